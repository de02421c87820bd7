"""Columns of a table in, padded tensors out.

Fine-tuning and nightly scoring both call :func:`collate`, so a user looks the same to the network in either.
Columns are one-dimensional numpy arrays, one entry per user; a history column is an object array of
one-dimensional arrays, oldest event first, whether Petastorm, pandas or Arrow made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bp_spark.errors import DataError

Columns = Mapping[str, np.ndarray]

HISTORY_COLUMNS = (
    "seq_kind",
    "seq_age_days",
    "seq_amount",
    "seq_items",
    "seq_discount",
    "seq_text_id",
    "seq_weekday",
    "seq_hour",
)
"""Parallel arrays of a user's last events."""

KINDS = 9
"""Padding (0), purchase, browse, click, cart, favourite, coupon, search, review."""
WEEKDAYS = 8
"""Padding (0), then 1 to 7."""
HOURS = 24
NUMERIC_FEATURES = 5
"""Of an event: log amount, log items, discount share, log gap to the event before, log age."""
AMOUNT, GAP, AGE = 0, 3, 4
"""Places among them."""


@dataclass(frozen=True)
class InputSpec:
    """What a network reads of a user.

    Attributes:
        tabular: names of the tabular columns, in the order of the tensor.
        log_scaled: those of them that are read as sign(x) * log(1 + |x|): money and counts.
        history_length: the most recent events read; older ones are dropped.
    """

    tabular: tuple[str, ...]
    log_scaled: frozenset[str]
    history_length: int

    def __post_init__(self) -> None:
        if unknown := self.log_scaled - set(self.tabular):
            raise ValueError(f"log_scaled names no tabular column: {sorted(unknown)}")

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that :func:`collate` needs."""
        return (*self.tabular, *HISTORY_COLUMNS)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; :meth:`from_json` reads it back."""
        return {**asdict(self), "tabular": list(self.tabular), "log_scaled": sorted(self.log_scaled)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> InputSpec:
        """The inverse of :meth:`to_json`.

        Raises:
            KeyError, TypeError, ValueError: ``values`` was not made by it.
        """
        return cls(tuple(values["tabular"]), frozenset(values["log_scaled"]), int(values["history_length"]))


@dataclass(frozen=True)
class Batch:
    """Users as tensors: B users, F tabular features, L events of the longest history among them (0 if none
    has any).

    Attributes:
        tabular: float32 [B, F], NaN where missing.
        kind, text, weekday, hour: int64 [B, L]; ``text`` indexes the vocabulary, 0 is none or unknown.
        numeric: float32 [B, L, NUMERIC_FEATURES].
        mask: bool [B, L], true where there is an event; events start at 0, padding follows.
    """

    tabular: Tensor
    kind: Tensor
    text: Tensor
    weekday: Tensor
    hour: Tensor
    numeric: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.tabular)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def collate(columns: Columns, spec: InputSpec, vocabulary_ids: np.ndarray) -> Batch:
    """Turn columns into padded tensors.

    Args:
        columns: at least ``spec.columns``, all of one length B.
        spec: what to read.
        vocabulary_ids: int64 [V], sorted: the texts the network knows. Text ``vocabulary_ids[i]`` becomes ``i
            + 1``.

    Raises:
        DataError: a column is missing, or the arrays of a history differ in length.
    """
    tabular = tabular_matrix(columns, spec)
    history, lengths = _flat_history(columns)
    history, lengths = _keep_last(history, lengths, spec.history_length)

    ends = np.cumsum(lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(row)) - np.repeat(ends - lengths, lengths)
    shape = (len(lengths), int(lengths.max(initial=0)))

    def padded(values: np.ndarray, dtype: type) -> Tensor:
        out: np.ndarray = np.zeros(shape + values.shape[1:], dtype)
        out[row, position] = values
        return torch.from_numpy(out)

    return Batch(
        tabular=torch.from_numpy(tabular),
        kind=padded(_categories(history["seq_kind"], KINDS), np.int64),
        text=padded(_text_indices(history["seq_text_id"], vocabulary_ids), np.int64),
        weekday=padded(_categories(history["seq_weekday"], WEEKDAYS), np.int64),
        hour=padded(_categories(history["seq_hour"], HOURS), np.int64),
        numeric=padded(_numeric(history, position), np.float32),
        mask=padded(np.ones(len(row), bool), np.bool_),
    )


