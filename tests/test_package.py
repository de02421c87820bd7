"""The wheel: what is in it, and that it does its work in an environment and a folder that know nothing of the checkout."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pyspark
import pytest

from bp_spark import __version__, cli
from tests.support.clusters import ROOT, bare_environment
from tests.support.small_package import household_ids, small_settings, write_small_package

SITE = Path(pyspark.__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources: setuptools leaves files of its own beside them."""
    sources, folder = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    shutil.copytree(ROOT / "src", sources / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(sources)], check=True)
    (built,) = folder.iterdir()
    return built


def test_the_wheel_holds_settings_and_jobs_and_no_test(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for name in ("default.yaml", "demo.yaml", "log4j2.properties"):
            assert archive.read(f"bp_spark/conf/{name}") == (ROOT / "conf" / name).read_bytes()
    jobs = {path.name for path in (ROOT / "jobs").glob("*.py")}
    assert {name for name in names if name.startswith("bp_spark/jobs/")} == {
        f"bp_spark/jobs/{name}" for name in jobs | {"__init__.py"}
    }
    assert "bp_spark/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"bp_spark", f"bp_spark-{__version__}.dist-info"}


@pytest.mark.parametrize("job", sorted((ROOT / "jobs").glob("*.py")), ids=lambda job: job.stem)
def test_a_job_runs_its_module_of_the_package(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []
    monkeypatch.setattr(cli, "main", commands.append)
    runpy.run_path(str(job), run_name="__main__")
    assert commands == [job.stem]


@pytest.mark.integration
def test_the_demo_runs_from_the_wheel_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "environment"
    venv.create(home)
    python = str(home / "bin/python")
    # packages of this environment are seen, the checkout, which a .pth file of it names, is not
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, str(wheel)], check=True)
    site = next(home.glob("lib/*/site-packages"))
    (site / "others.pth").write_text(f"{SITE}\n")
    folder = tmp_path / "empty"
    folder.mkdir()

    def run(*command: str) -> str:
        environment = {
            **bare_environment(),
            "HOME": str(tmp_path),
            "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(tmp_path / "packages"),
            "BP_SPARK_DRIVER_MEMORY": "1g",
        }
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}"
        return done.stdout

    assert run(python, "-c", "import bp_spark; print(bp_spark.__file__)").startswith(str(site))
    assert run("bp-spark", "--version").strip() == __version__
    assert "--date" in run(python, "-m", "bp_spark.jobs.score", "--help")
    assert list(folder.iterdir()) == []

    write_small_package(tmp_path / "packages", household_ids()[::27])
    printed = run("bp-spark", "demo", *small_settings(tmp_path))
    assert "Ten of" in printed
    assert {path.name for path in folder.iterdir()} <= {"demo", "metastore_db", "derby.log", "spark-warehouse"}
    assert (folder / "demo/lakehouse/bp/scores_latest").is_dir()
