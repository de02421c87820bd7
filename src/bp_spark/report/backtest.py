"""The page of a backtest, from predictions and the real spend: one HTML file that holds its images, and PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bp_spark.core import disk
from bp_spark.evaluation.bootstrap import CONFIDENCE
from bp_spark.evaluation.metrics import TITLES, format_figure
from bp_spark.report import page
from bp_spark.report.page import FAINT, Chart, Markup, Section

DECILES = 10
_MAX_POINTS = 4000
"""Most points of a scatter plot."""
_LEAST_LIFT_SHARE = 0.01
"""Share of users from which the lift is drawn: before, noise would set the scale."""


@dataclass(frozen=True)
class Fold:
    """Result of a backtest at one test date.

    Attributes:
        test_date: The as-of date of the predictions.
        table: See :func:`bp_spark.evaluation.bootstrap.compare`.
        figures: Title -> chart.
    """

    test_date: date
    table: pd.DataFrame
    figures: Mapping[str, Chart]


def figures(
    frame: pd.DataFrame, members: Sequence[str], coverage: float, history: Sequence[Mapping[str, float]]
) -> dict[str, Chart]:
    """Draw the figures of a fold, as title -> chart.

    Args:
        frame: A row per user: ``label_spend``, the members' columns, ``low``, ``high`` and ``p_active`` of ``fused``.
        members: Columns of expected spend, ``fused`` among them.
        coverage: Coverage that the intervals promise.
        history: ``epoch``, ``train_loss``, ``valid_loss`` per epoch of the transformer; empty without a transformer.
    """
    truth = np.maximum(frame["label_spend"].to_numpy(np.float64), 0.0)
    drawn = {
        "Gain and lift": _gain_and_lift(truth, frame, members),
        "Calibration by decile": _calibration(truth, frame, members),
        "Residuals against prediction": _residuals(truth, frame),
        "Reliability of the probability of any spend": _reliability(truth, frame),
        "Coverage by decile of expected spend": _coverage(truth, frame, coverage),
    }
    if history:
        drawn["Learning curve of the transformer"] = _learning_curve(history)
    return {title: page.chart(figure) for title, figure in drawn.items()}


def write(folder: Path, folds: Sequence[Fold], about: Mapping[str, str]) -> Path:
    """Write the PNG files and ``report.html``; return the page's path.

    Args:
        folder: Folder of the files, made if it is missing.
        folds: The test dates, in the order of the page.
        about: Facts at the top of the page, as setting -> value.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for fold in folds:
        for title, chart in fold.figures.items():
            path = folder / f"{fold.test_date}-{title.lower().replace(' ', '-')}.png"
            with disk.writing(path):
                path.write_bytes(chart.png)
    lead = [
        page.facts(list(about.items())),
        page.paragraph(
            f"In brackets: {CONFIDENCE:.0%} intervals, users drawn anew (percentile method; noise adds to a decile MAPE, so "
            "its interval may lie above the figure)."
        ),
    ]
    return page.write(folder / "report.html", page.page("Backtest", lead, [_section(fold) for fold in folds]))


def _section(fold: Fold) -> Section:
    body: list[Markup] = []
    for population, block in fold.table.groupby("population", sort=False):
        own, pairs = block[block["peer"].isna()], block[block["peer"].notna()]
        body.append(_table(f"{population} ({int(block['users'].iloc[0]):,} users)", own, "member"))
        if not pairs.empty:
            subject = str(pairs["member"].iloc[0])
            caption = f"{population}: {subject} less peer; share of resamples in which {subject} is better"
            body.append(_table(caption, pairs, "peer"))
    body.append(page.figures([page.figure(chart, title) for title, chart in fold.figures.items()]))
    return Section(f"Test date {fold.test_date}", body)


def _table(caption: str, rows: pd.DataFrame, by: str) -> Markup:
    metrics = list(dict.fromkeys(rows["metric"]))
    lines = []
    for name, block in rows.groupby(by, sort=False):
        cells = block.set_index("metric")
        texts = (_cell(cells.loc[metric], metric) if metric in cells.index else "–" for metric in metrics)
        lines.append([name, *texts])
    return page.table(caption, [by, *(TITLES.get(metric, metric) for metric in metrics)], lines)


def _cell(row: pd.Series, metric: str) -> Markup:
    value, low, high = (format_figure(metric, float(row[name])) for name in ("value", "low", "high"))
    share = "" if math.isnan(row["better"]) else f" {row['better']:.0%}"
    return Markup(f"{value}<br><small>[{low}, {high}]{share}</small>")


