"""Profiles and what is made from them: each definition on users made by hand, and no segment that tells of few."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark import pipeline
from bp_spark.core import config
from bp_spark.core.config import Config, FeaturesConfig, PhrasesConfig, ProfilesConfig
from bp_spark.core.errors import BundleError, ConfigError, ConflictError, DataError
from bp_spark.features.catalogue import catalogue, user_features_table
from bp_spark.lakehouse.schema import Table
from bp_spark.lakehouse.store import Lakehouse, read_as_declared
from bp_spark.lakehouse.tables import (
    CONSULTATION_TOPICS,
    CONSULTATIONS,
    EVENTS,
    FORGOTTEN,
    PROFILE_TABLES,
    RAW_USERS,
    RECOMMENDATIONS,
    SCORES,
    SCORES_LATEST,
    SHARED_TABLES,
    TABLE_NAMES,
    USER_DAILY,
    USER_PROFILE,
)
from bp_spark.model.refunds import Refunds
from bp_spark.model.totals import TotalError, Totals, interval
from bp_spark.registry import bundle as bundles
from bp_spark.scoring.profiles.affinity import category_affinity
from bp_spark.scoring.profiles.applications import customer_service, last_consultations
from bp_spark.scoring.profiles.margins import with_margin_share
from bp_spark.scoring.profiles.segments import CELL, market_segments
from bp_spark.scoring.profiles.user_profile import discounted_value, user_profile
from tests.support.harness import small_bundle
from tests.support.histories import sorted_rows
from tests.support.rows import forget_column, frame

pytestmark = pytest.mark.slow

DAY = date(2024, 3, 10)
DOCS = (Path(__file__).parents[2] / "docs/profiles.md").read_text(encoding="utf-8")
SETTINGS = [
    "features.windows=[30, 365]",
    "profiles.window_days=100",
    "profiles.half_life_days=10",
    "privacy.smallest_group=2",
    "profiles.region_segment=region",
]
NAMES = [table.name for table in PROFILE_TABLES]
ERRORS = Totals(0.9, (TotalError(30, 0.1, 0.2, 2.0, 0.5, 4.0), TotalError(90, 0.05, 0.1, 3.0, 0.0, 2.0)))
REFUNDS = Refunds(0.05, 100.0)
CATALOGUE = catalogue(FeaturesConfig(windows=(30, 365)))


def ago(days: int) -> date:
    return DAY - timedelta(days=days)


def score(user: str, day: date, value: float, **more: Any) -> dict[str, Any]:
    level, expected = "EDCBA"[min(4, int(value // 20))], more.get("expected_spend", 0.0)
    known = {"level": level, "risk_level": "low", "expected_by_horizon": {30: expected / 4, 90: expected}}
    return {"user_key": user, "score_date": day, "score": value, **known, "bundle_digest": "gone", **more}


def feature(user: str, **more: Any) -> dict[str, Any]:
    return {"user_key": user, "as_of_date": DAY, "seen_on": DAY, **more}


def bought(user: str, days: int, category: str, cents: int, price: float | None = None) -> dict[str, Any]:
    log = 0.0 if price is None else float(np.log(price))
    entry = (category, cents, int(price is not None), round(log * 1e6), round((log * 1e3) ** 2))
    spend = Decimal(cents) / 100
    return {"user_key": user, "day": ago(days), "orders": 1, "spend": spend, "categories": [entry]}


def looked(user: str, days: int, kind: str, category: str | None) -> dict[str, Any]:
    return {"user_key": user, "event_date": ago(days), "kind": kind, "category": category}


@dataclass
class Platform:
    """Four users, scored on three dates, and their profiles."""

    spark: SparkSession
    settings: Config
    stages: list[dict[str, Any]]

    @property
    def lakehouse(self) -> Lakehouse:
        return Lakehouse(self.spark, self.settings.tables)

    def versions(self) -> dict[str, int]:
        return {name: self.lakehouse.version(name) for name in NAMES}

    def inputs(self) -> set[str | None]:
        return {self.lakehouse.inputs(name) for name in NAMES}

    def arrow(self, name: str) -> Any:
        return DeltaTable(self.lakehouse.location(name)).to_pyarrow_table()

    def rows(self, name: str) -> dict[str, dict[str, Any]]:
        """Of a table with a row for each user."""
        return {row["user_key"]: row for row in self.arrow(name).to_pylist()}


@pytest.fixture(scope="module")
def platform(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    folder = tmp_path_factory.mktemp("profiles")
    settings = config.load(overrides=[*SETTINGS, f"tables.path={folder}/lakehouse"])
    features = user_features_table(settings.features)
    rows: dict[Table, list[dict[str, Any]]] = {
        SCORES: [
            score("a", DAY, 85.0, expected_spend=100.0, low=50.0, high=150.0, p_active=0.9, horizon_days=14),
            score("b", DAY, 50.0, expected_spend=2.0, low=0.0, high=20.0, p_active=0.6, risk_level="high"),
            score("c", DAY, 10.0, expected_spend=5.0, low=0.0, high=10.0, p_active=0.2, risk_level="medium"),
            score("d", DAY, 15.0, expected_spend=4.0, low=1.0, high=9.0, p_active=0.9),
            # nearest to 30 days before; another is a day further off
            *(score("a", ago(28), 75.0), score("b", ago(28), 80.0), score("c", ago(28), 12.0)),
            *(score("a", ago(33), 1.0), score("b", ago(33), 1.0)),
            # nearest of all, and by another bundle
            score("a", ago(30), 1.0, bundle_digest="another"),
            score("a", ago(90), 84.0),
        ],
        features: [
            feature(
                "a",
                recency_days=2.0,
                activity_recency_days=1.0,
                frequency=9.0,
                tenure_days=90.0,
                price_tier_365d=-1.0,
                gap_mean_days=10.0,
                monetary_value=12.0,
                refund_share_365d=0.0,
                discount_share_90d=0.4,
                weekly_spend_variation=1.0,
            ),
            feature(
                "b",
                seen_on=ago(4),
                recency_days=40.0,
                frequency=1.0,
                tenure_days=60.0,
                gap_mean_days=20.0,
                monetary_value=24.0,
                spend_365d=70.0,
                refund_share_365d=0.3,
                weekly_spend_variation=3.3,
            ),
            feature(
                "c",
                recency_days=200.0,
                activity_recency_days=150.0,
                frequency=3.0,
                tenure_days=300.0,
                price_tier_365d=0.5,
                gap_mean_days=30.0,
                monetary_value=7.0,
                spend_365d=475.0,
                refund_share_365d=0.05,
                low_ratings_365d=0.6,
            ),
            feature("d", recency_days=5.0, frequency=0.0, tenure_days=5.0, monetary_value=4.0),
            # another date's are not read
            feature("a", as_of_date=ago(28), frequency=70.0, tenure_days=1.0),
        ],
        USER_DAILY: [
            bought("a", 10, "Food > Dairy > Milk", 1000),
            bought("a", 10, "Food > Dairy > Cheese", 3000, price=4.0),
            bought("a", 20, "Home > Garden > Tools", 8000, price=80.0),
            bought("b", 5, "Food > Dairy > Milk", 1600, price=16.0),
            # before the window, and not yet known
            bought("c", 101, "Home > Textiles", 9000),
            bought("a", 0, "Travel", 900_000, price=9000.0),
        ],
        EVENTS: [
            *[looked("a", 10, kind, "Home > Garden > Plants") for kind in ("browse", "click", "cart")],
            looked("a", 10, "favourite", "Toys"),
            looked("a", 10, "click", None),
            looked("a", 0, "click", "Travel"),
            looked("a", 10, "purchase", "Books"),
        ],
        RAW_USERS: [
            {"user_key": "a", "segment": {"region": "south"}, "ingest_id": 1},
            {"user_key": "a", "segment": {"region": "north"}, "ingest_id": 2},
            {"user_key": "b", "segment": {"region": "south"}, "ingest_id": 1},
            {"user_key": "c", "segment": {"region": "north", "age": "30"}, "ingest_id": 1},
        ],
    }
    lakehouse = Lakehouse(spark, settings.tables)
    for table, values in rows.items():
        lakehouse.replace(table, frame(spark, table, *values))
    return Platform(spark, settings, pipeline.profile(spark, settings))


def summed_settings(folder: Path) -> Config:
    return config.load(overrides=[*SETTINGS, f"tables.path={folder}/lakehouse", f"bundles={folder}/bundles"])


@pytest.fixture(scope="module")
def summed(platform: Platform, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """The same users, scored by a bundle that knows the error of sums."""
    folder = tmp_path_factory.mktemp("summed")
    bundle = small_bundle(folder / "bundles" / "one", 20.0, ERRORS, REFUNDS)
    assert bundles.load(bundle.folder).totals == ERRORS
    assert bundles.load(bundle.folder).refunds == REFUNDS
    shutil.copytree(str(platform.settings.tables.path), folder / "lakehouse")
    settings = summed_settings(folder)
    lakehouse = Lakehouse(spark, settings.tables)
    digest = F.when(F.col("bundle_digest") == "gone", F.lit(bundle.digest)).otherwise(F.col("bundle_digest"))
    # thirty weeks in which everyone buys: a and b food, c and d things for the home
    weekly = [(user, ago(7 * week + day)) for week in range(30) for day, user in enumerate("abcd", 1)]
    category = dict(zip("abcd", ("Food > x", "Food > y", "Home", "Home > z"), strict=True))
    daily = [{"user_key": user, "day": day, "orders": 1, "spend": Decimal(10)} for user, day in weekly]
    lines = [
        {"user_key": user, "event_date": day, "kind": "purchase", "category": category[user], "amount": Decimal(10)}
        for user, day in weekly
    ]
    lakehouse.append(USER_DAILY, frame(spark, USER_DAILY, *daily))
    lakehouse.append(EVENTS, frame(spark, EVENTS, *lines))
    scores = lakehouse.read("scores").withColumn("bundle_digest", digest).localCheckpoint()
    lakehouse.replace(SCORES, scores)
    forget_column(lakehouse, SCORES, "horizon_days")
    lakehouse.replace(SCORES_LATEST, scores.filter(F.col("score_date") == F.lit(DAY)))
    return Platform(spark, settings, pipeline.profile(spark, settings))


def test_an_interest_is_a_mean_of_recent_shares_of_purchases_and_clicks(platform: Platform) -> None:
    # purchases: 40 x 1/2 of Food > Dairy and 80 x 1/4 of Home > Garden; clicks: 3 to 1; no search
    wanted = {
        "Home > Garden": (0.6 * 0.5 + 0.25 * 0.75) / 0.85,
        "Food > Dairy": 0.6 * 0.5 / 0.85,
        "Toys": 0.25 * 0.25 / 0.85,
    }
    found = platform.rows("user_profile")
    interests = {each["category"]: each["weight"] for each in found["a"]["interests"]}
    assert list(interests) == list(wanted)
    assert interests == pytest.approx(wanted)
    assert [each["category"] for each in found["b"]["interests"]] == ["Food > Dairy"]
    assert found["c"]["interests"] == found["d"]["interests"] == []


def test_refunds_to_come_are_the_users_own_as_far_as_the_money_of_a_year_tells(
    platform: Platform, summed: Platform
) -> None:
    # a twentieth on this platform, which weighs as much as 100 of a user's money: b paid 100 and c 500
    wanted = {"a": 0.05, "b": (5 + 30) / 200, "c": 0.05, "d": 0.05}
    for name in ("user_profile", "risk_control"):
        found = {user: row["expected_refund_share"] for user, row in summed.rows(name).items()}
        assert found == pytest.approx(wanted, abs=1e-4)
    # the other platform's bundle is gone
    assert {row["expected_refund_share"] for row in platform.rows("user_profile").values()} == {None}


def test_margins_are_the_users_own_as_far_as_the_year_tells(platform: Platform, spark: SparkSession) -> None:
    def line(user: str, days: int, amount: int, cost: int | None) -> dict[str, Any]:
        row = {"user_key": user, "event_date": ago(days), "kind": "purchase", "amount": Decimal(amount)}
        return {**row, "cost": None if cost is None else Decimal(cost)}

    events = frame(
        spark,
        EVENTS,
        *(line("a", 10, 100, 60), line("a", 9, -20, -12), line("b", 365, 20, 18)),
        # of unknown cost, too old, not yet known, and of a user whose refunds leave nothing
        *(line("c", 10, 50, None), line("c", 366, 50, 1), line("c", 0, 50, 1), line("d", 5, -30, -1)),
    )
    users = platform.lakehouse.read("scores").filter(f"score_date = '{DAY}'").select("user_key")
    # the mean user spent 50, of which 17 were left
    wanted = {"a": (17 + 32) / (50 + 80), "b": (17 + 2) / (50 + 20), "c": 0.34, "d": 0.34}
    found = with_margin_share(users, events, DAY).collect()
    assert {row["user_key"]: row["margin_share"] for row in found} == pytest.approx(wanted)
    of_no_cost = events.withColumn("cost", F.lit(None).cast("decimal(18,2)")), events.drop("cost")
    for rows in of_no_cost:
        assert {row["margin_share"] for row in with_margin_share(users, rows, DAY).collect()} == {None}
    read, features = platform.lakehouse.read, f"as_of_date = '{DAY}'"
    profiles = user_profile(
        read("scores").filter(f"score_date = '{DAY}'"),
        {},
        read("user_features").filter(features),
        read("category_affinity"),
        events,
        DAY,
        ProfilesConfig(),
        CATALOGUE,
    )
    expected = {row["user_key"]: row["expected_margin"] for row in profiles.collect()}
    assert expected == pytest.approx(
        {user: wanted[user] * spend for user, spend in zip("abcd", (100, 2, 5, 4), strict=True)}
    )


def test_a_category_is_recommended_by_affinity_and_by_what_the_user_can_afford(platform: Platform) -> None:
    rows = {(row["user_key"], row["category"]): row for row in platform.arrow("category_affinity").to_pylist()}
    assert {user for user, _ in rows} == {"a", "b"}
    # unit prices of two users, 4 and 16: usual is 8, and half of that one standard deviation below
    dairy = rows["a", "Food > Dairy"]
    assert dairy["usual_price"] == pytest.approx(8, rel=1e-5)
    assert dairy["affordability"] == pytest.approx(12 / (12 + 4), rel=1e-4)
    assert dairy["fit"] == pytest.approx(dairy["affinity"] * dairy["affordability"])
    # the expected spend is less than the usual order
    assert rows["b", "Food > Dairy"]["affordability"] == pytest.approx(2 / (2 + 8), rel=1e-5)
    # one user's price is nobody else's to see
    garden = rows["a", "Home > Garden"]
    assert (garden["usual_price"], garden["affordability"]) == (None, None)
    assert garden["fit"] == pytest.approx(garden["affinity"] / 2)
    assert (garden["rank"], dairy["rank"], rows["a", "Toys"]["rank"]) == (1, 2, 3)
    shares = [garden[f"{source}_share"] for source in ("purchase", "click", "search")]
    assert shares == pytest.approx([0.5, 0.75, 0])


def test_a_user_has_only_so_many_categories(platform: Platform) -> None:
    few = platform.settings.profiles.model_copy(update={"affinities": 2})
    scores, features, daily, events = (
        platform.lakehouse.read(name) for name in ("scores", "user_features", "user_daily", "events")
    )
    now = (scores.filter(f"score_date = '{DAY}'"), features.filter(f"as_of_date = '{DAY}'"))
    rows = category_affinity(*now, daily, events, DAY, few, 2).collect()
    assert sorted((row["user_key"], row["rank"], row["category"]) for row in rows) == [
        ("a", 1, "Home > Garden"),
        ("a", 2, "Food > Dairy"),
        ("b", 1, "Food > Dairy"),
    ]


def test_a_stage_goes_by_the_days_since_the_first_and_the_last_purchase(platform: Platform) -> None:
    # b was last seen four days ago: days without events count here
    stages = {user: row["stage"] for user, row in platform.rows("user_profile").items()}
    assert stages == {"a": "active", "b": "lapsing", "c": "lapsed", "d": "new"}


def test_a_trend_goes_by_the_nearest_date_that_the_same_bundle_scored(platform: Platform) -> None:
    found = platform.rows("user_profile")
    months = {user: (row["compared_30d"], row["score_change_30d"], row["trend_30d"]) for user, row in found.items()}
    assert months == {
        "a": (ago(28), 10, "rising"),
        "b": (ago(28), -30, "falling"),
        "c": (ago(28), -2, "steady"),
        "d": (ago(28), None, "new"),
    }
    assert [found[user]["trend_90d"] for user in "abcd"] == ["steady", "new", "new", "new"]


def test_without_earlier_scores_there_is_no_trend(platform: Platform) -> None:
    read = platform.lakehouse.read
    scores = read("scores").filter(f"score_date = '{DAY}'")
    features = read("user_features").filter(f"as_of_date = '{DAY}'")
    tables = features, read("category_affinity"), read("events")
    alone = user_profile(scores, {}, *tables, DAY, ProfilesConfig(), CATALOGUE)
    trends = alone.select("compared_30d", "score_change_30d", "trend_30d", "compared_90d", "trend_90d").distinct()
    assert [tuple(row) for row in trends.collect()] == [(None,) * 5]


def test_why_so_much_is_expected_is_told_in_words(platform: Platform) -> None:
    read = platform.lakehouse.read
    told = (("recent purchases", -12.5, "spend_30d", 40.0), ("latest activity", 3.0, None, None))
    of_type = read("scores").schema["reasons"].dataType
    scores = read("scores").filter(f"score_date = '{DAY}'").withColumn("reasons", F.array().cast(of_type))
    listed = F.array(*(F.struct(*map(F.lit, one)) for one in told)).cast(of_type)
    features = read("user_features").filter(f"as_of_date = '{DAY}'")
    rows = user_profile(
        scores.withColumn("reasons", F.when(F.col("user_key") == "a", listed).otherwise(F.col("reasons"))),
        {},
        features,
        read("category_affinity"),
        read("events"),
        DAY,
        ProfilesConfig(),
        CATALOGUE,
    )
    found = {row["user_key"]: row["reasons"] for row in rows.select("user_key", "reasons").collect()}
    assert found["a"] == [
        "Recent purchases: -12.50; above all Spend less refunds (currency, 30 days) = 40.00",
        "Latest activity: +3.00",
    ]
    assert found["b"] == []


def test_tier_activity_and_facts_are_of_the_date(platform: Platform) -> None:
    found = platform.rows("user_profile")
    assert [found[user]["price_tier"] for user in "abcd"] == ["budget", None, "premium", None]
    assert [found[user]["activity"] for user in "abcd"] == ["active", "cooling", "dormant", "active"]
    # the clock of b has not told the last four days
    assert [found[user]["days_since_purchase"] for user in "abcd"] == [2, 44, 200, 5]
    assert [found[user]["days_since_visit"] for user in "abcd"] == [1, None, 150, None]
    assert [found[user]["purchase_days"] for user in "abcd"] == [10, 2, 4, 1]
    assert {row["score_date"] for row in found.values()} == {DAY}


def test_amounts_say_of_how_many_days_they_are(platform: Platform) -> None:
    for name in ("user_profile", "risk_control"):
        days = {user: row["horizon_days"] for user, row in platform.rows(name).items()}
        assert days == {"a": 14, "b": None, "c": None, "d": None}


def test_scores_of_an_older_version_tell_no_horizon(summed: Platform) -> None:
    assert "horizon_days" not in summed.lakehouse.read("scores").columns
    assert {row["horizon_days"] for row in summed.rows("user_profile").values()} == {None}


def test_risk_is_points_of_three_signals_with_its_reasons(platform: Platform) -> None:
    found = platform.rows("risk_control")
    assert {user: (row["risk_band"], row["risk_points"]) for user, row in found.items()} == {
        "a": ("low", 0),
        "b": ("high", 6),
        "c": ("medium", 2),
        "d": ("low", 0),
    }
    reasons = {user: [(one["signal"], one["points"]) for one in row["reasons"]] for user, row in found.items()}
    assert reasons["b"] == [("interval", 2), ("refunds", 2), ("volatility", 2)]
    assert reasons["c"] == [("interval", 1), ("refunds", 1)]
    assert reasons["a"] == reasons["d"] == []
    assert found["b"]["reasons"][1]["value"] == pytest.approx(0.3)
    assert found["b"]["reasons"][1]["text"] == "Refunds of the past year came to 0.30 times what was paid."


def test_the_next_purchase_is_expected_by_the_own_rhythm_and_the_populations(platform: Platform) -> None:
    found = platform.rows("user_profile")
    days_per_purchase = (90 + 64 + 300 + 5) / (9 + 1 + 3)
    waits = [round((2 * days_per_purchase + T) / (2 + x), 1) for T, x in ((90, 9), (64, 1))]
    assert [found[user]["next_purchase_days"] for user in "abcd"] == [*waits, None, None]
    assert found["a"]["next_purchase_on"] == DAY + timedelta(days=round(waits[0]))
    assert [found[user]["next_purchase_unknown"] for user in "abcd"] == [
        None,
        None,
        "unlikely to buy",
        "one purchase day",
    ]


def test_talking_points_are_the_three_most_important_in_words(platform: Platform) -> None:
    told = {
        user: [point["text"] for point in row["talking_points"]]
        for user, row in platform.rows("customer_service").items()
    }
    assert told == {
        "a": [
            "The score has risen by 10 points since 2024-02-11: show something new.",
            "Is most interested in Home > Garden.",
            "Buys mostly at reduced prices: speak of offers.",
        ],
        "b": [
            "Has returned 30 % of what was bought in the past year: ask what went wrong.",
            "Last bought 44 days ago, where every 20 days is usual: give a reason to come back.",
            "The score has fallen by 30 points since 2024-02-11: ask what is missing.",
        ],
        "c": [
            "Has returned 5 % of what was bought in the past year: ask what went wrong.",
            "Gave mostly low ratings in the past year: listen first.",
            "Buys in the upper price range: speak of quality.",
        ],
        "d": [],
    }


def test_phrases_can_be_of_another_language_and_name_only_what_is_known(platform: Platform) -> None:
    chinese = config.load(overrides=["profiles.phrases.favourite='最感兴趣的是{category}。'"]).profiles
    rows = customer_service(platform.lakehouse.read("user_profile"), chinese).collect()
    assert "最感兴趣的是Home > Garden。" in {point["text"] for row in rows for point in row["talking_points"]}
    with pytest.raises(ConfigError, match=r"names \{user\}; what can be filled in there is \{category\}"):
        config.load(overrides=["profiles.phrases.favourite='{user} likes {category}'"])


def test_value_discounts_each_span_between_horizons_from_its_middle(platform: Platform) -> None:
    # 25 within 30 days, 75 more within 90
    worth = 25 / 1.1 ** (15 / 365) + 75 / 1.1 ** (60 / 365)
    value_by_user = {user: row["value"] for user, row in platform.rows("user_profile").items()}
    assert value_by_user == {
        user: pytest.approx(worth * spend / 100) for user, spend in {"a": 100.0, "b": 2.0, "c": 5.0, "d": 4.0}.items()
    }
    means = {row["level"]: row["mean_value"] for row in platform.arrow("market_segments").to_pylist()}
    assert means["E"] == pytest.approx(4.5 * worth / 100, abs=0.01)


@pytest.mark.parametrize(
    ("horizons", "rate", "value"),
    [
        ({30: 10.0, 90: 40.0}, 0.0, 40.0),
        ({365: 121.0}, 0.21, 110.0),
        ({730: 0.0, 365: 0.0}, 0.1, 0.0),
        ({}, 0.1, None),
        (None, 0.1, None),
    ],
)
def test_value_is_the_expected_spend_without_interest_and_unknown_without_horizons(
    spark: SparkSession, horizons: dict[int, float] | None, rate: float, value: float | None
) -> None:
    rows = spark.createDataFrame([(horizons,)], "expected map<int,double>")
    ((worth,),) = rows.select(discounted_value(F.col("expected"), rate)).collect()
    assert worth == (None if value is None else pytest.approx(value))


def test_the_service_tier_is_that_of_the_documented_table(spark: SparkSession) -> None:
    lines = re.findall(r"^\| ([A-E, ]+) \| (\w+) \| (\w+) \| (\w+) \|$", DOCS, re.MULTILINE)
    table = {
        (level, activity): tier
        for levels, *tiers in lines
        for level in levels.split(", ")
        for activity, tier in zip(("active", "cooling", "dormant"), tiers, strict=True)
    }
    assert len(table) == 15
    lowered = {"premier": "preferred", "preferred": "standard", "win_back": "standard", "standard": "standard"}
    users = [
        {"user_key": f"{level} {activity} {risk}", "level": level, "activity": activity, "risk_level": risk}
        for level, activity in table
        for risk in ("low", "high")
    ]
    phrases = PhrasesConfig(care_preferred="An own courier.")
    rows = customer_service(frame(spark, USER_PROFILE, *users), ProfilesConfig(phrases=phrases)).collect()
    for row in rows:
        tier = table[row["level"], row["activity"]]
        wanted = lowered[tier] if row["risk_level"] == "high" else tier
        assert row["service_tier"] == wanted, row["user_key"]
        assert row["proposal"] == getattr(phrases, f"care_{wanted}")
    assert "An own courier." in {row["proposal"] for row in rows}
    assert len(rows) == 30


def test_customer_service_knows_what_each_user_asked_last_before_the_date(spark: SparkSession) -> None:
    def talk(
        number: int, user: str, topic: str | None = None, *, solved: bool | None = None, ahead: int = 0
    ) -> dict[str, Any]:
        day = DAY + timedelta(days=ahead - 10 + number)
        begun = datetime.combine(day, time(8), tzinfo=UTC)
        known = {"consultation_id": f"c{number}", "user_key": user, "ts": begun, "event_date": day}
        return {**known, "topic": topic, "solved": solved}

    talks = [
        talk(1, "a", "size", solved=False),
        talk(2, "a", solved=False),
        talk(3, "b", "size", solved=True),
        talk(4, "b", "colour"),
        talk(5, "b", "of the day itself", solved=False, ahead=5),
        talk(6, "d", " "),  # solved or not: unknown
    ]
    topics = [
        {"consultation_id": f"c{number}", "topic": topic}
        for number, topic in ((2, "delivery"), (4, "not used"), (6, "price"))
    ]
    users = frame(spark, USER_PROFILE, *({"user_key": user, "level": "A"} for user in "abcd"))
    rows, found = frame(spark, CONSULTATIONS, *talks), frame(spark, CONSULTATION_TOPICS, *topics)
    asked = customer_service(users, ProfilesConfig(), last_consultations(rows, found, DAY))
    columns = ("user_key", "open_questions", "asked_on", "asked_about")
    assert sorted_rows(asked, *columns) == [
        ("a", 2, DAY - timedelta(days=8), "delivery"),
        ("b", 0, DAY - timedelta(days=6), "colour"),
        ("c", 0, None, None),
        ("d", None, DAY - timedelta(days=4), "price"),
    ]
    # a platform that delivers no consultations doesn't say that there is no question
    unknown = customer_service(users, ProfilesConfig(), last_consultations(None, None, DAY))
    assert sorted_rows(unknown, *columns) == [(user, None, None, None) for user in "abcd"]


def test_totals_are_sums_of_segments_with_an_interval_for_errors_that_users_share(
    platform: Platform, summed: Platform
) -> None:
    # without a bundle that knows the error of sums there are no totals, and no sums to make them of
    assert not platform.lakehouse.exists("totals")
    assert platform.lakehouse.read("market_segments").filter("expected_by_horizon IS NOT NULL").isEmpty()

    assert [(stage["stage"], stage["status"], stage["rows_out"]) for stage in summed.stages] == [
        ("profile", "done", 4),
        ("totals", "done", 12),
        ("cohorts", "done", 9),
        ("market", "done", 9 * 39 + 2 * 13),
    ]
    rows = summed.lakehouse.read("totals").collect()
    found = {(row["segment"], row["value"], row["horizon_days"]): row for row in rows}
    assert {key[:2]: row["users"] for key, row in found.items()} == {
        ("platform", "all"): 4,
        **{("level", level): 2 for level in ("E", "other")},
        **{("category", category): 2 for category in ("none", "other")},
        ("region", "other"): 4,
    }
    everyone = found["platform", "all", 30]
    assert everyone["expected_spend"] == 111 / 4
    assert everyone["variance"] == pytest.approx(
        sum(2.0 * (x / 4) + 0.5 * (x / 4) ** 2 for x in (100, 2, 5, 4)), abs=0.01
    )
    ends = interval(everyone["expected_spend"], everyone["variance"], ERRORS.errors[0], ERRORS.coverage, everyone=True)
    assert (everyone["low"], everyone["high"]) == ends
    assert (everyone["common_sd"], everyone["segment_sd"], everyone["horizons"]) == (0.1, 0.2, 4.0)
    of_region = found["region", "other", 30]
    assert of_region["low"] < everyone["low"] < everyone["high"] < of_region["high"]
    assert found["level", "E", 90]["expected_spend"] == 9.0
    assert found["level", "E", 90]["variance"] == 27.0


def test_what_all_events_make_is_made_anew_every_seven_days_and_after_a_user_was_forgotten(
    summed: Platform, spark: SparkSession, tmp_path: Path
) -> None:
    for name in ("lakehouse", "bundles"):
        shutil.copytree(Path(str(summed.settings.tables.path)).parent / name, tmp_path / name)
    settings = summed_settings(tmp_path)
    lakehouse = Lakehouse(spark, settings.tables)

    def night(day: date) -> dict[str, str]:
        for table, column in ((SCORES, "score_date"), (user_features_table(settings.features), "as_of_date")):
            rows = read_as_declared(lakehouse, table).filter(F.col(column) == F.lit(DAY))
            lakehouse.append(table, rows.withColumn(column, F.lit(day)).localCheckpoint())
        return {stage["stage"]: stage["status"] for stage in pipeline.profile(spark, settings, day)}

    assert DAY.toordinal() % 7 == 0
    same = {"cohorts": "unchanged", "market": "unchanged"}
    assert night(DAY + timedelta(days=1)) == {"profile": "done", "totals": "done", **same}
    lakehouse.append(FORGOTTEN, frame(spark, FORGOTTEN, {"key_hash": "0" * 64}))
    assert set(night(DAY + timedelta(days=2)).values()) == {"done"}
    cohorts_of, weeks_of = (
        {row["score_date"] for row in lakehouse.read(name).collect()} for name in ("cohorts", "market_forecast")
    )
    assert cohorts_of == {DAY + timedelta(days=2)}
    assert weeks_of == {DAY, DAY + timedelta(days=2)}


def test_totals_are_of_the_bundle_that_scored_and_of_no_other(summed: Platform, tmp_path: Path) -> None:
    shutil.copytree(Path(summed.settings.bundles).parent, tmp_path / "copy")
    settings = summed_settings(tmp_path / "copy")
    assert [stage["status"] for stage in pipeline.profile(summed.spark, settings)] == ["unchanged"] * 4
    (tmp_path / "copy/bundles/one/totals.json").write_text("{}")
    with pytest.raises(BundleError, match=r"totals\.json: differs from what was written"):
        pipeline.profile(summed.spark, settings)
    # without the bundle the error of its sums is unknown
    shutil.rmtree(tmp_path / "copy/bundles/one")
    pipeline.profile(summed.spark, settings)
    assert Lakehouse(summed.spark, settings.tables).read("totals").isEmpty()
    market = Lakehouse(summed.spark, settings.tables).read("market_forecast")
    assert {row[0] for row in market.select("segment").distinct().collect()} == {"platform", "category"}
    assert market.filter("gap IS NOT NULL").isEmpty()


def test_small_segments_are_merged_across_regions_categories_and_levels(platform: Platform) -> None:
    rows = {tuple(row[name] for name in CELL): row for row in platform.arrow("market_segments").to_pylist()}
    assert {cell: (row["users"], row["mean_score"]) for cell, row in rows.items()} == {
        ("E", "none", "other"): (2, 12.5),
        ("other", "other", "other"): (2, 67.5),
    }
    assert rows["E", "none", "other"]["mean_expected_spend"] == 4.5
    assert rows["E", "none", "other"]["mean_p_active"] == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("seed", "users", "k"), [(0, 400, 10), (1, 150, 10), (2, 60, 7), (3, 25, 10), (4, 9, 10), (5, 40, 1)]
)
def test_nothing_that_can_be_worked_out_from_segments_is_of_few_users(
    spark: SparkSession, seed: int, users: int, k: int
) -> None:
    rng = np.random.default_rng(seed)

    def drawn(values: list[str | None]) -> np.ndarray:
        # skewed: a few large cells and many small ones
        chance = 3.0 ** -np.arange(len(values))
        return rng.choice(np.array(values, object), size=users, p=chance / chance.sum())

    of_users = pd.DataFrame(
        {
            "level": drawn(["C", "B", "D", "A", "E"]),
            "category": drawn(["Food", "Home", None, "Toys", "Books"]),
            "region": drawn(["north", "south", "east", None]),
        }
    )
    profile = frame(
        spark,
        USER_PROFILE,
        *(
            {
                "user_key": f"u{n}",
                "level": row.level,
                "score": float(n),
                "interests": [] if row.category is None else [(f"{row.category} > x", 1.0)],
            }
            for n, row in enumerate(of_users.itertuples())
        ),
    )
    regions = spark.createDataFrame(
        [(f"u{n}", r) for n, r in enumerate(of_users["region"])], "user_key string, region string"
    )
    found = market_segments(profile, regions, DAY, k).toPandas()
    if users < k:
        assert found.empty
        return
    assert found["users"].min() >= k
    assert found["users"].sum() == users
    # nobody's score is in two rows or in none
    assert (found["users"] * found["mean_score"]).sum() == pytest.approx(sum(range(users)))
    true = of_users.fillna({"category": "none", "region": "unknown"})
    for names in ([], ["level"], ["level", "category"], ["level", "category", "region"]):
        keys = names or [lambda _: 0]
        totals = true.groupby(keys).size()
        told = found.groupby(keys)["users"].sum().reindex(totals.index, fill_value=0)
        hidden = (totals - told)[totals >= k]
        assert ((hidden == 0) | (hidden >= k)).all(), (names, hidden)
    if k == 1:
        assert len(found) == len(true.drop_duplicates())


def test_every_column_of_every_table_has_a_comment_that_readers_see(platform: Platform) -> None:
    for table in (*SHARED_TABLES, user_features_table(Config().features)):
        assert table.comment, table.name
        assert all(column.comment.strip() for column in table.columns), table.name
    for name in NAMES:
        stored = DeltaTable(platform.lakehouse.location(name))
        assert stored.metadata().description
        assert all(field.metadata.get("comment") for field in stored.schema().fields), name


def test_the_documented_queries_run_in_duckdb_and_in_spark(summed: Platform, spark: SparkSession) -> None:
    queries = re.findall(r"^```sql\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    assert [re.search(r"bp\.(\w+)", query)[1] for query in queries] == [  # type: ignore[index]
        "user_profile",
        "user_profile",
        "category_affinity",
        "risk_control",
        "customer_service",
        "customer_service",
        "market_segments",
        "totals",
        "scores_latest",
        "cohorts",
        "cohorts",
        "market_forecast",
        "market_forecast",
        "recommendations",
    ]
    item = {"user_key": "a", "score_date": DAY, "rank": 1, "item_id": "tea", "reason": "similar_users", "score": 0.5}
    summed.lakehouse.replace(RECOMMENDATIONS, frame(spark, RECOMMENDATIONS, item))
    with duckdb.connect() as connection:
        connection.sql("CREATE SCHEMA bp")
        for name in (*NAMES, "totals", "scores_latest", "cohorts", "market_forecast", "recommendations"):
            connection.register(f"{name}_rows", summed.arrow(name))
            connection.sql(f"CREATE VIEW bp.{name} AS SELECT * FROM {name}_rows")
        answers = [connection.sql(query).fetchall() for query in queries]
    assert answers[0] == [("A", "rising", 1, 100.0), ("E", "new", 1, 4.0)]
    assert [row[1] for row in answers[2]] == ["Home > Garden", "Food > Dairy", "Toys", "Food > Dairy"]
    assert ("high", "C", 1, 2.0, 0.0) in answers[3]
    of_premium = interval(5.0, 3.0 * 5.0, ERRORS.errors[1], 0.9)
    assert answers[8] == [(1, 5.0, pytest.approx(of_premium[0]), pytest.approx(of_premium[1]))]
    spent = Counter[int]()
    for row in summed.arrow("user_daily").to_pylist():
        spent[(DAY - row["day"]).days // -7] += row["spend"]
    weeks = [float(spent[-week]) for week in range(26, 0, -1)]
    usual = sum(weeks[-8:]) / 8
    assert [row[1] for row in answers[11]][:26] == weeks
    assert [row[2] for row in answers[11]][26:] == pytest.approx([usual] * 13)
    # the users' side expects 111 in 90 days
    assert answers[12] == [(90, 111.0, pytest.approx(usual * 90 / 7 / 111 - 1), 0.0)]
    assert answers[13] == [("a", 1, "tea", None, "similar_users", 0.5, None)]
    summed.lakehouse.register(TABLE_NAMES)
    try:
        counts = [len(spark.sql(query).collect()) for query in queries]
    finally:
        spark.sql("DROP SCHEMA IF EXISTS bp CASCADE")
    assert counts == [len(rows) for rows in answers]


def test_polars_reads_the_tables_without_spark(platform: Platform) -> None:
    profile = pl.scan_delta(platform.lakehouse.location("user_profile"))
    points = (
        pl.scan_delta(platform.lakehouse.location("customer_service"))
        .explode("talking_points")
        .unnest("talking_points")
    )
    best = profile.filter(pl.col("level") == "A").join(points, on="user_key").collect()
    assert set(best["topic"]) == {"rising", "favourite", "offers"}
    first = profile.sort("user_key").select(pl.col("interests").list.first().struct.field("category")).collect()
    assert first["category"].to_list() == ["Home > Garden", "Food > Dairy", None, None]


def test_a_date_that_was_not_scored_or_a_region_of_nobody_is_named(platform: Platform) -> None:
    versions = platform.versions()
    with pytest.raises(DataError, match=r"scores\.score_date: holds no rows of 2024-03-09"):
        pipeline.profile(platform.spark, platform.settings, ago(1))
    with pytest.raises(DataError, match=r"user_features\.as_of_date: holds no rows of 2023-12-11"):
        pipeline.profile(platform.spark, platform.settings, ago(90))
    nowhere = platform.settings.profiles.model_copy(update={"region_segment": "planet"})
    with pytest.raises(DataError, match="no user has a segment 'planet'"):
        pipeline.profile(platform.spark, platform.settings.model_copy(update={"profiles": nowhere}))
    assert platform.versions() == versions


@contextmanager
def before_writing(table: str, does: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the block something happens before the first write of a table."""
    original, waiting = Lakehouse.replace, [does]

    def replacing(self: Lakehouse, written: Table, *args: Any, **kwargs: Any) -> int:
        if written.name == table and waiting:
            waiting.pop()()
        return original(self, written, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Lakehouse, "replace", replacing)
        yield


