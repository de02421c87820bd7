"""Browsing and carts: what a user looks at, and how much of it is bought."""

from __future__ import annotations

from functools import partial

from bp_spark.features.aggregates import Newest
from bp_spark.features.definition import Feature, aggregate, last_days
from bp_spark.features.groups.terms import orders, total

feature = partial(Feature, group="browsing and carts")


def features() -> list[Feature]:
    """Return the features of the group."""
    return [
        *(each for days in (30, 90) for each in _window(days)),
        feature(
            "activity_recency_days",
            aggregate("activity_recency", Newest("activity")),
            "Days since the last browse, click, cart, favourite or search",
            "days",
            "all",
            scale="log",
        ),
    ]


def _window(days: int) -> list[Feature]:
    shared = partial(feature, window=last_days(days))
    counted = partial(shared, scale="log")
    browses, carts = total("browses", days), total("carts", days)
    items_browsed, dwell = total("items_browsed", days), total("dwell_milli", days) / 1000
    return [
        *(
            counted(f"{measure}_{days}d", total(measure, days), measure.capitalize(), measure)
            for measure in ("browses", "clicks", "carts", "favourites")
        ),
        counted(f"orders_per_browse_{days}d", orders(days) / browses, "Orders per browse", "ratio"),
        counted(f"orders_per_cart_{days}d", orders(days) / carts, "Orders per cart action", "ratio"),
        counted(f"items_browsed_{days}d", items_browsed, "Items looked at, counted once a day", "items"),
        shared(
            f"browse_to_buy_{days}d",
            total("items_browsed_bought", days) / items_browsed,
            "Share of items looked at that were bought on the same day",
            "share",
        ),
        shared(
            f"cart_abandonment_{days}d",
            1 - total("items_carted_bought", days) / total("items_carted", days),
            "Share of items put into the cart that were not bought on the same day",
            "share",
        ),
        counted(f"dwell_mean_{days}d", dwell / total("dwelled", days), "Mean length of a browse", "seconds"),
        counted(f"dwell_total_{days}d", dwell, "Time spent browsing", "seconds"),
    ]
