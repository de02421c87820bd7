"""The clock of silent users: one rule, for arrays and for columns."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.features.clock import quantize_recency, quantized_recency


@pytest.mark.parametrize(("silent", "seen"), [(1, 1), (15, 15), (17, 16), (63, 60), (64, 64), (100, 96), (300, 288)])
def test_days_of_silence_keep_four_binary_digits(silent: int, seen: int) -> None:
    assert quantize_recency(np.array([silent]), 4).tolist() == [seen]


@pytest.mark.parametrize("precision_bits", [None, 2, 4])
def test_clocks_of_columns_keep_as_many_binary_digits(spark: SparkSession, precision_bits: int | None) -> None:
    quantized = quantized_recency(F.col("id").cast("int"), precision_bits).alias("quantized")
    days = spark.range(1, 3_000).select("id", quantized).toPandas()
    bits = precision_bits or 64
    assert days["quantized"].tolist() == [day - day % (1 << max(day.bit_length() - bits, 0)) for day in range(1, 3_000)]
