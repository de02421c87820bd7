"""Expressions of a mapping: the text in ``expr`` or ``where`` -> SQL that is safe to run on any row.

An expression is checked without Spark, when the mapping is loaded. It is SQL over the columns of one row, with the functions
of :data:`FUNCTIONS`. So it gives the same value each time, and reads nothing but its row.

It is translated when the types of the columns are known. Columns are numbers, booleans or texts. Where a number is needed, a
text is read as one. A text that is no number gives NULL, also from functions that would hide this, such as ``coalesce``.
Times are texts, as in CSV. Blank texts are NULL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlglot import exp

from bp_spark.ingest.sources.grammar import (
    BOOLEAN,
    DECIMAL,
    DOUBLE,
    FUNCTIONS,
    INSTANT,
    NESTED,
    NUMBERS,
    TEXT,
    WHOLE,
    columns_of,
    name_of,
    no_function,
    parsed,
    refused,
    require_pattern,
    text_of,
)

_NULL = "null"
_MAX_DIGITS = 15
"""Most digits of a whole number in an expression: a double has no more."""
_MAX_CHARACTERS = 100_000
"""Most characters of SQL that an expression may be translated to."""
_NO_PART = ("split_part", "0")
"""The part that is none, for which Spark would end the job."""
_TYPES = {
    **dict.fromkeys(("TEXT", "VARCHAR", "CHAR"), ("STRING", TEXT)),
    **{name: (name, WHOLE) for name in ("TINYINT", "SMALLINT", "INT", "BIGINT")},
    **dict.fromkeys(("FLOAT", "DOUBLE"), ("DOUBLE", DOUBLE)),
    "DECIMAL": ("DECIMAL", DECIMAL),
    "BOOLEAN": ("BOOLEAN", BOOLEAN),
    "DATE": ("DATE", TEXT),
}
"""Types of CAST by sqlglot's name -> Spark's name and the kind of the value."""
_COMPARISONS: dict[type[exp.Expr], str] = {
    exp.EQ: "=",
    exp.NEQ: "<>",
    exp.GT: ">",
    exp.GTE: ">=",
    exp.LT: "<",
    exp.LTE: "<=",
    exp.NullSafeEQ: "<=>",
}
_ARITHMETIC: dict[type[exp.Expr], str] = {exp.Add: "+", exp.Sub: "-", exp.Mul: "*", exp.Mod: "%"}
_MATCHES: dict[type[exp.Expr], str] = {exp.Like: "LIKE", exp.ILike: "ILIKE", exp.RegexpLike: "RLIKE"}


class Value(NamedTuple):
    """SQL of a value.

    Args:
        sql: SQL of Spark that never fails.
        kind: kind of the value.
        failures: conditions, as SQL, that a text was no number.
    """

    sql: str
    kind: str
    failures: tuple[str, ...] = ()


def check(text: str, *, condition: bool = False) -> str:
    """Return the text of an expression that may stand in a mapping.

    Args:
        text: the expression.
        condition: whether it must be true or false.

    Raises:
        ValueError: it can't be parsed, or does what an expression may not do.
    """
    try:
        value = translate(text, dict.fromkeys(columns_of(text), TEXT))
    except RecursionError:
        raise ValueError("is too deeply nested") from None
    if len(value.sql) > _MAX_CHARACTERS:
        raise ValueError("is too deeply nested")
    if condition and value.kind in NUMBERS:
        raise ValueError("must be a condition, such as status = 'paid'")
    return text


def translate(text: str, kinds: Mapping[str, str], numbers: Mapping[str, str] | None = None) -> Value:
    """Return the SQL of an expression.

    Args:
        text: the expression.
        kinds: kind of each of its columns.
        numbers: column of texts -> column that holds its numbers as Spark reads them, where texts have other marks.

    Raises:
        ValueError: as in :func:`check`.
    """
    return _Translation(kinds, numbers or {}).value(parsed(text))


def condition(text: str, kinds: Mapping[str, str]) -> Value:
    """Return the SQL of an expression that is true or false."""
    return _Translation(kinds, {}).boolean(parsed(text))


def joined(failures: Sequence[str]) -> str:
    """Return SQL: whether any of the failures happened."""
    return f"({' OR '.join(dict.fromkeys(failures))})" if failures else "false"


def quoted(name: str) -> str:
    """Return a column's name as SQL."""
    return "`" + name.replace("`", "``") + "`"


