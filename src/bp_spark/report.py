"""The pages of a backtest: predictions with what was spent in, figures as PNG files and one HTML file out.

The HTML file holds its images and needs nothing beside it.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bp_spark.bootstrap import CONFIDENCE
from bp_spark.evaluation import TITLES, format_figure

DECILES = 10
_POINTS = 4000
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-size:13px}th,td{border-bottom:1px solid #ddd;padding:.25rem .6rem;"
    "text-align:right}th:nth-child(-n+2),td:nth-child(-n+2){text-align:left}td small{color:#777}"
    "figure{display:inline-block;margin:.5rem;width:36rem;max-width:100%}img{width:100%}figcaption{color:#555}"
)


@dataclass(frozen=True)
class Fold:
    """What a backtest came to at one test date.

    Attributes:
        test_date: the as-of date of the predictions.
        table: see :func:`bp_spark.bootstrap.compare`.
        figures: title -> PNG.
    """

    test_date: date
    table: pd.DataFrame
    figures: Mapping[str, bytes]


def figures(
    frame: pd.DataFrame, members: Sequence[str], coverage: float, history: Sequence[Mapping[str, float]]
) -> dict[str, bytes]:
    """Title -> PNG of each figure.

    Args:
        frame: a row per user: ``label_spend``, the members' columns, ``low``, ``high`` and ``p_active`` of ``fused``.
        members: columns of expected spend, ``fused`` among them.
        coverage: what the intervals promise.
        history: per epoch of the transformer ``epoch``, ``train_loss``, ``valid_loss``; empty without one.
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
    return {title: _png(figure) for title, figure in drawn.items()}


