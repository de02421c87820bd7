"""Fetch jars into a folder and prove that they are those of docker/jars.lock.

Usage: fetch_jars.py LOCK FOLDER REPOSITORY GROUP...
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import urllib.request
from pathlib import Path


def fetch(url: str, sha256: str, target: Path) -> None:
    """Put what is at ``url`` into ``target``, or end the process if it is something else than it should be."""
    draft = target.with_suffix(".part")
    with urllib.request.urlopen(url, timeout=60) as source, draft.open("wb") as file:  # noqa: S310 the caller's repository
        shutil.copyfileobj(source, file, 2**20)
    with draft.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        draft.unlink()
        sys.exit(f"{url}: has SHA-256 {found}, must have {sha256}")
    draft.chmod(0o644)
    draft.replace(target)


def main(lock: str, folder: str, repository: str, *groups: str) -> None:
    """Fetch the jars of some groups of the lock file into a folder, and check their digests."""
    lines = [line.split() for line in Path(lock).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    if unknown := set(groups) - {group for group, *_ in lines}:
        sys.exit(f"{lock}: has no group {min(unknown)}")
    for group, sha256, path in lines:
        if group in groups:
            fetch(f"{repository.rstrip('/')}/{path}", sha256, Path(folder) / Path(path).name)


if __name__ == "__main__":
    main(*sys.argv[1:])
