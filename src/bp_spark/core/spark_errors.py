"""Errors of Spark and Delta -> the project's errors: which table or file, which rule, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException

from bp_spark.core.disk import FULL
from bp_spark.core.errors import BpSparkError, ConflictError, DataError, FileReadError, OccupiedError, PlatformError

SPARK_ERRORS = (PySparkException, Py4JJavaError)
"""Errors of Spark and Delta: a Spark Connect session raises the first, a classic session both."""
_FULL_FILE = re.compile(r"(/\S+) \((?:No space left on device|Disk quota exceeded|File too large)\)")
_CONFLICT = re.compile(
    r"DELTA_CONCURRENT_|DELTA_METADATA_CHANGED|DELTA_PROTOCOL_CHANGED|TABLE_OR_VIEW_ALREADY_EXISTS|"
    r"Concurrent(Write|Append|Transaction|DeleteRead|DeleteDelete)Exception"
)
_OCCUPIED = re.compile("DELTA_CREATE_TABLE_WITH_NON_EMPTY_LOCATION")
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
    """Raise the project's error in the place of an error of Spark or Delta that has a known cause.

    Args:
        table: the table that the block writes, where it writes one.

    Raises:
        ConflictError: another job wrote the table meanwhile.
        OccupiedError: the table can't be created, because its folder holds other files.
        PlatformError: a disk is full, a Python worker was killed, or an object store has no connector or refuses the sign-in.
        DataError: a file of a table, or of its log, is damaged or missing.
        FileReadError: a Python worker could not read a file by itself.
    """
    try:
        yield
    except SPARK_ERRORS as error:
        translated = _translated(_text(error), table)
        if translated is None:
            raise
        raise translated from error


def is_gone(error: Exception) -> bool:
    """Return whether the error means that a table's version is gone: its files or its log were deleted."""
    return _GONE.search(str(error)) is not None


def is_feed_gone(error: Exception) -> bool:
    """Return whether the error means that a table's changes since a version can't be read any more.

    Files or log were deleted, or the table's columns have changed since.
    """
    return is_gone(error) or "DELTA_" in str(error)


def _text(error: PySparkException | Py4JJavaError) -> str:
    """Return message and causes with the class's name, which is all that some of Delta's Python errors say."""
    return f"{type(error).__name__} {error}"


def _translated(text: str, table: str) -> BpSparkError | None:
    for pattern, make in _CAUSES:
        if match := pattern.search(text):
            return make(match, table)
    return None


def _no_space(match: re.Match[str], table: str) -> BpSparkError:
    path = _FULL_FILE.search(match.string)
    name = table or (path[1] if path else "")
    where = f"{name}: can't be written: " if name else ""
    return PlatformError(
        f"{where}no space left on a disk; no table holds a part of what was being written: make room and run again"
    )


def _unreadable_file(match: re.Match[str], _: str) -> BpSparkError:
    if _TOO_LONG.search(match.string):
        return DataError(match[1], "has a value of too many characters: look for a quote that isn't closed")
    return DataError(match[1], "is damaged or missing and was not read; restore the file, then run again")


def _missing_log_entry(match: re.Match[str], _: str) -> BpSparkError:
    return DataError(match[1], "this entry of the table's log is missing; restore the file, then run again")


def _no_connector(match: re.Match[str], _: str) -> BpSparkError:
    return PlatformError(
        f"Spark can't read {match[1] or match[2]} addresses: it lacks the connector; conf/object-stores.md says which jar"
    )


def _refused_access(match: re.Match[str], _: str) -> BpSparkError:
    return PlatformError(
        f"the store, or file system, refuses access ({match[0]}); conf/object-stores.md says how jobs sign in to stores"
    )


def _killed_worker(_: re.Match[str], table: str) -> BpSparkError:
    return PlatformError(
        "a Python worker was killed (out of memory?); no table holds a part of what it computed: run again"
    )


_CAUSES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], str], BpSparkError]], ...] = (
    (_BY_WORKER, lambda match, table: FileReadError(match[1], match[2])),
    (FULL, _no_space),
    (_CONFLICT, lambda match, table: ConflictError(table)),
    (_OCCUPIED, lambda match, table: OccupiedError(table)),
    (_UNREADABLE, _unreadable_file),
    (_LOG, _missing_log_entry),
    (_GAP, lambda match, table: DataError(table or "a table", f"entries of its log are missing: {match[1]}")),
    (_NO_CONNECTOR, _no_connector),
    (_NOT_SIGNED_IN, _refused_access),
    (_WORKER, _killed_worker),
)
"""Pattern in the text of an error -> the project's error; the first match counts."""
