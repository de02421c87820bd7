"""Raw consultations and campaigns -> ``consultations`` and ``campaign_contacts``: rules, identity, corrections.

Each raw row ends in exactly one of contacts, duplicates, quarantine, as for events (:mod:`bp_spark.ingest.cleaning`).

Duplicates. A contact is identified by content: by all columns of its table but those that later deliveries may correct
(:attr:`ContactLog.outcome`). Its newest delivery counts. Equal rows are one contact, also within one file.

Point in time. A row is validated by the time of its ingest, and keeps the first ingest that brought it. So cleaning ingest by
ingest gives the same contacts as cleaning everything at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from bp_spark.core.config import CleaningConfig
from bp_spark.ingest.cleaning import Rule, first_broken, timed_rules
from bp_spark.ingest.identity import CHANGED, KNOWN, NEW
from bp_spark.ingest.pseudonyms import BROKEN_TEXT
from bp_spark.lakehouse.schema import Table
from bp_spark.lakehouse.tables import CAMPAIGN_CONTACTS, CONSULTATIONS, RAW_CAMPAIGNS, RAW_CONSULTATIONS

FORMAT = 1
"""Raised when the meaning of contacts changes; contacts of an older format are then cleaned anew."""
_ADDED = ("ingest_id", "ingested_at")


@dataclass(frozen=True)
class ContactLog:
    """A raw table of contacts and what it becomes.

    Attributes:
        raw: the raw table.
        cleaned: table of its good rows, each contact once.
        outcome: columns of ``cleaned`` that a later delivery may correct.
    """

    raw: Table
    cleaned: Table
    outcome: tuple[str, ...]

    @property
    def id(self) -> str:
        """Column of ``cleaned`` that identifies a contact."""
        return self.cleaned.key[0]

    @property
    def day(self) -> str:
        """Column of ``cleaned`` with the contact's day, which is part of its identity."""
        return self.cleaned.month_of

    @property
    def identity(self) -> tuple[str, ...]:
        """Columns of ``raw`` that identify a contact."""
        others = (self.id, *self.outcome, *_ADDED)
        raw_columns = self.raw.schema.names
        return tuple(name for name in self.cleaned.schema.names if name in raw_columns and name not in others)


LOGS = (
    ContactLog(RAW_CONSULTATIONS, CONSULTATIONS, outcome=("solved",)),
    ContactLog(RAW_CAMPAIGNS, CAMPAIGN_CONTACTS, outcome=("last_day", "cost")),
)


def rules(log: ContactLog, config: CleaningConfig, now: Column | None = None) -> Sequence[Rule]:
    """Return the rules of a raw table of contacts, in their order.

    A campaign may be planned: its days may lie ahead.

    Args:
        log: the table.
        config: settings of cleaning.
        now: latest valid time of a consultation; by default the time of the row's ingest.
    """

    def whole_text(column: str) -> Rule:
        return Rule(f"{column} is broken text", F.col(column).isNull() | ~F.col(column).rlike(BROKEN_TEXT))

    if log.raw is RAW_CONSULTATIONS:
        return [*timed_rules(config, now), *map(whole_text, ("channel", "topic", "text"))]
    cost, last_day = F.col("cost"), F.col("last_day")
    return [
        Rule("user_id is missing", F.col("user_key").isNotNull()),
        Rule("campaign_id is missing", F.length(F.trim("campaign_id")) > 0),
        Rule("first_day is missing", F.col("first_day").isNotNull()),
        Rule(f"first_day is before {config.first_day}", F.col("first_day") >= F.lit(config.first_day)),
        Rule("first_day is after last_day", last_day.isNull() | (F.col("first_day") <= last_day)),
        Rule("cost is negative", cost.isNull() | (cost >= 0)),
        Rule(f"cost is beyond {config.max_amount:g}", cost.isNull() | (cost <= config.max_amount)),
        *map(whole_text, ("campaign_id", "kind")),
    ]


def validate(log: ContactLog, raw: DataFrame, config: CleaningConfig, now: Column | None = None) -> DataFrame:
    """Add ``rule`` to raw rows: the first rule that a row breaks, or NULL; for the arguments see :func:`rules`."""
    return raw.withColumn("rule", first_broken(rules(log, config, now)))


def contacts(log: ContactLog, validated: DataFrame) -> DataFrame:
    """Return the good rows with the columns of the cleaned table, and two more.

    ``copy`` numbers the deliveries of one contact from 1, the newest, which counts. ``delivered_by`` is the ingest of the
    row, while ``ingest_id`` is the contact's first.
    """
    # JSON would cut a time to milliseconds
    parts = [F.unix_micros(name).alias(name) if name == "ts" else F.col(name) for name in log.identity]
    newest = [F.desc(name) for name in ("ingest_id", "delivery", *log.outcome)]
    good = validated.filter("rule IS NULL").withColumns(
        {log.id: F.sha2(F.to_json(F.struct(*parts)), 256), "delivered_by": F.col("ingest_id")}
    )
    if log.day not in log.raw.schema.names:
        good = good.withColumn(log.day, F.to_date("ts"))
    same_contact = Window.partitionBy(log.id)
    numbered = good.withColumn("copy", F.row_number().over(same_contact.orderBy(*newest)))
    first = {name: F.min(name).over(same_contact) for name in _ADDED}
    return numbered.withColumns(first).select(*log.cleaned.schema.names, "delivered_by", "copy")


def add_state(log: ContactLog, fresh: DataFrame, stored: DataFrame) -> DataFrame:
    """Add ``state`` to contacts: ``new``, ``changed`` (corrects a stored one) or ``known`` (delivered again, or outdated).

    Args:
        log: the table.
        fresh: rows of :func:`contacts`, each contact once.
        stored: stored contacts, at least those of the days in ``fresh``.
    """
    first = [F.col(name).alias(f"_{name}") for name in _ADDED]
    seen = stored.select(log.id, log.day, F.struct(*log.outcome).alias("_outcome"), *first)
    same_outcome = F.col("_outcome").eqNullSafe(F.struct(*log.outcome))
    # a row that waited in quarantine is older than a contact that came later
    outdated = F.col("_ingest_id") > F.col("delivered_by")
    state = F.when(F.col("_ingest_id").isNull(), NEW).when(same_outcome | outdated, KNOWN).otherwise(CHANGED)
    joined = fresh.join(seen, [log.id, log.day], "left").withColumn("state", state)
    return joined.withColumns({name: F.coalesce(f"_{name}", name) for name in _ADDED}).select(
        *log.cleaned.schema.names, "state"
    )
