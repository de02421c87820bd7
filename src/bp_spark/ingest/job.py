"""From what a source has delivered to events and embedded texts: ingest, clean, validate quarantine again, embed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from datetime import UTC, date, datetime
from functools import reduce
from typing import Any

from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, digest
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.session import broadcast_few, checkpointed, parallelism, persisted
from bp_spark.ingest import cleaning, pseudonyms, texts
from bp_spark.ingest.readable import Batch, undo_ingest, write_readable
from bp_spark.ingest.sources import open_source, source_digests
from bp_spark.ingest.sources.contract import Delivery
from bp_spark.lakehouse.run import Run, Step
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import (
    DELIVERIES,
    EVENTS,
    QUARANTINE,
    RAW_TABLES,
    TEXT_EMBEDDINGS,
    TEXTS,
    USER_KEYS,
)

_SAMPLE_BUCKETS = 10_000
"""Groups that a hash spreads user ids over, to draw a sample of users."""
_RULES_SHOWN = 3
"""Rules that a warning names when an ingest ends in quarantine as a whole."""

logger = logging.getLogger(__name__)


# --- ingest --------------------------------------------------------------------------------------------------------------


def ingest(run: Run, strict: bool = False) -> None:
    """Read the deliveries that are new into the raw tables, with keys instead of user ids.

    Args:
        run: the run to record the stage in.
        strict: refuse all deliveries if one can't be read. By default that one is named and left for the next ingest.

    Raises:
        ConfigError: the secret is missing, or is not the one that stored keys were made with.
        DataError: the source breaks the raw contract; the first ingest brings no transactions; deliveries can't be read, as
            :func:`bp_spark.ingest.readable.write_readable` says.
    """
    config, lakehouse = run.config.source, run.lakehouse
    source, identities = open_source(config), source_digests(config)
    identity = identities[0]
    with run.step("ingest", DELIVERIES, identity) as step:
        ingested, last = _ingested(lakehouse, *identities)
        fresh = [delivery for delivery in source.deliveries(run.spark) if delivery not in ingested]
        step.figures["deliveries"] = len(fresh)
        if not fresh:
            return
        number = last + 1
        secret = pseudonyms.load_secret(run.config.privacy.secret)
        require_same_secret(lakehouse, secret)
        now = F.lit(datetime.now(UTC))

        def write(batch: Batch) -> None:
            raw = {name: sampled(rows, config.sample) for name, rows in batch.rows.items()}
            if not last and raw["raw_transactions"].isEmpty():
                raise batch.no_transactions
            reservation = step.reserve()
            # keys before rows, so that no row ever has a key that user_keys lacks
            forgotten_users = _add_user_keys(lakehouse, raw, secret, number, after=reservation)
            row_counts = _write_raw_tables(run, raw, secret, number, now, after=reservation)
            step.figures["ingest_id"] = number
            if forgotten_users:
                step.figures["forgotten_users"] = forgotten_users
            step.figures.update(row_counts)
            step.figures["rows_in"] = step.figures["rows_out"] = sum(row_counts.values())
            read = [(identity, d.table, d.name, d.fingerprint, number) for d in batch.deliveries]
            # deliveries last: their commit makes the ingest complete
            step.append(run.spark.createDataFrame(read, DELIVERIES.schema), ingest_id=number, left=batch.left)

        batch = write_readable(
            run.spark,
            source,
            fresh,
            write,
            undo=lambda: undo_ingest(lakehouse, number, step.reserve),
            strict=strict,
            left_before=step.newest.get("left", ()),
        )
        step.figures["deliveries"] = len(batch.deliveries)
        if batch.unreadable:
            step.figures["unreadable_files"] = batch.unreadable_files


def _write_raw_tables(
    run: Run, raw: Mapping[str, DataFrame], secret: pseudonyms.Secret, number: int, now: Column, after: int
) -> dict[str, int]:
    """Write what an ingest read; return raw table -> rows written."""
    lakehouse = run.lakehouse
    mask = pseudonyms.mask if run.config.privacy.mask_texts else pseudonyms.as_written
    row_counts = dict[str, int]()
    for table in RAW_TABLES:
        of_ingest = F.col("ingest_id") == number
        if table.name in raw:
            rows = pseudonyms.pseudonymous(raw[table.name], table.name, secret, mask)
            if "user_key" in rows.columns:
                rows = _without_forgotten(lakehouse, rows)
            rows = rows.withColumns({"ingest_id": F.lit(number).cast("bigint"), "ingested_at": now})
        elif lakehouse.exists(table.name) and not lakehouse.read(table.name).filter(of_ingest).isEmpty():
            # an ingest of that number was stopped, and what it read of this table is no longer delivered
            rows = lakehouse.read(table.name).limit(0)
        else:
            continue
        version = lakehouse.replace(table, rows, where={"ingest_id": [number]}, after=after)
        row_counts[table.name] = lakehouse.rows_written(table.name, version)
    return row_counts


def _ingested(lakehouse: Lakehouse, *sources: str) -> tuple[set[Delivery], int]:
    """Return the deliveries of the sources that were read, and the number of the last ingest of any (0 for none)."""
    if not lakehouse.exists("deliveries"):
        return set(), 0
    rows = lakehouse.read("deliveries").collect()
    deliveries = {Delivery(row["table"], row["name"], row["fingerprint"]) for row in rows if row["source"] in sources}
    return deliveries, max((row["ingest_id"] for row in rows), default=0)


def require_same_secret(lakehouse: Lakehouse, secret: pseudonyms.Secret) -> None:
    """Require that all stored keys were made with this secret: with two secrets, one user would have two keys.

    Raises:
        ConfigError: some keys were made with another secret.
        DataError: the tables were written by a version that had no keys.
    """
    if not lakehouse.exists("user_keys"):
        if lakehouse.exists("deliveries"):
            rule = (
                "table does not exist, though deliveries were ingested: by a version that stored user ids. Begin anew"
            )
            raise DataError(f"{lakehouse.namespace}.user_keys", f"{rule}, with an empty tables.path")
        return
    if not lakehouse.read("user_keys").filter(F.col("key_id") != secret.key_id).isEmpty():
        raise ConfigError(
            "privacy.secret: isn't the secret that the keys in user_keys were made with; give that one, or change it with "
            "`bp-spark rotate-keys`"
        )


def _add_user_keys(
    lakehouse: Lakehouse, raw: Mapping[str, DataFrame], secret: pseudonyms.Secret, number: int, after: int
) -> int:
    """Store the keys of new users; return how many users are left out because they were forgotten."""
    ids = [
        rows.select(pseudonyms.user_id("user_id").alias("user_id"))
        for rows in raw.values()
        if "user_id" in rows.columns
    ]
    if not ids:
        return 0
    distinct_ids = reduce(DataFrame.unionByName, ids).filter(F.col("user_id").isNotNull()).distinct()
    keyed = distinct_ids.withColumns(
        {
            "user_key": pseudonyms.user_key(F.col("user_id"), secret),
            "key_id": F.lit(secret.key_id),
            "ingest_id": F.lit(number).cast("bigint"),
        }
    )
    if not lakehouse.exists("user_keys"):
        lakehouse.append(USER_KEYS, keyed, after=after)
        return 0
    new_users = checkpointed(keyed.join(lakehouse.read("user_keys").select("user_key"), "user_key", "left_anti"))
    rows = _without_forgotten(lakehouse, new_users)
    if not rows.isEmpty():
        lakehouse.append(USER_KEYS, rows, after=after)
    return 0 if rows is new_users else new_users.count() - rows.count()


def _without_forgotten(lakehouse: Lakehouse, rows: DataFrame) -> DataFrame:
    """Return the rows whose ``user_key`` is not that of a forgotten user."""
    if not lakehouse.exists("forgotten"):
        return rows
    forgotten = lakehouse.read("forgotten").select("key_hash")
    return rows.join(forgotten, pseudonyms.key_hash(F.col("user_key")) == F.col("key_hash"), "left_anti")


def sampled(df: DataFrame, share: float) -> DataFrame:
    """Return the rows of a share of the users: the same users in every table, by a hash of their ids."""
    if share == 1 or "user_id" not in df.columns:
        return df
    bucket = F.pmod(F.xxhash64("user_id"), F.lit(_SAMPLE_BUCKETS))
    return df.filter(bucket < int(share * _SAMPLE_BUCKETS))


# --- cleaning ------------------------------------------------------------------------------------------------------------


def clean(run: Run, rebuild: bool) -> None:
    """Turn the raw rows of ingests that were not cleaned yet into events, texts and quarantine.

    Args:
        run: the run to record the stage in.
        rebuild: clean all raw rows anew.

    Raises:
        ConfigError: events must be derived from all raw rows, and older ones were deleted.
    """
    lakehouse = run.lakehouse
    raw = {table.name: lakehouse.read(table.name) for table in RAW_TABLES if lakehouse.exists(table.name)}
    _, last = _ingested(lakehouse)
    with run.step("clean", EVENTS) as step:
        cleaned = _cleaned(run, step.newest)
        first = first_to_clean(cleaned, rebuild=rebuild, all_kept=run.config.privacy.retention_days.raw is None)
        rules = digest(run.config.cleaning)
        step.inputs = digest(rules, first, last)
        if first > last:
            return
        batch = {name: rows.filter(F.col("ingest_id").between(first, last)) for name, rows in raw.items()}
        validated = cleaning.validate(batch, raw, run.config.cleaning)
        reservation, figures = step.reserve(), step.figures
        figures["rows"] = figures["rows_in"] = sum(batch[name].count() for name in validated)
        of_ingests = {} if first == 1 else {"ingest_id": list(range(first, last + 1))}
        where = {"source": cleaning.LOGS, **of_ingests}
        lakehouse.replace(QUARANTINE, cleaning.quarantine(validated), where=where, after=reservation)
        quarantined = _quarantined(lakehouse).filter(F.col("ingest_id").between(first, last))
        figures["quarantine"] = quarantined.count()
        brands = cleaning.brands(raw["raw_items"]) if "raw_items" in raw else None
        note = {
            "format": cleaning.FORMAT,
            "through": last,
            "rules": rules,
            "currency": run.config.cleaning.currency,
        }
        # events last: their commit makes the cleaning complete
        if first == 1:
            _replace_texts(run, batch, brands)
            _replace_events(step, cleaning.events(validated), note)
        else:
            _add_texts(run, batch, brands)
            _add_events(step, cleaning.events(validated), note)
        _require_balance(figures)
        figures["rows_out"] = figures["events"]
        if first > 1 and "rules" not in cleaned:
            figures["note"] = "Delta cleaned the log of events: cleaned were the ingests after those that events are of"
        elif first > 1 and cleaned["rules"] != rules:
            figures["note"] = "older rows were judged by other cleaning settings; featurize --rebuild judges them anew"
        if 0 < figures["rows"] == figures["quarantine"]:
            figures["note"] = _why_all_refused(quarantined)
            logger.warning("quarantine: %s", figures["note"])


def currency_of(lakehouse: Lakehouse) -> str | None:
    """Return the currency that events are in, as their cleaning recorded it; ``None`` if none did (before version 0.2.0)."""
    return lakehouse.commit_metadata("events").get("currency")


def require_same_currency(lakehouse: Lakehouse, currency: str) -> None:
    """Make sure that new events would be in the currency of the stored ones.

    Raises:
        ConfigError: they would not.
    """
    stored = currency_of(lakehouse)
    if stored is not None and stored != currency:
        raise ConfigError(
            f"cleaning.currency: is {currency}, and events are in {stored}; set it to {stored}, or derive all events anew in "
            f"{currency} (featurize --rebuild) and train again"
        )


def first_to_clean(cleaned: Mapping[str, Any], *, rebuild: bool, all_kept: bool) -> int:
    """Return the number of the first ingest to clean.

    Args:
        cleaned: what the newest cleaning recorded.
        rebuild: clean all raw rows anew.
        all_kept: whether raw rows are never deleted.

    Raises:
        ConfigError: events must be derived from all raw rows, and older ones were deleted.
    """
    same_format = cleaned.get("format") == cleaning.FORMAT
    goes_on = same_format or (not all_kept and cleaned.get("format") in cleaning.COMPATIBLE)
    if goes_on and not rebuild:
        return int(cleaned["through"]) + 1
    if "through" in cleaned and not all_kept:
        raise ConfigError(
            "privacy.retention_days.raw: older raw rows are gone, so that events can't be derived from them anew (--rebuild, "
            "or a version of bp-spark that cleans otherwise)"
        )
    return 1


def _cleaned(run: Run, recorded: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the newest cleaning recorded in the log of ``events``: ``format``, ``through`` and ``rules``.

    Delta may have cleaned that commit away. Then events are derived anew. Where older raw rows are deleted, ``through`` is
    the newest ingest that an event has: cleaning an ingest twice adds nothing.
    """
    if "through" in recorded or run.config.privacy.retention_days.raw is None or not run.lakehouse.exists("events"):
        return recorded
    newest = run.lakehouse.read("events").agg(F.max("ingest_id")).collect()[0][0]
    return recorded if newest is None else {**recorded, "format": cleaning.FORMAT, "through": newest}


