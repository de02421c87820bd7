"""Shopping times: on which weekdays a user spends, and at which hours."""

from __future__ import annotations

from functools import partial

from bp_spark.features.aggregates import WEEKDAYS
from bp_spark.features.definition import Feature, last_days
from bp_spark.features.groups.terms import orders, total

DAYS = 180

feature = partial(Feature, unit="share", window=last_days(DAYS), group="shopping times")


def features() -> list[Feature]:
    """Return the features of the group."""
    return [*(_weekday(name) for name in WEEKDAYS), *(_hours(p) for p in ("morning", "afternoon", "evening", "night"))]


def _weekday(name: str) -> Feature:
    share = total(f"paid_{name}", DAYS) / total("paid", DAYS)
    return feature(f"share_{name}", share, f"Share of spend on a {name.capitalize()}")


def _hours(part: str) -> Feature:
    share = total(f"{part}_orders", DAYS) / orders(DAYS)
    return feature(f"share_{part}", share, f"Share of orders in the {part} (UTC)")
