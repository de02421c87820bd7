"""The calibrated stack: several members' predictions in, expected spend, interval, score and risk of each user out.

:meth:`CalibratedStack.fit` learns on out-of-fold predictions. :meth:`CalibratedStack.apply` is arithmetic on a few hundred
frozen numbers, row by row, so that a user's prediction doesn't depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import date
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy.optimize import minimize, nnls
from scipy.special import expit
from sklearn.isotonic import isotonic_regression

from bp_spark.core.config import FusionConfig
from bp_spark.core.errors import BundleError, DataError
from bp_spark.model.bins import equivalent_rows, quantile_bins
from bp_spark.model.columns import ACTIVE, SILENT
from bp_spark.model.curve import Curve, as_json, curve_from_json
from bp_spark.model.intervals import (
    Predicted,
    UserIntervals,
    fit_intervals,
    regressor_count,
    rows_needed,
)
from bp_spark.model.level import Level
from bp_spark.model.odds import with_log_odds
from bp_spark.model.values import LARGEST_LOG, floats, number, require_rising, texts, well_formed

LEVELS = ("E", "D", "C", "B", "A")
"""Fifths of the reference population, by score."""
LEVEL_BORDERS = (20.0, 40.0, 60.0, 80.0)
"""Scores from which a level holds."""
RISKS = ("low", "medium", "high")
"""Thirds of the reference population, by relative width of the interval."""
OUTPUTS = ("expected_spend", "low", "high", "p_active", "score", "level", "risk_level")

_CALIBRATION_BINS, _CALIBRATION_ROWS = 20, 200
_ACTIVITY_BINS, _ACTIVITY_ROWS = 50, 100
_ACTIVITY_WEIGHTS = 4
_PROCESS_COLUMNS = 2
"""The last of the regressors of the activity are those of the purchase process."""
_CLOSEST = 1e-4
"""Probabilities are kept this far from 0 and 1 before their logits are taken."""
_GRID = 1001
# Keeps the relative width finite for users expected to spend nothing. Not 1, which would cancel against log1p
# and make the width one constant per group: a third's border would then be decided by rounding.
_CENT = 0.01


@dataclass(frozen=True)
class CalibratedStack:
    """Turns members' predictions into scores. Frozen; see :meth:`fit` for the meaning of each step.

    Attributes:
        members: names of the members.
        weights: the members' shares in the stack: not negative, 1 together.
        coverage: share of users whose spend lies in the interval.
        calibration: log1p of the stack -> log1p of the expected spend.
        activity: log1p of the expected spend -> P(spend > 0).
        intervals: ends of the interval.
        reference: expected spend -> its percentile, 0 to 100, in the reference population.
        risk: tertiles of the relative interval width.
        level: factor of everyone's spend by date; ``None``: always 1.
        recency: intercept and weights that join ``activity`` with the purchase process; ``None``: ``activity`` alone is used.
    """

    members: tuple[str, ...]
    weights: tuple[float, ...]
    coverage: float
    calibration: Curve
    activity: Curve
    intervals: UserIntervals
    reference: Curve
    risk: tuple[float, float]
    level: Level | None = None
    recency: tuple[float, ...] | None = None

    @classmethod
    def fit(
        cls, frame: pd.DataFrame, conf: FusionConfig, reference: pd.DataFrame | None = None, level_sd: float = 0.0
    ) -> Self:
        """Fit the stack on out-of-fold predictions: no member was fitted on the users whom it predicts here.

        Older rows weigh less (``conf.half_life_days``): members and users change, and the question is how right members are
        now. In the interval such weights hold the coverage under slow change; see :mod:`bp_spark.model.intervals`.

        1. *Stack* (Breiman 1996, "Stacked regressions"): the square of the weighted mean of the square roots of
           ``conf.members``. The weights are non-negative least squares of root spend on root predictions. They are shrunk
           towards equal weights by ``conf.shrinkage`` times the mean square of a prediction, then scaled to sum to 1: the
           calibration decides which level is right. Money weighs a user by the square of the spend, logarithms by its ratio;
           roots do neither. One member is allowed.
        2. *Calibration*: users in up to 20 bins by that mean, at least 200 in each; mean spend by bin, made monotone (pool
           adjacent violators). Each pooled block has one knot, with straight lines between knots in log1p space. Pooled blocks
           differ strictly, so users keep their order, and no plateau makes ties as plain isotonic regression would. Below the
           first knot the curve runs to (0, 0); above the last the correction factor stays. Each bin has one more user, who
           spends what the members predict, so a bin without any spend doesn't fall to 0.
        3. *Activity*: P(spend > 0) by the same binned isotonic fit, with half a user of either kind added. Of two users with
           the same expected spend, one may buy seldom and the other may have stayed away. The purchase process, where it is a
           member, distinguishes them: logistic regression on the logits of both probabilities, neither weight negative, and
           on the logarithm of days since the last purchase.
        4. *Interval*: :func:`bp_spark.model.intervals.fit_intervals`, on the residuals of the rows that the calibration was
           fitted on. 20 knots on thousands of rows cost no measurable coverage, and a split would cost half the rows. The
           scales of the ends are fitted on half of the users and measured on the other half, both ways.
        5. *Reference*: percentiles of the expected spend, tertiles of ``(high - low) / (expected + 0.01)``.

        Args:
            frame: ``label_spend`` (below 0 counts as 0) and a column of predictions for each of ``conf.members``;
                ``as_of_date``, without which all rows weigh the same.
            conf: the members, the coverage, and how fast rows lose weight.
            reference: predictions of the population that scores compare with; by default ``frame``.
            level_sd: standard deviation of the log level of everyone's spend; see :class:`bp_spark.model.level.Level`.

        Raises:
            DataError: a column is missing, a prediction is negative or not finite, or there are too few rows for an interval
                of that coverage (``2 / (1 - coverage)``).
        """
        if not conf.members:
            raise DataError("fusion", "needs at least one member")
        if len(frame) < rows_needed(conf.coverage):
            raise DataError(
                "validation predictions",
                f"{rows_needed(conf.coverage)} rows at least for an interval of coverage {conf.coverage}",
                count=len(frame),
            )
        spend = np.maximum(_column(frame, "label_spend", signed=True), 0.0)
        roots = np.sqrt(np.stack([_column(frame, name) for name in conf.members], axis=1))
        row_weights = recency_weights(frame, conf.half_life_days)
        weights = _stacking_weights(roots, np.sqrt(spend), row_weights, conf.shrinkage)
        stacked = _stacked_log(roots, weights)
        calibration = _fit_calibration(stacked, spend, row_weights)
        expected = _calibrate(calibration, stacked)
        activity = _fit_activity(expected, spend, row_weights)
        recency, p_active, process = None, activity(expected), np.empty((len(frame), 0))
        if "btyd" in conf.members and {ACTIVE, SILENT} <= set(frame):
            inputs = _activity_inputs(p_active, _column(frame, ACTIVE), _column(frame, SILENT))
            recency = _fit_recency(inputs, spend > 0, row_weights)
            p_active, process = expit(_weighted_sum(inputs, recency)), inputs[:, -_PROCESS_COLUMNS:]
        users = Predicted(expected, roots, p_active, process)
        intervals = fit_intervals(users, spend, row_weights, _halves(frame, expected), conf.coverage, level_sd)
        fitted = cls(
            members=tuple(conf.members),
            weights=floats(weights),
            coverage=conf.coverage,
            calibration=calibration,
            activity=activity,
            intervals=intervals,
            reference=Curve((0.0,), (50.0,)),
            risk=(0.0, 0.0),
            recency=recency,
        )
        return fitted._with_reference(frame if reference is None else reference)

    def _with_reference(self, population: pd.DataFrame) -> Self:
        predicted = self.apply_without_level({name: _column(population, name) for name in self.inputs})
        percentiles = np.linspace(0.0, 100.0, _GRID)
        grid = pd.DataFrame({"x": np.quantile(predicted["expected_spend"], percentiles / 100.0), "y": percentiles})
        # Equal values share the middle of their percentiles.
        knots = grid.groupby("x", sort=True)["y"].mean()
        first, second = np.quantile(relative_width(predicted), [1 / 3, 2 / 3]).tolist()
        return replace(self, reference=Curve(floats(knots.index), floats(knots.to_numpy())), risk=(first, second))

    @property
    def reference_scores(self) -> np.ndarray:
        """Scores at evenly spaced percentiles of the reference population, float64 [1001]; equal scores recur."""
        first, scores = 0, list[float]()
        for score in self.reference.y:
            # A knot is the mean of consecutive percentiles; ``first`` is the first that earlier knots leave over.
            last = round(score * (_GRID - 1) / 50.0) - first
            scores += [score] * (last - first + 1)
            first = last + 1
        return np.array(scores)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the predictions that :meth:`apply` reads: those of the members, and :data:`ACTIVE` and :data:`SILENT`."""
        return self.members if self.recency is None else (*self.members, ACTIVE, SILENT)

    def inputs_from(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """Return the columns of a frame that :meth:`apply` reads, by name."""
        return {name: frame[name].to_numpy() for name in self.inputs}

    def factor(self, on: date | None = None) -> float:
        """Return the factor of everyone's spend as of a date, by default that of the fit."""
        return 1.0 if self.level is None else self.level.factor(on)

    def log_odds(self, on: date | None = None) -> float:
        """Return what is added to everyone's log odds of buying as of a date, by default that of the fit."""
        return 0.0 if self.level is None else self.level.log_odds(on)

    def apply(self, predictions: Mapping[str, np.ndarray], on: date | None = None) -> dict[str, np.ndarray]:
        """Return the :data:`OUTPUTS` for users, from the members' predictions.

        Args:
            predictions: ``float64[rows]`` for each of :attr:`inputs`; others are ignored.
            on: the date from which the spend counts, for the level; by default that of the fit.

        Returns:
            Arrays of ``rows``: ``expected_spend``, ``low``, ``high`` (``0 <= low <= expected_spend <=
            high``), ``p_active`` (0–1), ``score`` (0–100), all float64; ``level`` (A–E) and ``risk_level``
            (low, medium, high), both str objects.

        Raises:
            BundleError: a member's predictions are missing, negative or not finite.
        """
        return self.apply_level(self.apply_without_level(predictions), on)

    def apply_level(self, predicted: Mapping[str, np.ndarray], on: date | None = None) -> dict[str, np.ndarray]:
        """Multiply the money in what :meth:`apply_without_level` returned by the factor of a date, and move ``p_active``.

        How a user compares with others doesn't change: score, level and risk stay.
        """
        factor = self.factor(on)
        moved = {name: predicted[name] * factor for name in ("expected_spend", "low", "high")}
        return dict(predicted) | moved | {"p_active": with_log_odds(predicted["p_active"], self.log_odds(on))}

    def apply_without_level(self, predictions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return what :meth:`apply` does, without the level's factor."""
        for name in self.inputs:
            if name not in predictions:
                raise BundleError(f"fusion: no predictions of member {name!r}")
            if not _is_usable(predictions[name]):
                raise BundleError(f"fusion: member {name!r} predicted a negative or non-finite spend")
        roots = np.sqrt(np.stack([np.asarray(predictions[name], np.float64) for name in self.members], axis=1))
        logs = _calibrate(self.calibration, _stacked_log(roots, np.asarray(self.weights)))
        expected = np.expm1(logs)
        p_active, process = self._activity(logs, predictions)
        low, high = self.intervals.around(Predicted(logs, roots, p_active, process))
        score, level = self.rank(expected)
        predicted = {
            "expected_spend": expected,
            # The mean of a skewed spend can lie outside its own quantiles; widening keeps the coverage.
            "low": np.minimum(low, expected),
            "high": np.maximum(high, expected),
            "p_active": p_active,
            "score": score,
        }
        risk = np.searchsorted(np.asarray(self.risk), relative_width(predicted), side="left")
        predicted["level"] = level
        predicted["risk_level"] = np.array(RISKS, dtype=object)[risk]
        return predicted

    def rank(self, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the score, float64 [rows], and the level, str objects, of a spend without the level's factor."""
        score = np.interp(expected, self.reference.x, self.reference.y, left=0.0, right=100.0)
        level = np.searchsorted(np.array(LEVEL_BORDERS), score, side="right")
        return score, np.array(LEVELS, dtype=object)[level]

    def _activity(self, logs: np.ndarray, predictions: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return P(spend > 0), float64 [rows], and what the purchase process says, float64 [rows, columns]."""
        by_spend = self.activity(logs)
        if self.recency is None:
            return by_spend, np.empty((len(logs), 0))
        inputs = _activity_inputs(by_spend, *(np.asarray(predictions[name], np.float64) for name in (ACTIVE, SILENT)))
        return np.asarray(expit(_weighted_sum(inputs, self.recency))), inputs[:, -_PROCESS_COLUMNS:]

    def expected(self, root: np.ndarray) -> np.ndarray:
        """Return the calibrated expected spend, float64 [rows], of the stack's root, float64 [rows]."""
        return np.asarray(np.expm1(_calibrate(self.calibration, np.log1p(np.maximum(root, 0.0) ** 2))))

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a JSON file; floats come back bit for bit."""
        document = as_json(self)
        # without the parts there are no keys
        if self.level is None:
            del document["level"]
        if self.recency is None:
            del document["recency"]
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Return the stack that :meth:`to_json` wrote.

        Raises:
            BundleError: a key is missing or unknown, or a value has the wrong type, length or order.
        """
        if set(document) | {"level", "recency"} != {field.name for field in fields(cls)}:
            raise BundleError("fusion: not the keys of a fusion")
        with well_formed("fusion"):
            members = texts(document["members"])
            regressors = regressor_count(len(members), _PROCESS_COLUMNS if "recency" in document else 0)
            stack = cls(
                members=members,
                weights=floats(document["weights"], 0.0),
                coverage=number(document["coverage"], 0.0, 1.0),
                calibration=curve_from_json(document["calibration"], 0.0, LARGEST_LOG),
                activity=curve_from_json(document["activity"], 0.0, 1.0),
                intervals=UserIntervals.from_json(document["intervals"], regressors),
                reference=curve_from_json(document["reference"], 0.0, 100.0),
                risk=(number(document["risk"][0]), number(document["risk"][1])),
                level=Level.from_json(document["level"]) if "level" in document else None,
                recency=floats(document["recency"]) if "recency" in document else None,
            )
            for rising in (stack.calibration.y, stack.reference.y, stack.risk):
                require_rising(rising)
        if stack.recency is not None and len(stack.recency) != _ACTIVITY_WEIGHTS:
            raise BundleError("fusion: recency must have four numbers")
        if not stack.members or len(stack.weights) != len(stack.members):
            raise BundleError("fusion: members and weights don't fit together")
        return stack


def recency_weights(frame: pd.DataFrame, half_life_days: float | None) -> np.ndarray:
    """Return the weight of each row, float64 [rows]: 1 at the newest ``as_of_date``, half that each half-life before it."""
    if half_life_days is None or "as_of_date" not in frame:
        return np.ones(len(frame))
    days = pd.to_datetime(frame["as_of_date"])
    return np.asarray(0.5 ** ((days.max() - days).dt.days / half_life_days), np.float64)


def _halves(frame: pd.DataFrame, expected: np.ndarray) -> np.ndarray:
    """Return a half of the users, boolean [rows]: every second one, in the order of their keys.

    Without keys each row is a user, in the order of the expected spend. Either way the order of the rows doesn't matter.
    """
    order = frame["user_key"].astype(str).to_numpy() if "user_key" in frame else expected
    return np.asarray(np.unique(order, return_inverse=True)[1] % 2 == 0)


def _stacking_weights(roots: np.ndarray, target: np.ndarray, row_weights: np.ndarray, shrinkage: float) -> np.ndarray:
    """Return the weight, float64 [members], of each column of ``roots`` [rows, members]; see :meth:`CalibratedStack.fit`."""
    members = roots.shape[1]
    scale = np.sqrt(row_weights)
    roots, target = roots * scale[:, None], target * scale
    equal = np.full(members, 1.0 / members)
    plain_mean = roots.mean(axis=1)
    # Members that predict too much altogether are no reason to shrink the weight of the largest.
    level = float(plain_mean @ target) / max(float(plain_mean @ plain_mean), 1e-300)
    pull = math.sqrt(shrinkage * float((roots**2).sum()) / members)
    rows = np.vstack([roots, pull * np.eye(members)])
    targets = np.concatenate([target, pull * level * equal])
    weights, _ = nnls(rows, targets)
    return weights / weights.sum() if weights.sum() > 0 else equal


def _stacked_log(roots: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return log1p of the stack, float64 [rows]."""
    return np.asarray(np.log1p(_weighted_sum(roots, weights) ** 2))


def _weighted_sum(values: np.ndarray, weights: Iterable[float]) -> np.ndarray:
    """Return the weighted sum of the columns of ``values`` [rows, columns], float64 [rows]."""
    total = np.zeros(len(values))
    # Column by column and not by a matrix product: BLAS sums in an order that depends on the number of rows.
    for column, weight in zip(values.T, weights, strict=True):
        total += weight * column
    return total


def _fit_calibration(stacked: np.ndarray, spend: np.ndarray, row_weights: np.ndarray) -> Curve:
    predicted = np.expm1(stacked)
    group = quantile_bins(stacked, _CALIBRATION_BINS, equivalent_rows(_CALIBRATION_ROWS, row_weights))
    rows = np.bincount(group, row_weights)
    x = np.bincount(group, predicted * row_weights) / rows
    y = isotonic_regression((np.bincount(group, spend * row_weights) + x) / (rows + 1), sample_weight=rows + 1)
    block = np.unique(y, return_inverse=True)[1]
    # A knot stands at the mean prediction in money, as the spend beside it is a mean in money.
    block_x = np.bincount(block, x * rows) / np.bincount(block, rows)
    knots_x, knots_y = np.log1p(block_x), np.log1p(np.unique(y))
    if knots_x[0] > 0:
        knots_x, knots_y = np.append(0.0, knots_x), np.append(0.0, knots_y)
    return Curve(floats(knots_x), floats(knots_y))


def _calibrate(curve: Curve, stacked: np.ndarray) -> np.ndarray:
    return curve(stacked) + np.maximum(stacked - curve.x[-1], 0.0)


def _fit_activity(expected: np.ndarray, spend: np.ndarray, row_weights: np.ndarray) -> Curve:
    group = quantile_bins(expected, _ACTIVITY_BINS, equivalent_rows(_ACTIVITY_ROWS, row_weights))
    rows = np.bincount(group, row_weights)
    share = (np.bincount(group, (spend > 0) * row_weights) + 0.5) / (rows + 1)
    knots = isotonic_regression(share, y_min=0.0, y_max=1.0, sample_weight=rows + 1)
    return Curve(floats(np.bincount(group, expected * row_weights) / rows), floats(knots))


def _activity_inputs(by_spend: np.ndarray, by_process: np.ndarray, silent_days: np.ndarray) -> np.ndarray:
    """Return the regressors of P(spend > 0), float64 [rows, 4]: 1, both logits, log1p of days without a purchase."""
    return np.stack([np.ones(len(by_spend)), _logit(by_spend), _logit(by_process), np.log1p(silent_days)], axis=1)


def _fit_recency(inputs: np.ndarray, active: np.ndarray, row_weights: np.ndarray) -> tuple[float, ...]:
    """Return the weights of :func:`_activity_inputs` by maximum likelihood, those of the logits not negative."""
    # A weak prior at the first logit alone: data that part both kinds without error would drive weights to infinity.
    prior = np.array([0.0, 1.0, 0.0, 0.0])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        score = inputs @ weights
        value = row_weights @ (np.logaddexp(0.0, score) - active * score) + 0.5 * ((weights - prior) ** 2).sum()
        return float(value), inputs.T @ (row_weights * (expit(score) - active)) + (weights - prior)

    bounds = [(-10, 10), (0, 10), (0, 10), (-10, 10)]
    return floats(minimize(loss, prior, jac=True, method="L-BFGS-B", bounds=bounds).x)


def _logit(probability: np.ndarray) -> np.ndarray:
    bounded = np.clip(probability, _CLOSEST, 1 - _CLOSEST)
    return np.asarray(np.log(bounded) - np.log1p(-bounded))


def relative_width(predicted: Mapping[str, Any], factor: float = 1.0) -> Any:
    """Return the width of the interval relative to the expected spend, which the risk level goes by.

    Args:
        predicted: ``low``, ``high`` and ``expected_spend`` as arrays or as Spark's columns.
        factor: the level's factor in these.
    """
    return (predicted["high"] - predicted["low"]) / (predicted["expected_spend"] + _CENT * factor)


def _is_usable(values: np.ndarray) -> bool:
    return bool(np.all(np.isfinite(values)) and np.all(np.asarray(values) >= 0))


def _column(frame: pd.DataFrame, name: str, *, signed: bool = False) -> np.ndarray:
    if name not in frame.columns:
        raise DataError("validation predictions", "column is missing", column=name)
    values = frame[name].to_numpy(dtype=np.float64)
    bad = ~np.isfinite(values) | ((values < 0) & (not signed))
    if bad.any():
        rule = "must be finite" if signed else "must be finite and >= 0"
        raise DataError("validation predictions", rule, column=name, count=int(bad.sum()))
    return values
