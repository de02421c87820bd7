"""Values of a platform's columns -> the raw contract, by the rules of a mapping: ids, money, times, segments.

A value that is not of its column's type becomes NULL, and its text goes to ``unreadable``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from bp_spark.ingest.sources.contract import BLANKS, THOUSAND, in_contract, text_map
from bp_spark.ingest.sources.lines import CORRUPT, characters_pattern, quoted_column
from bp_spark.ingest.sources.mapping import (
    ColumnRule,
    DayRule,
    IdRule,
    MoneyRule,
    SegmentsRule,
    TableMapping,
    TextRule,
    TimeRule,
)

MICROS = {"s": 1_000_000, "ms": 1_000, "us": 1}
"""Microseconds of each unit of an epoch."""
DATE_AND_TIME = r"^\d{4}-\d\d?-\d\d?([T ]\d\d?:\d\d?(:\d\d?(\.\d+)?)?"
NO_IDS = ("nan", "null", "none", "nil", "undefined", "na", "n/a", "#n/a", "<na>", "\\n")
"""Texts that programs write where there is no id, in lower case."""
NO_USERS = ("0", "-1")
"""Ids that shops write for guests."""
SCALE = 2
"""Decimals of money."""
ZONE_LETTERS = "[VzOXxZ]"
"""Letters of a pattern of Spark that stand for a zone or an offset."""
_NOISE = 1e-6


class RuleError(ValueError):
    """A rule doesn't fit the type of its column.

    Args:
        name: column of the contract.
        column: column of the platform, or ``None``.
        problem: end of a sentence that begins with the column.
    """

    def __init__(self, name: str, column: str | None, problem: str) -> None:
        super().__init__(f"column {column} {problem}")
        self.name = name


@dataclass
class _Values:
    """Columns of the contract, as they are built up.

    Args:
        values: the column of each name.
        texts: what a value was read from; it goes to ``unreadable`` where the value is NULL.
        ids: text of each id, which :func:`_with_ids` turns into the column ``id of NAME``.
        id_rules: rule of each of these ids.
        numbers: columns ``number of NAME`` that values are computed from.
    """

    values: dict[str, Column] = field(default_factory=dict)
    texts: dict[str, Column] = field(default_factory=dict)
    ids: dict[str, Column] = field(default_factory=dict)
    id_rules: dict[str, IdRule] = field(default_factory=dict)
    numbers: dict[str, Column] = field(default_factory=dict)


def rows_in_contract(df: DataFrame, table: str, mapping: TableMapping, timezone: str, delivery: Column) -> DataFrame:
    """Return a platform's rows as rows of a raw table.

    Args:
        df: rows with the platform's columns; lines that are no rows in CORRUPT.
        table: raw table, as ``raw_transactions``.
        mapping: the table's mapping.
        timezone: zone of times without an offset where neither table nor column has one.
        delivery: name of the delivery that a row came from.

    Raises:
        RuleError: the type of a column doesn't fit its rule.
    """
    columns = _Values()
    for name, rule in mapping.columns:
        if isinstance(rule, SegmentsRule):
            columns.values[name] = _segments(df, rule)
        elif isinstance(rule, ColumnRule):
            _add(columns, df, name, rule, mapping.timezone or timezone, exact=table == "raw_transactions")
    df = df.withColumns(columns.numbers) if columns.numbers else df
    return _shaped(_with_ids(df, columns.ids, columns.id_rules), table, columns, delivery)


def _add(columns: _Values, df: DataFrame, name: str, rule: ColumnRule, zone: str, *, exact: bool) -> None:
    """Add the column of one rule; ``exact`` makes money with surplus decimals unreadable."""
    text = F.lit(str(rule.value)) if rule.column is None else _text(df, rule.column)
    columns.values[name] = text
    if isinstance(rule, TextRule) and rule.values:
        columns.values[name] = text = F.coalesce(F.try_element_at(_literal_map(rule.values), text), text)
    if isinstance(rule, IdRule) and rule.column is not None:
        _add_id(columns, name, rule, text)
    elif isinstance(rule, MoneyRule) and rule.column is not None:
        is_text = isinstance(df.schema[rule.column].dataType, T.StringType)
        number = quoted_column(f"number of {name}")
        must_be_exact = exact and not rule.round
        columns.numbers[f"number of {name}"] = _number(text, rule)
        columns.values[name] = F.when(_is_exact(number, rule, is_text=is_text), number) if must_be_exact else number
        columns.texts[name] = _text(df, rule.column)
    elif isinstance(rule, TimeRule | DayRule):
        kind = T.StringType() if rule.column is None else df.schema[rule.column].dataType
        columns.texts[name] = text
        columns.values[name] = _moment(name, rule, text, kind, zone)


def _add_id(columns: _Values, name: str, rule: IdRule, text: Column) -> None:
    columns.ids[name], columns.id_rules[name] = text, rule
    columns.values[name] = _id(name, rule)
    if name == "user_id":
        user_id = quoted_column(f"id of {name}")
        is_nested = _is_nested(user_id) & ~user_id.isin(*rule.valid)
        columns.values[name] = F.when(~is_nested, columns.values[name])
        columns.texts[name] = F.when(is_nested, F.lit("<nested>"))


def _segments(df: DataFrame, rule: SegmentsRule) -> Column:
    pairs = [part for key, column in rule.columns.items() for part in (F.lit(key), _text(df, column))]
    return F.map_filter(F.create_map(*pairs), lambda _, value: value.isNotNull())


def _shaped(df: DataFrame, table: str, columns: _Values, delivery: Column) -> DataFrame:
    """Return ``in_contract``, with the texts of unreadable values and lines in ``unreadable``."""
    corrupt = F.col(CORRUPT) if CORRUPT in df.columns else F.lit(None).cast("string")
    prepared = df.select(
        *(F.when(corrupt.isNull(), value).alias(name) for name, value in columns.values.items()),
        *(F.when(corrupt.isNull(), text).alias(f"text of {name}") for name, text in columns.texts.items()),
        corrupt.alias("row"),
        delivery.alias("delivery"),
    )
    unread = {name: F.when(F.col(name).isNull(), F.col(f"text of {name}")) for name in columns.texts}
    values = {name: F.col(name) for name in (*columns.values, "delivery")}
    return in_contract(prepared, table, text_map({"row": F.col("row"), **unread}), **values)


# --- texts and ids -------------------------------------------------------------------------------------------------------


def _text(df: DataFrame, name: str) -> Column:
    """Return a column as text; NULL where blank."""
    column = quoted_column(name)
    kind = df.schema[name].dataType
    if isinstance(kind, T.DecimalType):
        return F.regexp_replace(column.cast("string"), r"\.0+$", "")
    if isinstance(kind, T.FractionalType):
        # beyond 10 million the text of a double has an exponent
        whole = column.try_cast("decimal(38,0)")
        return F.when(whole == column, whole.cast("string")).otherwise(column.cast("string"))
    text = column.cast("string")
    return F.when(F.trim(text) != "", text)


def _literal_map(values: dict[str, str]) -> Column:
    return F.create_map(*(F.lit(text) for pair in values.items() for text in pair))


def _with_ids(df: DataFrame, texts: dict[str, Column], rules: dict[str, IdRule]) -> DataFrame:
    """Add ``id of NAME`` for each id: its text without blanks, and without the ``.0`` of a whole number.

    The columns are added in steps, because Spark computes an expression twice that stands twice in another one.
    """
    if not texts:
        return df
    ids = {name: F.btrim(text, F.lit(BLANKS)) for name, text in texts.items()}
    df = df.withColumns({f"id of {name}": F.lower(text) if rules[name].lower else text for name, text in ids.items()})
    columns = {name: quoted_column(f"id of {name}") for name in ids}
    # pandas writes a column of whole numbers with gaps as 17850.0
    whole = {name: F.regexp_replace(column, r"^(-?\d+)\.0+$", "$1") for name, column in columns.items()}
    may_be_whole = {name: column.endswith("0") & column.contains(".") for name, column in columns.items()}
    return df.withColumns(
        {f"id of {name}": F.when(may_be_whole[name], whole[name]).otherwise(column) for name, column in columns.items()}
    )


def _id(name: str, rule: IdRule) -> Column:
    """Return an id from :func:`_with_ids`; NULL where the text stands for none."""
    column = quoted_column(f"id of {name}")
    valid = {text.lower() for text in rule.valid}
    empty = [text for text in (*NO_IDS, *(NO_USERS if name == "user_id" else ())) if text not in valid]
    return F.when(~F.lower(column).isin("", *empty), column)


def _is_nested(text: Column) -> Column:
    """Return whether a text is a JSON object or array: a customer with all that the platform stores of the customer."""
    return (text.startswith("{") & text.endswith("}")) | (text.startswith("[") & text.endswith("]"))


# --- money ---------------------------------------------------------------------------------------------------------------


def _number(text: Column, rule: MoneyRule) -> Column:
    """Return a number as Spark reads it, from a text with the marks of a rule; NULL where the text has other marks."""
    if rule.thousands is None and rule.symbol is None and rule.negative == "leading" and rule.decimal in (None, "."):
        return text
    marks = (rule.decimal or ".", rule.thousands, rule.symbol)
    point, thousands, symbol = (characters_pattern(mark or "") for mark in marks)
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


def _is_exact(number: Column, rule: MoneyRule, *, is_text: bool) -> Column:
    """Return whether a number has no surplus decimals, and can't be a thousand with a mark for a point."""
    value = number.try_cast("double")
    # sums of binary fractions, as 0.30000000000000004, are as exact as they can be
    has_surplus = F.abs(value - F.round(value, SCALE)) > _NOISE
    is_ambiguous = number.rlike(THOUSAND) if is_text and rule.decimal is rule.thousands is None else F.lit(False)
    may_be_longer = (F.length(number) - F.instr(number, ".") > SCALE) & number.contains(".")
    return F.when(may_be_longer | number.contains("e") | number.contains("E"), ~(has_surplus | is_ambiguous)).otherwise(
        True
    )


