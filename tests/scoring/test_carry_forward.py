"""Scores that are carried forward follow the platform's level: each horizon by its own factor."""

from __future__ import annotations

import math
from datetime import date

import pytest
from pyspark.sql import SparkSession

from bp_spark.lakehouse.tables import SCORES
from bp_spark.scoring.carry_forward import Growth, carry_forward
from tests.support.rows import frame

LATER = date(2024, 3, 17)


def test_money_and_odds_grow_with_the_level_and_spend_does_not_fall_with_the_days(spark: SparkSession) -> None:
    known = {"expected_spend": 10.0, "low": 2.0, "high": 30.0, "base_spend": 4.0, "p_active": 0.5, "score": 70.0}
    known["horizon_days"] = 90
    reasons = [{"group": "visits", "contribution": -1.0, "feature": "f", "value": 3.0}]
    scores = frame(
        spark,
        SCORES,
        {"user_key": "a", "expected_by_horizon": {30: 4.0, 90: 10.0, 180: 15.0}, "reasons": reasons, **known},
        {"user_key": "b", **known},
        {"user_key": "stale", **known},
    )
    stale = spark.createDataFrame([("stale",)], "user_key string")

    def carried(growth: Growth | None) -> dict[str, dict]:
        return {row["user_key"]: row.asDict() for row in carry_forward(scores, stale, LATER, growth).collect()}

    rows = carried(Growth(90, {30: 3.0, 90: 1.1, 180: 0.7}, log_odds=math.log(3)))
    assert set(rows) == {"a", "b"}
    # 30 days would bring 12, and 180 days 10.5: neither may cross the main horizon's 11
    assert rows["a"]["expected_by_horizon"] == pytest.approx({30: 11.0, 90: 11.0, 180: 11.0})
    assert [rows["a"][name] for name in ("expected_spend", "low", "high")] == pytest.approx([11.0, 2.2, 33.0])
    assert rows["a"]["reasons"][0]["contribution"] == pytest.approx(-1.1)
    assert (rows["a"]["p_active"], rows["a"]["score"]) == (pytest.approx(0.75), 70.0), "odds of 1 become odds of 3"
    assert (rows["a"]["score_date"], rows["a"]["horizon_days"]) == (LATER, 90)
    assert rows["b"]["expected_by_horizon"] is None
    assert carried(None)["a"]["expected_by_horizon"] == {30: 4.0, 90: 10.0, 180: 15.0}
