"""A mapping and its files in a folder, and their rows in the raw contract."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.ingest.sources.files import FilesSource


def source_of(folder: Path, mapping: str, **files: str) -> FilesSource:
    """A source in ``folder`` with this mapping; files are given as ``name__csv="text"``."""
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    (folder / "shop.yaml").write_text(mapping, encoding="utf-8")
    return FilesSource(folder / "shop.yaml")


def rows_of(spark: SparkSession, source: FilesSource, table: str = "raw_transactions") -> list[Any]:
    df = source.read(spark, source.deliveries(spark))[table]
    times = [name for name in df.columns if name in ("ts", "signup_ts")]
    # collected timestamps are shown in the zone of the machine; the instant itself is not
    exact = df.withColumns({name: F.unix_micros(name) for name in times})
    return sorted(exact.collect(), key=lambda row: str(row.asDict()))


def utc(*parts: int) -> int:
    return int(datetime(*parts, tzinfo=UTC).timestamp()) * 1_000_000  # type: ignore[arg-type, misc]
