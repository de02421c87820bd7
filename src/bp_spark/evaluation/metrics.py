"""Compute metrics of per-user predictions against real spend, and show them as tables.

All metrics are of money over the horizon. Spend below 0 (net refunds) counts as 0, as it does in fitting. A metric that is not
defined on the data (one user, no spend, all predictions equal) is NaN, never a warning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from rich.table import Table

from bp_spark.core.errors import DataError

POPULATIONS = ("all", "seen", "unseen")
"""``seen``: users that some model was fitted on, at earlier dates; ``unseen``: users held out of all fitting."""

TITLES = {
    "spearman": "Spearman ↑",
    "gini": "norm. Gini ↑",
    "decile_mape": "decile MAPE ↓",
    "mae": "MAE ↓",
    "rmse": "RMSE ↓",
    "rmse_log1p": "RMSE log1p ↓",
    "top_decile_capture": "top-10 % capture ↑",
    "coverage": "coverage",
    "interval_width": "interval width ↓",
    "interval_score": "interval score ↓",
    "brier": "Brier ↓",
    "auc": "AUC ↑",
    "bracket_spearman": "Spearman with bracket ↑",
    "bracket_auc": "AUC of upper half ↑",
}
"""Title of every metric, in the order of tables; the arrow points to the better values."""
PROMISED = 0.9
"""Share of users whose spend an interval should hold, by default."""


def spearman(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return Spearman's rank correlation; equal predictions count as no order.

    Users of equal spend have their mean rank. Users of equal prediction are put in any order, and the result is the mean over
    all such orders. So to tell many users the same brings nothing: with mean ranks for these as well it would bring a higher
    correlation wherever many users spend nothing. Without equal predictions this is ``scipy.stats.spearmanr``.

    Returns:
        The correlation; NaN if either side is constant.
    """
    ranks = _ranks(predicted)
    if not ranks.size or ranks.min() == ranks.max():
        return math.nan
    # ties lower the variance of ranks
    variance_without_ties = (ranks.size**2 - 1) / 12
    return _correlation(_ranks(truth), ranks) * math.sqrt(float(np.var(ranks)) / variance_without_ties)


