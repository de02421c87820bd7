"""Columns of a table in, padded tensors out.

Fine-tuning and nightly scoring both read users by :func:`read`, so a user looks the same to the network in either. The
arrays of a history column have the oldest event first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bp_spark.core.config import FeaturesConfig
from bp_spark.core.errors import DataError
from bp_spark.features.catalogue import catalogue
from bp_spark.model.columns import Columns, ragged, stack

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

    @classmethod
    def of(cls, config: FeaturesConfig) -> InputSpec:
        """All that ``user_features`` holds of a user."""
        features = catalogue(config)
        logged = frozenset(feature.name for feature in features.features if feature.scale == "log")
        return cls(features.names, logged, config.history_length)

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


@dataclass(frozen=True)
class Users:
    """Users as a network reads them, before padding: B users with E events, the events of all end to end.

    Attributes:
        tabular: float32 [B, F], NaN where missing.
        lengths: int64 [B], events of each user.
        kind, text, weekday, hour: int64 [E]; ``text`` indexes the vocabulary, 0 is none or unknown.
        numeric: float32 [E, NUMERIC_FEATURES].
    """

    tabular: np.ndarray
    lengths: np.ndarray
    kind: np.ndarray
    text: np.ndarray
    weekday: np.ndarray
    hour: np.ndarray
    numeric: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: np.ndarray) -> Batch:
        """The users at these positions (int64), padded to the longest history among them."""
        lengths = self.lengths[rows]
        within = np.arange(int(lengths.max(initial=0)))
        mask = within < lengths[:, None]
        starts = np.cumsum(self.lengths)[rows] - lengths
        events = (starts[:, None] + within)[mask]

        def padded(values: np.ndarray) -> Tensor:
            out = np.zeros(mask.shape + values.shape[1:], values.dtype)
            out[mask] = values[events]
            return torch.from_numpy(out)

        return Batch(
            tabular=torch.from_numpy(self.tabular[rows]),
            kind=padded(self.kind),
            text=padded(self.text),
            weekday=padded(self.weekday),
            hour=padded(self.hour),
            numeric=padded(self.numeric),
            mask=torch.from_numpy(mask),
        )


def read(columns: Columns, spec: InputSpec, vocabulary_ids: np.ndarray) -> Users:
    """Turn columns into what a network reads.

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
    first = np.zeros(int(lengths.sum()), bool)
    first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    return Users(
        tabular=tabular,
        lengths=lengths,
        kind=_categories(history["seq_kind"], KINDS),
        text=_text_indices(history["seq_text_id"], vocabulary_ids),
        weekday=_categories(history["seq_weekday"], WEEKDAYS),
        hour=_categories(history["seq_hour"], HOURS),
        numeric=_numeric(history, first),
    )


def collate(columns: Columns, spec: InputSpec, vocabulary_ids: np.ndarray) -> Batch:
    """All users as one batch; see :func:`read`."""
    users = read(columns, spec, vocabulary_ids)
    return users.batch(np.arange(len(users)))


def tabular_matrix(columns: Columns, spec: InputSpec) -> np.ndarray:
    """The tabular features as the network reads them: float32 [B, F], log-scaled where asked, NaN where not
    finite.

    Raises:
        DataError: a column is missing.
    """
    for name in spec.tabular:
        _require(columns, name)
    if not spec.tabular:
        return np.zeros((len(history_lengths(columns)), 0), np.float32)
    values = stack(columns, spec.tabular, np.float64)
    logged = [name in spec.log_scaled for name in spec.tabular]
    values[:, logged] = _signed_log(values[:, logged])
    return values.astype(np.float32)


def history_lengths(columns: Columns) -> np.ndarray:
    """Events of each user: int64 [B]. What to order users by, so that a batch has little padding."""
    _require(columns, HISTORY_COLUMNS[0])
    return ragged(columns[HISTORY_COLUMNS[0]]).lengths


def empty_user(spec: InputSpec) -> dict[str, np.ndarray]:
    """Columns of one user without a history and features: what a forward pass needs when there is nobody."""
    history = np.empty(1, object)
    history[0] = np.zeros(0)
    return {name: np.array([np.nan]) for name in spec.tabular} | {name: history for name in HISTORY_COLUMNS}


def _require(columns: Columns, name: str) -> None:
    if name not in columns:
        raise DataError("network input", "column is missing", column=name)


def _flat_history(columns: Columns) -> tuple[dict[str, np.ndarray], np.ndarray]:
    lengths = history_lengths(columns)
    flat = {}
    for name in HISTORY_COLUMNS:
        _require(columns, name)
        flat[name] = ragged(columns[name]).values
        if len(flat[name]) != lengths.sum():
            raise DataError("network input", f"must be parallel to {HISTORY_COLUMNS[0]}", column=name)
    return flat, lengths


def _keep_last(
    flat: dict[str, np.ndarray], lengths: np.ndarray, limit: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    if lengths.max(initial=0) <= limit:
        return flat, lengths
    from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(int(lengths.sum()))
    kept = from_end <= limit
    return {name: values[kept] for name, values in flat.items()}, np.minimum(lengths, limit)


def _numeric(history: Mapping[str, np.ndarray], first: np.ndarray) -> np.ndarray:
    amount, items, discount, age = (
        np.nan_to_num(history[name].astype(np.float64), posinf=0.0, neginf=0.0)
        for name in ("seq_amount", "seq_items", "seq_discount", "seq_age_days")
    )
    price = np.abs(amount) + np.abs(discount)
    share = np.divide(np.abs(discount), price, out=np.zeros_like(price), where=price > 0)
    gap = np.where(first, 0.0, np.concatenate([age[:1], age[:-1]]) - age)
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