def write(folder: Path, folds: Sequence[Fold], about: Mapping[str, str]) -> Path:
    """Write the PNG files and ``report.html``; returns the page's path.

    Args:
        folder: made where it isn't there.
        folds: in the order of the page.
        about: what the page says of itself first, as setting -> value.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for fold in folds:
        for title, png in fold.figures.items():
            (folder / f"{fold.test_date}-{title.lower().replace(' ', '-')}.png").write_bytes(png)
    facts = "".join(f"<li>{html.escape(key)}: {html.escape(value)}</li>" for key, value in about.items())
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Backtest</title><style>{_STYLE}</style>'
        f"<h1>Backtest</h1><ul>{facts}</ul><p>In brackets: {CONFIDENCE:.0%} intervals, users drawn anew "
        "(percentile method; noise adds to a decile MAPE, so its interval may lie above the figure).</p>"
        f"{''.join(_section(fold) for fold in folds)}</html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _section(fold: Fold) -> str:
    parts = [f"<h2>Test date {fold.test_date}</h2>"]
    for population, block in fold.table.groupby("population", sort=False):
        heading = f"{html.escape(str(population))} ({int(block['users'].iloc[0]):,} users)"
        own, pairs = block[block["peer"].isna()], block[block["peer"].notna()]
        parts.append(f"<h3>{heading}</h3>{_html_table(own, 'member')}")
        if not pairs.empty:
            subject = html.escape(str(pairs["member"].iloc[0]))
            parts.append(f"<p>{subject} less peer; share of resamples in which {subject} is better:</p>")
            parts.append(_html_table(pairs, "peer"))
    for title, png in fold.figures.items():
        source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
        caption = html.escape(title)
        parts.append(f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>')
    return "".join(parts)


def _html_table(rows: pd.DataFrame, by: str) -> str:
    metrics = list(dict.fromkeys(rows["metric"]))
    head = "".join(f"<th>{html.escape(TITLES.get(metric, metric))}</th>" for metric in metrics)
    lines = []
    for name, block in rows.groupby(by, sort=False):
        cells = block.set_index("metric")
        found = (_html_cell(cells.loc[metric], metric) if metric in cells.index else "–" for metric in metrics)
        lines.append(f"<tr><td>{html.escape(str(name))}</td>{''.join(f'<td>{cell}</td>' for cell in found)}</tr>")
    return f"<table><tr><th>{by}</th>{head}</tr>{''.join(lines)}</table>"


def _html_cell(row: pd.Series, metric: str) -> str:
    value, low, high = (format_figure(metric, float(row[name])) for name in ("value", "low", "high"))
    share = "" if math.isnan(row["better"]) else f" {row['better']:.0%}"
    return f"{value}<br><small>[{low}, {high}]{share}</small>"


def _gain_and_lift(truth: np.ndarray, frame: pd.DataFrame, members: Sequence[str]) -> Figure:
    figure, (gain, lift) = _canvas(2)
    users = np.arange(1, len(truth) + 1) / max(len(truth), 1)
    total = truth.sum() or 1.0
    # the lift of the first few users is noise that would set the scale
    shown = users >= 0.01
    for member in [*members, "perfect"]:
        order_by = truth if member == "perfect" else frame[member].to_numpy()
        share = np.cumsum(truth[np.argsort(-order_by, kind="stable")]) / total
        look = (
            {"color": "0.6", "linestyle": ":"} if member == "perfect" else {"linewidth": 2 if member == "fused" else 1}
        )
        gain.plot(users, share, label=member, **look)
        lift.plot(users[shown], (share / users)[shown], label=member, **look)
    _label(gain, "share of users, highest predicted first", "share of spend")
    _label(lift, "share of users, highest predicted first", "lift")
    gain.legend(fontsize=8)
    return figure


def _calibration(truth: np.ndarray, frame: pd.DataFrame, members: Sequence[str]) -> Figure:
    figure, (axes,) = _canvas(1)
    top = 1.0
    for member in members:
        predicted = frame[member].to_numpy(np.float64)
        said, was = zip(*((predicted[rows].mean(), truth[rows].mean()) for rows in _deciles(predicted)), strict=True)
        top = max(top, *said, *was)
        axes.plot(said, was, marker="o", markersize=3, linewidth=2 if member == "fused" else 1, label=member)
    axes.plot([0, top], [0, top], color="0.6", linestyle=":")
    _label(axes, "mean expected spend of a decile", "mean spend")
    axes.legend(fontsize=8)
    return figure


def _residuals(truth: np.ndarray, frame: pd.DataFrame) -> Figure:
    figure, (axes,) = _canvas(1)
    shown = slice(None, None, max(1, math.ceil(len(truth) / _POINTS)))
    predicted = frame["fused"].to_numpy(np.float64)
    x, y = np.log1p(predicted), np.log1p(truth) - np.log1p(predicted)
    axes.scatter(x[shown], y[shown], s=4, alpha=0.4)
    axes.axhline(0.0, color="0.6", linestyle=":")
    _label(axes, "log(1 + expected spend)", "log(1 + spend) − log(1 + expected spend)")
    return figure


def _reliability(truth: np.ndarray, frame: pd.DataFrame) -> Figure:
    figure, (axes,) = _canvas(1)
    p = frame["p_active"].to_numpy(np.float64)
    said, was = zip(*((p[rows].mean(), (truth[rows] > 0).mean()) for rows in _deciles(p)), strict=True)
    axes.plot(said, was, marker="o")
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":")
    _label(axes, "mean predicted probability of a decile", "share of users that spent")
    return figure


def _coverage(truth: np.ndarray, frame: pd.DataFrame, coverage: float) -> Figure:
    figure, (axes,) = _canvas(1)
    inside = (frame["low"].to_numpy() <= truth) & (truth <= frame["high"].to_numpy())
    shares = [inside[rows].mean() for rows in _deciles(frame["fused"].to_numpy(np.float64))]
    axes.bar(range(1, len(shares) + 1), shares)
    axes.axhline(coverage, color="0.3", linestyle=":")
    axes.set_ylim(0, 1)
    _label(axes, "decile of expected spend, lowest first", "share of users inside their interval")
    return figure


def _learning_curve(history: Sequence[Mapping[str, float]]) -> Figure:
    figure, (axes,) = _canvas(1)
    epochs = [row["epoch"] for row in history]
    for name in ("train_loss", "valid_loss"):
        axes.plot(epochs, [row[name] for row in history], label=name.replace("_", " "))
    _label(axes, "epoch", "mean loss of a row")
    axes.legend(fontsize=8)
    return figure


def _deciles(by: np.ndarray) -> list[np.ndarray]:
    """Row numbers of up to ten equal parts, lowest first."""
    return [rows for rows in np.array_split(np.argsort(by, kind="stable"), DECILES) if len(rows)]


def _canvas(panels: int) -> tuple[Figure, list[Axes]]:
    # a Figure of its own and no pyplot: nothing global, no display needed
    figure = Figure(figsize=(5.5 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, number + 1) for number in range(panels)]


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
