"""Compare scores and their errors by segment: each group of a segment against all other users of the segment.

The input is the scores of a date, the segments of users and, if the horizon is over, their spend. The output is figures by
group with intervals, and their ratio to the same figure of all other users, by sums inside Spark. Segments are only read here
and for reports of backtests: no feature and no model sees them.

A figure is a ratio of sums ``R = N / D`` over users, which is a mean if ``D`` counts users. Its standard error is that of the
delta method, ``sqrt(m / (m - 1) Σ (n_i - R d_i)²) / D`` with ``m`` users (Deng, Knoblich and Lu 2018, "Applying the delta
method in metric analytics"), so no resampling is needed. A group and the others share no user. So the logarithm of their
ratio has the sum of the two variances, each relative to the square of its figure (Katz et al. 1978).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import FairnessConfig
from bp_spark.model.stack import LEVELS

ALL = "(all)"
NOT_GIVEN = "(not given)"
SMALL_GROUPS = "(small groups)"
Z = 1.6448536269514722
"""90 % of a normal distribution are between -Z and Z."""
TOP = 0.8
"""Users who spend more than this share of all users are the top."""

_SUMS = ("n", "d", "nn", "nd", "dd")

Figures = Mapping[str, tuple[Column, Column]]
"""Name -> values that are summed over users, for the numerator and the denominator."""


def of_scores() -> Figures:
    """Return the figures that need no spend: the mean score, and the share of users on each level."""
    levels = {f"level_{level}": (_one(F.col("level") == level), F.lit(1.0)) for level in sorted(LEVELS)}
    return {"score": (F.col("score"), F.lit(1.0)), **levels}


def of_errors(top_spend: float) -> Figures:
    """Return the figures that compare scores with ``label_spend``, where negative spend counts as 0.

    - ``mae``: mean absolute error, in money;
    - ``relative_error``: the mean absolute error, relative to the mean spend;
    - ``calibration``: mean expected spend over mean spend; above 1 a group is overrated;
    - ``coverage``: share of users whose spend is inside ``low``..``high``;
    - ``top_found``: share with level A among users who spent more than ``top_spend`` (equal opportunity, Hardt et al. 2016).
    """
    spend, expected = F.greatest(F.col("label_spend"), F.lit(0.0)), F.col("expected_spend")
    error, top = F.abs(expected - spend), F.col("label_spend") > top_spend
    return {
        "mae": (error, F.lit(1.0)),
        "relative_error": (error, spend),
        "calibration": (expected, spend),
        "coverage": (_one(spend.between(F.col("low"), F.col("high"))), F.lit(1.0)),
        "top_found": (_one(top & (F.col("level") == "A")), _one(top)),
    }


def newest_segments(users: DataFrame) -> DataFrame:
    """Return ``user_key, segment, group``: the newest value of each segment, per user.

    Args:
        users: rows of RAW_USERS.
    """
    pairs = users.filter(F.col("user_key").isNotNull()).select("user_key", "ingest_id", F.explode("segment"))
    newest = F.max_by("value", F.struct("ingest_id", "value")).alias("group")
    with_value = pairs.filter(F.col("value").isNotNull())
    return with_value.groupBy("user_key", F.col("key").alias("segment")).agg(newest)


def in_groups(scores: DataFrame, segments: DataFrame, names: Sequence[str]) -> DataFrame:
    """Return each user once per segment, with ``segment`` and ``group``, which is NOT_GIVEN for a user without a value.

    Args:
        scores: rows of SCORES of one date.
        segments: result of :func:`newest_segments`.
        names: names of all segments.
    """
    by_user = segments.groupBy("user_key").agg(
        F.map_from_entries(F.collect_list(F.struct("segment", "group"))).alias("_groups")
    )
    pairs = [
        F.struct(
            F.lit(name).alias("segment"),
            F.coalesce(F.element_at("_groups", F.lit(name)), F.lit(NOT_GIVEN)).alias("group"),
        )
        for name in names
    ]
    return scores.join(by_user, "user_key", "left").select(*scores.columns, F.inline(F.array(*pairs)))


def report(users: DataFrame, figures: Figures, config: FairnessConfig, least_users: int) -> DataFrame:
    """Return the figures of each group, and their ratios to those of all other users of the segment.

    Groups of fewer than ``least_users`` users are merged into one. If the merged group has fewer too, its users are left out of
    the segment, and of ALL, so that nobody can subtract them.

    Args:
        users: result of :func:`in_groups`, with the columns that the figures read.
        figures: name -> (numerator, denominator).
        config: watched figures, and their thresholds.
        least_users: least number of users in a group that is shown.

    Returns:
        The columns of FAIRNESS from ``segment`` on; rows ALL have no ratio.
    """
    sums = _sums(users, figures)
    few = F.col("users") < least_users
    merged = _merge_groups(sums.withColumn("group", F.when(few, SMALL_GROUPS).otherwise(F.col("group"))))
    shown = merged.filter(~few)
    total = _merge_groups(shown.withColumn("group", F.lit(ALL))).drop("group")
    total_columns = total.select("segment", "metric", *(F.col(name).alias(f"all_{name}") for name in ("users", *_SUMS)))
    both = shown.join(total_columns, ["segment", "metric"]).unionByName(
        total.withColumn("group", F.lit(ALL)), allowMissingColumns=True
    )
    group = {name: F.col(name) for name in ("users", *_SUMS)}
    others = {name: F.col(f"all_{name}") - F.col(name) for name in group}
    value, error = _value(group), _standard_error(group)
    other_value, other_error = _value(others), _standard_error(others)
    low, high = _interval(group)
    ratio = F.try_divide(value, other_value)
    relative = F.sqrt(F.pow(F.try_divide(error, value), 2) + F.pow(F.try_divide(other_error, other_value), 2))
    # a share of 0 or 1 has no standard error: the ends of its own interval limit the ratio
    at_edge = _is_share_at_edge(group)
    ratio_low = F.when(at_edge, F.try_divide(low, other_value)).otherwise(ratio * F.exp(-Z * relative))
    ratio_high = F.when(at_edge, F.try_divide(high, other_value)).otherwise(ratio * F.exp(Z * relative))
    small = F.col("users") < config.small_below
    watched = F.col("metric").isin(*config.watched) & (F.col("group") != ALL)
    apart = (ratio_high < config.min_ratio) | (ratio_low > config.max_ratio)
    return both.select(
        "segment",
        "group",
        "users",
        small.alias("small"),
        "metric",
        value.alias("value"),
        low.alias("low"),
        high.alias("high"),
        ratio.alias("ratio"),
        ratio_low.alias("ratio_low"),
        ratio_high.alias("ratio_high"),
        F.when(watched, config.min_ratio).alias("threshold_low"),
        F.when(watched, config.max_ratio).alias("threshold_high"),
        F.coalesce(watched & ~small & apart, F.lit(False)).alias("broken"),
    )


def _sums(users: DataFrame, figures: Figures) -> DataFrame:
    """Return ``segment, group, users, metric`` and the sums of numerators, denominators, their squares and their product."""
    aggregates = [F.count(F.lit(1)).alias("users")]
    for name, (n, d) in figures.items():
        for part, value in zip(_SUMS, (n, d, n * n, n * d, d * d), strict=True):
            aggregates.append(F.sum(value.cast("double")).alias(f"{name}_{part}"))
    rows = [
        F.struct(F.lit(name).alias("metric"), *(F.col(f"{name}_{part}").alias(part) for part in _SUMS))
        for name in figures
    ]
    return (
        users.groupBy("segment", "group").agg(*aggregates).select("segment", "group", "users", F.inline(F.array(*rows)))
    )


def _merge_groups(sums: DataFrame) -> DataFrame:
    """Add up the sums of rows with the same group."""
    return sums.groupBy("segment", "group", "metric").agg(*(F.sum(name).alias(name) for name in ("users", *_SUMS)))


def _value(sums: Mapping[str, Column]) -> Column:
    return F.try_divide(sums["n"], sums["d"])


def _standard_error(sums: Mapping[str, Column]) -> Column:
    value = _value(sums)
    # if all users are alike, the difference is only rounding, and may be negative
    squares = F.greatest(sums["nn"] - 2 * value * sums["nd"] + value * value * sums["dd"], F.lit(0.0))
    return F.try_divide(F.sqrt(F.try_divide(sums["users"], sums["users"] - 1) * squares), sums["d"])


def _interval(sums: Mapping[str, Column]) -> tuple[Column, Column]:
    """Return the 90 % interval: that of Wilson (1927) for a share, by the standard error for any other figure."""
    value, error = _value(sums), _standard_error(sums)
    over = F.try_divide(F.lit(Z * Z), sums["d"])
    middle = (value + over / 2) / (1 + over)
    half = F.sqrt(over * value * (1 - value) + over * over / 4) / (1 + over)
    low = F.when(_is_share(sums), middle - half).otherwise(value - Z * error)
    return F.greatest(low, F.lit(0.0)), F.when(_is_share(sums), middle + half).otherwise(value + Z * error)


def _is_share(sums: Mapping[str, Column]) -> Column:
    """Return whether each user counts as 0 or 1, in numerator and denominator."""
    return (sums["nn"] == sums["n"]) & (sums["dd"] == sums["d"])


def _is_share_at_edge(sums: Mapping[str, Column]) -> Column:
    """Return whether the figure is a share of 0 or 1."""
    return _is_share(sums) & ((sums["n"] == 0) | (sums["n"] == sums["d"]))


def _one(condition: Column) -> Column:
    return condition.cast("double")
