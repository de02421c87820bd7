"""Rows deleted when they are older than the configured periods, then the files that held them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from pyspark.sql import SparkSession

from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError
from bp_spark.governance import cleanup
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.tables import PROFILE_TABLES, RAW_CONTACTS, RAW_LOGS

ROW_DAYS: Mapping[str, Mapping[str, str]] = {
    "raw": {
        **dict.fromkeys((table.name for table in (*RAW_LOGS, *RAW_CONTACTS)), "ingested_at"),
        "quarantine": "substring(get_json_object(row, '$.ingested_at'), 1, 10)",
    },
    "events": {
        **dict.fromkeys(("events", "consultations", "consultation_topics"), "event_date"),
        "campaign_contacts": "coalesce(last_day, first_day)",
    },
    "features": dict.fromkeys(("user_features", "prospect_features"), "as_of_date"),
    "training": dict.fromkeys(("training_set", "pretraining_set", "label_requests", "given_labels"), "as_of_date"),
    "scores": dict.fromkeys(
        (
            *("scores", "scores_latest", "prospect_scores", "totals", "cohorts", "market_forecast", "experiments"),
            "recommendations",
            *(table.name for table in PROFILE_TABLES),
        ),
        "score_date",
    ),
}
"""Setting of ``privacy.retention_days`` -> table -> SQL of a row's day."""


def retain(spark: SparkSession, config: Config) -> list[dict[str, Any]]:
    """Delete the rows that are older than ``privacy.retention_days`` allows, and the files of older versions.

    Returns:
        The stages that ran, as in ``runs``.

    Raises:
        ConfigError: No period is set.
    """
    if not any(config.privacy.retention_days.model_dump().values()):
        raise ConfigError("retain: privacy.retention_days sets no period, so nothing is too old")
    with recorded(spark, config, "retain") as run:
        delete_expired_rows(run)
        with run.stage("forget texts") as figures:
            figures.update(cleanup.erase_unused_texts(run))
        cleanup.vacuum_tables(run)
        return run.records


def delete_expired_rows(run: Run) -> None:
    """Delete the rows that are older than ``privacy.retention_days`` allows; without a period do nothing."""
    today = datetime.now(UTC).date()
    days_by_period = run.config.privacy.retention_days.model_dump()
    if not any(days_by_period.values()):
        return
    with run.stage("retain") as figures:
        for period, days in days_by_period.items():
            for name, row_day in ROW_DAYS[period].items() if days else ():
                if run.lakehouse.exists(name):
                    oldest = today - timedelta(days=days)
                    figures[name] = run.lakehouse.delete(name, f"DATE({row_day}) < DATE'{oldest}'")
    cleanup.update_user_days(run)
