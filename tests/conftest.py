"""One Spark session for the whole test process: local, two cores, Delta, few shuffle partitions."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# What the person who runs the tests has set up for Spark, MLflow or a cloud is none of the tests' business.
FOREIGN_NAMES = ("JAVA_TOOL_OPTIONS", "MASTER", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONWARNINGS")
FOREIGN = ("AWS_", "AZURE_", "BP_SPARK_", "DATABRICKS_", "GOOGLE_", "HADOOP_", "MLFLOW_", "PYSPARK_", "SPARK_")
for name in os.environ:
    if name.startswith(FOREIGN) or name in FOREIGN_NAMES:
        del os.environ[name]
# Java reads the names of files by the locale: a checkout in a folder with an accent has to be found.
os.environ["LC_ALL"] = "C.UTF-8"
if "COVERAGE_PROCESS_START" in os.environ:
    os.environ["PYTHONPATH"] = str(Path(__file__).parent / "covered")

import hypothesis
import pytest
from pyspark.sql import SparkSession
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.session import MODEL_MODULES, get_session, is_connect
from bp_spark.lakehouse.store import Lakehouse
from tests.support.clusters import START_SETTINGS, TEST_SETTINGS
from tests.support.histories import SECRET

hypothesis.settings.register_profile("thorough", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# The code cache of C1 alone, 48 MB, is full within minutes of Spark, which then compiles the same again and again.
_JAVA = "-XX:ReservedCodeCacheSize=512m -XX:+UseSerialGC -XX:NewRatio=1"
# In a virtual machine a tenth of the time is page faults. Java warns, among a program's output, where Linux has no large pages.
_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
if _LARGE_PAGES.exists() and "[never]" not in _LARGE_PAGES.read_text(encoding="ascii"):
    _JAVA += " -XX:+UseTransparentHugePages"
# A job of a test ends before code that is compiled well would have paid for the compilation; the session of all tests does not.
os.environ.setdefault("JDK_JAVA_OPTIONS", f"{_JAVA} -XX:TieredStopAtLevel=1")
os.environ["BP_SPARK_SECRET"] = SECRET.value.decode()
# By its own limits, the second compiler takes a third of the time of toy nights. Methods that are called ten times as often are
# worth it.
_COMPILED_LATE = (
    "-XX:Tier4InvocationThreshold=60000 -XX:Tier4MinInvocationThreshold=15000 -XX:Tier4CompileThreshold=150000 "
    "-XX:Tier4BackEdgeThreshold=400000"
)
MOST_SECONDS = 60
_LOOP_SECONDS = 0.008
"""Seconds of :func:`_loop` on an idle machine of the kind that :data:`MOST_SECONDS` is of."""
SLOW = {
    "tests/faults/": "two nights of a platform, which all tests of faults share, and nights that are stopped and gone on with",
    "tests/training/test_pipeline.py": "all stages on real data, and six more trainings",
    "tests/test_cluster.py": "three jobs on a cluster of processes, each of which starts a driver and two executors",
    "tests/governance/test_erasure.py": "users forgotten and keys rotated in all tables, with every file read to prove it",
    "tests/test_bench.py": "five nights of two platforms, and the same features in DuckDB",
    "tests/test_connect.py": "two nights and a user forgotten, in Spark Connect and in a classic session",
    "tests/features/test_incremental.py": "four nights, a rebuild, and all of them at once",
    "tests/training/test_finetune.py": "two ranks, seven times",
    "tests/ingest/test_contacts.py": "two nights of contacts, one of them stopped, a rebuild and a replay",
    "tests/scoring/test_prospects.py": "a training and a night of buyers and prospects",
    "tests/ingest/test_deliveries.py": "nights of changed files and of a Delta table, and a rebuild after each",
    "tests/test_notebooks.py": "all notebooks, one after the other",
    "tests/test_fuzz.py": "ten thousand cases in make test-thorough",
    "tests/test_image.py": "the steps of the image, and a cluster started from it",
    "tests/test_package.py": "the demo, from the wheel",
}
"""What may take more than :data:`MOST_SECONDS` on an idle machine, and why; the longest first, for so they are run."""


class OneProcessAFile(LoadFileScheduling):
    """A file's tests stay in one process, and so do all tests of faults: their platform takes a minute to build.

    pytest-xdist 3.8 has groups for that, which pytest 9.2 doesn't see any more.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "tests/faults" if nodeid.startswith("tests/faults/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneProcessAFile:
    return OneProcessAFile(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: begun last, one of them would keep one process busy while the other waits.

    Tests with a Spark session are marked ``spark``, before any are chosen by their marks.
    """
    for item in items:
        if "spark" in getattr(item, "fixturenames", ()):
            item.add_marker("spark")
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def turn(item: pytest.Item) -> tuple[int, bool]:
        place = next((place for place, name in enumerate(SLOW) if item.nodeid.startswith(name)), len(SLOW))
        return place, item.path not in slow

    items.sort(key=turn)


def _loop() -> float:
    """Return the seconds of a fixed piece of work, the best of three."""

    def once() -> float:
        started, total = time.perf_counter(), 0
        for number in range(200_000):
            total += number
        return time.perf_counter() - started

    return min(once() for _ in range(3))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Fail a test that takes too long, or has too much set up, unless :data:`SLOW` says why it does."""
    report = yield
    if report.passed and report.duration > MOST_SECONDS and not item.nodeid.startswith(tuple(SLOW)):
        # on a machine that is slower or has more to do, all take longer
        limit = MOST_SECONDS * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)) * max(1.0, _loop() / _LOOP_SECONDS)
        if report.duration > limit:
            report.outcome = "failed"
            report.longrepr = (
                f"{item.nodeid}: {report.when} took {report.duration:.0f} s, more than {limit:.0f}: make it faster, or name "
                "it in SLOW of tests/conftest.py"
            )
    return report


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JDK_JAVA_OPTIONS", f"{_JAVA} {_COMPILED_LATE}")
        settings = (part for setting in START_SETTINGS.items() for part in ("--conf", "=".join(setting)))
        patched.setenv("PYSPARK_SUBMIT_ARGS", " ".join([*settings, "pyspark-shell"]))
        session = get_session(config.load(), "bp-spark tests", MODEL_MODULES)
    session.sparkContext.setLogLevel("OFF")  # of this JVM: Spark Connect has no call for it
    for key, value in TEST_SETTINGS.items():
        session.conf.set(key, value)
    yield session
    session.stop()


@pytest.fixture(scope="module", autouse=True)
def no_names_left() -> Iterator[None]:
    """Drop the names that a module's tests gave to tables: all modules share one session."""
    yield
    session = SparkSession.getActiveSession()
    if session is not None and not is_connect(session):
        for name in {found.name for found in session.catalog.listDatabases()} - {"default"}:
            session.sql(f"DROP SCHEMA `{name}` CASCADE")


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    """Defaults, with everything that is written under the test's own folder."""
    return config.load(
        overrides=[
            f"tables.path={tmp_path}/lakehouse",
            f"bundles={tmp_path}/bundles",
            f"training.work_dir={tmp_path}/work",
            f"tracking.uri=sqlite:///{tmp_path}/tracking/mlflow.db",
            f"tracking.artifacts={tmp_path}/tracking/artifacts",
        ]
    )


@pytest.fixture
def lakehouse(spark: SparkSession, settings: Config) -> Lakehouse:
    return Lakehouse(spark, settings.tables)
