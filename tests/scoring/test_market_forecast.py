"""Weeks of a platform by hand: sums of the past, no week of few users, no event of the future, and the gap to users' totals."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from bp_spark.core import extras
from bp_spark.lakehouse.tables import EVENTS, MARKET_FORECAST, USER_DAILY
from bp_spark.scoring.profiles import job
from bp_spark.scoring.profiles.market import SHAPE, forecasts, gap_of, levels, market_forecast
from bp_spark.scoring.profiles.weekly_history import History, _weeks_behind, weekly_history
from tests.support.rows import frame

pytest.importorskip("statsforecast")

DAY = date(2024, 3, 10)
WEEKS = 30
K = 3
FOOD, HOME, TOYS = [f"u{n}" for n in range(4)], [f"u{n}" for n in range(2, 6)], ["u6", "u7"]


def bought(user: str, week: int, category: str | None, amount: int = 10, *, day: int = 2) -> dict[str, Any]:
    """A line of an order, ``week`` weeks before the last one."""
    when = DAY - timedelta(days=7 * week + day)
    return {
        "user_key": user,
        "event_date": when,
        "kind": "purchase",
        "order_id": f"{user} {when}",
        "category": category,
        "amount": Decimal(amount),
    }


def platform(weeks: Iterable[int] = range(WEEKS + 1)) -> list[dict[str, Any]]:
    """Each week u0 to u3 buy food, u2 to u5 things for the home, and u6 and u7 toys. The oldest week isn't whole."""
    groups = {"Food > Dairy": FOOD, "Home": HOME, "Toys > Games": TOYS}
    return [bought(user, week, name) for week in weeks for name, users in groups.items() for user in users]


def history(spark: SparkSession, lines: list[dict[str, Any]], least_users: int = K) -> History:
    by_day: dict[tuple[str, date], list[dict[str, Any]]] = {}
    for line in lines:
        by_day.setdefault((line["user_key"], line["event_date"]), []).append(line)
    daily = [
        {
            "user_key": user,
            "day": day,
            "spend": sum(line["amount"] for line in of_day),
            "orders": len({line["order_id"] for line in of_day if line["amount"] > 0}),
        }
        for (user, day), of_day in by_day.items()
    ]
    return weekly_history(frame(spark, USER_DAILY, *daily), frame(spark, EVENTS, *lines), DAY, least_users)


def weeks_of(found: History) -> dict[tuple[str, str], list[float]]:
    """Value and measure -> its weeks, the newest first."""
    ordered = found.series.sort_values("week")
    return {key: rows["amount"].tolist() for key, rows in ordered.groupby(["value", "measure"])}


@pytest.fixture(scope="module")
def plain(spark: SparkSession) -> History:
    refunds = [bought("u0", 0, "Food > Dairy", -4), bought("u1", 1, "Food > Dairy", -10, day=3)]
    # on the last day of the week before the last one
    return history(spark, [*platform(), *refunds, bought("u3", 1, "Food > Dairy", 20, day=1)])


def test_a_week_has_the_money_less_refunds_the_orders_and_the_buyers_of_seven_days(plain: History) -> None:
    weeks = weeks_of(plain)
    assert weeks["all", "revenue"][:3] == [96.0, 110.0, 100.0]
    # u2 and u3 buy food and things for the home by one order
    assert weeks["all", "orders"][:3] == [8.0, 9.0, 8.0]
    assert weeks["all", "buyers"][:3] == [8.0, 8.0, 8.0]
    assert weeks["Food", "revenue"][:3] == [36.0, 50.0, 40.0]
    assert weeks["Food", "orders"][:3] == [4.0, 5.0, 4.0]
    assert {len(amounts) for amounts in weeks.values()} == {WEEKS}


