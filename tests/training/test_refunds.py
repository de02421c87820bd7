"""The training knows refunds to come from users' money before past dates and after these, and sees nothing later."""

from __future__ import annotations

from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.features.catalogue import user_features_table
from bp_spark.lakehouse.run import recorded
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import EVENTS, USER_DAILY
from bp_spark.model.refunds import Refunds
from bp_spark.training.refunds import collect_refunds, fit_refunds
from tests.support.rows import frame, write_without_spark

pytestmark = pytest.mark.slow

TEST_DATE = date(2024, 7, 1)
CUTOFF = TEST_DATE - timedelta(days=30)
USERS = 120
SETTINGS = (
    "labels.horizon_days=30",
    "labels.other_horizons=[]",
    "labels.cutoffs=1",
    "labels.holdout_fraction=0.0",
    "features.history_length=4",
)


def bought(user: str, day: date, spend: int, refunds: int = 0) -> dict[str, Any]:
    return {"user_key": user, "day": day, "orders": 1, "spend": Decimal(spend), "refunds": Decimal(refunds)}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A shop whose users returned a tenth in the year before, and a fifth after the cutoff."""
    folder = tmp_path_factory.mktemp("refunds")
    write = folder / "lakehouse"
    settings = config.load(overrides=[*SETTINGS, f"tables.path={write}"])
    users = [f"u{number}" for number in range(USERS)]
    past = {"spend_365d": 90.0, "refund_share_365d": 0.1, "order_value_max_365d": 60.0}
    features = user_features_table(settings.features)
    write_without_spark(write, features, *({"user_key": user, "as_of_date": CUTOFF, **past} for user in users))
    days = [bought(user, CUTOFF + timedelta(days=5), 40, 10) for user in users]
    before = [bought(user, CUTOFF - timedelta(days=1), 90, 10) for user in users]
    later = [bought(user, TEST_DATE, 0, 70) for user in users]
    write_without_spark(write, USER_DAILY, *days, *before, *later)
    first = {"user_key": "u0", "kind": "purchase", "event_date": CUTOFF - timedelta(days=40)}
    last = {**first, "event_date": TEST_DATE}
    write_without_spark(write, EVENTS, first, last)
    return settings


def fitted(spark: SparkSession, settings: Config, test_date: date = TEST_DATE) -> tuple[Refunds | None, dict[str, Any]]:
    with recorded(spark, settings, "train") as run:
        model = fit_refunds(run, test_date)
        return model, run.records[-1] if run.records else {}


def test_the_share_is_that_of_the_horizon_and_what_comes_later_is_not_seen(
    spark: SparkSession, settings: Config
) -> None:
    with recorded(spark, settings, "train") as run:
        rows = collect_refunds(run, TEST_DATE)
    money = rows[["paid", "refunded", "later_paid", "later_refunded"]]
    # features are stored as 32-bit numbers
    assert money.drop_duplicates().round(4).to_numpy().tolist() == [[100.0, 10.0, 50.0, 10.0]]
    assert len(rows) == USERS
    model, stage = fitted(spark, settings)
    assert model is not None
    assert float(model.share_of(100.0, 10.0)) == pytest.approx(0.2, abs=1e-6)
    assert (stage["stage"], stage["rows_in"]) == ("fit refunds", USERS)


def test_a_shop_without_refunds_learns_none_and_says_so(
    spark: SparkSession, settings: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lakehouse = Lakehouse(spark, settings.tables)
    daily = lakehouse.read("user_daily").drop("refunds")
    elsewhere = config.load(overrides=[*SETTINGS, f"tables.path={tmp_path}"])
    other = Lakehouse(spark, elsewhere.tables)
    for name in ("user_features", "events"):
        lakehouse.read(name).write.format("delta").save(other.location(name))
    without = frame(spark, USER_DAILY, *(row.asDict() for row in daily.collect()))
    other.replace(USER_DAILY, without)
    with caplog.at_level("INFO"):
        model, _ = fitted(spark, elsewhere)
    assert model is None
    assert "fewer than 100 refunds" in caplog.text
    short = config.load(overrides=[*SETTINGS, f"tables.path={tmp_path}", "features.windows=[30]"])
    assert fitted(spark, short) == (None, {})
