"""A night's tables -> the few figures that are shown of it: as many rows as there are groups, not users.

What is read by people then leaves out groups of few users; see :func:`bp_spark.ingest.pseudonyms.withheld`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.ingest.pseudonyms import withheld
from bp_spark.model.stack import LEVELS, RISKS

BEST_FIRST = tuple(reversed(LEVELS))

BIN = 5
"""Points of score in a bar of the distribution; the borders of levels are borders of bars too."""
NEW, GONE = "new", "gone"
"""What stands for the level of a user who has none on one of two nights."""


def distribution(scores: DataFrame) -> DataFrame:
    """``score_date, level, bin, risk_level, users, expected_spend``; ``bin`` is the lower end of BIN points of score.

    Args:
        scores: rows of SCORES.
    """
    lower = (F.least(F.floor(F.col("score") / BIN), F.lit(100 // BIN - 1)) * BIN).cast("int")
    return scores.groupBy("score_date", "level", lower.alias("bin"), "risk_level").agg(
        F.count(F.lit(1)).alias("users"), F.sum("expected_spend").alias("expected_spend")
    )


def migration(before: DataFrame, after: DataFrame) -> DataFrame:
    """``before, after, users``: users by their level on two nights, NEW or GONE where they have none.

    Args:
        before: rows of SCORES of one night.
        after: rows of SCORES of a later one.
    """
    one = before.select("user_key", F.col("level").alias("before"))
    other = after.select("user_key", F.col("level").alias("after"))
    levels = F.coalesce("before", F.lit(NEW)).alias("before"), F.coalesce("after", F.lit(GONE)).alias("after")
    return one.join(other, "user_key", "full_outer").groupBy(*levels).agg(F.count(F.lit(1)).alias("users"))


def reasons(scores: DataFrame) -> DataFrame:
    """``group, users, raised, contribution, feature``: of how many users a group of features is among the reasons, for how many
    of these it raised the expected spend, the mean size of what it came to in money, and the feature that most often did most
    of it.

    Args:
        scores: rows of SCORES of one night.
    """
    size = F.col("contribution")
    return (
        scores.select(F.inline("reasons"))
        # nights of before have none
        .filter("group IS NOT NULL")
        .groupBy("group")
        .agg(
            F.count(F.lit(1)).alias("users"),
            F.count_if(size > 0).alias("raised"),
            F.avg(F.abs(size)).alias("contribution"),
            F.mode("feature").alias("feature"),
        )
    )


def freshness(events: DataFrame, score_date: date, days: int) -> DataFrame:
    """``kind, newest, last_day, events``: the newest day of each kind of event in the ``days`` before the date, and how many
    lie on its last day and in all of them.

    Args:
        events: EVENTS.
    """
    day = F.col("event_date")
    recent = events.filter((day >= F.lit(score_date - timedelta(days=days))) & (day < F.lit(score_date)))
    return recent.groupBy("kind").agg(
        F.max(day).alias("newest"),
        F.count_if(day == F.lit(score_date - timedelta(days=1))).alias("last_day"),
        F.count(F.lit(1)).alias("events"),
    )


def refused(quarantine: DataFrame, ingests: list[int]) -> DataFrame:
    """``source, rule, rows, tonight``: rows in quarantine by what they broke, and those that the ingests brought.

    Args:
        quarantine: QUARANTINE.
    """
    fresh: Column = F.col("ingest_id").isin(ingests) if ingests else F.lit(False)
    return quarantine.groupBy("source", "rule").agg(F.count(F.lit(1)).alias("rows"), F.count_if(fresh).alias("tonight"))


@dataclass(frozen=True)
class Group:
    """A group of users as people may read of it; ``part`` is its share of all, NaN where that is withheld (``*``)."""

    users: str
    share: str
    spend: str
    mean: str
    part: float


def by_level(night: pd.DataFrame, smallest: int) -> dict[str, Group]:
    """Level -> its users, best first.

    Args:
        night: rows of :func:`distribution` of one night.
        smallest: users of which figures may be told; the night's total counts as told.
    """
    return _grouped(night, "level", BEST_FIRST, smallest)


def by_risk(night: pd.DataFrame, smallest: int) -> dict[str, Group]:
    """Risk level -> its users; see :func:`by_level`."""
    return _grouped(night, "risk_level", RISKS, smallest)


def _grouped(night: pd.DataFrame, by: str, groups: Sequence[str], smallest: int) -> dict[str, Group]:
    sums = night.groupby(by)[["users", "expected_spend"]].sum().reindex(list(groups), fill_value=0)
    counts = {group: int(sums["users"][group]) for group in groups}
    hidden, total = withheld(counts, [groups], smallest), sum(counts.values())
    withheld_group = Group("*", "*", "*", "*", math.nan)
    return {
        group: withheld_group if group in hidden else _group(counts[group], float(sums["expected_spend"][group]), total)
        for group in groups
    }


def _group(users: int, spend: float, total: int) -> Group:
    part = users / total if total else 0.0
    return Group(f"{users:,}", f"{part:.1%}", f"{spend:,.0f}", f"{spend / users:,.2f}" if users else "–", part)
