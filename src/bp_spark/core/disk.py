"""A full disk, wherever it strikes: one error that names the file."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bp_spark.core.errors import BpSparkError, PlatformError

FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large|database or disk is full")
"""Words of a full disk in the errors of Java, C++, Rust and SQLite, which have no number."""
_NUMBERS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Name the file, if a disk is full while the block writes it.

    Args:
        path: what the block writes.

    Raises:
        PlatformError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        # Libraries wrap a full disk in errors of any class.
        if isinstance(error, BpSparkError) or not is_full(error):
            raise
        raise no_space(path) from error


def no_space(path: str | Path) -> PlatformError:
    """Return the error of a disk that is full where ``path`` is written."""
    return PlatformError(f"{path}: can't be written: no space left on its disk; make room and run again")


def is_full(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, is that of a full disk."""
    return any(
        FULL.search(str(cause)) or (isinstance(cause, OSError) and cause.errno in _NUMBERS) for cause in _causes(error)
    )


def translated(error: BaseException) -> PlatformError | None:
    """Return the error of a full disk in the place of a foreign one, with the file where it is known; else ``None``."""
    if isinstance(error, BpSparkError) or not is_full(error):
        return None
    names = [cause.filename for cause in _causes(error) if isinstance(cause, OSError) and cause.filename]
    return no_space(names[0] if names else "a file")


def flush_output() -> None:
    """Write what is left for standard output.

    Raises:
        PlatformError: the disk of the file that it goes to is full.
    """
    # Where it fails, Python would try again when it ends, and end with a code of its own.
    try:
        with writing("standard output"):
            sys.stdout.flush()
    except BrokenPipeError:
        # whoever read it has read enough
        sys.stdout = None
    except PlatformError:
        sys.stdout = None
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and those that it was raised from or while handling."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
