"""Features of prospects: of users made by hand, and that nothing on the date or later changes one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession

from bp_spark.features import prospects
from bp_spark.features.prospects import FEATURES, PROSPECT_SOURCES
from bp_spark.lakehouse.schema import conform
from bp_spark.lakehouse.tables import (
    CAMPAIGN_CONTACTS,
    CONSULTATIONS,
    PROSPECT_FEATURES,
    RAW_USERS,
    TABLE_NAMES,
    USER_DAILY,
)
from tests.support.rows import frame

AS_OF = date(2024, 3, 10)
EARLIER = AS_OF - timedelta(days=14)


def ago(days: int) -> date:
    return AS_OF - timedelta(days=days)


def day(user: str, days: int, **measures: int) -> dict[str, Any]:
    return {"user_key": user, "day": ago(days), **measures}


def talk(user: str, days: int) -> dict[str, Any]:
    return {"user_key": user, "event_date": ago(days), "consultation_id": f"{user}{days}"}


def mail(user: str, days: int) -> dict[str, Any]:
    return {"user_key": user, "first_day": ago(days), "contact_id": f"{user}{days}"}


def signup(user: str, days: int, ingest_id: int = 1, hour: int = 12) -> dict[str, Any]:
    day = ago(days)
    ts = datetime(day.year, day.month, day.day, hour, tzinfo=UTC)
    return {"user_key": user, "signup_ts": ts, "ingest_id": ingest_id}


DAYS = [
    day("visitor", 200, browses=4),
    day("visitor", 40, browses=3, clicks=1, items_browsed=2, dwelled=2, dwell_milli=9_000, searches=1),
    day("visitor", 3, browses=1, carts=1, items_carted=1, searches=2, searches_cheap=1, searches_premium=1),
    day("visitor", -1, orders=1),
    day("buyer", 100, orders=1),
    day("buyer", 2, browses=9),
    day("newcomer", 20, clicks=2),
    day("newcomer", 10, orders=1),
    day("gone", 181, browses=1),
    day("refunded", 5, reviews=1),
    day("tomorrow", 0, browses=1),
]
TALKS = [talk("caller", 35), talk("caller", 12), talk("visitor", 0)]
MAILS = [mail("addressed", 90), mail("visitor", 30), mail("visitor", 31), mail("visitor", -5)]
SIGNUPS = [
    signup("visitor", 200),
    signup("buyer", 110),
    signup("registered", 8),
    signup("long ago", 181),
    signup("tomorrow", 0),
    # of an export that knows no day
    {"user_key": "refunded", "signup_ts": datetime(1970, 1, 1, tzinfo=UTC), "ingest_id": 1},
]


def features_of(
    spark: SparkSession,
    days: list[dict[str, Any]],
    talks: list[dict[str, Any]] | None,
    mails: list[dict[str, Any]] | None,
    signups: list[dict[str, Any]] | None = None,
    dates: Sequence[date] = (AS_OF, EARLIER),
) -> dict[tuple[str, date], dict[str, Any]]:
    def rows(table: Any, values: list[dict[str, Any]] | None) -> DataFrame | None:
        return None if values is None else frame(spark, table, *values)

    users = rows(RAW_USERS, signups)
    registered = None if users is None else prospects.registrations(users, date(2015, 1, 1), "UTC")
    traces = prospects.traces(
        frame(spark, USER_DAILY, *days), rows(CONSULTATIONS, talks), rows(CAMPAIGN_CONTACTS, mails), registered
    )
    found = conform(prospects.prospect_features(traces, dates, 180, "x"), PROSPECT_FEATURES)
    return {(row["user_key"], row["as_of_date"]): row.asDict() for row in found.collect()}


@pytest.fixture(scope="module")
def rows(spark: SparkSession) -> dict[tuple[str, date], dict[str, Any]]:
    return features_of(spark, DAYS, TALKS, MAILS, SIGNUPS)


def test_prospects_are_users_who_were_seen_lately_and_have_not_bought(rows: dict[tuple[str, date], Any]) -> None:
    assert {user for user, as_of in rows if as_of == AS_OF} == {
        "visitor",
        "refunded",
        "caller",
        "addressed",
        "registered",
    }
    # the newcomer had not bought yet
    assert {user for user, as_of in rows if as_of == EARLIER} == {
        "visitor",
        "newcomer",
        "gone",
        "caller",
        "addressed",
        "long ago",
    }


def test_features_are_those_of_the_days_before_the_date(rows: dict[tuple[str, date], Any]) -> None:
    expected: dict[str, float | None] = {
        **dict.fromkeys(FEATURES, 0.0),
        "days_known": 200,
        "days_since_seen": 3,
        "days_since_event": 3,
        "active_days_7d": 1,
        "active_days_30d": 1,
        "active_days_90d": 2,
        "browses_7d": 1,
        "browses_30d": 1,
        "browses_90d": 4,
        "clicks_90d": 1,
        "carts_7d": 1,
        "carts_30d": 1,
        "carts_90d": 1,
        "searches_30d": 2,
        "searches_90d": 3,
        "items_browsed_90d": 2,
        "items_carted_90d": 1,
        "searches_cheap_90d": 1,
        "searches_premium_90d": 1,
        "dwell_mean_90d": 4.5,
        "days_since_consultation": None,
        "contacts_30d": 1,
        "contacts_90d": 2,
        "days_since_contact": 30,
        "days_since_registration": 200,
    }
    assert {name: rows["visitor", AS_OF][name] for name in FEATURES} == expected
    caller = rows["caller", AS_OF]
    assert (caller["consultations_30d"], caller["consultations_90d"], caller["days_since_consultation"]) == (1, 2, 12)
    assert (caller["days_since_event"], caller["days_since_seen"], caller["days_known"]) == (None, 12, 35)
    assert (caller["dwell_mean_90d"], caller["browses_90d"]) == (None, 0)
    registered = rows["registered", AS_OF]
    assert [registered[f"days_{name}"] for name in ("known", "since_seen", "since_registration")] == [8, 8, 8]
    assert (registered["days_since_event"], registered["active_days_90d"]) == (None, 0)


def test_what_a_platform_does_not_deliver_is_unknown_and_not_0(spark: SparkSession) -> None:
    found = features_of(spark, DAYS, None, MAILS)["visitor", AS_OF]
    assert [found[name] for name in FEATURES if "consultation" in name] == [None, None, None]
    assert found["contacts_90d"] == 2
    assert found["days_since_registration"] is None


def test_of_a_user_who_is_delivered_time_and_again_the_first_registration_counts_and_no_other_attribute(
    spark: SparkSession,
) -> None:
    again = [signup("registered", 8), signup("registered", 8, ingest_id=2), signup("registered", 2, ingest_id=3)]
    told = features_of(spark, [], None, None, again)
    rich = [{**row, "segment": {"income": "high"}} for row in again]
    assert told == features_of(spark, [], None, None, rich)
    assert list(told) == [("registered", AS_OF)]
    assert told["registered", AS_OF]["days_since_registration"] == 8


def test_a_registration_counts_on_the_day_that_the_clock_showed(spark: SparkSession) -> None:
    users = frame(spark, RAW_USERS, signup("late", 8, hour=23), {"user_key": "unknown", "signup_ts": None})
    days = {zone: prospects.registrations(users, date(2015, 1, 1), zone).collect() for zone in ("UTC", "Asia/Shanghai")}
    assert {zone: [(row["user_key"], row["day"]) for row in rows] for zone, rows in days.items()} == {
        "UTC": [("late", ago(8))],
        "Asia/Shanghai": [("late", ago(7))],
    }


def test_nothing_on_the_date_or_later_changes_a_feature(spark: SparkSession) -> None:
    rng = np.random.default_rng(5)
    users = [f"user{n}" for n in range(25)]

    def random_days(count: int, oldest: int, newest: int) -> list[dict[str, Any]]:
        chosen = {(str(rng.choice(users)), int(ago_)) for ago_ in rng.integers(newest, oldest, count)}
        measures = ("browses", "clicks", "carts", "searches", "reviews", "dwelled", "dwell_milli")
        return [
            day(user, ago_, orders=int(rng.random() < 0.1), **{name: int(rng.integers(0, 5)) for name in measures})
            for user, ago_ in sorted(chosen)
        ]

    before = (
        random_days(80, 250, 1),
        [talk(user, 30) for user in users[::3]],
        [mail(user, 50) for user in users[::4]],
        [signup(user, 60) for user in users[::5]],
    )
    after = (
        random_days(40, 1, -60),
        [talk(user, 0) for user in users],
        [mail(user, -3) for user in users],
        [signup(user, 0) for user in users[1::5]],
    )
    everything = [one + other for one, other in zip(before, after, strict=True)]
    # a later date among those asked for sees more, and the earlier one doesn't
    both = features_of(spark, *everything, [AS_OF, ago(-30)])
    alone = features_of(spark, *before, [AS_OF])
    assert len(alone) > 10
    assert {key: row for key, row in both.items() if key[1] == AS_OF} == alone


def test_each_feature_is_a_column_and_each_source_a_table() -> None:
    assert 20 <= len(FEATURES) <= 40
    assert set(PROSPECT_SOURCES) <= set(TABLE_NAMES)
