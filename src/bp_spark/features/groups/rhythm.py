"""Rhythm of purchases: the times between a user's purchase days, and how the time since the last one compares."""

from __future__ import annotations

from functools import partial

from bp_spark.features.definition import Feature, column
from bp_spark.features.groups.terms import recency

feature = partial(Feature, window="all", group="rhythm of purchases")


def features() -> list[Feature]:
    """Return the features of the group; most are NULL for users with one purchase day."""
    mean, std, median, longest, last = (column(f"p_{name}") for name in ("mean", "std", "median", "max", "last"))
    return [
        feature("gap_mean_days", mean, "Mean days between purchase days", "days", scale="log"),
        feature("gap_median_days", median, "Median days between purchase days", "days", scale="log"),
        feature("gap_std_days", std, "Standard deviation of the days between purchase days", "days", scale="log"),
        feature("gap_max_days", longest, "Longest pause between purchase days", "days", scale="log"),
        feature("gap_last_days", last, "Pause before the last purchase day", "days", scale="log"),
        feature("gap_variation", std / mean, "Scatter of the pauses, relative to their mean", "ratio"),
        feature("overdue", recency() / mean, "Current pause over the mean pause", "ratio", scale="log"),
        feature("overdue_longest", recency() / longest, "Current pause over the longest one", "ratio", scale="log"),
    ]
