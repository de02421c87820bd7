"""Users of one date on the driver: what was known of them, whether they were treated, and what they spent since."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

FOLDS = 5
LEAST_USERS = 50
"""Treated users, and others, below which no interval is trusted: spend has a long tail."""
MOST_TREATED, MOST_OTHERS = 50_000, 150_000
"""Users who come to the driver at most; beyond, a random sample by a hash of the user."""
_SHARES = 1_000_000
_NO_COVARIATES = ("user_key", "treated", "spent")


@dataclass(frozen=True)
class Sample:
    """Users of one date.

    Attributes:
        x: what was known of each user before the date, float32 of shape (users, covariates); NaN where unknown.
        y: spend from the date on, float64 of shape (users,).
        treated: whether the user was treated, bool of shape (users,).
        fold: 0 to :data:`FOLDS` - 1 of each user; a hash of the user, so that it depends on no order.
        odds_factor: what turns the odds of treatment in the sample into those among all users; 1 where all users are there.
        keys: keys of the users, where they are needed, object of shape (users,).
    """

    x: np.ndarray
    y: np.ndarray
    treated: np.ndarray
    fold: np.ndarray
    odds_factor: float = 1.0
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, object))


def covariate_names(users: DataFrame) -> list[str]:
    """Return the names of the columns of :attr:`Sample.x`, in order."""
    return [name for name in users.columns if name not in _NO_COVARIATES]


def collect_sample(users: DataFrame) -> tuple[Sample | None, float]:
    """Return at most so many users as the driver may hold, and the share of the others; ``None`` where there are too few.

    Args:
        users: ``user_key``, ``treated``, ``spent`` and covariates.
    """
    counts = {row["treated"]: row["count"] for row in users.groupBy("treated").count().collect()}
    if min(counts.get(True, 0), counts.get(False, 0)) < LEAST_USERS:
        return None, 1.0
    shares = {True: min(1.0, MOST_TREATED / counts[True]), False: min(1.0, MOST_OTHERS / counts[False])}
    # the point that samples must be another than that of folds
    point = F.pmod(F.xxhash64("user_key", F.lit("sample")), F.lit(_SHARES))
    border = F.when(F.col("treated"), round(shares[True] * _SHARES)).otherwise(round(shares[False] * _SHARES))
    kept = users.filter(point < border).withColumn("fold", F.pmod(F.xxhash64("user_key"), F.lit(FOLDS)))
    # in one order, so that the same users give the same bits
    rows = kept.toPandas().sort_values("user_key")
    sample = Sample(
        x=rows[covariate_names(users)].to_numpy(np.float32),
        y=rows["spent"].to_numpy(np.float64),
        treated=rows["treated"].to_numpy(bool),
        fold=rows["fold"].to_numpy(np.int64),
        odds_factor=shares[False] / shares[True],
        keys=rows["user_key"].to_numpy(),
    )
    return sample, shares[False]
