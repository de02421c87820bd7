"""The image without a container engine: its build steps in an empty folder, then a cluster through its own entrypoint.

What a lock file installs is tested with a package of one file; those of requirements.lock are linked from this environment,
which was installed from it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyspark
import pytest

from tests.support.clusters import BIN, ROOT, SHORT, UNCOMPILED, Cluster, bare_environment, free_ports

SITE = Path(pyspark.__file__).parents[1]
OWN = ("bp_spark", "__editable__")
SPARK = ".".join(pyspark.__version__.split(".")[:2])


def _locked() -> list[list[str]]:
    lines = (ROOT / "docker/jars.lock").read_text(encoding="utf-8").splitlines()
    return [line.split() for line in lines if not line.startswith("#")]


DELTA_JARS = tuple(Path(path).name for group, _, path in _locked() if group == f"delta-{SPARK}")

pytestmark = pytest.mark.integration


def step(name: str, prefix: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a build step with this Python."""
    environment = {**bare_environment(), "PYTHON": sys.executable} | variables
    environment.pop("PYTHONPATH", None)
    command = [str(ROOT / "docker/build.sh"), name, str(prefix)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def maven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Maven repository with the jars of Delta that this environment's Spark runs with."""
    repository = tmp_path_factory.mktemp("maven")
    for group, _, path in _locked():
        if group == f"delta-{SPARK}":
            (repository / path).parent.mkdir(parents=True)
            shutil.copy(SITE / "pyspark/jars" / Path(path).name, repository / path)
    return repository


def _wheel(folder: Path) -> str:
    """Make a package of one file; the SHA-256 of its wheel."""
    files = {
        "tiny.py": "",
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {name: hashlib.sha256(text.encode()).digest() for name, text in files.items()}
    lines = [
        f"{name},sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')},{len(files[name])}"
        for name, digest in digests.items()
    ]
    files["tiny-1.0.dist-info/RECORD"] = "\n".join([*lines, "tiny-1.0.dist-info/RECORD,,\n"])
    wheel = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def _install_as_here(prefix: Path) -> None:
    """What ``pip install -r requirements.lock`` would leave, as links to this environment; this project is not in the lock."""
    site = prefix / "venv/lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    for older in site.glob("setuptools-*"):
        shutil.rmtree(older)
    for entry in SITE.iterdir():
        if entry.name.startswith((*OWN, "pip")) or entry.name == "pyspark":
            continue
        there = site / entry.name
        if there.is_dir() and not there.is_symlink():
            shutil.rmtree(there)
        there.unlink(missing_ok=True)
        there.symlink_to(entry)
    # Spark's folder is written to: its jars and conf
    (site / "pyspark/jars").mkdir(parents=True)
    for entry in (SITE / "pyspark").iterdir():
        if entry.name not in ("jars", "conf"):
            (site / "pyspark" / entry.name).symlink_to(entry)
    for jar in (SITE / "pyspark/jars").iterdir():
        if jar.name in DELTA_JARS:
            continue
        (site / "pyspark/jars" / jar.name).symlink_to(jar)
    for script in ("spark-submit", "spark-class", "find-spark-home", "find_spark_home.py", "load-spark-env.sh"):
        (prefix / "venv/bin" / script).symlink_to(BIN / script)


@dataclass
class Image(Cluster):
    """A cluster whose processes are started as containers of the image are."""

    prefix: Path = Path()

    def master(self) -> list[str]:
        return [self.entrypoint, "master"]

    def worker(self, *arguments: str) -> list[str]:
        return [self.entrypoint, "worker", *arguments]

    def job(self, job: str, *arguments: str) -> list[str]:
        return [self.entrypoint, job, *arguments]

    @property
    def entrypoint(self) -> str:
        return str(self.prefix / "bin/entrypoint.sh")

    def environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.folder),
            "PATH": os.environ["PATH"],
            "TMPDIR": str(self.folder),
            "SPARK_LOCAL_HOSTNAME": "localhost",
            "BP_SPARK_MASTER": self.address,
            "BP_SPARK_PROPERTIES": str(self.folder / "spark.conf"),
            "BP_SPARK_CONFIG": str(self.folder / "night.yaml"),
            "BP_SPARK_SECRET": os.environ["BP_SPARK_SECRET"],
        }


def left_by_setuptools() -> dict[Path, int]:
    """Files that setuptools writes beside the sources where it builds in place, and when they were written."""
    patterns = ("build/lib*", "build/bdist*", "src/*.egg-info", "src/*.egg-info/*")
    return {path: path.stat().st_mtime_ns for pattern in patterns for path in ROOT.glob(pattern)}


@pytest.fixture(scope="module")
def checkout_before() -> dict[Path, int]:
    return left_by_setuptools()


