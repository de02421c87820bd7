"""Any CSV, JSON, Parquet or Delta that a platform has, described by a YAML mapping -> the raw contract.

In: a mapping file in the language of :mod:`bp_spark.ingest.sources.mapping`, and the files that it names. Out: what
:mod:`bp_spark.ingest.sources.contract` asks of a source.
"""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.spark_errors import SPARK_ERRORS
from bp_spark.core.stores import UNREACHABLE, file_system
from bp_spark.ingest.sources.contract import Delivery, OnUnreadable, in_contract, refuse
from bp_spark.ingest.sources.lines import CORRUPT, csv_rows, json_rows, one_row
from bp_spark.ingest.sources.mapping import DayRule, TableMapping, TimeRule, load_mapping
from bp_spark.ingest.sources.values import RuleError, rows_in_contract

MAX_CHARACTERS = 20_000_000
"""Most characters of one CSV value: a quote that isn't closed would make one value of the rest of the file."""
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
        by_table: dict[str, dict[str, Delivery]] = {}
        for delivery in deliveries:
            if delivery.table not in self.tables:
                raise DataError(self.name, f"has no table {delivery.table}, to which delivery {delivery.name} belongs")
            by_table.setdefault(delivery.table, {})[delivery.name] = delivery

        def rows(table: str, by_name: dict[str, Delivery]) -> DataFrame:
            def leave(name: str, error: DataError) -> None:
                on_unreadable(by_name[name], error)

            return self._read(spark, table, sorted(by_name), leave)

        return {table: rows(table, by_name) for table, by_name in by_table.items()}

    def _address(self, path: str) -> str:
        return path if re.match(r"^([A-Za-z][\w+.-]*:)?/", path) else self.folder + path

    def _matching(self, spark: SparkSession, mapping: TableMapping) -> list[tuple[str, str]]:
        """Return address and fingerprint of the files that the mapping's path matches."""
        is_relative = self._address(mapping.path) != mapping.path
        return _listed(spark, _literal(self.folder) + mapping.path if is_relative else mapping.path)

    def _active(self, spark: SparkSession, mapping: TableMapping) -> list[tuple[str, str]]:
        """Return address and fingerprint of the files of a Delta table's newest version."""
        try:
            files = _reader(spark, mapping).load(self._address(mapping.path)).inputFiles()
        except AnalysisException as error:
            if error.getCondition() not in _NO_TABLE:
                raise
            return []
        # a data file of Delta never changes
        return [(path, "delta") for path in files]

    def _read(
        self, spark: SparkSession, table: str, names: list[str], leave: Callable[[str, DataError], None]
    ) -> DataFrame:
        mapping = self.tables[table]
        self._check_formats(spark, table)
        if mapping.format == "delta":
            try:
                with _readable(mapping.path):
                    df = _reader(spark, mapping).load(self._address(mapping.path))
                    columns = df.columns
                _require_columns(columns, mapping, mapping.path)
            except DataError as error:
                for name in names:
                    leave(name, error)
                return in_contract(spark.range(0).toDF("nothing"), table)
            return self._rows(df, table).filter(F.col("delivery").isin(names))
        by_layout: dict[str, list[str]] = {}
        for name in names:
            try:
                with _readable(name):
                    by_layout.setdefault(_layout(spark, mapping, self._address(name)), []).append(name)
            except DataError as error:
                leave(name, error)
        by_layout.pop("", None)
        loaded = (self._load_readable(spark, mapping, files, leave) for files in by_layout.values())
        frames = [self._rows(df, table) for df in loaded if df is not None]
        return reduce(DataFrame.unionByName, frames) if frames else in_contract(spark.range(0).toDF("nothing"), table)

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
        reader = _reader(spark, mapping)
        with _readable(names[0]):
            if mapping.format == "json":
                return json_rows(spark, mapping, addresses)
            if mapping.format == "parquet":
                df = reader.load(addresses)
                columns = df.columns
            else:
                columns = _schema_of(spark, mapping, self._address(names[0])).names
                df = csv_rows(reader, mapping, columns, addresses)
        _require_columns(columns, mapping, names[0])
        return cast(DataFrame, df)

    def _rows(self, df: DataFrame, table: str) -> DataFrame:
        try:
            return rows_in_contract(df, table, self.tables[table], self.timezone, self._delivery())
        except RuleError as error:
            raise ConfigError(f"{self.name}: {_key(table, error.name)}: {error}") from None

    def _delivery(self) -> Column:
        """Return the name of the delivery that a row came from, as :meth:`deliveries` gives it."""
        # Spark escapes the path as an address; a plus stands for itself there, but is a space to url_decode
        path = F.url_decode(F.replace(F.col("_metadata.file_path"), F.lit("+"), F.lit("%2B")))
        within = path.substr(F.lit(len(self.folder) + 1), F.length(path))
        return F.when(path.startswith(F.lit(self.folder)), within).otherwise(path)

    def _check_formats(self, spark: SparkSession, table: str) -> None:
        for name, rule in self.tables[table].columns:
            if isinstance(rule, TimeRule | DayRule) and rule.format:
                try:
                    one_row(spark).select(F.try_to_timestamp("nothing", F.lit(rule.format))).collect()
                except PySparkException as error:
                    raise ConfigError(
                        f"{self.name}: {_key(table, name)}.format: {rule.format!r} is no pattern of Spark"
                    ) from error


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
            return _parquet_schema(address)
        if mapping.has_header:
            return _first_line(address)
    # no header, or a file that Spark alone can reach
    return str(_schema_of(spark, mapping, address).simpleString())