def _gain_and_lift(truth: np.ndarray, frame: pd.DataFrame, members: Sequence[str]) -> Figure:
    figure, (gain, lift) = page.canvas(2)
    users = np.arange(1, len(truth) + 1) / max(len(truth), 1)
    total = truth.sum() or 1.0
    shown = users >= _LEAST_LIFT_SHARE
    for member in [*members, "perfect"]:
        order_by = truth if member == "perfect" else frame[member].to_numpy()
        share = np.cumsum(truth[np.argsort(-order_by, kind="stable")]) / total
        line_style = (
            {"color": FAINT, "linestyle": ":"} if member == "perfect" else {"linewidth": 2 if member == "fused" else 1}
        )
        gain.plot(users, share, label=member, **line_style)
        lift.plot(users[shown], (share / users)[shown], label=member, **line_style)
    page.label(gain, "share of users, highest predicted first", "share of spend")
    page.label(lift, "share of users, highest predicted first", "lift")
    page.legend(gain)
    return figure


def _calibration(truth: np.ndarray, frame: pd.DataFrame, members: Sequence[str]) -> Figure:
    figure, (axes,) = page.canvas()
    top = 1.0
    for member in members:
        predicted = frame[member].to_numpy(np.float64)
        means = ((predicted[rows].mean(), truth[rows].mean()) for rows in _deciles(predicted))
        expected, actual = zip(*means, strict=True)
        top = max(top, *expected, *actual)
        axes.plot(expected, actual, marker="o", markersize=3, linewidth=2 if member == "fused" else 1, label=member)
    axes.plot([0, top], [0, top], color=FAINT, linestyle=":")
    page.label(axes, "mean expected spend of a decile", "mean spend")
    page.legend(axes)
    return figure


def _residuals(truth: np.ndarray, frame: pd.DataFrame) -> Figure:
    figure, (axes,) = page.canvas()
    shown = slice(None, None, max(1, math.ceil(len(truth) / _MAX_POINTS)))
    predicted = frame["fused"].to_numpy(np.float64)
    x, y = np.log1p(predicted), np.log1p(truth) - np.log1p(predicted)
    # thousands of points are drawn as an image inside the drawing
    axes.scatter(x[shown], y[shown], s=4, alpha=0.4, rasterized=True)
    axes.axhline(0.0, color=FAINT, linestyle=":")
    page.label(axes, "log(1 + expected spend)", "log(1 + spend) − log(1 + expected spend)")
    return figure


def _reliability(truth: np.ndarray, frame: pd.DataFrame) -> Figure:
    figure, (axes,) = page.canvas()
    p = frame["p_active"].to_numpy(np.float64)
    expected, actual = zip(*((p[rows].mean(), (truth[rows] > 0).mean()) for rows in _deciles(p)), strict=True)
    axes.plot(expected, actual, marker="o")
    axes.plot([0, 1], [0, 1], color=FAINT, linestyle=":")
    page.label(axes, "mean predicted probability of a decile", "share of users that spent")
    return figure


def _coverage(truth: np.ndarray, frame: pd.DataFrame, coverage: float) -> Figure:
    figure, (axes,) = page.canvas()
    inside = (frame["low"].to_numpy() <= truth) & (truth <= frame["high"].to_numpy())
    shares = [inside[rows].mean() for rows in _deciles(frame["fused"].to_numpy(np.float64))]
    axes.bar(range(1, len(shares) + 1), shares)
    axes.axhline(coverage, color=FAINT, linestyle=":")
    axes.set_ylim(0, 1)
    page.label(axes, "decile of expected spend, lowest first", "share of users inside their interval")
    return figure


def _learning_curve(history: Sequence[Mapping[str, float]]) -> Figure:
    figure, (axes,) = page.canvas()
    epochs = [row["epoch"] for row in history]
    for name in ("train_loss", "valid_loss"):
        axes.plot(epochs, [row[name] for row in history], label=name.replace("_", " "))
    page.label(axes, "epoch", "mean loss of a row")
    page.legend(axes)
    return figure


def _deciles(by: np.ndarray) -> list[np.ndarray]:
    """Return the row numbers of up to ten equal parts, lowest first."""
    return [rows for rows in np.array_split(np.argsort(by, kind="stable"), DECILES) if len(rows)]
