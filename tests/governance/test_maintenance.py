"""Upkeep: fewer files, the same rows, and nothing deleted that a job may be writing."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pyspark.sql import SparkSession

from bp_spark import pipeline
from bp_spark.core.config import Config
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import METRICS
from tests.support.rows import frame

WEEK = 7 * 24 * 3600


def test_small_files_are_joined_and_old_leftovers_deleted(spark: SparkSession, settings: Config) -> None:
    lakehouse = Lakehouse(spark, settings.tables)
    for number in range(4):
        lakehouse.append(METRICS, frame(spark, METRICS, {"metric": f"m{number}"}))
    folder = Path(lakehouse.location("metrics"))
    before = {path.name for path in folder.glob("*.parquet")}
    old, new = folder / "part-old.parquet", folder / "part-new.parquet"
    for path in (old, new):
        path.write_bytes(b"a job was killed here, or writes")
    long_ago = time.time() - 2 * WEEK
    os.utime(old, (long_ago, long_ago))

    optimized, vacuumed = pipeline.maintain(spark, settings)
    assert optimized["figures"] == {"metrics": "4 files joined"}
    assert vacuumed["figures"] == {"tables": "1"}
    rows = lakehouse.read("metrics")
    assert sorted(row["metric"] for row in rows.collect()) == ["m0", "m1", "m2", "m3"]
    assert len(rows.inputFiles()) == 1
    # a reader of yesterday's version still finds its files
    assert before <= {path.name for path in folder.glob("*.parquet")}
    assert (old.exists(), new.exists()) == (False, True)
    assert lakehouse.read("metrics", 1).count() == 1
    # nothing to join is nothing written
    version = lakehouse.version("metrics")
    assert "metrics" not in pipeline.maintain(spark, settings)[0]["figures"]
    assert lakehouse.version("metrics") <= version + 2
