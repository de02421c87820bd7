"""Count the training data of a bundle: the reference that later scoring runs are compared with."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import DriftConfig, digest
from bp_spark.core.errors import BundleError
from bp_spark.core.spark_errors import SPARK_ERRORS, is_gone
from bp_spark.evaluation import drift
from bp_spark.lakehouse.run import Run
from bp_spark.lakehouse.tables import DRIFT_REFERENCE
from bp_spark.registry import bundle as bundles
from bp_spark.registry.bundle import Bundle

logger = logging.getLogger(__name__)

SCORE = "score"
SCORE_BORDERS = np.arange(1.0, 100.0)

Spreads = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Feature, or SCORE, -> its borders and its spread over the reference; see :mod:`bp_spark.evaluation.drift`."""


def store_reference(run: Run, bundle: Bundle) -> Spreads | None:
    """Count the training data of a bundle into ``drift_reference``, once.

    Features are counted in the bundle's version of ``training_set``, and the score in the bundle's reference population.

    Args:
        run: the running job; this is a stage of it.
        bundle: the bundle.

    Returns:
        The spreads; ``None`` if that version is not in this lakehouse, or was removed.
    """
    lakehouse, trained = run.lakehouse, bundle.manifest["lineage"].get("training_set", {})
    if not lakehouse.exists("training_set") or trained.get("location") != lakehouse.location("training_set"):
        return None
    with run.step("drift reference", DRIFT_REFERENCE, digest(bundle.digest)) as step:
        try:
            rows = lakehouse.read("training_set", trained["version"])
            names = [name for name in bundle.manifest["inputs"]["tabular"] if name in rows.columns]
            spreads = measure_spreads(rows, names, run.config.drift, key=("user_key", "as_of_date"))
        except SPARK_ERRORS as error:
            if not is_gone(error):
                raise
            return None
        spreads[SCORE] = SCORE_BORDERS, drift.spread(bundle.stack.reference_scores, SCORE_BORDERS)
        stored = [
            (bundle.digest, subject, edges.tolist(), counts.tolist(), run.run_id)
            for subject, (edges, counts) in spreads.items()
        ]
        rows = run.spark.createDataFrame(stored, DRIFT_REFERENCE.schema)
        step.replace(rows, where={"bundle_digest": [bundle.digest]})
        step.figures["rows_out"] = len(stored)
        return spreads


def read_reference(run: Run, bundle_digest: str) -> Spreads | None:
    """Return the stored spreads of a bundle's training data; count them now if there are none and the data still exist."""
    lakehouse = run.lakehouse
    if lakehouse.exists("drift_reference"):
        stored = lakehouse.read("drift_reference").filter(F.col("bundle_digest") == bundle_digest).collect()
        if stored:
            return {row["subject"]: (np.array(row["edges"], np.float64), np.array(row["counts"])) for row in stored}
    try:
        folder = bundles.find(run.config.bundles, bundle_digest)
        spreads = store_reference(run, bundles.load_promoted(run.config, folder))
    except BundleError:
        spreads = None
    if spreads is None:
        logger.warning(
            "drift: what bundle %s learned from is not in this lakehouse, so nothing is compared with it, only with the night "
            "before",
            bundle_digest[:12],
        )
    return spreads


def measure_spreads(
    rows: DataFrame, names: list[str], config: DriftConfig, key: tuple[str, ...]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Take the borders of each column from a small sample, and count its spread over a larger sample.

    Args:
        rows: rows with the columns.
        names: names of the columns.
        config: ``max_users`` is the size of the larger sample.
        key: columns that identify a row, for sampling.
    """
    total = rows.count()
    few = drift.sampled(rows, total, drift.SAMPLE, *key).select(*names).toPandas()
    edges = {name: drift.borders(few[name].to_numpy()) for name in names}
    many = drift.sampled(rows, total, config.max_users, *key).withColumn("_all", F.lit(""))
    counts = drift.count_spreads(many, edges, "_all").get("", {})
    return {name: (edges[name], counts[name]) for name in counts}
