"""Sections of the page of a scoring run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta

import pandas as pd

from bp_spark.evaluation.metrics import POPULATIONS, TITLES, format_figure
from bp_spark.ingest.pseudonyms import withheld
from bp_spark.report import page
from bp_spark.report.night import charts
from bp_spark.report.night.data import FRESH_DAYS, PageData
from bp_spark.report.night.formats import alarm, count, figure, is_broken
from bp_spark.report.page import Markup
from bp_spark.report.population import BEST_FIRST, BIN, GONE, NEW, by_level, by_risk

_SHOWN_REASONS = 12
_SHOWN_WATCHED = 40
_SHOWN_NIGHTS = 14
_SHOWN_SEGMENTS = 10
_LEAST_CURVE = 2
"""Dates that a curve needs."""
_LEAST_GROUPS = 2
"""Groups of a segment that are shown: one alone is the whole platform."""
_METRICS = ("spearman", "gini", "decile_mape", "mae", "top_decile_capture", "coverage")
_MOODS = {"done": "good", "unchanged": "good", "failed": "bad"}


def stages(data: PageData) -> list[Markup]:
    """Return the table of stages, with a column of errors if a stage has one."""
    headings = ("stage", "job", "status", "started, UTC", "seconds", "rows in", "rows out", "error")
    any_error = any(stage["error"] for stage in data.stages)
    rows = [
        [
            stage["stage"],
            stage["job"] or "–",
            page.badge(stage["status"], _MOODS.get(stage["status"], "warn")),
            stage["started"],
            f"{stage['seconds']:,.1f}",
            count(stage["rows_in"]),
            count(stage["rows_out"]),
            *([stage["error"] or ""] if any_error else []),
        ]
        for stage in data.stages
    ]
    shown = headings if any_error else headings[:-1]
    return [page.table("Stages since the night before", shown, rows, words=(0, 1, 2, 3), sentences=(7,))]


def population(data: PageData) -> list[Markup]:
    """Return charts and tables of users by score, level and risk, and of users who changed level."""
    current, previous = by_level(data.current, data.smallest_group), by_level(data.previous, data.smallest_group)
    rows = []
    for level in BEST_FIRST:
        now, before = current[level], previous[level]
        row = [level, now.users, now.share, now.spend, now.mean]
        rows.append([*row, before.users, before.share] if data.previous_date else row)
    headings = ["level", "users", "share", data.spend_name, "mean of a user"]
    headings += [f"users on {data.previous_date}", "share then"] if data.previous_date else []
    body = [
        page.figures(_charts(data)),
        page.table("Users by level", headings, rows),
        _risks(data),
    ]
    if data.previous_date:
        body.append(_migration(data))
    if data.prospects is not None:
        words = data.prospects.in_words(data.currency, data.smallest_group)
        body.append(page.paragraph(f"Users without a purchase yet: {words}."))
    body.append(
        page.note(
            f"Groups with fewer than {data.smallest_group} users show no figures (*), and neither does a group that would "
            "reveal them."
        )
    )
    return body


def _charts(data: PageData) -> list[Markup]:
    """Return the charts of scores and levels; without an earlier date all bins of the score hold about the same."""
    if data.previous_date:
        return [
            page.figure(charts.scores(data), "Scores", f"Share of users by {BIN} points of score."),
            page.figure(charts.levels(data), "Levels", "Share of users, A the highest."),
        ]
    caption = "Share of the expected spend that the best users have; a dot ends a level."
    return [
        page.figure(charts.concentration(data), "Who will spend it", caption),
        page.figure(charts.levels(data), "Levels", "Share of users and of the expected spend, A the highest."),
    ]


def _risks(data: PageData) -> Markup:
    groups = by_risk(data.current, data.smallest_group)
    rows = [[risk, group.users, group.share, group.spend, group.mean] for risk, group in groups.items()]
    headings = ["risk", "users", "share", data.spend_name, "mean of a user"]
    return page.table("Users by risk: how wide the interval is for the expected spend", headings, rows)


def _migration(data: PageData) -> Markup:
    counts = {(str(b), str(a)): int(n) for b, a, n in data.migration[["before", "after", "users"]].to_numpy()}
    befores, afters = (*BEST_FIRST, NEW), (*BEST_FIRST, GONE)
    counts = {(b, a): counts.get((b, a), 0) for b in befores for a in afters}
    # the page shows each level's users on both dates, and so how many more users came than went
    totals = [[(b, a) for a in afters] for b in BEST_FIRST] + [[(b, a) for b in befores] for a in BEST_FIRST]
    totals.append([(b, a) for b, a in counts if (b == NEW) != (a == GONE)])
    hidden = withheld(counts, totals, data.smallest_group)
    rows = []
    for before in befores:
        # people read along a row where users went, so the shade is the share of the row
        total = max(sum(counts[before, after] for after in afters), 1)
        cells = [
            "*" if (before, after) in hidden else _shaded(counts[before, after], counts[before, after] / total)
            for after in afters
        ]
        rows.append([before, *cells])
    return page.table(
        f"Users by level on {data.previous_date} (rows) and on {data.score_date} (columns)", ["", *afters], rows
    )


def _shaded(users: int, share: float) -> Markup:
    return Markup(f'<span class="heat" style="--part:{share * 60:.0f}%">{users:,}</span>' if users else "–")


def spend(data: PageData) -> list[Markup]:
    """Return curve and table of the expected spend by date."""
    history = data.history
    rows = [
        [
            str(row["score_date"]),
            f"{row['users']:,}",
            f"{row['expected_spend']:,.0f}",
            f"{row['expected_spend'] / max(row['users'], 1):,.2f}",
            row["bundle"][:12],
        ]
        for row in history.iloc[::-1].head(_SHOWN_NIGHTS).to_dict("records")
    ]
    headings = ["night", "users", data.spend_name, "mean of a user", "bundle"]
    table = page.table("Newest nights", headings, rows, words=(0, 4))
    if len(history) < _LEAST_CURVE:
        return [*_totals(data), page.note("A curve comes with the second night."), table]
    caption = "By night; a dotted line where another bundle began to score."
    curve = page.figures([page.figure(charts.spend(data), "Expected spend of all users", caption)])
    return [*_totals(data), curve, table]


def _totals(data: PageData) -> list[Markup]:
    """Return the totals of the platform, its levels, and its largest categories and regions."""
    if data.totals.empty:
        return []
    main = data.totals[data.totals["horizon_days"] == data.model["horizon_days"]]
    if main.empty:
        return []
    rows = []
    for segment, by in (("platform", "value"), ("level", "value"), ("category", ""), ("region", "")):
        of_segment = main[main["segment"] == segment]
        shown = of_segment.sort_values(by) if by else of_segment.nlargest(_SHOWN_SEGMENTS, "expected_spend")
        if segment != "platform" and len(shown) < _LEAST_GROUPS:
            continue
        rows += [
            [
                segment,
                row["value"],
                f"{row['users']:,}",
                f"{row['expected_spend']:,.0f}",
                f"{row['low']:,.0f} to {row['high']:,.0f}",
            ]
            for row in shown.to_dict("records")
        ]
    headings = ("segment", "value", "users", data.spend_name, "90 % interval of the sum")
    caption = "Users together, with what a season or a trend may move all of them by"
    return [page.table(caption, headings, rows, words=(0, 1))]


def reasons(data: PageData) -> list[Markup]:
    """Return chart and table of the most frequent reasons."""
    users = max(int(data.current["users"].sum()), 1)
    large = data.reasons[data.reasons["users"] >= data.smallest_group]
    top = large.sort_values(["users", "group"], ascending=[False, True]).head(_SHOWN_REASONS)
    if top.empty:
        return [page.note("The bundle gives no reasons.")]
    # the number of users that a group raised is shown only if neither it nor the rest is small
    parts = pd.concat([top["raised"], top["users"] - top["raised"]], axis=1)
    top = top.assign(split=~((parts > 0) & (parts < data.smallest_group)).any(axis=1))
    rows = [
        [
            row["group"],
            f"{row['users'] / users:.1%}",
            f"{row['raised'] / row['users']:.0%}" if row["split"] else "*",
            f"{row['contribution']:,.2f}",
            data.descriptions.get(row["feature"], "–") if row["feature"] else "order and content of recent events",
        ]
        for row in top.to_dict("records")
    ]
    chart_caption = "Share of users, by whether it raised or lowered the expected spend."
    headings = ["group of features", "users", "raised of them", f"mean size, {data.currency}", "most often above all"]
    caption = "The most frequent reasons, and how much of the expected spend they came to"
    return [
        page.figures([page.figure(charts.reasons(top, users), "Groups of features among the reasons", chart_caption)]),
        page.table(caption, headings, rows, sentences=(4,)),
    ]


def quality(data: PageData) -> list[Markup]:
    """Return the balance of delivered rows, rows in quarantine, and how fresh the events are."""
    return [*_balance(data), *_quarantine(data), _freshness(data)]


def _balance(data: PageData) -> list[Markup]:
    body = []
    for stage in data.stages:
        if stage["stage"] != "clean" or "rows" not in stage["figures"]:
            continue
        figures = {name: int(stage["figures"][name]) for name in ("rows", "events", "duplicates", "quarantine")}
        rows_out = figures["events"] + figures["duplicates"] + figures["quarantine"]
        verdict = page.badge("balanced", "good") if rows_out == figures["rows"] else page.badge("not balanced", "bad")
        sums = f" {figures['rows']:,} rows in = {figures['events']:,} events + {figures['duplicates']:,} duplicates + "
        body.append(page.paragraph(verdict, f"{sums}{figures['quarantine']:,} in quarantine"))
    return body or [page.paragraph("Nothing new was delivered and cleaned since the night before.")]


def _quarantine(data: PageData) -> list[Markup]:
    if data.quarantine is None:
        return []
    if not len(data.quarantine):
        return [page.paragraph("Quarantine is empty.")]
    broken_rules = data.quarantine.sort_values(["rows", "source", "rule"], ascending=[False, True, True])
    rows = [
        [row["rule"], row["source"], count(row["new_rows"]), count(row["rows"])]
        for row in broken_rules.to_dict("records")
    ]
    headings = ["rule", "table", "since the night before", "in all"]
    return [page.table("Rows in quarantine", headings, rows, words=(1,), sentences=(0,))]


def _freshness(data: PageData) -> Markup:
    rows = []
    for row in data.freshness.sort_values(["newest", "kind"], ascending=[False, True]).to_dict("records"):
        days_behind = (data.score_date - row["newest"]).days - 1
        state = page.badge(f"{days_behind} days behind", "warn") if days_behind else page.badge("up to date", "good")
        rows.append([row["kind"], str(row["newest"]), state, count(row["last_day"]), count(row["events"])])
    if not rows:
        return page.paragraph(page.badge("stale", "bad"), f" No event in the {FRESH_DAYS} days before the night.")
    last_day = data.score_date - timedelta(days=1)
    headings = ["events", "newest day", "", f"on {last_day}", f"in {FRESH_DAYS} days"]
    return page.table("How fresh the events are", headings, rows, words=(0, 1, 2))


def drift(rows: pd.DataFrame, smallest_group: int) -> list[Markup]:
    """Return the verdict on drift and its watched figures; ``Scores and levels`` shows changes of level.

    Args:
        rows: Rows of the table ``drift``.
        smallest_group: Least users of a figure that is shown.
    """
    shown = rows[(rows["kind"] != "levels") & (rows["users"] >= smallest_group)]
    judged = shown[shown["threshold"].notna()]
    # by the used part of the threshold, so that the figure that breaks next comes next
    used = (judged["value"] / judged["threshold"]).abs()
    ordered = judged.assign(used=used).sort_values(["broken", "used", "subject"], ascending=[False, False, True])
    headings = ["subject", "metric", "against", "value", "threshold", "", "note"]
    cells = [
        [
            row["subject"],
            row["metric"],
            row["against"] or "–",
            figure(row["value"]),
            figure(row["threshold"]),
            _beyond(row["broken"]),
            row["note"] or "",
        ]
        for row in ordered.head(_SHOWN_WATCHED).to_dict("records")
    ]
    if not cells:
        return [_verdict(judged)]
    caption = _caption("Figures that are watched", len(cells), len(judged))
    return [_verdict(judged), page.table(caption, headings, cells, words=(0, 1, 2, 5), sentences=(6,))]


def fairness(rows: pd.DataFrame, smallest_group: int) -> list[Markup]:
    """Return the verdict on fairness and its watched figures.

    Args:
        rows: Rows of the table ``fairness``.
        smallest_group: Least users of a figure that is shown.
    """
    shown = rows[rows["users"] >= smallest_group]
    judged = shown[shown["threshold_low"].notna()]
    order = ["segment", "metric", "group"]
    ordered = judged.sort_values(["broken", *order], ascending=[False, True, True, True])
    headings = ["segment", "group", "users", "metric", "value", "over all others", "90 % interval", "fair", ""]
    cells = [
        [
            row["segment"],
            row["group"],
            f"{row['users']:,}" + (" (few)" if row["small"] else ""),
            row["metric"],
            figure(row["value"]),
            figure(row["ratio"]),
            f"{figure(row['ratio_low'])} to {figure(row['ratio_high'])}",
            f"{figure(row['threshold_low'])} to {figure(row['threshold_high'])}",
            _beyond(row["broken"]),
        ]
        for row in ordered.head(_SHOWN_WATCHED).to_dict("records")
    ]
    if not cells:
        return [_verdict(judged)]
    caption = _caption("Groups held against all other users", len(cells), len(judged))
    return [_verdict(judged), page.table(caption, headings, cells, words=(0, 1, 3, 8))]


WATCHED: Mapping[str, Callable[[pd.DataFrame, int], list[Markup]]] = {"drift": drift, "fairness": fairness}
"""Table of watched figures -> its section."""


def _verdict(judged: pd.DataFrame) -> Markup:
    return page.paragraph(
        alarm(int(is_broken(judged).sum())), f" of {len(judged):,} watched figures are beyond their threshold."
    )


def _caption(text: str, shown: int, total: int) -> str:
    return text if shown == total else f"{text}: {shown} of {total:,}, those beyond or nearest to their threshold first"


def _beyond(broken: object) -> Markup:
    return page.badge("beyond", "bad") if broken else page.badge("within", "good")


def model(data: PageData) -> list[Markup]:
    """Return facts of the bundle and its metrics at the test date."""
    body = [page.facts([(name.replace("_", " "), value) for name, value in data.model.items()])]
    fused = data.metrics[data.metrics["member"] == "fused"]
    if fused.empty:
        return [*body, page.note("It has no metrics: no horizon after its test date was over when it was trained.")]
    values = fused.set_index(["population", "metric"])
    rows = []
    for population_name in POPULATIONS:
        own = fused[fused["population"] == population_name]
        # a mean error of a handful of users nearly reveals the error of each
        if len(own) and int(own["users"].iloc[0]) >= data.smallest_group:
            figures = (values["value"].get((population_name, metric)) for metric in _METRICS)
            cells = [format_figure(metric, value) for metric, value in zip(_METRICS, figures, strict=True)]
            rows.append([f"{population_name} ({int(own['users'].iloc[0]):,})", *cells])
    caption = "How good it was at its test date; unseen users never took part in training"
    return [*body, page.table(caption, ["users", *(TITLES[metric] for metric in _METRICS)], rows)]
