"""Prediction intervals of spend that are as wide as the user is unpredictable.

Each end has a scale of its own: its distance from the expected spend, in roots of money, as a log-linear function of what the
members say about the user. The scale minimises the quantile loss of its end (Koenker and Bassett 1978), so that the interval
score is least. It is then multiplied so that as many users as promised lie beyond it (normalised conformal prediction,
Papadopoulos et al. 2008; each tail by itself, Romano et al. 2019). Rows may have weights: where they fade with age, the
coverage holds under slow change (Barber et al. 2023, "Conformal prediction beyond exchangeability").

The lower end of users who may well spend nothing is 0. Then all who are left out lie above the upper end: the interval still
holds as many as promised, and not more. Who hardly buys at all has no upper end above the expected spend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from bp_spark.model.values import floats, number, require_rising

_SHOCKS = math.sqrt(1.5) * np.array([-1.0, 0.0, 1.0])
"""Numbers of equal probability, of mean 0 and variance 1: what may happen to the spend of all users at once."""
_RANGE = (0.001, 0.999)
"""Quantiles of a regressor beyond which it counts as constant."""
_UNIT = 0.1
"""Unit of roots, in the mean root of the expected spend: far below it, differences stop to count."""
_LEAST_SHARE = 0.02
"""Least share of those who buy that lies within an upper end, so that its logarithm is finite."""
_SMOOTHING = 0.05
"""Width of the bend that makes the quantile loss smooth, in mean distances."""
_RIDGE = 10.0
"""Penalty of the squared weights of standardised regressors, in mean losses of a row."""
_CLOSEST = 1e-9
"""Least distance of an end, in mean distances."""
_LARGEST_EXPONENT = 300.0
"""Largest log distance: its square is finite in money."""


@dataclass(frozen=True)
class Predicted:
    """Inputs of an interval, by user.

    Attributes:
        log_expected: log1p of the expected spend, float64 [rows].
        roots: square roots of the members' predictions, float64 [rows, members].
        p_active: P(spend > 0), float64 [rows].
        process: what the purchase process says, float64 [rows, columns]; without one there are no columns.
    """

    log_expected: np.ndarray
    roots: np.ndarray
    p_active: np.ndarray
    process: np.ndarray

    @property
    def root(self) -> np.ndarray:
        """Square root of the expected spend, float64 [rows]."""
        return np.asarray(np.sqrt(np.expm1(self.log_expected)))


@dataclass(frozen=True)
class Scale:
    """Distance of an end from the root of the expected spend: log-linear in :func:`_regressors`.

    Attributes:
        lowest: smallest value of each regressor in the fit; smaller ones count as this one.
        highest: largest value of each regressor; of larger ones only the first goes on, so that the relative width stays.
        weights: intercept and weight of each regressor.
    """

    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    weights: tuple[float, ...]

    def __call__(self, regressors: np.ndarray) -> np.ndarray:
        """Return the distance, float64 [rows], by the regressors, float64 [rows, regressors]."""
        total = self.weights[0] + _beyond(regressors, self.highest)
        # Column by column and not by a matrix product: BLAS sums in an order that depends on the number of rows.
        for column, weight, low, high in zip(regressors.T, self.weights[1:], self.lowest, self.highest, strict=True):
            total += weight * np.clip(column, low, high)
        return np.asarray(np.exp(np.minimum(total, _LARGEST_EXPONENT)))

    @classmethod
    def from_json(cls, document: Mapping[str, Any], regressors: int) -> Self:
        """Return the scale whose fields are in a JSON document; see :meth:`UserIntervals.from_json`."""
        if set(document) != {field.name for field in fields(cls)}:
            raise ValueError("not the keys of a scale")
        lowest, highest, weights = (floats(document[field.name]) for field in fields(cls))
        if not len(lowest) == len(highest) == len(weights) - 1 == regressors:
            raise ValueError("not as many numbers as regressors")
        for bounds in zip(lowest, highest, strict=True):
            require_rising(bounds)
        products = [(w * low, w * high) for w, low, high in zip(weights[1:], lowest, highest, strict=True)]
        number(weights[0] + sum(map(max, products)), most=_LARGEST_EXPONENT)
        number(highest[0], least=0.0)
        return cls(lowest, highest, weights)


@dataclass(frozen=True)
class UserIntervals:
    """Ends of the interval by user.

    Attributes:
        tail: share of users beyond each end, where both can be missed.
        unit: root of money that regressors count in, so that the currency doesn't matter.
        lower: distance of the lower end; ``None`` where too few users surely buy: the lower end is 0.
        upper: distance of the upper end.
    """

    tail: float
    unit: float
    lower: Scale | None
    upper: Scale

    def around(self, users: Predicted) -> tuple[np.ndarray, np.ndarray]:
        """Return both ends in money, float64 [rows] each; the lower one is not negative."""
        root, regressors = users.root, _regressors(users, self.tail, self.unit)
        low, high = np.zeros(len(root)), np.expm1(users.log_expected)
        surely, perhaps = users.p_active >= 1.0 - self.tail, users.p_active > upper_tails(users.p_active, self.tail)
        if self.lower is not None:
            low[surely] = np.maximum(root[surely] - self.lower(regressors[surely]), 0.0) ** 2
        high[perhaps] = (root[perhaps] + self.upper(regressors[perhaps])) ** 2
        return low, high

    @classmethod
    def from_json(cls, document: Mapping[str, Any], regressors: int) -> Self:
        """Return the intervals whose fields are in a JSON document.

        Args:
            document: of :func:`bp_spark.model.curve.as_json`.
            regressors: how many there must be; see :func:`regressor_count`.

        Raises:
            KeyError, TypeError, ValueError: they are not the fields of such intervals.
        """
        if set(document) != {field.name for field in fields(cls)}:
            raise ValueError("not the keys of intervals")
        lower = None if document["lower"] is None else Scale.from_json(document["lower"], regressors)
        tail, unit = number(document["tail"], 0.0, 0.5), number(document["unit"], _CLOSEST)
        return cls(tail, unit, lower, Scale.from_json(document["upper"], regressors))


def rows_needed(coverage: float) -> int:
    """Return the fewest rows that an interval of that coverage can be fitted on."""
    return math.ceil(2 / (1 - coverage) - 1e-9)


def regressor_count(members: int, process: int) -> int:
    """Return how many regressors there are for so many members and columns of the purchase process."""
    return 3 + members + process


def _regressors(users: Predicted, tail: float, unit: float) -> np.ndarray:
    """Return what the scales depend on, float64 [rows, regressors].

    Roots are in units of ``unit``. The regressors are, as logarithms: the root of the expected spend; the standard deviation of
    the members' roots; each member's root over that of the expected spend; how far the end lies within the spend of those who
    buy; and the purchase process.
    """
    members = users.roots.shape[1]
    log_root = np.log1p(users.root / unit)
    # Sums column by column: the order of a sum over rows could depend on how many there are.
    mean = sum(users.roots.T, np.zeros(len(log_root))) / members
    variance = sum(((root - mean) ** 2 for root in users.roots.T), np.zeros(len(log_root))) / members
    within_buyers = (users.p_active - upper_tails(users.p_active, tail)) / np.maximum(users.p_active, _CLOSEST)
    columns = [
        log_root,
        np.log1p(np.sqrt(variance) / unit),
        *(np.log1p(root / unit) - log_root for root in users.roots.T),
        np.log(np.maximum(within_buyers, _LEAST_SHARE)),
        *users.process.T,
    ]
    return np.stack(columns, axis=1)


def upper_tails(p_active: np.ndarray, tail: float) -> np.ndarray:
    """Return each user's chance to spend more than the upper end, float64 [rows].

    Spend is never negative. So an interval from 0 has both tails above its upper end, and one from above 0 has a tail on each
    side. Between the two, the chance is that of spending nothing: then the upper end doesn't jump.

    Args:
        p_active: P(spend > 0), float64 [rows].
        tail: share of users beyond each end, where both can be missed.
    """
    return np.asarray(np.clip(1.0 - p_active, tail, 2.0 * tail))


def _beyond(regressors: np.ndarray, highest: tuple[float, ...]) -> np.ndarray:
    """Return how far the log root of the expected spend lies above its largest value in the fit, float64 [rows]."""
    return np.asarray(np.maximum(regressors[:, 0] - highest[0], 0.0))


def fit_intervals(
    users: Predicted, spend: np.ndarray, weights: np.ndarray, halves: np.ndarray, coverage: float, level_sd: float
) -> UserIntervals:
    """Fit the scales of both ends.

    Rows of one date share what happened to all users at once, and the next date has its own. So each row stands for three,
    whose spend is moved by equally likely shocks of the level.

    Args:
        users: out-of-fold predictions.
        spend: money, float64 [rows].
        weights: of the rows, float64 [rows]; the newest have 1.
        halves: boolean [rows]; the scale of either half measures the other one, so no user is in both.
        coverage: share of users whose spend lies in the interval.
        level_sd: standard deviation of the log level of everyone's spend; see :class:`bp_spark.model.level.Level`.
    """
    tail = (1 - coverage) / 2
    unit = _UNIT * float(users.root.mean()) or 1.0
    regressors = _regressors(users, tail, unit)
    shocks = np.exp(level_sd * _SHOCKS) if level_sd > 0 else np.ones(1)
    above = np.sqrt(np.outer(spend, shocks)) - users.root[:, None]
    shares = np.repeat(weights[:, None] / len(shocks), len(shocks), axis=1)
    needed = rows_needed(coverage)
    tails = upper_tails(users.p_active, tail)
    surely, perhaps = users.p_active >= 1.0 - tail, users.p_active > tails
    if weights[perhaps].sum() < needed:
        perhaps = np.ones(len(spend), bool)
    lower = None
    if weights[surely].sum() >= needed:
        lower = _fit_scale(
            regressors[surely], -above[surely], shares[surely], halves[surely], np.full(surely.sum(), tail)
        )
    upper = _fit_scale(regressors[perhaps], above[perhaps], shares[perhaps], halves[perhaps], tails[perhaps])
    return UserIntervals(tail, unit, lower, upper)


def _fit_scale(
    regressors: np.ndarray, residuals: np.ndarray, shares: np.ndarray, halves: np.ndarray, tails: np.ndarray
) -> Scale:
    """Fit the distance of an end.

    Args:
        regressors: float64 [rows, regressors].
        residuals: root of the spend less that of the expected one, positive towards the end, float64 [rows, shocks].
        shares: weights of the residuals, float64 [rows, shocks].
        halves: see :func:`fit_intervals`.
        tails: of each user, the chance to be beyond the end, float64 [rows].
    """
    lowest, highest = (floats(bounds) for bounds in np.quantile(regressors, _RANGE, axis=0))
    bounded, beyond = np.clip(regressors, lowest, highest), _beyond(regressors, highest)
    mean, deviation = bounded.mean(axis=0), bounded.std(axis=0)
    deviation[deviation < _CLOSEST] = np.inf
    design = np.column_stack([np.ones(len(bounded)), (bounded - mean) / deviation])
    unit = float(np.average(np.abs(residuals), weights=shares)) or 1.0
    distances = residuals / unit
    fitted = _quantile_scale(design, beyond, distances, shares, tails)
    logs = design @ fitted + beyond
    for half in (halves, ~halves):
        if half.any() and not half.all():
            other = _quantile_scale(design[half], beyond[half], distances[half], shares[half], tails[half])
            logs[~half] = design[~half] @ other + beyond[~half]
    factor = _quantile((distances / np.exp(logs)[:, None]).ravel(), shares.ravel(), _mean(tails, shares))
    weights = fitted[1:] / deviation
    intercept = fitted[0] - float(weights @ mean) + math.log(unit) + math.log(max(factor, _CLOSEST))
    return Scale(lowest, highest, floats([intercept, *weights]))


def _quantile_scale(
    design: np.ndarray, beyond: np.ndarray, distances: np.ndarray, shares: np.ndarray, tails: np.ndarray
) -> np.ndarray:
    """Return the weights, float64 [columns], of a log distance that users exceed with the chances ``tails``.

    Args:
        design: 1 and the standardised regressors, float64 [rows, columns].
        beyond: what is added to the log distance, float64 [rows].
        distances: float64 [rows, shocks], in their mean.
        shares: weights of the distances, float64 [rows, shocks].
        tails: of each user, the chance to be beyond the end, float64 [rows].
    """
    start = np.zeros(design.shape[1])
    start[0] = math.log(max(_quantile(distances.ravel(), shares.ravel(), _mean(tails, shares)), _SMOOTHING))
    unit = math.exp(start[0])
    ridge = np.full(design.shape[1], _RIDGE)
    ridge[0] = 0.0
    rows = shares.sum()

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        scale = np.exp(np.clip(design @ weights + beyond, -20.0, 20.0))
        excess = distances - scale[:, None]
        bent = _SMOOTHING * np.logaddexp(0.0, excess / _SMOOTHING) - tails[:, None] * excess
        slope = ((expit(excess / _SMOOTHING) - tails[:, None]) * shares).sum(axis=1)
        value = float((bent * shares).sum()) / unit + 0.5 * float(ridge @ weights**2)
        return value / rows, (ridge * weights - design.T @ (slope * scale) / unit) / rows

    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B").x)


def _mean(tails: np.ndarray, shares: np.ndarray) -> float:
    """Return the mean chance to be beyond the end, by the rows' weights."""
    return float(np.average(tails, weights=shares.sum(axis=1)))


def _quantile(values: np.ndarray, weights: np.ndarray, tail: float) -> float:
    """Return the value that a new one, of weight 1, exceeds with probability ``tail`` at most, if the weights are right."""
    order = np.argsort(values, kind="stable")
    summed = np.cumsum(weights[order])
    position = int(np.searchsorted(summed, (summed[-1] + 1) * (1 - tail) - 1e-9))
    return float(values[order][min(position, len(values) - 1)])
