"""A user's days before a date -> the numbers and the history that features are made of, by numpy in Python workers.

All days of a user come to one worker in their order, and one pass over them gives windows, pauses and histories of all dates.
Spark's own aggregates would be code that it generates and Java compiles anew for each run: for some hundred of them that takes
as long as to run it. Sums are over whole numbers (cents, thousandths), so that no order of addition changes one by a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import StructType

from bp_spark.lakehouse.tables import KINDS, USER_DAILY, Column

ROWS_AT_ONCE = 100_000
"""User-days that a worker works on at once: some tens of megabytes."""
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
ACTIVITY = ("browses", "clicks", "carts", "favourites", "searches")
PAUSES = ("p_mean", "p_std", "p_median", "p_max", "p_last")
"""Of the days between a user's purchase days: mean, standard deviation, median, largest, last. With fewer than two such days
the standard deviation is 0 and the others are NULL."""
SEQUENCE_COLUMNS = (
    Column(
        "seq_kind",
        "array<int>",
        f"Kind of each history token, oldest first: {', '.join(KINDS)} as 1..{len(KINDS)}",
    ),
    Column("seq_age_days", "array<float>", "Days from the token to seen_on"),
    Column("seq_amount", "array<float>", "Spend of the order"),
    Column("seq_items", "array<float>", "Lines of the order"),
    Column("seq_discount", "array<float>", "Reductions of the order"),
    Column("seq_text_id", "array<bigint>", "Text of the order's largest line, or of the event; 0 for none"),
    Column("seq_weekday", "array<int>", "1 Monday to 7 Sunday, UTC"),
    Column("seq_hour", "array<int>", "Hour of day, UTC"),
)

_MICROS_A_DAY = 86_400_000_000
_EPOCH_WEEKDAY = 3  # 1970-01-01, a Thursday, with Monday as 0
_NO_AGE = np.iinfo(np.int64).max

Numbers = np.ndarray
"""int64, money in cents."""


@dataclass(frozen=True)
class Days:
    """Days of some users before one date, oldest first within a user.

    Args:
        measures: number of each day by name: columns of ``user_daily``, and those that :func:`_measured` adds.
        age: days from each to the user's ``seen_on``, at least 1.
        starts: position of each user's first day.
    """

    measures: Mapping[str, Numbers]
    age: Numbers
    starts: Numbers


class Aggregate(Protocol):
    """One whole number of each user."""

    def of(self, days: Days) -> pa.Array:
        """The number of each user, int64; NULL where there is no such day."""
        ...


@dataclass(frozen=True)
class Total:
    """Sum of a measure over the days of age ``newest`` to ``oldest``, or over all days; 0 without any."""

    measure: str
    oldest: int | None = None
    newest: int = 1

    def of(self, days: Days) -> pa.Array:
        """See :class:`Aggregate`."""
        values = days.measures[self.measure]
        if self.oldest is not None:
            values = np.where((days.age <= self.oldest) & (days.age >= self.newest), values, 0)
        return pa.array(np.add.reduceat(values, days.starts))


@dataclass(frozen=True)
class Decayed:
    """Sum of a measure in thousandths, each day's weighted by ``0.5 ** (age / half_life)`` and rounded to a whole number."""

    measure: str
    half_life: int

    def of(self, days: Days) -> pa.Array:
        """See :class:`Aggregate`."""
        weighted = days.measures[self.measure] * 1000 * np.power(0.5, days.age / self.half_life)
        whole = np.trunc(weighted + np.copysign(0.5, weighted)).astype(np.int64)
        return pa.array(np.add.reduceat(whole, days.starts))


@dataclass(frozen=True)
class Largest:
    """Largest value of a measure over the days up to ``oldest`` days of age."""

    measure: str
    oldest: int

    def of(self, days: Days) -> pa.Array:
        """See :class:`Aggregate`."""
        within = days.age <= self.oldest
        values = np.where(within, days.measures[self.measure], np.iinfo(np.int64).min)
        return pa.array(np.maximum.reduceat(values, days.starts), mask=~np.logical_or.reduceat(within, days.starts))


@dataclass(frozen=True)
class Newest:
    """Age of the newest day on which a measure is positive."""

    measure: str

    def of(self, days: Days) -> pa.Array:
        """See :class:`Aggregate`."""
        ages = np.minimum.reduceat(np.where(days.measures[self.measure] > 0, days.age, _NO_AGE), days.starts)
        return pa.array(ages, mask=ages == _NO_AGE)


@dataclass(frozen=True)
class Oldest:
    """Age of the oldest day on which a measure is positive."""

    measure: str

    def of(self, days: Days) -> pa.Array:
        """See :class:`Aggregate`."""
        ages = np.maximum.reduceat(np.where(days.measures[self.measure] > 0, days.age, 0), days.starts)
        return pa.array(ages, mask=ages == 0)


