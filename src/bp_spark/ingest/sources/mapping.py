r"""The mapping language: a YAML file that describes where the columns of the raw contract lie in a platform's files.

A mapping with all its keys (only ``transactions`` is mandatory)::

    timezone: UTC                # zone of times without an offset; UTC by default
    transactions:                # also behaviours, searches, reviews, items, users, rates, consultations, campaigns, promotions
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

Types are never guessed. A value that is not of its column's type becomes NULL, and its text stays in ``unreadable``. A line
that can't be parsed stays there whole, as ``row``. In CSV such a line has too many or too few fields, or a quote that isn't
closed. Such a quote takes all lines with it, up to the next quote that could close it. Blank text is NULL.

Ids are texts without surrounding blanks. A whole number is the same id with and without ``.0``. ``nan``, ``null``, ``NA``,
``\N`` and the like are no ids. ``0``, ``-1`` and JSON objects are no ids of users. ``valid`` lists exceptions.

Money is a number with a decimal point and no other mark, unless the mapping describes other marks. An amount or discount with
more than two decimals is unreadable unless ``round`` is set. So is the text ``1.234`` while ``decimal`` isn't given.

A CSV file is read by one task, because a quoted value may have line breaks. Files without such values are read in parallel
with ``options: {multiLine: false}``. An encoding that is not a Unicode one (``options: {encoding: GBK}``) needs Spark's setting
``spark.sql.legacy.javaCharsets=true``. Files whose names start with ``_`` or ``.`` are no deliveries. A path may be a folder,
and then means all files in it.
"""

from __future__ import annotations

import difflib
import re
import zoneinfo
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from bp_spark.core.config import Section, parse_yaml
from bp_spark.core.errors import ConfigError
from bp_spark.ingest.sources.contract import RAW
from bp_spark.lakehouse.schema import Table

REQUIRED = {
    "raw_transactions": ("user_id", "ts", "amount"),
    "raw_behaviours": ("user_id", "ts", "action"),
    "raw_searches": ("user_id", "ts", "query"),
    "raw_reviews": ("user_id", "ts"),
    "raw_items": ("item_id",),
    "raw_users": ("user_id",),
    "raw_rates": ("currency", "day", "rate"),
    "raw_consultations": ("user_id", "ts"),
    "raw_campaigns": ("user_id", "campaign_id", "first_day"),
    "raw_promotions": ("item_id", "first_day"),
}
"""Raw table -> columns that a mapping of the table must name."""
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
"""Options of Spark's readers that a mapping may set: none of them makes a row vanish or guesses a type."""
_STORE_PREFIX = "fs."
"""Prefix of the options of object stores."""


def _zone(name: str) -> str:
    if not re.fullmatch(r"[+-]\d\d:\d\d", name) and name not in zoneinfo.available_timezones():
        raise ValueError("must be a time zone such as Asia/Shanghai or +08:00")
    return name


