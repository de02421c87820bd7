"""Events -> ``user_daily``: what each user did on each day.

Every window of :mod:`bp_spark.features.catalogue` is built from these rows. A row depends only on the events of that user and
day, so a new or late event touches one row. Every sum is over whole numbers (cents, thousandths), so that the order of
addition, the size of the cluster and a rebuild change no value by a bit.
"""

from __future__ import annotations

from functools import reduce

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from bp_spark.lakehouse.schema import Column
from bp_spark.lakehouse.tables import CATEGORY_DAY, KINDS, TOKEN, USER_DAILY

FORMAT = 4
"""Goes up when the meaning or the storage of a column of ``user_daily`` changes: the table is then built anew."""

MONEY = "decimal(18,2)"
CODES = {kind: code for code, kind in enumerate(KINDS, start=1)}
"""Kind of an event -> its code in history tokens."""
KEY = ["user_key", "day"]
"""Columns that identify a row of ``user_daily``."""

LOW_RATING = 2
"""Ratings up to this one are low."""
NIGHT_FROM, NIGHT_UNTIL = 23, 5
"""Hours (UTC) between which an order counts as one of the night."""

_WORDS = ("cheap", "premium", "brand")
_ACTIONS = {"browse": "browses", "click": "clicks", "cart": "carts", "favourite": "favourites", "coupon": "coupons"}


def user_daily(events: DataFrame, texts: DataFrame, embeddings: DataFrame, tokens_kept: int) -> DataFrame:
    """Return rows of USER_DAILY.

    Args:
        events: EVENTS; all events of a user's day, or none.
        texts: TEXTS, for the words of searches.
        embeddings: TEXT_EMBEDDINGS of one model, for the sentiment of reviews.
        tokens_kept: how many of the day's newest tokens are stored for the sequence model.
    """
    tokens = day_tokens(_with_text_facts(events, texts, embeddings))
    parts = [_measures(tokens, tokens_kept), _category_days(events), _item_days(events)]
    joined = reduce(lambda left, right: left.join(right, KEY, "left"), parts)
    return joined.select(*(_stored(column) for column in USER_DAILY.columns))


def _with_text_facts(events: DataFrame, texts: DataFrame, embeddings: DataFrame) -> DataFrame:
    """Add the words and the sentiment of the texts of searches and reviews.

    Other events aren't joined: they have about as many texts as there are events.
    """
    has_words = F.col("kind").isin("search", "review") & F.col("text_id").isNotNull()
    words = [f"{word}_words" for word in _WORDS]
    facts = texts.select("text_id", *words).join(embeddings.select("text_id", "sentiment"), "text_id", "left")
    no_words = {name: F.lit(None).cast("int") for name in words}
    other_events = events.filter(~F.coalesce(has_words, F.lit(False)))
    without_facts = other_events.withColumns({**no_words, "sentiment": F.lit(None).cast("float")})
    return events.filter(has_words).join(facts, "text_id", "left").unionByName(without_facts)


def day_tokens(events: DataFrame) -> DataFrame:
    """Return the history tokens: one row for each order and day, and for each other event.

    An order is split at midnight UTC. So a token never holds events of two days, and later events change no history before a
    date. A token whose lines are all refunds or free is no order.
    """
    purchase = F.col("kind") == "purchase"
    is_line = purchase & (F.col("amount") >= 0)
    is_paid = F.count_if(purchase & (F.col("amount") > 0)) > 0
    code = F.element_at(F.create_map(*(F.lit(part) for pair in CODES.items() for part in pair)), F.col("kind"))
    day = F.col("event_date").alias("day")
    return (
        events.withColumn("token", F.when(purchase, F.col("order_id")).otherwise(F.col("event_id")))
        .groupBy("user_key", day, code.alias("kind"), "token")
        .agg(
            F.min("ts").alias("ts"),
            _total(cents("amount")).alias("amount"),
            F.when(is_paid, F.count_if(is_line)).otherwise(0).cast("bigint").alias("items"),
            _total(F.when(purchase, F.greatest(-cents("amount"), F.lit(0)))).alias("refunds"),
            _total(cents("discount")).alias("discount"),
            _total(cents("coupon_discount")).alias("coupon_discount"),
            F.count_if(F.col("discount") > 0).alias("discounted_items"),
            F.coalesce(F.max_by("text_id", F.struct("amount", "text_id")), F.lit(0)).alias("text_id"),
            F.max((F.col("dwell_s") * 1000).cast("long")).alias("dwell_milli"),
            F.max("rating").alias("rating"),
            F.count("item_id").alias("with_item"),
            *(F.max(name).alias(name) for name in (*(f"{word}_words" for word in _WORDS), "sentiment")),
        )
    )


