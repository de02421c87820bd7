"""Market segments: users by level, top category and region, without a cell of few users."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from functools import reduce
from operator import or_

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from bp_spark.lakehouse.tables import MARKET_SEGMENTS
from bp_spark.model.totals import Totals
from bp_spark.scoring.profiles.columns import shaped
from bp_spark.scoring.profiles.totals import by_horizon, sums_by_horizon

OTHER, UNKNOWN, ALL, NONE = "other", "unknown", "all", "none"
CELL = ("level", "category", "region")
"""Columns that identify a cell."""


def market_segments(
    profile: DataFrame, regions: DataFrame | None, day: date, least_users: int, totals: Totals | None = None
) -> DataFrame:
    """Return users by level, top category and region, without a row of fewer than ``least_users`` users.

    The rows are a partition of all users. Cells that are too small are merged with those of other regions first, then of other
    categories, then of other levels. If the result is still too small, it joins the smallest cell that is large enough. So
    sums and differences of rows and their totals are of no user or of at least so many. There is no row if all users are
    fewer.

    Args:
        profile: USER_PROFILE; with ``totals`` also ``expected_by_horizon`` of SCORES.
        regions: ``user_key, region``, one row a user; ``None`` puts all users into one region.
        day: The date.
        least_users: Least users of a row.
        totals: Errors of sums of the bundle; without them there are no sums by horizon.

    Returns:
        Rows of MARKET_SEGMENTS.
    """
    if regions is None:
        with_region = profile.withColumn("region", F.lit(ALL))
    else:
        region_by_user = regions.select("user_key", "region")
        with_region = profile.join(region_by_user, "user_key", "left").withColumn(
            "region", F.coalesce("region", F.lit(UNKNOWN))
        )
    top_category = F.get("interests", F.lit(0))["category"]
    # whole numbers, because their sums don't depend on the order
    scales = {"score": 10_000, "expected_spend": 100, "p_active": 1_000_000, "value": 100}
    sums = {name: F.sum(F.round(F.col(name) * scale).cast("decimal(28,0)")) for name, scale in scales.items()}
    sums |= sums_by_horizon(totals)
    cells = (
        with_region.withColumn("category", F.coalesce(F.split(top_category, " > ")[0], F.lit(NONE)))
        .groupBy(*CELL)
        .agg(F.count(F.lit(1)).alias("users"), *(total.alias(name) for name, total in sums.items()))
    )
    for depth in (2, 1, 0):
        cells = _merged(cells, CELL[:depth], [*sums], least_users)
    means = {f"mean_{name}": F.col(name).cast("double") / scale / F.col("users") for name, scale in scales.items()}
    columns = {**means, **by_horizon(totals), "score_date": F.lit(day)}
    rows = cells.filter(F.col("users") >= least_users).withColumns(columns)
    return shaped(rows, MARKET_SEGMENTS)


def _merged(cells: DataFrame, within: Sequence[str], sums: Sequence[str], least_users: int) -> DataFrame:
    """Merge cells below ``least_users`` into one per group of the columns ``within``.

    The merged cell has ``other`` in the remaining columns of CELL. If it is still too small, the smallest cell of the group
    that is large enough joins it.

    Args:
        cells: ``users``, the columns of CELL and ``sums``, one row a cell.
        within: Columns of CELL that identify a group; without any there is one group.
        sums: Columns to add up beside ``users``.
        least_users: Least users of a cell.
    """
    # the windows hold the few cells, not the users; a constant in the place of a condition would make Spark warn of one task
    group = Window.partitionBy(*within) if within else Window.partitionBy(F.col("users") < 0)
    is_small = F.col("users") < least_users
    users_of_small = F.coalesce(F.sum(F.when(is_small, F.col("users"))).over(group), F.lit(0))
    position = F.row_number().over(group.orderBy(is_small, "users", *CELL))
    needs_another = (users_of_small > 0) & (users_of_small < least_users)
    joins = reduce(or_, [is_small, needs_another & (position == 1)])
    return (
        cells.withColumn("joins", joins)
        .withColumns(
            {name: F.when(F.col("joins"), OTHER).otherwise(F.col(name)) for name in CELL if name not in within}
        )
        .groupBy(*CELL)
        .agg(*(F.sum(name).alias(name) for name in ("users", *sums)))
    )
