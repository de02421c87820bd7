"""The page of a night: what ran, whom it scored and how, what the data were like, from which model.

In: the few rows that :mod:`bp_spark.report.population` and the tables of the record leave. Out: one HTML document. No user is
in it: figures are of groups, and of groups with fewer than ``privacy.smallest_group`` users none are told, nor any from which
they could be reckoned. Rows in quarantine and events are counted whole: they are not users.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import pandas as pd
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.ticker import FuncFormatter, PercentFormatter

from bp_spark.core.version import __version__
from bp_spark.evaluation.metrics import POPULATIONS, TITLES, format_figure
from bp_spark.ingest.pseudonyms import withheld
from bp_spark.report import page
from bp_spark.report.page import FAINT, INK, SERIES, Chart, Markup, Section
from bp_spark.report.population import BEST_FIRST, BIN, GONE, NEW, by_level, by_risk

FRESH_DAYS = 28
"""Days before the night in which the newest events are looked for."""
_SHOWN_REASONS = 12
_SHOWN_WATCHED = 40
_METRICS = ("spearman", "gini", "decile_mape", "mae", "top_decile_capture", "coverage")
_MOODS = {"done": "good", "unchanged": "good", "failed": "bad"}


@dataclass(frozen=True)
class Night:
    """What the page of a night shows.

    Attributes:
        score_date: the night.
        previous: the scored night before it, if there is one.
        currency: of money.
        smallest: users of a group of which figures may be told.
        stages: rows of RUNS since the night before, oldest first, and ``started``, the time in words.
        distribution: see :func:`bp_spark.report.population.distribution`, of both nights.
        migration: see :func:`bp_spark.report.population.migration`; empty without a night before.
        history: a row a night, oldest first: ``score_date, expected_spend, users, bundle``.
        reasons: see :func:`bp_spark.report.population.reasons`.
        meanings: feature -> what it is.
        freshness: see :func:`bp_spark.report.population.freshness`.
        refused: see :func:`bp_spark.report.population.refused`; ``None`` where nothing was cleaned yet.
        model: what is known of the bundle, as name -> value; ``horizon_days`` too.
        metrics: rows of METRICS of the bundle.
        watched: ``drift`` and ``fairness``, where there are such tables: their rows of the night.
    """

    score_date: date
    previous: date | None
    currency: str
    smallest: int
    stages: Sequence[Mapping[str, Any]]
    distribution: pd.DataFrame
    migration: pd.DataFrame
    history: pd.DataFrame
    reasons: pd.DataFrame
    meanings: Mapping[str, str]
    freshness: pd.DataFrame
    refused: pd.DataFrame | None
    model: Mapping[str, object]
    metrics: pd.DataFrame
    watched: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def tonight(self) -> pd.DataFrame:
        """Its rows of ``distribution``."""
        return self.distribution[self.distribution["score_date"] == self.score_date]

    @property
    def before(self) -> pd.DataFrame:
        """Rows of ``distribution`` of the night before."""
        return self.distribution[self.distribution["score_date"] == self.previous]

    @property
    def spend_name(self) -> str:
        """What money is called here."""
        return f"expected spend of {self.model['horizon_days']} days, {self.currency}"


def document(night: Night) -> str:
    """The page."""
    sections = [
        Section("What ran", _ran(night)),
        Section("Scores and levels", _population(night)),
        Section("Expected spend", _spend(night)),
        Section("Reasons", _reasons(night)),
        Section("Data quality", _quality(night)),
        *(Section(name.capitalize(), _WATCHED[name](rows, night.smallest)) for name, rows in night.watched.items()),
        Section("Model", _model(night)),
    ]
    return page.page(f"Night of {night.score_date}", _lead(night), sections)


def _lead(night: Night) -> list[Markup]:
    tonight, before = night.tonight, night.before
    users, spend = int(tonight["users"].sum()), float(tonight["expected_spend"].sum())
    users_before, spend_before = int(before["users"].sum()), float(before["expected_spend"].sum())
    failed = [stage for stage in night.stages if stage["status"] == "failed"]
    scored = [stage for stage in night.stages if stage["stage"] == "score" and stage["status"] != "failed"]
    state = (
        page.badge(f"{len(failed)} of {len(night.stages)} stages failed", "bad")
        if failed
        else page.badge("all stages done", "good")
    )
    against = f"held against the night of {night.previous}" if night.previous else "the first night that was scored"
    rows: list[tuple[str, object, object]] = [
        ("Users scored", f"{users:,}", _change(users, users_before, "{:+,.0f}")),
        (f"Expected spend, {night.currency}", f"{spend:,.0f}", _change(spend, spend_before)),
        ("Mean of a user", f"{spend / users:,.2f}", _change(spend / users, spend_before / max(users_before, 1))),
    ]
    if scored and (computed := scored[-1]["figures"].get("computed")) is not None:
        rows.append(("Computed that night", f"{int(computed):,}", "the others keep their score"))
    rows.append(("Time of all stages", _duration(sum(stage["seconds"] for stage in night.stages)), ""))
    if night.refused is not None:
        fresh = int(night.refused["tonight"].sum())
        rows.append(("Rows refused", f"{fresh:,}", f"{int(night.refused['rows'].sum()):,} in quarantine"))
    for name, found in night.watched.items():
        rows.append((name.capitalize(), _alarm(int(_broken(found).sum())), "figures beyond their threshold"))
    return [page.paragraph(state, f" {against}; bp-spark {__version__}."), page.tiles(rows)]


def _ran(night: Night) -> list[Markup]:
    headings = ("stage", "job", "status", "started, UTC", "seconds", "rows in", "rows out", "error")
    troubled = any(stage["error"] for stage in night.stages)
    rows = [
        [
            stage["stage"],
            stage["job"] or "–",
            page.badge(stage["status"], _MOODS.get(stage["status"], "warn")),
            stage["started"],
            f"{stage['seconds']:,.1f}",
            _count(stage["rows_in"]),
            _count(stage["rows_out"]),
            *([stage["error"] or ""] if troubled else []),
        ]
        for stage in night.stages
    ]
    shown = headings if troubled else headings[:-1]
    return [page.table("Stages since the night before", shown, rows, words=(0, 1, 2, 3), sentences=(7,))]


def _population(night: Night) -> list[Markup]:
    tonight, before = by_level(night.tonight, night.smallest), by_level(night.before, night.smallest)
    rows = []
    for level in BEST_FIRST:
        now, then = tonight[level], before[level]
        row = [level, now.users, now.share, now.spend, now.mean]
        rows.append([*row, then.users, then.share] if night.previous else row)
    headings = ["level", "users", "share", night.spend_name, "mean of a user"]
    headings += [f"users on {night.previous}", "share then"] if night.previous else []
    body = [
        page.figures(
            [
                page.figure(_scores_chart(night), "Scores", f"Share of users by {BIN} points of score."),
                page.figure(_levels_chart(night), "Levels", "Share of users, A the highest."),
            ]
        ),
        page.table("Users by level", headings, rows),
        _risks(night),
    ]
    if night.previous:
        body.append(_migration(night))
    body.append(
        page.note(
            f"Of groups with fewer than {night.smallest} users no figure is told (*), nor of one more by which it could be "
            "reckoned."
        )
    )
    return body


def _bins(rows: pd.DataFrame, smallest: int) -> list[float]:
    """Share of users in each bar, NaN where it is withheld; each level's sum is told elsewhere."""
    starts = range(0, 100, BIN)
    users = rows.groupby("bin")["users"].sum().reindex(starts, fill_value=0)
    counts = {start: int(users[start]) for start in starts}
    width = 100 // len(BEST_FIRST)
    levels = [range(start, start + width, BIN) for start in range(0, 100, width)]
    hidden = withheld(counts, levels, smallest)
    total = max(sum(counts.values()), 1)
    return [math.nan if start in hidden else counts[start] / total for start in starts]


