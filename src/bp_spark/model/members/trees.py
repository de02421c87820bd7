"""Boosted trees (XGBoost, Tweedie loss or squared error of the root): members, and what both ways of fitting them share."""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import xgboost

from bp_spark.core.config import TreesConfig
from bp_spark.core.errors import BundleError, DataError
from bp_spark.model.columns import Columns, to_matrix
from bp_spark.model.members.base import LABEL, SPLIT, TABLE, read_json
from bp_spark.model.members.boosters import require_sound
from bp_spark.model.shapley import TreeShapley

PATIENCE = 40
"""Rounds without a better validation loss after which a fit stops."""


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


Trees = TypeVar("Trees", bound=TreesMember)


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


def booster_settings(kind: type[TreesMember], conf: TreesConfig) -> dict[str, Any]:
    """Return XGBoost's settings for a class of members, without rounds, seed and threads."""
    power = conf.tweedie_variance_power
    loss: dict[str, Any] = (
        {"eval_metric": "rmse"}
        if issubclass(kind, SqrtTreesMember)
        else {"tweedie_variance_power": power, "eval_metric": f"tweedie-nloglik@{power}"}
    )
    return {
        "objective": kind.OBJECTIVE,
        "max_depth": conf.max_depth,
        "learning_rate": conf.learning_rate,
        "min_child_weight": conf.min_child_weight,
        "subsample": conf.subsample,
        "colsample_bytree": conf.colsample_bytree,
        "reg_lambda": conf.reg_lambda,
        "tree_method": "hist",
        "device": "cpu",
        **loss,
    }


def require_spend(train_rows: int, top_spend: float) -> None:
    """Make sure that there is something to learn.

    Args:
        train_rows: number of training rows.
        top_spend: largest spend of a training row.

    Raises:
        DataError: no training row, or no training row has any spend.
    """
    if not train_rows:
        raise DataError(TABLE, "no training row", column=SPLIT)
    if top_spend <= 0:
        raise DataError(TABLE, "no training row has any spend", column=LABEL, count=train_rows)


def set_smearing(booster: xgboost.Booster, spend: float, predicted: float) -> None:
    """Make the predictions of the training rows sum to their spend; both sums are weighted."""
    booster.set_attr(smearing=repr(spend / predicted if predicted > 0 else 1.0))
