"""Features: their values on histories worked out by hand, and that nothing of the future or of the cluster shows in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, Row, SparkSession

from bp_spark.core.config import FeaturesConfig
from bp_spark.features import catalogue as features
from bp_spark.features import user_daily
from bp_spark.features.aggregates import SEQUENCE_COLUMNS
from bp_spark.features.catalogue import catalogue, user_features_table
from bp_spark.features.categories import CATEGORY_BUCKETS
from bp_spark.lakehouse.schema import conform
from bp_spark.lakehouse.store import Lakehouse
from tests.support.histories import AS_OF, embeddings_frame, events_frame, random_events, sorted_rows, texts_frame

CONFIG = FeaturesConfig(history_length=8)
FEW = FeaturesConfig(history_length=8, windows=(30, 90))
"""For what holds of any feature: to plan all of them takes seconds."""


def features_of(spark: SparkSession, rows: pd.DataFrame, *as_of: date, config: FeaturesConfig = CONFIG) -> DataFrame:
    days = user_daily.user_daily(events_frame(spark, rows), texts_frame(spark), embeddings_frame(spark), 8)
    result = features.user_features(days.localCheckpoint(), as_of or [AS_OF], config, "test")
    return conform(result, user_features_table(config))


def purchases(*lines: tuple[int, float], **more: object) -> pd.DataFrame:
    """Orders of one user, one a line: (days before AS_OF, amount), at noon."""
    base = random_events(1, users=1).iloc[:0]
    rows = []
    for number, (age, amount) in enumerate(lines):
        ts = datetime(AS_OF.year, AS_OF.month, AS_OF.day, 12, tzinfo=UTC) - timedelta(days=age)
        values = {"event_id": f"e{number}", "order_id": f"o{number}", "amount": amount, "kind": "purchase", **more}
        rows.append(
            {
                **dict.fromkeys(base.columns),
                "user_key": "u",
                "ts": ts,
                "event_date": ts.date(),
                "ingest_id": 1,
                **values,
            }
        )
    return pd.DataFrame(rows).astype(object)


def together(histories: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One log of users who know nothing of each other: name -> events."""
    rows = pd.concat([rows.assign(user_key=name) for name, rows in histories.items()], ignore_index=True)
    return rows.assign(event_id=[f"e{number}" for number in range(len(rows))])


MIDNIGHT = pd.Timestamp(AS_OF, tz="UTC")
SEEN = {1: 1, 15: 15, 17: 16, 63: 60, 64: 64, 100: 96, 300: 288}
"""Days of silence -> those that features tell."""
PRICES = {"cheap": 1.0, "dear": math.e**2}
BY_HAND = {
    "buyer": purchases((100, 10.0), (40, 20.0), (40, 5.0), (3, 40.0)),
    "at the edge of a window": purchases((30, 1.0), (31, 2.0)),
    "with gaps": purchases((50, 1.0), (40, 1.0), (10, 1.0)),
    "with a trend": purchases((60, 600.0), (10, 300.0)),
    "of six weeks": purchases(*((7 * week + 3, 10.0 * (week + 1)) for week in range(6))),
    "with equal orders": purchases((20, 30.0), (9, 30.0), (4, -30.0)),
    "with habits": purchases((1, 30.0), (8, 10.0), (2, 60.0)),
    "of two years": purchases((400, 1.0), (300, 30.0), (10, 10.0)),
    "of one year": purchases((300, 30.0)),
    "of two categories": pd.concat(
        [purchases((5, 30.0), category="A > x"), purchases((200, 10.0), category="B > y")], ignore_index=True
    ),
    **{
        user: purchases(*((5 + order, price) for order in range(6)), category="T > x", quantity=1.0)
        for user, price in PRICES.items()
    },
    "with a refund": purchases((5, 80.0), (4, -20.0), discount=10.0, coupon_discount=5.0),
    "with nothing but a refund": purchases((5, -20.0)),
    "with many events": purchases(*((age, float(age)) for age in range(20, 0, -1))),
    **{f"silent for {days}": purchases((days + 5, 1.0), (days, 2.0)) for days in SEEN},
    **{
        name: pd.concat([purchases((5, 1.0)), purchases((1, 1.0), ts=ts, event_date=ts.date())], ignore_index=True)
        for name, ts in {
            "of the last microsecond": (MIDNIGHT - pd.Timedelta(microseconds=1)).to_pydatetime(),
            "of midnight": MIDNIGHT.to_pydatetime(),
        }.items()
    },
}
"""Histories of a few users, worked out by hand."""


