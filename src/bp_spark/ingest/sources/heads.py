"""What the head or footer of a file says before its rows are read: columns, encoding, times in nanoseconds."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from bp_spark.core.errors import DataError
from bp_spark.core.stores import UNREACHABLE, file_system
from bp_spark.ingest.sources.lines import names_in_header, quoted_column, records_of
from bp_spark.ingest.sources.mapping import TableMapping

HOW_TO_ENCODE = "name the encoding in the mapping, as in options: {encoding: windows-1252}"
_CHINESE = re.compile(rb"[\xb0-\xf7][\xa1-\xfe]")
"""A Chinese character in GB18030, as far as it is common."""
_FEW = 3
"""Chinese characters that are no coincidence."""
_HEAD = 64 * 1024
"""Bytes of a text file that are looked at."""
_BROKEN_SHARE = 0.01
"""Share of the rows in the head up to which broken rows may be single mistakes."""
_NOT_DECODED = re.compile("[\udc80-\udcff]")
"""Bytes that are no UTF-8, as ``surrogateescape`` keeps them."""
_THOUSAND = 1_000


def require_utf8(mapping: TableMapping, name: str, address: str) -> None:
    """Require that a text file without an ``encoding`` is UTF-8, as far as its head shows.

    A header must be UTF-8. A row of the head is broken if a mapped value has bytes that are no UTF-8. The file is refused if
    more than one row in a hundred is broken, and more are broken than have letters of UTF-8 beyond ASCII. Fewer broken rows
    are single mistakes: they go to quarantine by rule.

    Args:
        mapping: the table's mapping.
        name: the file, as errors name it.
        address: address of the file.

    Raises:
        DataError: the file is UTF-16, or of another encoding; the message says what to set.
    """
    if mapping.format not in ("csv", "json") or {"encoding", "charset"} & set(mapping.reader_options):
        return
    with suppress(*UNREACHABLE):
        files, path = file_system(address)
        with files.open_input_stream(path) as stream:
            head = stream.read(_HEAD)
        if len(head) == _HEAD:
            # the last line may be cut within a letter
            head = head[: head.rfind(b"\n") + 1] or head
        problem = _broken_beginning(mapping, head) or _broken_rows(mapping, head)
        if problem:
            encoding = likely_encoding([head])
            lines = " and multiLine: true" if mapping.format == "json" and encoding.startswith("UTF-16") else ""
            raise DataError(name, f"{problem} and may be {encoding}: set options: {{encoding: {encoding}}}{lines}")


def likely_encoding(parts: Sequence[bytes]) -> str:
    """Return what the encoding of a text file may be.

    Args:
        parts: the head of the file, and parts from its middle, which may begin and end within a letter.
    """
    head = parts[0] if parts else b""
    if wide := _wide(head):
        return wide
    # whole lines only, so that no letter is cut
    whole = [part[part.find(b"\n") + 1 : part.rfind(b"\n") + 1] if at else part for at, part in enumerate(parts)]
    text = b"".join(part[: part.rfind(b"\n") + 1] or part for part in whole)
    if is_utf8(text):
        return "UTF-8"
    beyond_ascii = sum(byte > 127 for byte in text)  # noqa: PLR2004
    chinese = len(_CHINESE.findall(text))
    if chinese >= _FEW and 2 * chinese > 0.8 * beyond_ascii:
        with suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder("gb18030")().decode(text)
            return "GB18030"
    return "windows-1252"


def _wide(head: bytes) -> str | None:
    """Return the encoding of a file of UTF-16; ``None`` for others."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    zeros_at_even, zeros_at_odd = head[0:2000:2].count(0), head[1:2000:2].count(0)
    # most letters are ASCII, and have one zero in UTF-16
    if max(zeros_at_even, zeros_at_odd) > len(head[:2000]) // 5:
        return "UTF-16LE" if zeros_at_odd > zeros_at_even else "UTF-16BE"
    return None


def _broken_beginning(mapping: TableMapping, head: bytes) -> str | None:
    """Return what is wrong with the beginning of a file: its encoding, or that of a header and the lines before it."""
    if _wide(head):
        return "is no UTF-8"
    if mapping.format == "csv" and mapping.has_header:
        lines = b"".join(islice(io.BytesIO(head), mapping.skip_lines + 1))
        if not is_utf8(lines):
            return "its header is no UTF-8"
    return None


def _broken_rows(mapping: TableMapping, head: bytes) -> str | None:
    """Return what is wrong with the rows of a file, if so many are broken that it must be of another encoding."""
    if is_utf8(head):
        return None
    text = head.decode("utf-8", errors="surrogateescape")
    rows = list(_mapped_texts(mapping, text))
    broken = sum(bool(_NOT_DECODED.search(row)) for row in rows)
    decoded = sum(not row.isascii() for row in rows) - broken
    if broken > max(decoded, _BROKEN_SHARE * len(rows)):
        return f"{broken:,} of its first {len(rows):,} rows are no UTF-8" if len(rows) > 1 else "its row is no UTF-8"
    return None


