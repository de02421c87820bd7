"""The job that writes the profile tables, as of the newest scored date or an older one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date, timedelta
from typing import Any

import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core import extras
from bp_spark.core.config import Config, digest
from bp_spark.core.errors import DataError
from bp_spark.core.session import persisted
from bp_spark.core.version import __version__
from bp_spark.evaluation.realised import bundle_of
from bp_spark.features.catalogue import catalogue
from bp_spark.lakehouse.run import Run, Step, recorded
from bp_spark.lakehouse.schema import rows_of_date
from bp_spark.lakehouse.store import Lakehouse, read_as_declared
from bp_spark.lakehouse.tables import (
    CATEGORY_AFFINITY,
    COHORTS,
    CUSTOMER_SERVICE,
    MARKET_FORECAST,
    MARKET_SEGMENTS,
    PROFILE_TABLES,
    RISK_CONTROL,
    SCORES,
    TOTALS,
    USER_PROFILE,
)
from bp_spark.model.refunds import Refunds
from bp_spark.model.totals import Totals
from bp_spark.registry import bundle as bundles
from bp_spark.registry.publishing import folder_here
from bp_spark.scoring.profiles.affinity import category_affinity
from bp_spark.scoring.profiles.applications import customer_service, last_consultations, risk_control
from bp_spark.scoring.profiles.cohorts import cohorts
from bp_spark.scoring.profiles.market import market_forecast
from bp_spark.scoring.profiles.segments import market_segments
from bp_spark.scoring.profiles.totals import platform_totals
from bp_spark.scoring.profiles.user_profile import SPANS, user_profile
from bp_spark.scoring.profiles.weekly_history import weekly_history
from bp_spark.training.backtest import brackets

NEARBY_DAYS = 7
"""Days by which a scored date may miss the wanted one of SPANS."""
_INPUT_TABLES = ("scores", "user_features", "user_daily", "events")
_TALK_TABLES = ("consultations", "consultation_topics")

logger = logging.getLogger(__name__)


def profile(spark: SparkSession, config: Config, day: date | None = None) -> list[dict[str, Any]]:
    """Write the profile tables as of a scored date, each in one commit, unless their inputs are unchanged.

    From ``market_segments`` the rows of the date in ``totals`` are made, if the bundle that scored knows the error of sums.
    Every few dates (``profiles.history_every_days``) ``cohorts`` is replaced, and the weeks to come are forecast in
    ``market_forecast``, if the extra ``market`` is installed. So they are for another bundle or other settings, and after
    users were forgotten.

    Args:
        spark: The session.
        config: All settings.
        day: By default the newest scored date; an older one brings the tables back to it.

    Returns:
        The stages that ran, as in ``runs``.

    Raises:
        DataError: Nothing was scored on that date, its features are gone, or no user has ``profiles.region_segment``.
        ConflictError: Another run wrote the tables meanwhile.
    """
    with recorded(spark, config, "profile") as run:
        lakehouse = run.lakehouse
        names = [*_INPUT_TABLES, *lakehouse.existing(_TALK_TABLES)]
        if config.profiles.region_segment is not None:
            names.append("raw_users")
        # read the versions that are recorded, whatever other runs write meanwhile
        versions = {name: lakehouse.version(name) for name in names}
        scores = lakehouse.read("scores", versions["scores"])
        as_of = day or _newest_date(scores)
        bundle_digest = bundle_of(scores, as_of)
        totals, refunds = _parts_of_bundle(config, bundle_digest)
        how = (__version__, config.profiles, config.privacy.smallest_group, totals and asdict(totals))
        inputs = digest(*how, refunds and asdict(refunds), as_of, sorted(versions.items()))
        with run.step("profile", MARKET_SEGMENTS, inputs, score_date=str(as_of)) as step:
            step.figures["score_date"] = as_of
            if not all(lakehouse.inputs(table.name) == inputs for table in PROFILE_TABLES):
                step.figures.update(_write(run, versions, as_of, step, totals, refunds))
        _write_totals(run, totals, as_of, bundle_digest, inputs)
        every = config.profiles.history_every_days
        # made of all events, these tables are the same for several dates, whatever a night adds
        of_span = digest(*how, as_of.toordinal() // every, bundle_digest, _forgotten(lakehouse))
        of_history = of_span if every > 1 else inputs
        _write_cohorts(run, versions, as_of, totals, bundle_digest, of_history)
        _write_market_forecast(run, versions, totals, as_of, of_history)
        return run.records


def _forgotten(lakehouse: Lakehouse) -> int:
    """Return the version of the list of forgotten users; -1 without one."""
    return lakehouse.version("forgotten") if lakehouse.exists("forgotten") else -1


def _newest_date(scores: DataFrame) -> date:
    row = scores.agg(F.max("score_date")).first()
    if row is None or row[0] is None:
        raise DataError("scores", "holds no rows; run score first")
    newest: date = row[0]
    return newest


def _parts_of_bundle(config: Config, bundle_digest: str) -> tuple[Totals | None, Refunds | None]:
    """Return errors of sums and refunds to come of the bundle that scored; ``None`` if it has none, or isn't here any more."""
    folder = folder_here(config, bundle_digest)
    return bundles.profiling_parts(folder) if folder else (None, None)


def _write_totals(run: Run, totals: Totals | None, day: date, bundle_digest: str, inputs: str) -> None:
    """Write the date's rows of ``totals``; without errors of sums it has none."""
    lakehouse = run.lakehouse
    if totals is None and not lakehouse.exists(TOTALS.name):
        return
    with run.step("totals", TOTALS, inputs, score_date=str(day)) as step:
        if step.unchanged:
            return
        if totals is None:
            rows = run.spark.createDataFrame([], TOTALS.schema)
        else:
            rows = platform_totals(lakehouse.read("market_segments"), totals, day, bundle_digest)
        step.replace(rows, where={"score_date": [day]}, after=step.version)
        step.figures["rows_out"] = rows.count()


