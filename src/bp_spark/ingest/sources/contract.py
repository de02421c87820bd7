"""What every source offers: deliveries that can be listed cheaply, and their rows in the raw contract.

In: a platform's own files or tables. Out: DataFrames with the columns of the raw tables of
:mod:`bp_spark.lakehouse.tables`, less those
that the ingest adds itself (:data:`INGEST_COLUMNS`), and with the platform's ``user_id``, which the ingest turns into
``user_key`` before anything is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.lakehouse.tables import INGEST_COLUMNS, RAW_TABLES, Table
from bp_spark.lakehouse.tables import Column as TableColumn

_USER_ID = TableColumn("user_id", "string", "Platform's user id")


def _as_delivered(table: Table) -> Table:
    brought = (column for column in table.columns if column.name not in INGEST_COLUMNS)
    return replace(table, columns=tuple(_USER_ID if c.name == "user_key" else c for c in brought))


RAW = {table.name: _as_delivered(table) for table in RAW_TABLES}
"""Raw tables as sources deliver them."""


THOUSAND = r"^\s*[-+]?\d{1,3}\.\d{3}\s*$"
"""A text such as 1.234, which is a thousand and more in half of the world."""
BLANKS = " \t\r\n\u00a0\u3000\ufeff"
"""What may surround an id and is no part of it: a non-breaking space and a byte order mark, too."""


@dataclass(frozen=True, order=True)
class Delivery:
    """One file (or table version) that a platform delivered; a file changed in place is another delivery.

    Args:
        table: raw table that its rows belong to, as ``raw_transactions``.
        name: what the platform calls it; stored in the column ``delivery``.
        fingerprint: changes when its content does (size and time of change, a version).
    """

    table: str
    name: str
    fingerprint: str


class Source(Protocol):
    """A platform's data. Reading the same deliveries gives the same rows."""

    def deliveries(self, spark: SparkSession) -> list[Delivery]:
        """All that is there now, ordered; nothing is read but names.

        Raises:
            DataError: nothing is there for a table that the source must bring.
        """
        ...

    def read(self, spark: SparkSession, deliveries: Sequence[Delivery]) -> dict[str, DataFrame]:
        """Rows of these deliveries by raw table, as :func:`in_contract` shapes them.

        Raises:
            DataError: a delivery lacks a column or can't be read.
        """
        ...


def in_contract(df: DataFrame, table: str, unreadable: Column | None = None, **columns: Column) -> DataFrame:
    """``df`` with the columns of a raw table that a source brings, in order; those not given are NULL.

    A value that can't be cast to the column's type becomes NULL, and its text is kept in ``unreadable``, so that cleaning can
    name the column and nothing is lost.

    Args:
        unreadable: more such texts by column, of values that the source could not read itself: a map or NULL.
    """
    schema = RAW[table].schema
    wanted = [field for field in schema.fields if field.name != "unreadable"]
    given = {field.name: columns.get(field.name, F.lit(None)) for field in wanted}
    cast = {field.name: given[field.name].try_cast(field.dataType) for field in wanted}
    castable = [
        name for name in columns if schema[name].dataType.simpleString() not in ("string", "map<string,string>")
    ]
    texts = {name: F.when(cast[name].isNull(), given[name].cast("string")) for name in castable}
    found = (
        text_map(texts) if unreadable is None else F.map_concat(text_map(texts), F.coalesce(unreadable, text_map({})))
    )
    return df.select(
        *(cast[field.name].alias(field.name) for field in wanted),
        F.when(F.size(found) > 0, found).alias("unreadable"),
    )


def text_map(texts: Mapping[str, Column]) -> Column:
    """A map of those texts that are not NULL."""
    pairs = [
        F.when(text.isNotNull(), F.struct(F.lit(name).alias("key"), text.alias("value")))
        for name, text in texts.items()
    ]
    if not pairs:
        return F.create_map().cast("map<string,string>")
    return F.map_from_entries(F.array_compact(F.array(*pairs)))
