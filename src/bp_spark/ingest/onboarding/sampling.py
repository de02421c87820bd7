"""A sample of a mapping's files as files of their own, so that the code of the ingest reads them as it reads all.

Of CSV and JSON the first records of each file are copied as they are, of Parquet its first rows.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bp_spark.core.errors import DataError
from bp_spark.core.stores import UNREACHABLE, file_system
from bp_spark.ingest.onboarding.listing import FoundFile, is_absolute
from bp_spark.ingest.onboarding.preflight import Preflight, folder_of, shown
from bp_spark.ingest.sources.files import FilesSource
from bp_spark.ingest.sources.mapping import TableMapping

_MOST_FILES = 100
_SPARE_LINES = 1_000
"""Lines beyond the sample until a quoted value ends."""
_WHOLE = 32 << 20
"""Bytes of a file with one JSON array that is copied whole."""


@dataclass
class SampleFiles:
    """A source over copies.

    Attributes:
        source: the source; a Delta table is read where it lies.
        names: name of a copy -> name of its file.
        shares: raw table -> share of its bytes that the copies hold; not of a Delta table.
        files: raw table -> files that were copied, and all files.
    """

    source: FilesSource
    names: dict[str, str] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    files: dict[str, tuple[int, int]] = field(default_factory=dict)


def copy_sample(mapping: str, found: Preflight, rows: int, target: Path) -> SampleFiles:
    """Copy the first rows of files, spread over all of them.

    Args:
        mapping: path of the mapping file.
        found: its files.
        rows: rows to copy of each path.
        target: folder to copy to.
    """
    source, folder = FilesSource(mapping), folder_of(mapping)
    sample = SampleFiles(copy.copy(source))
    sample.source.folder = f"file:{target.resolve().as_posix()}/"
    sample.source.tables = {}
    copied: dict[str, tuple[str, float, int]] = {}
    for table, rules in source.tables.items():
        if table not in found.files:
            path = rules.path if is_absolute(rules.path) else folder + rules.path
            sample.source.tables[table] = rules.model_copy(update={"path": path})
            continue
        key = json.dumps([rules.path, rules.format, rules.reader_options, rules.skip_lines])
        if key not in copied:
            readable = [
                file for file in found.files[table] if file.size and shown(file, folder) not in found.unreadable
            ]
            name = str(len(copied))
            chosen = _spread(readable)
            (target / name).mkdir()
            for file in chosen:
                sample.names[f"{name}/{file.below}"] = shown(file, folder)
            share = _copy(chosen, rules, rows, target / name) / max(1, sum(file.size for file in readable))
            copied[key] = name, share, len(chosen)
        name, share, count = copied[key]
        sample.source.tables[table] = rules.model_copy(update={"path": name})
        sample.shares[table] = min(1.0, share)
        sample.files[table] = count, len(found.files[table])
    return sample


def _spread(files: Sequence[FoundFile]) -> list[FoundFile]:
    """Return at most _MOST_FILES files, evenly spread."""
    if len(files) <= _MOST_FILES:
        return list(files)
    return [files[at * len(files) // _MOST_FILES] for at in range(_MOST_FILES)]


def _copy(files: Sequence[FoundFile], rules: TableMapping, rows: int, target: Path) -> float:
    """Copy the first rows of files; return the bytes of the files that they stand for."""
    size, left = 0.0, rows
    # small files first, so that larger ones get what they leave
    for place, file in enumerate(sorted(files, key=lambda file: file.size)):
        quota = max(1, math.ceil(left / (len(files) - place)))
        path = target / file.below
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if rules.format == "parquet":
                count, share = _copy_parquet(file, path, quota)
            elif rules.format == "json" and rules.reader_options.get("multiline", "false").lower() == "true":
                count, share = _copy_array(file, path, quota, rules.encoding)
            else:
                count, share = _copy_lines(file, path, quota, rules)
        except UNREACHABLE as error:
            raise DataError(file.address, f"can't be read ({type(error).__name__})") from None
        left, size = left - count, size + file.size * share
    return size


def _copy_lines(file: FoundFile, path: Path, quota: int, rules: TableMapping) -> tuple[int, float]:
    """Copy lines as they are; return how many, and their share of the file."""
    wide = "UTF-16" in rules.encoding.upper()
    quote = rules.reader_options.get("quote", '"')
    quote_bytes = quote.encode() if rules.format == "csv" and len(quote) == 1 and quote != "\0" else b""
    count, is_open, written, read_to_end = 0, False, 0, True
    header = rules.skip_lines + rules.has_header if rules.format == "csv" else 0
    system, address = file_system(file.address)
    with system.open_input_stream(address) as stream, pa.output_stream(str(path), compression="detect") as out:
        for line in _lines(stream, wide=wide):
            if count >= quota + header and (not is_open or count > quota + header + _SPARE_LINES):
                read_to_end = False
                break
            out.write(line)
            written += len(line)
            count += 1
            # a line break within quotes ends no record
            is_open ^= bool(quote_bytes) and line.count(quote_bytes) % 2 == 1
    share = 1.0 if read_to_end else min(1.0, path.stat().st_size / file.size)
    return max(0, count - header), share


def _lines(stream: Any, *, wide: bool) -> Iterator[bytes]:
    """Yield the lines of a stream with their ends; ``wide`` for characters of two bytes."""
    rest = b""
    is_big = False
    while block := stream.read(1 << 20):
        is_big = is_big or (not rest and block.startswith(b"\xfe\xff"))
        end = (b"\0\n" if is_big else b"\n\0") if wide else b"\n"
        rest += block
        start, search = 0, 0
        while (at := rest.find(end, search)) >= 0:
            search = at + len(end)
            if wide and at % 2:
                search = at + 1
                continue
            yield rest[start:search]
            start = search
        rest = rest[start:]
    if rest:
        yield rest


def _copy_array(file: FoundFile, path: Path, quota: int, encoding: str) -> tuple[int, float]:
    """Copy the first objects of a file with one JSON array, or one object; a small file whole."""
    system, address = file_system(file.address)
    with system.open_input_stream(address) as stream:
        content = bytes(stream.read(_WHOLE))
        is_whole = not stream.read(1)
    if not is_whole:
        elements = _texts(content.decode(encoding, errors="replace"), quota)
        used = f"[{','.join(elements)}]".encode(encoding)
    with pa.output_stream(str(path), compression="detect") as out:
        out.write(content if is_whole else used)
    return (quota, 1.0) if is_whole else (len(elements), min(1.0, path.stat().st_size / file.size))


def _texts(text: str, quota: int) -> list[str]:
    """Return the first elements of a JSON array, as they are written."""
    decoder = json.JSONDecoder()
    texts: list[str] = []
    at = text.find("[") + 1
    while len(texts) < quota:
        at += len(text[at : at + 10_000]) - len(text[at : at + 10_000].lstrip(", \t\r\n"))
        try:
            _, end = decoder.raw_decode(text, at)
        except ValueError:
            break
        texts.append(text[at:end])
        at = end
    return texts


def _copy_parquet(file: FoundFile, path: Path, quota: int) -> tuple[int, float]:
    """Copy the first rows; a file that has no more than these, or times of two kinds, whole."""
    system, address = file_system(file.address)
    with system.open_input_file(address) as opened:
        parquet = pq.ParquetFile(opened)
        rows = parquet.metadata.num_rows
        kinds = {parquet.schema.column(place).physical_type for place in range(len(parquet.schema))}
        times = [one for one in parquet.schema_arrow.types if pa.types.is_timestamp(one)]
        # written again, all times get one physical type
        if rows > quota and ("INT96" not in kinds or len(times) == 1):
            int96 = "INT96" in kinds
            with pq.ParquetWriter(
                path, parquet.schema_arrow, store_schema=False, use_deprecated_int96_timestamps=int96
            ) as out:
                for batch in parquet.iter_batches(batch_size=quota):
                    out.write_batch(batch.slice(0, quota))
                    return batch.num_rows, batch.num_rows / rows
    with system.open_input_stream(address, compression=None) as stream, path.open("wb") as copy_of_file:
        while block := stream.read(1 << 20):
            copy_of_file.write(block)
    return rows, 1.0


def renamed(names: Mapping[str, str], error: DataError) -> DataError:
    """Return the error about a copy as one about its file."""
    name = next((original for copied, original in names.items() if error.table.endswith(copied)), error.table)
    return DataError(name, error.rule, column=error.column)
