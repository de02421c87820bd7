"""The stages of buyers."""

from __future__ import annotations

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.features.stages import buyer_stage


def test_a_first_purchase_makes_new_and_then_the_last_one_decides(spark: SparkSession) -> None:
    expected = {
        (30, 1): "new",
        (30, 30): "new",
        (31, 1): "active",
        (400, 30): "active",
        (400, 31): "lapsing",
        (400, 90): "lapsing",
        (400, 91): "lapsed",
        (None, None): None,
    }
    rows = spark.createDataFrame(list(expected), "first int, last int")
    found = rows.select("first", "last", buyer_stage(F.col("first"), F.col("last"), 30, 90).alias("stage")).collect()
    assert {(row["first"], row["last"]): row["stage"] for row in found} == expected