def test_no_category_is_of_few_users_and_neither_is_what_is_left_without_the_others(
    spark: SparkSession, plain: History
) -> None:
    # two users buy toys: with the smallest category that is shown they are enough
    assert {value for value, _ in weeks_of(plain)} == {"all", "Food", "other"}
    assert weeks_of(plain)["other", "buyers"][0] == 6.0
    # a single week of few users is enough to merge a category
    once = [line for line in platform() if not (line["category"] == "Home" and line["event_date"] > DAY - timedelta(7))]
    some = [bought(user, 0, "Home") for user in HOME[2:]]
    assert {value for value, _ in weeks_of(history(spark, [*once, *some]))} == {"all", "Food", "other"}
    # nobody can be worked out of a category that everyone else buys from
    assert {value for value, _ in weeks_of(history(spark, platform(), 5))} == {"all"}


def test_a_platform_with_a_week_of_few_users_or_few_weeks_has_no_forecast(spark: SparkSession) -> None:
    quiet = [line for line in platform() if line["event_date"] < DAY - timedelta(7) or line["user_key"] < "u2"]
    for lines in (quiet, platform(range(7))):
        found = history(spark, lines)
        assert found.series.empty
        assert "fewer than 8 weeks, or one of the newest 26 has fewer than 3 users" in found.missing
    # weeks without anybody tell of nobody
    assert history(spark, platform(week for week in range(WEEKS + 1) if week != 5)).missing == ""


def test_weeks_that_the_data_do_not_cover_are_left_out_and_old_data_have_no_forecast(spark: SparkSession) -> None:
    behind = history(spark, platform(range(1, WEEKS + 1)))
    assert behind.weeks_behind == 1
    assert len(weeks_of(behind)["all", "revenue"]) == WEEKS - 1
    rows, _ = market_forecast(spark, behind, pd.DataFrame(), DAY)
    ahead = sorted(row["weeks_ahead"] for row in rows.filter("value = 'all' AND measure = 'orders'").collect())
    assert ahead == [*range(-26, 0), *range(1, 14)]
    assert "the newest event is of 2024-02-02" in history(spark, platform(range(5, WEEKS + 1))).missing


def test_one_row_with_a_date_of_1970_makes_no_history(spark: SparkSession) -> None:
    stray = {**bought("u0", 0, "Home"), "event_date": date(1970, 1, 1)}
    assert {len(amounts) for amounts in weeks_of(history(spark, [*platform(), stray])).values()} == {WEEKS + 1}


def test_events_on_the_date_or_later_change_nothing(spark: SparkSession) -> None:
    later = [
        {**bought(user, 0, category, 5000), "event_date": DAY + timedelta(days)}
        for days in (0, 1, 8)
        for user, category in (("u0", "Food > Dairy"), ("u8", "Travel"), ("u9", "Home"))
    ]

    def forecast_of(lines: list[dict[str, Any]]) -> list[Any]:
        found = history(spark, lines)
        rows, gap = market_forecast(spark, found, TOTALS, DAY)
        return [found.new_buyer_share, gap, sorted(rows.collect(), key=str)]

    assert forecast_of([*platform(), *later]) == forecast_of(platform())


def total(segment: str, value: str, days: int, expected: float) -> dict[str, Any]:
    spreads = {"variance": expected, "segment_sd": 0.1, "dispersion": 1.0, "quadratic": 0.0, "horizons": 2.0}
    return {"segment": segment, "value": value, "horizon_days": days, "expected_spend": expected, **spreads}


TOTALS = pd.DataFrame(
    [
        *(total("platform", "all", days, 10.0 * days) for days in (30, 90, 180)),
        *(total("level", level, 90, spend) for level, spend in (("A", 600.0), ("B", 300.0))),
    ]
)


def test_a_level_has_its_users_money_in_the_shape_of_the_platform_and_a_wider_interval() -> None:
    expected = [float(week) for week in range(1, 14)]
    future = pd.DataFrame({"expected": expected, "high": [1.2 * week for week in expected]})
    rows = pd.DataFrame(levels(future, TOTALS))
    of_a = rows[rows["value"] == "A"]
    assert of_a["expected"].sum() == pytest.approx(600 * 91 / 90)
    assert (of_a["expected"] / of_a["expected"].iloc[0]).tolist() == pytest.approx(expected)
    assert set(rows["method"]) == {SHAPE}
    assert (rows["high"] / rows["expected"] > 1.2).all()
    assert ((rows["low"] < rows["expected"]) & (rows["low"] >= 0)).all()


