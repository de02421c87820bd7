"""Whether a new bundle may score: its predictions beside the baselines' and the promoted bundle's in, a decision in words out.

A bundle is promoted if it ranks users no worse than the baselines and is not inferior to the promoted one: the interval of the
paired difference (see :mod:`bp_spark.evaluation.bootstrap`) reaches above a margin below 0. Without the margin a
platform of a million users, where every difference is certain, would refuse a bundle for one in the fourth digit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bp_spark.evaluation import bootstrap
from bp_spark.evaluation.metrics import TITLES, format_figure, mae, normalised_gini

BASELINES = ("linear", "btyd")
"""Members that every bundle has to outdo in its normalised Gini at the test date."""


@dataclass(frozen=True)
class Decision:
    """Whether a bundle is promoted, and why, in words."""

    promoted: bool
    reason: str


@dataclass(frozen=True)
class _Measure:
    plain: Callable[[np.ndarray, np.ndarray], float]
    resampled: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


# one measure of order and one of money: a score is used as both
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
    # a Gini that the data can't tell holds nobody back
    above = [name for name in BASELINES if gini[name] > gini["fused"]]
    said = ", ".join(f"{name} {format_figure('gini', gini[name])}" for name in (above or BASELINES))
    verb = "below" if above else "no worse than"
    return Decision(not above, f"normalised Gini {format_figure('gini', gini['fused'])}, {verb} {said}")


def against_incumbent(frame: pd.DataFrame, incumbent: str, *, margin: float, resamples: int, seed: int) -> Decision:
    """Promote unless ``fused`` is surely worse than ``incumbent`` by more than a margin, in normalised Gini or in mean absolute
    error (a test of non-inferiority).

    Args:
        frame: a row per user: ``label_spend``, ``fused`` and ``incumbent``, expected spend each, of the same users.
        incumbent: name of the promoted bundle, for the reason.
        margin: as a share of the promoted bundle's figure.
        resamples: how often users are drawn anew; both bundles meet the same draws.
        seed: of the draws.
    """
    truth = _truth(frame)
    new, old = (frame[name].to_numpy(np.float64) for name in ("fused", "incumbent"))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in _MEASURES}
    for counts in bootstrap.draws(len(frame), resamples, seed):
        for name, measure in _MEASURES.items():
            parts[name].append(measure.resampled(counts, truth, new) - measure.resampled(counts, truth, old))
    said: list[str] = []
    worse = better = told_apart = False
    for name, measure in _MEASURES.items():
        differences = bootstrap.BETTER[name] * np.concatenate(parts[name])
        low, high = bootstrap.interval(differences)
        values = [measure.plain(truth, said_by) for said_by in (new, old)]
        worse = worse or high < -margin * values[1]
        better = better or low > 0
        told_apart = told_apart or high < 0
        figures = " against ".join(format_figure(name, value) for value in values)
        share = bootstrap.share_above(differences)
        told = "the same" if np.isnan(share) else f"better in {share:.0%} of {resamples} resamples"
        said.append(f"{TITLES[name].rstrip(' ↑↓')} {figures} ({told})")
    verdict = "not distinguishable from"
    if worse:
        verdict = "worse than"
    elif better:
        verdict = "better than"
    elif told_apart:
        verdict = f"not surely worse by {margin:.1%} than"
    return Decision(not worse, f"{verdict} {incumbent} on {len(frame):,} users: {', '.join(said)}")


def _truth(frame: pd.DataFrame) -> np.ndarray:
    return np.maximum(frame["label_spend"].to_numpy(np.float64), 0.0)
