"""Intervals by user: as wide as the user is unpredictable, without jumps, and old ones as they were."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bp_spark.core.config import FusionConfig
from bp_spark.core.errors import BundleError
from bp_spark.model.intervals import UserIntervals
from bp_spark.model.stack import CalibratedStack

CONF = FusionConfig(members=("trees", "sqrt_trees"))


def shop(rows: int, seed: int) -> pd.DataFrame:
    """Users who all buy. Half of them are hard to predict: they spend erratically, and the members disagree about them."""
    rng = np.random.default_rng(seed)
    hard = rng.random(rows) < 0.5
    spread = np.where(hard, 0.8, 0.2)
    usual = np.exp(rng.normal(4, 1, rows))
    apart = np.where(hard, 0.4, 0.05) * rng.choice([-1, 1], rows)
    return pd.DataFrame(
        {
            "user_key": [f"u{number}" for number in range(rows)],
            "label_spend": usual * np.exp(rng.normal(0, spread) - spread**2 / 2),
            "trees": usual * np.exp(apart),
            "sqrt_trees": usual * np.exp(-apart),
            "hard": hard,
        }
    )


def predictions(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    return {name: frame[name].to_numpy() for name in CONF.members}


@pytest.fixture(scope="module")
def stack() -> CalibratedStack:
    return CalibratedStack.fit(shop(6000, seed=1), CONF)


def test_users_who_are_harder_to_predict_have_wider_intervals_that_hold_as_many_of_them(stack: CalibratedStack) -> None:
    fresh = shop(20_000, seed=2)
    answers = pd.DataFrame(stack.apply(predictions(fresh)))
    inside = fresh["label_spend"].between(answers["low"], answers["high"])
    width = (answers["high"] - answers["low"]) / answers["expected_spend"]
    assert width[fresh["hard"]].median() > 2.5 * width[~fresh["hard"]].median()
    assert inside.groupby(fresh["hard"]).mean().between(0.86, 0.94).all()
    # the score alone doesn't say how sure a prediction is
    of_like_score = answers["risk_level"].groupby(pd.cut(answers["score"], 10, labels=False))
    assert (of_like_score.nunique() >= 2).all()


def test_ends_move_with_the_expected_spend_without_jumps(stack: CalibratedStack) -> None:
    spend = np.geomspace(1, 1e5, 20_000)
    answers = stack.apply({"trees": spend * 1.05, "sqrt_trees": spend * 0.95})
    for name in ("low", "high"):
        steps = np.diff(answers[name]) / answers[name][1:]
        assert np.abs(steps).max() < 0.01, name
    assert (np.diff(answers["high"]) > 0).all()


def test_beyond_all_that_was_seen_the_relative_width_stays(stack: CalibratedStack) -> None:
    spend = np.array([1e5, 1e7, 1e9])
    answers = stack.apply({"trees": spend, "sqrt_trees": spend})
    assert answers["high"] / answers["expected_spend"] == pytest.approx([answers["high"][0] / 1e5] * 3, rel=0.3)


def test_who_may_spend_nothing_has_no_lower_end_and_who_hardly_buys_no_upper_one() -> None:
    rng = np.random.default_rng(3)
    buys = np.clip(rng.uniform(-0.3, 1.3, 6000), 0, 1)
    spend = np.where(rng.random(6000) < buys, 50 * np.exp(rng.normal(0, 0.5, 6000)), 0.0)
    frame = pd.DataFrame({"label_spend": spend, "trees": 56 * buys, "sqrt_trees": 56 * buys})
    for coverage, tail in ((0.9, 0.05), (0.6, 0.2)):
        conf = CONF.model_copy(update={"coverage": coverage})
        answers = CalibratedStack.fit(frame, conf).apply(predictions(frame))
        p_active = answers["p_active"]
        assert p_active.min() < 2 * tail < 1 - tail < p_active.max()
        assert ((answers["low"] > 0) <= (p_active >= 1 - tail)).all()
        hardly = p_active <= 2 * tail
        assert (answers["high"][hardly] == answers["expected_spend"][hardly]).all()
        assert (answers["high"] > answers["expected_spend"])[~hardly].all()
        outside = (spend > answers["high"]) | (spend < answers["low"])
        assert outside.mean() < 2 * tail + 0.02
        perhaps = (p_active > 2.5 * tail) & (p_active < 1 - 2 * tail)
        assert outside[perhaps].mean() == pytest.approx(2 * tail, abs=0.04)


def test_where_too_few_surely_buy_the_lower_end_is_nothing() -> None:
    rng = np.random.default_rng(4)
    predicted = rng.uniform(5, 50, 400)
    spend = np.where(rng.random(400) < 0.5, 2 * predicted, 0.0)
    fitted = CalibratedStack.fit(
        pd.DataFrame({"label_spend": spend, "trees": predicted, "sqrt_trees": predicted}), CONF
    )
    assert isinstance(fitted.intervals, UserIntervals)
    assert fitted.intervals.lower is None
    assert CalibratedStack.from_json(json.loads(json.dumps(fitted.to_json()))) == fitted
    assert (fitted.apply({"trees": predicted, "sqrt_trees": predicted})["low"] == 0).all()


def test_another_currency_changes_no_more_than_the_unit(stack: CalibratedStack) -> None:
    fresh, rate = shop(500, seed=5), 150.0
    rows = shop(6000, seed=1)
    money = ["label_spend", *CONF.members]
    other = CalibratedStack.fit(rows.assign(**{name: rows[name] * rate for name in money}), CONF)
    ours, theirs = stack.apply(predictions(fresh)), other.apply({n: v * rate for n, v in predictions(fresh).items()})
    for name in ("low", "high"):
        assert np.median(np.abs(theirs[name] / rate / ours[name] - 1)) < 0.05, name


@pytest.mark.parametrize(
    "change",
    [
        {"upper": None},
        {"upper": {}},
        {"tail": 0.7},
        {"tail": None},
        {"unit": 0.0},
        {"more": 1},
        {"upper.weights": [0.0]},
        {"upper.weights": [400.0, 0.0, 0.0, 0.0, 0.0, 0.0]},
        {"upper.weights": [0.0, 1e300, 0.0, 0.0, 0.0, 0.0]},
        {"upper.weights": ["a", 0.0, 0.0, 0.0, 0.0, 0.0]},
        {"upper.highest": [-9.0, 9.0, 9.0, 9.0, 9.0]},
        {"upper.highest": [-1e300, 9.0, 9.0, 9.0, 9.0]},
        {"lower.lowest": [1e9, 0.0, 0.0, 0.0, 0.0]},
    ],
    ids=str,
)
def test_malformed_intervals_are_refused(stack: CalibratedStack, change: dict[str, Any]) -> None:
    document = stack.to_json()
    for path, value in change.items():
        *parents, name = path.split(".")
        place = document["intervals"]
        for parent in parents:
            place = place[parent]
        place[name] = value
    with pytest.raises(BundleError, match="fusion: malformed"):
        CalibratedStack.from_json(document)
