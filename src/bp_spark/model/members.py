"""The members of a bundle: each reads a user's columns and answers with the expected spend over the horizon.

In: the training set as a Spark DataFrame (features, ``label_spend``, ``split``) to fit, numpy columns to
predict. Out: :class:`Member` objects that save themselves as plain files (JSON, safetensors; nothing is ever
unpickled). The linear and the boosted-trees member live here; the purchase-process model is
:class:`bp_spark.model.btyd.BtydMember`, the sequence model :class:`bp_spark.model.network.TransformerMember`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
import pandas as pd
import xgboost
from pyspark.errors import PySparkAttributeError
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.regression import LinearRegression
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.config import LinearConfig, TreesConfig
from bp_spark.errors import BundleError, DataError, PlatformError
from bp_spark.model.columns import Columns, stack
from bp_spark.model.shapley import TreeShapley

TABLE = "training_set"
LABEL = "label_spend"
SPLIT = "split"
KEY = ("user_key", "as_of_date")


class Member(Protocol):
    """A fitted model of a user's spend. Rows are independent: a row's answer depends on that row only."""

    @property
    def name(self) -> str:
        """Short name, unique in a bundle: ``linear``, ``btyd``, ``trees``, ``sqrt_trees``, ``transformer``."""
        ...

    def predict(self, columns: Columns) -> np.ndarray:
        """Expected spend, ``float64[rows]``, finite and >= 0, in the currency of the labels.

        Args:
            columns: one array of ``rows`` values per input column; NaN is a missing value.

        Raises:
            BundleError: a column the member needs is missing.
        """
        ...

    def set_threads(self, threads: int) -> None:
        """Use that many threads in predictions from now on, where a prediction can use several."""
        ...

    def save(self, folder: Path) -> None:
        """Write the member's files, each named after it, into an existing folder."""
        ...

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            BundleError: a file is missing, cut short or not this member's; the message names it.
        """
        ...


@runtime_checkable
class HorizonsMember(Protocol):
    """A member that tells of other horizons too."""

    def predict_horizons(self, columns: Columns) -> dict[str, np.ndarray]:
        """As :meth:`Member.predict`, for each horizon: under the member's name for the main one, else under that of
        :func:`bp_spark.labels.of_days`.
        """
        ...


@runtime_checkable
class ActivityMember(Protocol):
    """A member that tells whether a user will buy at all, too."""

    def predict_activity(self, columns: Columns) -> dict[str, np.ndarray]:
        """Return :data:`bp_spark.model.columns.ACTIVE` and :data:`bp_spark.model.columns.SILENT`, ``float64[rows]`` each."""
        ...


def predict_all(members: Iterable[Member], columns: Columns) -> dict[str, np.ndarray]:
    """What members say, ``float64[rows]`` each: by name, by name and days (``transformer_30d``) of other horizons, and
    those of :class:`ActivityMember`.

    Raises:
        BundleError: a column a member needs is missing.
    """
    said: dict[str, np.ndarray] = {}
    for member in members:
        if isinstance(member, HorizonsMember):
            said |= member.predict_horizons(columns)
        else:
            said[member.name] = member.predict(columns)
        if isinstance(member, ActivityMember):
            said |= member.predict_activity(columns)
    return said


def load_member(name: str, folder: Path) -> Member:
    """The saved member of that name.

    Raises:
        BundleError: there is no such member, or its files can't be used.
    """
    kinds: tuple[type[Member], ...] = (LinearMember, TreesMember, SqrtTreesMember)
    for kind in kinds:
        if name == kind.name:
            return kind.load(folder)
    if name == "btyd":
        # it imports this module
        from bp_spark.model.btyd import BtydMember

        return BtydMember.load(folder)
    if name == "transformer":
        # torch takes seconds to import: bundles without a sequence model don't pay for it.
        from bp_spark.model.network import TransformerMember

        return TransformerMember.load(folder)
    raise BundleError(f"{folder}: unknown member {name!r}")


# ----------------------------------------------------------------------------------------------------- linear


@dataclass(frozen=True)
class LinearMember:
    """Ridge regression of ``log1p`` spend on ``log1p`` recency, frequency and monetary value.

    ``expected = exp(intercept + coefficients · x) * smearing - 1``, never below 0, with
    ``x = sign(v) * log1p(|v|)`` of each feature value ``v``, and the mean seen in fitting where ``v`` is
    missing. ``smearing`` makes the spend of all training rows come to what it was: the retransformation of Duan
    (1983), "Smearing estimate: a nonparametric retransformation method", JASA 78, as a ratio of sums, which one
    outlier can't rule. The exponent is held at ``ceiling``, the largest label seen in fitting, for a straight line
    in log space would promise a far outlier any sum.
    """

    name: ClassVar[str] = "linear"
    FILE: ClassVar[str] = "linear.json"

    features: tuple[str, ...]
    means: tuple[float, ...]
    coefficients: tuple[float, ...]
    intercept: float
    smearing: float
    ceiling: float

    def predict(self, columns: Columns) -> np.ndarray:
        """Expected spend, ``float64[rows]``; see :meth:`Member.predict`."""
        values = stack(columns, self.features, np.float64)
        logs = np.sign(values) * np.log1p(np.abs(values))
        exponent = np.full(len(values), self.intercept)
        # Column by column and not by a matrix product: BLAS sums in an order that depends on the number of
        # rows.
        for j, (mean, coefficient) in enumerate(zip(self.means, self.coefficients, strict=True)):
            exponent += coefficient * np.where(np.isnan(logs[:, j]), mean, logs[:, j])
        spend = np.exp(np.minimum(exponent, self.ceiling)) * self.smearing - 1.0
        return np.maximum(spend, 0.0)

    def set_threads(self, threads: int) -> None:
        """Nothing to do: a prediction is a few passes over a column."""

    def save(self, folder: Path) -> None:
        """Write ``linear.json``."""
        write_json(Path(folder) / self.FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``linear.json``; see :meth:`Member.load`."""
        path = Path(folder) / cls.FILE
        document = read_json(path)
        if set(document) != {field.name for field in fields(cls)}:
            raise BundleError(f"{path}: not a linear member")
        try:
            member = cls(
                features=tuple(str(name) for name in document["features"]),
                means=tuple(float(value) for value in document["means"]),
                coefficients=tuple(float(value) for value in document["coefficients"]),
                intercept=float(document["intercept"]),
                smearing=float(document["smearing"]),
                ceiling=float(document["ceiling"]),
            )
        except (TypeError, ValueError) as error:
            raise BundleError(f"{path}: not a linear member ({error})") from None
        if not len(member.features) == len(member.means) == len(member.coefficients):
            raise BundleError(f"{path}: features, means and coefficients differ in length")
        return member


