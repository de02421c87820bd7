"""Spark SQL as DuckDB understands it, and the check that a query only reads.

A query is translated only if both engines return the same rows for it. Everything else is left to Spark, with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import pyarrow as pa
import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.tokenizer_core import Token, TokenType

_READING = ("SELECT", "WITH", "VALUES", "DESCRIBE", "DESC", "SHOW", "EXPLAIN", "(")
"""First words of statements that only read."""
_WRITING = ("INSERT", "UPDATE", "DELETE", "MERGE")
"""Words that make a statement write that begins with WITH."""
_SAME_FUNCTIONS = (
    *(exp.And, exp.Or, exp.Case, exp.If, exp.Coalesce, exp.Nullif, exp.Exists),
    *(exp.Count, exp.CountIf, exp.Sum, exp.Avg, exp.Min, exp.Max, exp.Abs, exp.Round, exp.Lower, exp.Upper),
    *(exp.RowNumber, exp.Rank, exp.DenseRank, exp.CurrentDate, exp.CurrentTimestamp),
)
"""Functions with the same result in both engines."""
_SAME_CASTS = (exp.DataType.Type.DATE, exp.DataType.Type.DOUBLE)
"""Types that both engines cast to alike; DuckDB rounds to whole numbers where Spark cuts."""
_OTHERWISE = (
    *(exp.Version, exp.TableSample, exp.Pivot, exp.Hint, exp.Lambda, exp.Command, exp.IntDiv, exp.DPipe),
    *(exp.Sort, exp.Cluster, exp.Distribute, exp.Collate, exp.Placeholder, exp.Parameter, exp.Slice),
)
"""Parts of a query that DuckDB lacks or understands otherwise."""


_TIMES = (exp.CurrentDate, exp.CurrentTimestamp, exp.Interval, exp.Cast)
"""Times in a sum; of a cast no type is asked."""


class OtherDialectError(Exception):
    """DuckDB would not understand a query as Spark does; the message is the reason."""


def only_reads(query: str) -> bool:
    """Return whether a query of Spark or DuckDB is one statement that writes nothing."""
    try:
        tokens = list(sqlglot.tokenize(query, read="spark"))
    except SqlglotError:
        # an unclosed quote; the engine says where
        return True
    while tokens and tokens[-1].token_type is TokenType.SEMICOLON:
        tokens.pop()
    if not tokens or tokens[0].text.upper() not in _READING:
        return False
    outer = list(_outside_parentheses(tokens))
    if any(token.token_type is TokenType.SEMICOLON for token in tokens):
        return False
    return tokens[0].text.upper() != "WITH" or not any(token.text.upper() in _WRITING for token in outer)


def _outside_parentheses(tokens: list[Token]) -> Iterator[Token]:
    depth = 0
    for token in tokens:
        depth += (token.token_type is TokenType.L_PAREN) - (token.token_type is TokenType.R_PAREN)
        if depth == 0 and token.token_type not in (TokenType.STRING, TokenType.IDENTIFIER):
            yield token


def parse(query: str) -> exp.Query:
    """Return the tree of a query in Spark SQL.

    Raises:
        OtherDialectError: it is no SELECT, or sqlglot can't read it.
    """
    if "\\" in query or "$" in query:
        raise OtherDialectError("it has a backslash or a variable")
    try:
        tree = sqlglot.parse_one(query, read="spark")
    except SqlglotError:
        raise OtherDialectError("it could not be translated") from None
    if not isinstance(tree, exp.Query):
        raise OtherDialectError(f"{query.split(maxsplit=1)[0].upper()} is left to Spark")
    return tree


def table_names(tree: exp.Query, namespace: str) -> list[str]:
    """Return the tables of a query, without the namespace that all must have.

    Raises:
        OtherDialectError: a table has another namespace.
    """
    views = {view.alias.lower() for view in tree.find_all(exp.CTE)}
    names = dict.fromkeys(
        ".".join(part.name for part in table.parts).lower()
        for table in tree.find_all(exp.Table)
        if table.db or table.name.lower() not in views
    )
    prefix = f"{namespace.lower()}."
    if others := [name for name in names if not name.startswith(prefix)]:
        raise OtherDialectError(f"{others[0]} is not in {namespace}")
    return [name.removeprefix(prefix) for name in names]


def table_names_in_duckdb(query: str, namespace: str) -> list[str]:
    """Return the tables of the namespace that a query in DuckDB's SQL names; none if sqlglot can't read it."""
    try:
        tree = sqlglot.parse_one(query, read="duckdb")
    except SqlglotError:
        # DuckDB says what it is
        return []
    prefix = f"{namespace.lower()}."
    names = dict.fromkeys(".".join(part.name for part in table.parts).lower() for table in tree.find_all(exp.Table))
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def to_duckdb(tree: exp.Query, schemas: Mapping[str, pa.Schema]) -> str:
    """Return a query in DuckDB's SQL that returns the rows that Spark would return.

    Args:
        tree: the query, by :func:`parse`; it is changed.
        schemas: table -> its columns.

    Raises:
        OtherDialectError: the engines may return other rows.
    """
    types = {field.name.lower(): field.type for schema in schemas.values() for field in schema}
    if other := next(tree.find_all(*_OTHERWISE), None):
        raise OtherDialectError(f"DuckDB may read {_text(other)} otherwise")
    for lateral in tree.find_all(exp.Lateral):
        if not isinstance(lateral.this, exp.Explode) or lateral.args.get("outer"):
            raise OtherDialectError(f"DuckDB may read {_text(lateral)} otherwise")
    for function in tree.find_all(exp.Func):
        _require_same(function)
    _require_same_arithmetic(tree, types)
    _name_columns(tree)
    _compare_as_doubles(tree)
    for bracket in list(tree.find_all(exp.Bracket)):
        _index_as_spark(bracket, types, tree)
    for division in list(tree.find_all(exp.Div, exp.Mod)):
        _refuse_zero(division)
    translated: str = tree.sql("duckdb")
    return translated


def _require_same(function: exp.Func) -> None:
    if isinstance(function, exp.Explode) and isinstance(function.parent, exp.Lateral):
        return
    if isinstance(function, exp.Cast) and function.to.this in _SAME_CASTS and type(function) is exp.Cast:
        return
    if not isinstance(function, _SAME_FUNCTIONS):
        raise OtherDialectError(f"DuckDB may compute {_text(function)} otherwise")


def _require_same_arithmetic(tree: exp.Query, types: Mapping[str, pa.DataType]) -> None:
    """Refuse sums of dates, and quotients and means of decimals: DuckDB returns them as other types."""
    used = _used_columns(tree, types)
    decimals = any(pa.types.is_decimal(types[name]) for name in used) or any(
        literal.find_ancestor(exp.Div, exp.Mod, exp.Avg) for literal in _fractions(tree)
    )
    if decimals and (quotient := tree.find(exp.Div, exp.Mod, exp.Avg)):
        raise OtherDialectError(f"DuckDB computes {_text(quotient)} without decimals")
    has_times = any(pa.types.is_temporal(types[name]) for name in used)
    for total in tree.find_all(exp.Sub, exp.Add):
        if isinstance(total.this, exp.CurrentTimestamp) and isinstance(total.expression, exp.Interval):
            continue
        if total.find(*_TIMES) or (has_times and not _is_of_numbers(total, types)):
            raise OtherDialectError(f"DuckDB may compute {_text(total)} otherwise")


def _used_columns(tree: exp.Query, types: Mapping[str, pa.DataType]) -> set[str]:
    """Return the stored columns that a query names; all of them if an inner query takes them by a star."""
    stars = (star for star in tree.find_all(exp.Star) if not isinstance(star.parent, exp.Count))
    if any(star.find_ancestor(exp.Subquery, exp.CTE) for star in stars):
        return set(types)
    return {column.name.lower() for column in tree.find_all(exp.Column)} & set(types)


def _fractions(tree: exp.Query) -> list[exp.Literal]:
    return [literal for literal in tree.find_all(exp.Literal) if not literal.is_string and not literal.is_int]


def _compare_as_doubles(tree: exp.Query) -> None:
    """Compare columns with fractions as Spark does: DuckDB would round a fraction to the 32 bits of a feature."""
    for literal in _fractions(tree):
        if isinstance(literal.parent, exp.Predicate):
            literal.replace(exp.cast(literal.copy(), exp.DataType.Type.DOUBLE))


def _is_of_numbers(node: exp.Expr, types: Mapping[str, pa.DataType]) -> bool:
    """Return whether all columns below a node are stored numbers."""
    stored = [types.get(column.name.lower()) for column in node.find_all(exp.Column)]
    return all(
        kind is not None and (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))
        for kind in stored
    )


def _index_as_spark(bracket: exp.Bracket, types: Mapping[str, pa.DataType], tree: exp.Query) -> None:
    """Give an index of an array or a key of a map the form that DuckDB takes it in.

    sqlglot takes each index for one of an array, counted from 0 in Spark and from 1 in DuckDB.
    """
    column, keys = bracket.this, bracket.expressions
    aliases = {alias.alias.lower() for alias in tree.find_all(exp.Alias)}
    kind = types.get(column.name.lower()) if isinstance(column, exp.Column) else None
    is_known = kind is not None and column.name.lower() not in aliases
    if is_known and len(keys) == 1 and isinstance(keys[0], exp.Literal):
        if pa.types.is_map(kind):
            bracket.replace(exp.Anonymous(this="map_extract_value", expressions=[column.copy(), keys[0].copy()]))
            return
        if pa.types.is_list(kind) and keys[0].is_int:
            index = int(keys[0].name)
            item = exp.Anonymous(this="list_extract", expressions=[column.copy(), exp.Literal.number(index + 1)])
            length = exp.Anonymous(this="len", expressions=[column.copy()])
            beyond = exp.GTE(this=exp.Literal.number(index), expression=length)
            bracket.replace(_error_where(beyond, item))
            return
    raise OtherDialectError(f"DuckDB may read {_text(bracket)} otherwise")


def _refuse_zero(division: exp.Binary) -> None:
    """End with an error where Spark does so: DuckDB returns NULL for a division by zero."""
    divisor = division.expression
    if isinstance(divisor, exp.Literal) and float(divisor.name):
        return
    is_zero = exp.EQ(this=exp.paren(divisor.copy()), expression=exp.Literal.number(0))
    division.set("expression", _error_where(is_zero, exp.paren(divisor.copy())))


def _error_where(condition: exp.Expression, otherwise: exp.Expression) -> exp.Paren:
    error = exp.Anonymous(this="error", expressions=[exp.Literal.string("Spark ends with an error here")])
    return exp.Paren(this=exp.Case().when(condition, error).else_(otherwise))


def _name_columns(tree: exp.Query) -> None:
    """Name the computed columns of the result as Spark names them, or nearly."""
    select = tree
    while isinstance(select, exp.SetOperation):
        select = select.left
    if not isinstance(select, exp.Select):
        return
    for column in list(select.expressions):
        if not column.output_name and not column.is_star:
            name = "count(1)" if column == exp.Count(this=exp.Star(), big_int=True) else _text(column)
            column.replace(exp.alias_(column.copy(), name, quoted=True))


def _text(node: exp.Expr) -> str:
    text: str = node.sql("spark", normalize_functions="lower")
    return text


def quoted(parts: Collection[str]) -> str:
    """Return a dotted name as DuckDB quotes it."""
    return ".".join(exp.to_identifier(part, quoted=True).sql("duckdb") for part in parts)
