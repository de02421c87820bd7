"""What users did with items before a date: sums by user and item, by item, and by user."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import RecommendationsConfig
from bp_spark.features.user_daily import cents

RECENT_DAYS, QUARTER_DAYS = 28, 84
"""Windows before the date in which purchase days are counted."""
PRIOR_REPEATS = 2.0
"""Weight of an item's interval beside the user's own, in repeat purchases."""
_INTENT, _VIEW = 0.5, 0.1
"""Weight of a cart or favourite, and of a view, beside a purchase."""
_STEPS = 1_000_000
"""A weight of 1 as a whole number, because its sums don't depend on the order."""
_WHOLE = "decimal(38,0)"


@dataclass(frozen=True)
class History:
    """What users did with items in the window before a date.

    Attributes:
        day: The date.
        pairs: ``user_key, item_id, purchase_days, first_day, last_day, bought, intent, viewed, days_28, days_84``, a row
            for each user and item. ``bought, intent, viewed`` are sums of weights that halve with age.
        items: ``item_id, buyers, buyers_28, repeat_share, interval, sold_on, price, price_position``, a row an item.
            ``price`` is the geometric mean of unit prices. ``interval`` is in days, ``price_position`` in standard
            deviations of the log prices of the category. NULL stands for what fewer than ``least_users`` users would tell.
        users: ``user_key, user_days, user_days_28, user_span, order_value, user_position``, a row a buyer.
    """

    day: date
    pairs: DataFrame
    items: DataFrame
    users: DataFrame


def pairs_of(events: DataFrame, day: date, config: RecommendationsConfig) -> DataFrame:
    """Return what each user did with each item: ``pairs`` of :class:`History`, and sums that the other parts need.

    Args:
        events: EVENTS; days from ``window_days`` before ``day`` to the day before it are read.
        day: The date.
        config: Settings of the recommendations.
    """
    by_day = _by_day(events, day, config)
    days = F.col("paid_lines") > 0
    age = F.datediff(F.lit(day), "event_date")
    recency = F.pow(F.lit(0.5), age / config.half_life_days) * _STEPS

    def weights(times: Column) -> Column:
        return F.sum(F.round(times * recency).cast("bigint")).cast("double") / _STEPS

    return by_day.groupBy("user_key", "item_id").agg(
        F.count_if(days).alias("purchase_days"),
        F.min(F.when(days, F.col("event_date"))).alias("first_day"),
        F.max(F.when(days, F.col("event_date"))).alias("last_day"),
        weights(days.cast("int")).alias("bought"),
        weights(F.col("intents")).alias("intent"),
        weights(F.col("views")).alias("viewed"),
        F.count_if(days & (age <= RECENT_DAYS)).alias("days_28"),
        F.count_if(days & (age <= QUARTER_DAYS)).alias("days_84"),
        F.sum("priced").alias("priced"),
        F.sum("price_micro").alias("price_micro"),
        F.sum("price_sq").alias("price_sq"),
        F.max("category").alias("category"),
    )


def users_of(events: DataFrame, day: date, config: RecommendationsConfig) -> DataFrame:
    """Return ``user_key, user_days, user_days_28, user_span, order_value`` of users with a purchase in the window."""
    bought = _in_window(events, day, config).filter((F.col("kind") == "purchase") & (F.col("amount") > 0))
    by_day = bought.groupBy("user_key", "event_date").agg(F.sum(cents("amount").cast(_WHOLE)).alias("cents"))
    age = F.datediff(F.lit(day), "event_date")
    days = F.count(F.lit(1))
    return by_day.groupBy("user_key").agg(
        days.alias("user_days"),
        F.count_if(age <= RECENT_DAYS).alias("user_days_28"),
        F.max(age).alias("user_span"),
        (F.sum("cents").cast("double") / 100 / days).alias("order_value"),
    )


def history(pairs: DataFrame, users: DataFrame, day: date, least_users: int) -> History:
    """Return the parts of a history.

    Args:
        pairs: See :func:`pairs_of`.
        users: See :func:`users_of`.
        day: The date.
        least_users: Least users that a price or an interval tells of.
    """
    items = _items(pairs, day, least_users)
    position = F.sum(F.round(F.col("price_position") * _STEPS).cast(_WHOLE) * F.col("purchase_days"))
    positions = (
        pairs.filter("purchase_days > 0")
        .join(items.filter("price_position IS NOT NULL").select("item_id", "price_position"), "item_id")
        .groupBy("user_key")
        .agg((position.cast("double") / _STEPS / F.sum("purchase_days")).alias("user_position"))
    )
    return History(day, pairs, items, users.join(positions, "user_key", "left"))


