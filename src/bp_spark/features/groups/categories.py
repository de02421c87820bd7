"""Categories: how many a user buys from, how evenly, and which; of :mod:`bp_spark.features.categories`."""

from __future__ import annotations

from functools import partial

from bp_spark.features.categories import CATEGORY_BUCKETS
from bp_spark.features.definition import Feature, call, column, last_days

feature = partial(Feature, group="categories bought")
feature_of_year = partial(feature, window=last_days(365))


def features() -> list[Feature]:
    """Return the features of the group."""
    return [
        *(each for days in (90, 365) for each in _diversity(days)),
        feature_of_year(
            "category_types_365d", column("c_types"), "Full category paths bought from", "categories", scale="log"
        ),
        *(_share_of_rank(rank) for rank in (1, 2, 3)),
        *(_share_of_bucket(bucket) for bucket in range(CATEGORY_BUCKETS)),
    ]


def _diversity(days: int) -> list[Feature]:
    return [
        feature(
            f"categories_{days}d",
            column(f"c_count_{days}"),
            "Top-level categories bought from",
            "categories",
            last_days(days),
            scale="log",
        ),
        feature(
            f"category_entropy_{days}d",
            column(f"c_entropy_{days}"),
            "Shannon entropy of spend over top-level categories",
            "nats",
            last_days(days),
        ),
    ]


def _share_of_rank(rank: int) -> Feature:
    spend = call("coalesce", call("get", column("c_ranked"), rank - 1), 0)
    return feature_of_year(
        f"category_share_top{rank}",
        spend / column("c_total_365"),
        f"Share of spend in the user's category number {rank}",
        "share",
    )


def _share_of_bucket(bucket: int) -> Feature:
    return feature_of_year(
        f"category_share_hash{bucket:02d}",
        column(f"c_bucket_{bucket}") / column("c_total_365"),
        f"Share of spend in categories with hash {bucket} of {CATEGORY_BUCKETS} (Weinberger et al. 2009)",
        "share",
    )
