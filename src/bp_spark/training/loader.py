"""Read a snapshot of a Delta table in batches of columns, each rank its own shard of the Parquet files.

:func:`snapshot` asks the transaction log which files make up a version. Only those are read: Petastorm reads plain Parquet
files and would take the files of other versions too.

:meth:`Snapshot.shard` divides the row groups among the ranks. A :class:`ShardLoader` passes over a shard once per epoch in a
fixed number of batches. So all ranks take equally many steps, however unequal their shards are. The setting ``training.feed``
chooses the reader: Petastorm, or pyarrow alone.
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
"""Column name to values, one per row.

An array column is an object array of one-dimensional arrays, empty where the cell is NULL. A text column is an object array of
texts and ``None``. NULL numbers are NaN; integers with a NULL become float64.
"""

ReaderName = Literal["petastorm", "arrow"]

MEMORY_LIMIT = 512 * 2**20
"""A shard whose decoded size is below this many bytes is decoded once and kept in memory."""
SHUFFLE_BYTES = 128 * 2**20
"""Decoded bytes of the rows that are shuffled together when a shard is larger than ``MEMORY_LIMIT``."""
POOL_BATCHES = 16
"""Batches whose rows are sorted by length together: enough for little padding, few enough to stay random."""

_VALUE_BYTES = 8
_ARRAY_BYTES = 112  # overhead of a numpy array object
_TEXT_BYTES = 56  # overhead of a Python string


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file: its number of rows, and an estimate of their decoded size in bytes."""

    rows: int
    size: int


@dataclass(frozen=True)
class Shard:
    """The part of a snapshot that one rank reads: row groups ``index``, ``index + count``, ... of all files.

    ``count`` may be smaller than the number of ranks; a rank beyond it has a shard without rows.
    """

    files: tuple[str, ...]
    schema: pa.Schema
    index: int
    count: int
    rows: int
    size: int

    def file_system_and_paths(self) -> tuple[fs.FileSystem, list[str]]:
        """Return pyarrow's file system of the files, and their paths in it."""
        return file_system(self.files[0])[0], [file_system(file)[1] for file in self.files]


class ShardReader(Protocol):
    """A function that opens one pass over a shard, a row group at a time."""

    def __call__(
        self, shard: Shard, scalars: Sequence[str], arrays: Mapping[str, np.dtype[Any]], seed: int | None
    ) -> AbstractContextManager[Iterator[Columns]]:
        """Open a pass.

        Args:
            shard: the row groups; at least one.
            scalars: names of the plain columns to read; no others are decoded.
            arrays: array columns to read, and the type of their elements.
            seed: seed of the order of row groups; ``None`` keeps the order of the files.
        """


