"""Any CSV, JSON, Parquet or Delta that a platform has, described by a YAML mapping -> the raw contract.

In: a mapping file in the language of :mod:`bp_spark.ingest.sources.mapping`, and the files that it names. Out: what
:mod:`bp_spark.ingest.sources.contract` asks of a source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Any, cast

from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.spark_errors import SPARK_ERRORS
from bp_spark.core.stores import UNREACHABLE
from bp_spark.ingest.sources.contract import SNAPSHOT, Delivery, OnUnreadable, in_contract, refuse
from bp_spark.ingest.sources.fields import file_path, partitions_of, require_columns, with_fields
from bp_spark.ingest.sources.grammar import patterns_of
from bp_spark.ingest.sources.heads import first_line, parquet_layout, require_utf8, with_nanoseconds
from bp_spark.ingest.sources.lines import CORRUPT, csv_rows, head, json_rows, names_in_header, one_row
from bp_spark.ingest.sources.mapping import ColumnRule, DayRule, TableMapping, TimeRule, load_mapping
from bp_spark.ingest.sources.selection import BELONGS, FileCounts, file_counts, with_selection
from bp_spark.ingest.sources.times import RuleError
from bp_spark.ingest.sources.totals import shared
from bp_spark.ingest.sources.values import rows_in_contract

MAX_CHARACTERS = 20_000_000
"""Most characters of one CSV value: a quote that isn't closed would make one value of the rest of the file."""
_CHARSET = re.compile(r"\[INVALID_PARAMETER_VALUE\.CHARSET\].*but got (\S+?)\.? ")
_DAMAGED = re.compile("FAILED_READ_FILE|CANNOT_READ_FILE_FOOTER")
_NO_TABLE = ("PATH_NOT_FOUND", "DELTA_PATH_DOES_NOT_EXIST", "DELTA_TABLE_NOT_FOUND", "DELTA_MISSING_DELTA_TABLE")