@pytest.fixture(scope="module")
def by_hand(spark: SparkSession) -> dict[str, Row]:
    return {row.user_key: row for row in features_of(spark, together(BY_HAND)).collect()}


def test_recency_frequency_and_monetary_value(by_hand: dict[str, Row]) -> None:
    row = by_hand["buyer"]
    assert (row.recency_days, row.tenure_days, row.active_span_days, row.frequency) == (3, 100, 97, 2)
    assert (row.spend_total, row.monetary_value) == (75, 25)
    assert (row.spend_7d, row.spend_30d, row.spend_60d, row.spend_180d) == (40, 40, 65, 75)
    assert (row.orders_30d, row.orders_60d, row.items_365d) == (1, 3, 4)
    assert row.spend_rate_365d == pytest.approx(0.75)


def test_a_window_includes_its_last_day_and_no_older_one(by_hand: dict[str, Row]) -> None:
    row = by_hand["at the edge of a window"]
    assert (row.spend_30d, row.spend_60d) == (1, 3)


def test_gaps_between_orders(by_hand: dict[str, Row]) -> None:
    row = by_hand["with gaps"]
    assert (row.gap_mean_days, row.gap_median_days, row.gap_max_days, row.gap_last_days) == (20, 20, 30, 30)
    assert row.gap_std_days == 10
    assert (row.overdue, row.overdue_longest) == (0.5, pytest.approx(1 / 3))


def test_half_of_the_weeks_have_no_more_than_the_median(by_hand: dict[str, Row]) -> None:
    # six weeks of 0, then 10, 20, ..., 60: between 0 and 10
    assert by_hand["of six weeks"].weekly_spend_median == 5


def test_a_refund_scatters_no_order_values(by_hand: dict[str, Row]) -> None:
    assert by_hand["with equal orders"].order_value_std == 0
    # 10, 40 and 25 of two orders on a day
    assert by_hand["buyer"].order_value_std == pytest.approx(np.std([10, 20, 5, 40]))


def test_trend_compares_daily_rates(by_hand: dict[str, Row]) -> None:
    assert by_hand["with a trend"].trend_30d_60d == pytest.approx(math.log((300 / 30 + 1) / (900 / 60 + 1)))


def test_habits_are_shares(by_hand: dict[str, Row]) -> None:
    row = by_hand["with habits"]
    yesterday = (AS_OF - timedelta(days=1)).strftime("%A").lower()
    assert row[f"share_{yesterday}"] == pytest.approx(0.4)
    assert sum(row[f"share_{day}"] for day in ("monday", "tuesday", "wednesday", "thursday", "friday")) + (
        row.share_saturday + row.share_sunday
    ) == pytest.approx(1)
    assert (row.share_afternoon, row.share_night) == (1, 0)


def test_the_same_period_last_year_needs_a_year_of_history(by_hand: dict[str, Row]) -> None:
    row = by_hand["of two years"]
    assert row.spend_same_period_last_year == 30
    assert row.season_share_last_year == pytest.approx(0.75)
    assert by_hand["of one year"].spend_same_period_last_year is None


def test_categories_diversity_and_shares(by_hand: dict[str, Row]) -> None:
    row = by_hand["of two categories"]
    assert (row.categories_90d, row.categories_365d, row.category_types_365d) == (1, 2, 2)
    assert (row.category_share_top1, row.category_share_top2, row.category_share_top3) == (0.75, 0.25, 0)
    assert row.category_entropy_365d == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert sum(row[f"category_share_hash{n:02d}"] for n in range(CATEGORY_BUCKETS)) == pytest.approx(1)