def _schema_of(spark: SparkSession, mapping: TableMapping, address: str) -> T.StructType:
    """Return columns and types of one file."""
    reader, literal = _reader(spark, mapping), _literal(address)
    if mapping.format == "csv" and literal != address:
        # to find a header of several lines Spark would take the name for a pattern once more
        reader = reader.options(multiLine=False)
    return cast(T.StructType, reader.load(literal).schema)


def _require_columns(columns: Sequence[str], mapping: TableMapping, file: str) -> None:
    """Raise a DataError for a column that the mapping names and the file lacks.

    The first line of a CSV file without a header is a user's row. So the message quotes it only where the line names a column
    of the mapping.
    """
    mapped = mapping.platform_columns
    missing = sorted(mapped.difference(columns))
    if not missing:
        return
    if mapping.format == "csv" and mapping.has_header and len(missing) == len(mapped):
        problem = (
            f"column is missing, and so are all others of the mapping; the first line has {len(columns)} fields between "
            f"{mapping.separator!r}. For another separator set options: {{sep: ...}}; for a file without a header options: "
            "{header: false}, and name its columns _c0, _c1, ..."
        )
    else:
        close = difflib.get_close_matches(missing[0], columns, n=1)
        problem = f"column is missing; there are {', '.join(map(repr, columns))}" + (
            f"; did you mean {close[0]!r}?" if close else ""
        )
    raise DataError(file, problem, column=missing[0])


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


def _first_line(address: str) -> str:
    """Return the first line that is not blank; its bytes aren't decoded, so the text is good for comparing only."""
    files, path = file_system(address)
    with files.open_input_stream(path) as stream:
        for line in io.TextIOWrapper(stream, "ISO-8859-1"):
            if line.count('"') % 2:
                raise ValueError("a name of a column may go on in the next line")
            if line.strip():
                return line.rstrip("\n")
    return ""


def _parquet_schema(address: str) -> str:
    """Return columns and types of a file, without the first line, which names an object of this process."""
    files, path = file_system(address)
    with files.open_input_file(path) as file:
        return str(pq.ParquetFile(file).schema).partition("\n")[2]


def _literal(path: str) -> str:
    """Return a path as a glob that matches itself only."""
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", path)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn an error of Spark into a DataError about ``name``."""
    try:
        yield
    except SPARK_ERRORS as error:
        cause = error.java_exception.toString() if isinstance(error, Py4JJavaError) else str(error)
        problem = (
            "it is damaged, cut short or of another format" if _DAMAGED.search(str(error)) else cause.splitlines()[0]
        )
        raise DataError(name, f"can't be read: {problem}") from error
