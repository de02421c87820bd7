"""Users and what they visit: the latent truth, the visits, and the items of each visit."""

from __future__ import annotations

import math
from datetime import timedelta

import numpy as np
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import SyntheticConfig
from bp_spark.ingest.sources.synthetic.currency import CNY_SHARE
from bp_spark.ingest.sources.synthetic.draws import gamma, normal, poisson, sigmoid, uniform, whole
from bp_spark.ingest.sources.synthetic.items import (
    PER_DEPARTMENT,
    TIER_RATIO,
    TIERS,
    TYPES,
    list_price,
    popular_item,
)
from bp_spark.ingest.sources.synthetic.text import pick, text_time

# rates are per day, values in USD
LAMBDA_SHAPE, LAMBDA_MEAN = 0.553, 11.0 / 365
"""r of Pareto/NBD, and the mean of lambda: orders per day while alive."""
MU_SHAPE, MU_SCALE_DAYS = 0.606, 300.0
"""s and beta of Pareto/NBD."""
VALUE_SHAPE, NU_SHAPE, NU_SCALE = 6.25, 3.74, 15.44
"""p, q and gamma of Gamma-Gamma; the mean order value is p gamma / (q - 1) = 35 USD."""
Z_IN_LAMBDA, Z_IN_VALUE = 0.5, 0.7
"""Correlations of the normal scores with z."""
SIGNED_UP_BEFORE, DAYS_BEFORE = 0.6, 730
"""Share of users who signed up before the period, and how many days before at most."""
INCOME_BOUNDS = (-0.43, 0.43)
"""Normal scores that part low, middle and high incomes."""
WEEKDAYS = (0.9, 0.9, 0.95, 1.0, 1.1, 1.15, 1.0)
"""Relative activity from Monday to Sunday."""
DECEMBER, LAST_DAY_OF_GIFTS, OF_DECEMBER = 12, 24, 1.3
"""Month and last day of the season of gifts, and its relative activity."""
PEAKS, DAYS_BEFORE_PEAK, OF_PEAK, OF_DAYS_BEFORE_PEAK = ((6, 18), (11, 11)), 3, 2.2, 1.5
"""Month and day of each peak, days of run-up, relative activity of the peak and of its run-up."""
HOURS = (2, 1, 1, 1, 1, 2, 4, 6, 9, 11, 13, 13, 14, 13, 12, 12, 13, 14, 16, 19, 21, 19, 12, 6)
"""Weights of the hours of a day, from midnight UTC."""
MAX_LINES, MAX_LOOKED_AT = 6, 3
"""Most items of an order and of another visit."""
OWN_DEPARTMENT, SEVERAL, PROMOTED = 0.5, 0.15, 0.4
"""Shares of lines from the user's department, of lines with more than one piece, and of lines at a reduction."""
TASKS_AT_LEAST = 8


