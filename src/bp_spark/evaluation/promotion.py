"""Decide whether a new bundle may score, by comparing its predictions with the baselines and the promoted bundle.

A bundle is promoted if it ranks users no worse than the baselines and is not inferior to the promoted bundle. Not inferior
means that the interval of the paired difference (see :mod:`bp_spark.evaluation.bootstrap`) reaches above a margin below 0. On
a platform of a million users every difference is certain: without the margin, one in the fourth digit would refuse a bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bp_spark.evaluation import bootstrap
from bp_spark.evaluation.metrics import TITLES, format_figure, mae, normalised_gini

BASELINES = ("linear", "btyd")
"""Members that no bundle may fall below in the normalised Gini at the test date."""


@dataclass(frozen=True)
class Decision:
    """Whether a bundle is promoted, and why, in words."""

    promoted: bool
    reason: str


@dataclass(frozen=True)
class _Measure:
    plain: Callable[[np.ndarray, np.ndarray], float]
    resampled: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


# one measure of order and one of money: scores are used for both
_MEASURES = {
    "gini": _Measure(normalised_gini, bootstrap.normalised_gini),
    "mae": _Measure(mae, bootstrap.mae),
}


def against_baselines(frame: pd.DataFrame) -> Decision:
    """Promote unless ``fused`` ranks users worse than a baseline.

    Args:
        frame: a row per user: ``label_spend``, ``fused`` and :data:`BASELINES`, expected spend each.
    """
    truth = _truth(frame)
    gini = {name: normalised_gini(truth, frame[name].to_numpy(np.float64)) for name in ("fused", *BASELINES)}
    # a Gini that is NaN refuses no bundle
    better_baselines = [name for name in BASELINES if gini[name] > gini["fused"]]
    figures = ", ".join(f"{name} {format_figure('gini', gini[name])}" for name in (better_baselines or BASELINES))
    verb = "below" if better_baselines else "no worse than"
    reason = f"normalised Gini {format_figure('gini', gini['fused'])}, {verb} {figures}"
    return Decision(not better_baselines, reason)


def against_incumbent(frame: pd.DataFrame, incumbent: str, *, margin: float, resamples: int, seed: int) -> Decision:
    """Promote unless ``fused`` is surely worse than ``incumbent`` by more than a margin (a test of non-inferiority).

    Both are compared in normalised Gini and in mean absolute error.

    Args:
        frame: a row per user: ``label_spend``, ``fused`` and ``incumbent``, expected spend each, of the same users.
        incumbent: name of the promoted bundle, for the reason.
        margin: largest loss, as a share of the promoted bundle's figure.
        resamples: number of resamples; both bundles share the same draws.
        seed: seed of the draws.
    """
    truth = _truth(frame)
    new, old = (frame[name].to_numpy(np.float64) for name in ("fused", "incumbent"))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in _MEASURES}
    for counts in bootstrap.draws(len(frame), resamples, seed):
        for name, measure in _MEASURES.items():
            parts[name].append(measure.resampled(counts, truth, new) - measure.resampled(counts, truth, old))
    comparisons: list[str] = []
    worse = better = surely_lower = False
    for name, measure in _MEASURES.items():
        differences = bootstrap.BETTER[name] * np.concatenate(parts[name])
        low, high = bootstrap.interval(differences)
        values = [measure.plain(truth, predicted) for predicted in (new, old)]
        worse = worse or high < -margin * values[1]
        better = better or low > 0
        surely_lower = surely_lower or high < 0
        figures = " against ".join(format_figure(name, value) for value in values)
        share = bootstrap.share_above(differences)
        certainty = "the same" if np.isnan(share) else f"better in {share:.0%} of {resamples} resamples"
        comparisons.append(f"{TITLES[name].rstrip(' ↑↓')} {figures} ({certainty})")
    verdict = "not distinguishable from"
    if worse:
        verdict = "worse than"
    elif better:
        verdict = "better than"
    elif surely_lower:
        verdict = f"not surely worse by {margin:.1%} than"
    return Decision(not worse, f"{verdict} {incumbent} on {len(frame):,} users: {', '.join(comparisons)}")


def _truth(frame: pd.DataFrame) -> np.ndarray:
    return np.asarray(np.maximum(frame["label_spend"].to_numpy(np.float64), 0.0))
