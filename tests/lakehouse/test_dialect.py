"""Spark SQL that DuckDB may answer, and what is left to Spark."""

from __future__ import annotations

import duckdb
import pyarrow as pa
import pytest

from bp_spark.lakehouse import dialect
from bp_spark.lakehouse.dialect import OtherDialectError

SCHEMA = pa.schema(
    {
        "k": pa.string(),
        "n": pa.int64(),
        "x": pa.float32(),
        "money": pa.decimal128(18, 2),
        "day": pa.date32(),
        "by_days": pa.map_(pa.int32(), pa.float64()),
        "items": pa.list_(pa.struct({"group": pa.string()})),
    }
)


def translated(query: str) -> str:
    return dialect.to_duckdb(dialect.parse(query), {"t": SCHEMA})


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1",
        "(SELECT 1) UNION ALL (SELECT 2);",
        "WITH a AS (SELECT 'INSERT' AS x) SELECT x FROM a -- DELETE",
        "WITH a AS (SELECT 1) SELECT `update` FROM a",
        "describe bp.t",
        "SHOW TABLES IN bp",
    ],
)
def test_statements_that_read_pass(query: str) -> None:
    assert dialect.only_reads(query)


@pytest.mark.parametrize(
    "query",
    [
        "",
        "DROP TABLE bp.t",
        "INSERT INTO bp.t SELECT 1",
        "FROM bp.t INSERT INTO bp.u SELECT *",
        "WITH a AS (SELECT 1) INSERT INTO bp.t SELECT * FROM a",
        "SELECT 1; DROP TABLE bp.t",
        "COPY (SELECT 1) TO 'file'",
        "SET spark.sql.ansi.enabled = false",
        "/* SELECT */ DELETE FROM bp.t",
    ],
)
def test_statements_that_write_do_not_pass(query: str) -> None:
    assert not dialect.only_reads(query)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("SELECT percentile_approx(n, 0.5) FROM bp.t", "percentile_approx"),
        ("SELECT my_function(n) FROM bp.t", "my_function"),
        ("SELECT CAST(x AS INT) FROM bp.t", "INT"),
        ("SELECT avg(money) FROM bp.t", "decimals"),
        ("SELECT money / 3 FROM bp.t", "decimals"),
        ("SELECT avg(m) FROM (SELECT *, money AS m FROM bp.t)", "decimals"),
        ("SELECT day - DATE '2024-01-01' FROM bp.t", "otherwise"),
        ("SELECT d + 1 FROM (SELECT day AS d FROM bp.t)", "otherwise"),
        ("SELECT items[n] FROM bp.t", "otherwise"),
        ("SELECT k[0] FROM bp.t", "otherwise"),
        ("SELECT n || 'a' FROM bp.t", "otherwise"),
        ("SELECT * FROM bp.t VERSION AS OF 3", "otherwise"),
        ("SELECT * FROM bp.t TABLESAMPLE (10 PERCENT)", "otherwise"),
        ("SELECT * FROM bp.t LATERAL VIEW OUTER explode(items) AS i", "otherwise"),
        ("SELECT * FROM bp.t WHERE k LIKE 'a\\_%'", "backslash"),
        ("DESCRIBE bp.t", "DESCRIBE"),
        ("SELECT FROM WHERE", "translated"),
    ],
)
def test_what_duckdb_reads_otherwise_is_left_to_spark(query: str, reason: str) -> None:
    with pytest.raises(OtherDialectError, match=reason):
        translated(query)


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("SELECT n FROM t ORDER BY n", [(None,), (2,)]),
        ("SELECT by_days[30] AS v FROM t WHERE n = 2", [(1.5,)]),
        ("SELECT items[0].group AS g FROM t WHERE n = 2", [("a",)]),
        ("SELECT i.group AS g, count(*) AS c FROM t LATERAL VIEW explode(items) AS i GROUP BY i.group", [("a", 1)]),
        ('SELECT count(*) AS c FROM t WHERE k = "user"', [(1,)]),
        # 0.7 of 32 bits is less than 0.7
        ("SELECT count(*) AS c FROM t WHERE x < 0.7", [(1,)]),
        ("SELECT n / 4 AS half FROM t WHERE n = 2", [(0.5,)]),
    ],
)
def test_a_translated_query_means_in_duckdb_what_it_means_in_spark(query: str, rows: list[tuple[object]]) -> None:
    table = pa.table(
        {
            "k": ["user", None],
            "n": [2, None],
            "x": pa.array([0.7, None], pa.float32()),
            "by_days": pa.array([[(30, 1.5)], None], SCHEMA.field("by_days").type),
            "items": pa.array([[{"group": "a"}], None], SCHEMA.field("items").type),
        }
    )
    with duckdb.connect() as connection:
        connection.register("t", table)
        assert connection.execute(translated(query)).fetchall() == rows


@pytest.mark.parametrize("query", ["SELECT 1 / (n - 2) FROM t", "SELECT n % 0 FROM t", "SELECT items[1] FROM t"])
def test_what_is_an_error_in_spark_is_no_null(query: str) -> None:
    table = pa.table({"n": [2], "items": pa.array([[{"group": "a"}]], SCHEMA.field("items").type)})
    with duckdb.connect() as connection:
        connection.register("t", table)
        with pytest.raises(duckdb.InvalidInputException):
            connection.execute(translated(query)).fetchall()


def test_tables_are_those_of_the_namespace_and_no_views_of_the_query() -> None:
    tree = dialect.parse("WITH a AS (SELECT * FROM bp.T) SELECT * FROM a JOIN `bp`.`u` USING (k)")
    assert sorted(dialect.table_names(tree, "bp")) == ["t", "u"]
    with pytest.raises(OtherDialectError, match=r"other\.t is not in bp"):
        dialect.table_names(dialect.parse("SELECT * FROM other.t"), "bp")