def users(spark: SparkSession, config: SyntheticConfig) -> DataFrame:
    """Return the latent truth, one row per user.

    Rates are per day, money is in USD, days count from the first day of the period. A user signs up on ``signup_day`` and is
    alive in the period for ``alive_days`` from ``first_alive_day`` on. ``lambda``, ``mu`` and ``mean_value`` are the model's,
    ``conversion`` is orders per visit, ``candidates`` are visits before thinning, ``expected_spend_90d`` is the spend of 90
    days alive, before refunds.
    """

    def u(purpose: str) -> Column:
        return uniform(config, purpose, "id")

    def leaning(purpose: str, rho: float) -> Column:
        return rho * F.col("z") + math.sqrt(1 - rho**2) * normal(config, purpose, "id")

    is_new = u("signed up before") >= SIGNED_UP_BEFORE
    signup_day = F.when(is_new, whole(u("signup") * config.days)).otherwise(-1 - whole(u("signup") * DAYS_BEFORE))
    lifetime = F.least(F.ceil(-F.log(u("lifetime")) / F.col("mu")), F.lit(10_000_000)).cast("int")
    last = F.least(F.col("signup_day") + lifetime, F.lit(config.days))
    low, high = (F.col("income_score") < bound for bound in INCOME_BOUNDS)
    visits = F.col("lambda") / F.col("conversion") * F.col("alive_days") * float(season(config).max())
    return (
        spark.range(0, config.users, 1, max(TASKS_AT_LEAST, config.users // 100_000))
        .withColumns(
            {
                "user_id": F.concat(F.lit("u"), F.lpad(F.col("id").cast("string"), 9, "0")),
                "z": normal(config, "z", "id"),
                "mu": gamma(MU_SHAPE, normal(config, "mu", "id")) / MU_SCALE_DAYS,
                "signup_day": signup_day,
                "chinese": u("language") < config.chinese_share,
                "department": whole(u("department") * (len(TYPES) // PER_DEPARTMENT)),
                "age": pick(("18-24", "25-34", "35-44", "45-54", "55-64", "65+"), u("age")),
            }
        )
        .withColumns(
            {
                "lambda": gamma(LAMBDA_SHAPE, leaning("lambda", Z_IN_LAMBDA)) * (LAMBDA_MEAN / LAMBDA_SHAPE),
                # values fall with nu: the low half of its scores makes the high half of values
                "mean_value": VALUE_SHAPE * NU_SCALE / gamma(NU_SHAPE, -leaning("nu", Z_IN_VALUE)),
                "conversion": 0.15 + 0.5 * sigmoid(0.5 * F.col("z") + normal(config, "conversion", "id")),
                "cny": F.col("chinese") & (u("currency") < CNY_SHARE),
                "income_score": leaning("income", 0.6),
                "first_alive_day": F.greatest(F.col("signup_day"), F.lit(0)),
                "signup_ts": text_time(config, F.col("signup_day"), whole(u("signup time") * 86400)),
            }
        )
        .withColumns(
            {
                "alive_days": F.greatest(last - F.col("first_alive_day"), F.lit(0)),
                "income": F.when(low, "low").when(high, "middle").otherwise("high"),
                "expected_spend_90d": 90 * F.col("lambda") * F.col("mean_value"),
            }
        )
        .withColumn("candidates", poisson(visits, u("visits"), normal(config, "visits", "id")))
        .drop("income_score")
    )


def season(config: SyntheticConfig) -> np.ndarray:
    """Return the relative activity of each day of the period, float64 ``(days,)`` with mean 1."""
    weights = np.empty(config.days)
    for number in range(config.days):
        day = config.first_day + timedelta(number)
        is_gift_season = day.month == DECEMBER and day.day <= LAST_DAY_OF_GIFTS
        weights[number] = WEEKDAYS[day.weekday()] * (OF_DECEMBER if is_gift_season else 1.0)
        for month, peak in PEAKS:
            if day.month == month and peak - DAYS_BEFORE_PEAK <= day.day <= peak:
                weights[number] *= OF_PEAK if day.day == peak else OF_DAYS_BEFORE_PEAK
    return np.asarray(weights / weights.mean())


def visits(users: DataFrame, config: SyntheticConfig) -> DataFrame:
    """Return one row per visit.

    Adds to the user's columns ``visit`` (its number), ``day``, ``second`` (of the day), ``bought`` and ``value`` (USD).
    """
    key = ("id", "visit")
    weights = season(config)
    hours = F.lit(np.repeat(np.arange(24), HOURS).astype("int32"))
    hour = F.get(hours, whole(uniform(config, "hour", *key) * sum(HOURS)))
    happens = uniform(config, "thinning", *key) * float(weights.max()) < F.get(F.lit(weights), F.col("day"))
    return (
        users.repartition(max(TASKS_AT_LEAST, config.users // 25_000), "id")
        .filter("candidates > 0")
        .withColumn("visit", F.explode(F.sequence(F.lit(1), F.col("candidates"))))
        .withColumn("day", F.col("first_alive_day") + whole(uniform(config, "day", *key) * F.col("alive_days")))
        .filter(happens)
        .withColumns(
            {
                "second": hour * 3600 + whole(uniform(config, "second", *key) * 3600),
                "bought": uniform(config, "bought", *key) < F.col("conversion"),
                "value": F.col("mean_value") * gamma(VALUE_SHAPE, normal(config, "value", *key)) / VALUE_SHAPE,
            }
        )
    )


def lines(visits: DataFrame, config: SyntheticConfig) -> DataFrame:
    """Return one row per item of a visit; where ``bought``, an order line.

    Adds ``line`` (from 1), ``type``, ``tier``, ``item``, ``quantity``, ``paid``, ``discount`` and ``coupon`` (USD).
    """
    key = ("id", "visit", "line")

    def u(purpose: str) -> Column:
        return uniform(config, purpose, *key)

    most = F.when(F.col("bought"), MAX_LINES).otherwise(MAX_LOOKED_AT)
    wanted = 1 + whole(-F.log(uniform(config, "lines", "id", "visit")) * F.when(F.col("bought"), 1.6).otherwise(0.6))
    shares = F.transform(
        F.sequence(F.lit(1), F.least(wanted, most)),
        lambda line: 0.3 - F.log(uniform(config, "share", "id", "visit", line)),
    )
    own_type = F.col("department") * PER_DEPARTMENT + whole(u("own type") * PER_DEPARTMENT)
    pieces = F.when(u("several") < SEVERAL, 2 + whole(u("how many") * 3)).otherwise(1)
    price, dearest = F.lit(np.array([kind[4] for kind in TYPES])), TIER_RATIO ** (TIERS / 2)
    middle = F.get(price, F.col("type"))
    tier = whole(F.log(F.col("paid") / F.col("quantity") / middle) / math.log(TIER_RATIO) + TIERS / 2)
    is_promoted = u("promotion") < PROMOTED
    reduction = F.greatest(F.col("quantity") * list_price(config) - F.col("paid"), F.lit(0.0))
    has_coupon = u("coupon") < sigmoid(-0.5 - 0.8 * F.col("z"))
    return (
        visits.withColumn("shares", shares)
        .withColumn("total", F.aggregate("shares", F.lit(0.0), lambda total, share: total + share))
        .select("*", F.posexplode("shares").alias("position", "share"))
        .drop("shares")
        .withColumn("line", F.col("position") + 1)
        .withColumns(
            {
                "type": F.when(u("own department") < OWN_DEPARTMENT, own_type).otherwise(
                    whole(u("type") ** 1.5 * len(TYPES))
                ),
                "paid": F.greatest(F.col("value") * F.col("share") / F.col("total"), F.lit(0.5)),
            }
        )
        .withColumn("quantity", F.greatest(pieces, F.ceil(F.col("paid") / (middle * dearest)).cast("int")))
        .withColumn("tier", F.least(F.greatest(tier, F.lit(0)), F.lit(TIERS - 1)))
        .withColumn("item", popular_item(config, u("item"), u("hot")))
        .withColumn("discount", F.when(F.col("bought") & is_promoted, reduction).otherwise(0.0))
        .withColumn("coupon", F.when(has_coupon, F.col("discount") / 2).otherwise(0.0))
    )
