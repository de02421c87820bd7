r"""Files that a mapping's path matches, listed without Spark, on this machine and in object stores.

A path is a pattern of Hadoop: ``*``, ``?``, ``[a-c]``, ``{a,b}`` and ``\`` before a character that stands for itself. A folder
stands for all files below it. Names that begin with ``_`` or ``.`` are hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pyarrow import fs

from bp_spark.core.stores import file_system

_GLOB = re.compile(r"(?<!\\)[*?\[{]")


class FoundFile(NamedTuple):
    """A file.

    Args:
        address: where it lies, as ``file:/data/orders/day1.csv`` or ``s3://bucket/day1.csv``.
        below: path below the pattern's first folder, with the folders of partitions.
        size: bytes.
    """

    address: str
    below: str
    size: int


def is_absolute(path: str) -> bool:
    """Return whether a path doesn't begin in the mapping's folder."""
    return re.match(r"^([A-Za-z][\w+.-]*:)?/", path) is not None


def files_matching(folder: str, pattern: str) -> list[FoundFile]:
    """Return the files that a pattern matches, sorted.

    Args:
        folder: address of the folder that a relative pattern begins in, with a slash at its end.
        pattern: the pattern.

    Raises:
        OSError: a folder can't be listed.
    """
    found: dict[str, FoundFile] = {}
    for part in _without_braces(pattern):
        names = part.split("/")
        fixed = next((at for at, name in enumerate(names) if _GLOB.search(name)), len(names) - 1)
        base = "/".join(re.sub(r"\\(.)", r"\1", name) for name in names[:fixed])
        address = _local(base if is_absolute(part) else f"{folder}{base}").rstrip("/")
        files, root = file_system(address or "file:/")
        prefix = address if "://" in address else f"file:{root.rstrip('/')}"
        for path, size in _walk(files, root.rstrip("/"), names[fixed:]):
            below = path.removeprefix(root).lstrip("/")
            found[f"{prefix}/{below}"] = FoundFile(f"{prefix}/{below}", below, size)
    return [found[address] for address in sorted(found)]


def _local(address: str) -> str:
    """Return the address of a file on this machine as ``file:/...``, whatever number of slashes it has."""
    return re.sub(r"^file:/+", "file:/", address)


def _without_braces(pattern: str) -> list[str]:
    """Return the patterns that ``{a,b}`` stands for."""
    match = re.search(r"(?<!\\)\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [one for choice in match[1].split(",") for one in _without_braces(f"{before}{choice}{after}")]


def _walk(files: Any, folder: str, patterns: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield path and size of the files below a folder that the patterns of their folders and name match."""
    name, *rest = patterns
    if not name:
        yield from _all_below(files, folder or "/")
        return
    matches = re.compile(_expression(name)).fullmatch
    for info in files.get_file_info(fs.FileSelector(folder or "/", allow_not_found=True)):
        if not matches(info.base_name):
            continue
        if rest and info.type == fs.FileType.Directory:
            yield from _walk(files, info.path, rest)
        elif not rest and not _is_hidden(info.base_name):
            if info.type == fs.FileType.Directory:
                yield from _all_below(files, info.path)
            else:
                yield info.path, info.size


def _all_below(files: Any, folder: str) -> Iterator[tuple[str, int]]:
    for info in files.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True)):
        names = info.path.removeprefix(folder).strip("/").split("/")
        if info.type == fs.FileType.File and not any(map(_is_hidden, names)):
            yield info.path, info.size


def _is_hidden(name: str) -> bool:
    return name.startswith(("_", "."))


def _expression(pattern: str) -> str:
    """Return the regular expression of a name's pattern."""
    parts = re.findall(r"\\.|\[\^?[^\]]*\]|.", pattern)
    special = {"*": ".*", "?": "."}
    return "".join(
        part if part[0] == "[" and len(part) > 1 else special.get(part) or re.escape(part[-1]) for part in parts
    )
