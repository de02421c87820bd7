"""Weekly revenue, orders and buyers of the platform and its categories, without a week of few users.

Weeks are spans of seven days that end the day before the scored date.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import pairwise

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.core.session import persisted
from bp_spark.features.user_daily import cents
from bp_spark.model.market import LEAST_WEEKS, LONGEST, WEEKS_AHEAD
from bp_spark.scoring.profiles.segments import NONE, OTHER
from bp_spark.scoring.profiles.totals import EVERYONE, PLATFORM

PAST_WEEKS = 26
"""Weeks of the past that the table shows."""
MOST_CATEGORIES = 12
"""Categories with a forecast of their own; all others are one."""
MOST_WEEKS_BEHIND = 4
"""Weeks without any event before the date, beyond which there is no forecast."""
CATEGORY, REVENUE = "category", "revenue"
SERIES = ("segment", "value", "measure")
"""Columns that identify a series."""
DAYS = 7 * WEEKS_AHEAD
"""Days that are forecast."""

_CENTS = "decimal(38,0)"


@dataclass(frozen=True)
class History:
    """Weeks of the past.

    Attributes:
        series: ``segment, value, measure, week, amount``, a row a week; week 0 ends the day before the date. A series has no
            gap between its weeks.
        weeks_behind: Newest weeks that the data don't cover whole.
        new_buyer_share: Share of the revenue of 13 weeks that came from users who first ordered in them; NaN without revenue.
        missing: Why there is no series, in words; empty if there is one.
    """

    series: pd.DataFrame
    weeks_behind: int = 0
    new_buyer_share: float = math.nan
    missing: str = ""


def weekly_history(daily: DataFrame, events: DataFrame, day: date, least_users: int) -> History:
    """Return the weekly revenue, orders and buyers of the platform and of its categories.

    Revenue is money paid minus refunds, as in labels. Categories whose purchases were of 1 to ``least_users - 1`` users in one
    of the 26 newest weeks are merged, and so are all but the 12 with most revenue. If the merged ones are still too few, the
    smallest of the others joins them. So no week that is shown, and no difference between the platform and its categories,
    is of few users. A series begins with its first week of ``least_users`` users.

    Args:
        daily: USER_DAILY.
        events: EVENTS.
        day: The date; only days before it count.
        least_users: Least users of a group.
    """
    seen = daily.filter(F.col("day") < F.lit(day))
    days = sorted(row[0] for row in seen.select("day").distinct().collect())
    if not days:
        return _no_history("there is no event before the date")
    behind = _weeks_behind(days, day)
    if behind > MOST_WEEKS_BEHIND:
        return _no_history(f"the newest event is of {days[-1]}")
    weeks = _Weeks(day, behind, min((day - days[0]).days // 7, LONGEST), least_users)
    platform = weeks.of_platform(seen)
    series = weeks.series(platform, PLATFORM, EVERYONE)
    if series.empty:
        return _no_history(
            f"there are fewer than {LEAST_WEEKS} weeks, or one of the newest {PAST_WEEKS} has fewer than {least_users} users"
        )
    with persisted(weeks.of_category_users(events)) as category_users:
        by_category = weeks.of_categories(category_users)
    of_categories = (
        weeks.series(rows, CATEGORY, str(value)) for value, rows in by_category.groupby("category", sort=True)
    )
    all_series = pd.concat([series, *of_categories], ignore_index=True)
    return History(all_series, behind, _new_buyer_share(seen, day))


def _weeks_behind(days: Sequence[date], day: date) -> int:
    """Return how many of the newest weeks the data don't cover whole.

    A pause before the date that is no longer than one of the 26 weeks before is the shop's, as a Sunday may be; what is longer
    is missing.

    Args:
        days: Days with an event, in order.
        day: The date.
    """
    recent = [one for one in days if one >= days[-1] - timedelta(weeks=PAST_WEEKS)]
    usual = max(((later - earlier).days - 1 for earlier, later in pairwise(recent)), default=0)
    return math.ceil(max(0, (day - days[-1]).days - 1 - usual) / 7)


def _no_history(missing: str) -> History:
    return History(pd.DataFrame(columns=[*SERIES, "week", "amount"]), missing=missing)


@dataclass(frozen=True)
class _Weeks:
    """The weeks before a date.

    Attributes:
        day: The date.
        behind: Newest weeks to leave out.
        oldest: Number of whole weeks with data.
        least_users: Least users of a group.
    """

    day: date
    behind: int
    oldest: int
    least_users: int

    def of(self, column: str) -> Column:
        """Return the week of a day, 0 for the seven days before the date."""
        return F.floor((F.datediff(F.lit(self.day), column) - 1) / 7).cast("int")

    def within(self, column: str) -> Column:
        """Return whether a day is in one of the weeks."""
        first, after = (self.day - timedelta(weeks=weeks) for weeks in (self.oldest, self.behind))
        return (F.col(column) >= F.lit(first)) & (F.col(column) < F.lit(after))

    def of_platform(self, daily: DataFrame) -> pd.DataFrame:
        """Return ``week, cents, orders, buyers, users`` of all users, a row a week."""
        bought = daily.filter(self.within("day") & ((F.col("orders") > 0) | (F.col("spend") != 0)))
        by_user = bought.groupBy("user_key", self.of("day").alias("week")).agg(
            F.sum(cents("spend").cast(_CENTS)).alias("cents"), F.sum("orders").alias("orders")
        )
        return _by_week(by_user).toPandas()

    def of_category_users(self, events: DataFrame) -> DataFrame:
        """Return ``user_key, week, category, cents, orders``; an order counts in each category that it has a paid line of."""
        lines = events.filter((F.col("kind") == "purchase") & self.within("event_date"))
        category = F.coalesce(F.split("category", " > ")[0], F.lit(NONE))
        # the key of orders in user_daily
        orders = lines.groupBy("user_key", "event_date", "order_id", category.alias("category")).agg(
            F.sum(cents("amount").cast(_CENTS)).alias("cents"), F.max((F.col("amount") > 0).cast("int")).alias("paid")
        )
        return orders.groupBy("user_key", self.of("event_date").alias("week"), "category").agg(
            F.sum("cents").alias("cents"), F.sum("paid").alias("orders")
        )

    def of_categories(self, category_users: DataFrame) -> pd.DataFrame:
        """Return ``category, week, cents, orders, buyers, users`` of the categories that are shown; none of a single one.

        Args:
            category_users: See :meth:`of_category_users`.
        """
        shown = self._large_categories(category_users)
        while shown:
            merged = F.when(F.col("category").isin(shown), F.col("category")).otherwise(F.lit(OTHER))
            by_user = (
                category_users.withColumn("category", merged)
                .groupBy("user_key", "week", "category")
                .agg(*(F.sum(name).alias(name) for name in ("cents", "orders")))
            )
            rows = _by_week(by_user, "category").toPandas()
            others = rows[rows["category"] == OTHER]
            if not self._few(others):
                return rows if rows["category"].nunique() > 1 else rows[:0]
            shown = shown[:-1]
        return pd.DataFrame(columns=["category", "week", "cents", "orders", "buyers", "users"])

    def _large_categories(self, category_users: DataFrame) -> list[str]:
        """Return the categories that may be shown, that with most revenue first."""
        recent = category_users.filter(F.col("week") < self.behind + PAST_WEEKS)
        by_week = _by_week(recent, "category")
        rows = (
            by_week.groupBy("category")
            .agg(F.min("users").alias("users"), F.sum("cents").alias("cents"), F.count(F.lit(1)).alias("weeks"))
            # OTHER is the name of merged rows; a category that sells in less than half of the weeks gets no forecast
            .filter((F.col("users") >= self.least_users) & (F.col("category") != OTHER) & (F.col("cents") > 0))
            .filter(F.col("weeks") * 2 > min(PAST_WEEKS, self.oldest - self.behind))
            .orderBy(F.desc("cents"), "category")
            .limit(MOST_CATEGORIES)
            .collect()
        )
        return [row["category"] for row in rows]

    def _few(self, rows: pd.DataFrame) -> bool:
        """Return whether one of the newest weeks is of few users."""
        recent = rows[rows["week"] < self.behind + PAST_WEEKS]
        return bool((recent["users"] < self.least_users).any())

    def series(self, rows: pd.DataFrame, segment: str, value: str) -> pd.DataFrame:
        """Return the series of a group, as in :class:`History`; none if it is too short, or of few users in a newest week.

        Args:
            rows: ``week, cents, orders, buyers, users``; a missing week has nobody.
            segment: Of the group.
            value: Likewise.
        """
        large = rows.loc[rows["users"] >= self.least_users, "week"]
        if large.empty or self._few(rows) or large.max() + 1 - self.behind < LEAST_WEEKS:
            return _no_history("").series
        weeks = range(self.behind, int(large.max()) + 1)
        whole = rows.set_index("week").reindex(weeks, fill_value=0)
        amounts = {REVENUE: whole["cents"].astype(float) / 100, "orders": whole["orders"], "buyers": whole["buyers"]}
        parts = [
            pd.DataFrame(
                {"segment": segment, "value": value, "measure": measure, "week": weeks, "amount": amount.astype(float)}
            )
            for measure, amount in amounts.items()
        ]
        return pd.concat(parts, ignore_index=True)


def _by_week(by_user: DataFrame, *more: str) -> DataFrame:
    """Return sums of users by week and further columns."""
    return by_user.groupBy(*more, "week").agg(
        F.sum("cents").alias("cents"),
        F.sum("orders").cast("long").alias("orders"),
        F.count_if(F.col("orders") > 0).alias("buyers"),
        F.count(F.lit(1)).alias("users"),
    )


def _new_buyer_share(daily: DataFrame, day: date) -> float:
    """Return :attr:`History.new_buyer_share`."""
    recent = F.col("day") >= F.lit(day - timedelta(days=DAYS))
    spent = F.coalesce(F.sum(F.when(recent, cents("spend").cast(_CENTS))), F.lit(0))
    first_order = F.min(F.when(F.col("orders") > 0, F.col("day")))
    users = daily.groupBy("user_key").agg(first_order.alias("first"), spent.alias("cents"))
    is_new = F.col("first") >= F.lit(day - timedelta(days=DAYS))
    new, everyone = users.agg(F.sum(F.when(is_new, F.col("cents"))), F.sum("cents")).collect()[0]
    return float(new or 0) / float(everyone) if everyone and everyone > 0 else math.nan
