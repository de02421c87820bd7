"""Features of prospects: users who registered or have an event, a consultation or a contact by a campaign, and no purchase.

Point in time: a row of a date reads only days before that date, and a later purchase changes none of its values. Counts are of
whole numbers, so that neither the order of addition nor the size of the cluster changes a feature by a bit.

Of ``raw_users`` the time of registration counts, and nothing else: segments are no features here either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.features.definition import KEY
from bp_spark.features.user_daily import first_order_day
from bp_spark.ingest.cleaning import local_time
from bp_spark.lakehouse.tables import PROSPECT_FEATURES

FORMAT = 2
"""Goes up when values of features change. A bundle of another format scores no prospect."""
FEATURES = tuple(column.name for column in PROSPECT_FEATURES.columns if column.type == "float")
"""What the model of prospects reads."""
SILENCE = "days_since_seen"
"""The feature that stands in for all others where there are few first purchases."""
PROSPECT_SOURCES = ("raw_behaviours", "raw_searches", "raw_reviews", "consultations", "campaign_contacts")
"""Tables that name users before their first purchase, as ``raw_users`` does with those who registered."""

_COUNTED_DAYS: Mapping[str, tuple[int, ...]] = {
    "active_days": (7, 30, 90),
    "browses": (7, 30, 90),
    "clicks": (7, 30, 90),
    "carts": (7, 30, 90),
    "favourites": (30, 90),
    "searches": (30, 90),
    "reviews": (90,),
    "items_browsed": (90,),
    "items_carted": (90,),
    "searches_cheap": (90,),
    "searches_premium": (90,),
    "consultations": (30, 90),
    "contacts": (30, 90),
}
"""Measure of a day -> windows in days over which it is summed."""
_NEWEST_DAYS = {
    "consultations": "days_since_consultation",
    "contacts": "days_since_contact",
    "registrations": "days_since_registration",
}
"""Measure that a platform may not deliver -> the feature of its newest day."""
_DWELL_DAYS = 90


def registrations(users: DataFrame, first_day: date, day_in: str) -> DataFrame:
    """Return the day on which each user registered, ``user_key, day``: the first one, of all deliveries.

    Args:
        users: RAW_USERS.
        first_day: earlier registrations are errors, and left out: an export writes 1970-01-01 for one that it doesn't know.
        day_in: zone whose days count.
    """
    day = F.to_date(local_time("signup_ts", day_in)).alias("day")
    rows = users.filter("user_key IS NOT NULL").select("user_key", day)
    return rows.filter(F.col("day") >= F.lit(first_day)).groupBy("user_key").agg(F.min("day").alias("day"))


def traces(
    daily: DataFrame, consultations: DataFrame | None, contacts: DataFrame | None, registered: DataFrame | None
) -> DataFrame:
    """Return what each user left on each day: a row per user-day, consultation, contact and registration.

    Args:
        daily: USER_DAILY.
        consultations: CONSULTATIONS; ``None`` where the platform has none.
        contacts: CAMPAIGN_CONTACTS; ``None`` where the platform has none. A contact counts on its first day.
        registered: of :func:`registrations`; ``None`` where the platform delivers no users.

    Returns:
        ``user_key, day, orders``, and the measures of a day. There is no column for a table that is ``None``.
    """
    of_days = [name for name in _COUNTED_DAYS if name in daily.columns]
    of_events = daily.select("user_key", "day", "orders", *of_days, "dwelled", "dwell_milli").withColumn(
        "active_days", F.lit(1)
    )
    others = [
        rows.select("user_key", F.col(day).alias("day"), F.lit(1).alias(name))
        for name, day, rows in (
            ("consultations", "event_date", consultations),
            ("contacts", "first_day", contacts),
            ("registrations", "day", registered),
        )
        if rows is not None
    ]
    return reduce(lambda one, other: one.unionByName(other, allowMissingColumns=True), others, of_events)


def prospect_features(traces: DataFrame, as_of: Sequence[date], silent_days: int, built_from: str) -> DataFrame:
    """Return the features of every prospect of each as-of date.

    Args:
        traces: of :func:`traces`.
        as_of: dates before which days are seen.
        silent_days: most days since a prospect was last seen.
        built_from: identity of the inputs, stored with each row.

    Returns:
        Rows of PROSPECT_FEATURES.
    """
    dates = F.array(*(F.lit(day) for day in sorted(set(as_of))))
    # a window and no join: user-days are shuffled once, and those from the first purchase on go no further
    before_purchase = F.filter(
        dates, lambda d: (d > F.col("day")) & (F.col("first_order").isNull() | (d <= F.col("first_order")))
    )
    rows = (
        traces.filter(F.col("day") < F.lit(max(as_of)))
        .withColumn("first_order", first_order_day())
        .withColumn("as_of_date", F.explode(before_purchase))
        .withColumn("age", F.datediff("as_of_date", "day"))
    )
    features = rows.groupBy(*KEY).agg(*(value.alias(name) for name, value in _aggregates(traces).items()))
    return features.filter(F.col(SILENCE) <= silent_days).select(
        *KEY, *(F.col(name).cast("float").alias(name) for name in FEATURES), F.lit(built_from).alias("built_from")
    )


def _aggregates(traces: DataFrame) -> dict[str, Column]:
    """Return feature -> its aggregate over the days of a prospect, of columns that the traces have; NULL for the others."""
    age = F.col("age")
    # NULL, and not 0
    unknown = F.min(F.lit(None).cast("int"))

    def newest(measure: str) -> Column:
        return F.min(F.when(F.col(measure).isNotNull(), age))

    def total(measure: str, days: int) -> Column:
        return F.coalesce(F.sum(F.when(age <= days, F.col(measure))), F.lit(0))

    values = {
        "days_known": F.max("age"),
        SILENCE: F.min("age"),
        "days_since_event": newest("active_days"),
        "dwell_mean_90d": F.try_divide(total("dwell_milli", _DWELL_DAYS) / 1000, total("dwelled", _DWELL_DAYS)),
    }
    for measure, windows in _COUNTED_DAYS.items():
        if measure in traces.columns:
            values |= {f"{measure}_{days}d": total(measure, days) for days in windows}
        else:
            values |= {f"{measure}_{days}d": unknown for days in windows}
    for measure, name in _NEWEST_DAYS.items():
        values[name] = newest(measure) if measure in traces.columns else unknown
    return values
