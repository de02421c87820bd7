"""Bits of Parquet files flipped where no checksum covers them."""

from __future__ import annotations

import io

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
