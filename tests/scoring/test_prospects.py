"""Everyone on the platform has exactly one score: buyers in one table, visitors and those who were addressed in the other."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession

from bp_spark import pipeline
from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.features import job as features_job
from bp_spark.lakehouse.run import Run
from bp_spark.lakehouse.schema import Table
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import (
    CAMPAIGN_CONTACTS,
    CONSULTATIONS,
    EVENTS,
    RAW_BEHAVIOURS,
    RAW_TRANSACTIONS,
    RAW_USERS,
    TEXT_EMBEDDINGS,
    TEXTS,
)
from bp_spark.registry import bundle as bundles
from bp_spark.training.prospects import sample_shares, sampled
from tests.support.rows import frame

pytestmark = pytest.mark.slow

AS_OF = date(2024, 7, 1)
DAYS = 200
SILENT = 60
SMALL = (
    "labels.horizon_days=30",
    "labels.other_horizons=[]",
    "labels.cutoffs=2",
    "labels.recent_cutoffs=0",
    "fusion.members=[linear]",
    "evaluation.resamples=10",
    "features.windows=[30, 90]",
    "features.history_length=4",
    f"prospects.silent_days={SILENT}",
    "tracking.uri=null",
)


def event(user: str, days: int, kind: str, **more: Any) -> dict[str, Any]:
    day = AS_OF - timedelta(days=days)
    ts = datetime(day.year, day.month, day.day, 10, tzinfo=UTC)
    event_id = f"{user}-{days}-{kind}"
    return {"event_id": event_id, "user_key": user, "ts": ts, "event_date": day, "kind": kind, "item_id": "i1", **more}


def order(user: str, days: int) -> dict[str, Any]:
    return event(user, days, "purchase", order_id=f"{user}-{days}", amount=Decimal("20.00"), quantity=1.0)


def events() -> list[dict[str, Any]]:
    """Buyers, visitors, and visitors who become buyers."""
    rng = np.random.default_rng(3)
    rows = []
    for number in range(80):
        rows += [order(f"buyer{number}", int(days)) for days in np.unique(rng.integers(1, DAYS, 8))]
    for number in range(120):
        first = int(rng.integers(20, DAYS))
        rows += [event(f"visitor{number}", days, "browse") for days in (first, first - 5, first - 15)]
        if number % 2:
            rows.append(order(f"visitor{number}", first - 18))
    # a prospect of a date has an event before it, not only on it
    return [*rows, event("tomorrow", 0, "browse")]


def cleaned(spark: SparkSession, lakehouse: Lakehouse) -> None:
    """Store what an ingest and its cleaning leave: a user called, one was addressed by a campaign, and one registered."""
    called = {"consultation_id": "1", "user_key": "caller", "event_date": AS_OF - timedelta(days=9)}
    addressed = [
        {"contact_id": user, "user_key": user, "campaign_id": "c1", "first_day": AS_OF - timedelta(days=7)}
        for user in ("mailed", "buyer0")
    ]
    rows: dict[Table, list[dict[str, Any]]] = {
        RAW_BEHAVIOURS: [{"ingest_id": 1}],
        EVENTS: events(),
        TEXTS: [{"text_id": 1}],
        TEXT_EMBEDDINGS: [{"text_id": 1, "sentiment": 0.0}],
        CONSULTATIONS: [called],
        CAMPAIGN_CONTACTS: addressed,
        RAW_USERS: [
            {"ingest_id": 1, "user_key": user, "signup_ts": datetime.combine(AS_OF - timedelta(days=4), time(9), UTC)}
            for user in ("registered", "buyer1")
        ],
    }
    for table, values in rows.items():
        lakehouse.replace(table, frame(spark, table, *values))


@dataclass
class Platform:
    """A platform of buyers and visitors on which all stages ran once."""

    spark: SparkSession
    settings: Config
    trained: pipeline.TrainResult
    scored: pipeline.ScoreResult

    @property
    def lakehouse(self) -> Lakehouse:
        return Lakehouse(self.spark, self.settings.tables)

    def rows(self, name: str) -> pd.DataFrame:
        return self.lakehouse.read(name).filter(f"score_date = '{AS_OF}'").toPandas()


def featurized(spark: SparkSession, settings: Config) -> dict[str, str]:
    """Run what follows from clean events, and return the status of each stage."""
    run = Run(spark, settings)
    features_job.aggregate(run, rebuild=False)
    features_job.write_features(run, [AS_OF])
    features_job.write_prospects(run, [AS_OF])
    return {stage["stage"]: stage["status"] for stage in run.records}


@pytest.fixture(scope="module")
def platform(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    folder = tmp_path_factory.mktemp("everyone")
    paths = [f"tables.path={folder}/lakehouse", f"bundles={folder}/bundles", f"training.work_dir={folder}/work"]
    settings = config.load(overrides=[*SMALL, *paths])
    cleaned(spark, Lakehouse(spark, settings.tables))
    featurized(spark, settings)
    trained = pipeline.train(spark, settings, AS_OF)
    if not trained.promoted:
        # of so few users a baseline may be as good
        bundles.promote(settings.bundles, trained.bundle)
    return Platform(spark, settings, trained, pipeline.score(spark, settings, AS_OF))


def test_everyone_who_was_seen_before_the_date_has_exactly_one_score(platform: Platform) -> None:
    bought = {row["user_key"] for row in events() if row["kind"] == "purchase"}
    last_seen: dict[str, int] = {}
    for row in events():
        days = (AS_OF - row["event_date"]).days
        last_seen[row["user_key"]] = min(days, last_seen.get(row["user_key"], days))
    prospects = {user for user, days in last_seen.items() if user not in bought and 0 < days <= SILENT}
    prospects |= {"caller", "mailed", "registered"}
    assert len(prospects) > 15
    assert sorted(platform.rows("scores")["user_key"]) == sorted(bought)
    assert sorted(platform.rows("prospect_scores")["user_key"]) == sorted(prospects)
    assert platform.scored.prospects is not None
    assert platform.scored.prospects.users == len(prospects)


def test_scores_of_prospects_keep_the_promises_of_scores(platform: Platform) -> None:
    rows = platform.rows("prospect_scores")
    assert set(rows["stage"]) == {"prospect"}
    assert ((rows["low"] >= 0) & (rows["low"] <= rows["expected_spend"])).all()
    assert (rows["expected_spend"] <= rows["high"]).all()
    assert rows["p_active"].between(0.01, 0.9).all()
    assert (rows.sort_values("expected_spend")["score"].diff().dropna() >= 0).all()
    assert set(rows["level"]) <= set("ABCDE")
    assert set(rows["bundle_digest"]) == {platform.trained.bundle.digest}
    (stage,) = [stage for stage in platform.trained.stages if stage["stage"] == "fit prospects"]
    assert int(stage["figures"]["first_purchases"]) > 5
    assert {"auc", "ece", "spend_calibration", "above_high", "model"} <= set(stage["figures"])


def test_a_second_run_writes_nothing(platform: Platform) -> None:
    names = ("prospect_features", "prospect_scores")
    versions = [platform.lakehouse.version(name) for name in names]
    stages = featurized(platform.spark, platform.settings)
    scored = pipeline.score(platform.spark, platform.settings, AS_OF)
    stages |= {stage["stage"]: stage["status"] for stage in scored.stages}
    assert (stages["prospects"], stages["score prospects"]) == ("unchanged", "unchanged")
    assert scored.prospects == platform.scored.prospects
    assert [platform.lakehouse.version(name) for name in names] == versions


def test_a_bundle_without_a_model_of_prospects_scores_buyers_alone(
    platform: Platform, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = platform.trained.bundle
    manifest = bundle.manifest
    assert bundles.load(bundle.folder).prospects is not None
    older = bundles.write(
        tmp_path / "older",
        list(bundle.members.values()),
        bundle.stack,
        bundle.horizons,
        inputs=manifest["inputs"],
        lineage=manifest["lineage"],
        metrics=manifest["metrics"],
        explanation=bundle.explanation,
    )
    assert bundles.load(older.folder).prospects is None
    version = platform.lakehouse.version("prospect_scores")
    with caplog.at_level(logging.INFO):
        scored = pipeline.score(platform.spark, platform.settings, AS_OF, older.folder)
    assert scored.written
    assert scored.prospects is None
    assert "has no model of prospects" in caplog.text
    assert platform.lakehouse.version("prospect_scores") == version


def test_a_platform_of_purchases_alone_does_nothing_for_prospects(spark: SparkSession, settings: Config) -> None:
    run = Run(spark, settings)
    run.lakehouse.replace(RAW_TRANSACTIONS, frame(spark, RAW_TRANSACTIONS, {"ingest_id": 1}))
    features_job.write_prospects(run, [AS_OF])
    assert not features_job.can_have_prospects(run)
    assert run.records == []
    # segments of users make none a prospect, registrations do
    for users, expected in (({"user_key": "u1"}, False), ({"signup_ts": datetime(2024, 6, 1, tzinfo=UTC)}, True)):
        run.lakehouse.replace(RAW_USERS, frame(spark, RAW_USERS, {"ingest_id": 1, **users}))
        assert features_job.can_have_prospects(run) is expected
    run.lakehouse.replace(RAW_USERS, frame(spark, RAW_USERS, {"ingest_id": 2}))
    run.lakehouse.replace(RAW_BEHAVIOURS, frame(spark, RAW_BEHAVIOURS, {"ingest_id": 1}))
    assert features_job.can_have_prospects(run)
    assert not features_job.can_have_prospects(Run(spark, config.changed(settings, {"prospects.enabled": False})))


@pytest.mark.parametrize(
    ("buyers", "others", "most", "expected"),
    [
        (100, 900, 1_000, (1.0, 1.0)),
        (100, 10_000, 1_100, (1.0, 0.1)),
        (1_000, 1_000, 500, (0.25, 0.25)),
        (1_000, 50, 500, (0.45, 1.0)),
        (0, 0, 10, (0.0, 0.0)),
    ],
)
def test_a_sample_has_all_first_purchasers_where_they_fit(
    buyers: int, others: int, most: int, expected: tuple[float, float]
) -> None:
    assert sample_shares(buyers, others, most) == pytest.approx(expected)


@pytest.mark.parametrize("shares", [(1.0, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_a_sample_weighs_as_much_as_what_it_is_taken_from(spark: SparkSession, shares: tuple[float, float]) -> None:
    users = spark.range(400).selectExpr(
        "concat('u', id) AS user_key", "DATE '2024-01-01' AS as_of_date", "id < 40 AS bought"
    )
    rows = (
        sampled(users, *shares, config.load().labels).groupBy("bought").agg({"weight": "sum", "*": "count"}).collect()
    )
    taken = {row["bought"]: (row["count(1)"], row["sum(weight)"]) for row in rows}
    assert set(taken) == {bought for bought, share in zip((True, False), shares, strict=True) if share}
    if taken.get(True):
        assert taken[True] == (40, 40.0)
    if taken.get(False):
        assert taken[False][1] == pytest.approx(360, rel=0.2)
        assert taken[False][0] == pytest.approx(360 * shares[1], rel=0.2)