def _write_cohorts(
    run: Run, versions: Mapping[str, int], day: date, totals: Totals | None, bundle_digest: str, inputs: str
) -> None:
    """Replace ``cohorts``, from the same versions of scores and user-days as the other tables."""
    with run.step("cohorts", COHORTS, inputs) as step:
        if step.unchanged:
            return
        scores, daily = (run.lakehouse.read(name, versions[name]) for name in ("scores", "user_daily"))
        least_users = run.config.privacy.smallest_group
        rows = cohorts(rows_of_date(scores, day), daily, day, least_users, totals, bundle_digest)
        step.replace(rows, after=step.version)
        step.figures["rows_out"] = rows.count()


def _write_market_forecast(run: Run, versions: dict[str, int], totals: Totals | None, day: date, inputs: str) -> None:
    """Write the date's rows of ``market_forecast``, unless its library is missing or the history is too short."""
    lacking = extras.lacking("market", "it")
    if lacking is not None:
        logger.info("there is no market forecast: %s", lacking)
        return
    lakehouse = run.lakehouse
    with run.step("market", MARKET_FORECAST, inputs) as step:
        if step.unchanged:
            return
        daily, events = (lakehouse.read(name, versions[name]) for name in ("user_daily", "events"))
        history = weekly_history(daily, events, day, run.config.privacy.smallest_group)
        if history.missing:
            step.figures["missing"] = history.missing
            logger.info("there is no market forecast: %s", history.missing)
        if history.missing and not lakehouse.exists(MARKET_FORECAST.name):
            return
        promised = rows_of_date(lakehouse.read("totals"), day).toPandas() if totals is not None else pd.DataFrame()
        rows, gap = market_forecast(run.spark, history, promised, day)
        step.replace(rows, where={"score_date": [day]}, after=step.version)
        step.figures |= {"rows_out": rows.count(), **(asdict(gap) if gap else {})}


def _write(
    run: Run, versions: dict[str, int], day: date, step: Step, totals: Totals | None, refunds: Refunds | None
) -> dict[str, object]:
    """Write the five tables, that of the step last, and return the figures of the stage."""
    lakehouse, config = run.lakehouse, run.config.profiles
    least_users = run.config.privacy.smallest_group
    tables = {name: lakehouse.read(name, version) for name, version in versions.items() if name != SCORES.name}
    all_scores = read_as_declared(lakehouse, SCORES, versions["scores"])
    scores = rows_of_date(all_scores, day)
    users = scores.count()
    features = rows_of_date(tables["user_features"], day, "as_of_date")
    if features.isEmpty():
        raise DataError("user_features", f"holds no rows of {day}; run featurize for it", column="as_of_date")
    regions = None
    if config.region_segment is not None:
        regions = brackets(tables["raw_users"], config.region_segment).withColumnRenamed("bracket", "region")
    commit: dict[str, Any] = {"inputs": step.inputs, "note": step.recorded}
    # the reservation of the last table: from here on no run that began before this one writes any of the five
    reservation = step.reserve()
    affinity = category_affinity(scores, features, tables["user_daily"], tables["events"], day, config, least_users)
    version = lakehouse.replace(CATEGORY_AFFINITY, affinity, after=reservation, **commit)
    affinity = lakehouse.read("category_affinity", version)
    earlier = {span: compared for span in SPANS if (compared := _compared_scores(all_scores, day, span))}
    names = catalogue(run.config.features)
    rows = user_profile(scores, earlier, features, affinity, tables["events"], day, config, names, refunds)
    version = lakehouse.replace(USER_PROFILE, rows, after=reservation, **commit)
    profiles = lakehouse.read("user_profile", version)
    lakehouse.replace(RISK_CONTROL, risk_control(profiles, config), after=reservation, **commit)
    talks, topics = (tables.get(name) for name in _TALK_TABLES)
    asked = last_consultations(talks, topics, day)
    lakehouse.replace(CUSTOMER_SERVICE, customer_service(profiles, config, asked), after=reservation, **commit)
    by_horizon = scores.select("user_key", "expected_by_horizon")
    with_horizons = profiles if totals is None else profiles.join(by_horizon, "user_key")
    with persisted(market_segments(with_horizons, regions, day, least_users, totals)) as segments:
        step.replace(segments, after=reservation)
        cells, users_in_cells = segments.agg(F.count("users"), F.coalesce(F.sum("users"), F.lit(0))).collect()[0]
    count = profiles.count()
    if count != users:
        raise DataError("user_profile", f"must hold one row for each of {users} users", column="user_key", count=count)
    return {"rows_in": users, "rows_out": count, "users": count, "segments": cells, "users_in_segments": users_in_cells}


def _compared_scores(scores: DataFrame, day: date, span: int) -> tuple[date, DataFrame] | None:
    """Return the scored date nearest to ``span`` days before, with its scores; of two the newer one.

    Another bundle has another reference population: only dates that the same bundle scored are compared.
    """
    wanted = day - timedelta(days=span)
    first, last = wanted - timedelta(days=NEARBY_DAYS), wanted + timedelta(days=NEARBY_DAYS)
    by_same_bundle = scores.filter(F.col("bundle_digest") == F.lit(bundle_of(scores, day)))
    in_reach = F.col("score_date").between(F.lit(first), F.lit(last))
    nearby = by_same_bundle.filter(in_reach).select("score_date").distinct().collect()
    if not nearby:
        return None
    nearest = min((row[0] for row in nearby), key=lambda scored: (abs(scored - wanted), wanted - scored))
    return nearest, rows_of_date(by_same_bundle, nearest)
