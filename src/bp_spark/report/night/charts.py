"""Charts of the page of a scoring run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import dates
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from bp_spark.ingest.pseudonyms import withheld
from bp_spark.report import page
from bp_spark.report.night.data import PageData
from bp_spark.report.night.formats import short
from bp_spark.report.page import FAINT, INK, SERIES, Chart
from bp_spark.report.population import BEST_FIRST, BIN, by_level


def scores(data: PageData) -> Chart:
    """Draw the share of users by bins of score, on both dates."""
    drawn, (axes,) = page.canvas()
    starts = range(0, 100, BIN)
    axes.bar(
        starts,
        _shares_by_bin(data.current, data.smallest_group),
        BIN * 0.9,
        align="edge",
        color=SERIES[0],
        label=str(data.score_date),
    )
    if data.previous_date:
        shares = _shares_by_bin(data.previous, data.smallest_group)
        axes.stairs(shares, [*starts, 100], color=SERIES[1], linewidth=1.8, label=str(data.previous_date))
    page.label(axes, "score", "share of users")
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 20))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=False, axis="x")
    page.legend(axes, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return page.chart(drawn)


def _shares_by_bin(rows: pd.DataFrame, smallest_group: int) -> list[float]:
    """Return the share of users in each bar, NaN where it is withheld; the page shows the sum of each level elsewhere."""
    starts = range(0, 100, BIN)
    users = rows.groupby("bin")["users"].sum().reindex(starts, fill_value=0)
    counts = {start: int(users[start]) for start in starts}
    width = 100 // len(BEST_FIRST)
    levels = [range(start, start + width, BIN) for start in range(0, 100, width)]
    hidden = withheld(counts, levels, smallest_group)
    total = max(sum(counts.values()), 1)
    return [math.nan if start in hidden else counts[start] / total for start in starts]


def concentration(data: PageData) -> Chart:
    """Draw what share of the expected spend the best users have, level by level (Lorenz 1905), beside equal shares."""
    drawn, (axes,) = page.canvas()
    groups = by_level(data.current, data.smallest_group)
    users = np.cumsum([0.0, *(groups[level].part for level in BEST_FIRST)])
    spend = np.cumsum([0.0, *(groups[level].spend_part for level in BEST_FIRST)])
    axes.plot([0, 1], [0, 1], color=FAINT, linestyle=":", label="equal shares")
    axes.plot(users, spend, marker="o", markersize=4, color=SERIES[0], label="expected spend")
    page.label(axes, "share of users, the best first", "share of expected spend")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    page.legend(axes, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return page.chart(drawn)


def levels(data: PageData) -> Chart:
    """Draw the share of users by level on both dates; on the first one beside the share of the expected spend."""
    drawn, (axes,) = page.canvas()
    now = by_level(data.current, data.smallest_group)
    if data.previous_date:
        before = by_level(data.previous, data.smallest_group)
        bars = {
            str(data.previous_date): ([before[level].part for level in BEST_FIRST], SERIES[1]),
            str(data.score_date): ([now[level].part for level in BEST_FIRST], SERIES[0]),
        }
    else:
        bars = {
            "users": ([now[level].part for level in BEST_FIRST], SERIES[1]),
            "expected spend": ([now[level].spend_part for level in BEST_FIRST], SERIES[0]),
        }
    width = 0.8 / len(bars)
    for position, (name, (heights, colour)) in enumerate(bars.items()):
        lefts = [x - 0.4 + width * position for x in range(len(BEST_FIRST))]
        axes.bar(lefts, heights, width * 0.95, align="edge", color=colour, label=name)
    axes.set_xticks(range(len(BEST_FIRST)), BEST_FIRST)
    page.label(axes, "level", "share of users" if data.previous_date else "share")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=False, axis="x")
    page.legend(axes, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return page.chart(drawn)


def spend(data: PageData) -> Chart:
    """Draw the expected spend of all users over time, with a line where another bundle began to score."""
    drawn, (axes,) = page.canvas(width=6.5, height=3.0)
    history = data.history
    axes.plot(history["score_date"], history["expected_spend"], marker="o", markersize=4, color=SERIES[0])
    bundles = history["bundle"].tolist()
    for position in range(1, len(bundles)):
        if bundles[position] != bundles[position - 1]:
            axes.axvline(history["score_date"].iloc[position], color=FAINT, linestyle=":")
    page.label(axes, "", f"{data.currency}, {data.model['horizon_days']} days")
    _time_axis(axes)
    return page.chart(drawn)


def weeks(data: PageData, platform: pd.DataFrame) -> Chart:
    """Draw the weekly revenue of the platform, past and to come, with the interval of the weeks to come.

    Args:
        data: Data of the page.
        platform: Rows of MARKET_FORECAST of the platform's revenue, in order.
    """
    drawn, (axes,) = page.canvas(width=6.5, height=3.0)
    starts = pd.to_datetime(platform["week_start"])
    to_come = platform["weeks_ahead"] > 0
    axes.plot(starts[~to_come], platform.loc[~to_come, "actual"], color=SERIES[0], label="actual")
    axes.plot(starts[to_come], platform.loc[to_come, "expected"], color=SERIES[1], label="forecast")
    low, high = platform.loc[to_come, "low"], platform.loc[to_come, "high"]
    axes.fill_between(starts[to_come], low, high, color=SERIES[1], alpha=0.2, linewidth=0, label="90 % interval")
    page.label(axes, "", f"{data.currency} a week")
    _time_axis(axes)
    page.legend(axes, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return page.chart(drawn)


def _time_axis(axes: Axes) -> None:
    # matplotlib gives these two no types
    make_locator: Any = dates.AutoDateLocator
    make_formatter: Any = dates.ConciseDateFormatter
    locator = make_locator(minticks=2, maxticks=7)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(make_formatter(locator))
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.margins(y=0.25)


def reasons(top: pd.DataFrame, users: int) -> Chart:
    """Draw how many users each group of features raised and lowered.

    Args:
        top: ``group, users, raised, split``, the most frequent first; ``split`` says whether ``raised`` may be shown.
        users: All users.
    """
    shown = top.iloc[::-1]
    drawn, (axes,) = page.canvas(width=6.5, height=0.9 + 0.33 * len(shown))
    raised = shown["raised"].where(shown["split"], 0) / users
    lowered = (shown["users"] - shown["raised"]).where(shown["split"], 0) / users
    axes.barh(shown["group"], raised, color=SERIES[0], label="raised")
    axes.barh(shown["group"], lowered, left=raised, color=SERIES[1], label="lowered")
    if not shown["split"].all():
        unsplit = shown["users"].mask(shown["split"], 0) / users
        axes.barh(shown["group"], unsplit, color=FAINT, label="not shown: few users")
    page.label(axes, "share of users", "")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", labelcolor=INK)
    page.legend(axes, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return page.chart(drawn)
