"""A sample of files of unknown form: their format, encoding, separator, header, columns and some rows, without Spark.

In: addresses of files. Out: a :class:`Sample`, on which :mod:`bp_spark.ingest.onboarding.guess` bases its guesses.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bp_spark.core.errors import DataError
from bp_spark.core.stores import UNREACHABLE, file_system
from bp_spark.ingest.onboarding.listing import FoundFile
from bp_spark.ingest.sources.heads import likely_encoding

MOST_FILES = 10
"""Files that are looked into, spread over all of them."""
MOST_ROWS = 20_000
_HEAD = 1 << 19
_CHUNK = 1 << 15
_CHUNKS = 24
"""Parts of a file that are read after its head: its last days tell what its first ones leave open."""
_SEPARATORS = (",", ";", "\t", "|")
_TITLE_LINES = 20
_FORMATS = {"csv": "csv tsv txt psv tab dat", "json": "json jsonl ndjson", "parquet": "parquet pq"}
_LINE_ITEMS = re.compile(r"(line_?items|items|lines|products|positions|articles|details|order_?lines)$", re.IGNORECASE)
_NULLS = ("NULL", "\\N")
"""Texts by which databases write NULL."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """What a look at some files tells.

    Attributes:
        format: format of the mapping language.
        columns: names of the columns, those of fields as ``customer.id``.
        rows: values by column, ``None`` where missing or blank; texts, but for Parquet and Delta.
        options: options of the reader that the files need.
        skip_lines: lines before the header.
        explode: column with an array of order lines.
        doubts: what a person should look at.
    """

    format: str
    columns: Sequence[str]
    rows: Sequence[Row]
    options: Mapping[str, str | bool] = field(default_factory=dict)
    skip_lines: int = 0
    explode: str | None = None
    doubts: Sequence[str] = ()

    def values(self, column: str) -> list[Any]:
        """Return the values of a column that are there."""
        return [row[column] for row in self.rows if row.get(column) is not None]


def sample_of(files: Sequence[FoundFile], name: str) -> Sample:
    """Look at some files of one table.

    Args:
        files: all files.
        name: what messages call them.

    Raises:
        DataError: there are none, or the first can't be read.
    """
    filled = [file for file in files if file.size > 0]
    if not filled:
        raise DataError(
            name, "no file matches, or all are empty; a pattern needs quotes, as in --orders 'exports/*.csv'"
        )
    step = max(1, len(filled) // MOST_FILES)
    chosen = filled[::step][:MOST_FILES]
    kind = _format(chosen[0])
    sample = {"csv": _csv_sample, "json": _json_sample, "parquet": _parquet_sample}[kind](chosen)
    if not sample.rows:
        raise DataError(chosen[0].address, "has no rows to guess from")
    return sample


def delta_sample(address: str) -> Sample:
    """Look at the newest version of a Delta table.

    Raises:
        DataError: it can't be read.
    """
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, DeltaProtocolError

    try:
        table = DeltaTable(re.sub("^file:/+", "/", address))
        try:
            return _typed_sample([table.to_pyarrow_dataset().head(MOST_ROWS)], "delta")
        except DeltaProtocolError:
            # its deletion vectors are unknown to delta-rs: for guesses, rows that were deleted are as good
            files = [FoundFile(uri, uri, 1) for uri in sorted(table.file_uris())[:MOST_FILES]]
            return replace(_parquet_sample(files), format="delta")
    except (DeltaError, *UNREACHABLE) as error:
        raise DataError(address, "can't be read as a Delta table") from error


def _format(file: FoundFile) -> str:
    name = re.sub(r"\.(gz|bz2|zst|lz4)$", "", file.address.lower())
    for kind, endings in _FORMATS.items():
        if name.rpartition(".")[2] in endings.split():
            return kind
    head = _head(file)
    return "parquet" if head[:4] == b"PAR1" else "json" if head.lstrip()[:1] in (b"{", b"[") else "csv"


def _head(file: FoundFile, size: int = _HEAD) -> bytes:
    """Return the first bytes of a file, unpacked."""
    try:
        files, path = file_system(file.address)
        with files.open_input_stream(path) as stream:
            return bytes(stream.read(size))
    except UNREACHABLE as error:
        raise DataError(file.address, "can't be read") from error


# --- CSV -----------------------------------------------------------------------------------------------------------------


def _csv_sample(files: Sequence[FoundFile]) -> Sample:
    head = _head(files[0])
    parts = [(file, parts_of(file)) for file in files]
    encoding = likely_encoding([part for _, bytes_ in parts for part in bytes_])
    doubts = _doubts_about(encoding)
    charset = _python_name(encoding)
    first = _text(head, charset, whole=len(head) < _HEAD)
    separator, quote = _dialect(first)
    lines = list(_records(first, separator, quote))
    width = Counter(len(line) for line in lines).most_common(1)[0][0] if lines else 1
    skipped = next((at for at, line in enumerate(lines[:_TITLE_LINES]) if len(line) == width), 0)
    header = lines[skipped] if lines else []
    has_header = is_header(header, lines[skipped + 1 : skipped + 50])
    columns = _unique(header) if has_header else [f"_c{place}" for place in range(width)]
    options: dict[str, str | bool] = {}
    options |= {"sep": separator} if separator != "," else {}
    options |= {"quote": quote} if quote != '"' else {}
    options |= {"encoding": encoding} if encoding != "UTF-8" else {}
    options |= {} if has_header else {"header": False}
    if not has_header:
        doubts.append("the first line looks like a row: the columns are called _c0, _c1, ... by their place")
    rows: list[Row] = []
    for file, chunks in parts:
        most = MOST_ROWS // (len(parts) * len(chunks))
        for at, chunk in enumerate(chunks):
            until = len(rows) + most
            for record in _records(_text(chunk, charset, whole=False, begins=at == 0), separator, quote):
                is_title = has_header and record == header
                if len(record) == width and not is_title and len(rows) < until:
                    rows.append({name: _filled(value) for name, value in zip(columns, record, strict=True)})
        other = next(_records(_text(chunks[0], charset, whole=False), separator, quote), header) if chunks else header
        if has_header and not skipped and other != header and file is not files[0]:
            doubts.append(
                "some files have other columns than the first one; each needs the columns that are named here"
            )
            break
    for text in _NULLS:
        if any(text in row.values() for row in rows):
            options["nullValue"] = text
            rows = [{name: None if value == text else value for name, value in row.items()} for row in rows]
            break
    lines_before = _lines_before(first, header, separator, quote) if skipped else 0
    return Sample("csv", columns, rows, options, lines_before, doubts=tuple(doubts))


def _lines_before(text: str, header: Sequence[str], separator: str, quote: str) -> int:
    """Return how many lines, blank ones as well, stand before the header."""
    records = (list(_records(line, separator, quote)) for line in text.splitlines())
    return next((at for at, record in enumerate(records) if record == [header]), 0)


def parts_of(file: FoundFile) -> list[bytes]:
    """Return the head of a file and parts of the rest; of a packed one the head alone."""
    head = _head(file)
    files, path = file_system(file.address)
    if file.size <= len(head) or path.lower().endswith((".gz", ".bz2", ".zst", ".lz4")):
        return [head]
    parts = [head]
    with files.open_input_file(path) as stream:
        step = max(_CHUNK, (file.size - len(head)) // _CHUNKS)
        for start in (*range(len(head), file.size, step), max(len(head), file.size - _CHUNK)):
            stream.seek(start - start % 4)
            parts.append(bytes(stream.read(_CHUNK)))
    return parts


def first_lines(file: FoundFile, encoding: str, count: int) -> list[str]:
    """Return the first lines of a text file, without blank ones before a header that stands first.

    Raises:
        LookupError: Python doesn't know the encoding.
    """
    lines = _head(file).decode(encoding, errors="replace").removeprefix("\ufeff").splitlines()
    if count == 1:
        lines = [line for line in lines if line.strip()]
    return lines[:count]


def _doubts_about(encoding: str) -> list[str]:
    if encoding in ("windows-1252", "GB18030"):
        return [
            f"the files are not UTF-8, so taken for {encoding}; look whether names with letters beyond ASCII are right"
        ]
    return []


def _python_name(encoding: str) -> str:
    return "utf-8-sig" if encoding == "UTF-8" else encoding


def _text(part: bytes, charset: str, *, whole: bool, begins: bool = True) -> str:
    """Return the whole lines of a part of a file."""
    if not begins and charset == "UTF-16":
        charset = "UTF-16LE"
    text = part.decode(charset, errors="replace")
    if not begins:
        text = text[text.find("\n") + 1 :]
    return text if whole else text[: text.rfind("\n") + 1] or text


def _dialect(text: str) -> tuple[str, str]:
    """Return separator and quote: those by which most records have the same number of fields."""
    quote = "'" if text.count('"') == 0 and len(re.findall(r"(?:^|[,;\t|])'[^'\n]*'(?=[,;\t|\r\n])", text)) > 1 else '"'

    def fit(separator: str) -> tuple[float, int]:
        widths = Counter(len(record) for record in _records(text[:100_000], separator, quote))
        width, count = widths.most_common(1)[0] if widths else (1, 0)
        return (count / max(1, widths.total()) if width > 1 else 0.0), width

    return max(_SEPARATORS, key=fit), quote


def _records(text: str, separator: str, quote: str) -> Iterator[list[str]]:
    """Yield the records of a text; one that can't be taken apart ends them."""
    try:
        for record in csv.reader(io.StringIO(text, newline=""), delimiter=separator, quotechar=quote):
            if any(value.strip() for value in record):
                yield record
    except csv.Error:
        return


