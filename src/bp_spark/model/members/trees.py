"""Boosted trees (XGBoost, Tweedie loss or squared error of the root), fitted in Spark, predicted anywhere."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import pandas as pd
import xgboost
from pyspark.errors import PySparkAttributeError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import TreesConfig
from bp_spark.core.errors import BundleError, DataError, PlatformError
from bp_spark.model.columns import Columns, to_matrix
from bp_spark.model.members.base import (
    KEY,
    LABEL,
    SPLIT,
    TABLE,
    read_json,
    require,
    spend,
)
from bp_spark.model.members.boosters import require_sound
from bp_spark.model.shapley import TreeShapley


class TreesMember:
    """Gradient-boosted trees with the Tweedie loss: a mass of zeros and a long tail in one likelihood.

    Chen and Guestrin (2016), "XGBoost: a scalable tree boosting system"; the loss after Yang, Qian and Zou
    (2018). The log of the prediction is a sum over trees, hence :meth:`contributions` in log space.

    Args:
        booster: a fitted booster of the class's objective, with feature names.
        threads: of one prediction. 1 suits scoring, where each core has a Python worker of its own.
    """

    name: ClassVar[str] = "trees"
    FILE: ClassVar[str] = "trees.json"
    OBJECTIVE: ClassVar[str] = "reg:tweedie"

    def __init__(self, booster: xgboost.Booster, threads: int = 1) -> None:
        self.features: tuple[str, ...] = tuple(booster.feature_names or ())
        self._booster = booster
        self.set_threads(threads)

    def set_threads(self, threads: int) -> None:
        """Use that many threads in predictions from now on."""
        self._threads = threads
        self._booster.set_param({"nthread": threads})

    @property
    def rounds(self) -> int:
        """How many trees the booster has."""
        return int(self._booster.num_boosted_rounds())

    def predict(self, columns: Columns) -> np.ndarray:
        """Return the expected spend, ``float64[rows]``; see :meth:`Member.predict`."""
        return self._raw(columns)

    def contributions(self, columns: Columns) -> np.ndarray:
        """Return what each feature adds to the booster's sum over trees: exact TreeSHAP (Lundberg et al. 2020).

        Returns:
            ``float64[rows, features + 1]``, features in the order of ``self.features``, the last column the
            base value; a row sums to ``log(predict)``.

        Raises:
            BundleError: a column is missing.
        """
        values = to_matrix(columns, self.features, np.float32)
        if not len(values):
            return np.empty((0, len(self.features) + 1), dtype=np.float64)
        if self._shapley is None:
            matrix = xgboost.DMatrix(values, missing=np.nan, feature_names=list(self.features), nthread=self._threads)
            return np.asarray(self._booster.predict(matrix, pred_contribs=True), dtype=np.float64)
        shapley = self._shapley(values)
        total = self._booster.inplace_predict(
            values[:1], predict_type="margin", missing=np.nan, validate_features=False
        )
        base = float(total[0]) - shapley[0].sum()
        return np.column_stack([shapley, np.full(len(shapley), base)])

    @cached_property
    def _shapley(self) -> TreeShapley | None:
        """Tables of the trees' Shapley values; ``None`` for trees too deep for them."""
        try:
            return TreeShapley(json.loads(self._booster.save_raw("json")))
        except ValueError:
            return None

    def importance(self) -> dict[str, float]:
        """Return the share of the total gain by feature, without features never split on; the shares sum to 1."""
        gains: dict[str, Any] = self._booster.get_score(importance_type="total_gain")
        total = sum(gains.values()) or 1.0
        return {name: gain / total for name, gain in sorted(gains.items(), key=lambda item: -item[1])}

    def save(self, folder: Path) -> None:
        """Write XGBoost's own JSON, feature names included."""
        (Path(folder) / self.FILE).write_bytes(self._booster.save_raw("json"))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read XGBoost's JSON; see :meth:`Member.load`."""
        path = Path(folder) / cls.FILE
        document = read_json(path)
        booster = xgboost.Booster()
        try:
            require_sound(document, cls.OBJECTIVE)
            # The document that was checked, and not the file: readers of JSON differ where a file gives a key twice.
            booster.load_model(bytearray(json.dumps(document, ensure_ascii=False).encode()))
        except xgboost.core.XGBoostError as error:
            raise BundleError(f"{path}: XGBoost refuses it: {str(error).splitlines()[0]}") from None
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path}: {error}") from None
        try:
            return cls(booster)
        except ValueError as error:
            raise BundleError(f"{path}: {error}") from None

    def _raw(self, columns: Columns) -> np.ndarray:
        """Return the booster's own predictions, float64 [rows]."""
        values = to_matrix(columns, self.features, np.float32)
        if not len(values):
            return np.empty(0, dtype=np.float64)
        predicted = self._booster.inplace_predict(values, missing=np.nan, validate_features=False)
        return np.asarray(predicted, dtype=np.float64)


