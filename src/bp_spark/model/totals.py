"""The error of sums: how far what a group of users spends together may lie from what is expected of them together.

Users' errors aren't independent. A season, a trend or a campaign moves all users alike, and a part of it moves the users of one
segment alike. So the error of a sum doesn't vanish as the group grows. The logarithm of a group's spend over its expected spend
has the variance::

    common_sd² + segment_sd² + log(1 + sum(dispersion * expected + quadratic * expected²) / sum(expected)²)

The last term is that of independent users. Their variance is a quadratic function of their mean (McCullagh and Nelder 1989,
"Generalized linear models", 9.2): orders at random add up to a variance proportional to the mean, and what the predictions
don't know of a user grows with its square. All is learned from out-of-fold predictions at past cutoffs. A group's spend is
taken to be log-normal, with the expected spend as its mean.

Few past horizons tell these variances. So the ends of an interval are quantiles of Student's t, not of the normal
distribution. That is the posterior predictive distribution of a value whose variance is learned from n errors and a prior that
weighs as much as two (Gelman et al. 2013, "Bayesian Data Analysis", 2.6). One quantile serves the whole variance. So the
interval of a small group is too wide rather than too narrow: many rows tell the variance of independent users.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy.optimize import nnls
from scipy.stats import t as student

from bp_spark.model.bins import equivalent_rows, quantile_bins
from bp_spark.model.horizons import label_column
from bp_spark.model.members.base import read_json, write_json
from bp_spark.model.values import number, well_formed, whole

FILE = "totals.json"
"""File of a bundle that knows the error of sums."""
FEW_ERRORS = 2.0
"""Below so many independent errors, the common error is mostly an assumption."""

_BINS, _BIN_ROWS = 20, 200
_SEGMENTS = 5
"""Groups of like expected spend whose errors are compared: as many as there are levels."""
_PRIOR_WEIGHT = 2.0
"""Weight of an assumed standard deviation beside the measured one, in independent errors."""
_SEGMENT_SD = 0.05
"""Standard deviation that users of a segment share, where nothing is measured."""
_APART = 0.75
"""Share of a horizon that two cutoffs lie apart at least to show how a segment changes within a horizon."""
_LARGEST = 1e15
_LARGEST_SD = 10.0


@dataclass(frozen=True)
class TotalError:
    """Error of sums over one horizon.

    Attributes:
        days: of the horizon.
        common_sd: standard deviation of the log spend that all users share.
        segment_sd: that which users of one segment share beside it.
        dispersion: variance of a user, by the expected spend.
        quadratic: the same by its square.
        horizons: how many errors that are independent of each other ``common_sd`` was measured on: past forecasts of the main
            horizon; of another one the horizons that don't overlap, less the one that the predictions are calibrated on.
    """

    days: int
    common_sd: float
    segment_sd: float
    dispersion: float
    quadratic: float
    horizons: float

    def variance(self, expected: np.ndarray) -> np.ndarray:
        """Return the variance of users who are independent of each other, float64 [rows]."""
        return np.asarray(self.dispersion * expected + self.quadratic * expected**2)

    def quantile(self, coverage: float) -> float:
        """Return the standard deviations of the log spend from the middle of an interval with this coverage to its ends."""
        return float(student.ppf((1 + coverage) / 2, self.horizons + _PRIOR_WEIGHT))

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Return the fields of a JSON document.

        Raises:
            KeyError, TypeError, ValueError: they are not these fields.
        """
        if set(document) != {field.name for field in fields(cls)}:
            raise ValueError("not the fields of an error of sums")
        return cls(
            whole(document["days"], 1, 100 * 366),
            number(document["common_sd"], 0.0, _LARGEST_SD),
            number(document["segment_sd"], 0.0, _LARGEST_SD),
            number(document["dispersion"], 0.0, _LARGEST),
            number(document["quadratic"], 0.0, _LARGEST),
            number(document["horizons"], 0.0, _LARGEST),
        )


