"""Guesses of a mapping from a sample: what common exports mean, and what is left to a person."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from bp_spark.ingest.onboarding import guess, write
from bp_spark.ingest.onboarding.listing import files_matching
from bp_spark.ingest.onboarding.sniff import sample_of
from bp_spark.ingest.sources.mapping import load_mapping

EXPORTS = Path(__file__).parents[3] / "docs/mappings"
RIGHT: Mapping[str, Mapping[str, Any]] = {
    "online-retail/OnlineRetail.csv": {
        "user_id": "CustomerID",
        "order_id": "InvoiceNo",
        "ts": {"column": "InvoiceDate", "format": "M/d/yyyy H:mm"},
        "item_id": "StockCode",
        "quantity": "Quantity",
        "amount": {"expr": "Quantity * UnitPrice", "round": True},
    },
    "shopify/orders.csv": {
        "user_id": {"column": "Email", "lower": True},
        "order_id": "Name",
        "ts": "Created at",
        "line_id": {"value": "order"},
        "amount": {"expr": "Total - abs(coalesce(`Refunded Amount`, 0))"},
        "currency": "Currency",
    },
    "woocommerce/orders.csv": {
        "user_id": {"column": "billing_email", "lower": True},
        "order_id": "order_id",
        "line_id": "item_id",
        "item_id": "item_sku",
        "ts": "date",
        "quantity": "item_quantity",
        "amount": {"expr": "item_total - abs(coalesce(item_refunded, 0))"},
        "currency": "order_currency",
    },
    "olist/lines.csv": {
        "user_id": "customer_unique_id",
        "order_id": "order_id",
        "line_id": "order_item_id",
        "item_id": "product_id",
        "ts": "order_purchase_timestamp",
        "amount": "price",
    },
    "rees46/2019-Oct.csv": {
        "user_id": "user_id",
        "order_id": "user_session",
        "item_id": "product_id",
        "ts": "event_time",
        "amount": "price",
    },
    "shopify-json/orders.jsonl": {
        "user_id": "customer.id",
        "order_id": "id",
        "line_id": "line_items.id",
        "item_id": "line_items.sku",
        "ts": "processed_at",
        "quantity": "line_items.quantity",
        "amount": "current_total_price",
        "discount": "line_items.total_discount",
        "currency": "currency",
    },
}
"""Export -> columns of the right mapping."""


def guessed(path: Path, text: str | None = None) -> dict[str, Any]:
    """The mapping that is written for a file, as YAML reads it; it has no mistake."""
    if text is not None:
        path.write_text(text, encoding="utf-8")
    tables = guess.orders(sample_of(files_matching("file:/", str(path)), "--orders"))
    written = write.mapping_text([(table, str(path)) for table in tables])
    mapping = path.parent / "guessed.yaml"
    mapping.write_text(written, encoding="utf-8")
    load_mapping(mapping)
    return {"text": written, "currency": guess.currency(tables)[0], **yaml.safe_load(written)}


@pytest.mark.parametrize("export", RIGHT)
def test_common_exports_are_guessed_right(export: str, tmp_path: Path) -> None:
    path = tmp_path / Path(export).name
    path.write_bytes((EXPORTS / export).read_bytes())
    assert guessed(path)["transactions"]["columns"] == RIGHT[export]


def test_cancelled_orders_test_orders_and_other_events_are_left_out(tmp_path: Path) -> None:
    wheres = {}
    for export in RIGHT:
        path = tmp_path / Path(export).name
        path.write_bytes((EXPORTS / export).read_bytes())
        mapping = guessed(path)
        wheres[export] = mapping["transactions"].get("where", "")
    assert wheres["online-retail/OnlineRetail.csv"] == ""
    assert "lower(status) NOT IN ('cancelled'" in wheres["woocommerce/orders.csv"]
    assert "'canceled'" in wheres["olist/lines.csv"]
    assert wheres["rees46/2019-Oct.csv"] == "event_type IN ('purchase')"
    assert "Total IS NOT NULL" in wheres["shopify/orders.csv"]
    for condition in ("'voided'", "cancelled_at IS NULL", "test IS NULL OR"):
        assert condition in wheres["shopify-json/orders.jsonl"]
    assert mapping["transactions"]["per_order"] == ["amount"]


def test_a_log_of_events_feeds_behaviours_and_items_too(tmp_path: Path) -> None:
    path = tmp_path / "2019-Oct.csv"
    path.write_bytes((EXPORTS / "rees46/2019-Oct.csv").read_bytes())
    mapping = guessed(path)
    assert mapping["behaviours"]["columns"]["action"] == {"column": "event_type", "values": {"view": "browse"}}
    assert mapping["items"]["columns"]["category"] == {"expr": "replace(category_code, '.', ' > ')"}


def test_no_value_of_the_files_stands_in_what_is_written(tmp_path: Path) -> None:
    for export in RIGHT:
        path = tmp_path / Path(export).name
        path.write_bytes((EXPORTS / export).read_bytes())
        text = guessed(path)["text"]
        for value in (
            "17850",
            "12583",
            "anna@example.com",
            "Anna@example.com",
            "MUG-1",
            "541312140",
            "7c396fd40001",
            "53.91",
        ):
            assert value not in text.replace("17850.0 and 17850", "")


LINES = "order,customer,sku,date,qty,{name}\n"


def lines(name: str, *rows: str) -> str:
    return LINES.format(name=name) + "".join(row + "\n" for row in rows)


def test_a_price_that_stays_the_same_for_more_pieces_is_multiplied_and_one_that_grows_is_not(tmp_path: Path) -> None:
    per_piece = [f"{n},u{n % 3},{'ab'[n % 2]},2024-05-{n + 10},{n % 4 + 1},{(3.5, 7)[n % 2]}" for n in range(12)]
    of_line = [
        f"{n},u{n % 3},{'ab'[n % 2]},2024-05-{n + 10},{n % 4 + 1},{(3.5, 7)[n % 2] * (n % 4 + 1)}" for n in range(12)
    ]
    for name, rows, amount in (
        ("price", per_piece, {"expr": "qty * price", "round": True}),
        ("price", of_line, "price"),
        ("amount", per_piece, {"expr": "qty * amount", "round": True}),
        ("amount", of_line, "amount"),
    ):
        mapping = guessed(tmp_path / "a.csv", lines(name, *rows))
        assert mapping["transactions"]["columns"]["amount"] == amount


def test_a_total_that_all_lines_of_an_order_repeat_is_shared_and_that_is_a_doubt(tmp_path: Path) -> None:
    rows = [f"{n // 2},u{n // 2},s{n},2024-05-13,1,{n // 2 * 3 + 7}.50" for n in range(12)]
    mapping = guessed(tmp_path / "a.csv", lines("total", *rows))
    assert mapping["transactions"]["per_order"] == ["amount"]
    assert "Remove per_order if it is the line's own" in mapping["text"].replace("\n    #   ", " ")


def test_currencies_come_from_a_column_a_sign_a_name_or_are_left_to_a_person(tmp_path: Path) -> None:
    def of(header: str, value: str) -> str:
        text = f"customer,date,{header}\n" + f"u1,2024-05-13,{value}\nu2,2024-05-14,{value}\n"
        return str(guessed(tmp_path / "a.csv", text)["currency"])

    assert of("amount,currency", "1.50,PLN") == "PLN"
    assert of("amount,currency", "1.50,usd") == "USD"
    assert of("amount", "€1.50") == "EUR"
    assert of("amount,amount_gbp", "1.50,1.50") == "GBP"
    assert of("amount,country", "1.50,Japan") == "JPY"
    assert of("amount", "1.50") == guess.TODO
    assert of("amount", "¥1") == guess.TODO


def test_what_no_column_looks_like_stands_as_todo_with_the_names_of_all(tmp_path: Path) -> None:
    mapping = guessed(tmp_path / "a.csv", "alpha,beta\nx,2024-05-01\ny,2024-05-02\n")
    assert {name: mapping["transactions"]["columns"][name] for name in ("user_id", "ts", "amount")} == {
        "user_id": guess.TODO,
        "ts": "beta",
        "amount": guess.TODO,
    }
    assert "Columns are 'alpha', 'beta'" in mapping["text"]


def test_names_that_need_quotes_and_marks_of_numbers_are_written_so_that_they_hold(tmp_path: Path) -> None:
    text = 'Customer No.;Order Date;Menge;"Unit Price"\nu1;31.05.2024;2;"1.234,50"\nu2;01.06.2024;1;"2,50"\n'
    mapping = guessed(tmp_path / "a.csv", text.replace("Menge", "Qty"))["transactions"]
    assert mapping["options"] == {"sep": ";"}
    assert mapping["columns"]["amount"] == {
        "expr": "Qty * `Unit Price`",
        "decimal": ",",
        "thousands": ".",
        "round": True,
    }
    assert mapping["columns"]["ts"] == {"column": "Order Date", "format": "d.M.yyyy"}


def test_logs_of_searches_and_reviews_are_mapped_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("user_id,created_at,search_term\nu1,2024-05-01 10:00:00,mug\n")
    (tmp_path / "r.csv").write_text("user_id,date,product_id,stars,comment\nu1,2024-05-01,a,5,good\n")
    searches = guess.log(sample_of(files_matching("file:/", str(tmp_path / "s.csv")), "s"), "searches")
    reviews = guess.log(sample_of(files_matching("file:/", str(tmp_path / "r.csv")), "r"), "reviews")
    assert {name: one.value for name, one in searches.columns.items()} == {
        "user_id": "user_id",
        "ts": "created_at",
        "query": "search_term",
    }
    assert {name: one.value for name, one in reviews.columns.items()} == {
        "user_id": "user_id",
        "ts": "date",
        "item_id": "product_id",
        "rating": "stars",
        "text": "comment",
    }
