"""Spark SQL as text: quoted names and values, conditions, and the definition of a table."""

from __future__ import annotations

from collections.abc import Sequence

from bp_spark.lakehouse.schema import Table

_LISTED_VALUES = 200
"""The most values that a condition lists one by one."""
_CLUSTER_COLUMNS = 4
"""The most columns that Delta clusters a table by."""


def quoted_name(name: str) -> str:
    """Return a dotted name with each part quoted."""
    return ".".join(f"`{part}`" for part in name.split("."))


def literal(text: str) -> str:
    """Return a string literal; a plain ``$`` would let Spark put a variable's value in the place of ``${name}``."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("$", "\\u0024") + "'"


def one_of(column: str, values: Sequence[object]) -> str:
    """Return the condition that a column has one of some values."""
    return f"`{column}` IN ({', '.join(literal(str(value)) for value in values)})"


def skipping_condition(column: str, values: Sequence[object]) -> str:
    """Return a condition that holds for all the values and lets Delta skip files.

    Many values become a range: Delta skips files by a range, and not by a long list.

    Args:
        column: SQL expression of the column.
        values: values that the rows have.
    """
    texts = sorted({str(value) for value in values})
    if not texts:
        return "false"
    if len(texts) > _LISTED_VALUES:
        return f"{column} BETWEEN {literal(texts[0])} AND {literal(texts[-1])}"
    return f"{column} IN ({', '.join(map(literal, texts))})"


def merge_clauses(columns: Sequence[str], deleted_flag: str) -> str:
    """Return the clauses of a MERGE of rows ``s`` that updates, inserts or, where the flag is true, deletes."""
    names = [f"`{name}`" for name in columns]
    updates = ", ".join(f"{name} = s.{name}" for name in names)
    values = ", ".join(f"s.{name}" for name in names)
    return (
        f"WHEN MATCHED AND s.{deleted_flag} THEN DELETE "  # noqa: S608 (names of a declared table's columns)
        f"WHEN MATCHED THEN UPDATE SET {updates} "
        f"WHEN NOT MATCHED AND NOT s.{deleted_flag} THEN INSERT ({', '.join(names)}) VALUES ({values})"
    )


def table_definition(table: Table, name: str) -> str:
    """Return what follows ``CREATE TABLE``: name, columns with their comments, layout, properties.

    Args:
        table: declaration of the table.
        name: the table as SQL names it.
    """
    columns = ", ".join(
        f"`{column.name}` {column.type}{' NOT NULL' if column.required else ''} COMMENT {literal(column.comment)}"
        for column in table.stored_columns
    )
    # Petastorm reads Parquet files and does not know deletion vectors
    properties = {"delta.enableDeletionVectors": "false"}
    if table.skipped_by:
        properties["delta.dataSkippingStatsColumns"] = ",".join(table.skipped_by)
    else:
        properties["delta.dataSkippingNumIndexedCols"] = "0"
    if table.change_feed:
        properties["delta.enableChangeDataFeed"] = "true"
    settings = ", ".join(f"{literal(key)} = {literal(value)}" for key, value in properties.items())
    partitions = ", ".join(f"`{column}`" for column in table.partition_by)
    layout = f"PARTITIONED BY ({partitions})" if partitions else ""
    return f"{name} ({columns}) USING DELTA {layout} COMMENT {literal(table.comment)} TBLPROPERTIES ({settings})"


def key_and_clustering(table: Table, name: str) -> list[str]:
    """Return the SQL that gives a managed table its primary key and, without partitions, liquid clustering by that key.

    Databricks trusts the key (``RELY``) and doesn't enforce it. A key with a nullable column can't be a primary key.

    Args:
        table: declaration of the table.
        name: the table as SQL names it.
    """
    required = {column.name for column in table.stored_columns if column.required}
    if not table.key or not required.issuperset(table.key):
        return []
    key = ", ".join(f"`{column}`" for column in table.key)
    primary = f"ALTER TABLE {name} ADD CONSTRAINT `{table.name}_key` PRIMARY KEY ({key}) NOT ENFORCED RELY"
    if table.partition_by:
        return [primary]
    cluster = table.key[:_CLUSTER_COLUMNS]
    # Delta clusters by columns with statistics, and these tables collect statistics for few columns
    indexed = ",".join(dict.fromkeys((*table.skipped_by, *cluster)))
    return [
        f"ALTER TABLE {name} SET TBLPROPERTIES ('delta.dataSkippingStatsColumns' = '{indexed}')",
        f"ALTER TABLE {name} CLUSTER BY ({', '.join(f'`{column}`' for column in cluster)})",
        primary,
    ]
