"""Terms that groups of features share: sums over a window, the days since the first and the last purchase."""

from __future__ import annotations

from bp_spark.features.aggregates import Newest, Oldest, Total
from bp_spark.features.definition import Expression, aggregate, call


def total(measure: str, days: int | None = None) -> Expression:
    """Return the sum of a daily measure over the last ``days`` days, or over all days."""
    return aggregate(measure if days is None else f"{measure}_in_{days}", Total(measure, days))


def spend_cents(days: int | None = None) -> Expression:
    """Return the spend less refunds, a whole number of cents."""
    return total("spend", days)


def spend(days: int | None = None) -> Expression:
    """Return the spend less refunds, in currency."""
    return spend_cents(days) / 100


def orders(days: int | None = None) -> Expression:
    """Return the number of orders."""
    return total("orders", days)


def items(days: int | None = None) -> Expression:
    """Return the number of order lines."""
    return total("items", days)


def purchase_days(days: int | None = None) -> Expression:
    """Return the number of days with a purchase."""
    return total("purchase_days", days)


def recency() -> Expression:
    """Return the days since the last purchase."""
    return aggregate("recency", Newest("orders"))


def tenure() -> Expression:
    """Return the days since the first purchase, at least 1."""
    return aggregate("tenure", Oldest("orders"))


def customer_days(days: int) -> Expression:
    """Return how many of the last ``days`` days the user was a customer."""
    return call("least", days, tenure())


def at_least_zero(value: Expression) -> Expression:
    """Return the value, or 0 where it is negative."""
    return call("greatest", value, 0)


def standard_deviation(mean_square: Expression, mean: Expression) -> Expression:
    """Return the standard deviation; rounding never makes the variance negative."""
    return call("sqrt", at_least_zero(mean_square - mean * mean))
