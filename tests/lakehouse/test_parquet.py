"""Rows that Python workers read from a table's files: those that Spark reads, and nothing that was damaged."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

from bp_spark.core.errors import FileReadError
from bp_spark.core.session import with_settings
from bp_spark.lakehouse import parquet

COLUMNS = ["amount", "count", "tags", "amounts"]
ROWS = 5_000


@pytest.fixture(scope="module")
def folder(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of two dates, in three files each of several row groups, where a path has what URIs and globs have a use for."""
    folder = tmp_path_factory.mktemp("odd [1] {a,b} ü")
    key = F.col("id")
    rows = spark.range(0, 2 * ROWS, 1, 3).select(
        F.concat(F.lit("user"), key).alias("user_key"),
        key.alias("input_digest"),
        F.when(key % 7 > 0, F.rand(1)).cast("float").alias("amount"),
        (key % 11).cast("int").alias("count"),
        F.when(key % 5 > 0, F.transform(F.sequence(F.lit(0), key % 9), lambda i: (i + key) % 13)).alias("tags"),
        F.transform(F.sequence(F.lit(1), key % 4 + 1), lambda i: (i * key).cast("float")).alias("amounts"),
        F.when(key < ROWS, F.lit("2024-10-01")).otherwise(F.lit("2024-10-02")).cast("date").alias("day"),
    )
    with with_settings(spark, {"parquet.block.size": "16384", "parquet.page.row.count.limit": "200"}):
        rows.write.format("delta").partitionBy("day").save(str(folder / "table"))
    return folder / "table"


def of_day(spark: SparkSession, folder: Path) -> DataFrame:
    return spark.read.format("delta").load(str(folder)).filter("day = DATE'2024-10-02'")


def by_files(rows: DataFrame, places: DataFrame, size: int = 4_000) -> DataFrame:
    schema = to_arrow_schema(rows.select(*COLUMNS).schema)

    def read(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in parquet.read(batches, schema, size, most_rows=1_000):
            rows_at_once = pa.array(np.full(batch.num_rows, batch.num_rows))
            yield pa.RecordBatch.from_arrays([*batch.columns, rows_at_once], [*batch.schema.names, "rows_at_once"])

    wanted = rows.select("user_key", "input_digest", *COLUMNS, F.lit(0).cast("bigint").alias("rows_at_once"))
    return places.mapInArrow(read, wanted.schema)


def as_said(rows: DataFrame) -> list[tuple[object, ...]]:
    return sorted(map(tuple, rows.select("user_key", "input_digest", *COLUMNS).collect()))


def test_workers_read_what_spark_reads(spark: SparkSession, folder: Path) -> None:
    files = [pq.ParquetFile(path).metadata for path in folder.rglob("*.parquet")]
    assert min(file.num_row_groups for file in files) > 1
    rows = of_day(spark, folder)
    found = by_files(rows, parquet.row_locations(rows, "user_key", "input_digest")).cache()
    assert found.count() == ROWS
    assert as_said(found) == as_said(rows)
    # a row is some 60 bytes
    assert 20 < found.agg(F.max("rows_at_once")).collect()[0][0] < 200
    found.unpersist()


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_workers_read_some_rows_in_whatever_order_these_come(spark: SparkSession, folder: Path, share: float) -> None:
    rows = of_day(spark, folder)
    some = F.pmod(F.xxhash64("user_key"), F.lit(1_000)) < share * 1_000
    places = parquet.row_locations(rows, "user_key", "input_digest").filter(some)
    assert as_said(by_files(rows, places)) == as_said(rows.filter(some))
    stirred = places.orderBy(F.rand(2)).repartition(5)
    assert as_said(by_files(rows, parquet.in_file_order(stirred, 3))) == as_said(rows.filter(some))
    assert by_files(rows, places.limit(0)).isEmpty()


def test_rows_that_come_out_of_order_are_refused(spark: SparkSession, folder: Path) -> None:
    places = parquet.row_locations(of_day(spark, folder), "user_key").toPandas()
    one = places[places["file_path"] == places["file_path"][0]].sort_values("row_index", ascending=False)
    schema = pa.schema([("count", pa.int32())])
    with pytest.raises(FileReadError, match="not asked for in their order"):
        list(parquet.read([pa.RecordBatch.from_pandas(one)], schema, 1_000, 1_000))


def _read(path: Path, columns: Iterable[str] = COLUMNS) -> list[pa.RecordBatch]:
    """All rows of one file."""
    file = pq.ParquetFile(path)
    schema = pa.schema([file.schema_arrow.field(name) for name in columns])
    rows = np.arange(file.metadata.num_rows)
    batch = pa.RecordBatch.from_pydict({"file_path": pa.array([str(path)] * len(rows)), "row_index": rows})
    return list(parquet.read([batch], schema, 1 << 20, 1_000))


def test_no_flipped_bit_of_a_column_is_read_as_another_value(folder: Path, tmp_path: Path) -> None:
    path = shutil.copy(next(folder.rglob("*.parquet")), tmp_path / "copy.parquet")
    whole, sound = path.read_bytes(), _read(path)
    spans = []
    metadata = pq.ParquetFile(path).metadata
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            if chunk.path_in_schema.split(".")[0] in COLUMNS:
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                spans.append((start, chunk.total_compressed_size))
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(300):
        start, size = spans[rng.integers(len(spans))]
        place, bit = start + rng.integers(size), 1 << rng.integers(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        try:
            found = _read(path)
        except FileReadError:
            refused += 1
        else:
            # of a page's header only what is needed to read the page matters
            assert found == sound
    assert refused > 200


def test_a_file_that_is_cut_or_gone_or_holds_something_else_is_named(folder: Path, tmp_path: Path) -> None:
    path = shutil.copy(next(folder.rglob("*.parquet")), tmp_path / "copy.parquet")
    whole = path.read_bytes()
    places = [pa.RecordBatch.from_pydict({"file_path": [f"file:{path}"], "row_index": [0]})]
    read = partial(parquet.read, places, batch_bytes=1_000, most_rows=100)
    for schema, rule in (
        (pa.schema([("count", pa.int64())]), "no column count of the type int64"),
        (pa.schema([("price", pa.int32())]), "no column price"),
    ):
        with pytest.raises(FileReadError, match=f"copy.parquet: holds {rule}"):
            list(read(schema=schema))
    sound = pa.schema([("count", pa.int32())])
    assert next(read(schema=sound)).num_rows == 1
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileReadError, match=r"copy\.parquet"):
        list(read(schema=sound))
    path.unlink()
    with pytest.raises(FileReadError, match=r"copy\.parquet"):
        list(read(schema=sound))
