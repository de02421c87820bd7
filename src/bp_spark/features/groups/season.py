"""Season: what the user bought in the 90 days that began a year before the as-of date."""

from __future__ import annotations

from functools import partial

from bp_spark.features.aggregates import Total
from bp_spark.features.definition import Expression, Feature, aggregate, call, last_days
from bp_spark.features.groups.terms import spend_cents, tenure

OLDEST, NEWEST = 365, 276

feature = partial(Feature, window=f"{NEWEST} to {OLDEST} days", group="season")


def features() -> list[Feature]:
    """Return the features of the group; NULL for users with less than a year of history."""
    cents = aggregate("same_period_last_year", Total("spend", oldest=OLDEST, newest=NEWEST))
    orders = aggregate("orders_same_period_last_year", Total("orders", oldest=OLDEST, newest=NEWEST))
    return [
        feature(
            "spend_same_period_last_year",
            _after_a_year(cents / 100),
            "Spend in the 90 days that began a year before the as-of date",
            "currency",
            scale="log",
        ),
        feature(
            "orders_same_period_last_year",
            _after_a_year(orders),
            "Orders in the 90 days that began a year before the as-of date",
            "orders",
            scale="log",
        ),
        feature(
            "season_share_last_year",
            _after_a_year(cents / spend_cents(365)),
            "Share of the year's spend in the 90 days that began a year before the as-of date",
            "share",
            window=last_days(365),
        ),
    ]


def _after_a_year(value: Expression) -> Expression:
    return call("if", tenure() >= OLDEST, value, Expression("null"))
