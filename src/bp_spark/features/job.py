"""From what a source has delivered to features: ingest, clean, embed, aggregate, featurize; quarantine judged anew."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from functools import reduce
from typing import Any

from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, digest
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.session import broadcast_few, checkpointed, parallelism, persisted
from bp_spark.core.spark_errors import SPARK_ERRORS, is_feed_gone
from bp_spark.core.version import __version__
from bp_spark.features import catalogue, labels, user_daily
from bp_spark.ingest import cleaning, pseudonyms, texts
from bp_spark.ingest.sources import open_source, source_digests
from bp_spark.ingest.sources.contract import Delivery
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.tables import (
    DELIVERIES,
    EVENTS,
    QUARANTINE,
    RAW_TABLES,
    TEXT_EMBEDDINGS,
    TEXTS,
    USER_DAILY,
    USER_KEYS,
    Lakehouse,
)

logger = logging.getLogger(__name__)


def featurize(
    spark: SparkSession, config: Config, as_of: Sequence[date], rebuild: bool = False
) -> list[dict[str, Any]]:
    """Ingest what is new, clean it, embed new texts, update the user-days it touches, build features of the as-of dates.

    Args:
        as_of: dates to build features for.
        rebuild: derive everything anew from the raw tables: after a change of the cleaning rules, say.

    Returns:
        The stages that ran, as in ``runs``.

    Raises:
        DataError: the source breaks the raw contract; an as-of date lies before the data.
    """
    with recorded(spark, config, "featurize") as run:
        _ingest(run)
        clean(run, rebuild)
        embed(run)
        aggregate(run, rebuild)
        write_features(run, as_of)
        return run.records


def _ingest(run: Run) -> None:
    config, lakehouse = run.config.source, run.lakehouse
    source, identities = open_source(config), source_digests(config)
    identity = identities[0]
    with run.stage("ingest", identity) as figures:
        before = lakehouse.commit_metadata("deliveries")
        known, last = _ingested(lakehouse, *identities)
        fresh = [delivery for delivery in source.deliveries(run.spark) if delivery not in known]
        figures["deliveries"] = len(fresh)
        if not fresh:
            figures["status"] = "unchanged"
            return
        figures["ingest_id"] = number = last + 1
        secret = pseudonyms.load_secret(run.config.privacy.secret)
        require_same_secret(lakehouse, secret)
        raw = {name: sampled(rows, config.sample) for name, rows in source.read(run.spark, fresh).items()}
        if not last and raw["raw_transactions"].isEmpty():
            raise DataError("raw_transactions", "holds no rows; there is nobody to score")
        now, brought = F.lit(datetime.now(UTC)), dict[str, int]()
        claim = lakehouse.reserve(DELIVERIES, before)
        # before the rows, so that there never is one whose user nobody knows
        if left_out := _add_user_keys(lakehouse, raw, secret, number, after=claim):
            figures["forgotten_users"] = left_out
        masked = pseudonyms.mask if run.config.privacy.mask_texts else pseudonyms.as_written
        for table in RAW_TABLES:
            of_ingest = F.col("ingest_id") == number
            if table.name in raw:
                rows = pseudonyms.pseudonymous(raw[table.name], table.name, secret, masked)
                if "user_key" in rows.columns:
                    rows = _without_forgotten(lakehouse, rows)
                rows = rows.withColumns({"ingest_id": F.lit(number).cast("bigint"), "ingested_at": now})
            elif lakehouse.exists(table.name) and not lakehouse.read(table.name).filter(of_ingest).isEmpty():
                # an ingest of that number was stopped, and what it read of this table is no longer delivered
                rows = lakehouse.read(table.name).limit(0)
            else:
                continue
            version = lakehouse.replace(table, rows, where={"ingest_id": [number]}, after=claim)
            brought[table.name] = lakehouse.rows_written(table.name, version)
        figures.update(brought)
        figures["rows_in"] = figures["rows_out"] = sum(brought.values())
        read = [(identity, d.table, d.name, d.fingerprint, number) for d in fresh]
        # deliveries last: with its commit, and not before, the ingest has happened
        rows = run.spark.createDataFrame(read, DELIVERIES.schema)
        lakehouse.append(DELIVERIES, rows, note={"ingest_id": number}, after=claim)


def _ingested(lakehouse: Lakehouse, *sources: str) -> tuple[set[Delivery], int]:
    """Deliveries of the sources that were read, and the number of the last ingest of any (0 for none)."""
    if not lakehouse.exists("deliveries"):
        return set(), 0
    rows = lakehouse.read("deliveries").collect()
    known = {Delivery(row["table"], row["name"], row["fingerprint"]) for row in rows if row["source"] in sources}
    return known, max((row["ingest_id"] for row in rows), default=0)


def require_same_secret(lakehouse: Lakehouse, secret: pseudonyms.Secret) -> None:
    """Whether all keys were made with this secret: with two, a user would be two.

    Raises:
        ConfigError: some were made with another one.
        DataError: the tables are of a version that had no keys.
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
    """Store the keys of the users that are new, and return how many were forgotten: these are left out."""
    ids = [
        rows.select(pseudonyms.user_id("user_id").alias("user_id"))
        for rows in raw.values()
        if "user_id" in rows.columns
    ]
    if not ids:
        return 0
    found = reduce(DataFrame.unionByName, ids).filter(F.col("user_id").isNotNull()).distinct()
    keyed = found.withColumns(
        {
            "user_key": pseudonyms.user_key(F.col("user_id"), secret),
            "key_id": F.lit(secret.key_id),
            "ingest_id": F.lit(number).cast("bigint"),
        }
    )
    if not lakehouse.exists("user_keys"):
        lakehouse.append(USER_KEYS, keyed, after=after)
        return 0
    fresh = checkpointed(keyed.join(lakehouse.read("user_keys").select("user_key"), "user_key", "left_anti"))
    rows = _without_forgotten(lakehouse, fresh)
    if not rows.isEmpty():
        lakehouse.append(USER_KEYS, rows, after=after)
    return 0 if rows is fresh else fresh.count() - rows.count()


