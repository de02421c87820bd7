"""Campaigns without a random group: what is found, what is not, and when the command can't tell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession
from typer.testing import CliRunner

from bp_spark import pipeline
from bp_spark.cli import app, common
from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.experiments import campaign
from bp_spark.experiments.campaign import CANNOT_TELL, MORE, NO_DIFFERENCE, CampaignResult
from bp_spark.experiments.covariates import covariates, other_contacts
from bp_spark.experiments.doubly_robust import Effect, effect
from bp_spark.experiments.sample import Sample
from bp_spark.lakehouse.tables import CAMPAIGN_CONTACTS, EVENTS, USER_DAILY
from tests.support.rows import frame, write_without_spark

DAY = date(2024, 3, 10)
DAYS = 14
USERS = 400
LIFT = 40
"""What a planted campaign adds to each contacted user's spend."""


def after(days: int) -> date:
    return DAY + timedelta(days=days)


def contact(campaign: str, number: int, first: int = 0, last: int | None = DAYS - 1) -> dict[str, Any]:
    last_day = None if last is None else after(last)
    return {
        "contact_id": f"{campaign}-{number}",
        "user_key": f"user-{number:03d}",
        "campaign_id": campaign,
        "first_day": after(first),
        "last_day": last_day,
    }


def bought(number: int, days: int, spend: float, orders: int = 1) -> dict[str, Any]:
    return {"user_key": f"user-{number:03d}", "day": after(days), "orders": orders, "spend": Decimal(f"{spend:.2f}")}


@pytest.fixture(scope="module", autouse=True)
def one_placebo() -> Iterator[None]:
    """Half of the seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(campaign, "PLACEBOS", 1)
        yield


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Users whose weekly spend is known, and campaigns that chose those who spend more."""
    folder = tmp_path_factory.mktemp("campaigns")
    overrides = ["privacy.smallest_group=10", "tracking.uri=null"]
    settings = config.load(overrides=[*overrides, f"tables.path={folder}/lakehouse", f"bundles={folder}/bundles"])
    random = np.random.default_rng(5)
    weekly = np.exp(random.normal(3, 0.6, USERS))
    chance = 1 / (1 + np.exp(-1.2 * (np.log(weekly) - 3) + 0.5))
    chosen = np.flatnonzero(random.random(USERS) < chance)
    other = np.flatnonzero(random.random(USERS) < chance)
    spend = [
        bought(number, day, weekly[number] * random.uniform(0.7, 1.3))
        for number in range(USERS)
        for day in range(-70, 28, 7)
    ]
    planted = [bought(number, 3, LIFT, orders=0) for number in other]
    # these spent more than others just before the campaign, for a reason that ended nobody knows how
    lucky = np.flatnonzero(random.random(USERS) < 0.3)
    before = [bought(number, -5, LIFT, orders=0) for number in lucky]
    contacts = [contact("idle", int(n)) for n in chosen] + [contact("works", int(n)) for n in other]
    contacts += [contact("on-luck", int(n)) for n in lucky] + [contact("small", n) for n in range(20)]
    contacts += [contact("tiny", n) for n in range(5)] + [contact("endless", n, last=None) for n in range(60)]
    contacts += [contact("everyone", int(n)) for n in np.argsort(-weekly)[:280]]
    contacts += [contact("drip", n, first=n % 14) for n in range(100)]
    contacts += [contact("early", n, first=-60) for n in range(100)] + [contact("long", n, last=40) for n in range(60)]
    tables = folder / "lakehouse"
    write_without_spark(tables, USER_DAILY, *spend, *planted, *before)
    write_without_spark(tables, CAMPAIGN_CONTACTS, *contacts)
    write_without_spark(tables, EVENTS, *({"event_date": after(days)} for days in (-70, 27)))
    return settings


@pytest.fixture(scope="module")
def found(spark: SparkSession, platform: Config) -> Callable[[str], CampaignResult]:
    """A function that compares the users of a campaign, each campaign once."""
    results: dict[str, CampaignResult] = {}

    def compare(campaign: str) -> CampaignResult:
        if campaign not in results:
            results[campaign] = pipeline.campaign_effect(spark, platform, campaign)
        return results[campaign]

    return compare