def _risks(night: Night) -> Markup:
    risks = by_risk(night.tonight, night.smallest)
    rows = [[risk, group.users, group.share, group.spend, group.mean] for risk, group in risks.items()]
    headings = ["risk", "users", "share", night.spend_name, "mean of a user"]
    return page.table("Users by risk: how wide the interval is for the expected spend", headings, rows)


def _migration(night: Night) -> Markup:
    counts = {(str(b), str(a)): int(n) for b, a, n in night.migration[["before", "after", "users"]].to_numpy()}
    befores, afters = (*BEST_FIRST, NEW), (*BEST_FIRST, GONE)
    counts = {(b, a): counts.get((b, a), 0) for b in befores for a in afters}
    # each level's users are told of both nights, and so is by how many more came than went
    totals = [[(b, a) for a in afters] for b in BEST_FIRST] + [[(b, a) for b in befores] for a in BEST_FIRST]
    totals.append([(b, a) for b, a in counts if (b == NEW) != (a == GONE)])
    hidden = withheld(counts, totals, night.smallest)
    rows = []
    for before in befores:
        # where users went is read along a row; the shade is their share of it
        total = max(sum(counts[before, after] for after in afters), 1)
        cells = [
            "*" if (before, after) in hidden else _shaded(counts[before, after], counts[before, after] / total)
            for after in afters
        ]
        rows.append([before, *cells])
    return page.table(
        f"Users by level on {night.previous} (rows) and on {night.score_date} (columns)", ["", *afters], rows
    )