@dataclass(frozen=True)
class Totals:
    """Errors of sums by horizon. Frozen; see :meth:`fit`.

    Attributes:
        coverage: share of sums that shall lie in their interval.
        errors: of each horizon, the shortest first.
    """

    coverage: float
    errors: tuple[TotalError, ...]

    @classmethod
    def fit(
        cls,
        frame: pd.DataFrame,
        expected: Mapping[int, np.ndarray],
        row_weights: np.ndarray,
        *,
        main: int,
        level_sd: float,
        forecasts: float,
        coverage: float,
    ) -> Self:
        """Fit on out-of-fold predictions.

        1. *Independent users*: squared errors are averaged in up to 20 bins of the expected spend and divided by it. A line
           through these, neither part negative, gives both coefficients. A factor makes all predicted variances together as
           large as the squared errors.
        2. *Segments*: fifths of the expected spend at each cutoff stand for segments, each with its ratio of spent to expected
           over that of the whole cutoff. ``segment_sd²`` is what the squared differences of these ratios, between cutoffs that
           lie about a horizon apart, exceed the variance of independent users by: the predictions are calibrated on cutoffs as
           old as that. It is averaged with an assumed value.
        3. *Common error*: that of the main horizon is the level's (:class:`bp_spark.model.level.Level`), learned from past
           weeks. For another horizon the ratios of whole cutoffs are averaged with it. It weighs as much as two horizons that
           don't overlap.

        Args:
            frame: ``as_of_date``, ``label_spend``, and ``label_spend_30d`` for a horizon of 30 days (NaN where unknown).
            expected: days -> expected spend without the level's factor, float64 [rows].
            row_weights: float64 [rows].
            main: days of the main horizon.
            level_sd: standard deviation of the log level of everyone's spend.
            forecasts: how many independent errors it was measured on.
            coverage: share of sums that shall lie in their interval.
        """
        cutoffs = pd.to_datetime(frame["as_of_date"]).to_numpy()
        errors = []
        for days in sorted(expected):
            label = frame[label_column(days, main)].to_numpy(np.float64)
            known = ~np.isnan(label)
            rows = _Rows(np.maximum(label[known], 0.0), expected[days][known], row_weights[known], cutoffs[known])
            horizons = _independent(rows.cutoffs, days)
            common_sd = level_sd if days == main else _common_sd(rows, level_sd, horizons)
            of_common = forecasts if days == main else horizons
            error = TotalError(days, common_sd, 0.0, *_variance_of_users(rows), of_common)
            errors.append(replace(error, segment_sd=_segment_sd(rows, error, horizons)))
        return cls(coverage, tuple(errors))

    def save(self, folder: Path) -> None:
        """Write the file into an existing folder."""
        write_json(Path(folder) / FILE, {"coverage": self.coverage, "errors": [asdict(error) for error in self.errors]})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            BundleError: the file is missing, cut short or malformed.
        """
        path = Path(folder) / FILE
        document = read_json(path)
        with well_formed(path):
            if set(document) != {"coverage", "errors"}:
                raise ValueError("not the keys of totals")
            errors = tuple(map(TotalError.from_json, document["errors"]))
            return cls(number(document["coverage"], 0.01, 0.999), errors)


@dataclass(frozen=True)
class _Rows:
    """Users at past cutoffs, an array of rows each."""

    spend: np.ndarray
    expected: np.ndarray
    weights: np.ndarray
    cutoffs: np.ndarray


def _variance_of_users(rows: _Rows) -> tuple[float, float]:
    """Return ``dispersion`` and ``quadratic`` of the variance of independent users."""
    squares = (rows.spend - rows.expected) ** 2
    bins = quantile_bins(rows.expected, _BINS, equivalent_rows(_BIN_ROWS, rows.weights))
    weight = np.bincount(bins, rows.weights)
    mean = np.bincount(bins, rows.weights * rows.expected) / weight
    usable = mean > 0
    if not usable.any():
        return 0.0, 0.0
    ratio = np.bincount(bins, rows.weights * squares)[usable] / weight[usable] / mean[usable]
    line = np.stack([np.ones(len(ratio)), mean[usable]], axis=1)
    scale = np.sqrt(weight[usable])
    coefficients, _ = nnls(line * scale[:, None], ratio * scale)
    predicted = float(rows.weights @ (coefficients[0] * rows.expected + coefficients[1] * rows.expected**2))
    factor = float(rows.weights @ squares) / predicted if predicted > 0 else 0.0
    return float(coefficients[0]) * factor, float(coefficients[1]) * factor


def _segment_sd(rows: _Rows, error: TotalError, horizons: float) -> float:
    """Return ``segment_sd`` by the changes of segments between cutoffs about a horizon apart."""
    ratios = {cutoff: _segment_ratios(rows, rows.cutoffs == cutoff, error) for cutoff in np.unique(rows.cutoffs)}
    apart = np.timedelta64(math.ceil(_APART * error.days), "D")
    excess, weights = [np.zeros(0)], [np.zeros(0)]
    for (earlier, before), (later, after) in combinations(ratios.items(), 2):
        if later - earlier >= apart and len(before[0]) == len(after[0]):
            independent = before[1] + after[1]
            excess.append((after[0] - before[0]) ** 2 - independent)
            weights.append(1 / (independent + _SEGMENT_SD**2) ** 2)
    squares, precision = np.concatenate(excess), np.concatenate(weights)
    measured = max(0.0, float(np.average(squares, weights=precision))) if len(squares) else 0.0
    weight = horizons if len(squares) else 0.0
    return math.sqrt((weight * measured + _PRIOR_WEIGHT * _SEGMENT_SD**2) / (weight + _PRIOR_WEIGHT))


def _segment_ratios(rows: _Rows, at: np.ndarray, error: TotalError) -> tuple[np.ndarray, np.ndarray]:
    """Return the ratios of a cutoff's segments to the whole cutoff, and the variance of these by independent users."""
    spend, expected = rows.spend[at], rows.expected[at]
    if not (spend.sum() > 0 and expected.sum() > 0):
        return np.zeros(0), np.zeros(0)
    group = quantile_bins(expected, _SEGMENTS, 1)
    sums = np.bincount(group, expected)
    usable = sums > 0
    sums = sums[usable]
    ratio = np.bincount(group, spend)[usable] / sums / (spend.sum() / expected.sum())
    independent = np.bincount(group, error.variance(expected))[usable] / sums**2
    # of a segment and of the rest, whose errors are of opposite sign
    return ratio, independent * (1 - sums / expected.sum())


