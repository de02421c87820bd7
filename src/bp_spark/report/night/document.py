"""The page of a scoring run as one HTML document."""

from __future__ import annotations

from bp_spark.core.version import __version__
from bp_spark.report import page
from bp_spark.report.night import cohorts, decisions, formats, market, sections
from bp_spark.report.night.data import PageData
from bp_spark.report.page import Markup, Section


def document(data: PageData) -> str:
    """Return the page."""
    parts = [
        Section("Scores and levels", sections.population(data)),
        Section("Expected spend", sections.spend(data)),
        *([Section("Cohorts", cohorts.section(data))] if len(data.cohorts) else []),
        *([Section("Weeks to come", market.weeks(data))] if not data.market.empty else []),
        *([Section("What to act on", decisions.section(data))] if data.decisions else []),
        Section("Reasons", sections.reasons(data)),
        Section("Data quality", sections.quality(data)),
        *(
            Section(name.capitalize(), sections.WATCHED[name](rows, data.smallest_group))
            for name, rows in data.watched.items()
        ),
        Section("Model", sections.model(data)),
        Section("What ran", sections.stages(data), folded=True),
    ]
    return page.page(f"Night of {data.score_date}", _lead(data), parts)


def _lead(data: PageData) -> list[Markup]:
    """Return what stands above the sections: the state of all stages, and the figures that are read first."""
    current, previous = data.current, data.previous
    users, spend = int(current["users"].sum()), float(current["expected_spend"].sum())
    users_before, spend_before = int(previous["users"].sum()), float(previous["expected_spend"].sum())
    failed = [stage for stage in data.stages if stage["status"] == "failed"]
    scored = [stage for stage in data.stages if stage["stage"] == "score" and stage["status"] != "failed"]
    state = (
        page.badge(f"{len(failed)} of {len(data.stages)} stages failed", "bad")
        if failed
        else page.badge("all stages done", "good")
    )
    previous_date = data.previous_date
    compared = f"held against the night of {previous_date}" if previous_date else "the first night that was scored"
    mean, mean_before = spend / users, spend_before / max(users_before, 1)
    rows: list[tuple[str, object, object]] = [
        ("Users scored", f"{users:,}", formats.change(users, users_before, "{:+,.0f}")),
        (f"Expected spend, {data.currency}", f"{spend:,.0f}", formats.change(spend, spend_before)),
        ("Mean of a user", f"{mean:,.2f}", formats.change(mean, mean_before)),
    ]
    if scored and (computed := scored[-1]["figures"].get("computed")) is not None:
        rows.append(("Computed that night", f"{int(computed):,}", "the others keep their score"))
    rows.append(("Time of all stages", formats.duration(sum(stage["seconds"] for stage in data.stages)), ""))
    if data.quarantine is not None:
        new_rows, all_rows = int(data.quarantine["new_rows"].sum()), int(data.quarantine["rows"].sum())
        rows.append(("Rows refused", f"{new_rows:,}", f"{all_rows:,} in quarantine"))
    for name, watched in data.watched.items():
        broken = int(formats.is_broken(watched).sum())
        rows.append((name.capitalize(), formats.alarm(broken), "figures beyond their threshold"))
    return [page.paragraph(state, f" {compared}; bp-spark {__version__}."), page.tiles(rows)]
