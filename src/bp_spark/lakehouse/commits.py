"""Delta logs: where tables are, which versions they have, and what this package recorded in their commits.

A log in reach of pyarrow is read file by file, in milliseconds. Elsewhere (a table of the metastore, a store that only Spark
can sign in to, a cleaned log) Delta's own history answers, by a Spark job.
"""

from __future__ import annotations

import io
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from pyarrow import fs
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import TablesConfig
from bp_spark.core.errors import ConfigError, ConflictError, MissingTableError
from bp_spark.core.session import is_connect
from bp_spark.core.stores import UNREACHABLE, file_system, folder_of
from bp_spark.core.version import __version__
from bp_spark.lakehouse import sql

TRANSACTIONS = "bp-spark"
"""Delta's ``txnAppId`` of this package's writes. Delta drops a commit whose ``txnVersion`` isn't above the table's."""
NO_TABLE = re.compile("DELTA_TABLE_NOT_FOUND|DELTA_MISSING_DELTA_TABLE|DELTA_PATH_DOES_NOT_EXIST|PATH_NOT_FOUND")
_COMMITS_SEARCHED = 100
"""How far back the newest commit of this package is searched for, among maintenance commits."""
_COMMITS_SINCE = 20
"""How far back a write searches for its own commit, behind those that followed meanwhile."""
_LOG_ENTRY = re.compile(r"(\d{20})\.(?:json|checkpoint\..*parquet)")


