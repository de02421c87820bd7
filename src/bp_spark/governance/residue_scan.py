"""Folders of tables and checkpoints -> the files in them that still hold a user.

Every file is read, whether a table needs it or not: Parquet is decoded (compressed, a value can't be found in its bytes), all
others are searched as they are. Executors read; nothing but the names of what they found comes back.
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
"""Columns whose whole values are looked at, however short an id is."""
MIN_WORD = 6
"""Characters of a user id that is looked for inside longer texts too; a shorter one, or a number, is there by chance."""
_WORD = re.compile(r"[\w@.+-]+")
_RUN = re.compile(r"\w+")


@dataclass(frozen=True)
class Traces:
    """What a search came to.

    Attributes:
        parquet_files: that were decoded.
        other_files: that were searched as they are.
        found: files that hold a key or an id.
    """

    parquet_files: int
    other_files: int
    found: Sequence[str]


@dataclass(frozen=True)
class _Wanted:
    """What is looked for inside texts.

    Attributes:
        words: that are runs of characters of _WORD.
        phrases: that are not: by their first run of letters and digits, each with the place where that begins.
    """

    words: frozenset[str]
    phrases: Mapping[str, Sequence[tuple[int, str]]]

    @classmethod
    def of(cls, texts: Collection[str]) -> _Wanted:
        forms = {form for text in texts for form in (text, *_escaped(text))}
        words = frozenset(form for form in forms if _WORD.fullmatch(form))
        phrases: dict[str, list[tuple[int, str]]] = {}
        for form in sorted(forms - words):
            if run := _RUN.search(form):
                phrases.setdefault(run.group(), []).append((run.start(), form))
        return cls(words, phrases)

    def is_in(self, text: str) -> bool:
        """Whether the text holds a word or a phrase."""
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
    # the run that it ends with, as the one that it begins with, has to be whole
    goes_on = _RUN.fullmatch(text[end - 1 : end + 1]) and end < len(text)
    return start >= 0 and text.startswith(phrase, start) and not goes_on


def _escaped(text: str) -> tuple[str, str, str]:
    return json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], quote(text, safe="")


def search(spark: SparkSession, folders: Sequence[str], keys: Collection[str], ids: Collection[str]) -> Traces:
    """Look into every file of some folders for user keys, and for user ids.

    A key is found wherever it stands. An id is found where it is the whole value of one of ID_COLUMNS. If it isn't a number and
    has at least MIN_WORD characters, it is found in any text, too, as it is or escaped as in JSON or in a URL, unless letters
    or digits go on before or behind it.

    Args:
        folders: paths or addresses (``s3``, ``gs``, ``hdfs``) that driver and executors see; one that isn't there has no files.
    """
    files = [file for folder in folders for file in _files(folder)]
    if not files:
        return Traces(0, 0, [])
    wanted = _Wanted.of([*keys, *(one for one in ids if len(one) >= MIN_WORD and not one.isdigit())])
    values = frozenset(ids)

    def look(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            said = [_look_into(path, wanted, values) for path in batch["path"]]
            yield pd.DataFrame(
                {"path": batch["path"], "parquet": [one for one, _ in said], "found": [other for _, other in said]}
            )

    tasks = min(len(files), max(parallelism(spark), len(files) // FILES_PER_TASK))
    paths = spark.createDataFrame([(file,) for file in files], "path string").repartition(tasks)
    answers = paths.mapInPandas(look, "path string, parquet boolean, found boolean")
    counts = {row["parquet"]: row["count"] for row in answers.groupBy("parquet").count().collect()}
    found = sorted(row["path"] for row in answers.filter("found").collect())
    return Traces(counts.get(True, 0), counts.get(False, 0), found)


def _files(folder: str) -> list[str]:
    system, path = file_system(folder)
    if system.get_file_info(path).type == fs.FileType.NotFound:
        return []
    scheme = folder.partition("://")[0] + "://" if "://" in folder else ""
    listed = system.get_file_info(fs.FileSelector(path, recursive=True))
    return [scheme + info.path for info in listed if info.type == fs.FileType.File]


def _look_into(address: str, wanted: _Wanted, values: Collection[str]) -> tuple[bool, bool]:
    """Whether a file is Parquet, and whether it holds one of the words or values."""
    system, path = file_system(address)
    with system.open_input_file(path) as file:
        parquet = file.read(4) == b"PAR1"
        file.seek(0)
        if not parquet:
            return False, wanted.is_in(file.read().decode("utf-8", "replace"))
        found = any(_has_value(name, texts, values) or wanted.is_in("\n".join(texts)) for name, texts in _texts(file))
        return True, found


def _has_value(column: str, texts: Iterable[str], values: Collection[str]) -> bool:
    return column in ID_COLUMNS and any(text.strip() in values for text in texts)


def _texts(file: Any) -> Iterator[tuple[str, list[str]]]:
    """Name and distinct texts of each column with any, a row group at a time."""
    parquet = pq.ParquetFile(file)
    names = [field.name for field in parquet.schema_arrow if _holds_text(field.type)]
    for group in range(parquet.num_row_groups if names else 0):
        for name in names:
            for chunk in parquet.read_row_group(group, columns=[name]).column(0).chunks:
                yield name, [text for leaf in _leaves(chunk) for text in leaf.unique().drop_null().to_pylist()]


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_holds_text(kind.field(number).type) for number in range(kind.num_fields))
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _leaves(array: pa.Array) -> Iterator[pa.Array]:
    """The arrays of texts inside an array of any type."""
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
