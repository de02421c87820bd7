"""Rows of a table, read by pyarrow from its Parquet files in the Python workers that need them.

Spark turns the columns that it reads into rows, and for Python the rows into columns again. Here Spark returns only where in
its file each row lies (:func:`row_locations`), and may filter these rows. A worker then reads the columns straight from the
file (:func:`read`). As in this package's Spark sessions, each page is compared with its checksum before it is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.core.errors import FileReadError
from bp_spark.core.stores import file_system

LOCATION_COLUMNS = ("file_path", "row_index")
"""Columns with the location of a row: the file's address, and the number of rows before it."""
_UNREADABLE = (OSError, ValueError, pa.ArrowException)


def row_locations(rows: DataFrame, *columns: str) -> DataFrame:
    """Return some columns of a table's rows, with LOCATION_COLUMNS.

    Args:
        rows: a table as it was read, without filters but those that leave out whole files;
            :meth:`bp_spark.lakehouse.store.Lakehouse.is_plain` must hold for it.
        *columns: columns to return beside the locations.

    Raises:
        FileReadError: a file is missing.
    """
    files = [re.sub(r"([\\*?\[\]{}])", r"\\\1", unquote(address)) for address in rows.inputFiles()]
    reader = rows.sparkSession.read.schema(rows.select(*columns).schema)
    try:
        located = reader.parquet(*files)
    except AnalysisException as error:
        raise FileReadError("a table's files", str(error)) from error
    return located.select(*columns, *(F.col(f"_metadata.{name}").alias(name) for name in LOCATION_COLUMNS))


def in_file_order(locations: DataFrame, files: int) -> DataFrame:
    """Sort rows of :func:`row_locations` as :func:`read` needs them, by file and row; ``files`` is the number of files."""
    return locations.repartition(files, LOCATION_COLUMNS[0]).sortWithinPartitions(*LOCATION_COLUMNS)


def read(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, batch_bytes: int, most_rows: int
) -> Iterator[pa.RecordBatch]:
    """Read columns of located rows from their files; yield the rows with these columns instead of LOCATION_COLUMNS.

    Args:
        batches: rows of :func:`row_locations`, each file's rows together and in order, as a scan returns them; rows may be
            missing.
        schema: columns to read, with their required types; the names of lists' items don't matter.
        batch_bytes: least size of a decoded batch, where enough rows remain.
        most_rows: the most rows that are decoded at once, however narrow they are.

    Raises:
        FileReadError: a file can't be read from here, is damaged, or holds other columns. Spark's own reader may still read
            it, for it supports more kinds of tables and stores.
    """
    file: _File | None = None
    pieces: list[pa.Table] = []
    gathered = 0
    for batch in batches:
        paths, rows = (
            batch.column(LOCATION_COLUMNS[0]).dictionary_encode(),
            batch.column(LOCATION_COLUMNS[1]).to_numpy(),
        )
        numbers = paths.indices.to_numpy()
        borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        others = batch.select([name for name in batch.schema.names if name not in LOCATION_COLUMNS])
        for start, end in pairwise(borders):
            if start == end:
                continue
            address = paths.dictionary[int(numbers[start])].as_py()
            if file is None or file.address != address:
                file = _File(address, schema, batch_bytes, most_rows)
            position = start
            for decoded in file.take(rows[start:end]):
                given = others.slice(position, decoded.num_rows)
                position += decoded.num_rows
                columns = [*given.columns, *decoded.columns]
                pieces.append(pa.Table.from_arrays(columns, [*given.schema.names, *schema.names]))
                gathered += decoded.num_rows
                if gathered >= file.rows_at_once:
                    yield _one_batch(pieces)
                    pieces, gathered = [], 0
    if pieces:
        yield _one_batch(pieces)


def _one_batch(pieces: Sequence[pa.Table]) -> pa.RecordBatch:
    whole: pa.RecordBatch = pa.concat_tables(pieces).combine_chunks().to_batches()[0]
    return whole


class _File:
    """Columns of one file, decoded a few rows at a time; rows must be asked for in the file's order."""

    def __init__(self, address: str, schema: pa.Schema, batch_bytes: int, most_rows: int) -> None:
        self.address, self.rows_at_once = address, most_rows
        self._schema, self._batch_bytes, self._most_rows = schema, batch_bytes, most_rows
        try:
            # Spark names a file by a URI; for a local file that is a path with escapes
            system, path = file_system(unquote(address) if address.startswith("file:") else address)
            source = system.open_input_file(path)
            self._file = pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True)
        except _UNREADABLE as error:
            raise FileReadError(address, str(error)) from error
        present = self._file.schema_arrow
        for field in schema:
            if field.name not in present.names or not _same_type(present.field(field.name).type, field.type):
                raise FileReadError(address, f"holds no column {field.name} of the type {field.type}")
        groups = range(self._file.metadata.num_row_groups)
        self._borders = np.cumsum([0, *(self._file.metadata.row_group(group).num_rows for group in groups)])
        self._decoded: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._end = self._group_end = self._next = 0

    def take(self, rows: np.ndarray) -> Iterator[pa.RecordBatch]:
        """Yield rows by their ascending numbers, in batches."""
        if rows[0] < self._next or rows[-1] >= self._borders[-1] or (np.diff(rows) < 1).any():
            raise FileReadError(self.address, "its rows are not asked for in their order, or it has fewer")
        self._next = int(rows[-1]) + 1
        while len(rows):
            while rows[0] >= self._end:
                self._advance(int(rows[0]))
            assert self._batch is not None
            in_batch = rows[: np.searchsorted(rows, self._end)] - (self._end - self._batch.num_rows)
            if in_batch[-1] - in_batch[0] + 1 == len(in_batch):
                yield self._batch.slice(int(in_batch[0]), len(in_batch))
            else:
                yield self._batch.take(pa.array(in_batch))
            rows = rows[len(in_batch) :]

    def _advance(self, row: int) -> None:
        """Decode the next batch; begin the row's own row group, where it is another one."""
        try:
            if row >= self._group_end:
                self._open(int(np.searchsorted(self._borders, row, side="right")) - 1)
            self._batch = next(self._decoded)
        except (*_UNREADABLE, StopIteration) as error:
            raise FileReadError(self.address, str(error) or "is shorter than it says") from error
        self._end += self._batch.num_rows

    def _open(self, group: int) -> None:
        metadata = self._file.metadata.row_group(group)
        names = set(self._schema.names)
        chunks = [metadata.column(number) for number in range(metadata.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in names]
        row_bytes = max(1, sum(_decoded_bytes(chunk) for chunk in chunks) // metadata.num_rows)
        self.rows_at_once = int(min(self._most_rows, max(1, self._batch_bytes // row_bytes)))
        decoded = self._file.iter_batches(self.rows_at_once, [group], self._schema.names, use_threads=False)
        self._decoded = (batch.select(self._schema.names) for batch in decoded)
        self._end, self._group_end = int(self._borders[group]), int(self._borders[group + 1])


def _decoded_bytes(chunk: pq.ColumnChunkMetaData) -> int:
    width = 4 if chunk.physical_type in ("INT32", "FLOAT") else 8
    return int(chunk.num_values) * width


def _same_type(present: pa.DataType, required: pa.DataType) -> bool:
    if pa.types.is_list(present) and pa.types.is_list(required):
        return _same_type(present.value_type, required.value_type)
    return bool(present == required)