@pytest.fixture
def changed(spark: SparkSession, platform: Config) -> Iterator[Callable[..., CampaignResult]]:
    """A function that adds user-days and compares anew; the user-days are taken away again."""
    folder = Path(str(platform.tables.path))
    version = DeltaTable(folder / "bp/user_daily").version()

    def compare(*more: dict[str, Any]) -> CampaignResult:
        write_without_spark(folder, USER_DAILY, *more, mode="append")
        return pipeline.campaign_effect(spark, platform, "works")

    yield compare
    DeltaTable(folder / "bp/user_daily").restore(version)


def of(result: CampaignResult) -> Effect:
    assert result.window is not None
    return result.window.effect


# --- the estimate -------------------------------------------------------------------------------------------------------


def sample(size: int, lift: float, chooses: float, seed: int) -> Sample:
    random = np.random.default_rng(seed)
    x = random.normal(size=(size, 4)).astype(np.float32)
    y = 100 + 30 * x[:, 0] + 10 * x[:, 1] ** 2 + random.normal(0, 10, size)
    treated = random.random(size) < 1 / (1 + np.exp(-chooses * x[:, 0]))
    return Sample(x, y + lift * treated, treated, np.arange(size) % 5)


def test_users_chosen_for_what_they_spend_show_no_effect_where_plain_means_do() -> None:
    result = effect(sample(1_500, lift=0, chooses=1.0, seed=1))
    assert result.naive > 20
    assert result.comparison.low < 0 < result.comparison.high
    assert result.overlap.imbalance_after < 0.2 < result.overlap.imbalance_before


def test_the_interval_holds_a_planted_effect_as_often_as_it_should() -> None:
    results = [effect(sample(400, lift=8, chooses=0.7, seed=seed)).comparison for seed in range(8)]
    assert sum(one.low <= 8 <= one.high for one in results) >= 6
    assert np.mean([one.difference for one in results]) == pytest.approx(8, abs=1.5)


def test_a_sample_of_the_others_changes_no_weight() -> None:
    users = sample(3_000, lift=8, chooses=1.0, seed=2)
    kept = users.treated | (np.arange(3_000) % 3 == 0)
    part = effect(Sample(users.x[kept], users.y[kept], users.treated[kept], users.fold[kept], odds_factor=1 / 3))
    whole = effect(users)
    assert part.comparison.difference == pytest.approx(whole.comparison.difference, abs=2)
    # propensities are those among all users
    assert part.overlap.treated_quantiles[1] == pytest.approx(whole.overlap.treated_quantiles[1], abs=0.05)


def test_users_whom_nobody_resembles_are_counted() -> None:
    assert effect(sample(1_500, lift=0, chooses=9.0, seed=3)).overlap.comparable < 0.8


# --- what was known -----------------------------------------------------------------------------------------------------


def test_covariates_see_only_days_before_the_date(spark: SparkSession) -> None:
    days = [bought(1, -1, 5), bought(1, -7, 10), bought(1, -40, 20), bought(2, -9, 0, orders=0)]
    rows = covariates(frame(spark, USER_DAILY, *days), DAY).collect()
    # the second user bought nothing yet
    (row,) = rows
    assert (row["spend_7d"], row["spend_28d"], row["spend"], row["orders_56d"]) == (15, 15, 35, 3)
    assert (row["days_since_order"], row["days_known"], row["spend_week_1"], row["spend_week_6"]) == (1, 40, 15, 20)
    later = frame(spark, USER_DAILY, *days, bought(1, 0, 99), bought(1, 3, 99), bought(3, 0, 99))
    assert covariates(later, DAY).collect() == rows


def test_contacts_by_other_campaigns_that_began_by_the_date_are_known(spark: SparkSession) -> None:
    contacts = [contact("a", 1), contact("b", 1, first=-10, last=5), contact("b", 1, first=-9, last=5)]
    contacts += [contact("c", 1, first=-200, last=-190), contact("d", 1, first=1)]
    (row,) = other_contacts(frame(spark, CAMPAIGN_CONTACTS, *contacts), "a", DAY).collect()
    assert (row["contacts"], row["contacts_91d"], row["contacts_running"], row["days_since_contact"]) == (2, 1, 1, 9)


