"""Any CSV, JSON, Parquet or Delta that a platform has, described by a YAML mapping -> the raw contract.

In: a mapping file, and the files that it names. Out: what :mod:`bp_spark.ingest.sources.contract` asks of a source.

A mapping, with all that it may say (only ``transactions`` must be there)::

    timezone: UTC                # zone of times that carry no offset; UTC unless told
    transactions:                # also behaviours, searches, reviews, items, users, rates
      path: "orders/*.csv"       # glob: from this file's folder, absolute, or an object store's address
      format: csv                # csv, json, parquet, delta
      options: {sep: ";"}        # of Spark's reader; in CSV a header, doubled quotes and quoted line breaks are the defaults
      timezone: Asia/Shanghai    # of this table
      columns:
        user_id: customer                                      # column of the contract: column of the platform
        order_id: {column: number, lower: true, valid: ["NA"]} # in lower case; texts that are ids though they look like none
        ts: {column: time, format: "yyyy/MM/dd HH:mm"}         # or unit: s, ms, us for an epoch; timezone, too
        amount: {column: paid, decimal: ",", thousands: "."}   # and symbol: "€", negative: trailing (parentheses), round: true
        quantity: {value: 1}                                   # the same in all rows
    behaviours:
      path: clicks.parquet
      format: parquet
      columns:
        user_id: uid
        ts: at
        action: {column: event, values: {view: browse, pv: browse}}   # values not listed stay as they are
    users:
      path: users.json
      format: json
      columns: {user_id: id, segment: {columns: {age: age_bracket, income: income_bracket}}}

Types are never guessed: a value that is not of its column's type becomes NULL and its text stays in ``unreadable``, where a
line that can't be taken apart stays whole, as ``row``. In CSV that is a line with too many or too few fields, and one with a
quote that isn't closed, with all lines up to the next quote that could close it. Blank text is NULL.

Ids are texts without surrounding blanks, and a whole number is the same id with and without ``.0``. ``nan``, ``null``, ``NA``,
``\\N`` and the like are no ids, nor are ``0``, ``-1`` and JSON objects ids of users, unless ``valid`` lists them.

Money is a number with a decimal point and no other mark unless the mapping describes them. An amount or discount with more
decimals than are kept is unreadable, unless ``round`` is set, and so is ``1.234`` in a text while ``decimal`` isn't given.

A CSV file is read by one task, because a quoted value may have line breaks; ``options: {multiLine: false}`` says that none
has, and large files are read in parallel. An encoding that is not a Unicode one (``options: {encoding: GBK}``) needs Spark's
setting ``spark.sql.legacy.javaCharsets=true``. Files whose names start with ``_`` or ``.`` are no deliveries. A path may be a
folder: all files in it are meant.
"""

from __future__ import annotations

import difflib
import io
import re
import uuid
import zoneinfo
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import pyarrow.parquet as pq
from py4j.protocol import Py4JJavaError
from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from bp_spark.core.config import Section, parse_yaml
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.spark_errors import SPARK_ERRORS
from bp_spark.core.stores import UNREACHABLE, file_system
from bp_spark.ingest.sources.contract import BLANKS, RAW, THOUSAND, Delivery, in_contract, text_map
from bp_spark.lakehouse.tables import Table

REQUIRED = {
    "raw_transactions": ("user_id", "ts", "amount"),
    "raw_behaviours": ("user_id", "ts", "action"),
    "raw_searches": ("user_id", "ts", "query"),
    "raw_reviews": ("user_id", "ts"),
    "raw_items": ("item_id",),
    "raw_users": ("user_id",),
    "raw_rates": ("currency", "day", "rate"),
}
CORRUPT = "_bp_spark_corrupt"
SPARE_FIELDS = 50
"""Columns that a CSV file is read with beyond its own: see :func:`_csv_rows`."""
MAX_CHARACTERS = 20_000_000
"""Of one CSV value: a quote that isn't closed would make one value of the rest of the file, whatever its size."""
MICROS = {"s": 1_000_000, "ms": 1_000, "us": 1}
DATE_AND_TIME = r"^\d{4}-\d\d?-\d\d?([T ]\d\d?:\d\d?(:\d\d?(\.\d+)?)?"
_NO_TABLE = ("PATH_NOT_FOUND", "DELTA_PATH_DOES_NOT_EXIST", "DELTA_TABLE_NOT_FOUND", "DELTA_MISSING_DELTA_TABLE")
NO_IDS = ("nan", "null", "none", "nil", "undefined", "na", "n/a", "#n/a", "<na>", "\\n")
"""What programs write where there is no id, in lower case."""
NO_USERS = ("0", "-1")
"""What shops write for guests."""
SCALE = 2
"""Decimals of money."""
_NOISE = 1e-6
ZONE_LETTERS = "[VzOXxZ]"


def _zone(name: str) -> str:
    if not re.fullmatch(r"[+-]\d\d:\d\d", name) and name not in zoneinfo.available_timezones():
        raise ValueError("must be a time zone such as Asia/Shanghai or +08:00")
    return name


