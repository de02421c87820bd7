"""Raw rows end in events, duplicates or quarantine: which rows, and why."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core import config
from bp_spark.core.config import CleaningConfig
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.ingest import cleaning, identity
from bp_spark.ingest.clean import first_to_clean, require_balance
from bp_spark.lakehouse.tables import EVENTS
from tests.support.histories import raw_frame, sorted_rows

CONFIG = config.load().cleaning
GOOD = {
    "user_id": "u1",
    "order_id": "o1",
    "item_id": "i1",
    "ts": "2024-03-01 10:00:00",
    "quantity": "2",
    "amount": "9.90",
    "currency": "USD",
    "delivery": "a",
}
ACTION = {"user_id": "u1", "ts": "2024-03-01 10:00:00", "action": "browse", "item_id": "i1", "delivery": "a"}
SEARCH = {"user_id": "u1", "ts": "2024-03-01 10:00:00", "query": "Red Shoes", "delivery": "a"}
REVIEW = {"user_id": "u1", "ts": "2024-03-01 10:00:00", "item_id": "i1", "rating": "4", "text": "fine", "delivery": "a"}


def judged(
    spark: SparkSession, table: str, *rows: dict[str, Any], settings: CleaningConfig = CONFIG, **known: DataFrame
) -> dict[str, DataFrame]:
    return cleaning.validate({table: raw_frame(spark, table, *rows)}, known, settings)


def reasons(spark: SparkSession, table: str, *rows: dict[str, Any], **more: Any) -> list[str | None]:
    found = judged(spark, table, *rows, **more)[table]
    return [row["rule"] for row in found.select("rule", "delivery").orderBy("delivery").collect()]


def kept(spark: SparkSession, *batches: DataFrame, table: str = "raw_transactions") -> list[dict[str, Any]]:
    """Events of several deliveries of a table, cleaned at once."""
    rows = batches[0]
    for batch in batches[1:]:
        rows = rows.unionByName(batch)
    found = cleaning.events(cleaning.validate({table: rows}, {}, CONFIG)).filter("copy = 1")
    return [row.asDict() for row in found.orderBy("ts", "amount", "cost").collect()]


def numbered(*changes: dict[str, Any], base: dict[str, Any] = GOOD) -> list[dict[str, Any]]:
    """Rows in a known order: their delivery is their number."""
    return [{**base, **change, "delivery": f"{number:03d}"} for number, change in enumerate(changes)]


def test_each_broken_rule_is_named(spark: SparkSession) -> None:
    cases: dict[str, dict[str, Any]] = {
        "user_id is missing": {"user_id": None},
        "ts is missing": {"ts": None},
        "ts is unreadable": {"ts": "yesterday"},
        "ts is in the future": {"ts": "2024-06-02 00:00:00"},
        "ts is before 1995-01-01": {"ts": "1970-01-01 00:00:00"},
        "amount is missing": {"amount": None},
        "amount is unreadable": {"amount": "12,5x"},
        "amount is beyond 1e+06": {"amount": "1000000.01"},
        "currency has no rate": {"currency": "XYZ"},
        "quantity is not a finite number": {"quantity": "NaN"},
        "discount is negative": {"discount": "-0.01"},
        "coupon_discount is negative": {"coupon_discount": "-1"},
        "cost is beyond 1e+06": {"cost": "1000000.01"},
        "cost is negative": {"cost": "-3"},
        "quantity is negative, amount is not": {"quantity": "-2"},
    }
    assert reasons(spark, "raw_transactions", *numbered(*cases.values())) == list(cases)


def test_a_time_may_be_a_little_ahead_and_is_held_against_the_time_of_a_replay(spark: SparkSession) -> None:
    # the ingest was on 2024-06-01 at midnight
    ahead = numbered({"ts": "2024-06-01 00:10:00"}, {"ts": "2024-06-01 00:10:01"}, {"ts": "2024-06-01 01:00:00"})
    late = "ts is in the future"
    assert reasons(spark, "raw_transactions", *ahead) == [None, late, late]
    none = CONFIG.model_copy(update={"ahead_minutes": 0})
    assert reasons(spark, "raw_transactions", *ahead, settings=none) == [late, late, late]
    raw = raw_frame(spark, "raw_transactions", *ahead)
    replayed = cleaning.validate({"raw_transactions": raw}, {}, CONFIG, F.lit("2024-06-01 00:30:00").cast("timestamp"))
    rules = [row["rule"] for row in replayed["raw_transactions"].orderBy("delivery").collect()]
    assert rules == [None, None, late]


def test_a_refund_gives_back_units_and_reductions(spark: SparkSession) -> None:
    refund = {"quantity": "-2", "amount": "-9.90", "discount": "-1", "coupon_discount": "-1", "cost": "-6"}
    exchange = {"quantity": "-1", "amount": "0"}
    fee = {"quantity": "1", "amount": "-3"}
    assert reasons(spark, "raw_transactions", *numbered(refund, exchange, fee)) == [None, None, None]


@pytest.mark.parametrize(("policy", "reason"), [("keep", None), ("quarantine", "amount and discount are 0")])
def test_free_lines_are_kept_or_refused_as_configured(spark: SparkSession, policy: str, reason: str | None) -> None:
    settings = config.load(overrides=[f"cleaning.free_lines={policy}"]).cleaning
    rows = numbered({"amount": "0"}, {"amount": "0", "discount": "0"}, {"amount": "0", "discount": "9.90"}, {})
    assert reasons(spark, "raw_transactions", *rows, settings=settings) == [reason, reason, None, None]


def test_amounts_that_money_does_not_keep_whole_are_refused_by_name(spark: SparkSession) -> None:
    texts = {
        "0.0045": "amount has more than 2 decimals",
        "-12.34567": "amount has more than 2 decimals",
        "1.234": "amount has a point that may part thousands",
        "-999.999": "amount has a point that may part thousands",
        "12,50": "amount is unreadable",
        "(5.00)": "amount is unreadable",
    }
    rows = raw_frame(spark, "raw_transactions", *numbered(*({} for _ in texts)))
    of_row = F.element_at(F.array(*map(F.lit, texts)), F.col("delivery").cast("int") + 1)
    unread = rows.withColumns(
        {"amount": F.lit(None).cast("decimal(18,2)"), "unreadable": F.create_map(F.lit("amount"), of_row)}
    )
    judged_rows = cleaning.validate({"raw_transactions": unread}, {}, CONFIG)["raw_transactions"]
    assert [row["rule"] for row in judged_rows.orderBy("delivery").collect()] == list(texts.values())


def test_rules_of_actions_searches_and_reviews(spark: SparkSession) -> None:
    actions = numbered({"action": "stare"}, {"dwell_s": "-1"}, {"dwell_s": "30"}, base=ACTION)
    assert reasons(spark, "raw_behaviours", *actions) == ["action is unknown", "dwell_s is not within a day", None]
    searches = numbered({"query": "  "}, {"query": "a\u0000b"}, {"query": "手机"}, base=SEARCH)
    assert reasons(spark, "raw_searches", *searches) == ["query is missing", "query is broken text", None]
    reviews = numbered({"rating": "6"}, {"rating": None, "text": None}, {"rating": None}, {"text": None}, base=REVIEW)
    assert reasons(spark, "raw_reviews", *reviews) == [
        "rating is beyond 0..5",
        "rating and text are missing",
        None,
        None,
    ]


def test_a_row_in_quarantine_is_whole_and_comes_back_as_it_was(spark: SparkSession) -> None:
    row = {**GOOD, "ts": "2024-03-01 10:00:00.123456", "amount": "12,5x", "user_id": "用户'\"\\"}
    raw = raw_frame(spark, "raw_transactions", row)
    refused = cleaning.quarantine(cleaning.validate({"raw_transactions": raw}, {}, CONFIG))
    assert refused.first()["rule"] == "amount is unreadable"  # type: ignore[index]
    assert sorted_rows(cleaning.from_quarantine(refused, "raw_transactions")) == sorted_rows(raw)


def test_a_row_that_nothing_accounts_for_ends_the_night() -> None:
    figures = {"rows": 10, "events": 4, "duplicates": 3, "quarantine": 2, "superseded": 1}
    require_balance(figures)
    require_balance({"rows": 1, "events": 1})
    with pytest.raises(DataError, match=r"rows in \(11\) must equal events \(4\) .* \(1 rows\)"):
        require_balance({**figures, "rows": 11})
    with pytest.raises(DataError, match=r"\(-1 rows\)"):
        require_balance({**figures, "events": 5})


def test_two_equal_lines_of_one_delivery_are_two_and_delivered_again_still_two(spark: SparkSession) -> None:
    line = {**GOOD, "quantity": "1"}
    first = raw_frame(spark, "raw_transactions", line, line)
    again = raw_frame(spark, "raw_transactions", {**line, "delivery": "b"}, {**line, "delivery": "b"}, ingest_id=2)
    assert len(kept(spark, first)) == 2
    assert len(kept(spark, first, again)) == 2


UUID, OTHER_UUID = "0a1b2c3d-0000-4000-8000-00000000000a", "0a1b2c3d-0000-4000-8000-00000000000b"


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ([f"orders/part-00000-{UUID}-c000.csv", f"orders/part-00001-{UUID}-c000.csv"], 2),
        ([f"day=1/part-00000-{UUID}.c000.snappy.parquet", f"day=1/part-00000-{UUID}.c001.snappy.parquet"], 2),
        ([f"orders/part-00000-{UUID}-c000.csv", f"orders/part-00001-{OTHER_UUID}-c000.csv"], 1),
        ([f"orders/part-00000-{UUID}-c000.csv", f"backup/part-00000-{UUID}-c000.csv"], 1),
        ([f"shop=a/part-00000-{UUID}-c000.csv", f"shop=b/part-00000-{UUID}-c000.csv"], 2),
        ([f"day=2024-05-01/part-00000-{UUID}-c000.csv", f"day=2024-05-02/part-00000-{UUID}-c000.csv"], 1),
        (["orders/monday.csv", "orders/tuesday.csv"], 1),
        (["orders/part-1.csv", "orders/part-2.csv"], 1),
    ],
)
def test_equal_lines_in_two_parts_of_one_write_are_two(spark: SparkSession, files: list[str], count: int) -> None:
    lines = raw_frame(spark, "raw_transactions", *({**GOOD, "delivery": file} for file in files))
    assert len(kept(spark, lines)) == count
    # the platform writes all of them again
    renamed = [file.replace("-4000-", "-4001-") for file in files]
    again = raw_frame(spark, "raw_transactions", *({**GOOD, "delivery": file} for file in renamed), ingest_id=2)
    assert len(kept(spark, lines, again)) == count


def test_a_third_equal_line_in_a_later_delivery_is_new(spark: SparkSession) -> None:
    first = raw_frame(spark, "raw_transactions", GOOD, GOOD)
    more = raw_frame(spark, "raw_transactions", *[{**GOOD, "delivery": "b"}] * 3, ingest_id=2)
    assert len(kept(spark, first, more)) == 3


def test_a_cost_that_is_told_later_corrects_the_same_event(spark: SparkSession) -> None:
    before = raw_frame(spark, "raw_transactions", GOOD)
    first, second = {**GOOD, "cost": "4.00"}, {**GOOD, "cost": "3.00"}
    after = raw_frame(spark, "raw_transactions", first, second, ingest_id=2)
    (known,) = kept(spark, before)
    cheap, dear = kept(spark, before, after)
    # the second equal line is one more scan of the article, and the lower cost is always that of the first
    assert (known["cost"], cheap["cost"], dear["cost"]) == (None, Decimal("3.00"), Decimal("4.00"))
    assert known["event_id"] in {cheap["event_id"], dear["event_id"]}
    costs = {row["event_id"]: row["cost"] for row in kept(spark, raw_frame(spark, "raw_transactions", second, first))}
    assert costs == {event["event_id"]: event["cost"] for event in (cheap, dear)}
    events = cleaning.events(cleaning.validate({"raw_transactions": after}, {}, CONFIG)).filter("copy = 1")
    stored = cleaning.events(cleaning.validate({"raw_transactions": before}, {}, CONFIG)).filter("copy = 1")
    states = identity.add_state(events, stored.select(*EVENTS.schema.names))
    assert {row["event_id"]: row["state"] for row in states.collect()} == {
        known["event_id"]: identity.CHANGED,
        **{event_id: identity.NEW for event_id in costs if event_id != known["event_id"]},
    }


def test_a_line_with_an_identity_is_corrected_by_its_newest_delivery(spark: SparkSession) -> None:
    first = raw_frame(spark, "raw_transactions", {**GOOD, "line_id": "1", "amount": "9.90"})
    fixed = raw_frame(spark, "raw_transactions", {**GOOD, "line_id": "1", "amount": "8.00"}, ingest_id=2)
    events = kept(spark, first, fixed)
    assert [float(event["amount"]) for event in events] == [8.0]
    assert events[0]["ingest_id"] == 1


def test_what_is_known_already_is_told_from_what_is_new_or_corrected(spark: SparkSession) -> None:
    before = raw_frame(spark, "raw_transactions", *({**GOOD, "line_id": line} for line in ("1", "2")))
    after = raw_frame(
        spark,
        "raw_transactions",
        {**GOOD, "line_id": "1"},
        {**GOOD, "line_id": "2", "amount": "1.00"},
        {**GOOD, "line_id": "3", "amount": "2.00"},
        ingest_id=2,
    )
    known, fresh = (
        cleaning.events(cleaning.validate({"raw_transactions": raw}, {}, CONFIG)).drop("copy")
        for raw in (before, after)
    )
    found = identity.add_state(fresh, known).orderBy("amount").collect()
    assert [(float(row["amount"]), row["state"], row["ingest_id"]) for row in found] == [
        (1.0, identity.CHANGED, 1),
        (2.0, identity.NEW, 2),
        (9.9, identity.KNOWN, 1),
    ]


def test_amounts_are_converted_by_the_newest_rate_of_their_day(spark: SparkSession) -> None:
    rates = raw_frame(
        spark,
        "raw_rates",
        {"currency": "CNY", "day": "2024-01-01", "rate": "0.10"},
        {"currency": "CNY", "day": "2024-03-01", "rate": "0.20"},
        {"currency": "CNY", "day": "2024-03-02", "rate": "0.30"},
    )
    rows = numbered(
        {"currency": "CNY", "ts": "2024-02-01 00:00:00"},
        {"currency": "CNY", "discount": "1.00", "cost": "4.00"},
        {"currency": "CNY", "ts": "2023-12-31 23:59:59"},
        {"currency": None},
    )
    found = judged(spark, "raw_transactions", *rows, raw_rates=rates)
    events = cleaning.events(found).orderBy("ts", "amount").collect()
    assert [float(event["amount"]) for event in events] == [0.99, 1.98, 9.9]
    assert (float(events[1]["discount"]), float(events[1]["cost"])) == (0.2, 0.8)
    assert [row["rule"] for row in cleaning.quarantine(found).collect()] == ["currency has no rate"]


def test_amounts_are_bounded_in_the_platforms_currency(spark: SparkSession) -> None:
    rates = raw_frame(
        spark,
        "raw_rates",
        {"currency": "JPY", "day": "2024-01-01", "rate": "0.01"},
        {"currency": "BIG", "day": "2024-01-01", "rate": "9999999999"},
    )
    rows = numbered(
        {"currency": "JPY", "amount": "5000000"},
        {"currency": "BIG", "amount": "101"},
        {"currency": "BIG", "amount": "0", "coupon_discount": "9999999999999999.99"},
    )
    beyond = ["amount is beyond 1e+06", "coupon_discount is beyond 1e+06"]
    assert reasons(spark, "raw_transactions", *rows, raw_rates=rates) == [None, *beyond]


def test_a_rate_counts_from_the_ingest_that_brought_it(spark: SparkSession) -> None:
    rates = raw_frame(spark, "raw_rates", {"currency": "CNY", "day": "2024-01-01", "rate": "0.10"}, ingest_id=2)
    assert reasons(spark, "raw_transactions", {**GOOD, "currency": "CNY"}, raw_rates=rates) == ["currency has no rate"]


def test_events_are_described_by_what_was_known_of_the_item_then(spark: SparkSession) -> None:
    items = raw_frame(spark, "raw_items", {"item_id": "i1", "title": "Milk", "category": "Food > Milk"}).unionByName(
        raw_frame(spark, "raw_items", {"item_id": "i1", "title": "Milk", "category": "Drinks > Milk"}, ingest_id=3)
    )
    rows = raw_frame(spark, "raw_transactions", GOOD, ingest_id=2).unionByName(
        raw_frame(spark, "raw_transactions", {**GOOD, "amount": "5.00"}, ingest_id=3)
    )
    events = cleaning.events(cleaning.validate({"raw_transactions": rows}, {"raw_items": items}, CONFIG))
    assert [row["category"] for row in events.orderBy("ingest_id").collect()] == ["Food > Milk", "Drinks > Milk"]
    assert events.select("text_id").distinct().count() == 1


@pytest.mark.parametrize(("policy", "reason"), [("keep", None), ("quarantine", "item is unknown")])
def test_unknown_items_are_kept_or_refused_as_configured(spark: SparkSession, policy: str, reason: str | None) -> None:
    items = raw_frame(spark, "raw_items", {"item_id": "other"})
    settings = config.load(overrides=[f"cleaning.unknown_items={policy}"]).cleaning
    assert reasons(spark, "raw_transactions", GOOD, settings=settings, raw_items=items) == [reason]


def test_a_bare_order_log_gives_events(spark: SparkSession) -> None:
    rows = numbered(
        {}, {"ts": "2024-03-01 10:00:01"}, base={"user_id": "u1", "ts": "2024-03-01 10:00:00", "amount": "5"}
    )
    events = kept(spark, raw_frame(spark, "raw_transactions", *rows))
    assert len({event["order_id"] for event in events}) == 2
    assert all(event["item_id"] is None and event["kind"] == "purchase" for event in events)


def test_every_kind_becomes_an_event_with_its_text(spark: SparkSession) -> None:
    raw = {
        "raw_transactions": raw_frame(spark, "raw_transactions", GOOD),
        "raw_behaviours": raw_frame(spark, "raw_behaviours", ACTION, {**ACTION, "action": "coupon"}),
        "raw_searches": raw_frame(spark, "raw_searches", SEARCH),
        "raw_reviews": raw_frame(spark, "raw_reviews", REVIEW),
    }
    items = raw_frame(spark, "raw_items", {"item_id": "i1", "title": "Red shoes!"})
    events = cleaning.events(cleaning.validate(raw, {"raw_items": items}, CONFIG))
    text_of = {row["kind"]: row["text_id"] for row in events.collect()}
    assert set(text_of) == {"purchase", "browse", "coupon", "search", "review"}
    assert text_of["search"] == text_of["purchase"] != text_of["review"]
    known = {row["text"] for row in cleaning.texts({**raw, "raw_items": items}).collect()}
    assert known == {"red shoes", "fine"}


def test_where_raw_rows_are_not_all_kept_an_older_format_is_gone_on_with_if_it_can_be() -> None:
    def noted(number: int) -> dict[str, object]:
        return {"format": number, "through": 7, "rules": "some"}

    assert first_to_clean({}, rebuild=False, all_kept=True) == first_to_clean({}, rebuild=False, all_kept=False) == 1
    for kept in (True, False):
        assert first_to_clean(noted(cleaning.FORMAT), rebuild=False, all_kept=kept) == 8
    assert first_to_clean(noted(2), rebuild=False, all_kept=True) == 1
    assert first_to_clean(noted(2), rebuild=False, all_kept=False) == 8
    for done, rebuild in ((noted(1), False), (noted(2), True), (noted(cleaning.FORMAT), True)):
        with pytest.raises(ConfigError, match="can't be derived from them anew"):
            first_to_clean(done, rebuild=rebuild, all_kept=False)
