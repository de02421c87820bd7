"""Other pasts of a user: the same features as if they had been real, and the answers to them."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.errors import DataError
from bp_spark.features import user_daily
from bp_spark.features.catalogue import catalogue, user_features
from bp_spark.registry.bundle import Bundle
from bp_spark.scoring import counterfactual
from bp_spark.scoring.compare import TOLERANCE
from tests.support.histories import AS_OF, embeddings_frame, events_frame, random_events, texts_frame
from tests.support.random_users import NIGHT, make_bundles, users

USER = "user3"
EVENING = datetime(AS_OF.year, AS_OF.month, AS_OF.day, 19, tzinfo=UTC) - timedelta(days=1)


@pytest.fixture(scope="module")
def settings() -> Config:
    small = ["features.windows=[30, 90]", "features.history_length=6", "trees.rounds=8", "network.hidden_size=16"]
    sizes = ["network.layers=1", "network.heads=2", "network.intermediate_size=16", "network.adapter_size=16"]
    return config.load(overrides=[*small, *sizes])


@pytest.fixture(scope="module")
def events(spark: SparkSession) -> DataFrame:
    return events_frame(spark, random_events(seed=5)).localCheckpoint()


def test_another_past_gives_the_features_that_it_would_have_given(events: DataFrame, settings: Config) -> None:
    def change(theirs: DataFrame) -> DataFrame:
        silent = counterfactual.silent_since(AS_OF - timedelta(days=40))(theirs)
        return counterfactual.one_more_order(EVENING, times=1.5)(silent)

    spark, length = events.sparkSession, settings.features.history_length
    tables = texts_frame(spark), embeddings_frame(spark)
    days = user_daily.user_daily(events, *tables, length).localCheckpoint()
    imagined = counterfactual.counterfactual_features(
        events, days, *tables, USER, AS_OF, change, settings.features
    ).toPandas()
    theirs, others = events.filter(F.col("user_key") == USER), events.filter(F.col("user_key") != USER)
    # as if it had been so: by way of everybody's days
    real = user_daily.user_daily(others.unionByName(change(theirs)), *tables, length)
    wanted = user_features(real, [AS_OF], settings.features, "imagined").filter(F.col("user_key") == USER).toPandas()
    pd.testing.assert_frame_equal(imagined, wanted)
    assert imagined["recency_days"].tolist() == [1]
    # the 30 days are the imagined order's alone
    assert imagined["orders_30d"].tolist() == [1]
    assert len(imagined["seq_kind"][0]) > 1


def test_one_more_order_is_the_last_one_again(events: DataFrame) -> None:
    theirs = events.filter(F.col("user_key") == USER)
    before = theirs.filter(F.col("ts") < F.lit(EVENING)).toPandas()
    after = counterfactual.one_more_order(EVENING, times=2.0)(theirs).toPandas()
    more = after[~after["event_id"].isin(theirs.toPandas()["event_id"])]
    bought = before[(before["kind"] == "purchase") & (before["amount"].astype(float) > 0)]
    last = bought[bought["order_id"] == bought.sort_values(["ts", "order_id"])["order_id"].iloc[-1]]
    assert len(more) == len(last) > 0
    assert float(more["amount"].sum()) == pytest.approx(2 * float(last["amount"].sum()))
    assert set(more["event_date"]) == {EVENING.date()}
    assert not set(more["order_id"]) & set(before["order_id"])


def test_who_never_bought_has_no_order_to_repeat(events: DataFrame) -> None:
    never = events.filter("user_key = 'nobody'")
    assert counterfactual.one_more_order(EVENING)(never).isEmpty()


@pytest.fixture(scope="module")
def bundle(settings: Config, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundles(tmp_path_factory.mktemp("bundles"), settings, texts=20)["whole"]


@pytest.fixture(scope="module")
def row(spark: SparkSession, settings: Config) -> pd.DataFrame:
    return users(spark, settings, 1, mean=3, night=NIGHT).toPandas()


def test_answers_stand_beside_each_other_with_the_features_that_differ(
    settings: Config, bundle: Bundle, row: pd.DataFrame
) -> None:
    names = catalogue(settings.features).names
    after = counterfactual.with_features(row, {"spend_90d": 4_000.0, "orders_90d": 40.0})
    found = counterfactual.compare(bundle, row, after, names)
    assert list(found.predictions.index) == ["before", "after"]
    assert sorted(found.features.index) == ["orders_90d", "spend_90d"]
    assert found.features.loc["spend_90d"].tolist() == [float(row["spend_90d"][0]), 4_000.0]
    assert found.predictions.loc["after", "score"] != found.predictions.loc["before", "score"]
    alone = counterfactual.compare(bundle, row, row, names)
    assert alone.features.empty
    assert alone.predictions.loc["before", "score"] == pytest.approx(
        alone.predictions.loc["after", "score"], rel=TOLERANCE
    )
    np.testing.assert_allclose(alone.predictions["score"], found.predictions.loc["before", "score"], rtol=1e-5)


def test_what_is_no_feature_can_not_be_changed(row: pd.DataFrame) -> None:
    for name in ("spend_91d", "user_key"):
        with pytest.raises(DataError, match="is no feature"):
            counterfactual.with_features(row, {name: 1.0})


def test_a_past_without_any_purchase_has_no_answer(settings: Config, bundle: Bundle, row: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="one row of the user after the change"):
        counterfactual.compare(bundle, row, row.head(0), catalogue(settings.features).names)


def test_silence_leaves_the_days_before(events: DataFrame) -> None:
    kept = counterfactual.silent_since(date(2024, 2, 1))(events).toPandas()
    assert kept["event_date"].max() < date(2024, 2, 1)
    assert len(kept) == (events.toPandas()["event_date"] < date(2024, 2, 1)).sum()