def _without_forgotten(lakehouse: Lakehouse, rows: DataFrame) -> DataFrame:
    """Return the rows whose ``user_key`` is not that of a user who was forgotten."""
    if not lakehouse.exists("forgotten"):
        return rows
    forgotten = lakehouse.read("forgotten").select("key_hash")
    return rows.join(forgotten, pseudonyms.key_hash(F.col("user_key")) == F.col("key_hash"), "left_anti")


def sampled(df: DataFrame, share: float) -> DataFrame:
    """Rows of a share of the users, the same users in every table, chosen by a hash of their ids."""
    if share == 1 or "user_id" not in df.columns:
        return df
    return df.filter(F.pmod(F.xxhash64("user_id"), F.lit(labels.BUCKETS)) < int(share * labels.BUCKETS))


def clean(run: Run, rebuild: bool) -> None:
    lakehouse = run.lakehouse
    raw = {table.name: lakehouse.read(table.name) for table in RAW_TABLES if lakehouse.exists(table.name)}
    _, last = _ingested(lakehouse)
    done = _cleaned(run)
    first = first_to_clean(done, rebuild=rebuild, all_kept=run.config.privacy.retention_days.raw is None)
    rules = digest(run.config.cleaning)
    with run.stage("clean", digest(rules, first, last)) as figures:
        if first > last:
            figures["status"] = "unchanged"
            return
        batch = {name: raw[name].filter(F.col("ingest_id").between(first, last)) for name in raw}
        judged = cleaning.validate(batch, raw, run.config.cleaning)
        ingests = list(range(first, last + 1))
        claim = lakehouse.reserve(EVENTS, done)
        figures["rows"] = figures["rows_in"] = sum(batch[name].count() for name in judged)
        refused = cleaning.quarantine(judged)
        lakehouse.replace(QUARANTINE, refused, where=None if first == 1 else {"ingest_id": ingests}, after=claim)
        stored = lakehouse.read("quarantine").filter(F.col("ingest_id").between(first, last))
        figures["quarantine"] = stored.count()
        _add_texts(run, batch, raw, rebuild=first == 1)
        note = {"format": cleaning.FORMAT, "through": last, "rules": rules}
        # events last: with its commit, and not before, the ingests are cleaned
        _add_events(run, cleaning.events(judged), note, figures, after=claim, rebuild=first == 1)
        _require_balance(figures)
        figures["rows_out"] = figures["events"]
        if first > 1 and "rules" not in done:
            figures["note"] = "Delta cleaned the log of events: cleaned were the ingests after those that events are of"
        elif first > 1 and done["rules"] != rules:
            figures["note"] = "older rows were judged by other cleaning settings; featurize --rebuild judges them anew"
        counted: Mapping[str, Any] = figures
        if 0 < counted["rows"] == counted["quarantine"]:
            figures["note"] = _refusals(stored)
            logger.warning("quarantine: %s", figures["note"])


