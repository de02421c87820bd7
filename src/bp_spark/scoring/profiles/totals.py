"""Expected spend of groups of users together, with an interval; see :mod:`bp_spark.model.totals`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from functools import reduce
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.lakehouse.tables import TOTALS
from bp_spark.model.totals import Totals, interval
from bp_spark.scoring.profiles.columns import shaped

PLATFORM = "platform"
SEGMENTS = ("level", "category", "region")
"""Columns of MARKET_SEGMENTS by which there are totals."""
EVERYONE = "all"

_BY_HORIZON = ("expected_by_horizon", "variance_by_horizon")
_MONEY = "decimal(38,4)"
SCALES = {"expected": 100, "variance": 10_000}
"""Scales of whole numbers, whose sums don't depend on the order: money, and squares of money."""


def sums_by_horizon(totals: Totals | None) -> dict[str, Column]:
    """Return what :func:`by_horizon` is made of: for each horizon, the sums of money and of variance of users.

    Args:
        totals: Errors of sums of the bundle; ``None``: no sums.

    Returns:
        Name -> aggregate over rows with ``expected_by_horizon``, a whole number.
    """
    sums = {}
    for error in totals.errors if totals else ():
        expected = F.element_at("expected_by_horizon", F.lit(error.days))
        variance = expected * (F.lit(error.dispersion) + F.lit(error.quadratic) * expected)
        sums[f"expected_{error.days}"] = F.sum(F.round(expected * SCALES["expected"]).cast("decimal(38,0)"))
        sums[f"variance_{error.days}"] = F.sum(F.round(variance * SCALES["variance"]).cast("decimal(38,0)"))
    return sums


def by_horizon(totals: Totals | None) -> dict[str, Column]:
    """Return the columns ``expected_by_horizon`` and ``variance_by_horizon`` of groups with :func:`sums_by_horizon`."""
    if totals is None:
        return {f"{name}_by_horizon": F.lit(None) for name in SCALES}
    return {
        f"{name}_by_horizon": F.create_map(
            *(
                part
                for error in totals.errors
                for part in (F.lit(error.days), F.col(f"{name}_{error.days}").cast("double") / scale)
            )
        )
        for name, scale in SCALES.items()
    }


def platform_totals(segments: DataFrame, totals: Totals, day: date, bundle_digest: str) -> DataFrame:
    """Return totals of the platform and of each level, category and region.

    They are sums of rows of MARKET_SEGMENTS. So they tell nothing of few users that these rows don't tell.

    Args:
        segments: MARKET_SEGMENTS, with sums by horizon.
        totals: Errors of sums of the bundle.
        day: The date.
        bundle_digest: Of the bundle.

    Returns:
        Rows of TOTALS; none without a segment.
    """
    parts = []
    for segment in (PLATFORM, *SEGMENTS):
        value = F.lit(EVERYONE) if segment == PLATFORM else F.col(segment)
        parts.append(segments.select(F.lit(segment).alias("segment"), value.alias("of"), "users", *_BY_HORIZON))
    rows = reduce(DataFrame.unionByName, parts)
    exploded = rows.select("*", F.explode("expected_by_horizon").alias("days", "expected"))
    sums = {"expected": F.col("expected"), "variance": F.element_at("variance_by_horizon", F.col("days"))}
    # a row a group and horizon: as many as there are categories, whatever the number of users
    groups = (
        exploded.groupBy("segment", "of", "days")
        .agg(
            F.sum("users").alias("users"),
            *(F.sum(column.cast(_MONEY)).cast("double").alias(name) for name, column in sums.items()),
        )
        .collect()
    )
    errors = {error.days: error for error in totals.errors}

    def row(group: Mapping[str, Any]) -> dict[str, Any]:
        error, everyone = errors[group["days"]], group["segment"] == PLATFORM
        low, high = interval(group["expected"], group["variance"], error, totals.coverage, everyone=everyone)
        return {
            "score_date": day,
            "horizon_days": error.days,
            "segment": group["segment"],
            "value": group["of"],
            "users": group["users"],
            "expected_spend": group["expected"],
            "low": low,
            "high": high,
            "variance": group["variance"],
            "common_sd": error.common_sd,
            "segment_sd": error.segment_sd,
            "dispersion": error.dispersion,
            "quadratic": error.quadratic,
            "horizons": error.horizons,
            "quantile": error.quantile(totals.coverage),
            "bundle_digest": bundle_digest,
        }

    spark = segments.sparkSession
    return shaped(spark.createDataFrame([row(group.asDict()) for group in groups], TOTALS.schema), TOTALS)
