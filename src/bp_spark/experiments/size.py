"""The job that says how many users an experiment takes, by what past users spent."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.evaluation.realised import bundle_of
from bp_spark.experiments import spend
from bp_spark.experiments.assignment import EVERYONE, scored_users
from bp_spark.experiments.estimate import Moments, Plan
from bp_spark.features import labels
from bp_spark.ingest.clean import span
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.registry import manifest as manifests
from bp_spark.registry.publishing import folder_here

SCORE, SPEND_BEFORE = "score", "spend of the days before"
"""What stands in for the covariate."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SizeResult:
    """How many users an experiment takes, or what effect it sees.

    Attributes:
        day: date whose users were looked at: what they spent from it on is known.
        days: days of spend.
        covariate: SCORE, or SPEND_BEFORE where no scored date is over.
        selection: condition on the users.
        users: number of these users.
        mean_spend: their mean spend, in the platform's currency.
        sd_spend: standard deviation of it between users.
        correlation: of spend with the covariate.
        effect: relative difference to be seen.
        alpha: share of false alarms.
        power: probability to see the effect.
        share: share of the treatment group.
        unadjusted: users of the control and of the treatment group, by plain means.
        adjusted: the same with the covariate.
        effect_unadjusted: relative difference that ``users`` let see, by plain means.
        effect_adjusted: the same with the covariate.
        stages: the stages that ran.
    """

    day: date
    days: int
    covariate: str
    selection: str
    users: int
    mean_spend: float
    sd_spend: float
    correlation: float
    effect: float
    alpha: float
    power: float
    share: float
    unadjusted: tuple[int, int]
    adjusted: tuple[int, int]
    effect_unadjusted: float
    effect_adjusted: float
    stages: list[dict[str, Any]]

    @property
    def saved(self) -> float:
        """Share of the users that the covariate saves."""
        return self.correlation**2


def size(
    spark: SparkSession,
    config: Config,
    effect: float,
    plan: Plan,
    day: date | None = None,
    days: int | None = None,
    where: str | None = None,
) -> SizeResult:
    """Return how many users a test of mean spend takes, without and with the score as covariate.

    Spread of the spend and its correlation with the score are those of a past scored date whose days are over. If there is
    none, spend of as many days before stands in for the score, for users with a purchase.

    Args:
        spark: the running session.
        config: all settings.
        effect: relative difference of mean spend to be seen, as 0.02.
        plan: false alarms, power and share of the treatment group.
        day: the scored date; by default the newest whose days are over.
        days: days of spend; by default ``labels.horizon_days``.
        where: condition on the users, as for ``assign``.

    Raises:
        ConfigError: a number is out of its bounds, or the condition can't be used.
        DataError: the days of ``day`` are not over, there is too little history, or there are fewer users than
            ``privacy.smallest_group`` or none with spend.
    """
    wanted = config.labels.horizon_days if days is None else days
    if not (effect > 0 and wanted >= 1 and all(0 < value < 1 for value in (plan.alpha, plan.power, plan.share))):
        raise ConfigError(
            "experiment size: effect must be above 0, days at least 1, alpha, power and share between 0 and 1"
        )
    with recorded(spark, config, "experiment-size") as run, run.stage("size") as figures:
        scored = _scored_date(run, day, wanted)
        covariate = SPEND_BEFORE if scored is None else SCORE
        if scored is None:
            if where is not None:
                raise DataError(
                    "scores", f"--where needs a scored date whose {wanted} days are over, and there is none"
                )
            scored, users = _spend_before(run, wanted)
        else:
            _warn_if_seen(run, scored)
            users = scored_users(run.lakehouse, config, scored, wanted, where)
        daily = run.lakehouse.read("user_daily")
        rows = spend.with_spend(users, daily, scored, wanted).withColumn("all", F.lit("all"))
        sums = spend.moments(rows, "all").get("all", Moments(0, 0, 0, 0, 0, 0))
        if sums.users < config.privacy.smallest_group:
            least = config.privacy.smallest_group
            raise DataError("scores", f"{scored} has fewer than {least} such users (privacy.smallest_group)")
        if sums.y <= 0:
            raise DataError(
                "user_daily", f"such users spent nothing in the {wanted} days from {scored}", column="spend"
            )
        figures["score_date"], figures["users"], figures["covariate"] = scored, sums.users, covariate
    spread, correlation = sums.sd_y / sums.mean_y, sums.correlation
    return SizeResult(
        day=scored,
        days=wanted,
        covariate=covariate,
        selection=where or EVERYONE,
        users=sums.users,
        mean_spend=sums.mean_y / spend.CENT,
        sd_spend=sums.sd_y / spend.CENT,
        correlation=correlation,
        effect=effect,
        alpha=plan.alpha,
        power=plan.power,
        share=plan.share,
        unadjusted=plan.users(spread, effect),
        adjusted=plan.users(spread, effect, correlation),
        effect_unadjusted=plan.effect(spread, sums.users),
        effect_adjusted=plan.effect(spread, sums.users, correlation),
        stages=run.records,
    )


def _scored_date(run: Run, day: date | None, days: int) -> date | None:
    """Return the scored date to look at: the given one, or the newest whose days are over; ``None`` without such a date."""
    _, last = span(run.lakehouse)
    newest = last - timedelta(days=days)
    if day is not None:
        bundle_of(run.lakehouse.read("scores"), day)
        if day > newest:
            rule = f"the {days} days from {day} are not over: events reach to {last}; give fewer --days, or an earlier date"
            raise DataError("events", rule, column="event_date")
        return day
    if not run.lakehouse.exists("scores"):
        return None
    over = run.lakehouse.read("scores").filter(F.col("score_date") <= F.lit(newest))
    found: date | None = over.agg(F.max("score_date")).collect()[0][0]
    return found


def _spend_before(run: Run, days: int) -> tuple[date, DataFrame]:
    """Return the newest date whose days are over, and its users with the spend of as many days before as what was expected."""
    first, last = span(run.lakehouse)
    day = last - timedelta(days=days)
    before = day - timedelta(days=days)
    if before < first:
        rule = f"must reach back {2 * days} days from {last}, and begin on {first}; give fewer --days"
        raise DataError("events", rule, column="event_date")
    daily = run.lakehouse.read("user_daily")
    seen = daily.filter(F.col("day") < F.lit(day))
    buyers = seen.groupBy("user_key").agg(F.max("orders").alias("orders")).filter(F.col("orders") > 0)
    spent = labels.future_spend(daily, [before], days, until=day)
    rows = buyers.join(spent, "user_key", "left").withColumn("expected_spend", F.coalesce("label_spend", F.lit(0.0)))
    return day, rows.select("user_key", "expected_spend")


def seen_until(config: Config, digest: str) -> date | None:
    """Return the first day whose spend a bundle has not learned from; ``None`` if the bundle isn't here.

    Args:
        config: all settings.
        digest: of the bundle.
    """
    folder = folder_here(config, digest)
    if folder is None:
        return None
    lineage = manifests.read(folder / manifests.MANIFEST, None)["lineage"]
    return date.fromisoformat(lineage.get("test_date", "2000-01-01"))


def _warn_if_seen(run: Run, day: date) -> None:
    """Warn if the bundle that scored a date has learned from spend after it: its scores are too good then."""
    known_until = seen_until(run.config, bundle_of(run.lakehouse.read("scores"), day))
    if known_until is not None and known_until > day:
        message = (
            "scores of %s are of a bundle that has learned from spend up to %s: the correlation is higher than a new "
            "experiment will have"
        )
        logger.warning(message, day, known_until, extra={"fields": {"score_date": str(day)}})
