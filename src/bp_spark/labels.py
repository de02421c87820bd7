"""Past as-of dates and the spend that followed them: what models learn from, and who is kept apart.

A cutoff's horizon ends before the test date. Users are split by a hash of their key, so that a user is on one side for ever:
``holdout`` users are never fitted on, ``valid`` users stop training early and calibrate, ``train`` users fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.config import FeaturesConfig, LabelsConfig
from bp_spark.errors import DataError
from bp_spark.features import user_features_table
from bp_spark.tables import Column as TableColumn
from bp_spark.tables import Table

MIN_HISTORY_DAYS = 30
BUCKETS = 10_000


def cutoffs(first_event: date, test_date: date, config: LabelsConfig) -> list[date]:
    """The as-of dates to label, oldest first: each horizon ends on or before ``test_date``, each has 30 days of history.

    Raises:
        DataError: the events don't reach far enough back for a single cutoff.
    """
    newest = test_date - timedelta(days=config.horizon_days)
    oldest = first_event + timedelta(days=MIN_HISTORY_DAYS)
    dates = [newest - timedelta(days=step * config.cutoff_step_days) for step in range(config.cutoffs)]
    usable = sorted(day for day in dates if day >= oldest)
    if not usable:
        raise DataError(
            "events",
            f"must reach back {config.horizon_days + MIN_HISTORY_DAYS} days before {test_date} to train, "
            f"but begin on {first_event}",
            column="event_date",
        )
    return usable


def future_spend(daily: DataFrame, as_of: Sequence[date], horizon_days: int) -> DataFrame:
    """Spend less refunds in the ``horizon_days`` days from each as-of date on: user_key, as_of_date, label_spend.

    Users without any event in the horizon have no row; their label is 0.
    """
    dates = F.array(*(F.lit(day) for day in sorted(set(as_of))))
    age = F.datediff("day", "as_of_date")
    return (
        daily.withColumn("as_of_date", F.explode(F.filter(dates, lambda d: d <= F.col("day"))))
        .filter(age < horizon_days)
        .groupBy("user_key", "as_of_date")
        .agg((F.sum(F.round(F.col("spend").cast("double") * 100).cast("long")) / 100).alias("label_spend"))
    )


def labelled(features: DataFrame, spend: DataFrame) -> DataFrame:
    """Features with ``label_spend``, 0 for users that did nothing in the horizon."""
    return features.join(spend, ["user_key", "as_of_date"], "left").withColumn(
        "label_spend", F.coalesce("label_spend", F.lit(0.0))
    )


def split(config: LabelsConfig, user_key: str = "user_key") -> Column:
    """``holdout``, ``valid`` or ``train`` by the user's hash."""
    place = F.pmod(F.xxhash64(F.lit("split"), F.col(user_key)), F.lit(BUCKETS))
    holdout = int(config.holdout_fraction * BUCKETS)
    valid = holdout + int((1 - config.holdout_fraction) * config.validation_fraction * BUCKETS)
    return F.when(place < holdout, "holdout").when(place < valid, "valid").otherwise("train")


def training_set_table(config: FeaturesConfig) -> Table:
    """Features, label and split of all cutoffs."""
    features = user_features_table(config)
    return Table(
        "training_set",
        "User features at past cutoffs with the spend that followed; holdout users are not in it",
        (
            *features.columns,
            TableColumn("label_spend", "double", "Spend less refunds in the horizon after as_of_date", required=True),
            TableColumn("split", "string", "train or valid, by the user's hash", required=True),
        ),
        key=features.key,
        partition_by=("split",),
    )
