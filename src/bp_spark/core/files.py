"""Local files that survive a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and make it durable."""
    path.write_bytes(content)
    sync(path)


def sync(path: Path) -> None:
    """Make a file or the entries of a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
