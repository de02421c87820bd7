"""One unreadable file of many is named and left; the others are ingested, and none of its rows is anywhere."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession

from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.errors import DataError
from bp_spark.ingest.job import ingest
from bp_spark.ingest.readable import Batch, write_readable
from bp_spark.ingest.sources.contract import Delivery, OnUnreadable, refuse
from bp_spark.lakehouse.run import Run
from bp_spark.lakehouse.store import Lakehouse

MAPPING = """
transactions: {path: "orders/*", format: csv, columns: {user_id: who, ts: at, amount: paid}}
behaviours: {path: "clicks/*", format: parquet, columns: {user_id: who, ts: at, action: what, item_id: item}}
"""
HEADER = "who,at,paid\n"
LINES = 50_000
"""Lines of more characters than Spark reads to find the header."""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Two good files, and three that fail: by a column, by their format, and only while rows are read."""
    for folder in ("orders", "clicks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "shop.yaml").write_text(MAPPING, encoding="utf-8")
    orders, clicks = tmp_path / "orders", tmp_path / "clicks"
    (orders / "good.csv").write_text(f"{HEADER}good,2024-05-01,1.00\n")
    (orders / "lacks.csv").write_text("who,at\nlacking,2024-05-01\n")
    write_clicks(clicks / "good.parquet", "good")
    (clicks / "garbage.parquet").write_text("no Parquet, a shopper's name: anna" * 100)
    write_clicks(clicks / "torn.parquet", "torn")
    # a page that the keys of users aren't read from
    page = pq.ParquetFile(clicks / "torn.parquet").metadata.row_group(0).column(3)
    content = bytearray((clicks / "torn.parquet").read_bytes())
    start = page.data_page_offset
    content[start : start + page.total_compressed_size] = b"\xff" * page.total_compressed_size
    (clicks / "torn.parquet").write_bytes(content)
    return tmp_path


def write_clicks(path: Path, user: str) -> None:
    rows = {"who": [user], "at": ["2024-05-01"], "what": ["click"], "item": ["i1"]}
    pq.write_table(pa.table(rows), path, use_dictionary=False)


def ingested(spark: SparkSession, settings: Config, strict: bool = False) -> dict[str, Any]:
    run = Run(spark, settings, "featurize")
    ingest(run, strict)
    return run.records[-1]


def users(lakehouse: Lakehouse) -> set[str]:
    """Users whose rows or keys are in the tables; each row's key must be known."""
    keys = {row["user_key"]: row["user_id"] for row in lakehouse.read("user_keys").collect()}
    stored = {
        row[0]
        for table in ("raw_transactions", "raw_behaviours")
        for row in lakehouse.read(table).select("user_key").distinct().collect()
    }
    assert stored == set(keys)
    return set(keys.values())


def deliveries(lakehouse: Lakehouse) -> list[str]:
    return sorted(row["name"] for row in lakehouse.read("deliveries").collect())


def test_unreadable_files_are_named_and_left_and_read_once_they_are_mended(
    spark: SparkSession, shop: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config.load(
        overrides=["source.kind=files", f"source.mapping={shop}/shop.yaml", f"tables.path={shop}/lakehouse"]
    )
    lakehouse = Lakehouse(spark, settings.tables)

    with pytest.raises(DataError, match=r"^clicks/garbage\.parquet: can't be read"):
        ingested(spark, settings, strict=True)
    assert not lakehouse.existing(["deliveries", "user_keys", "raw_transactions", "raw_behaviours"])

    caplog.clear()
    stage = ingested(spark, settings)
    assert (stage["status"], stage["figures"]["unreadable_files"]) == ("done", "3")
    assert (stage["rows_out"], stage["figures"]["deliveries"]) == (2, "2")
    assert users(lakehouse) == {"good"}
    assert deliveries(lakehouse) == ["clicks/good.parquet", "orders/good.csv"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    names = ["clicks/garbage.parquet", "clicks/torn.parquet", "orders/lacks.csv.paid"]
    assert [warning.partition(": ")[0] for warning in warnings] == names
    assert "column is missing; there are 'who', 'at'" in warnings[2]
    assert "anna" not in caplog.text
    assert str(shop) not in caplog.text

    (shop / "clicks" / "garbage.parquet").unlink()
    write_clicks(shop / "clicks" / "torn.parquet", "torn")
    (shop / "orders" / "lacks.csv").write_text(f"{HEADER}mended,2024-05-01,2.00\n")
    cut = gzip.compress((HEADER + "".join(f"cut{n},2024-05-01,{n}.00\n" for n in range(LINES))).encode())[:-100]
    (shop / "orders" / "cut.csv.gz").write_bytes(cut)
    with pytest.raises(DataError, match=r"^orders/cut\.csv\.gz: is damaged"):
        ingested(spark, settings, strict=True)
    assert len(deliveries(lakehouse)) == 2

    assert ingested(spark, settings)["figures"]["unreadable_files"] == "1"
    assert users(lakehouse) == {"good", "mended", "torn"}

    # the same call again has nothing to read, and no error about an order file that is known
    stage = ingested(spark, settings)
    assert (stage["status"], stage["figures"]["unreadable_files"]) == ("unchanged", "1")
    assert len(deliveries(lakehouse)) == 4


# --- without rows --------------------------------------------------------------------------------------------------------


class Named:
    """A source without rows, whose files named ``bad`` can't be read."""

    def deliveries(self, spark: SparkSession) -> list[Delivery]:
        return []

    def read(
        self, spark: SparkSession, deliveries: Sequence[Delivery], on_unreadable: OnUnreadable = refuse
    ) -> dict[str, DataFrame]:
        for delivery in deliveries:
            if delivery.name.startswith("bad"):
                on_unreadable(delivery, DataError(delivery.name, "is bad"))
        return {}


def orders(*names: str) -> list[Delivery]:
    return [Delivery("raw_transactions", name, "1") for name in names]


CLICKS = Delivery("raw_behaviours", "clicks", "1")


@pytest.fixture
def written(spark: SparkSession) -> Callable[..., Batch]:
    def write(fresh: Sequence[Delivery], strict: bool = False, left_before: Sequence[str] = ()) -> Batch:
        return write_readable(
            spark, Named(), fresh, lambda _: None, lambda: None, strict=strict, left_before=left_before
        )

    return write


def test_a_night_without_a_readable_order_fails_unless_the_night_before_left_the_same_files(
    written: Callable[..., Batch],
) -> None:
    left = written(orders("bad1", "bad2", "good")).left
    with pytest.raises(DataError, match=r"^bad1: is bad$"):
        written([*orders("bad1", "bad2"), CLICKS])
    assert written([*orders("bad2"), CLICKS], left_before=left).deliveries == [CLICKS]
    assert written(orders("bad1", "bad2"), left_before=left).deliveries == []
    with pytest.raises(DataError, match=r"^bad2: is bad$"):
        written(orders("bad2", "bad3"), left_before=left)
    assert written([CLICKS]).deliveries == [CLICKS]


def test_strict_refuses_the_first_unreadable_file(written: Callable[..., Batch]) -> None:
    with pytest.raises(DataError, match=r"^bad1: is bad$"):
        written(orders("bad2", "bad1", "good"), strict=True)


def test_the_log_names_some_files_and_counts_the_others(
    written: Callable[..., Batch], caplog: pytest.LogCaptureFixture
) -> None:
    batch = written(orders("good", *(f"bad{n:03}" for n in range(150))))
    assert batch.unreadable_files == 150
    assert len(caplog.records) == 21
    assert caplog.records[-1].getMessage() == "and 130 more files can't be read and are left out"


def test_an_error_that_no_file_explains_is_passed_on(spark: SparkSession) -> None:
    def write(_: Batch) -> None:
        raise DataError("events", "is broken")

    def undo() -> None:
        pytest.fail("nothing may be undone")

    with pytest.raises(DataError, match=r"^events: is broken$"):
        write_readable(spark, Named(), orders("good"), write, undo, strict=False, left_before=())
