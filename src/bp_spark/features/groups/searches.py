"""Searches: how many, with which words, and whether a result was clicked."""

from __future__ import annotations

from functools import partial

from bp_spark.features.aggregates import Newest
from bp_spark.features.definition import Feature, aggregate, last_days
from bp_spark.features.groups.terms import total

WORDS = {
    "cheap": "a word that asks for a low price",
    "premium": "a word that asks for high quality",
    "brand": "a brand",
}

feature = partial(Feature, group="searches")


def features() -> list[Feature]:
    """Return the features of the group."""
    return [
        *(each for days in (30, 90) for each in _window(days)),
        feature(
            "search_recency_days",
            aggregate("search_recency", Newest("searches")),
            "Days since the last search",
            "days",
            "all",
            scale="log",
        ),
    ]


def _window(days: int) -> list[Feature]:
    shared = partial(feature, window=last_days(days))
    searches, clicked = total("searches", days), total("searches_clicked", days)
    return [
        shared(f"searches_{days}d", searches, "Searches", "searches", scale="log"),
        shared(f"search_clicks_{days}d", clicked / searches, "Share of searches with a click on a result", "share"),
        *(
            shared(
                f"{word}_searches_{days}d",
                total(f"searches_{word}", days) / searches,
                f"Share of searches with {meaning}",
                "share",
            )
            for word, meaning in WORDS.items()
        ),
    ]
