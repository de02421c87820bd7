"""Estimates of experiments: the textbook's figures, and as many false alarms as promised."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bp_spark.experiments.estimate import (
    Moments,
    Plan,
    adjusted,
    compare,
    lines,
    sample_ratio_p,
    unadjusted,
)

GROUPS = ("control", "mail", "coupon")


def moments(x: np.ndarray, y: np.ndarray) -> Moments:
    whole = [[int(value) for value in values] for values in (x, y)]
    products = [(0, 0), (0, 1), (1, 1)]
    return Moments(
        len(x),
        *map(sum, whole),
        *(sum(a * b for a, b in zip(whole[one], whole[other], strict=True)) for one, other in products),
    )


def skewed_users(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cents with a long tail, a fifth of them 0; the residuals of large expectations are large."""
    x = np.round(100 * rng.lognormal(3.0, 1.0, count))
    return x, np.round(x * rng.gamma(2.0, 0.5, count)) * (rng.random(count) < 0.8)


def regression(x: np.ndarray, y: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of Lin's regression and their covariance HC2, written out with the design matrix of all users."""
    centred = x - x.mean()
    is_group = [(group == number).astype(float) for number in range(1, len(GROUPS))]
    design = np.column_stack([np.ones_like(x), *is_group, centred, *(one * centred for one in is_group)])
    bread = np.linalg.inv(design.T @ design)
    beta = bread @ design.T @ y
    leverage = np.einsum("ij,jk,ik->i", design, bread, design)
    meat = (design * ((y - design @ beta) ** 2 / (1 - leverage))[:, None]).T @ design
    return beta, bread @ meat @ bread


def test_the_adjusted_difference_is_that_of_lins_regression_with_robust_errors() -> None:
    rng = np.random.default_rng(7)
    x, y = skewed_users(rng, 600)
    group = rng.choice(3, 600, p=[0.5, 0.3, 0.2])
    y = y + 500 * (group == 2)
    members = {name: group == number for number, name in enumerate(GROUPS)}
    found = lines({name: moments(x[of], y[of]) for name, of in members.items()})
    means = {
        name: adjusted(line, float(line.squared_influence(x[members[name]], y[members[name]]).sum()))
        for name, line in found.items()
    }
    beta, covariance = regression(x, y, group)
    for number in (1, 2):
        comparison = compare(means["control"], means[GROUPS[number]])
        assert comparison.difference == pytest.approx(beta[number])
        assert comparison.standard_error == pytest.approx(math.sqrt(covariance[number, number]))
        assert comparison.low < comparison.difference < comparison.high


def test_the_unadjusted_difference_is_that_of_welch() -> None:
    rng = np.random.default_rng(8)
    (x, y), (_, other) = skewed_users(rng, 80), skewed_users(rng, 30)
    comparison = compare(unadjusted(moments(x, y)), unadjusted(moments(x[:30], other)))
    expected = stats.ttest_ind(other, y, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert comparison.p_value == pytest.approx(expected.pvalue)
    assert (comparison.low, comparison.high) == pytest.approx((interval.low, interval.high))
    assert comparison.relative == pytest.approx(other.mean() / y.mean() - 1)
    assert comparison.relative_low < comparison.relative < comparison.relative_high


def test_sums_of_very_large_money_lose_no_digit() -> None:
    x = np.array([10**15, 10**15 + 1, 10**15 + 2], dtype=object)
    found = moments(x, x + 5)
    assert (found.sxx, found.sxy, found.syy) == (2.0, 2.0, 2.0)
    assert found.correlation == pytest.approx(1.0)
    assert found.sd_y == pytest.approx(1.0)


def test_groups_that_spent_nothing_differ_in_nothing() -> None:
    nothing = moments(np.full(20, 700), np.zeros(20))
    found = lines({"control": nothing, "treatment": nothing})
    variance = {name: float(line.squared_influence(700.0, 0.0)) for name, line in found.items()}
    comparison = compare(*(adjusted(line, variance[name]) for name, line in found.items()))
    assert (comparison.difference, comparison.low, comparison.high, comparison.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert math.isnan(comparison.relative)


def test_without_an_effect_five_in_a_hundred_alarm_and_the_score_saves_what_it_explains() -> None:
    rng = np.random.default_rng(11)
    x, y = skewed_users(rng, 400)
    alarms, saved = [], []
    for _ in range(400):
        treated = rng.random(400) < 0.5
        groups = {name: moments(x[of], y[of]) for name, of in {"control": ~treated, "treatment": treated}.items()}
        found = lines(groups)
        means = [
            adjusted(found[name], float(found[name].squared_influence(x[of], y[of]).sum()))
            for name, of in {"control": ~treated, "treatment": treated}.items()
        ]
        comparison = compare(*means)
        alarms.append(comparison.p_value < 0.05)
        saved.append(1 - (comparison.standard_error / compare(*map(unadjusted, groups.values())).standard_error) ** 2)
    assert 0.02 < np.mean(alarms) < 0.085
    assert np.mean(saved) == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, abs=0.06)


def test_the_size_is_the_rule_of_sixteen_and_the_score_saves_its_share() -> None:
    plan = Plan()
    # 16 variances over the squared difference, in each group (van Belle 2008): with more digits 15.7
    control, treatment = plan.users(spread=2.0, effect=0.1)
    assert control == treatment == pytest.approx(15.7 * 400, rel=1e-3)
    assert plan.users(2.0, 0.1, correlation=0.8)[0] == pytest.approx(0.36 * control, rel=1e-3)
    assert plan.effect(2.0, control + treatment) == pytest.approx(0.1, rel=1e-4)
    few_treated = Plan(share=0.1).users(2.0, 0.1)
    assert few_treated[0] == pytest.approx(9 * few_treated[1], abs=9)
    assert sum(few_treated) > control + treatment
    assert Plan(power=0.9).users(2.0, 0.1)[0] > control
    assert Plan(alpha=0.01).users(2.0, 0.1)[0] > control


def test_a_sample_ratio_mismatch_is_seen() -> None:
    assert sample_ratio_p([5_000, 5_020], [0.5, 0.5]) > 0.5
    assert sample_ratio_p([5_000, 5_400], [0.5, 0.5]) < 0.001
    # shares of a part of all users
    assert sample_ratio_p([100, 50], [0.2, 0.1]) == pytest.approx(1.0)
