"""Values of a bundle's JSON files, checked before anything is made of them: a bundle may be made by a wrong hand.

Messages hold no value: it may be of any length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np

from bp_spark.core.errors import BundleError

LARGEST_LOG = 700.0
"""Largest logarithm whose exponential is finite, rounded down."""


@contextmanager
def well_formed(what: str | Path) -> Iterator[None]:
    """Turn an error that the block raises over a document into a ``BundleError`` that names the document."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{what}: malformed ({error!r})") from None


def number(value: object, least: float = -math.inf, most: float = math.inf) -> float:
    """Return a number as a plain float.

    Raises:
        ValueError: it is no finite number, or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ValueError("a value is no number")
    try:
        plain = float(value)
    except OverflowError:
        raise ValueError("a number is too large") from None
    if not (math.isfinite(plain) and least <= plain <= most):
        raise ValueError(f"a number is not finite, or not from {least:g} to {most:g}")
    return plain


def floats(values: Iterable[object], least: float = -math.inf, most: float = math.inf) -> tuple[float, ...]:
    """Return numbers as plain floats.

    Raises:
        ValueError: one is no finite number, or out of bounds.
    """
    return tuple(number(value, least, most) for value in values)


def whole(value: object, least: int, most: int) -> int:
    """Return a whole number.

    Raises:
        ValueError: it is none, or out of bounds.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"a value is no whole number from {least} to {most}")
    return value


def texts(values: object) -> tuple[str, ...]:
    """Return the texts of a list.

    Raises:
        ValueError: it is no list of different texts.
    """
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise ValueError("must be a list of texts")
    if len(set(values)) != len(values):
        raise ValueError("a text is there twice")
    return tuple(values)


def require_rising(values: tuple[float, ...]) -> None:
    """Make sure that no number is smaller than the one before it.

    Raises:
        ValueError: one is.
    """
    if any(after < before for before, after in pairwise(values)):
        raise ValueError("numbers must not fall")
