"""A snapshot of a Delta table in, batches of columns out: each rank reads its own share of the Parquet files.

:func:`snapshot` asks the transaction log which files make up a version, and only those are read: a reader of Parquet files, as
Petastorm is one, knows nothing of Delta and would take those of other versions, too.

Ranks share the row groups of the snapshot (:meth:`Snapshot.share`), and a :class:`Feed` passes over a share
once per epoch in a fixed number of batches, so that all ranks take equally many steps however unequal their
shares are. Who reads the files is a matter of ``training.feed``: Petastorm, or pyarrow alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from pyarrow import fs

from bp_spark.core.errors import DataError
from bp_spark.core.stores import file_system
from bp_spark.lakehouse import footers

Columns = dict[str, np.ndarray]
"""Column name to values, one per row. An array column is an object array of one-dimensional arrays, empty where it is NULL, a
text column one of texts and ``None``. NULL numbers are NaN, of integers too, which are float64 then."""

ReaderName = Literal["petastorm", "arrow"]

MEMORY_LIMIT = 512 * 2**20
"""A share whose decoded size is below this many bytes is decoded once and kept."""
SHUFFLE_BYTES = 128 * 2**20
"""Decoded size of the rows that are shuffled together when a share is larger than that."""
POOL_BATCHES = 16
"""Batches whose rows are ordered by length together: enough for little padding, few enough to stay random."""

_VALUE_BYTES = 8
_ARRAY_BYTES = 112  # of a numpy array object, whatever it holds
_TEXT_BYTES = 56  # of a Python string, whatever it holds


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file: its rows, and an estimate of their decoded size in bytes."""

    rows: int
    size: int


@dataclass(frozen=True)
class Share:
    """The part of a snapshot that one rank reads: row groups ``index``, ``index + count``, ... of all files.

    ``count`` may be smaller than the number of ranks; a rank left over has a share without rows.
    """

    files: tuple[str, ...]
    schema: pa.Schema
    index: int
    count: int
    rows: int
    size: int

    def opened(self) -> tuple[fs.FileSystem, list[str]]:
        """What pyarrow reads the files by, and their paths in it."""
        return file_system(self.files[0])[0], [file_system(file)[1] for file in self.files]


class ShareReader(Protocol):
    """One pass over a share, a row group at a time: in the files' order without a seed, else in one that follows from it."""

    def __call__(
        self, share: Share, scalars: Sequence[str], arrays: Mapping[str, np.dtype[Any]], seed: int | None
    ) -> AbstractContextManager[Iterator[Columns]]:
        """
        Args:
            share: the row groups; at least one.
            scalars: names of the plain columns to read; no others are decoded.
            arrays: array columns to read, and the type of what they hold.
        """


@dataclass(frozen=True)
class Snapshot:
    """The active files of one version of a Delta table.

    Attributes:
        path: the table.
        version: its version.
        files: addresses of the Parquet files, sorted.
        schema: the columns that all files have.
        groups: the row groups, file by file.
    """

    path: str
    version: int
    files: tuple[str, ...]
    schema: pa.Schema
    groups: tuple[RowGroup, ...]

    @property
    def rows(self) -> int:
        """Rows in all files."""
        return sum(group.rows for group in self.groups)

    def share(self, rank: int, ranks: int) -> Share:
        """The share of ``rank`` (from 0) of ``ranks``. Together the shares hold each row exactly once.

        Petastorm refuses more shares than row groups, so then as many ranks as there are row groups read one
        each.

        >>> groups = (RowGroup(5, 80), RowGroup(3, 48))
        >>> whole = Snapshot("t", 0, ("file:///t/0.parquet",), pa.schema([]), groups)
        >>> [whole.share(rank, 3).rows for rank in range(3)]
        [5, 3, 0]
        """
        count = min(ranks, len(self.groups))
        own = self.groups[rank::count] if rank < count else ()
        rows, size = sum(group.rows for group in own), sum(group.size for group in own)
        return Share(self.files, self.schema, rank, count, rows, size)


