"""The command and the jobs as a shell sees them: output, messages, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bp_spark import __version__, pipeline
from bp_spark.cli import app, common, render
from bp_spark.core import extras
from bp_spark.core.config import Config
from bp_spark.core.errors import BpSparkError, DataError, PlatformError
from tests.support.clusters import bare_environment

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**bare_environment(), "PATH": f"{BIN}:{os.environ['PATH']}"} | variables
    return subprocess.run(arguments, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.mark.parametrize(
    "command",
    [
        "check",
        "featurize",
        "adapt-language",
        "train",
        "backtest",
        "search",
        "score",
        "select-labels",
        "add-labels",
        "profile",
        "drift",
        "fairness",
        "report",
        "explain-run",
        "explain-score",
        "reproduce",
        "publish",
        "sql",
        "quarantine",
        "generate",
        "forget",
        "rotate-keys",
        "retain",
        "features",
        "dbt-sources",
        "doctor",
        "demo",
        "experiment size",
        "experiment assign",
        "experiment read",
        "experiment uplift",
        "campaign-effect",
    ],
)
def test_help_teaches_each_command(command: str) -> None:
    result = CliRunner().invoke(app.app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "KEY=VALUE" in result.output


def test_the_shell_completes_commands_and_options() -> None:
    def completed(words: str, position: int) -> list[str]:
        variables = {"_BP_SPARK_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
        return run("bp-spark", **variables).stdout.split()

    assert completed("bp-spark fea", 1) == ["featurize", "features"]
    assert completed("bp-spark score --da", 2) == ["--date"]


def test_the_version_and_the_settings_are_printed() -> None:
    assert CliRunner().invoke(app.app, ["--version"]).output == f"{__version__}\n"
    printed = CliRunner().invoke(app.app, ["settings"]).output
    assert printed == (ROOT / "conf/default.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(("extra", "command"), [("spark", ["score", "--date", "2017-10-03"]), ("train", ["train"])])
def test_a_command_without_its_extra_ends_with_the_name_of_the_extra(
    extra: str, command: list[str], tmp_path: Path
) -> None:
    hidden = f"import sys; sys.modules.update(dict.fromkeys({extras.EXTRAS[extra]}))"
    # the command must name the missing extra before it asks for a session
    code = f"{hidden}\nfrom bp_spark.cli import app, common\ncommon.start_session = lambda *_: None\napp.main()"
    result = run(sys.executable, "-c", code, *command, cwd=tmp_path)
    assert result.returncode == PlatformError.exit_code
    assert result.stderr.strip().splitlines()[-1].endswith(f"which is not installed: pip install 'bp-spark[{extra}]'")
    assert "Traceback" not in result.stderr


def test_the_command_and_the_package_load_neither_spark_nor_torch() -> None:
    code = "import sys, bp_spark, bp_spark.cli; print([m for m in ('pyspark', 'torch', 'pandas') if m in sys.modules])"
    assert run(sys.executable, "-c", code).stdout == "[]\n"


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


def test_an_error_is_one_object_where_lines_are_asked_for_as_json() -> None:
    result = run("bp-spark", "--log-format", "json", "score", "--date", "2017-13-01")
    line = json.loads(result.stderr)
    assert (line["level"], line["error"], line["exit_code"]) == ("error", "ConfigError", result.returncode)
    assert "2017-13-01" in line["message"]


@pytest.mark.parametrize("error", [*BpSparkError.__subclasses__(), ZeroDivisionError], ids=lambda error: error.__name__)
def test_a_job_ends_with_the_exit_code_that_the_documentation_gives_its_error(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("table", "rule") if error is DataError else error("rule")

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(SystemExit) as ended:
        app.main("score", [])
    table = re.findall(r"^\| (\d) \| .+ \| (?:`(\w+)`)? *\|$", (ROOT / "docs/ops.md").read_text(encoding="utf-8"), re.M)
    assert (str(ended.value.code), error.__name__ if issubclass(error, BpSparkError) else "") in table
    assert len(table) == len({code for code, _ in table}) == len(BpSparkError.__subclasses__()) + 2


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["without", "with"])
def test_a_file_of_ids_is_read_with_or_without_a_byte_order_mark(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[str] = []
    monkeypatch.setattr(common, "start_session", lambda *_: None)
    monkeypatch.setattr(pipeline, "forget", lambda spark, settings, ids: forgotten.extend(ids) or [])
    (tmp_path / "gone.txt").write_bytes(f"{start}u1\r\nline\u2028separator\r\n".encode())
    assert CliRunner().invoke(app.app, ["forget", "--file", str(tmp_path / "gone.txt")]).exit_code == 0
    assert [user_id for user_id in forgotten if user_id] == ["u1", "line\u2028separator"]


@pytest.mark.parametrize("options", [[], ["--strict"]])
def test_featurize_is_strict_where_it_is_asked_to_be(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    strict: list[bool] = []
    monkeypatch.setattr(common, "start_session", lambda *_: None)
    monkeypatch.setattr(pipeline, "featurize", lambda *arguments: strict.append(arguments[-1]) or [])
    assert CliRunner().invoke(app.app, ["featurize", "--as-of", "2024-10-01", *options]).exit_code == 0
    assert strict == [bool(options)]


def test_train_starts_from_the_bundle_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str | None] = []

    def train(spark: object, settings: Config, day: date | None) -> None:
        started.append(settings.training.from_bundle)
        raise DataError("events", "enough of this test")

    monkeypatch.setattr(common, "start_session", lambda *_: None)
    monkeypatch.setattr(pipeline, "train", train)
    for address in ("models:/power@champion", "../shop: 2/bundles/20171003", "20171003"):
        CliRunner().invoke(app.app, ["train", "--from-bundle", address])
        assert started[-1] == address
    CliRunner().invoke(app.app, ["train"])
    assert started[-1] is None
    # an empty name is no name of the promoted bundle
    refused = CliRunner().invoke(app.app, ["train", "--from-bundle", ""])
    assert "training.from_bundle" in str(refused.exception)
    assert len(started) == 4


def test_what_people_typed_is_shown_as_it_is_and_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    typed = [
        "[red]x[/red]",
        "[/]",
        ":smile:",
        "\x1b[31mred\x1b]0;title\x07",
        "a\u202eb",
        {"k\x9b": ["[b]"]},
        "小明 naïve",
    ]
    render.show(render.rows_table([f"c{number}[/]" for number in range(len(typed))], [typed]))
    printed = capsys.readouterr().out
    for text in (
        "[red]x[/red]",
        "[/]",
        ":smile:",
        r"\x1b[31mred\x1b]0;title\x07",
        r"a\u202eb",
        r"k\x9b: [b]",
        "小明 naïve",
    ):
        assert f" {text} " in printed
    assert "c1[/]" in printed
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", printed)


@pytest.mark.slow
def test_a_job_under_spark_submit_ends_with_the_error_and_its_exit_code(tmp_path: Path) -> None:
    settings = [f"tables.path={tmp_path}/lakehouse", f"bundles={tmp_path}/bundles"]
    job = [str(ROOT / "jobs/score.py"), "--date", "2017-10-03", *settings]
    result = run("spark-submit", *job, BP_SPARK_LOG_FORMAT="json")
    assert result.returncode == 4
    (error,) = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    assert (error["error"], error["exit_code"]) == ("BundleError", 4)
    assert "no bundle is promoted yet" in error["message"]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "lakehouse/bp/scores").exists()


@pytest.mark.slow
def test_a_spark_without_delta_ends_with_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "spark-defaults.conf").write_text("")
    job = [str(ROOT / "jobs/score.py"), "--date", "2017-10-03"]
    result = run("spark-submit", *job, cwd=tmp_path, SPARK_CONF_DIR=str(tmp_path))
    assert result.returncode == 5
    assert "no Delta Lake" in result.stderr


def test_the_page_of_features_is_the_catalogue() -> None:
    assert run("bp-spark", "features").stdout == (ROOT / "docs/features.md").read_text(encoding="utf-8")


def test_a_traceback_holds_no_value_that_spark_quotes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pyspark.errors import AnalysisException, NumberFormatException

    words = "[CAST_INVALID_INPUT] The value 'anna@example.com' of the type \"STRING\" cannot be cast"
    for error, stays in ((NumberFormatException(words), False), (AnalysisException("no column paid"), True)):
        with pytest.raises(SystemExit), caplog.at_level("ERROR"):
            app._fail(error)
        assert ("no column paid" in caplog.text) is stays
    assert "NumberFormatException" in caplog.text
    assert "anna" not in caplog.text