@dataclass(frozen=True)
class Snapshot:
    """The active files of one version of a Delta table.

    Attributes:
        path: location of the table.
        version: version of the table.
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
        """Number of rows in all files."""
        return sum(group.rows for group in self.groups)

    def shard(self, rank: int, ranks: int) -> Shard:
        """Return the shard of ``rank`` (from 0) of ``ranks``; together the shards hold each row exactly once.

        Petastorm refuses more shards than row groups. With fewer row groups than ranks, the first ranks read one group each.

        >>> groups = (RowGroup(5, 80), RowGroup(3, 48))
        >>> whole = Snapshot("t", 0, ("file:///t/0.parquet",), pa.schema([]), groups)
        >>> [whole.shard(rank, 3).rows for rank in range(3)]
        [5, 3, 0]
        """
        count = min(ranks, len(self.groups))
        groups = self.groups[rank::count] if rank < count else ()
        rows, size = sum(group.rows for group in groups), sum(group.size for group in groups)
        return Shard(self.files, self.schema, rank, count, rows, size)


def snapshot(path: str, version: int | None = None, where: Mapping[str, str | Sequence[str]] | None = None) -> Snapshot:
    """Look up which files make up a version of a Delta table, and their row groups.

    Args:
        path: local folder or object-store URL of the table.
        version: version to read; ``None`` for the newest.
        where: value or values of partition columns, to read a part of the table.

    Raises:
        DataError: the table, version or partition column doesn't exist; there are no rows; a file differs from the table's log;
            or the table has deletion vectors or renamed columns (column mapping), which a reader of Parquet files can't see.

    >>> snapshot("lakehouse/training_set", where={"complete": "true", "fold": ["1", "2"]}).rows  # doctest: +SKIP
    15120
    """
    try:
        table = DeltaTable(path, version=version)
    except DeltaError as error:
        of_version = "" if version is None else f" with a version {version}"
        raise DataError(path, f"must be a Delta table{of_version}: {str(error).splitlines()[0]}") from error
    conditions = dict(where or {})
    if unknown := set(conditions) - set(table.metadata().partition_columns):
        raise DataError(path, "must be a partition column", column=min(unknown))
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        raise DataError(path, "must not use column mapping: training reads the names in the files")
    if files_with_vectors := sum(batch.num_rows for batch in table.deletion_vectors()):
        rule = "must have no deletion vectors: training would read the deleted rows"
        raise DataError(path, f"{rule}, {files_with_vectors} files have")
    predicate = [
        (column, "=", value) if isinstance(value, str) else (column, "in", list(value))
        for column, value in conditions.items()
    ]
    files = tuple(sorted(_address(uri) for uri in table.file_uris(file_pruning_predicate=predicate or None)))
    active_files = Snapshot(path, table.version(), files, *_schema_and_groups(footers.read(table, files)))
    if not active_files.rows:
        of_part = "".join(f", {column} = {value}" for column, value in conditions.items())
        raise DataError(path, f"must have rows (version {active_files.version}{of_part})")
    return active_files


def require_columns(snapshots: Sequence[Snapshot], names: Sequence[str]) -> None:
    """Make sure that every file of the snapshots has these columns.

    Raises:
        DataError: a column is missing.
    """
    for part in snapshots:
        for name in names:
            if name not in part.schema.names:
                raise DataError(part.path, "must be a column of all files", column=name)


class ShardLoader:
    """Pass over one rank's shard of a snapshot, as often as asked.

    The first pass decodes a small shard (:data:`MEMORY_LIMIT`) and keeps it. A larger shard is decoded by each pass.

    Args:
        shard: the rows.
        scalars: names of the plain columns to read; no others are decoded.
        arrays: names of the array columns to read. Rows are sorted by the length of the first array, if there is one.
        reader: what reads the files, see ``training.feed``.

    Raises:
        DataError: not all files have these columns.
    """

    def __init__(
        self, shard: Shard, scalars: Sequence[str], arrays: Sequence[str], reader: ReaderName = "petastorm"
    ) -> None:
        for name in (*scalars, *arrays):
            if name not in shard.schema.names:
                raise DataError(shard.files[0], "must be in all files", column=name)
        self.shard = shard
        self.scalars = tuple(scalars)
        self.arrays = {name: shard.schema.field(name).type.value_type.to_pandas_dtype() for name in arrays}
        self._open = _reader(reader)
        self._decoded: Columns | None = None

    @contextmanager
    def batches(self, steps: int, seed: int) -> Iterator[Iterator[Columns | None]]:
        """Yield all rows of the shard, each once, in exactly ``steps`` batches whose sizes differ by one at most.

        With more steps than rows, a step without a row yields ``None``. The order depends on ``seed`` alone. Ranks that pass
        the same seed get batches of similar length at the same step, so no rank waits long for another.

        Args:
            steps: number of batches.
            seed: seed of the order of rows and batches.

        Raises:
            DataError: the files hold fewer rows than the snapshot says.

        >>> with loader.batches(steps=10, seed=1) as batches:  # doctest: +SKIP
        ...     for columns in batches: ...
        """
        with closing(self._chunks(seed)) as chunks:
            yield self._rebatch(chunks, split_sizes(self.shard.rows, steps), seed)

    def _chunks(self, seed: int) -> Generator[Columns, None, None]:
        """Yield the rows in chunks, each large enough to be shuffled on its own."""
        if not self.shard.rows:
            return
        if self._decoded is None and self.shard.size <= MEMORY_LIMIT:
            with self._open(self.shard, self.scalars, self.arrays, None) as tables:
                self._decoded = _concat(list(tables))
        if self._decoded is not None:
            yield self._decoded
            return
        rows_together = max(1, SHUFFLE_BYTES * self.shard.rows // self.shard.size)
        with self._open(self.shard, self.scalars, self.arrays, seed) as tables:
            pending: list[Columns] = []
            for table in tables:
                pending.append(table)
                if sum(map(_rows, pending)) >= rows_together:
                    yield _concat(pending)
                    pending = []
            if pending:
                yield _concat(pending)

    def _rebatch(self, chunks: Iterator[Columns], sizes: list[int], seed: int) -> Iterator[Columns | None]:
        """Shuffle the rows of each chunk and cut them into batches of the given sizes."""
        row_rng = np.random.default_rng([seed, self.shard.index, 1])
        # the same on all ranks, so that they get batches of similar length together
        batch_rng = np.random.default_rng(seed)
        rows_read = batches_done = 0
        rest: Columns | None = None
        for chunk in chunks:
            rows_read += _rows(chunk)
            rows = chunk if rest is None else _concat([rest, chunk])
            order = row_rng.permutation(_rows(rows))
            while pool := _fitting(sizes[batches_done : batches_done + POOL_BATCHES], len(order)):
                picked, order = order[: sum(pool)], order[sum(pool) :]
                yield from self._by_length(rows, picked, pool, batch_rng)
                batches_done += len(pool)
            rest = _take(rows, order)
        if rows_read != self.shard.rows:
            raise DataError(self.shard.files[0], f"shard must have {self.shard.rows} rows, read {rows_read}")
        yield from (None for _ in sizes[batches_done:])

    def _by_length(
        self, rows: Columns, picked: np.ndarray, sizes: list[int], rng: np.random.Generator
    ) -> Iterator[Columns | None]:
        """Cut the picked rows into batches of similar length, and yield the batches in random order."""
        if self.arrays:
            lengths = [len(array) for array in rows[next(iter(self.arrays))][picked]]
            picked = picked[np.argsort(lengths, kind="stable")]
        parts = np.split(picked, np.cumsum(sizes)[:-1])
        for index in rng.permutation(len(parts)):
            yield _take(rows, parts[index]) if len(parts[index]) else None


def _reader(name: ReaderName) -> ShardReader:
    if name == "arrow":
        return _open_by_arrow
    # Petastorm imports many modules that nothing else needs
    from bp_spark.training.petastorm_reader import open_shard

    return open_shard


@contextmanager
def _open_by_arrow(
    shard: Shard, scalars: Sequence[str], arrays: Mapping[str, np.dtype[Any]], seed: int | None
) -> Iterator[Iterator[Columns]]:
    """Open a pass over a shard by pyarrow alone; see :class:`ShardReader`."""
    store, paths = shard.file_system_and_paths()

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

    shard_groups = list(groups())[shard.index :: shard.count]
    count = len(shard_groups)
    order = range(count) if seed is None else np.random.default_rng(seed).permutation(count)
    yield (read(*shard_groups[index]) for index in order)


def _values(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_pandas())


def _array_values(column: pa.ChunkedArray, dtype: np.dtype[Any]) -> np.ndarray:
    arrays = np.empty(len(column), object)
    for row, array in enumerate(column.to_pandas()):
        arrays[row] = np.empty(0, dtype) if array is None else array.astype(dtype, copy=False)
    return arrays


def split_sizes(rows: int, steps: int) -> list[int]:
    """Split ``rows`` into ``steps`` integers that differ by one at most.

    >>> split_sizes(7, 3)
    [2, 2, 3]
    """
    edges = [rows * step // steps for step in range(steps + 1)]
    return [end - start for start, end in pairwise(edges)]


def _fitting(sizes: list[int], rows: int) -> list[int]:
    """Return the first of ``sizes`` whose sum is at most ``rows``."""
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
    """Return an address for :func:`bp_spark.core.stores.file_system`: a local file as its path, without URI escapes."""
    if "://" in uri and not uri.startswith("file://"):
        return uri
    return unquote(uri.removeprefix("file://"))


def _schema_and_groups(metadata: Sequence[pq.FileMetaData]) -> tuple[pa.Schema, tuple[RowGroup, ...]]:
    if not metadata:
        return pa.schema([]), ()
    schema = metadata[0].schema.to_arrow_schema()
    common = set.intersection(*(set(other.schema.to_arrow_schema().names) for other in metadata))
    groups = tuple(_row_group(footer.row_group(index)) for footer in metadata for index in range(footer.num_row_groups))
    return pa.schema([field for field in schema if field.name in common]), groups


def _row_group(group: pq.RowGroupMetaData) -> RowGroup:
    """Estimate the decoded size of a row group from its footer."""
    chunks = [group.column(index) for index in range(group.num_columns)]
    arrays = sum("." in chunk.path_in_schema for chunk in chunks)
    size = _VALUE_BYTES * sum(chunk.num_values for chunk in chunks) + _ARRAY_BYTES * arrays * group.num_rows
    texts = [chunk for chunk in chunks if chunk.physical_type == "BYTE_ARRAY"]
    size += sum(_TEXT_BYTES * chunk.num_values + chunk.total_uncompressed_size for chunk in texts)
    return RowGroup(group.num_rows, size)