def snapshot(path: str, version: int | None = None, where: Mapping[str, str | Sequence[str]] | None = None) -> Snapshot:
    """Look up which files make up a version of a Delta table, and their row groups.

    Args:
        path: local folder or object-store URL of the table.
        version: ``None`` for the newest.
        where: value or values of partition columns, for part of the table.

    Raises:
        DataError: no such table, version or partition column; no rows; the table has deletion vectors or renamed columns
            (column mapping), which a reader of Parquet files would not see; a file is not as the table's log says.

    >>> snapshot("lakehouse/training_set", where={"complete": "true", "fold": ["1", "2"]}).rows  # doctest: +SKIP
    15120
    """
    try:
        table = DeltaTable(path, version=version)
    except DeltaError as error:
        which = "" if version is None else f" with a version {version}"
        raise DataError(path, f"must be a Delta table{which}: {str(error).splitlines()[0]}") from error
    conditions = dict(where or {})
    if unknown := set(conditions) - set(table.metadata().partition_columns):
        raise DataError(path, "must be a partition column", column=min(unknown))
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        raise DataError(path, "must not use column mapping: training reads the names in the files")
    if marked := sum(batch.num_rows for batch in table.deletion_vectors()):
        rule = "must have no deletion vectors: training would read the deleted rows"
        raise DataError(path, f"{rule}, {marked} files have")
    chosen = [
        (column, "=", value) if isinstance(value, str) else (column, "in", list(value))
        for column, value in conditions.items()
    ]
    files = tuple(sorted(_address(uri) for uri in table.file_uris(file_pruning_predicate=chosen or None)))
    found = Snapshot(path, table.version(), files, *_described(footers.read(table, files)))
    if not found.rows:
        which = "".join(f", {column} = {value}" for column, value in conditions.items())
        raise DataError(path, f"must have rows (version {found.version}{which})")
    return found


