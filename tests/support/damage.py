"""Bits of Parquet files flipped where no decoder notices it."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq


def with_rows_hidden(content: bytes) -> bytes:
    """Flip one bit of the footer, by which the file's row group has fewer rows to any reader; its length stays."""
    rows = pq.ParquetFile(io.BytesIO(content)).metadata.num_rows
    assert 1 < rows < 64
    # Thrift writes a number twice as large, behind a mark
    place = content.rindex(bytes([0x16, 2 * rows])) + 1
    flipped = content[:place] + bytes([2 * rows ^ 1 << (rows.bit_length())]) + content[place + 1 :]
    assert pq.ParquetFile(io.BytesIO(flipped)).read().num_rows < rows
    return flipped


def with_value_changed(content: bytes, column: str) -> bytes:
    """Flip one bit of a column's pages, by which readers that verify no checksum see other values, and no error."""
    whole = pq.read_table(io.BytesIO(content))
    group = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0)
    chunks = {group.column(number).path_in_schema: group.column(number) for number in range(group.num_columns)}
    chunk = chunks[column]
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    for place in reversed(range(start, start + chunk.total_compressed_size)):
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        try:
            found = pq.read_table(io.BytesIO(flipped))
        except (OSError, ValueError, pa.ArrowException):
            continue
        if found != whole:
            return flipped
    raise AssertionError(f"{column}: no flipped bit changes a value")
