"""Figures of all users of a scored date, from its tables: as many rows as there are groups, not users.

People never see groups of few users; see :func:`bp_spark.ingest.pseudonyms.withheld`.
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
from bp_spark.lakehouse.schema import rows_of_date
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import PROSPECT_SCORES
from bp_spark.model.stack import LEVELS, RISKS

BEST_FIRST = tuple(reversed(LEVELS))

BIN = 5
"""Points of score in a bar of the distribution; the borders of levels are borders of bars too."""
NEW, GONE = "new", "gone"
"""In the place of the level of a user who has none on one of two dates."""


def distribution(scores: DataFrame) -> DataFrame:
    """Count users and money by date, level, bin of score and risk level.

    Args:
        scores: Rows of SCORES.

    Returns:
        ``score_date, level, bin, risk_level, users, expected_spend``; ``bin`` is the lower end of BIN points of score.
    """
    lower = (F.least(F.floor(F.col("score") / BIN), F.lit(100 // BIN - 1)) * BIN).cast("int")
    return scores.groupBy("score_date", "level", lower.alias("bin"), "risk_level").agg(
        F.count(F.lit(1)).alias("users"), F.sum("expected_spend").alias("expected_spend")
    )


def migration(before: DataFrame, after: DataFrame) -> DataFrame:
    """Count users by their level on two dates.

    Args:
        before: Rows of SCORES of one date.
        after: Rows of SCORES of a later date.

    Returns:
        ``before, after, users``; NEW or GONE stands for a missing level.
    """
    levels_before = before.select("user_key", F.col("level").alias("before"))
    levels_after = after.select("user_key", F.col("level").alias("after"))
    levels = F.coalesce("before", F.lit(NEW)).alias("before"), F.coalesce("after", F.lit(GONE)).alias("after")
    both = levels_before.join(levels_after, "user_key", "full_outer")
    return both.groupBy(*levels).agg(F.count(F.lit(1)).alias("users"))


def reasons(scores: DataFrame) -> DataFrame:
    """Summarize the reasons by group of features.

    Args:
        scores: Rows of SCORES of one date.

    Returns:
        ``group, users, raised, contribution, feature``: users with the group among their reasons, and users whose expected
        spend it raised. ``contribution`` is its mean size in money; ``feature`` most often had the largest effect.
    """
    size = F.col("contribution")
    return (
        scores.select(F.inline("reasons"))
        # dates that an older version scored have none
        .filter("group IS NOT NULL")
        .groupBy("group")
        .agg(
            F.count(F.lit(1)).alias("users"),
            F.count_if(size > 0).alias("raised"),
            F.avg(F.abs(size)).alias("contribution"),
            F.mode("feature", deterministic=True).alias("feature"),
        )
    )


def freshness(events: DataFrame, score_date: date, days: int) -> DataFrame:
    """Return the newest day of each kind of event in the ``days`` days before the score date.

    Args:
        events: EVENTS.
        score_date: The date.
        days: Days to look back.

    Returns:
        ``kind, newest, last_day, events``: the newest day, the events on the day before the score date, and in all days.
    """
    day = F.col("event_date")
    recent = events.filter((day >= F.lit(score_date - timedelta(days=days))) & (day < F.lit(score_date)))
    return recent.groupBy("kind").agg(
        F.max(day).alias("newest"),
        F.count_if(day == F.lit(score_date - timedelta(days=1))).alias("last_day"),
        F.count(F.lit(1)).alias("events"),
    )


def quarantined(quarantine: DataFrame, new_ingests: list[int]) -> DataFrame:
    """Count rows in quarantine by table and broken rule.

    Args:
        quarantine: QUARANTINE.
        new_ingests: Numbers of the ingests whose rows are new.

    Returns:
        ``source, rule, rows, new_rows``.
    """
    is_new: Column = F.col("ingest_id").isin(new_ingests) if new_ingests else F.lit(False)
    return quarantine.groupBy("source", "rule").agg(
        F.count(F.lit(1)).alias("rows"), F.count_if(is_new).alias("new_rows")
    )


@dataclass(frozen=True)
class Prospects:
    """Sums over the prospects of a date.

    Attributes:
        users: Number of prospects.
        purchases: Expected number of first purchases in the horizon.
        spend: Expected spend in the horizon.
    """

    users: int
    purchases: float
    spend: float

    def in_words(self, currency: str, smallest_group: int) -> str:
        """Return the sums as one line; nothing of fewer prospects than the smallest group.

        >>> Prospects(1200, 36.4, 990.0).in_words("USD", 10)
        '1,200 prospects: 36 first purchases and 990 USD expected'
        >>> Prospects(9, 1.0, 20.0).in_words("USD", 10)
        'fewer than 10 prospects'
        """
        if self.users < smallest_group:
            return f"fewer than {smallest_group:,} prospects"
        return (
            f"{self.users:,} prospects: {self.purchases:,.0f} first purchases and {self.spend:,.0f} {currency} expected"
        )


def prospects_of(lakehouse: Lakehouse, score_date: date) -> Prospects | None:
    """Return the sums over the prospects of a date; ``None`` where none was scored."""
    if not lakehouse.exists(PROSPECT_SCORES.name):
        return None
    rows = rows_of_date(lakehouse.read(PROSPECT_SCORES.name), score_date)
    sums = rows.agg(F.count(F.lit(1)), F.sum("p_active"), F.sum("expected_spend")).collect()[0]
    return Prospects(*sums) if sums[0] else None


@dataclass(frozen=True)
class Group:
    """A group of users in words; a withheld group has ``*`` everywhere.

    Attributes:
        users: Number of users.
        share: Their share of all users.
        spend: Their expected spend.
        mean: Mean expected spend of a user.
        part: ``share`` as a number; NaN where it is withheld.
        spend_part: Their share of the expected spend; NaN where it is withheld.
    """

    users: str
    share: str
    spend: str
    mean: str
    part: float
    spend_part: float


def by_level(rows: pd.DataFrame, smallest_group: int) -> dict[str, Group]:
    """Return level -> its users, best first.

    Args:
        rows: Rows of :func:`distribution` of one date.
        smallest_group: Least users of a group that has figures; people also see the total of the date.
    """
    return _groups(rows, "level", BEST_FIRST, smallest_group)


def by_risk(rows: pd.DataFrame, smallest_group: int) -> dict[str, Group]:
    """Return risk level -> its users; see :func:`by_level`."""
    return _groups(rows, "risk_level", RISKS, smallest_group)


def _groups(rows: pd.DataFrame, by: str, names: Sequence[str], smallest_group: int) -> dict[str, Group]:
    sums = rows.groupby(by)[["users", "expected_spend"]].sum().reindex(list(names), fill_value=0)
    counts = {name: int(sums["users"][name]) for name in names}
    hidden, total = withheld(counts, [names], smallest_group), sum(counts.values())
    withheld_group = Group("*", "*", "*", "*", math.nan, math.nan)
    spend = {name: float(sums["expected_spend"][name]) for name in names}
    totals = total, sum(spend.values())
    return {name: withheld_group if name in hidden else _group(counts[name], spend[name], *totals) for name in names}


def _group(users: int, spend: float, all_users: int, all_spend: float) -> Group:
    part, spend_part = users / all_users if all_users else 0.0, spend / all_spend if all_spend else 0.0
    mean = f"{spend / users:,.2f}" if users else "–"
    return Group(f"{users:,}", f"{part:.1%}", f"{spend:,.0f}", mean, part, spend_part)
