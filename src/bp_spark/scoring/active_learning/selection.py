"""Selection of the users whose label would help most: active learning with an ensemble.

The label of a user on whom the bundle's members disagree helps most (query by committee: Seung, Opper and Sompolinsky 1992).
But the users of most disagreement are often much alike, and teach the same many times over. So more candidates are taken than
can be asked, and those are picked that represent the others (Zhdanov 2019, "Diverse mini-batch Active Learning",
arXiv:1901.05954).

Executors compute the disagreement, and Spark keeps the users of most of it. The driver sees ``labelling.candidates_per_label``
users for each label asked for, whatever the number of users.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from bp_spark.core.config import LabellingConfig
from bp_spark.core.errors import BundleError
from bp_spark.core.session import checkpointed
from bp_spark.features.catalogue import Catalogue
from bp_spark.model.columns import from_arrow
from bp_spark.model.members.base import predict_all
from bp_spark.registry.bundle import Bundle
from bp_spark.scoring.prediction import distribute, load_once

SEED = 7
"""Seed of the first centres, so that the same users and bundle give the same selection."""
MAX_BUDGET = 5_000
"""Most labels that are asked for at once: clustering several times as many users then takes minutes."""
SELECTED_COLUMNS = ("user_key", "rank", "disagreement", "expected_spend")
_LEAST_MEMBERS = 2
"""Members that a disagreement needs."""


def disagreement(predictions: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Return how far members are apart on each user: the weighted standard deviation of the roots of their predictions.

    The square root steadies the variance of spend, as in the stack. In money the largest spenders would always be first.

    Args:
        predictions: Member -> expected spend, ``float64[users]``.
        weights: Member -> its weight; a member that is missing here doesn't count.

    Returns:
        ``float64[users]``.

    >>> disagreement({"a": np.array([4.0, 9.0]), "b": np.array([16.0, 9.0])}, {"a": 0.5, "b": 0.5})
    array([1., 0.])
    """
    total = sum(weights.values())
    roots = {name: np.sqrt(np.maximum(predictions[name], 0.0)) for name in weights}
    # member by member, as in the stack: the order of a sum must not depend on the users of the batch
    mean = sum(weight / total * roots[name] for name, weight in weights.items())
    variance = sum(weight / total * (roots[name] - mean) ** 2 for name, weight in weights.items())
    return np.asarray(np.sqrt(variance), np.float64)


def standardise(frame: pd.DataFrame, catalogue: Catalogue) -> np.ndarray:
    """Return features that can be compared, each with mean 0 and variance 1: ``float64[rows, features]``.

    Skewed features enter as signed log1p. A missing value gets the mean.

    Args:
        frame: A row per user, with features as columns.
        catalogue: Names the features and their scale; features that ``frame`` lacks are left out.
    """
    columns = []
    for feature in catalogue.features:
        if feature.name not in frame:
            # the catalogue is newer than the rows
            continue
        values = frame[feature.name].to_numpy(np.float64, na_value=np.nan)
        values = np.where(np.isfinite(values), values, np.nan)
        if feature.scale == "log":
            values = np.sign(values) * np.log1p(np.abs(values))
        finite = values[~np.isnan(values)]
        deviation = finite.std() if len(finite) else 0.0
        scaled = (values - finite.mean()) / deviation if deviation > 0 else np.zeros(len(values))
        columns.append(np.nan_to_num(scaled, nan=0.0))
    return np.stack(columns, axis=1)


