"""Expressions of mappings: what they may hold, and that no text makes them fail or lie."""

from __future__ import annotations

from typing import Any

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.ingest.sources.expressions import check, condition, joined, translate
from bp_spark.ingest.sources.grammar import columns_of
from bp_spark.ingest.sources.selection import kinds_of

REFUSED = {
    "has a query": ["(SELECT 1)", "SELECT a FROM b", "a IN (SELECT b FROM c)", "EXISTS (SELECT 1)"],
    "must be one expression": ["", "a; DROP TABLE b", "-- nothing"],
    "can't be used": [
        *(
            "java_method('java.lang.System', 'exit', 1)",
            "reflect('a', 'b')",
            "try_reflect('a', 'b')",
            "read_files('/etc')",
        ),
        *("ai_query('m', a)", "http_request('x')", "input_file_name()", "input_file_block_start()", "secret('a', 'b')"),
        *("DROP TABLE a", "raise_error(a)", "a[0]", "a DIV b", "sequence(1, 1000000)", "repeat(a, 1000)"),
        *("CAST(a AS TIMESTAMP)", "CAST(a AS ARRAY<INT>)", "count_min_sketch(a)", "from_csv(a, 'b INT')"),
    ],
    "gives another value each time": [
        *("rand()", "uuid()", "now()", "current_date", "current_timestamp()", "monotonically_increasing_id()"),
        *("spark_partition_id()", "coalesce(a, rand())", "CASE WHEN a = 1 THEN uuid() END", "a IN (1, randn())"),
    ],
    "is an aggregate": ["sum(a)", "count(*)", "max(a) + 1"],
    "window": ["sum(a) OVER (PARTITION BY b)", "row_number() OVER (ORDER BY a)", "lag(a)"],
    "makes rows": ["explode(a)", "inline(a)"],
    "lambda": ["transform(a, x -> rand())"],
    "the session's zone": ["to_timestamp(a)", "from_unixtime(a)", "date_format(a, 'yyyy')"],
    "INTERVAL": ["a + INTERVAL 1 DAY"],
    "need backquotes": ["list price * 2", "a +", "a AS b", "order by = 1"],
    "did you mean": ["coalese(a, 0)", "rounded(a)"],
    "IS NULL": ["a = ''", "a IN ('x', ' ')"],
    "digits": ["a = 12345678901234567890"],
    "pattern": ["a RLIKE b", "regexp_extract(a, 'b', 1)", "regexp_replace(a, '(b)', '$2')", "a LIKE b"],
    "arguments": ["coalesce()", "substring(a)", "abs(a, b)"],
    "whole number": ["substring(a, b)", "split_part(a, '-', 0)"],
    "deeply": ["+".join(["a"] * 5_000), "(" * 900 + "a" + ")" * 900],
}
"""Part of the message -> expressions that no mapping may hold."""


