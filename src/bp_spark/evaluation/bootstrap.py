"""How sure a figure is: metrics of users drawn anew with replacement, all resamples at once.

In: a row per user, as :func:`bp_spark.evaluation.metrics.metrics_table` takes it. Out: percentile intervals of every
metric, and
of the paired differences between two members (Efron and Tibshirani 1993, "An introduction to the bootstrap", ch. 13).
A resample is a row of counts, how often each user was drawn: metrics are of the counted users, never of copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Group
from rich.table import Table

from bp_spark.core.errors import DataError
from bp_spark.evaluation.metrics import TITLES, bracket_order, evaluate, format_figure, populations, upper_half

CONFIDENCE = 0.9
BETTER = {name: 1 if title.endswith("↑") else -1 for name, title in TITLES.items() if title[-1] in "↑↓"}
"""Metric -> 1 where more is better, -1 where less is; coverage and width have no such direction."""

COLUMNS = ["population", "member", "peer", "metric", "value", "low", "high", "better", "users"]
SHOWN = ("spearman", "gini", "decile_mape", "mae", "rmse", "coverage", "bracket_spearman", "bracket_auc")
"""Metrics that :func:`render` shows; the others are in the table."""

_CELLS = 2_000_000


def draws(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Resamples as counts, ``float64[some, users]`` a part, each row summing to ``users``; the same seed, the same draws."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS // max(users, 1))
    for start in range(0, resamples, rows):
        some = min(rows, resamples - start)
        yield np.stack([np.bincount(rng.integers(users, size=users), minlength=users) for _ in range(some)]) * 1.0


class _Ties:
    """Users in rising order of a value, those with equal values in one group."""

    def __init__(self, values: np.ndarray) -> None:
        self.order = np.argsort(values, kind="stable")
        ordered = values[self.order]
        first = np.append(True, ordered[1:] > ordered[:-1]) if len(ordered) else np.empty(0, bool)
        self.starts = np.flatnonzero(first)
        self.of_user = np.empty(len(values), np.intp)
        self.of_user[self.order] = np.cumsum(first) - 1
        self.values = ordered[self.starts]

    def sums(self, cells: np.ndarray) -> np.ndarray:
        """Sums by group, ``[resamples, groups]``."""
        return np.add.reduceat(cells[:, self.order], self.starts, axis=1)

    def ranks(self, counts: np.ndarray) -> np.ndarray:
        """Mid-rank of each user among those drawn, ``[resamples, users]``."""
        rows = self.sums(counts)
        return (np.cumsum(rows, axis=1) - (rows - 1) / 2)[:, self.of_user]


def spearman(counts: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """:func:`bp_spark.evaluation.metrics.spearman` of each resample."""
    middle = (counts.sum(axis=1, keepdims=True) + 1) / 2
    a, b = (_Ties(values).ranks(counts) - middle for values in (truth, predicted))
    scale = np.sqrt((counts * a * a).sum(axis=1) * (counts * b * b).sum(axis=1))
    return _ratio((counts * a * b).sum(axis=1), scale)


def auc(counts: np.ndarray, active: np.ndarray, score: np.ndarray) -> np.ndarray:
    """:func:`bp_spark.evaluation.metrics.auc` of each resample."""
    positive = counts @ active
    negative = counts.sum(axis=1) - positive
    above = (counts * _Ties(score).ranks(counts)) @ active - positive * (positive + 1) / 2
    return _ratio(above, positive * negative)


def normalised_gini(counts: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """:func:`bp_spark.evaluation.metrics.normalised_gini` of each resample."""

    def gini(order_by: np.ndarray) -> np.ndarray:
        ties = _Ties(-order_by)
        rows, spend = ties.sums(counts), ties.sums(counts * truth)
        before = np.cumsum(spend, axis=1) - spend
        total, users = spend.sum(axis=1), rows.sum(axis=1)
        return _ratio(2 * (rows * before + spend * (rows + 1) / 2).sum(axis=1), users * total) - 1

    perfect = gini(truth)
    # where all spend alike the perfect order's own is rounding
    return _ratio(gini(predicted), np.where(np.abs(perfect * counts.sum(axis=1) - 1) < 1e-9, 0.0, perfect))


def top_decile_capture(counts: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """:func:`bp_spark.evaluation.metrics.top_decile_capture` of each resample."""
    ties = _Ties(-predicted)
    rows, spend = ties.sums(counts), ties.sums(counts * truth)
    top = np.ceil(rows.sum(axis=1, keepdims=True) / 10)
    taken = np.clip(top - (np.cumsum(rows, axis=1) - rows), 0.0, rows)
    return _ratio((spend * taken / np.maximum(rows, 1.0)).sum(axis=1), spend.sum(axis=1))


def decile_mape(counts: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """:func:`bp_spark.evaluation.metrics.decile_mape` of each resample."""
    ties = _Ties(predicted)
    rows, spend = ties.sums(counts), ties.sums(counts * truth)
    upto = np.cumsum(rows, axis=1)
    place = np.arange(1, 10) / 10 * (upto[:, -1:] - 1)
    below, share = np.floor(place), place % 1
    edges = np.empty_like(place)
    for row, (drawn, at) in enumerate(zip(upto, below, strict=True)):
        low, high = (ties.values[np.searchsorted(drawn, index, side="right")] for index in (at, np.ceil(place[row])))
        edges[row] = low + (high - low) * share[row]
    ends = np.searchsorted(ties.values, edges, side="right")
    borders = np.concatenate([np.zeros_like(ends[:, :1]), ends, np.full_like(ends[:, :1], len(ties.values))], axis=1)

    def by_decile(cells: np.ndarray) -> np.ndarray:
        sums = np.concatenate([np.zeros((len(cells), 1)), np.cumsum(cells, axis=1)], axis=1)
        return np.diff(np.take_along_axis(sums, borders, axis=1), axis=1)

    users, labelled, said = by_decile(rows), by_decile(spend), by_decile(rows * ties.values)
    total = spend.sum(axis=1, keepdims=True)
    # sums of cents cancel to rounding in a decile without spend
    labelled = np.where(labelled > 1e-9 * total, labelled, 0.0)
    against = np.where(labelled > 0, labelled, users * total / upto[:, -1:])
    error = np.abs(said - labelled) / np.where(users > 0, np.where(against > 0, against, np.nan), 1.0)
    return np.where(users > 0, error, 0.0).sum(axis=1) / (users > 0).sum(axis=1)


def mae(counts: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Mean absolute error of each resample, ``float64[resamples]``."""
    return _mean(counts, np.abs(predicted - truth))


