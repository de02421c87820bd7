"""Cohorts: users by the month of their first purchase, what they spent since, and what they are expected to spend.

Age is counted in periods of 30 days from each user's own first purchase, as is usual in customer-base analysis (Fader and
Hardie 2009, "Probability models for customer-base analysis"). In a calendar month the users of a cohort would be of different
age, and the first month would be a part of one. Horizons of 30, 90 and 180 days are whole periods.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from typing import Any, Self

from pyspark.sql import DataFrame, Row, Window
from pyspark.sql import functions as F

from bp_spark.core.session import persisted
from bp_spark.features.user_daily import cents
from bp_spark.lakehouse.tables import COHORTS
from bp_spark.model.totals import TotalError, Totals, interval
from bp_spark.scoring.profiles.cohort_cells import Cells, Published
from bp_spark.scoring.profiles.columns import shaped
from bp_spark.scoring.profiles.totals import SCALES, sums_by_horizon

PERIOD_DAYS = 30
"""Days of a period of age."""
_WHOLE = "decimal(38,0)"
"""Whole numbers, whose sums don't depend on the order."""


@dataclass(frozen=True)
class Cohort:
    """Users who first bought in a month, or in several months that follow each other.

    Attributes:
        first: First day of the first month.
        last: First day of the last month.
        users: Number of users.
        tenure: Sum of their days since the first purchase.
        expected: Days of a horizon -> sum of the expected spend, in cents.
        variance: Days of a horizon -> variance of that sum if users were independent of each other.
    """

    first: date
    last: date
    users: int
    tenure: int
    expected: dict[int, int]
    variance: dict[int, float]

    @classmethod
    def of_month(cls, row: Row, totals: Totals | None) -> Self:
        """Return the cohort of one row of :func:`_sums_by_month`."""
        errors = totals.errors if totals else ()
        days = [error.days for error in errors if row[f"expected_{error.days}"] is not None]
        expected = {one: int(row[f"expected_{one}"]) for one in days}
        variance = {one: float(row[f"variance_{one}"]) / SCALES["variance"] for one in days}
        return cls(row["month"], row["month"], int(row["users"]), int(row["tenure"]), expected, variance)

    @property
    def months(self) -> list[date]:
        """First days of the months, the oldest first."""
        months = [self.first]
        while months[-1] < self.last:
            months.append(_next_month(months[-1]))
        return months

    def joined(self, later: Self) -> Self:
        """Return the cohort with the users of later months."""
        expected = {
            days: self.expected.get(days, 0) + later.expected.get(days, 0) for days in self.expected | later.expected
        }
        variance = {
            days: self.variance.get(days, 0) + later.variance.get(days, 0) for days in self.variance | later.variance
        }
        users, tenure = self.users + later.users, self.tenure + later.tenure
        return type(self)(self.first, later.last, users, tenure, expected, variance)

    def complete_periods(self, day: date) -> int:
        """Return how many periods of age have ended before ``day`` for whoever first bought in these months."""
        newest_first_day = min(_next_month(self.last), day) - timedelta(days=1)
        return (day - newest_first_day).days // PERIOD_DAYS


def cohorts(
    scores: DataFrame, daily: DataFrame, day: date, least_users: int, totals: Totals | None, bundle_digest: str
) -> DataFrame:
    """Return what each cohort did by age, and what it is expected to spend.

    A cohort has a row for each period of age that all its users have lived through, and one more for all that came since.
    Another row for each horizon adds the expected spend to the spend so far, with the interval of
    :func:`bp_spark.model.totals.interval`. A refund before the first purchase counts in the first period.

    Months of fewer than ``least_users`` users join the months after them, and the newest ones the months before. Within a
    cohort :class:`bp_spark.scoring.profiles.cohort_cells.Cells` withholds what would tell of few users.

    Args:
        scores: Rows of SCORES of ``day``; only their users are counted.
        daily: USER_DAILY; days before ``day`` are read.
        day: The date.
        least_users: Least users that a figure tells of.
        totals: Errors of sums of the bundle; without them nothing is expected.
        bundle_digest: Of the bundle.

    Returns:
        Rows of COHORTS; none where fewer than ``least_users`` users have bought.
    """
    seen = daily.filter(F.col("day") < F.lit(day)).select("user_key", "day", "orders", "spend")
    first_days = seen.filter(F.col("orders") > 0).groupBy("user_key").agg(F.min("day").alias("first_day"))
    buyers = scores.select("user_key", "expected_by_horizon").join(first_days, "user_key")
    with persisted(buyers) as kept_buyers:
        months = [Cohort.of_month(row, totals) for row in _sums_by_month(kept_buyers, day, totals)]
        merged = merged_months(months, least_users)
        cells = _cells(seen, kept_buyers, merged, day)
    blank = dict.fromkeys(COHORTS.schema.names) | {"score_date": day, "bundle_digest": bundle_digest}
    rows = [
        blank | row
        for cohort in merged
        for row in _rows(cohort, cells[cohort.first].published(cohort.users, least_users), totals)
    ]
    return shaped(scores.sparkSession.createDataFrame(rows, COHORTS.schema), COHORTS)


def _next_month(month: date) -> date:
    return (month + timedelta(days=31)).replace(day=1)


