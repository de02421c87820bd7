"""Spend over other horizons than the main one: expected spend of the main horizon in, of each horizon out.

The main horizon has every member, a stack and a calibration. The spend of another horizon is a multiple of it: the ratio that
the network predicts, calibrated on users that the network wasn't fitted on. Without a network the ratio depends on the expected
spend alone. A season moves each horizon by a factor of its own: the next month may be November, and the next half year not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date
from typing import Any, Self, TypeVar

import numpy as np
import pandas as pd
from sklearn.isotonic import isotonic_regression

from bp_spark.core.errors import BundleError
from bp_spark.features.labels import horizon_column
from bp_spark.model.bins import quantile_bins
from bp_spark.model.curve import Curve, as_json, curve_from_json
from bp_spark.model.level import Level
from bp_spark.model.values import well_formed, whole

LABEL = "label_spend"
NETWORK = "transformer"
"""The member that predicts other horizons."""
EXPECTED = "expected_spend"
MIN_ROWS = 100
"""Rows with a complete horizon that a ratio needs at least."""

Values = TypeVar("Values")
"""Arrays, or columns of Spark."""

_BINS, _BIN_ROWS = 10, 200
_CENT = 0.01
_LONGEST = 100 * 366
"""Most days of a horizon."""


@dataclass(frozen=True)
class Ratio:
    """Spend over ``days``, by spend over the main horizon.

    Attributes:
        days: of the horizon.
        by: the curve's variable: the network's own ratio (:data:`NETWORK`) or log1p of the expected spend (:data:`EXPECTED`).
        curve: that variable -> the ratio.
    """

    days: int
    by: str
    curve: Curve


@dataclass(frozen=True)
class Horizons:
    """Ratios to the main horizon. Frozen; see :meth:`fit`.

    Attributes:
        main: days of the main horizon.
        ratios: of the other horizons.
        levels: days -> factor of everyone's spend over that horizon by date. Without an entry the main horizon's holds.
    """

    main: int
    ratios: tuple[Ratio, ...]
    levels: Mapping[int, Level] = field(default_factory=dict)

    @property
    def days(self) -> tuple[int, ...]:
        """All horizons that are predicted, the shortest first."""
        return tuple(sorted([self.main, *self.others]))

    @property
    def others(self) -> tuple[int, ...]:
        """All horizons but the main one."""
        return tuple(ratio.days for ratio in self.ratios)

    @classmethod
    def fit(cls, frame: pd.DataFrame, expected: np.ndarray, main: int, others: Sequence[int]) -> Self:
        """Fit the ratios on out-of-fold predictions.

        Users are put into up to 10 bins, of at least 200 users each, by the network's ratio of the two horizons. A bin's ratio
        is that of its sums of spend, with one more user who is like the mean of all. Ratios are made monotone (pool adjacent
        violators, weighted by main spend). Each pooled block has one knot, with straight lines between knots and constants
        beyond. So predictions sum to the actual spend, and a user whose spend the network expects sooner gets more of it soon.
        Where the network's ratio predicts nothing, one block is left: the same ratio for all.

        Without a network, bins are of the expected spend, and nothing is made monotone: light users may come back sooner or
        later than heavy ones.

        Args:
            frame: ``label_spend``, ``label_spend_30d`` (NaN where unknown) and, where there is a network, ``transformer`` and
                ``transformer_30d`` (so for each of ``others``).
            expected: calibrated spend over the main horizon, ``float64[rows]``.
            main: days of the main horizon.
            others: days of the others; one with fewer than :data:`MIN_ROWS` complete rows is left out.
        """
        columns = {str(name): frame[name].to_numpy() for name in frame}
        ratios = []
        for days in sorted(others):
            complete = ~np.isnan(columns[horizon_column(LABEL, days)])
            if complete.sum() < MIN_ROWS:
                continue
            spend, main_spend = (
                np.maximum(columns[name][complete], 0.0) for name in (horizon_column(LABEL, days), LABEL)
            )
            by = NETWORK if horizon_column(NETWORK, days) in columns else EXPECTED
            x = _curve_variable(by, days, main, expected, columns)[complete]
            ratios.append(Ratio(days, by, _fit_ratio(x, spend, main_spend, days / main, rising=by == NETWORK)))
        return cls(main, tuple(ratios))

    def apply(self, expected: np.ndarray, predictions: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
        """Return the expected spend over each of :attr:`days`, the shortest first, ``float64[rows]``.

        The main horizon gets ``expected`` itself. Spend doesn't fall with the days: on either side of the main horizon, a
        longer horizon has no less than a shorter one.

        Args:
            expected: calibrated spend over the main horizon.
            predictions: of members; see :func:`bp_spark.model.members.base.predict_all`.

        Raises:
            BundleError: predictions of the network are missing.
        """
        by_days = {self.main: expected}
        for ratio in self.ratios:
            x = _curve_variable(ratio.by, ratio.days, self.main, expected, predictions)
            by_days[ratio.days] = expected * ratio.curve(x)
        return not_falling(by_days, self.main, np.minimum, np.maximum)

    def factors(self, main: float, on: date | None = None) -> dict[int, float]:
        """Return days -> factor of everyone's spend over each of :attr:`days`.

        Args:
            main: that of the main horizon.
            on: the date from which the spend counts; by default that of the fit.
        """
        return {days: self.levels[days].factor(on) if days in self.levels else main for days in self.days}

    def apply_level(
        self, by_days: Mapping[int, np.ndarray], main: float, on: date | None = None
    ) -> dict[int, np.ndarray]:
        """Multiply what :meth:`apply` returned by :meth:`factors`; spend still doesn't fall with the days."""
        factors = self.factors(main, on)
        scaled = {days: spend * factors[days] for days, spend in by_days.items()}
        return not_falling(scaled, self.main, np.minimum, np.maximum)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a JSON file; floats come back bit for bit."""
        document = {"main": self.main, "ratios": [as_json(ratio) for ratio in self.ratios]}
        # bundles without levels have the manifest that they had before there were any
        return document | (
            {"levels": {str(days): one.to_json() for days, one in self.levels.items()}} if self.levels else {}
        )

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Return the horizons that :meth:`to_json` wrote.

        Raises:
            BundleError: a key is missing or unknown, or a value has the wrong type or order.
        """
        with well_formed("horizons"):
            if set(document) - {"levels"} != {"main", "ratios"}:
                raise ValueError("not the keys of horizons")
            levels = {int(days): Level.from_json(level) for days, level in document.get("levels", {}).items()}
            horizons = cls(whole(document["main"], 1, _LONGEST), tuple(map(_ratio, document["ratios"])), levels)
        if len(set(horizons.days)) < len(horizons.days):
            raise BundleError("horizons: one is there twice")
        if not set(levels) <= set(horizons.others):
            raise BundleError("horizons: a level is of none of them")
        return horizons


