"""Stages of a user's life as a customer: prospect, new, active, lapsing, lapsed. They are defined here and nowhere else."""

from __future__ import annotations

from pyspark.sql import Column
from pyspark.sql import functions as F

PROSPECT = "prospect"
"""Stage of a user without a purchase; see :mod:`bp_spark.features.prospects`."""


def buyer_stage(since_first: Column, since_last: Column, active_days: int, lapsed_days: int) -> Column:
    """Return the stage of a user with a purchase.

    ``new``: the first purchase is at most ``active_days`` ago. Otherwise the last purchase decides: ``active`` up to
    ``active_days`` ago, ``lapsing`` up to ``lapsed_days``, and ``lapsed`` after that. Visits don't count.

    Args:
        since_first: days since the first purchase; NULL gives NULL.
        since_last: days since the last purchase; NULL gives NULL.
        active_days: the border of ``active``.
        lapsed_days: the border of ``lapsed``.
    """
    return (
        F.when(since_first <= active_days, "new")
        .when(since_last <= active_days, "active")
        .when(since_last <= lapsed_days, "lapsing")
        .when(since_last > lapsed_days, "lapsed")
    )