def first_to_clean(done: Mapping[str, Any], *, rebuild: bool, all_kept: bool) -> int:
    """Return the number of the first ingest to clean.

    Args:
        done: what the newest cleaning noted.
        all_kept: whether raw rows are kept for ever.

    Raises:
        ConfigError: events must be derived from all raw rows, and these are not all kept.
    """
    goes_on = done.get("format") == cleaning.FORMAT or (not all_kept and done.get("format") in cleaning.COMPATIBLE)
    if goes_on and not rebuild:
        return int(done["through"]) + 1
    if "through" in done and not all_kept:
        raise ConfigError(
            "privacy.retention_days.raw: older raw rows are gone, so that events can't be derived from them anew (--rebuild, "
            "or a version of bp-spark that cleans otherwise)"
        )
    return 1


def _refusals(rows: DataFrame) -> str:
    """Say of rows in quarantine, which are all that an ingest brought, why they are there and what to do."""
    rules = rows.groupBy("source", "rule").count().orderBy(F.desc("count"), "source", "rule").limit(3).collect()
    told = ", ".join(f"{row['rule']} ({row['count']:,} of {row['source']})" for row in rules)
    return (
        f"all rows were refused, most of them for: {told}. `bp-spark quarantine show` tells all rules, docs/data-engineer.md "
        "what to do about each. After a change of `cleaning` run `bp-spark quarantine replay`; after one of the mapping "
        "begin anew, with an empty tables.path"
    )


def _cleaned(run: Run) -> dict[str, Any]:
    """Return what the newest cleaning noted in the log of ``events``: ``format``, ``through`` and ``rules``.

    Delta may have cleaned the note away. Then events are derived anew, or, where raw rows are not all kept, ``through`` is the
    newest ingest that an event is of: cleaning an ingest twice adds nothing.
    """
    done = run.lakehouse.commit_metadata("events")
    if "through" in done or run.config.privacy.retention_days.raw is None or not run.lakehouse.exists("events"):
        return done
    newest = run.lakehouse.read("events").agg(F.max("ingest_id")).collect()[0][0]
    return done if newest is None else {**done, "format": cleaning.FORMAT, "through": newest}


def _add_texts(run: Run, batch: Mapping[str, DataFrame], raw: Mapping[str, DataFrame], *, rebuild: bool) -> None:
    """Store the texts of the batch that are new."""
    lakehouse = run.lakehouse
    after = lakehouse.commit_metadata("texts")["version"]
    brands = cleaning.brands(raw["raw_items"]) if "raw_items" in raw else None
    if rebuild:
        rows = texts.distinct_texts(cleaning.texts(batch), brands, run.config.texts)
        lakehouse.replace(TEXTS, rows, after=after)
        return
    found = cleaning.texts(batch).withColumn("text_id", texts.text_id(F.col("text")))
    fresh = found.join(lakehouse.read("texts").select("text_id"), "text_id", "left_anti").drop("text_id")
    rows = checkpointed(texts.distinct_texts(fresh, brands, run.config.texts))
    if not rows.isEmpty():
        lakehouse.append(TEXTS, rows, after=after)


