"""The page of a night: the tables read, a few rows of each brought to the driver, one HTML file written."""

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
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.tables import METRICS, RUNS, Lakehouse, whole
from bp_spark.registry import bundle as bundles
from bp_spark.report import population

HISTORY_NIGHTS = 90
"""Nights of which the expected spend is drawn."""
_JOB = "report"
_MOST_STAGES = 200
_WATCHED = ("drift", "fairness")


@dataclass(frozen=True)
class ReportResult:
    """What a report came to: the page, the distribution of the night, what ran."""

    page: Path
    levels: pd.DataFrame
    stages: list[dict[str, Any]]


def report(spark: SparkSession, config: Config, score_date: date, path: str | Path | None = None) -> ReportResult:
    """Write the page of a night: what ran, scores beside those of the night before, reasons, data quality, drift and fairness
    where they are watched, the model.

    Users are counted by Spark; no more rows come to the driver than there are groups. The same tables give the same page.

    Args:
        path: the file; by default ``night-DATE.html`` in ``evaluation.reports``.

    Raises:
        DataError: ``scores`` holds no rows of that date, or ``runs`` doesn't know the night.
    """
    # matplotlib takes a second to import: other stages don't pay for it
    from bp_spark.report import night as pages
    from bp_spark.report import page

    path = Path(path or Path(config.evaluation.reports) / f"night-{score_date}.html")
    with recorded(spark, config, _JOB) as run:
        lakehouse = run.lakehouse
        nights = _nights(lakehouse)
        of_date = [row for row in nights if row["score_date"] == score_date]
        if not of_date:
            raise DataError("runs", f"knows no finished scoring of {score_date}; run score for it", column="figures")
        # a repetition that changed nothing is not the night
        tonight = next((row for row in reversed(of_date) if row["status"] == "done"), of_date[-1])
        with run.stage(_JOB, digest(tonight["run_id"])) as figures:
            scores = lakehouse.read("scores")
            of_night = scores.filter(F.col("score_date") == F.lit(score_date))
            previous = _previous(scores, score_date)
            before = scores.filter(F.col("score_date") == F.lit(previous))
            distribution = population.distribution(of_night.unionByName(before)).toPandas()
            if score_date not in set(distribution["score_date"]):
                raise DataError("scores", f"holds no rows of {score_date}; run score for it", column="score_date")
            moved = population.migration(before, of_night).toPandas() if previous else pd.DataFrame()
            stages = _stages(lakehouse, tonight, nights)
            model, metrics = _model(run, tonight["bundle"])
            known = catalogue.catalogue(config.features).features
            made = pages.Night(
                score_date=score_date,
                previous=previous,
                currency=config.cleaning.currency,
                smallest=config.privacy.smallest_group,
                stages=[stage.asDict() for stage in stages],
                distribution=distribution,
                migration=moved,
                history=_history(nights, distribution, score_date),
                reasons=population.reasons(of_night).toPandas(),
                meanings={
                    feature.name: f"{feature.description} [{feature.unit}; {feature.window}]" for feature in known
                },
                freshness=population.freshness(lakehouse.read("events"), score_date, pages.FRESH_DAYS).toPandas(),
                refused=_refused(lakehouse, stages),
                model=model,
                metrics=metrics,
                watched=_watched(lakehouse, score_date),
            )
            page.write(path, pages.document(made))
            figures["score_date"], figures["page"] = score_date, path.absolute()
        return ReportResult(path, made.tonight, run.records)


def _nights(lakehouse: Lakehouse) -> list[Row]:
    """Scorings that ended well, oldest first: ``run_id, started_at, status, score_date, bundle, users, expected_spend``.

    A row for each night and repetition: some hundreds a year.
    """
    told = F.col("figures")
    found = whole(lakehouse, RUNS).filter((F.col("stage") == "score") & (F.col("status") != "failed"))
    return (
        found.select(
            "run_id",
            "started_at",
            "status",
            F.to_date(told["score_date"]).alias("score_date"),
            told["bundle"].alias("bundle"),
            told["users"].cast("long").alias("users"),
            told["expected_spend"].cast("double").alias("expected_spend"),
        )
        .filter("score_date IS NOT NULL")
        .orderBy("started_at")
        .collect()
    )


def _previous(scores: DataFrame, score_date: date) -> date | None:
    found = scores.filter(F.col("score_date") < F.lit(score_date)).agg(F.max("score_date")).first()
    return None if found is None else found[0]


