"""The job that asks who of an experiment's users gained most, where the random groups let it tell."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.session import persisted
from bp_spark.experiments import learners
from bp_spark.experiments.assign import control_of, require_definition
from bp_spark.experiments.assignment import Definition
from bp_spark.experiments.covariates import covariates
from bp_spark.experiments.learners import Qini, Tenth
from bp_spark.experiments.read import require_over
from bp_spark.experiments.sample import LEAST_USERS, collect_sample, covariate_names
from bp_spark.features import labels
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.tables import EXPERIMENTS


@dataclass(frozen=True)
class UpliftResult:
    """Who of an experiment's users gained most.

    Attributes:
        experiment: name of the experiment.
        group: the treated group.
        first_day: first day of the spend.
        days: days of spend.
        users: users of both groups that were compared.
        qini: coefficient of the ranking by the X-learner, which decides.
        qini_t_learner: the same by the T-learner.
        tenths: tenths of the users that rankings were judged by, the largest predicted uplift first.
        separating: covariate, its mean in the first tenth, and that of all others; what differs most comes first.
        ranking: ``user_key, uplift`` of the compared users, the largest first; empty unless the ranking is sure.
        stages: the stages that ran.
    """

    experiment: str
    group: str
    first_day: date
    days: int
    users: int
    qini: Qini
    qini_t_learner: Qini
    tenths: list[Tenth]
    separating: list[tuple[str, float, float]]
    ranking: pd.DataFrame
    stages: list[dict[str, Any]]


def uplift(
    spark: SparkSession, config: Config, name: str, group: str | None = None, days: int | None = None
) -> UpliftResult:
    """Rank the users of an experiment by what the treatment is expected to add to their spend, and test the ranking.

    Users are ranked by what was known before the draw, by models that have not seen them. Nothing is written but the record of
    the run.

    Args:
        spark: the running session.
        config: all settings.
        name: name of the experiment.
        group: the treated group; may be left out where there is only one beside the control group.
        days: days of spend; by default those that were planned.

    Raises:
        ConfigError: ``days`` is not at least 1, or the group is not one of the experiment's.
        DataError: there is no such experiment, its span is not over, or a group has fewer than
            :data:`bp_spark.experiments.sample.LEAST_USERS` users.
    """
    if days is not None and days < 1:
        raise ConfigError(f"experiment uplift: days must be at least 1, is {days}")
    with recorded(spark, config, "experiment-uplift") as run, run.stage("uplift") as figures:
        definition = require_definition(run.lakehouse, name)
        treated = _treated_group(definition, group)
        read_days = definition.days if days is None else days
        require_over(run, definition.day, read_days)
        with persisted(_users(run, definition, treated, read_days)) as users:
            names = covariate_names(users)
            sample, _ = collect_sample(users)
            if sample is None:
                raise DataError(
                    EXPERIMENTS.name,
                    f"a group of {name} has fewer than {LEAST_USERS} users with an order before {definition.day}",
                    column="group",
                )
        judged, predicted = learners.judge(sample), learners.rank(sample)
        result = learners.qini(judged, judged.x_learner)
        figures["experiment"], figures["users"] = name, len(sample.y)
        figures["qini"] = f"{result.coefficient:.4g} ({result.low:.4g} to {result.high:.4g})"
    return UpliftResult(
        experiment=name,
        group=treated,
        first_day=definition.day,
        days=read_days,
        users=len(sample.y),
        qini=result,
        qini_t_learner=learners.qini(judged, judged.t_learner),
        tenths=learners.tenths(sample, judged),
        separating=learners.separating(sample, predicted, names),
        ranking=_ranking(sample.keys, predicted).head(len(sample.y) if result.is_sure else 0),
        stages=run.records,
    )


def _treated_group(definition: Definition, group: str | None) -> str:
    """Return the group to compare with the control group.

    Raises:
        ConfigError: it is none of the experiment's, or not named where there are several.
    """
    control = control_of([*definition.groups])
    others = [each for each in definition.groups if each != control]
    if group is None and len(others) == 1:
        return others[0]
    if group not in others:
        raise ConfigError(f"experiment uplift: --group must be one of {', '.join(others)}")
    return group


def _users(run: Run, definition: Definition, group: str, days: int) -> DataFrame:
    """Return the users of the group and of the control group: covariates of the draw, ``treated`` and ``spent``."""
    daily, drawn = run.lakehouse.read("user_daily"), run.lakehouse.read(EXPERIMENTS.name)
    compared = drawn.filter(
        (F.col("experiment") == definition.name) & F.col("group").isin(group, control_of([*definition.groups]))
    )
    spent = labels.future_spend(daily, [definition.day], days).select("user_key", F.col("label_spend").alias("spent"))
    groups = compared.select(
        "user_key",
        (F.col("group") == group).alias("treated"),
        F.col("expected_spend").cast("float").alias("expected_spend"),
    )
    return (
        covariates(daily, definition.day)
        .join(groups, "user_key")
        .join(spent, "user_key", "left")
        .fillna(0, subset=["spent"])
    )


def _ranking(keys: np.ndarray, predicted: np.ndarray) -> pd.DataFrame:
    rows = pd.DataFrame({"user_key": keys, "uplift": predicted})
    return rows.sort_values(["uplift", "user_key"], ascending=[False, True], ignore_index=True)
