"""False alarms of ``bp-spark campaign-effect``: a part of :mod:`bench.decisions`.

In: the demo's tables. Out: a line of JSON a figure on standard output. Each of :data:`CAMPAIGNS` campaigns that never were
draws users by what they did before: who spends more is contacted more often, as by real campaigns.

- ``campaign.placebo_false_alarms``: share of these campaigns for which ``bp-spark campaign-effect`` answers "more" or "less".
- ``campaign.naive_false_alarms``: share whose plain difference of means has a 95 % interval without 0.
- ``campaign.effects_found``: share for which it answers "more" where the contacted users spend 20 % more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import date, timedelta

import numpy as np
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from scipy import stats

from bp_spark.core.config import Config
from bp_spark.experiments.campaign import LEAST_COMPARABLE
from bp_spark.experiments.covariates import covariates
from bp_spark.experiments.doubly_robust import Effect, estimate, fit
from bp_spark.experiments.sample import FOLDS, LEAST_USERS, Sample
from bp_spark.features import labels
from bp_spark.lakehouse.store import Lakehouse

CAMPAIGNS = 200
EFFECT = 0.2
DAYS = 33
"""Days of most campaigns of the Complete Journey."""
FIRST_DAYS = (date(2017, 6, 14), date(2017, 8, 16), date(2017, 10, 4))
PLACEBOS = 3


def effects(spark: SparkSession, settings: Config) -> dict[str, float]:
    """Return how often the comparison answers, with and without an effect."""
    lakehouse = Lakehouse(spark, settings.tables)
    samples = {day: _samples(lakehouse, day) for day in FIRST_DAYS}
    alarms, naive, found = [], [], []
    for number in range(CAMPAIGNS):
        windows = samples[FIRST_DAYS[number % len(FIRST_DAYS)]]
        treated = _drawn(windows[0], number)
        window = replace(windows[0], treated=treated)
        nuisances = fit(window)
        result = estimate(window, nuisances)
        # the model of expected spend never sees the contacted users, so that their spend may be changed after it
        lifted = estimate(replace(window, y=np.where(treated, window.y * (1 + EFFECT), window.y)), nuisances)
        passes = [_sees(one) and _usable(one) for one in (result, lifted)]
        if any(passes):
            clean = not any(_sees(estimate(of, fit(of))) for of in (replace(w, treated=treated) for w in windows[1:]))
            passes = [one and clean for one in passes]
        alarms.append(passes[0])
        found.append(passes[1] and lifted.comparison.difference > 0)
        naive.append(stats.ttest_ind(window.y[treated], window.y[~treated], equal_var=False).pvalue < 0.05)
    return {
        "campaign.placebo_false_alarms": float(np.mean(alarms)),
        "campaign.naive_false_alarms": float(np.mean(naive)),
        "campaign.effects_found": float(np.mean(found)),
    }


def _sees(effect: Effect) -> bool:
    return effect.comparison.excludes_zero


def _usable(effect: Effect) -> bool:
    return effect.overlap.comparable >= LEAST_COMPARABLE and effect.overlap.effective_others >= LEAST_USERS


def _samples(lakehouse: Lakehouse, first_day: date) -> Sequence[Sample]:
    """Return the users known before the oldest window, as of each: the campaign's, then those of placebos."""
    daily = lakehouse.read("user_daily")
    frames = []
    for number in range(PLACEBOS + 1):
        day = first_day - timedelta(days=number * DAYS)
        spent = labels.future_spend(daily, [day], DAYS).select("user_key", "label_spend")
        rows = covariates(daily, day).join(spent, "user_key", "left").fillna(0, subset=["label_spend"])
        rows = rows.withColumn("fold", F.pmod(F.xxhash64("user_key"), F.lit(FOLDS)))
        frames.append(rows.toPandas().set_index("user_key").sort_index())
    users = frames[-1].index
    nobody = np.zeros(len(users), bool)
    return [
        Sample(
            x=rows.drop(columns=["label_spend", "fold"]).to_numpy(np.float32),
            y=rows["label_spend"].to_numpy(np.float64),
            treated=nobody,
            fold=rows["fold"].to_numpy(),
        )
        for rows in (frame.loc[users] for frame in frames)
    ]


def _drawn(window: Sample, number: int) -> np.ndarray:
    """Return the users of a campaign that never was: about a tenth, and more of those who were expected to spend."""
    random = np.random.default_rng(number)
    # the sum of all spend and that of the newest windows are among the covariates, so that the choice can be explained
    logs = np.log1p(np.maximum(np.nan_to_num(window.x), 0))
    chosen_by = logs[:, random.choice(logs.shape[1], 3, replace=False)]
    spread = chosen_by.std(axis=0)
    score = ((chosen_by - chosen_by.mean(axis=0)) / np.where(spread > 0, spread, 1)).mean(axis=1)
    chance = 1 / (1 + np.exp(2.3 - score))
    return np.asarray(random.random(len(chance)) < chance)
