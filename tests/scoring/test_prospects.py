"""Everyone on the platform has exactly one score: buyers in one table, visitors and those who were addressed in the other."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import date, timedelta
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
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import RAW_BEHAVIOURS, RAW_TRANSACTIONS
from bp_spark.registry import bundle as bundles
from bp_spark.training.prospects import sample_shares
from tests.support.histories import SECRET, write_night
from tests.support.platforms import CONTACTS, MAPPING, settings_in
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
    "features.windows=[30]",
    "features.history_length=4",
    f"prospects.silent_days={SILENT}",
    "tracking.uri=null",
)


def at(days: int) -> str:
    return f"{AS_OF - timedelta(days=days)} 10:00:00"


def order(user: str, days: int) -> dict[str, Any]:
    return {"user": user, "order": f"{user}-{days}", "line": 1, "item": "i1", "time": at(days), "n": 1, "paid": "20.00"}


def look(user: str, days: int) -> dict[str, Any]:
    return {"user": user, "time": at(days), "action": "browse", "item": "i1"}


def deliveries() -> dict[str, list[dict[str, Any]]]:
    """Buyers, visitors, and visitors who become buyers; one user who called, and one who was addressed by a campaign."""
    rng = np.random.default_rng(3)
    orders, looks = [], []
    for number in range(80):
        orders += [order(f"buyer{number}", int(days)) for days in np.unique(rng.integers(1, DAYS, 8))]
    for number in range(120):
        first = int(rng.integers(20, DAYS))
        looks += [look(f"visitor{number}", days) for days in (first, first - 5, first - 15)]
        if number % 2:
            orders.append(order(f"visitor{number}", first - 18))
    return {
        "items": [{"item": "i1", "title": "Thing", "category": "A > b", "brand": "Acme"}],
        "transactions": orders,
        # on the date: of nobody whom the date knows
        "behaviours": [*looks, look("tomorrow", 0)],
        "consultations": [{"user": "caller", "time": at(9), "channel": "chat", "text": "how much?"}],
        "campaigns": [
            {"user": user, "campaign": "c1", "from": str(AS_OF - timedelta(days=7))} for user in ("mailed", "buyer0")
        ],
    }


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


@pytest.fixture(scope="module")
def platform(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    folder = tmp_path_factory.mktemp("everyone")
    write_night(folder / "platform", 0, **deliveries())
    (folder / "platform/source.yaml").write_text(MAPPING + CONTACTS, encoding="utf-8")
    settings = settings_in(folder, "lakehouse", *SMALL)
    pipeline.featurize(spark, settings, [AS_OF])
    trained = pipeline.train(spark, settings, AS_OF)
    if not trained.promoted:
        # of so few users a baseline may be as good
        bundles.promote(settings.bundles, trained.bundle)
    return Platform(spark, settings, trained, pipeline.score(spark, settings, AS_OF))


def test_everyone_who_was_seen_before_the_date_has_exactly_one_score(platform: Platform) -> None:
    delivered = deliveries()
    bought = {row["user"] for row in delivered["transactions"]}
    last_seen: dict[str, int] = {}
    for row in delivered["behaviours"]:
        days = (AS_OF - date.fromisoformat(row["time"][:10])).days
        last_seen[row["user"]] = min(days, last_seen.get(row["user"], days))
    prospects = {user for user, days in last_seen.items() if user not in bought and 0 < days <= SILENT}
    prospects |= {"caller", "mailed"}
    assert len(prospects) > 20
    assert sorted(platform.rows("scores")["user_key"]) == sorted(map(SECRET.key_of, bought))
    assert sorted(platform.rows("prospect_scores")["user_key"]) == sorted(map(SECRET.key_of, prospects))
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
    featurized = pipeline.featurize(platform.spark, platform.settings, [AS_OF])
    scored = pipeline.score(platform.spark, platform.settings, AS_OF)
    stages = {stage["stage"]: stage["status"] for stage in (*featurized, *scored.stages)}
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