def select_diverse(points: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """Pick rows that represent all rows: the row nearest to each centre of a weighted k-means.

    Where many rows are equal there are fewer clusters than wanted, and the rows of most weight fill the selection.

    Args:
        points: ``float64[rows, features]``, see :func:`standardise`.
        weights: ``float64[rows]``, how much a row counts: its disagreement.
        count: Rows wanted.

    Returns:
        Positions of ``count`` rows, or of all rows if there are fewer, in rising order.
    """
    if count >= len(points):
        return np.arange(len(points))
    weights = weights if weights.max() > 0 else np.ones(len(points))
    # there can't be more centres than distinct rows
    clusters = min(count, len(np.unique(points, axis=0)))
    with threadpool_limits(limits=1):
        # several threads would sum in the order in which they end
        fitted = KMeans(clusters, n_init=1, random_state=SEED).fit(points, sample_weight=weights)
    distances = np.linalg.norm(points - fitted.cluster_centers_[fitted.labels_], axis=1)
    # by cluster, then by distance; of equally near rows the first
    order = np.lexsort((distances, fitted.labels_))
    _, first = np.unique(fitted.labels_[order], return_index=True)
    nearest_rows = order[first]
    by_weight = np.argsort(-weights, kind="stable")
    other_rows = by_weight[~np.isin(by_weight, nearest_rows)]
    return np.sort(np.concatenate([nearest_rows, other_rows[: count - len(nearest_rows)]]))


def most_disputed_users(
    users: DataFrame, bundle: Bundle, count: int, columns: Sequence[str] = (), on: date | None = None
) -> pd.DataFrame:
    """Return the users on whom the bundle's members disagree most, most disagreement first.

    Args:
        users: Rows of ``user_features`` of one date.
        bundle: The model.
        count: Users wanted.
        columns: Columns of ``users`` to return too.
        on: The date from which the spend counts; by default that of the bundle's training.

    Returns:
        ``user_key, disagreement, expected_spend`` and ``columns``.

    Raises:
        BundleError: Only one member has weight, or ``users`` lacks a column.
    """
    bundle.check_inputs(users.columns)
    weights = {
        name: weight for name, weight in zip(bundle.stack.members, bundle.stack.weights, strict=True) if weight > 0
    }
    if len(weights) < _LEAST_MEMBERS:
        raise BundleError(
            f"{bundle.folder}: only {', '.join(weights)} has weight in the fusion: nobody is there to disagree with; "
            "train with more fusion.members"
        )
    name, digest = distribute(users.sparkSession, bundle), bundle.digest

    def predict_batches(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        loaded = load_once(name, digest)
        for batch in batches:
            predictions = predict_all([loaded.members[member] for member in loaded.stack.members], from_arrow(batch))
            yield pa.RecordBatch.from_pydict(
                {
                    "user_key": batch.column("user_key"),
                    "disagreement": pa.array(disagreement(predictions, weights)),
                    "expected_spend": pa.array(loaded.stack.apply(predictions, on)["expected_spend"]),
                }
            )

    inputs = users.select("user_key", *dict.fromkeys(bundle.required_columns))
    predicted = inputs.mapInArrow(predict_batches, "user_key string, disagreement double, expected_spend double")
    # keys first, then their rows: otherwise Spark would sort every row whole
    most = checkpointed(predicted.orderBy(F.desc("disagreement"), "user_key").limit(count))
    rows = users.select("user_key", *columns).join(F.broadcast(most), "user_key").toPandas()
    return rows.sort_values(["disagreement", "user_key"], ascending=[False, True]).reset_index(drop=True)


def select_users(
    users: DataFrame, bundle: Bundle, catalogue: Catalogue, budget: int, config: LabellingConfig, on: date | None = None
) -> pd.DataFrame:
    """Select the users to ask, by rank from 1: most disagreement first.

    Args:
        users: Rows of ``user_features`` of one date: all users who could be asked.
        bundle: The model.
        catalogue: Catalogue of these features.
        budget: Users to select.
        config: Settings of the selection.
        on: See :func:`most_disputed_users`.

    Returns:
        SELECTED_COLUMNS; fewer rows than ``budget`` where there are fewer users.
    """
    compared = [name for name in catalogue.names if name in users.columns]
    most = most_disputed_users(users, bundle, budget * config.candidates_per_label, compared, on)
    if most.empty:
        return most.assign(rank=pd.Series(dtype="int64"))[list(SELECTED_COLUMNS)]
    positions = select_diverse(standardise(most[compared], catalogue), most["disagreement"].to_numpy(), budget)
    # candidates are in order of disagreement, and so are rising positions
    chosen = most.iloc[positions].assign(rank=np.arange(1, len(positions) + 1))
    return chosen[list(SELECTED_COLUMNS)].reset_index(drop=True)