def fit_linear(df: DataFrame, features: Sequence[str], conf: LinearConfig) -> LinearMember:
    """Fit :class:`LinearMember` on the rows with ``split = 'train'``, distributed.

    ``conf.l2`` is Spark's ``regParam``: with features of unit variance and ``s`` the deviation of the labels,
    the penalty is ``conf.l2 / s * |coefficients|² / 2`` beside half the mean squared error. Three passes over
    the data: means, least squares, smearing; cache ``df`` where computing it is dear.

    Raises:
        DataError: a column is missing, or no row is a training row.
    """
    require(df, [*features, LABEL, SPLIT])
    train = df.where(F.col(SPLIT) == "train").select(
        F.log1p(_spend()).alias(LABEL), *[_signed_log(name).alias(name) for name in features]
    )
    summary = train.agg(
        F.count(F.lit(1)).alias("rows"),
        F.max(LABEL).alias("ceiling"),
        *[F.avg(F.nanvl(F.col(name), F.lit(None))).alias(f"mean_{j}") for j, name in enumerate(features)],
    ).first()
    if summary is None or summary["rows"] == 0:
        raise DataError(TABLE, "no training row", column=SPLIT)
    means = [summary[f"mean_{j}"] for j in range(len(features))]
    # A feature that nobody has tells nothing: any constant does, and 0 keeps it out of the intercept.
    means = [0.0 if mean is None else float(mean) for mean in means]
    filled = train.select(
        LABEL,
        *[
            F.coalesce(F.nanvl(F.col(name), F.lit(None)), F.lit(mean)).alias(name)
            for name, mean in zip(features, means, strict=True)
        ],
    )
    estimator = LinearRegression(
        featuresCol="_x",
        labelCol=LABEL,
        elasticNetParam=0.0,
        regParam=conf.l2,
        standardization=True,
        solver="normal",
    )
    fitted = estimator.fit(VectorAssembler(inputCols=list(features), outputCol="_x").transform(filled))
    coefficients = [float(value) for value in fitted.coefficients.toArray()]
    ceiling = float(summary["ceiling"])
    exponent = F.lit(float(fitted.intercept))
    for name, coefficient in zip(features, coefficients, strict=True):
        exponent = exponent + F.lit(coefficient) * F.col(name)
    said = F.sum(F.exp(F.least(exponent, F.lit(ceiling))))
    smearing = filled.agg((F.sum(F.exp(F.col(LABEL))) / said).alias("smearing")).first()
    assert smearing is not None  # an aggregate without groups always has its one row
    return LinearMember(
        features=tuple(features),
        means=tuple(means),
        coefficients=tuple(coefficients),
        intercept=float(fitted.intercept),
        smearing=float(smearing["smearing"]),
        ceiling=ceiling,
    )


