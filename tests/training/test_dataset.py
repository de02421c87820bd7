"""What a training is planned on: the days of events, the test date, and the horizon."""

from __future__ import annotations

from datetime import date, timedelta

from pyspark.sql import SparkSession

from bp_spark.core.config import Config
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import EVENTS
from bp_spark.training.dataset import plan
from tests.support.rows import frame


def test_without_a_test_date_the_horizon_is_the_longest_that_events_allow(
    spark: SparkSession, settings: Config, lakehouse: Lakehouse
) -> None:
    first = date(2024, 1, 1)
    last = first + timedelta(days=36)
    rows = ({"event_id": str(day), "event_date": day, "kind": "purchase"} for day in (first, last))
    lakehouse.replace(EVENTS, frame(spark, EVENTS, *rows))
    found = plan(lakehouse, settings, None)
    assert found[:3] == (first, last, last - timedelta(days=14))
    assert found.config.labels.horizon_days == 14
    # a named date keeps the configured horizon: it may be judged later
    assert plan(lakehouse, settings, last) == (first, last, last, settings)
