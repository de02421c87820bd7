"""Cohorts: definitions on users made by hand, nothing of few users, nothing from the future, and every cent of the past."""

from __future__ import annotations

from datetime import date, timedelta
from decimal import Decimal
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession

from bp_spark.lakehouse.tables import SCORES, USER_DAILY
from bp_spark.model.totals import TotalError, Totals, interval
from bp_spark.scoring.profiles.cohort_cells import Cells
from bp_spark.scoring.profiles.cohorts import Cohort, cohorts, merged_months
from tests.support.rows import frame

DAY = date(2024, 3, 10)
ERRORS = Totals(0.9, (TotalError(30, 0.1, 0.2, 2.0, 0.5, 4.0), TotalError(90, 0.05, 0.1, 3.0, 0.0, 2.0)))
# user -> (first purchase, what was spent days later); of u4 a refund came first, u7 paid for nothing, u8 isn't scored
USERS: dict[str, tuple[date, dict[int, float]]] = {
    "u0": (date(2023, 12, 1), {0: 10.00, 29: 5.50, 30: 4.00, 65: 2.00}),
    "u1": (date(2023, 12, 31), {0: 20.00, 29: 0.25, 69: 7.75}),
    "u2": (date(2023, 12, 15), {0: 0.01, 31: -0.01, 59: 100.00}),
    "u3": (date(2024, 1, 31), {0: 30.00}),
    "u4": (date(2024, 2, 10), {-5: -3.00, 0: 8.00}),
    "u5": (date(2024, 2, 20), {0: 40.00, 3: 2.00}),
    "u6": (date(2024, 3, 9), {0: 50.00}),
    "u7": (date(2024, 1, 5), {0: 0.00}),
    "u8": (date(2023, 12, 2), {0: 1_000.00}),
}


def days_of(spark: SparkSession, users: dict[str, tuple[date, dict[int, float]]]) -> DataFrame:
    rows = [
        {
            "user_key": user,
            "day": first + timedelta(days=age),
            "orders": int(spend > 0),
            "spend": Decimal(str(spend)).quantize(Decimal("0.01")),
        }
        for user, (first, spend_by_age) in users.items()
        for age, spend in spend_by_age.items()
    ]
    return frame(spark, USER_DAILY, *rows)


def scored(spark: SparkSession) -> DataFrame:
    users = [user for user in USERS if user != "u8"]
    spend = {user: 10.0 * (n + 1) for n, user in enumerate(users)}
    return frame(
        spark,
        SCORES,
        *(
            {"user_key": user, "score_date": DAY, "expected_by_horizon": {30: of_user / 4, 90: of_user}}
            for user, of_user in spend.items()
        ),
    )


def rows_of(df: DataFrame) -> list[dict[str, Any]]:
    return [row.asDict() for row in df.orderBy("cohort", "horizon_days", "age").collect()]


def test_a_cohort_is_followed_by_whole_periods_of_age_and_what_came_since(spark: SparkSession) -> None:
    rows = rows_of(cohorts(scored(spark), days_of(spark, USERS), DAY, 1, None, "digest"))
    shown = ("age", "complete", "days", "users", "active_users", "orders", "spend", "cumulative_spend")
    december = [tuple(row[name] for name in shown) for row in rows if row["cohort"] == date(2023, 12, 1)]
    # the user of December 31 has lived through two periods; what the others did since is in the last row
    assert december == [
        (0, True, 30.0, 3, 3, 5, Decimal("35.76"), Decimal("35.76")),
        (1, True, 60.0, 3, 2, 2, Decimal("103.99"), Decimal("139.75")),
        (2, False, pytest.approx((100 + 70 + 86) / 3), 3, 2, 2, Decimal("9.75"), Decimal("149.50")),
    ]
    assert [row["retention"] for row in rows[:3]] == [1.0, pytest.approx(2 / 3), pytest.approx(2 / 3)]
    assert rows[1]["cumulative_spend_per_user"] == pytest.approx(139.75 / 3)
    newest = {row["cohort"].month: (row["users"], row["age"], row["cumulative_spend"]) for row in rows[3:]}
    assert newest == {1: (1, 1, Decimal("30.00")), 2: (2, 0, Decimal("47.00")), 3: (1, 0, Decimal("50.00"))}
    assert {row["horizon_days"] for row in rows} == {0}


