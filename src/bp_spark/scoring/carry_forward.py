"""Scores of an earlier scoring run that still hold: which users they are, and their rows for today.

A score depends on nothing but the bundle, the user's features and the level of the platform.
"""

from __future__ import annotations

from datetime import date

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.registry.predictions import PREDICTION_COLUMNS

MONEY = ("expected_spend", "low", "high", "expected_by_horizon", "base_spend", "reasons", "other_reasons")
"""Those of PREDICTION_COLUMNS that the level of the platform moves."""
ORIGIN = ("bundle_digest", "run_id", "features_version", "code_version", "computed_on", "scored_at")
"""Columns of SCORES that say where a score comes from: one that is carried forward keeps them."""


def stale_users(users: DataFrame, earlier: DataFrame) -> DataFrame:
    """Of whom an earlier night's score doesn't hold: users who are new or gone, or whose features are others now.

    Args:
        users: KEPT of ``user_features``, a user once, and what else is to be told of users.
        earlier: rows of SCORES that the same bundle made, a user at most once.

    Returns:
        The columns of ``users``; of one who is gone only ``user_key`` is known.
    """
    before = earlier.select("user_key", F.col("input_digest").alias("earlier_digest"))
    both = users.join(before, "user_key", "full_outer")
    # a user without a digest, or whom one side lacks, is like nobody
    same = F.coalesce(F.col("input_digest") == F.col("earlier_digest"), F.lit(False))
    return both.filter(~same).drop("earlier_digest")


def carry_forward(earlier: DataFrame, keys: DataFrame, score_date: date, factor: float = 1.0) -> DataFrame:
    """Rows of SCORES for ``score_date``: those of an earlier night but of the users in ``keys``, as computed then.

    Args:
        factor: what the level has moved by since the earlier night; all money is multiplied by it.
    """
    still = earlier.join(keys, "user_key", "left_anti")
    if factor != 1.0:
        still = still.withColumns({name: _times(name, factor) for name in MONEY})
    return still.select("user_key", F.lit(score_date).alias("score_date"), "input_digest", *PREDICTION_COLUMNS, *ORIGIN)


def _times(name: str, factor: float) -> Column:
    """A column of MONEY, multiplied."""
    if name == "expected_by_horizon":
        return F.transform_values(name, lambda _, money: money * F.lit(factor))
    if name == "reasons":
        return F.transform(
            name, lambda reason: reason.withField("contribution", reason["contribution"] * F.lit(factor))
        )
    return F.col(name) * F.lit(factor)
