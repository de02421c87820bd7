"""A user's score if the user had acted differently: features and predictions before and after a change of the past.

The code of a scoring run computes both, so an added order moves every feature that a real one would move: recency, windows,
interpurchase times, trends, categories and the history. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, FeaturesConfig
from bp_spark.core.errors import DataError
from bp_spark.features import catalogue, user_daily
from bp_spark.ingest.texts import model_digest
from bp_spark.lakehouse.store import Lakehouse, read_as_declared
from bp_spark.lakehouse.tables import EVENTS
from bp_spark.registry import bundle as bundles
from bp_spark.registry.bundle import Bundle
from bp_spark.registry.predictions import as_frame, predict
from bp_spark.scoring.job import features_of_date, require_same_features

Change = Callable[[DataFrame], DataFrame]
"""From a user's EVENTS to those of the counterfactual past."""


@dataclass(frozen=True)
class Comparison:
    """Predictions and features of one user for two pasts.

    Attributes:
        predictions: PREDICTION_COLUMNS; one row ``before`` and one ``after``.
        features: Features that differ, one a row, with columns ``before`` and ``after``.
    """

    predictions: pd.DataFrame
    features: pd.DataFrame


def what_if(
    spark: SparkSession,
    config: Config,
    user_key: str,
    score_date: date,
    change: Change | None = None,
    changed_features: Mapping[str, float] | None = None,
) -> Comparison:
    """Return what the promoted bundle predicts of a user on a date, before and after a change of the past.

    Args:
        spark: The session.
        config: All settings.
        user_key: The user.
        score_date: A date with features.
        change: What the user did differently, as :func:`one_more_order`. The features follow from it. It costs one pass over
            ``user_daily``, for the usual prices.
        changed_features: Feature -> value. These are set after ``change``, whatever the history gives.

    Raises:
        BundleError: No bundle is promoted, or it can't be trusted or doesn't fit the features.
        DataError: The user has no features on that date or after the change, or a name isn't a feature.
    """
    lakehouse = Lakehouse(spark, config.tables)
    bundle = bundles.load_promoted(config)
    require_same_features(bundle, config)
    features = features_of_date(lakehouse, score_date, lakehouse.version("user_features"))
    before = features.filter(F.col("user_key") == user_key).toPandas()
    if before.empty:
        # the message may end in a log, so it doesn't name the user
        raise DataError("user_features", f"holds no row of that user on {score_date}", column="user_key")
    after = before
    if change is not None:
        embeddings = lakehouse.read("text_embeddings").filter(F.col("model_digest") == model_digest(config.texts))
        tables = read_as_declared(lakehouse, EVENTS), lakehouse.read("user_daily"), lakehouse.read("texts"), embeddings
        after = counterfactual_features(*tables, user_key, score_date, change, config.features).toPandas()
    if changed_features:
        after = with_features(after, changed_features)
    return compare(bundle, before, after, catalogue.catalogue(config.features).names, score_date)


# --- changes of the past -----------------------------------------------------------------------------------------------


def one_more_order(at: datetime, times: float = 1.0) -> Change:
    """Repeat the user's last order before ``at`` at that time.

    Args:
        at: Time of the added order; UTC where it has no zone.
        times: Factor of its amounts and quantities.
    """

    def change(events: DataFrame) -> DataFrame:
        ordered_at = F.lit(at if at.tzinfo else at.replace(tzinfo=UTC)).cast("timestamp")
        orders = events.filter((F.col("kind") == "purchase") & (F.col("ts") < ordered_at) & (F.col("amount") > 0))
        last_order = orders.agg(F.max_by("order_id", F.struct("ts", "order_id")).alias("order_id")).filter(
            "order_id IS NOT NULL"
        )
        sums = ("amount", "quantity", "discount", "coupon_discount", "cost")
        scaled = {name: F.col(name) * F.lit(times) for name in sums}
        added = orders.join(last_order, "order_id", "left_semi").withColumns(
            {
                "event_id": F.concat(F.lit("imagined-"), F.col("event_id")),
                "order_id": F.concat(F.lit("imagined-"), F.col("order_id")),
                "ts": ordered_at,
                "event_date": F.to_date(ordered_at),
                **{name: value.cast(EVENTS.schema[name].dataType) for name, value in scaled.items()},
            }
        )
        names = EVENTS.schema.names
        return events.select(*names).unionByName(added.select(*names))

    return change


def silent_since(day: date) -> Change:
    """Remove everything that the user did on that day and later."""
    return lambda events: events.filter(F.col("event_date") < F.lit(day))


def with_features(row: pd.DataFrame, changes: Mapping[str, float]) -> pd.DataFrame:
    """Set features of a row of ``user_features``, each by itself; no real user may have such a row.

    Raises:
        DataError: There is no such feature.
    """
    for name in changes:
        if name not in row.columns or not pd.api.types.is_float_dtype(row[name]):
            raise DataError("user_features", "is no feature", column=name)
    return row.assign(**{name: np.float32(value) for name, value in changes.items()})


# --- before and after --------------------------------------------------------------------------------------------------


def counterfactual_features(
    events: DataFrame,
    days: DataFrame,
    texts: DataFrame,
    embeddings: DataFrame,
    user_key: str,
    as_of: date,
    change: Change,
    config: FeaturesConfig,
) -> DataFrame:
    """Return the user's row of ``user_features`` after a change of the past; no row without any purchase.

    Args:
        events: EVENTS.
        days: USER_DAILY of all users: the usual price of a category comes from all of them.
        texts: TEXTS.
        embeddings: TEXT_EMBEDDINGS of one model.
        user_key: The user.
        as_of: Only events before this date count.
        change: See :data:`Change`.
        config: Settings of the features.
    """
    changed_events = change(events.filter(F.col("user_key") == user_key))
    changed_days = user_daily.user_daily(changed_events, texts, embeddings, config.history_length)
    other_days = days.filter(F.col("user_key") != user_key).select(*changed_days.columns)
    one_user = days.sparkSession.createDataFrame([(user_key,)], "user_key string")
    all_days = other_days.unionByName(changed_days)
    return catalogue.user_features(all_days, [as_of], config, built_from="imagined", users=one_user)


def compare(
    bundle: Bundle, before: pd.DataFrame, after: pd.DataFrame, names: tuple[str, ...], on: date | None = None
) -> Comparison:
    """Compare what a bundle predicts for two rows of ``user_features``.

    Args:
        bundle: The model.
        before: One row.
        after: One row; see :func:`with_features` and :func:`counterfactual_features`.
        names: Features to compare.
        on: The date from which the spend counts; by default that of the bundle's training.

    Raises:
        BundleError: A column that the bundle reads is missing.
        DataError: ``before`` or ``after`` doesn't hold one row.
    """
    for rows, when in ((before, "before"), (after, "after")):
        if len(rows) != 1:
            raise DataError("user_features", f"must have one row of the user {when} the change", count=len(rows))
    both = pd.concat([before, after], ignore_index=True)
    bundle.check_inputs(both.columns)
    columns = {name: both[name].to_numpy() for name in bundle.required_columns}
    predictions = as_frame(predict(bundle, columns, on)).set_axis(["before", "after"])
    values = both[list(names)].T.set_axis(["before", "after"], axis=1).astype(np.float64)
    same = (values["before"] == values["after"]) | values.isna().all(axis=1)
    return Comparison(predictions, values[~same])