def test_expected_spend_is_added_to_what_was_spent_with_the_error_of_sums(spark: SparkSession) -> None:
    rows = rows_of(cohorts(scored(spark), days_of(spark, USERS), DAY, 3, ERRORS, "digest"))
    # January has one user and joins February; March has one and joins them
    assert {(row["cohort"], row["cohort_to"], row["users"]) for row in rows} == {
        (date(2023, 12, 1), date(2023, 12, 1), 3),
        (date(2024, 1, 1), date(2024, 3, 1), 4),
    }
    month, quarter = rows[3:5]
    assert [row["horizon_days"] for row in (month, quarter)] == [30, 90]
    assert (quarter["age"], quarter["complete"], quarter["days"]) == (2, False, pytest.approx(256 / 3 + 90))
    assert (quarter["spend"], quarter["cumulative_spend"]) == (Decimal("60.00"), Decimal("149.50") + 60)
    assert quarter["variance"] == pytest.approx(3.0 * 60)
    low, high = interval(60.0, 3.0 * 60, ERRORS.errors[1], ERRORS.coverage)
    assert (quarter["low"], quarter["high"]) == (pytest.approx(149.5 + low), pytest.approx(149.5 + high))
    assert month["variance"] == pytest.approx(sum(2.0 * x + 0.5 * x * x for x in (2.5, 5.0, 7.5)), abs=0.01)
    assert (quarter["active_users"], quarter["orders"], quarter["bundle_digest"]) == (None, None, "digest")


def test_cohorts_see_nothing_on_the_date_or_after_it(spark: SparkSession) -> None:
    future = {f"later{n}": (DAY + timedelta(days=n), {0: 900.0}) for n in range(4)}
    again = {user: (DAY, {0: 70.0, 40: -5.0}) for user in USERS}
    past = days_of(spark, USERS)
    with_future = past.unionByName(days_of(spark, future)).unionByName(days_of(spark, again))
    seen, told = (rows_of(cohorts(scored(spark), daily, DAY, 1, ERRORS, "digest")) for daily in (past, with_future))
    assert seen == told


def test_fewer_buyers_than_the_smallest_group_make_no_row(spark: SparkSession) -> None:
    assert cohorts(scored(spark), days_of(spark, USERS), DAY, 8, ERRORS, "digest").isEmpty()


