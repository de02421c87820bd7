"""A platform whose deliveries are JSON files, and its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.ingest.clean import clean
from bp_spark.ingest.job import ingest
from bp_spark.lakehouse.run import Run
from tests.support.histories import WRITTEN_TEXTS

MAPPING = (
    """
timezone: UTC
transactions:
  path: "transactions/*.json"
  format: json
  columns: {user_id: user, order_id: order, line_id: line, item_id: item, ts: time, quantity: n, amount: paid}
behaviours:
  path: "behaviours/*.json"
  format: json
  columns: {user_id: user, ts: time, action: action, item_id: item}
items:
  path: "items/*.json"
  format: json
  columns: {item_id: item, title: title, category: category, brand: brand}
"""
    + WRITTEN_TEXTS
)
CONTACTS = """
consultations:
  path: "consultations/*.json"
  format: json
  columns: {user_id: user, ts: time, channel: channel, topic: topic, text: text, solved: solved}
campaigns:
  path: "campaigns/*.json"
  format: json
  columns: {user_id: user, campaign_id: campaign, first_day: from, last_day: to, kind: kind, cost: cost}
"""
"""Of a mapping: contacts with users, for the tests that deliver some."""


DERIVED = ("events", "quarantine", "texts", "user_daily", "user_features")


def settings_in(folder: Path, lakehouse: str = "lakehouse", *overrides: str) -> Config:
    """Settings of the platform whose files lie in ``folder/platform``, with its tables beside them."""
    return config.load(
        overrides=[
            "source.kind=files",
            f"source.mapping={folder}/platform/source.yaml",
            f"tables.path={folder}/{lakehouse}",
            f"bundles={folder}/bundles",
            f"training.work_dir={folder}/work",
            # few columns: to plan the rest would be most of the time
            "features.windows=[30, 90]",
            "texts.max_tokens=8",
            *overrides,
        ]
    )


def cleaned(spark: SparkSession, settings: Config, *, rebuild: bool = False) -> dict[str, dict[str, Any]]:
    """Ingest and clean, without features; return the stages by name."""
    run = Run(spark, settings)
    ingest(run)
    clean(run, rebuild)
    return {stage["stage"]: stage for stage in run.records}