def _shaded(users: int, share: float) -> Markup:
    return Markup(f'<span class="heat" style="--part:{share * 60:.0f}%">{users:,}</span>' if users else "–")


def _spend(night: Night) -> list[Markup]:
    history = night.history
    rows = [
        [
            str(row["score_date"]),
            f"{row['users']:,}",
            f"{row['expected_spend']:,.0f}",
            f"{row['expected_spend'] / max(row['users'], 1):,.2f}",
            row["bundle"][:12],
        ]
        for row in history.iloc[::-1].head(14).to_dict("records")
    ]
    headings = ["night", "users", night.spend_name, "mean of a user", "bundle"]
    table = page.table("Newest nights", headings, rows, words=(0, 4))
    if len(history) < 2:
        return [page.note("A curve comes with the second night."), table]
    says = "By night; a dotted line where another bundle began to score."
    return [page.figures([page.figure(_spend_chart(night), "Expected spend of all users", says)]), table]


def _reasons(night: Night) -> list[Markup]:
    users = max(int(night.tonight["users"].sum()), 1)
    told = night.reasons[night.reasons["users"] >= night.smallest]
    top = told.sort_values(["users", "group"], ascending=[False, True]).head(_SHOWN_REASONS)
    if top.empty:
        return [page.note("The bundle gives no reasons.")]
    # how many it raised and lowered is told only where neither are few
    fewer = pd.concat([top["raised"], top["users"] - top["raised"]], axis=1)
    top = top.assign(split=~((fewer > 0) & (fewer < night.smallest)).any(axis=1))
    rows = [
        [
            row["group"],
            f"{row['users'] / users:.1%}",
            f"{row['raised'] / row['users']:.0%}" if row["split"] else "*",
            f"{row['contribution']:,.2f}",
            night.meanings.get(row["feature"], "–") if row["feature"] else "order and content of recent events",
        ]
        for row in top.to_dict("records")
    ]
    chart, says = _reasons_chart(top, users), "Share of users, by whether it raised or lowered the expected spend."
    headings = ["group of features", "users", "raised of them", f"mean size, {night.currency}", "most often above all"]
    caption = "The most frequent reasons, and how much of the expected spend they came to"
    return [
        page.figures([page.figure(chart, "Groups of features among the reasons", says)]),
        page.table(caption, headings, rows, sentences=(4,)),
    ]


def _quality(night: Night) -> list[Markup]:
    body: list[Markup] = []
    cleaned = [stage for stage in night.stages if stage["stage"] == "clean" and "rows" in stage["figures"]]
    for stage in cleaned:
        figures = {name: int(stage["figures"][name]) for name in ("rows", "events", "duplicates", "quarantine")}
        kept = figures["events"] + figures["duplicates"] + figures["quarantine"]
        verdict = page.badge("balanced", "good") if kept == figures["rows"] else page.badge("not balanced", "bad")
        said = f" {figures['rows']:,} rows in = {figures['events']:,} events + {figures['duplicates']:,} duplicates + "
        body.append(page.paragraph(verdict, f"{said}{figures['quarantine']:,} in quarantine"))
    if not cleaned:
        body.append(page.paragraph("Nothing new was delivered and cleaned since the night before."))
    if night.refused is not None and len(night.refused):
        found = night.refused.sort_values(["rows", "source", "rule"], ascending=[False, True, True])
        rows = [
            [row["rule"], row["source"], _count(row["tonight"]), _count(row["rows"])]
            for row in found.to_dict("records")
        ]
        body.append(
            page.table(
                "Rows in quarantine",
                ["rule", "table", "since the night before", "in all"],
                rows,
                words=(1,),
                sentences=(0,),
            )
        )
    elif night.refused is not None:
        body.append(page.paragraph("Quarantine is empty."))
    rows = []
    for row in night.freshness.sort_values(["newest", "kind"], ascending=[False, True]).to_dict("records"):
        late = (night.score_date - row["newest"]).days - 1
        state = page.badge("up to date", "good") if not late else page.badge(f"{late} days behind", "warn")
        rows.append([row["kind"], str(row["newest"]), state, _count(row["last_day"]), _count(row["events"])])
    day = night.score_date - timedelta(days=1)
    headings = ["events", "newest day", "", f"on {day}", f"in {FRESH_DAYS} days"]
    body.append(
        page.table("How fresh the events are", headings, rows, words=(0, 1, 2))
        if rows
        else page.paragraph(page.badge("stale", "bad"), f" No event in the {FRESH_DAYS} days before the night.")
    )
    return body