# --- times ---------------------------------------------------------------------------------------------------------------


def _moment(name: str, rule: TimeRule | DayRule, text: Column, kind: T.DataType, zone: str) -> Column:
    """Return a time or date from its column's text and type; NULL where it can't be read."""
    if isinstance(rule, DayRule):
        if isinstance(kind, T.TimestampType):
            raise RuleError(name, rule.column, "is an instant; a day must be a date or a text")
        return _day(rule, text, kind)
    zone = rule.timezone or zone
    if isinstance(kind, T.TimestampType):
        return quoted_column(rule.column or "")
    if isinstance(kind, T.TimestampNTZType | T.DateType):
        return _in_zone(quoted_column(rule.column or "").cast("timestamp_ntz"), zone)
    text = F.trim(text)
    if rule.unit:
        micros = text.try_cast("decimal(26,6)") * F.lit(MICROS[rule.unit])
        return F.timestamp_micros(micros.try_cast("bigint"))
    if rule.format:
        return _formatted(text, rule.format, zone)
    if isinstance(kind, T.NumericType):
        raise RuleError(name, rule.column, "is a number: say its unit (s, ms, us) or its format")
    return _iso_8601(text, zone)


def _day(rule: DayRule, text: Column, kind: T.DataType) -> Column:
    if rule.format and isinstance(kind, T.StringType):
        return F.try_to_timestamp(F.trim(text), F.lit(rule.format)).cast("date")
    return F.when(text.rlike(r"^\s*\d{4}-\d\d?-\d\d?"), text.try_cast("date"))


