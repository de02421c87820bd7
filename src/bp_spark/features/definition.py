"""What a feature is: an expression over a user's aggregates, with its name, description, unit and window.

Groups of features (:mod:`bp_spark.features.groups`) are written in these terms: ``spend(30) / orders(30)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bp_spark.features.aggregates import Aggregate

KEY = ["user_key", "as_of_date"]
"""Columns that identify a row of features."""


@dataclass(frozen=True)
class Expression:
    """One number of each user, as SQL.

    Each operator puts its SQL in parentheses, so that Python's precedence is SQL's. A quotient is NULL where its denominator
    is 0 or NULL.

    Args:
        sql: text that Spark evaluates; ``bench/duckdb_peer.py`` translates it for DuckDB.
        aggregates: the aggregates that the SQL reads, by column.
    """

    sql: str
    aggregates: Mapping[str, Aggregate] = field(default_factory=dict)

    def __add__(self, other: Operand) -> Expression:
        return _operator(self, "+", other)

    def __sub__(self, other: Operand) -> Expression:
        return _operator(self, "-", other)

    def __rsub__(self, other: Operand) -> Expression:
        return _operator(other, "-", self)

    def __mul__(self, other: Operand) -> Expression:
        return _operator(self, "*", other)

    def __truediv__(self, other: Operand) -> Expression:
        return call("try_divide", self, other) if isinstance(other, Expression) else _operator(self, "/", other)

    def __ge__(self, other: Operand) -> Expression:
        return _operator(self, ">=", other)


Operand = Expression | int | float


@dataclass(frozen=True)
class Feature:
    """One feature.

    Args:
        name: column of ``user_features``.
        expression: the feature's value.
        description: what the value means, in an analyst's words.
        unit: currency, orders, items, days, share, ...
        window: the days before the as-of date that the feature sees.
        group: subject of the feature; reasons are given by group.
        scale: ``log`` for heavy-tailed amounts and counts (models take the signed log1p), else ``linear``.
    """

    name: str
    expression: Expression
    description: str
    unit: str
    window: str
    group: str
    scale: Literal["log", "linear"] = "linear"


def column(name: str) -> Expression:
    """Return a column that stands beside the aggregates, such as an interpurchase time."""
    return Expression(name)


def aggregate(name: str, of: Aggregate) -> Expression:
    """Return an aggregate over the user's days; equal names must stand for equal aggregates."""
    return Expression(f"a_{name}", {f"a_{name}": of})


def call(function: str, *arguments: Operand) -> Expression:
    """Return the value of an SQL function.

    >>> call("least", 30, column("p_max") / 2).sql
    'least(30, (p_max / 2))'
    """
    operands = [_expression(argument) for argument in arguments]
    return Expression(f"{function}({', '.join(operand.sql for operand in operands)})", _read_by(*operands))


def last_days(days: int) -> str:
    """Return the window of a feature that sees the last ``days`` days."""
    return f"{days} days"


def _operator(left: Operand, symbol: str, right: Operand) -> Expression:
    first, second = _expression(left), _expression(right)
    return Expression(f"({first.sql} {symbol} {second.sql})", _read_by(first, second))


def _expression(operand: Operand) -> Expression:
    if isinstance(operand, Expression):
        return operand
    return Expression(f"{operand!r}D" if isinstance(operand, float) else str(operand))


def _read_by(*expressions: Expression) -> dict[str, Aggregate]:
    return {name: what for expression in expressions for name, what in expression.aggregates.items()}
