"""The loader reads what the Delta log says, each row once, whatever the number of ranks."""

from __future__ import annotations

import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, WriterProperties, write_deltalake
from pyspark.sql import SparkSession

from bp_spark.core.errors import DataError
from bp_spark.lakehouse import footers
from bp_spark.model.inputs import HISTORY_COLUMNS
from bp_spark.training import loader, petastorm_reader
from bp_spark.training.loader import ReaderName, ShardLoader, snapshot, split_sizes
from tests.support.damage import with_rows_hidden
from tests.support.training_rows import make_rows, take, write_table

SCALARS = ("row", "label_spend")
READERS = get_args(ReaderName)


def read(feed: ShardLoader, steps: int = 5, seed: int = 0) -> list[dict[str, np.ndarray] | None]:
    with feed.batches(steps, seed) as batches:
        return list(batches)


def row_numbers(batches: list[dict[str, np.ndarray] | None]) -> list[float]:
    return [row for batch in batches if batch is not None for row in batch["row"]]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "training set"
    write_table(path, make_rows(90), files=[50, 3, 30, 7])
    return path


def test_removed_rows_do_not_come_back_after_an_overwrite(table: Path) -> None:
    write_deltalake(str(table), pa.table({"row": [7.0], "split": ["train"]}), mode="overwrite", schema_mode="overwrite")
    now = snapshot(str(table))
    assert now.rows == 1
    assert len(list(table.rglob("*.parquet"))) > len(now.files)
    feed = ShardLoader(snapshot(str(table), version=now.version - 1).shard(0, 1), SCALARS, HISTORY_COLUMNS)
    assert sorted(row_numbers(read(feed))) == list(range(90))


def test_where_picks_a_partition(table: Path) -> None:
    write_table(table, make_rows(20), split="valid")
    assert snapshot(str(table), where={"split": "valid"}).rows == 20
    assert snapshot(str(table), where={"split": "train"}).rows == 90
    assert snapshot(str(table), where={"split": ["train", "valid"]}).rows == 110


