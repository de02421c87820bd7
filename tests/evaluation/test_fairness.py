"""Fairness: a disparity that was put in is found, none where there is none; few users are not told; models see no segment."""

from __future__ import annotations

import math
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession

from bp_spark import pipeline
from bp_spark.core import config
from bp_spark.core.config import CleaningConfig, FairnessConfig
from bp_spark.evaluation import fairness
from bp_spark.evaluation.job import fairness_is_due
from bp_spark.features import labels
from bp_spark.features.aggregates import SEQUENCE_COLUMNS
from bp_spark.features.catalogue import catalogue
from bp_spark.ingest import cleaning
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import EVENTS, SCORES, USER_DAILY
from tests.support.histories import RAW, raw_frame, rows_of, sorted_rows

NIGHT = date(2024, 10, 1)
USERS = 600


def rated() -> pd.DataFrame:
    """Users who spend alike; those of low income are expected to spend double, as nobody by age is; few are from afar."""
    rng = np.random.default_rng(2)
    number = np.arange(USERS)
    spend = rng.gamma(2, 20, USERS).round(2)
    expected = spend * rng.uniform(0.8, 1.2, USERS) * np.where(number % 2, 2.0, 1.0)
    return pd.DataFrame(
        {
            "user_key": [f"user{n}" for n in number],
            "label_spend": spend,
            "expected_spend": expected,
            "low": expected * 0.7,
            "high": expected * 1.3,
            "score": 100 * expected.argsort().argsort() / USERS,
            "level": np.where(expected > np.quantile(expected, 0.8), "A", "C"),
            "income": np.where(number % 2, "low", "high"),
            "age": np.where(number % 3 == 0, None, np.where(number % 3 == 1, "under 40", "40+")),
            # 5 + 4 + 3 users: joined they are 12
            "region": np.select([number < 5, number < 9, number < 12], ["north", "south", "west"], "home"),
            # 7 users: with nobody to join
            "tongue": np.where(number < 7, "rare", "common"),
        }
    )


@pytest.fixture(scope="module")
def report(spark: SparkSession) -> pd.DataFrame:
    frame = rated()
    names = ["age", "income", "region", "tongue"]
    long = frame.melt("user_key", names, "segment", "group").dropna()
    night = spark.createDataFrame(frame.drop(columns=names))
    grouped = fairness.in_groups(night, spark.createDataFrame(long), names)
    figures = {**fairness.of_scores(), **fairness.of_errors(float(np.quantile(frame["label_spend"], 0.8)))}
    return fairness.report(grouped, figures, FairnessConfig(), 10).toPandas().set_index(["segment", "group", "metric"])


def test_a_disparity_that_was_put_in_is_found_and_nothing_else(report: pd.DataFrame) -> None:
    broken = report[report["broken"]]
    assert set(broken.index.get_level_values("segment")) == {"income"}
    assert {metric for _, group, metric in broken.index if group == "low"} >= {
        "calibration",
        "relative_error",
        "coverage",
    }
    assert report.loc[("income", "low", "calibration"), "ratio"] == pytest.approx(2, rel=0.05)


def test_figures_intervals_and_ratios_are_those_of_the_delta_method(report: pd.DataFrame) -> None:
    frame = rated()

    def of(rows: pd.DataFrame) -> tuple[float, float]:
        above, below = rows["expected_spend"], rows["label_spend"]
        value = above.sum() / below.sum()
        squares = ((above - value * below) ** 2).sum()
        return value, math.sqrt(len(rows) / (len(rows) - 1) * squares) / below.sum()

    low, others = frame[frame["income"] == "low"], frame[frame["income"] != "low"]
    (value, error), (other, other_error) = of(low), of(others)
    row = report.loc[("income", "low", "calibration")]
    half = fairness.Z * math.hypot(error / value, other_error / other)
    ratio = value / other
    expected = [value, value - fairness.Z * error, value + fairness.Z * error, ratio]
    expected += [ratio * math.exp(-half), ratio * math.exp(half)]
    found = row[["value", "low", "high", "ratio", "ratio_low", "ratio_high"]].astype(float)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    everybody = report.loc[("income", fairness.ALL, "mae")]
    assert everybody["value"] == pytest.approx((frame["expected_spend"] - frame["label_spend"]).abs().mean())
    assert (everybody["users"], math.isnan(everybody["ratio"])) == (USERS, True)


def test_who_has_no_segment_is_a_group(report: pd.DataFrame) -> None:
    users = report.xs("score", level="metric").loc["age", "users"]
    assert users.to_dict() == {"under 40": 200, "40+": 200, fairness.NOT_GIVEN: 200, fairness.ALL: USERS}


def test_groups_of_few_users_are_joined_or_left_out_and_small_ones_marked(report: pd.DataFrame) -> None:
    by_group = report.xs("score", level="metric")
    assert by_group.loc["region", "users"].to_dict() == {"home": 588, fairness.SMALL_GROUPS: 12, fairness.ALL: USERS}
    assert by_group.loc[("region", fairness.SMALL_GROUPS), "small"]
    # not even by subtraction is anything told of seven users
    assert by_group.loc["tongue", "users"].to_dict() == {"common": 593, fairness.ALL: 593}
    assert not report[report["small"]]["broken"].any()


