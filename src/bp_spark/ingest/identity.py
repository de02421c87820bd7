"""Which rows are the same event: of the deliveries of one event, which counts, and what is new, changed or known.

A line with a ``line_id`` is identified by user, order, day and line. Its newest delivery counts, as a correction. If a newer
delivery has it on the day before or after, not more than twelve hours away, its time has moved over midnight: then it is no
event of its old day any more.

A line without one is identified by the whole content of the row and its occurrence number within its delivery. Two equal
lines of one basket in one file are two real lines (two scans of one article). The same two lines in a second file are a
repeated delivery, and only the larger count is kept. The part files of one write of Spark are one delivery (:func:`_write_of`),
and so are all files of a Delta table.

The day is part of either identity, so that duplicates are searched among events of the same days.

Rows that a later version of their file supersedes (:mod:`bp_spark.ingest.deliveries`) are no deliveries of an event. They only
tell since when it is known.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from bp_spark.lakehouse.tables import EVENTS

NEW, CHANGED, KNOWN, MOVED = "new", "changed", "known", "moved"
"""States of an event, by :func:`add_state` and :func:`moved_away`."""

CONTENT = ("item_id", "instant", "quantity", "amount", "discount", "coupon_discount", "rating", "dwell_s", "own_text")
"""Columns that identify a row without a line, beside user, kind and order.

