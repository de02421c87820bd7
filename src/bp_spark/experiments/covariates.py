"""Covariates of users as of any past date: sums over windows of ``user_daily``, and contacts by campaigns.

Unlike ``user_features`` these need no stored rows of the date, so that placebo dates are as good as any other. No event of the
date or after it is seen.
"""

from __future__ import annotations

from datetime import date

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

WINDOWS = (7, 14, 28, 56, 91, 182, 364)
"""Days over which spend and orders are summed."""
OTHER_WINDOWS = (28, 91, 364)
"""Days over which all else is summed."""
WEEKS = 8
"""Weeks before the date, each with its spend."""
_MEASURES = ("items", "discount", "coupon_discount", "coupons", "refunds", "browses", "carts", "searches")
_CONTACT_DAYS = 91


def covariates(daily: DataFrame, day: date) -> DataFrame:
    """Return what was known of each user with an order before a date.

    Args:
        daily: USER_DAILY.
        day: the first day that is not seen.

    Returns:
        ``user_key`` and covariates as floats; money in the platform's currency.
    """
    age = F.datediff(F.lit(day), "day")

    def total(measure: str, oldest: int | None = None, newest: int = 1) -> Column:
        value = F.col(measure)
        return F.sum(value if oldest is None else F.when((age >= newest) & (age <= oldest), value).otherwise(0))

    values = {
        "days_since_order": F.min(F.when(F.col("orders") > 0, age)),
        "days_known": F.max(F.when(F.col("orders") > 0, age)),
        "days_since_event": F.min(age),
        "largest_order": F.max("order_value_max"),
        "spend": total("spend"),
        "orders": total("orders"),
    }
    for days in WINDOWS:
        values |= {f"{measure}_{days}d": total(measure, days) for measure in ("spend", "orders")}
    for week in range(1, WEEKS + 1):
        values[f"spend_week_{week}"] = total("spend", 7 * week, 7 * week - 6)
    for days in OTHER_WINDOWS:
        values |= {f"{measure}_{days}d": total(measure, days) for measure in _MEASURES}
    rows = daily.filter(F.col("day") < F.lit(day)).groupBy("user_key")
    found = rows.agg(*(value.cast("float").alias(name) for name, value in values.items()))
    return found.filter(F.col("days_since_order").isNotNull())


def other_contacts(contacts: DataFrame, campaign: str, day: date) -> DataFrame:
    """Return the contacts of users by other campaigns that began by a date.

    Args:
        contacts: CAMPAIGN_CONTACTS.
        campaign: the campaign that is left out.
        day: contacts of that day count: their users were chosen before it.

    Returns:
        ``user_key``, ``contacts``, ``contacts_91d``, ``contacts_running`` (begun and not over) and ``days_since_contact``, as
        floats; users without a contact have no row.
    """
    age = F.datediff(F.lit(day), "first_day")
    begun = contacts.filter((F.col("campaign_id") != campaign) & (F.col("first_day") <= F.lit(day)))
    is_running = F.coalesce("last_day", "first_day") >= F.lit(day)
    values = {
        "contacts": F.count_distinct("campaign_id"),
        f"contacts_{_CONTACT_DAYS}d": F.count_distinct(F.when(age <= _CONTACT_DAYS, F.col("campaign_id"))),
        "contacts_running": F.count_distinct(F.when(is_running, F.col("campaign_id"))),
        "days_since_contact": F.min(age),
    }
    return begun.groupBy("user_key").agg(*(value.cast("float").alias(name) for name, value in values.items()))


def later_contacts(contacts: DataFrame, campaign: str, day: date, days: int) -> DataFrame:
    """Return the users whom another campaign contacted within the window, after its first day: ``user_key``."""
    last = F.date_add(F.lit(day), days - 1)
    later = (F.col("first_day") > F.lit(day)) & (F.col("first_day") <= last) & (F.col("campaign_id") != campaign)
    return contacts.filter(later).select("user_key").distinct()