def test_the_price_tier_is_a_position_within_the_category(by_hand: dict[str, Row]) -> None:
    cheap, dear = by_hand["cheap"], by_hand["dear"]
    # log prices 0 and 2, half each: mean 1, deviation 1
    assert (cheap.price_tier_90d, dear.price_tier_90d) == (pytest.approx(-1), pytest.approx(1))
    assert (cheap.premium_share_365d, dear.premium_share_365d) == (0, 1)


def test_refunds_and_discounts_are_shares_of_spend(by_hand: dict[str, Row]) -> None:
    row = by_hand["with a refund"]
    assert (row.refund_share_30d, row.orders_30d, row.spend_30d) == (0.25, 1, 60)
    assert row.discount_share_30d == pytest.approx(20 / 80)
    assert row.coupon_share_30d == pytest.approx(10 / 80)


def test_a_refund_alone_makes_no_customer(by_hand: dict[str, Row]) -> None:
    assert set(BY_HAND) - set(by_hand) == {"with nothing but a refund"}


def test_history_is_the_last_tokens_oldest_first(by_hand: dict[str, Row]) -> None:
    row = by_hand["with many events"]
    assert row.seq_amount == [8, 7, 6, 5, 4, 3, 2, 1]
    assert row.seq_age_days == pytest.approx([7.5, 6.5, 5.5, 4.5, 3.5, 2.5, 1.5, 0.5])
    assert {len(row[column.name]) for column in SEQUENCE_COLUMNS} == {8}
    yesterday = AS_OF - timedelta(days=1)
    assert (row.seq_weekday[-1], row.seq_hour[-1], row.seq_kind[-1]) == (yesterday.isoweekday(), 12, 1)


@pytest.mark.parametrize(("silent", "seen"), SEEN.items())
def test_a_silent_user_is_seen_as_of_the_last_tick(by_hand: dict[str, Row], silent: int, seen: int) -> None:
    row = by_hand[f"silent for {silent}"]
    assert (row.recency_days, row.tenure_days, row.gap_last_days) == (seen, seen + 5, 5)
    assert row.seen_on == AS_OF - timedelta(days=silent - seen)
    assert row.seq_age_days == pytest.approx([seen + 4.5, seen - 0.5])


@pytest.mark.parametrize(("name", "orders"), [("of the last microsecond", 2), ("of midnight", 1)])
def test_an_event_counts_until_the_last_microsecond_before_the_date(
    by_hand: dict[str, Row], name: str, orders: int
) -> None:
    assert by_hand[name].orders_30d == orders


def test_between_two_ticks_nothing_about_a_silent_user_changes(spark: SparkSession) -> None:
    rows = random_events(8, users=30)
    rows = rows[rows["ts"] < MIDNIGHT].astype(object)
    dates = [AS_OF + timedelta(days=n) for n in range(12)]
    rows_seen = features_of(spark, rows, *dates).drop("as_of_date").collect()
    states = {(row.user_key, row.seen_on) for row in rows_seen}
    assert len(states) < len(rows_seen)
    assert len({repr(row) for row in rows_seen}) == len(states)


def test_every_day_counts_where_silence_is_kept_exactly(spark: SparkSession) -> None:
    days = user_daily.user_daily(
        events_frame(spark, purchases((100, 2.0))), texts_frame(spark), embeddings_frame(spark), 8
    )
    exact = FEW.model_copy(update={"recency_precision_bits": None})
    (row,) = features.user_features(days, [AS_OF], exact, "test").collect()
    assert (row.recency_days, row.seen_on) == (100, AS_OF)


def world(seed: int) -> pd.DataFrame:
    """Users and categories of one seed, which share nothing with those of another."""
    rows = random_events(seed, users=12)
    return rows.assign(user_key=f"{seed}-" + rows["user_key"], category=f"{seed}-" + rows["category"])