def _drift(found: pd.DataFrame, smallest: int) -> list[Markup]:
    """Rows of the table ``drift``; how users changed level is told under Scores and levels."""
    told = found[(found["kind"] != "levels") & (found["users"] >= smallest)]
    judged = told[told["threshold"].notna()]
    body = [_verdict(judged)]
    # by how much of what is allowed is used up, so that the next to break comes next
    used = (judged["value"] / judged["threshold"]).abs()
    shown = judged.assign(used=used).sort_values(["broken", "used", "subject"], ascending=[False, False, True])
    headings = ["subject", "metric", "against", "value", "threshold", "", "note"]
    rows = [
        [
            row["subject"],
            row["metric"],
            row["against"] or "–",
            _figure(row["value"]),
            _figure(row["threshold"]),
            _beyond(row["broken"]),
            row["note"] or "",
        ]
        for row in shown.head(_SHOWN_WATCHED).to_dict("records")
    ]
    caption = _caption("Figures that are watched", len(rows), len(judged))
    return [*body, page.table(caption, headings, rows, words=(0, 1, 2, 5), sentences=(6,))] if rows else body


def _fairness(found: pd.DataFrame, smallest: int) -> list[Markup]:
    """Rows of the table ``fairness``."""
    told = found[found["users"] >= smallest]
    judged = told[told["threshold_low"].notna()]
    body = [_verdict(judged)]
    order = ["segment", "metric", "group"]
    shown = judged.sort_values(["broken", *order], ascending=[False, True, True, True])
    headings = ["segment", "group", "users", "metric", "value", "over all others", "90 % interval", "fair", ""]
    rows = [
        [
            *(
                row["segment"],
                row["group"],
                f"{row['users']:,}" + (" (few)" if row["small"] else ""),
                row["metric"],
                _figure(row["value"]),
            ),
            *(_figure(row["ratio"]), f"{_figure(row['ratio_low'])} to {_figure(row['ratio_high'])}"),
            *(f"{_figure(row['threshold_low'])} to {_figure(row['threshold_high'])}", _beyond(row["broken"])),
        ]
        for row in shown.head(_SHOWN_WATCHED).to_dict("records")
    ]
    caption = _caption("Groups held against all other users", len(rows), len(judged))
    return [*body, page.table(caption, headings, rows, words=(0, 1, 3, 8))] if rows else body


_WATCHED: Mapping[str, Callable[[pd.DataFrame, int], list[Markup]]] = {"drift": _drift, "fairness": _fairness}


def _verdict(judged: pd.DataFrame) -> Markup:
    return page.paragraph(
        _alarm(int(_broken(judged).sum())), f" of {len(judged):,} watched figures are beyond their threshold."
    )


def _caption(text: str, shown: int, total: int) -> str:
    return text if shown == total else f"{text}: {shown} of {total:,}, those beyond or nearest to their threshold first"


def _beyond(broken: object) -> Markup:
    return page.badge("beyond", "bad") if broken else page.badge("within", "good")


def _model(night: Night) -> list[Markup]:
    body = [page.facts([(name.replace("_", " "), value) for name, value in night.model.items()])]
    fused = night.metrics[night.metrics["member"] == "fused"]
    if fused.empty:
        return [*body, page.note("It has no metrics: no horizon after its test date was over when it was trained.")]
    values = fused.set_index(["population", "metric"])
    rows = []
    for population in POPULATIONS:
        own = fused[fused["population"] == population]
        # of a handful of users a mean error nearly tells the user's
        if len(own) and int(own["users"].iloc[0]) >= night.smallest:
            told = (values["value"].get((population, metric)) for metric in _METRICS)
            cells = [format_figure(metric, value) for metric, value in zip(_METRICS, told, strict=True)]
            rows.append([f"{population} ({int(own['users'].iloc[0]):,})", *cells])
    caption = "How good it was at its test date; unseen users never took part in training"
    return [*body, page.table(caption, ["users", *(TITLES[metric] for metric in _METRICS)], rows)]