class FilesSource:
    """Files or Delta tables as a mapping describes them.

    A delivery is a file. Its name is the path from the mapping's folder, or its address where it lies elsewhere. A Delta table
    delivers the files of its newest version: rewritten rows come in a new file, removed rows are not read.

    Args:
        mapping: the YAML file; see :mod:`bp_spark.ingest.sources.mapping` for its language.

    Raises:
        ConfigError: the mapping can't be read, has an unknown key or lacks a mandatory one.

    With ``shop.yaml`` as ``transactions: {path: "*.csv", format: csv, columns: {user_id: who, ts: at, amount: paid}}`` beside a
    file ``day1.csv`` of two lines, ``who,at,paid`` and ``007,2024-05-01 09:30:00,12.50``::

        source = FilesSource("shop.yaml")
        deliveries = source.deliveries(spark)             # [Delivery("raw_transactions", "day1.csv", "42-1714556000000")]
        source.read(spark, deliveries)["raw_transactions"]  # one row: user_id "007", ts 09:30 UTC, amount 12.50
    """

    def __init__(self, mapping: str | Path) -> None:
        self.timezone, self.tables = load_mapping(Path(mapping))
        self.name = str(mapping)
        # the mapping lies on this machine, whatever file system a cluster has as its default
        self.folder = f"file:{Path(mapping).resolve().parent.as_posix().rstrip('/')}/"

    def deliveries(self, spark: SparkSession) -> list[Delivery]:
        """Return the files that exist now, by table and name. Only names, sizes and times of change are read.

        Raises:
            DataError: no file of transactions; a folder that can't be listed.
        """
        deliveries: list[Delivery] = []
        for table, mapping in self.tables.items():
            with _readable(mapping.path):
                files = self._active(spark, mapping) if mapping.format == "delta" else self._matching(spark, mapping)
            if not files and table == "raw_transactions":
                raise DataError(self.name, f"has no file of transactions: {mapping.path!r} matches no {mapping.format}")
            deliveries += [Delivery(table, path.removeprefix(self.folder), mark) for path, mark in files]
        return sorted(deliveries)

    def snapshots(self) -> dict[str, str]:
        """Return raw table -> beginning of the names of its files, for the Delta tables of the mapping."""
        return {
            table: self._address(mapping.path).removeprefix(self.folder).rstrip("/") + "/"
            for table, mapping in self.tables.items()
            if mapping.format == "delta"
        }

    def read(
        self, spark: SparkSession, deliveries: Sequence[Delivery], on_unreadable: OnUnreadable = refuse
    ) -> dict[str, DataFrame]:
        """Return the rows of these deliveries by raw table. Of the files, only headers and schemas are read now.

        A text with an offset, and an instant of Parquet or Delta, is taken as it is. Any other time is wall-clock time in the
        zone of the column, else of the table, else of the mapping. A wall-clock time that the zone skips in spring counts from
        the offset before the change (02:30 is 03:30). A time that occurs twice in autumn is the first of the two.

        Numbers are rounded to their column's type. An id that Parquet or Delta store as a whole double loses its ``.0``.

        Args:
            spark: session to read with.
            deliveries: some of :meth:`deliveries`.
            on_unreadable: called with each file that can't be read, or lacks a column that the mapping names (in JSON a
                missing key is a NULL). By default it raises the error.

        Raises:
            DataError: a delivery is of no table of the mapping; a Delta table can't be read; or by ``on_unreadable``.
            ConfigError: a format is no pattern of Spark; a number is mapped to a time without a unit.
        """
        return {
            table: self._read(spark, table, by_name, on_unreadable)
            for table, by_name in self._by_name(deliveries).items()
        }

    def counts(
        self,
        spark: SparkSession,
        deliveries: Sequence[Delivery],
        on_unreadable: OnUnreadable = refuse,
        rows: int | None = None,
    ) -> dict[str, FileCounts]:
        """Return what :meth:`read` doesn't show, by raw table. Rows are read for it once more.

        Args:
            spark: session to read with.
            deliveries: as for :meth:`read`.
            on_unreadable: as for :meth:`read`.
            rows: most rows to read of files with the same columns; by default all.

        Raises:
            DataError: as :meth:`read` does.
            ConfigError: as :meth:`read` does.
        """
        counts: dict[str, FileCounts] = {}
        for table, by_name in self._by_name(deliveries).items():
            total = FileCounts(0, 0, {})
            for df in self._frames(spark, table, by_name, on_unreadable):
                sample = df if rows is None else df.limit(rows)
                total += file_counts(self._selected(sample, table), self.tables[table])
            counts[table] = total
        return counts

    def _by_name(self, deliveries: Sequence[Delivery]) -> dict[str, dict[str, Delivery]]:
        """Return table -> name -> delivery, sorted."""
        by_table: dict[str, dict[str, Delivery]] = {}
        for delivery in sorted(deliveries):
            if delivery.table not in self.tables:
                raise DataError(self.name, f"has no table {delivery.table}, to which delivery {delivery.name} belongs")
            by_table.setdefault(delivery.table, {})[delivery.name] = delivery
        return by_table

    def _address(self, path: str) -> str:
        return path if re.match(r"^([A-Za-z][\w+.-]*:)?/", path) else self.folder + path

    def _matching(self, spark: SparkSession, mapping: TableMapping) -> list[tuple[str, str]]:
        """Return address and fingerprint of the files that the mapping's path matches."""
        is_relative = self._address(mapping.path) != mapping.path
        return _listed(spark, _literal(self.folder) + mapping.path if is_relative else mapping.path)

    def _active(self, spark: SparkSession, mapping: TableMapping) -> list[tuple[str, str]]:
        """Return address and fingerprint of the files of a Delta table's newest version."""
        address = self._address(mapping.path)
        try:
            df = _reader(spark, mapping).load(address)
            files = df.inputFiles()
        except AnalysisException as error:
            if error.getCondition() not in _NO_TABLE:
                raise
            return []
        quoted = address.replace("`", "``")
        features = spark.sql(f"DESCRIBE DETAIL delta.`{quoted}`").select("tableFeatures").collect()[0][0]
        if "deletionVectors" not in (features or ()):
            # such a file never changes
            return [(path, SNAPSHOT) for path in files]
        # a deletion vector takes rows out of a file that stays
        rows_left = {row["path"]: row["count"] for row in df.groupBy(file_path().alias("path")).count().collect()}
        return [(path, f"{SNAPSHOT}-{rows_left.get(path, 0)}") for path in files]

    def _read(
        self, spark: SparkSession, table: str, by_name: dict[str, Delivery], on_unreadable: OnUnreadable
    ) -> DataFrame:
        frames = [self._rows(df, table) for df in self._frames(spark, table, by_name, on_unreadable)]
        return reduce(DataFrame.unionByName, frames) if frames else in_contract(spark.range(0).toDF("nothing"), table)

    def _frames(
        self, spark: SparkSession, table: str, by_name: dict[str, Delivery], on_unreadable: OnUnreadable
    ) -> list[DataFrame]:
        """Return the rows of files as the platform has them, in a frame for all files with the same columns."""

        def leave(name: str, error: DataError) -> None:
            on_unreadable(by_name[name], error)

        mapping = self.tables[table]
        self._check_patterns(spark, table)
        if mapping.format == "delta":
            try:
                with _readable(mapping.path):
                    df = _reader(spark, mapping).load(self._address(mapping.path))
                    schema = df.schema
                require_columns(schema, mapping, mapping.path)
            except DataError as error:
                for name in by_name:
                    leave(name, error)
                return []
            return [with_fields(df, mapping, {}).filter(self._delivery().isin(*by_name))]
        by_layout: dict[str, list[str]] = {}
        for name in by_name:
            try:
                require_utf8(mapping, name, self._address(name))
                with _readable(name):
                    layout = _layout(spark, mapping, self._address(name))
            except DataError as error:
                leave(name, error)
                continue
            if layout:
                by_layout.setdefault(f"{layout} {sorted(self._partitions(mapping, name))}", []).append(name)
        frames = (self._load_readable(spark, mapping, names, leave) for names in by_layout.values())
        return [df for df in frames if df is not None]

    def _partitions(self, mapping: TableMapping, name: str) -> dict[str, str]:
        """Return the names of the mapping that stand in a file's path."""
        partitions = partitions_of(self._address(name))
        return {key: written for key, written in partitions.items() if key in mapping.platform_columns}

    def _load_readable(
        self, spark: SparkSession, mapping: TableMapping, names: Sequence[str], leave: Callable[[str, DataError], None]
    ) -> DataFrame | None:
        """Return the rows of files with the same columns, without those that can't be read."""
        while names:
            try:
                return self._load(spark, mapping, names)
            except DataError as error:
                # these files lack the same columns; for other problems only the first was looked into
                unreadable = len(names) if error.column else 1
                for name in names[:unreadable]:
                    leave(name, DataError(name, error.rule, column=error.column))
                names = names[unreadable:]
        return None

    def _load(self, spark: SparkSession, mapping: TableMapping, names: Sequence[str]) -> DataFrame:
        """Return the rows of files with the same columns."""
        addresses = [_literal(self._address(name)) for name in names]
        partitions = self._partitions(mapping, names[0])
        reader = _reader(spark, mapping)
        with _readable(names[0]):
            if mapping.format == "json":
                return with_fields(json_rows(spark, mapping, addresses), mapping, partitions)
            skipped = set[str]()
            if mapping.format == "parquet":
                df = with_nanoseconds(reader.load(addresses), self._address(names[0]))
                schema = df.schema
            elif mapping.skip_lines:
                schema, skipped = self._after_skipped(spark, mapping, names)
                df = csv_rows(reader.options(header=False), mapping, schema.names, addresses, skipped)
            else:
                schema = _schema_of(spark, mapping, self._address(names[0]))
                df = csv_rows(reader, mapping, schema.names, addresses)
        require_columns(schema, mapping, names[0], partitions)
        return with_fields(df, mapping, partitions)

    def _after_skipped(
        self, spark: SparkSession, mapping: TableMapping, names: Sequence[str]
    ) -> tuple[T.StructType, set[str]]:
        """Return the columns that the line after skipped ones names, and the lines of all files that are no rows."""
        heads = [head(spark, mapping, self._address(name)) for name in names]
        try:
            columns = names_in_header(mapping, heads[0][-1])
        except ValueError as error:
            raise DataError(names[0], str(error)) from None
        skipped = {line for lines in heads for line in (lines if mapping.has_header else lines[:-1])}
        return T.StructType([T.StructField(column, T.StringType()) for column in columns]), skipped

    def _selected(self, df: DataFrame, table: str) -> DataFrame:
        try:
            return with_selection(df, self.tables[table])
        except ValueError as error:
            raise ConfigError(f"{self.name}: {table.removeprefix('raw_')}.where: {error}") from None

    def _rows(self, df: DataFrame, table: str) -> DataFrame:
        mapping = self.tables[table]
        if mapping.selects:
            df = self._selected(df, table).filter(BELONGS)
        try:
            rows = rows_in_contract(df, table, mapping, self.timezone, self._delivery())
        except RuleError as error:
            raise ConfigError(f"{self.name}: {_key(table, error.name)}: {error}") from None
        return shared(rows, mapping.totals) if mapping.totals else rows

    def _delivery(self) -> Column:
        """Return the name of the delivery that a row came from, as :meth:`deliveries` gives it."""
        path = file_path()
        within = path.substr(F.lit(len(self.folder) + 1), F.length(path))
        return F.when(path.startswith(F.lit(self.folder)), within).otherwise(path)

    def _check_patterns(self, spark: SparkSession, table: str) -> None:
        """Require patterns of times that Spark knows, and regular expressions that Java knows."""
        mapping = self.tables[table]
        for name, rule in mapping.columns:
            if isinstance(rule, TimeRule | DayRule) and rule.format:
                self._require_known(
                    spark, f"{_key(table, name)}.format", F.try_to_timestamp("nothing", F.lit(rule.format)), rule.format
                )
        expressions = {f"{table.removeprefix('raw_')}.where": mapping.where}
        expressions |= {
            f"{_key(table, name)}.expr": rule.expr for name, rule in mapping.columns if isinstance(rule, ColumnRule)
        }
        for key, text in expressions.items():
            for pattern in patterns_of(text) if text else ():
                self._require_known(spark, key, F.rlike("nothing", F.lit(pattern)), pattern)

    def _require_known(self, spark: SparkSession, key: str, use: Column, pattern: str) -> None:
        try:
            one_row(spark).select(use).collect()
        except PySparkException as error:
            raise ConfigError(f"{self.name}: {key}: {pattern!r} is no pattern of Spark") from error


