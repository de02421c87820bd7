"""What a declared table is: columns with comments, key, layout; and how a DataFrame is held to its declaration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, StructField, StructType

from bp_spark.core.errors import DataError


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: name of the column.
        type: SQL type.
        comment: meaning, in words for analysts; Delta and the documentation show it.
        required: whether Delta refuses NULL in it.
    """

    name: str
    type: str
    comment: str
    required: bool = False


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: name of the table in its namespace.
        comment: what a row is.
        columns: columns that a stage writes, in order.
        key: columns that identify a row.
        partition_by: columns that the table is partitioned by.
        change_feed: whether Delta keeps a feed of changes, for stages that follow only these.
        month_of: date column whose month is added as the column ``month``. Files hold one month each, so that a write or a
            read of one month leaves the files of others alone.
        skipped_by: columns with statistics by which Delta skips files.
        rows_in_file: the most rows of one file.
    """

    name: str
    comment: str
    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()
    partition_by: tuple[str, ...] = ()
    change_feed: bool = False
    month_of: str = ""
    skipped_by: tuple[str, ...] = ()
    rows_in_file: int | None = None

    @cached_property
    def schema(self) -> StructType:
        """Spark schema of the columns that a stage writes, comments included."""
        return _schema(self.columns)

    @cached_property
    def stored_columns(self) -> tuple[Column, ...]:
        """Columns as Delta stores them: with the month where the table is partitioned by it."""
        return (*self.columns, MONTH) if self.month_of else self.columns

    @cached_property
    def stored_schema(self) -> StructType:
        """Spark schema of the stored columns."""
        return _schema(self.stored_columns)


MONTH = Column("month", "date", "First day of the month; each file holds one month, so that a query reads few files")


def columns(*rows: tuple[str, str, str]) -> tuple[Column, ...]:
    """Return columns from (name, type, comment); a type that ends in ``!`` marks a required column."""
    return tuple(
        Column(name, sql_type.rstrip("!"), comment, sql_type.endswith("!")) for name, sql_type, comment in rows
    )


def conform(df: DataFrame, table: Table) -> DataFrame:
    """Select exactly the table's columns, in its order.

    Raises:
        DataError: a column is missing, or its type is not the table's.
    """
    present_types = {field.name: field.dataType for field in df.schema.fields}
    selected: list[SparkColumn] = []
    for field in table.schema.fields:
        if field.name not in present_types:
            raise DataError(table.name, "column is missing", column=field.name)
        present, declared = present_types[field.name].simpleString(), field.dataType.simpleString()
        if present != declared:
            raise DataError(table.name, f"must be {declared}, is {present}", column=field.name)
        selected.append(F.col(field.name).alias(field.name, metadata=field.metadata))
    return df.select(*selected)


def as_stored(df: DataFrame, table: Table) -> DataFrame:
    """Return :func:`conform`, with the month where the table has one."""
    rows = conform(df, table)
    if not table.month_of:
        return rows
    month = F.trunc(table.month_of, "MONTH").alias(MONTH.name, metadata={"comment": MONTH.comment})
    return rows.select("*", month)


def rows_of_date(df: DataFrame, day: date | None, column: str = "score_date") -> DataFrame:
    """Return the rows of a date; none for ``None``.

    Args:
        df: rows of a table that is kept by date.
        day: the date.
        column: column with the date.
    """
    return df.filter(F.col(column) == F.lit(day))


def typed_null(field: StructField) -> SparkColumn:
    """Return NULL of a field's type, under its name."""
    return F.lit(None).cast(field.dataType).alias(field.name)


def names_and_types(schema: StructType) -> list[tuple[str, str]]:
    """Return (name, type) of each field: what two schemas must share to hold the same rows."""
    return [(field.name, field.dataType.simpleString()) for field in schema.fields]


def _schema(columns: Sequence[Column]) -> StructType:
    return StructType(
        [StructField(c.name, DataType.fromDDL(c.type), not c.required, {"comment": c.comment}) for c in columns]
    )
