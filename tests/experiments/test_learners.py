"""Who gains from a treatment: found where some do, and not where nobody or everybody does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from bp_spark.experiments.learners import Judged, judge, qini, rank, separating, tenths
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
def found() -> tuple[Sample, Judged]:
    sample = world(1, of_discounts)
    return sample, judge(sample)


def judged_as(gain: np.ndarray) -> Judged:
    """Users of one fold."""
    users = np.arange(len(gain))
    return Judged(users, np.full(len(gain), 2), gain, gain, gain)


def test_users_who_gain_come_first_and_their_tenth_gains_what_was_planted(found: tuple[Sample, Judged]) -> None:
    sample, judged = found
    for ranked_by in (judged.x_learner, judged.t_learner):
        assert qini(judged, ranked_by).is_sure
    first, *_, last = tenths(sample, judged)
    assert first.low > 50
    assert last.low < 20
    assert abs(first.users - last.users) <= 3
    (name, of_first, of_others), *_ = separating(sample, rank(sample), ["usual", "discount", *"abcd"], 2)
    assert name in ("usual", "discount")
    assert of_first > of_others


def test_the_mean_gain_is_the_effect_on_all() -> None:
    gain = judge(world(2, lambda usual, _: np.full(len(usual), 40.0))).gain
    assert abs(gain.mean() - 40) < 3 * gain.std() / math.sqrt(len(gain))


def test_where_nobody_or_everybody_gains_the_same_no_ranking_is_sure() -> None:
    # 95 % intervals: of twelve rankings that know nothing hardly more than one is sure
    worlds = [world(seed, lift) for seed in range(10, 16) for lift in (lambda u, _: 0 * u, lambda u, _: 0 * u + 60)]
    judged = [judge(sample) for sample in worlds]
    assert sum(qini(each, each.x_learner).is_sure for each in judged) <= 1


def test_the_coefficient_is_the_area_between_the_curve_and_a_random_order() -> None:
    judged = judged_as(np.array([4.0, 0.0, 0.0, 0.0]))
    # the curve rises to 1 within the first quarter and stays: 1/8 + 3/4, less the 1/2 of the line
    assert qini(judged, np.array([4, 3, 2, 1])).coefficient == pytest.approx(3 / 8)
    assert qini(judged, np.array([1, 2, 3, 4])).coefficient == pytest.approx(-3 / 8)
    # a gain that all users have, no order finds
    assert qini(judged_as(np.full(4, 7.0)), np.array([4, 3, 2, 1])).coefficient == pytest.approx(0)


def test_no_user_is_ranked_by_a_model_that_has_seen_the_user() -> None:
    sample = world(3, of_discounts)
    changed = sample.y.copy()
    of_fold = sample.fold == 3
    changed[of_fold] = np.random.default_rng(0).permutation(changed[of_fold])
    other = replace(sample, y=changed)
    before, after = rank(sample), rank(other)
    np.testing.assert_array_equal(before[of_fold], after[of_fold])
    assert (before[~of_fold] != after[~of_fold]).any()
    # nor is one judged by what a model of later folds says
    judged, again = judge(sample), judge(other)
    np.testing.assert_array_equal(judged.x_learner[judged.fold <= 3], again.x_learner[again.fold <= 3])
    assert (judged.x_learner[judged.fold > 3] != again.x_learner[again.fold > 3]).any()


def test_what_is_unknown_of_users_is_no_obstacle() -> None:
    sample = world(4, of_discounts)
    x = sample.x.copy()
    x[::3, 2] = np.nan
    x[:, 3] = np.nan
    sample = replace(sample, x=x)
    predicted = rank(sample)
    assert np.isfinite(predicted).all()
    assert np.isfinite(judge(sample).x_learner).all()
    assert np.isfinite(separating(sample, predicted, [*"abcdef"])[0][1])
