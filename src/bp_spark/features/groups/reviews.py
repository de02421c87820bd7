"""Reviews: how many, how good, and how friendly their texts are."""

from __future__ import annotations

from functools import partial

from bp_spark.features.definition import Feature, last_days
from bp_spark.features.groups.terms import orders, total

feature = partial(Feature, group="reviews")


def features() -> list[Feature]:
    """Return the features of the group."""
    return [
        *(each for days in (90, 365) for each in _window(days)),
        feature(
            "reviews_per_order_365d",
            total("reviews", 365) / orders(365),
            "Reviews per order",
            "ratio",
            last_days(365),
            scale="log",
        ),
    ]


def _window(days: int) -> list[Feature]:
    shared = partial(feature, window=last_days(days))
    rated, with_text = total("rated", days), total("worded_reviews", days)
    return [
        shared(f"reviews_{days}d", total("reviews", days), "Reviews", "reviews", scale="log"),
        shared(f"rating_mean_{days}d", total("rating_milli", days) / 1000 / rated, "Mean rating given", "rating"),
        shared(f"low_ratings_{days}d", total("low_ratings", days) / rated, "Share of ratings of 2 or less", "share"),
        shared(
            f"review_sentiment_{days}d",
            total("sentiment_centi", days) / 100 / with_text,
            "Mean sentiment of review texts, from complaint (-1) to praise (1), by the language model's embedding",
            "cosine",
        ),
    ]
