"""A whole night in one session: new deliveries, features, scores, profiles, recommendations, checks, and the page about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from pyspark.sql import SparkSession, Window
from pyspark.sql import functions as F

from bp_spark import pipeline
from bp_spark.core.config import Config
from bp_spark.evaluation.job import fairness_is_due
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import RUNS
from bp_spark.pipeline import DriftResult, FairnessResult, ReportResult, ScoreResult
from bp_spark.recommend.job import is_due

STEPS = ("featurize", "score", "profile", "recommend", "drift", "fairness", "report")
"""What a night does, in order; each is a job of its own in ``runs``. Recommendations and fairness aren't due every night."""
_NIGHTS = 5
"""Runs of a step whose median tells how long it will take."""
_IN_MINUTES = 100
"""Shorter times are shown in seconds."""

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class NightResult:
    """Result of a night.

    Attributes:
        scored: What was scored.
        drift: Figures of drift, and which of them are beyond their thresholds.
        fairness: The report by segments of users; ``None`` where none was due.
        report: The page of the night.
        stages: The stages of all steps, as in ``runs``.
    """

    scored: ScoreResult
    drift: DriftResult
    fairness: FairnessResult | None
    report: ReportResult
    stages: list[dict[str, Any]]


def night(
    spark: SparkSession,
    config: Config,
    day: date,
    *,
    bundle: str | Path | None = None,
    strict: bool = False,
    page: str | Path | None = None,
) -> NightResult:
    """Run a night: ingest and featurize, score, profile, check for drift, and write the page.

    Recommendations and the report by segments of users are made where they are due.

    A step whose inputs are unchanged writes nothing. So a night that was stopped goes on where it was when it is run again.

    Args:
        spark: session to work in.
        config: all settings.
        day: date to score, from events before it.
        bundle: folder of a bundle, or its address in the registry; by default the promoted one.
        strict: refuse all new files if one can't be read.
        page: file of the page; by default ``night-DATE.html`` in ``evaluation.reports``.

    Raises:
        BundleError: no bundle is promoted, it can't be trusted, or it doesn't fit the features.
        ConfigError: a setting doesn't fit the stored tables.
        DataError: the source breaks the raw contract, or the date lies before the data.
    """
    lakehouse = Lakehouse(spark, config.tables)
    not_due = set[str]()
    if not is_due(lakehouse, config, day):
        not_due.add("recommend")
    if not fairness_is_due(lakehouse, config, day):
        not_due.add("fairness")
    steps = [step for step in STEPS if step not in not_due]
    progress = _Progress(day, steps, seconds_of_last_runs(lakehouse))
    stages = progress.step("featurize", lambda: pipeline.featurize(spark, config, [day], strict=strict))
    scored = progress.step("score", lambda: pipeline.score(spark, config, day, bundle))
    profiles = progress.step("profile", lambda: pipeline.profile(spark, config, day))
    recommended = []
    if "recommend" in steps:
        recommended = progress.step("recommend", lambda: pipeline.recommend(spark, config, day))
    drift = progress.step("drift", lambda: pipeline.check_drift(spark, config, day))
    fairness = None
    if "fairness" in steps:
        fairness = progress.step("fairness", lambda: pipeline.fairness(spark, config, day))
    report = progress.step("report", lambda: pipeline.report(spark, config, day, page))
    checked = [*drift.stages, *([] if fairness is None else fairness.stages)]
    all_stages = [*stages, *scored.stages, *profiles, *recommended, *checked, *report.stages]
    return NightResult(scored, drift, fairness, report, all_stages)


def seconds_of_last_runs(lakehouse: Lakehouse) -> dict[str, float]:
    """Return the median seconds of the last runs of each step that ended well; a step that never ran is left out."""
    if not lakehouse.exists(RUNS.name):
        return {}
    runs = lakehouse.read(RUNS.name).filter(F.col("job").isin(*STEPS))
    per_run = runs.groupBy("job", "run_id").agg(
        F.sum("seconds").alias("seconds"),
        F.max("started_at").alias("at"),
        F.bool_or(F.col("status") == "failed").alias("failed"),
    )
    newest = Window.partitionBy("job").orderBy(F.desc("at"))
    last = (
        per_run.filter("NOT failed").withColumn("place", F.row_number().over(newest)).filter(F.col("place") <= _NIGHTS)
    )
    return {
        row["job"]: row["seconds"] for row in last.groupBy("job").agg(F.median("seconds").alias("seconds")).collect()
    }


class _Progress:
    """Lines of the log that tell which step of a night begins, and how long the rest takes by the last nights."""

    def __init__(self, day: date, steps: Sequence[str], usual: Mapping[str, float]) -> None:
        self._day, self._steps, self._usual = day, steps, usual

    def step(self, name: str, run: Callable[[], T]) -> T:
        place = self._steps.index(name)
        left = time_left(self._steps[place:], self._usual)
        fields = {"night": str(self._day), "step": name}
        logger.info(
            "night %s, step %d of %d: %s%s",
            self._day,
            place + 1,
            len(self._steps),
            name,
            left,
            extra={"fields": fields},
        )
        return run()


def time_left(steps: Sequence[str], usual: Mapping[str, float]) -> str:
    """Return words for the time that steps usually take; none where one of them has never run.

    >>> time_left(["score", "report"], {"score": 170.0, "report": 20.0})
    ', about 3 min left by the last nights'
    >>> time_left(["report"], {"report": 20.0})
    ', about 20 s left by the last nights'
    >>> time_left(["score", "report"], {"score": 170.0})
    ''
    """
    if not all(name in usual for name in steps):
        return ""
    seconds = sum(usual[name] for name in steps)
    words = f"{seconds:.0f} s" if seconds < _IN_MINUTES else f"{seconds / 60:.0f} min"
    return f", about {words} left by the last nights"
