"""What users spent beside what was expected of them: sums by group, in whole numbers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.experiments.estimate import Line, Moments
from bp_spark.features import labels

CENT = 100
"""Spend is added up in whole numbers of this part of the currency."""
_WHOLE = "decimal(38,0)"
_SUMS = ("x", "y", "xx", "xy", "yy")


def with_spend(users: DataFrame, daily: DataFrame, day: date, days: int) -> DataFrame:
    """Add expected and actual spend in cents; a user without an event in the span spent 0.

    Args:
        users: rows with ``user_key`` and ``expected_spend``.
        daily: USER_DAILY.
        day: first day of the spend.
        days: number of its days.

    Returns:
        The rows with ``x`` and ``y``, whole numbers.
    """
    spend = labels.future_spend(daily, [day], days).select("user_key", "label_spend")
    spent = F.coalesce(F.col("label_spend"), F.lit(0.0))
    return users.join(spend, "user_key", "left").withColumns({"x": _cents(F.col("expected_spend")), "y": _cents(spent)})


def moments(rows: DataFrame, by: str) -> dict[str, Moments]:
    """Return the sums over the users of each group.

    Args:
        rows: result of :func:`with_spend`.
        by: column with the group.
    """
    x, y = F.col("x"), F.col("y")
    values = dict(zip(_SUMS, (x, y, x * x, x * y, y * y), strict=True))
    sums = (F.sum(value.cast(_WHOLE)).alias(name) for name, value in values.items())
    groups = rows.groupBy(by).agg(F.count(F.lit(1)).alias("users"), *sums).collect()
    return {row[by]: Moments(row["users"], *(int(row[name]) for name in _SUMS)) for row in groups}


def robust_variances(rows: DataFrame, by: str, lines: Mapping[str, Line]) -> dict[str, float]:
    """Return the variance of each group's adjusted mean, in squared cents.

    Args:
        rows: result of :func:`with_spend`.
        by: column with the group.
        lines: group -> its line.
    """
    x, y = F.col("x").cast("double"), F.col("y").cast("double")
    squared: Column = F.lit(None).cast("double")
    for group, line in lines.items():
        scaled = line.squared_influence(x, y) * float(line.users**2)
        squared = F.when(F.col(by) == group, scaled).otherwise(squared)
    # whole numbers, because their sums don't depend on the order
    sums = rows.groupBy(by).agg(F.sum(F.round(squared).cast(_WHOLE)).alias("squared")).collect()
    return {row[by]: float(row["squared"]) / lines[row[by]].users ** 2 for row in sums}


def _cents(money: Column) -> Column:
    return F.round(money * CENT).cast("decimal(18,0)")
