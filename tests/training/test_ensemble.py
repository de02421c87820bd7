"""What all that is fitted together learns from each other: here the season, from what members missed a year before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

from bp_spark.core import config
from bp_spark.lakehouse.run import Run
from bp_spark.model.curve import Curve
from bp_spark.model.horizons import EXPECTED, Horizons, Ratio
from bp_spark.model.level import Level, WeeklySpend
from bp_spark.model.stack import CalibratedStack
from bp_spark.training import ensemble

END = date(2017, 10, 3)
FALLING = Level("2017-10-03", 0.9, 0.8, Curve((0.0, 70.0), (0.0, -0.5)), 0.05)
SPEND = {date(2016, 9, 20): [0.0, 260.0, -20.0], date(2016, 10, 18): [65.0, 65.0, 0.0]}


class _Stages:
    """A run that keeps the figures of its stages."""

    def __init__(self) -> None:
        self.config = config.load()
        self.figures: dict[str, Any] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        self.figures[name] = {}
        yield self.figures[name]


def as_a_year_before(monkeypatch: pytest.MonkeyPatch, days: list[date]) -> tuple[dict[int, Level], dict[str, Any]]:
    """The completed levels of a shop whose members expect 50 of each user, 100 in 180 days and 200 in 360."""

    def predicted(day: date, members: object, conf: object) -> pd.DataFrame:
        spent = np.array(SPEND[day])
        # spend after the date of the fit is unknown on it
        poison = 1e9 if day + timedelta(days=360) > END else 4.0
        of_longer = {"label_spend_180d": spent * 2.5, "label_spend_360d": spent * poison}
        return pd.DataFrame({"label_spend": spent, **of_longer, "trees": 50.0, "chance": 0.4})

    monkeypatch.setattr(ensemble, "users_of_test_date", lambda run, day: day)
    monkeypatch.setattr(ensemble, "predict_sample", predicted)
    stack = SimpleNamespace(
        apply_without_level=lambda columns: {"expected_spend": columns["trees"], "p_active": columns["chance"]}
    )
    horizons = Horizons(90, tuple(Ratio(days, EXPECTED, Curve((0.0,), (days / 90,))) for days in (180, 360)))
    weekly = WeeklySpend(END, np.tril(np.random.default_rng(1).uniform(1, 2, (150, 150))))
    run = _Stages()
    levels = ensemble._as_a_year_before(
        cast(Run, run), FALLING, weekly, days, [], cast(CalibratedStack, stack), horizons
    )
    return levels, run.figures


def test_everyones_spend_is_moved_by_what_members_missed_a_year_before(monkeypatch: pytest.MonkeyPatch) -> None:
    levels, figures = as_a_year_before(monkeypatch, list(SPEND))
    level = levels[90]
    assert level.factor() == pytest.approx(390 / 300), "net refunds count as no spend, as in the calibration"
    assert level.factor(date(2017, 12, 12)) == pytest.approx(390 / 300 * np.exp(-0.5))
    assert levels[180].factor() == pytest.approx(390 * 2.5 / 600)
    factors = {"factor_90_days": "1.30", "factor_180_days": "1.62", "factor_360_days": "1.73"}
    # of six users three bought, where 2.4 were expected: odds of 1 instead of 2 to 3
    assert level.log_odds() == pytest.approx(np.log(3 / 2), rel=1e-3)
    assert figures == {"fit season": {"dates": 2, "odds": "1.55", **factors}}


def test_no_horizon_of_the_year_before_is_seen_beyond_the_date_of_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    levels, _ = as_a_year_before(monkeypatch, list(SPEND))
    # of the second date the 360 days end ten days after the fit
    assert levels[360].factor() == pytest.approx(260 * 4 / 600)
    unknown, _ = as_a_year_before(monkeypatch, [date(2016, 10, 18)])
    assert unknown[360].factor() == 1.0


def test_a_season_that_no_date_of_the_year_before_can_measure_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    for level in as_a_year_before(monkeypatch, [])[0].values():
        assert (level.evidence, level.factor(), level.factor(date(2017, 12, 12))) == (0.0, 1.0, 1.0)


def test_in_the_second_year_each_horizon_leads_towards_the_total_of_its_own_weeks() -> None:
    weekly, run = WeeklySpend(END, np.tril(np.random.default_rng(1).uniform(1, 2, (70, 70)))), _Stages()
    expected = {days: 0.8 * cast(float, weekly.seasonal_total(days)) for days in (30, 90)}
    levels = ensemble._as_last_year(cast(Run, run), FALLING, weekly, expected, 90)
    for level in levels.values():
        assert level.factor() == pytest.approx(1.25**0.9)
        assert level.odds == 1.0, "a season that is assumed moves the odds as much as the spend"
    assert levels[90].log_factor.x == FALLING.log_factor.x
    assert run.figures["fit season"]["factor_30_days"] == "1.22"
