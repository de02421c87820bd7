"""The job that compares the users whom a campaign contacted with comparable others: an answer, or that it can't tell.

Nobody drew the users of a campaign at random, so no difference here is called an effect of the campaign. A pseudo-outcome test
(Imbens and Rubin 2015, "Causal inference", ch. 21) looks for what the covariates don't explain: the same comparison over the
weeks before the campaign must see nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import Any

import numpy as np
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.session import persisted
from bp_spark.evaluation.realised import bundle_of
from bp_spark.experiments.assignment import with_covariate
from bp_spark.experiments.covariates import covariates, later_contacts, other_contacts
from bp_spark.experiments.doubly_robust import Effect, effect
from bp_spark.experiments.read import require_over
from bp_spark.experiments.sample import LEAST_USERS, collect_sample
from bp_spark.experiments.size import seen_until
from bp_spark.features import labels
from bp_spark.ingest.clean import span
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.schema import rows_of_date
from bp_spark.lakehouse.tables import CAMPAIGN_CONTACTS

MORE, LESS, NO_DIFFERENCE, CANNOT_TELL = "more", "less", "no difference seen", "can't tell"
"""The answers."""
LEAST_COMPARABLE = 0.9
"""Share of the treated users who must have comparable others."""
HISTORY_DAYS = 28
"""Days of events before each date: without them little is known of users."""
PLACEBOS = 3
"""Most windows before the campaign that are tested."""
WAVE_DAYS, MOST_LATER = 7, 0.05
"""A campaign begins within so many days for all of its users but such a share."""
SCORE_DAYS = 7
"""Days that a score may be older than the date."""
CAP = 0.99
"""Quantile of spend at which the second estimate caps it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """The comparison over the days of the campaign, or over as many days before it.

    Attributes:
        first_day: first day of the spend; users are compared by what was known before it.
        is_placebo: whether the days lie before the campaign, where there can be no effect.
        score_date: date of the expected spend among the covariates; ``None`` where there is none to be used.
        effect: the estimate.
    """

    first_day: date
    is_placebo: bool
    score_date: date | None
    effect: Effect

    @property
    def sees_difference(self) -> bool:
        """Whether the 95 % interval excludes 0."""
        return self.effect.comparison.excludes_zero


@dataclass(frozen=True)
class CampaignResult:
    """Whether the users of a campaign spent more than comparable others.

    Attributes:
        campaign: the campaign.
        first_day: its first day.
        days: days of spend.
        contacted: users that it contacted.
        answer: MORE, LESS, NO_DIFFERENCE or CANNOT_TELL.
        reasons: why it can't tell.
        window: the comparison over the campaign; ``None`` where too few users can be compared.
        capped: the same with spend capped at the quantile :data:`CAP`, so that no single user decides.
        placebos: the same over the days before, newest first.
        later_contacts: share of the contacted and of the others whom another campaign contacted within the window.
        sampled: share of the other users that were compared.
        stages: the stages that ran.
    """

    campaign: str
    first_day: date
    days: int
    contacted: int
    answer: str
    reasons: list[str]
    window: Window | None
    capped: Effect | None
    placebos: list[Window]
    later_contacts: tuple[float, float]
    sampled: float
    stages: list[dict[str, Any]]