def tabular_matrix(columns: Columns, spec: InputSpec) -> np.ndarray:
    """The tabular features as the network reads them: float32 [B, F], log-scaled where asked, NaN where not
    finite.

    Raises:
        DataError: a column is missing.
    """
    rows = len(_column(columns, HISTORY_COLUMNS[0]))
    out = np.empty((rows, len(spec.tabular)), np.float32)
    for index, name in enumerate(spec.tabular):
        values = np.asarray(_column(columns, name), np.float64)
        out[:, index] = _signed_log(values) if name in spec.log_scaled else values
    out[~np.isfinite(out)] = np.nan
    return out


def history_lengths(columns: Columns) -> np.ndarray:
    """Events of each user: int64 [B]. What to order users by, so that a batch has little padding."""
    column = _column(columns, HISTORY_COLUMNS[0])
    return np.fromiter(map(len, column), np.int64, len(column))


def empty_user(spec: InputSpec) -> dict[str, np.ndarray]:
    """Columns of one user without a history and features: what a forward pass needs when there is nobody."""
    history = np.empty(1, object)
    history[0] = np.zeros(0)
    return {name: np.array([np.nan]) for name in spec.tabular} | {name: history for name in HISTORY_COLUMNS}


def _column(columns: Columns, name: str) -> np.ndarray:
    try:
        return columns[name]
    except KeyError:
        raise DataError("network input", "column is missing", column=name) from None


def _flat_history(columns: Columns) -> tuple[dict[str, np.ndarray], np.ndarray]:
    lengths = history_lengths(columns)
    total = int(lengths.sum())
    flat = {}
    for name in HISTORY_COLUMNS:
        column = _column(columns, name)
        values = np.concatenate(list(column)) if total else np.zeros(0)
        if len(values) != total:
            raise DataError("network input", f"must be parallel to {HISTORY_COLUMNS[0]}", column=name)
        flat[name] = values
    return flat, lengths


def _keep_last(
    flat: dict[str, np.ndarray], lengths: np.ndarray, limit: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    if lengths.max(initial=0) <= limit:
        return flat, lengths
    from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(int(lengths.sum()))
    kept = from_end <= limit
    return {name: values[kept] for name, values in flat.items()}, np.minimum(lengths, limit)


def _numeric(history: Mapping[str, np.ndarray], position: np.ndarray) -> np.ndarray:
    amount, items, discount, age = (
        np.nan_to_num(history[name].astype(np.float64), posinf=0.0, neginf=0.0)
        for name in ("seq_amount", "seq_items", "seq_discount", "seq_age_days")
    )
    price = np.abs(amount) + np.abs(discount)
    share = np.divide(np.abs(discount), price, out=np.zeros_like(price), where=price > 0)
    gap = np.where(position == 0, 0.0, np.concatenate([age[:1], age[:-1]]) - age)
    columns = (_signed_log(amount), _signed_log(items), share, _signed_log(gap), _signed_log(age))
    return np.stack(columns, axis=1).astype(np.float32)


def _signed_log(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.log1p(np.abs(values))


def _categories(values: np.ndarray, count: int) -> np.ndarray:
    """Codes without an embedding (a newer kind of event) are read as 0, not refused: a night must run."""
    codes = np.nan_to_num(values.astype(np.float64)).astype(np.int64)
    return np.where((codes >= 0) & (codes < count), codes, 0)


def _text_indices(ids: np.ndarray, vocabulary_ids: np.ndarray) -> np.ndarray:
    if not len(vocabulary_ids):
        return np.zeros(len(ids), np.int64)
    ids = ids.astype(np.int64)
    place = np.minimum(np.searchsorted(vocabulary_ids, ids), len(vocabulary_ids) - 1)
    return np.where((vocabulary_ids[place] == ids) & (ids != 0), place + 1, 0)
