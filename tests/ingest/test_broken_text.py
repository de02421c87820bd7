"""Texts with bytes of another encoding are told, with the remedy and without a text."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from pyspark.sql import SparkSession

from bp_spark.ingest import broken_text
from bp_spark.lakehouse.tables import RAW_TABLES
from tests.support.rows import frame

TABLES = {table.name: table for table in RAW_TABLES}


def test_broken_texts_of_items_and_users_are_told_with_the_remedy(
    spark: SparkSession, caplog: pytest.LogCaptureFixture
) -> None:
    items = [
        {"item_id": "1", "title": "T\ufffdr", "ingest_id": 2},
        {"item_id": "2", "title": "Tür", "category": "a\ufffd", "ingest_id": 2},
        {"item_id": "3", "title": "Tür", "ingest_id": 2},
        {"item_id": "4", "title": "an earlier ingest \ufffd", "ingest_id": 1},
    ]
    users = [
        {"user_key": "u", "segment": {"city": "K\ufffdln"}, "ingest_id": 2},
        {"user_key": "v", "segment": {"city": "Köln"}, "ingest_id": 2},
    ]

    class Tables:
        def read(self, name: str) -> Any:
            return frame(spark, TABLES[name], *{"raw_items": items, "raw_users": users}[name])

    with caplog.at_level(logging.WARNING):
        count = broken_text.warn(Tables(), 2, {"raw_items": 3, "raw_users": 2, "raw_transactions": 9})  # type: ignore[arg-type]
    assert count == 3
    assert [message[:39] for message in caplog.messages] == [
        "raw_items: 2 rows have broken text: nam",
        "raw_users: 1 rows have broken text: nam",
    ]
    assert all("encoding: windows-1252" in message and "\ufffd" not in message for message in caplog.messages)
