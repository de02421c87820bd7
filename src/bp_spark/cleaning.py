"""Raw tables -> ``events`` and ``quarantine``: every raw row ends in exactly one of events, duplicates, quarantine.

A rule is declared as a name and the condition that a good row meets; a row goes to quarantine with the first rule it breaks.

Duplicates. A line with a ``line_id`` is identified by (user, order, line). Without one, the identity is the whole content of
the row plus its occurrence number within its delivery: two equal lines of one basket in one file are two honest lines (two
scans of one article); the same two lines in a second file are a repeated delivery, and only the larger count is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pyspark.sql import Column, DataFrame, Observation, Window
from pyspark.sql import functions as F

from bp_spark.config import CleaningConfig
from bp_spark.tables import EVENTS, RAW_TABLES
from bp_spark.texts import normalised, text_id

ACTIONS = ("browse", "click", "cart", "favourite", "coupon")
RAW = {table.name: table for table in RAW_TABLES}


@dataclass(frozen=True)
class Rule:
    """A rule's name, as it stands in quarantine, and the condition that good rows meet (NULL counts as broken)."""

    name: str
    holds: Column


def rules(table: str, config: CleaningConfig, now: datetime) -> Sequence[Rule]:
    """The rules of a raw table, in the order in which they are tried."""

    def present(column: str) -> Rule:
        return Rule(f"{column} is missing", F.length(F.trim(F.col(column))) > 0)

    def finite(column: str) -> Rule:
        value = F.col(column)
        return Rule(f"{column} is not a finite number", value.isNull() | F.abs(value).between(0, 1e15))

    timed = [
        present("user_id"),
        Rule("ts is missing", F.col("ts").isNotNull()),
        Rule("ts is in the future", F.col("ts") <= F.lit(now)),
    ]
    own = {
        "raw_transactions": [
            present("order_id"),
            present("item_id"),
            Rule("amount is missing", F.col("amount").isNotNull()),
            Rule(f"amount is beyond {config.max_amount:g}", F.abs("amount") <= config.max_amount),
            Rule(f"currency is not {config.currency}", F.col("currency") == config.currency),
            finite("quantity"),
        ],
        "raw_behaviours": [
            Rule("action is unknown", F.col("action").isin(*ACTIONS)),
            finite("dwell_s"),
        ],
        "raw_searches": [present("query")],
        "raw_reviews": [present("item_id"), finite("rating")],
    }
    return [*timed, *own[table]]


def clean(
    raw: Mapping[str, DataFrame], config: CleaningConfig, now: datetime
) -> tuple[DataFrame, DataFrame, Observation]:
    """Split raw rows into events and quarantine.

    Args:
        raw: raw table name -> rows; only ``raw_transactions`` is mandatory.
        now: rows of a later time are refused.

    Returns:
        events without duplicates; quarantine rows without run id; an observation that holds ``valid`` and
        ``duplicates`` (row counts) once the events were written.
    """
    items = _items(raw)
    judged = [
        raw[name].withColumn("rule", _first_broken(rules(name, config, now)))
        for name in ("raw_transactions", "raw_behaviours", "raw_searches", "raw_reviews")
        if name in raw
    ]
    names = [name for name in ("raw_transactions", "raw_behaviours", "raw_searches", "raw_reviews") if name in raw]
    quarantine = _union(
        [
            df.filter(F.col("rule").isNotNull()).select(
                F.lit(name).alias("source"),
                F.col("rule"),
                F.to_json(F.struct(*RAW[name].schema.names), {"ignoreNullFields": "false"}).alias("row"),
            )
            for name, df in zip(names, judged, strict=True)
        ]
    )
    good = _union([_EVENT_OF[name](df.filter(F.col("rule").isNull())) for name, df in zip(names, judged, strict=True)])
    counts = Observation("clean")
    events = (
        _identified(good)
        .observe(
            counts,
            F.count(F.lit(1)).alias("valid"),
            F.coalesce(F.sum((F.col("copy") > 1).cast("long")), F.lit(0)).alias("duplicates"),
        )
        .filter(F.col("copy") == 1)
        .transform(lambda df: _described(df, items))
        .select(*EVENTS.schema.names)
    )
    return events, quarantine, counts


def _first_broken(rules_of_table: Sequence[Rule]) -> Column:
    return F.coalesce(*(F.when(~F.coalesce(rule.holds, F.lit(False)), F.lit(rule.name)) for rule in rules_of_table))


