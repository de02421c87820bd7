"""Rows of a table from some of their values."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from bp_spark.lakehouse.schema import Table

DAY = date(2024, 3, 10)


def frame(spark: SparkSession, table: Table, *rows: dict[str, Any]) -> DataFrame:
    """Rows of a table from some of their values; of the others those that can't be NULL are zero or empty."""
    empty: dict[str, Any] = {"double": 0.0, "date": DAY, "timestamp": datetime(2024, 3, 10, tzinfo=UTC), "string": ""}
    empty |= {"decimal(18,2)": Decimal(0), "boolean": False}

    def nothing(kind: str, nullable: bool) -> Any:
        return None if nullable else [] if kind.startswith("array") else empty.get(kind, 0)

    blank = {f.name: nothing(f.dataType.simpleString(), f.nullable) for f in table.schema}
    return spark.createDataFrame([tuple({**blank, **row}.values()) for row in rows], table.schema)
