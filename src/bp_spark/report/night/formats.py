"""Figures as the page of a scoring run writes them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pandas as pd

from bp_spark.report import page
from bp_spark.report.page import Markup

_SHORT_DURATION_S = 120


def is_broken(rows: pd.DataFrame) -> pd.Series:
    """Return which watched figures are beyond their threshold; a figure that can't be judged is not."""
    return rows["broken"].fillna(False).astype(bool)


def alarm(broken: int) -> Markup:
    """Return a number of broken figures as a badge."""
    return page.badge(f"{broken:,}", "bad" if broken else "good")


def change(now: float, before: float, form: str | None = None) -> str:
    """Return in words how a figure changed; nothing without a figure before.

    Args:
        now: The figure.
        before: The figure of the scoring run before.
        form: Format of a difference in users; by default the change is relative.
    """
    if not before:
        return ""
    if now == before:
        return "no change"
    return f"{form.format(now - before)} users" if form else f"{now / before - 1:+.2%}"


def count(number: Any) -> str:
    """Return a whole number, or a dash where it is missing."""
    return "–" if pd.isna(number) else f"{int(number):,}"


def figure(value: Any) -> str:
    """Return four digits of a number, or a dash where it is missing."""
    return "–" if pd.isna(value) else f"{value:,.4g}"


def duration(seconds: float) -> str:
    """Return seconds in words."""
    return f"{seconds:.0f} s" if seconds < _SHORT_DURATION_S else str(timedelta(seconds=round(seconds)))


def short(value: float, _: object = None) -> str:
    """Return a number with thousands, millions or billions as a letter; matplotlib passes a position, too."""
    steps: tuple[tuple[float, str], ...] = ((1e9, "bn"), (1e6, "m"), (1e3, "k"))
    for size, unit in steps:
        if abs(value) >= size:
            return f"{value / size:,.4g} {unit}"
    return f"{value:,.4g}"
