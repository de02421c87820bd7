"""The job that draws the users of a scored date into the groups of an experiment."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, digest
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.session import persisted
from bp_spark.evaluation.realised import bundle_of
from bp_spark.experiments.assignment import CONTROL, EVERYONE, Definition, draw, scored_users
from bp_spark.ingest.clean import span
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import EXPERIMENTS

_SHARES_AGREE = 1e-9
"""Largest difference of two shares that are the same."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AssignResult:
    """The groups of an experiment.

    Attributes:
        definition: what the name stands for.
        users: group -> number of users.
        written: whether the users were drawn now; ``False`` if they were drawn before.
        stages: the stages that ran.
    """

    definition: Definition
    users: dict[str, int]
    written: bool
    stages: list[dict[str, Any]]


def assign(spark: SparkSession, config: Config, definition: Definition) -> AssignResult:
    """Draw the scored users of a date into groups, and write them to ``experiments`` in one commit.

    The same definition again writes nothing, whatever was scored since. Users who come later aren't added: all users of an
    experiment have the same span of days. So are users of another experiment drawn independently.

    Args:
        spark: the running session.
        config: all settings.
        definition: name, date, days, groups and condition.

    Raises:
        ConfigError: the name is that of an experiment with another definition, or the condition can't be used.
        ConflictError: another run wrote the table meanwhile.
        DataError: the date has no scores, or a group would have fewer users than ``privacy.smallest_group``.
    """
    definition.require_usable()
    with recorded(spark, config, "experiment-assign") as run:
        lakehouse = run.lakehouse
        inputs = digest(
            definition.name, definition.day, definition.days, [*definition.groups.items()], definition.where
        )
        with run.step("assign", EXPERIMENTS, inputs, experiment=definition.name) as step:
            existing = stored_definition(lakehouse, definition.name)
            if existing is not None:
                _require_same(existing, definition)
            else:
                with persisted(_drawn(run, definition)) as rows:
                    _require_users(rows, definition, config.privacy.smallest_group)
                    step.append(rows)
                _warn_of_known_spend(lakehouse, definition)
            users = _users_by_group(lakehouse.read(EXPERIMENTS.name).filter(F.col("experiment") == definition.name))
            step.figures["experiment"], step.figures["score_date"] = definition.name, definition.day
            step.figures["rows_out"] = sum(users.values()) if step.written else 0
            written = step.written
        return AssignResult(
            existing or definition, {name: users.get(name, 0) for name in definition.groups}, written, run.records
        )


def stored_definition(lakehouse: Lakehouse, name: str) -> Definition | None:
    """Return what an experiment's name stands for, by its users; ``None`` if it has none."""
    if not lakehouse.exists(EXPERIMENTS.name):
        return None
    rows = lakehouse.read(EXPERIMENTS.name).filter(F.col("experiment") == name)
    found = rows.groupBy("group").agg(
        *(F.first(column).alias(column) for column in ("share", "is_control", "score_date", "days", "selection"))
    )
    groups = sorted(found.collect(), key=lambda row: (not row["is_control"], row["group"]))
    if not groups:
        return None
    selection = groups[0]["selection"]
    return Definition(
        name=name,
        day=groups[0]["score_date"],
        days=groups[0]["days"],
        groups={row["group"]: row["share"] for row in groups},
        where=None if selection == EVERYONE else selection,
    )


def require_definition(lakehouse: Lakehouse, name: str) -> Definition:
    """Return what an experiment's name stands for.

    Raises:
        DataError: there is no such experiment.
    """
    definition = stored_definition(lakehouse, name)
    if definition is None:
        raise DataError(EXPERIMENTS.name, f"holds no user of {name}; run experiment assign", column="experiment")
    return definition


def control_of(groups: list[str]) -> str:
    """Return the group that others are compared with: the one named control, else the first."""
    return CONTROL if CONTROL in groups else groups[0]


def _drawn(run: Run, definition: Definition) -> DataFrame:
    """Return rows of EXPERIMENTS."""
    lakehouse = run.lakehouse
    # before anything else, so that a date without scores is the error, and no empty group
    bundle_of(lakehouse.read("scores"), definition.day)
    users = scored_users(lakehouse, run.config, definition.day, definition.days, definition.where)
    control = control_of([*definition.groups])
    return draw(users, definition.name, definition.groups).withColumns(
        {
            "experiment": F.lit(definition.name),
            "is_control": F.col("group") == control,
            "score_date": F.lit(definition.day),
            "days": F.lit(definition.days),
            "selection": F.lit(definition.selection),
            "run_id": F.lit(run.run_id),
            "assigned_at": F.current_timestamp(),
        }
    )


def _users_by_group(rows: DataFrame) -> dict[str, int]:
    return {row["group"]: row["count"] for row in rows.groupBy("group").count().collect()}


def _require_users(rows: DataFrame, definition: Definition, smallest_group: int) -> None:
    users = _users_by_group(rows)
    if min(users.get(name, 0) for name in definition.groups) < smallest_group:
        raise DataError(
            "scores",
            f"gives a group of {definition.name} fewer than {smallest_group} users (privacy.smallest_group), which read would "
            "refuse; select more users or draw larger shares",
        )


def _require_same(existing: Definition, definition: Definition) -> None:
    """Require that a name stands for what it stood for before."""
    shares = {*existing.groups, *definition.groups}
    differences = {
        "date": existing.day != definition.day,
        "days": existing.days != definition.days,
        "groups": any(
            abs(existing.groups.get(name, 0) - definition.groups.get(name, 0)) > _SHARES_AGREE for name in shares
        ),
        "condition": existing.where != definition.where,
    }
    if any(differences.values()):
        names = ", ".join(name for name, differs in differences.items() if differs)
        raise ConfigError(
            f"experiment assign: {definition.name} was drawn as of {existing.day}, and its {names} differ; a draw stands, so "
            "give the new one another name"
        )


def _warn_of_known_spend(lakehouse: Lakehouse, definition: Definition) -> None:
    _, last = span(lakehouse)
    known = (last - definition.day).days + 1
    if known > 0:
        message = (
            "experiment %s: events of %d days from %s on are there already. A treatment can't change them, and they blur its "
            "effect: draw from the newest scored date, unless this is an A/A test"
        )
        fields = {"experiment": definition.name, "known_days": known}
        logger.warning(message, definition.name, known, definition.day, extra={"fields": fields})
