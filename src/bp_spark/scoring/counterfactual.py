"""What a user's score would be, had the user done something else: events in, features and answers before and after out.

The same code as of a night computes both, so that an imagined order moves every feature that a real one would move: recency,
windows, pauses, trends, categories and the history. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import FeaturesConfig
from bp_spark.core.errors import DataError
from bp_spark.features import catalogue, user_daily
from bp_spark.lakehouse.tables import EVENTS
from bp_spark.registry.bundle import Bundle
from bp_spark.registry.predictions import as_frame, predict

Change = Callable[[DataFrame], DataFrame]
"""A user's EVENTS -> those of the other past."""


@dataclass(frozen=True)
class Comparison:
    """Two answers to two pasts of one user.

    Attributes:
        answers: a row for each of ``before`` and ``after``, with PREDICTION_COLUMNS.
        features: features that differ, as ``before`` and ``after`` by feature.
    """

    answers: pd.DataFrame
    features: pd.DataFrame


# --- other pasts -------------------------------------------------------------------------------------------------------


def one_more_order(at: datetime, times: float = 1.0) -> Change:
    """The user's last order before ``at`` once more at that time, its amounts and quantities multiplied by ``times``; a time
    without a zone is of UTC."""

    def change(events: DataFrame) -> DataFrame:
        when = F.lit(at if at.tzinfo else at.replace(tzinfo=UTC)).cast("timestamp")
        orders = events.filter((F.col("kind") == "purchase") & (F.col("ts") < when) & (F.col("amount") > 0))
        last = orders.agg(F.max_by("order_id", F.struct("ts", "order_id")).alias("order_id")).filter(
            "order_id IS NOT NULL"
        )
        scaled = {name: F.col(name) * F.lit(times) for name in ("amount", "quantity", "discount", "coupon_discount")}
        more = orders.join(last, "order_id", "left_semi").withColumns(
            {
                "event_id": F.concat(F.lit("imagined-"), F.col("event_id")),
                "order_id": F.concat(F.lit("imagined-"), F.col("order_id")),
                "ts": when,
                "event_date": F.to_date(when),
                **{name: value.cast(EVENTS.schema[name].dataType) for name, value in scaled.items()},
            }
        )
        names = EVENTS.schema.names
        return events.select(*names).unionByName(more.select(*names))

    return change


def silent_since(day: date) -> Change:
    """Nothing done from that day on."""
    return lambda events: events.filter(F.col("event_date") < F.lit(day))


# --- answers -----------------------------------------------------------------------------------------------------------


def counterfactual_history(
    events: DataFrame,
    days: DataFrame,
    texts: DataFrame,
    embeddings: DataFrame,
    user_key: str,
    as_of: date,
    change: Change,
    config: FeaturesConfig,
) -> DataFrame:
    """The user's row of ``user_features`` after a change of what the user did; none if nothing was bought then.

    Args:
        events: EVENTS.
        days: USER_DAILY of everyone: the usual price of a category is what all users pay.
        texts: TEXTS.
        embeddings: TEXT_EMBEDDINGS of one model.
        change: see :data:`Change`.
    """
    theirs = change(events.filter(F.col("user_key") == user_key))
    changed = user_daily.user_daily(theirs, texts, embeddings, config.history_length)
    everyone = days.filter(F.col("user_key") != user_key).select(*changed.columns).unionByName(changed)
    of = days.sparkSession.createDataFrame([(user_key,)], "user_key string")
    return catalogue.user_features(everyone, [as_of], config, built_from="imagined", of=of)


def compare(
    bundle: Bundle, before: pd.DataFrame, after: pd.DataFrame, names: tuple[str, ...], on: date | None = None
) -> Comparison:
    """What a bundle says of two rows of ``user_features``.

    Args:
        before: one row.
        after: one row, as ``before`` with whatever is changed: see :func:`with_features` and :func:`counterfactual_history`.
        names: features to compare.
        on: the date from which the spend counts; by default that of the bundle's training.

    Raises:
        BundleError: a column that the bundle reads is missing.
        DataError: there isn't one row each.
    """
    for rows, when in ((before, "before"), (after, "after")):
        if len(rows) != 1:
            raise DataError("user_features", f"must have one row of the user {when} the change", count=len(rows))
    both = pd.concat([before, after], ignore_index=True)
    bundle.check_inputs(both.columns)
    columns = {name: both[name].to_numpy() for name in bundle.required_columns}
    answers = as_frame(predict(bundle, columns, on)).set_axis(["before", "after"])
    values = both[list(names)].T.set_axis(["before", "after"], axis=1).astype(np.float64)
    same = (values["before"] == values["after"]) | values.isna().all(axis=1)
    return Comparison(answers, values[~same])


def with_features(row: pd.DataFrame, changes: Mapping[str, float]) -> pd.DataFrame:
    """A row of ``user_features`` with other values of some features, each by itself: it may be of no user that could be.

    Raises:
        DataError: there is no such feature.
    """
    for name in changes:
        if name not in row.columns or not pd.api.types.is_float_dtype(row[name]):
            raise DataError("user_features", "is no feature", column=name)
    return row.assign(**{name: np.float32(value) for name, value in changes.items()})
