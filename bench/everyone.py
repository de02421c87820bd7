"""Whether everyone on a platform has a score, and how right those of prospects are: ``python -m bench.everyone [SETTING ...]``.

In: settings to change, as ``synthetic.users=2000``. Out: a line of JSON a figure on standard output.

The platform is synthetic: its users visit before they buy, and some never do. A training as of the test date sees nothing
later. The figures are of that date's prospects and of what they spent in the horizon from it on.

- ``everyone.users_scored_share``: users with a purchase before the date, or registered or seen within ``prospects.silent_days``
  before it, who have exactly one row in ``scores`` and ``prospect_scores`` together.
- ``everyone.prospects``: prospects among them; ``everyone.registered_alone``: those who did nothing else yet.
- ``prospects.auc_first_purchase``: see :func:`bp_spark.evaluation.metrics.auc`.
- ``prospects.ece``: see :func:`bp_spark.evaluation.metrics.expected_calibration_error`.
- ``prospects.spend_calibration``: expected over real spend of all prospects together.
- ``prospects.above_high``: share of prospects who spent more than the upper end of their interval.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import numpy as np
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bench import say
from bp_spark import pipeline
from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.session import MODEL_MODULES, get_session
from bp_spark.evaluation import metrics
from bp_spark.features import labels
from bp_spark.ingest import pseudonyms
from bp_spark.ingest.sources.synthetic import generate
from bp_spark.lakehouse.schema import rows_of_date
from bp_spark.lakehouse.store import Lakehouse

SETTINGS = (
    "synthetic.users=20000",
    # a review comes after a purchase, and to read it takes longer than all else
    "synthetic.kinds=[transactions, behaviours, searches, items]",
    "source.kind=files",
    # prospects don't depend on how buyers are predicted
    "fusion.members=[linear]",
    "labels.other_horizons=[]",
    "labels.recent_cutoffs=0",
    "features.windows=[30, 90]",
    "features.history_length=8",
    "texts.max_tokens=8",
    "evaluation.resamples=10",
    "tracking.uri=null",
)


def run(spark: SparkSession, settings: Config, folder: Path) -> dict[str, float]:
    """Make the platform, train and score as of the newest date whose horizon is over, and return all figures."""
    generate(spark, settings.synthetic, str(folder / "platform"))
    last = settings.synthetic.first_day + timedelta(days=settings.synthetic.days)
    day = last - timedelta(days=settings.labels.horizon_days)
    pipeline.featurize(spark, settings, [day])
    bundle = pipeline.train(spark, settings, day).bundle
    pipeline.score(spark, settings, day, bundle.folder)
    lakehouse = Lakehouse(spark, settings.tables)
    return {**everyone(lakehouse, settings, day), **first_purchases(lakehouse, settings, day)}


def everyone(lakehouse: Lakehouse, settings: Config, day: date) -> dict[str, float]:
    """Return how many of those who should have a score have exactly one."""
    days = lakehouse.read("user_daily").select("user_key", "day", "orders")
    signups = lakehouse.read("raw_users").select(
        "user_key", F.to_date("signup_ts").alias("day"), F.lit(0).alias("orders")
    )
    before = days.unionByName(signups).filter(F.col("day") < F.lit(day))
    seen = before.groupBy("user_key").agg(F.sum("orders").alias("orders"), F.max("day").alias("last"))
    is_recent = F.datediff(F.lit(day), "last") <= settings.prospects.silent_days
    wanted = seen.filter((F.col("orders") > 0) | is_recent)
    scores = [rows_of_date(lakehouse.read(name), day).select("user_key") for name in ("scores", "prospect_scores")]
    counts = scores[0].unionByName(scores[1]).groupBy("user_key").agg(F.count(F.lit(1)).alias("scores"))
    users, once = (
        wanted.join(counts, "user_key", "left").agg(F.count(F.lit(1)), F.count_if(F.col("scores") == 1)).collect()[0]
    )
    features = rows_of_date(lakehouse.read("prospect_features"), day, "as_of_date")
    alone = "days_since_event IS NULL AND days_since_consultation IS NULL AND days_since_contact IS NULL"
    return {
        "everyone.users_scored_share": once / users,
        "everyone.prospects": float(scores[1].count()),
        "everyone.registered_alone": float(features.filter(alone).count()),
    }


def first_purchases(lakehouse: Lakehouse, settings: Config, day: date) -> dict[str, float]:
    """Return how right the scores of prospects are."""
    spend = labels.future_spend(lakehouse.read("user_daily"), [day], settings.labels.horizon_days)
    rows = rows_of_date(lakehouse.read("prospect_scores"), day).withColumn("as_of_date", F.col("score_date"))
    frame = labels.join_labels(rows, spend).select("label_spend", "p_active", "expected_spend", "high").toPandas()
    spent, p_active = np.maximum(frame["label_spend"].to_numpy(), 0.0), frame["p_active"].to_numpy()
    ones = np.ones(len(frame))
    return {
        "prospects.auc_first_purchase": metrics.auc(spent > 0, p_active),
        "prospects.ece": metrics.expected_calibration_error(spent > 0, p_active, ones),
        "prospects.spend_calibration": float(frame["expected_spend"].sum() / spent.sum()),
        "prospects.above_high": float((spent > frame["high"].to_numpy()).mean()),
    }


def main(arguments: Sequence[str]) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="settings to change, as section.key=value")
    overrides = parser.parse_args(arguments).settings
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pseudonyms.make_secret(folder / "secret")
        settings = config.load(
            overrides=[
                *SETTINGS,
                f"source.mapping={folder}/platform/source.yaml",
                f"privacy.secret=file:{folder}/secret",
                f"tables.path={folder}/lakehouse",
                f"bundles={folder}/bundles",
                f"training.work_dir={folder}/work",
                f"evaluation.reports={folder}/reports",
                *overrides,
            ]
        )
        spark = get_session(settings, "bp-spark bench", MODEL_MODULES)
        for figure, value in run(spark, settings, folder).items():
            say(figure, value)
        spark.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
