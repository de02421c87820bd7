"""Credibility: how far a share of a user's own is believed, for arrays and for columns of Spark."""

from __future__ import annotations

from typing import Any, TypeVar

Money = TypeVar("Money", bound=Any)
"""An array, or a column of Spark."""


def credible_share(part: Money, whole: Money, share: Any, weight: Any) -> Money:
    """Return the share that is expected of each user: between the own one and that of all, by how much the own rests on.

    Bühlmann and Straub 1970, "Glaubwürdigkeit für Schadensätze".

    Args:
        part: what the user's share is of, such as refunds.
        whole: what it is a share of, such as all money paid; 0 where nothing is known of the user.
        share: of all users.
        weight: ``whole`` that the share of all weighs as much as, above 0.
    """
    expected: Money = (part + share * weight) / (whole + weight)
    return expected