@pytest.mark.parametrize(
    ("where", "version", "message"),
    [
        ({"split": "test"}, None, "must have rows"),
        ({"label_spend": "1"}, None, "must be a partition column"),
        (None, 99, "version 99"),
    ],
)
def test_an_impossible_snapshot_is_refused(
    table: Path, where: dict[str, str] | None, version: int | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        snapshot(str(table), version=version, where=where)


def test_a_folder_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be a Delta table"):
        snapshot(str(tmp_path / "nowhere"))


def test_deletion_vectors_are_refused(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "marked")
    writer = spark.range(100).repartition(1).write.format("delta")
    writer.option("delta.enableDeletionVectors", "true").save(path)
    assert snapshot(path).rows == 100
    spark.sql(f"DELETE FROM delta.`{path}` WHERE id < 5")
    with pytest.raises(DataError, match="deletion vectors"):
        snapshot(path)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_see_each_row_once_in_equally_many_steps(table: Path, ranks: int) -> None:
    shares = [snapshot(str(table)).shard(rank, ranks) for rank in range(ranks)]
    feeds = [ShardLoader(share, SCALARS, HISTORY_COLUMNS) for share in shares]
    for epoch in range(2):
        batches = [read(feed, steps=9, seed=epoch) for feed in feeds]
        assert sorted(row_numbers([batch for own in batches for batch in own])) == list(range(90))
        assert {len(own) for own in batches} == {9}
        for share, own in zip(shares, batches, strict=True):
            sizes = sorted(0 if batch is None else len(batch["row"]) for batch in own)
            assert sizes == sorted(split_sizes(share.rows, 9))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_share_too_large_for_memory_is_read_once_per_pass(
    table: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(loader, "SHUFFLE_BYTES", 10_000)
    feeds = [ShardLoader(snapshot(str(table)).shard(rank, ranks), SCALARS, HISTORY_COLUMNS) for rank in range(ranks)]
    for epoch in range(2):
        batches = [read(feed, steps=11, seed=epoch) for feed in feeds]
        assert sorted(row_numbers([batch for own in batches for batch in own])) == list(range(90))
        assert {len(own) for own in batches} == {11}


@pytest.mark.parametrize("reader", READERS)
def test_an_object_store_is_read_as_a_folder_is(
    table: Path, monkeypatch: pytest.MonkeyPatch, reader: ReaderName
) -> None:
    here = snapshot(str(table))
    names = [file.removeprefix(str(table.parent)) for file in here.files]
    bucket = pyarrow.fs.SubTreeFileSystem(str(table.parent), pyarrow.fs.LocalFileSystem())
    local = loader.file_system

    def file_system(address: str) -> tuple[pyarrow.fs.FileSystem, str]:
        return (bucket, address.removeprefix("s3a://bucket/")) if address.startswith("s3a:") else local(address)

    for module in (loader, footers):
        monkeypatch.setattr(module, "file_system", file_system)
    files = tuple(f"s3a://bucket{name}" for name in names)
    schema, groups = loader._schema_and_groups(footers.read(DeltaTable(str(table)), files))
    assert (schema, groups) == (here.schema, here.groups)
    there = replace(here, files=files)
    batches = [read(ShardLoader(found.shard(0, 1), SCALARS, HISTORY_COLUMNS, reader)) for found in (here, there)]
    assert row_numbers(batches[0]) == row_numbers(batches[1])
    assert sorted(row_numbers(batches[1])) == list(range(90))


def test_petastorm_and_pyarrow_read_the_same_rows(tmp_path: Path) -> None:
    """Texts, numbers, times and lists, some NULL, in files of several row groups of unequal size, by three ranks."""
    rng = np.random.default_rng(5)
    for number, rows in enumerate((40, 7, 130, 1)):
        some = np.arange(rows) % 3 == 1
        columns = {
            "row": pa.array(1_000 * number + np.arange(rows)),
            "text": pa.array([None if gone else f"“{key}” 牛奶" for key, gone in enumerate(some)], pa.string()),
            "count": pa.array(rng.integers(0, 9, rows).astype("int32"), mask=some),
            "whole": pa.array(rng.integers(-9, 9, rows).astype("int16")),
            "amount": pa.array(rng.normal(size=rows).astype("float32"), mask=some),
            "flag": pa.array(some),
            "kinds": pa.array([None if gone else rng.integers(0, 9, key % 5) for key, gone in enumerate(some)]),
            "gaps": pa.array([rng.normal(size=key % 4) for key in range(rows)], pa.list_(pa.float32())),
        }
        writer = WriterProperties(max_row_group_size=29)
        write_deltalake(str(tmp_path / "t"), pa.table(columns), mode="append", writer_properties=writer)
    whole = snapshot(str(tmp_path / "t"))
    assert len({group.rows for group in whole.groups}) > 3
    scalars, arrays = list(columns)[:-2], list(columns)[-2:]

    def rows_of(reader: ReaderName, rank: int) -> dict[float, list[object]]:
        found = dict[float, list[object]]()
        for batch in read(ShardLoader(whole.shard(rank, 3), scalars, arrays, reader), steps=4):
            assert batch is not None
            for at, row in enumerate(batch["row"]):
                plain = [str(batch[name][at]) for name in scalars]
                lists = [(batch[name][at].dtype, batch[name][at].tolist()) for name in arrays]
                found[row] = [*plain, *lists, *(batch[name].dtype for name in scalars)]
        return found

    by_rank = [rows_of("petastorm", rank) for rank in range(3)]
    assert by_rank == [rows_of("arrow", rank) for rank in range(3)]
    assert sum(map(len, by_rank)) == whole.rows == 178
    (second,) = (found[1] for found in by_rank if 1 in found)
    assert [*second[:3], second[4], second[6][1]] == ["1", "None", "nan", "nan", []]


def test_values_arrive_unchanged(tmp_path: Path) -> None:
    rows = make_rows(40)
    write_table(tmp_path / "t", rows)
    names = ("row", "recency", "label_spend")
    (batch,) = read(ShardLoader(snapshot(str(tmp_path / "t")).shard(0, 1), names, HISTORY_COLUMNS), steps=1)
    assert batch is not None
    assert set(batch) == {*names, *HISTORY_COLUMNS}
    expected = take(rows, batch["row"].astype(int))
    for name in names:
        np.testing.assert_array_equal(batch[name], expected[name])
    for name in HISTORY_COLUMNS:
        for found, wanted in zip(batch[name], expected[name], strict=True):
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted)


def test_a_table_without_arrays_is_read_texts_included(tmp_path: Path) -> None:
    texts = [f"text {number} 牛奶" for number in range(40)]
    write_deltalake(str(tmp_path / "t"), pa.table({"row": range(40), "text": texts}))
    batches = read(ShardLoader(snapshot(str(tmp_path / "t")).shard(0, 1), ("row", "text"), ()))
    assert [len(batch["row"]) for batch in batches if batch is not None] == [8] * 5
    assert sorted(
        (row, text) for b in batches if b is not None for row, text in zip(b["row"], b["text"], strict=True)
    ) == (list(enumerate(texts)))


def test_the_size_of_texts_is_that_of_their_characters(tmp_path: Path) -> None:
    texts = [f"{number:4}" + "x" * 996 for number in range(500)]
    write_deltalake(str(tmp_path / "t"), pa.table({"text": texts}))
    assert 500 * 1000 < snapshot(str(tmp_path / "t")).shard(0, 1).size < 500 * 1200


def test_the_order_depends_on_the_seed_alone(table: Path) -> None:
    share = snapshot(str(table)).shard(0, 1)
    used = ShardLoader(share, SCALARS, HISTORY_COLUMNS)
    first = row_numbers(read(used, seed=1))
    second = row_numbers(read(used, seed=2))
    assert first != second
    assert row_numbers(read(ShardLoader(share, SCALARS, HISTORY_COLUMNS), seed=2)) == second


def test_batches_hold_histories_of_like_length(tmp_path: Path) -> None:
    write_table(tmp_path / "t", make_rows(600))
    batches = read(ShardLoader(snapshot(str(tmp_path / "t")).shard(0, 1), SCALARS, HISTORY_COLUMNS), steps=60)
    lengths = [[len(kinds) for kinds in batch["seq_kind"]] for batch in batches if batch is not None]
    padded = sum(max(batch) * len(batch) for batch in lengths)
    assert padded < 1.3 * sum(map(sum, lengths))
    assert [max(batch) for batch in lengths] != sorted(max(batch) for batch in lengths)


def test_a_pass_that_petastorm_ends_too_early_is_read_to_its_end(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    petastorm_reader._petastorm()
    from petastorm.workers_pool.thread_pool import ThreadPool
    from petastorm.workers_pool.ventilator import ConcurrentVentilator

    idle, hand_out, looked = ThreadPool.all_workers_done, ConcurrentVentilator._ventilate, threading.Event()

    def after_a_look(ventilator: Any) -> None:
        looked.wait()
        hand_out(ventilator)

    def look(pool: Any) -> bool:
        """Says what it saw at first, when all items have been handed out meanwhile."""
        found = idle(pool)
        looked.set()
        while found and not pool._ventilator.completed():
            time.sleep(0.001)
        return found

    monkeypatch.setattr(ConcurrentVentilator, "_ventilate", after_a_look)
    monkeypatch.setattr(ThreadPool, "all_workers_done", look)
    feed = ShardLoader(snapshot(str(table)).shard(0, 1), SCALARS, HISTORY_COLUMNS)
    assert sorted(row_numbers(read(feed))) == list(range(90))


def test_an_abandoned_pass_leaves_no_reader_open(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(loader, "SHUFFLE_BYTES", 1)
    before = threading.active_count()
    with ShardLoader(snapshot(str(table)).shard(0, 1), SCALARS, HISTORY_COLUMNS).batches(9, 0) as batches:
        next(batches)
        assert threading.active_count() > before
    assert threading.active_count() == before


class Trap:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        # Petastorm lets builtins pass, and exec is one.
        return exec, (f"import os; os.mkdir({str(self.marker)!r})",)


@pytest.mark.parametrize("file", ["_common_metadata", "_metadata"])
@pytest.mark.parametrize("key", ["dataset-toolkit.unischema.v1", "dataset-toolkit.rowgroups_index.v1"])
def test_pickles_in_the_metadata_of_a_dataset_are_not_read(tmp_path: Path, file: str, key: str) -> None:
    path, marker = tmp_path / "t", tmp_path / "sprung"
    write_table(path, make_rows(10))
    for folder in (path, path / "split=train"):
        pq.write_metadata(pa.schema([("row", pa.float64())], {key: pickle.dumps(Trap(marker))}), folder / file)
    feed = ShardLoader(snapshot(str(path)).shard(0, 1), SCALARS, HISTORY_COLUMNS)
    assert len(row_numbers(read(feed))) == 10
    assert not marker.exists()


def test_the_trap_springs_where_petastorm_reads_it(tmp_path: Path) -> None:
    petastorm_reader._petastorm()
    from petastorm.etl.legacy import depickle_legacy_package_name_compatible

    depickle_legacy_package_name_compatible(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists(), "the test that it is not read is worth something"


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_page_is_refused(tmp_path: Path, reader: ReaderName) -> None:
    path = tmp_path / "t"
    write_table(path, make_rows(500))
    (file,) = (file for file in path.rglob("*.parquet"))
    size = file.stat().st_size
    pq.write_table(pq.read_table(file, partitioning=None), file, compression="none", write_page_checksum=True)
    log = path / "_delta_log/00000000000000000000.json"
    log.write_text(log.read_text().replace(f'"size":{size}', f'"size":{file.stat().st_size}'))
    column = pq.read_metadata(file).row_group(0).column(0)
    content = bytearray(file.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start + column.total_compressed_size - 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        read(ShardLoader(snapshot(str(path)).shard(0, 1), (column.path_in_schema,), (), reader))


def test_a_footer_that_says_other_than_the_log_is_refused_by_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_table(path, make_rows(50))
    (file,) = (file for file in path.rglob("*.parquet"))
    whole = pq.read_table(file, partitioning=None)
    pq.write_table(whole.slice(0, 40), file)
    with pytest.raises(
        DataError, match=rf"{file.name}: has .* and 40 rows by its footer, .* and 50 rows by the table's log"
    ):
        snapshot(str(path))
    pq.write_table(whole, file, compression="none")
    with pytest.raises(
        DataError, match=rf"{file.name}: has .* and 50 rows by its footer, .* and 50 rows by the table's log"
    ):
        snapshot(str(path))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"{file.name}: its footer is damaged"):
        snapshot(str(path))


def test_a_footer_that_hides_rows_is_refused_by_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_table(path, make_rows(50))
    (file,) = (file for file in path.rglob("*.parquet"))
    file.write_bytes(with_rows_hidden(file.read_bytes()))
    with pytest.raises(DataError, match=rf"{file.name}: has .* rows by its footer, .* and 50 rows by the table's log"):
        snapshot(str(path))


def test_a_missing_column_is_named(table: Path) -> None:
    with pytest.raises(DataError, match="no_such_feature"):
        ShardLoader(snapshot(str(table)).shard(0, 1), ("no_such_feature",), HISTORY_COLUMNS)


def test_a_column_that_only_newer_files_have_is_refused(table: Path) -> None:
    newer = pa.table({"row": [1.0], "added": [1.0], "split": ["train"]})
    write_deltalake(str(table), newer, mode="append", schema_mode="merge")
    with pytest.raises(DataError, match="added"):
        ShardLoader(snapshot(str(table)).shard(0, 1), ("added",), HISTORY_COLUMNS)


@pytest.mark.parametrize("reader", READERS)
def test_a_path_may_have_what_urls_and_globs_have_a_use_for(tmp_path: Path, reader: ReaderName) -> None:
    path = tmp_path / "no#1; 50% of é"
    write_table(path, make_rows(20))
    feed = ShardLoader(snapshot(str(path)).shard(0, 1), SCALARS, HISTORY_COLUMNS, reader)
    assert sorted(row_numbers(read(feed))) == list(range(20))