# ------------------------------------------------------------------------------------------------------ trees


class TreesMember:
    """Gradient-boosted trees with the Tweedie loss: a mass of zeros and a long tail in one likelihood.

    Chen and Guestrin (2016), "XGBoost: a scalable tree boosting system"; the loss after Yang, Qian and Zou
    (2018). The log of the answer is a sum over trees, hence :meth:`contributions` in log space.

    Args:
        booster: a fitted booster of the class's objective that knows its feature names.
        threads: threads of one prediction. 1 suits scoring, where each core has a Python worker of its own.
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
        """Number of trees."""
        return int(self._booster.num_boosted_rounds())

    def predict(self, columns: Columns) -> np.ndarray:
        """Expected spend, ``float64[rows]``; see :meth:`Member.predict`."""
        return self._raw(columns)

    def contributions(self, columns: Columns) -> np.ndarray:
        """What each feature added to the booster's sum over trees: exact TreeSHAP (Lundberg et al. 2020).

        Returns:
            ``float64[rows, features + 1]``, features in the order of ``self.features``, the last column the
            base value; a row sums to ``log(predict)``.

        Raises:
            BundleError: a column is missing.
        """
        values = stack(columns, self.features, np.float32)
        if not len(values):
            return np.empty((0, len(self.features) + 1), dtype=np.float64)
        if self._shapley is None:
            matrix = xgboost.DMatrix(values, missing=np.nan, feature_names=list(self.features), nthread=self._threads)
            return np.asarray(self._booster.predict(matrix, pred_contribs=True), dtype=np.float64)
        given = self._shapley(values)
        total = self._booster.inplace_predict(
            values[:1], predict_type="margin", missing=np.nan, validate_features=False
        )
        base = float(total[0]) - given[0].sum()
        return np.column_stack([given, np.full(len(given), base)])

    @cached_property
    def _shapley(self) -> TreeShapley | None:
        """``None`` for trees too deep for its tables."""
        try:
            return TreeShapley(json.loads(self._booster.save_raw("json")))
        except ValueError:
            return None

    def importance(self) -> dict[str, float]:
        """Share of the total gain by feature, features never split on left out; the shares sum to 1."""
        gains: dict[str, Any] = self._booster.get_score(importance_type="total_gain")
        total = sum(gains.values()) or 1.0
        return {name: gain / total for name, gain in sorted(gains.items(), key=lambda item: -item[1])}

    def save(self, folder: Path) -> None:
        """Write XGBoost's own JSON, feature names included."""
        (Path(folder) / self.FILE).write_bytes(self._booster.save_raw("json"))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what :meth:`save` wrote; see :meth:`Member.load`."""
        path = Path(folder) / cls.FILE
        document = read_json(path)
        try:
            learner = document["learner"]
            ours = learner["objective"]["name"] == cls.OBJECTIVE and len(learner["feature_names"]) > 0
        except (KeyError, TypeError):
            ours = False
        if not ours:
            raise BundleError(f"{path}: not a booster of {cls.OBJECTIVE} with feature names")
        if not _are_trees(learner):
            raise BundleError(f"{path}: its trees are none: arrays of other lengths, an index beyond them, or a circle")
        booster = xgboost.Booster()
        try:
            booster.load_model(bytearray(path.read_bytes()))
        except (xgboost.core.XGBoostError, ValueError) as error:
            raise BundleError(f"{path}: XGBoost refuses it: {str(error).splitlines()[0]}") from None
        try:
            return cls(booster)
        except ValueError as error:
            raise BundleError(f"{path}: {error}") from None

    def _raw(self, columns: Columns) -> np.ndarray:
        values = stack(columns, self.features, np.float32)
        if not len(values):
            return np.empty(0, dtype=np.float64)
        said = self._booster.inplace_predict(values, missing=np.nan, validate_features=False)
        return np.asarray(said, dtype=np.float64)


_OF_NODES = (
    *("base_weights", "default_left", "left_children", "loss_changes", "parents", "right_children", "split_conditions"),
    *("split_indices", "split_type", "sum_hessian"),
)
"""Arrays of a tree in XGBoost's JSON, by node."""
_NO_CHILD = -1


