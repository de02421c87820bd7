"""Path-based tables read without Spark: delta-rs finds the files of the newest version, DuckDB answers SQL over them.

As in Spark sessions of this package, each page of a file is compared with its checksum before it is decoded.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import reduce
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs

from bp_spark.core.config import TablesConfig
from bp_spark.core.errors import MissingTableError
from bp_spark.core.stores import UNREACHABLE, folder_of
from bp_spark.lakehouse import dialect
from bp_spark.lakehouse.schema import Table

if TYPE_CHECKING:
    from deltalake import DeltaTable

_COMMITS_SEARCHED = 100
"""Newest commits of a table among which one of this package is looked for; as in :mod:`bp_spark.lakehouse.commits`."""
_SESSION_VARIABLES = ("SPARK_REMOTE", "PYSPARK_GATEWAY_PORT", "DATABRICKS_RUNTIME_VERSION")
"""Variables of processes that have a Spark session, or a server with one, which may see other files."""


class UnreadableError(Exception):
    """A table or query is left to Spark; the message is the reason."""


class StructValue(tuple[Any, ...]):
    """A value of a struct, which is shown as a Row of Spark is."""

    def __new__(cls, names: Sequence[str], values: Iterable[Any]) -> StructValue:
        """Return the value with its fields' names."""
        value = super().__new__(cls, values)
        value.__fields__ = tuple(names)  # type: ignore[attr-defined]
        return value

    def __getitem__(self, key: Any) -> Any:
        """Return a field by its name or its number."""
        return super().__getitem__(self.__fields__.index(key) if isinstance(key, str) else key)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        """Return the fields with their names."""
        pairs = zip(self.__fields__, self, strict=True)  # type: ignore[attr-defined]
        return f"Row({', '.join(f'{name}={value!r}' for name, value in pairs)})"


def is_possible(config: TablesConfig) -> bool:
    """Return whether tables may be read without Spark: by path, in a process without a session, with DuckDB installed."""
    if config.path is None or any(name in os.environ for name in _SESSION_VARIABLES):
        return False
    return all(find_spec(name) for name in ("duckdb", "deltalake"))


def dataset(config: TablesConfig, name: str) -> ds.Dataset:
    """Return the newest version of a table, to be read by pyarrow.

    Raises:
        MissingTableError: the local table does not exist.
        UnreadableError: delta-rs can't reach it, or lacks a feature of it, as deletion vectors.
    """
    from deltalake.exceptions import DeltaError

    location = _location(config, name)
    # delta-rs would hand Arrow a file system in Python, and its threads may still call that when the process ends
    files = None if "://" in location else fs.SubTreeFileSystem(location, fs.LocalFileSystem())
    stored = _table(config, name)
    try:
        table = stored.to_pyarrow_dataset(filesystem=files)
    except (DeltaError, *UNREACHABLE) as error:
        raise UnreadableError(f"delta-rs can't read {config.namespace}.{name} ({type(error).__name__})") from error
    options = ds.ParquetFragmentScanOptions(pre_buffer=True, page_checksum_verification=True)
    table.format.default_fragment_scan_options = options
    return table


def _location(config: TablesConfig, name: str) -> str:
    assert config.path is not None
    return f"{folder_of(config.path, config.namespace)}/{name}"


def _table(config: TablesConfig, name: str) -> DeltaTable:
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    full_name, location = f"{config.namespace}.{name}", _location(config, name)
    try:
        return DeltaTable(location)
    except TableNotFoundError as error:
        if "://" in location:
            raise UnreadableError(f"{full_name} isn't found from here") from error
        raise MissingTableError(full_name) from None
    except (DeltaError, *UNREACHABLE) as error:
        raise UnreadableError(f"delta-rs can't read {full_name} ({type(error).__name__})") from error


def rows_where(config: TablesConfig, table: Table, **values: Any) -> list[dict[str, Any]]:
    """Return a table's rows that have these values in these columns, or all, with all columns that are declared today.

    A list of values stands for any of them.

    Raises:
        MissingTableError: the local table does not exist.
        UnreadableError: delta-rs can't read the table.
    """
    stored = dataset(config, table.name)
    conditions = [pc.field(name).isin(value if isinstance(value, list) else [value]) for name, value in values.items()]
    wanted = reduce(operator.and_, conditions) if conditions else None
    try:
        found = stored.to_table(filter=wanted).to_pylist(maps_as_pydicts="strict")
    except UNREACHABLE as error:
        raise UnreadableError(f"pyarrow ends with {type(error).__name__}") from error
    # not its schema: Spark parses the types of that, in a session
    names = [column.name for column in table.columns]
    return [{name: _in_utc(row.get(name)) for name in names} for row in found]


