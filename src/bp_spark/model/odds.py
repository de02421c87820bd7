"""Probabilities, moved by their log odds: the same for arrays and for columns of Spark."""

from __future__ import annotations

import math
from typing import Any, TypeVar

Probability = TypeVar("Probability", bound=Any)
"""An array, or a column of Spark."""


def with_log_odds(probability: Probability, more: float) -> Probability:
    """Return probabilities whose log odds are larger by ``more``; 0 and 1 stay.

    Args:
        probability: each from 0 to 1.
        more: the difference.
    """
    if more == 0:  # to the last bit
        return probability
    moved: Probability = probability / (probability + (1.0 - probability) * math.exp(-more))
    return moved
