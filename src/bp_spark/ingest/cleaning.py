"""Raw tables -> ``events``, ``quarantine`` and ``texts``: each raw row ends in exactly one of events, duplicates, quarantine.

A rule is a name and the condition that a good row meets. A row goes to quarantine with the first rule that it breaks.

Point in time. The rows of one ingest are validated and described by what was known then. The ingest's time bounds their
timestamps; items and exchange rates count from the ingest that brought them. So cleaning ingest by ingest gives the same events
as cleaning everything at once.

Duplicates. :mod:`bp_spark.ingest.identity` says which rows are the same event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from bp_spark.core.config import CleaningConfig
from bp_spark.ingest.identity import identified
from bp_spark.ingest.pseudonyms import BROKEN_TEXT
from bp_spark.ingest.sources.contract import THOUSAND
from bp_spark.ingest.texts import normalised, text_id
from bp_spark.lakehouse.tables import EVENTS, RAW_CONTACTS, RAW_LOGS

FORMAT = 4
"""Raised when the meaning of events changes; events of an older format are then cleaned anew."""
COMPATIBLE = (2, 3)
"""Older formats that new events may join, where old raw rows are deleted.

In format 2, equal lines in two part files of one write were one event. In format 3, a line that moved over midnight was two,
and no row was superseded.
"""

ACTIONS = ("browse", "click", "cart", "favourite", "coupon")
LOGS = tuple(table.name for table in RAW_LOGS)
MONEY = "decimal(18,2)"

_AMOUNTS = ("amount", "discount", "coupon_discount", "cost")
_JSON = {"timestampFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSSSSXXX"}
_RAW = {table.name: table for table in (*RAW_LOGS, *RAW_CONTACTS)}


@dataclass(frozen=True)
class Rule:
    """A cleaning rule.

    Attributes:
        name: name of the rule in quarantine.
        holds: condition that good rows meet; NULL counts as broken.
    """

    name: str
    holds: Column


def timed_rules(config: CleaningConfig, now: Column | None = None) -> Sequence[Rule]:
    """Return the rules of rows with a user and a time; see :func:`rules`."""
    latest = (F.col("ingested_at") if now is None else now) + F.expr(f"INTERVAL {config.ahead_minutes} MINUTES")
    return [
        Rule("user_id is missing", F.col("user_key").isNotNull()),
        Rule("ts is missing", F.col("ts").isNotNull()),
        Rule("ts is in the future", F.col("ts") <= latest),
        Rule(f"ts is before {config.first_day}", F.col("ts") >= F.lit(config.first_day).cast("timestamp")),
    ]


def rules(table: str, config: CleaningConfig, now: Column | None = None) -> Sequence[Rule]:
    """Return the rules of a raw table in their order, for rows with the columns of :func:`_with_references`.

    Args:
        table: raw table.
        config: settings of cleaning.
        now: latest valid time of an event; by default the time of the row's ingest.
    """

    def present(column: str) -> Rule:
        return Rule(f"{column} is missing", F.length(F.trim(F.col(column))) > 0)

    def absent_or(column: str, condition: Column, rule: str) -> Rule:
        return Rule(f"{column} {rule}", F.col(column).isNull() | condition)

    def finite(column: str) -> Rule:
        return absent_or(column, F.abs(column).between(0, 1e15), "is not a finite number")

    def whole_text(column: str) -> Rule:
        return absent_or(column, ~F.col(column).rlike(BROKEN_TEXT), "is broken text")

    def plausible(column: str) -> Rule:
        # converted, too, the amount has to fit into its column
        converted = F.abs(F.col(column) * F.col("rate"))
        return absent_or(column, converted <= config.max_amount, f"is beyond {config.max_amount:g}")

    def not_negative(column: str) -> Rule:
        # a refund takes the reduction back, and goods
        return absent_or(column, (F.col(column) >= 0) | (F.col("amount") < 0), "is negative")

    known_item = (
        [Rule("item is unknown", F.col("item_id").isNull() | F.col("item_known"))]
        if config.unknown_items == "quarantine"
        else []
    )
    free_line = (
        [Rule("amount and discount are 0", (F.col("amount") != 0) | (F.col("discount") != 0))]
        if config.free_lines == "quarantine"
        else []
    )
    own = {
        "raw_transactions": [
            Rule("amount is missing", F.col("amount").isNotNull()),
            Rule("currency has no rate", F.col("rate").isNotNull()),
            plausible("amount"),
            plausible("discount"),
            plausible("coupon_discount"),
            plausible("cost"),
            finite("quantity"),
            not_negative("discount"),
            not_negative("coupon_discount"),
            not_negative("cost"),
            absent_or("quantity", (F.col("quantity") >= 0) | (F.col("amount") <= 0), "is negative, amount is not"),
            *free_line,
            *known_item,
        ],
        "raw_behaviours": [
            Rule("action is unknown", F.col("action").isin(*ACTIONS)),
            absent_or("dwell_s", F.col("dwell_s").between(0, 86_400), "is not within a day"),
            *known_item,
        ],
        "raw_searches": [present("query"), whole_text("query")],
        "raw_reviews": [
            Rule("rating and text are missing", F.coalesce("rating", F.length("text")).isNotNull()),
            absent_or("rating", F.col("rating").between(0, config.max_rating), f"is beyond 0..{config.max_rating:g}"),
            whole_text("text"),
            *known_item,
        ],
    }
    return [*timed_rules(config, now), *own[table]]


def validate(
    raw: Mapping[str, DataFrame], references: Mapping[str, DataFrame], config: CleaningConfig, now: Column | None = None
) -> dict[str, DataFrame]:
    """Add ``rule`` to the raw rows of each log: the first broken rule, or NULL; add item and rate of each row as well.

    Args:
        raw: log -> rows to validate; any of RAW_LOGS.
        references: ``raw_items`` and ``raw_rates``, all rows, where the platform has them.
        config: settings of cleaning.
        now: see :func:`rules`.
    """
    return {
        name: _with_references(raw[name], name, references, config).withColumn(
            "rule", first_broken(rules(name, config, now))
        )
        for name in LOGS
        if name in raw
    }


def _with_references(
    df: DataFrame, table: str, references: Mapping[str, DataFrame], config: CleaningConfig
) -> DataFrame:
    """Add ``rate`` to transactions, and ``category``, ``item_text`` and ``item_known`` to all rows."""
    if table == "raw_transactions":
        df = df.transform(lambda rows: _with_rate(rows, references.get("raw_rates"), config.currency))
    item = "clicked_item_id" if table == "raw_searches" else "item_id"
    if "raw_items" not in references:
        unknown = F.lit(None).cast("string")
        return df.withColumns({"category": unknown, "item_text": unknown, "item_known": F.lit(False)})
    items = _item_versions(references["raw_items"])
    at = df["ingest_id"]
    same_item = (df[item] == items["_item_id"]) & (at >= items["_from"]) & (at < items["_to"])
    described = df.join(items, same_item, "left").withColumn("item_known", F.col("_item_id").isNotNull())
    return described.drop("_item_id", "_from", "_to")


def _item_versions(raw_items: DataFrame) -> DataFrame:
    """Return what was known of each item from one ingest (``_from``) until another (``_to``, exclusive)."""
    newest = Window.partitionBy("item_id", "ingest_id").orderBy(F.desc("delivery"), F.desc("title"), F.desc("category"))
    later = Window.partitionBy("item_id").orderBy("ingest_id")
    forever = F.lit(2**62)
    return (
        raw_items.filter(F.col("item_id").isNotNull())
        .withColumn("n", F.row_number().over(newest))
        .filter("n = 1")
        .select(
            F.col("item_id").alias("_item_id"),
            F.col("ingest_id").alias("_from"),
            F.coalesce(F.lead("ingest_id").over(later), forever).alias("_to"),
            F.nullif(F.trim("category"), F.lit("")).alias("category"),
            _item_text().alias("item_text"),
        )
    )


def _item_text() -> Column:
    """Return the text that describes an item: its title, or the narrowest part of its category."""
    leaf = F.element_at(F.split("category", " > "), -1)
    return normalised(F.coalesce(F.col("title"), leaf))


def _with_rate(df: DataFrame, raw_rates: DataFrame | None, currency: str) -> DataFrame:
    """Add ``rate`` into the platform's currency: the newest by the row's day that was known at its ingest, 1 for its own."""
    own = F.coalesce(F.col("currency"), F.lit(currency)) == currency
    if raw_rates is None:
        return df.withColumn("rate", F.when(own, F.lit(1).cast("decimal(18,8)")))
    entry = F.struct("day", "ingest_id", "delivery", "rate")
    rates = (
        raw_rates.filter((F.col("rate") > 0) & F.col("day").isNotNull())
        .groupBy(F.col("currency").alias("_currency"))
        .agg(F.array_sort(F.collect_list(entry)).alias("_rates"))
    )
    usable = F.filter("_rates", lambda r: (r["day"] <= F.to_date("ts")) & (r["ingest_id"] <= F.col("ingest_id")))
    rate = F.when(own, F.lit(1).cast("decimal(18,8)")).otherwise(F.get(usable["rate"], F.size(usable) - 1))
    joined = df.join(F.broadcast(rates), df["currency"] == rates["_currency"], "left")
    return joined.withColumn("rate", rate).drop("_currency", "_rates")


def first_broken(rules_of_table: Sequence[Rule]) -> Column:
    """Return the name of the first rule that a raw row breaks; an unreadable value comes before all rules."""
    name = F.array_min(F.map_keys("unreadable"))
    text = F.when(name.isin(*_AMOUNTS), F.try_element_at("unreadable", name))
    reason = F.when(text.rlike(THOUSAND), F.lit(" has a point that may part thousands")).when(
        text.rlike(r"^\s*[-+]?\d*\.\d{3,}\s*$"), F.lit(" has more than 2 decimals")
    )
    unreadable = F.concat(name, F.coalesce(reason, F.lit(" is unreadable")))
    broken = (F.when(~F.coalesce(rule.holds, F.lit(False)), F.lit(rule.name)) for rule in rules_of_table)
    return F.coalesce(F.when(F.size("unreadable") > 0, unreadable), *broken)


def quarantine(validated: Mapping[str, DataFrame]) -> DataFrame:
    """Return rows of QUARANTINE: the validated rows that broke a rule, as delivered."""
    return _union(
        [
            df.filter(F.col("rule").isNotNull()).select(
                F.lit(name).alias("source"),
                F.col("rule"),
                F.to_json(F.struct(*_RAW[name].schema.names), {"ignoreNullFields": "false", **_JSON}).alias("row"),
                F.col("ingest_id"),
            )
            for name, df in validated.items()
        ]
    )


def from_quarantine(rows: DataFrame, table: str) -> DataFrame:
    """Return the rows of a raw table as they went into quarantine."""
    row = F.from_json("row", _RAW[table].schema, _JSON)
    return rows.filter(F.col("source") == table).select(row.alias("row")).select("row.*")


def events(validated: Mapping[str, DataFrame], day_in: str = "UTC") -> DataFrame:
    """Return the good rows as EVENTS, with the other columns of :func:`bp_spark.ingest.identity.identified`.

    Args:
        validated: log -> rows as :func:`validate` returns them; ``superseded`` and ``snapshot``
            (:meth:`bp_spark.ingest.deliveries.Versions.mark`) are false where they lack these columns.
        day_in: zone whose clock ``ts`` and ``event_date`` show.
    """
    rows = [_EVENT_OF[name](_with_clock(_that_count(df), day_in)) for name, df in validated.items()]
    added = ("copy", "superseded", "delivered_by", "neighbour_id", "neighbour_date")
    return _union(rows).transform(identified).select(*EVENTS.schema.names, *added)


def _that_count(df: DataFrame) -> DataFrame:
    """Return the rows that are good or superseded, with the flags ``good``, ``superseded`` and ``snapshot``."""
    flags = {name: F.lit(False) for name in ("superseded", "snapshot") if name not in df.columns}
    good = F.col("rule").isNull()
    # Spark Connect refuses to add no columns
    flagged = df.withColumns(flags) if flags else df
    kept = flagged.filter(good | F.col("superseded"))
    # where nothing is superseded, the filter leaves good rows alone; to apply the rules again would take as long as the rest
    return kept.withColumn("good", ~F.col("superseded") | good)


def _with_clock(df: DataFrame, day_in: str) -> DataFrame:
    """Move ``ts`` to the clock of a zone; ``instant`` is the time in UTC."""
    return df.withColumn("instant", F.col("ts")).withColumn("ts", local_time("ts", day_in))


def local_time(column: str, day_in: str) -> Column:
    """Return what the clock of a zone showed at a time of UTC."""
    return F.col(column) if day_in == "UTC" else F.from_utc_timestamp(column, day_in)


def _event(kind: Column, **columns: Column) -> list[Column]:
    given = {
        "user_key": F.col("user_key"),
        "ts": F.col("ts"),
        "event_date": F.to_date("ts"),
        "kind": kind,
        "category": F.col("category"),
        "ingest_id": F.col("ingest_id"),
        **columns,
    }
    given["text_id"] = text_id(F.coalesce(columns.get("own_text", F.lit(None)), F.col("item_text")))
    types = {field.name: field.dataType for field in EVENTS.schema.fields}
    names = [name for name in EVENTS.schema.names if name != "event_id"]
    selected = [given.get(name, F.lit(None)).cast(types[name]).alias(name) for name in names]
    extra = [columns.get(name, F.lit(None)).cast("string").alias(name) for name in ("line_id", "own_text")]
    delivery = F.coalesce(F.col("delivery"), F.lit("")).alias("delivery")
    return [*selected, *extra, delivery, *map(F.col, ("instant", "good", "superseded", "snapshot"))]


def _purchases(df: DataFrame) -> DataFrame:
    def converted(column: str) -> Column:
        # a superseded row may hold what the rules would have kept out
        return F.when(F.col("good"), F.col(column) * F.col("rate")).cast(MONEY)

    # in a log without orders, lines of one user and one moment are an order
    order = F.coalesce(F.col("order_id"), F.date_format("instant", "yyyy-MM-dd'T'HH:mm:ss"))
    money = {name: converted(name) for name in _AMOUNTS}
    names = ("line_id", "item_id", "quantity")
    return df.select(*_event(F.lit("purchase"), order_id=order, **{name: F.col(name) for name in names}, **money))


def _behaviours(df: DataFrame) -> DataFrame:
    return df.select(*_event(F.col("action"), item_id=F.col("item_id"), dwell_s=F.col("dwell_s")))


def _searches(df: DataFrame) -> DataFrame:
    return df.select(*_event(F.lit("search"), item_id=F.col("clicked_item_id"), own_text=normalised(F.col("query"))))


def _reviews(df: DataFrame) -> DataFrame:
    text = normalised(F.col("text"))
    columns = {"item_id": F.col("item_id"), "rating": F.col("rating"), "own_text": text}
    # a review without words is not described by its item's title
    return df.withColumn("item_text", F.lit(None).cast("string")).select(*_event(F.lit("review"), **columns))


_EVENT_OF = {
    "raw_transactions": _purchases,
    "raw_behaviours": _behaviours,
    "raw_searches": _searches,
    "raw_reviews": _reviews,
}


def texts(raw: Mapping[str, DataFrame]) -> DataFrame:
    """Return every normalised text of items, queries and reviews: ``text``, ``ingest_id`` of the ingest that brought it."""
    source = {
        "raw_items": _item_text(),
        "raw_searches": normalised(F.col("query")),
        "raw_reviews": normalised(F.col("text")),
    }
    frames = [raw[name].select(text.alias("text"), "ingest_id") for name, text in source.items() if name in raw]
    no_rows = raw[next(iter(raw))].select(F.lit(None).cast("string").alias("text"), "ingest_id").limit(0)
    return _union([no_rows, *frames]).filter(F.col("text").isNotNull())


def brands(raw_items: DataFrame) -> DataFrame:
    """Return normalised brand names: ``brand``, and ``known_from``, the first ingest that brought it."""
    brand = normalised(F.col("brand"))
    return (
        raw_items.select(brand.alias("brand"), "ingest_id")
        .filter("brand IS NOT NULL")
        .groupBy("brand")
        .agg(F.min("ingest_id").alias("known_from"))
    )


def _union(frames: Sequence[DataFrame]) -> DataFrame:
    return reduce(DataFrame.unionByName, frames)
