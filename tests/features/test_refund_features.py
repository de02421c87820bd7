"""Money paid and paid back, from features of a year."""

from __future__ import annotations

import pytest
from pyspark.sql import SparkSession

from bp_spark.features.refunds import knows_past, past_year


@pytest.mark.parametrize(
    ("spend", "share", "largest", "wanted"),
    [
        (75.0, 0.25, 50.0, (100.0, 25.0)),
        (75.0, 0.0, 50.0, (75.0, 0.0)),
        # all was paid back, or more: the largest order stands for what was paid
        (0.0, 1.0, 50.0, (50.0, 50.0)),
        (-20.0, 1.0, 50.0, (50.0, 50.0)),
        (-20.0, 1.0, None, (0.0, 0.0)),
        # nothing was paid
        (0.0, None, None, (0.0, 0.0)),
        (None, None, None, (0.0, 0.0)),
    ],
)
def test_what_was_paid_and_paid_back_follows_from_features(
    spark: SparkSession,
    spend: float | None,
    share: float | None,
    largest: float | None,
    wanted: tuple[float, float],
) -> None:
    schema = "spend_365d float, refund_share_365d float, order_value_max_365d float"
    found = spark.createDataFrame([(spend, share, largest)], schema).select(*past_year()).collect()
    assert tuple(found[0]) == wanted


def test_without_a_year_among_the_windows_the_past_is_not_known() -> None:
    assert knows_past(["spend_365d", "refund_share_365d", "order_value_max_365d", "recency_days"])
    assert not knows_past(["spend_90d", "refund_share_365d", "order_value_max_365d"])
