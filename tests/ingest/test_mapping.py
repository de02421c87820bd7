"""What a mapping can say of files: expressions, conditions, nested fields, arrays, paths, units, zones, totals of orders."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from bp_spark.core.errors import ConfigError, DataError
from bp_spark.ingest.sources.files import FilesSource
from tests.support.sources import rows_of, source_of, utc

ORDERS = """
transactions:
  path: "*.csv"
  format: csv
  columns: {user_id: who, ts: at, amount: paid}
"""
JSON_ORDERS = ORDERS.replace("csv", "json")


def money(rows: list[Any]) -> dict[str, str | None]:
    """Amount of each user."""
    return {row.user_id: None if row.amount is None else str(row.amount) for row in rows}


def left_out(spark: SparkSession, source: FilesSource) -> dict[str, int]:
    return {table: counts.left_out for table, counts in source.counts(spark, source.deliveries(spark)).items()}


def json_lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- expressions ---------------------------------------------------------------------------------------------------------

LINES = {
    "good": ("6", "2.55", "15.30"),
    "refund": ("-1", "2.5", "-2.50"),
    "noise": ("3", "0.1", "0.30"),
    "unpriced": ("2", "", None),
    "comma": ("2", "1,50", None),
    "word": ("two", "1.5", None),
    "missing": ("NaN", "1.5", None),
    "java": ("2d", "1.5", None),
    "surplus": ("1", "0.0045", None),
    "thousand": ("1000", "1.234", None),
    "infinite": ("1e25", "1e25", None),
}
"""User -> quantity, price and right amount."""


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_money_of_an_expression_is_right_or_unreadable(spark: SparkSession, tmp_path: Path, kind: str) -> None:
    mapping = ORDERS.replace("csv", kind).replace(
        "amount: paid",
        "amount: {expr: 'Quantity * `Unit Price`'}, discount: {expr: 'coalesce(`Unit Price` * 0.1, 0)', round: true}, "
        "quantity: {expr: abs(Quantity)}",
    )
    if kind == "csv":
        content = "who,at,Quantity,Unit Price\n"
        content += "".join(f'{user},2024-05-01,{quantity},"{price}"\n' for user, (quantity, price, _) in LINES.items())
    else:
        keys = ("who", "at", "Quantity", "Unit Price")
        content = json_lines(*(dict(zip(keys, (u, "2024-05-01", q, p), strict=True)) for u, (q, p, _) in LINES.items()))
    rows = rows_of(spark, source_of(tmp_path, mapping, **{f"a__{kind}": content}))
    assert money(rows) == {user: amount for user, (_, _, amount) in LINES.items()}
    of = {row.user_id: row for row in rows}
    assert of["good"].unreadable is None
    assert (of["good"].discount, of["refund"].quantity) == (Decimal("0.26"), 1.0)
    assert of["comma"].unreadable == {"amount": "2 | 1,50", "discount": "1,50"}
    assert of["word"].unreadable == {"amount": "two | 1.5", "quantity": "two"}
    # the expression gives none where the price is blank, and the price is what an amount needs
    assert of["unpriced"].unreadable == {"amount": "2"}
    assert of["unpriced"].discount == 0
    assert all(row.unreadable for row in rows if row.amount is None)


def test_marks_of_money_are_those_of_the_texts_that_an_expression_reads(spark: SparkSession, tmp_path: Path) -> None:
    mapping = ORDERS.replace(
        "amount: paid",
        "amount: {expr: \"if(kind = 'refund', -paid, paid)\", decimal: ',', thousands: '.', symbol: '€'}",
    )
    lines = ['a,sale,"€ 1.234,50"', 'b,refund,"1.234,5"', 'c,refund,"1.234"', "d,sale,12.5", 'e,refund,"x"']
    text = "who,kind,paid,at\n" + "".join(f"{line},2024-05-01\n" for line in lines)
    rows = rows_of(spark, source_of(tmp_path, mapping, a__csv=text))
    assert money(rows) == {"a": "1234.50", "b": "-1234.50", "c": "-1234.00", "d": None, "e": None}


def test_any_column_may_be_an_expression(spark: SparkSession, tmp_path: Path) -> None:
    columns = {
        "user_id": "{expr: \"coalesce(nullif(member, 'guest'), email)\", lower: true}",
        "order_id": "{expr: \"concat(shop, '-', number)\"}",
        "ts": "{expr: \"concat(day, ' ', time)\", timezone: Asia/Shanghai}",
        "amount": "{expr: cents / 100}",
        "currency": "{expr: \"CASE country WHEN 'CN' THEN 'CNY' WHEN 'DE' THEN 'EUR' END\", values: {EUR: USD}}",
        "item_id": "{expr: sku}",
    }
    mapping = ORDERS.replace(
        "{user_id: who, ts: at, amount: paid}",
        "{" + ", ".join(f"{name}: {rule}" for name, rule in columns.items()) + "}",
    )
    header = "member,email,shop,number,day,time,cents,country,sku"
    lines = [
        "M1,a@b.c,s1,17,2024-05-01,08:30:00,1999,CN,7.0",
        "guest,A@b.c,s1,18,2024-05-01,soon,5,DE,x",
        "M2,,s1,,2024-05-01,09:00:00,x,FR,",
    ]
    rows = rows_of(spark, source_of(tmp_path, mapping, a__csv="\n".join([header, *lines])))
    one, two, three = (next(row for row in rows if row.user_id == user) for user in ("m1", "a@b.c", "m2"))
    assert (one.order_id, one.ts, one.amount) == ("s1-17", utc(2024, 5, 1, 0, 30), Decimal("19.99"))
    assert (one.currency, one.item_id, one.unreadable) == ("CNY", "7", None)
    assert (two.currency, two.amount, two.unreadable) == ("USD", Decimal("0.05"), {"ts": "2024-05-01 soon"})
    assert (three.order_id, three.currency, three.unreadable) == (None, None, {"amount": "x"})


def test_products_of_whole_numbers_do_not_wrap_around(spark: SparkSession, tmp_path: Path) -> None:
    mapping = ORDERS.replace("csv", "parquet").replace("amount: paid", "amount: {expr: count * price}")
    table = {"who": ["a", "b"], "at": ["2024-05-01"] * 2, "count": pa.array([3_000_000, None], pa.int32())}
    pq.write_table(pa.table({**table, "price": pa.array([1_000, 5], pa.int32())}), tmp_path / "a.parquet")
    a, b = rows_of(spark, source_of(tmp_path, mapping))
    assert (a.amount, b.amount, b.unreadable) == (Decimal(3_000_000_000), None, {"amount": "5"})


# --- where ---------------------------------------------------------------------------------------------------------------


def test_one_log_feeds_several_tables_and_no_torn_line_is_lost(spark: SparkSession, tmp_path: Path) -> None:
    mapping = ORDERS.replace("path:", "where: \"event = 'purchase' AND price > 0\"\n  path:").replace("paid", "price")
    mapping += """
