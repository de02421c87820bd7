"""CalibratedStack: calibration that keeps order, intervals that cover, scores that stand still."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from datetime import date

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bp_spark.core.config import FusionConfig
from bp_spark.core.errors import BundleError, DataError
from bp_spark.model.columns import ACTIVE, SILENT
from bp_spark.model.curve import Curve
from bp_spark.model.level import Level
from bp_spark.model.stack import LEVELS, OUTPUTS, RISKS, CalibratedStack

BOTH = FusionConfig(members=("trees", "transformer"))
ONE = FusionConfig(members=("trees",))
NUMBERS = ("expected_spend", "low", "high", "p_active", "score")


def world(n: int, seed: int) -> pd.DataFrame:
    """Users whose members are wrong by a factor and a power, a third of them without spend."""
    rng = np.random.default_rng(seed)
    mu = rng.normal(4.5, 1.6, n)
    active = 1 / (1 + np.exp(3 - mu))
    expected = active * np.exp(mu + 0.32)
    return pd.DataFrame(
        {
            "label_spend": np.where(rng.random(n) < active, np.exp(mu + rng.normal(0, 0.8, n)), 0.0),
            "trees": 0.6 * expected**0.95 * np.exp(rng.normal(0, 0.25, n)),
            "transformer": expected**1.05 * np.exp(rng.normal(0, 0.35, n)),
        }
    )


def members(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    return {name: frame[name].to_numpy() for name in frame.columns if name != "label_spend"}


RISING = Level("2024-01-01", 1.0, 0.5, Curve((0.0, 10.0), (0.0, 0.5)), 0.05)


@pytest.fixture(scope="module")
def fusion() -> CalibratedStack:
    return CalibratedStack.fit(world(4000, seed=1), BOTH)


def assert_sound(answers: dict[str, np.ndarray]) -> None:
    assert tuple(answers) == OUTPUTS
    for name in NUMBERS:
        assert np.isfinite(answers[name]).all(), name
    assert (answers["low"] >= 0).all()
    assert (answers["low"] <= answers["expected_spend"]).all()
    assert (answers["expected_spend"] <= answers["high"]).all()
    assert ((answers["p_active"] >= 0) & (answers["p_active"] <= 1)).all()
    assert ((answers["score"] >= 0) & (answers["score"] <= 100)).all()
    assert set(answers["level"]) <= set(LEVELS)
    assert set(answers["risk_level"]) <= set(RISKS)


def test_one_fresh_user_in_ten_lies_outside_the_interval_half_of_those_who_surely_buy_below_it():
    fresh = world(20_000, seed=99)
    outside, below = [], []
    for seed in range(8):
        answers = CalibratedStack.fit(world(2000, seed=seed), BOTH).apply(members(fresh))
        surely = answers["p_active"] >= 0.95
        is_below = fresh["label_spend"] < answers["low"]
        outside.append((is_below | (fresh["label_spend"] > answers["high"])).mean())
        below.append(is_below[surely].mean())
        # the lower end of users who may well spend nothing is 0
        assert (answers["low"][~surely] == 0).all()
    # Given the fitting rows, a tail scatters like a Beta: about sqrt(0.05 * 0.95 / 2000) = 0.005 each.
    assert np.mean(outside) == pytest.approx(0.1, abs=0.015)
    assert np.mean(below) == pytest.approx(0.05, abs=0.015)
    assert np.ptp(outside) < 0.05


def test_every_fifth_of_users_is_covered(fusion):
    fresh = world(20_000, seed=98)
    answers = fusion.apply(members(fresh))
    inside = (answers["low"] <= fresh["label_spend"]) & (fresh["label_spend"] <= answers["high"])
    by_fifth = inside.groupby(pd.qcut(answers["expected_spend"], 5, labels=False)).mean()
    assert by_fifth.between(0.85, 0.99).all()


def test_expected_spend_is_calibrated_on_fresh_users(fusion):
    fresh = world(50_000, seed=97)
    expected = pd.Series(fusion.apply(members(fresh))["expected_spend"])
    fifths = pd.qcut(expected, 5, labels=False)
    ratio = expected.groupby(fifths).sum() / fresh["label_spend"].groupby(fifths).sum()
    assert ratio.between(0.8, 1.25).all()
    raw = fresh["trees"].groupby(fifths).sum() / fresh["label_spend"].groupby(fifths).sum()
    assert not raw.between(0.8, 1.25).any()


def test_p_active_is_the_share_of_active_users(fusion):
    fresh = world(50_000, seed=96)
    p = fusion.apply(members(fresh))["p_active"]
    active = (fresh["label_spend"] > 0).groupby(pd.qcut(p, 5, labels=False, duplicates="drop")).mean()
    predicted = pd.Series(p).groupby(pd.qcut(p, 5, labels=False, duplicates="drop")).mean()
    assert (active - predicted).abs().max() < 0.04


def test_one_member_keeps_its_order_without_new_ties():
    fitted = CalibratedStack.fit(world(3000, seed=2), ONE)
    spend = np.concatenate([np.linspace(0, 50, 4001), np.geomspace(50.1, 1e7, 4000)])
    answers = fitted.apply({"trees": spend})
    assert_sound(answers)
    assert (np.diff(answers["expected_spend"]) > 0).all()
    assert (np.diff(answers["p_active"]) >= 0).all()
    inside = (answers["score"] > 0) & (answers["score"] < 100)
    assert (np.diff(answers["score"][inside]) > 0).all()


def test_the_better_member_weighs_more_and_a_useless_one_all_but_nothing() -> None:
    frame = world(4000, seed=5)
    rng = np.random.default_rng(5)
    frame["btyd"] = frame["trees"] * np.exp(rng.normal(0, 1.5, len(frame)))
    frame["linear"] = rng.permutation(frame["trees"].to_numpy())
    conf = FusionConfig(members=("linear", "btyd", "trees"), shrinkage=1e-4)
    weights = dict(zip(conf.members, CalibratedStack.fit(frame, conf).weights, strict=True))
    assert sum(weights.values()) == pytest.approx(1)
    assert min(weights.values()) >= 0
    assert weights["trees"] > 0.6
    assert weights["linear"] < 0.15
    equal = CalibratedStack.fit(frame, conf.model_copy(update={"shrinkage": 1e6})).weights
    assert equal == pytest.approx([1 / 3] * 3, abs=1e-3)


def test_members_that_say_too_much_altogether_are_stacked_and_calibrated_all_the_same() -> None:
    frame = world(4000, seed=6)
    louder = frame.assign(trees=frame["trees"] * 4, transformer=frame["transformer"] * 4)
    fitted = [CalibratedStack.fit(rows, BOTH) for rows in (frame, louder)]
    np.testing.assert_allclose(fitted[0].weights, fitted[1].weights, rtol=1e-6)
    one, other = (fusion.apply(members(rows)) for fusion, rows in zip(fitted, (frame, louder), strict=True))
    spenders = one["expected_spend"] > 10
    np.testing.assert_allclose(one["expected_spend"][spenders], other["expected_spend"][spenders], rtol=0.05)


def drifting(seed: int, dates: int = 8) -> pd.DataFrame:
    """Users who spend a tenth less at each date for what members say: two weeks apart, the last is the newest."""
    frames = []
    for number in range(dates):
        of_date = world(1500, seed * dates + number)
        frames.append(
            of_date.assign(
                label_spend=of_date["label_spend"] * 0.9**number,
                as_of_date=pd.Timestamp("2024-01-01") + pd.Timedelta(days=14 * number),
            )
        )
    return pd.concat(frames, ignore_index=True)


def test_what_is_newer_tells_more_of_the_level_and_the_interval() -> None:
    past, later = drifting(seed=1), drifting(seed=2, dates=9)
    now = later[later["as_of_date"] == later["as_of_date"].max()]

    def off(half_life_days: float | None) -> tuple[float, float]:
        fitted = CalibratedStack.fit(past, BOTH.model_copy(update={"half_life_days": half_life_days}))
        answers = fitted.apply(members(now.drop(columns="as_of_date")))
        inside = (now["label_spend"] >= answers["low"]) & (now["label_spend"] <= answers["high"])
        return answers["expected_spend"].sum() / now["label_spend"].sum() - 1, abs(inside.mean() - 0.9)

    alike, newer = off(None), off(14)
    assert alike[0] > 0.4
    assert newer[0] < 0.6 * alike[0]
    assert newer[1] <= alike[1]
    # a very long half-life and none are the same
    assert off(1e9) == pytest.approx(alike, rel=1e-6)


def test_dates_are_not_needed_and_one_date_is_none() -> None:
    data = world(2000, seed=3)
    one_date = data.assign(as_of_date=pd.Timestamp("2024-01-01").date())
    assert CalibratedStack.fit(data, BOTH) == CalibratedStack.fit(one_date, BOTH)


def test_scores_are_percentiles_and_levels_fifths_of_the_reference(fusion):
    answers = fusion.apply(members(world(4000, seed=1)))
    ranks = pd.Series(answers["expected_spend"]).rank(pct=True) * 100
    assert np.abs(ranks - answers["score"]).max() < 0.2
    assert pd.Series(answers["level"]).value_counts(normalize=True).to_dict() == pytest.approx(
        dict.fromkeys(LEVELS, 0.2), abs=0.002
    )
    shares = pd.Series(answers["risk_level"]).value_counts(normalize=True)
    assert shares.to_dict() == pytest.approx(dict.fromkeys(RISKS, 1 / 3), abs=0.01)
    bounds = pd.Series(answers["score"]).groupby(answers["level"]).agg(["min", "max"])
    assert bounds.loc["A", "min"] >= 80
    assert bounds.loc["E", "max"] < 20


def test_another_reference_population_moves_scores_and_nothing_else():
    data = world(2000, seed=3)
    poor = data[data["trees"] < data["trees"].median()]
    own, other = (
        CalibratedStack.fit(data, BOTH),
        CalibratedStack.fit(data, BOTH, reference=poor.drop(columns="label_spend")),
    )
    a, b = own.apply(members(data)), other.apply(members(data))
    for name in ("expected_spend", "low", "high", "p_active"):
        np.testing.assert_array_equal(a[name], b[name])
    assert (b["score"] >= a["score"] - 1e-9).all()


def test_the_order_of_rows_does_not_matter_for_the_fit():
    data = world(1500, seed=4)
    shuffled = data.sample(frac=1, random_state=0)
    a, b = (CalibratedStack.fit(frame, BOTH).apply(members(data)) for frame in (data, shuffled))
    for name in NUMBERS:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 70).flatmap(
        lambda n: hnp.arrays(np.float64, (2, n), elements=st.floats(0, 1e9, allow_subnormal=False))
    )
)
def test_an_answer_depends_on_its_row_only_and_is_sound(fusion, spend):
    whole = fusion.apply({"trees": spend[0], "transformer": spend[1]})
    assert_sound(whole)
    for i in range(spend.shape[1]):
        alone = fusion.apply({"trees": spend[0, i : i + 1], "transformer": spend[1, i : i + 1]})
        for name in OUTPUTS:
            assert alone[name][0] == whole[name][i]


def test_json_brings_back_every_bit(fusion):
    back = CalibratedStack.from_json(json.loads(json.dumps(fusion.to_json())))
    assert back == fusion
    data = members(world(500, seed=5))
    before, after = fusion.apply(data), back.apply(data)
    for name in NUMBERS:
        assert before[name].tobytes() == after[name].tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"intervals": {}},
        {"edges": [1.0]},
        {"unknown": 1},
        {"calibration": {"x": [1.0, 1.0], "y": [1.0, 2.0]}},
        {"calibration": {"x": [], "y": []}},
        {"reference": {"x": [0.0]}},
        {"risk": [1.0]},
        {"activity": {"x": [0.0, math.inf], "y": [0.0, 1.0]}},
    ],
)
def test_a_malformed_document_is_refused(fusion, change):
    with pytest.raises(BundleError, match="fusion"):
        CalibratedStack.from_json(fusion.to_json() | change)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"label_spend": np.zeros(100), "trees": np.linspace(0, 50, 100)}),
        pd.DataFrame({"label_spend": np.zeros(50), "trees": np.zeros(50)}),
        pd.DataFrame({"label_spend": np.linspace(0, 90, 100), "trees": np.zeros(100)}),
        pd.DataFrame({"label_spend": np.linspace(0, 90, 100), "trees": np.full(100, 7.0)}),
        pd.DataFrame({"label_spend": np.full(20, 3.0), "trees": np.linspace(1, 9, 20)}),
        pd.DataFrame({"label_spend": np.linspace(900, 0, 900), "trees": np.linspace(0, 900, 900)}),
        pd.DataFrame({"label_spend": np.full(600, -4.0), "trees": np.r_[np.zeros(590), np.full(10, 1e12)]}),
    ],
    ids=["nobody spends", "all zero", "says nothing", "constant", "20 rows", "upside down", "outliers"],
)
def test_degenerate_users_give_defined_answers(frame):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = CalibratedStack.fit(frame, ONE)
        answers = fitted.apply({"trees": np.array([0.0, 1e-9, 1.0, 7.0, 50.0, 1e15])})
    assert_sound(answers)
    assert (np.diff(answers["expected_spend"]) > 0).sum() >= 4
    assert (np.diff(answers["expected_spend"]) >= 0).all()


def test_equal_users_share_the_middle_of_their_percentiles():
    frame = pd.DataFrame(
        {"label_spend": np.r_[np.zeros(50), np.full(50, 9.0)], "trees": np.r_[np.zeros(50), np.full(50, 9.0)]}
    )
    score = CalibratedStack.fit(frame, ONE).apply({"trees": np.array([0.0, 9.0, 10.0])})["score"]
    assert score == pytest.approx([25, 75, 100], abs=0.5)


def test_no_users_give_no_answers(fusion):
    answers = fusion.apply({"trees": np.empty(0), "transformer": np.empty(0)})
    assert {name: values.shape for name, values in answers.items()} == dict.fromkeys(OUTPUTS, (0,))


def test_too_few_rows_are_refused_with_the_number_needed():
    with pytest.raises(DataError, match=r"20 rows at least for an interval of coverage 0.9 \(5 rows\)"):
        CalibratedStack.fit(world(5, seed=0), BOTH)


def test_unusable_predictions_are_refused_by_name(fusion):
    data = world(100, seed=0)
    with pytest.raises(DataError, match=r"transformer.*missing"):
        CalibratedStack.fit(data.drop(columns="transformer"), BOTH)
    with pytest.raises(DataError, match=r"trees: must be finite and >= 0 \(1 rows\)"):
        CalibratedStack.fit(data.assign(trees=np.r_[np.nan, np.ones(99)]), BOTH)
    with pytest.raises(BundleError, match="no predictions of member 'transformer'"):
        fusion.apply({"trees": np.ones(2)})
    with pytest.raises(BundleError, match="'trees' predicted a negative or non-finite"):
        fusion.apply({"trees": np.array([np.inf]), "transformer": np.ones(1)})


# --- the platform's level ----------------------------------------------------------------------------------------------


def test_the_level_moves_money_and_odds_by_date_and_nothing_else(fusion: CalibratedStack) -> None:
    predictions = members(world(500, seed=9))
    before, rising = fusion.apply(predictions), replace(fusion, level=replace(RISING, odds=2.0))
    for on, factor in ((None, 1.0), (date(2024, 1, 1), 1.0), (date(2024, 1, 11), math.exp(0.5))):
        after = rising.apply(predictions, on)
        assert_sound(after)
        for name in OUTPUTS:
            if name in ("expected_spend", "low", "high"):
                np.testing.assert_allclose(after[name], before[name] * factor, rtol=1e-12)
            elif name == "p_active":
                odds = before[name] / (1 - before[name]) * factor**2
                np.testing.assert_allclose(after[name], odds / (1 + odds), rtol=1e-12)
            else:
                assert (after[name] == before[name]).all(), name


def test_a_fusion_without_a_level_is_written_as_before_and_one_with_it_comes_back(fusion: CalibratedStack) -> None:
    assert "level" not in fusion.to_json()
    rising = replace(fusion, level=RISING)
    assert CalibratedStack.from_json(json.loads(json.dumps(rising.to_json()))) == rising
    with pytest.raises(BundleError, match="level"):
        CalibratedStack.from_json(rising.to_json() | {"level": {}})


def test_what_moves_all_users_at_once_widens_intervals_until_they_hold() -> None:
    frame, conf = world(6000, seed=1), FusionConfig(members=("trees", "transformer"))
    plain, wide = CalibratedStack.fit(frame, conf), CalibratedStack.fit(frame, conf, level_sd=0.4)
    covered: dict[str, list[float]] = {"plain": [], "wide": []}
    for step, shock in enumerate(0.4 * np.array([-1.5, -1, -0.5, 0, 0.5, 1, 1.5])):
        fresh = world(4000, seed=100 + step)
        spend = fresh["label_spend"].to_numpy() * np.exp(shock)
        for name, fitted in (("plain", plain), ("wide", wide)):
            answers = fitted.apply(members(fresh))
            covered[name].append(float(((answers["low"] <= spend) & (spend <= answers["high"])).mean()))
    assert np.mean(covered["wide"]) > 0.885
    assert np.mean(covered["plain"]) < np.mean(covered["wide"]) - 0.01


# --- will a user buy at all? -------------------------------------------------------------------------------------------


def lapsing(n: int, seed: int) -> pd.DataFrame:
    """Users who spend much and seldom, or stay away: members see the mean, the purchase process sees who is away."""
    rng = np.random.default_rng(seed)
    away = rng.random(n) < 0.5
    size = np.exp(rng.normal(4, 1, n))
    chance = np.where(away, 0.3, 0.9)
    spend = np.where(rng.random(n) < chance, size * rng.gamma(4, 0.25, n), 0.0)
    # who is away is expected to spend as much: bought more when there
    expected = size * 0.6 * np.exp(rng.normal(0, 0.2, n))
    p_process = np.clip(chance + rng.normal(0, 0.05, n), 0.0, 1.0)
    days = rng.gamma(2, np.where(away, 40, 10), n)
    return pd.DataFrame({"label_spend": spend, "btyd": expected, ACTIVE: p_process, SILENT: days})


def test_of_two_users_who_are_expected_to_spend_the_same_the_one_who_stays_away_is_less_likely_to_buy() -> None:
    conf = FusionConfig(members=("btyd",))
    fitted, fresh = CalibratedStack.fit(lapsing(4000, seed=1), conf), lapsing(4000, seed=2)
    p_active = fitted.apply(members(fresh))["p_active"]
    bought, away = fresh["label_spend"].to_numpy() > 0, fresh[ACTIVE].to_numpy() < 0.6
    for part in (away, ~away):
        assert p_active[part].mean() == pytest.approx(bought[part].mean(), abs=0.03)
    without = CalibratedStack.fit(lapsing(4000, seed=1).drop(columns=[ACTIVE, SILENT]), conf).apply(members(fresh))[
        "p_active"
    ]
    assert ((p_active - bought) ** 2).mean() < 0.8 * ((without - bought) ** 2).mean()
    assert_sound(fitted.apply(members(fresh)))


def test_what_a_fusion_reads_is_asked_for_by_name_and_comes_back_from_json() -> None:
    fitted = CalibratedStack.fit(lapsing(1000, seed=1), FusionConfig(members=("btyd",)))
    assert fitted.inputs == ("btyd", ACTIVE, SILENT)
    assert CalibratedStack.from_json(json.loads(json.dumps(fitted.to_json()))) == fitted
    with pytest.raises(BundleError, match=ACTIVE):
        fitted.apply({"btyd": np.ones(3)})
    # a stack without the purchase process doesn't read what that says
    frame = lapsing(1000, seed=1).rename(columns={"btyd": "trees"})
    assert CalibratedStack.fit(frame, ONE).inputs == ("trees",)
    assert "recency" not in CalibratedStack.fit(frame, ONE).to_json()


def test_users_of_whom_all_or_none_buy_have_a_probability_all_the_same() -> None:
    for spent in (0.0, 5.0):
        frame = lapsing(500, seed=3).assign(label_spend=spent)
        answers = CalibratedStack.fit(frame, FusionConfig(members=("btyd",))).apply(members(frame))
        assert_sound(answers)
        assert abs(answers["p_active"].mean() - (spent > 0)) < 0.05
