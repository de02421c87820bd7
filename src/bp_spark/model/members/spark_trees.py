"""Fit boosted trees in Spark, by XGBoost's estimator: for training rows that don't fit one machine."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xgboost
from pyspark.errors import PySparkAttributeError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import TreesConfig
from bp_spark.core.errors import PlatformError
from bp_spark.model.members.base import KEY, LABEL, SPLIT, require, spend
from bp_spark.model.members.trees import (
    PATIENCE,
    SqrtTreesMember,
    Trees,
    TreesMember,
    booster_settings,
    require_spend,
    set_smearing,
)


def fit_trees_in_spark(
    df: DataFrame,
    features: Sequence[str],
    conf: TreesConfig,
    *,
    seed: int,
    kind: type[Trees] = TreesMember,  # type: ignore[assignment]
    patience: int = PATIENCE,
    rounds: int | None = None,
    weight: str | None = None,
    key: Sequence[str] = KEY,
) -> Trees:
    """Fit boosted trees on ``split = 'train'``, stopped early on ``split = 'valid'``, distributed.

    Rows are partitioned and sorted by a hash of their key. So the same rows and number of workers give the same trees, however
    Spark read them.

    Args:
        df: the features, ``label_spend``, ``split`` and the key; spend below 0 counts as 0.
        features: column names, cast to float32; null and NaN are missing values.
        conf: settings; ``conf.workers`` is an upper bound: a barrier stage with more tasks than the cluster has slots would
            wait until it fails.
        seed: of row and column sampling.
        kind: class of the member, which decides the loss.
        patience: rounds without a better validation loss before stopping; unused without validation rows.
        rounds: trees at most, by default ``conf.rounds``.
        weight: column of row weights, if any.
        key: columns that identify a row.

    Raises:
        DataError: a column is missing; no training row; or no training row has any spend.
        PlatformError: the session is one of Spark Connect, which XGBoost's estimator can't use.
    """
    from xgboost.spark import SparkXGBRegressor

    require(df, [*features, LABEL, SPLIT, *key, *([weight] if weight else [])])
    valid = F.col(SPLIT) == "valid"
    rows = df.where(F.col(SPLIT).isin("train", "valid"))
    row_weight = F.col(weight).cast("float") if weight else F.lit(1.0)
    totals = rows.agg(
        F.count_if(~valid).alias("train"),
        F.count_if(valid).alias("valid"),
        F.max(F.when(~valid, spend())).alias("top"),
        F.sum(F.when(~valid, spend() * row_weight)).alias("spend"),
    ).first()
    assert totals is not None  # an aggregate without groups always has its one row
    require_spend(totals["train"], totals["top"] or 0.0)
    workers = max(1, min(conf.workers, task_slots(df.sparkSession)))
    position = F.xxhash64(*[F.col(name).cast("string") for name in key])
    by_root = issubclass(kind, SqrtTreesMember)
    laid_out = (
        rows.select(
            *[F.col(name).cast("float").alias(name) for name in features],
            (F.sqrt(spend()) if by_root else spend()).alias("_label"),
            valid.alias("_valid"),
            row_weight.alias("_weight"),
            position.alias("_position"),
        )
        .repartition(workers, F.col("_position"))
        .sortWithinPartitions("_position")
    )
    early: dict[str, Any] = {}
    if totals["valid"]:
        early = {"validation_indicator_col": "_valid", "early_stopping_rounds": patience}
    if weight:
        early["weight_col"] = "_weight"
    logging.getLogger("XGBoost-PySpark").setLevel(logging.WARNING)
    estimator = SparkXGBRegressor(
        features_col=list(features),
        label_col="_label",
        num_workers=workers,
        n_estimators=rounds or conf.rounds,
        random_state=seed,
        missing=float("nan"),
        verbose=False,
        **booster_settings(kind, conf),
        **early,
    )
    fitted = estimator.fit(laid_out)
    booster = fitted.get_booster()
    if totals["valid"]:
        # A plain booster predicts with all its trees, also with those after the best round.
        booster = booster[: booster.best_iteration + 1]
    booster.feature_names = list(features)
    if by_root:
        booster.set_attr(smearing="1.0")
        predicted = _predicted_spend(laid_out.where("NOT _valid"), features, booster)
        set_smearing(booster, totals["spend"], predicted)
    return kind(booster)


def _predicted_spend(rows: DataFrame, features: Sequence[str], booster: xgboost.Booster) -> float:
    """Return the weighted sum of a booster's predictions, computed on the executors; the booster has no smearing yet."""
    document = bytes(booster.save_raw("json"))

    def summed(frames: Iterable[pd.DataFrame]) -> Iterable[pd.DataFrame]:
        member = SqrtTreesMember(xgboost.Booster(model_file=bytearray(document)))
        for frame in frames:
            spend = member.predict({name: frame[name].to_numpy() for name in features})
            yield pd.DataFrame({"spend": [float((spend * frame["_weight"].to_numpy(np.float64)).sum())]})

    parts = rows.select(*features, "_weight").mapInPandas(summed, "spend double").collect()
    return math.fsum(row["spend"] for row in parts)


CLASSIC_ONLY = (
    "trees and sqrt_trees of a training set of more than trees.max_local_values are fitted by XGBoost's estimator for Spark, "
    "which needs a classic session, not Spark Connect: raise trees.max_local_values if the driver has the memory, train in a "
    "classic session, or leave them out of fusion.members"
)


def task_slots(spark: SparkSession) -> int:
    """Return how many tasks the cluster can run at once.

    Raises:
        PlatformError: the session has no SparkContext (Spark Connect).
    """
    try:
        # XGBoost's estimator starts its workers in one barrier stage of RDDs, and only Spark's Java API gives how many fit.
        context = spark.sparkContext._jsc.sc()
    except (PySparkAttributeError, AttributeError):
        raise PlatformError(CLASSIC_ONLY) from None
    return int(context.maxNumConcurrentTasks(context.resourceProfileManager().resourceProfileFromId(0)))
