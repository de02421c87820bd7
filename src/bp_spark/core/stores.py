"""Folders on this machine and in object stores, as pyarrow reaches them without Spark."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

UNREACHABLE = (OSError, ValueError, pa.ArrowException)
"""What pyarrow raises where it can't reach a store or read a file: Spark, which may sign in in another way, may be able to."""


def file_system(address: str) -> tuple[Any, str]:
    """What pyarrow reads a folder or an object-store address by, and the path in it.

    Of S3 the variable ``AWS_ENDPOINT_URL`` is obeyed, as Spark and deltalake obey it.
    """
    if "://" not in address:
        return fs.LocalFileSystem(), address.removeprefix("file:")
    address = re.sub("^s3[an]:", "s3:", address)
    store = urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))
    if address.startswith("s3:") and store.netloc:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        found = fs.S3FileSystem(endpoint_override=store.netloc, scheme=store.scheme, region=region)
        return found, address.removeprefix("s3://")
    system, path = fs.FileSystem.from_uri(address)
    return system, path


def folder_of(path: str, namespace: str) -> str:
    """The folder of a namespace's path-based tables: an address as it is, a folder of this machine from the root on."""
    root = path.rstrip("/") if "://" in path else str(Path(path).resolve())
    return f"{root}/{namespace.replace('.', '/')}"


def remove_folder(address: str) -> None:
    """Delete a folder with all that is in it; one that isn't there is no error."""
    files, path = file_system(address)
    if files.get_file_info(path).type != fs.FileType.NotFound:
        files.delete_dir(path)
