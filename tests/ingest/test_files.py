"""Files of any shape become the raw contract: nothing vanishes, no value is guessed at, times are what the platform meant."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.errors import NumberFormatException, PythonException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.session import with_settings
from bp_spark.core.spark_errors import SPARK_ERRORS
from bp_spark.ingest.sources import files
from bp_spark.ingest.sources.contract import Delivery
from bp_spark.ingest.sources.files import FilesSource
from bp_spark.ingest.sources.heads import require_utf8
from bp_spark.lakehouse.tables import INGEST_COLUMNS, RAW_TRANSACTIONS
from tests.support.sources import rows_of, source_of, utc

ORDERS = """
transactions:
  path: "*.csv"
  format: csv
  columns: {user_id: who, ts: at, amount: paid}
"""


@pytest.fixture
def session_zone(spark: SparkSession) -> Iterator[Any]:
    yield lambda zone: spark.conf.set("spark.sql.session.timeZone", zone)
    spark.conf.set("spark.sql.session.timeZone", "UTC")


def test_csv_with_own_names_formats_and_zone(spark: SparkSession, tmp_path: Path) -> None:
    mapping = """
transactions:
  path: "*.csv"
  format: csv
  options: {sep: ";"}
  timezone: Asia/Shanghai
  columns:
    user_id: 客户
    order_id: 单号
    ts: {column: 时间, format: "yyyy/MM/dd HH:mm"}
    amount: {column: 实付 金额}
    quantity: {value: 1}
    currency: {value: CNY}
    item_id: {column: 商品, values: {苹果: apple}}
"""
    text = '客户;单号;时间;实付 金额;商品;多余\n007;1;2024/05/01 08:30;12.50;苹果;x\n王五;2;2024/05/02 00:00;-3;"梨;""大""";\n'
    source = source_of(tmp_path, mapping, 订单__csv=text)
    df = source.read(spark, source.deliveries(spark))["raw_transactions"]
    assert df.columns == ["user_id", *(n for n in RAW_TRANSACTIONS.schema.names[1:] if n not in INGEST_COLUMNS)]
    first, second = rows_of(spark, source)
    assert (first.user_id, first.order_id, first.ts) == ("007", "1", utc(2024, 5, 1, 0, 30))
    assert (first.amount, first.quantity, first.currency) == (Decimal("12.50"), 1.0, "CNY")
    assert (first.item_id, first.delivery, first.unreadable) == ("apple", "订单.csv", None)
    assert (second.user_id, second.amount, second.item_id) == ("王五", Decimal("-3.00"), '梨;"大"')
    assert second.ts == utc(2024, 5, 1, 16)


def test_multi_line_text_is_one_value(spark: SparkSession, tmp_path: Path) -> None:
    mapping = ORDERS + "reviews: {path: r.txt, format: csv, columns: "
    mapping += "{user_id: who, ts: at, text: said}}"
    source = source_of(
        tmp_path, mapping, o__csv="who,at,paid\n", r__txt='who,at,said\n1,2024-01-01,"good,\nand ""cheap"""\n'
    )
    [row] = rows_of(spark, source, "raw_reviews")
    assert row.text == 'good,\nand "cheap"'
    assert rows_of(spark, source) == []


def test_json_lines_keep_numbers_as_they_were_written(spark: SparkSession, tmp_path: Path) -> None:
    mapping = """
transactions:
  path: orders
  format: json
  columns:
    user_id: id
    ts: {column: t, unit: ms}
    amount: paid
users:
  path: users.json
  format: json
  columns: {user_id: id, signup_ts: since, segment: {columns: {age: age_bracket, income: income}}}
"""
    (tmp_path / "orders").mkdir()
    lines = '{"id": 12345678901234567890, "t": 1714550400123, "paid": 1e2}\n{"id": "007", "t": "soon"}\n'
    (tmp_path / "orders" / "a.json").write_text(lines)
    source = source_of(
        tmp_path, mapping, users__json='{"id": 1, "since": "2020-01-01T00:00:00+08:00", "age_bracket": "20-29"}\n'
    )
    late, big = rows_of(spark, source)
    assert (big.user_id, big.amount) == ("12345678901234567890", Decimal("100.00"))
    assert big.ts == utc(2024, 5, 1, 8) + 123_000
    assert (late.user_id, late.amount, late.unreadable) == ("007", None, {"ts": "soon"})
    assert late.delivery == "orders/a.json"
    [user] = rows_of(spark, source, "raw_users")
    assert (user.segment, user.signup_ts) == ({"age": "20-29"}, utc(2019, 12, 31, 16))


