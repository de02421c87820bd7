"""The mean difference of treated users to comparable others: doubly robust, cross-fitted, with checks of overlap and balance.

The estimate is the average effect on the treated by augmented inverse-propensity weighting, with a Hájek normalisation of the
weights (Robins, Rotnitzky and Zhao 1994; Chernozhukov et al. 2018, "Double/debiased machine learning", example 5.1). With the
outcome ``y``, what is expected of a user without treatment ``m(x)``, and the propensity ``e(x)``:

``mean over treated of (y - m) - weighted mean over others of (y - m), with weights e / (1 - e)``

It is right if either ``m`` or ``e`` is. No user is predicted by a model that has seen the user. ``doubleml`` has the same
score. It would bring 85 MB to each machine that runs nights, with plotly, seaborn and mypy, for the lines below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from bp_spark.experiments.estimate import Comparison, Mean, compare
from bp_spark.experiments.sample import FOLDS, Sample

HIGHEST_PROPENSITY = 0.95
"""Treated users above it have no comparable others, and are trimmed (Crump et al. 2009 trim both ends for the mean of all)."""
_PENALTIES = (1.0, 10.0, 100.0, 1_000.0)
_MOST_ODDS = 1e6
_SEED = 7
_UNKNOWN = np.float32(-1)
"""What trees see of an unknown covariate; counts and days are never below 0."""


@dataclass(frozen=True)
class Nuisances:
    """What both models say of each user, by models that have not seen the user.

    Attributes:
        expected: spend without treatment, shape (users,).
        odds: odds of treatment among the users of the sample, shape (users,).
    """

    expected: np.ndarray
    odds: np.ndarray


@dataclass(frozen=True)
class Overlap:
    """Whether treated users have comparable others.

    Attributes:
        treated_quantiles: propensity of the treated at 5, 50 and 95 %.
        other_quantiles: the same of the others.
        comparable: share of the treated whose propensity is at most :data:`HIGHEST_PROPENSITY`.
        effective_others: number of equally weighted users whose mean would be as precise as that of the weighted others
            (Kish 1965).
        imbalance_before: largest standardised difference of a covariate's mean between treated and others.
        imbalance_after: the same with the others weighted.
    """

    treated_quantiles: tuple[float, ...]
    other_quantiles: tuple[float, ...]
    comparable: float
    effective_others: float
    imbalance_before: float
    imbalance_after: float


@dataclass(frozen=True)
class Effect:
    """The estimate.

    Attributes:
        comparison: mean spend of the treated beside what is expected of them without treatment.
        treated_mean: mean spend of the treated that count.
        expected_mean: what they would have spent without treatment.
        naive: plain difference of means of treated and others.
        treated: number of treated users that count.
        others: number of others.
        overlap: checks.
    """

    comparison: Comparison
    treated_mean: float
    expected_mean: float
    naive: float
    treated: int
    others: int
    overlap: Overlap


def effect(sample: Sample) -> Effect:
    """Return the mean difference on the treated, with its 95 % interval and the checks.

    Args:
        sample: users; each fold needs both treated and others outside of it.
    """
    return estimate(sample, fit(sample))


def fit(sample: Sample) -> Nuisances:
    """Return the cross-fitted expected spend and odds of treatment of each user."""
    # one thread: the same sums in the same order, and no threads that wait for each other on a busy machine
    with threadpool_limits(limits=1):
        return _fit(sample)


def _fit(sample: Sample) -> Nuisances:
    expected, odds = np.empty(len(sample.y)), np.empty(len(sample.y))
    linear_x = linear_inputs(sample.x)
    tree_x = tree_inputs(sample.x)
    for number in range(FOLDS):
        held_out = sample.fold == number
        if not held_out.any():
            continue
        others = ~held_out & ~sample.treated
        of_trees = trees().fit(tree_x[others], sample.y[others])
        of_lines = _ridge().fit(linear_x[others], sample.y[others])
        predictions = (of_trees.predict(tree_x[held_out]), of_lines.predict(linear_x[held_out]))
        expected[held_out] = np.mean(predictions, axis=0)
        propensity = _logistic().fit(linear_x[~held_out], sample.treated[~held_out])
        odds[held_out] = np.exp(propensity.decision_function(linear_x[held_out]))
    return Nuisances(expected, np.clip(odds, 1 / _MOST_ODDS, _MOST_ODDS))


def estimate(sample: Sample, nuisances: Nuisances) -> Effect:
    """Return the mean difference on the treated by given models; see :func:`effect`."""
    odds_of_all = nuisances.odds * sample.odds_factor
    propensity = odds_of_all / (1 + odds_of_all)
    treated = sample.treated & (propensity <= HIGHEST_PROPENSITY)
    others = ~sample.treated
    if not treated.any():
        treated = sample.treated
    residual = sample.y - nuisances.expected
    # a weight counts as that of a user at the limit: those above were trimmed among the treated, too
    weight = np.minimum(nuisances.odds, HIGHEST_PROPENSITY / (1 - HIGHEST_PROPENSITY) / sample.odds_factor)[others]
    share = weight / weight.sum()
    correction = float(share @ residual[others])
    treated_mean = float(sample.y[treated].mean())
    expected_mean = float(nuisances.expected[treated].mean()) + correction
    # the difference is one of two independent means of residuals
    effective = float(1 / (share @ share))
    treated_variance = float(residual[treated].var(ddof=1)) / treated.sum() if treated.sum() > 1 else 0.0
    others_variance = float(share**2 @ (residual[others] - correction) ** 2)
    comparison = compare(
        Mean(expected_mean, others_variance, max(int(effective) - 1, 1)),
        Mean(treated_mean, treated_variance, max(int(treated.sum()) - 1, 1)),
    )
    quantiles = (0.05, 0.5, 0.95)
    overlap = Overlap(
        treated_quantiles=tuple(np.quantile(propensity[sample.treated], quantiles).tolist()),
        other_quantiles=tuple(np.quantile(propensity[others], quantiles).tolist()),
        comparable=float((propensity[sample.treated] <= HIGHEST_PROPENSITY).mean()),
        effective_others=effective,
        imbalance_before=_imbalance(sample.x, treated, others, np.full(int(others.sum()), 1 / others.sum())),
        imbalance_after=_imbalance(sample.x, treated, others, share),
    )
    naive = float(sample.y[sample.treated].mean() - sample.y[others].mean())
    return Effect(comparison, treated_mean, expected_mean, naive, int(treated.sum()), int(others.sum()), overlap)


def tree_inputs(x: np.ndarray) -> np.ndarray:
    """Return covariates for trees, which refuse one that is unknown for all users of a fold.

    Args:
        x: float32 of shape (users, covariates); NaN where unknown.
    """
    return np.where(np.isnan(x), _UNKNOWN, x)


def linear_inputs(x: np.ndarray) -> np.ndarray:
    """Return covariates for linear models: as they are and their signed logarithms; the unknown as mean, with a flag.

    Args:
        x: float32 of shape (users, covariates).
    """
    unknown = np.isnan(x)
    some_unknown = unknown.any(axis=0)
    counts = np.maximum((~unknown).sum(axis=0), 1)
    filled = np.where(unknown, np.nansum(x, axis=0, dtype=np.float64) / counts, x)
    return np.hstack([filled, np.sign(filled) * np.log1p(np.abs(filled)), unknown[:, some_unknown]])


def _imbalance(x: np.ndarray, treated: np.ndarray, others: np.ndarray, share: np.ndarray) -> float:
    """Return the largest standardised mean difference, by the standard deviation of the treated (Austin 2009)."""
    known = np.nan_to_num(x.astype(np.float64))
    logs = np.sign(known) * np.log1p(np.abs(known))
    spread = logs[treated].std(axis=0)
    usable = spread > 0
    apart = logs[treated].mean(axis=0) - share @ logs[others]
    return float(np.abs(apart[usable] / spread[usable]).max(initial=0.0))


def trees() -> HistGradientBoostingRegressor:
    """Return boosted trees of few leaves, not fitted: samples are small beside the noise of spend."""
    return HistGradientBoostingRegressor(
        max_iter=60,
        learning_rate=0.08,
        max_leaf_nodes=15,
        l2_regularization=1.0,
        early_stopping=False,
        random_state=_SEED,
    )


def _ridge() -> Pipeline:
    return make_pipeline(StandardScaler(), RidgeCV(_PENALTIES))


def _logistic() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=500))
