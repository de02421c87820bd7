"""The error of sums: how far what a group of users spends together may lie from what is expected of them together.

Users' errors aren't independent. A season, a trend or a campaign moves all users alike, and a part of it moves the users of one
segment alike. So the error of a sum doesn't vanish as the group grows. The logarithm of a group's spend over its expected spend
has the variance::

    common_sd² + segment_sd² + sum(dispersion * expected^power) / sum(expected)²

The last term is that of independent users: their variance is a power of their mean (Tweedie 1984; Jørgensen 1997, "The theory
of dispersion models"). All is learned from out-of-fold predictions at past cutoffs. A group's spend is taken to be log-normal,
with the expected spend as its mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy.stats import norm

from bp_spark.core.errors import BundleError
from bp_spark.features.labels import horizon_column
from bp_spark.model.bins import equivalent_rows, quantile_bins
from bp_spark.model.horizons import LABEL
from bp_spark.model.members.base import read_json, write_json
from bp_spark.model.values import number, whole

FILE = "totals.json"
"""File of a bundle that knows the error of sums."""
FEW_HORIZONS = 3.0
"""Below so many horizons that don't overlap, the common error is mostly an assumption."""

_BINS, _BIN_ROWS = 20, 200
_SEGMENTS = 5
"""Groups of like expected spend whose errors are compared: as many as there are levels."""
_LEAST_POWER, _POWER, _LARGEST_POWER = 1.0, 1.5, 2.0
"""Powers of Tweedie's distributions with a mass at 0, and the one that is taken where the data can't tell."""
_PRIOR_WEIGHT = 2.0
"""Weight of the main horizon's common error in that of another one, in independent horizons."""
_LEAST_SD = 0.05
"""Added to the error of a segment's ratio, so that no segment alone decides ``segment_sd``."""
_LARGEST = 1e15
_LARGEST_SD = 10.0


@dataclass(frozen=True)
class TotalError:
    """Error of sums over one horizon.

    Attributes:
        days: of the horizon.
        common_sd: standard deviation of the log spend that all users share.
        segment_sd: that which users of one segment share beside it.
        dispersion: variance of a user whose expected spend is 1.
        power: by which the variance grows with the expected spend, 1 to 2.
        horizons: how many horizons that don't overlap ``common_sd`` was measured on.
    """

    days: int
    common_sd: float
    segment_sd: float
    dispersion: float
    power: float
    horizons: float

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
            number(document["power"], _LEAST_POWER, _LARGEST_POWER),
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

    @property
    def z(self) -> float:
        """Standard deviations of the log spend from the middle of the interval to its ends."""
        return float(norm.ppf((1 + self.coverage) / 2))

    @classmethod
    def fit(
        cls,
        frame: pd.DataFrame,
        expected: Mapping[int, np.ndarray],
        row_weights: np.ndarray,
        *,
        main: int,
        level_sd: float,
        coverage: float,
    ) -> Self:
        """Fit on out-of-fold predictions.

        1. *Independent users*: squared errors are averaged in up to 20 bins of the expected spend, and the power is the slope
           of their logarithms. The dispersion makes all predicted variances together as large as the squared errors.
        2. *Segments*: fifths of the expected spend at each cutoff stand for segments. ``segment_sd²`` is what the squares of
           their ratios, spent over expected and over the same of the whole cutoff, exceed the variance of independent users by.
        3. *Common error*: that of the main horizon is the level's (:class:`bp_spark.model.level.Level`), learned from past
           weeks. For another horizon the ratios of whole cutoffs are averaged with it. It weighs as much as two horizons that
           don't overlap.

        Args:
            frame: ``as_of_date``, ``label_spend``, and ``label_spend_30d`` for a horizon of 30 days (NaN where unknown).
            expected: days -> expected spend without the level's factor, float64 [rows].
            row_weights: float64 [rows].
            main: days of the main horizon.
            level_sd: standard deviation of the log level of everyone's spend.
            coverage: share of sums that shall lie in their interval.
        """
        cutoffs = pd.to_datetime(frame["as_of_date"]).to_numpy()
        errors = []
        for days in sorted(expected):
            label = frame[LABEL if days == main else horizon_column(LABEL, days)].to_numpy(np.float64)
            known = ~np.isnan(label)
            rows = _Rows(np.maximum(label[known], 0.0), expected[days][known], row_weights[known], cutoffs[known])
            dispersion, power = _variance_of_users(rows)
            segment_sd = _segment_sd(rows, dispersion, power)
            horizons = _independent(rows.cutoffs, days)
            common_sd = level_sd if days == main else _common_sd(rows, level_sd, horizons)
            errors.append(TotalError(days, common_sd, segment_sd, dispersion, power, horizons))
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
        try:
            if set(document) != {"coverage", "errors"}:
                raise ValueError("not the keys of totals")
            errors = tuple(map(TotalError.from_json, document["errors"]))
            return cls(number(document["coverage"], 0.01, 0.999), errors)
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{path}: malformed ({error!r})") from None


