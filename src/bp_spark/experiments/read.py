"""The job that reads an experiment: mean spend of its groups since the draw."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, digest
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.session import persisted
from bp_spark.core.version import __version__
from bp_spark.experiments import spend
from bp_spark.experiments.assign import control_of, require_definition
from bp_spark.experiments.assignment import Definition
from bp_spark.experiments.estimate import (
    SAMPLE_RATIO_ALARM,
    Comparison,
    Mean,
    Moments,
    adjusted,
    compare,
    lines,
    sample_ratio_p,
    unadjusted,
)
from bp_spark.ingest.clean import span
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.tables import EXPERIMENT_RESULTS, EXPERIMENTS

ADJUSTED, UNADJUSTED = "adjusted", "unadjusted"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadResult:
    """What came of an experiment.

    Attributes:
        definition: what the name stands for.
        rows: rows of EXPERIMENT_RESULTS of the span: two a group, adjusted first.
        warnings: why the figures are to be doubted, in words.
        stages: the stages that ran.
    """

    definition: Definition
    rows: list[dict[str, Any]]
    warnings: list[str]
    stages: list[dict[str, Any]]


def read(spark: SparkSession, config: Config, name: str, days: int | None = None) -> ReadResult:
    """Compare what the groups of an experiment spent since the draw, and write it to ``experiment_results``.

    Every drawn user counts, whether the treatment reached the user or not (intention to treat). The score of the draw is the
    covariate: later scores may know the treatment. Unless tables changed, a repeated reading writes nothing.

    Args:
        spark: the running session.
        config: all settings.
        name: name of the experiment.
        days: days of spend; by default those that were planned.

    Raises:
        ConfigError: ``days`` is not at least 1.
        DataError: there is no such experiment, its span is not over, or a group has fewer users than
            ``privacy.smallest_group``.
    """
    if days is not None and days < 1:
        raise ConfigError(f"experiment read: days must be at least 1, is {days}")
    with recorded(spark, config, "experiment-read") as run:
        lakehouse = run.lakehouse
        definition = require_definition(lakehouse, name)
        read_days = definition.days if days is None else days
        require_over(run, definition.day, read_days)
        with run.step("read", EXPERIMENT_RESULTS, experiment=name, days=str(read_days)) as step:
            # after the step has looked at its table: users who are forgotten meanwhile are gone here, or the write is refused
            versions = (lakehouse.version("user_daily"), lakehouse.version(EXPERIMENTS.name))
            step.inputs = digest(__version__, name, read_days, versions, config.privacy.smallest_group)
            rows = _stored(run, name, read_days) if step.unchanged else []
            if not rows:
                rows = _compared(run, definition, read_days, versions)
                frame = spark.createDataFrame(rows, EXPERIMENT_RESULTS.schema)
                step.replace(frame, where={"experiment": [name], "days": [read_days]}, after=step.version)
            step.figures["experiment"], step.figures["days"] = name, read_days
            step.figures["rows_out"] = len(rows) if step.written else 0
        warnings = _warnings(definition, read_days, rows)
        for warning in warnings:
            logger.warning("%s", warning, extra={"fields": {"experiment": name, "days": read_days}})
        return ReadResult(definition, rows, warnings, run.records)


def require_over(run: Run, day: date, days: int) -> None:
    """Require an event after the last day of the span; without one, that day may not be whole.

    Args:
        run: the run that reads.
        day: first day of the span.
        days: number of its days.

    Raises:
        DataError: the span is not over.
    """
    _, last = span(run.lakehouse)
    end = day + timedelta(days=days)
    if last < end:
        over = (last - day).days
        shorter = f"; --days {over} reads what is there" if over > 0 else ""
        raise DataError(
            "events",
            f"the {days} days from {day} are not over: events reach to {last}, and must reach to {end}{shorter}",
            column="event_date",
        )


def _compared(run: Run, definition: Definition, days: int, versions: Sequence[int]) -> list[dict[str, Any]]:
    """Return rows of EXPERIMENT_RESULTS."""
    daily = run.lakehouse.read("user_daily", versions[0])
    drawn = run.lakehouse.read(EXPERIMENTS.name, versions[1]).filter(F.col("experiment") == definition.name)
    users = drawn.select("user_key", "group", "expected_spend")
    with persisted(spend.with_spend(users, daily, definition.day, days)) as rows:
        groups = spend.moments(rows, "group")
        smallest = run.config.privacy.smallest_group
        if min(group.users for group in groups.values()) < smallest or len(groups) < 2:  # noqa: PLR2004
            raise DataError(
                EXPERIMENTS.name,
                f"a group of {definition.name} has fewer than {smallest} users (privacy.smallest_group), and is not shown",
                column="group",
            )
        means = {ADJUSTED: _adjusted_means(rows, groups), UNADJUSTED: {n: unadjusted(m) for n, m in groups.items()}}
    control = control_of([*definition.groups])
    same_in_all_rows = {
        "experiment": definition.name,
        "days": days,
        "score_date": definition.day,
        "planned": days == definition.days,
        "control": control,
        "control_users": groups[control].users,
        "sample_ratio_p": sample_ratio_p([groups[n].users for n in groups], [definition.groups[n] for n in groups]),
        "earlier_looks": _earlier_looks(run, definition, days),
        "run_id": run.run_id,
        "read_at": datetime.now(UTC),
    }
    results = []
    for group in definition.groups:
        if group != control:
            found = {name: compare(of[control], of[group]) for name, of in means.items()}
            plain = found[UNADJUSTED].standard_error
            for method, comparison in found.items():
                saved = 1 - (comparison.standard_error / plain) ** 2 if plain > 0 else None
                row = {"group": group, "method": method, "users": groups[group].users, "variance_saved": saved}
                of = means[method]
                results.append({**same_in_all_rows, **row, **_figures(comparison, of[control], of[group])})
    return results


def _adjusted_means(rows: DataFrame, groups: Mapping[str, Moments]) -> dict[str, Mean]:
    by_group = lines(groups)
    variances = spend.robust_variances(rows, "group", by_group)
    return {name: adjusted(line, variances[name]) for name, line in by_group.items()}


def _figures(comparison: Comparison, control: Mean, group: Mean) -> dict[str, float | None]:
    """Return the columns with figures, in money and not in cents."""
    money = ("difference", "low", "high", "standard_error")
    relative = {
        name: None if math.isnan(value := getattr(comparison, name)) else value
        for name in ("relative", "relative_low", "relative_high")
    }
    return {
        "mean_spend": group.value / spend.CENT,
        "control_mean_spend": control.value / spend.CENT,
        **{name: getattr(comparison, name) / spend.CENT for name in money},
        **relative,
        "p_value": comparison.p_value,
    }


def _stored(run: Run, name: str, days: int) -> list[dict[str, Any]]:
    results = run.lakehouse.read(EXPERIMENT_RESULTS.name)
    rows = results.filter((F.col("experiment") == name) & (F.col("days") == days))
    return [row.asDict() for row in rows.orderBy("group", "method").collect()]


def _earlier_looks(run: Run, definition: Definition, days: int) -> int:
    """Return how many shorter spans than the planned one were read, other than this one."""
    if not run.lakehouse.exists(EXPERIMENT_RESULTS.name):
        return 0
    results = run.lakehouse.read(EXPERIMENT_RESULTS.name).filter(F.col("experiment") == definition.name)
    looks = results.select("days").distinct().filter((F.col("days") < definition.days) & (F.col("days") < days))
    return looks.count()


def _warnings(definition: Definition, days: int, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    name, warnings = definition.name, []
    ratio, looks = rows[0]["sample_ratio_p"], rows[0]["earlier_looks"]
    if ratio < SAMPLE_RATIO_ALARM:
        warnings.append(
            f"{name}: the groups don't have the users that their shares let expect (p = {ratio:.1e}); something else than "
            "the draw decided who is in them, so trust no figure"
        )
    if days < definition.days:
        warnings.append(
            f"{name}: {days} of {definition.days} planned days, look {looks + 1} before the end. Who stops at the first look "
            "that shows something has more false alarms than 5 %: decide by the planned days"
        )
    elif days > definition.days:
        warnings.append(f"{name}: {days} days, and {definition.days} were planned: decide by the planned days")
    elif looks:
        warnings.append(
            f"{name}: shorter spans that were read before the end: {looks}. The intervals hold if nobody could have stopped "
            "the experiment then"
        )
    return warnings