def aggregate_days(
    daily: DataFrame,
    as_of: Sequence[date],
    aggregates: Mapping[str, Aggregate],
    *,
    recency_precision_bits: int | None,
    history_length: int,
) -> DataFrame:
    """What is known of each user with a purchase before each date, from the days before it.

    Args:
        daily: USER_DAILY.
        aggregates: what to compute, by column.
        recency_precision_bits: see :func:`bp_spark.features.catalogue.quantize_recency`.
        history_length: tokens of the history that are kept, the newest ones.

    Returns:
        ``user_key, as_of_date, seen_on``, the aggregates (bigint), PAUSES (double) and SEQUENCE_COLUMNS.
    """
    columns = ", ".join(
        [
            "user_key string, as_of_date date, seen_on date",
            *(f"{name} bigint" for name in aggregates),
            *(f"{name} double" for name in PAUSES),
            *(f"{column.name} {column.type}" for column in SEQUENCE_COLUMNS),
        ]
    )
    schema = StructType.fromDDL(columns)
    assert isinstance(schema, StructType)
    known = partial(
        known_users,
        as_of=sorted(as_of),
        aggregates=aggregates,
        schema=to_arrow_schema(schema),
        recency_precision_bits=recency_precision_bits,
        history_length=history_length,
    )
    read = [column.name for column in USER_DAILY.columns if column.name != "categories"]
    # a repartition by a column keeps a user's rows together: unlike those of a join, Spark neither splits nor moves its parts
    in_order = daily.filter(daily["day"] < max(as_of)).select(*read).repartition("user_key")
    return in_order.sortWithinPartitions("user_key", "day").mapInArrow(known, schema)


def known_users(
    batches: Iterable[pa.RecordBatch],
    as_of: Sequence[date],
    aggregates: Mapping[str, Aggregate],
    schema: pa.Schema,
    recency_precision_bits: int | None,
    history_length: int,
    rows_at_once: int = ROWS_AT_ONCE,
) -> Iterator[pa.RecordBatch]:
    """Rows of :func:`aggregate_days`, of user-days in the order of users and days, wherever a batch ends."""
    for rows in _whole_users(batches, rows_at_once):
        users = _user_days(rows)
        for day in as_of:
            known = _known_before(users, day, aggregates, recency_precision_bits, history_length)
            yield from pa.table(known, schema=schema).to_batches()


def _quantize_recency(days: Numbers, digits: int | None) -> Numbers:
    """As :func:`bp_spark.features.catalogue.quantize_recency`."""
    if digits is None:
        return days
    length = np.frexp(days.astype(np.float64))[1].astype(np.int64)
    return days - days % (1 << np.maximum(length - digits, 0))


def _whole_users(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Tables of about so many rows, none of which ends within a user's."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(part.num_rows for part in waiting) < rows:
            continue
        table = pa.Table.from_batches(waiting).combine_chunks()
        last = int(_starts(table["user_key"].combine_chunks())[-1])
        waiting = table.slice(last).to_batches()
        if last:
            yield table.slice(0, last).combine_chunks()
    if sum(part.num_rows for part in waiting):
        yield pa.Table.from_batches(waiting).combine_chunks()


def _starts(keys: pa.Array) -> Numbers:
    """Positions at which another key begins."""
    return np.flatnonzero(np.append(True, np.asarray(pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1)))))


def _sizes(starts: Numbers, rows: int) -> Numbers:
    """Rows of each user."""
    return np.diff(np.append(starts, rows))


def _owners(starts: Numbers, rows: int) -> Numbers:
    """Position of the user of each row."""
    return np.repeat(np.arange(len(starts)), _sizes(starts, rows))


@dataclass(frozen=True)
class _UserDays:
    """All days of some users, as no date changes them.

    Args:
        key: user of each day.
        day: days since the epoch.
        measures: see :class:`Days`.
        starts: position of each user's first day.
        tokens: of each day.
    """

    key: pa.Array
    day: Numbers
    measures: Mapping[str, Numbers]
    starts: Numbers
    tokens: pa.ListArray


def _user_days(rows: pa.Table) -> _UserDays:
    key = rows["user_key"].combine_chunks()
    day = np.asarray(rows["day"].cast(pa.int32())).astype(np.int64)
    return _UserDays(key, day, _measured(rows, day), _starts(key), rows["tokens"].combine_chunks())


def _measured(users: pa.Table, day: Numbers) -> dict[str, Numbers]:
    """Each number of ``user_daily``, and some that aggregates want beside them."""
    numbers: dict[str, Numbers] = {}
    for field in users.schema:
        if pa.types.is_decimal(field.type):
            numbers[field.name] = np.rint(np.asarray(users[field.name].cast(pa.float64())) * 100).astype(np.int64)
        elif pa.types.is_integer(field.type):
            numbers[field.name] = np.asarray(users[field.name])
    paid = np.maximum(numbers["spend"], 0)
    weekday = (day + _EPOCH_WEEKDAY) % 7
    return numbers | {
        "purchase_days": (numbers["orders"] > 0).astype(np.int64),
        "activity": sum((numbers[name] for name in ACTIVITY), np.zeros_like(paid)),
        "paid": paid,
        **{f"paid_{name}": np.where(weekday == number, paid, 0) for number, name in enumerate(WEEKDAYS)},
    }


