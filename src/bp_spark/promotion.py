"""Whether a new bundle may score: its predictions beside the baselines' and the promoted bundle's in, a decision in words out.

A bundle is promoted if it ranks users no worse than the baselines and is better than the promoted one, or can't be told
from it. Can't be told: the interval of the paired difference (see :mod:`bp_spark.bootstrap`) holds 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bp_spark import bootstrap
from bp_spark.evaluation import TITLES, format_figure, mae, normalised_gini

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


def against_incumbent(frame: pd.DataFrame, incumbent: str, *, resamples: int, seed: int) -> Decision:
    """Promote unless ``fused`` is surely worse than ``incumbent``, by normalised Gini or by mean absolute error.

    Args:
        frame: a row per user: ``label_spend``, ``fused`` and ``incumbent``, expected spend each, of the same users.
        incumbent: name of the promoted bundle, for the reason.
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
    worse: list[str] = []
    better: list[str] = []
    for name, measure in _MEASURES.items():
        differences = bootstrap.BETTER[name] * np.concatenate(parts[name])
        low, high = bootstrap.interval(differences)
        if high < 0:
            worse.append(name)
        if low > 0:
            better.append(name)
        figures = " against ".join(format_figure(name, measure.plain(truth, values)) for values in (new, old))
        share = bootstrap.share_above(differences)
        told = "the same" if np.isnan(share) else f"better in {share:.0%} of {resamples} resamples"
        said.append(f"{TITLES[name].rstrip(' ↑↓')} {figures} ({told})")
    verdict = "worse than" if worse else "better than" if better else "not distinguishable from"
    return Decision(not worse, f"{verdict} {incumbent} on {len(frame):,} users: {', '.join(said)}")


def _truth(frame: pd.DataFrame) -> np.ndarray:
    return np.maximum(frame["label_spend"].to_numpy(np.float64), 0.0)