def test_parquet_ids_of_any_type_become_plain_text(spark: SparkSession, tmp_path: Path) -> None:
    mapping = """
transactions:
  path: "*.parquet"
  format: parquet
  timezone: Asia/Shanghai
  columns: {user_id: u, order_id: o, line_id: l, ts: t, amount: a}
"""
    instant = pa.array([datetime(2024, 1, 1, 12, tzinfo=UTC)] * 2, pa.timestamp("us", "UTC"))
    table = {
        "u": pa.array([7, 8]),
        "o": pa.array([123.0, None]),
        "l": pa.array(["0012", ""]),
        "t": instant,
        "a": pa.array([0.1, 1e20]),
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    # another file may hold other types and columns in another order
    other = {"a": pa.array([Decimal("5.550")]), "t": pa.array([datetime(2024, 1, 1, 8)], pa.timestamp("us"))}
    other |= {"u": pa.array([9.5]), "o": pa.array(["x"]), "l": pa.array([1]), "more": pa.array([1])}
    pq.write_table(pa.table(other), tmp_path / "b.parquet")
    days = {"u": pa.array(["d"]), "o": pa.array(["x"]), "l": pa.array([1]), "a": pa.array([1])}
    days["t"] = pa.array([datetime(2024, 1, 1).date()])
    pq.write_table(pa.table(days), tmp_path / "c.parquet")
    rows = {row.user_id: row for row in rows_of(spark, source_of(tmp_path, mapping))}
    assert [rows["7"].order_id, rows["8"].order_id, rows["9.5"].order_id] == ["123", None, "x"]
    assert [rows["7"].line_id, rows["8"].line_id, rows["9.5"].line_id] == ["0012", None, "1"]
    assert [rows["7"].amount, rows["8"].amount, rows["9.5"].amount] == [Decimal("0.10"), None, Decimal("5.55")]
    assert rows["8"].unreadable == {"amount": "100000000000000000000"}
    assert [rows["7"].ts, rows["9.5"].ts] == [utc(2024, 1, 1, 12), utc(2024, 1, 1)]
    assert rows["d"].ts == utc(2023, 12, 31, 16)
    assert {rows[key].delivery for key in ("7", "9.5")} == {"a.parquet", "b.parquet"}


NO_USERS = ["NaN", "nan", "null", "NULL", "None", "\\N", "NA", "0", "0.0", "-1", "", " \t", "\u00a0"]
IDS = {
    "17850": ["17850", "17850.0", " 17850.00 ", "17850\t", "\u00a017850\u00a0", "\ufeff17850"],
    "007": ["007"],
    "1.5": ["1.5"],
    "v1.0": ["v1.0"],
    "00": ["00"],
    "Anna": ["Anna"],
    "anna": ["anna"],
    "10": ["10"],
}
"""Id -> how files may have it."""


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_an_id_is_one_however_a_file_has_it(spark: SparkSession, tmp_path: Path, kind: str) -> None:
    given = [*NO_USERS, *(text for texts in IDS.values() for text in texts)]
    rows = {"who": given, "at": ["2024-05-01"] * len(given), "paid": ["1"] * len(given)}
    if kind == "parquet":
        pq.write_table(pa.table(rows), tmp_path / "a.parquet")
        pq.write_table(
            pa.table({"who": [17850.0, None, float("nan"), 0.0], "at": ["2024-05-01"] * 4, "paid": [1] * 4}),
            tmp_path / "b.parquet",
        )
    elif kind == "json":
        lines = [json.dumps(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
        (tmp_path / "a.json").write_text("\n".join(lines) + '\n{"who": 17850.0, "at": "2024-05-01", "paid": 1}\n')
    else:
        lines = [",".join(f'"{value}"' for value in row) for row in zip(*rows.values(), strict=True)]
        (tmp_path / "a.csv").write_text("\n".join(["who,at,paid", *lines, ""]))
    counts = Counter(row.user_id for row in rows_of(spark, source_of(tmp_path, ORDERS.replace("csv", kind))))
    more = {"parquet": 3, "json": 0, "csv": 0}[kind]
    extra = {"parquet": 1, "json": 1, "csv": 0}[kind]
    assert counts == {
        **{user: len(texts) for user, texts in IDS.items()},
        "17850": 6 + extra,
        None: len(NO_USERS) + more,
    }


def test_a_mapping_says_which_odd_texts_are_ids(spark: SparkSession, tmp_path: Path) -> None:
    mapping = ORDERS.replace(
        "user_id: who",
        "user_id: {column: who, lower: true, valid: ['0', NA], values: {'-1': guest}}, order_id: number, line_id: line",
    )
    lines = ["ANNA,,0", "anna,NaN,-1", "0,17.0,1.0", "NA,\\N,2", "-1,null,3", "nan,x,4"]
    text = "\n".join(["who,number,line,at,paid", *(f"{line},2024-05-01,1" for line in lines)])
    rows = rows_of(spark, source_of(tmp_path, mapping, a__csv=text))
    ids_by_line = {row.line_id: (row.user_id, row.order_id) for row in rows}
    assert ids_by_line == {
        "0": ("anna", None),
        "-1": ("anna", None),
        "1": ("0", "17"),
        "2": ("na", None),
        "3": ("guest", None),
        "4": (None, "x"),
    }


def test_a_nested_object_is_no_user(spark: SparkSession, tmp_path: Path) -> None:
    users = ['{"id": 7, "email": "a@b.c"}', "[7]", '"{7"', "7"]
    text = "".join(f'{{"who": {user}, "at": "2024-05-01", "paid": 1}}\n' for user in users)
    rows = rows_of(spark, source_of(tmp_path, ORDERS.replace("csv", "json"), a__json=text))
    assert {row.user_id: row.unreadable for row in rows} == {"7": None, "{7": None, None: {"user_id": "<nested>"}}
    assert len(rows) == 4


def test_delta_gives_the_newest_version_with_its_partitions(spark: SparkSession, tmp_path: Path) -> None:
    mapping = """
transactions:
  path: orders 表
  format: delta
  columns: {user_id: id, ts: at, amount: paid, currency: land}
"""
    source = source_of(tmp_path, mapping)
    path = str(tmp_path / "orders 表")

    def write(rows: list[tuple[int, str, float]], mode: str) -> None:
        df = spark.createDataFrame(rows, "id int, land string, paid double").withColumn(
            "at", F.timestamp_seconds(F.lit(0))
        )
        df.write.format("delta").partitionBy("land").mode(mode).save(path)

    with pytest.raises(DataError, match="orders 表"):
        source.deliveries(spark)
    write([(1, "gone", 1.0)], "overwrite")
    removed = source.deliveries(spark)
    write([(2, "a b/中", 2.0), (3, "us", 3.0)], "overwrite")
    assert [(row.user_id, row.currency) for row in rows_of(spark, source)] == [("2", "a b/中"), ("3", "us")]
    current = source.deliveries(spark)
    assert not set(removed) & set(current)
    write([(4, "us", 4.0)], "append")
    [new] = set(source.deliveries(spark)) - set(current)
    [row] = source.read(spark, [new])["raw_transactions"].collect()
    assert (row.user_id, row.delivery) == ("4", new.name)
    assert new.name.startswith("orders 表/land=us/")


def test_bare_order_log_leaves_the_rest_to_cleaning(spark: SparkSession, tmp_path: Path) -> None:
    [row] = rows_of(spark, source_of(tmp_path, ORDERS, day1__csv="who,at,paid\n007,2024-05-01 09:30:00,12.50\n"))
    assert (row.user_id, row.ts, row.amount) == ("007", utc(2024, 5, 1, 9, 30), Decimal("12.50"))
    assert (row.order_id, row.item_id, row.currency, row.quantity) == (None, None, None, None)


def test_bad_values_and_corrupt_lines_are_kept_as_text(spark: SparkSession, tmp_path: Path) -> None:
    lines = ["1,2024-05-01,5", '2,soon,"12,5x"', "3,12:30,7", "4,2024-05-01", "5,2024-05-01,1,2", "6,2024-02-30,", ",,"]
    rows = rows_of(spark, source_of(tmp_path, ORDERS, a__csv="\n".join(["who,at,paid", *lines])))
    assert len(rows) == len(lines)
    assert all(row.delivery == "a.csv" for row in rows)
    of = {row.user_id: row for row in rows if row.user_id}
    assert of["1"].unreadable is None
    assert of["2"].unreadable == {"ts": "soon", "amount": "12,5x"}
    assert of["3"].unreadable == {"ts": "12:30"}
    assert of["6"].unreadable == {"ts": "2024-02-30"}
    torn = [row for row in rows if row.unreadable and "row" in row.unreadable]
    assert [row.unreadable for row in torn] == [{"row": "4,2024-05-01"}, {"row": "5,2024-05-01,1,2"}]
    assert all((row.user_id, row.ts, row.amount) == (None, None, None) for row in torn)


def torn_and_whole(rows: list[Any]) -> tuple[list[str], list[str]]:
    """Texts of the lines that could not be taken apart, and the other lines as ``user amount``."""
    torn = [row.unreadable["row"] for row in rows if row.unreadable and "row" in row.unreadable]
    assert all(row.user_id is None for row in rows if row.unreadable and "row" in row.unreadable)
    return sorted(torn), sorted(f"{row.user_id} {row.amount}" for row in rows if row.unreadable is None)


EXPORT = """
transactions:
  path: "*.csv"
  format: csv
  columns: {user_id: customer, order_id: order, ts: at, amount: paid}
"""
"""Columns of :data:`HEADER` that a mapping names; the others are of no use to it."""
HEADER = "at,customer,order,name,paid,list_price"


@pytest.mark.parametrize("multi_line", ["true", "false"])
def test_torn_lines_are_no_rows_where_some_columns_alone_are_mapped(
    spark: SparkSession, tmp_path: Path, multi_line: str
) -> None:
    torn = [
        "2024-05-01 10:00:00,u1,1,Mug, 5,10.00,12.00",
        "2024-05-01 10:00:00,u2,2,Cup,7",
        "2024-05-01 10:00:00,u4",
        '2024-05-01 10:00:00,u5,5,"Mug, 5",10.00,12.00,',
        "2024-05-01 10:00:00,u6,6,Mug,1,2,3,4,5,6,7,8,9",
    ]
    whole = ["2024-05-01 10:00:00,u3,3,Pot,9.00,9.00", '2024-05-01 10:00:00,u7,7,"15"" screen, flat",70.00,']
    mapping = EXPORT.replace("format: csv", f"format: csv\n  options: {{multiLine: {multi_line}}}")
    source = source_of(tmp_path, mapping, a__csv="\n".join([HEADER, *torn, *whole, ""]))
    assert torn_and_whole(rows_of(spark, source)) == (sorted(torn), ["u3 9.00", "u7 70.00"])
    # as the ingest reads it to give users their keys
    ids = source.read(spark, source.deliveries(spark))["raw_transactions"].select("user_id").distinct().collect()
    assert {row.user_id for row in ids} == {"u3", "u7", None}


def test_a_line_break_in_quotes_is_part_of_the_value(spark: SparkSession, tmp_path: Path) -> None:
    lines = [
        '2024-05-01 10:00:00,u1,1,"please call\n2024-05-01 10:00:00,u9,9,x,999.00,now",10.00,12.00',
        '2024-05-01 10:00:00,u2,2,"say ""hi""\n\n",20.00,',
        '2024-05-01 10:00:00,u3,3,"a, b",30.00,""',
        '2024-05-01 10:00:00,u4,4,15" screen,40.00,1',
        '2024-05-01 10:00:00,u5,5,"15" screen",50.00,1',
    ]
    for end in ("\n", "\r\n"):
        content = f"{HEADER}\n" + "\n".join(lines) + "\n"
        (tmp_path / f"a{len(end)}.csv").write_bytes(content.replace("\n", end).encode())
    torn, whole = torn_and_whole(rows_of(spark, source_of(tmp_path, EXPORT)))
    assert not torn
    assert whole == sorted(2 * [f"u{user} {user}0.00" for user in range(1, 6)])


def test_a_quote_that_is_not_closed_neither_forges_nor_swallows_an_order(spark: SparkSession, tmp_path: Path) -> None:
    order = "2024-05-01 10:00:00,{0},1,{1},{2},1".format
    broken = [
        # to the end of the file, in the last column and in another
        [order("u1", "a", "10.00")[:-1] + '"please call', order("u2", "b", "20.00")],
        [order("u1", '"please call', "10.00"), order("u2", "b", "20.00")],
        # to a quote that some other value begins with, and one that stands within another
        [order("u1", '"please call', "10.00"), order("u2", '"b"', "20.00")],
        [order("u1", '"please call', "10.00"), order("u2", 'b"c', "20.00")],
    ]
    for number, lines in enumerate(broken):
        good = order(f"good{number}", '"x, y"', "5.00")
        after = [] if number < 2 else [order(f"after{number}", "z", "6.00")]
        (tmp_path / f"{number}.csv").write_text("\n".join([HEADER, good, *lines, *after]), encoding="utf-8")
    torn, whole = torn_and_whole(rows_of(spark, source_of(tmp_path, EXPORT)))
    assert torn == sorted("\n".join(lines) for lines in broken)
    assert whole == sorted([*(f"good{number} 5.00" for number in range(4)), "after2 6.00", "after3 6.00"])


def test_quotes_escapes_and_separators_are_those_of_the_mapping(spark: SparkSession, tmp_path: Path) -> None:
    options = "{sep: '\\t', quote: \"'\", escape: '\\'}"
    mapping = ORDERS.replace("format: csv", f"format: csv\n  options: {options}").replace(
        "amount: paid", "amount: paid, item_id: thing"
    )
    lines = (
        [r"u1	2024-05-01	1	'it\'s	a", "mug'	x"],
        [r"u2	2024-05-01	2	'a" + "\n" + r"\\'	x"],
        ["u3	2024-05-01	3	'a", "b	x"],
    )
    content = "\n".join("\n".join(record) for record in lines)
    source = source_of(tmp_path, mapping, a__csv=f"who	at	paid	thing	more\n{content}\n")
    rows = rows_of(spark, source)
    assert torn_and_whole(rows) == (["\n".join(lines[2])], ["u1 1.00", "u2 2.00"])
    assert {row.item_id for row in rows if row.user_id == "u1"} == {"it's\ta\nmug"}


def test_records_are_looked_at_in_files_of_many_megabytes(spark: SparkSession, tmp_path: Path) -> None:
    review = '"' + 'a ""long"" review,\n' * 2_000 + '"'
    lines = [f"u{n},2024-05-01,{n}.00,{review if n % 20 == 0 else 'short'}" for n in range(2_000)]
    lines[777] = 'u777,2024-05-01,"777.00'
    lines[778] = 'u778,2024-05-01,778.00,"short"'
    source = source_of(tmp_path, ORDERS, a__csv="\n".join(["who,at,paid,more", *lines]))
    torn, whole = torn_and_whole(rows_of(spark, source))
    assert torn == ["\n".join(lines[777:779])]
    assert len(whole) == 1_998


def test_corrupt_json_is_kept_as_text(spark: SparkSession, tmp_path: Path) -> None:
    text = '{"who": 1, "at": "2024-05-01", "paid": 2}\n{"who": 1, "at\n'
    rows = rows_of(spark, source_of(tmp_path, ORDERS.replace("csv", "json"), a__json=text))
    assert {row.user_id: row.unreadable for row in rows} == {"1": None, None: {"row": '{"who": 1, "at'}}


def test_no_object_of_a_json_line_is_lost(spark: SparkSession, tmp_path: Path) -> None:
    one, two = (f'{{"who": {who}, "at": "2024-05-01", "paid": 2}}' for who in (1, 2))
    torn = [
        one + two,
        f"{one} {two}",
        f"[{one}]{two}",
        f"[{one}, 7]",
        f"{one} x",
        "\u2028",
        "]",
        f"{one}]{two}",
        f"]{one}",
        f"{one}],[{two}",
    ]
    lines = [one, f"[{one}, {two}]", "[]", "", " ", *torn]
    source = source_of(tmp_path, ORDERS.replace("csv", "json"), a__json="\ufeff" + "\n".join(lines))
    rows = rows_of(spark, source)
    assert sorted(row.user_id for row in rows if row.unreadable is None) == ["1", "1", "2"]
    assert sorted(row.unreadable["row"] for row in rows if row.unreadable) == sorted(torn)


def test_a_json_file_of_one_array_may_have_many_lines(spark: SparkSession, tmp_path: Path) -> None:
    mapping = ORDERS.replace("csv", "json") + "  options: {multiLine: true}\n"
    text = '[{"who": 1, "at": "2024-05-01", "paid": 2},\n {"who": 2, "at": "2024-05-01",\n "paid": 3}]\n'
    source = source_of(tmp_path, mapping, a__json=text, b__json=text + text)
    rows = rows_of(spark, source)
    assert [(row.delivery, row.user_id) for row in rows if row.unreadable is None] == [("a.json", "1"), ("a.json", "2")]
    assert [(row.delivery, row.unreadable) for row in rows if row.unreadable] == [("b.json", {"row": text + text})]


@pytest.mark.parametrize(
    ("kind", "encoding", "more"),
    [
        ("csv", "GBK", ""),
        ("csv", "windows-1252", ""),
        ("csv", "UTF-16", ""),
        ("json", "windows-1252", ""),
        ("json", "UTF-16", ", multiLine: true"),
    ],
)
def test_a_file_is_read_in_the_encoding_that_the_mapping_names(
    spark: SparkSession, tmp_path: Path, kind: str, encoding: str, more: str
) -> None:
    mapping = ORDERS.replace("csv", kind).replace("path", f"options: {{encoding: {encoding}{more}}}\n  path")
    user = "王五" if encoding == "GBK" else "Müller"
    text = f"who,at,paid\n{user},2024-05-01,5\n"
    if kind == "json":
        text = f'{{"who": "{user}", "at": "2024-05-01", "paid": 5}}\n'
    (tmp_path / f"a.{kind}").write_bytes(text.encode(encoding))
    assert [(row.user_id, row.amount) for row in rows_of(spark, source_of(tmp_path, mapping))] == [(user, 5)]


def test_a_file_of_another_encoding_is_named_with_the_remedy(spark: SparkSession, tmp_path: Path) -> None:
    header = "who,at,paid,größe\n"
    json_row = '{"who": "1", "at": "2024-05-01", "paid": 5}'
    mapping = ORDERS.replace('"*.csv"', '"*.txt"')
    cases = {
        "a.txt": (header.encode("utf-16"), mapping, "is no UTF-8 and may be UTF-16: set options: {encoding: UTF-16}"),
        "b.txt": (
            header.encode("utf-16-be"),
            mapping,
            "is no UTF-8 and may be UTF-16BE: set options: {encoding: UTF-16BE}",
        ),
        "c.txt": (
            header.encode("cp1252"),
            mapping,
            "its header is no UTF-8 and may be windows-1252: set options: {encoding: windows-1252}",
        ),
        "d.txt": (json_row.encode("utf-16"), mapping.replace("csv", "json"), "{encoding: UTF-16} and multiLine: true"),
        "f.txt": (
            b"who,at,paid\nZo\xeb,2024-05-01,5\n",
            mapping,
            "its row is no UTF-8 and may be windows-1252",
        ),
        "e.txt": (
            b"x\n",
            mapping.replace("path", "options: {encoding: nothing-9}\n  path"),
            "doesn't know the encoding",
        ),
    }
    for name, (content, case, remedy) in cases.items():
        (tmp_path / name).write_bytes(content)
        source = source_of(tmp_path, case)
        with pytest.raises(DataError, match=re.escape(remedy)) as caught:
            source.read(spark, source.deliveries(spark))
        assert str(caught.value).startswith(f"{name}: ")
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("rows", "broken"),
    [
        (["Zoë"] * 3 + ["Bob"] * 200, 3),
        (["Zoë"] * 2 + ["Bob"] * 200, 0),  # single mistakes, whatever the size of the file
        (["Zoë"] * 2 + ["王五"] * 2, 0),  # who writes UTF-8 elsewhere, means it
        (["Bob"], 0),
    ],
)
def test_many_rows_of_another_encoding_refuse_a_file_and_few_are_left_to_the_rules(
    tmp_path: Path, rows: list[str], broken: int
) -> None:
    def refused(kind: str, lines: list[bytes], **options: str) -> str:
        file = tmp_path / f"a.{kind}"
        file.write_bytes(b"\n".join([*lines, b""]))
        table = FilesSource(source_of(tmp_path, ORDERS.replace("csv", kind)).name).tables["raw_transactions"]
        try:
            require_utf8(table.model_copy(update={"options": options}), "a", str(file))
        except DataError as error:
            return str(error)
        return ""

    people = [name.encode("cp1252" if name.isascii() or name == "Zoë" else "utf-8") for name in rows]
    message = (
        f"a: {broken} of its first {len(rows)} rows are no UTF-8 and may be windows-1252: set options" if broken else ""
    )
    csv = [b'"%s",2024-05-01,5,note' % name for name in people]
    json_lines = [b'{"who": "%s", "paid": 5, "note": 1}' % name for name in people]
    for text in (refused("csv", [b"who,at,paid,note", *csv]), refused("json", json_lines)):
        assert text.startswith(message)
        assert bool(text) == bool(broken)
    assert refused("csv", [b"who,at,paid,note", *csv], encoding="UTF-8") == ""
    # nothing reads the other columns
    assert refused("csv", [b"note,at,paid,who", *csv]) == ""
    assert refused("json", [line.replace(b"note", b"x").replace(b"who", b"note") for line in json_lines]) == ""


def test_a_head_that_ends_within_a_letter_is_utf8(tmp_path: Path) -> None:
    source = source_of(tmp_path, ORDERS)
    for shift in range(3):
        lines = "who,at,paid\n" + "x" * shift + "五" * 100_000
        (tmp_path / "a.csv").write_text(lines, encoding="utf-8")
        require_utf8(source.tables["raw_transactions"], "a.csv", str(tmp_path / "a.csv"))


def test_parquet_times_in_nanoseconds_are_instants_or_wall_clock_times(spark: SparkSession, tmp_path: Path) -> None:
    nanos, micros = [1714556000123456789, -1, None], [1714556000123456, -1, None]
    kinds = {
        "naive": (nanos, pa.timestamp("ns")),
        "aware": (nanos, pa.timestamp("ns", "America/Lima")),
        "micros": (micros, pa.timestamp("us")),
        "number": (micros, pa.timestamp("us", "UTC")),
    }
    for name, (values, kind) in kinds.items():
        times = pa.array(values, kind)
        lines = pa.array([[{"at": time}] for time in times], pa.list_(pa.struct([("at", kind)])))
        order = pa.StructArray.from_arrays([times, lines], ["at", "lines"])
        columns = {"who": ["a", "b", "c"], "at": times, "paid": [1.0] * 3, "order": order}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    mapping = ORDERS.replace("csv", "parquet").replace("path", "timezone: '+08:00'\n  path")
    exploded = mapping.replace("path", "explode: order.lines\n  path").replace("ts: at", "ts: order.lines.at")
    for case in (mapping, mapping.replace("ts: at", "ts: order.at"), exploded):
        rows = rows_of(spark, source_of(tmp_path, case))
        found = {(row.delivery.removesuffix(".parquet"), row.user_id): row.ts for row in rows}
        for name, (_, kind) in kinds.items():
            shift = 0 if kind.tz else 8 * 3_600_000_000
            right = [1714556000123456 - shift, -1 - shift, None]
            assert [found[name, user] for user in "abc"] == right, (case, name)


def test_new_and_changed_files_are_new_deliveries(spark: SparkSession, tmp_path: Path) -> None:
    text = "who,at,paid\n1,2024-05-01,5\n"
    source = source_of(tmp_path, ORDERS, a__csv=text, _b__csv=text)
    before = source.deliveries(spark)
    assert [(delivery.table, delivery.name) for delivery in before] == [("raw_transactions", "a.csv")]
    assert source.deliveries(spark) == before
    (tmp_path / "c [1]+%20.csv").write_text(text)
    [new] = set(source.deliveries(spark)) - set(before)
    assert new.name == "c [1]+%20.csv"
    [row] = source.read(spark, [new])["raw_transactions"].collect()
    assert row.delivery == new.name
    os.utime(tmp_path / "a.csv", (0, 0))
    changed = [delivery for delivery in source.deliveries(spark) if delivery.name == "a.csv"]
    assert changed[0].fingerprint != before[0].fingerprint


def test_files_outside_the_mappings_folder_have_their_address(spark: SparkSession, tmp_path: Path) -> None:
    for folder in ("maps", "data/x"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data/x/a.csv").write_text("who,at,paid\n1,2024-05-01,5\n")
    for path in ("../data/*/a.csv", f"{tmp_path}/data/x/*.csv", f"file://{tmp_path}/data"):
        source = source_of(tmp_path / "maps", ORDERS.replace("*.csv", path))
        [row] = rows_of(spark, source)
        assert row.delivery == source.deliveries(spark)[0].name == f"file:{tmp_path}/data/x/a.csv"


def test_columns_are_found_by_name_in_every_file(spark: SparkSession, tmp_path: Path) -> None:
    source_of(
        tmp_path,
        ORDERS,
        a__csv="who,at,paid\n1,2024-05-01,5\n",
        b__csv="\ufeffpaid,who,note,at\n6,2,x,2024-05-02\n",
        e__csv="",
    )
    (tmp_path / "z.csv.gz").write_bytes(gzip.compress(b"at,who,paid\n2024-05-03,3,7\n"))
    (tmp_path / "shop.yaml").write_text(ORDERS.replace("*.csv", "*.csv*"))
    rows = rows_of(spark, FilesSource(tmp_path / "shop.yaml"))
    assert [(row.user_id, row.amount) for row in rows] == [("1", Decimal(5)), ("2", Decimal(6)), ("3", Decimal(7))]


def test_csv_without_a_header_is_mapped_by_position(spark: SparkSession, tmp_path: Path) -> None:
    mapping = ORDERS.replace("who, ts: at, amount: paid", "_c0, ts: _c1, amount: _c2")
    mapping = mapping.replace("format: csv", "format: csv\n  options: {header: false}")
    source = source_of(tmp_path, mapping, a__csv="1,2024-05-01,5\n", b__csv="2,2024-05-01,6,x\n", e__csv="")
    assert [(row.user_id, row.unreadable) for row in rows_of(spark, source)] == [("1", None), ("2", None)]


def test_a_missing_column_names_file_and_columns(spark: SparkSession, tmp_path: Path) -> None:
    source = source_of(
        tmp_path, ORDERS, a__csv="who,at,paid\n1,2024-05-01,5\n", b__csv="who,at,amount\n1,2024-05-01,5\n"
    )
    with pytest.raises(DataError, match=r"b\.csv\.paid: column is missing; there are 'who', 'at', 'amount'"):
        source.read(spark, source.deliveries(spark))


@pytest.mark.parametrize("sep", [",", ";"])
def test_no_value_of_a_file_without_a_header_stands_in_an_error(spark: SparkSession, tmp_path: Path, sep: str) -> None:
    source = source_of(tmp_path, ORDERS, a__csv=f"anna@example.com{sep}2024-05-01{sep}5\nu2{sep}2024-05-01{sep}6\n")
    with pytest.raises(DataError, match=r"a\.csv\.at: column is missing.*header: false") as caught:
        source.read(spark, source.deliveries(spark))
    assert "anna" not in str(caught.value)
    assert "2024" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        NumberFormatException("[CAST_INVALID_INPUT] The value 'anna' of the type STRING cannot be cast"),
        PythonException("ValueError: could not convert string to float: 'anna'"),
    ],
)
def test_no_value_that_spark_quotes_stands_in_an_error(error: Exception) -> None:
    with pytest.raises(DataError, match=r"^a\.csv: can't be read: \S+") as caught, files._readable("a.csv"):
        raise error
    assert "anna" not in str(caught.value)


def test_equal_values_of_a_file_without_a_header_stand_in_no_error(spark: SparkSession, tmp_path: Path) -> None:
    source = source_of(tmp_path, ORDERS, a__csv="178,178,1780\n178,178,1780\n")
    with pytest.raises(DataError) as caught:
        source.read(spark, source.deliveries(spark))
    assert "178" not in str(caught.value)


def test_a_header_may_have_line_breaks_in_its_names(spark: SparkSession, tmp_path: Path) -> None:
    mapping = ORDERS.replace("user_id: who", 'user_id: "who\\nbought"')
    files = {
        "a__csv": '"who\nbought",at,paid\n1,2024-05-01,5\n',
        "b__csv": '"who\nbought",paid,at\n2,6,2024-05-01\n',
    }
    assert torn_and_whole(rows_of(spark, source_of(tmp_path, mapping, **files))) == ([], ["1 5.00", "2 6.00"])


def test_a_file_of_another_format_is_named(spark: SparkSession, tmp_path: Path) -> None:
    source = source_of(tmp_path, ORDERS.replace("format: csv", "format: parquet"), a__csv="who,at,paid\n")
    with pytest.raises(DataError, match=r"a\.csv: can't be read"):
        source.read(spark, source.deliveries(spark))


def test_unreadable_files_are_left_out_where_the_caller_takes_them(spark: SparkSession, tmp_path: Path) -> None:
    mapping = ORDERS.replace('"*.csv"', '"*.csv*"') + (
        "searches: {path: s.json.gz, format: json, columns: {user_id: who, ts: at, query: q}}\n"
        "reviews: {path: reviews, format: delta, columns: {user_id: who, ts: at, text: said}}\n"
    )
    spark.sql("SELECT 1 AS who").write.format("delta").save(str(tmp_path / "reviews"))
    header = "who,at,paid\n"
    files = {"b__csv": f"{header}1,2024-05-01,5\n", "c__csv": "who,at\n", "d__csv": f"{header}2,2024-05-01,6\n"}
    # cut short so early that Spark can't find the header, though its line can be read
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(header.encode() * 9)[:-12])
    lines = "".join(f'{{"who": "{n}", "at": "2024-05-01", "q": "a"}}\n' for n in range(2_000))
    (tmp_path / "s.json.gz").write_bytes(gzip.compress(lines.encode())[:-100])
    source = source_of(tmp_path, mapping, **files)
    unreadable: dict[Delivery, DataError] = {}
    rows = source.read(spark, source.deliveries(spark), unreadable.__setitem__)
    assert sorted(row.user_id for row in rows["raw_transactions"].collect()) == ["1", "2"]
    *reviews, cut, lacking = (str(unreadable[delivery]) for delivery in sorted(unreadable))
    assert reviews == ["reviews.at: column is missing; there are 'who'"]
    assert cut == "a.csv.gz: can't be read: it is damaged, cut short or of another format"
    assert lacking == "c.csv.paid: column is missing; there are 'who', 'at'"
    assert rows["raw_reviews"].isEmpty()
    # what a cluster may be set to
    silent = with_settings(spark, {"spark.sql.files.ignoreCorruptFiles": "true"})
    with silent, pytest.raises(SPARK_ERRORS, match="FAILED_READ_FILE"):
        rows["raw_searches"].count()


