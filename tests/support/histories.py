"""Random small histories of users, shared by the tests of cleaning, features and the pipeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructField

from bp_spark.ingest.pseudonyms import Secret
from bp_spark.ingest.sources.contract import in_contract
from bp_spark.lakehouse.schema import Table
from bp_spark.lakehouse.tables import EVENTS, RAW_TABLES, TEXT_EMBEDDINGS, TEXTS

SECRET = Secret(b"the-secret-of-the-tests-0123456789abcdef")
"""What conftest.py puts into the environment."""
RAW = {table.name: table for table in RAW_TABLES}

AS_OF = date(2024, 3, 10)
CATEGORIES = ("Food > Dairy > Milk", "Food > Fruit > Apples", "Home > Garden > Tools", "Home > Textiles")
WRITTEN_TEXTS = """
searches:
  path: "searches/*.json"
  format: json
  columns: {user_id: user, ts: time, query: query}
reviews:
  path: "reviews/*.json"
  format: json
  columns: {user_id: user, ts: time, item_id: item, rating: stars, text: text}
"""
"""Of a mapping: searches and reviews as :func:`write_night` delivers them."""
KINDS = ("browse", "click", "cart", "favourite", "coupon", "search", "review")


def clock_at(moment: datetime) -> type[datetime]:
    """A ``datetime`` for which it is always that moment."""

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return moment

    return Stopped


def random_events(seed: int, users: int = 12, days: int = 120, around: date = AS_OF) -> pd.DataFrame:
    """EVENTS of some users in the ``days`` before and the 30 days after ``around``, some at its very midnight."""
    rng = np.random.default_rng(seed)
    rows = []
    midnight = datetime(around.year, around.month, around.day, tzinfo=UTC)
    for user in range(users):
        for _ in range(int(rng.integers(1, 40))):
            offset = timedelta(microseconds=int(rng.integers(-days * 86_400_000_000, 30 * 86_400_000_000)))
            if rng.random() < 0.1:
                offset = timedelta(microseconds=int(rng.choice([-1, 0, 1])))
            ts = midnight + offset
            kind = "purchase" if rng.random() < 0.6 else str(rng.choice(KINDS))
            purchase = kind == "purchase"
            amount = round(float(rng.lognormal(3, 1)), 2) * (-1 if rng.random() < 0.1 else 1)
            rows.append(
                {
                    "event_id": f"e{len(rows)}",
                    "user_key": f"user{user}",
                    "ts": ts,
                    "event_date": ts.date(),
                    "kind": kind,
                    "order_id": f"o{user}-{rng.integers(0, 20)}" if purchase else None,
                    "item_id": f"i{rng.integers(0, 6)}" if rng.random() < 0.9 else None,
                    "category": str(rng.choice(CATEGORIES)) if rng.random() < 0.9 else None,
                    "text_id": int(rng.integers(1, 9)) if rng.random() < 0.8 else None,
                    "amount": amount if purchase else None,
                    "quantity": float(rng.integers(0, 5)) if purchase else None,
                    "discount": round(float(rng.random()), 2) if purchase and rng.random() < 0.5 else None,
                    "coupon_discount": 0.1 if purchase and rng.random() < 0.2 else None,
                    "cost": None,
                    "rating": float(rng.integers(1, 6)) if kind == "review" else None,
                    "dwell_s": float(rng.random() * 100) if kind == "browse" and rng.random() < 0.7 else None,
                    "ingest_id": 1,
                }
            )
    return pd.DataFrame(rows)


def events_frame(spark: SparkSession, rows: pd.DataFrame) -> DataFrame:
    """Rows of :func:`random_events` as EVENTS."""
    records = [{name: _native(value) for name, value in row.items()} for row in rows.to_dict("records")]
    types = {field.name: field.dataType.simpleString() for field in EVENTS.schema.fields}
    loose = ", ".join(f"`{n}` {'double' if t.startswith('decimal') else t}" for n, t in types.items())
    for row in records:
        row["text_id"] = None if row["text_id"] is None else int(row["text_id"])
    df = spark.createDataFrame([tuple(row[name] for name in types) for row in records], loose)
    return df.select(*(F.col(name).cast(kind).alias(name) for name, kind in types.items()))


def _native(value: Any) -> Any:
    if value is None or value != value:
        return None
    return value.to_pydatetime() if isinstance(value, pd.Timestamp) else value


def texts_frame(spark: SparkSession) -> DataFrame:
    """TEXTS of the ids 1 to 8."""
    rows = [(n, f"text {n}", 1, n % 2, n % 3, n % 4) for n in range(1, 9)]
    return spark.createDataFrame(rows, TEXTS.schema)


def embeddings_frame(spark: SparkSession) -> DataFrame:
    """TEXT_EMBEDDINGS of the ids 1 to 8."""
    rows = [(n, "model", [0.6, 0.8], n / 10 - 0.4) for n in range(1, 9)]
    return spark.createDataFrame(rows, TEXT_EMBEDDINGS.schema)


def raw_frame(
    spark: SparkSession, table: str, *rows: dict[str, Any], ingest_id: int = 1, at: str = "2024-06-01"
) -> DataFrame:
    """Rows of a raw table from a few of their values, given as text or plain values; a user's id stands for the key."""
    names = sorted({name for row in rows for name in row})
    texts = [tuple(None if row.get(name) is None else str(row[name]) for name in names) for row in rows]
    df = spark.createDataFrame(texts, ", ".join(f"`{name}` string" for name in names))
    shaped = in_contract(df, table, **{name: F.col(name) for name in names})
    when = F.lit(at).cast("timestamp")
    added = {"ingest_id": F.lit(ingest_id).cast("bigint"), "ingested_at": when}
    stored = shaped.withColumns(added).withColumnRenamed("user_id", "user_key")
    return stored.select(*RAW[table].schema.names)


def rows_of(spark: SparkSession, table: Table, rows: Sequence[dict[str, Any]]) -> DataFrame:
    """Rows of a table from a few of their values; of the others those that must be there are 0, empty or far back."""
    empty = {"string": "", "bigint": 0, "int": 0, "double": 0.0, "float": 0.0, "boolean": False}
    empty |= {"date": date(2000, 1, 1), "timestamp": datetime(2000, 1, 1, tzinfo=UTC)}

    def nothing(field: StructField) -> Any:
        name = field.dataType.simpleString()
        return [] if name.startswith("array") else Decimal(0) if name.startswith("decimal") else empty[name]

    defaults = {field.name: None if field.nullable else nothing(field) for field in table.schema}
    return spark.createDataFrame([tuple({**defaults, **row}.values()) for row in rows], table.schema)


def write_night(folder: Path, night: int, **tables: list[dict[str, Any]]) -> None:
    """Deliver rows as JSON lines: ``folder/TABLE/NIGHT.json``."""
    for table, rows in tables.items():
        path = folder / table / f"{night:03d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def sorted_rows(df: DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    """All rows as plain tuples in one order, NaN as a text, so that two frames can be compared."""
    rows = df.select(*columns).collect() if columns else df.collect()
    return sorted((tuple(_plain(value) for value in row) for row in rows), key=repr)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return "NaN" if value != value else value
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted(value.items()))
    return value