class CommitLog:
    """The Delta logs of one namespace's tables, by path or managed by the metastore."""

    def __init__(self, spark: SparkSession, config: TablesConfig) -> None:
        self.spark = spark
        self.namespace = config.namespace
        self._config = config
        self._root = None if config.path is None else folder_of(config.path, config.namespace)

    def location(self, name: str) -> str:
        """Return the folder or object-store address of a table."""
        if self._root is not None:
            return f"{self._root}/{name}"
        detail = self.spark.sql(f"DESCRIBE DETAIL {self._identifier(name)}").select("location").first()
        assert detail is not None
        return str(detail[0]).removeprefix("file:")

    def exists(self, name: str) -> bool:
        """Return whether the table exists."""
        if self._root is None:
            return self.spark.catalog.tableExists(self._identifier(name))
        try:
            is_logged = self._logged_version(name) is not None
        except UNREACHABLE:
            return self._is_known_to_spark(name)
        return is_logged or (self._is_elsewhere and self._is_known_to_spark(name))

    def existing(self, names: Iterable[str]) -> list[str]:
        """Return those of some tables' names that exist, in their order."""
        return [name for name in names if self.exists(name)]

    def folders(self, names: Iterable[str]) -> list[str]:
        """Return the folders that hold the tables' files: one for all, or one per table that the metastore manages."""
        return [self.location(name) for name in self.existing(names)] if self._root is None else [self._root]

    def register(self, names: Iterable[str]) -> list[str]:
        """Make path-based tables known by name to this session, for SQL; return the names that exist.

        Raises:
            ConfigError: the catalog knows one of the names as a table in another folder.
        """
        existing = self.existing(names)
        self.spark.sql(f"CREATE SCHEMA IF NOT EXISTS {sql.quoted_name(self.namespace)}")
        known = self._known_folders()
        for name in existing:
            location = self.location(name)
            if name not in known:
                written = sql.literal(location)
                self.spark.sql(f"CREATE TABLE IF NOT EXISTS {self._identifier(name)} USING DELTA LOCATION {written}")
            elif known[name] != _without_scheme(location):
                raise ConfigError(
                    f"{self._full_name(name)} is a table in another folder than tables.path for this Spark session; "
                    "set another tables.namespace, or drop that table's name from the catalog"
                )
        return existing

    def _known_folders(self) -> dict[str, str]:
        """Return the folders of the namespace's tables by name, as the catalog has them."""
        found = self.spark.sql(f"SHOW TABLE EXTENDED IN {sql.quoted_name(self.namespace)} LIKE '*'")
        at = F.regexp_extract("information", r"(?m)^Location: (.*)$", 1)
        rows = found.filter("NOT isTemporary").select("tableName", at.alias("at")).collect()
        return {row["tableName"]: _without_scheme(row["at"]) for row in rows}

    def is_plain(self, name: str) -> bool:
        """Return whether the table's Parquet files alone hold its rows, under its columns' names.

        Deletion vectors and column mapping break that. Delta's protocol asks a reader version above 1 for either.
        """
        return bool(self._detail(name, "minReaderVersion") == 1)

    def version(self, name: str) -> int:
        """Return the newest Delta version of a table.

        Raises:
            DataError: the table does not exist.
        """
        try:
            if (logged := self._logged_version(name)) is not None:
                return logged
        except UNREACHABLE:
            pass
        self._require(name)
        return int(self._history(name, 1).select("version").collect()[0][0])

    def commit_metadata(self, name: str, **recorded: str) -> dict[str, Any]:
        """Return what the newest write by this package recorded in its commit, with that write's Delta ``version``.

        Without such a commit, only ``version`` is returned: the table's newest, or -1 without a table.

        Args:
            name: name of the table.
            **recorded: values that the write must have recorded; other writes are passed over.
        """
        if not self.exists(name):
            return {"version": -1}
        # maintenance commits (OPTIMIZE, VACUUM, table properties) record nothing of ours
        for version, text in self._recorded_commits(name, _COMMITS_SEARCHED):
            try:
                metadata = json.loads(text)
            except json.JSONDecodeError:
                # written by somebody else
                continue
            if all(metadata.get(key) == value for key, value in recorded.items()):
                return {**metadata, "version": version}
        return {"version": self.version(name)}

    def inputs(self, name: str, **recorded: str) -> str | None:
        """Return the inputs digest that the newest (such) write recorded; ``None`` without table or digest."""
        return self.commit_metadata(name, **recorded).get("inputs")

    def rows_written(self, name: str, version: int) -> int:
        """Return the rows that an append wrote, or a replace of whole partitions, as Delta counted them."""
        try:
            metrics = self._commit_info(name, version)["operationMetrics"]
        except (*UNREACHABLE, KeyError):
            history = self._history(name).filter(F.col("version") == version)
            metrics = history.select("operationMetrics").collect()[0][0]
        # Delta counts no rows where Spark found the plan to be empty
        return int(metrics["numOutputRows"]) if metrics.get("numFiles") != "0" else 0

    def _committed_version(self, name: str, metadata: str, after: int | None) -> int:
        """Return the version of the commit with that metadata; the newest one where there was nothing to commit.

        Raises:
            ConflictError: no commit has it. Delta drops a transaction that comes too late, without an error.
        """
        for version, text in self._recorded_commits(name, _COMMITS_SINCE):
            if text == metadata:
                return version
        if after is not None:
            raise ConflictError(self._full_name(name))
        # without a transaction, Delta leaves out a commit that would change nothing
        return self.version(name)

    def _recorded_commits(self, name: str, most: int) -> Iterator[tuple[int, str]]:
        """Yield version and metadata of the newest ``most`` commits, newest first, without those that recorded nothing."""
        newest = self.version(name)
        for version in range(newest, max(-1, newest - most), -1):
            try:
                metadata = self._commit_info(name, version).get("userMetadata")
            except UNREACHABLE:
                history = self._history(name, most).filter(f"version <= {version} AND userMetadata IS NOT NULL")
                yield from map(tuple, history.orderBy(F.desc("version")).select("version", "userMetadata").collect())
                return
            if metadata is not None:
                yield version, metadata

    def _detail(self, name: str, column: str) -> Any:
        """Return a column of Delta's description of a table."""
        return self.spark.sql(f"DESCRIBE DETAIL {self.sql_name(name)}").select(column).collect()[0][0]

    def _history(self, name: str, most: int | None = None) -> DataFrame:
        """Return the newest commits, or all that the log still has, as Delta tells them by a Spark job."""
        limit = "" if most is None else f" LIMIT {most}"
        return self.spark.sql(f"DESCRIBE HISTORY {self.sql_name(name)}{limit}")

    @cached_property
    def _files(self) -> tuple[Any, str]:
        """The file system that pyarrow reads the tables' folder with, and the folder's path in it."""
        assert self._root is not None
        return file_system(self._root)

    @property
    def _is_elsewhere(self) -> bool:
        """Whether Spark may see tables where this process sees none: in a store, or on a Spark Connect server."""
        return self._root is not None and ("://" in self._root or is_connect(self.spark))

    def _is_known_to_spark(self, name: str) -> bool:
        try:
            # a folder with other files has a description too
            return bool(self._detail(name, "format") == "delta")
        except AnalysisException as error:
            if not NO_TABLE.search(str(error)):
                raise
            return False

    def _logged_version(self, name: str) -> int | None:
        """Return the newest version by the names of the log's files; ``None`` if the log has none.

        Raises:
            OSError, ValueError, pyarrow.ArrowException: the log can't be listed from here.
        """
        if self._root is None:
            raise FileNotFoundError(self._full_name(name))
        system, path = self._files
        listed = system.get_file_info(fs.FileSelector(f"{path}/{name}/_delta_log", allow_not_found=True))
        entries = (_LOG_ENTRY.fullmatch(info.base_name) for info in listed)
        return max((int(entry[1]) for entry in entries if entry), default=None)

    def _commit_info(self, name: str, version: int) -> dict[str, Any]:
        """Return the ``commitInfo`` of a commit, from the log's file.

        Raises:
            OSError, ValueError, pyarrow.ArrowException: the file can't be read from here.
        """
        if self._root is None:
            raise FileNotFoundError(self._full_name(name))
        system, path = self._files
        with system.open_input_stream(f"{path}/{name}/_delta_log/{version:020d}.json") as stream:
            for line in io.TextIOWrapper(stream, "utf-8"):
                info: dict[str, Any] | None = json.loads(line).get("commitInfo")
                if info is not None:
                    return info
        return {}

    def _require(self, name: str) -> None:
        if not self.exists(name):
            raise MissingTableError(self._full_name(name))

    def _full_name(self, name: str) -> str:
        """Return the table's name as messages show it."""
        return f"{self.namespace}.{name}"

    def _identifier(self, name: str) -> str:
        """Return the table's name in the metastore."""
        return f"{sql.quoted_name(self.namespace)}.`{name}`"

    def sql_name(self, name: str) -> str:
        """Return the table as SQL names it, by path or by name."""
        return f"delta.`{self.location(name).replace('`', '``')}`" if self._root is not None else self._identifier(name)


def commit_text(inputs: str, note: Mapping[str, object] | None) -> str:
    """Return what a commit records, as text; ``write`` tells it from all other commits."""
    return json.dumps({"inputs": inputs, "code_version": __version__, **(note or {}), "write": uuid.uuid4().hex})


def carried_forward(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a reservation repeats of a commit's metadata: all but what identifies that one commit."""
    return {key: value for key, value in metadata.items() if key not in ("version", "write")}


def _without_scheme(location: str) -> str:
    """Return a folder as catalogs and settings both may write it: ``file:/a``, ``file:///a`` and ``/a`` are one."""
    return re.sub(r"^(?:file|dbfs):/+", "/", location).rstrip("/")
