"""A user's days before a date -> the numbers and the history that features are made of, by numpy in Python workers.

All days of a user come to one worker in order. One pass over them gives windows, interpurchase times and histories of all
dates. Spark's own aggregates would be generated code that Java compiles anew in each run; for some hundred aggregates,
compiling takes as long as running. Sums are over whole numbers (cents, thousandths), so that the order of addition never
changes a bit.
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

from bp_spark.features.clock import quantize_recency
from bp_spark.lakehouse.schema import Column
from bp_spark.lakehouse.tables import KINDS, USER_DAILY

ROWS_AT_ONCE = 100_000
"""User-days that a worker processes at once: some tens of megabytes."""
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
ACTIVITY = ("browses", "clicks", "carts", "favourites", "searches")
INTERPURCHASE_TIMES = ("p_mean", "p_std", "p_median", "p_max", "p_last")
"""Mean, standard deviation, median, maximum and last of the days between a user's purchase days.

With fewer than two purchase days the standard deviation is 0 and the others are NULL.
"""
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
        measures: values of each day by name: columns of ``user_daily``, and the measures that :func:`_measures` adds.
        age: days from each day to the user's ``seen_on``, at least 1.
        starts: position of each user's first day.
    """

    measures: Mapping[str, Numbers]
    age: Numbers
    starts: Numbers


class Aggregate(Protocol):
    """One whole number of each user."""

    def of(self, days: Days) -> pa.Array:
        """Return the number of each user, int64; NULL where no day counts."""
        ...


@dataclass(frozen=True)
class Total:
    """Sum of a measure over the days of age ``newest`` to ``oldest``, or over all days; 0 without any."""

    measure: str
    oldest: int | None = None
    newest: int = 1

    def of(self, days: Days) -> pa.Array:
        """Return the number of each user; see :class:`Aggregate`."""
        values = days.measures[self.measure]
        if self.oldest is not None:
            values = np.where((days.age <= self.oldest) & (days.age >= self.newest), values, 0)
        return pa.array(np.add.reduceat(values, days.starts))


@dataclass(frozen=True)
class Decayed:
    """Sum of a measure in thousandths.

    Each day's value is weighted by ``0.5 ** (age / half_life)`` and rounded to a whole number.
    """

    measure: str
    half_life: int

    def of(self, days: Days) -> pa.Array:
        """Return the number of each user; see :class:`Aggregate`."""
        weighted = days.measures[self.measure] * 1000 * np.power(0.5, days.age / self.half_life)
        whole = np.trunc(weighted + np.copysign(0.5, weighted)).astype(np.int64)
        return pa.array(np.add.reduceat(whole, days.starts))


@dataclass(frozen=True)
class Largest:
    """Largest value of a measure over the days up to ``oldest`` days of age."""

    measure: str
    oldest: int

    def of(self, days: Days) -> pa.Array:
        """Return the number of each user; see :class:`Aggregate`."""
        within = days.age <= self.oldest
        values = np.where(within, days.measures[self.measure], np.iinfo(np.int64).min)
        return pa.array(np.maximum.reduceat(values, days.starts), mask=~np.logical_or.reduceat(within, days.starts))


@dataclass(frozen=True)
class Newest:
    """Age of the newest day on which a measure is positive."""

    measure: str

    def of(self, days: Days) -> pa.Array:
        """Return the number of each user; see :class:`Aggregate`."""
        ages = np.minimum.reduceat(np.where(days.measures[self.measure] > 0, days.age, _NO_AGE), days.starts)
        return pa.array(ages, mask=ages == _NO_AGE)


@dataclass(frozen=True)
class Oldest:
    """Age of the oldest day on which a measure is positive."""

    measure: str

    def of(self, days: Days) -> pa.Array:
        """Return the number of each user; see :class:`Aggregate`."""
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
    """Aggregate the days before each date, for each user with a purchase before it.

    Args:
        daily: USER_DAILY.
        as_of: dates before which days are seen.
        aggregates: what to compute, by column.
        recency_precision_bits: see :func:`bp_spark.features.clock.quantize_recency`.
        history_length: the newest tokens of the history that are kept.

    Returns:
        ``user_key, as_of_date, seen_on``, the aggregates (bigint), INTERPURCHASE_TIMES (double) and SEQUENCE_COLUMNS.
    """
    columns = ", ".join(
        [
            "user_key string, as_of_date date, seen_on date",
            *(f"{name} bigint" for name in aggregates),
            *(f"{name} double" for name in INTERPURCHASE_TIMES),
            *(f"{column.name} {column.type}" for column in SEQUENCE_COLUMNS),
        ]
    )
    schema = StructType.fromDDL(columns)
    assert isinstance(schema, StructType)
    aggregate = partial(
        aggregate_batches,
        as_of=sorted(as_of),
        aggregates=aggregates,
        schema=to_arrow_schema(schema),
        recency_precision_bits=recency_precision_bits,
        history_length=history_length,
    )
    columns_read = [column.name for column in USER_DAILY.columns if column.name != "categories"]
    # a repartition by a column keeps a user's rows together: Spark neither splits nor moves its parts, unlike those of a join
    by_user = daily.filter(daily["day"] < max(as_of)).select(*columns_read).repartition("user_key")
    return by_user.sortWithinPartitions("user_key", "day").mapInArrow(aggregate, schema)