def test_a_share_has_wilsons_interval_of_nobody_too(report: pd.DataFrame) -> None:
    row = report.loc[("income", "high", "level_B")]
    assert (row["value"], row["low"]) == (0, 0)
    assert row["high"] == pytest.approx(fairness.Z**2 / (300 + fairness.Z**2))
    found = report.loc[("income", "low", "level_A")]
    p, n, z = found["value"], 300, fairness.Z
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    assert (found["low"], found["high"]) == (pytest.approx(middle - half), pytest.approx(middle + half))


def test_the_newest_value_of_a_segment_counts(spark: SparkSession) -> None:
    def delivered(ingest: int, *rows: tuple[str, dict[str, str]]) -> object:
        given = [{"user_key": user, "segment": segment, "ingest_id": ingest} for user, segment in rows]
        return rows_of(spark, RAW["raw_users"], given)

    first = delivered(1, ("a", {"age": "19-24", "income": "low"}), ("b", {"age": "45-54"}))
    second = delivered(2, ("a", {"age": "25-34"}))
    newest = fairness.newest_segments(first.unionByName(second))  # type: ignore[attr-defined]
    assert sorted_rows(newest) == [("a", "age", "25-34"), ("a", "income", "low"), ("b", "age", "45-54")]


def test_a_night_is_reported_with_the_errors_of_the_newest_whose_horizon_is_over(
    spark: SparkSession, tmp_path: Path
) -> None:
    settings = config.load(overrides=[f"tables.path={tmp_path}/lakehouse"])
    lakehouse, frame, old = Lakehouse(spark, settings.tables), rated(), NIGHT - timedelta(days=95)
    scores = [
        {**row, "score_date": day, "bundle_digest": "bundle"}
        for row in frame[["user_key", "score", "level", "expected_spend", "low", "high"]].to_dict("records")
        for day in (old - timedelta(days=1), old, NIGHT)
    ]
    lakehouse.replace(SCORES, rows_of(spark, SCORES, scores))
    spent = zip(frame["user_key"], frame["label_spend"], strict=True)
    days = [{"user_key": user, "day": old, "spend": Decimal(str(spend))} for user, spend in spent]
    lakehouse.replace(USER_DAILY, rows_of(spark, USER_DAILY, days))
    lakehouse.replace(EVENTS, rows_of(spark, EVENTS, [{"event_date": old}, {"event_date": NIGHT}]))
    people = [
        {"user_key": row["user_key"], "segment": {"income": row["income"]}, "ingest_id": 1}
        for row in frame.to_dict("records")
    ]
    lakehouse.replace(RAW["raw_users"], rows_of(spark, RAW["raw_users"], people))
    assert fairness_is_due(lakehouse, settings, NIGHT)
    result = pipeline.fairness(spark, settings, NIGHT)
    assert {day: fairness_is_due(lakehouse, settings, NIGHT + timedelta(days=day)) for day in (-1, 0, 1, 6, 7)} == {
        -1: True,
        0: True,
        1: False,
        6: False,
        7: True,
    }
    version = lakehouse.version("fairness")
    again = pipeline.fairness(spark, settings, NIGHT)
    assert (lakehouse.version("fairness"), again.stages[-1]["status"]) == (version, "unchanged")
    assert (again.broken, again.report.count()) == (result.broken, result.report.count())
    assert not fairness_is_due(lakehouse, config.changed(settings, {"fairness.every_days": None}), NIGHT)
    lakehouse.replace(RAW["raw_users"], rows_of(spark, RAW["raw_users"], [{"user_key": "u1", "ingest_id": 2}]))
    assert not fairness_is_due(lakehouse, settings, NIGHT)
    assert result.measured == old
    found = result.report.toPandas().set_index(["group", "metric"])
    assert (found.loc[("low", "score"), "measured_date"], found.loc[("low", "mae"), "measured_date"]) == (NIGHT, old)
    assert found.loc[("low", "calibration"), "broken"]
    assert result.broken == found["broken"].sum() > 0
    assert set(found["bundle_digest"]) == {"bundle"}


# --- segments and models -----------------------------------------------------------------------------------------------


def test_no_column_of_features_or_of_training_is_a_segment() -> None:
    settings = config.load()
    read = [*catalogue(settings.features).names, *(column.name for column in SEQUENCE_COLUMNS)]
    about = ["user_key", "as_of_date", "seen_on", "input_digest", "built_from"]
    about += [
        "label_spend",
        "label_spend_30d",
        "label_spend_180d",
        "exposure_days",
        "weight",
        "complete",
        "given",
        "fold",
    ]
    table = labels.training_set_table(settings.features, settings.labels.other_horizons)
    assert sorted(table.schema.names) == sorted([*read, *about])
    assert not [name for name in table.schema.names if "segment" in name]


def test_events_do_not_change_with_segments(spark: SparkSession) -> None:
    orders = [{"user_id": f"u{n}", "order_id": f"o{n}", "ts": "2024-05-01 10:00:00", "amount": n} for n in range(1, 5)]
    logs, told = raw_frame(spark, "raw_transactions", *orders), []
    for income in ("low", "high"):
        people = [{"user_key": f"u{n}", "segment": {"income": income}} for n in range(3)]
        raw = {"raw_transactions": logs, "raw_users": rows_of(spark, RAW["raw_users"], people)}
        told.append(sorted_rows(cleaning.events(cleaning.validate(raw, raw, CleaningConfig()))))
    assert told[0] == told[1]
    assert len(told[0]) == 4