def _stages(lakehouse: Lakehouse, tonight: Row, nights: Collection[Row]) -> list[Row]:
    """What ran since another night was scored, up to the end of this one; the newest, where these are many."""
    earlier = [
        row["started_at"]
        for row in nights
        if row["started_at"] < tonight["started_at"] and row["score_date"] != tonight["score_date"]
    ]
    runs = whole(lakehouse, RUNS).filter(F.coalesce("job", F.lit("")) != _JOB)
    own = F.col("run_id") == tonight["run_id"]
    runs = runs.filter(own | (F.col("started_at") <= F.lit(tonight["started_at"])))
    if earlier:
        runs = runs.filter(own | (F.col("started_at") > F.lit(max(earlier))))
    # in words here: Python would tell the time of the machine's own zone
    runs = runs.withColumn("started", F.date_format("started_at", "yyyy-MM-dd HH:mm"))
    return runs.orderBy(F.desc("started_at")).limit(_MOST_STAGES).collect()[::-1]


def _history(nights: Collection[Row], distribution: pd.DataFrame, score_date: date) -> pd.DataFrame:
    """The newest scoring of each night up to this one: as recorded then, and the nights of ``distribution`` as they are."""
    found: dict[Any, dict[str, Any]] = {
        row["score_date"]: row.asDict() for row in nights if row["score_date"] <= score_date
    }
    for sums in (
        distribution.groupby("score_date", as_index=False)[["users", "expected_spend"]].sum().to_dict("records")
    ):
        day = sums["score_date"]
        found[day] = {"bundle": "", **found.get(day, {}), **{str(name): value for name, value in sums.items()}}
    # nights before this was recorded are left out
    told = [found[day] for day in sorted(found) if found[day]["expected_spend"] is not None][-HISTORY_NIGHTS:]
    history = pd.DataFrame(told, columns=["score_date", "expected_spend", "users", "bundle"])
    return history.astype({"users": "int64"})


def _refused(lakehouse: Lakehouse, stages: Collection[Row]) -> pd.DataFrame | None:
    if not lakehouse.exists("quarantine"):
        return None
    told = [stage["figures"].get("ingest_id") for stage in stages if stage["stage"] == "ingest"]
    return population.refused(lakehouse.read("quarantine"), [int(number) for number in told if number]).toPandas()


def _model(run: Run, of_digest: str) -> tuple[dict[str, object], pd.DataFrame]:
    """What the page says of a bundle, which may have been deleted since, and its metrics."""
    config, lakehouse = run.config, run.lakehouse
    metrics = (
        whole(lakehouse, METRICS) if lakehouse.exists("metrics") else run.spark.createDataFrame([], METRICS.schema)
    )
    of_bundle = metrics.filter(F.col("bundle_digest") == of_digest).toPandas()
    told: dict[str, object] = {"digest": of_digest}
    try:
        bundle = bundles.load_promoted(config, bundles.find(config.bundles, of_digest))
    except BundleError as error:
        return {"horizon_days": config.labels.horizon_days, **told, "bundle": f"can't be read: {error}"}, of_bundle
    lineage = bundle.manifest["lineage"]
    weights = zip(bundle.fusion.members, bundle.fusion.weights, strict=True)
    decision = bundles.decision(bundle.folder) or {"promoted": False, "reason": "no decision is recorded"}
    told |= {
        "bundle": bundle.folder.name,
        "horizon_days": bundle.horizon_days,
        "test_date": bundle.judged_on,
        "made": f"{bundle.manifest['created_at']} by bp-spark {bundle.manifest['code_version']}",
        "training_set": f"version {lineage['training_set']['version']}" if "training_set" in lineage else "–",
        "members": ", ".join(f"{name} {weight:.0%}" for name, weight in weights),
        "promoted" if decision["promoted"] else "not_promoted": decision["reason"],
    }
    return told, of_bundle


def _watched(lakehouse: Lakehouse, score_date: date) -> dict[str, pd.DataFrame]:
    """Rows of the night of the tables of what is watched, where somebody watches: as many as there are features and groups."""
    there = [name for name in _WATCHED if lakehouse.exists(name)]
    found = {name: lakehouse.read(name).filter(F.col("score_date") == F.lit(score_date)).toPandas() for name in there}
    return {name: rows for name, rows in found.items() if len(rows)}