def _key(table: str, column: str) -> str:
    """Return the key of a column in the mapping file."""
    return f"{table.removeprefix('raw_')}.columns.{column}"


def _reader(spark: SparkSession, mapping: TableMapping) -> Any:
    # a cluster may be set to drop the rows of damaged files silently
    reader = spark.read.format(mapping.format).option("ignoreCorruptFiles", False)
    if mapping.format == "csv":
        quote = mapping.reader_options.get("quote", '"')
        reader = reader.options(header=True, escape=quote, multiLine=True, maxCharsPerColumn=MAX_CHARACTERS)
        # with pruning Spark checks the number of fields only where all columns are asked for
        reader = reader.options(mode="PERMISSIVE", columnPruning=False, columnNameOfCorruptRecord=CORRUPT)
    return reader.options(**mapping.options)


def _layout(spark: SparkSession, mapping: TableMapping, address: str) -> str:
    """Return the same text for files with the same columns, "" for an empty file; only head or footer is read."""
    if mapping.format == "json":
        return "json"
    with suppress(*UNREACHABLE):
        if mapping.format == "parquet":
            return parquet_layout(address)
        if mapping.skip_lines:
            lines = head(spark, mapping, address)
            return lines[-1] if len(lines) > mapping.skip_lines else ""
        if mapping.has_header:
            return first_line(address)
    # no header, or a file that Spark alone can reach
    return str(_schema_of(spark, mapping, address).simpleString())


