"""Recent purchases: sums over windows, trends between windows, and exponentially weighted rates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from bp_spark.features.aggregates import Decayed
from bp_spark.features.definition import Expression, Feature, aggregate, call, last_days
from bp_spark.features.groups.terms import (
    at_least_zero,
    customer_days,
    items,
    orders,
    purchase_days,
    spend,
    tenure,
)

RATES_FROM = 30
"""Days of the shortest window that has rates and means."""
HALF_LIVES = (7, 30, 90)

feature = partial(Feature, group="recent purchases")


def features(windows: Sequence[int]) -> list[Feature]:
    """Return the features of the group.

    Args:
        windows: days of each window, shortest first.
    """
    return [
        *(each for days in windows for each in _window(days)),
        *(_trend(short, long) for short, long in pairwise(windows)),
        *(
            _decayed(measure, half_life, scale, unit)
            for measure, scale, unit in (("spend", 100, "currency/day"), ("orders", 1, "orders/day"))
            for half_life in HALF_LIVES
        ),
    ]


def _window(days: int) -> list[Feature]:
    counted = partial(feature, window=last_days(days), scale="log")
    sums = [
        counted(f"spend_{days}d", spend(days), "Spend less refunds", "currency"),
        counted(f"orders_{days}d", orders(days), "Orders", "orders"),
        counted(f"items_{days}d", items(days), "Order lines", "items"),
    ]
    if days < RATES_FROM:
        return sums
    return [
        *sums,
        counted(
            f"spend_rate_{days}d", spend(days) / customer_days(days), "Spend per day as a customer", "currency/day"
        ),
        counted(f"purchase_days_{days}d", purchase_days(days), "Days with a purchase", "days"),
        counted(f"order_value_{days}d", spend(days) / orders(days), "Mean order value", "currency"),
        counted(f"items_per_order_{days}d", items(days) / orders(days), "Lines per order", "items"),
    ]


def _trend(short: int, long: int) -> Feature:
    def daily_rate(days: int) -> Expression:
        return at_least_zero(spend(days)) / customer_days(days)

    return feature(
        f"trend_{short}d_{long}d",
        call("ln", (daily_rate(short) + 1) / (daily_rate(long) + 1)),
        f"Spend per day of {short} days against that of {long} days, as a log: above 0 where it rises",
        "log ratio",
        last_days(long),
    )


def _decayed(measure: str, half_life: int, scale: int, unit: str) -> Feature:
    """Return a rate in which a day's weight halves every ``half_life`` days.

    The sum of the weights of the user's days as a customer is that of a geometric series.
    """
    thousandths = aggregate(f"{measure}_halflife_{half_life}", Decayed(measure, half_life))
    ratio = call("pow", 0.5, 1 / half_life)
    weights = ratio * (1 - call("pow", ratio, tenure())) / (1 - ratio)
    return feature(
        f"{measure}_rate_halflife_{half_life}d",
        thousandths / (1000 * scale) / weights,
        f"Exponentially weighted {measure} per day, half-life {half_life} days, over the days as a customer",
        unit,
        "all",
        scale="log",
    )
