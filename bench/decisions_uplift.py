"""Whether users who gain from a campaign are found: a part of :mod:`bench.decisions`.

In: the demo's tables. Out: a line of JSON a figure on standard output. Each of :data:`CAMPAIGNS` campaigns that never were
draws half of the users at random. In one world the treatment adds a share of their spend to users with many discounts; in
another one it adds nothing, and in a third the same to all.

- ``uplift.qini_found``: share of campaigns in the first world whose ranking is surely better than a random order.
- ``uplift.qini_false``: the same in the other two worlds together; it should be about 0.025.
- ``uplift.first_tenth``: planted gain of the tenth that is ranked first over that of all users, in the first world.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import numpy as np
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config
from bp_spark.experiments.covariates import covariates
from bp_spark.experiments.learners import TENTHS, judge, qini
from bp_spark.experiments.sample import FOLDS, Sample
from bp_spark.features import labels
from bp_spark.lakehouse.store import Lakehouse

CAMPAIGNS = 30
DAY, DAYS = date(2017, 8, 1), 90
LIFT = 0.4
"""Share of their spend that users with many discounts spend more."""


def uplift(spark: SparkSession, settings: Config) -> dict[str, float]:
    """Return how often rankings are sure, where they should be and where not."""
    daily = Lakehouse(spark, settings.tables).read("user_daily")
    spent = labels.future_spend(daily, [DAY], DAYS).select("user_key", "label_spend")
    rows = covariates(daily, DAY).join(spent, "user_key", "left").fillna(0, subset=["label_spend"])
    rows = rows.withColumn("fold", F.pmod(F.xxhash64("user_key"), F.lit(FOLDS)))
    frame = rows.toPandas().sort_values("user_key")
    x = frame.drop(columns=["user_key", "label_spend", "fold"])
    discounts = (x["discount_91d"] / (x["spend_91d"] + x["discount_91d"]).clip(lower=1.0)).fillna(0.0).to_numpy()
    spend = frame["label_spend"].to_numpy(np.float64)
    planted = np.where(discounts > np.quantile(discounts, 0.7), LIFT * spend, 0.0)
    nobody = Sample(x.to_numpy(np.float32), spend, np.zeros(len(spend), bool), frame["fold"].to_numpy())
    found, false, first = [], [], []
    for number in range(CAMPAIGNS):
        treated = np.random.default_rng(number).random(len(spend)) < 0.5
        for gain in (planted, np.zeros(len(spend)), np.full(len(spend), planted.mean())):
            judged = judge(replace(nobody, y=spend + treated * gain, treated=treated))
            (found if gain is planted else false).append(qini(judged, judged.x_learner).is_sure)
            if gain is planted:
                of_judged = planted[judged.users]
                best = np.argsort(-judged.x_learner)[: len(of_judged) // TENTHS]
                first.append(of_judged[best].mean() / of_judged.mean())
    return {
        "uplift.qini_found": float(np.mean(found)),
        "uplift.qini_false": float(np.mean(false)),
        "uplift.first_tenth": float(np.mean(first)),
    }
