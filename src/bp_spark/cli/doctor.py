"""Check whether a machine is fit for a night: settings in, findings out, each with its remedy.

Checks that need no Spark come first. Then a session starts, asks its Python workers for their versions, and writes, reads and
removes a Delta table where the tables belong. Nothing else is written, and no secret is shown.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyspark
from packaging.requirements import Requirement
from pyspark.sql import DataFrame, SparkSession

from bp_spark.core import session
from bp_spark.core.config import Config
from bp_spark.core.errors import BpSparkError
from bp_spark.core.spark_errors import translate
from bp_spark.core.stores import UNREACHABLE, remove_folder
from bp_spark.core.version import __version__
from bp_spark.ingest import pseudonyms, texts
from bp_spark.registry import signing

PACKAGE = "bp-spark"
EXTRAS = ("spark", "train", "duckdb", "market", "demo")
"""Extras whose packages are checked; ``dev`` is left to developers."""
PYTHONS = ((3, 11), (3, 13))
"""The oldest and the newest Python that the lock files are resolved for."""
BESIDE_HEAP = 2 * 2**30
"""Bytes beside the heap: Spark's own memory, and what the Python workers of a machine share (docs/capacity.md)."""
FREE_DISK = 2**30
"""Free bytes of a disk below which a folder is a warning."""
TRIAL_ROWS = 3
"""Rows of the Delta table that is written, read and removed."""
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_UNITS = {"": 2**20, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_IVY_JARS = ".ivy2.5.2/jars"

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        check: Name of the check.
        status: ``ok``; ``warn``: some commands or a night's speed suffer; ``fail``: a night can't run.
        detail: State of the machine in words; never a secret.
        remedy: What to do about it; empty where nothing is to be done.
    """

    check: str
    status: Status
    detail: str
    remedy: str = ""


def examine(config: Config, start: Callable[[], SparkSession]) -> Iterator[Finding]:
    """Yield all findings, one after the other; those of the session come last.

    Args:
        config: Settings of the night.
        start: Starts the session to try; see :func:`bp_spark.core.session.get_session`.
    """
    for check in (java, python, pins, worker_python, delta_jars, secret, signing_key, language_model):
        yield check(config)
    if not _submitted():
        yield memory(session.driver_memory())
    yield from folders(config)
    with ThreadPoolExecutor(1) as pool:
        # torch is imported while Java starts: each takes seconds
        torch_finding = pool.submit(torch_devices, config)
        session_findings = list(in_session(config, start))
        yield torch_finding.result()
        yield from session_findings


def java(_: Config) -> Finding:
    """Check for a Java that Spark runs on, with the vector module that MLlib computes fastest with."""
    try:
        home = session.installed_java()
    except BpSparkError as error:
        return Finding("Java", "fail", str(error), "install a JDK 17 and set JAVA_HOME")
    detail = f"{session.java_version(home)} in {home}"
    if session.has_vector_module(home):
        return Finding("Java", "ok", detail)
    return Finding(
        "Java", "warn", f"{detail}, without {session.VECTOR_MODULE}", "install a whole JDK 17: training is faster"
    )


def python(_: Config) -> Finding:
    """Check for a Python that the lock files are resolved for."""
    detail = f"{sys.version.split()[0]} in {sys.executable}"
    oldest, newest = PYTHONS
    if oldest <= sys.version_info[:2] <= newest:
        return Finding("Python", "ok", detail)
    return Finding("Python", _status_of_mismatch(), detail, "install with Python 3.11, 3.12 or 3.13")


def pins(_: Config) -> Finding:
    """Compare the installed packages with the requirements of this package (``pyproject.toml``).

    An extra is checked if at least one of its packages is installed.
    """
    try:
        requirements = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", "fail", f"{PACKAGE} is not installed", "make install")
    by_extra = {extra: _required_by(extra, requirements) for extra in ("", *EXTRAS)}
    absent_extras = [extra for extra in EXTRAS if not any(map(_installed_version, by_extra[extra]))]
    needed = [package for extra, packages in by_extra.items() if extra not in absent_extras for package in packages]
    mismatches = []
    for package in needed:
        version = _installed_version(package)
        if version is None:
            mismatches.append(f"{package.name} is missing")
        elif not package.specifier.contains(version, prereleases=True):
            mismatches.append(f"{package.name} {version} is not {package.specifier}")
    if mismatches:
        return Finding(
            "packages", _status_of_mismatch(), "; ".join(mismatches), "make install, or pip install 'bp-spark[demo]'"
        )
    plural = "s" if len(absent_extras) > 1 else ""
    without = f"; without the extra{plural} {', '.join(absent_extras)}" if absent_extras else ""
    detail = f"all {len(needed)} that {PACKAGE} {__version__} asks for, as it asks{without}"
    return Finding("packages", "ok", detail)


def _required_by(extra: str, requirements: Iterable[str]) -> list[Requirement]:
    """Return the packages that only this extra brings; for ``""``, those of every installation."""
    no_extra, with_extra = {"extra": ""}, {"extra": extra}
    packages = [package for package in map(Requirement, requirements) if package.name != PACKAGE]
    if not extra:
        return [package for package in packages if package.marker is None or package.marker.evaluate(no_extra)]
    return [
        package
        for package in packages
        if package.marker and package.marker.evaluate(with_extra) and not package.marker.evaluate(no_extra)
    ]


def _installed_version(package: Requirement) -> str | None:
    """Return the version of a package, or ``None`` if it is not installed."""
    try:
        return importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        return None


def worker_python(_: Config) -> Finding:
    """Check that Spark's workers run the same Python version as this process, with the package."""
    interpreter = os.environ.get("PYSPARK_PYTHON")
    if interpreter is None:
        return Finding(
            "PYSPARK_PYTHON", "ok", "not set: local sessions take this Python, spark-submit asks conf/spark-env.sh"
        )
    remedy = f"export PYSPARK_PYTHON={sys.executable}, or unset it"
    code = f"import sys, {PACKAGE.replace('-', '_')}; print('%d.%d' % sys.version_info[:2])"
    try:
        process = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("PYSPARK_PYTHON", "fail", f"{interpreter} does not run ({error})", remedy)
    if process.returncode:
        return Finding("PYSPARK_PYTHON", "fail", f"{interpreter} has no package {PACKAGE}", remedy)
    worker_version, own_version = process.stdout.strip(), f"{sys.version_info[0]}.{sys.version_info[1]}"
    if worker_version != own_version:
        detail = f"{interpreter} is {worker_version}, this Python is {own_version}"
        return Finding("PYSPARK_PYTHON", "fail", detail, remedy)
    return Finding("PYSPARK_PYTHON", "ok", interpreter)


def memory(heap_size: str) -> Finding:
    """Compare the driver's heap with the memory of this machine or container.

    Args:
        heap_size: A size as Spark writes it, as ``4g``.
    """
    heap, available = memory_bytes(heap_size), machine_memory()
    setting = "--driver-memory of spark-submit" if _submitted() else "BP_SPARK_DRIVER_MEMORY"
    if heap is None:
        return Finding(
            "memory", "fail", f"a driver heap of {heap_size!r} is no size", f"write {setting} as 4g or 4096m"
        )
    detail = f"driver heap {heap_size} of {available / 2**30:.1f} GiB"
    smaller = f"{setting}: {max(1, (available - BESIDE_HEAP) // 2**30)}g"
    if heap > available:
        return Finding("memory", "fail", detail, smaller)
    if heap + BESIDE_HEAP > available:
        return Finding("memory", "warn", f"{detail}: little is left for Python workers", smaller)
    return Finding("memory", "ok", detail)


def memory_bytes(size: str) -> int | None:
    """Return the bytes of a size as Spark writes it, or ``None`` if the text is no size.

    A number without a unit counts MiB.

    >>> memory_bytes("4g"), memory_bytes("512m"), memory_bytes("many")
    (4294967296, 536870912, None)
    """
    match = re.fullmatch(r"(\d+)([kmgt]?)b?", size.strip().lower())
    return int(match[1]) * _UNITS[match[2]] if match else None


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of its container where that has less."""
    bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in map(Path, _CGROUP_LIMITS):
        if limit.exists() and (container_bytes := limit.read_text().strip()).isdigit():
            bounds.append(int(container_bytes))
    return min(bounds)


def delta_jars(_: Config) -> Finding:
    """Check whether Delta's jars are on this machine; otherwise the first session fetches them."""
    if _on_databricks():
        return Finding("Delta jars", "ok", "the runtime's own")
    try:
        wanted = session.delta_package().rpartition(":")[2]
    except BpSparkError as error:
        return Finding("Delta jars", "fail", str(error))
    installed = _installed_version(Requirement("delta-spark"))
    if installed not in (None, wanted):
        detail = f"the package delta-spark is {installed}, Spark {pyspark.__version__} goes with {wanted}"
        return Finding("Delta jars", "fail", detail, f"pip install delta-spark=={wanted}")
    for folder in (session.spark_jars(), Path.home() / _IVY_JARS):
        if session.has_delta_jars(folder):
            return Finding("Delta jars", "ok", f"{session.delta_package()} in {folder}")
    return Finding(
        "Delta jars",
        "warn",
        f"{session.delta_package()} is not on this machine: the first session fetches it from Maven",
        f"without the internet: docker/build.sh jars, or copy the jars to {session.spark_jars()}",
    )


def secret(config: Config) -> Finding:
    """Check the secret of user keys; only its length and address are shown."""
    address = config.privacy.secret
    try:
        user_secret = pseudonyms.load_secret(address)
    except BpSparkError as error:
        is_set = address.startswith("env:") and os.environ.get(address.removeprefix("env:"))
        remedy = "needed to featurize, forget and rotate keys, not to train or score"
        return Finding("secret", "fail" if is_set else "warn", str(error), remedy)
    return Finding("secret", "ok", f"{len(user_secret.value)} bytes at {address}")


def signing_key(config: Config) -> Finding:
    """Check the keys that sign and verify bundles, where any are set."""
    try:
        keys = [signing.private_key(config.signing), signing.public_key(config.signing)]
    except BpSparkError as error:
        return Finding("signing", "fail", str(error), "correct signing.private_key and signing.public_key")
    kinds = [kind for kind, key in zip(("private", "public"), keys, strict=True) if key is not None]
    return Finding("signing", "ok", f"{' and '.join(kinds)} key" if kinds else "no key set: bundles need no signature")


def language_model(config: Config) -> Finding:
    """Check that the language model that reads texts is on this machine."""
    try:
        folder = texts.model_folder(config.texts.model)
    except BpSparkError as error:
        return Finding("language model", "fail", str(error), "make install, or set texts.model to a folder")
    if Path(folder).is_dir():
        return Finding("language model", "ok", folder)
    return Finding("language model", "warn", f"{folder} is a hub's name: it is fetched, as it is then", "name a folder")


def torch_devices(config: Config) -> Finding:
    """Check that torch can be imported, and that there are enough GPUs for the ranks, if any."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("torch", "fail", f"can't be imported: {error}", "make install")
    gpus, ranks = torch.cuda.device_count(), config.training.processes
    detail = f"{torch.__version__}, {torch.get_num_threads()} threads, {gpus or 'no'} GPU{'s' if gpus > 1 else ''}"
    if 0 < gpus < ranks and config.training.launcher == "driver":
        remedy = f"training.processes={gpus}: with fewer GPUs than ranks all compute on the CPU"
        return Finding("torch", "warn", f"{detail} for {ranks} ranks", remedy)
    return Finding("torch", "ok", detail)


def folders(config: Config) -> Iterator[Finding]:
    """Check write access to local folders and room on their disks.

    Folders in an object store are left to :func:`in_session`.
    """
    for name, folder in (
        ("tables.path", config.tables.path),
        ("bundles", config.bundles),
        ("training.work_dir", config.training.work_dir),
    ):
        if folder is None or "://" in folder:
            continue
        existing = _nearest(Path(folder))
        try:
            with tempfile.TemporaryFile(dir=existing):
                free = shutil.disk_usage(existing).free
        except OSError as error:
            remedy = f"give the jobs' user write access, or set {name}"
            yield Finding(name, "fail", f"{existing} can't be written ({error.strerror})", remedy)
            continue
        status: Status = "ok" if free > FREE_DISK else "warn"
        remedy = "" if status == "ok" else "make room"
        yield Finding(name, status, f"{Path(folder).absolute()}: {free / 2**30:,.1f} GiB free", remedy)


def in_session(config: Config, start: Callable[[], SparkSession]) -> Iterator[Finding]:
    """Check that a session starts, that its Python workers are fit, and that it can write a Delta table where tables belong."""
    try:
        spark = start()
    except Exception as error:
        yield Finding("session", "fail", _first_line(error), "see the checks above, and the lines of Spark before them")
        return
    yield Finding("session", "ok", f"Spark {spark.version} on {spark.conf.get('spark.master', '')}")
    if _submitted():
        yield memory(spark.conf.get("spark.driver.memory", "1g") or "1g")
    # each waits for processes and classes to be loaded more than it computes
    with ThreadPoolExecutor(2) as pool:
        checks = [
            pool.submit(_guarded, "Python workers", _workers, spark),
            pool.submit(_guarded, "Delta table", _round_trip, spark, config),
        ]
    yield from (check.result() for check in checks)


def _guarded(check: str, run_check: Callable[..., Finding], *arguments: Any) -> Finding:
    """Run a check, and make a finding of any error."""
    try:
        with translate():
            return run_check(*arguments)
    except Exception as error:
        return Finding(check, "fail", _first_line(error), "see the lines of Spark above")


def _workers(spark: SparkSession) -> Finding:
    """Compare the Python and the package of the executors with those of the driver, in as many tasks as run at once."""

    def versions(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            pass
        yield pa.RecordBatch.from_pylist([{"python": sys.version.split()[0], "package": __version__}])

    # Spark divides a range among as many tasks as it runs at once
    rows = spark.range(session.RANGE_ROWS).mapInArrow(versions, "python string, package string").collect()
    worker_versions = sorted({(row["python"], row["package"]) for row in rows})
    detail = "; ".join(f"Python {python}, {PACKAGE} {package}" for python, package in worker_versions)
    own_versions = (sys.version.split()[0], __version__)
    if worker_versions == [own_versions]:
        return Finding("Python workers", "ok", f"{detail}, {len(rows)} tasks at once")
    detail = f"{detail}; the driver has {', '.join(own_versions)}"
    return Finding("Python workers", "fail", detail, "the same environment everywhere")


def _round_trip(spark: SparkSession, config: Config) -> Finding:
    """Write a Delta table where tables belong, read it and remove it."""
    root = tempfile.gettempdir() if config.tables.path is None else config.tables.path
    if "://" not in root:
        root = str(_nearest(Path(root)))
    folder = f"{root.rstrip('/')}/.{PACKAGE}-doctor-{uuid.uuid4().hex}"
    try:
        spark.range(TRIAL_ROWS).write.format("delta").save(folder)
        rows: DataFrame = spark.read.format("delta").load(folder)
        count = rows.count()
    finally:
        # Where only Spark can sign in to the store, the rows stay.
        with suppress(*UNREACHABLE):
            remove_folder(folder)
    if count != TRIAL_ROWS:
        remedy = "all machines must see the same folder: a shared file system or an object store"
        return Finding("Delta table", "fail", f"{TRIAL_ROWS} rows written to {root}, {count} read", remedy)
    return Finding("Delta table", "ok", f"written, read and removed in {root}")


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    path = folder.absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.is_dir())


def _submitted() -> bool:
    """Return whether spark-submit started this process, and so chose the heap."""
    return "PYSPARK_GATEWAY_PORT" in os.environ


def _status_of_mismatch() -> Status:
    """Return the status of a version that differs: Databricks brings its own Python, Spark and Delta (conf/databricks)."""
    return "warn" if _on_databricks() else "fail"


def _on_databricks() -> bool:
    return "DATABRICKS_RUNTIME_VERSION" in os.environ


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