def _add_events(
    run: Run, found: DataFrame, note: Mapping[str, Any], figures: dict[str, object], *, after: int, rebuild: bool
) -> None:
    """Store the events of a batch that are new, correct those that changed, count those that are there already."""
    lakehouse = run.lakehouse
    if rebuild:
        counts = Observation("events")
        repeated = F.coalesce(F.sum((F.col("copy") > 1).cast("long")), F.lit(0)).alias("duplicates")
        lakehouse.replace(EVENTS, found.observe(counts, repeated).filter("copy = 1"), note=note, after=after)
        figures["events"] = lakehouse.read("events").count()
        # of a plan that turns out to be empty Spark drops the observation, and to ask for it would wait for ever
        figures["duplicates"] = counts.get["duplicates"] if figures["events"] else found.filter("copy > 1").count()
        return
    with (
        persisted(found) as rows,
        persisted(cleaning.against_known(rows.filter("copy = 1"), _known(run, rows))) as sorted_out,
    ):
        states = {row["state"]: row["count"] for row in sorted_out.groupBy("state").count().collect()}
        new, changed, known = (states.get(state, 0) for state in (cleaning.NEW, cleaning.CHANGED, cleaning.KNOWN))
        if changed:
            days = _days(sorted_out, "event_date")
            fresh = sorted_out.filter(F.col("state") != cleaning.KNOWN)
            lakehouse.merge(EVENTS, fresh, within={"event_date": days}, note=note, after=after)
        else:
            lakehouse.append(EVENTS, sorted_out.filter(F.col("state") == cleaning.NEW), note=note, after=after)
        figures["events"], figures["corrections"] = new, changed
        figures["duplicates"] = rows.filter("copy > 1").count() + known + changed


def _known(run: Run, rows: DataFrame) -> DataFrame:
    """The events in ``events`` that are among these."""
    same_days = run.lakehouse.read("events").filter(F.col("event_date").isin(_days(rows, "event_date")))
    ids = rows.select("event_id", "event_date")
    return same_days.join(broadcast_few(ids, rows.count()), ["event_id", "event_date"], "left_semi")


def _days(df: DataFrame, column: str) -> list[date]:
    return sorted(row[0] for row in df.select(column).distinct().collect())


def _require_balance(figures: Mapping[str, Any]) -> None:
    rows, kept = figures["rows"], figures["events"] + figures["duplicates"] + figures["quarantine"]
    if kept != rows:
        raise DataError(
            "events",
            f"rows in ({rows}) must equal events ({figures['events']}) + duplicates ({figures['duplicates']}) "
            f"+ quarantine ({figures['quarantine']})",
            count=rows - kept,
        )