def _why_all_refused(quarantined: DataFrame) -> str:
    """Describe why all rows of an ingest are in quarantine, and what to do."""
    by_rule = quarantined.groupBy("source", "rule").count().orderBy(F.desc("count"), "source", "rule")
    reasons = ", ".join(
        f"{row['rule']} ({row['count']:,} of {row['source']})" for row in by_rule.limit(_RULES_SHOWN).collect()
    )
    return (
        f"all rows were refused, most of them for: {reasons}. `bp-spark quarantine show` tells all rules, "
        "docs/data-engineer.md what to do about each. After a change of `cleaning` run `bp-spark quarantine replay`; "
        "after one of the mapping begin anew, with an empty tables.path"
    )


def _replace_texts(run: Run, batch: Mapping[str, DataFrame], brands: DataFrame | None) -> None:
    """Store the texts of all raw rows, in the place of the stored ones."""
    step = Step.begin(run.lakehouse, TEXTS)
    step.replace(texts.distinct_texts(cleaning.texts(batch), brands, run.config.texts), after=step.version)


def _add_texts(run: Run, batch: Mapping[str, DataFrame], brands: DataFrame | None) -> None:
    """Store the texts of the batch that are new."""
    step = Step.begin(run.lakehouse, TEXTS)
    batch_texts = cleaning.texts(batch).withColumn("text_id", texts.text_id(F.col("text")))
    new_texts = batch_texts.join(run.lakehouse.read("texts").select("text_id"), "text_id", "left_anti")
    rows = checkpointed(texts.distinct_texts(new_texts.drop("text_id"), brands, run.config.texts))
    if not rows.isEmpty():
        step.append(rows)


