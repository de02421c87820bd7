"""Users alike: implicit alternating least squares (ALS) over users and items.

Hu, Koren and Volinsky 2008, "Collaborative filtering for implicit feedback datasets": the preference is whether a user took the
item, and the confidence in it is 1 + alpha x rating. ALS of Spark scales the regularisation by the number of ratings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pyspark.ml.recommendation import ALS, ALSModel
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from bp_spark.core.config import RecommendationsConfig
from bp_spark.core.session import parallelism

_ALPHA, _REGULARISATION, _SEED = 2.0, 0.1, 7
_BUCKETS = 256
"""Parts in which keys are numbered."""


def dense_ids(keys: DataFrame, column: str, name: str) -> DataFrame:
    """Number the distinct keys of a column from 0, without collecting them and without a task that sees all.

    Args:
        keys: Rows with the column.
        column: The keys.
        name: Name of the numbers.

    Returns:
        The column and the numbers, the same on any cluster.
    """
    distinct = keys.select(column).distinct()
    in_buckets = distinct.withColumn("bucket", F.pmod(F.xxhash64(column), F.lit(_BUCKETS)))
    # as few rows as there are buckets
    counts = {row["bucket"]: row["count"] for row in in_buckets.groupBy("bucket").count().collect()}
    starts = np.cumsum([0, *(counts.get(bucket, 0) for bucket in range(_BUCKETS - 1))])
    position = F.row_number().over(Window.partitionBy("bucket").orderBy(column)) - 1
    start = F.get(F.lit(starts), F.col("bucket").cast("int"))
    return in_buckets.select(column, (start + position).cast("int").alias(name))


@dataclass(frozen=True)
class Factors:
    """Vectors of users and items; they stay in memory, for they tell of users.

    Attributes:
        model: The fitted model.
        user_ids: ``user_key, user_id``.
        item_ids: ``item_id, item_number``.
    """

    model: ALSModel
    user_ids: DataFrame
    item_ids: DataFrame

    def best_items(self, users: DataFrame, most: int) -> DataFrame:
        """Return ``user_key, item_id`` with the items of most preference.

        Args:
            users: ``user_key``; who has no vector gets no row.
            most: Items a user.
        """
        ids = users.join(self.user_ids, "user_key").select("user_id")
        best = self.model.recommendForUserSubset(ids, most).select("user_id", F.inline("recommendations"))
        return best.join(self.user_ids, "user_id").join(self.item_ids, "item_number").select("user_key", "item_id")

    def with_preference(self, candidates: DataFrame) -> DataFrame:
        """Return the candidates with ``preference``, about 0 to 1; 0 where the user or the item has no vector.

        Args:
            candidates: ``user_key, item_id`` and more.
        """
        numbered = candidates.join(self.user_ids, "user_key", "left").join(self.item_ids, "item_id", "left")
        known = F.coalesce(F.nanvl("prediction", F.lit(0.0)), F.lit(0.0)).cast("double")
        # a missing vector has a number that no vector has
        filled = numbered.fillna(-1, ["user_id", "item_number"])
        rated = self.model.transform(filled).withColumn("preference", known)
        return rated.drop("prediction", "user_id", "item_number")


def fit(ratings: DataFrame, user_ids: DataFrame, item_ids: DataFrame, config: RecommendationsConfig) -> Factors | None:
    """Fit vectors of users and items.

    Args:
        ratings: ``user_key, item_id, rating``, each above 0.
        user_ids: ``user_key, user_id``, of all users of the ratings.
        item_ids: ``item_id, item_number``, likewise.
        config: Length of vectors and number of iterations.

    Returns:
        The vectors; ``None`` without a rating.
    """
    numbered = ratings.join(user_ids, "user_key").join(item_ids, "item_id").select("user_id", "item_number", "rating")
    if numbered.isEmpty():
        return None
    blocks = parallelism(ratings.sparkSession)
    als = ALS(
        rank=config.rank,
        maxIter=config.iterations,
        regParam=_REGULARISATION,
        numUserBlocks=blocks,
        numItemBlocks=blocks,
        implicitPrefs=True,
        alpha=_ALPHA,
        userCol="user_id",
        itemCol="item_number",
        ratingCol="rating",
        seed=_SEED,
        coldStartStrategy="nan",
    )
    return Factors(als.fit(numbered), user_ids, item_ids)
