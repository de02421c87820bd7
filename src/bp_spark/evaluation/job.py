"""What is watched from night to night: drift of features and scores, errors once they are known, fairness by segment."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, DriftConfig, digest
from bp_spark.core.errors import BundleError, DataError
from bp_spark.core.session import persisted
from bp_spark.core.spark_errors import SPARK_ERRORS, is_gone
from bp_spark.core.version import __version__
from bp_spark.evaluation import drift, metrics
from bp_spark.evaluation import fairness as by_segment
from bp_spark.features import labels
from bp_spark.features.job import span
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.tables import DRIFT, DRIFT_REFERENCE, FAIRNESS
from bp_spark.registry import bundle as bundles
from bp_spark.registry.bundle import Bundle

logger = logging.getLogger(__name__)

SCORE = "score"
TRAINING = "training"
SCORE_BORDERS = np.arange(1.0, 100.0)
_TOLD = 5
"""Broken thresholds that the log names."""

Spreads = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Feature, or SCORE, -> its borders and its spread over the reference; see :mod:`bp_spark.evaluation.drift`."""


@dataclass(frozen=True)
class DriftResult:
    """What a check came to.

    Attributes:
        rows: the night's rows of DRIFT.
        stages: what ran.
    """

    rows: list[dict[str, Any]]
    stages: list[dict[str, Any]]

    @property
    def broken(self) -> list[dict[str, Any]]:
        """Rows whose threshold is broken, those furthest beyond it first."""
        found = [row for row in self.rows if row["broken"]]
        return sorted(found, key=lambda row: -abs(row["value"] - row["threshold"]) / max(row["threshold"], 1e-9))


@dataclass(frozen=True)
class FairnessResult:
    """What a report came to.

    Attributes:
        report: the night's rows of FAIRNESS; there is one for each group and figure.
        broken: how many of them break their thresholds.
        measured: night whose errors are in it, if the horizon of any is over.
        stages: what ran.
    """

    report: DataFrame
    broken: int
    measured: date | None
    stages: list[dict[str, Any]]


# --- drift -------------------------------------------------------------------------------------------------------------


def check_drift(spark: SparkSession, config: Config, score_date: date) -> DriftResult:
    """Compare a night with what its bundle learned from and with the night before; hold earlier nights against real spend.

    Features and the score by their spread; users by their level before and now, and whose score moved without a new event;
    nights whose horizon is over, and that no other check has measured, by the figures of
    :mod:`bp_spark.evaluation.metrics`. The rows
    of the date in ``drift`` are replaced; a broken threshold is a warning in the log. A check of unchanged tables is left
    as it is.

    Raises:
        DataError: the date has no scores.
    """
    with recorded(spark, config, "drift") as run:
        lakehouse = run.lakehouse
        scores = lakehouse.read("scores", lakehouse.version("scores"))
        bundle_digest = _bundle_of(scores, score_date)
        reference = _reference(run, bundle_digest)
        read = {
            name: lakehouse.version(name)
            for name in ("scores", "user_features", "user_daily", "events")
            if lakehouse.exists(name)
        }
        inputs = digest(
            __version__, config.drift, config.labels, config.fusion.coverage, read, score_date, bool(reference)
        )
        with run.step("drift", DRIFT, inputs, score_date=str(score_date)) as step:
            step.figures["score_date"], step.figures["bundle"] = score_date, bundle_digest
            if not step.unchanged:
                rows = [
                    *_of_night(run, scores, score_date, reference),
                    *_realised(run, scores, score_date),
                ]
                same = {"run_id": run.run_id, "score_date": score_date, "bundle_digest": bundle_digest}
                written = spark.createDataFrame([{**row, **same} for row in rows], DRIFT.schema)
                step.replace(written, where={"score_date": [score_date]})
            of_date = lakehouse.read("drift").filter(F.col("score_date") == F.lit(score_date))
            result = DriftResult([row.asDict() for row in of_date.collect()], run.records)
            step.figures["rows_out"], step.figures["broken"] = len(result.rows), len(result.broken)
        _warn(result, score_date)
        return result