def _replace_events(step: Step, rows: DataFrame, note: Mapping[str, Any]) -> None:
    """Store the events of all raw rows, in the place of the stored ones."""
    counts = Observation("events")
    repeated = F.coalesce(F.sum((F.col("copy") > 1).cast("long")), F.lit(0)).alias("duplicates")
    step.replace(rows.observe(counts, repeated).filter("copy = 1"), after=step.version, **note)
    step.figures["events"] = count = step.lakehouse.read("events").count()
    # Spark drops the observation of a plan that turns out to be empty, and to ask for it would wait for ever
    step.figures["duplicates"] = counts.get["duplicates"] if count else rows.filter("copy > 1").count()


def _add_events(step: Step, fresh_rows: DataFrame, note: Mapping[str, Any]) -> None:
    """Store the events of a batch that are new, correct those that changed, count those that are stored already."""
    figures = step.figures
    with (
        persisted(fresh_rows) as rows,
        persisted(cleaning.add_state(rows.filter("copy = 1"), _stored_events(step.lakehouse, rows))) as compared,
    ):
        states = {row["state"]: row["count"] for row in compared.groupBy("state").count().collect()}
        new, changed, known = (states.get(state, 0) for state in (cleaning.NEW, cleaning.CHANGED, cleaning.KNOWN))
        if changed:
            days = distinct_dates(compared, "event_date")
            step.merge(compared.filter(F.col("state") != cleaning.KNOWN), within={"event_date": days}, **note)
        else:
            step.append(compared.filter(F.col("state") == cleaning.NEW), **note)
        figures["events"], figures["corrections"] = new, changed
        figures["duplicates"] = rows.filter("copy > 1").count() + known + changed


