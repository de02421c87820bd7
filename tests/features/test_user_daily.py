"""What a user's day comes to, and that it is that user's and that day's alone."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.features import user_daily
from bp_spark.lakehouse.schema import conform
from bp_spark.lakehouse.tables import USER_DAILY
from tests.support.histories import embeddings_frame, events_frame, random_events, sorted_rows, texts_frame


def days_of(spark: SparkSession, rows: pd.DataFrame, max_tokens: int = 8) -> DataFrame:
    events = events_frame(spark, rows)
    result = user_daily.user_daily(events, texts_frame(spark), embeddings_frame(spark), max_tokens)
    return conform(result, USER_DAILY)


@pytest.fixture(scope="module")
def history() -> pd.DataFrame:
    return random_events(seed=11)


@pytest.fixture(scope="module")
def rows(spark: SparkSession, history: pd.DataFrame) -> pd.DataFrame:
    return days_of(spark, history).toPandas().set_index(["user_key", "day"])


def test_there_is_a_row_for_each_day_with_an_event(history: pd.DataFrame, rows: pd.DataFrame) -> None:
    expected = history.groupby(["user_key", "event_date"]).size().index
    assert sorted(rows.index) == sorted(expected)


def test_sums_are_those_of_the_events(history: pd.DataFrame, rows: pd.DataFrame) -> None:
    by = history.groupby(["user_key", "event_date"])
    bought = history[(history["kind"] == "purchase") & (history["amount"] >= 0)]
    orders = bought.groupby(["user_key", "event_date"])["order_id"].nunique().reindex(rows.index, fill_value=0)
    pd.testing.assert_series_equal(rows["orders"], orders, check_names=False, check_dtype=False)
    for column, source in (("spend", "amount"), ("discount", "discount"), ("coupon_discount", "coupon_discount")):
        expected = by[source].sum().reindex(rows.index).round(2)
        pd.testing.assert_series_equal(rows[column].astype(float), expected, check_names=False)
    for kind, column in {"browse": "browses", "cart": "carts", "search": "searches", "review": "reviews"}.items():
        count = (
            (history["kind"] == kind).groupby([history["user_key"], history["event_date"]]).sum().reindex(rows.index)
        )
        pd.testing.assert_series_equal(rows[column], count, check_names=False, check_dtype=False)
    assert (
        rows[["morning_orders", "afternoon_orders", "evening_orders", "night_orders"]].sum().sum()
        == rows["orders"].sum()
    )


def test_a_day_depends_on_that_user_and_day_alone(
    spark: SparkSession, history: pd.DataFrame, rows: pd.DataFrame
) -> None:
    some = {("user1", day) for day in history.loc[history["user_key"] == "user1", "event_date"].unique()[:3]}
    part = history[[pair in some for pair in zip(history["user_key"], history["event_date"], strict=True)]]
    alone = sorted_rows(days_of(spark, part))
    whole = [row for row in sorted_rows(days_of(spark, history)) if (row[0], row[1]) in some]
    assert alone == whole


def event(**values: Any) -> dict[str, Any]:
    base = dict.fromkeys(random_events(1, users=1).columns)
    ts = pd.Timestamp(values.pop("ts", "2024-03-01 10:00:00"), tz="UTC").to_pydatetime()
    return {**base, "user_key": "u", "ts": ts, "event_date": ts.date(), "ingest_id": 1, "kind": "purchase", **values}


def one_day(spark: SparkSession, *events: dict[str, Any], max_tokens: int = 8) -> dict[str, Any]:
    rows = pd.DataFrame([{**each, "event_id": f"e{number}"} for number, each in enumerate(events)])
    (row,) = days_of(spark, rows.astype(object), max_tokens).collect()
    return row.asDict(recursive=True)


def test_a_refund_lowers_spend_but_is_no_order(spark: SparkSession) -> None:
    day = one_day(
        spark,
        event(order_id="a", amount=30.0),
        event(order_id="a", amount=-10.0),
        event(order_id="earlier", amount=-5.0),
    )
    assert (day["orders"], day["items"]) == (1, 1)
    assert (float(day["spend"]), float(day["refunds"]), float(day["order_value_max"])) == (15.0, 15.0, 20.0)
    assert (float(day["order_value"]), day["order_value_sq"]) == (20.0, 400)


def test_items_looked_at_or_carted_count_as_bought_on_the_same_day_only(spark: SparkSession) -> None:
    look = {"kind": "browse", "amount": None}
    day = one_day(
        spark,
        event(**look, item_id="x", dwell_s=2.5),
        event(**look, item_id="x"),
        event(**look, item_id="y"),
        event(kind="cart", item_id="x"),
        event(kind="cart", item_id="z"),
        event(order_id="a", item_id="x", amount=1.0),
    )
    assert (day["items_browsed"], day["items_browsed_bought"]) == (2, 1)
    assert (day["items_carted"], day["items_carted_bought"]) == (2, 1)
    assert (day["browses"], day["dwelled"], day["dwell_milli"]) == (3, 1, 2500)


def test_searches_and_reviews_are_counted_by_their_words(spark: SparkSession) -> None:
    # of the texts 1 to 8, odd ones are cheap, those not divisible by 3 premium, by 4 name a brand; sentiment is n / 10 - 0.4
    day = one_day(
        spark,
        event(kind="search", text_id=1, item_id="i"),
        event(kind="search", text_id=6),
        event(kind="review", text_id=8, rating=5.0),
        event(kind="review", text_id=1, rating=2.0),
        event(kind="review", rating=3.0),
    )
    names = ("searches", "searches_clicked", "searches_cheap", "searches_premium", "searches_brand")
    assert [day[name] for name in names] == [2, 1, 1, 1, 2]
    assert (day["reviews"], day["rated"], day["rating_milli"], day["low_ratings"]) == (3, 3, 10_000, 1)
    assert (day["worded_reviews"], day["sentiment_centi"]) == (2, 40 - 30)


def test_the_newest_tokens_of_a_day_are_kept_oldest_first(spark: SparkSession) -> None:
    browses = [event(kind="browse", ts=f"2024-03-01 10:00:{second:02d}") for second in range(10)]
    day = one_day(spark, *browses, event(order_id="a", amount=2.0, ts="2024-03-01 09:00:00"), max_tokens=4)
    assert [token["ts"].second for token in day["tokens"]] == [6, 7, 8, 9]
    assert day["browses"] == 10


def test_a_day_without_money_is_no_purchase_day(spark: SparkSession) -> None:
    gift = {"order_id": "a", "amount": 0.0, "quantity": 1.0, "item_id": "i"}
    day = one_day(spark, event(**gift), event(**gift, event_id="other"), event(order_id="b", amount=-5.0))
    assert (day["orders"], day["items"], float(day["spend"]), float(day["refunds"])) == (0, 0, -5.0, 5.0)
    assert [token["items"] for token in day["tokens"]] == [0, 0]
    # a gift in an order that is paid is one of its lines
    day = one_day(spark, event(**gift), event(order_id="a", amount=2.0))
    assert (day["orders"], day["items"], float(day["spend"])) == (1, 2, 2.0)


def test_categories_hold_spend_and_prices(spark: SparkSession) -> None:
    milk = {"order_id": "a", "category": "Food > Milk"}
    day = one_day(
        spark,
        event(**milk, amount=2.0, quantity=2.0),
        event(**milk, amount=1.5, discount=0.5, quantity=0.0),
        event(order_id="a", category=None, amount=7.0, quantity=1.0),
    )
    (entry,) = day["categories"]
    assert entry == {"category": "Food > Milk", "spend": 350, "priced": 1, "price_micro": 0, "price_sq": 0}


@pytest.mark.slow
def test_a_user_with_a_million_events_and_an_item_in_a_third_of_them_stay_small(spark: SparkSession) -> None:
    count = 1_000_000
    n = F.col("id")
    second = F.timestamp_seconds(F.lit(1_700_000_000) + n * 20)
    whale = spark.range(count).select(
        F.concat(F.lit("e"), n).alias("event_id"),
        F.when(n % 10 == 0, F.concat(F.lit("u"), n % 1000)).otherwise("whale").alias("user_key"),
        second.alias("ts"),
        second.cast("date").alias("event_date"),
        F.lit("browse").alias("kind"),
        F.lit(None).cast("string").alias("order_id"),
        F.when(n % 3 == 0, F.lit("hot")).otherwise(F.concat(F.lit("i"), n % 5000)).alias("item_id"),
        *(F.lit(None).cast(t).alias(name) for name, t in (("category", "string"), ("text_id", "bigint"))),
        *(F.lit(None).cast("decimal(18,2)").alias(name) for name in ("amount", "discount", "coupon_discount")),
        *(F.lit(None).cast("double").alias(name) for name in ("quantity", "rating", "dwell_s")),
        F.lit(1).cast("bigint").alias("ingest_id"),
    )
    rows = user_daily.user_daily(whale, texts_frame(spark), embeddings_frame(spark), 64)
    largest = rows.agg(F.sum("browses"), F.max(F.size("tokens")), F.max("browses")).first()
    assert largest is not None
    assert (largest[0], largest[1]) == (count, 64)
    assert largest[2] > 3000


def test_absurd_orders_and_quantities_still_come_to_a_day(spark: SparkSession, history: pd.DataFrame) -> None:
    rows = (
        history[(history["kind"] == "purchase") & history["category"].notna() & (history["amount"] > 0)].head(2).copy()
    )
    rows["order_id"], rows["ts"], rows["event_date"] = ["a", "b"], rows["ts"].iloc[0], rows["event_date"].iloc[0]
    rows["user_key"], rows["category"], rows["amount"], rows["quantity"] = "u", "Food", 3e9, 5e-324
    [day] = days_of(spark, rows).collect()
    assert (float(day["spend"]), day["order_value_sq"]) == (6e9, 2**63 - 1)
    assert [(entry["spend"], entry["priced"]) for entry in day["categories"]] == [(600_000_000_000, 0)]
