"""Tables and lines on standard output: how the commands show their results."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType

    from bp_spark.cli.doctor import Finding
    from bp_spark.evaluation.job import DriftResult
    from bp_spark.ingest.onboarding.check import Check
    from bp_spark.training.job import TrainResult

EXAMPLE_ROWS = 10
"""Rows of a table that are shown as examples."""
PIPE_WIDTH = 160
"""Columns of the output where it goes to a pipe or a file."""

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_STATUS_STYLES = {"done": "green", "unchanged": "dim", "failed": "red"}
_FINDING_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


def show(output: RenderableType) -> None:
    """Print a text or a table to standard output, with what users typed as they typed it."""
    # A pipe has no width of its own, and rows must not be cut there. Markup as [red] or :key: would change users' texts.
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, markup=False, emoji=False)
    console.print(output, highlight=False)


def show_training(result: TrainResult) -> None:
    """Print the metrics of a training, and whether its bundle was promoted."""
    from bp_spark.evaluation import metrics

    if result.metrics.empty:
        show("No metrics: no horizon after the test date is over yet.")
    else:
        days = result.bundle.horizon_days
        other_horizons = ", ".join(f"_{other}d of {other}" for other in result.bundle.horizons.others)
        members = f" (members with {other_horizons} days)" if other_horizons else ""
        show(metrics.render(result.metrics, f"Spend of {days} days from {result.bundle.test_date}{members}"))
    show(f"Bundle {result.bundle.digest[:12]} {'promoted' if result.promoted else 'NOT promoted'}: {result.reason}")


def show_drift(result: DriftResult) -> None:
    """Print what broke its threshold, then stability and realised errors, then the moves between levels."""
    broken = [["BROKEN", *_drift_cells(row)] for row in result.broken]
    others = [row for row in result.rows if row["kind"] in ("stability", "realised") and not row["broken"]]
    columns = ["", "figure", "value", "threshold", "users", "note"]
    show(rows_table(columns, broken + [["", *_drift_cells(row)] for row in others], title="drift"))
    moves = {tuple(row["subject"].split(">")): row for row in result.rows if row["kind"] == "levels"}
    if moves:
        levels_after = sorted({after for _, after in moves})
        shares = [
            [
                before,
                *(f"{moves[before, after]['value']:.2%}" if (before, after) in moves else "" for after in levels_after),
            ]
            for before in sorted({before for before, _ in moves})
        ]
        show(
            rows_table(["before", *levels_after], shares, title="Users of each level of the night before, by level now")
        )


def guess(value: str | Mapping[str, Any]) -> str:
    """Return where a column of a mapping comes from, as one line."""
    return value if isinstance(value, str) else ", ".join(f"{key}: {inner}" for key, inner in value.items())


def show_check(result: Check, config_option: str) -> None:
    """Print what a check found, and what to do next.

    Args:
        result: What it found.
        config_option: Words of the command line that name the settings.
    """
    columns = [
        [one.table, one.column, _share(one.unreadable, one.rows), _share(one.missing, one.rows), "; ".join(one.odd)]
        for one in result.columns
    ]
    show(rows_table(["table", "column", "unreadable", "missing", "odd"], columns, title="columns of the sample"))
    tables = [
        [
            *(one.table, f"{one.rows:,}", f"{one.left_out:,}", _share(sum(one.refused.values()), one.rows)),
            *(f"{one.equal_lines:,}", "–" if one.share is None else f"{one.share:.1%}"),
            "all" if one.files is None else f"{one.files[0]:,} of {one.files[1]:,}",
        ]
        for one in result.tables
    ]
    headings = ["table", "rows", "left out by where", "refused", "equal lines", "share of all bytes", "files"]
    show(rows_table(headings, tables, title="rows of the sample"))
    rules = [
        [one.table, rule, f"{count:,}", _share(count, one.rows)]
        for one in result.tables
        for rule, count in one.refused.items()
    ]
    if rules:
        show(rows_table(["table", "rule", "rows", "share"], rules, title="refused rows: they would go to quarantine"))
    if result.unreadable:
        show(rows_table(["file", "why"], sorted(result.unreadable.items()), title="files that would be left out"))
    for warning in result.warnings:
        show(f"Look: {warning}")
    purchases, share = result.purchases, result.share
    whole = share is not None and share < 1
    heading = "whole, by bytes (an estimate)"
    money = f"{result.currency} {purchases.money:,.2f}"
    facts: list[list[Any]] = [
        ["orders", f"{purchases.orders:,}", f"about {purchases.orders / share:,.0f}" if whole and share else ""],
        [
            "users",
            f"{purchases.users:,}",
            f"{purchases.users:,} to {purchases.users / share:,.0f}" if whole and share else "",
        ],
        ["money", money, f"about {result.currency} {purchases.money / share:,.0f}" if whole and share else ""],
        ["refunds in it", f"{result.currency} {purchases.refunds:,.2f}", ""],
        ["days", f"{purchases.first_day} to {purchases.last_day}", ""],
    ]
    rows = facts if whole else [row[:2] for row in facts]
    show(
        rows_table(
            ["", "in the sample", heading] if whole else ["", "in all files"],
            rows,
            title="order lines that are accepted",
        )
    )
    if purchases.last_day is not None:
        next_day = purchases.last_day + timedelta(days=1)
        newest = " (the newest day of the sample; take that of your data)" if whole else ""
        show(f"Next: bp-spark featurize --as-of {next_day}{config_option}{newest}")


def _share(count: int, rows: int) -> str:
    """Return a share in percent; a small one never looks like none."""
    if not count:
        return ""
    share = f"{count / rows:.1%}"
    return "< 0.1%" if share == "0.0%" else share


def stage_table(title: str, stages: Sequence[Mapping[str, Any]]) -> Table:
    """Return the stages of a run as a table, with the total of their seconds.

    Args:
        title: Name of the command.
        stages: Rows of the table ``runs``.
    """
    table = Table(title=title, show_footer=True)
    table.add_column("stage", "all")
    table.add_column("status")
    table.add_column("seconds", f"{sum(stage['seconds'] for stage in stages):.1f}", justify="right")
    table.add_column("rows in", justify="right")
    table.add_column("rows out", justify="right")
    table.add_column("figures", overflow="fold")
    for stage in stages:
        status = Text(stage["status"], style=_STATUS_STYLES.get(stage["status"], ""))
        counts = (count(stage[name]) for name in ("rows_in", "rows_out"))
        table.add_row(stage["stage"], status, f"{stage['seconds']:.1f}", *counts, figures(stage["figures"]))
    return table


def levels_table(levels: pd.DataFrame, title: str, currency: str, smallest_group: int) -> Table:
    """Return users and money by level, without the figures of groups that are too small.

    Args:
        levels: Users by level, as :func:`bp_spark.report.population.distribution` returns them, of one night.
        title: Heading of the table.
        currency: Currency of the money.
        smallest_group: Users of the smallest group that is shown; see ``privacy.smallest_group``.
    """
    from bp_spark.report.population import by_level

    table = Table(title=title)
    for heading in ("level", "users", "share", f"expected spend, {currency}", "mean of a user"):
        table.add_column(heading, justify="left" if heading == "level" else "right")
    for level, group in by_level(levels, smallest_group).items():
        table.add_row(level, group.users, group.share, group.spend, group.mean)
    return table


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return what the doctor found, a check a row."""
    table = Table(title="doctor")
    for heading in ("check", "", "found", "remedy"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        status = Text(finding.status, style=_FINDING_STYLES[finding.status])
        table.add_row(finding.check, status, Text(finding.detail), Text(finding.remedy))
    return table


def rows_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> Table:
    """Return rows of any values as a table, each value as people read it."""
    table = Table(title=None if title is None else _printable(title))
    for column in columns:
        table.add_column(_printable(column))
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    return table


def facts_table(title: str, facts: Sequence[tuple[str, Any]]) -> Table:
    """Return pairs of a name and a value as a table without a heading."""
    table = Table(title=_printable(title), show_header=False)
    for name, value in facts:
        table.add_row(name, _printable(str(value)))
    return table


def figures(stage_figures: Mapping[str, str]) -> str:
    """Return a stage's figures as people read them: large numbers with commas, digests cut to 12 characters."""
    return ", ".join(f"{name.replace('_', ' ')} {_figure(value)}" for name, value in stage_figures.items())


def table_versions(versions: Mapping[str, int] | None) -> str:
    """Return tables with their Delta versions, in alphabetical order."""
    return ", ".join(f"{name}@{version}" for name, version in sorted((versions or {}).items()))


def count(number: int | None) -> str:
    """Return a number with commas, and a dash for one that was not counted."""
    return "–" if number is None else f"{number:,}"


def _figure(value: str) -> str:
    if re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    return f"{int(value):,}" if re.fullmatch(r"\d{5,17}", value) else value


def _drift_cells(row: Mapping[str, Any]) -> list[str]:
    from bp_spark.evaluation.job import named

    value, threshold = ("–" if row[name] is None else f"{row[name]:,.4f}" for name in ("value", "threshold"))
    return [named(row), value, threshold, f"{row['users']:,}", row["note"] or ""]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    if isinstance(value, dict):
        return ", ".join(f"{_printable(str(key))}: {_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value)
    if "contribution" in getattr(value, "__fields__", ()):  # a Row of `reasons`
        return f"{value['group']} {value['contribution']:+,.2f}"
    return _printable(str(value))


def _printable(text: str) -> str:
    """Escape the characters that command a terminal or turn the direction of the text around them."""
    return _CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
