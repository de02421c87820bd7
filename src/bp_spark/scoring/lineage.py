"""Origin of scores: runs explained, score rows traced to what made them, and scoring runs repeated to check them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from operator import itemgetter
from typing import Any

import pandas as pd
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, digest
from bp_spark.core.errors import DataError, MissingTableError
from bp_spark.core.spark_errors import SPARK_ERRORS, is_gone
from bp_spark.core.version import __version__
from bp_spark.lakehouse.run import recorded
from bp_spark.lakehouse.schema import Table, rows_of_date
from bp_spark.lakehouse.store import Lakehouse, read_as_declared
from bp_spark.lakehouse.tables import METRICS, RUNS, SCORES
from bp_spark.registry import bundle as bundles
from bp_spark.registry.bundle import Bundle
from bp_spark.scoring import prediction
from bp_spark.scoring.compare import COMPARED_COLUMNS, TOLERANCE, differences
from bp_spark.scoring.job import features_of_date, newest_run_of

RowsWhere = Callable[..., list[dict[str, Any]]]
"""Reader of the rows of a table that have given values in columns, as :func:`rows_by_spark` for one session is."""


@dataclass(frozen=True)
class Origin:
    """Origin of a row of ``scores``.

    Attributes:
        row: The row, by column.
        run: Row of ``runs`` of the run that computed it, by column.
        bundle: The model, proved unchanged.
        metrics: Rows of ``metrics`` of the bundle; none where its test horizon was not over.
    """

    row: Mapping[str, Any]
    run: Mapping[str, Any]
    bundle: Bundle
    metrics: pd.DataFrame


@dataclass(frozen=True)
class Reproduction:
    """A scoring run that gave the same scores again.

    Attributes:
        rows: Rows compared: all of the date.
        largest: The largest difference, as in :func:`bp_spark.scoring.compare.differences`.
        column: The column with that difference.
        bundle: The model.
        features_version: Delta version of ``user_features`` that both computations read.
        other_code: Versions of bp-spark, other than this one, that computed rows of the date.
    """

    rows: int
    largest: float
    column: str
    bundle: Bundle
    features_version: int
    other_code: list[str]


def rows_by_spark(spark: SparkSession, config: Config, table: Table, **values: Any) -> list[dict[str, Any]]:
    """Return a table's rows that have these values in these columns, with all columns that are declared today.

    Raises:
        MissingTableError: The table does not exist.
    """
    rows = read_as_declared(Lakehouse(spark, config.tables), table)
    for name, value in values.items():
        rows = rows.filter(F.col(name) == F.lit(value))
    return [row.asDict() for row in rows.collect()]


def explain_run(rows_where: RowsWhere, run_id: str) -> list[dict[str, Any]]:
    """Return the rows of ``runs`` of a run, first stage first.

    Raises:
        DataError: There is no such run.
    """
    stages = sorted(rows_where(RUNS, run_id=run_id), key=itemgetter("started_at"))
    if not stages:
        raise DataError("runs", f"holds no run {run_id!r}", column="run_id")
    return stages


def explain_score(rows_where: RowsWhere, config: Config, user_key: str, score_date: date) -> Origin:
    """Trace a row of ``scores`` back to the run, the bundle and the metrics behind it.

    Args:
        rows_where: Reader of the tables.
        config: All settings.
        user_key: The user.
        score_date: Date of the score.

    Raises:
        DataError: There is no such row, or its run is not in ``runs``.
        BundleError: Its bundle isn't in the folder of bundles, or can't be trusted.
    """
    found = rows_where(SCORES, score_date=score_date, user_key=user_key)
    if not found:
        # the message may end in a log, so it doesn't name the user
        raise DataError("scores", f"holds no row of that user on {score_date}", column="user_key")
    row = found[0]
    scoring_stages = [stage for stage in rows_where(RUNS, run_id=row["run_id"]) if stage["stage"] == "score"]
    if not scoring_stages:
        raise DataError("runs", f"holds no run {row['run_id']!r}, which computed the score", column="run_id")
    bundle = _bundle(config, row["bundle_digest"])
    try:
        metrics = rows_where(METRICS, bundle_digest=bundle.digest)
    except MissingTableError:
        metrics = []
    return Origin(row, scoring_stages[0], bundle, pd.DataFrame(metrics))


def reproduce(spark: SparkSession, config: Config, score_date: date) -> Reproduction:
    """Repeat a scoring run from the versions that it read, and compare the result with ``scores``.

    Every user is computed, also those whose score was carried forward. ``scores`` is only read.

    Raises:
        DataError: Rows differ by more than :data:`bp_spark.scoring.compare.TOLERANCE`, or the record of the run or its
            version of ``user_features`` is gone.
        BundleError: Its bundle isn't in the folder of bundles, or can't be trusted.
    """
    with recorded(spark, config, "reproduce") as run:
        lakehouse = run.lakehouse
        scoring_run = newest_run_of(lakehouse, score_date)
        if scoring_run is None or not scoring_run.asDict().get("read"):
            raise DataError("runs", f"doesn't say from what {score_date} was scored; score it again with --full")
        bundle = _bundle(config, scoring_run["figures"]["bundle"])
        version = scoring_run["read"]["user_features"]
        with (
            run.stage("reproduce", digest(scoring_run["run_id"], score_date)) as figures,
            prediction.batch_sizes(spark, config.scoring),
        ):
            try:
                stored, users = _scores(lakehouse, score_date), features_of_date(lakehouse, score_date, version)
                computed = prediction.score(users, bundle, score_date, version)
                summary = _difference_summary(stored, computed, bundle, score_date)
            except SPARK_ERRORS as error:
                if not is_gone(error):
                    raise
                raise DataError(
                    "user_features",
                    f"version {version}, which the night was scored from, is vacuumed: it can't be repeated",
                ) from error
            expected, rows = users.count(), summary["rows"]
            figures["rows_in"], figures["rows_out"] = expected, rows
            figures["score_date"], figures["bundle"], figures["night"] = (
                score_date,
                bundle.digest,
                scoring_run["run_id"],
            )
            differing_rows = {name: count for name in COMPARED_COLUMNS if (count := summary[f"{name}_differing"])}
            if not differing_rows and rows > expected:
                # some users have two rows
                differing_rows = {"user_key": rows - expected}
            if differing_rows:
                listed = ", ".join(f"{name} of {count:,}" for name, count in differing_rows.items())
                raise DataError(
                    "scores",
                    f"{score_date} doesn't come out again from bundle {bundle.digest[:12]} and version {version} of "
                    f"user_features: of {rows:,} rows differ {listed}",
                    column=next(iter(differing_rows)),
                )
            column = max(COMPARED_COLUMNS, key=lambda name: summary[f"{name}_largest"])
            figures["largest_difference"] = largest = summary[f"{column}_largest"]
        by_other_code = stored.filter(F.col("code_version") != __version__).select("code_version").distinct()
        other_code = sorted(row[0] for row in by_other_code.collect())
        return Reproduction(rows, largest, column, bundle, version, other_code)


def _difference_summary(stored: DataFrame, computed: DataFrame, bundle: Bundle, score_date: date) -> Row:
    """Return ``rows``, and for each compared column ``NAME_largest`` and ``NAME_differing``, the rows beyond TOLERANCE."""
    by_user = differences(stored, computed, bundle, score_date)
    aggregates = [F.count(F.lit(1)).alias("rows")]
    for name in COMPARED_COLUMNS:
        aggregates += [
            F.max(name).alias(f"{name}_largest"),
            F.count_if(F.col(name) > TOLERANCE).alias(f"{name}_differing"),
        ]
    summary = by_user.agg(*aggregates).first()
    assert summary is not None
    return summary


def _bundle(config: Config, bundle_digest: str) -> Bundle:
    return bundles.load_promoted(config, bundles.find(config.bundles, bundle_digest))


def _scores(lakehouse: Lakehouse, score_date: date) -> DataFrame:
    return rows_of_date(read_as_declared(lakehouse, SCORES), score_date)
