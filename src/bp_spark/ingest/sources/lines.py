"""Lines of CSV and JSON files -> rows; a line that is no row stays whole in the column CORRUPT.

Spark's own readers silently take what follows an open quote for a value, and drop what follows the first value of a JSON line.
So each record's text is checked here.
"""

from __future__ import annotations

import codecs
import csv
import io
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from bp_spark.core.stores import UNREACHABLE, file_system
from bp_spark.ingest.sources.mapping import TableMapping

CORRUPT = "_bp_spark_corrupt"
SPARE_FIELDS = 50
"""Columns that a CSV file is read with beyond its own: see :func:`csv_rows`."""


def quoted_column(name: str) -> Column:
    """Return a column whose name may hold dots and backquotes."""
    return F.col("`" + name.replace("`", "``") + "`")


def one_row(spark: SparkSession) -> DataFrame:
    """Return one row with an empty text ``nothing``, to try whether Spark knows a pattern or a name."""
    return spark.sql("SELECT '' AS nothing")


def characters_pattern(text: str) -> str:
    """Return a regular expression of Java that matches the text."""
    return "".join(rf"\x{{{ord(character):x}}}" for character in text)


def csv_rows(
    reader: Any, mapping: TableMapping, columns: Sequence[str], addresses: list[str], skipped: Collection[str] = ()
) -> DataFrame:
    """Return the rows of CSV files with the same columns.

    Spark gives the text of a record only where the number of fields differs from that of columns. By SPARE_FIELDS it always
    does.

    Args:
        reader: Spark's reader with the mapping's options.
        mapping: the table's mapping.
        columns: columns of the files.
        addresses: the files, as globs.
        skipped: records that are no rows: the lines before a header, and the header.
    """
    spare = [f"{CORRUPT}_{number}" for number in range(SPARE_FIELDS)]
    fields = [T.StructField(name, T.StringType()) for name in (*columns, *spare, CORRUPT)]
    record = F.col(CORRUPT)
    torn = F.when(record.isNull(), F.lit(f"<{len(columns) + SPARE_FIELDS} fields>")).when(
        ~_has_fields(record, mapping, len(columns)), record
    )
    df = reader.schema(T.StructType(fields)).load(addresses)
    if skipped:
        df = df.filter(~F.coalesce(record.isin(*skipped), F.lit(False)))
    return cast(DataFrame, df.select("_metadata", *(quoted_column(name) for name in columns), torn.alias(CORRUPT)))


def head(spark: SparkSession, mapping: TableMapping, address: str) -> list[str]:
    """Return the first lines of a CSV file: those that the mapping skips, and the one after them."""
    count = mapping.skip_lines + 1
    encoding = mapping.reader_options.get("encoding", mapping.reader_options.get("charset", "utf-8"))
    try:
        files, path = file_system(address)
        with files.open_input_stream(path) as stream:
            text = io.TextIOWrapper(stream, codecs.lookup(encoding).name, errors="replace")
            lines = [line.rstrip("\r\n") for line in islice(text, count)]
    except (*UNREACHABLE, LookupError):
        rows = spark.read.option("encoding", encoding).text(address).limit(count).collect()
        lines = [row["value"].rstrip("\r") for row in rows]
    return [line.removeprefix("\ufeff") for line in lines]


def names_in_header(mapping: TableMapping, line: str) -> list[str]:
    """Return the columns that the first line after skipped ones names; without a header ``_c0, _c1, ...``.

    Raises:
        ValueError: a name goes on in the next line.
    """
    if _quote_of(mapping) and line.count(_quote_of(mapping)) % 2:
        raise ValueError("the header after skip_lines goes on in the next line")
    fields = next(records_of(mapping, [line]), [])
    if not mapping.has_header:
        return [f"_c{place}" for place in range(len(fields))]
    lower = [field.lower() for field in fields]
    # as Spark names columns without a name, and those that share one
    return [
        f"{field}{place}" if lower.count(field.lower()) > 1 else field
        for place, field in enumerate(field or f"_c{place}" for place, field in enumerate(fields))
    ]


def records_of(mapping: TableMapping, lines: Iterable[str]) -> Iterator[list[str]]:
    """Yield the fields of each record of CSV lines, as Python takes them apart: good for a look at a file's head."""
    separator = _unescaped(mapping.separator)
    if quote := _quote_of(mapping):
        yield from csv.reader(lines, delimiter=separator, quotechar=quote)
    else:
        yield from (line.rstrip("\r\n").split(separator) for line in lines)


def _quote_of(mapping: TableMapping) -> str:
    """Return the quote of a CSV file; "" if it has none, or one that Python can't read."""
    quote = _unescaped(mapping.reader_options.get("quote", '"'))
    return "" if quote == "\0" or len(quote) > 1 or len(_unescaped(mapping.separator)) > 1 else quote