def _bundle_of(scores: DataFrame, score_date: date) -> str:
    row = scores.filter(F.col("score_date") == F.lit(score_date)).select("bundle_digest").first()
    if row is None:
        raise DataError("scores", f"holds no rows of {score_date}; run score for it", column="score_date")
    return str(row[0])


def _warn(result: DriftResult, score_date: date) -> None:
    broken = result.broken
    if not broken:
        return
    told = [f"{named(row)} is {row['value']:.4g}, threshold {row['threshold']:.4g}" for row in broken[:_TOLD]]
    more = f"; and {len(broken) - _TOLD:,} more" if len(broken) > _TOLD else ""
    watched = sum(row["threshold"] is not None for row in result.rows)
    fields = {"score_date": str(score_date), "broken": len(broken), "watched": watched}
    message = "drift of %s: %d of %d thresholds are broken: %s%s (table drift; docs/monitoring.md says what to do)"
    logger.warning(message, score_date, len(broken), watched, "; ".join(told), more, extra={"fields": fields})


def named(row: Mapping[str, Any]) -> str:
    """Which figure of DRIFT a row is, in words."""
    against = f" against {row['against']}" if row["against"] else ""
    return f"{row['metric']} of {row['subject']}{against}"


def store_reference(run: Run, bundle: Bundle) -> Spreads | None:
    """Count what the bundle learned from into ``drift_reference``, once: features as in its version of ``training_set``, the
    score as in its reference population.

    Returns:
        ``None`` where that version is not in this lakehouse, or not any more.
    """
    lakehouse, trained = run.lakehouse, bundle.manifest["lineage"].get("training_set", {})
    if not lakehouse.exists("training_set") or trained.get("location") != lakehouse.location("training_set"):
        return None
    with run.step("drift reference", DRIFT_REFERENCE, digest(bundle.digest)) as step:
        try:
            rows = lakehouse.read("training_set", trained["version"])
            names = [name for name in bundle.manifest["inputs"]["tabular"] if name in rows.columns]
            spreads = _spreads(rows, names, run.config.drift, key=("user_key", "as_of_date"))
        except SPARK_ERRORS as error:
            if not is_gone(error):
                raise
            return None
        spreads[SCORE] = SCORE_BORDERS, drift.spread(bundle.fusion.reference_scores, SCORE_BORDERS)
        stored = [
            (bundle.digest, subject, edges.tolist(), counts.tolist(), run.run_id)
            for subject, (edges, counts) in spreads.items()
        ]
        rows = run.spark.createDataFrame(stored, DRIFT_REFERENCE.schema)
        step.replace(rows, where={"bundle_digest": [bundle.digest]})
        step.figures["rows_out"] = len(stored)
        return spreads


def _reference(run: Run, bundle_digest: str) -> Spreads | None:
    """What is known of the bundle's training: as stored, else counted now, if that still can be."""
    lakehouse = run.lakehouse
    if lakehouse.exists("drift_reference"):
        stored = lakehouse.read("drift_reference").filter(F.col("bundle_digest") == bundle_digest).collect()
        if stored:
            return {row["subject"]: (np.array(row["edges"], np.float64), np.array(row["counts"])) for row in stored}
    try:
        folder = bundles.find(run.config.bundles, bundle_digest)
        found = store_reference(run, bundles.load_promoted(run.config, folder))
    except BundleError:
        found = None
    if found is None:
        logger.warning(
            "drift: what bundle %s learned from is not in this lakehouse, so nothing is compared with it, only with the night "
            "before",
            bundle_digest[:12],
        )
    return found