class SqrtTreesMember(TreesMember):
    """Gradient-boosted trees with the squared error of the square root of spend.

    The root stabilises the variance of a compound Poisson sum (Bartlett 1936, "The square root transformation in analysis of
    variance"). It is defined at 0, and gives large spenders more weight than a logarithm does.
    ``expected = max(sum over trees, 0)² * smearing``. ``smearing``, an attribute of the booster, makes the predictions of the
    training rows sum to their spend (Duan 1983, as a ratio of sums). :meth:`contributions` are in root units.

    Raises:
        ValueError: the booster has no smearing.
    """

    name: ClassVar[str] = "sqrt_trees"
    FILE: ClassVar[str] = "sqrt_trees.json"
    OBJECTIVE: ClassVar[str] = "reg:squarederror"

    def __init__(self, booster: xgboost.Booster, threads: int = 1) -> None:
        super().__init__(booster, threads)
        self.smearing = float(booster.attr("smearing") or "nan")
        if not (math.isfinite(self.smearing) and self.smearing >= 0):
            raise ValueError("must have an attribute smearing, a number")

    def predict(self, columns: Columns) -> np.ndarray:
        """Return the expected spend, ``float64[rows]``; see :meth:`Member.predict`."""
        return np.asarray(np.maximum(self._raw(columns), 0.0) ** 2 * self.smearing)


Trees = TypeVar("Trees", bound=TreesMember)


def fit_trees(
    df: DataFrame,
    features: Sequence[str],
    conf: TreesConfig,
    *,
    seed: int,
    kind: type[Trees] = TreesMember,  # type: ignore[assignment]
    patience: int = 40,
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
    if totals is None or totals["train"] == 0:
        raise DataError(TABLE, "no training row", column=SPLIT)
    if totals["top"] <= 0:
        raise DataError(TABLE, "no training row has any spend", column=LABEL, count=totals["train"])
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
    power = conf.tweedie_variance_power
    loss: dict[str, Any] = (
        {"eval_metric": "rmse"}
        if by_root
        else {"tweedie_variance_power": power, "eval_metric": f"tweedie-nloglik@{power}"}
    )
    logging.getLogger("XGBoost-PySpark").setLevel(logging.WARNING)
    estimator = SparkXGBRegressor(
        features_col=list(features),
        label_col="_label",
        num_workers=workers,
        objective=kind.OBJECTIVE,
        n_estimators=rounds or conf.rounds,
        max_depth=conf.max_depth,
        learning_rate=conf.learning_rate,
        min_child_weight=conf.min_child_weight,
        subsample=conf.subsample,
        colsample_bytree=conf.colsample_bytree,
        reg_lambda=conf.reg_lambda,
        random_state=seed,
        missing=float("nan"),
        tree_method="hist",
        device="cpu",
        verbose=False,
        **loss,
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
        booster.set_attr(smearing=repr(totals["spend"] / predicted if predicted > 0 else 1.0))
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
    "trees and sqrt_trees are fitted by XGBoost's estimator for Spark, which needs a classic session, not Spark Connect: train "
    "in a classic session, or leave them out of fusion.members"
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
