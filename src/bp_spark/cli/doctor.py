"""Is this machine fit for a night? Settings in; findings out, each with its remedy.

What can be asked without Spark comes first; then a session is started, writes a Delta table where tables belong, reads it back
through a Python worker, and removes it. Nothing else is written, and no secret is shown.
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
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
EXTRAS = ("spark", "train", "demo")
"""Extras whose packages are held to what the package asks for; ``dev`` is the developers' own."""
PYTHONS = ((3, 11), (3, 13))
"""The oldest and the newest Python that the lock files are resolved for."""
# Beside the heap: Spark's own memory, and what one machine's Python workers share (docs/capacity.md).
BESIDE_HEAP = 2 * 2**30
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_UNITS = {"": 2**20, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_IVY_JARS = ".ivy2.5.2/jars"

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What a check came to.

    Attributes:
        check: what was looked at.
        status: ``ok``; ``warn``: some commands, or a night's speed, suffer; ``fail``: a night can't run.
        found: what is there, in words; never a secret.
        remedy: what to do about it, where something is to be done.
    """

    check: str
    status: Status
    found: str
    remedy: str = ""


def examine(config: Config, start: Callable[[], SparkSession]) -> Iterator[Finding]:
    """All findings, one after the other; those of the session last.

    Args:
        start: gives the session to try; see :func:`bp_spark.core.session.get_session`.
    """
    alone = (java, python, pins, worker_python, delta_jars, secret, signing_key, language_model, torch_devices)
    for check in alone:
        yield check(config)
    if not _submitted():
        yield memory(session.driver_memory())
    yield from folders(config)
    yield from in_session(config, start)


def java(_: Config) -> Finding:
    """A Java that Spark runs on, with the module that MLlib computes fastest with."""
    try:
        home = session.installed_java()
    except BpSparkError as error:
        return Finding("Java", "fail", str(error), "install a JDK 17 and set JAVA_HOME")
    found = f"{session.java_version(home)} in {home}"
    if session.has_vector_module(home):
        return Finding("Java", "ok", found)
    return Finding(
        "Java", "warn", f"{found}, without {session.VECTOR_MODULE}", "install a whole JDK 17: training is faster"
    )


def python(_: Config) -> Finding:
    """A Python that the pins are resolved for."""
    found = f"{sys.version.split()[0]} in {sys.executable}"
    oldest, newest = PYTHONS
    if oldest <= sys.version_info[:2] <= newest:
        return Finding("Python", "ok", found)
    return Finding("Python", _others_own(), found, "install with Python 3.11, 3.12 or 3.13")


def pins(_: Config) -> Finding:
    """Installed packages against what this package asks for (``pyproject.toml``).

    An extra counts as chosen where any of its packages is installed; of the others nothing is asked.
    """
    try:
        asked = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", "fail", f"{PACKAGE} is not installed", "make install")
    by_extra = {extra: _asked_by(extra, asked) for extra in ("", *EXTRAS)}
    left_out = [extra for extra in EXTRAS if not any(map(_installed, by_extra[extra]))]
    needed = [one for extra, packages in by_extra.items() if extra not in left_out for one in packages]
    wrong = []
    for one in needed:
        version = _installed(one)
        if version is None:
            wrong.append(f"{one.name} is missing")
        elif not one.specifier.contains(version, prereleases=True):
            wrong.append(f"{one.name} {version} is not {one.specifier}")
    if wrong:
        return Finding("packages", _others_own(), "; ".join(wrong), "make install, or pip install 'bp-spark[demo]'")
    without = f"; without the extra{'s' if len(left_out) > 1 else ''} {', '.join(left_out)}" if left_out else ""
    found = f"all {len(needed)} that {PACKAGE} {__version__} asks for, as it asks{without}"
    return Finding("packages", "ok", found)


def _asked_by(extra: str, requirements: Iterable[str]) -> list[Requirement]:
    """The packages that an extra brings, ``""`` for those of every installation; not the package itself."""
    every, chosen = {"extra": ""}, {"extra": extra}
    parsed = [one for one in map(Requirement, requirements) if one.name != PACKAGE]
    if not extra:
        return [one for one in parsed if one.marker is None or one.marker.evaluate(every)]
    return [one for one in parsed if one.marker and one.marker.evaluate(chosen) and not one.marker.evaluate(every)]


def _installed(package: Requirement) -> str | None:
    """Return the version of a package, or ``None`` if it is not installed."""
    try:
        return importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        return None


def worker_python(_: Config) -> Finding:
    """The Python of Spark's workers: the same as this one, with the package."""
    named = os.environ.get("PYSPARK_PYTHON")
    if named is None:
        return Finding(
            "PYSPARK_PYTHON", "ok", "not set: local sessions take this Python, spark-submit asks conf/spark-env.sh"
        )
    remedy = f"export PYSPARK_PYTHON={sys.executable}, or unset it"
    ask = f"import sys, {PACKAGE.replace('-', '_')}; print('%d.%d' % sys.version_info[:2])"
    try:
        told = subprocess.run([named, "-c", ask], capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("PYSPARK_PYTHON", "fail", f"{named} does not run ({error})", remedy)
    if told.returncode:
        return Finding("PYSPARK_PYTHON", "fail", f"{named} has no package {PACKAGE}", remedy)
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if told.stdout.strip() != own:
        return Finding("PYSPARK_PYTHON", "fail", f"{named} is {told.stdout.strip()}, this Python is {own}", remedy)
    return Finding("PYSPARK_PYTHON", "ok", named)


def memory(said: str) -> Finding:
    """The driver's heap, as Spark writes sizes, against the memory that this machine, or container, gives."""
    heap, there = memory_bytes(said), machine_memory()
    setting = "--driver-memory of spark-submit" if _submitted() else "BP_SPARK_DRIVER_MEMORY"
    if heap is None:
        return Finding("memory", "fail", f"a driver heap of {said!r} is no size", f"write {setting} as 4g or 4096m")
    found = f"driver heap {said} of {there / 2**30:.1f} GiB"
    smaller = f"{setting}: {max(1, (there - BESIDE_HEAP) // 2**30)}g"
    if heap > there:
        return Finding("memory", "fail", found, smaller)
    if heap + BESIDE_HEAP > there:
        return Finding("memory", "warn", f"{found}: little is left for Python workers", smaller)
    return Finding("memory", "ok", found)


def memory_bytes(said: str) -> int | None:
    """Bytes of a size as Spark writes it, without a unit MiB; ``None`` for what is no size.

    >>> memory_bytes("4g"), memory_bytes("512m"), memory_bytes("many")
    (4294967296, 536870912, None)
    """
    match = re.fullmatch(r"(\d+)([kmgt]?)b?", said.strip().lower())
    return int(match[1]) * _UNITS[match[2]] if match else None


def machine_memory() -> int:
    """Bytes of memory of this machine, or of its container where that has less."""
    bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in map(Path, _CGROUP_LIMITS):
        if limit.exists() and (said := limit.read_text().strip()).isdigit():
            bounds.append(int(said))
    return min(bounds)


def delta_jars(_: Config) -> Finding:
    """Delta's jars: on this machine, or to be fetched by the first session."""
    if _on_databricks():
        return Finding("Delta jars", "ok", "the runtime's own")
    try:
        wanted = session.delta_package().rpartition(":")[2]
    except BpSparkError as error:
        return Finding("Delta jars", "fail", str(error))
    installed = _installed(Requirement("delta-spark"))
    if installed not in (None, wanted):
        found = f"the package delta-spark is {installed}, Spark {pyspark.__version__} goes with {wanted}"
        return Finding("Delta jars", "fail", found, f"pip install delta-spark=={wanted}")
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
    """The secret of user keys; how long, never what."""
    address = config.privacy.secret
    try:
        found = pseudonyms.load_secret(address)
    except BpSparkError as error:
        there = address.startswith("env:") and os.environ.get(address.removeprefix("env:"))
        remedy = "needed to featurize, forget and rotate keys, not to train or score"
        return Finding("secret", "fail" if there else "warn", str(error), remedy)
    return Finding("secret", "ok", f"{len(found.value)} bytes at {address}")


def signing_key(config: Config) -> Finding:
    """The keys of bundles, where any are set."""
    try:
        keys = [signing.private_key(config.signing), signing.public_key(config.signing)]
    except BpSparkError as error:
        return Finding("signing", "fail", str(error), "correct signing.private_key and signing.public_key")
    kinds = [kind for kind, key in zip(("private", "public"), keys, strict=True) if key is not None]
    return Finding("signing", "ok", f"{' and '.join(kinds)} key" if kinds else "no key set: bundles need no signature")


def language_model(config: Config) -> Finding:
    """The model that reads texts, on this machine."""
    try:
        folder = texts.model_folder(config.texts.model)
    except BpSparkError as error:
        return Finding("language model", "fail", str(error), "make install, or set texts.model to a folder")
    if Path(folder).is_dir():
        return Finding("language model", "ok", folder)
    return Finding("language model", "warn", f"{folder} is a hub's name: it is fetched, as it is then", "name a folder")


def torch_devices(config: Config) -> Finding:
    """What torch computes on."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("torch", "fail", f"can't be imported: {error}", "make install")
    gpus, ranks = torch.cuda.device_count(), config.training.processes
    found = f"{torch.__version__}, {torch.get_num_threads()} threads, {gpus or 'no'} GPU{'s' if gpus > 1 else ''}"
    if 0 < gpus < ranks and config.training.launcher == "driver":
        remedy = f"training.processes={gpus}: with fewer GPUs than ranks all compute on the CPU"
        return Finding("torch", "warn", f"{found} for {ranks} ranks", remedy)
    return Finding("torch", "ok", found)


def folders(config: Config) -> Iterator[Finding]:
    """Write access to local folders, and room on their disks; one in an object store is tried by :func:`in_session`."""
    for name, folder in (
        ("tables.path", config.tables.path),
        ("bundles", config.bundles),
        ("training.work_dir", config.training.work_dir),
    ):
        if folder is None or "://" in folder:
            continue
        there = _nearest(Path(folder))
        try:
            with tempfile.TemporaryFile(dir=there):
                free = shutil.disk_usage(there).free
        except OSError as error:
            remedy = f"give the jobs' user write access, or set {name}"
            yield Finding(name, "fail", f"{there} can't be written ({error.strerror})", remedy)
            continue
        status: Status = "ok" if free > 2**30 else "warn"
        remedy = "" if status == "ok" else "make room"
        yield Finding(name, status, f"{Path(folder).absolute()}: {free / 2**30:,.1f} GiB free", remedy)


def in_session(config: Config, start: Callable[[], SparkSession]) -> Iterator[Finding]:
    """A session starts, its Python workers are fit, and a Delta table is written, read and removed where tables belong."""
    try:
        spark = start()
    except Exception as error:
        yield Finding("session", "fail", _first_line(error), "see the checks above, and the lines of Spark before them")
        return
    master = spark.conf.get("spark.master", "")
    yield Finding("session", "ok", f"Spark {spark.version} on {master}, {session.parallelism(spark)} tasks at once")
    if _submitted():
        yield memory(spark.conf.get("spark.driver.memory", "1g") or "1g")
    yield from (_guarded("Python workers", _workers, spark), _guarded("Delta table", _round_trip, spark, config))


def _guarded(check: str, of: Callable[..., Finding], *arguments: Any) -> Finding:
    try:
        with translate():
            return of(*arguments)
    except Exception as error:
        return Finding(check, "fail", _first_line(error), "see the lines of Spark above")


def _workers(spark: SparkSession) -> Finding:
    """Which Python and package the executors have."""
    tasks = session.parallelism(spark)

    def versions(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for _ in batches:
            yield pd.DataFrame({"python": [sys.version.split()[0]], "package": [__version__]})

    asked = spark.range(tasks, numPartitions=tasks).mapInPandas(versions, "python string, package string")
    found = sorted({(row["python"], row["package"]) for row in asked.collect()})
    said = "; ".join(f"Python {python}, {PACKAGE} {package}" for python, package in found)
    own = (sys.version.split()[0], __version__)
    if found == [own]:
        return Finding("Python workers", "ok", said)
    return Finding(
        "Python workers", "fail", f"{said}; the driver has {own[0]}, {own[1]}", "the same environment everywhere"
    )


def _round_trip(spark: SparkSession, config: Config) -> Finding:
    root = tempfile.gettempdir() if config.tables.path is None else config.tables.path
    if "://" not in root:
        root = str(_nearest(Path(root)))
    folder = f"{root.rstrip('/')}/.{PACKAGE}-doctor-{uuid.uuid4().hex}"
    try:
        spark.range(3).write.format("delta").save(folder)
        rows: DataFrame = spark.read.format("delta").load(folder)
        count = rows.count()
    finally:
        # where Spark alone can sign in to the store, the three rows stay
        with suppress(*UNREACHABLE):
            remove_folder(folder)
    if count != 3:
        remedy = "all machines must see the same folder: a shared file system or an object store"
        return Finding("Delta table", "fail", f"3 rows written to {root}, {count} read", remedy)
    return Finding("Delta table", "ok", f"written, read and removed in {root}")


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir())


def _submitted() -> bool:
    """Whether spark-submit started this process, and chose the heap."""
    return "PYSPARK_GATEWAY_PORT" in os.environ


def _others_own() -> Status:
    """Of what differs: Databricks brings its own Python, Spark and Delta (conf/databricks)."""
    return "warn" if _on_databricks() else "fail"


def _on_databricks() -> bool:
    return "DATABRICKS_RUNTIME_VERSION" in os.environ


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
