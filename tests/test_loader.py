"""The loader reads what the Delta log says, each row once, whatever the number of ranks."""

from __future__ import annotations

import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from petastorm import make_batch_reader
from petastorm.workers_pool.thread_pool import ThreadPool
from petastorm.workers_pool.ventilator import ConcurrentVentilator
from pyspark.sql import SparkSession

from bp_spark import loader
from bp_spark.errors import DataError
from bp_spark.loader import Feed, snapshot, split_sizes
from bp_spark.model.inputs import HISTORY_COLUMNS
from training_rows import make_rows, take, write_table

SCALARS = ("row", "label_spend")


def read(feed: Feed, steps: int = 5, seed: int = 0) -> list[dict[str, np.ndarray] | None]:
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
    feed = Feed(snapshot(str(table), version=now.version - 1).share(0, 1), SCALARS, HISTORY_COLUMNS)
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
    shares = [snapshot(str(table)).share(rank, ranks) for rank in range(ranks)]
    feeds = [Feed(share, SCALARS, HISTORY_COLUMNS) for share in shares]
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
    feeds = [Feed(snapshot(str(table)).share(rank, ranks), SCALARS, HISTORY_COLUMNS) for rank in range(ranks)]
    for epoch in range(2):
        batches = [read(feed, steps=11, seed=epoch) for feed in feeds]
        assert sorted(row_numbers([batch for own in batches for batch in own])) == list(range(90))
        assert {len(own) for own in batches} == {11}


