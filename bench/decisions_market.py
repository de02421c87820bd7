"""How right forecasts of weeks are: a part of :mod:`bench.decisions`.

In: the demo's tables. Out: a line of JSON a figure on standard output.

- ``market.mase_vs_naive``: MASE of weekly forecasts over that of the baseline, at origins from the 26th week on; geometric mean
  over the platform and its categories, by revenue, orders and buyers. No forecast sees a later week, nor does the choice of its
  method.
- ``market.coverage``: share of these weeks that lay in their 90 % interval.
"""

from __future__ import annotations

import numpy as np
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.model.market import WEEKS_AHEAD, forecast
from bp_spark.scoring.profiles.weekly_history import SERIES, weekly_history

FIRST_ORIGIN, STEP = 26, 3
"""Weeks of history of the first origin, and weeks between two origins."""


def market(spark: SparkSession, settings: Config) -> dict[str, float]:
    """Return how right weekly forecasts are at past dates."""
    lakehouse = Lakehouse(spark, settings.tables)
    daily, events = lakehouse.read("user_daily"), lakehouse.read("events")
    last = daily.agg(F.max("day")).collect()[0][0]
    # the last day of the demo's data is not whole
    history = weekly_history(daily, events, last, settings.privacy.smallest_group)
    ratios, inside = [], []
    for _, rows in history.series.groupby(list(SERIES)):
        weeks = rows.sort_values("week", ascending=False)["amount"].to_numpy(np.float64)
        own, naive = [], []
        for origin in range(FIRST_ORIGIN, len(weeks), STEP):
            actual = weeks[origin : origin + WEEKS_AHEAD]
            found = forecast(weeks[:origin], len(actual))
            assert found is not None
            scale = np.abs(np.diff(weeks[:origin])).mean()
            own += list(np.abs(actual - found.expected) / scale)
            naive += list(np.abs(actual - weeks[origin - 1]) / scale)
            inside += list((found.low <= actual) & (actual <= found.high))
        ratios.append(np.mean(own) / np.mean(naive))
    return {
        "market.mase_vs_naive": float(np.exp(np.log(ratios).mean())),
        "market.coverage": float(np.mean(inside)),
    }