def normalised_gini(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return the Gini coefficient of the prediction's gain chart, divided by that of the truth's own gain chart.

    Order users by falling prediction, and let ``c_i`` be the share of all spend held by the first ``i`` of ``n``. Then ``gini
    = 2 * Σ c_i / n - 1``, and the result is ``gini(predicted) / gini(truth)``: 1 for a perfect order, about 0 for a random
    order. This is the measure of Wang, Liu and Miao (2019), "A deep probabilistic model for customer lifetime value
    prediction" (google/lifetime_value, ``gini_from_gain``), with one exception. Tied predictions share their spend evenly, so
    that the result doesn't depend on the order of rows.

    Returns:
        The ratio; NaN if all spend is equal (then no order is better than another) or nobody spends.
    """
    if not truth.size or truth.sum() <= 0 or truth.min() == truth.max():
        return math.nan

    def gini(order_by: np.ndarray) -> float:
        gain = np.cumsum(_by_falling(order_by, truth)) / truth.sum()
        return float(2 * gain.mean() - 1)

    return gini(predicted) / gini(truth)


def decile_mape(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean absolute percentage error of mean prediction against mean spend, over deciles of the prediction.

    As in ``decile_stats`` of google/lifetime_value: ``mean_d |pred_mean_d - label_mean_d| / label_mean_d``. Two cases are
    defined in addition. Equal predictions stay in one decile, so there may be fewer than ten. In a decile where nobody spends
    the error would be infinite; there ``pred_mean_d`` counts relative to the mean spend of all users.

    Returns:
        A fraction, 0.1 for 10 %; NaN if nobody spends.
    """
    if not truth.size or truth.sum() <= 0:
        return math.nan
    edges = np.unique(np.quantile(predicted, np.arange(1, 10) / 10))
    decile = np.unique(np.searchsorted(edges, predicted, side="left"), return_inverse=True)[1]
    rows = np.bincount(decile)
    mean_spend, mean_prediction = np.bincount(decile, truth) / rows, np.bincount(decile, predicted) / rows
    return float(np.mean(np.abs(mean_prediction - mean_spend) / np.where(mean_spend > 0, mean_spend, truth.mean())))


def mae(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean absolute error, in money."""
    return _mean(np.abs(predicted - truth))


def rmse(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return the root mean squared error, in money."""
    return math.sqrt(_mean((predicted - truth) ** 2))


def rmse_log1p(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return the root mean squared error of ``log1p``; predictions below 0 count as 0."""
    return math.sqrt(_mean((np.log1p(np.maximum(predicted, 0.0)) - np.log1p(truth)) ** 2))


def top_decile_capture(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return the share of all real spend held by the tenth of users (rounded up) with the highest predictions.

    Users tied at the border share their spend evenly. The result is NaN if nobody spends.
    """
    if not truth.size or truth.sum() <= 0:
        return math.nan
    top = math.ceil(truth.size / 10)
    return float(_by_falling(predicted, truth)[:top].sum() / truth.sum())


def coverage(truth: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Return the share of users whose spend lies in ``low``..``high``, ends included."""
    return _mean((low <= truth) & (truth <= high))


def interval_width(low: np.ndarray, high: np.ndarray) -> float:
    """Return the mean of ``high - low``, in money."""
    return _mean(high - low)


def interval_score(truth: np.ndarray, low: np.ndarray, high: np.ndarray, promised: float = PROMISED) -> float:
    """Return the mean interval score, in money: the width, and for each user outside a fine of the distance.

    Gneiting and Raftery (2007), "Strictly proper scoring rules, prediction, and estimation". With a promise of 90 % the fine
    is 20 times the distance. The score is least for the quantiles of 5 and 95 %, so narrow intervals that don't hold lose.
    """
    return _mean(interval_scores(truth, low, high, promised))


def interval_scores(truth: np.ndarray, low: np.ndarray, high: np.ndarray, promised: float) -> np.ndarray:
    """Return the interval score of each user, ``float64[users]``; see :func:`interval_score`."""
    outside = np.maximum(low - truth, 0.0) + np.maximum(truth - high, 0.0)
    return np.asarray(high - low + 2 / (1 - promised) * outside)


def brier(active: np.ndarray, p_active: np.ndarray) -> float:
    """Return the Brier score, the mean squared error of a probability (Brier 1950); ``active`` is boolean."""
    return _mean((p_active - active) ** 2)


def auc(active: np.ndarray, p_active: np.ndarray) -> float:
    """Return the area under the ROC curve: the chance that an active user ranks above an inactive one, ties half.

    The result is NaN unless there are active and inactive users.
    """
    positive = int(active.sum())
    negative = active.size - positive
    if not positive or not negative:
        return math.nan
    above = _ranks(p_active)[active].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))


def expected_calibration_error(active: np.ndarray, p_active: np.ndarray, weights: np.ndarray, bins: int = 10) -> float:
    """Return the mean distance of a probability from the share of active users, over bins of about equal numbers of users.

    Naeini, Cooper and Hauskrecht (2015), "Obtaining well calibrated probabilities using Bayesian binning", with equal counts
    in the place of equal widths. The result is NaN without users.

    Args:
        active: boolean [rows].
        p_active: predicted probability, float64 [rows].
        weights: users that a row stands for, float64 [rows].
        bins: number of bins.
    """
    if not active.size:
        return math.nan
    order = np.argsort(p_active, kind="stable")
    group = np.minimum(np.cumsum(weights[order]) / weights.sum() * bins, bins - 1).astype(int)
    difference = np.bincount(group, (weights * (p_active - active))[order])
    return float(np.abs(difference).sum() / weights.sum())


POINT_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "spearman": spearman,
    "gini": normalised_gini,
    "decile_mape": decile_mape,
    "mae": mae,
    "rmse": rmse,
    "rmse_log1p": rmse_log1p,
    "top_decile_capture": top_decile_capture,
}
"""Metrics of an expected spend."""


def evaluate(
    truth: np.ndarray,
    predicted: np.ndarray,
    *,
    low: np.ndarray | None = None,
    high: np.ndarray | None = None,
    p_active: np.ndarray | None = None,
    promised: float = PROMISED,
) -> dict[str, float]:
    """Return all metrics that the given predictions allow.

    Args:
        truth: real spend, ``[users]``; below 0 counts as 0.
        predicted: expected spend, ``[users]``.
        low: lower end of the interval, ``[users]``; needs ``high``.
        high: upper end of the interval, ``[users]``; needs ``low``.
        p_active: probability of any spend, ``[users]``.
        promised: share of users that the interval promises to hold.

    Returns:
        Metric name to value, in the order of :data:`TITLES`.

    Raises:
        DataError: arrays differ in length or hold NaN or infinite values.

    >>> evaluate(np.array([0.0, 10.0, 30.0]), np.array([1.0, 12.0, 25.0]))["spearman"]
    1.0
    """
    given = {"label_spend": truth, "predicted": predicted, "low": low, "high": high, "p_active": p_active}
    arrays = {name: np.asarray(values, np.float64) for name, values in given.items() if values is not None}
    truth, predicted = arrays["label_spend"], arrays["predicted"]
    for name, values in arrays.items():
        if values.shape != truth.shape or values.ndim != 1:
            raise DataError("predictions", f"must be {truth.shape}, not {values.shape}", column=name)
        if not np.isfinite(values).all():
            raise DataError("predictions", "must be finite", column=name, count=int((~np.isfinite(values)).sum()))
    truth = np.maximum(truth, 0.0)
    metrics = {name: metric(truth, predicted) for name, metric in POINT_METRICS.items()}
    if "low" in arrays and "high" in arrays:
        metrics["coverage"] = coverage(truth, arrays["low"], arrays["high"])
        metrics["interval_width"] = interval_width(arrays["low"], arrays["high"])
        metrics["interval_score"] = interval_score(truth, arrays["low"], arrays["high"], promised)
    if "p_active" in arrays:
        metrics["brier"] = brier(truth > 0, arrays["p_active"])
        metrics["auc"] = auc(truth > 0, arrays["p_active"])
    return metrics


def metrics_table(frame: pd.DataFrame, members: Sequence[str], promised: float = PROMISED) -> pd.DataFrame:
    """Return the metrics of every member on all, seen and unseen users.

    Args:
        frame: a row per user: ``user_key``, ``label_spend``, ``seen`` (bool) and a column of expected spend per member. The
            optional columns ``low`` and ``high``, and ``p_active``, belong to the member ``fused``.
        members: the members' columns, in the order of the result.
        promised: share of users that the interval promises to hold.

    Returns:
        Long table ``member, population, metric, value, users``; populations without users have no rows.

    Raises:
        DataError: a column is missing, or see :func:`evaluate`.
    """
    rows = []
    for population, part in populations(frame, members).items():
        users = part["user_key"].nunique()
        for member in members:
            metrics = evaluate(
                part["label_spend"].to_numpy(),
                part[member].to_numpy(),
                **interval_columns(part, member),
                promised=promised,
            )
            rows += [(member, population, metric, value, users) for metric, value in metrics.items()]
    return pd.DataFrame(rows, columns=["member", "population", "metric", "value", "users"])


def interval_columns(frame: pd.DataFrame, member: str) -> dict[str, np.ndarray]:
    """Return ``low``, ``high`` and ``p_active`` as far as the frame has them; only the member ``fused`` has any."""
    names = ("low", "high", "p_active") if member == "fused" else ()
    return {name: frame[name].to_numpy() for name in names if name in frame.columns}


def populations(frame: pd.DataFrame, members: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Return the rows of each of :data:`POPULATIONS` that has any.

    Raises:
        DataError: ``user_key``, ``label_spend``, ``seen`` or a member's column is missing.
    """
    for name in ("user_key", "label_spend", "seen", *members):
        if name not in frame.columns:
            raise DataError("predictions", "column is missing", column=name)
    seen = frame["seen"].to_numpy(dtype=bool)
    parts = {"all": frame, "seen": frame[seen], "unseen": frame[~seen]}
    return {population: part for population, part in parts.items() if not part.empty}


def bracket_order(texts: Sequence[str | None]) -> np.ndarray:
    """Rank brackets by the numbers in their texts: ``float64[users]``, from 0, NaN without a number.

    ``Under 15K`` < ``15-24K`` < ``250K+``: brackets are ordered by the lower end, then by the upper end. K and M are thousands
    and millions, and also apply to the number before a dash. Commas separate thousands.

    >>> bracket_order(["250K+", "15-24K", None, "Under 15K", "15-24K"]).tolist()
    [2.0, 1.0, nan, 0.0, 1.0]
    """
    ends = {text: _bracket_ends(text) for text in {text for text in texts if isinstance(text, str)}}
    known_brackets = {bracket for bracket in ends.values() if bracket is not None}
    ranks = {bracket: rank for rank, bracket in enumerate(sorted(known_brackets))}
    brackets = (ends[text] if isinstance(text, str) else None for text in texts)
    return np.array([math.nan if bracket is None else ranks[bracket] for bracket in brackets], np.float64)


def upper_half(order: np.ndarray) -> np.ndarray:
    """Return which users are in the upper brackets, boolean: the split by bracket whose halves are nearest to equal.

    Raises:
        DataError: there are fewer than two brackets.
    """
    brackets, users = np.unique(order, return_counts=True)
    if len(brackets) <= 1:
        raise DataError("raw_users", "needs users of two brackets at least to compare", column="segment")
    border = brackets[1 + int(np.argmin(np.abs(np.cumsum(users)[:-1] - len(order) / 2)))]
    return np.asarray(order >= border)


_NUMBER = re.compile(r"(\d[\d,]*(?:\.\d+)?)\s*([kKmM]?)(?![A-Za-z])")
_BELOW = re.compile(r"under|below|less|up to|<", re.IGNORECASE)
_ABOVE = re.compile(r"\+|over|above|more|>", re.IGNORECASE)
_SCALES = {"": 1.0, "k": 1e3, "m": 1e6}


def _bracket_ends(text: str) -> tuple[float, float] | None:
    """Return the lower and the upper end of a bracket; ``None`` if its text has no number."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    values, scale = [], ""
    for digits, suffix in reversed(numbers):
        scale = suffix.lower() or scale
        values.append(float(digits.replace(",", "")) * _SCALES[scale])
    low, high = values[-1], values[0]
    if len(values) == 1 and _BELOW.search(text):
        low = -math.inf
    if len(values) == 1 and _ABOVE.search(text):
        high = math.inf
    return low, high


def render(table: pd.DataFrame, title: str | None = None) -> Table:
    """Render a :func:`metrics_table` for the terminal: metrics as rows, members as columns, a block per population."""
    members = table["member"].unique()
    terminal_table = Table("users, metric", title=title)
    for member in members:
        terminal_table.add_column(str(member), justify="right")
    values = table.set_index(["population", "member", "metric"])["value"].to_dict()
    for population in POPULATIONS:
        block = table[table["population"] == population]
        if not block.empty:
            terminal_table.add_row(f"{population} ({int(block['users'].iloc[0]):,})", style="bold")
        for name in (name for name in TITLES if name in set(block["metric"])):
            cells = [format_figure(name, values.get((population, member, name))) for member in members]
            terminal_table.add_row(TITLES[name], *cells)
        terminal_table.add_section()
    return terminal_table


_MONEY = ("mae", "rmse", "interval_width", "interval_score")
"""Metrics that are amounts of money."""


def format_figure(metric: str, value: float | None) -> str:
    """Format a figure: money with two digits, other figures with four, NaN and ``None`` as a dash."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.2f}" if metric in _MONEY else f"{value:.4f}"


def _by_falling(order_by: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Order ``values`` by falling ``order_by``, and replace those of a tie by their mean."""
    tie = np.unique(-order_by, return_inverse=True)[1]
    rows = np.bincount(tie)
    return np.repeat(np.bincount(tie, values) / rows, rows)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1, with ties at their mean rank."""
    tie = np.unique(values, return_inverse=True)[1]
    rows = np.bincount(tie)
    return (np.cumsum(rows) - (rows - 1) / 2)[tie] if values.size else values


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Pearson's correlation; NaN if either side is constant."""
    if not a.size:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(np.clip((a @ b) / scale, -1.0, 1.0)) if scale > 0 else math.nan


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if values.size else math.nan
