"""What every source offers: deliveries that can be listed cheaply, and their rows in the raw contract.

In: a platform's own files or tables. Out: DataFrames with the columns of the raw tables of :mod:`bp_spark.lakehouse.tables`,
less the columns that the ingest adds (:data:`INGEST_COLUMNS`). They hold the platform's ``user_id``, which the ingest turns
into ``user_key`` before anything is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.errors import DataError
from bp_spark.lakehouse.schema import Column as TableColumn
from bp_spark.lakehouse.schema import Table
from bp_spark.lakehouse.tables import INGEST_COLUMNS, RAW_TABLES

_USER_ID = TableColumn("user_id", "string", "Platform's user id")


def _as_delivered(table: Table) -> Table:
    delivered = (column for column in table.columns if column.name not in INGEST_COLUMNS)
    return replace(table, columns=tuple(_USER_ID if c.name == "user_key" else c for c in delivered))


RAW = {table.name: _as_delivered(table) for table in RAW_TABLES}
"""Raw tables as sources deliver them."""


THOUSAND = r"^\s*[-+]?\d{1,3}\.\d{3}\s*$"
"""A text such as 1.234, which in half of the world means a thousand and more."""
BLANKS = " \t\r\n\u00a0\u3000\ufeff"
"""Characters that may surround an id and are no part of it, with the non-breaking space and the byte order mark."""


@dataclass(frozen=True, order=True)
class Delivery:
    """One file (or table version) that a platform delivered; a file changed in place is another delivery.

    Args:
        table: raw table to which the rows belong, as ``raw_transactions``.
        name: the platform's name for the delivery; stored in the column ``delivery``.
        fingerprint: changes when the content does (size and time of change, a version).
    """

    table: str
    name: str
    fingerprint: str


SNAPSHOT = "delta"
"""Beginning of the fingerprint of a data file of a Delta table."""

OnUnreadable = Callable[[Delivery, DataError], None]
"""Called by :meth:`Source.read` with a delivery that can't be read, and why."""


def refuse(_: Delivery, error: DataError) -> None:
    """Raise the error of a delivery that can't be read: one unreadable delivery refuses all."""
    raise error


class Source(Protocol):
    """A platform's data. Reading the same deliveries gives the same rows."""

    def deliveries(self, spark: SparkSession) -> list[Delivery]:
        """Return all deliveries that exist now, ordered; only names are read.

        Raises:
            DataError: a table that the source must bring has no delivery.
        """
        ...

    def snapshots(self) -> Mapping[str, str]:
        """Return raw table -> beginning of the names of its deliveries, for the tables that are read from a Delta table.

        A delivery of such a table that isn't listed any more has no rows any more.
        """
        ...

    def read(
        self, spark: SparkSession, deliveries: Sequence[Delivery], on_unreadable: OnUnreadable = refuse
    ) -> dict[str, DataFrame]:
        """Return the rows of these deliveries by raw table, as :func:`in_contract` shapes them.

        Args:
            spark: session to read with.
            deliveries: some of :meth:`deliveries`.
            on_unreadable: called with each delivery that lacks a column or can't be read, as far as that shows before its rows
                are read. If it returns, the delivery is left out. By default it raises the error.
        """
        ...


def in_contract(df: DataFrame, table: str, unreadable: Column | None = None, **columns: Column) -> DataFrame:
    """Return the columns of a raw table that a source brings, in order; columns that aren't given are NULL.

    A value that can't be cast to the column's type becomes NULL. Its text is stored in ``unreadable``, so that cleaning can
    name the column and nothing is lost.

    Args:
        df: a platform's rows.
        table: raw table, as ``raw_transactions``.
        unreadable: further texts by column, of values that the source could not read itself: a map or NULL.
        **columns: value of each column, from the columns of ``df``.
    """
    schema = RAW[table].schema
    fields = [field for field in schema.fields if field.name != "unreadable"]
    values = {field.name: columns.get(field.name, F.lit(None)) for field in fields}
    cast = {field.name: values[field.name].try_cast(field.dataType) for field in fields}
    castable = [
        name for name in columns if schema[name].dataType.simpleString() not in ("string", "map<string,string>")
    ]
    not_cast = text_map({name: F.when(cast[name].isNull(), values[name].cast("string")) for name in castable})
    texts = not_cast if unreadable is None else F.map_concat(not_cast, F.coalesce(unreadable, text_map({})))
    return df.select(
        *(cast[field.name].alias(field.name) for field in fields),
        F.when(F.size(texts) > 0, texts).alias("unreadable"),
    )


def text_map(texts: Mapping[str, Column]) -> Column:
    """Return a map of the texts that are not NULL."""
    pairs = [
        F.when(text.isNotNull(), F.struct(F.lit(name).alias("key"), text.alias("value")))
        for name, text in texts.items()
    ]
    if not pairs:
        return F.create_map().cast("map<string,string>")
    return F.map_from_entries(F.array_compact(F.array(*pairs)))
