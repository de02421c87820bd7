"""Scores of prospects: users without a purchase before the date, who have no row in ``scores``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import date

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import StructField, StructType

from bp_spark.core.config import digest
from bp_spark.core.version import __version__
from bp_spark.features.prospects import FEATURES, FORMAT
from bp_spark.features.stages import PROSPECT
from bp_spark.lakehouse.run import Run
from bp_spark.lakehouse.schema import rows_of_date
from bp_spark.lakehouse.tables import PROSPECT_FEATURES, PROSPECT_SCORES
from bp_spark.model.columns import from_arrow
from bp_spark.registry.bundle import Bundle
from bp_spark.report.population import Prospects, prospects_of
from bp_spark.scoring.prediction import distribute, load_once

_PREDICTED = ("user_key", "expected_spend", "low", "high", "p_active", "score", "level", "reason")
"""Columns of PROSPECT_SCORES that the workers compute, with the key."""

logger = logging.getLogger(__name__)


def score_prospects(run: Run, bundle: Bundle, score_date: date) -> Prospects | None:
    """Score the prospects of a date and overwrite that date in ``prospect_scores``, after the buyers of the date.

    Args:
        run: The running job.
        bundle: The model.
        score_date: A date with rows in ``scores``.

    Returns:
        The sums; ``None`` where there are no prospects, or no model of them.
    """
    lakehouse = run.lakehouse
    if not run.config.prospects.enabled or not lakehouse.exists(PROSPECT_FEATURES.name):
        return None
    if (missing := _why_not(bundle)) is not None:
        logger.info("%s: %s; no prospect is scored", bundle.folder, missing)
        return None
    with run.step("score prospects", PROSPECT_SCORES, score_date=str(score_date)) as step:
        # after the step has looked at its table: users who are forgotten meanwhile are gone here, or the write is refused
        version = lakehouse.version(PROSPECT_FEATURES.name)
        prospects = rows_of_date(lakehouse.read(PROSPECT_FEATURES.name, version), score_date, "as_of_date")
        users_by_source = {row["built_from"]: row["count"] for row in prospects.groupBy("built_from").count().collect()}
        of_buyers = lakehouse.inputs("scores", score_date=str(score_date))
        step.inputs = digest(__version__, bundle.digest, sorted(users_by_source.items()), of_buyers)
        if not step.unchanged:
            buyers = rows_of_date(lakehouse.read("scores"), score_date)
            rows = prospects.join(buyers.select("user_key"), "user_key", "left_anti")
            scored = predict(rows, bundle, score_date, run.run_id)
            step.replace(scored, where={"score_date": [score_date]}, after=step.version)
        totals = prospects_of(lakehouse, score_date)
        users = 0 if totals is None else totals.users
        step.figures["rows_in"], step.figures["rows_out"] = sum(users_by_source.values()), users
        step.figures["score_date"], step.figures["bundle"] = score_date, bundle.digest
    return totals


def predict(prospects: DataFrame, bundle: Bundle, score_date: date, run_id: str) -> DataFrame:
    """Compute the score of every prospect on the executors.

    Args:
        prospects: Rows of PROSPECT_FEATURES of one date.
        bundle: A bundle with a model of prospects.
        score_date: The date.
        run_id: The run that computes the scores, recorded with each.

    Returns:
        Rows of PROSPECT_SCORES.
    """
    name, bundle_digest = distribute(prospects.sparkSession, bundle), bundle.digest

    def predict_batches(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        loaded = load_once(name, bundle_digest)
        for batch in batches:
            yield predict_batch(loaded, batch)

    # Spark accepts no NOT NULL from Python
    schema = StructType([StructField(name, PROSPECT_SCORES.schema[name].dataType) for name in _PREDICTED])
    return (
        prospects.select("user_key", *FEATURES)
        .mapInArrow(predict_batches, schema)
        .withColumns(
            {
                "score_date": F.lit(score_date),
                "stage": F.lit(PROSPECT),
                "horizon_days": F.lit(bundle.horizon_days),
                "bundle_digest": F.lit(bundle_digest),
                "run_id": F.lit(run_id),
                "code_version": F.lit(__version__),
                "scored_at": F.current_timestamp(),
            }
        )
    )


def predict_batch(bundle: Bundle, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the predictions for an Arrow batch of ``user_key`` and FEATURES."""
    model = bundle.prospects
    assert model is not None
    columns = from_arrow(batch.drop_columns(["user_key"]))
    predicted = model.predict(columns)
    score, level = bundle.stack.rank(predicted["expected_spend"])
    reason = pa.array(model.reason(columns), pa.string())
    values = {**predicted, "score": score, "level": level, "user_key": batch.column("user_key"), "reason": reason}
    return pa.RecordBatch.from_pydict({column: values[column] for column in _PREDICTED})


def _why_not(bundle: Bundle) -> str | None:
    """Return why a bundle can't score prospects; ``None`` if it can."""
    if bundle.prospects is None:
        return "has no model of prospects"
    if bundle.prospects.definition != FORMAT:
        return "was trained on another definition of prospects' features: train again"
    return None