def _event(kind: Column, **columns: Column) -> list[Column]:
    given = {
        "user_key": F.trim(F.col("user_id")),
        "ts": F.col("ts"),
        "event_date": F.to_date("ts"),
        "kind": kind,
        "delivery": F.col("delivery"),
        **columns,
    }
    types = {field.name: field.dataType for field in EVENTS.schema.fields}
    wanted = [name for name in EVENTS.schema.names if name not in ("event_id", "text_id", "category")]
    selected = [given.get(name, F.lit(None)).cast(types[name]).alias(name) for name in wanted]
    extra = [given.get(name, F.lit(None)).cast("string").alias(name) for name in ("line_id", "own_text", "delivery")]
    return selected + extra


def _purchases(df: DataFrame) -> DataFrame:
    names = ("order_id", "line_id", "item_id", "quantity", "amount", "discount", "coupon_discount")
    return df.select(*_event(F.lit("purchase"), **{name: F.col(name) for name in names}))


def _behaviours(df: DataFrame) -> DataFrame:
    return df.select(*_event(F.col("action"), item_id=F.col("item_id"), dwell_s=F.col("dwell_s")))


def _searches(df: DataFrame) -> DataFrame:
    return df.select(*_event(F.lit("search"), item_id=F.col("clicked_item_id"), own_text=normalised(F.col("query"))))


def _reviews(df: DataFrame) -> DataFrame:
    return df.select(
        *_event(
            F.lit("review"),
            item_id=F.col("item_id"),
            rating=F.col("rating"),
            own_text=normalised(F.col("text")),
        )
    )


_EVENT_OF = {
    "raw_transactions": _purchases,
    "raw_behaviours": _behaviours,
    "raw_searches": _searches,
    "raw_reviews": _reviews,
}


def _identified(df: DataFrame) -> DataFrame:
    """Add ``event_id`` and ``copy``, which numbers the deliveries of one event from 1."""
    content = (
        "item_id",
        "ts",
        "quantity",
        "amount",
        "discount",
        "coupon_discount",
        "rating",
        "dwell_s",
        "own_text",
    )
    by_line = F.struct("kind", "user_key", "order_id", "line_id")
    by_content = F.struct("kind", "user_key", "order_id", *content)
    has_line = F.col("line_id").isNotNull()
    identity = F.sha2(F.when(has_line, F.to_json(by_line)).otherwise(F.to_json(by_content)), 256)
    same_file = Window.partitionBy("identity", "delivery").orderBy("ts")
    same_event = Window.partitionBy("identity", "occurrence").orderBy(
        F.col("delivery").desc_nulls_last(), F.col("ts").desc(), F.col("amount").desc()
    )
    return (
        df.withColumn("identity", identity)
        .repartition("identity")
        .withColumn("occurrence", F.when(has_line, F.lit(0)).otherwise(F.row_number().over(same_file)))
        .withColumn("copy", F.row_number().over(same_event))
        .withColumn("event_id", F.sha2(F.concat_ws("/", "identity", "occurrence"), 256))
    )


def _items(raw: Mapping[str, DataFrame]) -> DataFrame | None:
    if "raw_items" not in raw:
        return None
    leaf = F.element_at(F.split("category", " > "), -1)
    return (
        raw["raw_items"]
        .select("item_id", "category", normalised(F.coalesce(F.col("title"), leaf)).alias("item_text"))
        .dropDuplicates(["item_id"])
    )


def _described(df: DataFrame, items: DataFrame | None) -> DataFrame:
    """Add the item's category and the text that describes the event: its own (query, review), else the item's."""
    if items is None:
        df = df.withColumns({"category": F.lit(None).cast("string"), "item_text": F.lit(None).cast("string")})
    else:
        df = df.join(items, "item_id", "left")
    return df.withColumn("text_id", text_id(F.coalesce("own_text", "item_text")))


def texts(raw: Mapping[str, DataFrame]) -> DataFrame:
    """Every normalised text behind a ``text_id`` of the events (and of items not yet bought): a column ``text``."""
    found = [(_items(raw), F.col("item_text"))]
    found += [
        (raw.get("raw_searches"), normalised(F.col("query"))),
        (raw.get("raw_reviews"), normalised(F.col("text"))),
    ]
    frames = [df.select(text.alias("text")) for df, text in found if df is not None]
    return (
        _union(frames) if frames else raw["raw_transactions"].select(F.lit(None).cast("string").alias("text")).limit(0)
    )


def _union(frames: Sequence[DataFrame]) -> DataFrame:
    first, *others = frames
    for other in others:
        first = first.unionByName(other)
    return first