def replay_quarantine(spark: SparkSession, config: Config) -> list[dict[str, Any]]:
    """Judge the rows in quarantine anew, after a change of rules, items or rates, and move the good ones into ``events``.

    Raises:
        DataError: nothing was cleaned yet.
    """
    with recorded(spark, config, "quarantine replay") as run:
        lakehouse = run.lakehouse
        done = _cleaned(run)
        if "through" not in done:
            raise DataError(f"{lakehouse.namespace}.events", "nothing was cleaned yet; run featurize first")
        known = {name: lakehouse.read(name) for name in ("raw_items", "raw_rates") if lakehouse.exists(name)}
        with run.stage("replay", digest(config.cleaning, lakehouse.version("quarantine"))) as figures:
            claim = lakehouse.reserve(EVENTS, done)
            rows = checkpointed(lakehouse.read("quarantine"))
            figures["rows"] = figures["rows_in"] = rows.count()
            # what is known today counts for rows that were refused for not knowing it, and so does today's time
            now = F.lit(datetime.now(UTC))
            today = {name: df.withColumn("ingest_id", F.lit(0).cast("bigint")) for name, df in known.items()}
            raw = {name: cleaning.from_quarantine(rows, name) for name in cleaning.LOGS}
            judged = {
                name: checkpointed(df) for name, df in cleaning.validate(raw, today, config.cleaning, now).items()
            }
            _add_texts(run, {name: df.filter("rule IS NULL") for name, df in judged.items()}, known, rebuild=False)
            note: dict[str, Any] = {key: done[key] for key in ("format", "through", "rules") if key in done}
            _add_events(run, cleaning.events(judged), note, figures, after=claim, rebuild=False)
            # events first: stopped between the two, a row is in both and the next replay counts it as a duplicate
            lakehouse.replace(QUARANTINE, cleaning.quarantine(judged), after=claim)
            figures["quarantine"] = lakehouse.read("quarantine").count()
            _require_balance(figures)
            figures["rows_out"] = figures["events"]
        embed(run)
        aggregate(run, rebuild=False)
        return run.records


def quarantine_by_rule(spark: SparkSession, config: Config) -> list[tuple[str, str, int]]:
    """Source, rule and number of rows in quarantine, most first.

    Raises:
        DataError: nothing was cleaned yet.
    """
    rows = Lakehouse(spark, config.tables).read("quarantine").groupBy("source", "rule").count()
    return [tuple(row) for row in rows.orderBy(F.desc("count"), "source", "rule").collect()]


def embed(run: Run) -> None:
    lakehouse, config = run.lakehouse, run.config.texts
    model = texts.model_digest(config)
    inputs = digest(model, lakehouse.version("texts"))
    with run.stage("embed", inputs) as figures:
        done = lakehouse.commit_metadata("text_embeddings")
        if done.get("inputs") == inputs:
            figures["status"] = "unchanged"
            return
        unread = lakehouse.read("texts")
        if lakehouse.exists("text_embeddings"):
            unread = texts.unread(unread, lakehouse.read("text_embeddings"), model)
        # the model is loaded once in each task: as many as there are cores, but one for a handful of texts
        figures["rows_in"] = figures["rows_out"] = count = unread.count()
        if not count and lakehouse.exists("text_embeddings"):
            # maintenance moved the version of texts and no text
            figures["status"] = "unchanged"
            return
        tasks = min(parallelism(run.spark), math.ceil(count / texts.TEXTS_PER_TASK))
        unread = unread.repartition(max(1, tasks), "text_id")
        rows = texts.embed(unread, config)
        lakehouse.append(TEXT_EMBEDDINGS, rows, inputs=inputs, after=done["version"])
        figures["texts"] = lakehouse.read("text_embeddings").filter(F.col("model_digest") == model).count()


