"""Draw users into groups: by a hash of the experiment and the user, out of those that a condition selects."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError
from bp_spark.features.catalogue import catalogue
from bp_spark.ingest.sources import expressions
from bp_spark.ingest.sources.grammar import DOUBLE, TEXT, columns_of
from bp_spark.lakehouse.schema import rows_of_date
from bp_spark.lakehouse.store import Lakehouse

EVERYONE = "all users of the date"
"""Words of a selection without a condition."""
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
CONTROL, TREATMENT = "control", "treatment"
DIGITS = 13
"""Hexadecimal digits of a hash that make a point: 52 bits, which a double holds exactly."""
POINTS = 16**DIGITS
_SELECTABLE: Mapping[str, str] = {
    **dict.fromkeys(("expected_spend", "low", "high", "p_active", "score"), DOUBLE),
    **dict.fromkeys(("level", "risk_level"), TEXT),
}
"""Columns of ``scores`` that a selection may name -> kind of their values."""


@dataclass(frozen=True)
class Definition:
    """What a name stands for.

    Attributes:
        name: name of the experiment.
        day: scored date; spend counts from this day on.
        days: planned days of spend.
        groups: group -> share of the users; the first is the control group. Users beyond their sum are in no group.
        where: condition on the users, or ``None``.
    """

    name: str
    day: date
    days: int
    groups: Mapping[str, float]
    where: str | None = None

    def require_usable(self) -> None:
        """Require names, shares and days that can be drawn by.

        Raises:
            ConfigError: one of them can't be used.
        """
        if not NAME.fullmatch(self.name):
            raise ConfigError(
                "experiment: a name has small letters, digits, - and _, at most 64, and begins with no sign"
            )
        if len(self.groups) < 2 or not all(NAME.fullmatch(group) for group in self.groups):  # noqa: PLR2004
            raise ConfigError("experiment: groups must be two or more, with names such as control and treatment")
        if not all(share > 0 for share in self.groups.values()) or sum(self.groups.values()) > 1 + 1e-9:
            raise ConfigError("experiment: shares of groups must be above 0, and at most 1 together")
        if self.days < 1:
            raise ConfigError(f"experiment: days must be at least 1, is {self.days}")

    @property
    def selection(self) -> str:
        """The condition as it is stored with each user."""
        return self.where or EVERYONE


def parse_groups(text: str) -> dict[str, float]:
    """Return group -> share from text such as ``control=0.5,treatment=0.5``.

    Raises:
        ConfigError: the text has another form, or names a group twice.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = (word.strip() for word in part.partition("="))
        try:
            value = float(share)
        except ValueError:
            raise ConfigError("--groups: must be NAME=SHARE,NAME=SHARE, such as control=0.5,treatment=0.5") from None
        if name in shares:
            raise ConfigError(f"--groups: names {name} twice")
        shares[name] = value
    return shares


# --- the draw -----------------------------------------------------------------------------------------------------------


def point(experiment: str, user_key: str) -> int:
    """Return the point of a user in an experiment, 0 to :data:`POINTS` - 1: the first digits of SHA-256.

    A point depends on nothing but both names. So it is the same in any order and on any cluster, and the points of two
    experiments are independent of each other.

    >>> 0 <= point("spring", "0037ddb4787") < POINTS
    True
    """
    return int(hashlib.sha256(f"{experiment}:{user_key}".encode()).hexdigest()[:DIGITS], 16)


def borders(groups: Mapping[str, float]) -> dict[str, int]:
    """Return group -> the first point that is beyond it; points beyond all groups are in none.

    >>> borders({"control": 0.5, "treatment": 0.5})["treatment"] == POINTS
    True
    """
    ends, total = {}, 0.0
    for group, share in groups.items():
        total += share
        ends[group] = min(round(total * POINTS), POINTS)
    return ends


def draw(users: DataFrame, experiment: str, groups: Mapping[str, float]) -> DataFrame:
    """Add ``group`` and ``share`` to users; those whose point is beyond all groups are left out.

    Args:
        users: rows with ``user_key``.
        experiment: name of the experiment.
        groups: group -> share of the users.
    """
    text = F.concat(F.lit(f"{experiment}:"), F.col("user_key"))
    at = F.conv(F.substring(F.sha2(text, 256), 1, DIGITS), 16, 10).cast("bigint")
    group, share = F.lit(None).cast("string"), F.lit(None).cast("double")
    for name, end in reversed(borders(groups).items()):
        group = F.when(at < end, F.lit(name)).otherwise(group)
        share = F.when(at < end, F.lit(groups[name])).otherwise(share)
    return users.withColumns({"group": group, "share": share}).filter(F.col("group").isNotNull())


# --- whom to draw from --------------------------------------------------------------------------------------------------


def scored_users(lakehouse: Lakehouse, config: Config, day: date, days: int, where: str | None) -> DataFrame:
    """Return the scored users of a date that meet a condition, with the expected spend that fits the days best.

    Scores and features of a date know only events before it, so the choice of users does, too.

    Args:
        lakehouse: the tables.
        config: all settings.
        day: scored date.
        days: days of spend to come.
        where: condition over columns of ``scores`` or features of the date; ``None``: all users.

    Returns:
        ``user_key, expected_spend, expected_days, bundle_digest``.

    Raises:
        ConfigError: the condition can't be read, or names another column.
    """
    users = rows_of_date(lakehouse.read("scores"), day)
    if where is not None:
        users = _selected(lakehouse, config, users, day, where)
    return with_covariate(users, days, config.labels.horizon_days)


def with_covariate(scores: DataFrame, days: int, main_days: int) -> DataFrame:
    """Return scores with the expected spend over the horizon that is nearest to so many days, the longer one of two.

    Args:
        scores: rows of SCORES of one date.
        days: days of spend to come.
        main_days: days of ``expected_spend`` where a row has no other horizon.

    Returns:
        ``user_key, expected_spend, expected_days, bundle_digest``.
    """
    horizons = F.map_keys("expected_by_horizon")
    nearest = F.array_min(F.transform(horizons, lambda h: F.struct(F.abs(h - days).alias("gap"), (-h).alias("minus"))))
    chosen = -nearest["minus"]
    return scores.withColumn("_days", chosen).select(
        "user_key",
        F.coalesce(F.try_element_at("expected_by_horizon", F.col("_days")), F.col("expected_spend")).alias(
            "expected_spend"
        ),
        F.coalesce(F.col("_days"), F.lit(main_days)).cast("int").alias("expected_days"),
        "bundle_digest",
    )


def _selected(lakehouse: Lakehouse, config: Config, users: DataFrame, day: date, where: str) -> DataFrame:
    """Return the users that meet the condition."""
    features = catalogue(config.features).names
    try:
        named = columns_of(where)
        unknown = sorted(set(named) - set(_SELECTABLE) - set(features))
        if unknown:
            allowed = ", ".join(_SELECTABLE)
            raise ConfigError(f"--where: there is no column {unknown[0]}; it may name {allowed}, and any feature")
        kinds = {name: _SELECTABLE.get(name, DOUBLE) for name in named}
        condition = expressions.condition(where, kinds)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--where: {error or 'is too deeply nested'}") from None
    of_features = [name for name in named if name not in _SELECTABLE]
    if of_features:
        rows = rows_of_date(lakehouse.read("user_features"), day, "as_of_date").select("user_key", *of_features)
        users = users.join(rows, "user_key")
    return users.filter(_true(condition.sql))


def _true(condition: str) -> Column:
    return F.coalesce(F.expr(condition), F.lit(False))