def _common_sd(rows: _Rows, level_sd: float, horizons: float) -> float:
    logs = []
    for cutoff in np.unique(rows.cutoffs):
        at = rows.cutoffs == cutoff
        spent, expected = float(rows.spend[at].sum()), float(rows.expected[at].sum())
        if spent > 0 and expected > 0:
            logs.append(math.log(spent / expected))
    squares = horizons * float(np.mean(np.square(logs))) if logs else 0.0
    return math.sqrt((squares + _PRIOR_WEIGHT * level_sd**2) / ((horizons if logs else 0.0) + _PRIOR_WEIGHT))


def _independent(cutoffs: np.ndarray, days: int) -> float:
    """Return how many horizons that don't overlap the cutoffs are worth, beyond the one that predictions are calibrated on."""
    if not len(cutoffs):
        return 0.0
    return float((cutoffs.max() - cutoffs.min()) / np.timedelta64(1, "D")) / days


def interval(
    expected: float, variance: float, error: TotalError, coverage: float, *, everyone: bool = False
) -> tuple[float, float]:
    """Return the ends of the interval of a group's spend.

    The lower end is 0 where the standard deviation of independent users exceeds the expected spend: so few may all stay away.

    Args:
        expected: sum of the expected spend.
        variance: sum of :meth:`TotalError.variance` over the users.
        error: of the horizon.
        coverage: :attr:`Totals.coverage`.
        everyone: whether the group is the whole platform, without an error of its segment.
    """
    if expected <= 0:
        return 0.0, 0.0
    own = 0.0 if everyone else error.segment_sd**2
    independent = variance / expected**2
    squared = math.log1p(independent) + error.common_sd**2 + own
    middle, half = math.log(expected) - squared / 2, error.quantile(coverage) * math.sqrt(squared)
    low = math.exp(middle - half) if independent < 1 else 0.0
    return low, math.exp(middle + half)
