"""Reasons: they add up to the prediction, they name what it depends on, and their error is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xgboost
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import FeaturesConfig, FusionConfig
from bp_spark.core.errors import BundleError
from bp_spark.features.catalogue import catalogue
from bp_spark.lakehouse.tables import SCORES
from bp_spark.model.explanation import SEQUENCE, Explanation
from bp_spark.model.horizons import Horizons
from bp_spark.model.members.base import Member, predict_all
from bp_spark.model.members.btyd import BtydMember
from bp_spark.model.members.linear import LinearMember
from bp_spark.model.members.trees import SqrtTreesMember, TreesMember
from bp_spark.model.stack import CalibratedStack
from bp_spark.registry import bundle as bundles
from bp_spark.scoring import reasons

ROWS = 3000
GROUPS = {"spend": "money", "orders": "money", "gap": "rhythm", "season": "season", "noise": "noise"}


@pytest.fixture(scope="module")
def columns() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    drawn = {name: rng.exponential(10, ROWS).astype(np.float32) for name in GROUPS}
    drawn["gap"][rng.random(ROWS) < 0.2] = np.nan
    return drawn


@pytest.fixture(scope="module")
def members(columns: dict[str, np.ndarray]) -> dict[str, Member]:
    rng = np.random.default_rng(5)
    late = np.nan_to_num(columns["gap"], nan=30.0)
    spend = rng.gamma(2, 1 + 3 * columns["spend"] + columns["orders"]) * (rng.random(ROWS) < np.exp(-late / 30))

    def booster(objective: str, label: np.ndarray) -> xgboost.Booster:
        matrix = xgboost.DMatrix(
            np.stack(list(columns.values()), axis=1), label=label, missing=np.nan, feature_names=list(GROUPS)
        )
        settings = {"objective": objective, "max_depth": 4, "eta": 0.1, "nthread": 1, "seed": 1}
        booster = xgboost.train(settings, matrix, 40)
        booster.set_attr(smearing="1.2")
        return booster

    return {
        "trees": TreesMember(booster("reg:tweedie", spend)),
        "sqrt_trees": SqrtTreesMember(booster("reg:squarederror", np.sqrt(spend))),
        "linear": LinearMember(tuple(GROUPS), (1.0,) * 5, (0.6, 0.1, -0.5, 0.0, 0.0), 2.0, 1.3, 9.0),
    }


def fused(
    members: dict[str, Member], columns: dict[str, np.ndarray], *names: str
) -> tuple[CalibratedStack, dict[str, np.ndarray]]:
    predictions = {name: members[name].predict(columns) for name in names}
    rng = np.random.default_rng(6)
    spend = np.mean(list(predictions.values()), axis=0) * rng.gamma(2, 0.5, ROWS)
    fusion = CalibratedStack.fit(pd.DataFrame({**predictions, "label_spend": spend}), FusionConfig(members=names))
    weights = tuple(1.0 / len(names) for _ in names)
    return replace(fusion, weights=weights), predictions


def explained(
    members: dict[str, Member], columns: dict[str, np.ndarray], *names: str
) -> tuple[Explanation, CalibratedStack, dict[str, np.ndarray]]:
    fusion, predictions = fused(members, columns, *names)
    users = np.array([f"u{row // 3}" for row in range(ROWS)], object)
    explanation = Explanation.fit(
        columns, predictions, users, list(members.values()), fusion, GROUPS, seed=1, threads=1
    )
    return explanation, fusion, predictions


@pytest.mark.parametrize("names", [("trees",), ("sqrt_trees",), ("linear",), ("trees", "sqrt_trees", "linear")])
def test_contributions_add_up_to_what_the_fusion_expects(
    members: dict[str, Member], columns: dict[str, np.ndarray], names: tuple[str, ...]
) -> None:
    explanation, fusion, predictions = explained(members, columns, *names)
    by_feature, of_sequence, base = explanation(columns, predictions, members, fusion)
    expected = fusion.apply(predictions)["expected_spend"]
    np.testing.assert_allclose(base + by_feature.sum(axis=0) + of_sequence, expected, rtol=1e-6, atol=1e-5)
    assert expected.min() < base < expected.max()
    # none of these members reads histories
    assert SEQUENCE not in explanation.group_names
    assert not of_sequence.any()


def test_trees_alone_are_told_by_their_shapley_values(
    members: dict[str, Member], columns: dict[str, np.ndarray]
) -> None:
    explanation, fusion, predictions = explained(members, columns, "trees")
    by_feature, _, _ = explanation(columns, predictions, members, fusion)
    trees: Any = members["trees"]
    shares = trees.contributions(columns)[:, :-1].T
    # a user's contributions are the shares, all stretched alike
    stretch = by_feature.sum(axis=0) / shares.sum(axis=0)
    np.testing.assert_allclose(by_feature, shares * stretch, rtol=1e-6, atol=1e-6)
    assert (stretch > 0).all()


def test_a_user_who_stands_at_the_base_has_finite_reasons_that_cancel(
    members: dict[str, Member], columns: dict[str, np.ndarray]
) -> None:
    explanation, fusion, _ = explained(members, columns, "linear")
    base_root = float(explanation.imitations["linear"].contributions(columns)[0, -1])
    for shift in (0.0, 1e-9, 1e-5):
        predictions = {"linear": np.full(ROWS, (base_root + shift) ** 2)}
        by_feature, of_sequence, base = explanation(columns, predictions, members, fusion)
        summed = by_feature.sum(axis=0) + of_sequence
        assert np.isfinite(by_feature).all()
        np.testing.assert_allclose(base + summed, fusion.apply(predictions)["expected_spend"], rtol=1e-7)


def test_a_member_is_told_by_the_features_that_it_reads_and_by_no_others() -> None:
    rng = np.random.default_rng(9)
    tenure = rng.integers(20, 400, ROWS)
    columns = {
        "spend_90d": np.zeros(ROWS),
        "frequency": rng.poisson(rng.gamma(0.7, tenure / 30)),
        "active_span_days": (tenure * rng.random(ROWS)).round(),
        "tenure_days": tenure,
        "monetary_value": rng.gamma(3, 10, ROWS),
    }
    # nearly the same as what the purchase process predicts, which doesn't read it
    columns["spend_90d"] = columns["frequency"] / tenure * 90 * columns["monetary_value"] + rng.gamma(2, 1, ROWS)
    btyd = BtydMember(90, 0.8, 20.0, 0.5, 3.0, 4.0, 3.0, 30.0)
    predictions = predict_all([btyd], columns)
    spend = predictions["btyd"] * rng.gamma(2, 0.5, ROWS)
    fusion = CalibratedStack.fit(pd.DataFrame({**predictions, "label_spend": spend}), FusionConfig(members=("btyd",)))
    groups = {name: "lately" if name == "spend_90d" else "history" for name in columns}
    users = np.arange(ROWS)
    explanation = Explanation.fit(columns, predictions, users, [btyd], fusion, groups, seed=1, threads=1)
    by_feature, of_sequence, base = explanation(columns, predictions, {"btyd": btyd}, fusion)
    assert not by_feature[0].any()
    assert not of_sequence.any()
    expected = fusion.apply(predictions)["expected_spend"]
    np.testing.assert_allclose(by_feature[1:].sum(axis=0), expected - base, rtol=1e-6, atol=1e-6)
    # more purchase days, or dearer ones, never look like a reason to expect less
    many = (columns["frequency"] > 15) & (columns["active_span_days"] > 0.9 * tenure)
    assert (by_feature[list(columns).index("frequency")][many] > 0).mean() > 0.95


def test_reasons_are_compared_with_permutations_of_the_prediction_itself(
    members: dict[str, Member], columns: dict[str, np.ndarray]
) -> None:
    explanation, fusion, _ = explained(members, columns, "trees", "sqrt_trees", "linear")
    figures = explanation.agreement(columns, members, fusion, seed=1)
    assert figures.users == 100
    assert figures.error < 0.4
    assert figures.same_first > 0.8
    without_trees = replace(fusion, weights=(0.0, 0.5, 0.5))
    assert explanation.agreement(columns, members, without_trees, seed=1).error < 0.4
    document = explanation.to_json() | {"r_squared": {}}
    mute = Explanation.from_json(document, Path())
    with pytest.raises(BundleError, match="no imitation of member 'linear'"):
        mute.require(members, fusion)
    with pytest.raises(BundleError, match="read histories"):
        replace(explanation, sequence=True).require(members, fusion)


def test_to_lose_the_foremost_group_costs_more_than_to_lose_another(
    members: dict[str, Member], columns: dict[str, np.ndarray]
) -> None:
    explanation, fusion, predictions = explained(members, columns, "trees", "sqrt_trees", "linear")
    by_feature, _, _ = explanation(columns, predictions, members, fusion)
    names = list(dict.fromkeys(GROUPS.values()))
    by_group = np.stack([by_feature[[GROUPS[f] == name for f in GROUPS]].sum(axis=0) for name in names])
    foremost = np.argmax(np.abs(by_group), axis=0)
    expected = fusion.apply(predictions)["expected_spend"]
    # lost: another user's values stand there
    other = np.random.default_rng(7).permutation(ROWS)
    moved = []
    for name in names:
        without = {f: values[other] if GROUPS[f] == name else values for f, values in columns.items()}
        anew = fusion.apply({member: members[member].predict(without) for member in predictions})["expected_spend"]
        moved.append(np.abs(anew - expected))
    lost = np.stack(moved)
    of_foremost = lost[foremost, np.arange(ROWS)].mean()
    assert of_foremost > 2 * lost.mean()


def test_the_imitation_is_measured_by_users_it_has_not_seen(
    members: dict[str, Member], columns: dict[str, np.ndarray]
) -> None:
    assert explained(members, columns, "trees")[0].r_squared == {}
    assert explained(members, columns, "linear")[0].r_squared["linear"] > 0.9
    fusion, _ = fused(members, columns, "linear")
    unknowable = {"linear": np.random.default_rng(8).gamma(2, 20, ROWS)}
    users = np.array([f"u{row}" for row in range(ROWS)], object)
    explanation = Explanation.fit(columns, unknowable, users, list(members.values()), fusion, GROUPS, seed=1, threads=1)
    assert explanation.r_squared["linear"] < 0.1


def test_a_bundle_brings_its_explanation_and_refuses_one_of_other_features(
    members: dict[str, Member], columns: dict[str, np.ndarray], tmp_path: Path
) -> None:
    explanation, fusion, _ = explained(members, columns, "trees", "linear")
    written = bundles.write(
        tmp_path / "one",
        [members["trees"], members["linear"]],
        fusion,
        Horizons(90, ()),
        inputs={"tabular": list(GROUPS)},
        lineage={},
        metrics={},
        explanation=explanation,
    )
    loaded = bundles.load(written.folder)
    predicted = loaded.predict(columns)
    for before, after in zip(written.explain(columns, predicted), loaded.explain(columns, predicted), strict=True):
        np.testing.assert_array_equal(before, after)
    document = explanation.to_json()
    document["features"] = ["spend", *document["features"][:0:-1]]
    with pytest.raises(BundleError, match="other features"):
        Explanation.from_json(document, written.folder)
    with pytest.raises(BundleError, match="malformed"):
        Explanation.from_json({}, written.folder)


def test_reasons_are_sentences(spark: SparkSession) -> None:
    features = catalogue(FeaturesConfig(windows=(7, 30)))
    listed_reasons = [
        {"group": "recent purchases", "contribution": 48.1, "feature": "spend_30d", "value": 1512.3},
        {"group": "rhythm of purchases", "contribution": -1234.5, "feature": "gap_mean_days", "value": None},
        {"group": SEQUENCE, "contribution": -0.001, "feature": None, "value": None},
    ]
    rows = spark.createDataFrame([(listed_reasons,)], f"reasons {SCORES.schema['reasons'].dataType.simpleString()}")
    assert rows.select(reasons.in_words(F.col("reasons"), features)).collect()[0][0] == [
        "Recent purchases: +48.10; above all Spend less refunds (currency, 30 days) = 1,512.30",
        "Rhythm of purchases: -1,234.50; above all Mean days between purchase days (days, ever) = unknown",
        "Latest activity: -0.00",
    ]
