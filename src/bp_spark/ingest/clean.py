"""From raw rows to events: rows of new ingests are judged, what files changed is derived anew, and the balance is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from datetime import date, timedelta
from functools import reduce
from typing import Any

from pyspark.sql import Column, DataFrame, Observation
from pyspark.sql import functions as F

from bp_spark.core.config import CleaningConfig, digest
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.session import broadcast_few, checkpointed, persisted
from bp_spark.ingest import cleaning
from bp_spark.ingest.changes import OTHER_SETTINGS, count_states, store_changes
from bp_spark.ingest.deliveries import Versions, entries
from bp_spark.ingest.identity import CHANGED, KNOWN, MOVED, NEW, add_state, moved_away
from bp_spark.ingest.sources import source_digests
from bp_spark.ingest.texts_job import add_texts, replace_texts
from bp_spark.lakehouse.run import Run, Step
from bp_spark.lakehouse.store import Lakehouse, read_as_declared
from bp_spark.lakehouse.tables import EVENTS, QUARANTINE, RAW_TABLES

_RULES_SHOWN = 3
"""Rules that a warning names when an ingest ends in quarantine as a whole."""

logger = logging.getLogger(__name__)


def clean(run: Run, rebuild: bool) -> None:
    """Turn the raw rows of ingests that were not cleaned yet into events, texts and quarantine.

    Where these ingests bring a file again, the events of its days are derived anew from all raw rows.

    Args:
        run: the run to record the stage in.
        rebuild: clean all raw rows anew.

    Raises:
        ConfigError: events must be derived from all raw rows, and older ones were deleted.
    """
    lakehouse, config = run.lakehouse, run.config.cleaning
    all_kept = run.config.privacy.retention_days.raw is None
    raw = {table.name: read_as_declared(lakehouse, table) for table in RAW_TABLES if lakehouse.exists(table.name)}
    with run.step("clean", EVENTS) as step:
        files = entries(lakehouse)
        last = max((row["ingest_id"] for row in files), default=0)
        cleaned = last_cleaning(run, step.newest)
        first = first_to_clean(cleaned, rebuild=rebuild, all_kept=all_kept)
        rules = digest(config)
        step.inputs = digest(rules, first, last)
        if first > last:
            return
        versions = Versions.of(files, source_digests(run.config.source), first, last)
        known_versions = versions if all_kept else Versions((), changes_older=False)
        of_batch = F.col("ingest_id").between(first, last)
        logs = {name: known_versions.mark(raw[name], name) for name in cleaning.LOGS if name in raw}
        batch = {name: rows.filter(of_batch) for name, rows in {**raw, **logs}.items()}
        validated = cleaning.validate(batch, raw, config)
        reservation, figures = step.reserve(), step.figures
        one_a_row = (batch[name].select(F.lit(1)) for name in validated)
        figures["rows"] = figures["rows_in"] = reduce(DataFrame.union, one_a_row).count()
        _replace_quarantine(lakehouse, validated, known_versions, first, last, after=reservation)
        quarantined = quarantined_events(lakehouse).filter(of_batch)
        figures["quarantine"] = quarantined.count()
        brands = cleaning.brands(raw["raw_items"]) if "raw_items" in raw else None
        note = {
            "format": cleaning.FORMAT,
            "through": last,
            "rules": rules,
            "currency": config.currency,
            "day_in": config.day_in,
        }
        # events last: their commit makes the cleaning complete
        if first == 1:
            replace_texts(run, batch, brands)
            _replace_events(step, cleaning.events(validated, config.day_in), note)
        else:
            add_texts(run, batch, brands)
            if known_versions.changes_older:
                _derive_anew(step, logs, raw, config, of_batch, note)
            else:
                add_events(step, cleaning.events(validated, config.day_in), note)
        try:
            require_balance(figures)
        except DataError:
            # repeats what was recorded before: the next cleaning judges these ingests again, and fails again
            step.reserve()
            raise
        figures["rows_out"] = figures["events"]
        notes = _notes(cleaned, rules, first) + [_CANT_SUPERSEDE] * (versions.changes_older and not all_kept)
        if 0 < figures["rows"] == figures["quarantine"]:
            notes = [why_all_refused(quarantined)]
            logger.warning("quarantine: %s", notes[0])
        if notes:
            figures["note"] = "; ".join(notes)


_CANT_SUPERSEDE = (
    "files came again, and older raw rows are deleted (privacy.retention_days.raw): lines that these files lack now are still "
    "events"
)


def _notes(cleaned: Mapping[str, Any], rules: str, first: int) -> list[str]:
    if first == 1:
        return []
    if "rules" not in cleaned:
        return ["Delta cleaned the log of events: cleaned were the ingests after those that events are of"]
    if cleaned["rules"] != rules:
        return [OTHER_SETTINGS]
    return []


def currency_of(lakehouse: Lakehouse) -> str | None:
    """Return the currency that events are in, as their cleaning recorded it; ``None`` if none did (before version 0.2.0)."""
    return lakehouse.commit_metadata("events").get("currency")


def require_same_terms(lakehouse: Lakehouse, config: CleaningConfig) -> None:
    """Make sure that new events would be in the currency of the stored ones, and by the same clock.

    Raises:
        ConfigError: they would not.
    """
    stored, currency = currency_of(lakehouse), config.currency
    if stored is not None and stored != currency:
        raise ConfigError(
            f"cleaning.currency: is {currency}, and events are in {stored}; set it to {stored}, or derive all events anew in "
            f"{currency} (featurize --rebuild) and train again"
        )
    day_in = lakehouse.commit_metadata("events").get("day_in", "UTC")
    if stored is not None and day_in != config.day_in:
        raise ConfigError(
            f"cleaning.day_in: is {config.day_in}, and the days of events are those of {day_in}; set it to {day_in}, or derive "
            "all events anew (featurize --rebuild) and train again"
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


def last_cleaning(run: Run, recorded: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the newest cleaning recorded in the log of ``events``: ``format``, ``through`` and ``rules``.

    Delta may have cleaned that commit away. Then events are derived anew. Where older raw rows are deleted, ``through`` is
    the newest ingest that an event has: cleaning an ingest twice adds nothing.
    """
    if "through" in recorded or run.config.privacy.retention_days.raw is None or not run.lakehouse.exists("events"):
        return recorded
    newest = run.lakehouse.read("events").agg(F.max("ingest_id")).collect()[0][0]
    return recorded if newest is None else {**recorded, "format": cleaning.FORMAT, "through": newest}


