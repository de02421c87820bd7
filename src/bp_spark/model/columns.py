"""Users as columns, the input of members, whether pandas, Petastorm or Arrow brought them.

A column is a one-dimensional array with a value for each user. A history column holds an array for each user: as an object
array of arrays, or as :class:`Ragged`, which needs no Python object for a user.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from bp_spark.core.errors import BundleError


@dataclass(frozen=True)
class Ragged:
    """The arrays of a history column end to end.

    Attributes:
        values: [sum of ``lengths``], user after user.
        lengths: int64 [B], values of each user.
    """

    values: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)


Columns = Mapping[str, np.ndarray | Ragged]
ACTIVE, SILENT = "btyd_active", "btyd_silent_days"
"""Predictions of the purchase process: probability of a purchase in the horizon, and days since the last purchase."""


def ragged(column: np.ndarray | Ragged) -> Ragged:
    """Return a history column as :class:`Ragged`."""
    if isinstance(column, Ragged):
        return column
    lengths = np.fromiter(map(len, column), np.int64, len(column))
    return Ragged(np.concatenate(list(column)) if lengths.any() else np.zeros(0), lengths)


def from_arrow(batch: pa.RecordBatch) -> dict[str, np.ndarray | Ragged]:
    """Return the columns of an Arrow batch; a missing number becomes NaN, and only such columns are copied."""
    return {name: _from_arrow(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}


def _from_arrow(column: pa.Array) -> np.ndarray | Ragged:
    if pa.types.is_list(column.type):
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        values = column.flatten()
        if values.null_count and pa.types.is_integer(values.type):
            # Without this they would become floats, which lose digits of 64-bit ids.
            values = values.fill_null(0)
        return Ragged(values.to_numpy(zero_copy_only=False), lengths)
    return np.asarray(column.to_numpy(zero_copy_only=False))


def to_matrix(columns: Columns, names: Iterable[str], dtype: type[np.floating]) -> np.ndarray:
    """Return the named columns as one ``dtype[users, names]`` array; infinite values become NaN.

    Raises:
        BundleError: columns are missing; the message names them.
    """
    names = tuple(names)
    if missing := [name for name in names if name not in columns]:
        raise BundleError(f"input columns missing: {', '.join(missing)}")
    stacked = np.stack([np.asarray(columns[name], dtype=np.float64) for name in names], axis=1)
    stacked[np.isinf(stacked)] = np.nan
    return stacked.astype(dtype, copy=False)