OPTIONS = {
    "csv": (
        *("sep", "delimiter", "quote", "escape", "header", "encoding", "charset", "multiLine", "lineSep", "nullValue"),
        *("emptyValue", "ignoreLeadingWhiteSpace", "ignoreTrailingWhiteSpace", "maxColumns", "maxCharsPerColumn"),
    ),
    "json": (
        *("encoding", "multiLine", "lineSep", "allowSingleQuotes", "allowUnquotedFieldNames", "allowNonNumericNumbers"),
        *("allowNumericLeadingZeros", "allowBackslashEscapingAnyCharacter", "allowUnquotedControlChars"),
    ),
    "parquet": ("datetimeRebaseMode", "int96RebaseMode"),
    "delta": ("versionAsOf", "timestampAsOf"),
}
"""Options of Spark's readers that a mapping may set: no row may vanish by one, and no type be guessed."""
_STORES = "fs."
"""Options of object stores begin so."""


def _require_allowed(options: Iterable[str], kind: str) -> None:
    allowed = {name.lower() for name in OPTIONS[kind]}
    for name in options:
        if name.lower() not in allowed and not name.startswith(_STORES):
            close = difflib.get_close_matches(name, OPTIONS[kind], n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(
                f"{name} can't be set, for no row may vanish and no type be guessed; {hint}{kind} takes "
                f"{', '.join(OPTIONS[kind])}"
            )


Zone = Annotated[str, AfterValidator(_zone)]
Scalar = str | bool | int | float


class Given(Section):
    """Where a column comes from; a bare name stands for ``{column: name}``."""

    column: str | None = None
    value: Scalar | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> Given:
        if (self.column is None) == (self.value is None):
            raise ValueError("needs either column or value")
        return self


class Plain(Given):
    """A text or a number."""

    values: dict[str, str] = Field(default_factory=dict)
    """Value of the platform -> value of the contract."""


class Id(Plain):
    """An id: NULL where the text stands for none."""

    lower: bool = False
    """Ids that differ in case only are the same."""
    valid: tuple[str, ...] = ()
    """Texts that are ids though they are among :data:`NO_IDS` or :data:`NO_USERS`."""


class Money(Plain):
    """A number, with the marks that its text has: ``1.234,50-`` is of ``decimal: ",", thousands: ".", negative: trailing``."""

    decimal: Literal[".", ","] | None = None
    """A point where it isn't given; given, ``1.234`` is no longer taken for a thousand with a mark."""
    thousands: Literal[",", ".", "'", " ", "\u00a0"] | None = None
    symbol: str | None = Field(None, pattern=r"^[^\d()+-]+$")
    """What may stand before or after the number, as ``€`` or ``EUR``."""
    negative: Literal["leading", "trailing", "parentheses"] = "leading"
    round: bool = False
    """More decimals than are kept are rounded away."""

    @model_validator(mode="after")
    def _two_marks(self) -> Money:
        if self.thousands == (self.decimal or "."):
            raise ValueError("decimal and thousands must be two marks")
        return self


class Day(Given):
    """A date without a time: no zone."""

    format: str | None = None


class Time(Given):
    """A time: ``format`` of a text (ISO 8601 without), or ``unit`` of an epoch."""

    format: str | None = None
    unit: Literal["s", "ms", "us"] | None = None
    timezone: Zone | None = None

    @model_validator(mode="after")
    def _text_or_epoch(self) -> Time:
        if self.format and self.unit:
            raise ValueError("has a format (of texts) or a unit (of epochs), not both")
        return self


class Segments(Section):
    """Segment name -> column of the platform."""

    columns: dict[str, str] = Field(min_length=1)


class TableMapping(Section):
    """Where a raw table comes from."""

    path: str
    format: Literal["csv", "json", "parquet", "delta"]
    options: dict[str, Scalar] = Field(default_factory=dict)
    timezone: Zone | None = None
    columns: Section

    @field_validator("options")
    @classmethod
    def _harmless(cls, options: dict[str, Scalar], info: ValidationInfo) -> dict[str, Scalar]:
        if "format" in info.data:
            _require_allowed(options, info.data["format"])
        return options


KIND_OF_RULE = {"timestamp": Time, "date": Day, "map<string,string>": Segments}


def _model(table: Table) -> Any:
    """TableMapping with the columns of a raw table, those of REQUIRED mandatory."""
    fields: dict[str, Any] = {}
    for column in table.columns:
        if column.name not in ("delivery", "unreadable"):
            kind = Money if column.type.startswith("decimal") else KIND_OF_RULE.get(column.type, Plain)
            rule: Any = Id if column.name.endswith("_id") else kind
            fields[column.name] = (rule, ...) if column.name in REQUIRED[table.name] else (rule | None, None)
    columns = create_model(f"{table.name}_columns", __base__=Section, **fields)
    return create_model(table.name, __base__=TableMapping, columns=(columns, ...))


MODELS = {name.removeprefix("raw_"): _model(table) for name, table in RAW.items()}
_FIELDS: dict[str, Any] = {name: (model | None, None) for name, model in MODELS.items()}
_FIELDS |= {"timezone": (Zone, "UTC"), "transactions": (MODELS["transactions"], ...)}
MAPPING: Any = create_model("mapping", __base__=Section, **_FIELDS)


class FilesSource:
    """Files or Delta tables as a mapping describes them.

    A delivery is a file: its name is the path from the mapping's folder, or its address where it lies elsewhere. A Delta table
    delivers the files of its newest version; rewritten rows come in a new file, removed ones are not read.

    Args:
        mapping: the YAML file; see the module for what it says.

    Raises:
        ConfigError: the mapping can't be read, has an unknown key or lacks a mandatory one.

    With ``shop.yaml`` as ``transactions: {path: "*.csv", format: csv, columns: {user_id: who, ts: at, amount: paid}}`` beside a
    file ``day1.csv`` of two lines, ``who,at,paid`` and ``007,2024-05-01 09:30:00,12.50``::

        source = FilesSource("shop.yaml")
        found = source.deliveries(spark)             # [Delivery("raw_transactions", "day1.csv", "42-1714556000000")]
        source.read(spark, found)["raw_transactions"]  # one row: user_id "007", ts 09:30 UTC, amount 12.50
    """

    def __init__(self, mapping: str | Path) -> None:
        loaded = _load(Path(mapping))
        self.timezone: str = loaded.pop("timezone")
        self.tables: dict[str, TableMapping] = {f"raw_{name}": found for name, found in loaded.items() if found}
        self.name = str(mapping)
        # the mapping lies on this machine, whatever file system a cluster has as its default
        self.folder = f"file:{Path(mapping).resolve().parent.as_posix().rstrip('/')}/"

    def deliveries(self, spark: SparkSession) -> list[Delivery]:
        """The files that are there now, by table and name. Only names, sizes and times of change are read.

        Raises:
            DataError: no file of transactions; a folder that can't be listed.
        """
        found: list[Delivery] = []
        for table, mapping in self.tables.items():
            with _readable(mapping.path):
                files = self._active(spark, mapping) if mapping.format == "delta" else self._matching(spark, mapping)
            if not files and table == "raw_transactions":
                raise DataError(
                    self.name, f"nothing there for transactions: {mapping.path!r} names no {mapping.format}"
                )
            found += [Delivery(table, path.removeprefix(self.folder), mark) for path, mark in files]
        return sorted(found)

    def read(self, spark: SparkSession, deliveries: Sequence[Delivery]) -> dict[str, DataFrame]:
        """Rows of these deliveries by raw table. Of the files, only headers and schemas are read now.

        Times: text with an offset, and instants of Parquet and Delta, are taken as they are; all others are wall-clock time
        in the zone of the column, else of the table, else of the mapping. A wall-clock time that the zone skips in spring
        counts from the offset before the change (02:30 is 03:30); one that occurs twice in autumn is the first of the two.

        Numbers are rounded to their column's type. An id that Parquet or Delta hold as a whole double loses its ``.0``.

        Raises:
            DataError: a file can't be read or lacks a column that the mapping names (in JSON a missing key is a NULL).
            ConfigError: a format is no pattern of Spark; a number is mapped to a time without a unit.
        """
        names: dict[str, list[str]] = {}
        for delivery in deliveries:
            if delivery.table not in self.tables:
                raise DataError(self.name, f"has nothing for {delivery.table}, of which {delivery.name} is a delivery")
            names.setdefault(delivery.table, []).append(delivery.name)
        return {table: self._read(spark, table, sorted(files)) for table, files in names.items()}

    def _address(self, path: str) -> str:
        return path if re.match(r"^([A-Za-z][\w+.-]*:)?/", path) else self.folder + path

    def _matching(self, spark: SparkSession, mapping: TableMapping) -> list[tuple[str, str]]:
        relative = self._address(mapping.path) != mapping.path
        return _listed(spark, _literal(self.folder) + mapping.path if relative else mapping.path)

    def _active(self, spark: SparkSession, mapping: TableMapping) -> list[tuple[str, str]]:
        try:
            files = self._reader(spark, mapping).load(self._address(mapping.path)).inputFiles()
        except AnalysisException as error:
            if error.getCondition() not in _NO_TABLE:
                raise
            return []
        # a data file of Delta never changes
        return [(path, "delta") for path in files]

    def _reader(self, spark: SparkSession, mapping: TableMapping) -> Any:
        reader = spark.read.format(mapping.format)
        if mapping.format == "csv":
            quote = _lower_keys(mapping.options).get("quote", '"')
            reader = reader.options(header=True, escape=quote, multiLine=True, maxCharsPerColumn=MAX_CHARACTERS)
            # with pruning Spark checks the number of fields only where all columns are asked for
            reader = reader.options(mode="PERMISSIVE", columnPruning=False, columnNameOfCorruptRecord=CORRUPT)
        return reader.options(**mapping.options)

    def _read(self, spark: SparkSession, table: str, names: list[str]) -> DataFrame:
        mapping = self.tables[table]
        self._check_formats(spark, table)
        if mapping.format == "delta":
            with _readable(mapping.path):
                df = self._reader(spark, mapping).load(self._address(mapping.path))
                columns = df.columns
            _require(columns, mapping, mapping.path)
            return self._rows(df, table).filter(F.col("delivery").isin(names))
        alike: dict[str, list[str]] = {}
        for name in names:
            with _readable(name):
                alike.setdefault(self._layout(spark, mapping, self._address(name)), []).append(name)
        alike.pop("", None)
        frames = [self._rows(self._load(spark, mapping, group), table) for group in alike.values()]
        return reduce(DataFrame.unionByName, frames) if frames else in_contract(spark.range(0).toDF("nothing"), table)

    def _layout(self, spark: SparkSession, mapping: TableMapping, address: str) -> str:
        """The same text for files with the same columns, empty for an empty file; only its head or footer is read."""
        options = _lower_keys(mapping.options)
        if mapping.format == "json":
            return "json"
        with suppress(*UNREACHABLE):
            if mapping.format == "parquet":
                return _parquet_schema(address)
            if _has_header(options):
                return _first_line(address)
        # no header, or a file that Spark alone can reach
        return str(self._schema_of(spark, mapping, address).simpleString())

    def _schema_of(self, spark: SparkSession, mapping: TableMapping, address: str) -> T.StructType:
        """Columns and types of one file."""
        reader, literal = self._reader(spark, mapping), _literal(address)
        if mapping.format == "csv" and literal != address:
            # to find a header of several lines Spark would take the name for a pattern once more
            reader = reader.options(multiLine=False)
        return cast(T.StructType, reader.load(literal).schema)

    def _load(self, spark: SparkSession, mapping: TableMapping, names: Sequence[str]) -> DataFrame:
        """Files with the same columns."""
        addresses = [_literal(self._address(name)) for name in names]
        reader = self._reader(spark, mapping)
        with _readable(names[0]):
            if mapping.format == "json":
                return _json_rows(spark, mapping, addresses)
            if mapping.format == "parquet":
                df = reader.load(addresses)
                columns = df.columns
            else:
                columns = self._schema_of(spark, mapping, self._address(names[0])).names
                df = _csv_rows(reader, mapping, columns, addresses)
        _require(columns, mapping, names[0])
        return cast(DataFrame, df)

    def _rows(self, df: DataFrame, table: str) -> DataFrame:
        mapping = self.tables[table]
        values: dict[str, Column] = {}
        texts: dict[str, Column] = {}
        ids: dict[str, Column] = {}
        numbers: dict[str, Column] = {}
        rules: dict[str, Id] = {}
        for name, rule in mapping.columns:
            if isinstance(rule, Segments):
                pairs = [part for key, column in rule.columns.items() for part in (F.lit(key), _text(df, column))]
                values[name] = F.map_filter(F.create_map(*pairs), lambda _, value: value.isNotNull())
            elif isinstance(rule, Given):
                text = F.lit(str(rule.value)) if rule.column is None else _text(df, rule.column)
                values[name] = text
                if isinstance(rule, Plain) and rule.values:
                    values[name] = F.coalesce(F.try_element_at(_literal_map(rule.values), text), text)
                if isinstance(rule, Id) and rule.column is not None:
                    ids[name], rules[name] = values[name], rule
                    values[name] = _id(name, rule)
                    if name == "user_id":
                        nested = _is_nested(_column(f"id of {name}")) & ~_column(f"id of {name}").isin(*rule.valid)
                        values[name], texts[name] = F.when(~nested, values[name]), F.when(nested, F.lit("<nested>"))
                if isinstance(rule, Money) and rule.column is not None:
                    numbers[f"number of {name}"] = _number(values[name], rule)
                    values[name] = number = _column(f"number of {name}")
                    texts[name] = text
                    if table == "raw_transactions" and not rule.round:
                        is_text = isinstance(df.schema[rule.column].dataType, T.StringType)
                        values[name] = F.when(_is_exact(number, rule, is_text=is_text), number)
                elif isinstance(rule, Time | Day):
                    texts[name] = text
                    kind = T.StringType() if rule.column is None else df.schema[rule.column].dataType
                    zone = (rule.timezone if isinstance(rule, Time) else None) or mapping.timezone or self.timezone
                    try:
                        values[name] = _moment(rule, text, kind, zone)
                    except ValueError as error:
                        where = f"{table.removeprefix('raw_')}.columns.{name}"
                        raise ConfigError(f"{self.name}: {where}: column {rule.column} {error}") from None
        df = df.withColumns(numbers) if numbers else df
        return _shaped(_with_ids(df, ids, rules), table, values, texts, self._delivery())

    def _delivery(self) -> Column:
        """The name of the delivery that a row came from, as :meth:`deliveries` gives it."""
        # Spark escapes the path as an address; a plus stands for itself there, but is a space to url_decode
        path = F.url_decode(F.replace(F.col("_metadata.file_path"), F.lit("+"), F.lit("%2B")))
        within = path.substr(F.lit(len(self.folder) + 1), F.length(path))
        return F.when(path.startswith(F.lit(self.folder)), within).otherwise(path)

    def _check_formats(self, spark: SparkSession, table: str) -> None:
        for name, rule in self.tables[table].columns:
            if isinstance(rule, Time | Day) and rule.format:
                try:
                    _nothing(spark).select(F.try_to_timestamp("nothing", F.lit(rule.format))).collect()
                except PySparkException as error:
                    where = f"{table.removeprefix('raw_')}.columns.{name}.format"
                    raise ConfigError(f"{self.name}: {where}: {rule.format!r} is no pattern of Spark") from error


def _nothing(spark: SparkSession) -> DataFrame:
    """One row with an empty text, to try on whether Spark knows a pattern or a name."""
    return spark.sql("SELECT '' AS nothing")


def _lower_keys(options: dict[str, Any]) -> dict[str, str]:
    return {key.lower(): str(value) for key, value in options.items()}


def _has_header(options: dict[str, str]) -> bool:
    """Whether the first line of a CSV file names its columns."""
    return options.get("header", "true").lower() == "true"


def _separator(options: dict[str, str]) -> str:
    """What parts the fields of a CSV file, as the mapping writes it."""
    return options.get("sep", options.get("delimiter", ","))


def _csv_rows(reader: Any, mapping: TableMapping, columns: Sequence[str], addresses: list[str]) -> DataFrame:
    """Rows of CSV files with the same columns; a record that is no row of these columns stays whole as CORRUPT.

    Spark's reader takes what follows an open quote for a value, be it the rest of the file, and says nothing. So each record's
    own text is looked at. Spark gives it for records with another number of fields than columns: all have, by SPARE_FIELDS.
    """
    spare = [f"{CORRUPT}_{number}" for number in range(SPARE_FIELDS)]
    fields = [T.StructField(name, T.StringType()) for name in (*columns, *spare, CORRUPT)]
    record = F.col(CORRUPT)
    torn = F.when(record.isNull(), F.lit(f"<{len(columns) + SPARE_FIELDS} fields>")).when(
        ~_has_fields(record, mapping, len(columns)), record
    )
    df = reader.schema(T.StructType(fields)).load(addresses)
    return cast(DataFrame, df.select("_metadata", *(_column(name) for name in columns), torn.alias(CORRUPT)))


def _has_fields(record: Column, mapping: TableMapping, count: int) -> Column:
    """Whether the text of a CSV record has that many fields, and all its quotes are closed (RFC 4180)."""
    options = _lower_keys(mapping.options)
    separator = _unescaped(_separator(options))
    of_record = F.octet_length(record) - F.octet_length(F.replace(record, F.lit(separator), F.lit("")))
    plain = of_record == (count - 1) * len(separator.encode())
    quote = _unescaped(options.get("quote", '"'))
    if quote in ("", "\0"):
        return plain
    return F.when(
        record.contains(F.lit(quote)), record.rlike(_record_pattern(options, separator, quote, count))
    ).otherwise(plain)


def _record_pattern(options: dict[str, str], separator: str, quote: str, count: int) -> str:
    """A regular expression of Java that matches a CSV record with quotes in it.

    Groups are possessive: they neither go back nor call themselves, so that a value of megabytes is matched in one pass.
    """
    breaks = _unescaped(options.get("linesep", "\r\n"))
    q, s, b = (_characters(text) for text in (quote, separator, breaks))
    escape = _characters(_unescaped(options.get("escape", quote)) or quote)
    blanks = _characters("".join(blank for blank in " \t\r" if blank not in separator))

    def quoted(excluded: str) -> str:
        escaped = f"{q}{q}" if escape == q else rf"{escape}[\s\S]"
        within = f"[^{q}{'' if escape == q else escape}{excluded}]*+"
        return f"{q}{within}(?:{escaped}{within})*+{q}"

    until = f"[^{s}{b}]*+" if len(separator) == 1 else f"(?:(?!{s})[^{b}])*+"
    before = f"[{blanks}]*+" if options.get("ignoreleadingwhitespace", "").lower() == "true" else ""
    # a quote within a value on one line, as in "15" screen", is part of it
    field = f"(?>{before}{quoted('')}[{blanks}]*+(?={s}|\\z)|{before}{quoted(b)}{until}|(?!{before}{q}){until})"
    return rf"\A{field}(?:{s}{field}){{{count - 1}}}+[\r\n]*\z"


def _characters(text: str) -> str:
    return "".join(rf"\x{{{ord(character):x}}}" for character in text)


def _unescaped(text: str) -> str:
    """A separator or quote as Spark takes it: ``\\t`` may be two characters."""
    names = {"t": "\t", "r": "\r", "n": "\n", "b": "\b", "f": "\f", '"': '"', "'": "'", "\\": "\\", "u0000": "\0"}
    return names.get(text[1:], text) if len(text) > 1 and text[0] == "\\" else text


def _json_rows(spark: SparkSession, mapping: TableMapping, addresses: list[str]) -> DataFrame:
    """Rows of JSON files, one for an object, one for each object of an array; a line that is neither stays as CORRUPT.

    Not by Spark's own reader, which takes the first value of a line and is silent about what follows it.
    """
    options = _lower_keys(mapping.options)
    of_text = {key: options.pop(key) for key in ("encoding", "linesep") if key in options}
    whole = options.get("multiline", "false")
    if "encoding" in of_text:
        # the reader of texts would refuse it only when rows are asked for
        _nothing(spark).select(F.encode("nothing", of_text["encoding"])).collect()
    lines = spark.read.format("text").options(wholetext=whole, **of_text).load(addresses)
    row = T.StructType([T.StructField(column, T.StringType()) for column in sorted(_mapped(mapping))])
    text = F.regexp_replace("value", "^\ufeff", "")
    # in an object of our own that ends with a mark: whatever closes it early, or follows a value, takes the mark away
    mark = uuid.uuid4().hex
    array = text.rlike(r"^\s*\[")
    rows = F.when(array, text).otherwise(F.concat(F.lit("["), text, F.lit("]")))
    whole_line = F.concat(F.lit(f'{{"{mark}":'), rows, F.lit(f',"end":"{mark}"}}'))
    parsed = F.from_json(
        whole_line, T.StructType().add(mark, T.ArrayType(row)).add("end", T.StringType()), options or None
    )
    found = lines.filter(~text.rlike(r"^\s*\z")).select("_metadata", text.alias("line"), parsed.alias("parsed"))
    found = found.select(
        "_metadata", "line", F.col(f"parsed.{mark}").alias("rows"), (F.col("parsed.end") == mark).alias("ended")
    )
    all_rows = F.col("rows").isNotNull() & ~F.exists("rows", lambda each: each.isNull())
    readable = F.coalesce(F.col("ended") & all_rows, F.lit(False))
    nothing = F.array(F.lit(None).cast(row))
    return found.select(
        "_metadata",
        F.explode(F.when(readable, F.col("rows")).otherwise(nothing)).alias("row"),
        F.when(~readable, F.col("line")).alias(CORRUPT),
    ).select("_metadata", "row.*", CORRUPT)


def _shaped(
    df: DataFrame, table: str, values: dict[str, Column], texts: dict[str, Column], delivery: Column
) -> DataFrame:
    """``in_contract``, with unreadable times (``texts`` is what they were read from) and lines in ``unreadable`` too."""
    corrupt = F.col(CORRUPT) if CORRUPT in df.columns else F.lit(None).cast("string")
    prepared = df.select(
        *(F.when(corrupt.isNull(), value).alias(name) for name, value in values.items()),
        *(F.when(corrupt.isNull(), text).alias(f"text of {name}") for name, text in texts.items()),
        corrupt.alias("row"),
        delivery.alias("delivery"),
    )
    unread = {name: F.when(F.col(name).isNull(), F.col(f"text of {name}")) for name in texts}
    given = {name: F.col(name) for name in (*values, "delivery")}
    return in_contract(prepared, table, text_map({"row": F.col("row"), **unread}), **given)


def _column(name: str) -> Column:
    return F.col("`" + name.replace("`", "``") + "`")


def _text(df: DataFrame, column: str) -> Column:
    """A column as text; NULL where blank."""
    found = _column(column)
    kind = df.schema[column].dataType
    if isinstance(kind, T.DecimalType):
        return F.regexp_replace(found.cast("string"), r"\.0+$", "")
    if isinstance(kind, T.FractionalType):
        # beyond 10 million the text of a double has an exponent
        whole = found.try_cast("decimal(38,0)")
        return F.when(whole == found, whole.cast("string")).otherwise(found.cast("string"))
    text = found.cast("string")
    return F.when(F.trim(text) != "", text)


def _with_ids(df: DataFrame, texts: dict[str, Column], rules: dict[str, Id]) -> DataFrame:
    """Add ``id of NAME`` for each id of these names: its text without blanks, and without the ``.0`` of a whole number.

    In steps, because an expression that stands twice in another one is computed twice.
    """
    if not texts:
        return df
    ids = {name: F.btrim(text, F.lit(BLANKS)) for name, text in texts.items()}
    df = df.withColumns({f"id of {name}": F.lower(text) if rules[name].lower else text for name, text in ids.items()})
    # a column of whole numbers with gaps is written as 17850.0 by pandas
    number = {name: F.regexp_replace(_column(f"id of {name}"), r"^(-?\d+)\.0+$", "$1") for name in ids}
    whole = {name: _column(f"id of {name}").endswith("0") & _column(f"id of {name}").contains(".") for name in ids}
    return df.withColumns(
        {f"id of {name}": F.when(whole[name], number[name]).otherwise(_column(f"id of {name}")) for name in ids}
    )


def _id(name: str, rule: Id) -> Column:
    """An id from :func:`_with_ids`; NULL where that is one of the texts that stand for none."""
    found = _column(f"id of {name}")
    valid = {text.lower() for text in rule.valid}
    empty = [text for text in (*NO_IDS, *(NO_USERS if name == "user_id" else ())) if text not in valid]
    return F.when(~F.lower(found).isin("", *empty), found)


def _number(text: Column, rule: Money) -> Column:
    """A number as Spark reads it, from a text with the marks of a rule; NULL where the text has others."""
    if rule.thousands is None and rule.symbol is None and rule.negative == "leading" and rule.decimal in (None, "."):
        return text
    point, thousands, symbol = (_characters(mark or "") for mark in (rule.decimal or ".", rule.thousands, rule.symbol))
    whole = rf"(?:\d{{1,3}}(?:{thousands}\d{{3}})+|\d+)" if thousands else r"\d+"
    digits = rf"{whole}(?:{point}\d+)?"
    mark = rf"(?:{symbol})?\s*" if symbol else ""
    number = rf"{digits}\s*{mark}"
    shape = {
        "leading": rf"(?:-?\s*{mark}|{mark}-?){number}",
        "trailing": rf"{mark}{number}-?\s*{mark}",
        "parentheses": rf"(?:\({mark}{number}\)|{mark}{number})",
    }[rule.negative]
    plain = F.regexp_extract(text, digits, 0)
    if rule.thousands:
        plain = F.replace(plain, F.lit(rule.thousands), F.lit(""))
    plain = F.replace(plain, F.lit(rule.decimal or "."), F.lit("."))
    signed = F.when(text.rlike("[-(]"), F.concat(F.lit("-"), plain)).otherwise(plain)
    return F.when(text.rlike(rf"\A\s*{shape}\s*\z"), signed)


def _is_exact(number: Column, rule: Money, *, is_text: bool) -> Column:
    """Whether a number has no more decimals than money keeps, and can't be a thousand with a mark for a point."""
    value = number.try_cast("double")
    # sums of binary fractions, as 0.30000000000000004, are as exact as they can be
    rounded = F.abs(value - F.round(value, SCALE)) > _NOISE
    ambiguous = number.rlike(THOUSAND) if is_text and rule.decimal is rule.thousands is None else F.lit(False)
    may_be_longer = (F.length(number) - F.instr(number, ".") > SCALE) & number.contains(".")
    return F.when(may_be_longer | number.contains("e") | number.contains("E"), ~(rounded | ambiguous)).otherwise(True)


def _is_nested(text: Column) -> Column:
    """Whether a text is a JSON object or array: a customer with all that the platform knows of it."""
    return (text.startswith("{") & text.endswith("}")) | (text.startswith("[") & text.endswith("]"))


def _moment(rule: Time | Day, text: Column, kind: T.DataType, zone: str) -> Column:
    """A time or date from its column's text and type; NULL where it can't be read."""
    if isinstance(rule, Day):
        if isinstance(kind, T.TimestampType):
            raise ValueError("is an instant; a day must be a date or a text")
        if rule.format and isinstance(kind, T.StringType):
            return F.try_to_timestamp(F.trim(text), F.lit(rule.format)).cast("date")
        return F.when(text.rlike(r"^\s*\d{4}-\d\d?-\d\d?"), text.try_cast("date"))
    if isinstance(kind, T.TimestampType):
        return _column(rule.column or "")
    if isinstance(kind, T.TimestampNTZType | T.DateType):
        return _in_zone(_column(rule.column or "").cast("timestamp_ntz"), zone)
    text = F.trim(text)
    if rule.unit:
        micros = text.try_cast("decimal(26,6)") * F.lit(MICROS[rule.unit])
        return F.timestamp_micros(micros.try_cast("bigint"))
    if rule.format:
        return _formatted(text, rule.format, zone)
    if isinstance(kind, T.NumericType):
        raise ValueError("is a number: say its unit (s, ms, us) or its format")
    local = F.when(text.rlike(f"{DATE_AND_TIME})?$"), _in_zone(text.try_cast("timestamp_ntz"), zone))
    # a letter or sign after the time begins an offset or zone; other texts that Spark would read depend on its session
    zoned = F.regexp_replace(text, r"^(\S+[T ]\d\d?:\d\d?)( ?[A-Za-z+-])", "$1:00$2")
    return local.when(text.rlike(f"{DATE_AND_TIME} ?[A-Za-z+-].*)$"), zoned.try_cast("timestamp"))


def _in_zone(wall_clock: Column, zone: str) -> Column:
    return F.concat(wall_clock.cast("string"), F.lit(f" {zone}")).try_cast("timestamp")


def _formatted(text: Column, pattern: str, zone: str) -> Column:
    """Text of a pattern, whose zone may be missing, in brackets (optional) or mandatory."""
    bare = re.sub(rf"\[[^\[\]']*{ZONE_LETTERS}[^\[\]']*\]", "", pattern)
    whole = F.try_to_timestamp(text, F.lit(pattern))
    if re.search(ZONE_LETTERS, re.sub("'[^']*'", "", bare)):
        return whole
    local = F.try_to_timestamp(F.concat(text, F.lit(f" {zone}")), F.lit(f"{bare} VV"))
    return local if bare == pattern else F.coalesce(local, whole)


def _literal_map(values: dict[str, str]) -> Column:
    return F.create_map(*(F.lit(text) for pair in values.items() for text in pair))


def _mapped(mapping: TableMapping) -> set[str]:
    """Columns of the platform that a mapping names."""
    named: set[str] = set()
    for _, rule in mapping.columns:
        if isinstance(rule, Segments):
            named |= set(rule.columns.values())
        elif isinstance(rule, Given) and rule.column is not None:
            named.add(rule.column)
    return named


def _require(columns: Sequence[str], mapping: TableMapping, file: str) -> None:
    """Raise a DataError for a column that the mapping names and the file lacks.

    The first line of a CSV file without a header is a user's row: it is told only where it names a column of the mapping.
    """
    mapped = _mapped(mapping)
    missing = sorted(mapped.difference(columns))
    if not missing:
        return
    options = _lower_keys(mapping.options)
    if mapping.format == "csv" and _has_header(options) and len(missing) == len(mapped):
        separator = _separator(options)
        rule = (
            f"column is missing, and so are all others of the mapping; the first line has {len(columns)} fields between "
            f"{separator!r}. For another separator set options: {{sep: ...}}; for a file without a header options: "
            "{header: false}, and name its columns _c0, _c1, ..."
        )
    else:
        close = difflib.get_close_matches(missing[0], columns, n=1)
        rule = f"column is missing; there are {', '.join(map(repr, columns))}" + (
            f"; did you mean {close[0]!r}?" if close else ""
        )
    raise DataError(file, rule, column=missing[0])


def _listed(spark: SparkSession, pattern: str) -> list[tuple[str, str]]:
    """Address and fingerprint of the files that match, those in matching folders included; by Spark, which knows the stores."""
    files = spark.read.format("binaryFile").option("recursiveFileLookup", True)
    changed = F.unix_millis("modificationTime").alias("changed")
    try:
        rows = files.load(pattern).select("path", "length", changed).collect()
    except AnalysisException as error:
        if error.getCondition() != "PATH_NOT_FOUND":
            raise
        return []
    depth = pattern.count("/")
    # Spark does not read hidden files, even if told to
    return [
        (row["path"], f"{row['length']}-{row['changed']}")
        for row in rows
        if not any(part.startswith(("_", ".")) for part in row["path"].split("/")[depth:])
    ]


def _first_line(address: str) -> str:
    """First line that is not blank; its bytes as they are, so good for comparing only."""
    files, path = file_system(address)
    with files.open_input_stream(path) as stream:
        for line in io.TextIOWrapper(stream, "ISO-8859-1"):
            if line.count('"') % 2:
                raise ValueError("a name of a column may go on in the next line")
            if line.strip():
                return line.rstrip("\n")
    return ""


def _parquet_schema(address: str) -> str:
    """Columns and types of a file, without the first line, which names an object of this process."""
    files, path = file_system(address)
    with files.open_input_file(path) as file:
        return str(pq.ParquetFile(file).schema).partition("\n")[2]


def _literal(path: str) -> str:
    """A path as a glob that matches itself only."""
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", path)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except SPARK_ERRORS as error:
        cause = error.java_exception.toString() if isinstance(error, Py4JJavaError) else str(error)
        raise DataError(name, f"can't be read: {cause.splitlines()[0]}") from error


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must be a mapping of tables, not a {type(loaded).__name__}")
    try:
        return dict(MAPPING.model_validate(loaded))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(str(path), problem) for problem in error.errors())) from None


def _explain(name: str, problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{name}: {key} is missing"
    if problem["type"] != "extra_forbidden":
        # options may hold what a store is signed in to with
        got = "" if problem["loc"][-1] == "options" else f" (got {problem['input']!r})"
        return f"{name}: {key}: {problem['msg']}{got}"
    *parents, last = (str(part) for part in problem["loc"])
    if not parents:
        known: set[str] = set(MAPPING.model_fields)
    elif len(parents) == 2:
        known = set(MODELS[parents[0]].model_fields["columns"].annotation.model_fields)
    else:
        known = {*TableMapping.model_fields, *Time.model_fields, *Id.model_fields, *Money.model_fields}
    close = difflib.get_close_matches(last, sorted(known), n=1)
    return f"{name}: unknown key {key}" + (f"; did you mean {close[0]}?" if close else "")
