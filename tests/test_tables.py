"""Writing tables: contracts are kept, only what is meant is replaced, and each write says what it was made from."""

from __future__ import annotations

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.errors import DataError
from bp_spark.tables import SCORES, Column, Lakehouse, Table, conform

TABLE = Table(
    "things",
    "Things",
    (Column("day", "date", "Day", required=True), Column("name", "string", "Name"), Column("n", "bigint", "Number")),
    key=("name",),
    partition_by=("day",),
)
ROWS = [("2024-01-01", "a", 1), ("2024-01-02", "b", 2)]


def things(spark: SparkSession, rows: list[tuple[str, str, int]], number: str = "bigint"):  # type: ignore[no-untyped-def]
    df = spark.createDataFrame(rows, "day string, name string, n bigint")
    return df.select(F.col("day").cast("date"), "name", F.col("n").cast(number))


def stored(lakehouse: Lakehouse) -> list[tuple[str, int]]:
    return sorted((row["name"], row["n"]) for row in lakehouse.read("things").collect())


def test_a_wrong_type_or_a_missing_column_is_named_and_the_table_untouched(
    spark: SparkSession, lakehouse: Lakehouse
) -> None:
    lakehouse.replace(TABLE, things(spark, ROWS))
    version = lakehouse.version("things")
    with pytest.raises(DataError, match=r"things\.n: must be bigint, is string"):
        lakehouse.replace(TABLE, things(spark, ROWS, "string"))
    with pytest.raises(DataError, match=r"things\.name: column is missing"):
        lakehouse.replace(TABLE, things(spark, ROWS).drop("name"))
    assert lakehouse.version("things") == version
    assert stored(lakehouse) == [("a", 1), ("b", 2)]


def test_a_partition_is_replaced_alone_and_no_other_row_gets_in(spark: SparkSession, lakehouse: Lakehouse) -> None:
    lakehouse.replace(TABLE, things(spark, ROWS), inputs="first")
    day = {"day": ["2024-01-02"]}
    lakehouse.replace(TABLE, things(spark, [("2024-01-02", "c", 3)]), where=day, inputs="second", note={"through": 7})
    assert stored(lakehouse) == [("a", 1), ("c", 3)]
    assert (lakehouse.inputs("things"), lakehouse.note("things")["through"]) == ("second", 7)
    with pytest.raises(Exception, match="DELTA_REPLACE_WHERE_MISMATCH"):
        lakehouse.replace(TABLE, things(spark, [("2024-01-05", "d", 4)]), where=day)
    assert stored(lakehouse) == [("a", 1), ("c", 3)]


def test_a_merge_updates_inserts_and_deletes_by_key(spark: SparkSession, lakehouse: Lakehouse) -> None:
    lakehouse.replace(TABLE, things(spark, [*ROWS, ("2024-01-02", "old", 9)]))
    fresh = things(spark, [("2024-01-01", "a", 10), ("2024-01-02", "new", 3)])
    gone = spark.createDataFrame([("old",), ("never there",)], "name string")
    days = {"day": ["2024-01-01", "2024-01-02"]}
    lakehouse.merge(TABLE, fresh, within=days, gone=gone.withColumn("day", F.lit("2024-01-02").cast("date")))
    assert stored(lakehouse) == [("a", 10), ("b", 2), ("new", 3)]


def test_a_table_that_is_not_there_is_an_error_that_names_it(lakehouse: Lakehouse) -> None:
    with pytest.raises(DataError, match=r"bp\.scores: table does not exist"):
        lakehouse.read("scores")


def test_columns_carry_their_comments(spark: SparkSession, lakehouse: Lakehouse) -> None:
    lakehouse.replace(TABLE, things(spark, ROWS))
    assert [field.metadata["comment"] for field in lakehouse.read("things").schema.fields] == ["Day", "Name", "Number"]
    assert conform(spark.createDataFrame([], SCORES.schema), SCORES).schema == SCORES.schema
