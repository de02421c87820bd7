"""How right refunds to come are: a part of :mod:`bench.decisions`.

The platform is synthetic, because no real shop at hand tells refunds: 3 % of its order lines are paid back, and users differ
from each other (``synthetic.refund_spread``). The model is fitted as of a date, and judged on the 90 days from it on.

- ``refund.auc``: chance that a user with a refund has a larger product of expected share and money of the past year than one
  without, among those who paid; ``refund.auc_past_refunds``: the same of the refunds of the past year.
- ``refund.error_vs_platform``: squared error of refunds, each over the money paid, by that of the platform's share for all.
- ``refund.error_vs_past_share``: the same by that of the user's share of the past year, and of the platform's where nothing was
  paid.
- ``refund.calibration``: expected over real refunds of those who paid; ``refund.calibration_top``: the same of the tenth with
  the largest expected shares.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark import pipeline
from bp_spark.core import config
from bp_spark.evaluation.metrics import auc
from bp_spark.features import labels
from bp_spark.features.refunds import with_horizon
from bp_spark.ingest import pseudonyms
from bp_spark.ingest.sources.synthetic import generate
from bp_spark.lakehouse.run import recorded
from bp_spark.lakehouse.schema import rows_of_date
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.model.refunds import Refunds
from bp_spark.training.refunds import fit_refunds

SETTINGS = (
    "synthetic.users=10000",
    "synthetic.days=540",
    "synthetic.kinds=[transactions, items]",
    "synthetic.refund_spread=1.0",
    "source.kind=files",
    "labels.cutoffs=4",
    "labels.cutoff_step_days=28",
    "features.history_length=4",
    "texts.max_tokens=8",
)


def refunds(spark: SparkSession, folder: Path) -> dict[str, float]:
    """Return how right refunds to come are on a platform that is made in a folder."""
    return figures(*judged(spark, folder))


def judged(spark: SparkSession, folder: Path) -> tuple[Refunds, pd.DataFrame]:
    """Make the platform, fit as of a date, and return the model and the money of users who paid from that date on."""
    pseudonyms.make_secret(folder / "secret")
    settings = config.load(
        overrides=[
            *SETTINGS,
            f"source.mapping={folder}/platform/source.yaml",
            f"privacy.secret=file:{folder}/secret",
            f"tables.path={folder}/lakehouse",
        ]
    )
    generate(spark, settings.synthetic, str(folder / "platform"))
    first, horizon = settings.synthetic.first_day, settings.labels.horizon_days
    day = first + timedelta(days=settings.synthetic.days - horizon)
    pipeline.featurize(spark, settings, [*labels.cutoffs(first, day, settings.labels), day])
    with recorded(spark, settings, "bench") as run:
        model = fit_refunds(run, day)
    assert model is not None
    lakehouse = Lakehouse(spark, settings.tables)
    users = rows_of_date(lakehouse.read("user_features"), day, "as_of_date")
    rows = with_horizon(users, lakehouse.read("user_daily"), [day], horizon).filter(F.col("later_paid") > 0)
    return model, rows.toPandas()


def figures(model: Refunds, rows: pd.DataFrame) -> dict[str, float]:
    """Return the figures of users whose money from the date on is known."""
    money = ("paid", "refunded", "later_paid", "later_refunded")
    paid, refunded, later_paid, later_refunded = (rows[name].to_numpy(np.float64) for name in money)
    share = model.share_of(paid, refunded)
    own_share = np.divide(refunded, paid, out=np.full(len(rows), model.share), where=paid > 0)
    platform_share = np.full(len(rows), later_refunded.sum() / later_paid.sum())

    def error(shares: np.ndarray) -> float:
        return float(((later_refunded - shares * later_paid) ** 2 / later_paid).sum())

    top = share >= np.quantile(share, 0.9)
    return {
        "refund.auc": auc(later_refunded > 0, share * paid),
        "refund.auc_past_refunds": auc(later_refunded > 0, refunded),
        "refund.error_vs_platform": error(share) / error(platform_share),
        "refund.error_vs_past_share": error(share) / error(own_share),
        "refund.calibration": float(share @ later_paid) / later_refunded.sum(),
        "refund.calibration_top": float(share[top] @ later_paid[top]) / later_refunded[top].sum(),
    }
