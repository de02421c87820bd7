"""A newcomer's hour: init, check, ingest and clean of a raw export, and what check tells of files with faults."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from typer.testing import CliRunner

from bp_spark.cli import app, common
from bp_spark.core import config, stores
from bp_spark.core.errors import DataError
from bp_spark.ingest.clean import clean
from bp_spark.ingest.job import ingest
from bp_spark.ingest.onboarding.preflight import look_at_files
from bp_spark.ingest.onboarding.sampling import copy_sample
from bp_spark.ingest.onboarding.start import start
from bp_spark.ingest.sources.mapping import load_mapping
from bp_spark.lakehouse.run import recorded
from bp_spark.lakehouse.store import Lakehouse
from tests.support.exports import truth, write_online_retail


@pytest.fixture
def checked(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(common, "start_session", lambda *_: spark)

    def run(*arguments: str) -> tuple[dict[str, Any], BaseException | None]:
        result = CliRunner().invoke(app.app, ["check", "--json", *arguments])
        return json.loads(result.stdout), result.exception

    return run


def test_a_raw_export_is_mapped_checked_and_read_right_without_an_edit(
    spark: SparkSession, tmp_path: Path, checked: Any
) -> None:
    (tmp_path / "exports").mkdir()
    export = tmp_path / "exports/OnlineRetail.csv"
    write_online_retail(export)
    right = truth(export)
    result = start(tmp_path / "shop", {"transactions": f"{tmp_path}/exports/*.csv"})
    assert (result.currency, result.open) == ("GBP", [])
    settings = tmp_path / "shop/settings.yaml"
    told, error = checked("--config", str(settings))
    assert error is None
    assert told["share"] == 1
    assert tuple(told["purchases"][name] for name in ("orders", "users", "money", "refunds")) == right
    orders = next(table for table in told["tables"] if table["table"] == "transactions")
    assert list(orders["refused"]) == ["user_id is missing"]
    assert orders["equal_lines"] > 0
    user = next(column for column in told["columns"] if column["column"] == "user_id")
    assert user["missing"] == orders["refused"]["user_id is missing"]
    assert user["odd"] == [f"{orders['rows'] - user['missing']:,} end in .0, which is taken off"]

    platform = config.load(settings)
    with recorded(spark, platform, "featurize") as run:
        ingest(run)
        clean(run, rebuild=False)
    events = Lakehouse(spark, platform.tables).read("events").filter("kind = 'purchase'")
    row = events.agg(
        F.count_distinct(F.when(F.col("amount") > 0, F.col("order_id"))),
        F.count_distinct("user_key"),
        F.sum("amount").cast("double"),
        F.sum(F.when(F.col("amount") < 0, F.col("amount"))).cast("double"),
    ).collect()[0]
    assert tuple(row) == right


MAPPING = """
transactions:
  path: "orders/*.csv"
  format: csv
  where: "state <> 'draft'"
  columns: {user_id: who, ts: at, amount: paid, quantity: qty, currency: money}
reviews:
  path: "reviews.jsonl"
  format: json
  columns: {user_id: who, ts: at, rating: stars}
