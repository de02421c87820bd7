"""Bootstrap the metrics: draw users with replacement, and compute all resamples at once.

The input is a row per user, as for :func:`bp_spark.evaluation.metrics.metrics_table`. The output has percentile intervals of
every metric, and of the paired differences between two members (Efron and Tibshirani 1993, "An introduction to the bootstrap",
ch. 13). A resample is a row of counts, how often each user was drawn; no user is copied.
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
from bp_spark.evaluation.metrics import (
    PROMISED,
    TITLES,
    bracket_order,
    evaluate,
    format_figure,
    interval_columns,
    interval_scores,
    populations,
    upper_half,
)

CONFIDENCE = 0.9
BETTER = {name: 1 if title.endswith("↑") else -1 for name, title in TITLES.items() if title[-1] in "↑↓"}
"""Metric -> 1 if more is better, -1 if less is better; coverage has no direction."""

COLUMNS = ["population", "member", "peer", "metric", "value", "low", "high", "better", "users"]
SHOWN = ("spearman", "gini", "decile_mape", "mae", "rmse", "coverage", "bracket_spearman", "bracket_auc")
"""Metrics that :func:`render` shows; the table has the others too."""

_CELLS = 2_000_000
"""Counts of resamples that are held in memory at once."""
_ROUNDING = 1e-9


def draws(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield resamples in parts, as counts ``float64[some, users]``; each row sums to ``users``.

    Args:
        users: number of users.
        resamples: number of resamples of all parts together.
        seed: seed of the draws; the same seed gives the same draws.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS // max(users, 1))
    for start in range(0, resamples, rows):
        some = min(rows, resamples - start)
        yield np.stack([np.bincount(rng.integers(users, size=users), minlength=users) for _ in range(some)]) * 1.0


class _Ties:
    """Users in rising order of a value, with equal values in one group."""

    def __init__(self, values: np.ndarray) -> None:
        self.order = np.argsort(values, kind="stable")
        ordered = values[self.order]
        first = np.append(True, ordered[1:] > ordered[:-1]) if len(ordered) else np.empty(0, bool)
        self.starts = np.flatnonzero(first)
        self.of_user = np.empty(len(values), np.intp)
        self.of_user[self.order] = np.cumsum(first) - 1
        self.values = ordered[self.starts]

    def sums(self, cells: np.ndarray) -> np.ndarray:
        """Return sums by group, ``[resamples, groups]``."""
        return np.asarray(np.add.reduceat(cells[:, self.order], self.starts, axis=1))

    def ranks(self, counts: np.ndarray) -> np.ndarray:
        """Return the mid-rank of each user among those drawn, ``[resamples, users]``."""
        rows = self.sums(counts)
        return (np.cumsum(rows, axis=1) - (rows - 1) / 2)[:, self.of_user]


def spearman(counts: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return :func:`bp_spark.evaluation.metrics.spearman` of each resample."""
    users = counts.sum(axis=1)
    a, b = (_Ties(values).ranks(counts) - (users[:, None] + 1) / 2 for values in (truth, predicted))
    is_constant = (counts * b * b).sum(axis=1) == 0
    scale = np.sqrt((counts * a * a).sum(axis=1) * users * (users**2 - 1) / 12)
    return _ratio((counts * a * b).sum(axis=1), np.where(is_constant, 0.0, scale))


