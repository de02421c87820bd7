"""From raw consultations and campaigns to cleaned ones: the stages ``consultations`` and ``campaign_contacts``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

from pyspark.sql import Column, DataFrame, Observation
from pyspark.sql import functions as F

from bp_spark.core.config import digest
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.session import broadcast_few, checkpointed, persisted
from bp_spark.ingest import cleaning
from bp_spark.ingest.changes import OTHER_SETTINGS, count_states, store_changes
from bp_spark.ingest.contacts import FORMAT, LOGS, ContactLog, add_state, validate
from bp_spark.ingest.contacts import contacts as contact_rows
from bp_spark.ingest.deliveries import Versions, entries
from bp_spark.ingest.identity import CHANGED, KNOWN, NEW
from bp_spark.ingest.sources import source_digests
from bp_spark.lakehouse.run import Run, Step
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import EVENTS, QUARANTINE


def contacts(run: Run, rebuild: bool) -> None:
    """Turn the raw contacts of ingests that were not cleaned yet into contacts and quarantine, after events were cleaned.

    Args:
        run: the run to record the stages in.
        rebuild: clean all raw rows anew.

    Raises:
        ConfigError: contacts must be derived from all raw rows, and older ones were deleted.
    """
    for log in LOGS:
        if run.lakehouse.exists(log.raw.name):
            _clean(run, log, rebuild=rebuild)


def replay(run: Run) -> None:
    """Validate the contacts in quarantine again, by today's settings and time, and store the good ones."""
    lakehouse = run.lakehouse
    for log in LOGS:
        if not lakehouse.exists(log.cleaned.name):
            continue
        inputs = digest(run.config.cleaning, lakehouse.version("quarantine"))
        with run.step(f"replay {log.cleaned.name}", log.cleaned, inputs) as step:
            rows = checkpointed(cleaning.from_quarantine(lakehouse.read("quarantine"), log.raw.name))
            if rows.isEmpty():
                continue
            guard = _reserve(step)
            validated = checkpointed(validate(log, rows, run.config.cleaning, F.lit(datetime.now(UTC))))
            step.figures["rows"] = step.figures["rows_in"] = rows.count()
            _add(step, log, validated, step.newest)
            # contacts first: if the run stops between the two, the next replay counts the rows as duplicates
            step.figures["quarantine"] = _replace_quarantine(lakehouse, log, validated, {}, F.lit(True), guard)
            _require_balance(step, log)


def _clean(run: Run, log: ContactLog, *, rebuild: bool) -> None:
    lakehouse = run.lakehouse
    raw = lakehouse.read(log.raw.name)
    with run.step(log.cleaned.name, log.cleaned) as step:
        files = entries(lakehouse)
        # rows of an ingest that was stopped are in no delivery yet
        last = max((row["ingest_id"] for row in files), default=0)
        first = _first_ingest(run, log, step.newest, rebuild=rebuild)
        if run.config.privacy.retention_days.raw is None:
            versions = Versions.of(files, source_digests(run.config.source), first, last)
            raw = versions.mark(raw, log.raw.name).filter("NOT superseded")
            if versions.supersedes(log.raw.name):
                # contacts are few: what a changed file no longer has is found by deriving all anew
                first = 1
        rules = digest(run.config.cleaning)
        step.inputs = digest(rules, FORMAT, first, last)
        of_ingests = F.col("ingest_id").between(first, last)
        batch = raw.filter(of_ingests)
        if first > 1 and batch.isEmpty():
            return
        guard = _reserve(step)
        validated = validate(log, batch, run.config.cleaning)
        step.figures["rows"] = step.figures["rows_in"] = batch.count()
        ingests = {} if first == 1 else {"ingest_id": list(range(first, last + 1))}
        step.figures["quarantine"] = _replace_quarantine(lakehouse, log, validated, ingests, of_ingests, guard)
        note = {"format": FORMAT, "through": last, "rules": rules}
        # contacts last: their commit makes the cleaning complete
        if first == 1:
            _replace(step, log, validated, note)
        else:
            _add(step, log, validated, note)
            if step.newest.get("rules", rules) != rules:
                step.figures["note"] = OTHER_SETTINGS
        _require_balance(step, log)