def why_all_refused(quarantined: DataFrame) -> str:
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


def quarantined_events(lakehouse: Lakehouse) -> DataFrame:
    """Return the rows in quarantine that would be events; those of contacts are another stage's."""
    return lakehouse.read("quarantine").filter(F.col("source").isin(*cleaning.LOGS))


def _replace_quarantine(
    lakehouse: Lakehouse, validated: Mapping[str, DataFrame], versions: Versions, first: int, last: int, after: int
) -> None:
    """Store the rows of a batch that broke a rule; older rows that a version of the batch supersedes leave quarantine."""
    rows = cleaning.quarantine({name: df.filter("NOT superseded") for name, df in validated.items()})
    if first == 1:
        lakehouse.replace(QUARANTINE, rows, where={"source": cleaning.LOGS}, after=after)
        return
    older = [number for number in versions.touched_ingests if number < first]
    if older:
        stored = quarantined_events(lakehouse).filter(F.col("ingest_id").isin(*older))
        day = F.substring(F.get_json_object("row", "$.ts"), 1, 10).try_cast("date")
        placed = stored.withColumns({"delivery": F.get_json_object("row", "$.delivery"), "_day": day})
        for log in cleaning.LOGS:
            marked = versions.mark(placed.filter(F.col("source") == log), log, F.col("_day"))
            rows = rows.unionByName(marked.filter("NOT superseded").select(*QUARANTINE.schema.names))
        rows = checkpointed(rows)
    ingests = {"ingest_id": [*older, *range(first, last + 1)]}
    lakehouse.replace(QUARANTINE, rows, where={"source": cleaning.LOGS, **ingests}, after=after)