def auc(counts: np.ndarray, active: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return :func:`bp_spark.evaluation.metrics.auc` of each resample."""
    positive = counts @ active
    negative = counts.sum(axis=1) - positive
    above = (counts * _Ties(score).ranks(counts)) @ active - positive * (positive + 1) / 2
    return _ratio(above, positive * negative)


def normalised_gini(counts: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return :func:`bp_spark.evaluation.metrics.normalised_gini` of each resample."""

    def gini(order_by: np.ndarray) -> np.ndarray:
        ties = _Ties(-order_by)
        rows, spend = ties.sums(counts), ties.sums(counts * truth)
        before = np.cumsum(spend, axis=1) - spend
        total, users = spend.sum(axis=1), rows.sum(axis=1)
        return _ratio(2 * (rows * before + spend * (rows + 1) / 2).sum(axis=1), users * total) - 1

    perfect = gini(truth)
    # if all spend is equal, the Gini of the perfect order is only rounding
    is_rounding = np.abs(perfect * counts.sum(axis=1) - 1) < _ROUNDING
    return _ratio(gini(predicted), np.where(is_rounding, 0.0, perfect))


def top_decile_capture(counts: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return :func:`bp_spark.evaluation.metrics.top_decile_capture` of each resample."""
    ties = _Ties(-predicted)
    rows, spend = ties.sums(counts), ties.sums(counts * truth)
    top = np.ceil(rows.sum(axis=1, keepdims=True) / 10)
    taken = np.clip(top - (np.cumsum(rows, axis=1) - rows), 0.0, rows)
    return _ratio((spend * taken / np.maximum(rows, 1.0)).sum(axis=1), spend.sum(axis=1))


def decile_mape(counts: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return :func:`bp_spark.evaluation.metrics.decile_mape` of each resample."""
    ties = _Ties(predicted)
    rows, spend = ties.sums(counts), ties.sums(counts * truth)
    rows_up_to = np.cumsum(rows, axis=1)
    position = np.arange(1, 10) / 10 * (rows_up_to[:, -1:] - 1)
    below, share = np.floor(position), position % 1
    edges = np.empty_like(position)
    for row, (drawn, at) in enumerate(zip(rows_up_to, below, strict=True)):
        low, high = (ties.values[np.searchsorted(drawn, index, side="right")] for index in (at, np.ceil(position[row])))
        edges[row] = low + (high - low) * share[row]
    ends = np.searchsorted(ties.values, edges, side="right")
    borders = np.concatenate([np.zeros_like(ends[:, :1]), ends, np.full_like(ends[:, :1], len(ties.values))], axis=1)

    def by_decile(cells: np.ndarray) -> np.ndarray:
        sums = np.concatenate([np.zeros((len(cells), 1)), np.cumsum(cells, axis=1)], axis=1)
        return np.diff(np.take_along_axis(sums, borders, axis=1), axis=1)

    users, actual, predicted_sum = by_decile(rows), by_decile(spend), by_decile(rows * ties.values)
    total = spend.sum(axis=1, keepdims=True)
    # in a decile without spend, differences of cumulative sums leave only rounding
    actual = np.where(actual > _ROUNDING * total, actual, 0.0)
    scale = np.where(actual > 0, actual, users * total / rows_up_to[:, -1:])
    error = np.abs(predicted_sum - actual) / np.where(users > 0, np.where(scale > 0, scale, np.nan), 1.0)
    return np.asarray(np.where(users > 0, error, 0.0).sum(axis=1) / (users > 0).sum(axis=1))


def mae(counts: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the mean absolute error of each resample, ``float64[resamples]``."""
    return _mean(counts, np.abs(predicted - truth))


def _mean(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.asarray((counts @ values) / counts.sum(axis=1))


def resampled_metrics(
    counts: np.ndarray, truth: np.ndarray, predicted: np.ndarray, promised: float = PROMISED, **more: np.ndarray
) -> dict[str, np.ndarray]:
    """Return :func:`bp_spark.evaluation.metrics.evaluate` of each resample: metric to ``float64[resamples]``.

    Args:
        counts: how often each user was drawn, ``float64[resamples, users]``; each row has a user.
        truth: real spend, ``[users]``; below 0 counts as 0.
        predicted: expected spend, ``[users]``.
        promised: share of users that the interval promises to hold.
        more: ``low`` and ``high``, and ``p_active``, ``[users]`` each, as far as they exist.
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
        metrics["interval_score"] = mean(interval_scores(truth, more["low"], more["high"], promised))
    if "p_active" in more:
        metrics["brier"] = mean((more["p_active"] - (truth > 0)) ** 2)
        metrics["auc"] = auc(counts, (truth > 0).astype(float), more["p_active"])
    return metrics


def compare(
    frame: pd.DataFrame,
    members: Sequence[str],
    *,
    subject: str = "fused",
    resamples: int = 500,
    seed: int = 7,
    promised: float = PROMISED,
) -> pd.DataFrame:
    """Return every member's metrics with 90 % intervals, and the paired differences ``subject - peer``.

    Users are drawn within a population. All members share the same draws, so the variation between users cancels in a
    difference.

    Args:
        frame: see :func:`bp_spark.evaluation.metrics.metrics_table`; a row per user.
        members: columns of expected spend; ``subject`` is one of them.
        subject: the member that is compared with all others.
        resamples: number of resamples.
        seed: seed of the draws.
        promised: share of users that the interval promises to hold.

    Returns:
        Long table ``population, member, peer, metric, value, low, high, better, users``. In the rows of a member's own figures
        ``peer`` is ``None``. In the others ``value`` is the difference, and ``better`` is the share of resamples in which the
        subject is better, ties half.

    Raises:
        DataError: a column is missing, or see :func:`bp_spark.evaluation.metrics.evaluate`.
    """
    if subject not in members:
        raise DataError("predictions", "column is missing", column=subject)
    rows: list[tuple[Any, ...]] = []
    for population, part in populations(frame, members).items():
        point = {member: _evaluated(part, member, promised) for member in members}
        resampled = _resampled(part, members, resamples, seed, promised)
        for member in members:
            rows += [
                (population, member, None, metric, value, *interval(resampled[member][metric]), math.nan, len(part))
                for metric, value in point[member].items()
            ]
        for peer in members:
            if peer == subject:
                continue
            for metric, sign in BETTER.items():
                if metric in point[subject] and metric in point[peer]:
                    difference = resampled[subject][metric] - resampled[peer][metric]
                    value = point[subject][metric] - point[peer][metric]
                    better = share_above(sign * difference)
                    rows.append((population, subject, peer, metric, value, *interval(difference), better, len(part)))
    return pd.DataFrame(rows, columns=COLUMNS)


def compare_with_brackets(
    frame: pd.DataFrame, members: Sequence[str], segment: str, *, resamples: int = 500, seed: int = 7
) -> pd.DataFrame:
    """Compare expected spend with a bracket that no model saw, such as income, for the users with a bracket.

    Args:
        frame: a row per user: ``bracket`` (text or ``None``) and the members' columns.
        members: columns of expected spend.
        segment: name of the bracket, for the column ``population``.
        resamples: number of resamples.
        seed: seed of the draws.

    Returns:
        Rows as in :func:`compare`: ``bracket_spearman`` with the order of the brackets, and ``bracket_auc`` of the upper half
        of the brackets against the lower half.

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
        (segment, member, None, name, value, *interval(np.concatenate(samples)), math.nan, len(part))
        for (member, name), value, samples in zip(figures, values, zip(*parts, strict=True), strict=True)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def render(table: pd.DataFrame, title: str) -> Group:
    """Render a table of :func:`compare` for the terminal: members' figures, differences, and figures against a bracket."""
    own, by_bracket = table["peer"].isna(), table["metric"].str.startswith("bracket_")
    parts = {
        title: table[own & ~by_bracket],
        "Difference to each peer, and the share of resamples in which it is for the better": table[~own],
        "Held against a bracket that no model saw": table[own & by_bracket],
    }
    return Group(*(_render(part, heading) for heading, part in parts.items() if not part.empty))


def _render(table: pd.DataFrame, title: str) -> Table:
    names = [name for name in SHOWN if name in set(table["metric"])]
    terminal_table = Table(title=title)
    terminal_table.add_column("users")
    terminal_table.add_column("member")
    for name in names:
        terminal_table.add_column(TITLES[name], justify="right", no_wrap=True)
    label = table["member"].where(table["peer"].isna(), table["member"] + " − " + table["peer"].fillna(""))
    for population, block in table.groupby("population", sort=False):
        heading = f"{population} ({int(block['users'].iloc[0]):,})"
        for member, figures in block.groupby(label, sort=False):
            cells = {row["metric"]: row for row in figures.to_dict("records")}
            terminal_table.add_row(heading, str(member), *(_cell(cells.get(name), name) for name in names))
            heading = ""
        terminal_table.add_section()
    return terminal_table


def _cell(row: Mapping[Any, Any] | None, metric: str) -> str:
    if row is None:
        return "–"
    value, low, high = (format_figure(metric, row[name]) for name in ("value", "low", "high"))
    share = "" if math.isnan(row["better"]) else f" ({row['better']:.0%})"
    return f"{value}{share}\n{low} … {high}"


def interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the percentile interval of a resampled figure, without the resamples that are NaN.

    The method corrects no bias. The decile MAPE is a mean of absolute deviations, which noise makes larger in every resample:
    its interval may lie above the figure.

    Args:
        values: the figure of each resample.
        confidence: share of the resamples inside the interval.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return math.nan, math.nan
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def share_above(differences: np.ndarray) -> float:
    """Return the share of resamples with a difference above 0, a difference of 0 counting half; NaN if all are NaN."""
    finite = differences[np.isfinite(differences)]
    return float(np.mean((finite > 0) + 0.5 * (finite == 0))) if finite.size else math.nan


def _evaluated(part: pd.DataFrame, member: str, promised: float) -> dict[str, float]:
    columns = interval_columns(part, member)
    return evaluate(part["label_spend"].to_numpy(), part[member].to_numpy(), **columns, promised=promised)


def _resampled(
    part: pd.DataFrame, members: Sequence[str], resamples: int, seed: int, promised: float
) -> Mapping[str, dict[str, np.ndarray]]:
    truth = part["label_spend"].to_numpy(np.float64)
    parts: dict[str, list[dict[str, np.ndarray]]] = {member: [] for member in members}
    for counts in draws(len(part), resamples, seed):
        for member in members:
            predicted = part[member].to_numpy(np.float64)
            columns = interval_columns(part, member)
            parts[member].append(resampled_metrics(counts, truth, predicted, promised, **columns))
    return {
        member: {metric: np.concatenate([some[metric] for some in member_parts]) for metric in member_parts[0]}
        for member, member_parts in parts.items()
    }


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.asarray(above / np.where(below > 0, below, np.nan))