def aggregate_batches(
    batches: Iterable[pa.RecordBatch],
    as_of: Sequence[date],
    aggregates: Mapping[str, Aggregate],
    schema: pa.Schema,
    recency_precision_bits: int | None,
    history_length: int,
    rows_at_once: int = ROWS_AT_ONCE,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of :func:`aggregate_days`.

    Args:
        batches: user-days, ordered by user and day; a user may be split between batches.
        as_of: dates before which days are seen.
        aggregates: what to compute, by column.
        schema: columns of the result.
        recency_precision_bits: see :func:`bp_spark.features.clock.quantize_recency`.
        history_length: the newest tokens of the history that are kept.
        rows_at_once: user-days that are processed at once, or those of a user who has more.
    """
    for rows in _whole_users(batches, rows_at_once):
        users = _user_days(rows)
        for day in as_of:
            columns = _aggregate_before(day, users, aggregates, recency_precision_bits, history_length)
            yield from pa.table(columns, schema=schema).to_batches()


def _whole_users(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Yield tables of about ``rows`` rows; each holds all rows of its users."""
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
    """Return the positions at which another key begins."""
    return np.flatnonzero(np.append(True, np.asarray(pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1)))))


def _sizes(starts: Numbers, rows: int) -> Numbers:
    """Return the number of rows of each user."""
    return np.diff(np.append(starts, rows))


def _owners(starts: Numbers, rows: int) -> Numbers:
    """Return the user's position for each row."""
    return np.repeat(np.arange(len(starts)), _sizes(starts, rows))


@dataclass(frozen=True)
class _UserDays:
    """All days of some users; every date reads the same.

    Args:
        key: user of each day.
        day: days since the epoch.
        measures: see :class:`Days`.
        starts: position of each user's first day.
        tokens: history tokens of each day.
    """

    key: pa.Array
    day: Numbers
    measures: Mapping[str, Numbers]
    starts: Numbers
    tokens: pa.ListArray


def _user_days(rows: pa.Table) -> _UserDays:
    key = rows["user_key"].combine_chunks()
    day = np.asarray(rows["day"].cast(pa.int32())).astype(np.int64)
    return _UserDays(key, day, _measures(rows, day), _starts(key), rows["tokens"].combine_chunks())


def _measures(users: pa.Table, day: Numbers) -> dict[str, Numbers]:
    """Return each number of ``user_daily``, and the measures that follow from these numbers."""
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


def _aggregate_before(
    as_of: date,
    users: _UserDays,
    aggregates: Mapping[str, Aggregate],
    recency_precision_bits: int | None,
    history_length: int,
) -> dict[str, pa.Array]:
    """Return the columns of :func:`aggregate_days` for one date."""
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
    seen_on = last + quantize_recency(today - last, recency_precision_bits)
    age = np.repeat(seen_on, size) - day[rows]
    days = Days({name: values[rows] for name, values in users.measures.items()}, age, starts)
    return {
        "user_key": users.key.take(pa.array(rows[starts])),
        "as_of_date": pa.array(np.full(len(starts), today, np.int32)).cast(pa.date32()),
        "seen_on": pa.array(seen_on.astype(np.int32)).cast(pa.date32()),
        **{name: aggregate.of(days) for name, aggregate in aggregates.items()},
        **_interpurchase_times(days),
        **_history(users.tokens, rows[starts], rows[ends], seen_on, history_length),
    }


def _interpurchase_times(days: Days) -> dict[str, pa.Array]:
    """Return INTERPURCHASE_TIMES of users who all have a purchase day."""
    bought = days.measures["orders"] > 0
    owner, age = _owners(days.starts, len(days.age))[bought], days.age[bought]
    within = owner[1:] == owner[:-1]
    owner, gap = owner[1:][within], (age[:-1] - age[1:])[within]
    count = np.bincount(owner, minlength=len(days.starts))
    ends = np.cumsum(count)
    has_gaps = count > 0
    first, final, n = (ends - count)[has_gaps], (ends - 1)[has_gaps], count[has_gaps]
    ranked = gap[np.lexsort((gap, owner))].astype(np.float64)
    mean, squares = (np.add.reduceat(values, first) / n for values in (gap, gap * gap))
    statistics = {
        "p_mean": mean,
        "p_std": np.sqrt(np.maximum(squares - mean * mean, 0)),
        "p_median": (ranked[first + (n - 1) // 2] + ranked[first + n // 2]) / 2,
        "p_max": ranked[final],
        "p_last": gap[final].astype(np.float64),
    }
    of_all_users = {name: _scatter(statistics[name], has_gaps) for name in INTERPURCHASE_TIMES}
    return of_all_users | {"p_std": of_all_users["p_std"].fill_null(0)}


def _scatter(values: np.ndarray, mask: np.ndarray) -> pa.Array:
    """Return the values where the mask is true, NULL elsewhere."""
    scattered = np.zeros(len(mask), values.dtype)
    scattered[mask] = values
    return pa.array(scattered, mask=~mask)


def _history(tokens: pa.ListArray, first: Numbers, last: Numbers, seen_on: Numbers, length: int) -> dict[str, pa.Array]:
    """Return the last ``length`` tokens of each user, oldest first, as parallel arrays.

    Args:
        tokens: tokens of all days.
        first: position of each user's first day.
        last: position of each user's last day before the date.
        seen_on: days since the epoch, by user.
        length: the most tokens of a user.
    """
    offsets = np.asarray(tokens.offsets).astype(np.int64)
    end = offsets[last + 1]
    start = np.maximum(offsets[first], end - length)
    size = end - start
    bounds = np.append(0, np.cumsum(size))
    token = np.repeat(start - bounds[:-1], size) + np.arange(bounds[-1])
    newest = tokens.values.take(pa.array(token))
    field = {newest.type.field(n).name: column for n, column in enumerate(newest.flatten())}
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
