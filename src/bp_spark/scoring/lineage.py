"""Where a score comes from, and whether it would come out again: runs explained, score rows traced, nights recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import pandas as pd
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, digest
from bp_spark.core.errors import DataError
from bp_spark.core.spark_errors import SPARK_ERRORS, is_gone
from bp_spark.core.version import __version__
from bp_spark.lakehouse.run import recorded
from bp_spark.lakehouse.tables import RUNS, SCORES, Lakehouse, whole
from bp_spark.registry import bundle as bundles
from bp_spark.registry.bundle import Bundle
from bp_spark.scoring import prediction
from bp_spark.scoring.compare import COMPARED, TOLERANCE, differences
from bp_spark.scoring.job import features_of, night_run


@dataclass(frozen=True)
class Origin:
    """Where a row of ``scores`` comes from.

    Attributes:
        row: the row.
        run: row of ``runs`` of the run that computed it.
        bundle: the model, proved unchanged.
        metrics: rows of ``metrics`` of the bundle, none where its test horizon was not over.
    """

    row: Row
    run: Row
    bundle: Bundle
    metrics: pd.DataFrame


@dataclass(frozen=True)
class Reproduction:
    """A night that came out again.

    Attributes:
        rows: rows compared: all of the night.
        largest: the largest difference, as in :func:`bp_spark.scoring.compare.differences`.
        column: where that is.
        bundle: the model.
        features_version: Delta version of ``user_features`` that was read then and now.
        other_code: versions of bp-spark other than this one that rows of the night were computed by.
    """

    rows: int
    largest: float
    column: str
    bundle: Bundle
    features_version: int
    other_code: list[str]


def explain_run(spark: SparkSession, config: Config, run_id: str) -> list[Row]:
    """The rows of ``runs`` of a run, first stage first.

    Raises:
        DataError: there is no such run.
    """
    stages = _stages(Lakehouse(spark, config.tables), run_id)
    if not stages:
        raise DataError("runs", f"holds no run {run_id!r}", column="run_id")
    return stages


def explain_score(spark: SparkSession, config: Config, user_key: str, score_date: date) -> Origin:
    """Trace a row of ``scores`` back to what it was made from.

    Raises:
        DataError: there is no such row, or its run is not in ``runs``.
        BundleError: its bundle isn't in the folder of bundles, or can't be trusted.
    """
    lakehouse = Lakehouse(spark, config.tables)
    row = _scores(lakehouse, score_date).filter(F.col("user_key") == user_key).first()
    if row is None:
        # not told whom: what this says may end in a log
        raise DataError("scores", f"holds no row of that user on {score_date}", column="user_key")
    made = [stage for stage in _stages(lakehouse, row["run_id"]) if stage["stage"] == "score"]
    if not made:
        raise DataError("runs", f"holds no run {row['run_id']!r}, which computed the score", column="run_id")
    bundle = _bundle(config, row["bundle_digest"])
    if not lakehouse.exists("metrics"):
        return Origin(row, made[0], bundle, pd.DataFrame())
    metrics = lakehouse.read("metrics").filter(F.col("bundle_digest") == bundle.digest)
    return Origin(row, made[0], bundle, metrics.toPandas())


def reproduce(spark: SparkSession, config: Config, score_date: date) -> Reproduction:
    """Compute a night again from the versions it was computed from, and hold it against what ``scores`` says.

    Every user is computed, those too whose score was carried forward from an earlier night. ``scores`` is only read.

    Raises:
        DataError: rows differ by more than :data:`bp_spark.scoring.compare.TOLERANCE`, or the night's run or its version of
            ``user_features`` isn't there any more.
        BundleError: its bundle isn't in the folder of bundles, or can't be trusted.
    """
    with recorded(spark, config, "reproduce") as run:
        lakehouse = run.lakehouse
        night = night_run(lakehouse, score_date)
        if night is None or not night.asDict().get("read"):
            raise DataError("runs", f"doesn't say from what {score_date} was scored; score it again with --full")
        bundle = _bundle(config, night["figures"]["bundle"])
        version = night["read"]["user_features"]
        with (
            run.stage("reproduce", digest(night["run_id"], score_date)) as figures,
            prediction.sized(spark, config.scoring),
        ):
            try:
                stored, users = _scores(lakehouse, score_date), features_of(lakehouse, score_date, version)
                found = _compared(stored, prediction.score(users, bundle, score_date, version), bundle, score_date)
            except SPARK_ERRORS as error:
                if not is_gone(error):
                    raise
                raise DataError(
                    "user_features",
                    f"version {version}, which the night was scored from, is vacuumed: it can't be repeated",
                ) from error
            expected, rows = users.count(), found["rows"]
            figures["rows_in"], figures["rows_out"] = expected, rows
            figures["score_date"], figures["bundle"], figures["night"] = score_date, bundle.digest, night["run_id"]
            differing = {name: n for name in COMPARED if (n := found[f"{name}_differing"])}
            if not differing and rows > expected:
                # users with a score are there twice
                differing = {"user_key": rows - expected}
            if differing:
                told = ", ".join(f"{name} of {count:,}" for name, count in differing.items())
                raise DataError(
                    "scores",
                    f"{score_date} doesn't come out again from bundle {bundle.digest[:12]} and version {version} of "
                    f"user_features: of {rows:,} rows differ {told}",
                    column=next(iter(differing)),
                )
            column = max(COMPARED, key=lambda name: found[f"{name}_largest"])
            figures["largest_difference"] = largest = found[f"{column}_largest"]
        others = stored.filter(F.col("code_version") != __version__).select("code_version").distinct().collect()
        return Reproduction(rows, largest, column, bundle, version, sorted(row[0] for row in others))


def _compared(stored: DataFrame, computed: DataFrame, bundle: Bundle, score_date: date) -> Row:
    """``rows``, and for each compared column its largest difference and how many rows differ by more than the tolerance."""
    apart = differences(stored, computed, bundle, score_date)
    figures = [F.count(F.lit(1)).alias("rows")]
    for name in COMPARED:
        figures += [
            F.max(name).alias(f"{name}_largest"),
            F.count_if(F.col(name) > TOLERANCE).alias(f"{name}_differing"),
        ]
    found = apart.agg(*figures).first()
    assert found is not None
    return found


def _bundle(config: Config, of_digest: str) -> Bundle:
    return bundles.load_promoted(config, bundles.find(config.bundles, of_digest))


def _scores(lakehouse: Lakehouse, score_date: date) -> DataFrame:
    return whole(lakehouse, SCORES).filter(F.col("score_date") == F.lit(score_date))


def _stages(lakehouse: Lakehouse, run_id: str | None) -> list[Row]:
    return whole(lakehouse, RUNS).filter(F.col("run_id") == F.lit(run_id)).orderBy("started_at").collect()
