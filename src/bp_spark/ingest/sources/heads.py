"""What the head or footer of a file says before its rows are read: columns, encoding, times in nanoseconds."""

from __future__ import annotations

import codecs
import io
from contextlib import suppress
from itertools import islice
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from bp_spark.core.errors import DataError
from bp_spark.core.stores import UNREACHABLE, file_system
from bp_spark.ingest.sources.lines import quoted_column
from bp_spark.ingest.sources.mapping import TableMapping

HOW_TO_ENCODE = "name the encoding in the mapping, as in options: {encoding: windows-1252}"
_WIDE = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
"""Bytes that a file begins with -> its encoding."""
_THOUSAND = 1_000


def require_utf8(mapping: TableMapping, name: str, address: str) -> None:
    """Require that a text file without an ``encoding`` begins as UTF-8: CSV with its header, JSON with its first byte.

    Args:
        mapping: the table's mapping.
        name: the file, as errors name it.
        address: address of the file.

    Raises:
        DataError: the beginning is UTF-16, or bytes of another encoding; the message says what to set.
    """
    if mapping.format not in ("csv", "json") or {"encoding", "charset"} & set(mapping.reader_options):
        return
    with suppress(*UNREACHABLE):
        files, path = file_system(address)
        with files.open_input_stream(path) as stream:
            is_csv = mapping.format == "csv"
            head = b"".join(islice(io.BufferedReader(stream), mapping.skip_lines + 1)) if is_csv else stream.read(4)
        problem = _problem(head, is_header=is_csv and mapping.has_header)
        if problem and mapping.format == "json" and "UTF-16" in problem:
            problem = f"{problem} and multiLine: true"
        if problem:
            raise DataError(name, problem)


def _problem(head: bytes, *, is_header: bool) -> str | None:
    """Return what is wrong with the first lines of a file that should be UTF-8."""
    marked = next((encoding for mark, encoding in _WIDE.items() if head.startswith(mark)), None)
    # most characters of a header are ASCII, and have one zero in UTF-16
    if marked or head[:2].count(0) == 1:
        encoding = marked or ("UTF-16LE" if head[1] == 0 else "UTF-16BE")
        return f"is no UTF-8 but {encoding}: set options: {{encoding: {encoding}}}"
    if is_header:
        try:
            head.decode("utf-8")
        except UnicodeDecodeError:
            return f"its header is no UTF-8: {HOW_TO_ENCODE}"
    return None


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


def parquet_schema(address: str) -> str:
    """Return columns and types of a file, without the first line, which names an object of this process."""
    files, path = file_system(address)
    with files.open_input_file(path) as file:
        return str(pq.ParquetFile(file).schema).partition("\n")[2]


def with_nanoseconds(df: DataFrame, address: str) -> DataFrame:
    """Turn the times that a Parquet file has in nanoseconds into times of Spark, which reads them as numbers.

    What is below a microsecond is cut off, towards the past.

    Args:
        df: rows of files with the same columns.
        address: one of these files.
    """
    with suppress(*UNREACHABLE):
        files, path = file_system(address)
        with files.open_input_file(path) as file:
            schema = pq.ParquetFile(file).schema_arrow
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