def _literal(text: str) -> str:
    """Return a text as SQL."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


@dataclass
class _Translation:
    """Translation of one expression, by the kinds of its columns and the columns that hold their numbers."""

    kinds: Mapping[str, str]
    numbers: Mapping[str, str]

    def value(self, node: exp.Expr) -> Value:
        """Return the SQL of any expression.

        Raises:
            ValueError: the expression may not stand in a mapping.
        """
        if type(node) not in _TRANSLATIONS:
            raise refused(node)
        return _TRANSLATIONS[type(node)](self, node)

    # --- values of another kind ------------------------------------------------------------------------------------------

    def number(self, node: exp.Expr) -> Value:
        """Return an expression as a double."""
        if isinstance(node, exp.Paren):
            return self.number(node.this)
        if isinstance(node, exp.Column | exp.Dot) and (name := name_of(node)) in self.numbers:
            return _read(self.value(node), f"CAST(TRY_CAST({quoted(self.numbers[name])} AS DECIMAL(38,12)) AS DOUBLE)")
        return _as_number(self.value(node))

    def boolean(self, node: exp.Expr) -> Value:
        """Return an expression as a condition."""
        value = self.value(node)
        if value.kind in NUMBERS:
            return Value(f"({value.sql} <> 0)", BOOLEAN, value.failures)
        if value.kind == TEXT:
            return _read(value, f"TRY_CAST({value.sql} AS BOOLEAN)", BOOLEAN)
        return value

    def _same_kind(self, nodes: Sequence[exp.Expr]) -> list[Value]:
        """Return expressions as values of one kind: of their own, else texts for texts and whole numbers, else numbers."""
        values = [self.value(node) for node in nodes]
        kinds = {value.kind for value in values} - {_NULL}
        if len(kinds) <= 1:
            return [value._replace(kind=next(iter(kinds), TEXT)) for value in values]
        if kinds == {TEXT, WHOLE}:
            return [_as_text(value) for value in values]
        return [self.number(node) for node in nodes]

    def _comparable(self, nodes: Sequence[exp.Expr]) -> list[Value]:
        """Return expressions as values that can be compared: numbers if one is a number, else conditions, else texts."""
        for node, other in [(nodes[0], other) for other in nodes[1:]] + [(other, nodes[0]) for other in nodes[1:]]:
            if isinstance(node, exp.Column | exp.Dot) and isinstance(other, exp.Literal) and not other.name.strip():
                raise ValueError("compares a column with a blank text; blanks are NULL: write IS NULL or IS NOT NULL")
        values = [self.value(node) for node in nodes]
        kinds = {value.kind for value in values} - {_NULL}
        if kinds & set(NUMBERS):
            return [self.number(node) for node in nodes]
        if BOOLEAN in kinds:
            return [self.boolean(node) for node in nodes]
        return [_as_text(value) for value in values]

    # --- kinds of expressions --------------------------------------------------------------------------------------------

    def _column(self, node: exp.Expr) -> Value:
        name = name_of(node)
        kind, sql = self.kinds[name], quoted(name)
        if kind == NESTED:
            raise ValueError(f"column {name} holds an object or array; name a field, as in {name}.id")
        if kind == INSTANT:
            # whatever the session's zone is; a cast to a text would depend on it
            since = f"make_dt_interval(0, 0, 0, CAST(unix_micros({sql}) AS DECIMAL(24,0)) / 1000000)"
            return Value(f"concat(CAST(TIMESTAMP_NTZ '1970-01-01 00:00:00' + {since} AS STRING), 'Z')", TEXT)
        if kind == DOUBLE:
            # pandas writes NaN for NULL, and for Spark it is above all numbers
            return Value(f"nanvl(CAST({sql} AS DOUBLE), CAST(NULL AS DOUBLE))", DOUBLE)
        if kind == TEXT:
            text = f"CAST({sql} AS STRING)"
            return Value(f"CASE WHEN trim({text}) <> '' THEN {text} END", TEXT)
        return Value(sql, kind)

    def _literal_value(self, node: exp.Expr) -> Value:
        if isinstance(node, exp.RawString) or node.is_string:
            return Value(_literal(node.name), TEXT)
        if re.fullmatch(r"\d+", node.name):
            if len(node.name.lstrip("0")) > _MAX_DIGITS:
                raise ValueError(f"has a number of more than {_MAX_DIGITS} digits; write an id as a text, in quotes")
            return Value(f"CAST({node.name} AS BIGINT)", WHOLE)
        return Value(f"CAST({_literal(node.name)} AS DOUBLE)", DOUBLE)

    def _arithmetic(self, node: exp.Expr) -> Value:
        left, right = self.number(node.this), self.number(node.expression)
        failures = left.failures + right.failures
        if isinstance(node, exp.Div):
            return Value(f"try_divide({left.sql}, {right.sql})", DOUBLE, failures)
        divisor = f"nullif({right.sql}, 0D)" if isinstance(node, exp.Mod) else right.sql
        return Value(f"({left.sql} {_ARITHMETIC[type(node)]} {divisor})", DOUBLE, failures)

    def _comparison(self, node: exp.Expr) -> Value:
        left, right = self._comparable([node.this, node.expression])
        sign = _COMPARISONS[type(node)]
        value = Value(f"({left.sql} {sign} {right.sql})", BOOLEAN, left.failures + right.failures)
        return _guarded(value) if sign == "<=>" else value

    def _match(self, node: exp.Expr) -> Value:
        pattern = text_of(node.expression)
        if pattern is None or (not isinstance(node, exp.RegexpLike) and re.search(r"\\(?![%_\\])", pattern)):
            raise ValueError(
                f"has a {_MATCHES[type(node)]} without a text as its pattern, or with a single backslash in it"
            )
        text = _as_text(self.value(node.this))
        negation = "NOT " if node.args.get("negate") else ""
        return Value(f"({text.sql} {negation}{_MATCHES[type(node)]} {_literal(pattern)})", BOOLEAN, text.failures)

    def _logic(self, node: exp.Expr) -> Value:
        left, right = self.boolean(node.this), self.boolean(node.expression)
        word = node.key.upper()
        return Value(f"({left.sql} {word} {right.sql})", BOOLEAN, left.failures + right.failures)

    def _not(self, node: exp.Expr) -> Value:
        value = self.boolean(node.this)
        return value._replace(sql=f"(NOT {value.sql})")

    def _negative(self, node: exp.Expr) -> Value:
        value = self.number(node.this)
        return value._replace(sql=f"(- {value.sql})")

    def _is(self, node: exp.Expr) -> Value:
        if isinstance(node.expression, exp.Null):
            value = self._any(node.this)
            return _guarded(Value(f"({value.sql} IS NULL)", BOOLEAN, value.failures))
        if not isinstance(node.expression, exp.Boolean):
            raise refused(node)
        value = self.boolean(node.this)
        word = "TRUE" if node.expression.this else "FALSE"
        return _guarded(Value(f"({value.sql} <=> {word})", BOOLEAN, value.failures))

    def _any(self, node: exp.Expr) -> Value:
        """Return a value whose kind is of no interest: an object or array, too."""
        if isinstance(node, exp.Column | exp.Dot) and self.kinds[name_of(node)] == NESTED:
            return Value(quoted(name_of(node)), NESTED)
        return self.value(node)

    def _in(self, node: exp.Expr) -> Value:
        if node.args.get("query") or node.args.get("unnest") or node.args.get("field"):
            raise refused(exp.Subquery())
        value, *options = self._comparable([node.this, *node.expressions])
        failures = (*value.failures, *(failure for option in options for failure in option.failures))
        return Value(f"({value.sql} IN ({', '.join(option.sql for option in options)}))", BOOLEAN, failures)

    def _between(self, node: exp.Expr) -> Value:
        if node.args.get("symmetric"):
            raise refused(node)
        value, low, high = self._comparable([node.this, node.args["low"], node.args["high"]])
        sql = f"({value.sql} BETWEEN {low.sql} AND {high.sql})"
        return Value(sql, BOOLEAN, value.failures + low.failures + high.failures)

    def _case(self, node: exp.Expr) -> Value:
        branches = node.args["ifs"]
        default = node.args.get("default") or exp.Null()
        values = self._same_kind([*(branch.args["true"] for branch in branches), default])
        if node.this:
            conditions = [self.value(exp.EQ(this=node.this, expression=branch.this)) for branch in branches]
        else:
            conditions = [self.boolean(branch.this) for branch in branches]
        return _chosen(conditions, values)

    def _if(self, node: exp.Expr) -> Value:
        values = self._same_kind([node.args["true"], node.args.get("false") or exp.Null()])
        return _chosen([self.boolean(node.this)], values)

    def _cast(self, node: exp.Expr) -> Value:
        to = node.args["to"]
        if to.this.name not in _TYPES:
            zoned = "; give the text of a time, and let its rule read it" if "TIMESTAMP" in to.this.name else ""
            raise ValueError(f"has a CAST to {to.this.name}, which can't be used{zoned}")
        type_name, kind = _TYPES[to.this.name]
        sizes = ",".join(size.name for size in to.expressions)
        type_name = f"{type_name}({sizes})" if sizes and kind == DECIMAL else type_name
        value = self.value(node.this)
        if kind == TEXT and type_name == "STRING":
            return _as_text(value)
        cast = f"TRY_CAST({value.sql} AS {type_name})"
        cast = f"CAST({cast} AS STRING)" if type_name == "DATE" else cast
        # who writes TRY_CAST wants NULL for other values
        return Value(cast, kind, value.failures) if node.args.get("safe") else _read(value, cast, kind)

    def _call(self, node: exp.Expr) -> Value:
        name = node.name.lower()
        if name not in FUNCTIONS:
            raise no_function(name)
        function, arguments = FUNCTIONS[name], node.expressions
        kinds = function.kinds + function.kinds[-1] * (len(arguments) if function.repeats else 0)
        if not function.least <= len(arguments) <= len(kinds):
            raise ValueError(f"calls {name} with {len(arguments)} arguments; it takes {len(function.kinds)}")
        if name.startswith("regexp"):
            require_pattern(name, arguments)
        if name == "nullif":
            is_equal = self.value(exp.EQ(this=arguments[0], expression=arguments[1]))
            return _chosen([is_equal], [Value("NULL", _NULL), self.value(arguments[0])])
        same = iter(self._same_kind([node for node, kind in zip(arguments, kinds, strict=False) if kind == "s"]))
        values = [
            next(same) if kind == "s" else self._argument(name, at, argument, kind)
            for at, (argument, kind) in enumerate(zip(arguments, kinds, strict=False))
        ]
        failures = tuple(failure for value in values for failure in value.failures)
        result = function.result or next(value.kind for value, kind in zip(values, kinds, strict=False) if kind == "s")
        value = Value(f"{name}({', '.join(value.sql for value in values)})", result, failures)
        return _guarded(value) if function.hides else value

    def _argument(self, name: str, at: int, node: exp.Expr, kind: str) -> Value:
        if kind == "v":
            return self._any(node)
        if kind == "t":
            return _as_text(self.value(node))
        if kind == "n":
            return self.number(node)
        negative = isinstance(node, exp.Neg)
        literal = node.this if negative else node
        if (
            text_of(literal) is not None
            or not re.fullmatch(r"\d{1,4}", literal.name)
            or (name, literal.name) == _NO_PART
        ):
            raise ValueError(f"calls {name} without a whole number at place {at + 1}")
        return Value(f"{'-' * negative}{literal.name}", WHOLE)

    def _concat(self, node: exp.Expr) -> Value:
        left, right = _as_text(self.value(node.this)), _as_text(self.value(node.expression))
        return Value(f"concat({left.sql}, {right.sql})", TEXT, left.failures + right.failures)


_TRANSLATIONS: dict[type, Callable[[_Translation, Any], Value]] = {
    exp.Paren: lambda translation, node: translation.value(node.this),
    exp.Column: _Translation._column,
    exp.Dot: _Translation._column,
    exp.Literal: _Translation._literal_value,
    exp.RawString: _Translation._literal_value,
    exp.Null: lambda _, node: Value("NULL", _NULL),
    exp.Boolean: lambda _, node: Value("TRUE" if node.this else "FALSE", BOOLEAN),
    exp.Div: _Translation._arithmetic,
    exp.Neg: _Translation._negative,
    exp.DPipe: _Translation._concat,
    exp.And: _Translation._logic,
    exp.Or: _Translation._logic,
    exp.Not: _Translation._not,
    exp.Is: _Translation._is,
    exp.In: _Translation._in,
    exp.Between: _Translation._between,
    exp.Case: _Translation._case,
    exp.If: _Translation._if,
    exp.Cast: _Translation._cast,
    exp.TryCast: _Translation._cast,
    exp.Anonymous: _Translation._call,
    **dict.fromkeys(_COMPARISONS, _Translation._comparison),
    **dict.fromkeys(_ARITHMETIC, _Translation._arithmetic),
    **dict.fromkeys(_MATCHES, _Translation._match),
}
"""Kind of a node -> its translation; a node of another kind can't stand in a mapping."""


