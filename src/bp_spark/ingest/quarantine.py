"""Rows in quarantine: judged again by today's settings, items and rates, and counted by rule."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, digest
from bp_spark.core.errors import DataError
from bp_spark.core.session import checkpointed
from bp_spark.ingest import cleaning
from bp_spark.ingest.clean import add_events, last_cleaning, quarantined_events, require_balance, require_same_terms
from bp_spark.ingest.texts_job import add_texts
from bp_spark.lakehouse.run import Run
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import EVENTS, QUARANTINE


def replay(run: Run) -> None:
    """Validate the rows in quarantine again and move the good ones into ``events``.

    Items and rates that are known today count, and so does today's time.

    Raises:
        ConfigError: ``cleaning.currency`` or ``cleaning.day_in`` are not those of the stored events.
        DataError: nothing was cleaned yet.
    """
    lakehouse = run.lakehouse
    if "through" not in last_cleaning(run, lakehouse.commit_metadata("events")):
        raise DataError(f"{lakehouse.namespace}.events", "nothing was cleaned yet; run featurize first")
    require_same_terms(lakehouse, run.config.cleaning)
    references = {name: lakehouse.read(name) for name in ("raw_items", "raw_rates") if lakehouse.exists(name)}
    inputs = digest(run.config.cleaning, lakehouse.version("quarantine"))
    with run.step("replay", EVENTS, inputs) as step:
        cleaned = last_cleaning(run, step.newest)
        reservation, figures = step.reserve(), step.figures
        rows = checkpointed(quarantined_events(lakehouse))
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
        add_texts(run, good_rows, brands)
        note: dict[str, Any] = {
            key: cleaned[key] for key in ("format", "through", "rules", "currency", "day_in") if key in cleaned
        }
        add_events(step, cleaning.events(validated, run.config.cleaning.day_in), note)
        # events first: if the run stops between the two, a row is in both, and the next replay counts it as a duplicate
        where = {"source": cleaning.LOGS}
        lakehouse.replace(QUARANTINE, cleaning.quarantine(validated), where=where, after=reservation)
        figures["quarantine"] = quarantined_events(lakehouse).count()
        require_balance(figures)
        figures["rows_out"] = figures["events"]


def quarantine_by_rule(spark: SparkSession, config: Config) -> list[tuple[str, str, int]]:
    """Return source, rule and number of rows in quarantine, most rows first.

    Raises:
        DataError: nothing was cleaned yet.
    """
    rows = Lakehouse(spark, config.tables).read("quarantine").groupBy("source", "rule").count()
    return [tuple(row) for row in rows.orderBy(F.desc("count"), "source", "rule").collect()]