def _measures(tokens: DataFrame, tokens_kept: int) -> DataFrame:
    """Return the sums, counts and newest tokens of each user and day."""
    kind = F.col("kind")
    purchase = kind == CODES["purchase"]
    order = purchase & (F.col("items") > 0)
    search, review = kind == CODES["search"], kind == CODES["review"]
    value = F.col("amount")
    hour = F.hour("ts")

    def in_hours(first: int, last: int) -> SparkColumn:
        return F.count_if(order & hour.between(first, last))

    newest = Window.partitionBy(*KEY).orderBy(F.desc("ts"), F.desc("kind"), F.desc("token"))
    entry = F.struct(
        (-F.col("n")).alias("n"),
        F.struct("ts", "kind", "amount", "items", "discount", "text_id").cast(TOKEN).alias("token"),
    )
    return (
        tokens.withColumn("n", F.row_number().over(newest))
        .groupBy(*KEY)
        .agg(
            F.count_if(order).alias("orders"),
            _total(F.when(purchase, F.col("items"))).alias("items"),
            _total(F.when(purchase, value)).alias("spend"),
            _total(F.col("refunds")).alias("refunds"),
            _total(F.col("discount")).alias("discount"),
            _total(F.col("coupon_discount")).alias("coupon_discount"),
            _total(F.col("discounted_items")).alias("discounted_items"),
            _total(F.when(order, value)).alias("order_value"),
            F.max(F.when(order, value)).alias("order_value_max"),
            _bounded_total(F.when(order, F.round((value / 100) * (value / 100)))).alias("order_value_sq"),
            in_hours(5, 10).alias("morning_orders"),
            in_hours(11, 16).alias("afternoon_orders"),
            in_hours(17, 22).alias("evening_orders"),
            F.count_if(order & ((hour >= NIGHT_FROM) | (hour < NIGHT_UNTIL))).alias("night_orders"),
            *(F.count_if(kind == CODES[action]).alias(name) for action, name in _ACTIONS.items()),
            F.count("dwell_milli").alias("dwelled"),
            _total(F.col("dwell_milli")).alias("dwell_milli"),
            F.count_if(search).alias("searches"),
            F.count_if(search & (F.col("with_item") > 0)).alias("searches_clicked"),
            *(F.count_if(search & (F.col(f"{word}_words") > 0)).alias(f"searches_{word}") for word in _WORDS),
            F.count_if(review).alias("reviews"),
            F.count("rating").alias("rated"),
            _total(F.round(F.col("rating") * 1000).cast("long")).alias("rating_milli"),
            F.count_if(F.col("rating") <= LOW_RATING).alias("low_ratings"),
            F.count_if(review & F.col("sentiment").isNotNull()).alias("worded_reviews"),
            _total(F.when(review, F.round(F.col("sentiment") * 100).cast("long"))).alias("sentiment_centi"),
            F.array_sort(F.collect_list(F.when(F.col("n") <= tokens_kept, entry))).alias("tokens"),
        )
        .withColumn("tokens", F.col("tokens.token"))
    )


def _category_days(events: DataFrame) -> DataFrame:
    """Return ``categories`` of each user and day."""
    price = F.try_divide((F.col("amount") + F.coalesce("discount", F.lit(0))).cast("double"), F.col("quantity"))
    # NULL where the quantity is so small that the price is infinite
    micro = F.round(F.ln(price) * 1e6).try_cast("long")
    purchases = events.filter((F.col("kind") == "purchase") & (F.col("amount") >= 0) & F.col("category").isNotNull())
    with_price = purchases.withColumn("micro", F.when((F.col("quantity") > 0) & (price > 0), micro))
    milli = F.col("micro") / 1000
    return (
        with_price.groupBy("user_key", F.col("event_date").alias("day"), "category")
        .agg(
            _total(cents("amount")).alias("spend"),
            F.count("micro").alias("priced"),
            _total(F.col("micro")).alias("price_micro"),
            _total(F.round(milli * milli).cast("long")).alias("price_sq"),
        )
        .withColumn("entry", F.struct("category", "spend", "priced", "price_micro", "price_sq").cast(CATEGORY_DAY))
        .groupBy(*KEY)
        .agg(F.array_sort(F.collect_list("entry")).alias("categories"))
    )


def _item_days(events: DataFrame) -> DataFrame:
    """Count the items that a user looked at and put into the cart on a day, and those of them bought on the same day."""
    looked = F.col("kind").isin("browse", "click", "favourite")
    counts = {"looked": looked, "carted": F.col("kind") == "cart", "bought": F.col("kind") == "purchase"}
    with_item = events.filter(
        (F.col("kind").isin("purchase", "browse", "click", "favourite", "cart")) & F.col("item_id").isNotNull()
    )
    by_item = with_item.groupBy("user_key", F.col("event_date").alias("day"), "item_id").agg(
        *(F.bool_or(condition).alias(name) for name, condition in counts.items())
    )
    return (
        by_item.filter("looked OR carted")
        .groupBy(*KEY)
        .agg(
            F.count_if("looked").alias("items_browsed"),
            F.count_if(F.col("looked") & F.col("bought")).alias("items_browsed_bought"),
            F.count_if("carted").alias("items_carted"),
            F.count_if(F.col("carted") & F.col("bought")).alias("items_carted_bought"),
        )
    )


def first_order_day() -> SparkColumn:
    """Return the day of the user's first order among all rows of a frame; NULL for a user without an order."""
    return F.min(F.when(F.col("orders") > 0, F.col("day"))).over(Window.partitionBy("user_key"))


def cents(column: str) -> SparkColumn:
    """Return money as a whole number of cents."""
    return F.round(F.col(column).cast("double") * 100).cast("long")


def _total(column: SparkColumn) -> SparkColumn:
    return F.coalesce(F.sum(column), F.lit(0))


def _bounded_total(column: SparkColumn) -> SparkColumn:
    """Return the sum of whole doubles, or the largest bigint where the sum exceeds it."""
    return F.least(_total(column.cast("decimal(38,0)")), F.lit(2**63 - 1)).cast("bigint")


def _stored(column: Column) -> SparkColumn:
    """Return a computed column in its stored type: cents as money, 0 for a missing count, an empty array for a missing one."""
    value = F.col(column.name)
    if column.type == MONEY:
        return (F.coalesce(value, F.lit(0)).cast("decimal(20,0)") / 100).cast(MONEY).alias(column.name)
    if column.type == "bigint":
        return F.coalesce(value, F.lit(0)).cast("bigint").alias(column.name)
    if column.type.startswith("array"):
        return F.coalesce(value, F.array().cast(column.type)).alias(column.name)
    return value
