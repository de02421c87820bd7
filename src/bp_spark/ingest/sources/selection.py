"""Rows of a file that belong to a table: ``where`` and ``explode`` of its mapping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from bp_spark.ingest.sources import expressions, grammar
from bp_spark.ingest.sources.fields import NO_ELEMENTS, UNEXPLODED
from bp_spark.ingest.sources.lines import CORRUPT, quoted_column
from bp_spark.ingest.sources.mapping import ColumnRule, IdRule, TableMapping

BELONGS = "_bp_spark_belongs"
"""Column of :func:`with_selection`: whether the row belongs to the table."""
UNREADABLE_WHERE = "_bp_spark_unreadable_where"
"""Column of :func:`with_selection`: texts of a row for which ``where`` can't be told."""


@dataclass(frozen=True)
class FileCounts:
    """Counts of the rows of a table's files.

    Attributes:
        rows: rows that belong to the table.
        left_out: rows that ``where`` and empty arrays of ``explode`` leave out.
        decimal_ids: id of the contract -> rows in which it ends in ``.0``.
    """

    rows: int
    left_out: int
    decimal_ids: Mapping[str, int]

    def __add__(self, other: FileCounts) -> FileCounts:
        """Return the counts of both."""
        names = {**self.decimal_ids, **other.decimal_ids}
        ids = {name: self.decimal_ids.get(name, 0) + other.decimal_ids.get(name, 0) for name in names}
        return FileCounts(self.rows + other.rows, self.left_out + other.left_out, ids)


def file_counts(selected: DataFrame, mapping: TableMapping) -> FileCounts:
    """Count the rows of :func:`with_selection`."""
    ids = {name: rule.column for name, rule in mapping.columns if isinstance(rule, IdRule) and rule.column}
    belongs = F.col(BELONGS)
    row = selected.agg(
        F.count_if(belongs).alias("rows"),
        F.count_if(~belongs).alias("left_out"),
        *(
            F.count_if(belongs & quoted_column(column).cast("string").rlike(r"\.0+\s*$")).alias(f"id {name}")
            for name, column in ids.items()
        ),
    ).collect()[0]
    return FileCounts(row["rows"], row["left_out"], {name: row[f"id {name}"] for name in ids})


def kinds_of(df: DataFrame, names: Iterable[str]) -> dict[str, str]:
    """Return the kind of each column, as expressions know them."""
    return {name: _kind(df.schema[name].dataType) for name in names}


def _kind(kind: T.DataType) -> str:
    kinds: tuple[tuple[type[T.DataType], str], ...] = (
        (T.IntegralType, grammar.WHOLE),
        (T.DecimalType, grammar.DECIMAL),
        (T.FractionalType, grammar.DOUBLE),
        (T.BooleanType, grammar.BOOLEAN),
        (T.TimestampType, grammar.INSTANT),
        (T.StringType, grammar.TEXT),
        (T.TimestampNTZType, grammar.TEXT),
        (T.DateType, grammar.TEXT),
    )
    return next((name for type_, name in kinds if isinstance(kind, type_)), grammar.NESTED)


def joined_texts(df: DataFrame, names: Iterable[str], mapping: TableMapping) -> Column:
    """Return the texts of columns, joined; NULL where all are blank. The user's id is left out."""
    user = getattr(mapping.columns, "user_id", None)
    hidden = user.platform_columns if isinstance(user, ColumnRule) else ()
    kinds = kinds_of(df, names)
    texts = [
        quoted_column(name).cast("string")
        for name, kind in kinds.items()
        if name not in hidden and kind != grammar.NESTED
    ]
    return F.nullif(F.trim(F.concat_ws(" | ", *(F.when(F.trim(text) != "", text) for text in texts))), F.lit(""))


def with_selection(df: DataFrame, mapping: TableMapping) -> DataFrame:
    """Add BELONGS and, if there is a ``where``, UNREADABLE_WHERE.

    A row belongs to the table where ``where`` is true. It stays, too, where that depends on a text that is no number, and where
    the line could not be taken apart: both end in quarantine. A row of an array without elements doesn't belong to the table.

    Args:
        df: rows with the columns that the mapping names.
        mapping: the table's mapping.

    Raises:
        ValueError: ``where`` doesn't fit the types of its columns.
    """
    is_exploded = NO_ELEMENTS in df.columns
    belongs = ~F.col(NO_ELEMENTS) if is_exploded else F.lit(True)
    if mapping.where is None:
        return df.withColumn(BELONGS, belongs)
    kinds: Mapping[str, str] = kinds_of(df, grammar.columns_of(mapping.where))
    where = expressions.condition(mapping.where, kinds)
    corrupt = F.col(CORRUPT).isNotNull() if CORRUPT in df.columns else F.lit(False)
    corrupt = corrupt | F.col(UNEXPLODED).isNotNull() if is_exploded else corrupt
    df = df.withColumns(
        {"_where": F.expr(where.sql), "_where_failed": F.expr(expressions.joined(where.failures)) & ~corrupt}
    )
    is_unreadable = F.col("_where").isNull() & F.col("_where_failed")
    text = F.coalesce(joined_texts(df, kinds, mapping), F.lit("<where>"))
    return df.withColumns(
        {
            BELONGS: belongs & (F.coalesce(F.col("_where"), F.lit(False)) | is_unreadable | corrupt),
            UNREADABLE_WHERE: F.when(is_unreadable, text),
        }
    ).drop("_where", "_where_failed")
