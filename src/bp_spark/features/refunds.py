"""Money paid and paid back by each user: in the year before a date, and in the horizon from it on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import date

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.features.definition import KEY
from bp_spark.features.labels import sums_ahead

PAST = ("spend_365d", "refund_share_365d", "order_value_max_365d")
"""Features that the past year's money follows from."""


def knows_past(features: Collection[str]) -> bool:
    """Return whether the money of the past year follows from these features: ``features.windows`` may leave out 365 days."""
    return set(PAST) <= set(features)


def past_year() -> tuple[Column, Column]:
    """Return the money paid in the year before the date, before refunds, and what of it was paid back; from features.

    Of a user who was paid back all, or more, the features tell no sum. The largest order stands for it.
    """
    share = F.coalesce(F.col("refund_share_365d").cast("double"), F.lit(0.0))
    net = F.greatest(F.col("spend_365d").cast("double"), F.lit(0.0))
    all_back = F.coalesce(F.col("order_value_max_365d").cast("double"), F.lit(0.0))
    paid = F.coalesce(F.when(share < 1, net / (1 - share)).otherwise(all_back), F.lit(0.0))
    return paid, paid * share


def with_horizon(users: DataFrame, daily: DataFrame, as_of: Sequence[date], horizon_days: int) -> DataFrame:
    """Return the money of users before their as-of date and from it on.

    Args:
        users: Rows of ``user_features``.
        daily: USER_DAILY.
        as_of: Their dates.
        horizon_days: Days from the date on.

    Returns:
        ``user_key, as_of_date``; ``paid`` and ``refunded`` of :func:`past_year`; ``later_paid`` and ``later_refunded``, the
        same in the horizon.
    """
    sums = {"net": ("spend", horizon_days), "back": ("refunds", horizon_days)}
    later_refunded = F.coalesce("back", F.lit(0.0))
    paid, refunded = past_year()
    return users.join(sums_ahead(daily, as_of, sums), KEY, "left").select(
        *KEY,
        paid.alias("paid"),
        refunded.alias("refunded"),
        (F.coalesce("net", F.lit(0.0)) + later_refunded).alias("later_paid"),
        later_refunded.alias("later_refunded"),
    )
