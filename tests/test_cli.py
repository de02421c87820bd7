"""The command and the jobs as a shell sees them: output, messages, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "SPARK_CONF_DIR": str(ROOT / "conf")}
    return subprocess.run(arguments, capture_output=True, text=True, cwd=cwd, env=environment, timeout=600, check=False)


@pytest.mark.parametrize(
    "command",
    [
        "featurize",
        "adapt-language",
        "train",
        "backtest",
        "search",
        "score",
        "publish",
        "sql",
        "quarantine",
        "generate",
        "features",
        "demo",
    ],
)
def test_help_teaches_each_command(command: str) -> None:
    result = run("bp-spark", command, "--help")
    assert result.returncode == 0
    assert "KEY=VALUE" in result.stdout


def test_an_unknown_key_is_one_clear_error() -> None:
    result = run("bp-spark", "score", "--date", "2017-10-03", "scoring.batch_m=7")
    assert result.returncode == 2
    assert (
        result.stderr.strip().splitlines()[-1].endswith("unknown key scoring.batch_m; did you mean scoring.batch_mb?")
    )
    assert "Traceback" not in result.stderr


def test_a_date_that_is_none_is_one_clear_error() -> None:
    result = run("bp-spark", "featurize", "--as-of", "2017-13-01")
    assert result.returncode == 2
    assert "2017-13-01" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_synthetic_platform_that_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    result = run(
        "bp-spark", "generate", str(tmp_path / "platform"), "synthetic.malformed_rate=0.9", "synthetic.late_rate=0.2"
    )
    assert result.returncode == 2
    assert "must be less than 1 together" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "platform").exists()


def test_dates_and_a_number_of_them_are_one_too_many() -> None:
    result = run("bp-spark", "backtest", "--test-date", "2017-10-03", "--folds", "3")
    assert result.returncode == 2
    assert "not both" in result.stderr


def test_a_missing_option_is_a_usage_error() -> None:
    result = run("bp-spark", "score")
    assert result.returncode == 2
    assert "--date" in result.stderr


def test_a_job_under_spark_submit_ends_with_the_error_and_its_exit_code(tmp_path: Path) -> None:
    settings = [f"tables.path={tmp_path}/lakehouse", f"bundles={tmp_path}/bundles"]
    result = run("spark-submit", str(ROOT / "jobs/score.py"), "--date", "2017-10-03", *settings)
    assert result.returncode == 4
    assert "error: " in result.stderr
    assert "no bundle is promoted yet" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "lakehouse/bp/scores").exists()


def test_a_spark_without_delta_is_told_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "spark-defaults.conf").write_text("")
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "SPARK_CONF_DIR": str(tmp_path)}
    environment["PYSPARK_PYTHON"] = sys.executable
    result = subprocess.run(
        ["spark-submit", str(ROOT / "jobs/score.py"), "--date", "2017-10-03"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
        check=False,
    )
    assert result.returncode == 5
    assert "no Delta Lake" in result.stderr


def test_the_page_of_features_is_the_catalogue() -> None:
    assert run("bp-spark", "features").stdout == (ROOT / "docs/features.md").read_text(encoding="utf-8")
