"""Past as-of dates and the spend that followed them: the labels that models learn from, and the split of users.

No label sees the test date or a day after it. A cutoff whose whole horizon lies before the test date gets the whole spend.
A newer cutoff gets the spend seen so far, scaled up to the horizon as past spend went on (:func:`exposure_factors`), or the
label of a survey or a reviewer (:func:`join_survey_labels`). Further horizons are never scaled up: a horizon that reaches
beyond the test date is NULL (:func:`with_other_horizons`).

Users are split by a hash of their key, so a user stays on one side for ever. No model is fitted on ``holdout`` users. The
others are in one of ``labels.folds`` folds for cross-fitting: a fold is predicted by models that have not seen its users.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import date, timedelta

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import FeaturesConfig, LabelsConfig
from bp_spark.core.errors import DataError
from bp_spark.features import definition
from bp_spark.features.aggregates import SEQUENCE_COLUMNS
from bp_spark.features.catalogue import user_features_table
from bp_spark.features.user_daily import cents, first_order_day
from bp_spark.lakehouse.schema import Column as TableColumn
from bp_spark.lakehouse.schema import Table

KEY = definition.KEY
"""Columns that identify a row of features and labels."""
MIN_HISTORY_DAYS = 30
"""Days of events that lie before each cutoff, unless half of the horizon is shorter."""
MIN_EXPOSURE = 1 / 3
"""Share of a cutoff's horizon that must have been seen, so that its spend is a fair sample of the whole."""
WEEKS_A_YEAR = 52
COMPARABLE_DAYS = 252
"""Days of events before a date of the year before: predictions of shorter histories can't be compared with today's."""
AROUND_WEEKS = (-2, 0, 2)
"""Weeks around the same date of the year before: one date alone has more noise, further ones another season."""
LARGEST_EXPOSURE_FACTOR = 2.0
"""Largest factor of the spend of a shorter exposure, as a multiple of horizon over exposure."""
BUCKETS = 10_000
"""Parts into which a hash divides the users; some of them are held out."""
HOLDOUT = -1
"""Fold of users on whom no model is fitted."""


def horizon_column(name: str, days: int) -> str:
    """Return the name of a column that belongs to another horizon than the main one.

    >>> horizon_column("label_spend", 30)
    'label_spend_30d'
    """
    return f"{name}_{days}d"


def history_days(horizon_days: int) -> int:
    """Return the days of events that must lie before each cutoff: half of a horizon, but no more than 30 days.

    >>> history_days(90), history_days(14)
    (30, 7)
    """
    return min(MIN_HISTORY_DAYS, math.ceil(horizon_days / 2))


def with_horizon_in_reach(config: LabelsConfig, first_event: date, last_event: date) -> LabelsConfig:
    """Return the settings with the longest horizon that a training has enough events for.

    Args:
        config: the configured horizon and shorter ones.
        first_event: day of the first event.
        last_event: day of the last event.

    Raises:
        DataError: there are shorter horizons, and events are too few for the shortest, too.
    """
    shorter = sorted((days for days in config.shorter_horizons if days < config.horizon_days), reverse=True)
    known = (last_event - first_event).days
    for days in (config.horizon_days, *shorter):
        if known >= days_needed(days):
            return config.with_horizon(days)
    if not shorter:
        return config
    raise DataError(
        "events",
        f"must reach over {days_needed(shorter[-1])} days to train for the shortest of labels.shorter_horizons, "
        f"{shorter[-1]} days, but reach over {known}",
        column="event_date",
    )


def days_needed(horizon_days: int) -> int:
    """Return the days from the first event to the last that a training with such a horizon needs.

    It needs one horizon to be judged by, one before that to learn from, and history before both.
    """
    return 2 * horizon_days + history_days(horizon_days)