def _replace_events(step: Step, rows: DataFrame, note: Mapping[str, Any]) -> None:
    """Store the events of all raw rows, in the place of the stored ones."""
    counts, figures = Observation("events"), step.figures
    parts = {"duplicates": (F.col("copy") != 1) & ~F.col("superseded"), "superseded": F.col("superseded")}
    totals = [F.coalesce(F.sum(part.cast("long")), F.lit(0)).alias(name) for name, part in parts.items()]
    step.replace(rows.observe(counts, *totals).filter("copy = 1"), after=step.version, **note)
    figures["events"] = count = step.lakehouse.read("events").count()
    # Spark drops the observation of a plan that turns out to be empty, and to ask for it would wait for ever
    found = counts.get if count else rows.agg(*totals).collect()[0].asDict()
    figures["duplicates"] = found["duplicates"]
    if found["superseded"]:
        figures["superseded"] = found["superseded"]


def add_events(step: Step, fresh_rows: DataFrame, note: Mapping[str, Any]) -> None:
    """Store the events of a batch that are new, correct those that changed, count those that are stored already.

    Events whose lines have moved to another day are deleted.
    """
    figures = step.figures
    with persisted(fresh_rows) as rows:
        per_day = rows.groupBy("event_date").agg(
            F.count(F.lit(1)).alias("rows"),
            F.count_if(F.col("copy") != 1).alias("repeated"),
            F.collect_set("neighbour_date").alias("neighbours"),
        )
        found = per_day.collect()
        days = {row["event_date"] for row in found}
        beside = {day for row in found for day in row["neighbours"]}
        count = sum(row["rows"] for row in found)
        stored = _stored_events(step.lakehouse, rows, days | beside, count, with_neighbours=bool(beside))
        compared = add_state(rows.filter("copy = 1"), stored)
        if beside:
            compared = compared.unionByName(moved_away(rows, stored), allowMissingColumns=True)
        with persisted(compared) as judged:
            states = count_states(judged)
            store_changes(step, judged, states, {"event_date": sorted(days | beside)}, note)
        new, changed, known, moved = (states.get(state, 0) for state in (NEW, CHANGED, KNOWN, MOVED))
        figures["events"], figures["corrections"] = new, changed
        if moved:
            figures["moved"] = moved
        figures["duplicates"] = sum(row["repeated"] for row in found) + known + changed


def _stored_events(
    lakehouse: Lakehouse, rows: DataFrame, days: Iterable[date], count: int, *, with_neighbours: bool
) -> DataFrame:
    """Return the stored events with the ids of these rows, or of their neighbours."""
    ids = rows.select("event_id", "event_date")
    if with_neighbours:
        neighbours = rows.filter("neighbour_id IS NOT NULL").select("neighbour_id", "neighbour_date")
        ids = ids.union(neighbours)
    same_days = lakehouse.read("events").filter(F.col("event_date").isin(sorted(days)))
    return same_days.join(broadcast_few(ids, 2 * count), ["event_id", "event_date"], "left_semi")


