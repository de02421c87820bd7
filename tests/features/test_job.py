"""What featurize tells of the days that it reads."""

from __future__ import annotations

from datetime import date, timedelta

import pytest
from pyspark.sql import SparkSession

from bp_spark.features.job import incomplete_days

AS_OF = date(2024, 6, 3)
SUNDAY = 6


def days_before(weeks: int, orders: int = 100) -> dict[date, int]:
    """Orders of each day of the weeks before AS_OF, without Sundays."""
    days = [AS_OF - timedelta(days=back) for back in range(1, 7 * weeks + 1)]
    return {day: orders + 10 * (day.day % 5) for day in days if day.weekday() != SUNDAY}


@pytest.mark.parametrize(
    ("weeks", "orders", "last_days", "expected"),
    [
        (12, 100, {}, []),
        (12, 100, {1: 0}, []),  # a Sunday
        (12, 100, {2: 0}, [2]),
        (12, 100, {2: 40, 4: 60, 6: 49}, [6, 2]),
        (12, 100, {2: 50}, []),
        (5, 100, {2: 0}, []),
        (12, 10, {2: 0}, []),
        (12, 100, {9: 0}, []),
    ],
)
def test_days_with_far_fewer_orders_than_the_weeks_before_are_named(
    spark: SparkSession, weeks: int, orders: int, last_days: dict[int, int], expected: list[int]
) -> None:
    found = days_before(weeks, orders)
    for back, count in last_days.items():
        found[AS_OF - timedelta(days=back)] = count
    # days of two users; a day without a row is one without an event
    halves = [(day, part) for day, count in found.items() if count for part in (count // 2, count - count // 2)]
    # what comes on the date and later is not looked at
    rows = spark.createDataFrame([*halves, (AS_OF, 1)], "day date, orders bigint")
    assert incomplete_days(rows, AS_OF) == [AS_OF - timedelta(days=back) for back in expected]