behaviours:
  path: "*.csv"
  format: csv
  where: "event IN ('view', 'cart')"
  columns: {user_id: who, ts: at, action: {column: event, values: {view: browse}}}
"""
    lines = [
        "a,2024-05-01,view,free",
        "b,2024-05-01,cart,",
        "c,2024-05-01,purchase,12.50",
        "d,2024-05-01,purchase,12x",
        "e,2024-05-01,purchase,0",
        "f,2024-05-01,purchase,",
        "g,2024-05-01,,5",
        "h,2024-05-01,purchase",
    ]
    source = source_of(tmp_path, mapping, a__csv="\n".join(["who,at,event,price", *lines]))
    rows = rows_of(spark, source)
    assert money(rows) == {"c": "12.50", "d": None, None: None}
    assert {row.user_id: row.unreadable for row in rows if row.unreadable} == {
        "d": {"amount": "12x", "where": "purchase | 12x"},
        None: {"row": lines[-1]},
    }
    behaviours = rows_of(spark, source, "raw_behaviours")
    assert {row.user_id: row.action for row in behaviours} == {"a": "browse", "b": "cart", None: None}
    assert left_out(spark, source) == {"raw_transactions": 5, "raw_behaviours": 5}


@pytest.mark.parametrize(
    ("where", "users"),
    [
        ("status NOT IN ('cancelled', 'voided')", "ad"),
        ("coalesce(status, '') NOT IN ('cancelled', 'voided')", "acd"),
        ("number NOT LIKE 'C%' AND `is test` IS NOT TRUE", "ac"),
        ("qty BETWEEN 10 AND 20 OR status = 'paid'", "ad"),
    ],
)
def test_where_is_that_of_sql(spark: SparkSession, tmp_path: Path, where: str, users: str) -> None:
    mapping = ORDERS.replace("path:", f"where: {json.dumps(where)}\n  path:")
    lines = ["a,paid,10,1,false", "b,cancelled,9,C2,false", "c,,2.5,3,", "d,open,11.0,4,true"]
    text = "who,status,qty,number,is test,at,paid\n" + "".join(f"{line},2024-05-01,1\n" for line in lines)
    assert "".join(sorted(money(rows_of(spark, source_of(tmp_path, mapping, a__csv=text))))) == users


# --- nested columns, arrays, paths ---------------------------------------------------------------------------------------


def test_fields_of_json_objects(spark: SparkSession, tmp_path: Path) -> None:
    mapping = JSON_ORDERS.replace("who", "customer.id").replace("paid", "total.price.amount")
    mapping = mapping.replace("amount: total", "item_id: customer, order_id: shop.order, amount: total")
    rows = [
        {"customer": {"id": 12345678901234567890}, "total": {"price": {"amount": "7.50"}}},
        {"customer.id": "flat", "customer": {"id": "nested"}, "total": {"price": {"amount": 2}}, "shop": {"order": 5}},
        {"customer": "guest", "total": {"price": 3}},
        {"customer": None, "total": [{"price": {"amount": 4}}]},
    ]
    text = json_lines(*({**row, "at": "2024-05-01"} for row in rows))
    found = rows_of(spark, source_of(tmp_path, mapping, a__json=text))
    assert {(row.user_id, row.amount, row.order_id) for row in found if row.user_id} == {
        ("flat", Decimal(2), "5"),
        ("12345678901234567890", Decimal("7.50"), None),
    }
    assert len(found) == len(rows)
    assert {row.item_id for row in found} == {'{"id":12345678901234567890}', '{"id":"nested"}', "guest", None}


def test_fields_of_parquet_and_a_flat_name_that_wins(spark: SparkSession, tmp_path: Path) -> None:
    mapping = ORDERS.replace("csv", "parquet").replace("who", "customer.id").replace("paid", "total.gross.value")
    customers = [{"id": 7.0}, {"id": 8.0}, None]
    totals = [{"gross": {"value": 1.5}}, {"gross": None}, {"gross": {"value": 2.0}}]
    table = {"customer": customers, "total": totals, "at": [datetime(2024, 5, 1, tzinfo=UTC)] * 3}
    pq.write_table(pa.table({key: pa.array(values) for key, values in table.items()}), tmp_path / "a.parquet")
    flat = {"customer": customers, "total": totals, "at": table["at"], "customer.id": ["x", "y", "z"]}
    pq.write_table(pa.table({key: pa.array(values) for key, values in flat.items()}), tmp_path / "b.parquet")
    rows = rows_of(spark, source_of(tmp_path, mapping))
    assert {(row.delivery, row.user_id): row.amount for row in rows} == {
        ("a.parquet", "7"): Decimal("1.50"),
        ("a.parquet", "8"): None,
        ("a.parquet", None): Decimal(2),
        ("b.parquet", "x"): Decimal("1.50"),
        ("b.parquet", "y"): None,
        ("b.parquet", "z"): Decimal(2),
    }
    with pytest.raises(DataError, match=r"total\.gross\.net: column is missing.*'customer\.id'"):
        rows_of(spark, source_of(tmp_path, mapping.replace("gross.value", "gross.net")))


ITEMS = """
transactions:
  path: "*.KIND"
  format: KIND
  explode: order.items
  where: "order.items.price <> 0"
  columns:
    user_id: customer
    order_id: order.id
    ts: at
    item_id: order.items.sku
    amount: {expr: "order.items.price * order.items.qty"}
