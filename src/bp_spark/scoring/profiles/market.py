"""Forecasts of the weeks of the platform, its categories and levels, beside what its users are expected to spend.

See :mod:`bp_spark.model.market` for the methods, and :mod:`bp_spark.scoring.profiles.weekly_history` for the past.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, SparkSession

from bp_spark.core.session import parallelism
from bp_spark.lakehouse.tables import MARKET_FORECAST
from bp_spark.model.market import WEEKS_AHEAD, Forecast, forecast
from bp_spark.model.totals import TotalError, interval
from bp_spark.scoring.profiles.totals import PLATFORM
from bp_spark.scoring.profiles.weekly_history import DAYS, PAST_WEEKS, REVENUE, SERIES, History

LEVEL = "level"
SHAPE = "shape of the platform"
"""Method of a level."""
COVERAGE = 0.9
"""Share of weeks that shall lie in their interval."""
LEAST_DAYS = 60
"""Days of a total that 13 weeks are forecast from: of fewer, as on a young platform, it would be guessed how spend goes on."""

_OF_SERIES = (
    *("weeks_ahead", "actual", "expected", "low", "high", "method", "baseline"),
    *("mase", "mase_baseline", "mase_vs_naive", "origins", "history_weeks"),
)
"""Columns that follow from a series alone."""


@dataclass(frozen=True)
class Gap:
    """What users are expected to spend beside the forecast of the same days; columns of MARKET_FORECAST."""

    users_expected: float
    users_days: int
    gap: float
    new_buyer_share: float


def market_forecast(
    spark: SparkSession, history: History, totals: pd.DataFrame, day: date
) -> tuple[DataFrame, Gap | None]:
    """Return the forecasts of the platform, its categories and its levels.

    Args:
        spark: The session.
        history: Weeks of the past.
        totals: Rows of TOTALS of the date; without any there are no levels and no gap.
        day: The date.

    Returns:
        Rows of MARKET_FORECAST, and the gap of the platform.
    """
    series = spark.createDataFrame(
        history.series, "segment string, value string, measure string, week int, amount double"
    )
    # a few rows a series, and there are at most 14 groups of three series
    rows = forecasts(series, history.weeks_behind).toPandas()
    of_platform = (rows["segment"] == PLATFORM) & (rows["measure"] == REVENUE) & (rows["weeks_ahead"] > 0)
    platform = rows[of_platform].sort_values("weeks_ahead")
    gap = gap_of(platform, totals, history.new_buyer_share)
    if gap is not None:
        rows.loc[of_platform, list(asdict(gap))] = list(asdict(gap).values())
    rows = pd.concat([rows, pd.DataFrame(levels(platform, totals))], ignore_index=True)
    rows["score_date"] = day
    rows["week_start"] = [day + timedelta(weeks=int(ahead) - 1) for ahead in rows["weeks_ahead"]]
    return _as_table(spark, rows), gap


def _as_table(spark: SparkSession, rows: pd.DataFrame) -> DataFrame:
    """Return rows of MARKET_FORECAST, with NULL for a missing column or value."""
    types = {column.name: column.type.rstrip("!") for column in MARKET_FORECAST.columns}
    columns = []
    for name, kind in types.items():
        values = rows[name].tolist() if name in rows else [None] * len(rows)
        cast = int if kind == "int" else lambda value: value
        columns.append([None if pd.isna(value) else cast(value) for value in values])
    return spark.createDataFrame(list(zip(*columns, strict=True)), MARKET_FORECAST.schema)


def forecasts(series: DataFrame, weeks_behind: int) -> DataFrame:
    """Forecast each series.

    Args:
        series: See :class:`History`.
        weeks_behind: Likewise.

    Returns:
        Of each series, 26 weeks of the past and 13 to come: ``segment, value, measure`` and columns of MARKET_FORECAST that
        follow from the series alone.
    """
    types = {column.name: column.type.rstrip("!") for column in MARKET_FORECAST.columns}
    schema = ", ".join(f"`{name}` {types[name]}" for name in (*SERIES, *_OF_SERIES))

    def of_series(rows: pd.DataFrame) -> pd.DataFrame:
        by_week = rows.sort_values("week", ascending=False)["amount"].to_numpy(np.float64)
        found = forecast(by_week, WEEKS_AHEAD + weeks_behind, COVERAGE)
        if found is None:
            return pd.DataFrame(columns=[*SERIES, *_OF_SERIES])
        table = pd.DataFrame([*_past(by_week, weeks_behind), *_future(found, len(by_week))], columns=list(_OF_SERIES))
        return pd.concat(
            [pd.DataFrame([rows[list(SERIES)].iloc[0]] * len(table)).reset_index(drop=True), table], axis=1
        )

    # a fixed number of parts: few rows would all come to one task otherwise, and each of them takes a tenth of a second
    parts = series.repartition(4 * parallelism(series.sparkSession), *SERIES)
    return parts.groupBy(*SERIES).applyInPandas(of_series, schema)


def _past(by_week: np.ndarray, weeks_behind: int) -> Iterable[dict[str, Any]]:
    shown = by_week[-PAST_WEEKS:]
    for position, amount in enumerate(shown):
        yield {"weeks_ahead": position + 1 - len(shown) - weeks_behind, "actual": amount}


def _future(found: Forecast, weeks: int) -> Iterable[dict[str, Any]]:
    more = len(found.expected) - WEEKS_AHEAD
    ratio = found.mase / found.mase_baseline if found.mase_baseline > 0 else math.nan
    for position in range(WEEKS_AHEAD):
        yield {
            "weeks_ahead": position + 1,
            "expected": found.expected[more + position],
            "low": found.low[more + position],
            "high": found.high[more + position],
            "method": found.method,
            "baseline": found.baseline,
            "mase": found.mase,
            "mase_baseline": found.mase_baseline,
            "mase_vs_naive": ratio,
            "origins": found.origins,
            "history_weeks": weeks,
        }


def gap_of(platform: pd.DataFrame, totals: pd.DataFrame, new_buyer_share: float) -> Gap | None:
    """Return the gap between the platform's forecast and the sum of its users' expected spend.

    Of the horizons of ``totals`` that nearest to 13 weeks counts, by its days: those within 13 weeks are compared as they are,
    a longer horizon in part.

    Args:
        platform: Weeks to come of the platform's revenue, in order.
        totals: Rows of TOTALS of the date.
        new_buyer_share: See :class:`History`.

    Returns:
        The gap; ``None`` without totals.
    """
    nearest = _nearest(totals, PLATFORM)
    if nearest.empty or platform.empty or not nearest["expected_spend"].iloc[0] > 0:
        return None
    horizon, expected = int(nearest["horizon_days"].iloc[0]), float(nearest["expected_spend"].iloc[0])
    days = min(horizon, DAYS)
    users_expected = expected * days / horizon
    # each week's share in these days
    shares = np.clip(days - 7 * np.arange(WEEKS_AHEAD), 0, 7) / 7
    spent = float(platform["expected"].to_numpy(np.float64) @ shares)
    return Gap(users_expected, days, spent / users_expected - 1, new_buyer_share)


def levels(platform: pd.DataFrame, totals: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the weekly revenue of each level's users: the level's total, with the weekly shape of the platform.

    Users get their level by their past up to the date. So the past of those who have a high level today is no past of a group,
    and no forecast is made from it. The interval has three parts: that of the platform's week, what users of one segment
    share (``segment_sd``), and the variance of independent users, of which a week has its share
    (:func:`bp_spark.model.totals.interval`).

    Args:
        platform: Weeks to come of the platform's revenue, in order.
        totals: Rows of TOTALS of the date.

    Returns:
        Values of MARKET_FORECAST; none where no total reaches over LEAST_DAYS.
    """
    of_platform = platform["expected"].to_numpy(np.float64)
    if platform.empty or not (of_platform > 0).all():
        return []
    shares = of_platform / of_platform.sum()
    half_widths = (platform["high"].to_numpy(np.float64) - of_platform) / of_platform
    found = []
    totals_of_levels = _nearest(totals, LEVEL).to_dict("records")
    for total in [total for total in totals_of_levels if total["horizon_days"] >= LEAST_DAYS]:
        scale = DAYS / total["horizon_days"]
        of_week = TotalError(7, 0.0, total["segment_sd"], total["dispersion"], total["quadratic"], total["horizons"])
        for ahead, (share, half_width) in enumerate(zip(shares * scale, half_widths, strict=True), 1):
            expected, variance = total["expected_spend"] * share, total["variance"] * share
            # the platform's interval, as the quantile makes it wide again
            error = replace(of_week, common_sd=half_width / of_week.quantile(COVERAGE))
            low, high = interval(expected, variance, error, COVERAGE)
            found.append(
                {
                    "segment": LEVEL,
                    "value": total["value"],
                    "measure": REVENUE,
                    "weeks_ahead": ahead,
                    "expected": expected,
                    "low": low,
                    "high": high,
                    "method": SHAPE,
                }
            )
    return found


def _nearest(totals: pd.DataFrame, segment: str) -> pd.DataFrame:
    """Return the totals of a segment over the horizon nearest to 13 weeks."""
    if totals.empty:
        return totals
    distance = (totals["horizon_days"] - DAYS).abs()
    nearest: pd.DataFrame = totals[(distance == distance.min()) & (totals["segment"] == segment)]
    return nearest