def of_month(number: int, users: int) -> Cohort:
    first = date(2023 + number // 12, number % 12 + 1, 1)
    return Cohort(first, first, users, 30 * users, {30: 100 * users}, {30: 1.0 * users})


@pytest.mark.parametrize("sizes", [[3, 4, 5, 20, 1, 30, 2], [12], [4], [4, 3], [50, 1], [1] * 24, [], [20, 0, 9, 1]])
def test_months_of_few_users_are_merged_with_those_beside_them(sizes: list[int]) -> None:
    months = [of_month(number, users) for number, users in enumerate(sizes) if users]
    merged = merged_months(months[::-1], 10)
    assert all(cohort.users >= 10 for cohort in merged)
    if sum(sizes) < 10:
        assert merged == []
        return
    in_a_cohort = [first for cohort in merged for first in cohort.months]
    # each month is in one cohort
    assert len(set(in_a_cohort)) == len(in_a_cohort)
    assert {month.first for month in months} <= set(in_a_cohort)
    assert sum(cohort.users for cohort in merged) == sum(sizes)
    assert sum(cohort.expected[30] for cohort in merged) == 100 * sum(sizes)


@pytest.mark.parametrize(
    "first_day", [date(2023, 12, 1), date(2024, 1, 31), date(2024, 2, 29), DAY - timedelta(days=1)]
)
def test_a_period_is_complete_once_the_newest_user_of_the_month_has_lived_through_it(first_day: date) -> None:
    first = first_day.replace(day=1)
    periods = Cohort(first, first, 10, 0, {}, {}).complete_periods(DAY)
    last_day = min((first + timedelta(days=31)).replace(day=1), DAY) - timedelta(days=1)
    assert last_day + timedelta(days=30 * periods) <= DAY < last_day + timedelta(days=30 * (periods + 1))


@pytest.mark.parametrize(
    ("seed", "users", "chance", "k"),
    [
        (0, 12, 0.3, 10),
        (1, 40, 0.2, 10),
        (2, 40, 0.5, 10),
        (3, 200, 0.02, 10),
        (4, 25, 0.95, 10),
        (5, 15, 0.1, 5),
        (6, 5, 0.5, 1),
    ],
)
def test_no_figure_of_a_cohort_and_no_difference_of_figures_tells_of_few_users(
    seed: int, users: int, chance: float, k: int
) -> None:
    rng = np.random.default_rng(seed)
    for last_age in (0, 1, 7, 20):
        orders = rng.random((users, last_age + 1)) < chance * 0.9 ** np.arange(last_age + 1)
        refunds = rng.random(orders.shape) < 0.03
        orders[:, 0] = True
        moved = orders | refunds
        cents = rng.integers(1, 10_000, orders.shape) * moved
        cells = Cells(last_age)
        for user in range(users):
            earlier = -1
            for age in np.flatnonzero(moved[user]):
                once = int(orders[user, age])
                cells.add(int(age), earlier, users=1, active_users=once, orders=once, cents=int(cents[user, age]))
                earlier = int(age)
        rows = cells.published(users, k)
        assert [row.age for row in rows] == list(range(last_age + 1))

        def few(of_users: np.ndarray) -> bool:
            return 0 < of_users.sum() < k

        sums = [(-1, 0), *((row.age, row.cumulative_cents) for row in rows if row.cumulative_cents is not None)]
        assert sums[-1] == (last_age, cents.sum())
        for (before, less), (age, more) in combinations(sums, 2):
            assert more - less == cents[:, before + 1 : age + 1].sum()
            assert not few(moved[:, before + 1 : age + 1].any(axis=1)), (before, age)
        shown_ages = {age for age, _ in sums}
        for row in rows:
            active = orders[:, row.age]
            # a spend is no more than the difference of two sums
            assert (row.cents is not None) == ({row.age - 1, row.age} <= shown_ages)
            assert row.cents in (None, cents[:, row.age].sum())
            assert row.active_users == (None if few(active) or few(~active) else active.sum())
            assert row.orders == (None if few(active) else active.sum())
        if k == 1:
            assert None not in [value for row in rows for value in vars(row).values()]


def test_what_many_users_did_is_shown_and_what_few_did_waits_for_more() -> None:
    cells = Cells(4)
    cells.add(0, -1, users=20, active_users=20, orders=25, cents=1_000)
    cells.add(1, 0, users=12, active_users=12, orders=12, cents=600)
    # seven who bought at age 1, and three who didn't; then nobody; then two
    cells.add(2, 1, users=7, active_users=7, orders=7, cents=70)
    cells.add(2, 0, users=3, active_users=3, orders=3, cents=30)
    cells.add(4, 2, users=2, active_users=2, orders=2, cents=2)
    rows = {row.age: (row.active_users, row.orders, row.cents, row.cumulative_cents) for row in cells.published(20, 10)}
    assert rows == {
        0: (20, 25, 1_000, 1_000),
        1: (None, 12, 600, 1_600),  # eight bought nothing
        2: (10, 10, None, None),  # else the two would be known by the sum at the end
        3: (0, 0, None, None),
        4: (None, None, None, 1_702),
    }
