"""Column helpers that all profile tables share."""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.lakehouse.schema import Table


def shaped(rows: DataFrame, table: Table) -> DataFrame:
    """Return the table's columns in their types."""
    return rows.select(*(F.col(field.name).cast(field.dataType).alias(field.name) for field in table.schema))


def as_double(feature: str) -> Column:
    """Return a feature as a double."""
    return F.col(feature).cast("double")


def as_long(feature: str) -> Column:
    """Return a feature as a whole number."""
    return F.col(feature).cast("long")


def filled(phrase: str, **values: Column) -> Column:
    """Return the phrase with each ``{name}`` replaced by the value of that name."""
    text = F.lit(phrase)
    for name, value in values.items():
        if f"{{{name}}}" in phrase:
            text = F.replace(text, F.lit(f"{{{name}}}"), value.cast("string"))
    return text
