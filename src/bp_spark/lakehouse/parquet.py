"""Rows of a table, read by pyarrow from its Parquet files in the Python workers that need them.

Spark hands wide rows to Python by making rows of the columns that it reads, and columns of the rows. Here Spark says
which rows there are and where in its file each lies (:func:`row_locations`), and may choose some of them. A worker then
reads the columns as they are in the file (:func:`read`). Each page is held against its checksum before it is decoded,
as Spark does in sessions of this package.
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
"""Columns that say where a row lies: the file's address, and how many rows of it come before."""
_UNREADABLE = (OSError, ValueError, pa.ArrowException)


def row_locations(rows: DataFrame, *kept: str) -> DataFrame:
    """Some columns of a table's rows, and where these lie: LOCATION_COLUMNS.

    Args:
        rows: a table as it was read, of which nothing is left out but whole files;
        :meth:`bp_spark.lakehouse.store.Lakehouse.is_plain`
            must hold of it.

    Raises:
        FileReadError: a file is not there.
    """
    files = [re.sub(r"([\\*?\[\]{}])", r"\\\1", unquote(address)) for address in rows.inputFiles()]
    reader = rows.sparkSession.read.schema(rows.select(*kept).schema)
    try:
        found = reader.parquet(*files)
    except AnalysisException as error:
        raise FileReadError("a table's files", str(error)) from error
    return found.select(*kept, *(F.col(f"_metadata.{name}").alias(name) for name in LOCATION_COLUMNS))


def in_file_order(places: DataFrame, files: int) -> DataFrame:
    """Rows of :func:`row_locations`, of so many files, as :func:`read` wants them, whatever was done to their order."""
    return places.repartition(files, LOCATION_COLUMNS[0]).sortWithinPartitions(*LOCATION_COLUMNS)


def read(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, batch_bytes: int, most_rows: int
) -> Iterator[pa.RecordBatch]:
    """Batches of :func:`row_locations` -> the same rows, with the columns of ``schema`` from their files
    in the place of LOCATION_COLUMNS.

    Args:
        batches: rows of a file one after the other and in its order, as a scan gives them; rows may be left out.
        schema: columns to read, with the types that they must have; the names of lists' items don't matter.
        batch_bytes: of a batch, decoded, at least where there are as many rows.
        most_rows: that are decoded at once, however narrow they are.

    Raises:
        FileReadError: a file can't be read from here, is damaged, or holds other columns. Spark's own reader, which knows
            more kinds of tables and stores, may read it all the same.
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
            for found in file.take(rows[start:end]):
                theirs = others.slice(start, found.num_rows)
                start += found.num_rows
                both = [*theirs.columns, *found.columns]
                pieces.append(pa.Table.from_arrays(both, [*theirs.schema.names, *schema.names]))
                gathered += found.num_rows
                if gathered >= file.rows_at_once:
                    yield _one_batch(pieces)
                    pieces, gathered = [], 0
    if pieces:
        yield _one_batch(pieces)


def _one_batch(pieces: Sequence[pa.Table]) -> pa.RecordBatch:
    whole: pa.RecordBatch = pa.concat_tables(pieces).combine_chunks().to_batches()[0]
    return whole


class _File:
    """Columns of one file, decoded a few rows at a time, for rows that are asked for in its order."""

    def __init__(self, address: str, schema: pa.Schema, batch_bytes: int, most_rows: int) -> None:
        self.address, self.rows_at_once = address, most_rows
        self._schema, self._batch_bytes, self._most_rows = schema, batch_bytes, most_rows
        try:
            # what Spark calls a file is a URI, which of this machine's files is no more than a path with escapes
            system, path = file_system(unquote(address) if address.startswith("file:") else address)
            source = system.open_input_file(path)
            self._file = pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True)
        except _UNREADABLE as error:
            raise FileReadError(address, str(error)) from error
        found = self._file.schema_arrow
        for field in schema:
            if field.name not in found.names or not _same_type(found.field(field.name).type, field.type):
                raise FileReadError(address, f"holds no column {field.name} of the type {field.type}")
        groups = range(self._file.metadata.num_row_groups)
        self._borders = np.cumsum([0, *(self._file.metadata.row_group(group).num_rows for group in groups)])
        self._decoded: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._end = self._group_end = self._next = 0

    def take(self, rows: np.ndarray) -> Iterator[pa.RecordBatch]:
        """Rows by their ascending numbers, as batches one after the other."""
        if rows[0] < self._next or rows[-1] >= self._borders[-1] or (np.diff(rows) < 1).any():
            raise FileReadError(self.address, "its rows are not asked for in their order, or it has fewer")
        self._next = int(rows[-1]) + 1
        while len(rows):
            while rows[0] >= self._end:
                self._advance(int(rows[0]))
            assert self._batch is not None
            here = rows[: np.searchsorted(rows, self._end)] - (self._end - self._batch.num_rows)
            if here[-1] - here[0] + 1 == len(here):
                yield self._batch.slice(int(here[0]), len(here))
            else:
                yield self._batch.take(pa.array(here))
            rows = rows[len(here) :]

    def _advance(self, row: int) -> None:
        """Decode the next batch; of the row's own row group, where that is another."""
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
        a_row = max(1, sum(_decoded_bytes(chunk) for chunk in chunks) // metadata.num_rows)
        self.rows_at_once = int(min(self._most_rows, max(1, self._batch_bytes // a_row)))
        decoded = self._file.iter_batches(self.rows_at_once, [group], self._schema.names, use_threads=False)
        self._decoded = (batch.select(self._schema.names) for batch in decoded)
        self._end, self._group_end = int(self._borders[group]), int(self._borders[group + 1])


def _decoded_bytes(chunk: pq.ColumnChunkMetaData) -> int:
    width = 4 if chunk.physical_type in ("INT32", "FLOAT") else 8
    return int(chunk.num_values) * width


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_list(found) and pa.types.is_list(wanted):
        return _same_type(found.value_type, wanted.value_type)
    return bool(found == wanted)
