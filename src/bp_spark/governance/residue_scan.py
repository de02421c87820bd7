"""Search of every file below some folders for users that were to be erased.

Files are read whether a table needs them or not. Parquet is decoded, because compression hides a value in the bytes; all
other files are searched as they are. Executors read, and only the names of files with residue come back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pyspark.sql import SparkSession

from bp_spark.core.session import parallelism
from bp_spark.core.stores import file_system

FILES_PER_TASK = 50
ID_COLUMNS = ("user_id", "user_key")
"""Columns whose whole values are compared, however short an id is."""
MIN_WORD = 6
"""Least characters of a user id that is searched inside longer texts. A shorter one, or a number, occurs there by chance."""
_WORD = re.compile(r"[\w@.+-]+")
_RUN = re.compile(r"\w+")


@dataclass(frozen=True)
class Residue:
    """Result of a search.

    Attributes:
        parquet_files: Number of files that were decoded.
        other_files: Number of files that were searched as they are.
        files_with_residue: Files that hold a key or an id.
    """

    parquet_files: int
    other_files: int
    files_with_residue: Sequence[str]


@dataclass(frozen=True)
class _Wanted:
    """Keys and ids to search for inside texts.

    Attributes:
        words: Those that consist of characters of _WORD.
        phrases: The others, by their first run of letters and digits, each with the position of that run.
    """

    words: frozenset[str]
    phrases: Mapping[str, Sequence[tuple[int, str]]]

    @classmethod
    def of(cls, texts: Collection[str]) -> _Wanted:
        """Sort texts, and their forms escaped as in JSON and in a URL, into words and phrases."""
        forms = {form for text in texts for form in (text, *_escaped(text))}
        words = frozenset(form for form in forms if _WORD.fullmatch(form))
        phrases: dict[str, list[tuple[int, str]]] = {}
        for form in sorted(forms - words):
            if run := _RUN.search(form):
                phrases.setdefault(run.group(), []).append((run.start(), form))
        return cls(words, phrases)

    def is_in(self, text: str) -> bool:
        """Return whether the text holds a word or a phrase."""
        if any(
            match.group() in self.words or match.group().strip(".+-@") in self.words for match in _WORD.finditer(text)
        ):
            return True
        return bool(self.phrases) and any(
            _stands_at(text, match.start() - offset, phrase)
            for match in _RUN.finditer(text)
            for offset, phrase in self.phrases.get(match.group(), ())
        )


def _stands_at(text: str, start: int, phrase: str) -> bool:
    end = start + len(phrase)
    # the run at its end has to be whole, as the one at its beginning is
    run_goes_on = _RUN.fullmatch(text[end - 1 : end + 1]) and end < len(text)
    return start >= 0 and text.startswith(phrase, start) and not run_goes_on


def _escaped(text: str) -> tuple[str, str, str]:
    return json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], quote(text, safe="")


def search(spark: SparkSession, folders: Sequence[str], keys: Collection[str], ids: Collection[str]) -> Residue:
    """Search every file of some folders for user keys and user ids.

    A key is found in any text. An id is found as the whole value of one of ID_COLUMNS. An id that has at least MIN_WORD
    characters and isn't a number is found in any text, too: as it is, or escaped as in JSON or in a URL. It doesn't count
    where letters or digits precede or follow it.

    Args:
        spark: The session whose executors read the files.
        folders: Paths or addresses (``s3``, ``gs``, ``hdfs``) in reach of driver and executors. A missing folder has no
            files.
        keys: User keys to search for.
        ids: User ids to search for.
    """
    files = [file for folder in folders for file in _files(folder)]
    if not files:
        return Residue(0, 0, [])
    wanted = _Wanted.of([*keys, *(user_id for user_id in ids if len(user_id) >= MIN_WORD and not user_id.isdigit())])
    id_values = frozenset(ids)

    def search_files(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            answers = [_search_file(path, wanted, id_values) for path in batch["path"]]
            yield pd.DataFrame(
                {
                    "path": batch["path"],
                    "parquet": [is_parquet for is_parquet, _ in answers],
                    "found": [is_found for _, is_found in answers],
                }
            )

    tasks = min(len(files), max(parallelism(spark), len(files) // FILES_PER_TASK))
    paths = spark.createDataFrame([(file,) for file in files], "path string").repartition(tasks)
    searched = paths.mapInPandas(search_files, "path string, parquet boolean, found boolean")
    counts = {row["parquet"]: row["count"] for row in searched.groupBy("parquet").count().collect()}
    files_with_residue = sorted(row["path"] for row in searched.filter("found").collect())
    return Residue(counts.get(True, 0), counts.get(False, 0), files_with_residue)


def _files(folder: str) -> list[str]:
    system, path = file_system(folder)
    if system.get_file_info(path).type == fs.FileType.NotFound:
        return []
    scheme = folder.partition("://")[0] + "://" if "://" in folder else ""
    entries = system.get_file_info(fs.FileSelector(path, recursive=True))
    return [scheme + entry.path for entry in entries if entry.type == fs.FileType.File]


def _search_file(address: str, wanted: _Wanted, id_values: Collection[str]) -> tuple[bool, bool]:
    """Return whether a file is Parquet, and whether it holds a key or an id."""
    system, path = file_system(address)
    with system.open_input_file(path) as file:
        is_parquet = file.read(4) == b"PAR1"
        file.seek(0)
        if not is_parquet:
            return False, wanted.is_in(file.read().decode("utf-8", "replace"))
        is_found = any(
            _has_value(name, texts, id_values) or wanted.is_in("\n".join(texts)) for name, texts in _texts(file)
        )
        return True, is_found


def _has_value(column: str, texts: Iterable[str], values: Collection[str]) -> bool:
    return column in ID_COLUMNS and any(text.strip() in values for text in texts)


def _texts(file: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield name and distinct texts of each column that can hold texts, a row group at a time."""
    parquet = pq.ParquetFile(file)
    names = [field.name for field in parquet.schema_arrow if _holds_text(field.type)]
    for group in range(parquet.num_row_groups if names else 0):
        for name in names:
            for chunk in parquet.read_row_group(group, columns=[name]).column(0).chunks:
                yield name, [text for leaf in _leaves(chunk) for text in leaf.unique().drop_null().to_pylist()]


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_holds_text(kind.field(number).type) for number in range(kind.num_fields))
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _leaves(array: pa.Array) -> Iterator[pa.Array]:
    """Yield the arrays of texts inside an array of any type."""
    if isinstance(array, pa.MapArray):
        yield from _leaves(array.keys)
        yield from _leaves(array.items)
    elif isinstance(array, pa.StructArray):
        for leaf in array.flatten():
            yield from _leaves(leaf)
    elif isinstance(array, pa.ListArray | pa.LargeListArray):
        yield from _leaves(array.flatten())
    elif _holds_text(array.type):
        yield array