def campaign_effect(spark: SparkSession, config: Config, campaign: str, days: int | None = None) -> CampaignResult:
    """Compare the spend of the users whom a campaign contacted with that of comparable others, and test the comparison.

    Users count if they bought before the campaign's first day. Nothing is written but the record of the run.

    Args:
        spark: the running session.
        config: all settings.
        campaign: ``campaign_id`` of ``campaign_contacts``.
        days: days of spend from the first day on; by default those of the campaign.

    Raises:
        ConfigError: ``days`` is not at least 1, or is missing for a campaign without a last day.
        DataError: there is no such campaign, it contacted fewer users than ``privacy.smallest_group``, its days are not over,
            or there is too little history before it.
    """
    if days is not None and days < 1:
        raise ConfigError(f"campaign-effect: days must be at least 1, is {days}")
    with recorded(spark, config, "campaign-effect") as run, run.stage("compare") as figures:
        contacts = run.lakehouse.read(CAMPAIGN_CONTACTS.name)
        facts = _facts(contacts, campaign, config.privacy.smallest_group)
        first_day = facts["first_day"]
        window_days = _window_days(facts, days)
        require_over(run, first_day, window_days)
        windows: list[Window] = []
        capped, later, sampled = None, (0.0, 0.0), 1.0
        for day in _dates(run, first_day, window_days):
            score_date, rows = _users(run, contacts, campaign, day, window_days)
            with persisted(rows) as users:
                sample, shares = collect_sample(users)
                if sample is None:
                    break
                windows.append(Window(day, day != first_day, score_date, effect(sample)))
                if day == first_day:
                    later, sampled = _later_shares(users, contacts, campaign, day, window_days), shares
                    cap = float(np.quantile(sample.y, CAP))
                    capped = effect(replace(sample, y=np.minimum(sample.y, cap)))
        window, placebos = (windows[0], windows[1:]) if windows else (None, [])
        reasons = [*_reasons_of_contacts(facts), *_reasons(window, placebos)]
        figures["campaign"], figures["first_day"], figures["users"] = campaign, first_day, facts["users"]
        figures["answer"] = answer = CANNOT_TELL if reasons or window is None else _direction(window)
    return CampaignResult(
        campaign=campaign,
        first_day=first_day,
        days=window_days,
        contacted=facts["users"],
        answer=answer,
        reasons=reasons,
        window=window,
        capped=capped,
        placebos=placebos,
        later_contacts=later,
        sampled=sampled,
        stages=run.records,
    )


# --- the campaign and its dates -----------------------------------------------------------------------------------------


def _facts(contacts: DataFrame, campaign: str, smallest_group: int) -> dict[str, Any]:
    """Return ``users, first_day, last_day, later``: the share of users whose contact began after the first wave."""
    of_users = (
        contacts.filter(F.col("campaign_id") == campaign)
        .groupBy("user_key")
        .agg(F.min("first_day").alias("first_day"), F.max("last_day").alias("last_day"))
    )
    row = of_users.agg(F.count(F.lit(1)), F.min("first_day"), F.max("last_day")).collect()[0]
    users, first_day, last_day = row
    if not users:
        raise DataError(CAMPAIGN_CONTACTS.name, f"holds no contact by the campaign {campaign}", column="campaign_id")
    if users < smallest_group:
        raise DataError(
            CAMPAIGN_CONTACTS.name,
            f"holds fewer than {smallest_group} users of the campaign {campaign} (privacy.smallest_group), who are not shown",
            column="campaign_id",
        )
    wave_ends = first_day + timedelta(days=WAVE_DAYS)
    later = of_users.filter(F.col("first_day") >= F.lit(wave_ends)).count()
    return {"users": users, "first_day": first_day, "last_day": last_day, "later": later / users}


def _window_days(facts: dict[str, Any], days: int | None) -> int:
    if days is not None:
        return days
    if facts["last_day"] is None:
        raise ConfigError("campaign-effect: the campaign has no last day; give --days")
    window: timedelta = facts["last_day"] - facts["first_day"]
    return window.days + 1


def _dates(run: Run, first_day: date, days: int) -> Iterator[date]:
    """Yield the first day of the campaign, then those of the placebos, each with enough history before it."""
    first_event, _ = span(run.lakehouse)
    oldest = first_event + timedelta(days=HISTORY_DAYS)
    if first_day < oldest:
        raise DataError(
            "events",
            f"must reach back {HISTORY_DAYS} days before the campaign's first day, {first_day}, and begin on {first_event}",
            column="event_date",
        )
    for number in range(PLACEBOS + 1):
        day = first_day - timedelta(days=number * days)
        if day >= oldest:
            yield day


