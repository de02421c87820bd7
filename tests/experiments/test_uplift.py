"""Whom to treat: the users of an experiment, ranked by what was known before the draw."""

from __future__ import annotations

import json
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession
from typer.testing import CliRunner

from bp_spark import pipeline
from bp_spark.cli import app, common
from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.experiments.uplift import UpliftResult
from bp_spark.lakehouse.tables import EVENTS, EXPERIMENTS, USER_DAILY
from tests.support.rows import write_without_spark

pytestmark = pytest.mark.slow

DAY, DAYS = date(2024, 3, 10), 28
USERS = 600
LIFT = 80
"""What the treatment adds to the spend of users who buy at a discount."""


def after(days: int) -> date:
    return DAY + timedelta(days=days)


def drawn(name: str, user: int, group: str, **more: Any) -> dict[str, Any]:
    row = {"experiment": name, "user_key": f"u{user:03d}", "group": group, "score_date": DAY, "days": DAYS}
    return {**row, "share": 0.5, "is_control": group == "control", "expected_spend": 100.0, **more}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An experiment that half of its users gain from, one of nobody's gain, one of three groups, and one of few users."""
    folder = tmp_path_factory.mktemp("uplift") / "lakehouse"
    random = np.random.default_rng(1)
    usual, groups = random.gamma(4.0, 25.0, USERS), random.random(USERS) < 0.5
    days: list[dict[str, Any]] = []
    for user in range(USERS):
        discount = Decimal(20 if user % 2 else 0)
        for day, factor in ((-20, 1.0), (-6, random.uniform(0.8, 1.2)), (5, random.uniform(0.8, 1.2))):
            spend = usual[user] * factor + (LIFT if day > 0 and groups[user] and user % 2 else 0)
            row = {"user_key": f"u{user:03d}", "day": after(day), "orders": 1, "spend": Decimal(f"{spend:.2f}")}
            days.append({**row, "discount": discount if day < 0 else Decimal(0)})
    write_without_spark(folder, USER_DAILY, *days)
    other = random.random(USERS) < 0.5
    rows = [drawn("works", user, "treatment" if groups[user] else "control") for user in range(USERS)]
    rows += [drawn("luck", user, "treatment" if other[user] else "control") for user in range(USERS)]
    rows += [drawn("three", user, ("control", "mail", "coupon")[user % 3]) for user in range(USERS)]
    rows += [drawn("few", user, "treatment" if user % 2 else "control") for user in range(60)]
    rows += [
        drawn("later", user, "treatment" if user % 2 else "control", score_date=after(20)) for user in range(USERS)
    ]
    write_without_spark(folder, EXPERIMENTS, *rows)
    write_without_spark(folder, EVENTS, *({"event_date": after(day)} for day in (-60, 30)))
    return config.load(overrides=[f"tables.path={folder}", "tracking.uri=null"])


@pytest.fixture(scope="module")
def works(spark: SparkSession, settings: Config) -> UpliftResult:
    return pipeline.uplift_experiment(spark, settings, "works")


def test_users_who_gain_are_ranked_first_and_told_apart_by_what_was_known(works: UpliftResult) -> None:
    assert works.qini.is_sure
    assert (works.group, works.users, works.days) == ("treatment", USERS, DAYS)
    assert works.tenths[0].low > LIFT / 4
    assert works.tenths[-1].high < LIFT
    assert any("discount" in covariate for covariate, *_ in works.separating)
    assert len(works.ranking) == USERS
    first = works.ranking["user_key"].head(USERS // 5)
    assert first.str[1:].astype(int).mod(2).mean() > 0.9
    assert works.ranking["uplift"].is_monotonic_decreasing


def test_where_nobody_gains_more_than_others_nobody_is_ranked(spark: SparkSession, settings: Config) -> None:
    found = pipeline.uplift_experiment(spark, settings, "luck")
    assert not found.qini.is_sure
    assert found.ranking.empty


def test_the_command_says_whom_to_treat_and_names_no_user(
    spark: SparkSession, settings: Config, works: UpliftResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "start_session", lambda *_: spark)
    monkeypatch.setattr(pipeline, "uplift_experiment", lambda *_: works)

    def run(*words: str) -> str:
        found = CliRunner().invoke(
            app.app, ["experiment", "uplift", "works", *words, f"tables.path={settings.tables.path}"]
        )
        assert found.exit_code == 0
        assert "u001" not in found.output
        return found.output

    assert "Treat the first tenths" in run()
    values = json.loads(run("--json"))
    assert values["sure"] is True
    assert len(values["tenths"]) == 10


@pytest.mark.parametrize(
    ("name", "more", "error", "words"),
    [
        ("unknown", {}, DataError, "holds no user of unknown"),
        ("three", {}, ConfigError, "--group must be one of coupon, mail"),
        ("works", {"group": "control"}, ConfigError, "--group must be one of treatment"),
        ("works", {"days": 0}, ConfigError, "days must be at least 1"),
        ("few", {}, DataError, "fewer than 50 users"),
        ("later", {}, DataError, "are not over"),
    ],
)
def test_what_cannot_be_told_is_one_clear_error(
    spark: SparkSession, settings: Config, name: str, more: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        pipeline.uplift_experiment(spark, settings, name, **more)


def test_one_of_several_groups_is_compared_with_the_control_group(spark: SparkSession, settings: Config) -> None:
    found = pipeline.uplift_experiment(spark, settings, "three", "mail", days=10)
    assert (found.group, found.users, found.days) == ("mail", USERS * 2 // 3, 10)
