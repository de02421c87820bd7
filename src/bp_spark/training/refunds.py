"""Fit refunds to come: what users paid and were paid back before past dates, and in the horizons from these on."""

from __future__ import annotations

import logging
from datetime import date

import numpy as np
import pandas as pd
from pyspark.sql import functions as F

from bp_spark.evaluation.metrics import auc
from bp_spark.features import labels
from bp_spark.features.catalogue import catalogue
from bp_spark.features.refunds import PAST, knows_past, with_horizon
from bp_spark.ingest.clean import span
from bp_spark.lakehouse.run import Run
from bp_spark.model.refunds import LEAST_USERS, Refunds
from bp_spark.model.stack import recency_weights
from bp_spark.training.dataset import sample

logger = logging.getLogger(__name__)


def fit_refunds(run: Run, test_date: date) -> Refunds | None:
    """Fit refunds to come with nothing later than a test date; the stage ``fit refunds`` has its figures.

    Args:
        run: the running job; ``user_features`` has the cutoffs of its training.
        test_date: date from which on nothing is seen.

    Returns:
        The model; ``None`` where refunds are too few, or features don't tell the money of a year.
    """
    config = run.config
    if not knows_past(catalogue(config.features).names):
        logger.info("fit refunds: left out; it takes 365 days in features.windows")
        return None
    with run.stage("fit refunds") as figures:
        frame = collect_refunds(run, test_date)
        seen = ~frame["is_holdout"].to_numpy()
        model = fit_on(frame[seen], config.fusion.half_life_days)
        figures["rows_in"] = len(frame)
        if model is None:
            figures["note"] = note = f"fewer than {LEAST_USERS} refunds: none are predicted"
            logger.info("fit refunds: %s", note)
            return None
        figures["share"], figures["prior_paid"] = f"{model.share:.4f}", f"{model.prior_paid:,.2f}"
        figures.update({name: f"{value:.4f}" for name, value in refund_metrics(model, frame[~seen]).items()})
    return model


def collect_refunds(run: Run, test_date: date) -> pd.DataFrame:
    """Bring the money of users before past cutoffs, and in the horizons from these on, to the driver.

    Returns:
        The columns of :func:`bp_spark.features.refunds.with_horizon` and ``is_holdout``, of about ``evaluation.max_users`` rows
        at most.
    """
    config, lakehouse = run.config, run.lakehouse
    dates = labels.cutoffs(span(lakehouse)[0], test_date, config.labels)
    users = lakehouse.read("user_features").filter(F.col("as_of_date").isin(*dates)).select(*labels.KEY, *PAST)
    # all of these horizons end by the test date
    rows = with_horizon(sample(users, config), lakehouse.read("user_daily"), dates, config.labels.horizon_days)
    is_holdout = labels.fold(config.labels) == labels.HOLDOUT
    frame: pd.DataFrame = rows.withColumn("is_holdout", is_holdout).toArrow().to_pandas()
    return frame


def fit_on(frame: pd.DataFrame, half_life_days: float | None) -> Refunds | None:
    """Fit on rows of :func:`collect_refunds`, of which newer ones weigh more."""
    names = ("paid", "refunded", "later_paid", "later_refunded")
    money = {name: frame[name].to_numpy(np.float64) for name in names}
    return Refunds.fit(**money, weights=recency_weights(frame, half_life_days))


def refund_metrics(model: Refunds, frame: pd.DataFrame) -> dict[str, float]:
    """Return figures of users whom the model has not seen; NaN where they can't be computed.

    Returns:
        ``auc`` of a refund in the horizon among those who paid in it, by the share of the past year's money; ``calibration``,
        expected over real refunds of these.
    """
    buyers = frame[frame["later_paid"] > 0]
    paid = buyers["paid"].to_numpy()
    share = model.share_of(paid, buyers["refunded"].to_numpy())
    came = float(buyers["later_refunded"].sum())
    return {
        "auc": auc(buyers["later_refunded"].to_numpy() > 0, share * paid),
        "calibration": float(share @ buyers["later_paid"].to_numpy()) / came if came > 0 else float("nan"),
    }