def _mean(counts: np.ndarray, of_user: np.ndarray) -> np.ndarray:
    return (counts @ of_user) / counts.sum(axis=1)


def resampled_metrics(
    counts: np.ndarray, truth: np.ndarray, predicted: np.ndarray, **more: np.ndarray
) -> dict[str, np.ndarray]:
    """:func:`bp_spark.evaluation.metrics.evaluate` of each resample: metric to ``float64[resamples]``.

    Args:
        counts: how often each user was drawn, ``float64[resamples, users]``, no row without a user.
        truth: real spend, ``[users]``; below 0 counts as 0.
        predicted: expected spend, ``[users]``.
        more: ``low`` and ``high``, ``p_active``, where there.
    """
    truth = np.maximum(truth, 0.0)

    mean = partial(_mean, counts)
    logs = np.log1p(np.maximum(predicted, 0.0)) - np.log1p(truth)
    metrics = {
        "spearman": spearman(counts, truth, predicted),
        "gini": normalised_gini(counts, truth, predicted),
        "decile_mape": decile_mape(counts, truth, predicted),
        "mae": mae(counts, truth, predicted),
        "rmse": np.sqrt(mean((predicted - truth) ** 2)),
        "rmse_log1p": np.sqrt(mean(logs**2)),
        "top_decile_capture": top_decile_capture(counts, truth, predicted),
    }
    if "low" in more and "high" in more:
        metrics["coverage"] = mean(((more["low"] <= truth) & (truth <= more["high"])).astype(float))
        metrics["interval_width"] = mean(more["high"] - more["low"])
    if "p_active" in more:
        metrics["brier"] = mean((more["p_active"] - (truth > 0)) ** 2)
        metrics["auc"] = auc(counts, (truth > 0).astype(float), more["p_active"])
    return metrics


def compare(
    frame: pd.DataFrame, members: Sequence[str], *, subject: str = "fused", resamples: int = 500, seed: int = 7
) -> pd.DataFrame:
    """Every member's metrics with 90 % intervals, and the paired differences ``subject - peer``.

    Users are drawn within a population; all members meet the same draws, so that what users have in common cancels in
    a difference.

    Args:
        frame: see :func:`bp_spark.evaluation.metrics.metrics_table`; a row per user.
        members: columns of expected spend; ``subject`` is one of them.

    Returns:
        Long table ``population, member, peer, metric, value, low, high, better, users``. ``peer`` is ``None`` in the rows
        of a member's own figures; in the others ``value`` is the difference and ``better`` the share of resamples in
        which the subject is better, ties half.

    Raises:
        DataError: a column is missing, or see :func:`bp_spark.evaluation.metrics.evaluate`.
    """
    if subject not in members:
        raise DataError("predictions", "column is missing", column=subject)
    rows: list[tuple[Any, ...]] = []
    for population, part in populations(frame, members).items():
        point = {member: _evaluated(part, member) for member in members}
        found = _resampled(part, members, resamples, seed)
        for member in members:
            rows += [
                (population, member, None, metric, value, *interval(found[member][metric]), math.nan, len(part))
                for metric, value in point[member].items()
            ]
        for peer in members:
            if peer == subject:
                continue
            for metric, sign in BETTER.items():
                if metric in point[subject] and metric in point[peer]:
                    difference = found[subject][metric] - found[peer][metric]
                    value = point[subject][metric] - point[peer][metric]
                    better = share_above(sign * difference)
                    rows.append((population, subject, peer, metric, value, *interval(difference), better, len(part)))
    return pd.DataFrame(rows, columns=COLUMNS)


