"""Category features: how many categories a user buys from, which ones, and how dear the items are within them.

In: ``user_daily``. Out: a row per user and as-of date with columns ``c_...``, which the expressions of
:mod:`bp_spark.features.groups` read.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.features.clock import quantized_recency
from bp_spark.features.definition import KEY

CATEGORY_BUCKETS = 16
SHORT, LONG = WINDOWS = (90, 365)
"""Days before the user's ``seen_on``."""
MIN_PRICED_LINES = 10
"""A category with fewer lines has no usual price."""
MIN_STD = 1e-3
"""A category whose log prices scatter less has no usual price."""
PREMIUM_STD = 0.5
"""Standard deviations above the mean from which a user buys dear."""


def category_features(daily: DataFrame, as_of: Sequence[date], precision_bits: int | None) -> DataFrame:
    """Return diversity and shares of categories, and the position of prices within them, per user and date.

    The reference of a price is what all users paid for lines of the category in the year before the as-of date: mean and
    standard deviation of the log unit price. Positions are NULL where a category has no reference.

    Args:
        daily: USER_DAILY of all users.
        as_of: dates before which events are seen.
        precision_bits: see :func:`bp_spark.features.clock.quantize_recency`.
    """
    by_category = _by_category(daily, _user_clocks(daily, as_of, precision_bits))
    with_reference = by_category.join(_usual_prices(by_category), ["as_of_date", "category"], "left")
    return _by_user(_by_top_level(with_reference))


def _user_clocks(daily: DataFrame, as_of: Sequence[date], precision_bits: int | None) -> DataFrame:
    """Return ``user_key, as_of_date, seen_on`` of each user with a day before the as-of date."""
    dates = F.array(*(F.lit(day) for day in sorted(as_of)))
    last = F.max(F.when(F.col("day") < F.col("as_of_date"), F.col("day"))).alias("last")
    silence = quantized_recency(F.datediff("as_of_date", "last"), precision_bits)
    return (
        daily.select("user_key", "day")
        .filter(F.col("day") < F.lit(max(as_of)))
        .withColumn("as_of_date", F.explode(dates))
        .groupBy(*KEY)
        .agg(last)
        .filter(F.col("last").isNotNull())
        .select(*KEY, F.date_add("last", silence).alias("seen_on"))
    )


def _by_category(daily: DataFrame, clocks: DataFrame) -> DataFrame:
    """Return the sums of both windows, for each user, date and full category path."""
    days = daily.filter(F.size("categories") > 0).select("user_key", "day", "categories")
    entries = (
        # clocks are narrow and days are wide: hashed, neither is sorted
        days.join(clocks.hint("shuffle_hash"), "user_key")
        .filter(F.col("day") < F.col("as_of_date"))
        .withColumn("age", F.datediff("seen_on", "day"))
        .filter(F.col("age") <= LONG)
        .select(*KEY, "age", F.inline("categories"))
    )
    sums = ("spend", "priced", "price_micro")
    recent = F.col("age") <= SHORT
    return entries.groupBy(*KEY, "category").agg(
        *(F.sum(name).alias(f"{name}_{LONG}") for name in sums),
        *(F.sum(F.when(recent, F.col(name)).otherwise(0)).alias(f"{name}_{SHORT}") for name in sums),
        F.sum("price_sq").alias("price_sq"),
    )


def _usual_prices(by_category: DataFrame) -> DataFrame:
    """Return mean and standard deviation of the log unit price of each date and category."""
    lines = F.sum("priced_365")
    mean = F.try_divide(F.sum("price_micro_365") / 1e6, lines)
    variance = F.try_divide(F.sum("price_sq") / 1e6, lines) - mean * mean
    return (
        by_category.groupBy("as_of_date", "category")
        .agg(lines.alias("n"), mean.alias("mean"), F.sqrt(F.greatest(variance, F.lit(0.0))).alias("std"))
        .filter((F.col("n") >= MIN_PRICED_LINES) & (F.col("std") > MIN_STD))
        .select("as_of_date", "category", "mean", "std")
    )


def _by_top_level(with_reference: DataFrame) -> DataFrame:
    """Return sums of each user, date and top-level category."""
    top_level = F.split("category", " > ")[0]
    bucket = F.pmod(F.xxhash64(top_level), F.lit(CATEGORY_BUCKETS)).cast("int")
    return (
        with_reference.withColumn("bucket", bucket)
        .groupBy(*KEY, top_level.alias("top"), "bucket")
        .agg(
            F.sum("spend_365").alias("spend_365"),
            F.sum("spend_90").alias("spend_90"),
            F.count_if(F.col("spend_365") > 0).alias("types"),
            # rounded before they are added up: the sum is then the same in any order
            *(F.sum(F.round(_position(days) * 1000).cast("long")).alias(f"tier_{days}") for days in WINDOWS),
            *(
                F.sum(F.when(F.col("std").isNotNull(), F.col(f"priced_{days}"))).alias(f"tiered_{days}")
                for days in WINDOWS
            ),
            F.sum(F.col("spend_365") * _is_premium().cast("int")).alias("premium"),
        )
    )


def _position(days: int) -> Column:
    """Return the sum, over lines, of the standard deviations between a line's price and the usual one."""
    return (F.col(f"price_micro_{days}") / 1e6 - F.col(f"priced_{days}") * F.col("mean")) / F.col("std")


def _is_premium() -> Column:
    return _position(365) > PREMIUM_STD * F.col("priced_365")


def _by_user(by_top_level: DataFrame) -> DataFrame:
    """Return the columns ``c_...`` of each user and date."""
    ranked = "array_sort(collect_list(spend_365), (a, b) -> cast(sign(b - a) as int))"
    return (
        by_top_level.groupBy(*KEY)
        .agg(
            *(F.count_if(F.col(f"spend_{days}") > 0).alias(f"c_count_{days}") for days in WINDOWS),
            *(F.sum(f"spend_{days}").alias(f"c_total_{days}") for days in WINDOWS),
            *(F.array_sort(F.collect_list(f"spend_{days}")).alias(f"c_spends_{days}") for days in WINDOWS),
            F.sum("types").alias("c_types"),
            *(F.sum(f"tier_{days}").alias(f"c_tier_{days}") for days in WINDOWS),
            *(F.sum(f"tiered_{days}").alias(f"c_tiered_{days}") for days in WINDOWS),
            F.sum("premium").alias("c_premium"),
            F.expr(ranked).alias("c_ranked"),
            *(
                F.sum(F.when(F.col("bucket") == n, F.col("spend_365")).otherwise(0)).alias(f"c_bucket_{n}")
                for n in range(CATEGORY_BUCKETS)
            ),
        )
        .withColumns({f"c_entropy_{days}": F.expr(_entropy(days)) for days in WINDOWS})
    )


def _entropy(days: int) -> str:
    # spends are sorted, so that the floating-point sum has one order
    share = f"try_divide(x, c_total_{days})"
    return f"aggregate(filter(c_spends_{days}, x -> x > 0), 0D, (s, x) -> s - {share} * ln({share}))"