@dataclass(frozen=True)
class _Rows:
    """Users at past cutoffs, an array of rows each."""

    spend: np.ndarray
    expected: np.ndarray
    weights: np.ndarray
    cutoffs: np.ndarray


def _variance_of_users(rows: _Rows) -> tuple[float, float]:
    """Return dispersion and power of the variance of independent users."""
    squares = (rows.spend - rows.expected) ** 2
    bins = quantile_bins(rows.expected, _BINS, equivalent_rows(_BIN_ROWS, rows.weights))
    weight = np.bincount(bins, rows.weights)
    mean = np.bincount(bins, rows.weights * rows.expected) / weight
    variance = np.bincount(bins, rows.weights * squares) / weight
    usable = (mean > 0) & (variance > 0)
    power = _POWER
    if usable.sum() > 1:
        slope = np.polyfit(np.log(mean[usable]), np.log(variance[usable]), 1, w=np.sqrt(weight[usable]))[0]
        power = float(np.clip(slope, _LEAST_POWER, _LARGEST_POWER))
    predicted = float(rows.weights @ rows.expected**power)
    return (float(rows.weights @ squares) / predicted if predicted > 0 else 0.0), power


def _segment_sd(rows: _Rows, dispersion: float, power: float) -> float:
    excess, weights = [], []
    for cutoff in np.unique(rows.cutoffs):
        at = rows.cutoffs == cutoff
        spend, expected = rows.spend[at], rows.expected[at]
        if not (spend.sum() > 0 and expected.sum() > 0):
            continue
        group = quantile_bins(expected, _SEGMENTS, 1)
        sums = np.bincount(group, expected)
        usable = sums > 0
        ratio = np.bincount(group, spend)[usable] / sums[usable] / (spend.sum() / expected.sum())
        independent = dispersion * np.bincount(group, expected**power)[usable] / sums[usable] ** 2
        # of a group and of the rest, whose errors are of opposite sign
        independent *= 1 - sums[usable] / sums.sum()
        excess.append((ratio - 1) ** 2 - independent)
        weights.append(rows.weights[at][0] / (independent + _LEAST_SD**2) ** 2)
    if not excess:
        return 0.0
    return math.sqrt(max(0.0, float(np.average(np.concatenate(excess), weights=np.concatenate(weights)))))


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
    """Return how many horizons that don't overlap the cutoffs are worth."""
    if not len(cutoffs):
        return 0.0
    return 1.0 + float((cutoffs.max() - cutoffs.min()) / np.timedelta64(1, "D")) / days


def interval(
    expected: float, variance: float, error: TotalError, z: float, *, everyone: bool = False
) -> tuple[float, float]:
    """Return the ends of the interval of a group's spend.

    Args:
        expected: sum of the expected spend.
        variance: sum of ``dispersion * expected^power`` over the users.
        error: of the horizon.
        z: :attr:`Totals.z`.
        everyone: whether the group is the whole platform, without an error of its segment.
    """
    if expected <= 0:
        return 0.0, 0.0
    own = 0.0 if everyone else error.segment_sd**2
    squared = math.log1p(variance / expected**2) + error.common_sd**2 + own
    middle, sd = math.log(expected) - squared / 2, math.sqrt(squared)
    return math.exp(middle - z * sd), math.exp(middle + z * sd)
