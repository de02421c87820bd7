"""Fit the model of prospects: their features at past dates, the first purchases that followed, and figures of unseen users."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import date

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import LabelsConfig
from bp_spark.core.session import persisted
from bp_spark.evaluation.metrics import auc, expected_calibration_error
from bp_spark.features import labels
from bp_spark.features.definition import KEY
from bp_spark.features.job import can_have_prospects, write_prospects
from bp_spark.features.prospects import FEATURES
from bp_spark.ingest.clean import span
from bp_spark.lakehouse.run import Run
from bp_spark.lakehouse.tables import PROSPECT_FEATURES
from bp_spark.model.members.local_trees import LocalRows, collect_rows
from bp_spark.model.prospects import ProspectModel

_HASHES = 1_000_000

logger = logging.getLogger(__name__)


def fit_prospects(run: Run, test_date: date) -> ProspectModel | None:
    """Fit the model of prospects with nothing later than a test date; the stage ``fit prospects`` has its figures.

    Args:
        run: the running job.
        test_date: date from which on nothing is seen.

    Returns:
        The model; ``None`` where the platform can't have prospects, or had none at any past date.
    """
    if not can_have_prospects(run):
        return None
    config = run.config
    dates = labels.cutoffs(span(run.lakehouse)[0], test_date, config.labels)
    write_prospects(run, dates)
    with run.stage("fit prospects") as figures:
        rows = collect_labelled(run, dates, test_date)
        seen = rows.fold != labels.HOLDOUT
        figures["rows_in"], figures["first_purchases"] = len(rows.spend), int((rows.spend > 0).sum())
        if not seen.any():
            figures["note"] = note = "no prospect at any past date: the bundle scores buyers alone"
            logger.info("fit prospects: %s", note)
            return None
        model = ProspectModel.fit(
            chosen_rows(rows, seen),
            coverage=config.fusion.coverage,
            seed=config.training.seed,
        )
        figures["model"] = "trees" if model.chance else "rates by days since last seen"
        figures.update(
            {name: f"{value:.4f}" for name, value in unseen_metrics(model, chosen_rows(rows, ~seen)).items()}
        )
    return model


def collect_labelled(run: Run, dates: Sequence[date], test_date: date) -> LocalRows:
    """Bring prospects of past dates with their spend in the horizon to the driver, unseen users among them.

    Of all first purchasers and of all others at most about ``prospects.max_training_rows`` / 2 are taken, or more of the one
    where there are fewer of the other. A hash chooses them, and each counts for those who were left out.

    Args:
        run: the running job.
        dates: as-of dates whose horizons end on or before the test date.
        test_date: date from which on no spend is seen.
    """
    config, lakehouse = run.config, run.lakehouse
    spend = labels.future_spend(lakehouse.read("user_daily"), dates, config.labels.horizon_days, test_date)
    stored = lakehouse.read(PROSPECT_FEATURES.name).filter(F.col("as_of_date").isin(*dates))
    labelled = labels.join_labels(stored, spend).select(*KEY, *FEATURES, "label_spend")
    with persisted(labelled.withColumn("bought", F.col("label_spend") > 0)) as rows:
        counts = {row["bought"]: row["count"] for row in rows.groupBy("bought").count().collect()}
        shares = sample_shares(counts.get(True, 0), counts.get(False, 0), config.prospects.max_training_rows)
        return collect_rows(sampled(rows, *shares, config.labels), FEATURES, weight="weight")


def sample_shares(buyers: int, others: int, most: int) -> tuple[float, float]:
    """Return the shares of first purchasers and of others to take, so that about ``most`` are taken at most.

    >>> sample_shares(100, 10_000, 1_100)
    (1.0, 0.1)
    >>> sample_shares(1_000, 1_000, 500)
    (0.25, 0.25)
    """
    taken_buyers = min(buyers, max(most // 2, most - others))
    taken_others = min(others, most - taken_buyers)
    return taken_buyers / max(buyers, 1), taken_others / max(others, 1)


def sampled(rows: DataFrame, buyers_share: float, others_share: float, config: LabelsConfig) -> DataFrame:
    """Take a share of either kind by a hash of the row, with weights, folds and the column ``complete``.

    Args:
        rows: labelled prospects, with the column ``bought``.
        buyers_share: share of first purchasers to take, 0 to 1.
        others_share: share of the others to take, 0 to 1.
        config: the folds.
    """
    share = F.when(F.col("bought"), buyers_share).otherwise(others_share)
    place = F.pmod(F.xxhash64(F.lit("prospects"), *KEY), F.lit(_HASHES)) / _HASHES
    taken = rows.filter(place < share)
    # a share of 0 leaves no row to weigh
    weight = F.try_divide(F.lit(1.0), share)
    return taken.withColumns({"weight": weight, "fold": labels.fold(config), "complete": F.lit(True)})


def chosen_rows(rows: LocalRows, chosen: np.ndarray) -> LocalRows:
    """Return the rows where ``chosen``, boolean [rows], is true."""
    arrays = (rows.values, rows.spend, rows.weights, rows.fold, rows.complete)
    return LocalRows(rows.features, *(array[chosen] for array in arrays))


def unseen_metrics(model: ProspectModel, rows: LocalRows) -> dict[str, float]:
    """Return figures of prospects whom the model has not seen; NaN where they can't be computed.

    Returns:
        ``auc`` of a first purchase; ``ece``, the expected calibration error of its chance; ``spend_calibration``, expected over
        real spend; ``above_high``, the share of prospects who spent more than the upper end.
    """
    predicted = model.predict(dict(zip(rows.features, rows.values.T, strict=True)))
    weights, bought = rows.weights.astype(np.float64), rows.spend > 0
    spent, everyone = float(weights @ rows.spend), float(weights.sum())
    return {
        # weights are the same within either kind, so that they change nothing here
        "auc": auc(bought, predicted["p_active"]),
        "ece": expected_calibration_error(bought, predicted["p_active"], weights),
        "spend_calibration": float(weights @ predicted["expected_spend"]) / spent if spent > 0 else float("nan"),
        "above_high": float(weights @ (rows.spend > predicted["high"])) / everyone if everyone > 0 else float("nan"),
    }
