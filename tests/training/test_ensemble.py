"""What all that is fitted together learns from each other: here the season, from what members missed a year before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

from bp_spark.core import config
from bp_spark.lakehouse.run import Run
from bp_spark.model.curve import Curve
from bp_spark.model.level import Level
from bp_spark.model.stack import CalibratedStack
from bp_spark.training import ensemble

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


def as_a_year_before(monkeypatch: pytest.MonkeyPatch, days: list[date]) -> tuple[Level, dict[str, Any]]:
    """The completed level of a shop whose members expect 50 of each user."""
    monkeypatch.setattr(ensemble, "users_of_test_date", lambda run, day: day)
    monkeypatch.setattr(
        ensemble, "predict_sample", lambda day, members, conf: pd.DataFrame({"label_spend": SPEND[day], "trees": 50.0})
    )
    stack = SimpleNamespace(
        inputs_from=lambda frame: {"trees": frame["trees"].to_numpy()},
        apply_without_level=lambda columns: {"expected_spend": np.asarray(columns["trees"])},
    )
    run = _Stages()
    level = ensemble._as_a_year_before(cast(Run, run), FALLING, days, [], cast(CalibratedStack, stack))
    return level, run.figures


def test_everyones_spend_is_moved_by_what_members_missed_a_year_before(monkeypatch: pytest.MonkeyPatch) -> None:
    level, figures = as_a_year_before(monkeypatch, list(SPEND))
    assert level.factor() == pytest.approx(390 / 300), "net refunds count as no spend, as in the calibration"
    assert level.factor(date(2017, 12, 12)) == pytest.approx(390 / 300 * np.exp(-0.5))
    assert figures == {"fit season": {"dates": 2, "factor": "1.30"}}


def test_a_season_that_no_date_of_the_year_before_can_measure_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    level, _ = as_a_year_before(monkeypatch, [])
    assert (level.evidence, level.factor(), level.factor(date(2017, 12, 12))) == (0.0, 1.0, 1.0)
