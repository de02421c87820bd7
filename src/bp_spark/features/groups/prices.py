"""Discounts and prices: how much of the spend is reduced or paid back, and how dear the items are within their category."""

from __future__ import annotations

from functools import partial

from bp_spark.features.definition import Feature, call, column, last_days
from bp_spark.features.groups.terms import at_least_zero, items, spend_cents, total

feature = partial(Feature, group="discounts and prices")


def features() -> list[Feature]:
    """Return the features of the group."""
    return [
        *(each for days in (30, 90, 365) for each in _discounts(days)),
        *(_price_tier(days) for days in (90, 365)),
        feature(
            "premium_share_365d",
            column("c_premium") / column("c_total_365"),
            "Share of spend in categories where the user buys half a standard deviation above the mean price",
            "share",
            last_days(365),
        ),
    ]


def _discounts(days: int) -> list[Feature]:
    shared = partial(feature, unit="share", window=last_days(days))
    paid_net = at_least_zero(spend_cents(days))
    discount, coupon_discount, refunds = (total(name, days) for name in ("discount", "coupon_discount", "refunds"))
    undiscounted = paid_net + discount
    return [
        shared(f"discount_share_{days}d", discount / undiscounted, "Reductions over undiscounted spend"),
        shared(f"coupon_share_{days}d", coupon_discount / undiscounted, "Coupon reductions over undiscounted spend"),
        shared(
            f"discounted_items_{days}d",
            total("discounted_items", days) / items(days),
            "Share of lines bought at a reduction",
        ),
        feature(
            f"coupons_{days}d", total("coupons", days), "Coupons redeemed", "coupons", last_days(days), scale="log"
        ),
        shared(f"refund_share_{days}d", refunds / (paid_net + refunds), "Money paid back over money paid"),
    ]


def _price_tier(days: int) -> Feature:
    fiftieths = column(f"c_tier_{days}") / 50 / column(f"c_tiered_{days}")
    return feature(
        f"price_tier_{days}d",
        # in twentieths: every night's purchases of others move the reference a little
        call("round", fiftieths) / 20,
        "Mean price position within the item's category: z-score of log unit price among all users' lines of a year",
        "z-score",
        last_days(days),
    )
