"""Dirt, deliveries and files: rows spoiled, late or repeated, written by the day on which the platform ships them."""

from __future__ import annotations

from collections.abc import Mapping

from pyspark.sql import DataFrame, Observation
from pyspark.sql import functions as F

from bp_spark.core.config import SyntheticConfig
from bp_spark.ingest.sources.synthetic.currency import MAX_DELAY
from bp_spark.ingest.sources.synthetic.draws import uniform, whole
from bp_spark.ingest.sources.synthetic.text import pick

_ALWAYS = {
    "missing_user": ("user_id", None),
    "unreadable_ts": ("ts", "31/02/2024 25:61"),
    "future_ts": ("ts", "2999-01-01 00:00:00"),
}
SPOILS: Mapping[str, Mapping[str, tuple[str, str | None]]] = {
    "transactions": {
        **_ALWAYS,
        "unreadable_amount": ("amount", "12,3O"),
        "huge_amount": ("amount", "999999999999.99"),
        "unknown_currency": ("currency", "XXX"),
        "unknown_item": ("item_id", "i-unknown"),
    },
    "behaviours": {**_ALWAYS, "unknown_action": ("action", "teleport"), "unknown_item": ("item_id", "i-unknown")},
    "searches": {**_ALWAYS, "empty_query": ("query", "  "), "broken_unicode": ("query", "caf\ufffd \x07\x1b[0m")},
    "reviews": {
        **_ALWAYS,
        "rating_out_of_range": ("rating", "11.0"),
        "broken_unicode": ("text", "\ufffd\ufffd good \x00\x1b[0m"),
        "unknown_item": ("item_id", "i-unknown"),
    },
    "consultations": {**_ALWAYS, "unreadable_solved": ("solved", "maybe")},
}
"""Log -> kind of malformed row -> the spoiled column and its value; kinds are equally likely."""
DELIVERED: Mapping[str, tuple[str, ...]] = {
    "transactions": (
        *("user_id", "order_id", "line_id", "item_id", "ts"),
        *("quantity", "amount", "discount", "coupon_discount", "currency"),
    ),
    "behaviours": ("user_id", "ts", "action", "item_id", "dwell_s"),
    "searches": ("user_id", "ts", "query", "clicked_item_id"),
    "reviews": ("user_id", "ts", "item_id", "rating", "text"),
    "consultations": ("user_id", "ts", "channel", "topic", "text", "solved"),
    "items": ("item_id", "title", "category", "brand", "price"),
    "users": ("user_id", "signup_ts", "age", "income"),
    "rates": ("currency", "day", "rate"),
}
"""Columns of each table's files; all are text but ``quantity`` (int) and ``dwell_s`` (double)."""


def soiled(df: DataFrame, log: str, config: SyntheticConfig) -> DataFrame:
    """Return the rows as delivered: the columns of the file, ``delivery_day``, and ``dirt`` (its kind, or NULL)."""
    kinds = list(SPOILS[log])
    place = uniform(config, f"dirt of {log}", "key")
    late = config.malformed_rate + config.late_rate
    twice = late + config.duplicate_rate
    dirt = (
        F.when(place < config.malformed_rate, pick(kinds, uniform(config, f"spoil of {log}", "key")))
        .when(place < late, F.lit("late"))
        .when(place < twice, F.lit("duplicate"))
    )
    delay = 1 + whole(uniform(config, f"delay of {log}", "key") * MAX_DELAY)
    delays = (
        F.when(F.col("dirt") == "late", F.array(delay))
        .when(F.col("dirt") == "duplicate", F.array(F.lit(0), delay))
        .otherwise(F.array(F.lit(0)))
    )
    spoiled = {name: F.col(name) for name in DELIVERED[log]}
    for kind, (column, value) in SPOILS[log].items():
        spoiled[column] = F.when(F.col("dirt") == kind, F.lit(value)).otherwise(spoiled[column])
    first_of_two = (F.col("dirt") == "duplicate") & (F.col("delay") == 0)
    return (
        df.withColumn("dirt", dirt)
        .withColumn("delay", F.explode(delays))
        .select(
            *(value.alias(name) for name, value in spoiled.items()),
            F.date_add(F.lit(config.first_day), F.col("day") + F.col("delay")).alias("delivery_day"),
            F.when(first_of_two, None).otherwise(F.col("dirt")).alias("dirt"),
        )
    )


def write_log(df: DataFrame, log: str, folder: str) -> dict[str, int]:
    """Write a log by delivery day, and return the number of ``rows`` and of rows of each kind of dirt."""
    kinds = (*SPOILS[log], "late", "duplicate")
    dirt_counts = [F.count_if(F.coalesce(F.col("dirt") == kind, F.lit(False))).alias(kind) for kind in kinds]
    counts = Observation(log)
    (
        # a day in one task, a large day in several: else every task would leave a file for every day (without adaptive
        # execution, which splits and joins tasks by size, Spark ignores the hint)
        df.hint("rebalance", "delivery_day")
        # counted behind the shuffle: a retried task before it would count twice
        .observe(counts, F.count(F.lit(1)).alias("rows"), *dirt_counts)
        .drop("dirt")
        .write.partitionBy("delivery_day")
        .option("maxRecordsPerFile", 5_000_000)
        .parquet(f"{folder}/{log}")
    )
    return {name: int(count) for name, count in counts.get.items()}
