"""Watch scoring runs: drift of features and scores, errors once the spend is known, and fairness by segment."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, DriftConfig, digest
from bp_spark.core.errors import DataError
from bp_spark.core.session import persisted
from bp_spark.core.version import __version__
from bp_spark.evaluation import drift
from bp_spark.evaluation import fairness as by_segment
from bp_spark.evaluation.drift_reference import SCORE, SCORE_BORDERS, Spreads, measure_spreads, read_reference
from bp_spark.evaluation.realised import bundle_of, complete_dates, realised, with_spend
from bp_spark.lakehouse.run import Run, is_written_lately, recorded
from bp_spark.lakehouse.schema import rows_of_date
from bp_spark.lakehouse.store import Lakehouse, read_as_declared
from bp_spark.lakehouse.tables import DRIFT, FAIRNESS, SCORES

logger = logging.getLogger(__name__)

TRAINING = "training"
_LOGGED = 5
"""Number of broken thresholds that the log names."""


@dataclass(frozen=True)
class DriftResult:
    """Result of a drift check.

    Attributes:
        rows: the rows of DRIFT of the date.
        stages: the stages that ran.
    """

    rows: list[dict[str, Any]]
    stages: list[dict[str, Any]]

    @property
    def broken(self) -> list[dict[str, Any]]:
        """Rows with a broken threshold, those furthest beyond it first."""
        broken_rows = [row for row in self.rows if row["broken"]]
        return sorted(broken_rows, key=lambda row: -abs(row["value"] - row["threshold"]) / max(row["threshold"], 1e-9))


@dataclass(frozen=True)
class FairnessResult:
    """Result of a fairness report.

    Attributes:
        report: the rows of FAIRNESS of the date, one for each group and figure.
        broken: number of rows that break their thresholds.
        measured: date of the scores whose errors are reported; ``None`` if no horizon is over.
        stages: the stages that ran.
    """

    report: DataFrame
    broken: int
    measured: date | None
    stages: list[dict[str, Any]]


# --- drift -------------------------------------------------------------------------------------------------------------


def check_drift(spark: SparkSession, config: Config, score_date: date) -> DriftResult:
    """Compare a scoring run with the training of its bundle, with the run before, and earlier runs with the real spend.

    Features and scores are compared by their spread, and users by their level before and now, and by whether their score moved
    without a new event. Runs whose horizon is over, and that no other check has measured, get the figures of
    :mod:`bp_spark.evaluation.metrics`. The rows of the date in ``drift`` are replaced. A broken threshold is a warning in the
    log. If no table has changed since the last check, its rows stay.

    Args:
        spark: the running session.
        config: settings.
        score_date: date of the scoring run.

    Raises:
        DataError: the date has no scores.
    """
    with recorded(spark, config, "drift") as run:
        lakehouse = run.lakehouse
        scores = read_as_declared(lakehouse, SCORES, lakehouse.version("scores"))
        bundle_digest = bundle_of(scores, score_date)
        reference = read_reference(run, bundle_digest)
        versions = {
            name: lakehouse.version(name)
            for name in lakehouse.existing(("scores", "prospect_scores", "user_features", "user_daily", "events"))
        }
        inputs = digest(
            __version__, config.drift, config.labels, config.fusion.coverage, versions, score_date, bool(reference)
        )
        with run.step("drift", DRIFT, inputs, score_date=str(score_date)) as step:
            step.figures["score_date"], step.figures["bundle"] = score_date, bundle_digest
            if not step.unchanged:
                rows = [
                    *_changes(run, scores, score_date, reference),
                    *realised(run, scores, score_date),
                ]
                common = {"run_id": run.run_id, "score_date": score_date, "bundle_digest": bundle_digest}
                frame = spark.createDataFrame([{**row, **common} for row in rows], DRIFT.schema)
                step.replace(frame, where={"score_date": [score_date]})
            date_rows = rows_of_date(lakehouse.read("drift"), score_date)
            result = DriftResult([row.asDict() for row in date_rows.collect()], run.records)
            step.figures["rows_out"], step.figures["broken"] = len(result.rows), len(result.broken)
        _warn(result, score_date)
        return result


def _warn(result: DriftResult, score_date: date) -> None:
    broken = result.broken
    if not broken:
        return
    figures = [f"{named(row)} is {row['value']:.4g}, threshold {row['threshold']:.4g}" for row in broken[:_LOGGED]]
    more = f"; and {len(broken) - _LOGGED:,} more" if len(broken) > _LOGGED else ""
    watched = sum(row["threshold"] is not None for row in result.rows)
    fields = {"score_date": str(score_date), "broken": len(broken), "watched": watched}
    message = "drift of %s: %d of %d thresholds are broken: %s%s (table drift; docs/monitoring.md says what to do)"
    logger.warning(message, score_date, len(broken), watched, "; ".join(figures), more, extra={"fields": fields})


def named(row: Mapping[str, Any]) -> str:
    """Name the figure of a row of DRIFT in words."""
    against = f" against {row['against']}" if row["against"] else ""
    return f"{row['metric']} of {row['subject']}{against}"


def _changes(run: Run, scores: DataFrame, score_date: date, reference: Spreads | None) -> list[dict[str, Any]]:
    """Return the rows of the kinds feature, score, levels and stability."""
    before = scores.filter(F.col("score_date") < F.lit(score_date)).agg(F.max("score_date")).collect()[0][0]
    # read the version that is recorded, whatever is written meanwhile
    features = run.lakehouse.read("user_features", run.lakehouse.version("user_features"))
    days = [score_date] if before is None else [score_date, before]
    rows = _spread_figures(run.config.drift, scores, features, days, reference)
    if before is not None:
        rows += _level_changes(run.config.drift, scores, features, score_date, before)
    return rows


def _spread_figures(
    config: DriftConfig, scores: DataFrame, features: DataFrame, days: list[date], reference: Spreads | None
) -> list[dict[str, Any]]:
    """Return the distances of features and score on the first day to the training, and to the second day if there is one."""
    users = rows_of_date(scores, days[0]).count()
    feature_rows = drift.sampled(features.filter(F.col("as_of_date").isin(days)), users, config.max_users, "user_key")
    score_rows = drift.sampled(scores.filter(F.col("score_date").isin(days)), users, config.max_users, "user_key")
    if reference is None:
        # without a training to compare with, the borders come from the other day
        names = [field.name for field in features.schema if field.dataType.simpleString() == "float"]
        last_day = rows_of_date(feature_rows, days[-1], "as_of_date")
        reference = measure_spreads(last_day, names, config, ("user_key",))
        trained = {}
    else:
        trained = {name: counts for name, (_, counts) in reference.items()}
    edges = {name: edges for name, (edges, _) in reference.items() if name in features.columns}
    spreads = drift.count_spreads(feature_rows, edges, "as_of_date")
    for day, counts in drift.count_spreads(score_rows, {SCORE: SCORE_BORDERS}, "score_date").items():
        spreads[day] = {**spreads.get(day, {}), **counts}
    rows = []
    for subject, current in spreads.get(str(days[0]), {}).items():
        watched, kind = subject not in config.not_watched, SCORE if subject == SCORE else "feature"
        for before, spread, max_psi, max_ks in (
            (TRAINING, trained.get(subject), config.max_psi, config.max_ks),
            *(
                (day, spreads.get(day, {}).get(subject), config.max_psi_night, config.max_ks_night)
                for day in map(str, days[1:])
            ),
        ):
            if spread is not None:
                rows += drift.distances(
                    kind,
                    subject,
                    spread,
                    current,
                    against=before,
                    max_psi=max_psi if watched else None,
                    max_ks=max_ks if watched else None,
                )
    return rows


def _level_changes(
    config: DriftConfig, scores: DataFrame, features: DataFrame, score_date: date, before: date
) -> list[dict[str, Any]]:
    """Return the shares of users by their level before and now, and how many scores moved."""
    earlier, later = (rows_of_date(scores, day) for day in (before, score_date))
    feature_rows = [rows_of_date(features, day, "as_of_date") for day in (before, score_date)]
    moved = drift.has_moved(config.moved_points)
    with persisted(drift.join_runs(earlier, later)) as users:
        cells = users.groupBy("before", "after").agg(F.count(F.lit(1)).alias("users"), F.count_if(moved).alias("moved"))
        matrix = cells.orderBy("before", "after").collect()
        moved_without_events = drift.without_new_events(users.filter(moved), *feature_rows).count()
    both = [cell for cell in matrix if cell["before"] != drift.NEW and cell["after"] != drift.GONE]
    count = sum(cell["users"] for cell in both)
    changed = sum(cell["users"] for cell in both if cell["before"] != cell["after"])
    users_before: dict[str, int] = {}
    for cell in matrix:
        users_before[cell["before"]] = users_before.get(cell["before"], 0) + cell["users"]
    against, digests = str(before), [bundle_of(scores, day) for day in (before, score_date)]
    note = None if digests[0] == digests[1] else f"scores of the night before are of another bundle, {digests[0][:12]}"
    rows = [
        drift.figure(
            "levels",
            f"{cell['before']}>{cell['after']}",
            "share",
            cell["users"] / users_before[cell["before"]],
            cell["users"],
            against=against,
            note=note,
        )
        for cell in matrix
    ]
    no_features = not count or feature_rows[0].isEmpty()
    share_without_events = math.nan if no_features else moved_without_events / count
    counts = {"changed_level": changed, "moved": sum(cell["moved"] for cell in both)}
    for metric, changed_users in counts.items():
        share = changed_users / count if count else math.nan
        rows.append(drift.figure("stability", SCORE, metric, share, count, against=against, note=note))
    rows.append(
        drift.figure(
            "stability",
            SCORE,
            "moved_without_events",
            share_without_events,
            count,
            against=against,
            most=config.max_moved,
            note=note
            if not math.isnan(share_without_events)
            else "user_features of the night before are not there any more",
        )
    )
    return rows


# --- fairness ----------------------------------------------------------------------------------------------------------


def fairness(spark: SparkSession, config: Config, score_date: date) -> FairnessResult:
    """Report the scores of a date by segment of users, and the errors of the newest date up to it whose horizon is over.

    The rows of the date in ``fairness`` are replaced. A broken threshold is a warning in the log. If no table has changed since
    the last report, its rows stay.

    Args:
        spark: the running session.
        config: settings.
        score_date: date of the scoring run.

    Raises:
        DataError: the date has no scores, or no user has a segment.
    """
    with recorded(spark, config, "fairness") as run:
        lakehouse = run.lakehouse
        scores = read_as_declared(lakehouse, SCORES, lakehouse.version("scores"))
        bundle_of(scores, score_date)
        versions = {name: lakehouse.version(name) for name in lakehouse.existing(("scores", "raw_users", "user_daily"))}
        segments = by_segment.newest_segments(lakehouse.read("raw_users", versions.get("raw_users")))
        names = sorted(row[0] for row in segments.select("segment").distinct().collect())
        if not names:
            raise DataError("raw_users", "no user has a segment; there is nothing to report by", column="segment")
        complete = list(complete_dates(run, scores, score_date).items())[-1:]
        measured = complete[-1][0] if complete else None
        smallest = config.privacy.smallest_group
        inputs = digest(__version__, config.fairness, smallest, versions, score_date, complete)
        with run.step("fairness", FAIRNESS, inputs, score_date=str(score_date)) as step:
            if not step.unchanged:
                of_date = rows_of_date(scores, score_date)
                rows = _by_segment(run, of_date, segments, names, by_segment.of_scores(), score_date)
                for day, days in complete:
                    labelled = with_spend(run, scores, day, days)
                    top = labelled.agg(F.percentile_approx("label_spend", by_segment.TOP)).collect()[0][0]
                    errors = by_segment.of_errors(max(top, 0.0))
                    rows = rows.unionByName(_by_segment(run, labelled, segments, names, errors, day))
                rows = rows.withColumns({"run_id": F.lit(run.run_id), "score_date": F.lit(score_date)})
                step.replace(rows, where={"score_date": [score_date]})
            report = rows_of_date(lakehouse.read("fairness"), score_date)
            counted = report.agg(F.count(F.lit(1)), F.count_if("broken")).collect()[0]
            step.figures["segments"], step.figures["score_date"] = len(names), score_date
            step.figures["measured"] = measured
            step.figures["rows_out"], step.figures["broken"] = counted
        if counted[1]:
            message = "fairness of %s: %d figures of groups break their thresholds (table fairness; docs/monitoring.md)"
            fields = {"score_date": str(score_date), "broken": counted[1]}
            logger.warning(message, score_date, counted[1], extra={"fields": fields})
        return FairnessResult(report, counted[1], measured, run.records)


def fairness_is_due(lakehouse: Lakehouse, config: Config, day: date) -> bool:
    """Return whether a night has to report by segment: users have some, and no report is of the last nights.

    How many these are says ``fairness.every_days``.
    """
    every = config.fairness.every_days
    if every is None or not lakehouse.exists("raw_users"):
        return False
    if is_written_lately(lakehouse, FAIRNESS.name, day, every):
        return False
    return not lakehouse.read("raw_users").filter("cardinality(segment) > 0").isEmpty()


def _by_segment(
    run: Run, scores: DataFrame, segments: DataFrame, names: list[str], figures: by_segment.Figures, day: date
) -> DataFrame:
    """Return rows of FAIRNESS, without run and score date, for the scores of a day."""
    users = by_segment.in_groups(scores, segments, names)
    rows = by_segment.report(users, figures, run.config.fairness, run.config.privacy.smallest_group)
    bundle_digest = bundle_of(scores, day)
    return rows.withColumns({"measured_date": F.lit(day), "bundle_digest": F.lit(bundle_digest)})