def _has_fields(record: Column, mapping: TableMapping, count: int) -> Column:
    """Return whether the text of a CSV record has ``count`` fields, with all quotes closed (RFC 4180)."""
    options = mapping.reader_options
    separator = _unescaped(mapping.separator)
    separator_bytes = F.octet_length(record) - F.octet_length(F.replace(record, F.lit(separator), F.lit("")))
    without_quotes = separator_bytes == (count - 1) * len(separator.encode())
    quote = _unescaped(options.get("quote", '"'))
    if quote in ("", "\0"):
        return without_quotes
    return F.when(
        record.contains(F.lit(quote)), record.rlike(_record_pattern(options, separator, quote, count))
    ).otherwise(without_quotes)


def _record_pattern(options: dict[str, str], separator: str, quote: str, count: int) -> str:
    """Return a regular expression of Java that matches a CSV record with quotes in it.

    Groups are possessive: they neither backtrack nor recurse, so that a value of megabytes is matched in one pass.
    """
    breaks = _unescaped(options.get("linesep", "\r\n"))
    q, s, b = (characters_pattern(text) for text in (quote, separator, breaks))
    escape = characters_pattern(_unescaped(options.get("escape", quote)) or quote)
    blanks = characters_pattern("".join(blank for blank in " \t\r" if blank not in separator))

    def quoted(excluded: str) -> str:
        escaped = f"{q}{q}" if escape == q else rf"{escape}[\s\S]"
        within = f"[^{q}{'' if escape == q else escape}{excluded}]*+"
        return f"{q}{within}(?:{escaped}{within})*+{q}"

    until = f"[^{s}{b}]*+" if len(separator) == 1 else f"(?:(?!{s})[^{b}])*+"
    before = f"[{blanks}]*+" if options.get("ignoreleadingwhitespace", "").lower() == "true" else ""
    # a quote within a value on one line, as in "15" screen", is part of it
    field = f"(?>{before}{quoted('')}[{blanks}]*+(?={s}|\\z)|{before}{quoted(b)}{until}|(?!{before}{q}){until})"
    return rf"\A{field}(?:{s}{field}){{{count - 1}}}+[\r\n]*\z"


def _unescaped(text: str) -> str:
    r"""Return a separator or quote as Spark takes it: ``\t`` may be written with two characters."""
    names = {"t": "\t", "r": "\r", "n": "\n", "b": "\b", "f": "\f", '"': '"', "'": "'", "\\": "\\", "u0000": "\0"}
    return names.get(text[1:], text) if len(text) > 1 and text[0] == "\\" else text


def json_rows(spark: SparkSession, mapping: TableMapping, addresses: list[str]) -> DataFrame:
    """Return the rows of JSON files: one for an object, one for each object of an array.

    A line that is neither an object nor an array of objects stays as CORRUPT.
    """
    options = mapping.reader_options
    encoding = options.pop("encoding", None)
    of_text = {name: options.pop(name) for name in ("linesep",) if name in options}
    whole_file = options.get("multiline", "false")
    if encoding is not None:
        # an unknown encoding would end the job only when rows are asked for
        one_row(spark).select(F.encode("nothing", encoding)).collect()
    reader = spark.read.format("text").options(wholetext=whole_file, ignoreCorruptFiles=False, **of_text)
    lines = reader.load(addresses)
    if encoding is not None:
        # the reader of texts takes the bytes as they are, whatever encoding it is given
        lines = lines.withColumn("value", F.decode(F.col("value").cast("binary"), encoding))
    row = T.StructType([T.StructField(key, T.StringType()) for key in mapping.top_level_names])
    text = F.regexp_replace("value", "^\ufeff", "")
    # in an object of our own that ends with a mark: whatever closes it early, or follows a value, takes the mark away
    mark = uuid.uuid4().hex
    is_array = text.rlike(r"^\s*\[")
    rows = F.when(is_array, text).otherwise(F.concat(F.lit("["), text, F.lit("]")))
    wrapped = F.concat(F.lit(f'{{"{mark}":'), rows, F.lit(f',"end":"{mark}"}}'))
    wrapper = T.StructType().add(mark, T.ArrayType(row)).add("end", T.StringType())
    parsed = (
        lines.filter(~text.rlike(r"^\s*\z"))
        .select("_metadata", text.alias("line"), F.from_json(wrapped, wrapper, options or None).alias("parsed"))
        .select(
            "_metadata", "line", F.col(f"parsed.{mark}").alias("rows"), (F.col("parsed.end") == mark).alias("ended")
        )
    )
    all_rows = F.col("rows").isNotNull() & ~F.exists("rows", lambda each: each.isNull())
    is_readable = F.coalesce(F.col("ended") & all_rows, F.lit(False))
    no_row = F.array(F.lit(None).cast(row))
    return parsed.select(
        "_metadata",
        F.explode(F.when(is_readable, F.col("rows")).otherwise(no_row)).alias("row"),
        F.when(~is_readable, F.col("line")).alias(CORRUPT),
    ).select("_metadata", "row.*", CORRUPT)