@pytest.mark.parametrize(("message", "text"), [(message, text) for message in REFUSED for text in REFUSED[message]])
def test_an_expression_is_a_value_of_its_row(message: str, text: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        check(text)


def test_a_condition_is_no_number() -> None:
    with pytest.raises(ValueError, match="must be a condition"):
        check("a * 2", condition=True)


def test_columns_are_found_wherever_they_stand() -> None:
    text = "CASE WHEN customer.id IS NULL OR `list price` > 1 THEN concat(a, upper(`b.c`.d)) ELSE x.y.z.q.r END"
    assert columns_of(text) == ("customer.id", "list price", "a", "b.c.d", "x.y.z.q.r")


TEXTS = {
    "n": "3",
    "p": "2.50",
    "bad": "12,5x",
    "blank": " ",
    "none": None,
    "nan": "NaN",
    "d": "5d",
    "t": "It's 10%",
    "f": "yes",
}
"""Columns of a row of texts, as CSV and JSON have them."""
UNREAD = "unread"
VALUES: dict[str, Any] = {
    "n * p": "7.5",
    "n * p - 1": "6.5",
    "-p": "-2.5",
    "n / 0": None,
    "n % 2": "1.0",
    "n % 0": None,
    "round(p / n, 2)": "0.83",
    "abs(-n)": "3.0",
    "greatest(n, 10)": "10.0",
    "least(n, p)": "2.5",
    "p > 10": "false",
    "n BETWEEN 2 AND 3.5": "true",
    "n IN (1, 3)": "true",
    "p = 2.5": "true",
    "n > '10'": "true",
    "nullif(n, 3.0)": None,
    "coalesce(none, n)": "3",
    "coalesce(blank, 0)": "0",
    "coalesce(blank, 0) * 2 + n": "3.0",
    "CASE WHEN n > 2 THEN 'many' ELSE 'few' END": "many",
    "CASE n WHEN 3 THEN p * 2 END": "5.0",
    "if(n = 3, -p, p)": "-2.5",
    "nvl2(none, 'a', 'b')": "b",
    "CAST(p AS DECIMAL(9,1)) + 0": "2.5",
    "CAST(n AS INT)": "3",
    "TRY_CAST(bad AS INT)": None,
    "coalesce(TRY_CAST(bad AS INT), 7)": "7",
    "n || '-' || p": "3-2.50",
    "concat(n * 2, '/', p)": "6/2.50",
    "concat_ws('-', n, none, blank, p)": "3-2.50",
    "substring(t, 1, 4)": "It's",
    "regexp_extract(t, r'(\\d+)%', 1)": "10",
    "split_part(p, '.', 2)": "50",
    "t LIKE 'It\\'s%'": "true",
    "t NOT RLIKE '\\\\d'": "false",
    "f AND n = 3": "true",
    "NOT f": "false",
    "blank IS NULL": "true",
    "none = 5": None,
    "none <=> NULL": "true",
    "left(upper(t), 2)": "IT",
    # a text that is no number is never hidden, and never a number
    "bad * 2": UNREAD,
    "nan + 1": UNREAD,
    "d * 1": UNREAD,
    "bad > 5": UNREAD,
    "coalesce(bad * 2, 0)": UNREAD,
    "coalesce(bad, 0) * 2": UNREAD,
    "CASE WHEN bad > 5 THEN 1 ELSE 0 END": UNREAD,
    "if(bad = 0, 'a', 'b')": UNREAD,
    "greatest(bad, n)": UNREAD,
    "concat_ws('-', n, bad * 1)": UNREAD,
    "(bad > 1) IS NULL": UNREAD,
    "nullif(bad, 0)": UNREAD,
    "CAST(bad AS INT)": UNREAD,
    "bad IN (1, 2)": UNREAD,
    "isnull(-bad)": UNREAD,
    "t IS TRUE": UNREAD,
    # but where the outcome is the same whatever the text means
    "n = 4 AND bad > 5": "false",
    "n = 3 OR bad > 5": "true",
    "coalesce(nullif(bad, '12,5x'), 0) * 2": "0.0",
}


def test_texts_are_numbers_where_numbers_are_needed(spark: SparkSession) -> None:
    df = spark.createDataFrame([tuple(TEXTS.values())], ", ".join(f"{name} STRING" for name in TEXTS))
    values = {text: translate(text, kinds_of(df, columns_of(text))) for text in VALUES}
    sql = [
        f"struct(CAST({value.sql} AS STRING) AS value, {joined(value.failures)} AS failed)" for value in values.values()
    ]
    [row] = df.select(*(F.expr(text).alias(str(place)) for place, text in enumerate(sql))).collect()
    results = {
        text: UNREAD if result.value is None and result.failed else result.value
        for text, result in zip(values, row, strict=True)
    }
    assert results == VALUES


TYPED = {
    "i * i": "4.0E18",
    "CAST(big AS INT)": UNREAD,
    "i": "2000000000",
    "concat(i, x)": "20000000000.1",
    "price > 0": None,
    "coalesce(price, 0)": "0.0",
    "coalesce(i, 'none')": "2000000000",
    "round(x * 3, 2)": "0.3",
    "ok AND x < 1": "true",
    "ok = 'false'": "false",
    "at": "2024-05-01 22:30:00.5Z",
    "at >= '2024-05-01'": "true",
    "day": "2024-05-01",
    "day || ' ' || i": "2024-05-01 2000000000",
    "money * 2": "24.68",
    "items IS NULL": "false",
}


@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_typed_columns_neither_wrap_around_nor_depend_on_the_session(spark: SparkSession, zone: str) -> None:
    spark.conf.set("spark.sql.session.timeZone", zone)
    try:
        df = spark.sql(
            "SELECT 2000000000 AS i, 5000000000 AS big, 0.1D AS x, double('NaN') AS price, true AS ok, "
            "timestamp'2024-05-01 22:30:00.5Z' AS at, date'2024-05-01' AS day, 12.34BD AS money, array(1) AS items"
        )
        values = {text: translate(text, kinds_of(df, columns_of(text))) for text in TYPED}
        row = df.select(
            *(
                F.expr(f"struct(CAST({v.sql} AS STRING), {joined(v.failures)})").alias(str(n))
                for n, v in enumerate(values.values())
            )
        ).collect()[0]
    finally:
        spark.conf.set("spark.sql.session.timeZone", "UTC")
    assert {
        text: UNREAD if value is None and failed else value for text, (value, failed) in zip(values, row, strict=True)
    } == TYPED
    with pytest.raises(ValueError, match=r"items holds an object or array.*items\.id"):
        condition("items = 1", kinds_of(df, ["items"]))
