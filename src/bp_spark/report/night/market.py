"""Section of the weeks to come: chart, forecasts of the platform and its categories, and the gap to ``totals``."""

from __future__ import annotations

import math

import pandas as pd

from bp_spark.report import page
from bp_spark.report.night import charts
from bp_spark.report.night.data import PageData
from bp_spark.report.night.formats import figure
from bp_spark.report.page import Markup

_HORIZON = 13
"""Weeks to come, and as many of the past beside them."""
_REVENUE = "revenue"


def weeks(data: PageData) -> list[Markup]:
    """Return the chart of the platform's weekly revenue, the gap to its users' expected spend, and the forecasts."""
    ordered = data.market.sort_values("weeks_ahead")
    platform = ordered[(ordered["segment"] == "platform") & (ordered["measure"] == _REVENUE)]
    caption = f"The newest weeks and the 13 weeks from {ordered['score_date'].iloc[0]} on."
    return [
        page.figures([page.figure(charts.weeks(data, platform), "Revenue of the platform by week", caption)]),
        *_gap(data, platform),
        _forecasts(ordered),
    ]


def _gap(data: PageData, platform: pd.DataFrame) -> list[Markup]:
    """Return how far the forecast is from the sum of users' expected spend."""
    known = platform[platform["gap"].notna()]
    if known.empty:
        return []
    row = known.iloc[0]
    users, days, share = row["users_expected"], int(row["users_days"]), row["new_buyer_share"]
    cells = [
        f"{days}",
        f"{users * (1 + row['gap']):,.0f}",
        f"{users:,.0f}",
        f"{row['gap']:+.1%}",
        "–" if math.isnan(share) else f"{share:.1%}",
    ]
    headings = [
        "days",
        f"forecast by weeks, {data.currency}",
        f"sum over users, {data.currency}",
        "gap",
        "share of new buyers, past 13 weeks",
    ]
    caption = "The platform's revenue from two sides; the sum over users has no buyer to come"
    return [page.table(caption, headings, [cells], words=())]


def _forecasts(ordered: pd.DataFrame) -> Markup:
    """Return a row a forecast: the platform's measures, and the revenue of categories and levels, the largest first."""
    shown = ordered[(ordered["segment"] == "platform") | (ordered["measure"] == _REVENUE)]
    rows = []
    for (segment, value, measure), of_series in shown.groupby(["segment", "value", "measure"], sort=False):
        to_come = of_series[of_series["weeks_ahead"] > 0]
        past = of_series.loc[of_series["weeks_ahead"].between(1 - _HORIZON, 0), "actual"]
        if to_come.empty:
            continue
        mean, mean_before = float(to_come["expected"].mean()), float(past.mean()) if len(past) else math.nan
        first, last = to_come.iloc[0], to_come.iloc[-1]
        cells = [
            segment,
            value,
            measure,
            "–" if math.isnan(mean_before) else f"{mean_before:,.0f}",
            f"{mean:,.0f}",
            f"{mean / mean_before - 1:+.1%}" if mean_before > 0 else "–",
            f"{first['low']:,.0f} to {first['high']:,.0f}",
            f"{last['low']:,.0f} to {last['high']:,.0f}",
            first["method"],
            figure(first["mase_vs_naive"]),
        ]
        rows.append((segment != "platform", segment, -mean if segment == "category" else 0.0, str(value), cells))
    headings = [
        *("segment", "value", "measure", "a week, past 13 weeks", "a week, next 13", "change"),
        *("90 % interval, first week", "90 % interval, last week", "method", "error over the baseline's"),
    ]
    caption = "Forecasts of the next 13 weeks; an error below 1 is less than that of going on as before"
    return page.table(caption, headings, [row[-1] for row in sorted(rows, key=lambda row: row[:4])], words=(0, 1, 2, 8))
