"""``user_daily`` -> ``user_features``: all features, their table, and the transform that fills it.

Point in time: a feature for date D reads only days before D. Every sum is over whole numbers (cents, thousandths), so that
the order of addition, the size of the cluster and a rebuild change no feature by a bit.

A silent user is seen as of the day of the clock's last tick (``seen_on``): see :mod:`bp_spark.features.clock`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import FeaturesConfig, digest
from bp_spark.features.aggregates import SEQUENCE_COLUMNS, Aggregate, aggregate_days
from bp_spark.features.categories import category_features
from bp_spark.features.definition import KEY, Feature
from bp_spark.features.groups import (
    browsing,
    categories,
    order_values,
    prices,
    recency,
    reviews,
    rhythm,
    searches,
    season,
    times,
    weekly,
    windows,
)
from bp_spark.lakehouse.schema import Column, Table

FORMAT = 1
"""Goes up when values of features change whose expressions stay: the aggregates below them, prices, interpurchase times."""
FILE_ROWS = 50_000
"""Users in a file of ``user_features``: some tens of megabytes, and half a minute of one core's scoring."""


@dataclass(frozen=True)
class Catalogue:
    """All features, in table order."""

    features: tuple[Feature, ...]

    @property
    def aggregates(self) -> Mapping[str, Aggregate]:
        """Aggregates over a user's days that the features' expressions read, by column."""
        return {name: what for feature in self.features for name, what in feature.expression.aggregates.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Feature columns, in table order."""
        return tuple(feature.name for feature in self.features)

    @property
    def definitions(self) -> dict[str, str]:
        """Feature -> digest of what its values mean, in table order."""
        return {feature.name: digest(FORMAT, feature.expression) for feature in self.features}

    @property
    def groups(self) -> dict[str, str]:
        """Feature -> group, in table order."""
        return {feature.name: feature.group for feature in self.features}


def catalogue(config: FeaturesConfig) -> Catalogue:
    """Return all features for the configured windows."""
    return Catalogue(
        (
            *recency.features(),
            *windows.features(config.windows),
            *rhythm.features(),
            *weekly.features(),
            *order_values.features(),
            *prices.features(),
            *times.features(),
            *season.features(),
            *categories.features(),
            *browsing.features(),
            *searches.features(),
            *reviews.features(),
        )
    )


def user_features_table(config: FeaturesConfig) -> Table:
    """Return the catalogue's table: a commented column for each feature, then the history as parallel arrays."""
    return Table(
        "user_features",
        "What is known of each user on as_of_date, from events before it; users with a purchase before it",
        (
            Column("user_key", "string", "User", required=True),
            Column("as_of_date", "date", "Only events before this day are seen", required=True),
            Column("seen_on", "date", "Last tick of the user's clock: as_of_date, or earlier for users long silent"),
            *(Column(f.name, "float", f"{f.description} [{f.unit}; {f.window}]") for f in catalogue(config).features),
            *SEQUENCE_COLUMNS,
            Column(
                "input_digest",
                "bigint",
                "xxhash64 of features and history: as long as it is the same, a bundle's answer is the same",
            ),
            Column(
                "built_from",
                "string",
                "Digest of the events' version, the catalogue and the code",
                required=True,
            ),
        ),
        key=("user_key", "as_of_date"),
        partition_by=("as_of_date",),
        rows_in_file=FILE_ROWS,
    )


def user_features(
    daily: DataFrame, as_of: Sequence[date], config: FeaturesConfig, built_from: str, users: DataFrame | None = None
) -> DataFrame:
    """Return the features of every user with a purchase before each as-of date.

    Args:
        daily: USER_DAILY of all users: the usual price of a category is learned from all of them.
        as_of: dates before which events are seen.
        config: windows, length of the history, precision of recency.
        built_from: identity of the inputs, stored with each row.
        users: ``user_key`` of the users whose rows are returned; ``None`` for all users.
    """
    features = catalogue(config)
    requested = daily if users is None else daily.join(users, "user_key", "left_semi")
    return (
        aggregate_days(
            requested,
            as_of,
            features.aggregates,
            recency_precision_bits=config.recency_precision_bits,
            history_length=config.history_length,
        )
        .join(category_features(daily, as_of, config.recency_precision_bits), KEY, "left")
        .select(
            *KEY,
            "seen_on",
            *(F.expr(f.expression.sql).cast("float").alias(f.name) for f in features.features),
            *(column.name for column in SEQUENCE_COLUMNS),
            F.lit(built_from).alias("built_from"),
        )
        .withColumn("input_digest", input_digest(features))
    )


def input_digest(features: Catalogue) -> SparkColumn:
    """Return the xxhash64 of the features and the history of a row of ``user_features``."""
    # xxhash64 skips NULL, so that it would not matter which of two features has none
    values = (F.coalesce(F.col(name), F.lit(float("nan")).cast("float")) for name in features.names)
    return F.xxhash64(*values, *(F.col(column.name) for column in SEQUENCE_COLUMNS))
