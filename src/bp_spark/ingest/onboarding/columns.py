"""Columns of a sample, found by the names that exports use and by what they hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from bp_spark.ingest.onboarding.names import NAMES, plain
from bp_spark.ingest.onboarding.sniff import Sample
from bp_spark.ingest.sources.grammar import columns_of

Accepts = Callable[[Sequence[Any]], bool]
Part = Literal["any", "order", "line"]
"""Where a column may stand in exploded files: in the order, in a line, or first in a line and else in the order."""
_FILLED = 0.2
_MANY = 0.8
_REPEATED = 0.02


class Columns:
    """Columns of a sample.

    Args:
        sample: the sample.
    """

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self._in_line = {name for name in sample.columns if sample.explode and name.startswith(f"{sample.explode}.")}

    def find(
        self,
        name: str,
        accepts: Accepts | None = None,
        *,
        part: Part = "any",
        least: float = _FILLED,
        exclude: Sequence[str | None] = (),
    ) -> str | None:
        """Return the column of the first name in NAMES that is filled and accepted.

        Args:
            name: key of NAMES.
            accepts: whether values fit.
            part: where the column may stand.
            least: share of rows that must have a value.
            exclude: columns that have another meaning.
        """
        for wanted in NAMES[name]:
            for column in self._ordered(part):
                if column in exclude or not self._is_called(column, wanted):
                    continue
                if filled_share(self.sample, column) >= least and (not accepts or self._fits(column, accepts)):
                    return column
        return None

    def find_email(self) -> str | None:
        """Return a column of e-mail addresses."""
        names = [name for name in self.sample.columns if name not in self._in_line and "mail" in name.lower()]
        return next((name for name in names if is_email(self.sample.values(name))), None)

    def all_named(self, name: str) -> list[str]:
        """Return all columns with one of the names in NAMES, the best first."""
        return [column for wanted in NAMES[name] for column in self.sample.columns if self._is_called(column, wanted)]

    def named(self, wanted: str) -> str | None:
        """Return the column with a plain name."""
        return next((column for column in self.sample.columns if plain(column) == wanted), None)

    def has(self, wanted: str) -> bool:
        """Return whether there is a column with a plain name."""
        return self.named(wanted) is not None

    def containing(self, words: Sequence[str], excluded: Sequence[str]) -> str | None:
        """Return the first filled column of the order whose name has one of the words and none of the excluded ones."""
        for column in self.sample.columns:
            name = plain(column)
            fits = any(word in name for word in words) and not any(word in name for word in excluded)
            if fits and column not in self._in_line and filled_share(self.sample, column) >= _FILLED:
                return column
        return None

    def of_form(self, accepts: Accepts) -> str | None:
        """Return the first filled column whose values are accepted, whatever its name."""
        names = [name for name in self.sample.columns if name not in self._in_line]
        filled = (name for name in names if filled_share(self.sample, name) >= _MANY)
        return next((name for name in filled if self._fits(name, accepts)), None)

    def line_id(self, order_id: str | None, item: str | None) -> str | None:
        """Return the column that tells the lines of an order apart, if one does in the sample."""
        if order_id is None:
            return None
        inner = f"{self.sample.explode}.id"
        names = [inner] if inner in self._in_line else []
        if column := self.find("line_id", exclude=[order_id, item], part="line"):
            names.append(column)
        for name in names:
            pairs = [(row.get(order_id), row.get(name)) for row in self.sample.rows]
            if filled_share(self.sample, name) > 1 - _REPEATED and len(set(pairs)) >= (1 - _REPEATED) * len(pairs):
                return name
        return None

    def orders(self, order_id: str, column: str) -> list[list[Any]]:
        """Return the values of a column in each order of at least two lines."""
        by_order: dict[Any, list[Any]] = {}
        for row in self.sample.rows:
            if row.get(order_id) is not None:
                by_order.setdefault(row[order_id], []).append(row.get(column))
        return [values for values in by_order.values() if len(values) > 1]

    def is_in_line(self, column: str) -> bool:
        """Return whether a column is a field of the exploded array."""
        return column in self._in_line

    def _ordered(self, part: Part) -> list[str]:
        of_order = [name for name in self.sample.columns if name not in self._in_line]
        of_line = [name for name in self.sample.columns if name in self._in_line]
        return {"any": [*of_order, *of_line], "order": of_order, "line": [*of_line, *of_order]}[part]

    def _is_called(self, column: str, wanted: str) -> bool:
        if column in self._in_line:
            # the id of a line is none of an order
            return wanted != "id" and plain(column.removeprefix(f"{self.sample.explode}.")) == wanted
        return plain(column) == wanted

    def _fits(self, column: str, accepts: Accepts) -> bool:
        values = self.sample.values(column)
        return bool(values) and accepts(values)


def filled_share(sample: Sample, column: str) -> float:
    """Return the share of rows that have a value."""
    return len(sample.values(column)) / len(sample.rows)


def is_email(values: Sequence[Any]) -> bool:
    """Return whether most values are e-mail addresses."""
    return bool(values) and sum("@" in str(value) for value in values) > _MANY * len(values)


def sql_name(column: str) -> str:
    """Return a column's name as an expression needs it."""
    if re.fullmatch(r"[A-Za-z_][\w.]*", column):
        try:
            if columns_of(f"{column} = 1") == (column,):
                return column
        except ValueError:
            pass
    return "`" + column.replace("`", "``") + "`"
