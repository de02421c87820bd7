"""Damaged or missing files, a full disk, a clock set back: an error that names the file, or a night made whole; never half."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from bp_spark import pipeline
from bp_spark.core.errors import DataError, PlatformError
from bp_spark.lakehouse import run as running
from tests.support.damage import with_rows_hidden, with_value_changed
from tests.support.harness import AS_OF, Scored, World, assert_same_tables, copied, forget_cached, tables
from tests.support.histories import clock_at


def _data(table: Path) -> Path:
    return Path(DeltaTable(str(table)).file_uris()[0])


def _log(table: Path) -> Path:
    return table / "_delta_log/00000000000000000001.json"


def _first_log(table: Path) -> Path:
    return table / "_delta_log/00000000000000000000.json"


def _cut(content: bytes) -> bytes | None:
    return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes | None:
    return with_value_changed(content, "tenure_days")


def _gone(content: bytes) -> bytes | None:
    return None


DAMAGE: dict[str, tuple[Callable[[Path], Path], Callable[[bytes], bytes | None]]] = {
    "parquet cut short": (_data, _cut),
    "parquet with a flipped bit": (_data, _flipped),
    "parquet with a flipped bit in its footer": (_data, with_rows_hidden),
    "parquet missing": (_data, _gone),
    "log cut short": (_log, _cut),
    "log entry missing": (_first_log, _gone),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_of_a_table_is_named_and_nothing_is_written(
    spark: SparkSession, unscored: Scored, what: str
) -> None:
    place, damage = DAMAGE[what]
    table = unscored.lakehouse / "bp/user_features"
    # an object store keeps none of Hadoop's checksums beside a file
    for checksum in [*table.rglob(".*.crc")]:
        checksum.unlink()
    path = place(table)
    whole = path.read_bytes()
    damaged = damage(whole)
    path.unlink() if damaged is None else path.write_bytes(damaged)
    forget_cached(spark)
    with pytest.raises(DataError, match=re.escape(path.name)):
        unscored.score(spark)
    path.write_bytes(whole)
    forget_cached(spark)
    scores = unscored.lakehouse / "bp/scores"
    assert not scores.exists() or spark.read.format("delta").load(str(scores)).isEmpty()


def test_a_footer_of_user_days_that_hides_rows_is_named_and_no_features_are_written(
    spark: SparkSession, world: World, tmp_path: Path
) -> None:
    lakehouse = copied(spark, world.whole, tmp_path / "lakehouse")
    table = lakehouse / "bp/user_daily"
    for checksum in [*table.rglob(".*.crc")]:
        checksum.unlink()
    files = map(Path, DeltaTable(str(table)).file_uris())
    path = next(path for path in files if 1 < pq.read_metadata(path).num_rows < 64)
    path.write_bytes(with_rows_hidden(path.read_bytes()))
    features = DeltaTable(str(lakehouse / "bp/user_features")).version()
    with pytest.raises(DataError, match=re.escape(path.name)):
        pipeline.featurize(spark, world.platform.config(lakehouse), [AS_OF - timedelta(days=1)])
    assert DeltaTable(str(lakehouse / "bp/user_features")).version() == features


def test_after_a_restored_file_the_night_is_that_of_an_undisturbed_run(spark: SparkSession, unscored: Scored) -> None:
    path = _data(unscored.lakehouse / "bp/user_features")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(DataError):
        unscored.score(spark)
    path.write_bytes(whole)
    unscored.score(spark)
    assert_same_tables(unscored.lakehouse, unscored.undisturbed)


def test_events_whose_newest_log_entry_is_lost_are_cleaned_again(
    spark: SparkSession, world: World, tmp_path: Path
) -> None:
    lakehouse = copied(spark, world.whole, tmp_path / "lakehouse")
    log = sorted((lakehouse / "bp/events/_delta_log").glob("*.json"))[-1]
    for path in log.parent.glob(f"*{log.stem}*"):
        path.unlink()
    forget_cached(spark)
    world.platform.featurize(spark, lakehouse)
    assert_same_tables(lakehouse, world.undisturbed)


@contextmanager
def full_disk(spark: SparkSession) -> Iterator[None]:
    """No file of this session can grow: what a write meets on a full disk or at the end of a quota."""
    # it is the JVM whose files must not grow
    jvm = psutil.Process(int(spark._jvm.java.lang.ProcessHandle.current().pid()))
    before = jvm.rlimit(psutil.RLIMIT_FSIZE)
    jvm.rlimit(psutil.RLIMIT_FSIZE, (512, before[1]))
    try:
        yield
    finally:
        jvm.rlimit(psutil.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_with_the_table_and_the_remedy(spark: SparkSession, unscored: Scored) -> None:
    with full_disk(spark), pytest.raises(PlatformError, match=r"no space left on a disk.*make room and run again"):
        unscored.score(spark)
    assert "scores" not in tables(unscored.lakehouse / "bp") or not tables(unscored.lakehouse / "bp")["scores"].count
    unscored.score(spark)
    assert_same_tables(unscored.lakehouse, unscored.undisturbed)


def test_a_clock_set_back_does_not_make_an_older_run_the_newest(
    spark: SparkSession, unscored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unscored.score(spark).written

    with monkeypatch.context() as patch:
        patch.setattr(running, "datetime", clock_at(datetime(2001, 1, 1, tzinfo=UTC)))
        assert unscored.score(spark, unscored.other).written
    # by the clocks the first run is the newest, by the table the second is
    assert unscored.score(spark).written
    assert_same_tables(unscored.lakehouse, unscored.undisturbed)
    assert not unscored.score(spark).written