def test_no_transactions_is_an_error_and_no_other_table_is(spark: SparkSession, tmp_path: Path) -> None:
    mapping = ORDERS + "items: {path: 'items/*.csv', format: csv, columns: {item_id: id}}"
    with pytest.raises(DataError, match=r"'\*\.csv'"):
        source_of(tmp_path, mapping).deliveries(spark)
    source = source_of(tmp_path, mapping, a__csv="who,at,paid\n")
    assert [delivery.table for delivery in source.deliveries(spark)] == ["raw_transactions"]


@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_times_do_not_depend_on_the_session(spark: SparkSession, tmp_path: Path, session_zone: Any, zone: str) -> None:
    session_zone(zone)
    mapping = """
timezone: Asia/Shanghai
transactions:
  path: "*.csv"
  format: csv
  columns:
    user_id: who
    amount: {value: 1}
    ts: at
reviews:
  path: "*.csv"
  format: csv
  columns:
    user_id: who
    ts: {column: local, format: "dd.MM.yyyy HH:mm[ XXX]", timezone: America/New_York}
rates:
  path: "*.csv"
  format: csv
  columns: {currency: who, rate: {value: 2}, day: at}
"""
    wall_clock = [
        "2024-05-01 08:00:00",
        "2024-05-01T08:00:00.5",
        "2024-05-01",
        "2024-05-01T00:00:00Z",
        "2024-05-01 08:00 +08:00",
    ]
    local = ["10.03.2024 02:30", "03.11.2024 01:30", "01.05.2024 08:00 +08:00", "01.05.2024 00:00", "2024-05-01 08:00"]
    text = "".join(f"{n},{a},{b}\n" for n, (a, b) in enumerate(zip(wall_clock, local, strict=True), start=1))
    source = source_of(tmp_path, mapping, a__csv="who,at,local\n" + text)
    midnight = utc(2024, 5, 1)
    first = [row.ts for row in rows_of(spark, source)]
    assert first == [midnight, midnight + 500_000, midnight - 8 * 3_600_000_000, midnight, midnight]
    skipped, twice, offset, plain, wrong = rows_of(spark, source, "raw_reviews")
    assert [skipped.ts, twice.ts] == [utc(2024, 3, 10, 7, 30), utc(2024, 11, 3, 5, 30)]
    assert [offset.ts, plain.ts] == [midnight, utc(2024, 5, 1, 4)]
    assert (wrong.ts, wrong.unreadable) == (None, {"ts": "2024-05-01 08:00"})
    assert {str(row.day) for row in rows_of(spark, source, "raw_rates")} == {"2024-05-01"}