def aggregate(run: Run, rebuild: bool) -> None:
    """Update ``user_daily`` for the users and days whose events changed since it was last written."""
    lakehouse, config = run.lakehouse, run.config
    model = texts.model_digest(config.texts)
    length = config.features.history_length
    definition = digest(user_daily.FORMAT, cleaning.FORMAT, model, length)
    done, version = lakehouse.commit_metadata("user_daily"), lakehouse.version("events")
    with run.stage("aggregate", digest(definition, version)) as figures:
        events = lakehouse.read("events", version)
        words = lakehouse.read("texts")
        vectors = lakehouse.read("text_embeddings").filter(F.col("model_digest") == model)
        after = done["version"]
        from_scratch = rebuild or done.get("definition") != definition or int(done["events"]) > version
        if not from_scratch and done["events"] == version:
            figures["status"] = "unchanged"
            return
        counted = None if from_scratch else _changed_days(lakehouse, int(done["events"]))
        if counted is None:
            if not from_scratch:
                figures["note"] = "the changes of events were cleaned away: user_daily was derived from all events anew"
                # with them the files of older versions may have gone
                version = lakehouse.version("events")
                events = lakehouse.read("events", version)
            note = {"definition": definition, "events": version}
            lakehouse.replace(USER_DAILY, user_daily.user_daily(events, words, vectors, length), note=note, after=after)
            figures["rows_in"] = events.count()
            figures["user_days"] = figures["rows_out"] = lakehouse.read("user_daily").count()
            return
        touched = counted.drop("count")
        figures["user_days"] = figures["rows_out"] = count = touched.count()
        figures["rows_in"] = counted.agg(F.coalesce(F.sum("count"), F.lit(0))).collect()[0][0]
        if not count:
            # maintenance moved the version of events and no event
            figures["status"] = "unchanged"
            return
        days = _days(touched, "day")
        figures["days"] = len(days)
        keys = broadcast_few(touched.withColumnRenamed("day", "event_date"), count)
        found = events.filter(F.col("event_date").isin(days)).join(keys, ["user_key", "event_date"], "left_semi")
        with persisted(found) as theirs:
            rows = checkpointed(user_daily.user_daily(theirs, words, vectors, length))
        gone = touched.join(rows, user_daily.KEY, "left_anti")
        note = {"definition": definition, "events": version}
        lakehouse.merge(USER_DAILY, rows, within={"day": days}, gone=gone, note=note, after=after)


def _changed_days(lakehouse: Lakehouse, since: int) -> DataFrame | None:
    """Return the user-days whose events changed after a version, with the number of changes; ``None`` where the change feed
    is gone, by VACUUM or because Delta cleaned the log."""
    try:
        changes = lakehouse.changes("events", since)
        return checkpointed(changes.groupBy("user_key", F.col("event_date").alias("day")).count())
    except SPARK_ERRORS as error:
        if not is_feed_gone(error):
            raise
        return None


def write_features(run: Run, as_of: Sequence[date]) -> None:
    lakehouse, config = run.lakehouse, run.config.features
    first, _ = span(lakehouse)
    for day in as_of:
        if day <= first:
            raise DataError(
                "events", f"no event lies before the as-of date {day}; the first is of {first}", column="ts"
            )
    table = catalogue.user_features_table(config)
    built_from = features_digest(run)
    with run.stage("featurize", built_from) as figures:
        built = _built(lakehouse, built_from)
        missing = [day for day in as_of if day not in built]
        figures["dates"] = len(missing)
        if not missing:
            figures["status"] = "unchanged"
            return
        lakehouse.require_whole_files("user_daily")
        days = lakehouse.read("user_daily")
        figures["rows_in"] = days.count()
        rows = catalogue.user_features(days, missing, config, built_from)
        lakehouse.replace(table, rows, where={"as_of_date": missing}, inputs=built_from)
        written = lakehouse.read("user_features").filter(F.col("as_of_date").isin(*missing))
        figures["users"] = figures["rows_out"] = written.count()


def features_digest(run: Run) -> str:
    """Identity of what features would be built from now: ``built_from`` of ``user_features``."""
    config = run.config.features
    return digest(__version__, run.lakehouse.version("user_daily"), config, catalogue.catalogue(config))


def _built(lakehouse: Lakehouse, built_from: str) -> set[date]:
    """As-of dates whose features are those that would be built now."""
    if not lakehouse.exists("user_features"):
        return set()
    rows = lakehouse.read("user_features").filter(F.col("built_from") == built_from).select("as_of_date").distinct()
    return {row[0] for row in rows.collect()}


def span(lakehouse: Lakehouse) -> tuple[date, date]:
    """Days of the first and the last event."""
    row = lakehouse.read("events").agg(F.min("event_date"), F.max("event_date")).first()
    if row is None or row[0] is None:
        refused = lakehouse.exists("quarantine") and not lakehouse.read("quarantine").isEmpty()
        raise DataError("events", "holds no rows" + (f": {_refusals(lakehouse.read('quarantine'))}" if refused else ""))
    return row[0], row[1]