def _stored_events(lakehouse: Lakehouse, rows: DataFrame) -> DataFrame:
    """Return the stored events with the ids of these rows."""
    same_days = lakehouse.read("events").filter(F.col("event_date").isin(distinct_dates(rows, "event_date")))
    ids = rows.select("event_id", "event_date")
    return same_days.join(broadcast_few(ids, rows.count()), ["event_id", "event_date"], "left_semi")


def distinct_dates(df: DataFrame, column: str) -> list[date]:
    """Return the distinct dates of a column, rising."""
    return sorted(row[0] for row in df.select(column).distinct().collect())


def _require_balance(figures: Mapping[str, Any]) -> None:
    """Require that each row became an event, a duplicate or a row in quarantine."""
    rows, accounted = figures["rows"], figures["events"] + figures["duplicates"] + figures["quarantine"]
    if accounted != rows:
        raise DataError(
            "events",
            f"rows in ({rows}) must equal events ({figures['events']}) + duplicates ({figures['duplicates']}) "
            f"+ quarantine ({figures['quarantine']})",
            count=rows - accounted,
        )


# --- quarantine ----------------------------------------------------------------------------------------------------------


def replay(run: Run) -> None:
    """Validate the rows in quarantine again and move the good ones into ``events``.

    Items and rates that are known today count, and so does today's time.

    Raises:
        ConfigError: ``cleaning.currency`` is not the currency of the stored events.
        DataError: nothing was cleaned yet.
    """
    lakehouse = run.lakehouse
    if "through" not in _cleaned(run, lakehouse.commit_metadata("events")):
        raise DataError(f"{lakehouse.namespace}.events", "nothing was cleaned yet; run featurize first")
    require_same_currency(lakehouse, run.config.cleaning.currency)
    references = {name: lakehouse.read(name) for name in ("raw_items", "raw_rates") if lakehouse.exists(name)}
    inputs = digest(run.config.cleaning, lakehouse.version("quarantine"))
    with run.step("replay", EVENTS, inputs) as step:
        cleaned = _cleaned(run, step.newest)
        reservation, figures = step.reserve(), step.figures
        rows = checkpointed(_quarantined(lakehouse))
        figures["rows"] = figures["rows_in"] = rows.count()
        now = F.lit(datetime.now(UTC))
        # ingest 0 is before any row's
        known_today = {name: df.withColumn("ingest_id", F.lit(0).cast("bigint")) for name, df in references.items()}
        raw = {name: cleaning.from_quarantine(rows, name) for name in cleaning.LOGS}
        validated = {
            name: checkpointed(df) for name, df in cleaning.validate(raw, known_today, run.config.cleaning, now).items()
        }
        good_rows = {name: df.filter("rule IS NULL") for name, df in validated.items()}
        brands = cleaning.brands(references["raw_items"]) if "raw_items" in references else None
        _add_texts(run, good_rows, brands)
        note: dict[str, Any] = {
            key: cleaned[key] for key in ("format", "through", "rules", "currency") if key in cleaned
        }
        _add_events(step, cleaning.events(validated), note)
        # events first: if the run stops between the two, a row is in both, and the next replay counts it as a duplicate
        where = {"source": cleaning.LOGS}
        lakehouse.replace(QUARANTINE, cleaning.quarantine(validated), where=where, after=reservation)
        figures["quarantine"] = _quarantined(lakehouse).count()
        _require_balance(figures)
        figures["rows_out"] = figures["events"]