def cutoffs(first_event: date, test_date: date, config: LabelsConfig) -> list[date]:
    """Return the as-of dates to label, oldest first.

    Each horizon ends on or before the test date, and :func:`history_days` of events lie before each date.

    Args:
        first_event: day of the first event.
        test_date: the first day that no label may see.
        config: horizon, number of cutoffs and the days between them.

    Raises:
        DataError: the events don't reach far enough back for a single cutoff.
    """
    newest = test_date - timedelta(days=config.horizon_days)
    history = history_days(config.horizon_days)
    oldest = first_event + timedelta(days=history)
    dates = [newest - timedelta(days=step * config.cutoff_step_days) for step in range(config.cutoffs)]
    usable = sorted(day for day in dates if day >= oldest)
    if not usable:
        raise DataError(
            "events",
            f"must reach back {config.horizon_days + history} days before {test_date} to train, "
            f"but begin on {first_event}; a shorter labels.horizon_days needs less",
            column="event_date",
        )
    return usable


def recent_cutoffs(newest: date, test_date: date, config: LabelsConfig) -> list[date]:
    """Return the as-of dates after the newest complete one, oldest first, with a third of their horizon seen.

    A platform with little history, or one that changed recently, learns most from these dates.

    Args:
        newest: the newest of :func:`cutoffs`.
        test_date: the first day that no label may see.
        config: horizon, number of recent cutoffs and the days between them.
    """
    shortest = math.ceil(MIN_EXPOSURE * config.horizon_days)
    dates = [newest + timedelta(days=step * config.cutoff_step_days) for step in range(1, config.recent_cutoffs + 1)]
    return [day for day in dates if (test_date - day).days >= shortest]


def year_before(first_event: date, test_date: date, config: LabelsConfig) -> list[date]:
    """Return the as-of dates around the test date's weekday of the year before, oldest first, to measure a season by.

    Each horizon ends on or before the test date, and :data:`COMPARABLE_DAYS` of events lie before each date.

    Args:
        first_event: day of the first event.
        test_date: the first day that no label may see.
        config: the horizon.
    """
    same_day = test_date - timedelta(weeks=WEEKS_A_YEAR)
    newest, oldest = test_date - timedelta(days=config.horizon_days), first_event + timedelta(days=COMPARABLE_DAYS)
    dates = [same_day + timedelta(weeks=weeks) for weeks in AROUND_WEEKS]
    return [day for day in dates if oldest <= day <= newest]


def future_spend(daily: DataFrame, as_of: Sequence[date], horizon_days: int, until: date | None = None) -> DataFrame:
    """Return the spend less refunds in the ``horizon_days`` days from each as-of date on.

    Users without any event in the horizon have no row; their label is 0.

    Args:
        daily: USER_DAILY.
        as_of: the first days of the horizons.
        horizon_days: length of each horizon.
        until: the first day that is not seen; ``None`` sees all days.

    Returns:
        ``user_key, as_of_date, label_spend``.
    """
    return _spend(daily, as_of, {"label_spend": horizon_days}, until)


def _spend(daily: DataFrame, as_of: Sequence[date], horizons: Mapping[str, int], until: date | None) -> DataFrame:
    """Return ``user_key, as_of_date`` and a column of spend for each horizon; NULL without an event in the horizon.

    Args:
        daily: USER_DAILY.
        as_of: the first days of the horizons.
        horizons: column -> days of its horizon.
        until: the first day that is not seen; ``None`` sees all days.
    """
    return sums_ahead(daily, as_of, {name: ("spend", days) for name, days in horizons.items()}, until)


def sums_ahead(
    daily: DataFrame, as_of: Sequence[date], sums: Mapping[str, tuple[str, int]], until: date | None = None
) -> DataFrame:
    """Return ``user_key, as_of_date`` and sums of money from each date on; no row without an event in the longest horizon.

    Args:
        daily: USER_DAILY.
        as_of: the first days of the horizons.
        sums: column -> the column of money to add up, and the days of its horizon. NULL without an event in that horizon.
        until: the first day that is not seen; ``None`` sees all days.
    """
    dates = F.array(*(F.lit(day) for day in sorted(set(as_of))))
    age = F.datediff("day", "as_of_date")
    seen = daily if until is None else daily.filter(F.col("day") < F.lit(until))
    return (
        seen.withColumn("as_of_date", F.explode(F.filter(dates, lambda d: d <= F.col("day"))))
        .filter(age < max(days for _, days in sums.values()))
        .groupBy(*KEY)
        .agg(*((F.sum(F.when(age < days, cents(money))) / 100).alias(name) for name, (money, days) in sums.items()))
    )