def test_an_object_store_is_read_as_a_folder_is(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = snapshot(str(table))
    names = [file.removeprefix(f"file://{table.parent}") for file in here.files]
    bucket = pyarrow.fs.SubTreeFileSystem(str(table.parent), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(loader, "file_system", lambda address: (bucket, address.removeprefix("s3a://bucket/")))
    files = tuple(f"s3a://bucket{name}" for name in names)
    schema, groups = loader._read_footers(files)
    assert (schema, groups) == (here.schema, here.groups)
    there = replace(here, files=files)
    batches = [read(Feed(found.share(0, 1), SCALARS, HISTORY_COLUMNS)) for found in (here, there)]
    assert row_numbers(batches[0]) == row_numbers(batches[1])
    assert sorted(row_numbers(batches[1])) == list(range(90))


def test_values_arrive_unchanged(tmp_path: Path) -> None:
    rows = make_rows(40)
    write_table(tmp_path / "t", rows)
    names = ("row", "recency", "label_spend")
    (batch,) = read(Feed(snapshot(str(tmp_path / "t")).share(0, 1), names, HISTORY_COLUMNS), steps=1)
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
    batches = read(Feed(snapshot(str(tmp_path / "t")).share(0, 1), ("row", "text"), ()))
    assert [len(batch["row"]) for batch in batches if batch is not None] == [8] * 5
    assert sorted(
        (row, text) for b in batches if b is not None for row, text in zip(b["row"], b["text"], strict=True)
    ) == (list(enumerate(texts)))


def test_the_size_of_texts_is_that_of_their_characters(tmp_path: Path) -> None:
    texts = [f"{number:4}" + "x" * 996 for number in range(500)]
    write_deltalake(str(tmp_path / "t"), pa.table({"text": texts}))
    assert 500 * 1000 < snapshot(str(tmp_path / "t")).share(0, 1).size < 500 * 1200


def test_the_order_depends_on_the_seed_alone(table: Path) -> None:
    share = snapshot(str(table)).share(0, 1)
    used = Feed(share, SCALARS, HISTORY_COLUMNS)
    first = row_numbers(read(used, seed=1))
    second = row_numbers(read(used, seed=2))
    assert first != second
    assert row_numbers(read(Feed(share, SCALARS, HISTORY_COLUMNS), seed=2)) == second


def test_batches_hold_histories_of_like_length(tmp_path: Path) -> None:
    write_table(tmp_path / "t", make_rows(600))
    batches = read(Feed(snapshot(str(tmp_path / "t")).share(0, 1), SCALARS, HISTORY_COLUMNS), steps=60)
    lengths = [[len(kinds) for kinds in batch["seq_kind"]] for batch in batches if batch is not None]
    padded = sum(max(batch) * len(batch) for batch in lengths)
    assert padded < 1.3 * sum(map(sum, lengths))
    assert [max(batch) for batch in lengths] != sorted(max(batch) for batch in lengths)


def test_a_pass_that_petastorm_ends_too_early_is_read_to_its_end(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idle, hand_out, looked = ThreadPool.all_workers_done, ConcurrentVentilator._ventilate, threading.Event()

    def after_a_look(ventilator: ConcurrentVentilator) -> None:
        looked.wait()
        hand_out(ventilator)

    def look(pool: ThreadPool) -> bool:
        """Says what it saw at first, when all items have been handed out meanwhile."""
        found = idle(pool)
        looked.set()
        while found and not pool._ventilator.completed():
            time.sleep(0.001)
        return found

    monkeypatch.setattr(ConcurrentVentilator, "_ventilate", after_a_look)
    monkeypatch.setattr(ThreadPool, "all_workers_done", look)
    feed = Feed(snapshot(str(table)).share(0, 1), SCALARS, HISTORY_COLUMNS)
    assert sorted(row_numbers(read(feed))) == list(range(90))


def test_an_abandoned_pass_leaves_no_reader_open(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(loader, "SHUFFLE_BYTES", 1)
    before = threading.active_count()
    with Feed(snapshot(str(table)).share(0, 1), SCALARS, HISTORY_COLUMNS).batches(9, 0) as batches:
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
    feed = Feed(snapshot(str(path)).share(0, 1), SCALARS, HISTORY_COLUMNS)
    assert len(row_numbers(read(feed))) == 10
    assert not marker.exists()


def test_the_trap_springs_where_petastorm_is_given_a_folder(tmp_path: Path) -> None:
    path, marker = tmp_path / "t", tmp_path / "sprung"
    write_table(path, make_rows(10))
    schema = pa.schema([("row", pa.float64())], {"dataset-toolkit.unischema.v1": pickle.dumps(Trap(marker))})
    pq.write_metadata(schema, path / "split=train" / "_common_metadata")
    with pytest.raises(Exception), make_batch_reader(f"file://{path / 'split=train'}"):  # noqa: B017, PT011
        pass
    assert marker.exists(), "handing over the folder springs it: the tests that it does not are worth something"


def test_a_pickled_extension_type_in_the_footers_is_not_read(tmp_path: Path) -> None:
    path, marker = tmp_path / "t", tmp_path / "sprung"
    write_table(path, make_rows(10))
    trap = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Trap(marker))}
    for file in path.rglob("*.parquet"):
        rows = pq.read_table(file, partitioning=None)
        pq.write_table(rows.append_column(pa.field("more", pa.int64(), metadata=trap), [range(rows.num_rows)]), file)
    feed = Feed(snapshot(str(path)).share(0, 1), SCALARS, HISTORY_COLUMNS)
    assert len(row_numbers(read(feed))) == 10
    assert not marker.exists()
    pa.PyExtensionType.set_auto_load(True)
    try:
        with pytest.raises(Exception):  # noqa: B017, PT011
            pq.read_schema(file)
    finally:
        pa.PyExtensionType.set_auto_load(False)
    assert marker.exists(), "pyarrow before 14.0.1 would have sprung it"


def test_a_missing_column_is_named(table: Path) -> None:
    with pytest.raises(DataError, match="no_such_feature"):
        Feed(snapshot(str(table)).share(0, 1), ("no_such_feature",), HISTORY_COLUMNS)


def test_a_column_that_only_newer_files_have_is_refused(table: Path) -> None:
    newer = pa.table({"row": [1.0], "added": [1.0], "split": ["train"]})
    write_deltalake(str(table), newer, mode="append", schema_mode="merge")
    with pytest.raises(DataError, match="added"):
        Feed(snapshot(str(table)).share(0, 1), ("added",), HISTORY_COLUMNS)


def test_a_path_that_petastorm_would_cut_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "no#1", make_rows(2))
    with pytest.raises(DataError, match="'#' in its path"):
        snapshot(str(tmp_path / "no#1"))