def _quarantined(lakehouse: Lakehouse) -> DataFrame:
    """Return the rows in quarantine that would be events; those of contacts are another stage's."""
    return lakehouse.read("quarantine").filter(F.col("source").isin(*cleaning.LOGS))


def quarantine_by_rule(spark: SparkSession, config: Config) -> list[tuple[str, str, int]]:
    """Return source, rule and number of rows in quarantine, most rows first.

    Raises:
        DataError: nothing was cleaned yet.
    """
    rows = Lakehouse(spark, config.tables).read("quarantine").groupBy("source", "rule").count()
    return [tuple(row) for row in rows.orderBy(F.desc("count"), "source", "rule").collect()]


# --- texts ---------------------------------------------------------------------------------------------------------------


def embed(run: Run) -> None:
    """Embed the texts that the configured language model has not read yet."""
    lakehouse, config = run.lakehouse, run.config.texts
    model = texts.model_digest(config)
    with run.step("embed", TEXT_EMBEDDINGS, digest(model, lakehouse.version("texts"))) as step:
        if step.unchanged:
            return
        unread_texts, figures = lakehouse.read("texts"), step.figures
        has_embeddings = lakehouse.exists("text_embeddings")
        if has_embeddings:
            unread_texts = texts.unread(unread_texts, lakehouse.read("text_embeddings"), model)
        figures["rows_in"] = figures["rows_out"] = count = unread_texts.count()
        if not count and has_embeddings:
            # maintenance moved the version of texts, and brought no text
            return
        # each task loads the model once: one task per core, and one alone for a handful of texts
        tasks = min(parallelism(run.spark), math.ceil(count / texts.TEXTS_PER_TASK))
        step.append(texts.embed(unread_texts.repartition(max(1, tasks), "text_id"), config))
        figures["texts"] = lakehouse.read("text_embeddings").filter(F.col("model_digest") == model).count()


# --- events --------------------------------------------------------------------------------------------------------------


def span(lakehouse: Lakehouse) -> tuple[date, date]:
    """Return the days of the first and the last event.

    Raises:
        DataError: there are no events.
    """
    row = lakehouse.read("events").agg(F.min("event_date"), F.max("event_date")).first()
    if row is None or row[0] is None:
        refused = lakehouse.exists("quarantine") and not lakehouse.read("quarantine").isEmpty()
        reason = f": {_why_all_refused(lakehouse.read('quarantine'))}" if refused else ""
        raise DataError("events", f"holds no rows{reason}")
    return row[0], row[1]