def _are_trees(learner: Mapping[str, Any]) -> bool:
    """Whether a booster's trees can be walked: XGBoost, which takes the document's word for it, would read beyond its memory or
    never come back."""
    try:
        features = len(learner["feature_names"])
        model = learner["gradient_booster"]["model"]
        trees = model["trees"]
        return (
            int(learner["learner_model_param"]["num_feature"]) == features
            and int(model["gbtree_model_param"]["num_trees"]) == len(trees) == len(model["tree_info"])
            and not any(model["tree_info"])
            and all(_is_tree(tree, features) for tree in trees)
        )
    except (KeyError, TypeError, ValueError):
        return False


def _is_tree(tree: Mapping[str, Any], features: int) -> bool:
    left, right, split = (tree[name] for name in ("left_children", "right_children", "split_indices"))
    nodes = int(tree["tree_param"]["num_nodes"])
    if nodes < 1 or {len(tree[name]) for name in _OF_NODES} != {nodes} or any(tree["split_type"]):
        return False
    seen: set[int] = set()
    waiting = [0]
    while waiting:
        node = waiting.pop()
        if node in seen or node not in range(nodes):
            return False
        seen.add(node)
        children = [left[node], right[node]]
        if children == [_NO_CHILD, _NO_CHILD]:
            continue
        if split[node] not in range(features):
            return False
        waiting += children
    return True


class SqrtTreesMember(TreesMember):
    """Gradient-boosted trees with the squared error of the square root of spend.

    The root steadies the variance of a compound Poisson sum (Bartlett 1936, "The square root transformation in
    analysis of variance"), is defined at 0, and heeds large spenders more than a logarithm does.
    ``expected = max(sum over trees, 0)² * smearing``; ``smearing``, an attribute of the booster, makes the spend of the
    training rows come to what it was (Duan 1983, as a ratio of sums). :meth:`contributions` are in root units.

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
        """Expected spend, ``float64[rows]``; see :meth:`Member.predict`."""
        return np.maximum(self._raw(columns), 0.0) ** 2 * self.smearing


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

    The rows are laid out by a hash of their key and sorted by it, so that the same rows and number of workers
    give the same trees however Spark read them.

    Args:
        df: the features, ``label_spend``, ``split`` and the key; spend below 0 counts as 0.
        features: column names, cast to float32; null and NaN are missing values.
        conf: settings; ``conf.workers`` is an upper bound, for a barrier stage with more tasks than the
            cluster has slots would wait until it fails.
        seed: of row and column sampling.
        kind: which member: its loss.
        patience: rounds without a better validation loss before stopping; unused without validation rows.
        rounds: trees at most, by default ``conf.rounds``.
        weight: column of row weights, if any.
        key: columns that identify a row.

    Raises:
        DataError: a column is missing; no training row; or no training row has any spend.
        PlatformError: the session is a Spark Connect one, which XGBoost's estimator can't use.
    """
    from xgboost.spark import SparkXGBRegressor

    require(df, [*features, LABEL, SPLIT, *key, *([weight] if weight else [])])
    valid = F.col(SPLIT) == "valid"
    rows = df.where(F.col(SPLIT).isin("train", "valid"))
    weighed = F.col(weight).cast("float") if weight else F.lit(1.0)
    counted = rows.agg(
        F.count_if(~valid).alias("train"),
        F.count_if(valid).alias("valid"),
        F.max(F.when(~valid, _spend())).alias("top"),
        F.sum(F.when(~valid, _spend() * weighed)).alias("spend"),
    ).first()
    if counted is None or counted["train"] == 0:
        raise DataError(TABLE, "no training row", column=SPLIT)
    if counted["top"] <= 0:
        raise DataError(TABLE, "no training row has any spend", column=LABEL, count=counted["train"])
    workers = max(1, min(conf.workers, task_slots(df.sparkSession)))
    position = F.xxhash64(*[F.col(name).cast("string") for name in key])
    by_root = issubclass(kind, SqrtTreesMember)
    laid_out = (
        rows.select(
            *[F.col(name).cast("float").alias(name) for name in features],
            (F.sqrt(_spend()) if by_root else _spend()).alias("_label"),
            valid.alias("_valid"),
            weighed.alias("_weight"),
            position.alias("_position"),
        )
        .repartition(workers, F.col("_position"))
        .sortWithinPartitions("_position")
    )
    early: dict[str, Any] = {}
    if counted["valid"]:
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
    if counted["valid"]:
        # A plain booster predicts with every tree it holds, also with those after the best round.
        booster = booster[: booster.best_iteration + 1]
    booster.feature_names = list(features)
    if by_root:
        booster.set_attr(smearing="1.0")
        said = _predicted_spend(laid_out.where("NOT _valid"), features, booster)
        booster.set_attr(smearing=repr(counted["spend"] / said if said > 0 else 1.0))
    return kind(booster)


