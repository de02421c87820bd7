"""Other horizons: in line with the main one, rising with the days, and only where the data have seen one."""

from __future__ import annotations

import json
import math
from datetime import date, timedelta

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bp_spark.core.errors import BundleError
from bp_spark.model.curve import Curve
from bp_spark.model.horizons import EXPECTED, MIN_ROWS, NETWORK, Horizons, Ratio
from bp_spark.model.level import Level

MONEY = st.floats(0, 1e6)
NOW = date(2024, 1, 1)


def world(n: int, seed: int, seen: float = 1.0) -> pd.DataFrame:
    """Users of a quick and a slow kind, whom the network tells apart, if with too strong a contrast; a fifth spends nothing.

    ``label_spend_180d`` is known for a share ``seen``.
    """
    rng = np.random.default_rng(seed)
    whole = np.where(rng.random(n) < 0.2, 0.0, np.exp(rng.normal(4, 1, n)))
    kind = rng.random(n)
    predicted = whole * np.exp(rng.normal(0, 0.3, n)) + 1.0
    return pd.DataFrame(
        {
            "label_spend": whole,
            "label_spend_30d": whole * (0.2 + 0.4 * kind) * rng.uniform(0.5, 1.5, n),
            "label_spend_180d": np.where(rng.random(n) < seen, whole * (2.2 - 0.4 * kind), np.nan),
            "transformer": predicted,
            "transformer_30d": predicted * (0.1 + 0.8 * kind),
            "transformer_180d": predicted * (2.5 - kind),
            "kind": kind,
        }
    )


def fitted(frame: pd.DataFrame) -> Horizons:
    return Horizons.fit(frame, frame["transformer"].to_numpy(), 90, (30, 180))


def applied(horizons: Horizons, frame: pd.DataFrame, expected: np.ndarray) -> dict[int, np.ndarray]:
    return horizons.apply(expected, {str(name): frame[name].to_numpy() for name in frame})


def test_the_networks_ratio_is_calibrated_on_fresh_users() -> None:
    fresh = world(20_000, seed=2)
    predicted = applied(fitted(world(5000, seed=1)), fresh, fresh["label_spend"].to_numpy())
    for days, share in ((30, lambda kind: 0.2 + 0.4 * kind), (180, lambda kind: 2.2 - 0.4 * kind)):
        truth = fresh[f"label_spend_{days}d"]
        assert predicted[days].sum() == pytest.approx(truth.sum(), rel=0.03)
        quick, slow = fresh["kind"] > 0.9, fresh["kind"] < 0.1
        for part, kind in ((quick, 0.95), (slow, 0.05)):
            ratio = predicted[days][part].sum() / fresh["label_spend"][part].sum()
            assert ratio == pytest.approx(share(kind), rel=0.1)


@pytest.mark.filterwarnings("error")
@settings(max_examples=60, deadline=None)
@given(
    expected=hnp.arrays(np.float64, 20, elements=MONEY),
    predicted=hnp.arrays(np.float64, (4, 20), elements=MONEY),
)
def test_spend_rises_with_the_days_whatever_members_say(expected: np.ndarray, predicted: np.ndarray) -> None:
    ratios = tuple(
        Ratio(days, NETWORK, Curve((0.1, 4.0), (low, high)))
        for days, low, high in ((7, 0.2, 1.4), (30, 0.1, 1.2), (180, 0.8, 3.0))
    )
    names = (NETWORK, *(f"{NETWORK}_{days}d" for days in (7, 30, 180)))
    answers = Horizons(90, ratios).apply(expected, dict(zip(names, predicted, strict=True)))
    assert list(answers) == [7, 30, 90, 180]
    assert answers[90] is expected
    rows = np.stack(list(answers.values()))
    assert np.isfinite(rows).all()
    assert (np.diff(rows, axis=0) >= 0).all()
    assert (rows[0] >= 0).all()


def test_a_users_answer_depends_on_that_user_alone() -> None:
    frame = world(2000, seed=3)
    horizons, expected = fitted(frame), frame["label_spend"].to_numpy()
    together = applied(horizons, frame, expected)
    for row in (0, 7, 1999):
        alone = applied(horizons, frame.iloc[[row]], expected[[row]])
        assert {days: values[0] for days, values in alone.items()} == {
            days: values[row] for days, values in together.items()
        }