def _iso_8601(text: Column, zone: str) -> Column:
    local = F.when(text.rlike(f"{DATE_AND_TIME})?$"), _in_zone(text.try_cast("timestamp_ntz"), zone))
    # a letter or sign after the time begins an offset or zone; other texts that Spark would read depend on its session
    zoned = F.regexp_replace(text, r"^(\S+[T ]\d\d?:\d\d?)( ?[A-Za-z+-])", "$1:00$2")
    return local.when(text.rlike(f"{DATE_AND_TIME} ?[A-Za-z+-].*)$"), zoned.try_cast("timestamp"))


def _in_zone(wall_clock: Column, zone: str) -> Column:
    return F.concat(wall_clock.cast("string"), F.lit(f" {zone}")).try_cast("timestamp")


def _formatted(text: Column, pattern: str, zone: str) -> Column:
    """Return the time of a text by a pattern; the pattern's zone is missing, optional (in brackets) or mandatory."""
    bare = re.sub(rf"\[[^\[\]']*{ZONE_LETTERS}[^\[\]']*\]", "", pattern)
    with_zone = F.try_to_timestamp(text, F.lit(pattern))
    if re.search(ZONE_LETTERS, re.sub("'[^']*'", "", bare)):
        return with_zone
    local = F.try_to_timestamp(F.concat(text, F.lit(f" {zone}")), F.lit(f"{bare} VV"))
    return local if bare == pattern else F.coalesce(local, with_zone)
