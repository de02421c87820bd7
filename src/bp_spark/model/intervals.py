"""Prediction intervals of spend by split conformal prediction, in groups of like expected spend.

Vovk et al. 2005, signed residuals in log1p space, Mondrian by fifths of the expected spend, each tail by itself (Romano et
al. 2019). Rows may have weights: where they fade with age, the coverage holds under slow change (Barber et al. 2023,
"Conformal prediction beyond exchangeability").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from bp_spark.model.bins import equivalent_rows, quantile_edges

_GROUPS = 5
_SHOCKS = np.array([NormalDist().inv_cdf((step + 0.5) / 9) for step in range(9)])
"""Standard normal numbers of equal probability: what may happen to the spend of all users at once."""


@dataclass(frozen=True)
class Intervals:
    """Residual quantiles of each group, in log1p space.

    Attributes:
        edges: borders between the groups, log1p of the expected spend.
        lower: lower residual quantile of each group; one more than ``edges``.
        upper: upper residual quantile of each group.
    """

    edges: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]

    def around(self, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return both ends in money, float64 [rows] each, around log1p of the expected spend; the lower one is not negative."""
        group = np.searchsorted(np.asarray(self.edges), logs, side="right")
        low = np.maximum(np.expm1(logs + np.asarray(self.lower)[group]), 0.0)
        return low, np.expm1(logs + np.asarray(self.upper)[group])


def rows_needed(coverage: float) -> int:
    """Return the fewest rows that an interval of that coverage can be fitted on."""
    return math.ceil(2 / (1 - coverage) - 1e-9)


def fit_intervals(
    expected: np.ndarray, spend: np.ndarray, weights: np.ndarray, coverage: float, level_sd: float
) -> Intervals:
    """Fit the residual quantiles of each group.

    Rows of one date share what happened to all users at once, and the next date has its own. So each row stands for nine,
    whose spend is moved by equally likely shocks of the level.

    Args:
        expected: log1p of the calibrated expected spend, float64 [rows].
        spend: money, float64 [rows].
        weights: of the rows, float64 [rows]; the newest have 1.
        coverage: share of users whose spend lies in the interval.
        level_sd: standard deviation of the log level of everyone's spend; see :class:`bp_spark.model.level.Level`.
    """
    edges = quantile_edges(expected, _GROUPS, equivalent_rows(rows_needed(coverage), weights))
    shocks = np.exp(level_sd * _SHOCKS) if level_sd > 0 else np.ones(1)
    residuals = np.log1p(np.outer(spend, shocks)) - expected[:, None]
    shares = np.repeat(weights[:, None] / len(shocks), len(shocks), axis=1)
    group = np.searchsorted(edges, expected, side="right")
    masks = [group == number for number in range(len(edges) + 1)]
    alpha = (1 - coverage) / 2
    tails = [_tails(residuals[inside].ravel(), shares[inside].ravel(), alpha) for inside in masks]
    return Intervals(
        edges=tuple(edges.tolist()), lower=tuple(low for low, _ in tails), upper=tuple(high for _, high in tails)
    )


def _tails(residuals: np.ndarray, weights: np.ndarray, alpha: float) -> tuple[float, float]:
    """Return the residuals that a new one, of weight 1, falls below and above with probability ``alpha`` at most.

    This holds as far as the weights are right.
    """
    order = np.argsort(residuals, kind="stable")
    ordered, last = residuals[order], len(residuals) - 1

    def position(ordered_weights: np.ndarray) -> int:
        """Return the first position, from the inner end, beyond which lies no more than ``alpha``."""
        needed = (ordered_weights.sum() + 1) * (1 - alpha) - 1e-9
        return min(last, int(np.searchsorted(np.cumsum(ordered_weights), needed)))

    ordered_weights = weights[order]
    return float(ordered[last - position(ordered_weights[::-1])]), float(ordered[position(ordered_weights)])
