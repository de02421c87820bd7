"""The job that writes the page of a scoring run: few rows of each table on the driver, one HTML file out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, digest
from bp_spark.core.errors import BundleError, DataError
from bp_spark.features import catalogue
from bp_spark.ingest.clean import currency_of
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.schema import rows_of_date
from bp_spark.lakehouse.store import Lakehouse, read_as_declared
from bp_spark.lakehouse.tables import METRICS, RUNS
from bp_spark.registry import bundle as bundles
from bp_spark.registry import decisions
from bp_spark.report import population
from bp_spark.report.night.data import FRESH_DAYS, PageData

HISTORY_DATES = 90
"""Scored dates of the curve of expected spend."""
_JOB = "report"
_MAX_STAGES = 200
_WATCHED = ("drift", "fairness")


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
    # matplotlib takes a second to import, which other stages needn't spend
    from bp_spark.report import page
    from bp_spark.report.night.document import document

    path = Path(path or Path(config.evaluation.reports) / f"night-{score_date}.html")
    with recorded(spark, config, _JOB) as run:
        lakehouse = run.lakehouse
        scoring_runs = _scoring_runs(lakehouse)
        runs_of_date = [row for row in scoring_runs if row["score_date"] == score_date]
        if not runs_of_date:
            raise DataError("runs", f"knows no finished scoring of {score_date}; run score for it", column="figures")
        # a repetition that changed nothing doesn't count
        scoring_run = next((row for row in reversed(runs_of_date) if row["status"] == "done"), runs_of_date[-1])
        with run.stage(_JOB, digest(scoring_run["run_id"])) as figures:
            scores = lakehouse.read("scores")
            current = rows_of_date(scores, score_date)
            previous_date = _previous_date(scores, score_date)
            previous = rows_of_date(scores, previous_date)
            distribution = population.distribution(current.unionByName(previous)).toPandas()
            if score_date not in set(distribution["score_date"]):
                raise DataError("scores", f"holds no rows of {score_date}; run score for it", column="score_date")
            migration = population.migration(previous, current).toPandas() if previous_date else pd.DataFrame()
            stages = _stages(lakehouse, scoring_run, scoring_runs)
            model, metrics = _model(run, scoring_run["bundle"])
            features = catalogue.catalogue(config.features).features
            data = PageData(
                score_date=score_date,
                previous_date=previous_date,
                currency=currency_of(lakehouse) or config.cleaning.currency,
                smallest_group=config.privacy.smallest_group,
                stages=[stage.asDict() for stage in stages],
                distribution=distribution,
                migration=migration,
                history=_history(scoring_runs, distribution, score_date),
                reasons=population.reasons(current).toPandas(),
                descriptions={
                    feature.name: f"{feature.description} [{feature.unit}; {feature.window}]" for feature in features
                },
                freshness=population.freshness(lakehouse.read("events"), score_date, FRESH_DAYS).toPandas(),
                quarantine=_quarantine(lakehouse, stages),
                model=model,
                metrics=metrics,
                prospects=population.prospects_of(lakehouse, score_date),
                watched=_watched(lakehouse, score_date),
            )
            page.write(path, document(data))
            figures["score_date"], figures["page"] = score_date, path.absolute()
        return ReportResult(path, data.current, run.records, data.currency)


def _scoring_runs(lakehouse: Lakehouse) -> list[Row]:
    """Return the scoring runs that ended well, oldest first: some hundreds a year.

    Returns:
        ``run_id, started_at, status, score_date, bundle, users, expected_spend``, a row for each run and repetition.
    """
    figures = F.col("figures")
    ended_well = read_as_declared(lakehouse, RUNS).filter((F.col("stage") == "score") & (F.col("status") != "failed"))
    return (
        ended_well.select(
            "run_id",
            "started_at",
            "status",
            F.to_date(figures["score_date"]).alias("score_date"),
            figures["bundle"].alias("bundle"),
            figures["users"].cast("long").alias("users"),
            figures["expected_spend"].cast("double").alias("expected_spend"),
        )
        .filter("score_date IS NOT NULL")
        .orderBy("started_at")
        .collect()
    )


def _previous_date(scores: DataFrame, score_date: date) -> date | None:
    newest = scores.filter(F.col("score_date") < F.lit(score_date)).agg(F.max("score_date")).first()
    return None if newest is None else newest[0]


def _stages(lakehouse: Lakehouse, scoring_run: Row, scoring_runs: Collection[Row]) -> list[Row]:
    """Return the stages since another date was scored, up to the end of this scoring run; at most the newest _MAX_STAGES."""
    earlier_starts = [
        row["started_at"]
        for row in scoring_runs
        if row["started_at"] < scoring_run["started_at"] and row["score_date"] != scoring_run["score_date"]
    ]
    stages = read_as_declared(lakehouse, RUNS).filter(F.coalesce("job", F.lit("")) != _JOB)
    is_own = F.col("run_id") == scoring_run["run_id"]
    stages = stages.filter(is_own | (F.col("started_at") <= F.lit(scoring_run["started_at"])))
    if earlier_starts:
        stages = stages.filter(is_own | (F.col("started_at") > F.lit(max(earlier_starts))))
    # formatted by Spark: Python would use the time zone of the machine
    stages = stages.withColumn("started", F.date_format("started_at", "yyyy-MM-dd HH:mm"))
    return stages.orderBy(F.desc("started_at")).limit(_MAX_STAGES).collect()[::-1]


def _history(scoring_runs: Collection[Row], distribution: pd.DataFrame, score_date: date) -> pd.DataFrame:
    """Return the newest scoring run of each date up to this one, as it was recorded; ``distribution`` overrides the record."""
    row_by_date: dict[Any, dict[str, Any]] = {
        row["score_date"]: row.asDict() for row in scoring_runs if row["score_date"] <= score_date
    }
    sums = distribution.groupby("score_date", as_index=False)[["users", "expected_spend"]].sum()
    for sums_of_date in sums.to_dict("records"):
        day = sums_of_date["score_date"]
        overrides = {str(name): value for name, value in sums_of_date.items()}
        row_by_date[day] = {"bundle": "", **row_by_date.get(day, {}), **overrides}
    # older versions of this package did not record the spend
    rows = [row_by_date[day] for day in sorted(row_by_date) if row_by_date[day]["expected_spend"] is not None]
    history = pd.DataFrame(rows[-HISTORY_DATES:], columns=["score_date", "expected_spend", "users", "bundle"])
    return history.astype({"users": "int64"})


def _quarantine(lakehouse: Lakehouse, stages: Collection[Row]) -> pd.DataFrame | None:
    if not lakehouse.exists("quarantine"):
        return None
    ingest_ids = [stage["figures"].get("ingest_id") for stage in stages if stage["stage"] == "ingest"]
    new_ingests = [int(ingest_id) for ingest_id in ingest_ids if ingest_id]
    return population.quarantined(lakehouse.read("quarantine"), new_ingests).toPandas()


def _model(run: Run, bundle_digest: str) -> tuple[dict[str, object], pd.DataFrame]:
    """Return facts of a bundle, which may have been deleted since, and its metrics."""
    config, lakehouse = run.config, run.lakehouse
    metrics = (
        read_as_declared(lakehouse, METRICS)
        if lakehouse.exists("metrics")
        else run.spark.createDataFrame([], METRICS.schema)
    )
    metrics_of_bundle = metrics.filter(F.col("bundle_digest") == bundle_digest).toPandas()
    facts: dict[str, object] = {"digest": bundle_digest}
    try:
        bundle = bundles.load_promoted(config, bundles.find(config.bundles, bundle_digest))
    except BundleError as error:
        facts = {"horizon_days": config.labels.horizon_days, **facts, "bundle": f"can't be read: {error}"}
        return facts, metrics_of_bundle
    lineage = bundle.manifest["lineage"]
    reasons = bundle.manifest["metrics"].get("reasons")
    weights = zip(bundle.stack.members, bundle.stack.weights, strict=True)
    decision = decisions.decision(bundle.folder) or {"promoted": False, "reason": "no decision is recorded"}
    facts |= {
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
    return facts, metrics_of_bundle


def _watched(lakehouse: Lakehouse, score_date: date) -> dict[str, pd.DataFrame]:
    """Return the date's rows of the tables of watched figures that have any: as many as there are features and groups."""
    names = [name for name in _WATCHED if lakehouse.exists(name)]
    tables = {name: rows_of_date(lakehouse.read(name), score_date).toPandas() for name in names}
    return {name: rows for name, rows in tables.items() if len(rows)}
