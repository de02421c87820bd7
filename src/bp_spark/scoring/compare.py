"""How far two computations of the same scores lie apart, user by user."""

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

NUMBERS = ("expected_spend", "low", "high", "p_active", "score")
WORDS = ("user_key", "bundle_digest", "input_digest")
COMPARED = (*WORDS, *PREDICTION_COLUMNS)
"""Columns of SCORES that are the same whenever and with whomever a night is computed."""
TOLERANCE = 1e-5
"""How far two computations of a number may be apart, relative to it where it is above 1: single precision sums of the network
depend on who shares the batch, by about 1e-7."""


def differences(stored: DataFrame, computed: DataFrame, bundle: Bundle, score_date: date) -> DataFrame:
    """How far two computations of the same scores are apart, user by user.

    Args:
        stored: rows of SCORES of one night.
        computed: the same night, as computed by ``bundle``.
        score_date: the night.

    Returns:
        A double for each of COMPARED: 0 where both say the same, up to TOLERANCE where that is due to who shared a batch, more
        where they differ, infinity where one side has nothing to compare. A label on whose border the user stands within
        TOLERANCE counts as the same.
    """
    both = stored.alias("s").join(computed.alias("c"), F.col("s.user_key") == F.col("c.user_key"), "full_outer")
    s, c = ({name: F.col(f"{side}.{name}") for name in COMPARED} for side in "sc")
    apart = {name: _numbers_apart(s[name], c[name]) for name in NUMBERS}
    apart |= {name: _words_apart(s[name], c[name]) for name in WORDS}
    for label, figure, borders in (
        ("level", c["score"], LEVEL_BORDERS),
        ("risk_level", relative_width(c, bundle.fusion.factor(score_date)), bundle.fusion.risk),
    ):
        on_border = reduce(or_, (_numbers_apart(figure, F.lit(border)) <= TOLERANCE for border in borders))
        apart[label] = F.when(on_border, 0.0).otherwise(_words_apart(s[label], c[label]))
    by_horizon = F.map_zip_with(
        s["expected_by_horizon"], c["expected_by_horizon"], lambda _, x, y: _numbers_apart(x, y)
    )
    apart["expected_by_horizon"] = F.array_max(F.map_values(by_horizon))
    apart["reasons"] = _reasons_apart(s["reasons"], c["reasons"])
    apart["base_spend"] = _numbers_apart(s["base_spend"], c["base_spend"])
    apart["other_reasons"] = _money_apart(s["other_reasons"], c["other_reasons"], c["expected_spend"])
    nothing = {name: F.when(s[name].isNull() != c[name].isNull(), math.inf) for name in COMPARED}
    return both.select(*(F.coalesce(nothing[name], apart[name], F.lit(0.0)).alias(name) for name in COMPARED))


def _numbers_apart(x: Column, y: Column) -> Column:
    """Relative to the larger where that is above 1."""
    return _money_apart(x, y, F.lit(1.0))


def _words_apart(x: Column, y: Column) -> Column:
    return F.when(x.eqNullSafe(y), 0.0).otherwise(math.inf)


def _reasons_apart(x: Column, y: Column) -> Column:
    """By group; of one that only one side lists, how much more it is than the least that the other does: which of two nearly
    equal ones is the last to be listed is a matter of rounding."""

    def by_group(reasons: Column, field: str) -> Column:
        return F.map_from_entries(F.transform(reasons, lambda each: F.struct(each["group"], each[field])))

    def sizes(reasons: Column) -> Column:
        return F.array_max(F.transform(reasons, lambda each: F.abs(each["contribution"])))

    def least(reasons: Column) -> Column:
        return F.array_min(F.transform(reasons, lambda each: F.abs(each["contribution"])))

    scale = F.greatest(sizes(x), sizes(y))
    both = F.map_zip_with(
        by_group(x, "contribution"),
        by_group(y, "contribution"),
        lambda _, one, other: (
            F.when(one.isNull(), F.abs(F.abs(other) - least(x)))
            .when(other.isNull(), F.abs(F.abs(one) - least(y)))
            .otherwise(F.abs(one - other))
        ),
    )
    apart = F.array_max(F.map_values(both)) / F.greatest(scale, F.lit(1.0))
    values = F.map_zip_with(by_group(x, "value"), by_group(y, "value"), lambda _, one, other: _values_apart(one, other))
    features = F.map_zip_with(
        by_group(x, "feature"), by_group(y, "feature"), lambda _, one, other: _values_apart(one, other)
    )
    return F.greatest(
        F.coalesce(apart, F.lit(0.0)), F.array_max(F.map_values(values)), F.array_max(F.map_values(features))
    )


def _money_apart(x: Column, y: Column, scale: Column) -> Column:
    """Relative to a user's money: what is left of sums that cancel is as exact as these are."""
    apart = F.abs(x - y) / F.greatest(F.abs(scale), F.abs(x), F.abs(y), F.lit(1.0))
    return F.when(x.eqNullSafe(y), 0.0).otherwise(F.coalesce(apart, F.lit(math.inf)))


def _values_apart(x: Column, y: Column) -> Column:
    """0 where both are the same or one side has none."""
    return F.when(x.isNull() | y.isNull() | (x == y), 0.0).otherwise(math.inf)
