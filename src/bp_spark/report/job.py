"""The job that writes the page of a scoring run: few rows of each table on the driver, one HTML file out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
from pyspark.sql import SparkSession

from bp_spark.core.config import Config, digest
from bp_spark.core.errors import BundleError, DataError
from bp_spark.features import catalogue
from bp_spark.lakehouse.run import recorded
from bp_spark.lakehouse.tables import COHORTS, DRIFT, FAIRNESS, MARKET_FORECAST, TOTALS
from bp_spark.registry import bundle as bundles
from bp_spark.registry import decisions as promotions
from bp_spark.report.night import decisions
from bp_spark.report.night.data import PageData
from bp_spark.report.night.reader import REPORT, NightReader, Rows, SparkReader
from bp_spark.report.night.reader_without_spark import DuckdbReader

HISTORY_DATES = 90
"""Scored dates of the curve of expected spend."""


@dataclass(frozen=True)
class ReportResult:
    """Result of a report.

    Attributes:
        page: The HTML file.
        levels: Users and money by level and score; see :func:`bp_spark.report.population.distribution`.
        stages: The stages that ran.
        currency: Currency of the money in ``levels``.
    """

    page: Path
    levels: pd.DataFrame
    stages: list[dict[str, Any]]
    currency: str


def report(spark: SparkSession, config: Config, score_date: date, path: str | Path | None = None) -> ReportResult:
    """Write the page of a scoring run.

    It shows what ran, scores beside those of the date before, reasons, data quality, the model, and drift and fairness where
    they are watched. Spark counts the users; the driver gets as many rows as there are groups. The same tables give the same
    page.

    Args:
        spark: The session.
        config: All settings.
        score_date: A scored date.
        path: The file; by default ``night-DATE.html`` in ``evaluation.reports``.

    Raises:
        DataError: ``scores`` holds no rows of that date, or ``runs`` has no finished scoring run of it.
    """
    with recorded(spark, config, REPORT) as run:
        reader = SparkReader(run.lakehouse)
        scoring_runs = reader.scoring_runs()
        scoring_run = _newest_run(scoring_runs, score_date)
        with run.stage(REPORT, digest(scoring_run["run_id"])) as figures:
            result = _write(reader, config, scoring_runs, scoring_run, path)
            figures["score_date"], figures["page"] = score_date, result.page.absolute()
        return replace(result, stages=run.records)


def report_without_spark(config: Config, score_date: date, path: str | Path | None = None) -> ReportResult:
    """Write the page that :func:`report` would write, without a session; nothing is recorded in ``runs``.

    Raises:
        DataError: ``scores`` holds no rows of that date, or ``runs`` has no finished scoring run of it.
        UnreadableError: A table is left to Spark.
    """
    reader = DuckdbReader(config.tables)
    scoring_runs = reader.scoring_runs()
    return _write(reader, config, scoring_runs, _newest_run(scoring_runs, score_date), path)


def _newest_run(scoring_runs: Rows, score_date: date) -> dict[str, Any]:
    runs_of_date = [row for row in scoring_runs if row["score_date"] == score_date]
    if not runs_of_date:
        raise DataError("runs", f"knows no finished scoring of {score_date}; run score for it", column="figures")
    # a repetition that changed nothing doesn't count
    return next((row for row in reversed(runs_of_date) if row["status"] == "done"), runs_of_date[-1])


def _write(
    reader: NightReader, config: Config, scoring_runs: Rows, scoring_run: dict[str, Any], path: str | Path | None
) -> ReportResult:
    # matplotlib takes a second to import, which other stages needn't spend
    from bp_spark.report import page
    from bp_spark.report.night.document import document

    score_date = scoring_run["score_date"]
    path = Path(path or Path(config.evaluation.reports) / f"night-{score_date}.html")
    data = _page_data(reader, config, scoring_runs, scoring_run)
    page.write(path, document(data))
    return ReportResult(path, data.current, [], data.currency)


def _page_data(reader: NightReader, config: Config, scoring_runs: Rows, scoring_run: dict[str, Any]) -> PageData:
    score_date = scoring_run["score_date"]
    previous_date = reader.previous_date(score_date)
    distribution = reader.distribution(score_date, previous_date)
    if score_date not in set(distribution["score_date"]):
        raise DataError("scores", f"holds no rows of {score_date}; run score for it", column="score_date")
    earlier_starts = [
        row["started_at"]
        for row in scoring_runs
        if row["started_at"] < scoring_run["started_at"] and row["score_date"] != score_date
    ]
    stages = reader.stages(scoring_run, max(earlier_starts, default=None))
    ingest_ids = [stage["figures"].get("ingest_id") for stage in stages if stage["stage"] == "ingest"]
    watched = {table.name: reader.rows_of(table, score_date) for table in (DRIFT, FAIRNESS)}
    # written every few nights
    since = config.profiles.history_every_days - 1
    market = reader.rows_of(MARKET_FORECAST, score_date, since)
    cohorts = _of_bundle(reader.rows_of(COHORTS, score_date, since), scoring_run["bundle"])
    features = catalogue.catalogue(config.features).features
    return PageData(
        score_date=score_date,
        previous_date=previous_date,
        currency=reader.currency() or config.cleaning.currency,
        smallest_group=config.privacy.smallest_group,
        stages=stages,
        distribution=distribution,
        migration=reader.migration(previous_date, score_date) if previous_date else pd.DataFrame(),
        history=_history(scoring_runs, distribution, score_date),
        reasons=reader.reasons(score_date),
        descriptions={
            feature.name: f"{feature.description} [{feature.unit}; {feature.window}]" for feature in features
        },
        freshness=reader.freshness(score_date),
        quarantine=reader.quarantine([int(ingest_id) for ingest_id in ingest_ids if ingest_id]),
        model=_model(config, scoring_run["bundle"]),
        metrics=reader.metrics(scoring_run["bundle"]),
        prospects=reader.prospects(score_date),
        totals=_of_bundle(reader.rows_of(TOTALS, score_date), scoring_run["bundle"]),
        cohorts=cohorts,
        market=market,
        decisions=decisions.read(
            reader, score_date, config.recommendations.every_days or 1, config.privacy.smallest_group
        ),
        watched={name: rows for name, rows in watched.items() if len(rows)},
    )


def _of_bundle(rows: pd.DataFrame, bundle_digest: str) -> pd.DataFrame:
    return rows[rows["bundle_digest"] == bundle_digest] if len(rows) else rows


def _history(scoring_runs: Rows, distribution: pd.DataFrame, score_date: date) -> pd.DataFrame:
    """Return the newest scoring run of each date up to this one, as it was recorded; ``distribution`` overrides the record.

    Dates whose bundle had another horizon are left out: their money is of other days.
    """
    row_by_date: dict[Any, dict[str, Any]] = {
        row["score_date"]: row for row in scoring_runs if row["score_date"] <= score_date
    }
    sums = distribution.groupby("score_date", as_index=False)[["users", "expected_spend"]].sum()
    for sums_of_date in sums.to_dict("records"):
        day = sums_of_date["score_date"]
        overrides = {str(name): value for name, value in sums_of_date.items()}
        row_by_date[day] = {"bundle": "", **row_by_date.get(day, {}), **overrides}
    # older versions of this package recorded neither the spend nor the horizon
    days = row_by_date[score_date].get("horizon_days")
    same = [row for _, row in sorted(row_by_date.items()) if row.get("horizon_days") in (None, days)]
    rows = [row for row in same if row["expected_spend"] is not None]
    history = pd.DataFrame(rows[-HISTORY_DATES:], columns=["score_date", "expected_spend", "users", "bundle"])
    return history.astype({"users": "int64"})


def _model(config: Config, bundle_digest: str) -> dict[str, object]:
    """Return facts of a bundle, which may have been deleted since."""
    facts: dict[str, object] = {"digest": bundle_digest}
    try:
        bundle = bundles.load_promoted(config, bundles.find(config.bundles, bundle_digest))
    except BundleError as error:
        return {"horizon_days": config.labels.horizon_days, **facts, "bundle": f"can't be read: {error}"}
    lineage = bundle.manifest["lineage"]
    reasons = bundle.manifest["metrics"].get("reasons")
    weights = zip(bundle.stack.members, bundle.stack.weights, strict=True)
    decision = promotions.decision(bundle.folder) or {"promoted": False, "reason": "no decision is recorded"}
    return facts | {
        "bundle": bundle.folder.name,
        "horizon_days": bundle.horizon_days,
        "test_date": bundle.test_date,
        "made": f"{bundle.manifest['created_at']} by bp-spark {bundle.manifest['code_version']}",
        "training_set": f"version {lineage['training_set']['version']}" if "training_set" in lineage else "–",
        "members": ", ".join(f"{name} {weight:.0%}" for name, weight in weights),
        "reasons": f"off by {reasons['error']:.0%}, first one right for {reasons['same_first']:.0%} of users"
        if reasons
        else "–",
        "promoted" if decision["promoted"] else "not_promoted": decision["reason"],
    }