def _predicted_spend(rows: DataFrame, features: Sequence[str], booster: xgboost.Booster) -> float:
    """Weighted sum of what the booster, a member without smearing, says of the rows, on the executors."""
    document = bytes(booster.save_raw("json"))

    def summed(frames: Iterable[pd.DataFrame]) -> Iterable[pd.DataFrame]:
        member = SqrtTreesMember(xgboost.Booster(model_file=bytearray(document)))
        for frame in frames:
            said = member.predict({name: frame[name].to_numpy() for name in features})
            yield pd.DataFrame({"said": [float((said * frame["_weight"].to_numpy(np.float64)).sum())]})

    parts = rows.select(*features, "_weight").mapInPandas(summed, "said double").collect()
    return math.fsum(row["said"] for row in parts)


CLASSIC_ONLY = (
    "trees and sqrt_trees are fitted by XGBoost's estimator for Spark, which needs a classic session, not Spark Connect: train "
    "in a classic session, or leave them out of fusion.members"
)


def task_slots(spark: SparkSession) -> int:
    """How many tasks the cluster can run at once.

    Raises:
        PlatformError: the session has no SparkContext (Spark Connect).
    """
    try:
        # XGBoost's estimator starts its workers in one barrier stage of RDDs, and Spark tells only Java how many fit
        context = spark.sparkContext._jsc.sc()
    except (PySparkAttributeError, AttributeError):
        raise PlatformError(CLASSIC_ONLY) from None
    return int(context.maxNumConcurrentTasks(context.resourceProfileManager().resourceProfileFromId(0)))


# ----------------------------------------------------------------------------------------------------- shared


def _spend() -> Column:
    return F.greatest(F.col(LABEL).cast("double"), F.lit(0.0))


def _signed_log(name: str) -> Column:
    value = F.col(name).cast("double")
    return F.signum(value) * F.log1p(F.abs(value))


def require(df: DataFrame, names: Iterable[str]) -> None:
    """Make sure that the training set has these columns.

    Raises:
        DataError: one is missing; the message names it.
    """
    for name in names:
        if name not in df.columns:
            raise DataError(TABLE, "column is missing", column=name)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write what :func:`read_json` reads; floats come back bit for bit."""
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a member's file.

    Raises:
        BundleError: the file can't be read or holds no JSON object.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not JSON or cut short ({error})") from None
    if not isinstance(document, dict):
        raise BundleError(f"{path}: must hold a JSON object, not a {type(document).__name__}")
    return document
