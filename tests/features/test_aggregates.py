"""Aggregates of a user's days: which days each sums, and that batches and other users change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bp_spark.features.aggregates import (
    INTERPURCHASE_TIMES,
    SEQUENCE_COLUMNS,
    Aggregate,
    Decayed,
    Largest,
    Newest,
    Oldest,
    Total,
    aggregate_batches,
)
from bp_spark.lakehouse.tables import USER_DAILY

AS_OF = date(2024, 3, 10)
LENGTH = 3
TOKEN = pa.struct(
    {
        "ts": pa.timestamp("us", tz="UTC"),
        **{name: pa.int64() for name in ("kind", "amount", "items", "discount", "text_id")},
    }
)
TYPES: dict[str, pa.DataType] = {
    "bigint": pa.int64(),
    "decimal(18,2)": pa.decimal128(18, 2),
    "string": pa.string(),
    "date": pa.date32(),
}
AGGREGATES: dict[str, Aggregate] = {
    "spend": Total("spend"),
    "spend_in_30": Total("spend", 30),
    "spend_second_week": Total("spend", oldest=14, newest=8),
    "saturdays": Total("paid_saturday", 365),
    "decayed": Decayed("spend", 30),
    "largest_in_30": Largest("order_value_max", 30),
    "recency": Newest("orders"),
    "tenure": Oldest("orders"),
    "active": Newest("activity"),
}


def user_days(*days: dict[str, Any]) -> pa.Table:
    """Rows of USER_DAILY, in the order of users and days: ``user``, ``age`` before AS_OF, and what is not 0."""
    rows = []
    for day in sorted(days, key=lambda day: (day["user"], -day["age"])):
        when = AS_OF - timedelta(days=day["age"])
        row: dict[str, Any] = {column.name: 0 for column in USER_DAILY.columns if column.type == "bigint"}
        row |= {column.name: Decimal(0) for column in USER_DAILY.columns if column.type.startswith("decimal")}
        row |= {"user_key": day["user"], "day": when}
        row |= {name: value for name, value in day.items() if name not in ("user", "age", "texts")}
        noon = datetime(when.year, when.month, when.day, 12)
        row["tokens"] = [
            {"ts": noon, "kind": 1, "amount": 250, "items": 2, "discount": 50, "text_id": text}
            for text in day.get("texts", [])
        ]
        rows.append(row)
    columns = [column for column in USER_DAILY.columns if column.name != "categories"]
    schema = pa.schema([(c.name, pa.list_(TOKEN) if c.name == "tokens" else TYPES[c.type]) for c in columns])
    return pa.Table.from_pylist(rows, schema)


def aggregated(
    days: pa.Table,
    as_of: Sequence[date] = (AS_OF,),
    *,
    rows_in_batch: int = 1_000,
    rows_at_once: int = 100_000,
    precision_bits: int | None = None,
) -> dict[tuple[str, date], dict[str, Any]]:
    """Rows of :func:`aggregate_batches` by user and date."""
    lists = {"array<int>": pa.int32(), "array<float>": pa.float32(), "array<bigint>": pa.int64()}
    schema = pa.schema(
        [
            ("user_key", pa.string()),
            ("as_of_date", pa.date32()),
            ("seen_on", pa.date32()),
            *((name, pa.int64()) for name in AGGREGATES),
            *((name, pa.float64()) for name in INTERPURCHASE_TIMES),
            *((column.name, pa.list_(lists[column.type])) for column in SEQUENCE_COLUMNS),
        ]
    )
    batches = days.to_batches(max_chunksize=rows_in_batch)
    result = aggregate_batches(batches, as_of, AGGREGATES, schema, precision_bits, LENGTH, rows_at_once)
    rows = [row for batch in result for row in batch.to_pylist()]
    keyed = {(row["user_key"], row["as_of_date"]): row for row in rows}
    assert len(keyed) == len(rows)
    return keyed


def test_each_aggregate_sees_its_days_and_no_others() -> None:
    row = aggregated(
        user_days(
            # a Saturday, a Sunday
            {"user": "u", "age": 8, "orders": 1, "spend": Decimal("10.25"), "order_value_max": Decimal("10.25")},
            {"user": "u", "age": 14, "spend": Decimal("-0.25")},
            {"user": "u", "age": 31, "orders": 1, "spend": Decimal("5.00"), "order_value_max": Decimal("90.00")},
            {"user": "u", "age": 2, "searches": 1},
            {"user": "u", "age": 0, "orders": 1, "spend": Decimal("99.00")},
        )
    )["u", AS_OF]
    assert {name: row[name] for name in AGGREGATES} == {
        "spend": 1500,
        "spend_in_30": 1000,
        "spend_second_week": 1000,
        "saturdays": 1025,
        "decayed": round(1_025_000 * 0.5 ** (8 / 30))
        - round(25_000 * 0.5 ** (14 / 30))
        + round(500_000 * 0.5 ** (31 / 30)),
        "largest_in_30": 1025,
        "recency": 8,
        "tenure": 31,
        "active": 2,
    }


def test_aggregates_without_a_day_are_null() -> None:
    row = aggregated(user_days({"user": "u", "age": 40, "orders": 1}))["u", AS_OF]
    assert row["largest_in_30"] is row["active"] is None
    assert row["spend_in_30"] == 0
    assert {name: row[name] for name in INTERPURCHASE_TIMES} == {**dict.fromkeys(INTERPURCHASE_TIMES), "p_std": 0}
    assert [row[column.name] for column in SEQUENCE_COLUMNS] == [[]] * len(SEQUENCE_COLUMNS)


def test_interpurchase_times_lie_between_purchase_days() -> None:
    ages = [90, 80, 50, 49, 4]
    days = [{"user": "u", "age": age, "orders": 1} for age in ages]
    by_user = aggregated(
        user_days(*days, {"user": "u", "age": 60, "searches": 1}, {"user": "v", "age": 7, "orders": 1})
    )
    gaps = [10, 30, 1, 45]
    expected = (np.mean(gaps), np.std(gaps), np.median(gaps), 45, 45)
    assert [by_user["u", AS_OF][name] for name in INTERPURCHASE_TIMES] == pytest.approx(expected)
    assert by_user["v", AS_OF]["p_mean"] is None


def test_a_history_is_the_newest_tokens_of_the_days_before() -> None:
    days = user_days(
        {"user": "u", "age": 9, "orders": 1, "texts": [1, 2]},
        {"user": "u", "age": 3, "texts": [3, 4]},
        {"user": "u", "age": 0, "texts": [5]},
        {"user": "v", "age": 1, "orders": 1, "texts": [6]},
    )
    by_user = aggregated(days)
    history = by_user["u", AS_OF]
    assert history["seq_text_id"] == [2, 3, 4]
    assert history["seq_age_days"] == [8.5, 2.5, 2.5]
    assert (history["seq_amount"][0], history["seq_items"][0], history["seq_discount"][0]) == (2.5, 2.0, 0.5)
    assert (history["seq_weekday"], history["seq_hour"]) == ([5, 4, 4], [12, 12, 12])
    assert by_user["v", AS_OF]["seq_text_id"] == [6]
    later = AS_OF + timedelta(days=1)
    assert aggregated(days, [later])["u", later]["seq_text_id"] == [3, 4, 5]


def test_only_users_with_a_purchase_before_the_date_have_a_row() -> None:
    days = user_days(
        {"user": "a", "age": 5, "searches": 1},
        {"user": "b", "age": 0, "orders": 1},
        {"user": "c", "age": 5, "orders": 1},
        {"user": "d", "age": 5, "spend": Decimal(-1), "refunds": Decimal(1)},
    )
    assert list(aggregated(days)) == [("c", AS_OF)]
    assert aggregated(days.slice(0, 2)) == aggregated(days.slice(0, 0)) == {}


@st.composite
def histories(draw: st.DrawFn) -> pa.Table:
    ages = st.dictionaries(st.integers(-3, 400), st.integers(-500, 900), min_size=1, max_size=12)
    drawn = draw(st.dictionaries(st.sampled_from("abcdef"), ages, min_size=1))
    return user_days(
        *(
            {
                "user": user,
                "age": age,
                "orders": int(cents > 0),
                "spend": Decimal(cents) / 100,
                "texts": list(range(abs(cents) % 3)),
            }
            for user, days in drawn.items()
            for age, cents in days.items()
        )
    )


@settings(max_examples=60, deadline=None)
@given(days=histories(), rows_in_batch=st.integers(1, 9), rows_at_once=st.integers(1, 20))
def test_wherever_batches_end_and_whoever_is_with_them_users_are_the_same(
    days: pa.Table, rows_in_batch: int, rows_at_once: int
) -> None:
    dates = [AS_OF - timedelta(days=30), AS_OF]
    at_once = aggregated(days, dates, precision_bits=4)
    assert aggregated(days, dates, precision_bits=4, rows_in_batch=rows_in_batch, rows_at_once=rows_at_once) == at_once
    users = set(days["user_key"].to_pylist())
    of_each = (days.filter(pa.compute.equal(days["user_key"], user)) for user in users)
    assert {key: row for alone in of_each for key, row in aggregated(alone, dates, precision_bits=4).items()} == at_once


@settings(max_examples=60, deadline=None)
@given(days=histories())
def test_days_from_the_date_on_change_nothing(days: pa.Table) -> None:
    before = days.filter(pa.compute.less(days["day"], pa.scalar(AS_OF, pa.date32())))
    assert aggregated(days, precision_bits=4) == aggregated(before, precision_bits=4)
