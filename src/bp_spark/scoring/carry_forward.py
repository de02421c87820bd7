"""Scores of an earlier scoring run that still hold: the users whose score is stale, and the rows of all others.

A score depends on nothing but the bundle, the user's features and the level of the platform.
"""

from __future__ import annotations

from datetime import date

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.registry.predictions import PREDICTION_COLUMNS

MONEY_COLUMNS = ("expected_spend", "low", "high", "expected_by_horizon", "base_spend", "reasons", "other_reasons")
"""Those of PREDICTION_COLUMNS that the level of the platform moves."""
ORIGIN_COLUMNS = ("bundle_digest", "run_id", "features_version", "code_version", "computed_on", "scored_at")
"""Columns of SCORES that say where a score comes from. A carried score keeps their values."""


def stale_users(users: DataFrame, earlier_scores: DataFrame) -> DataFrame:
    """Return the users whose earlier score is stale: new users, users who are gone, and users whose features changed.

    Args:
        users: ``user_key`` and ``input_digest`` of ``user_features``, one row a user. Other columns may come with them.
        earlier_scores: Rows of SCORES that the same bundle made, at most one a user.

    Returns:
        The columns of ``users``. For a user who is gone, all but ``user_key`` is NULL.
    """
    earlier_digests = earlier_scores.select("user_key", F.col("input_digest").alias("earlier_digest"))
    both = users.join(earlier_digests, "user_key", "full_outer")
    # NULL where the digest is unknown or one side lacks the user: stale
    same = F.coalesce(F.col("input_digest") == F.col("earlier_digest"), F.lit(False))
    return both.filter(~same).drop("earlier_digest")


def carry_forward(earlier_scores: DataFrame, stale_keys: DataFrame, score_date: date, factor: float = 1.0) -> DataFrame:
    """Return rows of SCORES for ``score_date`` of all users whose earlier score still holds.

    Args:
        earlier_scores: Rows of SCORES of an earlier scoring run.
        stale_keys: ``user_key`` of the users to leave out.
        score_date: The new date.
        factor: Growth of the platform's level since the earlier run; multiplies all money.
    """
    carried = earlier_scores.join(stale_keys, "user_key", "left_anti")
    if factor != 1.0:
        carried = carried.withColumns({name: _scaled(name, factor) for name in MONEY_COLUMNS})
    new_date = F.lit(score_date).alias("score_date")
    return carried.select("user_key", new_date, "input_digest", *PREDICTION_COLUMNS, *ORIGIN_COLUMNS)


def _scaled(name: str, factor: float) -> Column:
    """Return one of MONEY_COLUMNS, multiplied."""
    if name == "expected_by_horizon":
        return F.transform_values(name, lambda _, money: money * F.lit(factor))
    if name == "reasons":
        return F.transform(
            name, lambda reason: reason.withField("contribution", reason["contribution"] * F.lit(factor))
        )
    return F.col(name) * F.lit(factor)