def weight() -> Column:
    """Return the weight of a pair: its purchases, carts, favourites and views together."""
    return F.col("bought") + _INTENT * F.col("intent") + _VIEW * F.col("viewed")


def _in_window(events: DataFrame, day: date, config: RecommendationsConfig) -> DataFrame:
    first = day - timedelta(days=config.window_days)
    return events.filter((F.col("event_date") >= F.lit(first)) & (F.col("event_date") < F.lit(day)))


def _by_day(events: DataFrame, day: date, config: RecommendationsConfig) -> DataFrame:
    """Return counts and sums of logarithms of prices by user, item and day."""
    kind = F.col("kind")
    paid = (kind == "purchase") & (F.col("amount") > 0)
    price = F.try_divide(F.col("amount").cast("double"), F.col("quantity"))
    # NULL where the quantity is so small that the price is infinite
    micro = F.round(F.ln(F.when(paid & (F.col("quantity") > 0), price)) * _STEPS).try_cast("bigint")
    milli = F.col("micro") / 1000
    used = _in_window(events, day, config).filter(
        F.col("item_id").isNotNull() & (paid | kind.isin("cart", "favourite", "browse", "click"))
    )
    return (
        used.withColumn("micro", micro)
        # one exchange serves all groups by user and item
        .repartition("user_key", "item_id")
        .groupBy("user_key", "item_id", "event_date")
        .agg(
            F.count_if(paid).alias("paid_lines"),
            F.count_if(kind.isin("cart", "favourite")).alias("intents"),
            F.count_if(kind.isin("browse", "click")).alias("views"),
            F.count("micro").alias("priced"),
            F.sum("micro").alias("price_micro"),
            F.sum(F.round(milli * milli).cast("bigint")).alias("price_sq"),
            F.max(F.when(paid, F.col("category"))).alias("category"),
        )
    )


def _items(pairs: DataFrame, day: date, least_users: int) -> DataFrame:
    bought = pairs.filter("purchase_days > 0")
    repeats = F.col("purchase_days") - 1
    is_repeat = repeats > 0
    sums = bought.groupBy("item_id").agg(
        F.count(F.lit(1)).alias("buyers"),
        F.count_if(F.col("days_28") > 0).alias("buyers_28"),
        F.count_if(is_repeat).alias("repeat_buyers"),
        F.sum(F.when(is_repeat, F.datediff("last_day", "first_day"))).alias("gap_days"),
        F.sum(repeats).alias("gaps"),
        F.max("last_day").alias("sold_on"),
        F.sum("priced").alias("priced"),
        F.sum("price_micro").alias("price_micro"),
        F.sum("price_sq").alias("price_sq"),
        F.max("category").alias("category"),
    )
    mean = F.try_divide(F.sum("price_micro") / 1e6, F.sum("priced"))
    variance = F.try_divide(F.sum("price_sq") / 1e6, F.sum("priced")) - mean * mean
    prices = sums.groupBy("category").agg(
        mean.alias("category_mean"), F.sqrt(F.greatest(variance, F.lit(0.0))).alias("category_std")
    )
    usual = sums.agg(
        F.coalesce(F.try_divide(F.sum("gap_days"), F.sum("gaps")), F.lit(float(RECENT_DAYS))).alias("usual_interval")
    )
    enough = F.col("buyers") >= least_users
    log_price = F.when(enough, F.try_divide(F.col("price_micro") / 1e6, F.col("priced")))
    interval = F.when(F.col("repeat_buyers") >= least_users, F.try_divide(F.col("gap_days"), F.col("gaps")))
    # the variance is of rounded sums, so that one of equal prices isn't quite 0
    spread = F.when(F.col("category_std") > 0.01, F.col("category_std"))  # noqa: PLR2004
    return (
        sums.join(prices, "category", "left")
        .crossJoin(F.broadcast(usual))
        .select(
            "item_id",
            "buyers",
            "buyers_28",
            (F.col("repeat_buyers") / F.col("buyers")).alias("repeat_share"),
            F.coalesce(interval, "usual_interval").alias("interval"),
            "sold_on",
            F.exp(log_price).alias("price"),
            F.try_divide(log_price - F.col("category_mean"), spread).alias("price_position"),
        )
    )
