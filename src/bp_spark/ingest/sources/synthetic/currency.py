"""Currencies: users who pay in CNY, and what one CNY is worth in USD."""

from __future__ import annotations

import math
from datetime import timedelta

from pyspark.sql import DataFrame, SparkSession

from bp_spark.core.config import SyntheticConfig

CNY_SHARE, CNY_RATE = 0.2, 0.14
"""Share of Chinese-language users who pay in CNY, and the worth of one CNY in USD, on average."""
RATE_DAYS = 30
"""Days for which a rate holds."""
MAX_DELAY = 30
"""Most days from an event to its delivery."""


def cny_rates(config: SyntheticConfig) -> list[float]:
    """Return the worth of one CNY in USD, for each 30 days of the period and of the deliveries after it."""
    return [round(CNY_RATE * (1 + 0.03 * math.sin(n)), 8) for n in range((config.days + MAX_DELAY) // RATE_DAYS + 1)]


def rates(spark: SparkSession, config: SyntheticConfig) -> DataFrame:
    """Return the delivered rates: currency, first day, worth in USD."""
    days = [config.first_day + timedelta(n * RATE_DAYS) for n in range(len(cny_rates(config)))]
    rows = [("CNY", str(day), f"{rate:.8f}") for day, rate in zip(days, cny_rates(config), strict=True)]
    return spark.createDataFrame(rows, "currency string, day string, rate string")
