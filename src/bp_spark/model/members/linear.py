"""Ridge regression of the logarithm of spend on recency, frequency and monetary value: the simplest member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.regression import LinearRegression
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import LinearConfig
from bp_spark.core.errors import BundleError, DataError
from bp_spark.model.columns import Columns, to_matrix
from bp_spark.model.members.base import (
    LABEL,
    SPLIT,
    TABLE,
    read_json,
    require,
    signed_log,
    spend,
    write_json,
)
from bp_spark.model.values import LARGEST_LOG, floats, number, texts


@dataclass(frozen=True)
class LinearMember:
    """Ridge regression of ``log1p`` spend on ``log1p`` recency, frequency and monetary value.

    ``expected = exp(intercept + coefficients · x) * smearing - 1``, never below 0, with
    ``x = sign(v) * log1p(|v|)`` of each feature value ``v``, or the training mean where ``v`` is missing.

    ``smearing`` makes the predictions of all training rows sum to their spend: the retransformation of Duan (1983), "Smearing
    estimate: a nonparametric retransformation method", JASA 78, as a ratio of sums, which one outlier can't rule. The exponent
    stops at ``ceiling``, the largest training label: a straight line in log space would promise a far outlier any sum.
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
        """Return the expected spend, ``float64[rows]``; see :meth:`Member.predict`."""
        values = to_matrix(columns, self.features, np.float64)
        logs = np.sign(values) * np.log1p(np.abs(values))
        exponent = np.full(len(values), self.intercept)
        # Column by column and not by a matrix product: BLAS sums in an order that depends on the number of rows.
        for j, (mean, coefficient) in enumerate(zip(self.means, self.coefficients, strict=True)):
            exponent += coefficient * np.where(np.isnan(logs[:, j]), mean, logs[:, j])
        spend = np.exp(np.minimum(exponent, self.ceiling)) * self.smearing - 1.0
        return np.asarray(np.maximum(spend, 0.0))

    def set_threads(self, threads: int) -> None:
        """Do nothing: a prediction is a few passes over a column."""

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
                features=texts(document["features"]),
                means=floats(document["means"]),
                coefficients=floats(document["coefficients"]),
                intercept=number(document["intercept"]),
                smearing=number(document["smearing"], 0.0),
                ceiling=number(document["ceiling"], 0.0, LARGEST_LOG),
            )
        except (TypeError, ValueError) as error:
            raise BundleError(f"{path}: not a linear member ({error})") from None
        if not len(member.features) == len(member.means) == len(member.coefficients):
            raise BundleError(f"{path}: features, means and coefficients differ in length")
        return member


def fit_linear(df: DataFrame, features: Sequence[str], conf: LinearConfig) -> LinearMember:
    """Fit :class:`LinearMember` on the rows with ``split = 'train'``, distributed.

    Three passes over the data: means, least squares, smearing. Cache ``df`` where computing it is expensive.

    Args:
        df: the features, ``label_spend`` and ``split``.
        features: column names; NaN is a missing value.
        conf: ``conf.l2`` is Spark's ``regParam``: with features of unit variance and ``s`` the deviation of the labels, the
            penalty is ``conf.l2 / s * |coefficients|² / 2`` beside half the mean squared error.

    Raises:
        DataError: a column is missing, or no row is a training row.
    """
    require(df, [*features, LABEL, SPLIT])
    train = df.where(F.col(SPLIT) == "train").select(
        F.log1p(spend()).alias(LABEL), *[signed_log(name).alias(name) for name in features]
    )
    summary = train.agg(
        F.count(F.lit(1)).alias("rows"),
        F.max(LABEL).alias("ceiling"),
        *[F.avg(F.nanvl(F.col(name), F.lit(None))).alias(f"mean_{j}") for j, name in enumerate(features)],
    ).first()
    if summary is None or summary["rows"] == 0:
        raise DataError(TABLE, "no training row", column=SPLIT)
    means = [summary[f"mean_{j}"] for j in range(len(features))]
    # A feature that nobody has carries no information: any constant does, and 0 keeps it out of the intercept.
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
    predicted = F.sum(F.exp(F.least(exponent, F.lit(ceiling))))
    smearing = filled.agg((F.sum(F.exp(F.col(LABEL))) / predicted).alias("smearing")).first()
    assert smearing is not None  # an aggregate without groups always has its one row
    return LinearMember(
        features=tuple(features),
        means=tuple(means),
        coefficients=tuple(coefficients),
        intercept=float(fitted.intercept),
        smearing=float(smearing["smearing"]),
        ceiling=ceiling,
    )
