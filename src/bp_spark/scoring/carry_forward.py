"""Scores of an earlier scoring run that still hold: the users whose score is stale, and the rows of all others.

A score depends on nothing but the bundle, the user's features and the level of the platform.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import NamedTuple

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.model.horizons import not_falling
from bp_spark.model.odds import with_log_odds
from bp_spark.registry.predictions import PREDICTION_COLUMNS

MONEY_COLUMNS = ("expected_spend", "low", "high", "expected_by_horizon", "base_spend", "reasons", "other_reasons")
"""Those of PREDICTION_COLUMNS that the level of the platform multiplies."""
ORIGIN_COLUMNS = (
    "horizon_days",
    "bundle_digest",
    "run_id",
    "features_version",
    "code_version",
    "computed_on",
    "scored_at",
)
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


class Growth(NamedTuple):
    """Growth of the platform's level between two scored dates.

    Attributes:
        main_days: Days of the main horizon.
        by_horizon: Days -> factor of the spend over that horizon, the main one included.
        log_odds: Difference of everyone's log odds of buying.
    """

    main_days: int
    by_horizon: Mapping[int, float]
    log_odds: float = 0.0

    @property
    def main(self) -> float:
        """Factor of the main horizon."""
        return self.by_horizon[self.main_days]


def carry_forward(
    earlier_scores: DataFrame, stale_keys: DataFrame, score_date: date, growth: Growth | None = None
) -> DataFrame:
    """Return rows of SCORES for ``score_date`` of all users whose earlier score still holds.

    Args:
        earlier_scores: Rows of SCORES of an earlier scoring run.
        stale_keys: ``user_key`` of the users to leave out.
        score_date: The new date.
        growth: Of the platform's level since the earlier run; multiplies all money and moves ``p_active``. ``None``: none.
    """
    carried = earlier_scores.join(stale_keys, "user_key", "left_anti")
    if growth is not None and set(growth.by_horizon.values()) != {1.0}:
        moved = {name: _scaled(name, growth) for name in MONEY_COLUMNS}
        carried = carried.withColumns(moved | {"p_active": with_log_odds(F.col("p_active"), growth.log_odds)})
    new_date = F.lit(score_date).alias("score_date")
    return carried.select("user_key", new_date, "input_digest", *PREDICTION_COLUMNS, *ORIGIN_COLUMNS)


def _scaled(name: str, growth: Growth) -> Column:
    """Return one of MONEY_COLUMNS, multiplied."""
    if name == "expected_by_horizon":
        return _scaled_horizons(growth)
    factor = F.lit(growth.main)
    if name == "reasons":
        return F.transform(name, lambda reason: reason.withField("contribution", reason["contribution"] * factor))
    return F.col(name) * factor


def _scaled_horizons(growth: Growth) -> Column:
    """Return ``expected_by_horizon``, each horizon by its factor."""
    spend = {
        days: F.element_at("expected_by_horizon", F.lit(days)) * F.lit(factor)
        for days, factor in growth.by_horizon.items()
    }
    bounded = not_falling(spend, growth.main_days, F.least, F.greatest)
    scaled = F.create_map(*(part for days, column in bounded.items() for part in (F.lit(days), column)))
    return F.when(F.col("expected_by_horizon").isNotNull(), scaled)
