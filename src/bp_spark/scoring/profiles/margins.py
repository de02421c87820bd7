"""The margin of each user: what is left of the spend once the goods are paid."""

from __future__ import annotations

from datetime import date, timedelta

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.features.user_daily import cents
from bp_spark.model.credibility import credible_share

DAYS = 365
"""Days before the date whose purchases count."""


def with_margin_share(users: DataFrame, events: DataFrame, day: date) -> DataFrame:
    """Add ``margin_share``: the share of the user's spend that is left once the goods are paid.

    Few lines tell little about a user. So the share is a credibility estimate
    (:func:`bp_spark.model.credibility.credible_share`), in which the platform's share weighs as much as the spend of a mean
    user. Refunds take off spend, and goods that came back cost. Only lines with a known cost count.

    Args:
        users: Rows with ``user_key``, each user once.
        events: EVENTS; a table from before there were costs may lack the column.
        day: The date; only purchases of the year before it count.

    Returns:
        The rows. The share is NULL where the platform has no spend with a known cost.
    """
    if "cost" not in events.columns:
        return users.withColumn("margin_share", F.lit(None).cast("double"))
    in_reach = F.col("event_date").between(F.lit(day - timedelta(days=DAYS)), F.lit(day - timedelta(days=1)))
    lines = events.filter(in_reach & (F.col("kind") == "purchase") & F.col("cost").isNotNull())
    spend, margin = F.sum(cents("amount")), F.sum(cents("amount") - cents("cost"))
    own = lines.groupBy("user_key").agg(spend.alias("known_spend"), margin.alias("margin")).filter("known_spend > 0")
    # of whole numbers, so that their order changes nothing
    total = F.sum("known_spend")
    platform = own.agg((total / F.count(F.lit(1))).alias("mean_spend"), (F.sum("margin") / total).alias("share"))
    known_spend, known_margin = (F.coalesce(name, F.lit(0)) for name in ("known_spend", "margin"))
    share = credible_share(known_margin, known_spend, F.col("share"), F.col("mean_spend"))
    joined = users.join(own, "user_key", "left").crossJoin(F.broadcast(platform))
    return joined.withColumn("margin_share", share).drop("known_spend", "margin", "mean_spend", "share")
