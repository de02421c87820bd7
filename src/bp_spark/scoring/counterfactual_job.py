"""What one user's score would be after another past: the tables read, both pasts computed, nothing written."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config
from bp_spark.core.errors import DataError
from bp_spark.features import catalogue
from bp_spark.ingest import texts
from bp_spark.lakehouse.tables import Lakehouse
from bp_spark.registry.bundle import load_promoted
from bp_spark.scoring import counterfactual as pasts
from bp_spark.scoring.counterfactual import Change, Comparison
from bp_spark.scoring.job import features_of, require_same_features


def what_if(
    spark: SparkSession,
    config: Config,
    user_key: str,
    score_date: date,
    change: Change | None = None,
    changed_features: Mapping[str, float] | None = None,
) -> Comparison:
    """What the promoted bundle says of a user on a date, and what it would say after another past.

    Args:
        change: what the user did otherwise, as :func:`bp_spark.scoring.counterfactual.one_more_order`; the features
        follow from it. It costs
            one pass over ``user_daily``, for the usual prices.
        changed_features: feature -> value, set then, whatever the history says.

    Raises:
        BundleError: no bundle is promoted, or it can't be trusted or doesn't fit the features.
        DataError: the user has no features on that date, or none after the change; a name is no feature.
    """
    lakehouse = Lakehouse(spark, config.tables)
    bundle = load_promoted(config)
    require_same_features(bundle, config)
    of_date = features_of(lakehouse, score_date, lakehouse.version("user_features"))
    before = of_date.filter(F.col("user_key") == user_key).toPandas()
    if before.empty:
        # not told whom: what this says may end in a log
        raise DataError("user_features", f"holds no row of that user on {score_date}", column="user_key")
    after = before
    if change is not None:
        embeddings = lakehouse.read("text_embeddings").filter(F.col("model_digest") == texts.model_digest(config.texts))
        tables = lakehouse.read("events"), lakehouse.read("user_daily"), lakehouse.read("texts"), embeddings
        after = pasts.counterfactual_history(*tables, user_key, score_date, change, config.features).toPandas()
    if changed_features:
        after = pasts.with_features(after, changed_features)
    return pasts.compare(bundle, before, after, catalogue.catalogue(config.features).names, score_date)