# --- the users ----------------------------------------------------------------------------------------------------------


def _users(run: Run, contacts: DataFrame, campaign: str, day: date, days: int) -> tuple[date | None, DataFrame]:
    """Return the date of the expected spend, and the users known before a day: covariates, ``treated`` and ``spent``."""
    daily = run.lakehouse.read("user_daily")
    treated = contacts.filter(F.col("campaign_id") == campaign).select("user_key").distinct()
    spent = labels.future_spend(daily, [day], days).select("user_key", F.col("label_spend").alias("spent"))
    others = other_contacts(contacts, campaign, day)
    counts = [name for name in others.columns if name.startswith("contacts")]
    rows = (
        covariates(daily, day)
        .join(others, "user_key", "left")
        .join(treated.withColumn("treated", F.lit(True)), "user_key", "left")
        .join(spent, "user_key", "left")
        .fillna(0, subset=[*counts, "spent"])
        .fillna(False, subset=["treated"])
    )
    score_date, scores = _scores(run, day, days)
    if scores is not None:
        rows = rows.join(scores, "user_key", "left")
    return score_date, rows


def _scores(run: Run, day: date, days: int) -> tuple[date | None, DataFrame | None]:
    """Return the newest expected spend as of a day: of a bundle that has provably not learned from spend after it."""
    if not run.lakehouse.exists("scores"):
        return None, None
    scores = run.lakehouse.read("scores")
    oldest = day - timedelta(days=SCORE_DAYS)
    recent = scores.filter((F.col("score_date") <= F.lit(day)) & (F.col("score_date") >= F.lit(oldest)))
    found: date | None = recent.agg(F.max("score_date")).collect()[0][0]
    if found is None:
        return None, None
    known_until = seen_until(run.config, bundle_of(scores, found))
    if known_until is None or known_until > found:
        return None, None
    expected = with_covariate(rows_of_date(scores, found), days, run.config.labels.horizon_days)
    return found, expected.select("user_key", F.col("expected_spend").cast("float").alias("expected_spend"))


def _later_shares(users: DataFrame, contacts: DataFrame, campaign: str, day: date, days: int) -> tuple[float, float]:
    later = later_contacts(contacts, campaign, day, days).withColumn("later", F.lit(1))
    found = users.select("user_key", "treated").join(later, "user_key", "left").groupBy("treated")
    shares = {
        row["treated"]: row["share"] for row in found.agg(F.avg(F.coalesce("later", F.lit(0))).alias("share")).collect()
    }
    return shares[True], shares[False]


# --- the answer ---------------------------------------------------------------------------------------------------------


def _reasons_of_contacts(facts: dict[str, Any]) -> list[str]:
    if facts["later"] <= MOST_LATER:
        return []
    return [
        f"{facts['later']:.0%} of the users were contacted {WAVE_DAYS} days or more after the campaign's first day: what they "
        "did in between may have chosen them"
    ]


def _reasons(window: Window | None, placebos: Sequence[Window]) -> list[str]:
    """Return why there is no answer, in words."""
    if window is None:
        return [f"fewer than {LEAST_USERS} contacted users, or others, had bought before"]
    overlap, reasons = window.effect.overlap, []
    if overlap.comparable < LEAST_COMPARABLE:
        reasons.append(
            f"only {overlap.comparable:.0%} of the contacted users have comparable others: nearly all users like the rest were "
            "contacted"
        )
    if overlap.effective_others < LEAST_USERS:
        reasons.append(f"the comparable others are as few as {overlap.effective_others:.0f} users")
    if not placebos:
        reasons.append("there is too little history before the campaign for a placebo test")
    for placebo in placebos:
        if placebo.sees_difference:
            reasons.append(
                f"the placebo from {placebo.first_day} fails: contacted users differed from comparable ones before the campaign"
            )
    return reasons


def _direction(window: Window) -> str:
    if not window.sees_difference:
        return NO_DIFFERENCE
    return MORE if window.effect.comparison.difference > 0 else LESS
