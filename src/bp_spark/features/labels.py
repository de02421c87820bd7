"""Past as-of dates and the spend that followed them: what models learn from, and who is kept apart.

Nothing from the test date on is seen. Cutoffs whose horizon was over by then are labelled whole; newer ones, of which a part
was seen, at what was seen, scaled up to the horizon (:func:`join_labels`), or at what a survey or a reviewer gave
(:func:`with_given`). Of further horizons the spend is known or not: what was not over yet is NULL, neither a part nor scaled up
(:func:`with_other_horizons`).

Users are split by a hash of their key, so that a user is on one side for ever: ``holdout`` users are never fitted on, the
others are in one of ``labels.folds`` folds, for cross-fitting: what a model says of a fold before it has seen its users.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import date, timedelta

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from bp_spark.core.config import FeaturesConfig, LabelsConfig
from bp_spark.core.errors import DataError
from bp_spark.features.aggregates import SEQUENCE_COLUMNS
from bp_spark.features.catalogue import KEY, user_features_table
from bp_spark.lakehouse.tables import Column as TableColumn
from bp_spark.lakehouse.tables import Table

MIN_HISTORY_DAYS = 30
MIN_EXPOSURE = 1 / 3
"""Share of the horizon that must have been seen of a cutoff for its spend to tell of the whole."""
BUCKETS = 10_000
HOLDOUT = -1
"""Fold of the users that no model is fitted on."""


def of_days(name: str, days: int) -> str:
    """Name of a column that is of another horizon than the main one.

    >>> of_days("label_spend", 30)
    'label_spend_30d'
    """
    return f"{name}_{days}d"


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


def recent_cutoffs(newest: date, test_date: date, config: LabelsConfig) -> list[date]:
    """The as-of dates after the ``newest`` complete one, oldest first, of whose horizon a third at least was over.

    They are what a platform with little history, or one that has changed of late, can learn most from.
    """
    shortest = math.ceil(MIN_EXPOSURE * config.horizon_days)
    dates = [newest + timedelta(days=step * config.cutoff_step_days) for step in range(1, config.recent_cutoffs + 1)]
    return [day for day in dates if (test_date - day).days >= shortest]


def future_spend(daily: DataFrame, as_of: Sequence[date], horizon_days: int, until: date | None = None) -> DataFrame:
    """Spend less refunds in the ``horizon_days`` days from each as-of date on: user_key, as_of_date, label_spend.

    Users without any event in the horizon have no row; their label is 0.

    Args:
        until: the first day that is not seen; by default none.
    """
    return _spend(daily, as_of, {"label_spend": horizon_days}, until)


def _spend(daily: DataFrame, as_of: Sequence[date], horizons: Mapping[str, int], until: date | None) -> DataFrame:
    """user_key, as_of_date and a column of spend for each of the horizons, column -> days; NULL without an event in it."""
    dates = F.array(*(F.lit(day) for day in sorted(set(as_of))))
    age = F.datediff("day", "as_of_date")
    cents = F.round(F.col("spend").cast("double") * 100).cast("long")
    seen = daily if until is None else daily.filter(F.col("day") < F.lit(until))
    return (
        seen.withColumn("as_of_date", F.explode(F.filter(dates, lambda d: d <= F.col("day"))))
        .filter(age < max(horizons.values()))
        .groupBy(*KEY)
        .agg(*((F.sum(F.when(age < days, cents)) / 100).alias(name) for name, days in horizons.items()))
    )


def weekly_spend(daily: DataFrame, until: date) -> DataFrame:
    """Spend less refunds of all users together by week, and by the week of the user's first order.

    Weeks count back from ``until``: week 0 is the seven days before it. Refunds before a first order count with no user.

    Returns:
        ``first_week int, week int, cents bigint``: as many rows as there are pairs of weeks, however many the users are.
    """

    def week(day: Column) -> Column:
        return F.floor((F.datediff(F.lit(until), day) - 1) / 7).cast("int")

    first_order = F.min(F.when(F.col("orders") > 0, F.col("day"))).over(Window.partitionBy("user_key"))
    days = daily.filter(F.col("day") < F.lit(until)).select("day", "spend", first_order.alias("first_order"))
    return (
        days.filter(F.col("day") >= F.col("first_order"))
        .groupBy(week(F.col("first_order")).alias("first_week"), week(F.col("day")).alias("week"))
        .agg((F.sum("spend") * 100).cast("long").alias("cents"))
    )


def join_labels(features: DataFrame, spend: DataFrame) -> DataFrame:
    """Features with ``label_spend``, 0 for users that did nothing in the horizon."""
    return features.join(spend, ["user_key", "as_of_date"], "left").withColumn(
        "label_spend", F.coalesce("label_spend", F.lit(0.0))
    )


def with_other_horizons(
    rows: DataFrame, daily: DataFrame, as_of: Sequence[date], horizons: Sequence[int], until: date
) -> DataFrame:
    """Add the spend of each further horizon, as ``label_spend_30d``; NULL where it was not over by ``until``.

    Args:
        rows: with user_key and as_of_date.
        as_of: the dates of ``rows``.
        horizons: days of each.
        until: the first day that is not seen.
    """
    if not horizons:
        return rows
    columns = {of_days("label_spend", days): days for days in horizons}
    found = rows.join(_spend(daily, as_of, columns, until), KEY, "left")
    over = {name: F.date_add("as_of_date", days) <= F.lit(until) for name, days in columns.items()}
    return found.withColumns({name: F.when(over[name], F.coalesce(name, F.lit(0.0))) for name in columns})


def add_weights(rows: DataFrame, test_date: date, config: LabelsConfig) -> DataFrame:
    """Add what fitting needs to know of a label: ``exposure_days``, ``complete``, ``weight`` and ``given``; scale it up to the
    horizon.

    The spend of a shorter exposure, times horizon over exposure, has the same expectation under a steady rate and a variance
    that is larger by that factor, so it weighs exposure over horizon. ``labels.recency_half_life_days`` halves the weight of a
    row for each so many days that its horizon has been over.
    """
    horizon = F.lit(float(config.horizon_days))
    until = F.datediff(F.lit(test_date), "as_of_date")
    exposure = F.least(until, F.lit(config.horizon_days))
    weight = F.col("exposure_days") / horizon
    if config.recency_half_life_days is not None:
        over = F.greatest(until - config.horizon_days, F.lit(0))
        weight = weight * F.pow(F.lit(0.5), over / F.lit(float(config.recency_half_life_days)))
    return (
        rows.withColumn("exposure_days", exposure)
        .withColumn("complete", F.col("exposure_days") == config.horizon_days)
        .withColumn("weight", weight.cast("float"))
        .withColumn("label_spend", F.col("label_spend") * horizon / F.col("exposure_days"))
        .withColumn("given", F.lit(False))
    )


def given_before(given: DataFrame, test_date: date, config: LabelsConfig) -> DataFrame:
    """The given labels that a training sees: given before the test date, of an as-of date before it, and of no horizon that
    was over by then, for what was spent is known of such a one.

    Args:
        given: rows of GIVEN_LABELS.

    Returns:
        ``user_key, as_of_date, spend``.
    """
    told = F.to_date("given_at") < F.lit(test_date)
    begun = F.col("as_of_date") < F.lit(test_date)
    over = F.date_add("as_of_date", config.horizon_days) <= F.lit(test_date)
    return given.filter(told & begun & ~over).select(*KEY, "spend")


def with_given(rows: DataFrame, given: DataFrame, test_date: date, config: LabelsConfig) -> DataFrame:
    """Features with what was given as label, and the columns of :func:`add_weights`; never ``complete``, so that nothing is
    calibrated or evaluated by what somebody said.

    Args:
        rows: features; those without a given label are left out.
        given: ``user_key, as_of_date, spend``; see :func:`given_before`.
    """
    until = F.datediff(F.lit(test_date), "as_of_date")
    return (
        rows.join(given.withColumnRenamed("spend", "label_spend"), KEY)
        .withColumn("exposure_days", F.least(until, F.lit(config.horizon_days)))
        .withColumn("complete", F.lit(False))
        .withColumn("weight", F.lit(config.given_weight).cast("float"))
        .withColumn("given", F.lit(True))
    )


def fold(config: LabelsConfig, user_key: str = "user_key") -> Column:
    """The user's fold by hash, 0 to ``folds - 1``; HOLDOUT for users held out of all fitting."""
    place = F.pmod(F.xxhash64(F.lit("split"), F.col(user_key)), F.lit(BUCKETS))
    # another hash: folds stay even however many users are held out
    number = F.pmod(F.xxhash64(F.lit("fold"), F.col(user_key)), F.lit(config.folds)).cast("int")
    return F.when(place < int(config.holdout_fraction * BUCKETS), HOLDOUT).otherwise(number)