# --- values of another kind ----------------------------------------------------------------------------------------------


def _as_number(value: Value) -> Value:
    if value.kind == DOUBLE:
        return value
    if value.kind == TEXT:
        # a text of a double may end with a d or f, or be NaN; that of a decimal is a number
        return _read(value, f"CAST(TRY_CAST({value.sql} AS DECIMAL(38,12)) AS DOUBLE)")
    return Value(f"CAST({value.sql} AS DOUBLE)", DOUBLE, value.failures)


def _as_text(value: Value) -> Value:
    if value.kind == TEXT:
        return value
    sql = f"CAST({value.sql} AS STRING)"
    if value.kind == DOUBLE:
        whole = f"TRY_CAST({value.sql} AS DECIMAL(15,0))"
        sql = f"CASE WHEN {whole} = {value.sql} THEN CAST({whole} AS STRING) ELSE {sql} END"
    return Value(sql, TEXT, value.failures)


def _read(value: Value, sql: str, kind: str = DOUBLE) -> Value:
    """Return a value that is read from another one: it fails where it is NULL and the other one is not."""
    is_given = f"trim({value.sql}) <> ''" if value.kind == TEXT else f"{value.sql} IS NOT NULL"
    failure = f"CASE WHEN {is_given} THEN {sql} IS NULL ELSE FALSE END"
    return Value(sql, kind, (*value.failures, failure))


def _guarded(value: Value) -> Value:
    """Return a value that is NULL where a text is no number, though its function would hide that."""
    if not value.failures:
        return value
    return value._replace(sql=f"CASE WHEN {joined(value.failures)} THEN NULL ELSE {value.sql} END")


def _chosen(conditions: Sequence[Value], values: Sequence[Value]) -> Value:
    """Return the value after the first condition that is true, else the last one."""
    branches = zip(conditions, values, strict=False)
    cases = " ".join(f"WHEN {condition.sql} THEN {value.sql}" for condition, value in branches)
    failures = tuple(failure for value in (*conditions, *values) for failure in value.failures)
    return _guarded(Value(f"CASE {cases} ELSE {values[-1].sql} END", values[-1].kind, failures))
