"""Spend over other horizons than the main one, in line with it: expected spend of the main horizon in, of each horizon out.

The main horizon has every member, a stack and a calibration. Another one is told as a share of it, or a multiple: the ratio
that the network sees, calibrated on users it has not seen. Without a network the ratio depends on the expected spend alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import pandas as pd
from sklearn.isotonic import isotonic_regression

from bp_spark.core.errors import BundleError
from bp_spark.features.labels import of_days
from bp_spark.model.curve import Curve, as_json, curve_from_json
from bp_spark.model.stack import groups

LABEL = "label_spend"
NETWORK = "transformer"
"""The member that tells of other horizons."""
EXPECTED = "expected_spend"
MIN_ROWS = 100
"""Rows that must have seen a horizon whole for a ratio to be told."""

_BINS, _BIN_ROWS = 10, 200
_CENT = 0.01


@dataclass(frozen=True)
class Ratio:
    """Spend over ``days``, by spend over the main horizon.

    ``curve`` maps to it the network's own ratio (``by`` is :data:`NETWORK`) or log1p of the expected spend (:data:`EXPECTED`).
    """

    days: int
    by: str
    curve: Curve


@dataclass(frozen=True)
class Horizons:
    """Ratios to the main horizon of ``main`` days. Frozen; see :meth:`fit`."""

    main: int
    ratios: tuple[Ratio, ...]

    @property
    def days(self) -> tuple[int, ...]:
        """All horizons that are told, the shortest first."""
        return tuple(sorted([self.main, *self.others]))

    @property
    def others(self) -> tuple[int, ...]:
        """Those beside the main one."""
        return tuple(ratio.days for ratio in self.ratios)

    @classmethod
    def fit(cls, frame: pd.DataFrame, expected: np.ndarray, main: int, others: Sequence[int]) -> Self:
        """Learn the ratios from out-of-fold predictions.

        Users are put into up to 10 bins, at least 200 in each, by the network's ratio of the two horizons. The ratio of a bin
        is that of its sums of spend, with one more user who is like all together; made monotone (pool adjacent violators,
        weighed by main spend), a knot per pooled block, straight lines between and constant beyond. So what is said sums to
        what was spent, a user whose spend the network expects sooner has more of it soon, and where the network's ratio tells
        nothing, one block, the same ratio for all, is left.

        Without a network bins are of the expected spend, and nothing is made monotone: light users may come back sooner or
        later than heavy ones.

        Args:
            frame: ``label_spend``, ``label_spend_30d`` (NaN where not known) and, where there is a network, ``transformer`` and
                ``transformer_30d`` (so for each of ``others``).
            expected: calibrated spend over the main horizon, ``float64[rows]``.
            main: days of the main horizon.
            others: days of the others; one that fewer than :data:`MIN_ROWS` rows have seen whole is left out.
        """
        columns = {str(name): frame[name].to_numpy() for name in frame}
        ratios = []
        for days in sorted(others):
            known = ~np.isnan(columns[of_days(LABEL, days)])
            if known.sum() < MIN_ROWS:
                continue
            spend, whole = (np.maximum(columns[name][known], 0.0) for name in (of_days(LABEL, days), LABEL))
            by = NETWORK if of_days(NETWORK, days) in columns else EXPECTED
            x = _place(by, days, main, expected, columns)[known]
            ratios.append(Ratio(days, by, _fit_ratio(x, spend, whole, days / main, rising=by == NETWORK)))
        return cls(main, tuple(ratios))

    def apply(self, expected: np.ndarray, predictions: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
        """Expected spend over each of :attr:`days`, the shortest first, ``float64[rows]``.

        The main horizon has ``expected`` itself. Rising with the days: a longer horizon has no less than a shorter one between
        it and the main one.

        Args:
            expected: calibrated spend over the main horizon.
            predictions: of members; see :func:`bp_spark.model.members.base.predict_all`.

        Raises:
            BundleError: predictions of the network are missing.
        """
        said = {self.main: expected}
        for ratio in self.ratios:
            said[ratio.days] = expected * ratio.curve(_place(ratio.by, ratio.days, self.main, expected, predictions))
        shorter = [days for days in reversed(self.days) if days < self.main]
        longer = [days for days in self.days if days > self.main]
        for chain, border in ((shorter, np.minimum), (longer, np.maximum)):
            nearer = expected
            for days in chain:
                said[days] = nearer = border(said[days], nearer)
        return {days: said[days] for days in self.days}

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file; floats come back bit for bit."""
        return as_json(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """What :meth:`to_json` gave.

        Raises:
            BundleError: a key is missing or unknown, or a value has the wrong type or order.
        """
        try:
            if set(document) != {field.name for field in fields(cls)}:
                raise ValueError("not the keys of horizons")
            horizons = cls(int(document["main"]), tuple(map(_ratio, document["ratios"])))
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"horizons: malformed ({error!r})") from None
        if len(set(horizons.days)) < len(horizons.days):
            raise BundleError("horizons: one is there twice")
        return horizons


def _ratio(document: Mapping[str, Any]) -> Ratio:
    if set(document) != {field.name for field in fields(Ratio)} or document["by"] not in (NETWORK, EXPECTED):
        raise ValueError("not a ratio")
    return Ratio(int(document["days"]), str(document["by"]), curve_from_json(document["curve"]))


def _place(by: str, days: int, main: int, expected: np.ndarray, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
    """Where users stand on the curve of a ratio, ``float64[rows]``."""
    if by == EXPECTED:
        return np.log1p(expected)
    for name in (NETWORK, of_days(NETWORK, days)):
        if name not in predictions:
            raise BundleError(f"horizons: no predictions {name!r}")
    whole = np.asarray(predictions[NETWORK], np.float64)
    spend = np.asarray(predictions[of_days(NETWORK, days)], np.float64)
    # of less than a cent any share will do
    return np.divide(spend, whole, out=np.full(len(whole), days / main), where=whole > _CENT)


def _fit_ratio(x: np.ndarray, spend: np.ndarray, whole: np.ndarray, otherwise: float, *, rising: bool) -> Curve:
    """Knots of spend by whole spend over ``x``; see :meth:`Horizons.fit`. ``otherwise``: the ratio where nobody spends."""
    overall = spend.sum() / whole.sum() if whole.sum() > 0 else otherwise
    group = groups(x, _BINS, _BIN_ROWS)
    rows = np.bincount(group)
    alike = max(whole.mean(), _CENT)
    weight = np.bincount(group, whole) + alike
    y = (np.bincount(group, spend) + overall * alike) / weight
    block = np.arange(len(rows))
    if rising:
        y = isotonic_regression(y, sample_weight=weight)
        block = np.unique(y, return_inverse=True)[1]
    knots_x = np.bincount(block, np.bincount(group, x)) / np.bincount(block, rows)
    knots_y = np.bincount(block, y) / np.bincount(block)
    return Curve(tuple(knots_x.tolist()), tuple(knots_y.tolist()))