def without_holdout(rows: DataFrame, config: LabelsConfig) -> DataFrame:
    """The rows of users that models may be fitted on, with their ``fold``."""
    return rows.withColumn("fold", fold(config)).filter(F.col("fold") != HOLDOUT)


def training_set_table(config: FeaturesConfig, other_horizons: Sequence[int]) -> Table:
    """Features, labels and split of all cutoffs."""
    features = user_features_table(config)
    return Table(
        "training_set",
        "User features at past cutoffs with the spend that followed; holdout users are not in it",
        (
            *features.columns,
            TableColumn(
                "label_spend",
                "double",
                "Spend less refunds in the horizon after as_of_date; where that was not over yet, in exposure_days, times "
                "horizon over exposure, or as given",
                required=True,
            ),
            *(
                TableColumn(
                    of_days("label_spend", days),
                    "double",
                    f"Spend less refunds in the {days} days from as_of_date on; NULL where they were not over yet",
                )
                for days in other_horizons
            ),
            TableColumn("exposure_days", "int", "Days of the horizon that were seen", required=True),
            TableColumn("weight", "float", "Weight of the row in fitting", required=True),
            TableColumn("complete", "boolean", "Whether the whole horizon was seen", required=True),
            TableColumn(
                "given", "boolean", "Whether the label is one of given_labels, not what was seen", required=True
            ),
            TableColumn(
                "fold", "int", "Part, by the user's hash, that is predicted by models of the other parts", required=True
            ),
        ),
        key=features.key,
        partition_by=("complete", "fold"),
    )


def pretraining_set_table() -> Table:
    """Histories without labels, for :mod:`bp_spark.training.tasks.pretrain`."""
    return Table(
        "pretraining_set",
        "User histories without labels; holdout users are not in it",
        (
            TableColumn("user_key", "string", "User", required=True),
            TableColumn("as_of_date", "date", "Only events before this day are seen", required=True),
            *SEQUENCE_COLUMNS,
            TableColumn("fold", "int", "Part, by the user's hash, as in training_set", required=True),
        ),
        key=("user_key", "as_of_date"),
        partition_by=("fold",),
    )