def _known_before(
    users: _UserDays,
    as_of: date,
    aggregates: Mapping[str, Aggregate],
    recency_precision_bits: int | None,
    history_length: int,
) -> dict[str, pa.Array]:
    """Columns of :func:`aggregate_days` for one date."""
    day = users.day
    today = (as_of - date(1970, 1, 1)).days
    user = _owners(users.starts, len(day))
    before = day < today
    buyers = np.logical_or.reduceat(before & (users.measures["orders"] > 0), users.starts)
    rows = np.flatnonzero(before & buyers[user])
    starts = np.flatnonzero(np.diff(user[rows], prepend=-1))
    size = _sizes(starts, len(rows))
    ends = starts + size - 1
    last = day[rows[ends]]
    seen_on = last + _quantize_recency(today - last, recency_precision_bits)
    age = np.repeat(seen_on, size) - day[rows]
    days = Days({name: values[rows] for name, values in users.measures.items()}, age, starts)
    return {
        "user_key": users.key.take(pa.array(rows[starts])),
        "as_of_date": pa.array(np.full(len(starts), today, np.int32)).cast(pa.date32()),
        "seen_on": pa.array(seen_on.astype(np.int32)).cast(pa.date32()),
        **{name: aggregate.of(days) for name, aggregate in aggregates.items()},
        **_pauses(days),
        **_history(users.tokens, rows[starts], rows[ends], seen_on, history_length),
    }


def _pauses(days: Days) -> dict[str, pa.Array]:
    """PAUSES of users who all have a purchase day."""
    bought = days.measures["orders"] > 0
    owner, age = _owners(days.starts, len(days.age))[bought], days.age[bought]
    within = owner[1:] == owner[:-1]
    owner, gap = owner[1:][within], (age[:-1] - age[1:])[within]
    count = np.bincount(owner, minlength=len(days.starts))
    ends = np.cumsum(count)
    some = count > 0
    first, final, n = (ends - count)[some], (ends - 1)[some], count[some]
    ranked = gap[np.lexsort((gap, owner))].astype(np.float64)
    mean, squares = (np.add.reduceat(values, first) / n for values in (gap, gap * gap))
    found = {
        "p_mean": mean,
        "p_std": np.sqrt(np.maximum(squares - mean * mean, 0)),
        "p_median": (ranked[first + (n - 1) // 2] + ranked[first + n // 2]) / 2,
        "p_max": ranked[final],
        "p_last": gap[final].astype(np.float64),
    }
    spread = {name: _spread(found[name], some) for name in PAUSES}
    return spread | {"p_std": spread["p_std"].fill_null(0)}


def _spread(values: np.ndarray, known: np.ndarray) -> pa.Array:
    """Values at the places that are known, NULL at the others."""
    spread = np.zeros(len(known), values.dtype)
    spread[known] = values
    return pa.array(spread, mask=~known)


def _history(tokens: pa.ListArray, first: Numbers, last: Numbers, seen_on: Numbers, length: int) -> dict[str, pa.Array]:
    """The last ``length`` tokens of each user, oldest first, as parallel arrays.

    Args:
        tokens: of all days.
        first: position of each user's first day.
        last: that of the user's last one before the date.
        seen_on: days since the epoch.
    """
    offsets = np.asarray(tokens.offsets).astype(np.int64)
    end = offsets[last + 1]
    start = np.maximum(offsets[first], end - length)
    size = end - start
    bounds = np.append(0, np.cumsum(size))
    token = np.repeat(start - bounds[:-1], size) + np.arange(bounds[-1])
    kept = tokens.values.take(pa.array(token))
    field = {kept.type.field(n).name: column for n, column in enumerate(kept.flatten())}
    ts = np.asarray(field["ts"].cast(pa.int64()))
    values = {
        "seq_kind": field["kind"],
        "seq_age_days": (np.repeat(seen_on, size) * _MICROS_A_DAY - ts) / _MICROS_A_DAY,
        "seq_amount": np.asarray(field["amount"]) / 100,
        "seq_items": np.asarray(field["items"]),
        "seq_discount": np.asarray(field["discount"]) / 100,
        "seq_text_id": field["text_id"],
        "seq_weekday": (ts // _MICROS_A_DAY + _EPOCH_WEEKDAY) % 7 + 1,
        "seq_hour": ts % _MICROS_A_DAY // (_MICROS_A_DAY // 24),
    }
    ends = pa.array(bounds.astype(np.int32))
    return {name: pa.ListArray.from_arrays(ends, pa.array(column)) for name, column in values.items()}