def test_named_values_are_renamed_and_others_stay(spark: SparkSession, tmp_path: Path) -> None:
    mapping = ORDERS + "behaviours: {path: b.txt, format: csv, columns: {user_id: who, ts: at, "
    mapping += "action: {column: event, values: {view: browse, pv: browse, 加购: cart}}}}"
    events = ["view", "pv", "加购", "click", "dance", ""]
    text = "who,at,event\n" + "".join(f"{n},2024-05-01,{event}\n" for n, event in enumerate(events, start=1))
    source = source_of(tmp_path, mapping, a__csv="who,at,paid\n", b__txt=text)
    actions = {row.user_id: row.action for row in rows_of(spark, source, "raw_behaviours")}
    assert [actions[str(n)] for n in range(1, 7)] == ["browse", "browse", "cart", "click", "dance", None]


PLAIN = {
    "12.50": "12.50",
    "-3": "-3.00",
    "1234.5": "1234.50",
    "0.30000000000000004": "0.30",
    "12.299999999999999": "12.30",
    "1e2": "100.00",
    "7.5000": "7.50",
    **dict.fromkeys(["0.0045", "1.005", "12.345678", "1.234", "1.230", "-1.500", "1e-3", "12,50", "1.234,56"]),
    **dict.fromkeys(["5,00-", "(5.00)", "¥1,234", "1,234", "$5", "--5"]),
}
COMMA = {
    **{
        "12,50": "12.50",
        "1.234,56": "1234.56",
        "1.234": "1234.00",
        "12.345.678": "12345678.00",
        "5,00-": "-5.00",
        "7": "7.00",
    },
    **{"€ 1.234,5": "1234.50", "3,10 €": "3.10", "3,10- €": "-3.10"},
    **dict.fromkeys(["12.50", "1.23", "1,234", "-5,00", "1.2345", "1,2,3", "€", "(5,00)"]),
}
YEN = {
    **{
        "¥1,234": "1234.00",
        "(¥1,234)": "-1234.00",
        "(5.00)": "-5.00",
        "5.00": "5.00",
        "1,234.50": "1234.50",
        "¥12": "12.00",
    },
    **dict.fromkeys(["1,23", "-5", "(5", "5)", "¥", "1,2345", "0.0045"]),
}


