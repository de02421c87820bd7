"""Several members' predictions in, one calibrated answer per user out.

:meth:`CalibratedStack.fit` learns on validation users, whom no member was fitted on; :meth:`CalibratedStack.apply` is
arithmetic on a few hundred frozen numbers, row by row, so that any batch of users gives the same answers as
one user alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import date
from statistics import NormalDist
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy.optimize import minimize, nnls
from scipy.special import expit
from sklearn.isotonic import isotonic_regression

from bp_spark.core.config import FusionConfig
from bp_spark.core.errors import BundleError, DataError
from bp_spark.model.columns import ACTIVE, SILENT
from bp_spark.model.curve import Curve, as_json, curve_from_json, floats
from bp_spark.model.level import Level

LEVELS = ("E", "D", "C", "B", "A")
"""Fifths of the reference population, by score."""
LEVEL_BORDERS = (20.0, 40.0, 60.0, 80.0)
"""Scores from which a level holds."""
RISKS = ("low", "medium", "high")
"""Thirds of the reference population, by relative width of the interval."""
OUTPUTS = ("expected_spend", "low", "high", "p_active", "score", "level", "risk_level")

_CALIBRATION_BINS, _CALIBRATION_ROWS = 20, 200
_ACTIVITY_BINS, _ACTIVITY_ROWS = 50, 100
_INTERVAL_GROUPS = 5
_SURE = 1e-4
_GRID = 1001
_SHOCKS = np.array([NormalDist().inv_cdf((step + 0.5) / 9) for step in range(9)])
"""Standard normal numbers of equal probability: what may happen to the spend of all users at once."""
# Keeps the relative width finite for users expected to spend nothing. Not 1, which would cancel against log1p
# and make the width one constant per group: a third's border would then be decided by rounding.
_CENT = 0.01


@dataclass(frozen=True)
class CalibratedStack:
    """What turns members' predictions into scores. Frozen; see :meth:`fit` for the meaning of each step.

    ``weights`` are the members' shares in the stack: not negative, 1 together. ``calibration`` maps log1p of the stack to
    log1p of the expected spend, ``activity``
    log1p of the expected spend to P(spend > 0). ``edges`` (log1p expected spend) part the groups of the
    interval, ``lower`` and ``upper`` are the residual quantiles of each group in log1p space. ``reference``
    maps expected spend to its percentile 0–100 in the reference population, ``risk`` holds the tertiles of
    the relative interval width. ``level`` is the factor of everyone's spend by date; ``None``: always 1.
    ``recency`` joins ``activity`` with what the purchase process says (intercept and weights); ``None``: it isn't asked.
    """

    members: tuple[str, ...]
    weights: tuple[float, ...]
    coverage: float
    calibration: Curve
    activity: Curve
    edges: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    reference: Curve
    risk: tuple[float, float]
    level: Level | None = None
    recency: tuple[float, ...] | None = None

    @classmethod
    def fit(
        cls, frame: pd.DataFrame, conf: FusionConfig, reference: pd.DataFrame | None = None, level_sd: float = 0.0
    ) -> Self:
        """Learn the fusion from out-of-fold predictions: each of users that the predicting member was not fitted on.

        Rows weigh the less the older they are (``conf.half_life_days``): members and users change, and what is asked is how
        right members are now. In the interval such weights hold the coverage up under slow change (Barber et al. 2023,
        "Conformal prediction beyond exchangeability").

        1. *Stack* (Breiman 1996, "Stacked regressions"): the square of the weighted mean of the square roots of
           ``conf.members``. Non-negative least squares of root spend on root predictions, drawn towards equal weights by
           ``conf.shrinkage`` times the mean square of a prediction, then made 1 together: which level is right is left to
           the calibration. Roots weigh a user by neither the square of the spend, as money does, nor its ratio, as
           logarithms do. One member is legal.
        2. *Calibration*: users in up to 20 bins by that mean, at least 200 in each; mean spend by bin, made
           monotone (pool adjacent violators), one knot per pooled block, straight lines in log1p space.
           Pooled blocks differ strictly, so users keep their order and no plateau makes ties, as plain
           isotonic regression would. Below the first knot the curve runs to (0, 0), above the last the
           correction factor stays. Each bin has one more user, who spends what the members say: a bin without
           any spend doesn't fall to 0.
        3. *Activity*: P(spend > 0) by the same binned isotonic fit, with half a user of either kind added. Of two users who
           are expected to spend the same, one buys seldom and the other has stayed away. Where the purchase process is a
           member, it tells them apart: logistic regression on the logits of both probabilities, neither weight negative, and
           on the logarithm of days since the last purchase.
        4. *Interval*: split conformal prediction (Vovk et al. 2005), signed residuals in log1p space,
           Mondrian by fifths of the expected spend, each tail by itself (Romano et al. 2019). They are of the
           rows that the calibration was fitted on: 20 knots on thousands of rows cost no measurable coverage,
           and a split would cost half the rows. Rows of one date share what happened to all users at once, and the next
           date has its own: each row stands for nine, whose spend is moved by equally likely shocks of the level.
        5. *Reference*: percentiles of the expected spend, tertiles of ``(high - low) / (expected + 0.01)``.

        Args:
            frame: ``label_spend`` (below 0 counts as 0) and a column of predictions for each of
                ``conf.members``; ``as_of_date``, without which all rows weigh the same.
            conf: the members, the coverage, and how fast rows lose weight.
            reference: predictions of the population that scores compare with; by default ``frame``.
            level_sd: standard deviation of the log level of everyone's spend; see :class:`bp_spark.model.level.Level`.

        Raises:
            DataError: a column is missing, a prediction is negative or not finite, or there are too few rows
                for an interval of that coverage (``2 / (1 - coverage)``).
        """
        if not conf.members:
            raise DataError("fusion", "needs at least one member")
        rows_needed = math.ceil(2 / (1 - conf.coverage) - 1e-9)
        if len(frame) < rows_needed:
            raise DataError(
                "validation predictions",
                f"{rows_needed} rows at least for an interval of coverage {conf.coverage}",
                count=len(frame),
            )
        spend = np.maximum(_column(frame, "label_spend", signed=True), 0.0)
        roots = np.sqrt(np.stack([_column(frame, name) for name in conf.members], axis=1))
        recency = _recency(frame, conf.half_life_days)
        weights = _stacking_weights(roots, np.sqrt(spend), recency, conf.shrinkage)
        mean = _stacked_log(roots, weights)
        calibration = _fit_calibration(mean, spend, recency)
        expected = _calibrate(calibration, mean)
        activity = _fit_activity(expected, spend, recency)
        joined = None
        if "btyd" in conf.members and {ACTIVE, SILENT} <= set(frame):
            inputs = _activity_inputs(activity(expected), _column(frame, ACTIVE), _column(frame, SILENT))
            joined = _fit_joined(inputs, spend > 0, recency)
        edges = _edges(expected, _INTERVAL_GROUPS, _rows_worth(rows_needed, recency))
        shocks = np.exp(level_sd * _SHOCKS) if level_sd > 0 else np.ones(1)
        residuals = np.log1p(np.outer(spend, shocks)) - expected[:, None]
        shares = np.repeat(recency[:, None] / len(shocks), len(shocks), axis=1)
        group = np.searchsorted(edges, expected, side="right")
        masks = [group == number for number in range(len(edges) + 1)]
        alpha = (1 - conf.coverage) / 2
        tails = [_tails(residuals[inside].ravel(), shares[inside].ravel(), alpha) for inside in masks]
        fusion = cls(
            members=tuple(conf.members),
            weights=floats(weights),
            coverage=conf.coverage,
            calibration=calibration,
            activity=activity,
            edges=tuple(edges.tolist()),
            lower=tuple(low for low, _ in tails),
            upper=tuple(high for _, high in tails),
            reference=Curve((0.0,), (50.0,)),
            risk=(0.0, 0.0),
            recency=joined,
        )
        return fusion._with_reference(frame if reference is None else reference)

    def _with_reference(self, population: pd.DataFrame) -> Self:
        answers = self.steady({name: _column(population, name) for name in self.inputs})
        shares = np.linspace(0.0, 100.0, _GRID)
        grid = pd.DataFrame({"x": np.quantile(answers["expected_spend"], shares / 100.0), "y": shares})
        # Equal values share the middle of their percentiles.
        knots = grid.groupby("x", sort=True)["y"].mean()
        first, second = np.quantile(relative_width(answers), [1 / 3, 2 / 3]).tolist()
        return replace(self, reference=Curve(floats(knots.index), floats(knots.to_numpy())), risk=(first, second))

    @property
    def reference_scores(self) -> np.ndarray:
        """Scores of the reference population, float64 [1001]: of users that part it evenly, equal ones as often as they are."""
        first, scores = 0, list[float]()
        for score in self.reference.y:
            # a knot stands for percentiles from the first that is left on, and is their mean
            last = round(score * (_GRID - 1) / 50.0) - first
            scores += [score] * (last - first + 1)
            first = last + 1
        return np.array(scores)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the predictions that it reads: of the members, and of the purchase process whether a user buys at all."""
        return self.members if self.recency is None else (*self.members, ACTIVE, SILENT)

    def factor(self, on: date | None = None) -> float:
        """Factor of everyone's spend as of a date, by default that of the fit."""
        return 1.0 if self.level is None else self.level.factor(on)

    def apply(self, predictions: Mapping[str, np.ndarray], on: date | None = None) -> dict[str, np.ndarray]:
        """Answers for users, from each member's expected spend.

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
        return self.moved(self.steady(predictions), on)

    def moved(self, answers: Mapping[str, np.ndarray], on: date | None = None) -> dict[str, np.ndarray]:
        """Multiply the money in answers of :meth:`steady` by the factor of a date.

        How a user compares with others doesn't change: score, level and risk stay.
        """
        factor = self.factor(on)
        return dict(answers) | {name: answers[name] * factor for name in ("expected_spend", "low", "high")}

    def steady(self, predictions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answers as of :meth:`apply` before the level moves them."""
        for name in self.inputs:
            if name not in predictions:
                raise BundleError(f"fusion: no predictions of member {name!r}")
            if not _usable(predictions[name]):
                raise BundleError(f"fusion: member {name!r} predicted a negative or non-finite spend")
        roots = np.sqrt(np.stack([np.asarray(predictions[name], np.float64) for name in self.members], axis=1))
        logs = _calibrate(self.calibration, _stacked_log(roots, np.asarray(self.weights)))
        expected = np.expm1(logs)
        group = np.searchsorted(np.asarray(self.edges), logs, side="right")
        low = np.maximum(np.expm1(logs + np.asarray(self.lower)[group]), 0.0)
        high = np.expm1(logs + np.asarray(self.upper)[group])
        score = np.interp(expected, self.reference.x, self.reference.y, left=0.0, right=100.0)
        answers = {
            "expected_spend": expected,
            # The mean of a skewed spend can lie outside its own quantiles; widening keeps the coverage.
            "low": np.minimum(low, expected),
            "high": np.maximum(high, expected),
            "p_active": self._p_active(logs, predictions),
            "score": score,
        }
        level = np.searchsorted(np.array(LEVEL_BORDERS), score, side="right")
        risk = np.searchsorted(np.asarray(self.risk), relative_width(answers), side="left")
        answers["level"] = np.array(LEVELS, dtype=object)[level]
        answers["risk_level"] = np.array(RISKS, dtype=object)[risk]
        return answers

    def _p_active(self, logs: np.ndarray, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
        """Probability of any spend, from log1p of the expected spend and what the purchase process says."""
        by_spend = self.activity(logs)
        if self.recency is None:
            return by_spend
        inputs = _activity_inputs(by_spend, *(np.asarray(predictions[name], np.float64) for name in (ACTIVE, SILENT)))
        return expit(_weighted(inputs, self.recency))

    def expected(self, root: np.ndarray) -> np.ndarray:
        """Calibrated expected spend, float64 [rows], of the stack's root, float64 [rows]."""
        return np.expm1(_calibrate(self.calibration, np.log1p(np.maximum(root, 0.0) ** 2)))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file; floats come back bit for bit."""
        document = as_json(self)
        if self.level is None:
            # as bundles were written that know no level
            del document["level"]
        if self.recency is None:
            del document["recency"]
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """What :meth:`to_json` gave.

        Raises:
            BundleError: a key is missing or unknown, or a value has the wrong type, length or order.
        """
        if set(document) | {"level", "recency"} != {field.name for field in fields(cls)}:
            raise BundleError("fusion: not the keys of a fusion")
        try:
            fusion = cls(
                members=tuple(str(name) for name in document["members"]),
                weights=floats(document["weights"]),
                coverage=float(document["coverage"]),
                calibration=curve_from_json(document["calibration"]),
                activity=curve_from_json(document["activity"]),
                edges=floats(document["edges"]),
                lower=floats(document["lower"]),
                upper=floats(document["upper"]),
                reference=curve_from_json(document["reference"]),
                risk=(float(document["risk"][0]), float(document["risk"][1])),
                level=Level.from_json(document["level"]) if "level" in document else None,
                recency=floats(document["recency"]) if "recency" in document else None,
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BundleError(f"fusion: malformed ({error!r})") from None
        if fusion.recency is not None and len(fusion.recency) != 4:
            raise BundleError("fusion: recency must have four numbers")
        if len(fusion.weights) != len(fusion.members) or min(fusion.weights) < 0:
            raise BundleError("fusion: members and weights don't fit together")
        if not len(fusion.edges) + 1 == len(fusion.lower) == len(fusion.upper):
            raise BundleError("fusion: edges, lower and upper don't fit together")
        return fusion


def _recency(frame: pd.DataFrame, half_life_days: float | None) -> np.ndarray:
    """Weight of each row, float64 [rows]: 1 at the newest ``as_of_date``, half of that each ``half_life_days`` before it."""
    if half_life_days is None or "as_of_date" not in frame:
        return np.ones(len(frame))
    days = pd.to_datetime(frame["as_of_date"])
    return np.asarray(0.5 ** ((days.max() - days).dt.days / half_life_days), np.float64)


def _rows_worth(rows: int, recency: np.ndarray) -> int:
    """How many rows of the mean weight weigh as much as so many of the newest."""
    return math.ceil(rows * len(recency) / recency.sum() - 1e-9)


def _stacking_weights(roots: np.ndarray, target: np.ndarray, recency: np.ndarray, shrinkage: float) -> np.ndarray:
    """Weights, float64 [members], of the columns of ``roots`` [rows, members]; see :meth:`CalibratedStack.fit`."""
    members = roots.shape[1]
    scale = np.sqrt(recency)
    roots, target = roots * scale[:, None], target * scale
    equal = np.full(members, 1.0 / members)
    plain = roots.mean(axis=1)
    # members that say too much altogether are no reason to heed the largest least
    level = float(plain @ target) / max(float(plain @ plain), 1e-300)
    pull = math.sqrt(shrinkage * float((roots**2).sum()) / members)
    rows, answers = np.vstack([roots, pull * np.eye(members)]), np.concatenate([target, pull * level * equal])
    weights, _ = nnls(rows, answers)
    return weights / weights.sum() if weights.sum() > 0 else equal


def _stacked_log(roots: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """log1p of the stack, float64 [rows]."""
    return np.log1p(_weighted(roots, weights) ** 2)


def _weighted(values: np.ndarray, weights: Iterable[float]) -> np.ndarray:
    """Weighted sum of the columns of ``values`` [rows, columns], float64 [rows]."""
    total = np.zeros(len(values))
    # Column by column and not by a matrix product: BLAS sums in an order that depends on the number of rows.
    for column, weight in zip(values.T, weights, strict=True):
        total += weight * column
    return total


def _fit_calibration(mean: np.ndarray, spend: np.ndarray, recency: np.ndarray) -> Curve:
    said = np.expm1(mean)
    group = groups(mean, _CALIBRATION_BINS, _rows_worth(_CALIBRATION_ROWS, recency))
    rows = np.bincount(group, recency)
    x = np.bincount(group, said * recency) / rows
    y = isotonic_regression((np.bincount(group, spend * recency) + x) / (rows + 1), sample_weight=rows + 1)
    block = np.unique(y, return_inverse=True)[1]
    # A knot stands at the mean of what was said in money, as the spend beside it is a mean in money.
    block_x = np.bincount(block, x * rows) / np.bincount(block, rows)
    knots_x, knots_y = np.log1p(block_x), np.log1p(np.unique(y))
    if knots_x[0] > 0:
        knots_x, knots_y = np.append(0.0, knots_x), np.append(0.0, knots_y)
    return Curve(floats(knots_x), floats(knots_y))


def _calibrate(curve: Curve, mean: np.ndarray) -> np.ndarray:
    return curve(mean) + np.maximum(mean - curve.x[-1], 0.0)


def _fit_activity(expected: np.ndarray, spend: np.ndarray, recency: np.ndarray) -> Curve:
    group = groups(expected, _ACTIVITY_BINS, _rows_worth(_ACTIVITY_ROWS, recency))
    rows = np.bincount(group, recency)
    share = (np.bincount(group, (spend > 0) * recency) + 0.5) / (rows + 1)
    knots = isotonic_regression(share, y_min=0.0, y_max=1.0, sample_weight=rows + 1)
    return Curve(floats(np.bincount(group, expected * recency) / rows), floats(knots))


def _activity_inputs(by_spend: np.ndarray, by_process: np.ndarray, silent_days: np.ndarray) -> np.ndarray:
    """What the probability of any spend is told from, float64 [rows, 4]: 1, both logits, log1p of days without a purchase."""
    return np.stack([np.ones(len(by_spend)), _logit(by_spend), _logit(by_process), np.log1p(silent_days)], axis=1)


def _fit_joined(inputs: np.ndarray, active: np.ndarray, recency: np.ndarray) -> tuple[float, ...]:
    """Weights of :func:`_activity_inputs` by maximum likelihood, those of the logits not negative."""
    # drawn a little towards the first logit alone: data that part both kinds without error would drive weights to infinity
    prior = np.array([0.0, 1.0, 0.0, 0.0])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        score = inputs @ weights
        value = recency @ (np.logaddexp(0.0, score) - active * score) + 0.5 * ((weights - prior) ** 2).sum()
        return float(value), inputs.T @ (recency * (expit(score) - active)) + (weights - prior)

    bounds = [(-10, 10), (0, 10), (0, 10), (-10, 10)]
    return floats(minimize(loss, prior, jac=True, method="L-BFGS-B", bounds=bounds).x)


def _logit(probability: np.ndarray) -> np.ndarray:
    """Log odds, of a probability that is no nearer to 0 and 1 than :data:`_SURE`."""
    bounded = np.clip(probability, _SURE, 1 - _SURE)
    return np.log(bounded) - np.log1p(-bounded)


def _tails(residuals: np.ndarray, recency: np.ndarray, alpha: float) -> tuple[float, float]:
    """Residuals that a fresh one, of weight 1, falls below, above with probability ``alpha`` at most, if weights are right."""
    order = np.argsort(residuals, kind="stable")
    ordered, last = residuals[order], len(residuals) - 1

    def place(weights: np.ndarray) -> int:
        """Of the first, from the inner end, beyond which lies no more than ``alpha``."""
        needed = (weights.sum() + 1) * (1 - alpha) - 1e-9
        return min(last, int(np.searchsorted(np.cumsum(weights), needed)))

    weights = recency[order]
    return float(ordered[last - place(weights[::-1])]), float(ordered[place(weights)])


def _edges(x: np.ndarray, groups: int, smallest: int) -> np.ndarray:
    """Borders between up to ``groups`` equal shares of ``x``, ties together, ``smallest`` rows at least."""
    edges = np.unique(np.quantile(x, np.arange(1, groups) / groups, method="higher"))
    while len(edges):
        rows = np.bincount(np.searchsorted(edges, x, side="right"), minlength=len(edges) + 1)
        thin = int(np.argmin(rows))
        if rows[thin] >= smallest:
            break
        edges = np.delete(edges, min(thin, len(edges) - 1))
    return edges


def groups(x: np.ndarray, bins: int, smallest: int) -> np.ndarray:
    """Number of the group of each row: up to ``bins`` equal shares of ``x``, about ``smallest`` rows in each at least."""
    return np.searchsorted(_edges(x, min(bins, max(1, len(x) // smallest)), 1), x, side="right")


def relative_width(answers: Mapping[str, Any], factor: float = 1.0) -> Any:
    """What the risk level goes by: how wide the interval is for the expected spend; of arrays or of Spark's columns.

    Args:
        factor: what the level has moved the answers by.
    """
    return (answers["high"] - answers["low"]) / (answers["expected_spend"] + _CENT * factor)


def _usable(values: np.ndarray) -> bool:
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