def _schema_of(spark: SparkSession, mapping: TableMapping, address: str) -> T.StructType:
    """Return columns and types of one file."""
    reader, literal = _reader(spark, mapping), _literal(address)
    if mapping.format == "csv" and literal != address:
        # to find a header of several lines Spark would take the name for a pattern once more
        reader = reader.options(multiLine=False)
    return cast(T.StructType, reader.load(literal).schema)


def _listed(spark: SparkSession, pattern: str) -> list[tuple[str, str]]:
    """Return address and fingerprint of the files that match, with those in matching folders.

    Spark lists them, because it reaches every store.
    """
    files = spark.read.format("binaryFile").option("recursiveFileLookup", True)
    changed = F.unix_millis("modificationTime").alias("changed")
    try:
        rows = files.load(pattern).select("path", "length", changed).collect()
    except AnalysisException as error:
        if error.getCondition() != "PATH_NOT_FOUND":
            raise
        return []
    depth = pattern.count("/")
    # Spark can't be made to read hidden files
    return [
        (row["path"], f"{row['length']}-{row['changed']}")
        for row in rows
        if not any(part.startswith(("_", ".")) for part in row["path"].split("/")[depth:])
    ]


def _literal(path: str) -> str:
    """Return a path as a glob that matches itself only."""
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", path)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn an error of Spark into a DataError about ``name``."""
    try:
        yield
    except SPARK_ERRORS as error:
        problem = _problem(error)
        raise DataError(name, f"can't be read: {problem}") from error


def _problem(error: Exception) -> str:
    """Return the reason of an error of Spark. Only errors of analysis are quoted: others may hold values of rows."""
    text = str(error)
    if encoding := _CHARSET.search(text):
        return f"Java doesn't know the encoding {encoding[1]}: name another one in options: {{encoding: ...}}"
    if _DAMAGED.search(text):
        return "it is damaged, cut short or of another format"
    if isinstance(error, AnalysisException):
        # the first line of a file without a header is a row, and Spark takes its values for names
        two = "two of its columns have the same name" if error.getCondition() == "COLUMN_ALREADY_EXISTS" else None
        return two or text.splitlines()[0]
    if isinstance(error, Py4JJavaError):
        return f"Spark ends with {error.java_exception.getClass().getName()}"
    condition = error.getCondition() if isinstance(error, PySparkException) else None
    return f"Spark ends with {condition or type(error).__name__}"
