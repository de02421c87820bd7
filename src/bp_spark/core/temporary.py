"""Private temporary folder of this process; folders that killed processes left are deleted.

Only its user can open the folder. The process locks a file in it, and the system frees the lock when the process ends, killed
or not. So a folder with a free lock belongs to no process, and the next process deletes it.
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
    """Return this process's folder for temporary files of one kind; it is deleted when the process ends."""
    path = _private_folder(os.getpid()) / name
    path.mkdir(mode=0o700, exist_ok=True)
    return path


@cache
def _private_folder(owner: int) -> Path:
    """Delete the folders of killed processes, then make this process's own."""
    root = Path(tempfile.gettempdir())
    _sweep(root)
    with disk.writing(root):
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        draft = path / f"{_LOCK}.tmp"
        descriptor = os.open(draft, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The file gets its name when it is locked: another process never finds it unlocked and deletes the folder.
        draft.rename(path / _LOCK)
    atexit.register(_delete, path, owner)
    return path


def _delete(path: Path, owner: int) -> None:
    # A forked process runs the exit handlers of its parent, too.
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Delete those folders of this user whose processes have ended."""
    for path in root.glob(f"{_PREFIX}*"):
        try:
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            # Another program's folder, or one that another process is deleting.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            # Its process is alive, or the file system has no locks.
            continue
        finally:
            os.close(descriptor)