def test_no_level_is_forecast_for_a_quarter_from_what_a_young_platform_knows_of_a_month() -> None:
    future = pd.DataFrame({"expected": [7.0] * 13, "high": [9.0] * 13})
    known = {days: pd.DataFrame([total("level", "A", days, 600.0)]) for days in (30, 60)}
    assert levels(future, known[30]) == []
    assert len(levels(future, known[60])) == 13


@pytest.mark.parametrize(
    ("pauses", "behind"),
    [((1,) * 30, 0), ((1,) * 30 + (2,), 1), ((1, 2, 1) * 9 + (2,), 0), ((1,) * 30 + (9,), 2), ((8,) * 9 + (9,), 1)],
)
def test_data_are_missing_where_the_last_pause_is_longer_than_all_before(pauses: tuple[int, ...], behind: int) -> None:
    days = [DAY - timedelta(days=sum(pauses[position:])) for position in range(len(pauses))]
    assert _weeks_behind(days, DAY) == behind


@pytest.mark.parametrize(("days", "counted"), [((30,), 30), ((90, 30), 90), ((180, 365), 91)])
def test_the_gap_is_of_the_same_days_on_both_sides(days: tuple[int, ...], counted: int) -> None:
    totals = pd.DataFrame([total("platform", "all", horizon, 2.0 * horizon) for horizon in days])
    # three a day, as two a day are expected of users; in the weeks after four nobody buys, where 30 days are compared
    future = pd.DataFrame({"expected": [21.0] * 13})
    gap = gap_of(future, totals, 0.25)
    assert gap is not None
    assert (gap.users_days, gap.users_expected) == (counted, pytest.approx(2.0 * counted))
    assert gap.gap == pytest.approx(0.5)
    assert gap.new_buyer_share == 0.25
    assert gap_of(future, pd.DataFrame(), 0.25) is None


def test_new_buyers_are_those_whose_first_order_is_of_the_last_thirteen_weeks(spark: SparkSession) -> None:
    new = [bought(f"new {n}", week, "Food", 70) for n, week in ((1, 12), (2, 0))]
    old = [bought("old", week, "Food", 60) for week in (13, 12)]
    found = history(spark, [*platform(), *new, *old])
    assert found.new_buyer_share == pytest.approx(140 / (140 + 60 + 13 * 100))


def test_each_series_has_its_past_and_thirteen_weeks_to_come(spark: SparkSession, plain: History) -> None:
    series = spark.createDataFrame(plain.series)
    rows = forecasts(series, 0).toPandas()
    counts = rows.groupby(["value", "measure"])[["actual", "expected"]].count()
    assert (counts["actual"] == 26).all()
    assert (counts["expected"] == 13).all()
    assert len(counts) == 9
    table, _ = market_forecast(spark, plain, TOTALS, DAY)
    first = table.filter("value = 'all' AND measure = 'revenue' AND weeks_ahead IN (0, 1)").orderBy("weeks_ahead")
    past, to_come = first.collect()
    assert (past["week_start"], past["actual"], past["expected"], past["gap"]) == (DAY - timedelta(7), 96.0, None, None)
    assert (to_come["week_start"], to_come["actual"], to_come["history_weeks"]) == (DAY, None, WEEKS)
    assert to_come["gap"] == pytest.approx(to_come["expected"] / 70 - 1)
    assert table.columns == [column.name for column in MARKET_FORECAST.columns]


def test_a_platform_without_the_library_goes_on_without_a_forecast(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    with caplog.at_level("INFO"):
        # neither the run nor its tables are looked at
        job._write_market_forecast(None, {}, None, DAY, "")  # type: ignore[arg-type]
    assert caplog.messages == [
        "there is no market forecast: it needs statsforecast, which is not installed: pip install 'bp-spark[market]'"
    ]
