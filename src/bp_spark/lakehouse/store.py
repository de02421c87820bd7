"""The store of Delta tables: read, replace, append, merge, delete and vacuum, for any declared table.

In: a DataFrame and a :class:`bp_spark.lakehouse.schema.Table`. Out: one Delta commit. The store knows no table by name.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from bp_spark.core.errors import ConflictError, OccupiedError
from bp_spark.core.session import with_settings
from bp_spark.core.spark_errors import SPARK_ERRORS, translate
from bp_spark.core.stores import UNREACHABLE
from bp_spark.lakehouse import footers, leftovers, sql
from bp_spark.lakehouse.commits import NO_TABLE, TRANSACTIONS, CommitLog, carried_forward, commit_text
from bp_spark.lakehouse.schema import MONTH, Table, as_stored, names_and_types, typed_null

_CREATION_S = 10
"""How long a table's folder may exist before its first commit."""
_DELETED = "_deleted"
"""Column of a MERGE's source that is true for rows to delete."""

_logger = logging.getLogger(__name__)


class Lakehouse(CommitLog):
    """The tables of one namespace, by path or managed by the metastore.

    Every write is one Delta commit. Readers see the state before it or after it, and nothing between.

    A write that replaces all rows, or all rows of given partition values, leaves the same rows when a stage is repeated. A
    write that adds to what the stage has read is given ``after``, the version that the stage read. If another run has written
    since, it adds nothing and raises :class:`ConflictError`, whether the two runs overlapped or followed each other.
    """

    # --- reading ---------------------------------------------------------------------------------------------------------

    def read(self, name: str, version: int | None = None) -> DataFrame:
        """Return a table as it is now, or as of a version.

        Raises:
            DataError: the table does not exist.
        """
        self._require(name)
        reader = self.spark.read.format("delta")
        if version is not None:
            reader = reader.option("versionAsOf", version)
        return reader.load(self.location(name)) if self._root is not None else reader.table(self._identifier(name))

    def collect(self, table: Table) -> list[Row]:
        """Return all rows of a small table, with all columns that are declared today; none without the table.

        On this machine delta-rs reads it, in a tenth of the time of a Spark job.
        """
        if not self.exists(table.name):
            return []
        if self._root is not None and not self._is_elsewhere:
            # a logged model is loaded where the readers without Spark are not installed
            from bp_spark.lakehouse import without_spark

            with suppress(without_spark.UnreadableError):
                return [Row(**row) for row in without_spark.rows_where(self._config, table)]
        return read_as_declared(self, table).collect()

    def changes(self, name: str, since: int) -> DataFrame:
        """Return the rows that commits after version ``since`` wrote, in their old and new form, or deleted."""
        if self.version(name) <= since:
            return self.read(name).limit(0)
        reader = self.spark.read.format("delta").option("readChangeFeed", "true").option("startingVersion", since + 1)
        return reader.load(self.location(name)) if self._root is not None else reader.table(self._identifier(name))

    def require_whole_files(
        self, name: str, version: int | None = None, where: Mapping[str, str] | None = None
    ) -> int | None:
        """Require that the footers of a version's files agree with the table's log.

        Args:
            name: name of the table.
            version: version to check; the newest by default.
            where: partition column -> value, to check only files with these.

        Returns:
            The rows of these files; ``None`` where nothing was checked, or where a file may hold rows that are deleted.

        Raises:
            DataError: a footer is damaged: see :mod:`bp_spark.lakehouse.footers`.
        """
        return footers.rows(self._full_name(name), self.location(name), version, where or {})

    # --- writing ---------------------------------------------------------------------------------------------------------

    def replace(
        self,
        table: Table,
        df: DataFrame,
        *,
        where: Mapping[str, Sequence[object]] | None = None,
        inputs: str = "",
        note: Mapping[str, object] | None = None,
        after: int | None = None,
    ) -> int:
        """Replace a table's rows, or those with the given partition values, in one commit.

        Args:
            table: declaration of the table; it is created where it doesn't exist.
            df: the new rows.
            where: partition column -> values. Rows of ``df`` must all have one of them; Delta checks it.
            inputs: digest of what ``df`` was made from, recorded with the commit.
            note: more values to record with the commit.
            after: version that the rows follow from, by :meth:`commit_metadata` or :meth:`reserve`.

        Returns:
            The version written.

        Raises:
            DataError: ``df`` lacks a column or has one of another type.
            ConflictError: another run wrote the table meanwhile.
        """
        self._create(table)
        writer = self._writer(df, table).mode("overwrite")
        if where:
            writer = writer.option("replaceWhere", " AND ".join(sql.one_of(*item) for item in where.items()))
            # a feature added to the catalogue becomes a new column; older dates hold NULL in it
            writer = writer.option("mergeSchema", "true")
        elif self._is_stored_otherwise(table):
            writer = writer.option("overwriteSchema", "true")
        if table.partition_by:
            writer = writer.partitionBy(*table.partition_by)
        if table.rows_in_file:
            writer = writer.option("maxRecordsPerFile", table.rows_in_file)
        return self._save(writer, table.name, commit_text(inputs, note), after)

    def append(
        self,
        table: Table,
        df: DataFrame,
        *,
        inputs: str = "",
        note: Mapping[str, object] | None = None,
        after: int | None = None,
    ) -> int:
        """Add rows to a table in one commit. For the arguments, the result and errors see :meth:`replace`."""
        self._create(table)
        # a column that a newer version of this package declares is added; older rows hold NULL in it
        writer = self._writer(df, table).mode("append").option("mergeSchema", "true")
        return self._save(writer, table.name, commit_text(inputs, note), after)

    def merge(
        self,
        table: Table,
        df: DataFrame,
        *,
        within: Mapping[str, Sequence[object]],
        deleted_keys: DataFrame | None = None,
        inputs: str = "",
        note: Mapping[str, object] | None = None,
        after: int | None = None,
    ) -> int:
        """Update the rows with the keys of ``df`` and insert the new ones, in one commit.

        Args:
            table: see :meth:`replace`.
            df: rows, each key once.
            within: column -> the values that it has in ``df``; only files that can hold them are read.
            deleted_keys: keys, not in ``df``, whose rows are deleted.
            inputs: see :meth:`replace`.
            note: see :meth:`replace`.
            after: see :meth:`replace`.

        Returns:
            The version written.

        Raises:
            DataError: ``df`` lacks a column or has one of another type.
            ConflictError: another run wrote the table meanwhile.
        """
        self._create(table)
        source = as_stored(df, table).withColumn(_DELETED, F.lit(False))
        if deleted_keys is not None:
            columns = [F.col(f.name) if f.name in table.key else typed_null(f) for f in table.stored_schema]
            source = source.unionByName(deleted_keys.select(*columns).withColumn(_DELETED, F.lit(True)))
        same_key = [f"t.`{column}` = s.`{column}`" for column in table.key]
        skipping = [sql.skipping_condition(f"t.`{column}`", values) for column, values in within.items()]
        # a table made by an older version of this package has no month
        has_month = MONTH.name in self.read(table.name).columns
        stored_names = (table.stored_schema if has_month else table.schema).names
        metadata = commit_text(inputs, note)
        settings = {"spark.databricks.delta.commitInfo.userMetadata": metadata}
        if table.month_of:
            settings["spark.databricks.delta.optimizeWrite.enabled"] = "true"
        if after is not None:
            settings["spark.databricks.delta.write.txnAppId"] = TRANSACTIONS
            settings["spark.databricks.delta.write.txnVersion"] = str(after + 1)
        with translate(self._full_name(table.name)), with_settings(self.spark, settings):
            condition = " AND ".join([*skipping, *same_key])
            self._merge(table.name, source, condition, sql.merge_clauses(stored_names, _DELETED))
        return self._committed_version(table.name, metadata, after)

    def erase(self, name: str, rows_to_erase: DataFrame, condition: str) -> int:
        """Delete the rows that match one of some other rows, in one commit; without a match there is no commit.

        The newest recorded metadata stays that of the commit before.

        Args:
            name: name of the table.
            rows_to_erase: rows that name what is deleted.
            condition: SQL condition over a row ``t`` of the table and a row ``s`` of ``rows_to_erase``.

        Returns:
            How many rows were deleted.
        """
        matches = self.read(name).alias("t").join(rows_to_erase.alias("s"), F.expr(condition), "left_semi")
        count = matches.count()
        if count:
            with translate(self._full_name(name)):
                self._merge(name, rows_to_erase, condition, "WHEN MATCHED THEN DELETE")
        return count

    def delete(self, name: str, condition: str) -> int:
        """Delete the rows that meet a SQL condition, as :meth:`erase` does; return how many."""
        count = self.read(name).filter(condition).count()
        if count:
            with translate(self._full_name(name)):
                self.spark.sql(f"DELETE FROM {self.sql_name(name)} WHERE {condition}")  # noqa: S608 (the caller's)
        return count

    # --- reservations ----------------------------------------------------------------------------------------------------

    def reserve(self, table: Table, metadata: Mapping[str, Any]) -> int:
        """Record in a table's log that a run is about to write it; older reservations end with that.

        A run that writes several tables commits all of them by its write of this one, which comes last. Each of these writes
        is ``after`` the version returned here, so that no run with an older reservation can overwrite it.

        Args:
            table: declaration of the table that is written last.
            metadata: what :meth:`commit_metadata` returned when the run looked; the reservation repeats it.

        Returns:
            The reservation's version, above that of any reservation or write before.

        Raises:
            ConflictError: another run has written or reserved the table since.
        """
        if metadata["version"] >= 0:
            return self.append(table, self._no_rows(table), note=carried_forward(metadata), after=metadata["version"])
        try:
            with translate(self._full_name(table.name)):
                self._create_new(table, "CREATE TABLE")
        except OccupiedError as error:
            self._await_creation(table.name, error)
            raise ConflictError(self._full_name(table.name)) from None
        return self.version(table.name)

    def invalidate_writers(self, table: Table, reservation: int) -> None:
        """Refuse all writes of a table that are ``after`` an older reservation than this one."""
        metadata = carried_forward(self.commit_metadata(table.name))
        self.append(table, self._no_rows(table), note=metadata, after=reservation)

    def _no_rows(self, table: Table) -> DataFrame:
        return self.spark.range(0).select(*map(typed_null, table.schema.fields))

    # --- vacuum ----------------------------------------------------------------------------------------------------------

    def fence(self, name: str) -> str:
        """End all writes of a table that are under way: Delta refuses commits that began before a change of the metadata.

        Returns:
            A text that only the commit of the change holds.
        """
        token = uuid.uuid4().hex
        with translate(self._full_name(name)):
            self.spark.sql(f"ALTER TABLE {self.sql_name(name)} SET TBLPROPERTIES ('bp-spark.fence' = '{token}')")
        return token

    def vacuum(self, name: str) -> int:
        """Delete all files that the newest version doesn't need, the change feed's too; older versions are gone then.

        Other jobs may run. A job that reads an older version, or began to write before the fence, ends with an error. Later
        writes are left alone: see :mod:`bp_spark.lakehouse.leftovers`.

        Returns:
            How many files were deleted; 0 where Delta had to do it.
        """
        with translate(self._full_name(name)):
            if not self.is_plain(name):
                # a row that a deletion vector hides is still in its file
                self.spark.sql(f"REORG TABLE {self.sql_name(name)} APPLY (PURGE)")
            location = self.location(name)
            try:
                listed = leftovers.data_files(location)
                leftovers.require_commit(location, self.fence(name))
            except UNREACHABLE as error:
                self._vacuum_by_delta(name, error)
                return 0
            return leftovers.delete(location, listed, self.read(name).inputFiles())

    def _vacuum_by_delta(self, name: str, reason: Exception) -> None:
        """Delete the files that commits removed.

        A file that never was in the log stays for a later VACUUM: only a clock could tell it from a file that a job is
        writing.
        """
        _logger.warning(
            "%s: its folder can't be listed from here (%s): what killed runs left in it stays until Delta's VACUUM finds it",
            self._full_name(name),
            type(reason).__name__,
        )
        settings = {
            "spark.databricks.delta.retentionDurationCheck.enabled": "false",
            "spark.databricks.delta.vacuum.logging.enabled": "false",
        }
        with with_settings(self.spark, settings):
            try:
                self.spark.sql(f"VACUUM {self.sql_name(name)} LITE RETAIN 0 HOURS")
            except SPARK_ERRORS as error:
                if "DELTA_CANNOT_VACUUM_LITE" not in str(error):
                    raise
                _logger.warning(
                    "%s: its log was cleaned, so that files of older versions stay for the table's own retention time",
                    self._full_name(name),
                )
                self.spark.sql(f"VACUUM {self.sql_name(name)}")

    # --- creation --------------------------------------------------------------------------------------------------------

    def declare_key(self, table: Table) -> None:
        """Declare key and clustering of a new table of Unity Catalog; do nothing elsewhere.

        That changes no row. A catalog that refuses a statement, such as ``hive_metastore``, gets a warning.
        """
        if self._root is not None or "DATABRICKS_RUNTIME_VERSION" not in os.environ:
            return
        for statement in sql.key_and_clustering(table, self._identifier(table.name)):
            try:
                self.spark.sql(statement)
            except PySparkException as error:
                _logger.warning(
                    "%s: goes without %r: %s", self._full_name(table.name), statement, str(error).split("\n")[0]
                )

    def _create(self, table: Table) -> None:
        """Create a table that doesn't exist.

        Raises:
            OccupiedError: other files lie in its folder.
        """
        if self.exists(table.name):
            return
        try:
            with translate(self._full_name(table.name)):
                self._create_new(table, "CREATE TABLE IF NOT EXISTS")
            if not self.exists(table.name):
                # Delta takes any folder with a log for a table, and leaves it alone
                raise OccupiedError(self._full_name(table.name))
        except ConflictError:
            # another run created it in the same moment, which is as good
            if not self.exists(table.name):
                raise
        except OccupiedError as error:
            self._await_creation(table.name, error)
        except AnalysisException as error:
            # or Delta finds that the folder holds no table
            if not NO_TABLE.search(str(error)):
                raise
            self._await_creation(table.name, OccupiedError(self._full_name(table.name)))

    def _create_new(self, table: Table, statement: str) -> None:
        if self._root is None:
            self.spark.sql(f"CREATE SCHEMA IF NOT EXISTS {sql.quoted_name(self.namespace)}")
        self.spark.sql(f"{statement} {sql.table_definition(table, self.sql_name(table.name))}")
        self.declare_key(table)

    def _await_creation(self, name: str, error: OccupiedError) -> None:
        """Wait for the first commit of another run that has made the table's folder; raise the error if none comes."""
        end = time.monotonic() + _CREATION_S
        while not self._has_first_commit(name):
            if time.monotonic() > end:
                raise error
            time.sleep(0.1)

    def _has_first_commit(self, name: str) -> bool:
        """Return whether a table's log, as it is now, has a commit; Delta itself remembers a folder without one."""
        try:
            # the schema makes Delta look: in a Spark Connect session a frame is no more than a plan
            _ = self.spark.read.format("delta").load(self.location(name)).schema
        except AnalysisException:
            return False
        return self.exists(name)

    # --- one write -------------------------------------------------------------------------------------------------------

    def _writer(self, df: DataFrame, table: Table) -> Any:
        """Return a writer of the rows; by month, it balances file sizes, or each task would leave a file in each month."""
        writer = as_stored(df, table).write.format("delta")
        return writer.option("optimizeWrite", "true") if table.month_of else writer

    def _is_stored_otherwise(self, table: Table) -> bool:
        """Return whether an older version of this package made the table, with other columns or another layout."""
        if names_and_types(self.read(table.name).schema) != names_and_types(table.stored_schema):
            return True
        if not table.month_of:
            return False
        return tuple(self._detail(table.name, "partitionColumns")) != table.partition_by

    def _save(self, writer: Any, name: str, metadata: str, after: int | None) -> int:
        """Commit and return the version; with ``after``, Delta refuses what isn't newer than the newest such commit."""
        writer = writer.option("userMetadata", metadata)
        if after is not None:
            writer = writer.option("txnAppId", TRANSACTIONS).option("txnVersion", after + 1)
        with translate(self._full_name(name)):
            if self._root is not None:
                writer.save(self.location(name))
            else:
                writer.saveAsTable(self._identifier(name))
        return self._committed_version(name, metadata, after)

    def _merge(self, name: str, source: DataFrame, condition: str, clauses: str) -> None:
        """Merge rows ``s`` into rows ``t`` of a table, by SQL."""
        with _named_view(source) as view:
            self.spark.sql(f"MERGE INTO {self.sql_name(name)} AS t USING {view} AS s ON {condition} {clauses}")


def read_as_declared(lakehouse: Lakehouse, table: Table, version: int | None = None) -> DataFrame:
    """Return a table with all columns that are declared today; rows from before a column existed hold NULL in it."""
    rows = lakehouse.read(table.name, version)
    declared = [F.col(f.name) if f.name in rows.columns else typed_null(f) for f in table.schema]
    return rows.select(*declared, *(name for name in rows.columns if name not in table.schema.names))


@contextmanager
def _named_view(df: DataFrame) -> Iterator[str]:
    """Give SQL of the frame's session a name for the frame, for the block."""
    name = f"bp_spark_{uuid.uuid4().hex}"
    df.createOrReplaceTempView(name)
    try:
        yield name
    finally:
        df.sparkSession.catalog.dropTempView(name)
