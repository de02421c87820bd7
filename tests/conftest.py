"""One Spark session for the whole test process: local, two cores, Delta, few shuffle partitions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from pyspark.sql import SparkSession
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from bp_spark import config
from bp_spark.config import Config
from bp_spark.session import MODEL_MODULES, get_session
from bp_spark.tables import Lakehouse
from clusters import UNCOMPILED
from histories import SECRET

hypothesis.settings.register_profile("thorough", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# The code cache of C1 alone, 48 MB, is full within minutes of Spark, which then compiles the same again and again.
_JAVA = "-XX:ReservedCodeCacheSize=512m -XX:+UseSerialGC -XX:NewRatio=1"
# A job of a test ends before code that is compiled well would have paid for the compilation; the session of all tests does not.
os.environ.setdefault("JDK_JAVA_OPTIONS", f"{_JAVA} -XX:TieredStopAtLevel=1")
os.environ["BP_SPARK_SECRET"] = SECRET.value.decode()
TEST_SETTINGS = {
    "spark.sql.shuffle.partitions": "2",
    **UNCOMPILED,
    "spark.databricks.delta.snapshotPartitions": "1",
    # plans as text are for the web interface, which nobody looks at
    "spark.sql.ui.explainMode": "simple",
    "spark.sql.maxPlanStringLength": "0",
}


class OneProcessAFile(LoadFileScheduling):
    """A file's tests stay in one process, and so do all tests of faults: their platform takes a minute to build.

    pytest-xdist 3.8 has groups for that, which pytest 9.2 doesn't see any more.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "tests/faults" if nodeid.startswith("tests/faults/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneProcessAFile:
    return OneProcessAFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with heavy tests first: begun last, one of them would keep one process busy while the other waits."""
    heavy = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in heavy)


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JDK_JAVA_OPTIONS", _JAVA)
        session = get_session(config.load(), "bp-spark tests", MODEL_MODULES)
    session.sparkContext.setLogLevel("OFF")
    for key, value in TEST_SETTINGS.items():
        session.conf.set(key, value)
    yield session
    session.stop()


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
