"""Section of cohorts on the page of a scoring run: a heat map of retention, and curves of spend."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter

from bp_spark.report import page
from bp_spark.report.night.data import PageData
from bp_spark.report.night.formats import short
from bp_spark.report.page import SERIES, Chart, Markup

_SHOWN_COHORTS, _SHOWN_AGES = 24, 12
_SHOWN_CURVES = 6
_LEAST_POINTS = 2
"""Points that a curve needs."""


def section(data: PageData) -> list[Markup]:
    """Return the heat map and the curves; ``data.cohorts`` has rows."""
    body = [_retention(data)]
    cohorts = _curves(data.cohorts)
    if cohorts:
        title = "Spend of a user since the first purchase"
        caption = "Mean of a cohort, refunds taken off; dashed: expected, with its 90 % interval."
        body.append(page.figures([page.figure(_spend(data, cohorts), title, caption)]))
    else:
        body.append(page.note("Curves come once all users of a cohort bought first at least 30 days ago."))
    body.append(
        page.note(
            f"Cohorts and figures (*) of fewer than {data.smallest_group} users aren't shown: see cohorts in docs/profiles.md."
        )
    )
    return body


def _retention(data: PageData) -> Markup:
    """Return the shares of users with an order, a row a cohort; all users have one at age 0."""
    history = data.cohorts[data.cohorts["horizon_days"] == 0]
    is_complete = history["complete"].astype(bool)
    newest = history[~is_complete].sort_values("cohort", ascending=False).head(_SHOWN_COHORTS)
    complete = history[is_complete & history["age"].between(1, _SHOWN_AGES)]
    shown = complete[complete["cohort"].isin(newest["cohort"])]
    by_cell = {(row["cohort"], row["age"]): row["retention"] for row in shown.to_dict("records")}
    ages = range(1, int(shown["age"].max()) + 1 if len(shown) else 1)
    largest = shown["retention"].max()
    rows = [
        [
            _months(cohort["cohort"], cohort["cohort_to"]),
            f"{cohort['users']:,}",
            f"{cohort['cumulative_spend_per_user']:,.2f}",
            *(_share(by_cell, (cohort["cohort"], age), largest) for age in ages),
        ]
        for cohort in newest.to_dict("records")
    ]
    headings = ["first purchase", "users", f"spend of a user, {data.currency}", *(f"day {30 * age}" for age in ages)]
    caption = "Share of users with an order in the 30 days from that day on, counted from each user's first purchase"
    return page.table(caption, headings, rows)


def _share(by_cell: Mapping[tuple[date, int], float], cell: tuple[date, int], largest: float) -> str:
    if cell not in by_cell:
        return ""
    share = by_cell[cell]
    if np.isnan(share):
        return "*"
    # the largest share has the darkest shade: in many shops all are small
    part = 60 * share / largest if largest > 0 else 0
    return Markup(f'<span class="heat" style="--part:{part:.0f}%">{share:.0%}</span>')


def _months(first: date, last: date) -> str:
    return f"{first:%Y-%m}" if first == last else f"{first:%Y-%m} to {last:%Y-%m}"


def _curves(cohorts: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the rows of a few cohorts, from the oldest to the newest that can be drawn."""
    shown = cohorts[cohorts["cumulative_spend_per_user"].notna()].sort_values(["cohort", "days"])
    drawable = [rows for _, rows in shown.groupby("cohort") if (rows["horizon_days"] == 0).sum() >= _LEAST_POINTS]
    positions = np.linspace(0, len(drawable) - 1, min(_SHOWN_CURVES, len(drawable))).round().astype(int)
    return [drawable[position] for position in positions]


def _spend(data: PageData, cohorts: list[pd.DataFrame]) -> Chart:
    drawn, (axes,) = page.canvas()
    for colour, rows in zip(SERIES, cohorts, strict=False):
        spent = rows[rows["horizon_days"] == 0]
        # the expected part begins where the spend ends
        ahead = rows[(rows["horizon_days"] > 0) | (rows["days"] == spent["days"].max())]
        months = _months(*rows[["cohort", "cohort_to"]].iloc[0])
        axes.plot(spent["days"], spent["cumulative_spend_per_user"], color=colour, label=months)
        axes.plot(ahead["days"], ahead["cumulative_spend_per_user"], color=colour, linestyle="--")
        low, high = (
            (ahead[name] / ahead["users"]).fillna(ahead["cumulative_spend_per_user"]) for name in ("low", "high")
        )
        axes.fill_between(ahead["days"], low, high, color=colour, alpha=0.15, linewidth=0)
    page.label(axes, "days since the first purchase", f"{data.currency} a user")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    page.legend(axes, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return page.chart(drawn)
