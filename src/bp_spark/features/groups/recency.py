"""Recency, frequency and monetary value over all days."""

from __future__ import annotations

from functools import partial

from bp_spark.features.definition import Feature
from bp_spark.features.groups.terms import purchase_days, recency, spend, tenure

feature = partial(Feature, window="all", group="purchase history")


def features() -> list[Feature]:
    """Return the features of the group."""
    return [
        feature("recency_days", recency(), "Days since the last purchase", "days", scale="log"),
        feature(
            "tenure_days",
            tenure(),
            "Days since the first purchase seen",
            "days",
            scale="log",
        ),
        feature(
            "active_span_days",
            tenure() - recency(),
            "Days between first and last purchase",
            "days",
            scale="log",
        ),
        feature("frequency", purchase_days() - 1, "Days with a repeat purchase", "days", scale="log"),
        feature("purchase_day_rate", purchase_days() / tenure(), "Purchase days per day since the first one", "share"),
        feature("monetary_value", spend() / purchase_days(), "Mean spend of a purchase day", "currency", scale="log"),
        feature("spend_total", spend(), "Spend less refunds", "currency", scale="log"),
    ]
