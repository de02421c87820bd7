"""Footers of Parquet files, compared with Delta's log.

Pages have checksums, and footers have none: one flipped bit in a footer can hide rows from every reader. The log has the size
and the number of rows of each file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from bp_spark.core.errors import DataError
from bp_spark.core.stores import UNREACHABLE, file_system

if TYPE_CHECKING:
    from deltalake import DeltaTable

_logger = logging.getLogger(__name__)


def rows(name: str, location: str, version: int | None, where: Mapping[str, str]) -> int | None:
    """Return the rows of a table's files by their footers, which must agree with its log.

    Args:
        name: name of the table, for the log.
        location: its folder or address.
        version: version of the table; ``None`` for the newest.
        where: partition column -> value, for only the files with these.

    Returns:
        The rows; ``None`` where files or log can't be read from here, or where a file may hold rows that are deleted.

    Raises:
        DataError: a footer is damaged, or disagrees with the log.
    """
    # a logged model is loaded where deltalake is not installed
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    try:
        table = DeltaTable(location, version=version)
        partitions = [(column, "=", value) for column, value in where.items()]
        files = read(table, table.file_uris(file_pruning_predicate=partitions or None))
        # deletion vectors ask for a newer reader
        return sum(file.num_rows for file in files) if table.protocol().min_reader_version == 1 else None
    except (DeltaError, *UNREACHABLE) as error:
        kind = type(error).__name__
        _logger.info("%s: footers were not held against its log, which can't be read from here (%s)", name, kind)
        return None


def read(table: DeltaTable, files: Sequence[str]) -> list[pq.FileMetaData]:
    """Return the footers of some files of a Delta table's version, in their order.

    Args:
        table: the table at that version.
        files: addresses of the files.

    Raises:
        DataError: a footer is damaged, or disagrees with the log.
        OSError: a file can't be read from here.
    """
    if not files:
        return []
    actions = pa.table(table.get_add_actions(flatten=True)).select(["path", "size_bytes", "num_records"]).to_pylist()
    # by name: names are unique, and paths are escaped
    logged = {row["path"].rpartition("/")[2]: (row["size_bytes"], row["num_records"]) for row in actions}
    store = file_system(files[0])[0]

    def footer(address: str) -> pq.FileMetaData:
        with store.open_input_file(file_system(address)[1]) as file:
            size = file.size()
            try:
                metadata = pq.read_metadata(file)
                rows = {metadata.num_rows, sum(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))}
            except (ValueError, OSError, pa.ArrowException) as error:
                raise DataError(address, "its footer is damaged; restore the file, then run again") from error
        logged_size, logged_rows = logged[address.rpartition("/")[2]]
        if size != logged_size or (logged_rows is not None and rows != {logged_rows}):
            footer_rows = " or ".join(f"{count:,}" for count in sorted(rows))
            raise DataError(
                address,
                f"has {size:,} bytes and {footer_rows} rows by its footer, and {logged_size:,} bytes and {logged_rows} rows by "
                "the table's log: it is damaged; restore the file, then run again",
            )
        return metadata

    with ThreadPoolExecutor() as pool:
        return list(pool.map(footer, files))
