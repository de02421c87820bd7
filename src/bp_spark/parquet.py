"""Rows of a table, read by pyarrow from its Parquet files in the Python workers that need them.

Spark hands wide rows to Python by making rows of the columns that it reads, and columns of the rows. Here Spark says which rows
there are and where in its file each lies (:func:`places`), and may choose some of them. A worker then reads the columns as they
are in the file (:func:`read`). Each page is held against its checksum before it is decoded, as Spark does in sessions of this
package.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.errors import FileReadError
from bp_spark.tables import file_system

PLACE = ("file_path", "row_index")
"""Columns that say where a row lies: the file's address, and how many rows of it come before."""
_UNREADABLE = (OSError, ValueError, pa.ArrowException)


def places(rows: DataFrame, *kept: str) -> DataFrame:
    """Some columns of a table's rows, and where these lie: PLACE.

    Args:
        rows: a table as it was read, of which nothing is left out but whole files; :meth:`bp_spark.tables.Lakehouse.is_plain`
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
    return found.select(*kept, *(F.col(f"_metadata.{name}").alias(name) for name in PLACE))


def in_file_order(places: DataFrame, files: int) -> DataFrame:
    """Rows of :func:`places`, of so many files, as :func:`read` wants them, whatever was done to their order."""
    return places.repartition(files, PLACE[0]).sortWithinPartitions(*PLACE)


def read(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, batch_bytes: int, most_rows: int
) -> Iterator[pa.RecordBatch]:
    """Batches of :func:`places` -> the same rows, with the columns of ``schema`` from their files in the place of PLACE.

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
        paths, rows = batch.column(PLACE[0]).dictionary_encode(), batch.column(PLACE[1]).to_numpy()
        numbers = paths.indices.to_numpy()
        borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        others = batch.select([name for name in batch.schema.names if name not in PLACE])
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
            self._source = system.open_input_file(path)
            self._metadata = pq.read_metadata(self._source)
        except _UNREADABLE as error:
            raise FileReadError(address, str(error)) from error
        found = self._metadata.schema.to_arrow_schema()
        for field in schema:
            if field.name not in found.names or not _same_type(found.field(field.name).type, field.type):
                raise FileReadError(address, f"holds no column {field.name} of the type {field.type}")
        groups = range(self._metadata.num_row_groups)
        self._borders = np.cumsum([0, *(self._metadata.row_group(group).num_rows for group in groups)])
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
        metadata = self._metadata.row_group(group)
        names = set(self._schema.names)
        chunks = [metadata.column(number) for number in range(metadata.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in names]
        spans = [(_first_page(chunk), chunk.total_compressed_size) for chunk in chunks]
        first = min(start for start, _ in spans)
        content = self._source.read_at(max(start + size for start, size in spans) - first, first)
        part = _Part(content, first, self._source.size())
        whole = memoryview(part.content).cast("B")
        for chunk, (start, size) in zip(chunks, spans, strict=True):
            _verify(whole[start - first : start - first + size], chunk, self.address)
        a_row = max(1, sum(_decoded_bytes(chunk) for chunk in chunks) // metadata.num_rows)
        self.rows_at_once = int(min(self._most_rows, max(1, self._batch_bytes // a_row)))
        file = pq.ParquetFile(part, metadata=self._metadata)
        decoded = file.iter_batches(self.rows_at_once, [group], self._schema.names, use_threads=False)
        self._decoded = (batch.select(self._schema.names) for batch in decoded)
        self._end, self._group_end = int(self._borders[group]), int(self._borders[group + 1])


def _decoded_bytes(chunk: pq.ColumnChunkMetaData) -> int:
    width = 4 if chunk.physical_type in ("INT32", "FLOAT") else 8
    return int(chunk.num_values) * width


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_list(found) and pa.types.is_list(wanted):
        return _same_type(found.value_type, wanted.value_type)
    return bool(found == wanted)


class _Part:
    """A span of a file in memory, for a reader of the file that reads nowhere else."""

    closed = False

    def __init__(self, content: bytes, start: int, size: int) -> None:
        self.content, self._start, self._size, self._place = pa.py_buffer(content), start, size, 0

    def read_buffer(self, size: int) -> pa.Buffer:
        """The next bytes, not copied."""
        found = self.content.slice(self._place - self._start, size)
        self._place += size
        return found

    def read(self, size: int) -> bytes:
        return bytes(self.read_buffer(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing is open."""


# --- integrity ---------------------------------------------------------------------------------------------------------

_ENCODINGS = {0: "PLAIN", 2: "PLAIN_DICTIONARY", 3: "RLE", 4: "BIT_PACKED", 5: "DELTA_BINARY_PACKED"} | {
    6: "DELTA_LENGTH_BYTE_ARRAY",
    7: "DELTA_BYTE_ARRAY",
    8: "RLE_DICTIONARY",
    9: "BYTE_STREAM_SPLIT",
}
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3
_Struct = dict[int, Any]


def _first_page(chunk: pq.ColumnChunkMetaData) -> int:
    return int(chunk.dictionary_page_offset or chunk.data_page_offset)


def _verify(content: memoryview, chunk: pq.ColumnChunkMetaData, address: str) -> None:
    """Hold each page of a column chunk against its checksum, where it has one, and the pages' headers, which have none and are
    believed by the decoder, against what the file's footer says of the chunk.

    Source: Parquet's format, ``PageHeader`` in parquet.thrift: a page is its header, in Thrift's compact protocol, and then
    ``compressed_page_size`` bytes, of which ``crc`` is the CRC-32.

    Raises:
        FileReadError: something is other than it was written.
    """
    place = values = uncompressed = 0
    try:
        while place < len(content):
            header, start = _thrift_struct(content, place)
            uncompressed += start - place + header[2]
            kind, place = header[1], start + header[3]
            page = content[start:place]
            if len(page) != header[3] or zlib.crc32(page) != header.get(4, zlib.crc32(page)) & 0xFFFFFFFF:
                raise ValueError("a page is damaged")
            said = header[{_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}[kind]]
            if kind != _DICTIONARY:
                values += said[1]
            encodings = {_DATA: (2, 3, 4), _DICTIONARY: (2,), _DATA_2: (4,)}[kind]
            if any(_ENCODINGS[said[number]] not in chunk.encodings for number in encodings):
                raise ValueError("a page is encoded in another way than its column")
        if values != chunk.num_values or uncompressed != chunk.total_uncompressed_size:
            raise ValueError("its pages are not all there")
    except (IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"column {chunk.path_in_schema} is damaged: {error if type(error) is ValueError else 'a page header'}"
        raise FileReadError(address, reason) from error


def _thrift_struct(content: memoryview, place: int) -> tuple[_Struct, int]:
    """The integers and structs in a struct of Thrift's compact protocol, by field number, and where it ends."""
    found: _Struct = {}
    number = 0
    while kind := content[place]:
        place += 1
        if kind >> 4:
            number += kind >> 4
        else:
            number, place = _zigzag(content, place)
        kind &= 15
        if kind in (4, 5, 6):
            found[number], place = _zigzag(content, place)
        elif kind == 12:
            found[number], place = _thrift_struct(content, place)
        elif kind == 8:
            size, place = _varint(content, place)
            place += size
        elif kind == 3:
            place += 1
        elif kind == 7:
            place += 8
        elif kind > 2:
            # a boolean, 1 or 2, is its own value
            raise ValueError(f"a page header has a field of the type {kind}")
    return found, place + 1


def _zigzag(content: memoryview, place: int) -> tuple[int, int]:
    value, place = _varint(content, place)
    return (value >> 1) ^ -(value & 1), place


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
