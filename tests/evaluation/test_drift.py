"""Drift: spreads and distances by hand; drift that was put in is found, none is found where there is none."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from scipy.stats import ks_2samp

from bp_spark import pipeline
from bp_spark.cli import app
from bp_spark.core import config
from bp_spark.core.config import Config, FusionConfig
from bp_spark.evaluation import drift, realised
from bp_spark.features import labels
from bp_spark.features.catalogue import catalogue, user_features_table
from bp_spark.lakehouse.run import Run
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import EVENTS, PROSPECT_SCORES, SCORES, TOTALS, USER_DAILY
from bp_spark.model.horizons import Horizons
from bp_spark.model.members.btyd import BtydMember
from bp_spark.model.stack import CalibratedStack
from bp_spark.registry import bundle as bundles
from bp_spark.registry.bundle import Bundle
from tests.support.histories import rows_of
from tests.support.random_users import users
from tests.support.rows import forget_column

pytestmark = pytest.mark.slow

NIGHT = date(2024, 10, 1)
NEXT = NIGHT + timedelta(days=1)
LAST = NIGHT + timedelta(days=2)
OLD = NIGHT - timedelta(days=100)
USERS = 400
PROSPECTS = 80
FIRST_PURCHASES = ("auc", "ece", "above_high", "buyers", "spent_over_expected")


# --- spreads and distances ---------------------------------------------------------------------------------------------


def test_a_frequent_value_has_a_bin_of_its_own_and_missing_ones_the_last() -> None:
    values = np.array([0.0] * 60 + [1.0, 2.0, 3.0, 4.0] * 10 + [np.nan] * 7)
    edges = drift.borders(values)
    assert edges.tolist() == [0, 1, 2, 3, 4]
    assert drift.spread(values, edges).tolist() == [60, 10, 10, 10, 10, 0, 7]
    assert drift.spread(np.array([-1.0, 0.5, 9.0, np.inf]), edges).tolist() == [1, 1, 0, 0, 0, 2, 0]
    assert drift.borders(np.array([np.nan, np.inf])).size == 0


def test_the_index_is_what_it_comes_to_by_hand() -> None:
    # two groups, one above the last border and one of missing values, half a row more in each
    before, now = np.array([50, 50, 0, 0]), np.array([25, 75, 0, 0])
    assert drift.psi(before, now) == pytest.approx(25 / 102 * math.log(75.5 / 25.5))
    assert drift.psi(before, before) == 0
    lost = np.array([40, 40, 0, 20])
    by_hand = 2 * (10 / 102) * math.log(50.5 / 40.5) + (20 / 102) * math.log(20.5 / 0.5)
    assert drift.psi(before, lost) == pytest.approx(by_hand)
    assert math.isnan(drift.psi(before, np.zeros(4)))


def test_the_distance_is_what_it_comes_to_by_hand() -> None:
    before = np.array([50, 50, 0, 0])
    assert drift.ks(before, np.array([25, 75, 0, 0])) == 0.25
    assert drift.ks(before, np.array([40, 40, 0, 20])) == pytest.approx(0.2)
    assert drift.ks(before, np.array([5, 5, 0, 0])) == 0


def test_bins_cost_the_distance_no_more_than_one_bin() -> None:
    rng = np.random.default_rng(3)
    before, now = rng.normal(size=4000), rng.normal(0.3, 1.2, size=3000)
    edges = drift.borders(before)
    binned = drift.ks(drift.spread(before, edges), drift.spread(now, edges))
    exact = ks_2samp(before, now).statistic
    assert exact - 0.011 <= binned <= exact


def test_two_samples_of_one_population_are_within_chance_and_a_shift_is_beyond() -> None:
    rng = np.random.default_rng(5)
    beyond = {"same": 0, "shifted": 0}
    for _ in range(50):
        before = rng.lognormal(size=300)
        edges = drift.borders(before)
        for name, factor in (("same", 1.0), ("shifted", 1.6)):
            counts = drift.spread(before, edges), drift.spread(rng.lognormal(size=300) * factor, edges)
            beyond[name] += drift.psi(*counts) > drift.psi_by_chance(*counts)
            beyond[name] += drift.ks(*counts) > drift.ks_by_chance(*counts)
    assert beyond["same"] <= 2
    assert beyond["shifted"] >= 80


def test_scores_of_the_reference_population_come_out_of_the_curve() -> None:
    rng = np.random.default_rng(7)
    spend = np.where(rng.random(3000) < 0.2, 5.0, rng.gamma(2, 20, 3000))
    fusion = CalibratedStack.fit(pd.DataFrame({"btyd": spend, "label_spend": spend}), FusionConfig(members=("btyd",)))
    scores = fusion.reference_scores
    assert len(scores) == 1001
    told = fusion.apply({"btyd": spend})["score"]
    edges = np.arange(1.0, 100.0)
    assert drift.ks(drift.spread(scores, edges), drift.spread(told, edges)) < 0.01


def test_a_value_that_cannot_be_told_breaks_no_threshold() -> None:
    row = drift.figure("stability", "score", "moved", math.nan, 0, most=0.1)
    assert (row["value"], row["threshold"], row["broken"]) == (None, 0.1, False)


@pytest.mark.parametrize(("value", "threshold", "broken"), [(0.7, 0.8, True), (0.9, 0.8, False), (1.3, 1.2, True)])
def test_a_figure_between_two_borders_names_the_nearer(value: float, threshold: float, broken: bool) -> None:
    row = drift.figure("realised", "2024-01-01", "calibration", value, 9, least=0.8, most=1.2)
    assert (row["threshold"], row["broken"]) == (threshold, broken)


def test_wide_rows_are_counted_as_numpy_counts_them(spark: SparkSession) -> None:
    rng = np.random.default_rng(11)
    frame = pd.DataFrame({"a": rng.normal(size=300), "b": np.floor(rng.exponential(2, 300))})
    frame.loc[::7, "a"] = np.nan
    frame["day"] = np.where(np.arange(300) % 3 == 0, "2024-01-01", "2024-01-02")
    edges = {name: drift.borders(frame[name].to_numpy()) for name in "ab"}
    rows = spark.createDataFrame(frame).withColumn("b", F.nullif("b", F.lit(3.0)).cast("float")).repartition(3)
    found = drift.count_spreads(rows, edges, "day")
    frame.loc[frame["b"] == 3, "b"] = np.nan
    assert set(found) == {"2024-01-01", "2024-01-02"}
    for day, part in frame.groupby("day"):
        for name in "ab":
            assert found[str(day)][name].tolist() == drift.spread(part[name].to_numpy(), edges[name]).tolist()


# --- the nightly check -------------------------------------------------------------------------------------------------


@dataclass
class Platform:
    """Three nights of 400 users.

    Of OLD the horizon is over: everybody spent what was expected, every second outside the interval. On NIGHT features are as
    in training. On NEXT spend_30d is five times as large, and five scores have moved by 30 points, two of them after an event.
    """

    spark: SparkSession
    settings: Config
    lakehouse: Lakehouse
    bundle: Bundle

    @property
    def arguments(self) -> list[str]:
        given = self.settings
        return [
            "features.windows=[30,90]",
            "features.history_length=6",
            f"tables.path={given.tables.path}",
            f"bundles={given.bundles}",
        ]

    def check(self, day: date) -> tuple[pipeline.DriftResult, dict[tuple[Any, ...], dict[str, Any]]]:
        result = pipeline.check_drift(self.spark, self.settings, day)
        return result, {(row["subject"], row["metric"], row["against"]): row for row in result.rows}


def scored(day: date, number: int, score: float, digest: str, **values: Any) -> dict[str, Any]:
    row = {"user_key": f"user{number}", "score_date": day, "score": score, "level": "EDCBA"[min(int(score / 20), 4)]}
    return {**row, "bundle_digest": digest, "risk_level": "low", "code_version": "test", **values}


def promised_totals(digest: str) -> list[dict[str, Any]]:
    """Of OLD, when every user spent 10: right for all, right for A, too low for B, and of C not all users are counted.

    Those of another bundle are all too low.
    """
    ends = {
        ("platform", "all"): (USERS, 1.1),
        ("level", "A"): (80, 1.1),
        ("level", "B"): (80, 0.9),
        ("level", "C"): (70, 0.9),
    }
    return [
        {
            "score_date": OLD,
            "horizon_days": days,
            "segment": segment,
            "value": value,
            "users": users,
            "high": 10 * users * most if bundle == digest else 1.0,
            "bundle_digest": bundle,
        }
        for (segment, value), (users, most) in ends.items()
        for days in (90, 30)
        for bundle in (digest, "another")
    ]


def prospects_of_old(digest: str) -> list[dict[str, Any]]:
    """Prospects of OLD: of the likely ones, who are users, each bought for 10; of the others none."""
    return [
        {
            "user_key": f"user{number}" if number < PROSPECTS // 5 else f"visitor{number}",
            "score_date": OLD,
            "expected_spend": 6.0 if number < PROSPECTS // 5 else 0.75,
            "high": 9.0 if number < PROSPECTS // 10 else 12.0,
            "p_active": 0.9 if number < PROSPECTS // 5 else 0.1,
            "bundle_digest": digest,
        }
        for number in range(PROSPECTS)
    ]


@pytest.fixture(scope="module")
def platform(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    folder = tmp_path_factory.mktemp("drift")
    settings = config.load(
        overrides=[
            "features.windows=[30, 90]",
            "features.history_length=6",
            f"tables.path={folder}/lakehouse",
            f"bundles={folder}/bundles",
        ]
    )
    lakehouse = Lakehouse(spark, settings.tables)
    features = users(spark, settings, USERS, mean=3, night=NIGHT).localCheckpoint()
    trained = features.withColumns(
        {
            "as_of_date": F.lit(NIGHT - timedelta(days=200)),
            "label_spend": F.lit(1.0),
            "exposure_days": F.lit(90),
            "weight": F.lit(1.0).cast("float"),
            "complete": F.lit(True),
            "given": F.lit(False),
            "fold": F.lit(0),
        }
    )
    version = lakehouse.replace(labels.training_set_table(settings.features, ()), trained)
    spend = np.random.default_rng(1).gamma(2, 20, 2000)
    bundle = bundles.write(
        folder / "bundles" / "one",
        [BtydMember(90, 0.8, 20.0, 0.5, 3.0, 4.0, 3.0, 30.0)],
        CalibratedStack.fit(pd.DataFrame({"btyd": spend, "label_spend": spend}), FusionConfig(members=("btyd",))),
        Horizons(90, ()),
        inputs={"tabular": catalogue(settings.features).names},
        lineage={"training_set": {"location": lakehouse.location("training_set"), "version": version}},
        metrics={},
    )
    number = F.substring("user_key", 5, 9).cast("int")
    bought = F.when(number < 2, F.transform("seq_amount", lambda amount: amount + 1)).otherwise(F.col("seq_amount"))
    after = features.withColumns(
        {
            "as_of_date": F.lit(NEXT),
            "spend_30d": F.col("spend_30d") * F.lit(5).cast("float"),
            "seq_amount": bought.cast("array<float>"),
        }
    )
    lakehouse.replace(user_features_table(settings.features), features.unionByName(after))
    scores = []
    for user in range(USERS):
        score, inside = 100 * (user + 0.5) / USERS, user % 2 == 0
        known = {"expected_spend": 10.0, "low": 9.0 if inside else 11.0, "high": 12.0, "p_active": 0.9}
        scores += [
            scored(OLD, user, score, bundle.digest, **known),
            scored(NIGHT, user, score, bundle.digest),
            scored(NEXT, user, score + 30 * (user < 5), bundle.digest),
            scored(LAST, user, score, "another"),
        ]
    lakehouse.replace(SCORES, rows_of(spark, SCORES, scores))
    forget_column(lakehouse, SCORES, "horizon_days")
    lakehouse.replace(PROSPECT_SCORES, rows_of(spark, PROSPECT_SCORES, prospects_of_old(bundle.digest)))
    lakehouse.replace(TOTALS, rows_of(spark, TOTALS, promised_totals(bundle.digest)))
    days = [
        {"user_key": f"user{user}", "day": OLD + timedelta(days=user % 90), "spend": Decimal(10)}
        for user in range(USERS)
    ]
    lakehouse.replace(USER_DAILY, rows_of(spark, USER_DAILY, days))
    lakehouse.replace(EVENTS, rows_of(spark, EVENTS, [{"event_date": OLD}, {"event_date": NIGHT}]))
    return Platform(spark, settings, lakehouse, bundle)


@pytest.fixture(autouse=True)
def listener() -> Iterator[None]:
    """What the command does to the log, undone: tests listen to it through pytest."""
    package = logging.getLogger("bp_spark")
    package.propagate = True
    yield
    package.handlers.clear()
    package.propagate = True


def test_where_nothing_moved_nothing_alarms_but_what_was_spent_outside_the_intervals(platform: Platform) -> None:
    result, figures = platform.check(NIGHT)
    assert [(row["kind"], row["subject"], row["metric"]) for row in result.broken] == [
        ("realised", str(OLD), "coverage")
    ]
    assert figures["spend_30d", "psi", "training"]["value"] == pytest.approx(0, abs=0.01)
    assert figures[str(OLD), "coverage", None]["value"] == 0.5
    assert figures[str(OLD), "calibration", None]["value"] == 1
    assert figures[str(OLD), "mae", None]["value"] == 0
    first = {name: figures[str(OLD), f"prospects_{name}", None] for name in FIRST_PURCHASES}
    assert {name: row["value"] for name, row in first.items()} == {
        "auc": 1.0,
        "ece": pytest.approx(0.1, abs=0.005),
        "above_high": 1 / 10,
        "buyers": 1 / 5,
        "spent_over_expected": pytest.approx(160 / 144),
    }
    # chance explains more than the setting tolerates: 16 * 0.9 + 64 * 0.1 purchasers were expected
    total = first["spent_over_expected"]
    assert (total["threshold"], total["users"]) == (pytest.approx(1 + 3.3 / 20.8**0.5), PROSPECTS)
    inside = figures[str(OLD), "totals_inside", None]
    assert (inside["value"], inside["reference"], inside["users"]) == (2 / 3, 0.9, USERS)
    assert figures["score", "moved", str(OLD)]["value"] == 0
    # there are no features of OLD: nobody can tell whom an event moved
    assert figures["score", "moved_without_events", str(OLD)]["value"] is None
    watched = {row["subject"] for row in result.rows if row["kind"] == "feature"}
    assert watched == set(catalogue(platform.settings.features).names)


def test_prospects_who_spend_nothing_or_far_too_much_raise_the_alarm(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(platform.spark, platform.settings)

    def total(amount: float) -> dict[str, Any]:
        def spent(run: Run, scores: Any, day: date, days: int) -> Any:
            return scores.withColumn("label_spend", F.lit(amount))

        monkeypatch.setattr(realised, "with_spend", spent)
        rows = realised._errors_of_prospects(run, OLD, 90, platform.bundle.digest)
        return next(row for row in rows if row["metric"] == "prospects_spent_over_expected")

    for amount, is_alarm in {0.0: False, 1.8: False, 40.0: True}.items():
        row = total(amount)
        assert row["value"] == pytest.approx(amount * PROSPECTS / 144)
        assert row["broken"] is is_alarm
    # of so few expected purchasers none is little evidence; of more it is
    monkeypatch.setattr(realised, "_DEVIATIONS", 2.0)
    assert total(0.0)["broken"]
    assert realised._errors_of_prospects(run, OLD, 90, "another bundle") == []


def test_drift_that_was_put_in_is_found_and_nothing_else(platform: Platform) -> None:
    platform.check(NIGHT)
    result, figures = platform.check(NEXT)
    broken = {(row["subject"], row["against"]) for row in result.broken}
    assert broken == {("spend_30d", "training"), ("spend_30d", str(NIGHT)), ("score", str(NIGHT))}
    still = figures["score", "moved_without_events", str(NIGHT)]
    assert (still["value"], still["threshold"], still["broken"]) == (3 / USERS, 0.005, True)
    assert figures["score", "moved", str(NIGHT)]["value"] == 5 / USERS
    assert not figures["score", "psi", str(NIGHT)]["broken"]
    assert figures["score", "changed_level", str(NIGHT)]["value"] == 5 / USERS
    assert figures["E>D", "share", str(NIGHT)]["value"] == 5 / 80
    assert figures["E>E", "share", str(NIGHT)]["users"] == 75
    # another night's check has measured it
    assert not [row for row in result.rows if row["kind"] == "realised"]


def test_a_second_check_of_the_same_tables_changes_nothing(platform: Platform) -> None:
    platform.check(NIGHT)
    version = platform.lakehouse.version("drift")
    again, _ = platform.check(NIGHT)
    assert platform.lakehouse.version("drift") == version
    assert again.stages[-1]["status"] == "unchanged"
    assert len(again.broken) == 1


def test_a_bundle_that_was_trained_elsewhere_is_compared_with_the_night_before_only(
    platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "bp_spark")
    result, figures = platform.check(LAST)
    assert "what bundle another learned from is not in this lakehouse" in caplog.text
    assert {row["against"] for row in result.rows if row["kind"] != "realised"} == {str(NEXT)}
    assert "another bundle" in figures["score", "moved", str(NEXT)]["note"]


def test_the_command_ends_with_8_where_a_watched_threshold_is_broken(
    platform: Platform, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = ["drift.not_watched=[spend_30d]", "drift.max_moved=0.1"]
    with pytest.raises(SystemExit) as ended:
        app.main("drift", ["--date", str(NEXT), *platform.arguments])
    assert ended.value.code == 8
    said = capsys.readouterr().out
    assert "BROKEN" in said
    assert "6.25%" in said
    app.main("drift", ["--date", str(NEXT), *platform.arguments, *fine])
    said = capsys.readouterr().out
    assert "BROKEN" not in said
    assert "6.25%" in said
    # what is not watched is recorded all the same
    of_spend = platform.lakehouse.read("drift").filter("subject = 'spend_30d' AND metric = 'psi'")
    (least,) = of_spend.filter(F.col("score_date") == F.lit(NEXT)).agg(F.min("value")).collect()[0]
    assert least > 0.25


def test_score_checks_the_night_and_warns(platform: Platform, capsys: pytest.CaptureFixture[str]) -> None:
    version, table = platform.lakehouse.version("scores"), platform.lakehouse.location("scores")
    # profiles are of the newest night, and there are no features of LAST
    platform.lakehouse.delete("scores", f"score_date = '{LAST}'")
    app.main("score", ["--date", str(NEXT), "--bundle", str(platform.bundle.folder), *platform.arguments])
    platform.spark.sql(f"RESTORE delta.`{table}` TO VERSION AS OF {version}")
    said = capsys.readouterr()
    assert "400 users scored" in said.out
    assert re.search(rf"warning: drift of {NEXT}: \d+ of \d+ thresholds are broken: ", said.err)
