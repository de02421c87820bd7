"""Rows of a table from some of their values."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import write_deltalake
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import to_arrow_schema

from bp_spark.lakehouse.schema import Table
from bp_spark.lakehouse.store import Lakehouse

DAY = date(2024, 3, 10)


def frame(spark: SparkSession, table: Table, *rows: dict[str, Any]) -> DataFrame:
    """Rows of a table from some of their values; of the others those that can't be NULL are zero or empty."""
    return spark.createDataFrame([tuple(row.values()) for row in _whole(table, rows)], table.schema)


def write_without_spark(lakehouse: Path, table: Table, *rows: dict[str, Any], mode: Any = "overwrite") -> None:
    """Write such rows to a table by path, in milliseconds; the month of a table that has one is left out."""
    arrow = pa.Table.from_pylist(_whole(table, rows), schema=to_arrow_schema(table.schema))
    partitions = [column for column in table.partition_by if column in arrow.column_names]
    write_deltalake(lakehouse / "bp" / table.name, arrow, mode=mode, partition_by=partitions or None)


def forget_column(lakehouse: Lakehouse, table: Table, column: str) -> None:
    """Leave a table as an older version of the package did, which didn't know a column."""
    older = lakehouse.read(table.name).drop(column).localCheckpoint()
    writer = older.write.format("delta").mode("overwrite").option("overwriteSchema", "true")
    writer.partitionBy(*table.partition_by).save(lakehouse.location(table.name))


def _whole(table: Table, rows: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    empty: dict[str, Any] = {"double": 0.0, "date": DAY, "timestamp": datetime(2024, 3, 10, tzinfo=UTC), "string": ""}
    empty |= {"decimal(18,2)": Decimal(0), "boolean": False}

    def nothing(kind: str, nullable: bool) -> Any:
        return None if nullable else [] if kind.startswith("array") else empty.get(kind, 0)

    blank = {f.name: nothing(f.dataType.simpleString(), f.nullable) for f in table.schema}
    return [{**blank, **row} for row in rows]
