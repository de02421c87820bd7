"""Monotone functions given by knots, and the JSON form of dataclasses of numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bp_spark.model.values import floats

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Curve:
    """A monotone function given by knots: straight lines between them. ``x`` increases strictly."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __call__(self, at: np.ndarray) -> np.ndarray:
        """Return the values at ``at``, ``float64[rows]``, constant beyond the ends."""
        return np.asarray(np.interp(at, self.x, self.y))


def as_json(fitted: DataclassInstance) -> dict[str, Any]:
    """Return the fields of a dataclass of numbers as plain values for a JSON file; floats come back bit for bit."""
    document: dict[str, Any] = json.loads(json.dumps(asdict(fitted), allow_nan=False))
    return document


def curve_from_json(document: Mapping[str, Any], least: float = -math.inf, most: float = math.inf) -> Curve:
    """Return the curve whose fields are in a JSON document.

    Args:
        document: of :func:`as_json`.
        least: smallest ``y`` that is allowed.
        most: largest ``y`` that is allowed.

    Raises:
        KeyError, TypeError, ValueError: they are not the fields of a curve.
    """
    curve = Curve(floats(document["x"]), floats(document["y"], least, most))
    if len(curve.x) != len(curve.y) or not curve.x:
        raise ValueError("a curve needs as many x as y")
    if any(after <= before for before, after in zip(curve.x, curve.x[1:], strict=False)):
        raise ValueError("x of a curve must increase")
    return curve
