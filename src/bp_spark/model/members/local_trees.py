"""Fit boosted trees on the driver, outside Spark, where the training rows fit one machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xgboost
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import TreesConfig
from bp_spark.model.members.base import KEY, LABEL, require, spend
from bp_spark.model.members.trees import (
    PATIENCE,
    SqrtTreesMember,
    Trees,
    booster_settings,
    require_spend,
    set_smearing,
)

_VALUES_PER_THREAD = 4_000_000
"""Least values of a fit for each of its threads: with fewer, threads wait for each other longer than they compute."""


class _Matrices(NamedTuple):
    """Binned features of the rows to learn from, and of those that tell when to stop."""

    train: xgboost.QuantileDMatrix
    valid: xgboost.QuantileDMatrix | None


@dataclass(frozen=True)
class LocalRows:
    """Training rows on the driver, in the order of a hash of their key.

    Attributes:
        features: names of the features.
        values: float32 [rows, features]; NaN is a missing value.
        spend: float64 [rows], never below 0.
        weights: float32 [rows].
        fold: int64 [rows], fold of the row's user.
        complete: bool [rows], whether the whole horizon was seen.
    """

    features: tuple[str, ...]
    values: np.ndarray
    spend: np.ndarray
    weights: np.ndarray
    fold: np.ndarray
    complete: np.ndarray


def fits_driver(rows: DataFrame, features: Sequence[str], conf: TreesConfig) -> bool:
    """Return whether the rows times the features are at most ``trees.max_local_values``; nothing is collected."""
    return rows.count() * len(features) <= conf.max_local_values


def collect_rows(
    df: DataFrame, features: Sequence[str], *, weight: str | None = None, key: Sequence[str] = KEY
) -> LocalRows:
    """Bring training rows to the driver as Arrow; ask :func:`fits_driver` first.

    Args:
        df: the features, ``label_spend``, ``fold``, ``complete`` and the key; spend below 0 counts as 0.
        features: column names, cast to float32; null, NaN and infinite values are missing ones.
        weight: column of row weights, if any.
        key: columns that identify a row.

    Raises:
        DataError: a column is missing.
    """
    require(df, [*features, LABEL, "fold", "complete", *key, *([weight] if weight else [])])
    table = df.select(
        *[F.col(name).cast("float").alias(f"_{position}") for position, name in enumerate(features)],
        spend().alias("_spend"),
        (F.col(weight) if weight else F.lit(1.0)).cast("float").alias("_weight"),
        F.col("fold").cast("long").alias("_fold"),
        F.col("complete").alias("_complete"),
        F.xxhash64(*[F.col(name).cast("string") for name in key]).alias("_position"),
    ).toArrow()
    # The same rows give the same trees, however Spark read them.
    order = np.argsort(table["_position"].to_numpy(), kind="stable")
    values = np.empty((len(order), len(features)), dtype=np.float32)
    for position in range(len(features)):
        values[:, position] = table[f"_{position}"].to_numpy()[order]
    values[np.isinf(values)] = np.nan
    others = {name: table[name].to_numpy()[order] for name in ("_spend", "_weight", "_fold", "_complete")}
    return LocalRows(
        tuple(features), values, others["_spend"], others["_weight"], others["_fold"], others["_complete"].astype(bool)
    )


def fit_threads(values: int, at_once: int = 1) -> int:
    """Return the threads of a fit; their number changes no bit of it.

    Args:
        values: rows times features.
        at_once: number of fits that share the cores.
    """
    cores = max(1, (os.cpu_count() or 1) // at_once)
    return max(1, min(cores, values // _VALUES_PER_THREAD))


class LocalTreesFit:
    """Fits members on rows of the driver. The binned features of a fold are made once, for all members.

    Args:
        rows: the training rows.
        conf: settings of the trees.
        seed: of row and column sampling.
        patience: rounds without a better validation loss before stopping.
    """

    def __init__(self, rows: LocalRows, conf: TreesConfig, *, seed: int, patience: int = PATIENCE) -> None:
        self._rows, self._conf, self._seed, self._patience = rows, conf, seed, patience
        self._matrices: dict[int | None, _Matrices] = {}

    def fit(self, kind: type[Trees], fold: int | None, *, rounds: int | None = None, at_once: int = 1) -> Trees:
        """Fit a member without a fold of users, stopped early on its complete rows; the number of threads changes no bit.

        Args:
            kind: class of the member, which decides the loss.
            fold: fold that is left out; ``None`` to fit on all rows, without stopping early.
            rounds: trees at most, by default ``trees.rounds``.
            at_once: number of fits that share the cores.

        Raises:
            DataError: no training row, or no training row has any spend.
        """
        rows = self._rows
        train, valid = self._split(fold)
        require_spend(int(train.sum()), float(rows.spend[train].max(initial=0.0)))
        threads = self._threads(int(train.sum()), at_once)
        if fold not in self._matrices:
            self._matrices[fold] = self._binned(train, valid, threads)
        matrices = self._matrices[fold]
        by_root = issubclass(kind, SqrtTreesMember)
        label = np.sqrt(rows.spend) if by_root else rows.spend
        matrices.train.set_label(label[train])
        stop_early: dict[str, Any] = {}
        if matrices.valid is not None:
            matrices.valid.set_label(label[valid])
            stop_early = {"evals": [(matrices.valid, "valid")], "early_stopping_rounds": self._patience}
        settings = {**booster_settings(kind, self._conf), "seed": self._seed, "nthread": threads}
        booster = xgboost.train(settings, matrices.train, rounds or self._conf.rounds, verbose_eval=False, **stop_early)
        if matrices.valid is not None:
            # A plain booster predicts with all its trees, also with those after the best round.
            booster = booster[: booster.best_iteration + 1]
        if by_root:
            booster.set_param({"nthread": threads})
            set_smearing(booster, self._weighted(rows.spend, train), self._weighted_prediction(booster, train))
        return kind(booster)

    def _split(self, fold: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return which rows are learned from, and which tell when to stop, bool [rows] each."""
        rows = self._rows
        if fold is None:
            return np.ones(len(rows.fold), dtype=bool), np.zeros(len(rows.fold), dtype=bool)
        return rows.fold != fold, (rows.fold == fold) & rows.complete

    def _binned(self, train: np.ndarray, valid: np.ndarray, threads: int) -> _Matrices:
        learned = self._matrix(train, threads)
        return _Matrices(learned, self._matrix(valid, threads, learned) if valid.any() else None)

    def _matrix(
        self, chosen: np.ndarray, threads: int, bins_of: xgboost.QuantileDMatrix | None = None
    ) -> xgboost.QuantileDMatrix:
        return xgboost.QuantileDMatrix(
            self._rows.values[chosen],
            weight=self._rows.weights[chosen],
            feature_names=list(self._rows.features),
            nthread=threads,
            ref=bins_of,
        )

    def _weighted(self, spend_of_rows: np.ndarray, chosen: np.ndarray) -> float:
        return float((spend_of_rows[chosen] * self._rows.weights[chosen].astype(np.float64)).sum())

    def _weighted_prediction(self, booster: xgboost.Booster, train: np.ndarray) -> float:
        """Return the weighted sum of the predicted spend of the training rows, without smearing."""
        roots = booster.inplace_predict(self._rows.values[train], missing=np.nan, validate_features=False)
        predicted = np.maximum(np.asarray(roots, dtype=np.float64), 0.0) ** 2
        return float((predicted * self._rows.weights[train].astype(np.float64)).sum())

    def _threads(self, rows: int, at_once: int) -> int:
        return fit_threads(rows * len(self._rows.features), at_once)
