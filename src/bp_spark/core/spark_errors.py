"""What Spark and Delta raise -> the project's errors: which table or file, which rule, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException

from bp_spark.core.errors import BpSparkError, ConflictError, DataError, FileReadError, OccupiedError, PlatformError

SPARK_ERRORS = (PySparkException, Py4JJavaError)
"""What Spark and Delta raise: Spark Connect the first alone, a classic session the second too."""
_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large")
_CONFLICT = re.compile(
    r"DELTA_CONCURRENT_|DELTA_METADATA_CHANGED|DELTA_PROTOCOL_CHANGED|TABLE_OR_VIEW_ALREADY_EXISTS|"
    r"Concurrent(Write|Append|Transaction|DeleteRead|DeleteDelete)Exception"
)
_OCCUPIED = "DELTA_CREATE_TABLE_WITH_NON_EMPTY_LOCATION"
_UNREADABLE = re.compile(r"FAILED_READ_FILE\S* Encountered error while reading file (\S+?)\.?\s")
_TOO_LONG = re.compile(r"TextParsingException.*exceeds the maximum number of characters")
_BY_WORKER = re.compile(r"FileReadError: (\S+): ([^\n]*)")
_LOG = re.compile(r"DELTA_(?:TRUNCATED_TRANSACTION_LOG|LOG_FILE_NOT_FOUND)\S* (\S+): ")
_GAP = re.compile(r"DELTA_VERSIONS_NOT_CONTIGUOUS\S* ([^\n]*)")
_GONE = re.compile(r"FILE_NOT_EXIST|FileNotFoundException|DELTA_VERSION_NOT_FOUND|Cannot time travel")
_NO_CONNECTOR = re.compile(r'No FileSystem for scheme:? "?(\w+)|Class org\.apache\.hadoop\.fs\.(\w+)\.\w+ not found')
_NOT_SIGNED_IN = re.compile(r"NoAuthWithAWSException|AccessDeniedException|InvalidAccessKeyId|SignatureDoesNotMatch")
_WORKER = re.compile(r"Python worker (?:exited unexpectedly|failed to connect)")


@contextmanager
def translate(table: str = "") -> Iterator[None]:
    """Raise the project's error for what Spark or Delta raise in the block, where they tell of one of these:

    Args:
        table: the table that the block writes, where it writes one.

    Raises:
        ConflictError: another job wrote the table meanwhile.
        OccupiedError: the table can't be created, for its folder has files.
        PlatformError: a disk is full, a Python worker was killed, or an object store has no connector or refuses the sign-in.
        DataError: a file of a table, or of its log, is damaged or missing.
        FileReadError: a Python worker could not read a file by itself.
    """
    try:
        yield
    except SPARK_ERRORS as error:
        explanation = _explanation(_text(error), table)
        if explanation is None:
            raise
        raise explanation from error


def is_gone(error: Exception) -> bool:
    """Whether Spark or Delta say that a table's version is not there any more: its files or its log were deleted."""
    return _GONE.search(str(error)) is not None


def is_feed_gone(error: Exception) -> bool:
    """Whether Spark or Delta say that a table's changes since a version can't be read any more: its files or its log were
    deleted, or it has other columns since."""
    return is_gone(error) or "DELTA_" in str(error)


def _text(error: PySparkException | Py4JJavaError) -> str:
    """Message and causes; the class's name too, for Delta's Python errors say no more by their message."""
    return f"{type(error).__name__} {error}"


def _explanation(text: str, table: str) -> BpSparkError | None:
    if found := _BY_WORKER.search(text):
        return FileReadError(found[1], found[2])
    if _FULL.search(text):
        where = f"{table}: can't be written: " if table else ""
        return PlatformError(
            f"{where}no space left on a disk; no table holds a part of what was being written: make room and run again"
        )
    if _CONFLICT.search(text):
        return ConflictError(table)
    if _OCCUPIED in text:
        return OccupiedError(table)
    if found := _UNREADABLE.search(text):
        if _TOO_LONG.search(text):
            return DataError(found[1], "has a value of too many characters: look for a quote that isn't closed")
        return DataError(found[1], "is damaged or missing and was not read; restore the file, then run again")
    if found := _LOG.search(text):
        return DataError(found[1], "this entry of the table's log is missing; restore the file, then run again")
    if found := _GAP.search(text):
        return DataError(table or "a table", f"entries of its log are missing: {found[1]}")
    if found := _NO_CONNECTOR.search(text):
        return PlatformError(
            f"Spark can't read {found[1] or found[2]} addresses: it lacks the connector; conf/object-stores.md says which jar"
        )
    if found := _NOT_SIGNED_IN.search(text):
        return PlatformError(
            f"the store, or file system, refuses access ({found[0]}); conf/object-stores.md says how jobs sign in to stores"
        )
    if _WORKER.search(text):
        return PlatformError(
            "a Python worker was killed (out of memory?); no table holds a part of what it computed: run again"
        )
    return None