@pytest.mark.parametrize("kind", ["csv", "json"])
@pytest.mark.parametrize(
    ("rule", "amounts"),
    [
        ("paid", PLAIN),
        ("{column: paid, decimal: '.'}", {"1.230": "1.23", "-1.500": "-1.50", "1.234": None, "12,50": None}),
        ("{column: paid, round: true, decimal: '.'}", {"1.234": "1.23", "0.0045": "0.00", "1.005": "1.01"}),
        ("{column: paid, decimal: ',', thousands: '.', symbol: '€', negative: trailing}", COMMA),
        ("{column: paid, thousands: ',', symbol: '¥', negative: parentheses}", YEN),
    ],
)
def test_money_is_what_its_text_says_or_unreadable(
    spark: SparkSession, tmp_path: Path, kind: str, rule: str, amounts: dict[str, str | None]
) -> None:
    texts = list(amounts)
    if kind == "csv":
        content = "".join(f'{n},2024-05-01,"{text}"\n' for n, text in enumerate(texts, start=1))
        content = f"who,at,paid\n{content}"
    else:
        content = "".join(
            json.dumps({"who": n, "at": "2024-05-01", "paid": text}) + "\n" for n, text in enumerate(texts, start=1)
        )
    source = source_of(
        tmp_path, ORDERS.replace("csv", kind).replace("amount: paid", f"amount: {rule}"), **{f"a__{kind}": content}
    )
    rows = {texts[int(row.user_id) - 1]: row for row in rows_of(spark, source)}
    assert {text: None if row.amount is None else str(row.amount) for text, row in rows.items()} == amounts
    assert {text: row.unreadable for text, row in rows.items()} == {
        text: None if value else {"amount": text} for text, value in amounts.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("amount: paid", "amout: paid"), r"unknown key transactions\.columns\.amout; did you mean amount\?"),
        (("amount: paid", "discount: paid"), r"transactions\.columns\.amount is missing"),
        (("transactions:", "transaction:"), r"unknown key transaction; did you mean transactions\?"),
        (("format: csv", "formt: csv"), r"unknown key transactions\.formt; did you mean format\?"),
        (("format: csv", "format: xls"), r"transactions\.format: .*'xls'"),
        (("ts: at", "ts: {column: at, unit: h}"), r"transactions\.columns\.ts\.unit"),
        (("ts: at", "ts: {column: at, unit: s, format: yyyy}"), "not both"),
        (("ts: at", "ts: {column: at, timezone: Asia/Bejing}"), r"ts\.timezone: .*time zone"),
        (("ts: at", "ts: {}"), "needs either column or value"),
        (("user_id: who", "user_id: {column: who, unit: s}"), r"unknown key transactions\.columns\.user_id\.unit"),
        (
            ("format: csv", "format: csv\n  options: {mode: DROPMALFORMED}"),
            r"options: .*mode can't be set.*no row may vanish",
        ),
        *(
            (("format: csv", f"format: {kind}\n  options: {{{option}}}"), f"{option.split(':')[0]} can't be set")
            for kind, option in [
                ("csv", "comment: '#'"),
                ("csv", "pathGlobFilter: '*.x'"),
                ("csv", "modifiedAfter: '2050-01-01'"),
                ("csv", "columnPruning: true"),
                ("csv", "unescapedQuoteHandling: SKIP_VALUE"),
                ("json", "allowComments: true"),
                ("parquet", "modifiedBefore: '2001-01-01'"),
                ("parquet", "ignoreCorruptFiles: true"),
                ("delta", "readChangeFeed: true"),
            ]
        ),
        (("format: csv", "format: csv\n  options: {multiLines: true}"), "did you mean multiLine"),
        (("amount: paid", "amount: {column: paid, decimal: '.', thousands: '.'}"), "two marks"),
        (("amount: paid", "amount: {column: paid, symbol: '-'}"), r"amount\.symbol"),
        (("amount: paid", "amount: {column: paid, desimal: ','}"), "did you mean decimal"),
        (("transactions:", "- transactions:"), "must be a mapping of tables, not a list"),
    ],
)
def test_mapping_errors_name_file_and_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        source_of(tmp_path, ORDERS.replace(*change))
    assert "shop.yaml" in str(caught.value)


