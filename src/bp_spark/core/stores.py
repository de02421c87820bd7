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
"""Errors of pyarrow where it can't reach a store or read a file. Spark may sign in differently, and succeed."""


def file_system(address: str) -> tuple[Any, str]:
    """Return the pyarrow file system of a folder or an object-store address, and the path in it.

    For S3 the variable ``AWS_ENDPOINT_URL`` counts, as it does for Spark and deltalake.
    """
    if "://" not in address:
        return fs.LocalFileSystem(), address.removeprefix("file:")
    address = without_hadoop_names(address)
    store = urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))
    if address.startswith("s3:") and store.netloc:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        s3 = fs.S3FileSystem(endpoint_override=store.netloc, scheme=store.scheme, region=region)
        return s3, address.removeprefix("s3://")
    system, path = fs.FileSystem.from_uri(address)
    return system, path


def without_hadoop_names(address: str) -> str:
    """Return an address as others than Hadoop spell it.

    >>> without_hadoop_names("s3a://lake/shop")
    's3://lake/shop'
    """
    return re.sub("^s3[an]:", "s3:", address)


def folder_of(path: str, namespace: str) -> str:
    """Return the folder of a namespace's path-based tables: an address as given, a local folder as an absolute path.

    >>> folder_of("dbfs:/mnt/lake/", "main.bp"), folder_of("s3a://lake", "bp"), folder_of("/data/../lake", "bp")
    ('dbfs:///mnt/lake/main/bp', 's3a://lake/bp', '/lake/bp')
    """
    # Hadoop writes an address without a host with one slash
    path = re.sub(r"^([a-z][a-z0-9+.-]+):/(?!/)", r"\1:///", path)
    root = path.rstrip("/") if "://" in path else str(Path(path).resolve())
    return f"{root}/{namespace.replace('.', '/')}"


def remove_folder(address: str) -> None:
    """Delete a folder with all its files; do nothing where it doesn't exist."""
    files, path = file_system(address)
    if files.get_file_info(path).type != fs.FileType.NotFound:
        files.delete_dir(path)
