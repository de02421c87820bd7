"""Delta tables as they are after weeks and after maintenance: old entries of logs, old files and changes are gone."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pyspark.sql import SparkSession

from bp_spark.core.session import with_settings

_DAYS = 40
"""More than the 30 days that Delta keeps the entries of a log."""


def age_log(spark: SparkSession, table: Path) -> None:
    """Make a table's log forty days old, and let Delta clean it at its next checkpoint."""
    then = time.time() - _DAYS * 86_400
    for number, path in enumerate(sorted((table / "_delta_log").iterdir())):
        os.utime(path, (then + number, then + number))
    for interval in (1, 10):
        # with a checkpoint at each commit, this commit makes one
        spark.sql(f"ALTER TABLE delta.`{table}` SET TBLPROPERTIES ('delta.checkpointInterval' = '{interval}')")
    assert not (table / "_delta_log/00000000000000000000.json").exists()


def optimize_and_vacuum(spark: SparkSession, table: Path) -> None:
    """Leave neither older versions of a table nor its changes."""
    spark.sql(f"OPTIMIZE delta.`{table}`")
    with with_settings(spark, {"spark.databricks.delta.retentionDurationCheck.enabled": "false"}):
        spark.sql(f"VACUUM delta.`{table}` RETAIN 0 HOURS")