def is_utf8(head: bytes) -> bool:
    """Return whether bytes are UTF-8. The last letter may be incomplete."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _mapped_texts(mapping: TableMapping, text: str) -> Iterator[str]:
    """Yield for each row of a head the text of its mapped values, without lines that can't be taken apart."""
    if mapping.format == "json":
        for row in _objects(text):
            yield json.dumps([row.get(name) for name in mapping.top_level_names], ensure_ascii=False)
        return
    lines = islice(io.StringIO(text, newline=""), mapping.skip_lines, None)
    with suppress(ValueError, csv.Error):
        names = names_in_header(mapping, first := next(lines, "").removeprefix("\ufeff"))
        places = [place for place, name in enumerate(names) if name in mapping.platform_columns]
        for fields in records_of(mapping, lines if mapping.has_header else chain([first], lines)):
            if len(fields) == len(names):
                yield "".join(fields[place] for place in places)


def _objects(text: str) -> Iterator[dict[str, object]]:
    """Yield the objects of JSON lines, or of one array."""
    for part in [text] if text.lstrip("\ufeff \r\n").startswith("[") else text.split("\n"):
        with suppress(ValueError, RecursionError):
            value = json.loads(part.removeprefix("\ufeff"))
            yield from (row for row in (value if isinstance(value, list) else [value]) if isinstance(row, dict))


def first_line(address: str) -> str:
    """Return the first line that is not blank; its bytes aren't decoded, so the text is good for comparing only."""
    files, path = file_system(address)
    with files.open_input_stream(path) as stream:
        for line in io.TextIOWrapper(stream, "ISO-8859-1"):
            if line.count('"') % 2:
                raise ValueError("a name of a column may go on in the next line")
            if line.strip():
                return line.rstrip("\n")
    return ""


def parquet_footer(address: str) -> pq.ParquetFile:
    """Return a Parquet file with its footer. Its rows can't be read, because the file is closed."""
    files, path = file_system(address)
    with files.open_input_file(path) as file:
        return pq.ParquetFile(file)


def parquet_layout(address: str) -> str:
    """Return columns and types of a file, without the first line, which names an object of this process."""
    return str(parquet_footer(address).schema).partition("\n")[2]


def with_nanoseconds(df: DataFrame, address: str) -> DataFrame:
    """Turn the times that a Parquet file has in nanoseconds into times of Spark, which reads them as numbers.

    What is below a microsecond is cut off, towards the past.

    Args:
        df: rows of files with the same columns.
        address: one of these files.
    """
    with suppress(*UNREACHABLE):
        schema = parquet_footer(address).schema_arrow
        times = {
            field.name: time
            for field in df.schema.fields
            if schema.names.count(field.name) == 1
            and (time := _time(quoted_column(field.name), field.dataType, schema.field(field.name).type)) is not None
        }
        return df.withColumns(times) if times else df
    return df


def _time(column: Column, kind: T.DataType, arrow: pa.DataType) -> Column | None:
    """Return a column with its nanoseconds as times; ``None`` where it has none."""
    if isinstance(kind, T.LongType) and pa.types.is_timestamp(arrow):
        micros = F.call_function("div", F.try_subtract(column, F.pmod(column, F.lit(_THOUSAND))), F.lit(_THOUSAND))
        if arrow.tz:
            return F.timestamp_micros(micros)
        # a wall-clock time has no zone, whatever that of the session is
        seconds = micros.cast("decimal(24,0)") / F.lit(1_000_000)
        return F.lit("1970-01-01").cast("timestamp_ntz") + F.make_dt_interval(secs=seconds.cast("decimal(18,6)"))
    if isinstance(kind, T.StructType) and pa.types.is_struct(arrow):
        fields = {
            field.name: _time(column.getField(field.name), field.dataType, arrow.field(field.name).type)
            for field in kind.fields
        }
        if any(field is not None for field in fields.values()):
            values = ((column.getField(name) if field is None else field).alias(name) for name, field in fields.items())
            return F.when(column.isNotNull(), F.struct(*values))
    if isinstance(kind, T.ArrayType) and (pa.types.is_list(arrow) or pa.types.is_large_list(arrow)):
        element, of_arrow = kind.elementType, arrow.value_type
        if _time(F.lit(None), element, of_arrow) is not None:
            return F.transform(column, lambda each: cast(Column, _time(each, element, of_arrow)))
    return None
