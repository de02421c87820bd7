"""Category affinity, for recommendation: the categories of most interest to each user, and what the user can afford there."""

from __future__ import annotations

from datetime import date, timedelta

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from bp_spark.core.config import ProfilesConfig
from bp_spark.lakehouse.tables import CATEGORY_AFFINITY
from bp_spark.scoring.profiles.columns import as_double, shaped

UNKNOWN_AFFORDABILITY = 0.5

_WEIGHT_SETTINGS = {"purchase": "purchase_weight", "click": "click_weight", "search": "search_weight"}
"""Source of interest -> its setting."""
_CLICKS = ("browse", "click", "cart", "favourite")
_STEPS = 1_000_000
"""A recency weight of 1 as a whole number."""


def category_affinity(
    scores: DataFrame,
    features: DataFrame,
    daily: DataFrame,
    events: DataFrame,
    day: date,
    config: ProfilesConfig,
    least_users: int,
) -> DataFrame:
    """Return the categories of most interest to each user, with affinity and affordability.

    Affinity is the weighted mean of the category's recency-weighted shares of the user's spend, clicks and searches. A source
    without any action of the user is left out. Affordability is ``budget / (budget + price)``. Budget is the usual order, or
    the expected spend where that is less. Price is the category's usual unit price, moved by the user's price position.

    Args:
        scores: Rows of SCORES of ``day``.
        features: Rows of ``user_features`` of ``day``.
        daily: USER_DAILY; days before ``day`` are read.
        events: EVENTS; days before ``day`` are read.
        day: The date.
        config: Settings of the profiles.
        least_users: A usual price needs at least so many buyers.

    Returns:
        Rows of CATEGORY_AFFINITY, at most ``config.affinities`` a user.
    """
    purchases = _purchases(daily, day, config)
    means = features.select(
        "user_key",
        F.greatest(as_double("monetary_value"), F.lit(0.0)).alias("order"),
        F.coalesce(as_double("price_tier_365d"), F.lit(0.0)).alias("position"),
    )
    price = F.exp(F.col("mean") + F.col("position") * F.col("std"))
    budget = F.least("order", "expected_spend")
    fit = F.col("affinity") * F.coalesce("affordability", F.lit(UNKNOWN_AFFORDABILITY))
    best_first = Window.partitionBy("user_key").orderBy(F.desc("fit"), F.desc("affinity"), "category")
    rows = (
        _interests(purchases, _clicks_and_searches(events, day, config), config)
        .join(scores.select("user_key", "expected_spend").join(means, "user_key", "left"), "user_key")
        .join(F.broadcast(_usual_prices(purchases, least_users)), "category", "left")
        .withColumn("affordability", F.try_divide(budget, budget + price))
        .withColumn("fit", fit)
        .withColumns({"rank": F.row_number().over(best_first), "score_date": F.lit(day), "usual_price": F.exp("mean")})
    )
    return shaped(rows, CATEGORY_AFFINITY)


def _purchases(daily: DataFrame, day: date, config: ProfilesConfig) -> DataFrame:
    """Return ``user_key, category, value`` with the recency-weighted spend in the window, and sums of the prices paid."""
    entries = _recent(daily, "day", day, config).select("user_key", "age", F.inline("categories"))
    sums = ("priced", "price_micro", "price_sq")
    return entries.groupBy("user_key", _broad("category", config.category_levels)).agg(
        F.sum(_weighted(F.col("spend") / 100, config)).alias("value"), *(F.sum(name).alias(name) for name in sums)
    )


def _clicks_and_searches(events: DataFrame, day: date, config: ProfilesConfig) -> DataFrame:
    """Return ``user_key, source, category, value``: recency-weighted counts of actions and of searches in the window."""
    kinds = events.filter(F.col("kind").isin(*_CLICKS, "search") & F.col("category").isNotNull())
    source = F.when(F.col("kind") == "search", "search").otherwise("click").alias("source")
    return (
        _recent(kinds, "event_date", day, config)
        .groupBy("user_key", source, _broad("category", config.category_levels))
        .agg(F.sum(_weighted(F.lit(1.0), config)).alias("value"))
    )


def _recent(df: DataFrame, column: str, day: date, config: ProfilesConfig) -> DataFrame:
    """Return the rows of the window before ``day``, with their ``age`` in days."""
    first, last = day - timedelta(days=config.window_days), day - timedelta(days=1)
    in_window = F.col(column).between(F.lit(first), F.lit(last))
    return df.filter(in_window).withColumn("age", F.datediff(F.lit(day), column))


def _weighted(value: Column, config: ProfilesConfig) -> Column:
    return F.round(value * _STEPS * F.pow(F.lit(0.5), F.col("age") / config.half_life_days)).cast("decimal(28,0)")


def _broad(category: str, levels: int) -> Column:
    """Return the broadest levels of a category path."""
    return F.array_join(F.slice(F.split(category, " > "), 1, levels), " > ").alias("category")


def _interests(purchases: DataFrame, clicks_and_searches: DataFrame, config: ProfilesConfig) -> DataFrame:
    """Return ``user_key, category, affinity`` and the share of each source, for the categories of most interest."""
    by_source = purchases.select("user_key", F.lit("purchase").alias("source"), "category", "value")
    by_category = (
        by_source.unionByName(clicks_and_searches)
        .groupBy("user_key", "category")
        .agg(
            *(
                F.sum(F.when(F.col("source") == name, F.col("value")).otherwise(0)).alias(name)
                for name in _WEIGHT_SETTINGS
            )
        )
    )
    user = Window.partitionBy("user_key")
    shares = by_category.select(
        "user_key",
        "category",
        *(
            F.coalesce(
                F.try_divide(F.col(name).cast("double"), F.sum(name).over(user).cast("double")), F.lit(0.0)
            ).alias(f"{name}_share")
            for name in _WEIGHT_SETTINGS
        ),
        # sources without any action of the user have no weight
        sum(
            (
                F.when(F.sum(name).over(user) > 0, getattr(config, setting)).otherwise(0.0)
                for name, setting in _WEIGHT_SETTINGS.items()
            ),
            start=F.lit(0.0),
        ).alias("weights"),
    )
    weighted = sum(
        (F.col(f"{name}_share") * getattr(config, setting) for name, setting in _WEIGHT_SETTINGS.items()),
        start=F.lit(0.0),
    )
    most_first = Window.partitionBy("user_key").orderBy(F.desc("affinity"), "category")
    return (
        shares.withColumn("affinity", F.try_divide(weighted, F.col("weights")))
        .filter(F.col("affinity") > 0)
        .withColumn("position", F.row_number().over(most_first))
        .filter(F.col("position") <= config.affinities)
        .drop("weights", "position")
    )


def _usual_prices(purchases: DataFrame, least_users: int) -> DataFrame:
    """Return ``category, mean, std`` of log unit prices, where at least so many users bought."""
    n = F.sum("priced")
    mean = F.try_divide(F.sum("price_micro") / 1e6, n)
    variance = F.try_divide(F.sum("price_sq") / 1e6, n) - mean * mean
    return (
        purchases.groupBy("category")
        .agg(
            F.count_if(F.col("priced") > 0).alias("users"),
            mean.alias("mean"),
            F.sqrt(F.greatest(variance, F.lit(0.0))).alias("std"),
        )
        .filter(F.col("users") >= least_users)
        .drop("users")
    )
