"""Queries of ``bp-spark sql``: by DuckDB without a session, or by Spark."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import typer

from bp_spark.cli import common
from bp_spark.cli.common import Engine
from bp_spark.core import extras
from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError, PlatformError
from bp_spark.lakehouse import dialect, without_spark
from bp_spark.lakehouse.schema import Table
from bp_spark.lakehouse.without_spark import UnreadableError

_MOST_RULES = 10_000
Rows = tuple[list[str], list[list[Any]]]
"""Names of the columns, and rows."""

logger = logging.getLogger(__name__)


def run(settings: Config, query: str, most_rows: int, engine: Engine) -> Rows:
    """Return the columns and the first rows of a query.

    Raises:
        BadParameter: the query writes, can't be read, or doesn't fit the tables.
        DataError: a table does not exist.
        ConfigError: DuckDB is asked for tables of a metastore.
        PlatformError: DuckDB is asked for and can't read a table, or isn't installed.
    """
    if not dialect.only_reads(query):
        raise typer.BadParameter("must be one SELECT, WITH, VALUES, DESCRIBE, SHOW or EXPLAIN", param_hint="QUERY")
    if engine is Engine.duckdb:
        return _by_duckdb(settings, query, most_rows)
    if engine is Engine.auto and without_spark.is_possible(settings.tables):
        try:
            return without_spark.query_as_spark(settings.tables, query, most_rows)
        except UnreadableError as reason:
            logger.info("read by Spark: %s", reason)
    return _by_spark(settings, query, most_rows)


def _by_duckdb(settings: Config, query: str, most_rows: int) -> Rows:
    if settings.tables.path is None:
        raise ConfigError("--engine duckdb reads tables by path, and tables.path is null: use --engine spark")
    extras.require("duckdb", "--engine duckdb")
    import duckdb

    try:
        return without_spark.query_of_duckdb(settings.tables, query, most_rows)
    except UnreadableError as error:
        raise PlatformError(f"{error}: use --engine spark") from error
    except (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException) as error:
        raise typer.BadParameter(str(error).strip().splitlines()[0], param_hint="QUERY") from None
    except duckdb.Error as error:
        # the text may hold a value of a row
        raise PlatformError(f"DuckDB ends with {type(error).__name__}; --engine spark may say more") from error


def _by_spark(settings: Config, query: str, most_rows: int) -> Rows:
    extras.require("spark", "the query")
    from pyspark.errors import AnalysisException, ParseException

    from bp_spark.lakehouse.store import Lakehouse
    from bp_spark.lakehouse.tables import TABLE_NAMES

    spark = common.start_session(settings, "sql")
    if settings.tables.path is not None:
        Lakehouse(spark, settings.tables).register(TABLE_NAMES)
    try:
        result = spark.sql(query)
        columns = result.columns
    except (AnalysisException, ParseException) as error:
        raise typer.BadParameter(str(error).strip().splitlines()[0], param_hint="QUERY") from None
    return columns, [list(row) for row in result.limit(most_rows).collect()]


def rows_where(settings: Config, command: str) -> Callable[..., list[dict[str, Any]]]:
    """Return a reader of rows that have given values in columns: without a session where that is possible.

    Args:
        settings: all settings.
        command: name of the command, for a session.
    """

    def read(table: Table, **values: Any) -> list[dict[str, Any]]:
        if without_spark.is_possible(settings.tables):
            try:
                return without_spark.rows_where(settings.tables, table, **values)
            except UnreadableError as reason:
                logger.info("read by Spark: %s", reason)
        from bp_spark.scoring.lineage import rows_by_spark

        return rows_by_spark(common.start_session(settings, command), settings, table, **values)

    return read


def quarantine_by_rule(settings: Config) -> list[list[Any]]:
    """Return source, rule and number of rows in quarantine, most rows first.

    Raises:
        DataError: nothing was cleaned yet.
    """
    query = f"""
        SELECT source, rule, count(*) AS rows FROM {settings.tables.namespace}.quarantine
        GROUP BY source, rule ORDER BY rows DESC, source, rule"""  # noqa: S608 (a name that the settings checked)
    return run(settings, query, _MOST_RULES, Engine.auto)[1]