def compare_with_brackets(
    frame: pd.DataFrame, members: Sequence[str], segment: str, *, resamples: int = 500, seed: int = 7
) -> pd.DataFrame:
    """How far expected spend follows a bracket that no model saw, such as income, of the users that have one.

    Args:
        frame: a row per user: ``bracket`` (text or ``None``) and the members' columns.
        members: columns of expected spend.
        segment: the bracket's name, which stands in ``population``.

    Returns:
        Rows as of :func:`compare`: ``bracket_spearman`` with the bracket's order, ``bracket_auc`` of the upper half of the
        brackets against the lower one.

    Raises:
        DataError: users are of fewer than two brackets with a number in their text.
    """
    order = bracket_order(frame["bracket"].tolist())
    part, order = frame[~np.isnan(order)], order[~np.isnan(order)]
    upper = upper_half(order).astype(np.float64)
    metrics = {"bracket_spearman": (spearman, order), "bracket_auc": (auc, upper)}
    figures = [(member, name) for member in members for name in metrics]

    def resampled(counts: np.ndarray) -> list[np.ndarray]:
        return [
            metrics[name][0](counts, metrics[name][1], part[member].to_numpy(np.float64)) for member, name in figures
        ]

    values = [float(value[0]) for value in resampled(np.ones((1, len(part))))]
    parts = [resampled(counts) for counts in draws(len(part), resamples, seed)]
    rows = [
        (segment, member, None, name, value, *interval(np.concatenate(drawn)), math.nan, len(part))
        for (member, name), value, drawn in zip(figures, values, zip(*parts, strict=True), strict=True)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def render(table: pd.DataFrame, title: str) -> Group:
    """A table of :func:`compare` for the terminal: members' figures, differences, figures against a bracket, a part each."""
    own, outside = table["peer"].isna(), table["metric"].str.startswith("bracket_")
    parts = {
        title: table[own & ~outside],
        "Difference to each peer, and the share of resamples in which it is for the better": table[~own],
        "Held against a bracket that no model saw": table[own & outside],
    }
    return Group(*(_render(part, heading) for heading, part in parts.items() if not part.empty))


def _render(table: pd.DataFrame, title: str) -> Table:
    names = [name for name in SHOWN if name in set(table["metric"])]
    drawn = Table(title=title)
    drawn.add_column("users")
    drawn.add_column("member")
    for name in names:
        drawn.add_column(TITLES[name], justify="right", no_wrap=True)
    label = table["member"].where(table["peer"].isna(), table["member"] + " − " + table["peer"].fillna(""))
    for population, block in table.groupby("population", sort=False):
        heading = f"{population} ({int(block['users'].iloc[0]):,})"
        for member, figures in block.groupby(label, sort=False):
            cells = {row["metric"]: row for row in figures.to_dict("records")}
            drawn.add_row(heading, str(member), *(_cell(cells.get(name), name) for name in names))
            heading = ""
        drawn.add_section()
    return drawn


def _cell(row: Mapping[Any, Any] | None, metric: str) -> str:
    if row is None:
        return "–"
    value, low, high = (format_figure(metric, row[name]) for name in ("value", "low", "high"))
    share = "" if math.isnan(row["better"]) else f" ({row['better']:.0%})"
    return f"{value}{share}\n{low} … {high}"


def interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Percentile interval of a resampled figure; resamples that can't tell it are left out, NaN where none can.

    The method corrects no bias: of a mean of absolute deviations, as the decile MAPE, noise makes every resample's larger,
    and the interval may lie above the figure.
    """
    known = values[np.isfinite(values)]
    if not known.size:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def share_above(differences: np.ndarray) -> float:
    """Share of the resamples with a difference above 0, those of 0 half; NaN where none can tell."""
    known = differences[np.isfinite(differences)]
    return float(np.mean((known > 0) + 0.5 * (known == 0))) if known.size else math.nan


def _evaluated(part: pd.DataFrame, member: str) -> dict[str, float]:
    return evaluate(part["label_spend"].to_numpy(), part[member].to_numpy(), **_more(part, member))


def _more(part: pd.DataFrame, member: str) -> dict[str, np.ndarray]:
    names = ("low", "high", "p_active") if member == "fused" else ()
    return {name: part[name].to_numpy() for name in names if name in part.columns}


def _resampled(
    part: pd.DataFrame, members: Sequence[str], resamples: int, seed: int
) -> Mapping[str, dict[str, np.ndarray]]:
    truth = part["label_spend"].to_numpy(np.float64)
    parts: dict[str, list[dict[str, np.ndarray]]] = {member: [] for member in members}
    for counts in draws(len(part), resamples, seed):
        for member in members:
            predicted = part[member].to_numpy(np.float64)
            parts[member].append(resampled_metrics(counts, truth, predicted, **_more(part, member)))
    return {
        member: {metric: np.concatenate([some[metric] for some in found]) for metric in found[0]}
        for member, found in parts.items()
    }


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return above / np.where(below > 0, below, np.nan)