def _spreads(
    rows: DataFrame, names: list[str], config: DriftConfig, key: tuple[str, ...]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Borders of each column, from a small sample, and its spread over a larger one."""
    total = rows.count()
    few = drift.sampled(rows, total, drift.SAMPLE, *key).select(*names).toPandas()
    edges = {name: drift.borders(few[name].to_numpy()) for name in names}
    many = drift.sampled(rows, total, config.max_users, *key).withColumn("_all", F.lit(""))
    counts = drift.counted(many, edges, "_all").get("", {})
    return {name: (edges[name], counts[name]) for name in counts}


def _of_night(run: Run, scores: DataFrame, score_date: date, reference: Spreads | None) -> list[dict[str, Any]]:
    """Rows of the kinds feature, score, levels and stability."""
    before = scores.filter(F.col("score_date") < F.lit(score_date)).agg(F.max("score_date")).collect()[0][0]
    # the version that is recorded is the one that is read, whatever is written meanwhile
    features = run.lakehouse.read("user_features", run.lakehouse.version("user_features"))
    days = [score_date] if before is None else [score_date, before]
    rows = _spread_figures(run.config.drift, scores, features, days, reference)
    if before is not None:
        rows += _between(run.config.drift, scores, features, score_date, before)
    return rows


def _spread_figures(
    config: DriftConfig, scores: DataFrame, features: DataFrame, days: list[date], reference: Spreads | None
) -> list[dict[str, Any]]:
    """How features and score are spread on the first day, against training and against the other day, if there is one."""
    users = scores.filter(F.col("score_date") == F.lit(days[0])).count()
    theirs = drift.sampled(features.filter(F.col("as_of_date").isin(days)), users, config.max_users, "user_key")
    scored = drift.sampled(scores.filter(F.col("score_date").isin(days)), users, config.max_users, "user_key")
    if reference is None:
        # borders have to come from somewhere: of what is there to compare with
        names = [field.name for field in features.schema if field.dataType.simpleString() == "float"]
        reference = _spreads(theirs.filter(F.col("as_of_date") == F.lit(days[-1])), names, config, ("user_key",))
        against = {}
    else:
        against = {name: {TRAINING: counts} for name, (_, counts) in reference.items()}
    edges = {name: edges for name, (edges, _) in reference.items() if name in features.columns}
    found = drift.counted(theirs, edges, "as_of_date")
    for day, counts in drift.counted(scored, {SCORE: SCORE_BORDERS}, "score_date").items():
        found[day] = {**found.get(day, {}), **counts}
    rows = []
    for subject, tonight in found.get(str(days[0]), {}).items():
        watched, kind = subject not in config.not_watched, SCORE if subject == SCORE else "feature"
        if TRAINING in against.get(subject, {}):
            rows += drift.distances(
                kind,
                subject,
                against[subject][TRAINING],
                tonight,
                against=TRAINING,
                max_psi=config.max_psi if watched else None,
                max_ks=config.max_ks if watched else None,
            )
        for before in map(str, days[1:]):
            if subject in found.get(before, {}):
                rows += drift.distances(
                    kind,
                    subject,
                    found[before][subject],
                    tonight,
                    against=before,
                    max_psi=config.max_psi_night if watched else None,
                    max_ks=config.max_ks_night if watched else None,
                )
    return rows


def _between(
    config: DriftConfig, scores: DataFrame, features: DataFrame, score_date: date, before: date
) -> list[dict[str, Any]]:
    """Users by their level before and now, and how many scores moved."""
    earlier, tonight = (scores.filter(F.col("score_date") == F.lit(day)) for day in (before, score_date))
    theirs = [features.filter(F.col("as_of_date") == F.lit(day)) for day in (before, score_date)]
    moved = drift.moved(config.moved_points)
    with persisted(drift.beside(earlier, tonight)) as users:
        cells = users.groupBy("before", "after").agg(F.count(F.lit(1)).alias("users"), F.count_if(moved).alias("moved"))
        matrix = cells.orderBy("before", "after").collect()
        quiet = drift.without_new_events(users.filter(moved), *theirs).count()
    both = [cell for cell in matrix if cell["before"] != drift.NEW and cell["after"] != drift.GONE]
    count = sum(cell["users"] for cell in both)
    changed = sum(cell["users"] for cell in both if cell["before"] != cell["after"])
    of_level: dict[str, int] = {}
    for cell in matrix:
        of_level[cell["before"]] = of_level.get(cell["before"], 0) + cell["users"]
    against, digests = str(before), [_bundle_of(scores, day) for day in (before, score_date)]
    note = None if digests[0] == digests[1] else f"scores of the night before are of another bundle, {digests[0][:12]}"
    rows = [
        drift.figure(
            "levels",
            f"{cell['before']}>{cell['after']}",
            "share",
            cell["users"] / of_level[cell["before"]],
            cell["users"],
            against=against,
            note=note,
        )
        for cell in matrix
    ]
    nobody = math.nan if not count or theirs[0].isEmpty() else quiet / count
    shares = {"changed_level": changed, "moved": sum(cell["moved"] for cell in both)}
    for metric, some in shares.items():
        share = some / count if count else math.nan
        rows.append(drift.figure("stability", SCORE, metric, share, count, against=against, note=note))
    rows.append(
        drift.figure(
            "stability",
            SCORE,
            "moved_without_events",
            nobody,
            count,
            against=against,
            most=config.max_moved,
            note=note if not math.isnan(nobody) else "user_features of the night before are not there any more",
        )
    )
    return rows


# --- what was spent since ----------------------------------------------------------------------------------------------


def _realised(run: Run, scores: DataFrame, score_date: date) -> list[dict[str, Any]]:
    """Figures of the nights whose horizon is over and that no check of another date has measured."""
    measured = set[str]()
    if run.lakehouse.exists("drift"):
        others = run.lakehouse.read("drift").filter(
            (F.col("kind") == "realised") & (F.col("score_date") != F.lit(score_date))
        )
        measured = {row[0] for row in others.select("subject").distinct().collect()}
    rows = []
    for day in _over(run, scores, score_date):
        if str(day) not in measured:
            rows += _errors(run, scores, day)
    return rows


def _over(run: Run, scores: DataFrame, score_date: date) -> list[date]:
    """Nights up to a date whose horizon has passed, as far as events reach, oldest first."""
    if not run.lakehouse.exists("user_daily"):
        return []
    days = run.config.labels.horizon_days
    _, last = span(run.lakehouse)
    newest = min(score_date, last - timedelta(days=days))
    nights = scores.filter(F.col("score_date") <= F.lit(newest)).select("score_date").distinct().collect()
    return [day for day in sorted(row[0] for row in nights) if _of_horizon(scores, day, days)]


def _of_horizon(scores: DataFrame, day: date, days: int) -> bool:
    """Whether a night's expected spend is over so many days: one bundle, with one horizon, made it."""
    by_horizon = F.col("expected_by_horizon")
    same = F.element_at(by_horizon, F.lit(days)) == F.col("expected_spend")
    row = scores.filter(F.col("score_date") == F.lit(day)).select(F.coalesce(same, by_horizon.isNull())).first()
    return row is not None and bool(row[0])


def _with_spend(run: Run, scores: DataFrame, day: date) -> DataFrame:
    """Scores of a night with ``label_spend``, what the user spent over the horizon."""
    night = scores.filter(F.col("score_date") == F.lit(day)).withColumn("as_of_date", F.col("score_date"))
    spend = labels.future_spend(run.lakehouse.read("user_daily"), [day], run.config.labels.horizon_days)
    return labels.join_labels(night, spend)


def _errors(run: Run, scores: DataFrame, day: date) -> list[dict[str, Any]]:
    config = run.config.drift
    rows = _with_spend(run, scores, day)
    users = scores.filter(F.col("score_date") == F.lit(day)).count()
    kept_columns = ("label_spend", "expected_spend", "low", "high", "p_active")
    frame = drift.sampled(rows, users, config.max_users, "user_key").select(*kept_columns).toPandas()
    truth, predicted, low, high, p_active = (frame[name].to_numpy(np.float64) for name in kept_columns)
    found = metrics.evaluate(truth, predicted, low=low, high=high, p_active=p_active)
    spent = np.maximum(truth, 0.0).sum()
    found["calibration"] = predicted.sum() / spent if spent > 0 else math.nan
    promised = _of_test_date(run, _bundle_of(scores, day))
    coverage = run.config.fusion.coverage
    promised |= {"coverage": coverage, "calibration": 1.0}
    ranks = [name for name in promised if name in ("spearman", "gini")]
    least = {name: promised[name] - config.max_rank_loss for name in ranks}
    least |= {"coverage": coverage - config.max_coverage_gap, "calibration": 1 - config.max_calibration_error}
    most = {"calibration": 1 + config.max_calibration_error}
    note = None if len(frame) == users else f"of a sample of {len(frame):,} of {users:,} users, by hash"
    return [
        drift.figure(
            "realised",
            str(day),
            metric,
            value,
            len(frame),
            reference=promised.get(metric),
            least=least.get(metric),
            most=most.get(metric),
            note=note,
        )
        for metric, value in found.items()
    ]


def _of_test_date(run: Run, bundle_digest: str) -> dict[str, float]:
    """Figures of the bundle on its test date, of all users; none where its horizon was not over then."""
    if not run.lakehouse.exists("metrics"):
        return {}
    of_bundle = (
        (F.col("bundle_digest") == bundle_digest) & (F.col("member") == "fused") & (F.col("population") == "all")
    )
    rows = (
        run.lakehouse.read("metrics").filter(of_bundle & F.col("value").isNotNull()).select("metric", "value").collect()
    )
    return {row["metric"]: row["value"] for row in rows if not math.isnan(row["value"])}


# --- fairness ----------------------------------------------------------------------------------------------------------


def fairness(spark: SparkSession, config: Config, score_date: date) -> FairnessResult:
    """Report scores of a night, and the errors of the newest night up to it whose horizon is over, by segment of users.

    The rows of the date in ``fairness`` are replaced; a broken threshold is a warning in the log.

    Raises:
        DataError: the date has no scores, or no user has a segment.
    """
    with recorded(spark, config, "fairness") as run:
        lakehouse = run.lakehouse
        scores = lakehouse.read("scores", lakehouse.version("scores"))
        _bundle_of(scores, score_date)
        segments = by_segment.newest_segments(lakehouse.read("raw_users"))
        names = sorted(row[0] for row in segments.select("segment").distinct().collect())
        if not names:
            raise DataError("raw_users", "no user has a segment; there is nothing to report by", column="segment")
        over = _over(run, scores, score_date)
        inputs = digest(config.fairness, score_date, over[-1:])
        with run.step("fairness", FAIRNESS, inputs, score_date=str(score_date)) as step:
            tonight = scores.filter(F.col("score_date") == F.lit(score_date))
            rows = _by_segment(run, tonight, segments, names, by_segment.of_scores(), score_date)
            for day in over[-1:]:
                night = _with_spend(run, scores, day)
                top = night.agg(F.percentile_approx("label_spend", by_segment.TOP)).collect()[0][0]
                errors = by_segment.of_errors(max(top, 0.0))
                rows = rows.unionByName(_by_segment(run, night, segments, names, errors, day))
            rows = rows.withColumns({"run_id": F.lit(run.run_id), "score_date": F.lit(score_date)})
            step.replace(rows, where={"score_date": [score_date]})
            report = lakehouse.read("fairness").filter(F.col("score_date") == F.lit(score_date))
            counted = report.agg(F.count(F.lit(1)), F.count_if("broken")).collect()[0]
            step.figures["segments"], step.figures["score_date"] = len(names), score_date
            step.figures["measured"] = over[-1] if over else None
            step.figures["rows_out"], step.figures["broken"] = counted
        if counted[1]:
            message = "fairness of %s: %d figures of groups break their thresholds (table fairness; docs/monitoring.md)"
            fields = {"score_date": str(score_date), "broken": counted[1]}
            logger.warning(message, score_date, counted[1], extra={"fields": fields})
        return FairnessResult(report, counted[1], over[-1] if over else None, run.records)


def _by_segment(
    run: Run, night: DataFrame, segments: DataFrame, names: list[str], figures: by_segment.Figures, day: date
) -> DataFrame:
    found = by_segment.report(
        by_segment.in_groups(night, segments, names), figures, run.config.fairness, run.config.privacy.smallest_group
    )
    bundle_digest = _bundle_of(night, day)
    return found.withColumns({"measured_date": F.lit(day), "bundle_digest": F.lit(bundle_digest)})
