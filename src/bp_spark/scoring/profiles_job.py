"""What people and applications are told of each user, as of the newest scored date; see :mod:`bp_spark.scoring.profiles`."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, digest
from bp_spark.core.errors import DataError
from bp_spark.core.session import persisted
from bp_spark.core.version import __version__
from bp_spark.features.catalogue import catalogue
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.tables import (
    CATEGORY_AFFINITY,
    CUSTOMER_SERVICE,
    MARKET_SEGMENTS,
    PROFILE_TABLES,
    RISK_CONTROL,
    USER_PROFILE,
)
from bp_spark.scoring import profiles
from bp_spark.training.backtest import brackets

_READ = ("scores", "user_features", "user_daily", "events")


def profile(spark: SparkSession, config: Config, day: date | None = None) -> list[dict[str, Any]]:
    """Write the tables of profiles anew, as of a scored date, each in one commit; left as they are if nothing that they are
    made from has changed.

    Args:
        day: by default the newest scored date; an older one brings the tables back to it.

    Returns:
        The stages that ran, as in ``runs``.

    Raises:
        DataError: nothing was scored on that date; its features are gone; no user has ``profiles.region_segment``.
        ConflictError: another run wrote the tables meanwhile.
    """
    with recorded(spark, config, "profile") as run:
        lakehouse = run.lakehouse
        read = (*_READ, "raw_users") if config.profiles.region_segment is not None else _READ
        # the versions that are recorded are those that are read, whatever is written meanwhile
        versions = {name: lakehouse.version(name) for name in read}
        scores = lakehouse.read("scores", versions["scores"])
        as_of = day or _newest(scores)
        inputs = digest(__version__, config.profiles, config.privacy.smallest_group, as_of, sorted(versions.items()))
        with run.stage("profile", inputs) as figures:
            figures["score_date"] = as_of
            if all(lakehouse.inputs(table.name) == inputs for table in PROFILE_TABLES):
                figures["status"] = "unchanged"
            else:
                figures.update(_write(run, versions, as_of, inputs))
        return run.records


def _newest(scores: DataFrame) -> date:
    row = scores.agg(F.max("score_date")).first()
    if row is None or row[0] is None:
        raise DataError("scores", "holds no rows; run score first")
    newest: date = row[0]
    return newest


def _write(run: Run, versions: dict[str, int], day: date, inputs: str) -> dict[str, object]:
    lakehouse, config = run.lakehouse, run.config.profiles
    least_users = run.config.privacy.smallest_group
    tables = {name: lakehouse.read(name, version) for name, version in versions.items()}
    scores = tables["scores"].filter(F.col("score_date") == F.lit(day))
    users = scores.count()
    if not users:
        raise DataError("scores", f"holds no rows of {day}; run score for it", column="score_date")
    features = tables["user_features"].filter(F.col("as_of_date") == F.lit(day))
    if features.isEmpty():
        raise DataError("user_features", f"holds no rows of {day}; run featurize for it", column="as_of_date")
    regions = None
    if config.region_segment is not None:
        regions = brackets(tables["raw_users"], config.region_segment).withColumnRenamed("bracket", "region")
    how: dict[str, Any] = {"inputs": inputs, "note": {"score_date": str(day)}}
    # the last table says whose turn it is: no run that began before this one writes any of them from here on
    claim = lakehouse.reserve(MARKET_SEGMENTS, lakehouse.commit_metadata("market_segments"))
    affinity = profiles.category_affinity(
        scores, features, tables["user_daily"], tables["events"], day, config, least_users
    )
    written = lakehouse.replace(CATEGORY_AFFINITY, affinity, after=claim, **how)
    affinity = lakehouse.read("category_affinity", written)
    earlier = {span: found for span in profiles.SPANS if (found := _compared(tables["scores"], day, span))}
    rows = profiles.user_profile(scores, earlier, features, affinity, day, config, catalogue(run.config.features))
    written = lakehouse.replace(USER_PROFILE, rows, after=claim, **how)
    told = lakehouse.read("user_profile", written)
    lakehouse.replace(RISK_CONTROL, profiles.risk_control(told, config), after=claim, **how)
    lakehouse.replace(CUSTOMER_SERVICE, profiles.customer_service(told, config), after=claim, **how)
    with persisted(profiles.market_segments(told, regions, day, least_users)) as segments:
        lakehouse.replace(MARKET_SEGMENTS, segments, after=claim, **how)
        cells, shown = segments.agg(F.count("users"), F.coalesce(F.sum("users"), F.lit(0))).collect()[0]
    count = told.count()
    if count != users:
        raise DataError("user_profile", f"must hold one row for each of {users} users", column="user_key", count=count)
    return {"rows_in": users, "rows_out": count, "users": count, "segments": cells, "users_in_segments": shown}


def _compared(scores: DataFrame, day: date, span: int) -> tuple[date, DataFrame] | None:
    """The scored date nearest to ``span`` days before, with its scores; the newer of two."""
    then = day - timedelta(days=span)
    near = [then + timedelta(days=n) for n in range(-profiles.NEARBY, profiles.NEARBY + 1)]
    scored_date = F.col("score_date")
    found = (
        scores.filter(scored_date.between(F.lit(near[0]), F.lit(near[-1]))).select("score_date").distinct().collect()
    )
    if not found:
        return None
    nearest = min((row[0] for row in found), key=lambda one: (abs(one - then), then - one))
    return nearest, scores.filter(scored_date == F.lit(nearest))