def is_header(first: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Return whether a first line names columns: no value in it is blank, a number or a time, as those below it are."""
    names = [name.strip() for name in first]
    if any(re.fullmatch(r"[-+(]?[\d.,:/ -]*\d[\d.,:/ T-]*\)?", name) for name in names):
        return False
    filled = [name for name in names if name]
    # a column without a name is an index that a program wrote
    return len(set(filled)) == len(filled) >= len(names) - 1 or not rows


def _unique(header: Sequence[str]) -> list[str]:
    """Return the names of columns as Spark gives them."""
    lower = [name.lower() for name in header]
    return [
        f"{name}{place}" if name and lower.count(name.lower()) > 1 else name or f"_c{place}"
        for place, name in enumerate(header)
    ]


def _filled(value: str) -> str | None:
    return value.strip(" \t\u00a0") or None


# --- JSON, Parquet -------------------------------------------------------------------------------------------------------


def _json_sample(files: Sequence[FoundFile]) -> Sample:
    objects: list[Any] = []
    is_array = False
    for file in files:
        head = _head(file, 16 * _HEAD).decode("utf-8-sig", errors="replace")
        if head.lstrip().startswith("["):
            is_array = True
            objects += _elements(head)
        else:
            objects += [parsed for line in head.splitlines() if isinstance(parsed := _parsed(line), dict)]
    objects = [one for one in objects if isinstance(one, dict)][:MOST_ROWS]
    keys = list(dict.fromkeys(key for one in objects for key in one))
    explode = next((key for key in keys if _LINE_ITEMS.search(key) and _is_array(objects, key)), None)
    rows: list[Row] = []
    for one in objects:
        elements = one.get(explode) if explode else None
        for element in elements if isinstance(elements, list) else [{}]:
            rows.append(dict(_flat({**one, **({explode: element} if explode else {})})))
    options: dict[str, str | bool] = {"multiLine": True} if is_array else {}
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Sample("json", columns, rows[:MOST_ROWS], options, explode=explode)


def _elements(text: str) -> list[Any]:
    """Return the elements of a JSON array whose end may be cut off."""
    decoder = json.JSONDecoder()
    found: list[Any] = []
    at = text.index("[") + 1
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(", \t\r\n"))
        try:
            element, at = decoder.raw_decode(text, at)
        except ValueError:
            return found
        found.append(element)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _is_array(objects: Sequence[Mapping[str, Any]], key: str) -> bool:
    values = [one[key] for one in objects if one.get(key)]
    return bool(values) and all(isinstance(value, list) and isinstance(value[0], dict) for value in values)


def _flat(one: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values within an object by their names, as ``customer.id``."""
    for key, value in one.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            yield f"{prefix}{key}", _filled(value) if isinstance(value, str) else _plain(value)


def _plain(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else None if value is None else str(value)


def _parquet_sample(files: Sequence[FoundFile]) -> Sample:
    tables = []
    for file in files:
        try:
            system, path = file_system(file.address)
            parquet = pq.ParquetFile(system.open_input_file(path))
            batch = next(parquet.iter_batches(batch_size=MOST_ROWS // len(files)), None)
        except UNREACHABLE as error:
            raise DataError(file.address, "can't be read as Parquet") from error
        if batch is not None:
            tables.append(pa.Table.from_batches([batch]))
    return _typed_sample(tables, "parquet")


def _typed_sample(tables: Sequence[pa.Table], format_: str) -> Sample:
    objects = [row for table in tables for row in table.to_pylist()]
    keys = list(dict.fromkeys(key for one in objects for key in one))
    explode = next((key for key in keys if _LINE_ITEMS.search(key) and _is_array(objects, key)), None)
    rows: list[Row] = []
    for one in objects:
        elements = one.get(explode) if explode else None
        for element in elements or [{}]:
            flat = _flat_typed({**one, **({explode: element} if explode else {})})
            rows.append(dict(flat))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Sample(format_, columns, rows[:MOST_ROWS], explode=explode)


def _flat_typed(one: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in one.items():
        if isinstance(value, dict):
            yield from _flat_typed(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            yield f"{prefix}{key}", _filled(value) if isinstance(value, str) else value
