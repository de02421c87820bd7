"""Grammar of the expressions of a mapping: which SQL they may hold, read without Spark.

An expression sees one row, and gives the same value each time. It calls no function but those of :data:`FUNCTIONS`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

import sqlglot
from sqlglot import exp
from sqlglot.dialects.spark import Spark
from sqlglot.errors import SqlglotError

TEXT, WHOLE, DECIMAL, DOUBLE, BOOLEAN, INSTANT, NESTED = (
    *("text", "whole", "decimal", "double", "boolean", "instant", "nested"),
)
"""Kinds of values. INSTANT and NESTED are kinds of columns only."""
NUMBERS = (WHOLE, DECIMAL, DOUBLE)


class _Function(NamedTuple):
    """A function that expressions may call.

    Args:
        kinds: kind of each argument: ``t`` a text, ``n`` a number, ``i`` a whole number, ``b`` a condition, ``s`` and ``v`` any
            value. All ``s`` get the same kind.
        least: arguments that must be given.
        result: kind of the value; "" for that of the arguments ``s``.
        hides: whether the value may be no NULL though an argument is.
        repeats: whether the last argument may be repeated.
    """

    kinds: str
    least: int
    result: str
    hides: bool = False
    repeats: bool = False


FUNCTIONS = {
    **dict.fromkeys(("abs", "sign"), _Function("n", 1, DOUBLE)),
    **dict.fromkeys(("floor", "ceil", "ceiling"), _Function("n", 1, WHOLE)),
    "round": _Function("ni", 1, DOUBLE),
    **dict.fromkeys(("lower", "upper", "trim", "ltrim", "rtrim", "reverse", "initcap"), _Function("t", 1, TEXT)),
    "concat": _Function("t", 1, TEXT, repeats=True),
    "concat_ws": _Function("tt", 2, TEXT, hides=True, repeats=True),
    **dict.fromkeys(("substring", "substr"), _Function("tii", 2, TEXT)),
    **dict.fromkeys(("left", "right"), _Function("ti", 2, TEXT)),
    **dict.fromkeys(("lpad", "rpad"), _Function("tit", 2, TEXT)),
    "replace": _Function("ttt", 2, TEXT),
    "translate": _Function("ttt", 3, TEXT),
    "split_part": _Function("tti", 3, TEXT),
    "regexp_replace": _Function("ttt", 3, TEXT),
    "regexp_extract": _Function("tti", 2, TEXT),
    "get_json_object": _Function("tt", 2, TEXT),
    "sha2": _Function("ti", 2, TEXT),
    "md5": _Function("t", 1, TEXT),
    **dict.fromkeys(("length", "char_length"), _Function("t", 1, WHOLE)),
    "instr": _Function("tt", 2, WHOLE),
    **dict.fromkeys(("contains", "startswith", "endswith"), _Function("tt", 2, BOOLEAN)),
    **dict.fromkeys(("isnull", "isnotnull"), _Function("v", 1, BOOLEAN, hides=True)),
    "coalesce": _Function("s", 1, "", hides=True, repeats=True),
    **dict.fromkeys(("nvl", "ifnull", "nullif"), _Function("ss", 2, "", hides=True)),
    "nvl2": _Function("vss", 3, "", hides=True),
    **dict.fromkeys(("greatest", "least"), _Function("nn", 2, DOUBLE, hides=True, repeats=True)),
}
"""Functions that an expression may call, with CASE, IF, CAST and TRY_CAST. All are deterministic, and see one row."""
_AGGREGATES = (
    *(
        "sum",
        "count",
        "avg",
        "mean",
        "min",
        "max",
        "first",
        "last",
        "any_value",
        "collect_list",
        "collect_set",
        "stddev",
    ),
    *(
        "variance",
        "median",
        "mode",
        "count_if",
        "approx_count_distinct",
        "max_by",
        "min_by",
        "bool_and",
        "bool_or",
        "any",
    ),
)
_WINDOWS = ("row_number", "rank", "dense_rank", "lag", "lead", "ntile", "percent_rank", "cume_dist")
_CHANGING = (
    *(
        "rand",
        "randn",
        "random",
        "uuid",
        "shuffle",
        "now",
        "curdate",
        "current_date",
        "current_timestamp",
        "localtimestamp",
    ),
    *("current_timezone", "current_user", "monotonically_increasing_id", "spark_partition_id", "unix_timestamp"),
)
_GENERATORS = ("explode", "explode_outer", "posexplode", "posexplode_outer", "inline", "inline_outer", "stack")
_ZONED = (
    *(
        "to_timestamp",
        "to_date",
        "date_format",
        "from_unixtime",
        "to_unix_timestamp",
        "from_utc_timestamp",
        "date_trunc",
    ),
    *(
        "to_utc_timestamp",
        "timestamp_seconds",
        "timestamp_millis",
        "timestamp_micros",
        "try_to_timestamp",
        "make_timestamp",
    ),
)


class _Dialect(Spark):
    """SQL of Spark in which calls of functions are left as they are written."""

    class Parser(Spark.parser_class):  # type: ignore[misc, name-defined]
        FUNCTIONS: dict[str, object] = {}  # noqa: RUF012 - as in the base class
        FUNCTION_PARSERS = {  # noqa: RUF012
            name: parser for name, parser in Spark.parser_class.FUNCTION_PARSERS.items() if name in ("CAST", "TRY_CAST")
        }


def columns_of(text: str) -> tuple[str, ...]:
    """Return the columns that an expression names, in their order; fields of a column as ``customer.id``."""
    names: dict[str, None] = {}

    def visit(node: exp.Expr) -> None:
        if isinstance(node, exp.Column | exp.Dot):
            names[name_of(node)] = None
            return
        for child in node.iter_expressions():
            visit(child)

    visit(parsed(text))
    return tuple(names)


def parsed(text: str) -> exp.Expr:
    """Return the tree of an expression.

    Raises:
        ValueError: the text is no expression, or more than one.
    """
    try:
        trees = sqlglot.parse(text, dialect=_Dialect)
    except SqlglotError as error:
        details = getattr(error, "errors", None)
        near = f" near {details[0]['highlight']!r}" if details and details[0].get("highlight") else ""
        raise ValueError(f"is no expression of Spark SQL: it can't be read{near}; {_BACKQUOTES}") from None
    if len(trees) != 1 or trees[0] is None:
        raise ValueError("must be one expression")
    return trees[0]


_BACKQUOTES = "names with blanks or signs, and words of SQL, need backquotes, as in `list price`"


_REFUSED: tuple[tuple[tuple[type, ...], str], ...] = (
    ((exp.Subquery, exp.Query, exp.Exists), "has a query; only columns of the same row can be used"),
    ((exp.Window, exp.IgnoreNulls, exp.RespectNulls), "has a window (OVER); an expression sees one row"),
    ((exp.Lambda, exp.Transform, exp.JSONExtract), "has a lambda (->); use explode for the elements of an array"),
    ((exp.Interval,), "has an INTERVAL; times are texts here, which the rule of a time reads"),
    ((exp.Alias,), f"is no single expression; {_BACKQUOTES}"),
)


def name_of(node: exp.Expr) -> str:
    """Return the name of a column or of a field within one."""
    if isinstance(node, exp.Dot) and isinstance(node.expression, exp.Identifier):
        return f"{name_of(node.this)}.{node.expression.name}"
    if isinstance(node, exp.Identifier):
        return node.name
    if isinstance(node, exp.Column) and all(isinstance(part, exp.Identifier) for part in node.parts):
        return ".".join(part.name for part in node.parts)
    raise ValueError("has a * or a call where a column's name must stand")


def refused(node: exp.Expr) -> ValueError:
    """Return the error for a kind of expression that isn't one of a row's values."""
    for kinds, problem in _REFUSED:
        if isinstance(node, kinds):
            return ValueError(problem)
    if isinstance(node, exp.Func):
        return no_function(node.sql_name())
    return ValueError(f"has {node.key.upper()}, which can't be used in a mapping")


def no_function(name: str) -> ValueError:
    """Return the error for a function that an expression can't call, with the reason."""
    lower = name.lower()
    reasons = (
        (_AGGREGATES, "is an aggregate; an expression sees one row"),
        (_WINDOWS, "is a function of windows; an expression sees one row"),
        (_CHANGING, "gives another value each time; a delivery must always give the same rows"),
        (_GENERATORS, "makes rows; use the key explode of the table"),
        (
            _ZONED,
            "depends on the session's zone; give the text, and let the rule of the time read it (format, unit, timezone)",
        ),
    )
    for names, reason in reasons:
        if lower in names:
            return ValueError(f"the function {lower} {reason}")
    close = difflib.get_close_matches(lower, FUNCTIONS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return ValueError(f"the function {lower} can't be used; {hint}docs/mapping.md lists those that can")


# --- patterns ------------------------------------------------------------------------------------------------------------


def patterns_of(text: str) -> tuple[str, ...]:
    """Return the regular expressions in an expression; only Java can tell whether they are ones."""
    patterns: list[str] = []
    for node in parsed(text).walk():
        if isinstance(node, exp.RegexpLike):
            patterns.append(node.expression.name)
        elif isinstance(node, exp.Anonymous) and node.name.lower().startswith("regexp"):
            patterns.append(node.expressions[1].name)
    return tuple(patterns)


def text_of(node: exp.Expr) -> str | None:
    """Return the text that a literal is; ``None`` for another node."""
    return node.name if isinstance(node, exp.RawString) or (isinstance(node, exp.Literal) and node.is_string) else None


def require_pattern(name: str, arguments: Sequence[exp.Expr]) -> None:
    """Require texts as pattern and replacement, and groups that the pattern has: else the job would end at the first match."""
    pattern = text_of(arguments[1])
    if pattern is None:
        raise ValueError(f"calls {name} without a text as its pattern")
    groups = len(re.findall(r"\((?!\?)|\(\?<[A-Za-z]", re.sub(r"\\.|\[(?:\\.|[^\]])*\]", "", pattern)))
    if name == "regexp_extract":
        wanted = [int(arguments[2].name) if len(arguments) > 2 and arguments[2].name.isdigit() else 1]  # noqa: PLR2004
    else:
        replacement = text_of(arguments[2])
        if replacement is None or re.search(r"\$(?!\d)|\\", replacement):
            raise ValueError(f"calls {name} without a text as its replacement, in which $1 stands for a group")
        wanted = [int(number) for number in re.findall(r"\$(\d)", replacement)]
    if max(wanted, default=0) > groups:
        raise ValueError(f"calls {name} for group {max(wanted)} of a pattern that has {groups}")
