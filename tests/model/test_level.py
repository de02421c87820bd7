"""The platform's level: a season is recognised where there is one, ignored where there is none, never from later days."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import pytest

from bp_spark.core.config import FusionConfig
from bp_spark.core.errors import BundleError
from bp_spark.model.curve import Curve
from bp_spark.model.level import Level, WeeklySpend

END = date(2024, 1, 1)
HORIZON_DAYS, HORIZON = 91, 13
CUTOFF_AGES = [90 + 14 * step for step in range(8)]


def platform(weeks: int, season: float, seed: int, growth: float = 0.0) -> tuple[WeeklySpend, float]:
    """A shop of 1,500 users up to END, and what they spend in the horizon after it."""
    rng = np.random.default_rng(seed)
    users, week = 1500, np.arange(weeks + HORIZON)
    start = rng.integers(0, weeks, users)
    stays = rng.exponential(120, users)
    calendar = np.exp(season * np.sin(2 * np.pi * week / 52.18) + growth * week / 52)
    there = (week >= start[:, None]) & (week < (start + stays)[:, None])
    orders = rng.poisson(rng.gamma(0.8, 0.2, users)[:, None] * calendar * there)
    spend = orders * rng.gamma(3, 10, users)[:, None]
    first = np.where(orders.any(axis=1), (orders > 0).argmax(axis=1), weeks + HORIZON)
    observed = first < weeks
    rows = [
        (weeks - 1 - int(first[user]), weeks - 1 - int(when), round(100 * float(spend[user, when])))
        for user, when in zip(*np.nonzero(spend[:, :weeks] * observed[:, None]), strict=True)
    ]
    weekly = WeeklySpend.of(rows, END - timedelta(weeks=weeks), END)
    return weekly, float(spend[observed, weeks:].sum())


def steady_forecast(weekly: WeeklySpend, weeks_ago: int = 0) -> float:
    """What users spent in the quarter before a week, times what followed a quarter at the cutoffs that members learn from."""
    spent = weekly.cohorts
    ratios = []
    for age in CUTOFF_AGES:
        back = round(age / 7)
        ratios.append(after(weekly, back) / spent[:, back : back + HORIZON].sum())
    return float(spent[:, weeks_ago : weeks_ago + HORIZON].sum() * np.mean(ratios))


def after(weekly: WeeklySpend, weeks_ago: int) -> float:
    """What users of a past week spent in the horizon after it."""
    return float(weekly.cohorts[weeks_ago:, weeks_ago - HORIZON : weeks_ago].sum())


def with_year_before(weekly: WeeklySpend) -> Level:
    """The level, by what a steady forecast missed a year before."""
    return fitted(weekly).as_a_year_before(after(weekly, 52), steady_forecast(weekly, 52))


def fitted(weekly: WeeklySpend) -> Level:
    return Level.fit(weekly, HORIZON_DAYS, CUTOFF_AGES, FusionConfig())


def test_a_strong_season_of_three_years_is_found_and_brings_the_total_near_what_is_spent() -> None:
    steady, seasonal = [], []
    for seed in range(5):
        weekly, spent = platform(156, season=0.5, seed=seed)
        expected = steady_forecast(weekly)
        level = with_year_before(weekly)
        assert level.evidence > 0.7
        steady.append(abs(np.log(expected / spent)))
        seasonal.append(abs(np.log(expected * level.factor() / spent)))
    assert np.mean(steady) > 0.2
    assert np.mean(seasonal) < np.mean(steady) / 3


def test_without_a_season_the_factor_stays_near_one() -> None:
    for seed in range(5):
        weekly, _ = platform(156, season=0.0, seed=seed)
        assert abs(np.log(with_year_before(weekly).factor())) < 0.05


@pytest.mark.parametrize("weeks", [0, 1, 11, 13, 14, 40, 52, 55])
def test_a_year_or_less_tells_of_no_season_but_of_an_unsure_level(weeks: int) -> None:
    weekly, spent = platform(weeks, season=0.5, seed=1) if weeks else (WeeklySpend.of([], END, END), 1.0)
    level = fitted(weekly).as_a_year_before(2 * spent, spent)
    assert (level.evidence, level.factor()) == (0.0, 1.0)
    assert 0 < level.sd < 1
    assert weeks < 52 or level.sd > 0.15


@pytest.mark.parametrize("weeks", [58, 66, 80])
def test_a_season_that_no_past_week_can_show_is_assumed_where_the_level_moves(weeks: int) -> None:
    steady, followed, by_weeks = [], [], []
    for seed in range(5):
        weekly, spent = platform(weeks, season=0.5, seed=seed)
        level, total = fitted(weekly), weekly.seasonal_total(HORIZON_DAYS)
        unfollowed = Level.fit(weekly, HORIZON_DAYS, CUTOFF_AGES, FusionConfig(season=False))
        assert total is not None
        assert 0.3 < level.evidence <= 0.8
        assert 0.4 * unfollowed.sd < level.sd < unfollowed.sd
        expected = steady_forecast(weekly)
        steady.append(np.log(expected / spent))
        by_weeks.append(np.log(total / spent))
        followed.append(np.log(expected * level.towards(total, expected).factor() / spent))
    errors = [float(np.sqrt(np.mean(np.square(logs)))) for logs in (steady, followed, by_weeks)]
    assert errors[0] > 0.3
    assert errors[1] < errors[0] / 2
    assert errors[2] < 0.2


@pytest.mark.parametrize("weeks", [58, 66, 80])
def test_no_season_is_assumed_where_the_level_moves_by_chance_alone(weeks: int) -> None:
    levels = [fitted(platform(weeks, season=0.0, seed=seed)[0]) for seed in range(8)]
    # the noise of so few users can look like a movement of the level
    assert [level.evidence for level in levels].count(0.0) >= 7


@pytest.mark.parametrize("weeks", [0, 13, 55])
def test_without_the_weeks_of_the_year_before_there_is_no_seasonal_total(weeks: int) -> None:
    weekly = platform(weeks, season=0.5, seed=1)[0] if weeks else WeeklySpend.of([], END, END)
    assert weekly.seasonal_total(HORIZON_DAYS) is None


def test_a_season_makes_the_level_unsure_where_it_is_not_followed() -> None:
    weekly, _ = platform(156, season=0.5, seed=2)
    steady = Level.fit(weekly, HORIZON_DAYS, CUTOFF_AGES, FusionConfig(season=False))
    assert (steady.evidence, steady.factor()) == (0.0, 1.0)
    assert steady.sd > 2 * fitted(weekly).sd


def test_the_effects_of_age_and_calendar_are_told_apart() -> None:
    weeks = 60
    size, calendar = np.linspace(5, 1, weeks), 1 + 0.3 * np.sin(np.arange(weeks))
    by_age = np.exp(-np.arange(weeks) / 10)
    cohorts = np.array(
        [[size[f] * by_age[f - w] * calendar[w] if f >= w else 0.0 for w in range(weeks)] for f in range(weeks)]
    )
    parts = WeeklySpend(END, cohorts).decomposed
    fit = parts.size[:, None] * parts.calendar * parts.by_age[np.abs(np.subtract.outer(range(weeks), range(weeks)))]
    np.testing.assert_allclose(np.tril(fit), cohorts, rtol=1e-3, atol=1e-6)
    detrended = np.log(parts.calendar / calendar)
    line = np.polyval(np.polyfit(np.arange(weeks), detrended, 1), np.arange(weeks))
    # A trend of the calendar can't be distinguished from one of the ages.
    np.testing.assert_allclose(detrended, line, atol=0.01)


def test_the_factor_follows_the_calendar_and_is_held_beyond_what_is_known() -> None:
    weekly, _ = platform(156, season=0.5, seed=3)
    level = with_year_before(weekly)
    by_week = [level.factor(END + timedelta(weeks=week)) for week in range(40)]
    assert by_week[0] == level.factor() == level.factor(END)
    assert max(by_week) / min(by_week) > 1.5
    last = END + timedelta(days=int(level.log_factor.x[-1]))
    assert level.factor(last) == level.factor(last + timedelta(days=400))


def test_the_factor_reaches_no_further_than_seasons_have() -> None:
    weekly, spent = platform(156, season=0.3, seed=3)
    level = fitted(weekly)
    assert 0.5 < level.reach < np.log(3)
    assert level.as_a_year_before(spent, spent / 100).factor() == pytest.approx(np.exp(level.reach))


def test_the_factor_is_what_was_missed_a_year_before_and_one_with_nothing_to_compare() -> None:
    level = fitted(platform(156, season=0.5, seed=3)[0])
    assert level.as_a_year_before(130.0, 100.0).factor() == pytest.approx(1.3)
    assert level.towards(130.0, 100.0).factor() == pytest.approx(1.3**level.evidence)
    for spent, expected in ((0.0, 100.0), (100.0, 0.0)):
        unknown = level.as_a_year_before(spent, expected)
        assert {unknown.factor(END + timedelta(weeks=week)) for week in (-4, 0, 20)} == {1.0}
        assert unknown.evidence == 0


def test_another_horizon_has_the_evidence_and_a_course_of_its_own() -> None:
    weekly, _ = platform(156, season=0.5, seed=3)
    level = fitted(weekly)
    month = level.of_horizon(weekly, 28)
    assert (month.evidence, month.reach, month.log_factor.x[0]) == (level.evidence, level.reach, level.log_factor.x[0])
    assert month.factor() == level.factor() == 1.0
    assert np.ptp(month.log_factor.y) > 0.5
    assert month.log_factor.y != level.log_factor.y
    assert month.as_a_year_before(130.0, 100.0).factor() == pytest.approx(1.3)
    none = Level.fit(weekly, HORIZON_DAYS, CUTOFF_AGES, FusionConfig(season=False)).of_horizon(weekly, 28)
    assert none.as_a_year_before(130.0, 100.0).factor() == 1.0


def test_the_order_of_rows_changes_no_bit() -> None:
    rng = np.random.default_rng(3)
    rows = [
        (int(f), int(w), int(c))
        for f, w, c in zip(rng.integers(0, 90, 500), rng.integers(0, 90, 500), rng.integers(1, 10**9, 500), strict=True)
    ]
    first = END - timedelta(weeks=70)
    one, other = WeeklySpend.of(rows, first, END), WeeklySpend.of(rows[::-1], first, END)
    assert one.cohorts.tobytes() == other.cohorts.tobytes()
    assert one.cohorts.shape == (70, 70)


def test_a_stray_row_of_long_ago_costs_no_more_than_eight_years() -> None:
    assert WeeklySpend.of([(2800, 2800, 5), (3, 2, 7)], date(1970, 1, 1), END).cohorts.shape == (416, 416)


def test_the_odds_of_buying_follow_the_season_as_they_did_a_year_before() -> None:
    p_active = np.random.default_rng(3).uniform(0.0, 1.0, 5_000)
    for factor, power in ((1.8, 0.7), (0.6, 0.7), (1.8, 0.0)):
        level = Level("2024-01-01", 1.0, 1.0, Curve((0.0, 7.0), (np.log(factor), 0.0)), 0.05)
        truth = p_active * factor**power / (1 - p_active + p_active * factor**power)
        bought = np.random.default_rng(4).uniform(size=5_000) < truth
        learned = level.with_odds(p_active, bought)
        assert learned.odds == pytest.approx(power, abs=0.1)
        assert learned.log_odds(date(2024, 1, 1)) == pytest.approx(learned.odds * np.log(factor))
        assert learned.log_odds(date(2024, 1, 8)) == 0.0, "without a season on that date nobody's odds move"
    against = level.with_odds(p_active, np.zeros(5_000, bool))
    assert against.odds == 0.0, "odds don't move against the season"
    still = replace(level, log_factor=Curve((0.0,), (0.01,)))
    assert still.with_odds(p_active, bought).odds == 0.0, "a factor near 1 tells nothing of the odds"


def test_a_level_comes_back_from_json_bit_for_bit_and_a_broken_one_is_refused() -> None:
    level = Level("2024-01-01", 0.7, 0.4, Curve((0.0, 7.0), (0.1, 1 / 3)), 0.06, odds=0.9)
    assert Level.from_json(level.to_json()) == level
    before_odds = {key: value for key, value in level.to_json().items() if key != "odds"}
    assert Level.from_json(before_odds) == replace(level, odds=0.0)
    for change in (
        {"sd": -1},
        {"evidence": 2},
        {"odds": -1},
        {"as_of": "soon"},
        {"log_factor": {"x": [1, 1], "y": [0, 0]}},
        {"more": 1},
    ):
        with pytest.raises(BundleError, match="level: malformed"):
            Level.from_json(level.to_json() | change)
