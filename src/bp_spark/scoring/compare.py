"""Differences between two computations of the same scores, user by user."""

from __future__ import annotations

import math
from datetime import date
from functools import reduce
from operator import or_

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.model.stack import LEVEL_BORDERS, relative_width
from bp_spark.registry.bundle import Bundle
from bp_spark.registry.predictions import PREDICTION_COLUMNS

NUMBER_COLUMNS = ("expected_spend", "low", "high", "p_active", "score")
EXACT_COLUMNS = ("user_key", "bundle_digest", "input_digest")
"""Columns whose values must be equal."""
COMPARED_COLUMNS = (*EXACT_COLUMNS, *PREDICTION_COLUMNS)
"""Columns of SCORES that don't depend on when, and with which other users, a score is computed."""
TOLERANCE = 1e-5
"""Largest difference between two computations of a number, relative to it where it is above 1. Sums of the network in single
precision depend on the users of the batch, by about 1e-7."""


def differences(stored: DataFrame, computed: DataFrame, bundle: Bundle, score_date: date) -> DataFrame:
    """Return how far two computations of the same scores are apart, user by user.

    A difference is 0 where both are equal, and up to TOLERANCE where rounding in another batch explains it. It is infinity
    where one side has no value. A level or risk level counts as equal if the user is within TOLERANCE of its border.

    Args:
        stored: Rows of SCORES of one date.
        computed: Rows of the same date, computed by ``bundle``.
        bundle: The model.
        score_date: The date.

    Returns:
        One double for each of COMPARED_COLUMNS.
    """
    both = stored.alias("s").join(computed.alias("c"), F.col("s.user_key") == F.col("c.user_key"), "full_outer")
    s, c = ({name: F.col(f"{side}.{name}") for name in COMPARED_COLUMNS} for side in "sc")
    apart = {name: _number_difference(s[name], c[name]) for name in NUMBER_COLUMNS}
    apart |= {name: _exact_difference(s[name], c[name]) for name in EXACT_COLUMNS}
    for label, figure, borders in (
        ("level", c["score"], LEVEL_BORDERS),
        ("risk_level", relative_width(c, bundle.stack.factor(score_date)), bundle.stack.risk),
    ):
        on_border = reduce(or_, (_number_difference(figure, F.lit(border)) <= TOLERANCE for border in borders))
        apart[label] = F.when(on_border, 0.0).otherwise(_exact_difference(s[label], c[label]))
    by_horizon = F.map_zip_with(
        s["expected_by_horizon"], c["expected_by_horizon"], lambda _, x, y: _number_difference(x, y)
    )
    apart["expected_by_horizon"] = F.array_max(F.map_values(by_horizon))
    apart["reasons"] = _reasons_difference(s["reasons"], c["reasons"])
    apart["base_spend"] = _number_difference(s["base_spend"], c["base_spend"])
    apart["other_reasons"] = _money_difference(s["other_reasons"], c["other_reasons"], c["expected_spend"])
    one_is_null = {name: F.when(s[name].isNull() != c[name].isNull(), math.inf) for name in COMPARED_COLUMNS}
    return both.select(
        *(F.coalesce(one_is_null[name], apart[name], F.lit(0.0)).alias(name) for name in COMPARED_COLUMNS)
    )


def _number_difference(x: Column, y: Column) -> Column:
    """Return the difference, relative to the larger number where that is above 1."""
    return _money_difference(x, y, F.lit(1.0))


def _exact_difference(x: Column, y: Column) -> Column:
    return F.when(x.eqNullSafe(y), 0.0).otherwise(math.inf)


def _reasons_difference(x: Column, y: Column) -> Column:
    """Return the largest difference between two arrays of reasons, group by group.

    Rounding may decide which of two nearly equal groups is listed last. So a group that only one side lists is compared with
    the smallest contribution that the other side lists.
    """

    def by_group(reasons: Column, field: str) -> Column:
        return F.map_from_entries(F.transform(reasons, lambda reason: F.struct(reason["group"], reason[field])))

    def largest(reasons: Column) -> Column:
        return F.array_max(F.transform(reasons, lambda reason: F.abs(reason["contribution"])))

    def smallest(reasons: Column) -> Column:
        return F.array_min(F.transform(reasons, lambda reason: F.abs(reason["contribution"])))

    scale = F.greatest(largest(x), largest(y))
    contributions = F.map_zip_with(
        by_group(x, "contribution"),
        by_group(y, "contribution"),
        lambda _, one, other: (
            F.when(one.isNull(), F.abs(F.abs(other) - smallest(x)))
            .when(other.isNull(), F.abs(F.abs(one) - smallest(y)))
            .otherwise(F.abs(one - other))
        ),
    )
    apart = F.array_max(F.map_values(contributions)) / F.greatest(scale, F.lit(1.0))
    values = F.map_zip_with(
        by_group(x, "value"), by_group(y, "value"), lambda _, one, other: _value_difference(one, other)
    )
    features = F.map_zip_with(
        by_group(x, "feature"), by_group(y, "feature"), lambda _, one, other: _value_difference(one, other)
    )
    return F.greatest(
        F.coalesce(apart, F.lit(0.0)), F.array_max(F.map_values(values)), F.array_max(F.map_values(features))
    )


def _money_difference(x: Column, y: Column, scale: Column) -> Column:
    """Return the difference relative to a user's money: a rest of sums that cancel is only as exact as the sums."""
    apart = F.abs(x - y) / F.greatest(F.abs(scale), F.abs(x), F.abs(y), F.lit(1.0))
    return F.when(x.eqNullSafe(y), 0.0).otherwise(F.coalesce(apart, F.lit(math.inf)))


def _value_difference(x: Column, y: Column) -> Column:
    """Return 0 where both are equal or one side has none, else infinity."""
    return F.when(x.isNull() | y.isNull() | (x == y), 0.0).otherwise(math.inf)
