"""Do scores and their errors differ by segment? Each group of a segment beside all its other users.

In: scores of a night, segments of users and, where the horizon is over, what they spent. Out: figures by group with intervals,
and their ratio to the same figure of everybody else, all by sums inside Spark. Segments are read here and for reports of
backtests, and nowhere else: no feature and no model sees them.

A figure is a ratio of sums ``R = N / D`` over users, a mean where ``D`` counts them. Its standard error is that of the delta
method, ``sqrt(m / (m - 1) Σ (n_i - R d_i)²) / D`` with ``m`` users (Deng, Knoblich and Lu 2018, "Applying the delta method in
metric analytics"), so that no user has to be drawn again. A group and the others share no user, so that of the logarithm of
their ratio the variances of both, relative to their squares, add up (Katz et al. 1978).
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
"""Of a normal distribution, between -Z and Z is 90 %."""
TOP = 0.8
"""Users who spend more than this share of users are the top."""

_SUMS = ("n", "d", "nn", "nd", "dd")

Figures = Mapping[str, tuple[Column, Column]]
"""Name -> what is summed over users above and below the line."""


def of_scores() -> Figures:
    """Figures that need no spend: the mean score, and the share of users on each level."""
    levels = {f"level_{level}": (_one(F.col("level") == level), F.lit(1.0)) for level in sorted(LEVELS)}
    return {"score": (F.col("score"), F.lit(1.0)), **levels}


def of_errors(top_spend: float) -> Figures:
    """Figures that hold scores against ``label_spend``, which is 0 where it is below.

    - ``mae``: mean absolute error, in money;
    - ``relative_error``: the same, relative to the mean spend;
    - ``calibration``: mean expected spend over mean spend: above 1 a group is overrated;
    - ``coverage``: share of users whose spend is inside ``low``..``high``;
    - ``top_found``: share of users who spent more than ``top_spend`` that have level A (equal opportunity, Hardt et al. 2016).
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
    """``user_key, segment, group``: of each user the newest value of each segment that has one.

    Args:
        users: rows of RAW_USERS.
    """
    pairs = users.filter(F.col("user_key").isNotNull()).select("user_key", "ingest_id", F.explode("segment"))
    newest = F.max_by("value", F.struct("ingest_id", "value")).alias("group")
    known = pairs.filter(F.col("value").isNotNull())
    return known.groupBy("user_key", F.col("key").alias("segment")).agg(newest)


def in_groups(night: DataFrame, segments: DataFrame, names: Sequence[str]) -> DataFrame:
    """Each user of a night once for each of the segments, with ``segment`` and ``group``; NOT_GIVEN who has none.

    Args:
        night: rows of SCORES of one date.
        segments: what :func:`newest_segments` gave.
        names: all segments.
    """
    by_user = segments.groupBy("user_key").agg(
        F.map_from_entries(F.collect_list(F.struct("segment", "group"))).alias("_groups")
    )
    theirs = [
        F.struct(
            F.lit(name).alias("segment"),
            F.coalesce(F.element_at("_groups", F.lit(name)), F.lit(NOT_GIVEN)).alias("group"),
        )
        for name in names
    ]
    return night.join(by_user, "user_key", "left").select(*night.columns, F.inline(F.array(*theirs)))


def report(users: DataFrame, figures: Figures, config: FairnessConfig, least_users: int) -> DataFrame:
    """Figures of each group, and beside those of all other users of the segment.

    Groups of fewer than ``least_users`` users are joined; where even that has fewer, its users are left out of the
    segment, of ALL too, so that nobody can subtract them.

    Args:
        users: what :func:`in_groups` gave, with the columns that the figures read.
        figures: name -> (above, below the line).

    Returns:
        The columns of FAIRNESS from ``segment`` on; rows ALL have no ratio.
    """
    sums = _sums(users, figures)
    few = F.col("users") < least_users
    joined = _added(sums.withColumn("group", F.when(few, SMALL_GROUPS).otherwise(F.col("group"))), "group")
    shown = joined.filter(~few)
    total = _added(shown.withColumn("group", F.lit(ALL)), "group").drop("group")
    named = total.select("segment", "metric", *(F.col(name).alias(f"all_{name}") for name in ("users", *_SUMS)))
    both = shown.join(named, ["segment", "metric"]).unionByName(
        total.withColumn("group", F.lit(ALL)), allowMissingColumns=True
    )
    theirs = {name: F.col(name) for name in ("users", *_SUMS)}
    others = {name: F.col(f"all_{name}") - F.col(name) for name in theirs}
    value, error = _value(theirs), _standard_error(theirs)
    other_value, other_error = _value(others), _standard_error(others)
    low, high = _interval(theirs)
    ratio = F.try_divide(value, other_value)
    relative = F.sqrt(F.pow(F.try_divide(error, value), 2) + F.pow(F.try_divide(other_error, other_value), 2))
    # a share of nobody, or of all, has no error of its own: how far it may be from there is its interval's other end
    ratio_low = F.when(_edge(theirs), F.try_divide(low, other_value)).otherwise(ratio * F.exp(-Z * relative))
    ratio_high = F.when(_edge(theirs), F.try_divide(high, other_value)).otherwise(ratio * F.exp(Z * relative))
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
    """``segment, group, users, metric`` and sums of the figure's parts, their squares and product."""
    aggregates = [F.count(F.lit(1)).alias("users")]
    for name, (above, below) in figures.items():
        for part, value in zip(_SUMS, (above, below, above * above, above * below, below * below), strict=True):
            aggregates.append(F.sum(value.cast("double")).alias(f"{name}_{part}"))
    rows = [
        F.struct(F.lit(name).alias("metric"), *(F.col(f"{name}_{part}").alias(part) for part in _SUMS))
        for name in figures
    ]
    return (
        users.groupBy("segment", "group").agg(*aggregates).select("segment", "group", "users", F.inline(F.array(*rows)))
    )


def _added(sums: DataFrame, group: str) -> DataFrame:
    return sums.groupBy("segment", group, "metric").agg(*(F.sum(name).alias(name) for name in ("users", *_SUMS)))


def _value(of: Mapping[str, Column]) -> Column:
    return F.try_divide(of["n"], of["d"])


def _standard_error(of: Mapping[str, Column]) -> Column:
    value = _value(of)
    # sums cancel to rounding where all users are alike
    squares = F.greatest(of["nn"] - 2 * value * of["nd"] + value * value * of["dd"], F.lit(0.0))
    return F.try_divide(F.sqrt(F.try_divide(of["users"], of["users"] - 1) * squares), of["d"])


def _interval(of: Mapping[str, Column]) -> tuple[Column, Column]:
    """Ends of the 90 % interval: Wilson's (1927) of a share, by the standard error of any other figure."""
    value, error = _value(of), _standard_error(of)
    over = F.try_divide(F.lit(Z * Z), of["d"])
    middle = (value + over / 2) / (1 + over)
    half = F.sqrt(over * value * (1 - value) + over * over / 4) / (1 + over)
    low = F.when(_share(of), middle - half).otherwise(value - Z * error)
    return F.greatest(low, F.lit(0.0)), F.when(_share(of), middle + half).otherwise(value + Z * error)


def _share(of: Mapping[str, Column]) -> Column:
    """Whether users count as 0 or 1, above and below the line."""
    return (of["nn"] == of["n"]) & (of["dd"] == of["d"])


def _edge(of: Mapping[str, Column]) -> Column:
    return _share(of) & ((of["n"] == 0) | (of["n"] == of["d"]))


def _one(condition: Column) -> Column:
    return condition.cast("double")
