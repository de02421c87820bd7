"""Data files in a Delta table's folder that its newest version does not need: listed and deleted by pyarrow, without Spark.

No clock decides. The caller lists the files, ends all running writes (:meth:`bp_spark.lakehouse.store.Lakehouse.fence`), and
then deletes the listed files that the newest version doesn't need. A later write's files were not listed, and an earlier write
can't commit any more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

from pyarrow import fs

from bp_spark.core.errors import PlatformError
from bp_spark.core.stores import file_system

_DELETES_AT_ONCE = 16
_COMMITS_SEARCHED = 20


def data_files(address: str) -> list[str]:
    """Return the paths of all data files in a table's folder, the change feed's included, by one listing.

    As in Delta's own VACUUM, hidden files and folders are left out, such as the log. So are deletion vectors: they hold row
    numbers, and no values.

    Raises:
        OSError, ValueError, pyarrow.ArrowException: the folder can't be listed from here.
    """
    system, folder = file_system(address)
    listed = system.get_file_info(fs.FileSelector(folder, recursive=True))
    return [info.path for info in listed if info.type == fs.FileType.File and _is_data(info.path, folder)]


def require_commit(address: str, text: str) -> None:
    """Require that one of the newest commits in a table's log holds a text.

    For a Spark on another machine, the same path may be another folder.

    Raises:
        FileNotFoundError: no commit holds it.
        OSError, ValueError, pyarrow.ArrowException: the log can't be read from here.
    """
    system, folder = file_system(address)
    listed = system.get_file_info(fs.FileSelector(f"{folder}/_delta_log"))
    commits = sorted(info.path for info in listed if info.extension == "json" and info.base_name[:20].isdigit())
    for path in reversed(commits[-_COMMITS_SEARCHED:]):
        with system.open_input_stream(path) as stream:
            if text.encode() in stream.read():
                return
    raise FileNotFoundError(f"{address}: the table's newest commits are not in its folder as it is seen from here")


def delete(address: str, paths: Sequence[str], needed: Collection[str]) -> int:
    """Delete the files of a table that its newest version does not need; return how many.

    Args:
        address: folder of the table.
        paths: as :func:`data_files` gave them.
        needed: addresses of the version's data files, as Spark lists them.

    Raises:
        PlatformError: a file can't be deleted.
    """
    system, _ = file_system(address)
    # compare file names, which are unique: folder names are escaped differently in addresses
    names = {name for uri in needed for name in _forms(uri.rpartition("/")[2])}
    unneeded = [path for path in paths if names.isdisjoint(_forms(_data_name(path)))]

    def delete_some(first: int) -> None:
        for path in unneeded[first::_DELETES_AT_ONCE]:
            _delete_file(system, path)

    with ThreadPoolExecutor(_DELETES_AT_ONCE) as pool:
        list(pool.map(delete_some, range(_DELETES_AT_ONCE)))
    return len(unneeded)


def _delete_file(system: Any, path: str) -> None:
    try:
        system.delete_file(path)
    except FileNotFoundError:
        # another clean-up was faster
        return
    except OSError as error:
        raise PlatformError(f"{path}: can't be deleted ({error.strerror or error})") from error


def _is_data(path: str, folder: str) -> bool:
    *folders, _ = PurePosixPath(path).relative_to(folder).parts
    name = _data_name(path)
    is_vector = name.startswith("deletion_vector_") and name.endswith(".bin")
    return not is_vector and not any(map(_is_hidden, (*folders, name)))


def _is_hidden(name: str) -> bool:
    # folders of partitions have a "=" in their name
    return name[0] in "._" and name != "_change_data" and "=" not in name


def _data_name(path: str) -> str:
    """Return the file's name; for a checksum that Hadoop keeps beside a local file, the name of that file."""
    name = path.rpartition("/")[2]
    return name[1:-4] if name.startswith(".") and name.endswith(".crc") else name


def _forms(name: str) -> tuple[str, str]:
    return name, unquote(name)
