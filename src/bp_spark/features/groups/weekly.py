"""Weekly spend: level, scatter and slope over the last twelve weeks."""

from __future__ import annotations

from functools import partial

from bp_spark.features.aggregates import Total
from bp_spark.features.definition import Expression, Feature, aggregate, call, last_days
from bp_spark.features.groups.terms import standard_deviation

WEEKS = 12

feature = partial(Feature, window=last_days(7 * WEEKS), group="weekly spend")


def features() -> list[Feature]:
    """Return the features of the group."""
    weeks = [_week(number) for number in range(WEEKS)]
    cents = call("array", *weeks)
    sum_of_cents = call("aggregate", cents, Expression("0L"), Expression("(s, x) -> s + x"))
    sum_of_squares = call("aggregate", cents, Expression("0D"), Expression("(s, x) -> s + x / 100 * (x / 100)"))
    mean = sum_of_cents / (100 * WEEKS)
    std = standard_deviation(sum_of_squares / WEEKS, mean)
    ordered = call("array_sort", cents)
    lower, upper = (Expression(f"{ordered.sql}[{place}]", ordered.aggregates) for place in (WEEKS // 2 - 1, WEEKS // 2))
    median = (lower + upper) / 200
    active = call("size", call("filter", cents, Expression("x -> x > 0")))
    return [
        feature("weekly_spend_mean", mean, "Mean weekly spend", "currency", scale="log"),
        feature("weekly_spend_std", std, "Standard deviation of weekly spend", "currency", scale="log"),
        feature("weekly_spend_variation", std / mean, "Scatter of weekly spend, relative to its mean", "ratio"),
        feature("weekly_spend_max", call("array_max", cents) / 100, "Largest weekly spend", "currency", scale="log"),
        feature("weekly_spend_median", median, "Median weekly spend", "currency", scale="log"),
        feature("weekly_spend_slope", _slope(weeks), "Change of weekly spend per week", "currency/week", scale="log"),
        feature("weeks_active", active, "Weeks with spend", "weeks"),
    ]


def _week(number: int) -> Expression:
    """Return the cents spent in a week; number 0 is the newest."""
    return aggregate(f"week_{number}", Total("spend", oldest=7 * number + 7, newest=7 * number + 1))


def _slope(weeks: list[Expression]) -> Expression:
    """Return the least-squares slope against the week's distance from the middle, newest week positive."""
    middle = (WEEKS - 1) / 2
    first, *others = (week * (middle - number) for number, week in enumerate(weeks))
    products = sum(others, start=first)
    return products / (100 * sum((number - middle) ** 2 for number in range(WEEKS)))
