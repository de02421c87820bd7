"""Values of a platform's columns -> the raw contract, by the rules of a mapping: ids, money, times, segments.

A value that is not of its column's type becomes NULL, and its text goes to ``unreadable``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from bp_spark.ingest.sources import expressions, grammar
from bp_spark.ingest.sources.contract import BLANKS, THOUSAND, in_contract, text_map
from bp_spark.ingest.sources.fields import UNEXPLODED
from bp_spark.ingest.sources.lines import CORRUPT, characters_pattern, quoted_column
from bp_spark.ingest.sources.mapping import (
    REQUIRED,
    ColumnRule,
    DayRule,
    IdRule,
    MoneyRule,
    SegmentsRule,
    TableMapping,
    TextRule,
    TimeRule,
)
from bp_spark.ingest.sources.selection import UNREADABLE_WHERE, joined_texts, kinds_of
from bp_spark.ingest.sources.times import RuleError, moment

NO_IDS = ("nan", "null", "none", "nil", "undefined", "na", "n/a", "#n/a", "<na>", "\\n")
"""Texts that programs write where there is no id, in lower case."""
NO_USERS = ("0", "-1")
"""Ids that shops write for guests."""
SCALE = 2
"""Decimals of money."""
_NOISE = 1e-6
_WHOLE_DOUBLES = 2**53
"""Whole numbers below are doubles of their own."""
_SELECTION = {"where": UNREADABLE_WHERE, "explode": UNEXPLODED}
"""Key of a table in the mapping -> column with the text that it could not read."""


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
    exact = table == "raw_transactions"
    for name, rule in mapping.columns:
        if isinstance(rule, SegmentsRule):
            columns.values[name] = _segments(df, rule)
        elif isinstance(rule, ColumnRule):
            mapped, text = rule, None
            if rule.expr is not None:
                df, mapped, text = _with_expression(df, table, name, rule, mapping, exact=exact)
            _add(columns, df, name, mapped, mapping.timezone or timezone, exact=exact)
            if text is not None:
                columns.texts[name] = text
    df = df.withColumns(columns.numbers) if columns.numbers else df
    return _shaped(_with_ids(df, columns.ids, columns.id_rules), table, columns, delivery)


def _with_expression(
    df: DataFrame, table: str, name: str, rule: ColumnRule, mapping: TableMapping, *, exact: bool
) -> tuple[DataFrame, ColumnRule, Column | None]:
    """Return rows with the value of an expression as a column, the rule of this column, and the text where it's unreadable."""
    expr = rule.expr or ""
    kinds = kinds_of(df, grammar.columns_of(expr))
    df, numbers = _with_numbers(df, name, rule, kinds, exact=exact) if isinstance(rule, MoneyRule) else (df, {})
    try:
        value = expressions.translate(expr, kinds, numbers)
    except ValueError as error:
        raise RuleError(name, "the expression", str(error)) from None
    sql, column = value.sql, _origin(name)
    if isinstance(rule, IdRule) and value.kind == grammar.DOUBLE:
        # beyond that, two ids are one double
        sql = f"CASE WHEN abs({sql}) < {_WHOLE_DOUBLES} THEN {sql} END"
    failed = f"failed in {name}"
    df = df.withColumns({column: F.expr(sql), failed: F.expr(expressions.joined(value.failures))})
    update: dict[str, object] = {"column": column, "expr": None}
    if isinstance(rule, MoneyRule) and value.kind != grammar.TEXT:
        update |= {"decimal": ".", "thousands": None, "symbol": None, "negative": "leading"}
    text = joined_texts(df, kinds, mapping)
    if value.kind == grammar.TEXT:
        text = F.coalesce(_text(df, column), text)
    is_unread = quoted_column(failed)
    if name == "user_id":
        return df, rule.model_copy(update=update), None
    if not isinstance(rule, IdRule):
        # NULL in a mandatory column is no answer, whatever the expression means by it
        is_unread = F.lit(True) if name in REQUIRED[table] else is_unread | quoted_column(column).isNotNull()
    return df, rule.model_copy(update=update), F.when(is_unread, text)


def _origin(name: str) -> str:
    """Return the name of the column that holds the value of an expression."""
    return f"expression of {name}"


def _with_numbers(
    df: DataFrame, name: str, rule: MoneyRule, kinds: dict[str, str], *, exact: bool
) -> tuple[DataFrame, dict[str, str]]:
    """Add the number of each text that an expression of money uses, by the marks of its rule; return their names as well."""
    texts = [column for column in kinds if isinstance(df.schema[column].dataType, T.StringType)]
    numbers = {column: f"number of {column} in {name}" for column in texts}
    values = {numbers[column]: _unambiguous(_text(df, column), rule, exact=exact) for column in texts}
    return (df.withColumns(values) if values else df), numbers


def _unambiguous(text: Column, rule: MoneyRule, *, exact: bool) -> Column:
    """Return the number in a text, but for a thousand with a mark that may be a point."""
    is_ambiguous = exact and not rule.round and rule.decimal is rule.thousands is None
    return F.when(~text.rlike(THOUSAND), text) if is_ambiguous else _number(text, rule)


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
        if rule.scale is not None:
            # what is scaled has no mark any more
            text = _unambiguous(text, rule, exact=exact) if is_text else _number(text, rule)
            is_text = False
            columns.numbers[f"number of {name}"] = _scaled(text, rule.scale)
        else:
            columns.numbers[f"number of {name}"] = _number(text, rule)
        columns.values[name] = F.when(_is_exact(number, rule, is_text=is_text), number) if must_be_exact else number
        columns.texts[name] = _text(df, rule.column)
    elif isinstance(rule, TimeRule | DayRule):
        kind = T.StringType() if rule.column is None else df.schema[rule.column].dataType
        columns.texts[name] = text
        origin = "the expression" if rule.column == _origin(name) else f"column {rule.column}"
        columns.values[name] = moment(name, rule, text, kind, zone, origin)


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
    selected = {key: F.col(column) for key, column in _SELECTION.items() if column in df.columns}
    prepared = df.select(
        *(F.when(corrupt.isNull(), value).alias(name) for name, value in columns.values.items()),
        *(F.when(corrupt.isNull(), text).alias(f"text of {name}") for name, text in columns.texts.items()),
        corrupt.alias("row"),
        delivery.alias("delivery"),
        *(column.alias(key) for key, column in selected.items()),
    )
    unread = {name: F.when(F.col(name).isNull(), F.col(f"text of {name}")) for name in columns.texts}
    unread |= {key: F.col(key) for key in selected}
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


def _scaled(number: Column, scale: Decimal) -> Column:
    """Return a number times a scale, as text without surplus zeros; exact, as products of doubles are not."""
    product = number.try_cast("decimal(26,10)") * F.lit(scale).cast("decimal(11,8)")
    return F.regexp_replace(product.cast("string"), r"\.?0+$", "")