def test_profiles_are_left_alone_made_whole_and_of_one_run(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, of_cohorts = platform.stages[:2]
    assert (stage["status"], stage["rows_in"], stage["rows_out"]) == ("done", 4, 4)
    assert set(stage["written"]) == set(NAMES)
    assert (of_cohorts["stage"], set(of_cohorts["written"])) == ("cohorts", {"cohorts"})
    assert {"scores", "user_daily"} == set(of_cohorts["read"])
    assert {"scores", "user_features", "user_daily", "events", "raw_users"} <= set(stage["read"])
    versions, spark = platform.versions(), platform.spark

    def profiled(*overrides: str) -> list[dict[str, Any]]:
        update = config.load(overrides=[*SETTINGS, *overrides]).profiles
        return pipeline.profile(spark, platform.settings.model_copy(update={"profiles": update}))

    assert [again["status"] for again in profiled()[:2]] == ["unchanged"] * 2
    assert platform.versions() == versions

    def killed() -> None:
        raise KeyboardInterrupt

    with before_writing("user_profile", killed, monkeypatch), pytest.raises(KeyboardInterrupt):
        profiled("profiles.affinities=5")
    assert len(platform.inputs()) == 2
    # a run goes on from there, and is overtaken by another, whose tables stand: all of them
    with (
        before_writing("user_profile", lambda: profiled("profiles.active_days=1") and None, monkeypatch),
        pytest.raises(ConflictError, match="user_profile: another run wrote this table meanwhile"),
    ):
        profiled("profiles.active_days=2")
    assert len(platform.inputs()) == 1
    assert stage["inputs"] not in platform.inputs()
    assert [platform.rows(name)["d"]["activity"] for name in ("user_profile", "customer_service")] == ["cooling"] * 2
    assert profiled("profiles.active_days=1")[0]["status"] == "unchanged"