def weekly_spend(daily: DataFrame, until: date) -> DataFrame:
    """Return the spend less refunds of all users together, by week and by the week of the user's first order.

    Weeks count back from ``until``: week 0 is the seven days before it. Refunds before a user's first order don't count.

    Args:
        daily: USER_DAILY.
        until: the first day that is not seen.

    Returns:
        ``first_week int, week int, cents bigint``: a row per pair of weeks, however many users there are.
    """

    def week(day: Column) -> Column:
        return F.floor((F.datediff(F.lit(until), day) - 1) / 7).cast("int")

    days = daily.filter(F.col("day") < F.lit(until)).select("day", "spend", first_order_day().alias("first_order"))
    return (
        days.filter(F.col("day") >= F.col("first_order"))
        .groupBy(week(F.col("first_order")).alias("first_week"), week(F.col("day")).alias("week"))
        .agg((F.sum("spend") * 100).cast("long").alias("cents"))
    )


def join_labels(features: DataFrame, spend: DataFrame) -> DataFrame:
    """Add ``label_spend`` to features; 0 for users who did nothing in the horizon."""
    return features.join(spend, ["user_key", "as_of_date"], "left").withColumn(
        "label_spend", F.coalesce("label_spend", F.lit(0.0))
    )


def with_other_horizons(
    rows: DataFrame, daily: DataFrame, as_of: Sequence[date], horizons: Sequence[int], until: date
) -> DataFrame:
    """Add the spend of each further horizon, as ``label_spend_30d``; NULL where the horizon ends after ``until``.

    Args:
        rows: rows with user_key and as_of_date.
        daily: USER_DAILY.
        as_of: the dates of ``rows``.
        horizons: days of each further horizon.
        until: the first day that is not seen.
    """
    if not horizons:
        return rows
    columns = {horizon_column("label_spend", days): days for days in horizons}
    with_spend = rows.join(_spend(daily, as_of, columns, until), KEY, "left")
    is_over = {name: F.date_add("as_of_date", days) <= F.lit(until) for name, days in columns.items()}
    return with_spend.withColumns({name: F.when(is_over[name], F.coalesce(name, F.lit(0.0))) for name in columns})


def exposure_factors(
    users: DataFrame, daily: DataFrame, as_of: Sequence[date], test_date: date, config: LabelsConfig
) -> dict[int, float]:
    """Return the factor from the spend of each shorter exposure to that of the whole horizon, by days of exposure.

    The factor is what all users of the complete cutoffs spent in their horizon, over what they spent in its first days: the
    development factor of the chain ladder (Mack 1993). Users leave, so their spend falls within a horizon: horizon over
    exposure would promise too much. That ratio stands in where nothing was spent. The factor is at least 1, and at most
    :data:`LARGEST_EXPOSURE_FACTOR` times that ratio.

    Args:
        users: rows with ``user_key`` and ``as_of_date`` of all cutoffs; holdout users are left out here.
        daily: USER_DAILY.
        as_of: all cutoffs, complete or not.
        test_date: the first day that no label may see.
        config: the horizon.
    """
    horizon = config.horizon_days
    seen_days = {day: (test_date - day).days for day in as_of}
    exposures = sorted(days for days in seen_days.values() if days < horizon)
    complete = [day for day, days in seen_days.items() if days >= horizon]
    if not exposures or not complete:
        return {days: horizon / days for days in exposures}
    columns = {f"first_{days}": days for days in (*exposures, horizon)}
    spent = _spend(daily, complete, columns, test_date)
    sums = without_holdout(users, config).join(spent, KEY).agg(*(F.sum(name).alias(name) for name in columns)).first()
    assert sums is not None
    whole = sums[f"first_{horizon}"] or 0.0
    factors = {}
    for days in exposures:
        first, steady = sums[f"first_{days}"] or 0.0, horizon / days
        factor = whole / first if first > 0 and whole > 0 else steady
        factors[days] = min(max(factor, 1.0), LARGEST_EXPOSURE_FACTOR * steady)
    return factors