"""
LINES = """who,at,paid,qty,money,state
7.0,2024-05-01,1.50,1,EUR,paid
7,2024-05-02,"1,50",1,EUR,paid
8,2024-05-02,-2.50,1,EUR,paid
8,2024-05-02,5.00,1,USD,paid
,2024-05-02,5.00,1,EUR,paid
9,2024-05-03,5.00,1,EUR,draft
9,2024-05-03,4.00,1,EUR,paid
9,2024-05-03,4.00,1,EUR,paid
9,yesterday,4.00,1,EUR,paid
torn,2024-05-03,4.00
"""


def test_shares_of_columns_and_rules_are_told_and_a_bad_file_is_named(tmp_path: Path, checked: Any) -> None:
    (tmp_path / "orders").mkdir()
    (tmp_path / "orders/a.csv").write_text(LINES)
    (tmp_path / "orders/b.csv").write_text(LINES.replace("who", "customer"))
    (tmp_path / "reviews.jsonl").write_text(
        '{"who": "7", "at": "2024-05-01", "stars": 9}\n{"who": "8", "at": "2024-05-01"}\n'
    )
    (tmp_path / "shop.yaml").write_text(MAPPING)
    arguments = ["source.kind=files", f"source.mapping={tmp_path}/shop.yaml", "cleaning.currency=EUR"]
    told, error = checked(*arguments)
    assert error is None
    tables = {table["table"]: table for table in told["tables"]}
    assert (tables["transactions"]["rows"], tables["transactions"]["left_out"]) == (9, 1)
    assert tables["transactions"]["refused"] == {
        "amount is unreadable": 1,
        "currency has no rate": 1,
        "row is unreadable": 1,
        "ts is unreadable": 1,
        "user_id is missing": 1,
    }
    assert tables["reviews"]["refused"] == {"rating and text are missing": 1, "rating is beyond 0..5": 1}
    columns = {(one["table"], one["column"]): one for one in told["columns"]}
    amount, currency = columns["transactions", "amount"], columns["transactions", "currency"]
    assert (amount["rows"], amount["unreadable"], amount["missing"], amount["odd"]) == (9, 1, 0, ["1 negative"])
    assert currency["odd"] == ["2 currencies: EUR, USD"]
    assert (columns["transactions", "user_id"]["missing"], columns["transactions", "ts"]["unreadable"]) == (1, 1)
    assert columns["reviews", "rating"]["missing"] == 1
    assert tables["transactions"]["equal_lines"] == 1
    assert list(told["unreadable"]) == ["orders/b.csv"]
    assert told["purchases"]["orders"] == 2
    assert told["purchases"]["money"] == 1.5 - 2.5 + 8


def test_a_mapping_by_which_all_is_refused_ends_with_the_rules_and_a_code(tmp_path: Path, checked: Any) -> None:
    (tmp_path / "orders").mkdir()
    (tmp_path / "orders/a.csv").write_text("who,at,paid,qty,money,state\nu1,1/5/2024,1.50,1,EUR,paid\n")
    (tmp_path / "shop.yaml").write_text(MAPPING.partition("reviews")[0])
    _, error = checked("source.kind=files", f"source.mapping={tmp_path}/shop.yaml", "cleaning.currency=EUR")
    assert isinstance(error, DataError)
    assert "all rows of the sample would be refused: ts is unreadable (1)" in str(error)
    assert "1/5/2024" not in str(error)


def test_a_store_and_a_delta_table_are_looked_at_and_checked(
    spark: SparkSession, tmp_path: Path, checked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Spark has no connector for this store, so that only copies of its files can be read
    bucket = tmp_path / "bucket/shop/orders"
    bucket.mkdir(parents=True)
    (bucket / "a.csv").write_text(LINES)
    (bucket / "b.csv").write_text(LINES.replace("who", "customer"))
    tree = fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem())

    class Stores:
        @staticmethod
        def from_uri(address: str) -> tuple[Any, str]:
            if address.startswith("memory://"):
                return tree, address.removeprefix("memory://")
            return fs.LocalFileSystem(), address.removeprefix("file://")

    monkeypatch.setattr(stores, "fs", SimpleNamespace(FileSystem=Stores, LocalFileSystem=fs.LocalFileSystem))
    reviews = [("7", "2024-05-01", 5.0), ("8", "2024-05-02", 9.0), ("9", "2024-05-02", 1.0)]
    df = spark.createDataFrame(reviews, "who string, at string, rating double").coalesce(1)
    df.write.format("delta").option("delta.enableDeletionVectors", "true").save(f"{tmp_path}/reviews")
    spark.sql(f"DELETE FROM delta.`{tmp_path}/reviews` WHERE who = '9'")
    mapping = MAPPING.replace("orders/*", "memory://shop/orders/*").replace(
        "reviews.jsonl", f"file://{tmp_path}/reviews"
    )
    mapping = mapping.replace("json", "delta").replace("stars", "rating")
    (tmp_path / "shop.yaml").write_text(mapping)
    arguments = ["source.kind=files", f"source.mapping={tmp_path}/shop.yaml", "cleaning.currency=EUR"]
    told, error = checked(*arguments)
    assert error is None
    tables = {table["table"]: table for table in told["tables"]}
    assert (tables["transactions"]["rows"], tables["transactions"]["files"]) == (9, [1, 2])
    assert list(told["unreadable"]) == ["memory://shop/orders/b.csv"]
    assert (tables["reviews"]["rows"], tables["reviews"]["share"]) == (2, None)
    assert tables["reviews"]["refused"] == {"rating is beyond 0..5": 1}
    few, _ = checked(*arguments, "--rows", "1")
    assert next(table["rows"] for table in few["tables"] if table["table"] == "reviews") == 1

    start(tmp_path / "new", {"transactions": "memory://shop/orders/a.csv", "reviews": f"file://{tmp_path}/reviews"})
    written = load_mapping(tmp_path / "new/shop.yaml")[1]
    assert {name: (table.path, table.format) for name, table in written.items()} == {
        "raw_transactions": ("memory://shop/orders/a.csv", "csv"),
        "raw_reviews": (f"file://{tmp_path}/reviews", "delta"),
    }


# --- the sample, without a session ---------------------------------------------------------------------------------------


def sample(tmp_path: Path, mapping: str, rows: int) -> tuple[Path, Any]:
    path, target = tmp_path / "shop.yaml", tmp_path / "sample"
    path.write_text("transactions:\n" + mapping)
    target.mkdir()
    return target, copy_sample(str(path), look_at_files(str(path), load_mapping(path)), rows, target)


def test_records_are_copied_whole_and_their_share_is_that_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("who,at,paid,note\n" + 'u1,2024-05-01,1.50,"two\nlines"\n' * 100)
    (tmp_path / "b.csv").write_text("who,at,paid,note\nu2,2024-05-01,1.50,x\n")
    columns = "columns: {user_id: who, ts: at, amount: paid}"
    target, copied = sample(tmp_path, f"  path: '*.csv'\n  format: csv\n  {columns}\n", 12)
    lines = (target / "0/a.csv").read_text()
    assert lines.count('"') % 2 == 0
    assert lines.startswith("who,at,paid,note\n")
    assert (target / "0/b.csv").read_text() == (tmp_path / "b.csv").read_text()
    assert copied.names == {"0/a.csv": "a.csv", "0/b.csv": "b.csv"}
    assert 0.05 < copied.shares["raw_transactions"] < 0.15
    assert copied.files["raw_transactions"] == (2, 2)


def test_utf_16_packed_files_arrays_and_parquet_are_copied_so_that_they_can_be_read(tmp_path: Path) -> None:
    columns = "columns: {user_id: who, ts: at, amount: paid}"
    text = "who,at,paid\n" + "uĊ1,2024-05-01,1.50\n" * 50
    cases: dict[str, tuple[bytes, str]] = {
        "a.csv": (text.encode("utf-16"), "format: csv\n  options: {encoding: UTF-16}"),
        "b.csv.gz": (gzip.compress(text.encode()), "format: csv"),
    }
    for name, (content, rules) in cases.items():
        folder = tmp_path / name.replace(".", "")
        folder.mkdir()
        (folder / name).write_bytes(content)
        target, _ = sample(folder, f"  path: '{name}'\n  {rules}\n  {columns}\n", 5)
        copied = (target / f"0/{name}").read_bytes()
        readable = gzip.decompress(copied).decode() if name.endswith("gz") else copied.decode("utf-16")
        assert readable == text[: len("who,at,paid\n") + 5 * len("uĊ1,2024-05-01,1.50\n")]
    folder = tmp_path / "parquet"
    folder.mkdir()
    pq.write_table(pa.table({"who": ["u"] * 50, "at": ["2024-05-01"] * 50, "paid": [1.5] * 50}), folder / "a.parquet")
    target, parquet = sample(folder, f"  path: a.parquet\n  format: parquet\n  {columns}\n", 5)
    assert pq.read_table(target / "0/a.parquet").num_rows == 5
    assert parquet.shares["raw_transactions"] == pytest.approx(0.1)
    folder = tmp_path / "array"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps([{"who": "u", "at": "2024-05-01", "paid": 1.10}] * 5))
    target, _ = sample(folder, f"  path: a.json\n  format: json\n  options: {{multiLine: true}}\n  {columns}\n", 2)
    assert (target / "0/a.json").read_text() == (folder / "a.json").read_text()
