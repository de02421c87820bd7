"""Queries by DuckDB and by Spark on the same tables."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
import typer
from pyspark.sql import SparkSession

from bp_spark.cli import common, queries
from bp_spark.cli.common import Engine
from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError, DataError, PlatformError
from bp_spark.lakehouse import without_spark
from bp_spark.lakehouse.schema import Table, columns
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.without_spark import UnreadableError
from bp_spark.scoring.lineage import rows_by_spark
from tests.support.damage import with_value_changed

TABLE = Table(
    "scores",
    "Rows of all types",
    columns(
        ("user_key", "string", "key"),
        ("score_date", "date", "date"),
        ("score", "double", "score"),
        ("feature", "float", "feature"),
        ("spend", "decimal(18,2)", "money"),
        ("by_horizon", "map<int,double>", "map"),
        ("reasons", "array<struct<group:string,contribution:double>>", "structs"),
        ("scored_at", "timestamp", "time"),
    ),
    partition_by=("score_date",),
)
ROWS = """VALUES
    ('a\u001b[31m', DATE'2024-01-01', 1.5D, 0.1F, 2.50BD, map(30, 1D), array(struct('visits', -2D)),
     TIMESTAMP'2024-01-01 02:03:04'),
    ('b', DATE'2024-01-02', CAST('NaN' AS DOUBLE), NULL, NULL, NULL, array(), NULL),
    (NULL, DATE'2024-01-02', NULL, 0.7F, -1.00BD, map(), NULL, TIMESTAMP'2024-02-01 00:00:00')"""
QUERIES = (
    "SELECT * FROM bp.scores ORDER BY user_key",
    "SELECT user_key, by_horizon[30] AS m, feature FROM bp.scores WHERE feature < 0.8 ORDER BY feature DESC",
    "SELECT score_date, count(*), sum(spend), max(score), min(scored_at) FROM bp.scores GROUP BY score_date ORDER BY 1",
    "SELECT r.group, r.contribution FROM bp.scores LATERAL VIEW explode(reasons) AS r",
    "WITH d AS (SELECT score_date AS day, count(*) AS n FROM bp.scores GROUP BY 1) "
    "SELECT s.user_key, n / 2 AS half, rank() OVER (ORDER BY s.user_key) AS place "
    "FROM bp.scores s JOIN d ON s.score_date = d.day ORDER BY place",
    "SELECT user_key FROM bp.scores WHERE score_date = '2024-01-01'",
)


@pytest.fixture
def stored(
    spark: SparkSession, lakehouse: Lakehouse, settings: Config, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Config]:
    rows = spark.sql(ROWS).toDF(*TABLE.schema.names)
    lakehouse.replace(TABLE, rows.select(*(rows[f.name].cast(f.dataType) for f in TABLE.schema)))
    monkeypatch.setattr(common, "start_session", lambda *_: spark)
    yield settings
    spark.sql("DROP SCHEMA IF EXISTS bp CASCADE")


def cells(found: queries.Rows) -> list[list[str]]:
    return [[str(value) for value in row] for row in found[1]]


def test_both_engines_return_the_same_rows_and_columns(stored: Config) -> None:
    for query in QUERIES:
        by_duckdb = without_spark.query_as_spark(stored.tables, query, 20)
        by_spark = queries.run(stored, query, 20, Engine.spark)
        assert cells(by_duckdb) == cells(by_spark), query
        assert by_duckdb[0] == by_spark[0], query


def test_rows_by_their_values_are_those_of_spark_with_columns_that_are_declared_since(
    stored: Config, spark: SparkSession
) -> None:
    table = Table(
        "scores", "Rows", (*TABLE.columns, *columns(("tier", "string", "tier"))), partition_by=("score_date",)
    )
    for values in (
        {"user_key": "a\u001b[31m"},
        {"score_date": date(2024, 1, 2), "user_key": "b"},
        {"user_key": "nobody"},
    ):
        by_spark = rows_by_spark(spark, stored, table, **values)
        found = without_spark.rows_where(stored.tables, table, **values)
        assert [str(row) for row in found] == [
            str({name: [dict(r.asDict()) for r in v] if isinstance(v, list) else v for name, v in row.items()})
            for row in by_spark
        ]
        assert len(found) == (0 if "nobody" in values.values() else 1)
        assert all(row["tier"] is None for row in found)


def test_a_query_runs_in_spark_with_a_reason_only_where_nobody_chose(
    stored: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries.logger, "propagate", True)
    query = "SELECT size(reasons) AS n FROM bp.scores WHERE user_key = 'b'"
    with caplog.at_level("INFO", queries.logger.name):
        assert queries.run(stored, query, 20, Engine.auto) == (["n"], [[0]])
    assert [r.getMessage() for r in caplog.records if r.name == queries.logger.name] == [
        "read by Spark: DuckDB may compute size(reasons) otherwise"
    ]
    with pytest.raises(typer.BadParameter, match="size"):
        queries.run(stored, query, 20, Engine.duckdb)


def test_duckdb_takes_its_own_sql_when_it_is_chosen(stored: Config) -> None:
    query = "SELECT reasons[1].group AS g FROM bp.scores WHERE len(reasons) > 0"
    assert queries.run(stored, query, 20, Engine.duckdb) == (["g"], [["visits"]])
    names = [row[0] for row in queries.run(stored, "DESCRIBE bp.scores", 20, Engine.duckdb)[1]]
    assert names == TABLE.schema.names


def test_a_table_with_deletion_vectors_is_left_to_spark(
    stored: Config, spark: SparkSession, lakehouse: Lakehouse
) -> None:
    location = lakehouse.location("scores")
    spark.sql(f"ALTER TABLE delta.`{location}` SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')")
    with pytest.raises(UnreadableError, match=r"delta-rs can't read bp\.scores"):
        without_spark.query_as_spark(stored.tables, QUERIES[0], 20)
    assert len(queries.run(stored, QUERIES[0], 20, Engine.auto)[1]) == 3
    with pytest.raises(PlatformError, match="--engine spark"):
        queries.run(stored, QUERIES[0], 20, Engine.duckdb)


def test_a_damaged_page_is_no_other_value(stored: Config, lakehouse: Lakehouse) -> None:
    file = next(Path(lakehouse.location("scores")).glob("score_date=2024-01-01/*.parquet"))
    file.write_bytes(with_value_changed(file.read_bytes(), "score"))
    with pytest.raises(UnreadableError, match="DuckDB ends with"):
        without_spark.query_as_spark(stored.tables, QUERIES[0], 20)


def test_a_table_that_does_not_exist_is_named(settings: Config) -> None:
    for engine in (Engine.auto, Engine.duckdb):
        with pytest.raises(DataError, match=r"bp\.nothing: table does not exist"):
            queries.run(settings, "SELECT * FROM bp.nothing", 20, engine)


def test_statements_that_write_and_tables_of_a_metastore_are_refused(settings: Config) -> None:
    for engine in Engine:
        with pytest.raises(typer.BadParameter, match="must be one SELECT"):
            queries.run(settings, "DROP TABLE bp.scores", 20, engine)
    managed = settings.model_copy(update={"tables": settings.tables.model_copy(update={"path": None})})
    assert not without_spark.is_possible(managed.tables)
    with pytest.raises(ConfigError, match="--engine spark"):
        queries.run(managed, "SELECT 1", 20, Engine.duckdb)


def test_a_process_with_a_session_asks_that_session(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    assert without_spark.is_possible(settings.tables)
    monkeypatch.setenv("SPARK_REMOTE", "sc://elsewhere")
    assert not without_spark.is_possible(settings.tables)