def query_as_spark(config: TablesConfig, query: str, most_rows: int) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and first rows of a query in Spark SQL.

    Raises:
        MissingTableError: a local table does not exist.
        UnreadableError: DuckDB would return other rows than Spark, or none, or an error; the message is the reason.
    """
    try:
        tree = dialect.parse(query)
        tables = {name: dataset(config, name) for name in dialect.table_names(tree, config.namespace)}
        translated = dialect.to_duckdb(tree, {name: table.schema for name, table in tables.items()})
    except dialect.OtherDialectError as error:
        raise UnreadableError(str(error)) from error
    import duckdb

    try:
        return _rows(config, tables, translated, most_rows)
    except duckdb.Error as error:
        # the text of an error may hold a value of a row
        raise UnreadableError(f"DuckDB ends with {type(error).__name__}") from error


def query_of_duckdb(config: TablesConfig, query: str, most_rows: int) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and first rows of a query in DuckDB's SQL.

    Raises:
        MissingTableError: a local table does not exist.
        UnreadableError: delta-rs can't read a table.
        duckdb.Error: the query is none, or doesn't fit the tables.
    """
    tables = {name: dataset(config, name) for name in dialect.table_names_in_duckdb(query, config.namespace)}
    return _rows(config, tables, query, most_rows)


def query_in_duckdb(config: TablesConfig, query: str, most_rows: int) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and first rows of a query of this package in DuckDB's SQL.

    Raises:
        MissingTableError: a local table does not exist.
        UnreadableError: delta-rs or DuckDB can't read a table.
    """
    import duckdb

    try:
        return query_of_duckdb(config, query, most_rows)
    except duckdb.Error as error:
        # the text of an error may hold a value of a row
        raise UnreadableError(f"DuckDB ends with {type(error).__name__}") from error


def commit_metadata(config: TablesConfig, name: str) -> dict[str, Any]:
    """Return what the newest write by this package recorded in its commit; see :meth:`Lakehouse.commit_metadata`.

    Raises:
        MissingTableError: the local table does not exist.
        UnreadableError: delta-rs can't read the table.
    """
    from deltalake.exceptions import DeltaError

    try:
        commits = _table(config, name).history(_COMMITS_SEARCHED)
    except (DeltaError, *UNREACHABLE) as error:
        raise UnreadableError(f"delta-rs can't read the log of {config.namespace}.{name}") from error
    for commit in commits:
        try:
            metadata: dict[str, Any] = json.loads(commit.get("userMetadata") or "")
        except json.JSONDecodeError:
            # maintenance records nothing, and others what they like
            continue
        return metadata
    return {}


def _rows(
    config: TablesConfig, tables: dict[str, ds.Dataset], query: str, most_rows: int
) -> tuple[list[str], list[list[Any]]]:
    import duckdb

    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        *catalog, schema = config.namespace.split(".")
        if catalog:
            connection.execute(f"ATTACH ':memory:' AS {dialect.quoted(catalog)}")
        connection.execute(f"CREATE SCHEMA {dialect.quoted((*catalog, schema))}")
        for name, table in tables.items():
            connection.register(f"bp_spark_{name}", table)
            view = dialect.quoted((*catalog, schema, name))
            source = dialect.quoted(("memory", "main", f"bp_spark_{name}"))
            connection.execute(f"CREATE VIEW {view} AS SELECT * FROM {source}")  # noqa: S608 (a table's name, quoted)
        connection.execute("SET enable_external_access = false")
        cursor = connection.execute(query)
        columns = [column[0] for column in cursor.description or ()]
        types = [column[1] for column in cursor.description or ()]
        rows = cursor.fetchmany(most_rows)
    return columns, [[_as_spark(value, kind) for value, kind in zip(row, types, strict=True)] for row in rows]


def _in_utc(value: Any) -> Any:
    """Return a time without its zone, as Spark returns it in a session of UTC."""
    return value.astimezone(UTC).replace(tzinfo=None) if isinstance(value, datetime) else value


def _as_spark(value: Any, kind: Any) -> Any:
    """Return a value of DuckDB as Spark's Row would hold it: structs with their names, times in UTC without a zone."""
    if value is None:
        return None
    if isinstance(value, datetime):
        return value.replace(tzinfo=None)
    if kind.id == "list":
        return [_as_spark(item, kind.children[0][1]) for item in value]
    if kind.id == "struct":
        return StructValue(list(value), [_as_spark(value[name], item) for name, item in kind.children])
    if kind.id == "map":
        key_kind, item_kind = (child for _, child in kind.children)
        return {_as_spark(key, key_kind): _as_spark(item, item_kind) for key, item in value.items()}
    return value