def test_no_secret_of_a_store_stands_in_an_error(tmp_path: Path) -> None:
    options = "{fs.s3a.secret.key: hunter2, comment: x}"
    with pytest.raises(ConfigError, match="comment can't be set") as caught:
        source_of(tmp_path, ORDERS.replace("format: csv", f"format: csv\n  options: {options}"))
    assert "hunter2" not in str(caught.value)


def test_a_missing_mapping_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        FilesSource(tmp_path / "none.yaml")


def test_formats_and_units_are_checked_before_rows_are_read(spark: SparkSession, tmp_path: Path) -> None:
    wrong = ORDERS.replace("ts: at", "ts: {column: at, format: YYYY-MM-dd}")
    source = source_of(tmp_path, wrong, a__csv="who,at,paid\n1,2024-05-01,5\n")
    with pytest.raises(ConfigError, match=r"transactions\.columns\.ts\.format: 'YYYY-MM-dd'"):
        source.read(spark, source.deliveries(spark))
    pq.write_table(pa.table({"who": [1], "at": [1714550400], "paid": [1]}), tmp_path / "a.parquet")
    source = source_of(tmp_path, ORDERS.replace("csv", "parquet"))
    with pytest.raises(ConfigError, match=r"transactions\.columns\.ts: column at is a number"):
        source.read(spark, source.deliveries(spark))