def test_a_horizon_that_too_few_have_seen_whole_is_left_out() -> None:
    frame = world(2000, seed=4, seen=0.0)
    assert fitted(frame).days == (30, 90)
    few = frame.assign(label_spend_180d=np.where(np.arange(2000) < MIN_ROWS, 1.0, math.nan))
    assert fitted(few).days == (30, 90, 180)
    assert Horizons.fit(frame, frame["transformer"].to_numpy(), 90, ()).days == (90,)


def test_without_a_network_the_ratio_is_that_of_users_expected_to_spend_alike() -> None:
    frame = world(5000, seed=5)
    heavy = frame["label_spend"] > frame["label_spend"].median()
    frame["label_spend_30d"] = frame["label_spend"] * np.where(heavy, 0.3, 0.5)
    plain = frame.drop(columns=["transformer", "transformer_30d", "transformer_180d"])
    expected = frame["label_spend"].to_numpy()
    horizons = Horizons.fit(plain, expected, 90, (30, 180))
    assert {ratio.by for ratio in horizons.ratios} == {EXPECTED}
    predicted = applied(horizons, plain, expected)[30]
    for part in (heavy, ~heavy):
        assert predicted[part].sum() == pytest.approx(frame["label_spend_30d"][part].sum(), rel=0.05)


@pytest.mark.filterwarnings("error")
def test_where_nobody_spends_a_horizon_has_its_share_of_the_days() -> None:
    nothing = {f"{name}{end}": np.zeros(500) for name in ("label_spend", NETWORK) for end in ("", "_30d", "_180d")}
    horizons = fitted(pd.DataFrame(nothing))
    predicted = horizons.apply(np.full(500, 9.0), nothing)
    assert (predicted[30][0], predicted[180][0]) == pytest.approx((3.0, 18.0))


def test_horizons_survive_json_to_the_bit() -> None:
    horizons = fitted(world(3000, seed=6))
    assert Horizons.from_json(json.loads(json.dumps(horizons.to_json()))) == horizons


def test_missing_predictions_of_the_network_are_named() -> None:
    horizons = fitted(world(3000, seed=7))
    with pytest.raises(BundleError, match="transformer_30d"):
        horizons.apply(np.ones(2), {"transformer": np.ones(2)})


def season(*log_factors: float) -> Level:
    """A level whose factor changes week by week from NOW on."""
    x = tuple(7.0 * week for week in range(len(log_factors)))
    return Level(NOW.isoformat(), 1.0, 1.0, Curve(x, log_factors), 0.05)


def test_a_season_moves_each_horizon_by_its_own_factor_and_spend_still_does_not_fall_with_the_days() -> None:
    ratios = (Ratio(30, EXPECTED, Curve((0.0,), (0.4,))), Ratio(180, EXPECTED, Curve((0.0,), (1.5,))))
    horizons = Horizons(90, ratios, {30: season(0.1, 2.0), 180: season(-0.2, -2.0)})
    spend = np.array([0.0, 10.0])
    steady = horizons.apply(spend, {})
    now = horizons.apply_level(steady, 1.2)
    assert list(now) == [30, 90, 180]
    np.testing.assert_allclose(now[30], spend * 0.4 * math.exp(0.1))
    np.testing.assert_allclose(now[90], spend * 1.2)
    np.testing.assert_allclose(now[180], spend * 1.5 * math.exp(-0.2))
    later = NOW + timedelta(days=7)
    assert horizons.factors(1.3, later) == pytest.approx({30: math.exp(2), 90: 1.3, 180: math.exp(-2)})
    for values in horizons.apply_level(steady, 1.3, later).values():
        np.testing.assert_allclose(values, spend * 1.3)
    # without levels of their own all follow the main horizon
    assert Horizons(90, ratios).factors(1.3) == {30: 1.3, 90: 1.3, 180: 1.3}


def test_levels_come_back_from_json_and_horizons_without_any_are_written_as_before() -> None:
    ratios = (Ratio(30, EXPECTED, Curve((0.0,), (0.4,))),)
    assert set(Horizons(90, ratios).to_json()) == {"main", "ratios"}
    horizons = Horizons(90, ratios, {30: season(0.1, 1 / 3)})
    document = json.loads(json.dumps(horizons.to_json()))
    assert Horizons.from_json(document) == horizons
    for levels in ({"60": document["levels"]["30"]}, {"30": {}}, {"soon": document["levels"]["30"]}, [], 7):
        with pytest.raises(BundleError):
            Horizons.from_json(document | {"levels": levels})