# --- charts ------------------------------------------------------------------------------------------------------------


def _scores_chart(night: Night) -> Chart:
    drawn, (axes,) = page.canvas()
    starts = range(0, 100, BIN)
    axes.bar(
        starts,
        _bins(night.tonight, night.smallest),
        BIN * 0.9,
        align="edge",
        color=SERIES[0],
        label=str(night.score_date),
    )
    if night.previous:
        then = _bins(night.before, night.smallest)
        axes.stairs(then, [*starts, 100], color=SERIES[1], linewidth=1.8, label=str(night.previous))
    page.label(axes, "score", "share of users")
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 20))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=False, axis="x")
    page.legend(axes, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return page.chart(drawn)


def _levels_chart(night: Night) -> Chart:
    drawn, (axes,) = page.canvas()
    nights = [(night.score_date, night.tonight, SERIES[0])]
    if night.previous:
        nights.insert(0, (night.previous, night.before, SERIES[1]))
    width = 0.8 / len(nights)
    for place, (day, rows, colour) in enumerate(nights):
        levels = by_level(rows, night.smallest)
        at = [x - 0.4 + width * place for x in range(len(BEST_FIRST))]
        axes.bar(
            at, [levels[level].part for level in BEST_FIRST], width * 0.95, align="edge", color=colour, label=str(day)
        )
    axes.set_xticks(range(len(BEST_FIRST)), BEST_FIRST)
    page.label(axes, "level", "share of users")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=False, axis="x")
    page.legend(axes, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return page.chart(drawn)


def _spend_chart(night: Night) -> Chart:
    drawn, (axes,) = page.canvas(width=6.5, height=3.0)
    history = night.history
    axes.plot(history["score_date"], history["expected_spend"], marker="o", markersize=4, color=SERIES[0])
    bundles = history["bundle"].tolist()
    for place in range(1, len(bundles)):
        if bundles[place] != bundles[place - 1]:
            axes.axvline(history["score_date"].iloc[place], color=FAINT, linestyle=":")
    page.label(axes, "", f"{night.currency}, {night.model['horizon_days']} days")
    locator = AutoDateLocator(minticks=2, maxticks=7)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    axes.margins(y=0.25)
    return page.chart(drawn)


def _reasons_chart(top: pd.DataFrame, users: int) -> Chart:
    shown = top.iloc[::-1]
    drawn, (axes,) = page.canvas(width=6.5, height=0.9 + 0.33 * len(shown))
    raised = shown["raised"].where(shown["split"], 0) / users
    lowered = (shown["users"] - shown["raised"]).where(shown["split"], 0) / users
    axes.barh(shown["group"], raised, color=SERIES[0], label="raised")
    axes.barh(shown["group"], lowered, left=raised, color=SERIES[1], label="lowered")
    if not shown["split"].all():
        whole = shown["users"].mask(shown["split"], 0) / users
        axes.barh(shown["group"], whole, color=FAINT, label="not told: few users")
    page.label(axes, "share of users", "")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", labelcolor=INK)
    page.legend(axes, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return page.chart(drawn)


# --- words -------------------------------------------------------------------------------------------------------------


def _broken(found: pd.DataFrame) -> pd.Series:
    # a figure that can't be judged is not beyond its threshold
    return found["broken"].fillna(False).astype(bool)


def _alarm(broken: int) -> Markup:
    return page.badge(f"{broken:,}", "bad" if broken else "good")


def _change(now: float, before: float, form: str | None = None) -> str:
    """How ``now`` stands to the night before, in words; nothing without one."""
    if not before:
        return ""
    if now == before:
        return "no change"
    return f"{form.format(now - before)} users" if form else f"{now / before - 1:+.2%}"


def _count(number: Any) -> str:
    return "–" if number is None or number != number else f"{int(number):,}"


def _figure(value: Any) -> str:
    return "–" if value is None or value != value else f"{value:,.4g}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else str(timedelta(seconds=round(seconds)))


def _short(value: float, _: object = None) -> str:
    steps: tuple[tuple[float, str], ...] = ((1e9, "bn"), (1e6, "m"), (1e3, "k"))
    for size, unit in steps:
        if abs(value) >= size:
            return f"{value / size:,.4g} {unit}"
    return f"{value:,.4g}"
