"""Who gains from a treatment: found where some do, and not where nobody or everybody does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from bp_spark.experiments.learners import Uplift, fit, qini, separating, tenths
from bp_spark.experiments.sample import Sample

USERS = 1_500
Lift = Callable[[np.ndarray, np.ndarray], np.ndarray]


def world(seed: int, lift: Lift) -> Sample:
    """Users drawn at random whose spend rests on what they usually spend; the treatment adds ``lift(usual, discount)``."""
    random = np.random.default_rng(seed)
    usual, discount = random.gamma(2.0, 100.0, USERS), random.beta(1, 3, USERS)
    others = random.normal(size=(USERS, 4))
    treated = random.random(USERS) < 0.5
    spend = usual * random.gamma(6.0, 1 / 6, USERS) + treated * lift(usual, discount)
    x = np.column_stack([usual, discount, others]).astype(np.float32)
    return Sample(x, spend, treated, random.integers(0, 5, USERS))


def of_discounts(usual: np.ndarray, discount: np.ndarray) -> np.ndarray:
    return np.where(discount > 0.3, 0.8 * usual, 0.0)


@pytest.fixture(scope="module")
def found() -> tuple[Sample, Uplift]:
    sample = world(1, of_discounts)
    return sample, fit(sample)


def test_users_who_gain_come_first_and_their_tenth_gains_what_was_planted(found: tuple[Sample, Uplift]) -> None:
    sample, uplift = found
    for ranked_by in (uplift.x_learner, uplift.t_learner):
        assert qini(ranked_by, uplift.gain).is_sure
    first, *_, last = tenths(sample, uplift.x_learner, uplift.gain)
    assert first.low > 50
    assert last.low < 20
    assert first.users == last.users == USERS // 10
    (name, of_first, of_others), *_ = separating(sample, uplift.x_learner, ["usual", "discount", *"abcd"], 2)
    assert name in ("usual", "discount")
    assert of_first > of_others


def test_the_mean_gain_is_the_effect_on_all() -> None:
    sample = world(2, lambda usual, _: np.full(len(usual), 40.0))
    gain = fit(sample).gain
    assert abs(gain.mean() - 40) < 3 * gain.std() / math.sqrt(USERS)


def test_where_nobody_or_everybody_gains_the_same_no_ranking_is_sure() -> None:
    # 95 % intervals: of twelve rankings that know nothing hardly more than one is sure
    worlds = [world(seed, lift) for seed in range(10, 16) for lift in (lambda u, _: 0 * u, lambda u, _: 0 * u + 60)]
    fitted = [fit(sample) for sample in worlds]
    assert sum(qini(uplift.x_learner, uplift.gain).is_sure for uplift in fitted) <= 2


def test_the_coefficient_is_the_area_between_the_curve_and_a_random_order() -> None:
    gain = np.array([4.0, 0.0, 0.0, 0.0])
    # the curve rises to 1 within the first quarter and stays: 1/8 + 3/4, less the 1/2 of the line
    assert qini(np.array([4, 3, 2, 1]), gain).coefficient == pytest.approx(3 / 8)
    assert qini(np.array([1, 2, 3, 4]), gain).coefficient == pytest.approx(-3 / 8)
    # a gain that all users have, no order finds
    assert qini(np.array([4, 3, 2, 1]), np.full(4, 7.0)).coefficient == pytest.approx(0)


def test_no_user_is_ranked_by_a_model_that_has_seen_the_user() -> None:
    sample = world(3, of_discounts)
    before = fit(sample)
    changed = sample.y.copy()
    of_fold = sample.fold == 2
    changed[of_fold] = np.random.default_rng(0).permutation(changed[of_fold])
    after = fit(replace(sample, y=changed))
    np.testing.assert_array_equal(before.x_learner[of_fold], after.x_learner[of_fold])
    assert (before.x_learner[~of_fold] != after.x_learner[~of_fold]).any()


def test_what_is_unknown_of_users_is_no_obstacle() -> None:
    sample = world(4, of_discounts)
    x = sample.x.copy()
    x[::3, 2] = np.nan
    x[:, 3] = np.nan
    uplift = fit(replace(sample, x=x))
    assert np.isfinite(uplift.x_learner).all()
    assert np.isfinite(separating(replace(sample, x=x), uplift.x_learner, [*"abcdef"])[0][1])