def add_weights(rows: DataFrame, test_date: date, config: LabelsConfig, factors: Mapping[int, float]) -> DataFrame:
    """Add ``exposure_days``, ``complete``, ``weight`` and ``given``, and scale the label up to the horizon.

    The spend of a shorter exposure says less, so the row weighs exposure over horizon. With ``labels.recency_half_life_days``
    the weight halves for each so many days since the horizon ended.

    Args:
        rows: features with ``label_spend``.
        test_date: the first day that no label may see.
        config: horizon and half-life.
        factors: days of exposure -> factor of the label; see :func:`exposure_factors`. Whole horizons need none.
    """
    horizon = F.lit(float(config.horizon_days))
    until = F.datediff(F.lit(test_date), "as_of_date")
    exposure = F.least(until, F.lit(config.horizon_days))
    weight = F.col("exposure_days") / horizon
    if config.recency_half_life_days is not None:
        over = F.greatest(until - config.horizon_days, F.lit(0))
        weight = weight * F.pow(F.lit(0.5), over / F.lit(float(config.recency_half_life_days)))
    factor = F.lit(1.0)
    for days, value in factors.items():
        factor = F.when(F.col("exposure_days") == days, value).otherwise(factor)
    return (
        rows.withColumn("exposure_days", exposure)
        .withColumn("complete", F.col("exposure_days") == config.horizon_days)
        .withColumn("weight", weight.cast("float"))
        .withColumn("label_spend", F.col("label_spend") * factor)
        .withColumn("given", F.lit(False))
    )


def survey_labels_before(survey_labels: DataFrame, test_date: date, config: LabelsConfig) -> DataFrame:
    """Return the survey labels that a training run may see.

    A label counts if it was given before the test date and its as-of date lies before the test date. A horizon that is over by
    then needs no survey: its spend was seen.

    Args:
        survey_labels: rows of GIVEN_LABELS.
        test_date: the first day that no label may see.
        config: the horizon.

    Returns:
        ``user_key, as_of_date, spend``.
    """
    was_given = F.to_date("given_at") < F.lit(test_date)
    has_begun = F.col("as_of_date") < F.lit(test_date)
    is_over = F.date_add("as_of_date", config.horizon_days) <= F.lit(test_date)
    return survey_labels.filter(was_given & has_begun & ~is_over).select(*KEY, "spend")


def join_survey_labels(rows: DataFrame, survey_labels: DataFrame, test_date: date, config: LabelsConfig) -> DataFrame:
    """Add survey labels to features, with the columns of :func:`add_weights`.

    The rows are never ``complete``: no model is calibrated or evaluated by what somebody stated in a survey.

    Args:
        rows: features; rows without a survey label are left out.
        survey_labels: ``user_key, as_of_date, spend``; see :func:`survey_labels_before`.
        test_date: the first day that no label may see.
        config: horizon and weight of a survey label.
    """
    until = F.datediff(F.lit(test_date), "as_of_date")
    return (
        rows.join(survey_labels.withColumnRenamed("spend", "label_spend"), KEY)
        .withColumn("exposure_days", F.least(until, F.lit(config.horizon_days)))
        .withColumn("complete", F.lit(False))
        .withColumn("weight", F.lit(config.given_weight).cast("float"))
        .withColumn("given", F.lit(True))
    )


def fold(config: LabelsConfig, user_key: str = "user_key") -> Column:
    """Return the user's fold by hash, 0 to ``folds - 1``; HOLDOUT for users held out of all fitting."""
    bucket = F.pmod(F.xxhash64(F.lit("split"), F.col(user_key)), F.lit(BUCKETS))
    # another hash: folds stay even however many users are held out
    number = F.pmod(F.xxhash64(F.lit("fold"), F.col(user_key)), F.lit(config.folds)).cast("int")
    return F.when(bucket < int(config.holdout_fraction * BUCKETS), HOLDOUT).otherwise(number)


def without_holdout(rows: DataFrame, config: LabelsConfig) -> DataFrame:
    """Return the rows of users on whom models may be fitted, with their ``fold``."""
    return rows.withColumn("fold", fold(config)).filter(F.col("fold") != HOLDOUT)


def training_set_table(config: FeaturesConfig, other_horizons: Sequence[int]) -> Table:
    """Return the table of features, labels and split of all cutoffs."""
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
                "what past horizons brought over their first exposure_days, or as given",
                required=True,
            ),
            *(
                TableColumn(
                    horizon_column("label_spend", days),
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
    """Return the table of histories without labels, for :mod:`bp_spark.training.tasks.pretrain`."""
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
