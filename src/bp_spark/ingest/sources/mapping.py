"""The mapping language: a YAML file that describes where the columns of the raw contract lie in a platform's files.

docs/mapping.md describes each key, with examples.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from decimal import Decimal
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
from bp_spark.core.config.base import Zone
from bp_spark.core.errors import ConfigError
from bp_spark.ingest.sources.contract import RAW
from bp_spark.ingest.sources.expressions import check
from bp_spark.ingest.sources.grammar import columns_of
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


Scalar = str | bool | int | float


Expression = Annotated[str, AfterValidator(check)]
Condition = Annotated[str, AfterValidator(lambda text: check(text, condition=True))]


class ColumnRule(Section):
    """Where a column comes from; a bare name stands for ``{column: name}``."""

    column: str | None = None
    value: Scalar | None = None
    expr: Expression | None = None
    """Expression of Spark SQL over the columns of the row."""

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> ColumnRule:
        if sum(origin is not None for origin in (self.column, self.value, self.expr)) != 1:
            raise ValueError("needs either column or value or expr")
        return self

    @property
    def platform_columns(self) -> tuple[str, ...]:
        """Columns of the platform that the value is read from."""
        if self.expr is not None:
            return columns_of(self.expr)
        return () if self.column is None else (self.column,)


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
    scale: Decimal | None = Field(None, gt=0, lt=1000, decimal_places=8)
    """What the number is multiplied by: 0.01 for cents."""

    @model_validator(mode="after")
    def _two_marks(self) -> MoneyRule:
        if self.thousands == (self.decimal or "."):
            raise ValueError("decimal and thousands must be two marks")
        return self


class DayRule(ColumnRule):
    """A date without a time, and so without a zone."""

    format: str | None = None


class TimeRule(ColumnRule):
    """A time: ``format`` of a text (by default ISO 8601), or ``unit`` of an epoch or of Excel's days."""

    format: str | None = None
    unit: Literal["s", "ms", "us", "ns", "excel_days"] | None = None
    timezone: Zone | None = None
    zones: dict[Annotated[str, Field(pattern=r"^[A-Za-z]{1,9}$")], Zone] = Field(default_factory=dict)
    """Short name of a zone, as ``IST`` -> the zone that the platform means."""

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
    where: Condition | None = None
    """Condition that rows of this table meet."""
    skip_lines: int = Field(0, ge=0, le=1000)
    """Lines of a CSV file before its header."""
    explode: str | None = None
    """Column with an array of objects; each of them is a row."""
    columns: Section

    @field_validator("options")
    @classmethod
    def _harmless(cls, options: dict[str, Scalar], info: ValidationInfo) -> dict[str, Scalar]:
        if "format" in info.data:
            _require_allowed(options, info.data["format"])
        return options

    @model_validator(mode="after")
    def _of_the_format(self) -> TableMapping:
        if self.skip_lines and (self.format != "csv" or "linesep" in self.reader_options):
            raise ValueError("skip_lines is of CSV files without the option lineSep")
        encoding = self.reader_options.get("encoding", "").lower()
        is_wide = encoding.replace("_", "-").startswith(("utf-16", "utf-32"))
        if self.format == "json" and is_wide and self.reader_options.get("multiline", "").lower() != "true":
            raise ValueError(f"{encoding} can't be parted into lines: set multiLine: true, or deliver UTF-8")
        if self.explode and self.format == "csv":
            raise ValueError("explode is of JSON, Parquet and Delta; a CSV file has no arrays")
        return self

    @property
    def totals(self) -> tuple[str, ...]:
        """Columns of the contract that hold an order's total on each of its lines."""
        return ()

    @property
    def selects(self) -> bool:
        """Whether some rows of the files don't belong to the table."""
        return self.where is not None or self.explode is not None

    @property
    def reader_options(self) -> dict[str, str]:
        """Options as texts, by name in lower case."""
        return {name.lower(): str(value) for name, value in self.options.items()}

    @property
    def encoding(self) -> str:
        """Encoding of text files, as the mapping names it."""
        return self.reader_options.get("encoding", self.reader_options.get("charset", "UTF-8"))

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
        """Columns of the platform that the mapping names; fields of a column as ``customer.id``."""
        names = {self.explode} if self.explode else set()
        names |= set(columns_of(self.where)) if self.where else set()
        for _, rule in self.columns:
            if isinstance(rule, SegmentsRule):
                names |= set(rule.columns.values())
            elif isinstance(rule, ColumnRule):
                names |= set(rule.platform_columns)
        return names

    @property
    def top_level_names(self) -> list[str]:
        """Keys that a JSON object may have for the names of the mapping, sorted."""
        names = self.platform_columns
        return sorted(names | {name.split(".")[0] for name in names})


class OrdersMapping(TableMapping):
    """Where order lines come from."""

    per_order: tuple[Literal["amount", "discount", "coupon_discount", "cost"], ...] = ()
    """Columns that hold the order's total on each of its lines."""

    @property
    def totals(self) -> tuple[str, ...]:
        """Columns of the contract that hold an order's total on each of its lines."""
        return self.per_order

    @model_validator(mode="after")
    def _orders_are_named(self) -> OrdersMapping:
        if self.per_order and getattr(self.columns, "order_id", None) is None:
            raise ValueError("per_order needs columns.order_id, to know the lines of an order")
        for name in self.per_order:
            if getattr(self.columns, name, None) is None:
                raise ValueError(f"per_order names {name}, which columns doesn't map")
        return self


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
    base = OrdersMapping if table.name == "raw_transactions" else TableMapping
    return create_model(table.name, __base__=base, columns=(columns, ...))


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
        value = (
            ""
            if problem["loc"][-1] == "options" or isinstance(problem["input"], dict)
            else f" (got {problem['input']!r})"
        )
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
            sections = (OrdersMapping, TimeRule, IdRule, MoneyRule)
            return {name for section in sections for name in section.model_fields}
