"""Inputs of the network: columns of a table in, padded tensors out.

Fine-tuning and scoring both use :func:`read`, so the network gets the same input for a user in either. The arrays of a history
column have the oldest event first.
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
from bp_spark.model.columns import Columns, ragged, to_matrix
from bp_spark.model.values import texts, whole

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
"""Numbers of an event: log amount, log items, discount share, log gap to the event before, log age."""
AMOUNT, GAP, AGE = 0, 3, 4
"""Positions among the numbers of an event."""
_LONGEST_HISTORY = 1_000_000


@dataclass(frozen=True)
class InputSpec:
    """The columns of a user that a network reads.

    Attributes:
        tabular: names of the tabular columns, in the order of the tensor.
        log_scaled: tabular columns that are read as sign(x) * log(1 + |x|): money and counts.
        history_length: how many of the most recent events are read.
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
        """Return the specification of all columns of ``user_features``."""
        features = catalogue(config)
        logged = frozenset(feature.name for feature in features.features if feature.scale == "log")
        return cls(features.names, logged, config.history_length)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a JSON file; :meth:`from_json` reads them back."""
        return {**asdict(self), "tabular": list(self.tabular), "log_scaled": sorted(self.log_scaled)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> InputSpec:
        """Return the specification that :meth:`to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: ``values`` are not those of a specification.
        """
        history_length = whole(values["history_length"], 1, _LONGEST_HISTORY)
        return cls(texts(values["tabular"]), frozenset(texts(values["log_scaled"])), history_length)


@dataclass(frozen=True)
class Batch:
    """Users as tensors: B users, F tabular features, L events of the longest history among them.

    L is 0 if no user has an event.

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

    def __getitem__(self, rows: slice) -> Batch:
        """Return some of the users."""
        return Batch(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on another device."""
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
        """Return the users at these positions (int64), padded to the longest history among them."""
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
    """Turn columns into the arrays that a network reads.

    Args:
        columns: at least ``spec.columns``, all of one length B.
        spec: the columns to read.
        vocabulary_ids: int64 [V], sorted: ids of the texts of the vocabulary. Text ``vocabulary_ids[i]`` becomes ``i + 1``.

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
    """Return all users as one batch; see :func:`read`."""
    users = read(columns, spec, vocabulary_ids)
    return users.batch(np.arange(len(users)))


def tabular_matrix(columns: Columns, spec: InputSpec) -> np.ndarray:
    """Return the tabular features as the network reads them, float32 [B, F]: log-scaled by ``spec``, NaN where not finite.

    Raises:
        DataError: a column is missing.
    """
    for name in spec.tabular:
        _require(columns, name)
    if not spec.tabular:
        return np.zeros((len(history_lengths(columns)), 0), np.float32)
    values = to_matrix(columns, spec.tabular, np.float64)
    logged = [name in spec.log_scaled for name in spec.tabular]
    values[:, logged] = _signed_log(values[:, logged])
    return values.astype(np.float32)


def history_lengths(columns: Columns) -> np.ndarray:
    """Return how many events each user has, int64 [B]; batches of users in this order have little padding."""
    _require(columns, HISTORY_COLUMNS[0])
    return ragged(columns[HISTORY_COLUMNS[0]]).lengths


def empty_user(spec: InputSpec) -> dict[str, np.ndarray]:
    """Return the columns of one user without history and features, for a forward pass without users."""
    history = np.empty(1, object)
    history[0] = np.zeros(0)
    return {name: np.array([np.nan]) for name in spec.tabular} | {name: history for name in HISTORY_COLUMNS}


def _require(columns: Columns, name: str) -> None:
    if name not in columns:
        raise DataError("network input", "column is missing", column=name)


def _flat_history(columns: Columns) -> tuple[dict[str, np.ndarray], np.ndarray]:
    lengths = history_lengths(columns)
    """Return the history columns end to end, and the events of each user, int64 [B]."""
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
    """Drop all but the newest ``limit`` events of each user."""
    if lengths.max(initial=0) <= limit:
        return flat, lengths
    from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(int(lengths.sum()))
    is_recent = from_end <= limit
    return {name: values[is_recent] for name, values in flat.items()}, np.minimum(lengths, limit)


def _numeric(history: Mapping[str, np.ndarray], first: np.ndarray) -> np.ndarray:
    """Return the numbers of events, float32 [E, NUMERIC_FEATURES]; ``first`` marks the oldest event of each user."""
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
    return np.asarray(np.sign(values) * np.log1p(np.abs(values)))


def _categories(values: np.ndarray, count: int) -> np.ndarray:
    """Return codes, int64; one without an embedding (a newer kind of event) becomes 0, so that a scoring run goes on."""
    codes = np.nan_to_num(values.astype(np.float64)).astype(np.int64)
    return np.where((codes >= 0) & (codes < count), codes, 0)


def _text_indices(ids: np.ndarray, vocabulary_ids: np.ndarray) -> np.ndarray:
    """Return positions in the vocabulary, from 1 on; 0 for no text and for an unknown one."""
    if not len(vocabulary_ids):
        return np.zeros(len(ids), np.int64)
    ids = ids.astype(np.int64)
    position = np.minimum(np.searchsorted(vocabulary_ids, ids), len(vocabulary_ids) - 1)
    return np.where((vocabulary_ids[position] == ids) & (ids != 0), position + 1, 0)