def _derive_anew(
    step: Step,
    logs: Mapping[str, DataFrame],
    raw: Mapping[str, DataFrame],
    config: CleaningConfig,
    of_batch: Column,
    note: Mapping[str, Any],
) -> None:
    """Derive the events of all days anew on which the batch has rows, or supersedes some.

    Args:
        step: the step that writes ``events``.
        logs: all raw rows of the logs, marked by :meth:`bp_spark.ingest.deliveries.Versions.mark`.
        raw: all raw tables.
        config: settings of cleaning.
        of_batch: whether a row is of the batch, by its ``ingest_id``.
        note: what to record with the commit.
    """
    figures = step.figures
    local = F.to_date(cleaning.local_time("ts", config.day_in))
    dated = {name: rows.withColumn("_day", local) for name, rows in logs.items()}
    changed = of_batch | (F.col("superseded") & F.col("touched"))
    # other rows are in quarantine
    plausible = F.col("ts").between(F.lit(config.first_day).cast("timestamp"), F.date_add(F.to_date("ingested_at"), 3))
    changed_days = (rows.filter(changed & plausible).select("_day") for rows in dated.values())
    days = distinct_dates(reduce(DataFrame.unionByName, changed_days), "_day")
    # lines move to the day before or after
    around, further = _around(days, 1), _around(days, 2)
    near = F.col("_day").isin(further)
    if days:
        # in terms of the stored column, so that files can be skipped by their statistics
        bounds = (further[0] - timedelta(days=1), further[-1] + timedelta(days=2))
        near = near & F.col("ts").between(*(F.lit(day).cast("timestamp") for day in bounds))
    dated = {name: rows.filter(near).drop("_day") for name, rows in dated.items()}
    with persisted(cleaning.events(cleaning.validate(dated, raw, config), config.day_in)) as rows:
        delivered = rows.withColumn("ingest_id", F.col("delivered_by")).filter(of_batch)
        fresh = delivered.agg(F.count_if(~F.col("superseded"))).collect()[0][0]
        on_days = F.col("event_date").isin(around)
        ids = ["event_id", "event_date"]
        current = rows.filter(on_days & (F.col("copy") == 1))
        stored = step.lakehouse.read("events").filter(on_days)
        no_events = (
            stored.select(*EVENTS.schema.names)
            .join(rows.select(*ids).distinct(), ids, "left_semi")
            .join(current.select(*ids), ids, "left_anti")
        )
        compared = add_state(current, stored).unionByName(
            no_events.withColumn("state", F.lit(MOVED)), allowMissingColumns=True
        )
        with persisted(compared) as judged:
            is_fresh = F.coalesce(F.col("ingest_id").isNotNull() & of_batch, F.lit(False))
            by_state = (
                judged.withColumn("ingest_id", F.col("delivered_by"))
                .groupBy("state", is_fresh.alias("fresh"))
                .count()
                .collect()
            )
            states = {(row["state"], row["fresh"]): row["count"] for row in by_state}
            store_changes(step, judged, {state for state, _ in states}, {"event_date": around}, note)
    figures["events"] = states.get((NEW, True), 0)
    figures["corrections"] = sum(count for (state, _), count in states.items() if state == CHANGED)
    figures["duplicates"] = fresh - figures["events"]
    superseded = sum(rows.filter(of_batch & F.col("superseded")).count() for rows in logs.values())
    more = {"removed": states.get((MOVED, False), 0), "restored": states.get((NEW, False), 0), "superseded": superseded}
    figures.update({name: count for name, count in more.items() if count})


def _around(days: Iterable[date], distance: int) -> list[date]:
    """Return the days, and those at most this many days from one of them."""
    return sorted({day + timedelta(days=offset) for day in days for offset in range(-distance, distance + 1)})


def distinct_dates(df: DataFrame, column: str) -> list[date]:
    """Return the distinct dates of a column, rising."""
    return sorted(row[0] for row in df.select(column).distinct().collect())


def require_balance(figures: Mapping[str, Any]) -> None:
    """Require that each row became an event, a duplicate or a row in quarantine, or was superseded."""
    parts = {name: figures.get(name, 0) for name in ("events", "duplicates", "quarantine", "superseded")}
    missing = figures["rows"] - sum(parts.values())
    if missing:
        accounted = " + ".join(f"{name} ({count})" for name, count in parts.items())
        raise DataError("events", f"rows in ({figures['rows']}) must equal {accounted}", count=missing)


def span(lakehouse: Lakehouse) -> tuple[date, date]:
    """Return the days of the first and the last event.

    Raises:
        DataError: there are no events.
    """
    row = lakehouse.read("events").agg(F.min("event_date"), F.max("event_date")).first()
    if row is None or row[0] is None:
        refused = lakehouse.exists("quarantine") and not lakehouse.read("quarantine").isEmpty()
        reason = f": {why_all_refused(lakehouse.read('quarantine'))}" if refused else ""
        raise DataError("events", f"holds no rows{reason}")
    return row[0], row[1]