def not_falling(
    by_days: Mapping[int, Values],
    main: int,
    least: Callable[[Values, Values], Values],
    greatest: Callable[[Values, Values], Values],
) -> dict[int, Values]:
    """Bound the spend of each horizon by that of its neighbour on the side of the main one, the shortest first.

    Args:
        by_days: days of the horizon -> spend.
        main: days of the main horizon, whose spend stays.
        least: returns the smaller of two spends, row by row.
        greatest: returns the larger.
    """
    bounded = dict(sorted(by_days.items()))
    shorter = [days for days in reversed(list(bounded)) if days < main]
    longer = [days for days in bounded if days > main]
    for chain, bound in ((shorter, least), (longer, greatest)):
        nearer = bounded[main]
        for days in chain:
            bounded[days] = nearer = bound(bounded[days], nearer)
    return bounded


def label_column(days: int, main: int) -> str:
    """Return the name of the column with the spend over a horizon; that of the main one names no days."""
    return LABEL if days == main else horizon_column(LABEL, days)


def _ratio(document: Mapping[str, Any]) -> Ratio:
    if set(document) != {one.name for one in fields(Ratio)} or document["by"] not in (NETWORK, EXPECTED):
        raise ValueError("not a ratio")
    curve = curve_from_json(document["curve"], least=0.0)
    return Ratio(whole(document["days"], 1, _LONGEST), str(document["by"]), curve)


def _curve_variable(
    by: str, days: int, main: int, expected: np.ndarray, predictions: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Return the variable of a ratio's curve for each user, ``float64[rows]``."""
    if by == EXPECTED:
        return np.asarray(np.log1p(expected))
    for name in (NETWORK, horizon_column(NETWORK, days)):
        if name not in predictions:
            raise BundleError(f"horizons: no predictions {name!r}")
    main_spend = np.asarray(predictions[NETWORK], np.float64)
    spend = np.asarray(predictions[horizon_column(NETWORK, days)], np.float64)
    # Below a cent of main spend any ratio will do.
    otherwise = np.full(len(main_spend), days / main)
    return np.asarray(np.divide(spend, main_spend, out=otherwise, where=main_spend > _CENT))


def _fit_ratio(x: np.ndarray, spend: np.ndarray, main_spend: np.ndarray, otherwise: float, *, rising: bool) -> Curve:
    """Fit the knots of a ratio; see :meth:`Horizons.fit`.

    Args:
        x: the curve's variable, float64 [rows].
        spend: over the horizon, float64 [rows].
        main_spend: over the main horizon, float64 [rows].
        otherwise: the ratio where nobody spends.
        rising: whether the curve must not fall.
    """
    overall = spend.sum() / main_spend.sum() if main_spend.sum() > 0 else otherwise
    group = quantile_bins(x, _BINS, _BIN_ROWS)
    rows = np.bincount(group)
    mean_spend = max(main_spend.mean(), _CENT)
    weight = np.bincount(group, main_spend) + mean_spend
    y = (np.bincount(group, spend) + overall * mean_spend) / weight
    block = np.arange(len(rows))
    if rising:
        y = isotonic_regression(y, sample_weight=weight)
        block = np.unique(y, return_inverse=True)[1]
    knots_x = np.bincount(block, np.bincount(group, x)) / np.bincount(block, rows)
    knots_y = np.bincount(block, y) / np.bincount(block)
    return Curve(tuple(knots_x.tolist()), tuple(knots_y.tolist()))