def _sums_by_month(buyers: DataFrame, day: date, totals: Totals | None) -> list[Row]:
    """Return a row for each month of first purchases: ``month, users, tenure`` and the sums by horizon."""
    return (
        buyers.groupBy(F.trunc("first_day", "MONTH").alias("month"))
        .agg(
            F.count(F.lit(1)).alias("users"),
            F.sum(F.datediff(F.lit(day), "first_day").cast(_WHOLE)).alias("tenure"),
            *(total.alias(name) for name, total in sums_by_horizon(totals).items()),
        )
        .collect()
    )


def merged_months(months: Sequence[Cohort], least_users: int) -> list[Cohort]:
    """Return cohorts of at least ``least_users`` users, the oldest first; none where all months together have fewer."""
    merged: list[Cohort] = []
    for month in sorted(months, key=lambda one: one.first):
        if merged and merged[-1].users < least_users:
            merged[-1] = merged[-1].joined(month)
        else:
            merged.append(month)
    if len(merged) > 1 and merged[-1].users < least_users:
        newest = merged.pop()
        merged[-1] = merged[-1].joined(newest)
    return [cohort for cohort in merged if cohort.users >= least_users]


def _cells(seen: DataFrame, buyers: DataFrame, merged: Sequence[Cohort], day: date) -> dict[date, Cells]:
    """Return the sums by age of each cohort, by its first month."""
    cells = {cohort.first: Cells(cohort.complete_periods(day)) for cohort in merged}
    months = [(month, cohort.first, cells[cohort.first].last_age) for cohort in merged for month in cohort.months]
    of_month = seen.sparkSession.createDataFrame(months, "month date, cohort date, last_age int")
    month = F.trunc("first_day", "MONTH").alias("month")
    with_cohort = buyers.select("user_key", "first_day", month).join(F.broadcast(of_month), "month")
    period = F.floor(F.datediff("day", "first_day") / PERIOD_DAYS).cast("int")
    age = F.least(F.greatest(period, F.lit(0)), F.col("last_age"))
    previous = F.lag("age", 1, -1).over(Window.partitionBy("user_key").orderBy("age"))
    # a row for each cohort, age and earlier age: as many as there are months, whatever the number of users
    sums = (
        seen.join(with_cohort, "user_key")
        .groupBy("user_key", "cohort", age.alias("age"))
        .agg(F.sum("orders").alias("orders"), F.sum(cents("spend")).alias("cents"))
        .filter((F.col("orders") > 0) | (F.col("cents") != 0))
        .withColumn("previous", previous)
        .groupBy("cohort", "age", "previous")
        .agg(
            F.count(F.lit(1)).alias("users"),
            F.count_if(F.col("orders") > 0).alias("active_users"),
            F.sum(F.col("orders").cast(_WHOLE)).alias("orders"),
            F.sum(F.col("cents").cast(_WHOLE)).alias("cents"),
        )
    )
    for row in sums.collect():
        cells[row["cohort"]].add(
            row["age"],
            row["previous"],
            users=row["users"],
            active_users=row["active_users"],
            orders=int(row["orders"]),
            cents=int(row["cents"]),
        )
    return cells


def _rows(cohort: Cohort, published: Sequence[Published], totals: Totals | None) -> Iterator[dict[str, Any]]:
    mean_tenure = cohort.tenure / cohort.users
    of_all = {"cohort": cohort.first, "cohort_to": cohort.last, "users": cohort.users}
    *complete, newest = published
    for cell in complete:
        days = float((cell.age + 1) * PERIOD_DAYS)
        yield {**of_all, **_history(cell, cohort.users), "complete": True, "days": days}
    yield {**of_all, **_history(newest, cohort.users), "complete": False, "days": mean_tenure}
    spent = newest.cumulative_cents or 0
    for error in totals.errors if totals else ():
        if error.days in cohort.expected:
            expected = _expected(cohort, error, spent, totals.coverage if totals else 0.0)
            yield {**of_all, **expected, "age": newest.age, "days": mean_tenure + error.days}


def _history(cell: Published, users: int) -> dict[str, Any]:
    return {
        "age": cell.age,
        "horizon_days": 0,
        "active_users": cell.active_users,
        "retention": None if cell.active_users is None else cell.active_users / users,
        "orders": cell.orders,
        "spend": _money(cell.cents),
        "cumulative_spend": _money(cell.cumulative_cents),
        "cumulative_spend_per_user": None if cell.cumulative_cents is None else cell.cumulative_cents / 100 / users,
    }


def _expected(cohort: Cohort, error: TotalError, spent: int, coverage: float) -> dict[str, Any]:
    cents_expected, variance = cohort.expected[error.days], cohort.variance[error.days]
    low, high = interval(cents_expected / 100, variance, error, coverage)
    return {
        "horizon_days": error.days,
        "complete": False,
        "spend": _money(cents_expected),
        "cumulative_spend": _money(spent + cents_expected),
        "cumulative_spend_per_user": (spent + cents_expected) / 100 / cohort.users,
        "low": spent / 100 + low,
        "high": spent / 100 + high,
        "variance": variance,
    }


def _money(whole_cents: int | None) -> Decimal | None:
    return None if whole_cents is None else Decimal(whole_cents).scaleb(-2)