What it cost the shop is none of them: a platform that learns it later corrects its lines.
"""

_MOVES_S = 12 * 3600
"""Seconds that the time of a line may move over midnight."""
_NOON = 12
_DELIVERED = ("ingest_id", "delivery", "seconds")
"""Columns that tell which of two deliveries is the newer one."""
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def identified(rows: DataFrame) -> DataFrame:
    """Add identities and ``copy`` to the rows of events.

    Args:
        rows: columns of EVENTS without ``event_id``; ``instant`` (time in UTC), ``line_id``, ``own_text``, ``delivery``; flags
            ``good``, ``superseded`` and ``snapshot``. Rows that are not good are superseded.

    Returns:
        The rows with these columns:

        - ``event_id``.
        - ``copy``: 1 for the delivery that counts, more for others, 0 for rows that are no event: superseded ones, and lines
          that moved to another day.
        - ``delivered_by``: ingest of the row. ``ingest_id`` becomes that of the event's first delivery.
        - ``neighbour_id``, ``neighbour_date``: the event that this line would be on the only other day within twelve hours;
          NULL without a ``line_id``.
    """
    has_line = F.col("line_id").isNotNull()
    line = F.xxhash64("kind", "user_key", "order_id", "line_id")
    by_content = F.to_json(F.struct("kind", "user_key", "order_id", *(_renamed(name) for name in CONTENT)))
    identity = F.sha2(F.when(has_line, _line_on(F.col("event_date"))).otherwise(by_content), 256)
    before_noon = F.hour("ts") < _NOON
    neighbour_date = F.when(has_line, F.date_add("event_date", F.when(before_noon, -1).otherwise(1)))
    live = ~F.col("superseded")
    write = [
        F.when(F.col("snapshot"), F.lit(0)).otherwise(F.col("ingest_id")),
        # a line is the same in any write
        F.when(F.col("snapshot") | has_line, F.lit("")).otherwise(_write_of("delivery")),
    ]
    # Spark sorts for this window, and the two of a line that follow need no other order; so do the two of an event
    delivered_first = ("ts", "ingest_id", "delivery", "cost")
    same_write = Window.partitionBy("place", "identity", "superseded", *write).orderBy(*delivered_first)
    same_line = Window.partitionBy("place")
    content = [F.desc(name) for name in (*CONTENT, "cost", "category", "text_id")]
    newest = [F.desc("live"), F.desc("ingest_id"), F.desc("delivery"), *content]
    event = ("place", "identity", "occurrence")
    # few lines have two days; only their deliveries are held against each other
    delivered = F.struct(*_DELIVERED)
    # that they name the occurrence keeps Spark from moving these windows before the first one
    is_line = has_line & live & (F.col("occurrence") == 0)
    line_day = F.when(is_line, F.col("event_date"))
    has_days = F.min(line_day).over(same_line) != F.max(line_day).over(same_line)
    of_days = F.collect_list(F.when(is_line & F.col("has_days"), F.struct(*_DELIVERED, "event_date"))).over(same_line)
    moved = F.exists(
        "of_days",
        lambda other: (
            (other["event_date"] != F.col("event_date"))
            & (F.abs(other["seconds"] - F.col("seconds")) <= _MOVES_S)
            & (F.struct(*(other[name].alias(name) for name in _DELIVERED)) > delivered)
        ),
    )
    deliveries = Window.partitionBy(*event).orderBy(*newest)
    copy = F.row_number().over(deliveries)
    # a line that moved away and came back is known since it came back
    first = F.min(F.when(F.col("good") & ~F.col("moved"), F.col("ingest_id"))).over(
        deliveries.rowsBetween(Window.unboundedPreceding, Window.unboundedFollowing)
    )
    return (
        rows.withColumns({"identity": identity, "live": live, "seconds": F.unix_timestamp("ts")})
        .withColumn("place", F.when(has_line, line).otherwise(F.xxhash64("identity")))
        .repartition("place")
        .withColumn("occurrence", F.when(has_line, F.lit(0)).otherwise(F.row_number().over(same_write)))
        .withColumn("has_days", has_days)
        .withColumn("of_days", of_days)
        .withColumn("moved", moved)
        .withColumns({"copy": copy, "delivered_by": F.col("ingest_id"), "ingest_id": first})
        .withColumn(
            "copy", F.when(~F.col("live") | (F.col("moved") & (F.col("copy") == 1)), 0).otherwise(F.col("copy"))
        )
        .withColumns(
            {
                "event_id": _event_id("identity", F.col("occurrence")),
                "neighbour_id": F.when(has_line, _event_id(F.sha2(_line_on(neighbour_date), 256), F.lit(0))),
                "neighbour_date": neighbour_date,
            }
        )
    )


def add_state(fresh: DataFrame, stored: DataFrame) -> DataFrame:
    """Add ``state`` to fresh events: ``new``, ``changed`` (corrects a stored event) or ``known`` (delivered again).

    Args:
        fresh: EVENTS, each event once.
        stored: stored EVENTS, at least of the days in ``fresh``.
    """
    content = F.xxhash64(*(name for name in EVENTS.schema.names if name != "ingest_id"))
    seen = stored.select("event_id", "event_date", content.alias("_content"), F.col("ingest_id").alias("_first"))
    state = F.when(F.col("_content").isNull(), NEW).when(F.col("_content") == content, KNOWN).otherwise(CHANGED)
    joined = fresh.join(seen, ["event_id", "event_date"], "left").withColumn("state", state)
    more = [name for name in ("delivered_by",) if name in fresh.columns]
    return joined.withColumn("ingest_id", F.coalesce("_first", "ingest_id")).select(
        *EVENTS.schema.names, *more, "state"
    )


def moved_away(rows: DataFrame, stored: DataFrame) -> DataFrame:
    """Return the stored events that fresh rows have moved to another day, with the ``state`` ``moved``.

    Args:
        rows: fresh rows, as :func:`identified` returns them.
        stored: stored EVENTS, at least of the days of the rows and their neighbours.
    """
    neighbours = rows.filter("neighbour_id IS NOT NULL").select(
        F.col("neighbour_id").alias("event_id"),
        F.col("neighbour_date").alias("event_date"),
        F.col("ts").alias("_ts"),
        "delivered_by",
    )
    no_events = rows.filter("copy = 0").select("event_id", "event_date", F.lit(None).cast("timestamp").alias("_ts"))
    near = F.abs(F.unix_timestamp("ts") - F.unix_timestamp("_ts")) <= _MOVES_S
    # a row that waited in quarantine may be older than the event
    moved = near & (F.col("delivered_by") > F.col("ingest_id"))
    fresh_events = rows.filter("copy = 1").select("event_id", "event_date")
    joined = stored.join(
        neighbours.unionByName(no_events, allowMissingColumns=True), ["event_id", "event_date"]
    ).filter(F.col("_ts").isNull() | moved)
    once = joined.select(*EVENTS.schema.names).dropDuplicates(["event_id"])
    return once.join(fresh_events, ["event_id", "event_date"], "left_anti").withColumn("state", F.lit(MOVED))


def _renamed(name: str) -> Column:
    # event ids are stored: the name is part of what was hashed
    return F.col(name).alias("ts" if name == "instant" else name)


def _line_on(day: Column) -> Column:
    """Return the identity of a line on a day, before it is hashed."""
    return F.to_json(F.struct("kind", "user_key", "order_id", day.alias("event_date"), "line_id"))


def _event_id(identity: str | Column, occurrence: Column) -> Column:
    return F.sha2(F.concat_ws("/", identity, occurrence), 256)


def _write_of(delivery: str) -> Column:
    """Return the write that a file is part of: Spark names a file by the number of its task and the write's UUID.

    Files of one write in folders such as ``shop=a/`` are one delivery. In other folders they are two: ``day=2024-05-01/`` and
    ``day=2024-05-02/`` may bring a line twice, and a backup does. So folders count unless they are partitions by another
    value than a date, or a part of one.
    """
    # anchored, and without a way back: searched from each letter of a path, it took as long as all the rest of cleaning
    folders = F.regexp_replace(delivery, r"(?<![^/])[^/=]++=(?![\d-]++/)[^/]*+/", "")
    named = F.regexp_replace(folders, rf"part-\d++-({_UUID})[^/]*$", "$1")
    return F.when(F.contains(F.col(delivery), F.lit("part-")), named).otherwise(F.col(delivery))
