"""Columns: the same users, whether Arrow or pandas brought them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from bp_spark.core.errors import BundleError
from bp_spark.model.columns import Ragged, from_arrow, ragged, to_matrix
from bp_spark.model.inputs import read
from tests.support.training_rows import SPEC, TEXT_IDS, make_rows


def as_arrow(rows: dict[str, np.ndarray]) -> pa.RecordBatch:
    arrays = {
        name: pa.array(list(values)) if values.dtype == object else pa.array(values, from_pandas=True)
        for name, values in rows.items()
    }
    return pa.RecordBatch.from_pydict(arrays)


def test_users_read_from_arrow_are_those_read_from_arrays() -> None:
    rows = make_rows(50)
    batch = as_arrow({name: rows[name] for name in SPEC.columns})
    for columns in (from_arrow(batch), from_arrow(batch.slice(7, 20))):
        users = read(columns, SPEC, TEXT_IDS)
        first = 0 if len(users) == 50 else 7
        alone = {name: values[first : first + len(users)] for name, values in rows.items()}
        expected = read(alone, SPEC, TEXT_IDS)
        for name, values in vars(expected).items():
            np.testing.assert_array_equal(getattr(users, name), values, err_msg=name)


def test_missing_values_are_nan_and_ids_keep_their_digits() -> None:
    batch = pa.RecordBatch.from_pydict(
        {"x": pa.array([1.5, None], pa.float32()), "ids": pa.array([[2**62 + 1, None], None], pa.list_(pa.int64()))}
    )
    columns = from_arrow(batch)
    ids = ragged(columns["ids"])
    assert (ids.values.tolist(), ids.lengths.tolist()) == ([2**62 + 1, 0], [2, 0])
    np.testing.assert_array_equal(to_matrix(columns, ["x"], np.float64), [[1.5], [np.nan]])


def test_nobody_has_no_history() -> None:
    empty = ragged(np.empty(0, object))
    assert (len(empty), len(empty.values)) == (0, 0)
    assert len(Ragged(np.zeros(0), np.zeros(3, np.int64))) == 3


def test_missing_columns_are_named() -> None:
    with pytest.raises(BundleError, match="input columns missing: y, z"):
        to_matrix({"x": np.zeros(1)}, ["x", "y", "z"], np.float32)
