"""Upkeep of the tables: small files joined, and files deleted that no version within the retention time needs."""

from __future__ import annotations

from typing import Any

from pyspark.sql import SparkSession

from bp_spark.core.config import Config
from bp_spark.core.spark_errors import translate
from bp_spark.lakehouse.run import recorded
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import TABLE_NAMES

WRITTEN_WHOLE = ("user_features", "training_set", "pretraining_set")
"""Tables without small files: each date, or all of it, is written at once, cut for the workers that read it."""


def maintain(spark: SparkSession, config: Config) -> list[dict[str, Any]]:
    """Join the small files of all tables by Delta's OPTIMIZE, then delete files of old versions by its VACUUM.

    No row changes, and other jobs may run. OPTIMIZE leaves out :data:`WRITTEN_WHOLE`. How long the files of old versions are
    kept is the table's own property ``delta.deletedFileRetentionDuration``, by default a week.

    Returns:
        The stages that ran, as in ``runs``. The first one counts the joined files of each table.
    """
    with recorded(spark, config, "maintain") as run:
        lakehouse = run.lakehouse
        names = lakehouse.existing(TABLE_NAMES)
        with run.stage("optimize") as figures:
            for name in names:
                if name not in WRITTEN_WHOLE and (joined := _join_small_files(lakehouse, name)):
                    figures[name] = f"{joined:,} files joined"
        with run.stage("vacuum") as figures:
            for name in names:
                with translate(name):
                    spark.sql(f"VACUUM {lakehouse.sql_name(name)}")
            figures["tables"] = len(names)
        return run.records


def _join_small_files(lakehouse: Lakehouse, name: str) -> int:
    """Return how many files were joined to fewer."""
    with translate(name):
        result = lakehouse.spark.sql(f"OPTIMIZE {lakehouse.sql_name(name)}").select("metrics.numFilesRemoved").first()
    return int(result[0]) if result is not None else 0
