"""The tables as sources of dbt, with their comments, so that a warehouse's models build on them and its docs describe them."""

from __future__ import annotations

from typing import Any

import yaml

from bp_spark.core.config import Config
from bp_spark.core.stores import folder_of, without_hadoop_names
from bp_spark.features.catalogue import user_features_table
from bp_spark.lakehouse.schema import Column, Table
from bp_spark.lakehouse.tables import (
    DELIVERIES,
    FORGOTTEN,
    QUARANTINE,
    RAW_TABLES,
    SCORES,
    SHARED_TABLES,
    TEXT_EMBEDDINGS,
    USER_KEYS,
)

LATE_DAYS = 2
"""Days after which dbt warns that no night has scored."""
_LEFT_OUT = (*RAW_TABLES, QUARANTINE, DELIVERIES, USER_KEYS, FORGOTTEN, TEXT_EMBEDDINGS)
"""Tables that hold what was delivered, ids of users, or nothing for analysts."""


def sources(settings: Config) -> str:
    """Return the text of a ``sources.yml``: the tables that analysts read, their columns, and tests that their schemas promise.

    Tables by path get the place from which DuckDB reads them, ``external_location`` of dbt-duckdb. Those of a metastore are
    found by catalog and schema.
    """
    where = settings.tables
    catalog, _, schema = where.namespace.rpartition(".")
    folder = None if where.path is None else without_hadoop_names(folder_of(where.path, where.namespace))
    tables = [table for table in SHARED_TABLES if table not in _LEFT_OUT]
    tables.append(user_features_table(settings.features))
    source = {
        "name": schema,
        **({"database": catalog} if catalog else {}),
        "schema": schema,
        "description": "Written by bp-spark; read only.",
        "tables": [_table(table, folder) for table in sorted(tables, key=lambda table: table.name)],
    }
    text: str = yaml.safe_dump({"version": 2, "sources": [source]}, sort_keys=False, allow_unicode=True, width=120)
    return text


def _table(table: Table, folder: str | None) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if folder is not None:
        # in SQL a quote is doubled; dbt-duckdb fills in what stands in braces
        path = f"{folder}/{table.name}".replace("'", "''").replace("{", "{{").replace("}", "}}")
        config["meta"] = {"external_location": f"delta_scan('{path}')"}
    if table == SCORES:
        config["loaded_at_field"] = "cast(score_date as timestamp)"
        config["freshness"] = {"warn_after": {"count": LATE_DAYS, "period": "day"}}
    return {
        "name": table.name,
        "description": table.comment,
        **({"config": config} if config else {}),
        "columns": [_column(column, table.key) for column in table.stored_columns],
    }


def _column(column: Column, key: tuple[str, ...]) -> dict[str, Any]:
    tests = ["unique"] * (key == (column.name,)) + ["not_null"] * column.required
    return {
        "name": column.name,
        "description": column.comment,
        "data_type": column.type,
        **({"data_tests": tests} if tests else {}),
    }