def _require_allowed(options: Iterable[str], file_format: str) -> None:
    allowed = {name.lower() for name in OPTIONS[file_format]}
    for name in options:
        if name.lower() not in allowed and not name.startswith(_STORE_PREFIX):
            close = difflib.get_close_matches(name, OPTIONS[file_format], n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(
                f"{name} can't be set, for no row may vanish and no type be guessed; {hint}{file_format} takes "
                f"{', '.join(OPTIONS[file_format])}"
            )


Zone = Annotated[str, AfterValidator(_zone)]
Scalar = str | bool | int | float


class ColumnRule(Section):
    """Where a column comes from; a bare name stands for ``{column: name}``."""

    column: str | None = None
    value: Scalar | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> ColumnRule:
        if (self.column is None) == (self.value is None):
            raise ValueError("needs either column or value")
        return self


class TextRule(ColumnRule):
    """A text or a number."""

    values: dict[str, str] = Field(default_factory=dict)
    """Value of the platform -> value of the contract."""


class IdRule(TextRule):
    """An id: NULL where the text stands for none."""

    lower: bool = False
    """Whether ids that differ only in case are the same."""
    valid: tuple[str, ...] = ()
    """Texts that are ids though they look like none, such as ``NA`` or ``0``."""


class MoneyRule(TextRule):
    """A number and the marks in its text: ``1.234,50-`` has ``decimal: ",", thousands: ".", negative: trailing``."""

    decimal: Literal[".", ","] | None = None
    """Decimal mark, by default a point; where it is given, ``1.234`` is no longer taken for a thousand with a mark."""
    thousands: Literal[",", ".", "'", " ", "\u00a0"] | None = None
    symbol: str | None = Field(None, pattern=r"^[^\d()+-]+$")
    """Text that may stand before or after the number, as ``€`` or ``EUR``."""
    negative: Literal["leading", "trailing", "parentheses"] = "leading"
    round: bool = False
    """Whether surplus decimals are rounded away."""

    @model_validator(mode="after")
    def _two_marks(self) -> MoneyRule:
        if self.thousands == (self.decimal or "."):
            raise ValueError("decimal and thousands must be two marks")
        return self


class DayRule(ColumnRule):
    """A date without a time, and so without a zone."""

    format: str | None = None


class TimeRule(ColumnRule):
    """A time: ``format`` of a text (by default ISO 8601), or ``unit`` of an epoch."""

    format: str | None = None
    unit: Literal["s", "ms", "us"] | None = None
    timezone: Zone | None = None

    @model_validator(mode="after")
    def _text_or_epoch(self) -> TimeRule:
        if self.format and self.unit:
            raise ValueError("has a format (of texts) or a unit (of epochs), not both")
        return self


class SegmentsRule(Section):
    """Segments of a user."""

    columns: dict[str, str] = Field(min_length=1)
    """Segment name -> column of the platform."""


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

    @property
    def reader_options(self) -> dict[str, str]:
        """Options as texts, by name in lower case."""
        return {name.lower(): str(value) for name, value in self.options.items()}

    @property
    def has_header(self) -> bool:
        """Whether the first line of a CSV file names its columns."""
        return self.reader_options.get("header", "true").lower() == "true"

    @property
    def separator(self) -> str:
        """Separator of a CSV file's fields, as the mapping writes it."""
        return self.reader_options.get("sep", self.reader_options.get("delimiter", ","))

    @property
    def platform_columns(self) -> set[str]:
        """Columns of the platform that the mapping names."""
        names: set[str] = set()
        for _, rule in self.columns:
            if isinstance(rule, SegmentsRule):
                names |= set(rule.columns.values())
            elif isinstance(rule, ColumnRule) and rule.column is not None:
                names.add(rule.column)
        return names


RULES = {"timestamp": TimeRule, "date": DayRule, "map<string,string>": SegmentsRule}
"""Type of a column -> kind of its rule, where it is neither money nor an id nor a plain value."""


def _model(table: Table) -> Any:
    """Return TableMapping with the columns of a raw table; the columns of REQUIRED are mandatory."""
    fields: dict[str, Any] = {}
    for column in table.columns:
        if column.name not in ("delivery", "unreadable"):
            by_type = MoneyRule if column.type.startswith("decimal") else RULES.get(column.type, TextRule)
            rule: Any = IdRule if column.name.endswith("_id") else by_type
            fields[column.name] = (rule, ...) if column.name in REQUIRED[table.name] else (rule | None, None)
    columns = create_model(f"{table.name}_columns", __base__=Section, **fields)
    return create_model(table.name, __base__=TableMapping, columns=(columns, ...))


MODELS = {name.removeprefix("raw_"): _model(table) for name, table in RAW.items()}
_FIELDS: dict[str, Any] = {name: (model | None, None) for name, model in MODELS.items()}
_FIELDS |= {"timezone": (Zone, "UTC"), "transactions": (MODELS["transactions"], ...)}
MAPPING: Any = create_model("mapping", __base__=Section, **_FIELDS)


class MappingFile(NamedTuple):
    """A mapping file.

    Args:
        timezone: zone of times without an offset where neither table nor column has one.
        tables: mapping of each raw table, by its name as ``raw_transactions``.
    """

    timezone: str
    tables: dict[str, TableMapping]


def load_mapping(path: Path) -> MappingFile:
    """Read and validate a mapping file.

    Raises:
        ConfigError: the file can't be read, is not YAML, has an unknown key or lacks a mandatory one.
    """
    try:
        loaded = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must be a mapping of tables, not a {type(loaded).__name__}")
    try:
        sections = dict(MAPPING.model_validate(loaded))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(str(path), problem) for problem in error.errors())) from None
    timezone = sections.pop("timezone")
    return MappingFile(timezone, {f"raw_{name}": table for name, table in sections.items() if table})


def _explain(name: str, problem: Any) -> str:
    """Return the message for one problem that pydantic reports."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{name}: {key} is missing"
    if problem["type"] != "extra_forbidden":
        # options may hold the credentials of a store
        value = "" if problem["loc"][-1] == "options" else f" (got {problem['input']!r})"
        return f"{name}: {key}: {problem['msg']}{value}"
    *parents, last = (str(part) for part in problem["loc"])
    close = difflib.get_close_matches(last, sorted(_keys_within(parents)), n=1)
    return f"{name}: unknown key {key}" + (f"; did you mean {close[0]}?" if close else "")


def _keys_within(parents: list[str]) -> set[str]:
    """Return the keys that a mapping may have below ``parents``, such as ``transactions, columns``."""
    match parents:
        case []:
            return set(MAPPING.model_fields)
        case [table, _]:
            return set(MODELS[table].model_fields["columns"].annotation.model_fields)
        case _:
            sections = (TableMapping, TimeRule, IdRule, MoneyRule)
            return {name for section in sections for name in section.model_fields}