"""


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_each_element_of_an_array_is_a_row(spark: SparkSession, tmp_path: Path, kind: str) -> None:
    def order(number: int, items: Any) -> dict[str, Any]:
        return {"customer": f"u{number}", "at": "2024-05-01", "order": {"id": number, "items": items}}

    def item(sku: str, price: float, qty: int) -> dict[str, Any]:
        return {"sku": sku, "price": price, "qty": qty}

    orders = [order(1, [item("a", 2.5, 2), item("b", 1.1, 3), item("free", 0, 1)]), order(2, []), order(3, None)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(orders), tmp_path / "a.parquet")
    else:
        orders.append({"customer": "u5", "at": "2024-05-01", "order": {"id": 5, "items": "none"}})
        (tmp_path / "a.json").write_text(json_lines(*orders) + '{"customer": "u6", "at\n')
    source = source_of(tmp_path, ITEMS.replace("KIND", kind))
    rows = rows_of(spark, source)
    whole = [(row.user_id, row.order_id, row.item_id, str(row.amount)) for row in rows if not row.unreadable]
    assert sorted(whole) == [("u1", "1", "a", "5.00"), ("u1", "1", "b", "3.30")]
    unreadable = {row.user_id: row.unreadable for row in rows if row.unreadable}
    assert unreadable == (
        {} if kind == "parquet" else {None: {"row": '{"customer": "u6", "at'}, "u5": unreadable["u5"]}
    )
    assert kind == "parquet" or unreadable["u5"]["explode"] == "<4 characters>"
    assert left_out(spark, source) == {"raw_transactions": 3}


def test_what_is_no_array_is_named(spark: SparkSession, tmp_path: Path) -> None:
    row = {"customer": "u", "at": "2024-05-01", "order": {"id": 1, "items": [{"sku": "a", "price": 1.0, "qty": 1}]}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    mapping = ITEMS.replace("KIND", "parquet")
    with pytest.raises(DataError, match=r"a\.parquet\.order: column can't be exploded: it is no array"):
        rows_of(spark, source_of(tmp_path, mapping.replace("explode: order.items", "explode: order")))


def test_names_in_a_path_are_columns_where_the_file_has_none(spark: SparkSession, tmp_path: Path) -> None:
    for kind in ("csv", "json"):
        for folder in (
            "day=2024-05-01/shop=a b%2Fc+d",
            "day=2024-05-02/shop=__HIVE_DEFAULT_PARTITION__",
            "day=2024-05-03",
        ):
            (tmp_path / kind / folder).mkdir(parents=True)
    own, other = "who,paid,shop\nx,1,own\n", "who,paid\ny,2\n"
    (tmp_path / "csv/day=2024-05-01/shop=a b%2Fc+d/1.csv").write_text(own)
    (tmp_path / "csv/day=2024-05-01/shop=a b%2Fc+d/2.csv").write_text(other)
    (tmp_path / "csv/day=2024-05-02/shop=__HIVE_DEFAULT_PARTITION__/3.csv").write_text(other)
    (tmp_path / "json/day=2024-05-01/shop=a b%2Fc+d/1.json").write_text('{"who": "x", "shop": "own"}\n{"who": "y"}\n')
    mapping = ORDERS.replace('"*.csv"', "csv").replace("ts: at", "ts: day, order_id: {expr: upper(shop)}")
    rows = rows_of(spark, source_of(tmp_path, mapping))
    first, second = utc(2024, 5, 1), utc(2024, 5, 2)
    assert sorted((row.user_id, row.ts, row.order_id) for row in rows if row.order_id) == [
        ("x", first, "OWN"),
        ("y", first, "A B/C+D"),
    ]
    assert [(row.user_id, row.ts) for row in rows if not row.order_id] == [("y", second)]
    rows = rows_of(spark, source_of(tmp_path, mapping.replace("csv", "json")))
    assert sorted((row.user_id, row.ts, row.order_id) for row in rows) == [("x", first, "OWN"), ("y", first, "A B/C+D")]
    (tmp_path / "csv/day=2024-05-03/4.csv").write_text(other)
    with pytest.raises(DataError, match=r"4\.csv\.shop: column is missing"):
        rows_of(spark, source_of(tmp_path, mapping))


@pytest.mark.parametrize("multi_line", ["true", "false"])
def test_lines_before_the_header_are_no_rows(spark: SparkSession, tmp_path: Path, multi_line: str) -> None:
    options = f"{{sep: ';', multiLine: {multi_line}}}"
    mapping = ORDERS.replace("format: csv", f"format: csv\n  skip_lines: 3\n  options: {options}")
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbfReport of May\r\n\r\n;;\r\nwho;"at";paid\r\nu1;2024-05-01;5\r\nu2;x\r\n'
    )
    (tmp_path / "b.csv").write_text('Report of June\nby shop\n\nwho;"at";paid\nu3;2024-06-01;6\nReport of June\n')
    (tmp_path / "c.csv").write_text("a\nb\nc\npaid;who;at\n7;u4;2024-07-01\n")
    (tmp_path / "d.csv").write_text("Report of July\nempty\n")
    rows = rows_of(spark, source_of(tmp_path, mapping))
    assert money(rows) == {"u1": "5.00", "u3": "6.00", "u4": "7.00", None: None}
    assert [row.unreadable for row in rows if row.unreadable] == [{"row": "u2;x"}]


# --- money, times, orders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_cents_are_scaled(spark: SparkSession, tmp_path: Path, kind: str) -> None:
    mapping = ORDERS.replace("csv", kind).replace("amount: paid", "amount: {column: paid, scale: 0.01}")
    cents = {"1999": "19.99", "-5": "-0.05", "100": "1.00", "0": "0.00", "1234567890123456": "12345678901234.56"}
    cents |= {"7.0": "0.07", "7.5": None, "12x": None, "1.234": None}
    content = json_lines(*({"who": text, "at": "2024-05-01", "paid": text} for text in cents))
    if kind == "csv":
        content = "who,at,paid\n" + "".join(f"u{text},2024-05-01,{text}\n" for text in cents)
    rows = rows_of(
        spark,
        source_of(
            tmp_path,
            mapping.replace("who", "{expr: \"concat('u', who)\"}") if kind == "json" else mapping,
            **{f"a__{kind}": content},
        ),
    )
    assert money(rows) == {f"u{text}": amount for text, amount in cents.items()}


TIMES: dict[str, dict[str, tuple[int, ...] | None]] = {
    "{column: at, unit: ns}": {"1714554600123456789": (2024, 5, 1, 9, 10), "x": None},
    "{column: at, unit: excel_days, timezone: Asia/Shanghai}": {
        "45413.354166666664": (2024, 5, 1, 0, 30),
        "45413": (2024, 4, 30, 16),
        "60": None,
        "1e9": None,
        "2024-05-01": None,
    },
    "{column: at, timezone: Asia/Shanghai}": {
        "2024-05-01t10:00:00z": (2024, 5, 1, 10),
        "2024-05-01t10:00:00": (2024, 5, 1, 2),
        "2024-05-01 10:00 z": (2024, 5, 1, 10),
        "2024-05-01T10:00:00+02:00[Europe/Berlin]": (2024, 5, 1, 8),
        "2024-05-01T10:00[Europe/Berlin]": (2024, 5, 1, 8),
        "2024-05-01 10:00 Europe/Berlin": (2024, 5, 1, 8),
        "2024-05-01T08:00:00Z[UTC]": (2024, 5, 1, 8),
        "2024-05-01 10:00 UTC+2": (2024, 5, 1, 8),
        "2024-05-01 10:00:00 +0200": (2024, 5, 1, 8),
        **dict.fromkeys(
            [f"2024-05-01 10:00 {name}" for name in ("IST", "EST", "CST", "BST", "PRC", "Nowhere/At_All", "PM")]
        ),
        "2024-05-01T10:00[IST]": None,
    },
    "{column: at, zones: {IST: Asia/Kolkata, CST: '+08:00'}}": {
        "2024-05-01 10:00 IST": (2024, 5, 1, 4, 30),
        "2024-05-01T10:00[IST]": (2024, 5, 1, 4, 30),
        "2024-05-01 10:00:00 CST": (2024, 5, 1, 2),
        "2024-05-01 10:00 EST": None,
    },
    "{column: at, format: 'dd/MM/yyyy HH:mm z'}": {
        "01/05/2024 10:00 Asia/Kolkata": (2024, 5, 1, 4, 30),
        "01/05/2024 10:00 UTC": (2024, 5, 1, 10),
        "01/05/2024 10:00 IST": None,
        "01/05/2024 10:00 EST": None,
    },
    '{column: at, format: "dd/MM/yyyy HH:mm z", zones: {IST: Asia/Kolkata, EST: America/New_York}}': {
        "01/05/2024 10:00 IST": (2024, 5, 1, 4, 30),
        "01/05/2024 10:00 EST": (2024, 5, 1, 14),
        "01/05/2024 10:00 PST": None,
    },
}
"""Rule -> text -> the instant that it means."""


@pytest.mark.parametrize("rule", TIMES)
def test_a_time_is_the_one_that_its_text_means_or_unreadable(spark: SparkSession, tmp_path: Path, rule: str) -> None:
    mapping = JSON_ORDERS.replace("ts: at", f"ts: {rule}")
    text = json_lines(*({"who": f"u{n}", "at": at, "paid": 1} for n, at in enumerate(TIMES[rule])))
    rows = {row.user_id: row for row in rows_of(spark, source_of(tmp_path, mapping, a__json=text))}
    for number, (at, parts) in enumerate(TIMES[rule].items()):
        row = rows[f"u{number}"]
        seconds = None if row.ts is None else row.ts // 60_000_000 * 60
        right = None if parts is None else utc(*parts) // 60_000_000 * 60
        assert (at, seconds) == (at, right)
        assert row.unreadable == (None if parts else {"ts": at})


def test_a_total_on_each_line_is_shared_so_that_cents_sum(spark: SparkSession, tmp_path: Path) -> None:
    mapping = ORDERS.replace("path:", "per_order: [amount, discount]\n  path:").replace(
        "paid}", "paid, discount: less, order_id: number, item_id: sku}"
    )
    lines = [
        *(f"u1,1,{sku},10.00,1.00" for sku in "cab"),
        *(f"u2,1,{sku},-0.05," for sku in "ab"),
        "u3,2,a,7.77,0",
        "u4,3,a,5.00,1",
        "u4,3,b,6.00,1",
        "u5,4,a,x,",
        "u5,4,b,5.00,",
        "u6,5,a,9.00,",
        "u6,5,b,,",
        "u7,,a,3.00,",
        "u8,6,a,,",
        "u9,7",
    ]
    header = "who,number,sku,paid,less,at\n"
    text = header + "".join(f"{line},2024-05-01\n" if line != "u9,7" else f"{line}\n" for line in lines)
    source = source_of(tmp_path, mapping, a__csv=text, b__csv=header + "u1,1,a,10.00,1.00,2024-05-01\n")
    rows = rows_of(spark, source)
    assert len(rows) == len(lines) + 1
    shares = {
        (row.delivery, row.user_id, row.item_id): (str(row.amount), None if row.discount is None else str(row.discount))
        for row in rows
        if row.unreadable is None
    }
    assert shares == {
        ("a.csv", "u1", "a"): ("3.34", "0.34"),
        ("a.csv", "u1", "b"): ("3.33", "0.33"),
        ("a.csv", "u1", "c"): ("3.33", "0.33"),
        ("a.csv", "u2", "a"): ("-0.03", None),
        ("a.csv", "u2", "b"): ("-0.02", None),
        ("a.csv", "u3", "a"): ("7.77", "0.00"),
        ("a.csv", "u6", "a"): ("4.50", None),
        ("a.csv", "u6", "b"): ("4.50", None),
        ("a.csv", "u8", "a"): ("None", None),
        ("b.csv", "u1", "a"): ("10.00", "1.00"),
    }
    unreadable = {(row.user_id, row.item_id): row.unreadable for row in rows if row.unreadable}
    assert unreadable == {
        ("u4", "a"): {"amount": "5.00"},
        ("u4", "b"): {"amount": "6.00"},
        ("u5", "a"): {"amount": "x"},
        ("u5", "b"): {"amount": "5.00"},
        ("u7", "a"): {"amount": "3.00"},
        (None, None): {"row": "u9,7"},
    }
    assert all(row.amount is None for row in rows if row.unreadable)


# --- mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("amount: paid", "amount: {expr: rand()}"),
            r"transactions\.columns\.amount\.expr: .*rand gives another value",
        ),
        (("amount: paid", "amount: {expr: a, column: b}"), "needs either column or value or expr"),
        (("path:", "where: paid * 2\n  path:"), r"transactions\.where: .*must be a condition"),
        (("path:", "where: (SELECT 1)\n  path:"), r"transactions\.where: .*has a query"),
        (("path:", "explode: items\n  path:"), "a CSV file has no arrays"),
        (("path:", "skip_lines: -1\n  path:"), r"transactions\.skip_lines"),
        (("format: csv", "format: json\n  skip_lines: 2"), "skip_lines is of CSV files"),
        (("path:", "per_order: [amount]\n  path:"), r"per_order needs columns\.order_id"),
        (("path:", "per_order: [quantity]\n  path:"), r"per_order\.0"),
        (("amount: paid", "amount: {column: paid, scale: -1}"), r"amount\.scale"),
        (("ts: at", "ts: {column: at, zones: {IST: India}}"), "time zone"),
        (("ts: at", "ts: {column: at, unit: days}"), r"ts\.unit"),
    ],
)
def test_mistakes_name_file_and_key_before_spark_starts(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        source_of(tmp_path, ORDERS.replace(*change))
    assert "shop.yaml" in str(caught.value)


def test_columns_of_expressions_must_exist(spark: SparkSession, tmp_path: Path) -> None:
    text = "who,at,Quantity,UnitPrice\nu,2024-05-01,1,2\n"
    mapping = ORDERS.replace("amount: paid", "amount: {expr: quantity * UnitPrice}")
    with pytest.raises(DataError, match=r"a\.csv\.quantity: column is missing.*did you mean 'Quantity'\?"):
        rows_of(spark, source_of(tmp_path, mapping, a__csv=text))
    mapping = ORDERS.replace("paid", "Quantity").replace("path:", "where: \"who RLIKE '('\"\n  path:")
    with pytest.raises(ConfigError, match=r"transactions\.where: '\(' is no pattern"):
        rows_of(spark, source_of(tmp_path, mapping, a__csv=text))


def test_no_secret_of_a_store_stands_in_an_error_about_a_table(tmp_path: Path) -> None:
    mapping = ORDERS.replace("format: csv", "format: csv\n  explode: items\n  options: {fs.s3a.secret.key: hunter2}")
    with pytest.raises(ConfigError, match="no arrays") as caught:
        source_of(tmp_path, mapping)
    assert "hunter2" not in str(caught.value)


def test_a_plain_mapping_needs_no_further_column(spark: SparkSession, tmp_path: Path) -> None:
    source = source_of(tmp_path, ORDERS, a__csv="who,at,paid\nu,2024-05-01,1\n")
    assert isinstance(source, FilesSource)
    assert left_out(spark, source) == {"raw_transactions": 0}