# --- the answer ---------------------------------------------------------------------------------------------------------


def test_a_campaign_that_moved_spend_is_seen_and_one_that_only_chose_good_users_is_not(
    found: Callable[[str], CampaignResult],
) -> None:
    works, idle = found("works"), found("idle")
    assert (works.answer, works.reasons) == (MORE, [])
    assert of(works).comparison.low <= LIFT <= of(works).comparison.high
    assert idle.answer == NO_DIFFERENCE
    assert of(idle).naive > 3 * abs(of(idle).comparison.difference)
    assert [placebo.first_day for placebo in works.placebos] == [after(-DAYS)]


def test_a_difference_before_the_campaign_makes_it_impossible_to_tell(found: Callable[[str], CampaignResult]) -> None:
    result = found("on-luck")
    assert result.answer == CANNOT_TELL
    assert [reason for reason in result.reasons if f"the placebo from {after(-DAYS)} fails" in reason]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("everyone", "have comparable others"),
        ("small", "fewer than 50 contacted users"),
        ("drip", "7 days or more after the campaign's first day"),
    ],
)
def test_it_cannot_tell_where_users_are_not_comparable(
    name: str, reason: str, spark: SparkSession, platform: Config
) -> None:
    result = pipeline.campaign_effect(spark, platform, name)
    assert result.answer == CANNOT_TELL
    assert [one for one in result.reasons if reason in one]


def test_spend_after_the_window_changes_nothing_and_spend_in_it_does(
    found: Callable[[str], CampaignResult], changed: Callable[..., CampaignResult]
) -> None:
    before = found("works")
    late = [bought(number, DAYS, 9_000) for number in range(0, USERS, 2)]
    after_more = changed(*late)
    assert (after_more.window, after_more.placebos) == (before.window, before.placebos)
    assert changed(bought(1, DAYS - 1, 9_000)).window != before.window


def test_what_cannot_be_compared_is_refused(spark: SparkSession, platform: Config) -> None:
    with pytest.raises(DataError, match="holds no contact by the campaign nothing"):
        pipeline.campaign_effect(spark, platform, "nothing")
    with pytest.raises(DataError, match=r"fewer than 10 users of the campaign tiny \(privacy.smallest_group\)"):
        pipeline.campaign_effect(spark, platform, "tiny")
    with pytest.raises(DataError, match=r"41 days from 2024-03-10 are not over.*--days 27 reads what is there"):
        pipeline.campaign_effect(spark, platform, "long")
    with pytest.raises(DataError, match="must reach back 28 days before"):
        pipeline.campaign_effect(spark, platform, "early")
    with pytest.raises(ConfigError, match="no last day; give --days"):
        pipeline.campaign_effect(spark, platform, "endless")
    with pytest.raises(ConfigError, match="days must be at least 1"):
        pipeline.campaign_effect(spark, platform, "works", 0)


def test_the_command_shows_the_answer_and_never_calls_it_causal(
    spark: SparkSession, platform: Config, found: Callable[[str], CampaignResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "start_session", lambda *_: spark)
    results = {name: found(name) for name in ("works", "on-luck")}
    monkeypatch.setattr(pipeline, "campaign_effect", lambda *words: results[words[2]])

    def run(*words: str) -> str:
        result = CliRunner().invoke(app.app, ["campaign-effect", *words, f"tables.path={platform.tables.path}"])
        assert result.exit_code == 0, result.output
        return result.output

    shown = " ".join(run("works").split())
    assert "Contacted users spent more than comparable others" in shown
    assert "Only a random group can tell whether the campaign caused it" in shown
    assert "placebo from 2024-02-25" in shown
    assert "Can't tell" in run("on-luck")
    values = json.loads(run("works", "--json"))
    assert (values["answer"], values["days"], len(values["placebos"])) == (MORE, DAYS, 1)
