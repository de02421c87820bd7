"""Predictions of a bundle as Arrow columns: for scoring runs, pandas UDFs and logged models."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark import TaskContext

from bp_spark.model.columns import Columns
from bp_spark.model.explanation import SEQUENCE
from bp_spark.registry.bundle import Bundle

REASONS = 3
"""How many reasons a prediction lists at most."""
PREDICTION_COLUMNS = (
    "expected_spend",
    "low",
    "high",
    "p_active",
    "score",
    "level",
    "risk_level",
    "expected_by_horizon",
    "base_spend",
    "reasons",
    "other_reasons",
)
"""Columns of ``scores`` that a bundle computes."""
REASON = pa.struct(
    [
        ("group", pa.string()),
        ("contribution", pa.float64()),
        ("feature", pa.string()),
        ("value", pa.float64()),
    ]
)


def predict(bundle: Bundle, columns: Columns, on: date | None = None) -> dict[str, pa.Array]:
    """Return the :data:`PREDICTION_COLUMNS` of users, an Arrow array of one value a user for each.

    Args:
        bundle: the model.
        columns: an array of values for each column that the bundle reads.
        on: the date from which the spend counts; by default that of the bundle's training.
    """
    predicted = bundle.predict(columns, on)
    nested: dict[str, pa.Array] = {
        "expected_by_horizon": _by_horizon(bundle, predicted["expected_by_horizon"]),
    } | _reasons(bundle, columns, predicted, on)
    return {name: nested[name] if name in nested else pa.array(predicted[name]) for name in PREDICTION_COLUMNS}


def as_frame(predictions: Mapping[str, pa.Array]) -> pd.DataFrame:
    """Return the columns of :func:`predict` as a pandas DataFrame, maps as dictionaries."""
    frame: pd.DataFrame = pa.table(predictions).to_pandas(maps_as_pydicts="strict")
    return frame


def _by_horizon(bundle: Bundle, expected: np.ndarray) -> pa.MapArray:
    """Return maps from days to expected spend, one a user, from float64 [users, horizons]."""
    users, horizons = expected.shape
    offsets = np.arange(users + 1, dtype=np.int32) * horizons
    return pa.MapArray.from_arrays(offsets, np.tile(np.array(bundle.horizons.days, np.int32), users), expected.ravel())


def _reasons(
    bundle: Bundle, columns: Columns, predicted: Mapping[str, np.ndarray], on: date | None
) -> dict[str, pa.Array]:
    """Return ``base_spend``, ``reasons`` and ``other_reasons`` of users; null and empty where the bundle gives no reasons.

    A reason is a group of features that moved the expected spend most, with its foremost feature. ``other_reasons`` is the sum
    of all other groups. All are counted from ``base_spend``.
    """
    users = len(predicted["expected_spend"])
    explanation = bundle.explanation
    if explanation is None or users == 0:
        return {
            "base_spend": pa.nulls(users, pa.float64()),
            "reasons": pa.ListArray.from_arrays(np.zeros(users + 1, np.int32), pa.array([], REASON)),
            "other_reasons": pa.nulls(users, pa.float64()),
        }
    by_feature, of_sequence, base = bundle.explain(columns, predicted, on)
    names = explanation.group_names
    by_group = np.zeros((len(names), users))
    foremost = np.full((len(names), users), -1)
    groups = np.array(explanation.groups)
    for number, name in enumerate(names):
        if name == SEQUENCE:
            by_group[number] = of_sequence
            continue
        members = np.flatnonzero(groups == name)
        by_group[number] = by_feature[members].sum(axis=0)
        foremost[number] = members[np.argmax(by_feature[members] * np.sign(by_group[number]), axis=0)]
    count = min(REASONS, len(names))
    # Stable: equal contributions stay in the order of the groups.
    top = np.argsort(-np.abs(by_group), axis=0, kind="stable")[:count]
    contribution = np.take_along_axis(by_group, top, axis=0)
    feature = np.take_along_axis(foremost, top, axis=0).T.ravel()
    has_feature = feature >= 0
    values = np.full(len(feature), np.nan)
    tabular = np.stack([np.asarray(columns[name], np.float64) for name in explanation.features])
    values[has_feature] = tabular[feature[has_feature], np.repeat(np.arange(users), count)[has_feature]]
    listed = pa.StructArray.from_arrays(
        [
            pa.array(names, pa.string()).take(pa.array(top.T.ravel())),
            pa.array(contribution.T.ravel()),
            pa.array(explanation.features, pa.string()).take(pa.array(feature, mask=~has_feature)),
            pa.array(values, from_pandas=True),
        ],
        fields=list(REASON),
    )
    return {
        "base_spend": pa.array(np.full(users, base)),
        "reasons": pa.ListArray.from_arrays(np.arange(users + 1, dtype=np.int32) * count, listed),
        "other_reasons": pa.array(by_group.sum(axis=0) - contribution.sum(axis=0)),
    }


def fit_to_task(bundle: Bundle, task: TaskContext | None) -> None:
    """Let the bundle use the cores and the GPU of a Spark task.

    It gets as many threads as the task has cores: more would take the cores of the next task.

    Args:
        bundle: the model.
        task: the running task; ``None`` outside of Spark's tasks.
    """
    cores = task.cpus() if task else 1
    for member in bundle.members.values():
        member.set_threads(cores)
    transformer: Any = bundle.members.get("transformer")
    resources: Mapping[str, Any] = task.resources() if task else {}
    if transformer is not None and "gpu" in resources:
        transformer.move_to(f"cuda:{resources['gpu'].addresses[0]}")