class Feed:
    """Passes over one rank's share of a snapshot.

    Args:
        share: the rows.
        scalars: names of the plain columns to read; no others are decoded.
        arrays: names of the array columns to read; rows are ordered by the length of the first, if there is one.
        reader: who reads the files, as ``training.feed`` says.

    A small share (:data:`MEMORY_LIMIT`) is decoded by the first pass and kept; a larger one is decoded by
    each.

    Raises:
        DataError: not all files have these columns.
    """

    def __init__(
        self, share: Share, scalars: Sequence[str], arrays: Sequence[str], reader: ReaderName = "petastorm"
    ) -> None:
        for name in (*scalars, *arrays):
            if name not in share.schema.names:
                raise DataError(share.files[0], "must be in all files", column=name)
        self.share = share
        self.scalars = tuple(scalars)
        self.arrays = {name: share.schema.field(name).type.value_type.to_pandas_dtype() for name in arrays}
        self._open = _reader(reader)
        self._kept: Columns | None = None

    @contextmanager
    def batches(self, steps: int, seed: int) -> Iterator[Iterator[Columns | None]]:
        """All rows of the share, each once, in exactly ``steps`` batches whose sizes differ by one at most.

        With more steps than rows, a step without a row yields ``None``. The order depends on ``seed`` alone.
        Ranks
        that pass the same seed meet batches of like length at the same step, so that none waits long for
        another.

        Raises:
            DataError: the files hold fewer rows than the snapshot says.

        >>> with feed.batches(steps=10, seed=1) as batches:  # doctest: +SKIP
        ...     for columns in batches: ...
        """
        with closing(self._chunks(seed)) as chunks:
            yield self._rebatch(chunks, split_sizes(self.share.rows, steps), seed)

    def _chunks(self, seed: int) -> Generator[Columns, None, None]:
        """The rows in pieces large enough to be shuffled each on its own."""
        if not self.share.rows:
            return
        if self._kept is None and self.share.size <= MEMORY_LIMIT:
            with self._open(self.share, self.scalars, self.arrays, None) as tables:
                self._kept = _concat(list(tables))
        if self._kept is not None:
            yield self._kept
            return
        rows_together = max(1, SHUFFLE_BYTES * self.share.rows // self.share.size)
        with self._open(self.share, self.scalars, self.arrays, seed) as tables:
            held: list[Columns] = []
            for table in tables:
                held.append(table)
                if sum(map(_rows, held)) >= rows_together:
                    yield _concat(held)
                    held = []
            if held:
                yield _concat(held)

    def _rebatch(self, chunks: Iterator[Columns], sizes: list[int], seed: int) -> Iterator[Columns | None]:
        of_rows = np.random.default_rng([seed, self.share.index, 1])
        of_batches = np.random.default_rng(seed)
        read = done = 0
        rest: Columns | None = None
        for chunk in chunks:
            read += _rows(chunk)
            rows = chunk if rest is None else _concat([rest, chunk])
            order = of_rows.permutation(_rows(rows))
            while pool := _fitting(sizes[done : done + POOL_BATCHES], len(order)):
                picked, order = order[: sum(pool)], order[sum(pool) :]
                yield from self._by_length(rows, picked, pool, of_batches)
                done += len(pool)
            rest = _take(rows, order)
        if read != self.share.rows:
            raise DataError(self.share.files[0], f"share must have {self.share.rows} rows, read {read}")
        yield from (None for _ in sizes[done:])

    def _by_length(
        self, rows: Columns, picked: np.ndarray, sizes: list[int], rng: np.random.Generator
    ) -> Iterator[Columns | None]:
        if self.arrays:
            lengths = [len(array) for array in rows[next(iter(self.arrays))][picked]]
            picked = picked[np.argsort(lengths, kind="stable")]
        parts = np.split(picked, np.cumsum(sizes)[:-1])
        for index in rng.permutation(len(parts)):
            yield _take(rows, parts[index]) if len(parts[index]) else None


def _reader(name: ReaderName) -> ShareReader:
    if name == "arrow":
        return _open_by_arrow
    # imported only where it reads: it brings much, and none of it is needed elsewhere
    from bp_spark.training.petastorm_reader import open_share

    return open_share


@contextmanager
def _open_by_arrow(
    share: Share, scalars: Sequence[str], arrays: Mapping[str, np.dtype[Any]], seed: int | None
) -> Iterator[Iterator[Columns]]:
    """One pass over a share by pyarrow alone; see :class:`ShareReader`."""
    store, paths = share.opened()

    def groups() -> Iterator[tuple[str, int]]:
        for path in paths:
            with store.open_input_file(path) as source:
                yield from ((path, group) for group in range(pq.read_metadata(source).num_row_groups))

    def read(path: str, group: int) -> Columns:
        with store.open_input_file(path) as source:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            table = file.read_row_group(group, [*scalars, *arrays])
        columns = {name: _values(table.column(name)) for name in scalars}
        return columns | {name: _array_values(table.column(name), dtype) for name, dtype in arrays.items()}

    own = list(groups())[share.index :: share.count]
    order = range(len(own)) if seed is None else np.random.default_rng(seed).permutation(len(own))
    yield (read(*own[index]) for index in order)


def _values(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_pandas())


def _array_values(column: pa.ChunkedArray, dtype: np.dtype[Any]) -> np.ndarray:
    found = np.empty(len(column), object)
    for row, array in enumerate(column.to_pandas()):
        found[row] = np.empty(0, dtype) if array is None else array.astype(dtype, copy=False)
    return found


def split_sizes(rows: int, steps: int) -> list[int]:
    """``rows`` as ``steps`` integers that differ by one at most.

    >>> split_sizes(7, 3)
    [2, 2, 3]
    """
    edges = [rows * step // steps for step in range(steps + 1)]
    return [end - start for start, end in pairwise(edges)]


def _fitting(sizes: list[int], rows: int) -> list[int]:
    """The first of ``sizes`` that ``rows`` suffice for."""
    return sizes[: int(np.searchsorted(np.cumsum(sizes), rows, side="right"))]


def _rows(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _take(columns: Columns, rows: np.ndarray) -> Columns:
    return {name: values[rows] for name, values in columns.items()}


def _concat(tables: Sequence[Columns]) -> Columns:
    if len(tables) == 1:
        return tables[0]
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _address(uri: str) -> str:
    """A file as :func:`bp_spark.lakehouse.tables.file_system` takes it: the path of a local one, without the escapes
    of a URI."""
    if "://" in uri and not uri.startswith("file://"):
        return uri
    return unquote(uri.removeprefix("file://"))


def _described(metadata: Sequence[pq.FileMetaData]) -> tuple[pa.Schema, tuple[RowGroup, ...]]:
    if not metadata:
        return pa.schema([]), ()
    schema = metadata[0].schema.to_arrow_schema()
    common = set.intersection(*(set(other.schema.to_arrow_schema().names) for other in metadata))
    groups = tuple(_describe(footer.row_group(index)) for footer in metadata for index in range(footer.num_row_groups))
    return pa.schema([field for field in schema if field.name in common]), groups


def _describe(group: pq.RowGroupMetaData) -> RowGroup:
    chunks = [group.column(index) for index in range(group.num_columns)]
    arrays = sum("." in chunk.path_in_schema for chunk in chunks)
    size = _VALUE_BYTES * sum(chunk.num_values for chunk in chunks) + _ARRAY_BYTES * arrays * group.num_rows
    texts = [chunk for chunk in chunks if chunk.physical_type == "BYTE_ARRAY"]
    size += sum(_TEXT_BYTES * chunk.num_values + chunk.total_uncompressed_size for chunk in texts)
    return RowGroup(group.num_rows, size)