def _first_ingest(run: Run, log: ContactLog, recorded: Mapping[str, Any], *, rebuild: bool) -> int:
    """Return the number of the first ingest to clean.

    Raises:
        ConfigError: contacts must be derived from all raw rows, and older ones were deleted.
    """
    if recorded.get("format") == FORMAT and not rebuild:
        return int(recorded["through"]) + 1
    if run.config.privacy.retention_days.raw is None or recorded["version"] < 0:
        return 1
    if rebuild or "through" in recorded:
        raise ConfigError(
            f"privacy.retention_days.raw: older raw rows are gone, so that {log.cleaned.name} can't be derived from them anew"
        )
    # the log was cleaned by Delta, or the first cleaning was stopped
    newest = run.lakehouse.read(log.cleaned.name).agg(F.max("ingest_id")).collect()[0][0]
    return 1 if newest is None else int(newest) + 1


def _reserve(step: Step) -> int:
    """Reserve the step's table and the quarantine; return the reservation of the latter."""
    step.reserve()
    # all stages that write the quarantine follow the reservations of events, so that none can write behind another's back
    return step.lakehouse.reserve(EVENTS, step.lakehouse.commit_metadata(EVENTS.name))


def _replace_quarantine(
    lakehouse: Lakehouse,
    log: ContactLog,
    validated: DataFrame,
    ingests: Mapping[str, Sequence[object]],
    of_ingests: Column,
    guard: int,
) -> int:
    """Store the rows that broke a rule in the place of the log's rows of these ingests; return how many are stored."""
    where = {"source": [log.raw.name], **ingests}
    lakehouse.replace(QUARANTINE, cleaning.quarantine({log.raw.name: validated}), where=where, after=guard)
    return lakehouse.read("quarantine").filter((F.col("source") == log.raw.name) & of_ingests).count()


def _replace(step: Step, log: ContactLog, validated: DataFrame, note: Mapping[str, Any]) -> None:
    """Store the contacts of all raw rows, in the place of the stored ones."""
    rows, counts = contact_rows(log, validated), Observation(log.cleaned.name)
    repeated = F.coalesce(F.sum((F.col("copy") > 1).cast("long")), F.lit(0)).alias("duplicates")
    step.replace(rows.observe(counts, repeated).filter("copy = 1"), after=step.version, **note)
    step.figures["contacts"] = step.figures["rows_out"] = count = step.lakehouse.read(log.cleaned.name).count()
    # Spark drops the observation of a plan that turns out to be empty, and to ask for it would wait for ever
    step.figures["duplicates"] = counts.get["duplicates"] if count else rows.filter("copy > 1").count()


def _add(step: Step, log: ContactLog, validated: DataFrame, note: Mapping[str, Any]) -> None:
    """Store the contacts of a batch that are new, correct those that changed, count those that are stored already."""
    figures = step.figures
    with persisted(contact_rows(log, validated)) as rows:
        days = sorted(row[0] for row in rows.select(log.day).distinct().collect())
        stored = _stored(step.lakehouse, log, rows, days)
        with persisted(add_state(log, rows.filter("copy = 1"), stored)) as compared:
            states = count_states(compared)
            recorded = {key: note[key] for key in ("format", "through", "rules") if key in note}
            store_changes(step, compared, states, {log.day: days}, recorded)
        new, changed, known = (states.get(state, 0) for state in (NEW, CHANGED, KNOWN))
        figures["contacts"] = figures["rows_out"] = new
        figures["corrections"] = changed
        figures["duplicates"] = rows.filter("copy > 1").count() + known + changed


def _stored(lakehouse: Lakehouse, log: ContactLog, rows: DataFrame, days: Sequence[date]) -> DataFrame:
    """Return the stored contacts with the ids of these rows, which are of these days."""
    same_days = lakehouse.read(log.cleaned.name).filter(F.col(log.day).isin(*days))
    ids = rows.select(log.id, log.day)
    return same_days.join(broadcast_few(ids, rows.count()), [log.id, log.day], "left_semi")


def _require_balance(step: Step, log: ContactLog) -> None:
    """Require that each row became a contact, a duplicate or a row in quarantine."""
    counted = {name: step.figures[name] for name in ("contacts", "duplicates", "quarantine")}
    missing = step.figures["rows"] - sum(counted.values())
    if missing:
        parts = " + ".join(f"{name} ({count})" for name, count in counted.items())
        raise DataError(log.cleaned.name, f"rows in ({step.figures['rows']}) must equal {parts}", count=missing)