@pytest.fixture(scope="module")
def prefix(checkout_before: dict[Path, int], maven: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the image has as /opt/bp-spark."""
    prefix = tmp_path_factory.mktemp("opt")
    wheels = tmp_path_factory.mktemp("wheels")
    lock = wheels / "requirements.lock"
    lock.write_text(f"tiny==1.0 --hash=sha256:{_wheel(wheels)}\n")
    steps = [step("environment", prefix, LOCK=str(lock), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))]
    assert next(prefix.glob("venv/lib/*/site-packages/tiny.py")).exists()
    _install_as_here(prefix)
    steps += [step("jars", prefix, JARS="delta", MAVEN=maven.as_uri())]
    steps += [step("configuration", prefix), step("package", prefix)]
    assert [done.stderr for done in steps if done.returncode] == []
    return prefix


@pytest.fixture(scope="module")
def image(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    folder = tmp_path_factory.mktemp("containers")
    (folder / "events").mkdir()
    memory = {"spark.driver.memory": "1g", "spark.executor.memory": "1g"}
    logged = {name: f"file:{folder}/events" for name in ("spark.eventLog.dir", "spark.history.fs.logDirectory")}
    settings = SHORT | UNCOMPILED | memory | logged | {"spark.eventLog.enabled": "true", "spark.history.ui.port": "0"}
    (folder / "spark.conf").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    (folder / "night.yaml").write_text(f"tables: {{path: {folder}/lakehouse}}\nbundles: {folder}/bundles\n")
    image = Image(folder, workers=1, prefix=prefix)
    try:
        image.start()
        yield image
    finally:
        image.stop()


def test_a_package_that_is_not_the_locked_one_is_refused(tmp_path: Path) -> None:
    _wheel(tmp_path)
    (tmp_path / "requirements.lock").write_text(f"tiny==1.0 --hash=sha256:{'0' * 64}\n")
    done = step(
        "environment",
        tmp_path / "opt",
        LOCK=str(tmp_path / "requirements.lock"),
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(tmp_path),
    )
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr


def test_a_jar_that_is_not_the_locked_one_is_refused(maven: Path, prefix: Path, tmp_path: Path) -> None:
    shutil.copytree(maven, tmp_path / "maven")
    changed = next((tmp_path / "maven").rglob("delta-storage-*.jar"))
    changed.write_bytes(changed.read_bytes() + b" ")
    before = sorted(jar.name for jar in _spark(prefix, "jars").iterdir())
    done = step("jars", prefix, JARS="delta", MAVEN=(tmp_path / "maven").as_uri())
    assert done.returncode != 0
    assert f"{changed.name}: has SHA-256" in done.stderr
    assert sorted(jar.name for jar in _spark(prefix, "jars").iterdir()) == before


def test_the_project_is_in_the_image_and_no_file_of_the_checkout_was_touched(
    prefix: Path, checkout_before: dict[Path, int]
) -> None:
    installed = next(prefix.glob("venv/lib/*/site-packages/bp_spark/cli/app.py"))
    assert installed.read_bytes() == (ROOT / "src/bp_spark/cli/app.py").read_bytes()
    assert not installed.is_symlink()
    assert left_by_setuptools() == checkout_before
    assert {path.name for path in (prefix / "jobs").iterdir()} == {path.name for path in (ROOT / "jobs").glob("*.py")}


def test_spark_of_the_image_has_its_jars_and_asks_no_repository(prefix: Path) -> None:
    assert {jar.name for jar in _spark(prefix, "jars").iterdir()} >= set(DELTA_JARS)
    settings = (_spark(prefix, "conf") / "spark-defaults.conf").read_text(encoding="utf-8")
    assert "DeltaSparkSessionExtension" in settings
    assert "spark.jars.packages" not in settings


def _spark(prefix: Path, folder: str) -> Path:
    return next(prefix.glob("venv/lib/*/site-packages/pyspark")) / folder


def test_the_cluster_of_the_image_is_fit_for_a_night_and_its_history_is_served(image: Image) -> None:
    result = image.submit("doctor")
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-6000:]}"
    assert " fail " not in result.stdout
    assert f"on {image.address}" in result.stdout
    assert "Delta table" in result.stdout
    assert "Ivy Default Cache" not in result.stderr
    assert [app["name"] for app in image.state()["completedapps"]] == ["bp-spark doctor"]
    assert list(image.folder.glob("lakehouse/**/*")) == []

    (port,) = free_ports(1)
    page = f"http://localhost:{port}/api/v1/applications"
    with (image.folder / "spark.conf").open("a") as settings:
        settings.write(f"spark.history.ui.port {port}\n")
    listed: list[dict] = []

    def is_listed() -> bool:
        with urllib.request.urlopen(page, timeout=10) as answer:
            listed.extend(json.load(answer))
        return bool(listed)

    image.daemon("history", image.entrypoint, "history")
    image.wait_for("the history server knows no application", is_listed)
    assert listed[0]["name"] == "bp-spark doctor"


def test_a_night_ends_with_the_exit_code_of_the_job_that_failed(image: Image) -> None:
    result = image.submit("night", "2024-10-01", "scoring.batch_m=7")
    assert result.returncode == 2
    assert "did you mean scoring.batch_mb" in result.stderr


def test_a_part_of_the_cluster_is_well_as_long_as_its_page_answers(image: Image) -> None:
    (port,) = free_ports(1)
    page = image.folder / "bp-spark-page"

    def health(address: str) -> int:
        page.write_text(address)
        asked = [image.entrypoint, "health"]
        return subprocess.run(asked, env=image.environment(), capture_output=True, check=False).returncode

    assert health(image.page) == 0
    assert health(f"http://localhost:{port}/") != 0
    page.unlink()
    assert subprocess.run([image.entrypoint, "health"], env=image.environment(), check=False).returncode == 0
