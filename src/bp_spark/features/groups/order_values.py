"""Order values: their scatter, and the largest."""

from __future__ import annotations

from functools import partial

from bp_spark.features.aggregates import Largest
from bp_spark.features.definition import Feature, aggregate, last_days
from bp_spark.features.groups.terms import orders, standard_deviation, total

feature = partial(Feature, group="size of orders", scale="log")


def features() -> list[Feature]:
    """Return the features of the group."""
    # not by the spend: refunds that belong to no order lower it, and leave the orders as they were
    mean = total("order_value") / 100 / orders()
    std = standard_deviation(total("order_value_sq") / orders(), mean)
    return [
        feature("order_value_std", std, "Standard deviation of order values", "currency", "all"),
        *(_largest(days) for days in (90, 365)),
    ]


def _largest(days: int) -> Feature:
    cents = aggregate(f"order_value_max_{days}", Largest("order_value_max", days))
    return feature(f"order_value_max_{days}d", cents / 100, "Largest order", "currency", last_days(days))
