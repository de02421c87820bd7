"""This process's private temporary folder, and the sweep of those that killed processes left.

A folder is open to its owner alone. Its process holds a lock on a file in it, which the system frees however the process ends.
So a folder whose lock is free is nobody's, and the next process deletes it.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from bp_spark.core import disk

_PREFIX = "bp-spark-"
_LOCK = ".lock"


def folder(name: str) -> Path:
    """Return a folder of this process for temporary files of one kind; it is deleted when the process ends."""
    path = _private_folder(os.getpid()) / name
    path.mkdir(mode=0o700, exist_ok=True)
    return path


@cache
def _private_folder(owner: int) -> Path:
    """Make the folder of a process, after sweeping those of killed ones."""
    root = Path(tempfile.gettempdir())
    _sweep(root)
    with disk.writing(root):
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        draft = path / f"{_LOCK}.tmp"
        descriptor = os.open(draft, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Under its name the file is locked from the first moment, so that nobody sweeps the folder.
        draft.rename(path / _LOCK)
    atexit.register(_delete, path, owner)
    return path


def _delete(path: Path, owner: int) -> None:
    # A forked process inherits what its parent does at exit.
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Delete the folders of this user whose process has ended."""
    for path in root.glob(f"{_PREFIX}*"):
        try:
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            # No folder of this package, or one that another process sweeps now.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            # Its process is alive, or the file system knows no locks.
            continue
        finally:
            os.close(descriptor)