def changed_after(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The same past, another future: events at or after AS_OF dropped, changed and added."""
    rng = np.random.default_rng(seed)
    late = rows["ts"] >= MIDNIGHT
    changed = rows[~late | (rng.random(len(rows)) < 0.5)].copy()
    touched = (changed["ts"] >= MIDNIGHT) & (changed["kind"] == "purchase")
    changed.loc[touched, "amount"] = changed.loc[touched, "amount"] * 7 + 1
    added = random_events(seed + 1, users=12)
    added = added[added["ts"] >= MIDNIGHT].assign(user_key=lambda df: f"{seed}-" + df["user_key"])
    return pd.concat([changed, added], ignore_index=True)


@settings(max_examples=1, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds=st.lists(st.integers(0, 2**31), min_size=4, max_size=4, unique=True))
def test_future_events_do_not_change_features(spark: SparkSession, seeds: list[int]) -> None:
    def features_before(worlds: list[pd.DataFrame]) -> list[tuple[Any, ...]]:
        rows = pd.concat(worlds, ignore_index=True).astype(object)
        return sorted_rows(features_of(spark, rows.assign(event_id=[f"e{n}" for n in range(len(rows))])))

    assert features_before([world(seed) for seed in seeds]) == features_before(
        [changed_after(world(seed), seed) for seed in seeds]
    )


def test_several_dates_at_once_are_those_dates_alone(spark: SparkSession) -> None:
    rows = random_events(5).astype(object)
    dates = [AS_OF - timedelta(days=days) for days in (0, 1, 45)]
    at_once = sorted_rows(features_of(spark, rows, *dates, config=FEW))
    alone = [row for day in dates for row in sorted_rows(features_of(spark, rows, day, config=FEW))]
    assert at_once == sorted(alone, key=repr)
    assert len({row[1] for row in at_once}) == 3


def test_the_number_of_tasks_and_the_order_of_rows_change_nothing(spark: SparkSession) -> None:
    rows = random_events(6).astype(object)
    before = sorted_rows(features_of(spark, rows, config=FEW))
    tasks = spark.conf.get("spark.sql.shuffle.partitions")
    spark.conf.set("spark.sql.shuffle.partitions", "7")
    spark.conf.set("spark.sql.adaptive.enabled", "false")
    try:
        assert sorted_rows(features_of(spark, rows.sample(frac=1, random_state=1), config=FEW)) == before
    finally:
        spark.conf.set("spark.sql.shuffle.partitions", str(tasks))
        spark.conf.unset("spark.sql.adaptive.enabled")


def test_a_feature_of_a_random_history_is_what_pandas_says(spark: SparkSession) -> None:
    rows = random_events(9, users=15)
    past = rows[(rows["ts"] < MIDNIGHT) & (rows["kind"] == "purchase")]
    table = features_of(spark, rows.astype(object)).toPandas().set_index("user_key")
    buyers = past[past["amount"] >= 0]["user_key"].unique()
    assert sorted(table.index) == sorted(buyers)
    age = (pd.Timestamp(AS_OF) - pd.to_datetime(past["event_date"])).dt.days
    for days in (7, 30, 90):
        spend = past[age <= days].groupby("user_key")["amount"].sum().reindex(table.index, fill_value=0)
        np.testing.assert_allclose(table[f"spend_{days}d"], spend, rtol=1e-5, atol=1e-3)
        orders = past[(age <= days) & (past["amount"] >= 0)].groupby("user_key")
        count = orders.apply(lambda df: len(df[["event_date", "order_id"]].drop_duplicates()), include_groups=False)
        assert (table[f"orders_{days}d"] == count.reindex(table.index, fill_value=0)).all()


def test_every_feature_says_what_it_is(spark: SparkSession, lakehouse: Lakehouse) -> None:
    defined = catalogue(FeaturesConfig())
    assert len(set(defined.names)) == len(defined.names) >= 120
    assert all(f.description and f.unit and f.window for f in defined.features)
    table = user_features_table(CONFIG)
    lakehouse.replace(table, spark.createDataFrame([], table.schema), where={"as_of_date": [AS_OF]})
    comments = {field.name: field.metadata.get("comment") for field in lakehouse.read("user_features").schema.fields}
    assert comments["spend_30d"] == "Spend less refunds [currency; 30 days]"
    assert all(comments.values())
