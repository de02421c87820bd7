"""From a source's deliveries to features: featurize runs the ingest's stages, then user-days and features follow."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import date, timedelta
from statistics import median
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, digest
from bp_spark.core.errors import DataError
from bp_spark.core.session import broadcast_few, checkpointed, persisted
from bp_spark.core.spark_errors import SPARK_ERRORS, is_feed_gone
from bp_spark.core.version import __version__
from bp_spark.features import catalogue, prospects, user_daily
from bp_spark.ingest import cleaning, contacts_job, texts
from bp_spark.ingest.clean import clean, require_same_terms, span
from bp_spark.ingest.job import ingest
from bp_spark.ingest.quarantine import replay
from bp_spark.ingest.texts_job import embed, find_topics
from bp_spark.lakehouse.run import Run, Step, recorded
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import CAMPAIGN_CONTACTS, CONSULTATIONS, PROSPECT_FEATURES, RAW_USERS, USER_DAILY

_WEEKS_COMPARED = 8
"""Weeks before a day whose same weekdays tell how many orders it should have."""
_ORDERS_COMPARED = 30
"""A median of fewer orders a day tells nothing of a day that lacks some."""

logger = logging.getLogger(__name__)


def featurize(
    spark: SparkSession, config: Config, as_of: Sequence[date], rebuild: bool = False, strict: bool = False
) -> list[dict[str, Any]]:
    """Ingest new deliveries, clean them, read new texts, update user-days, and build features of the as-of dates.

    Args:
        spark: session to work in.
        config: all settings.
        as_of: dates to build features for.
        rebuild: derive everything from the raw tables anew: after a change of the cleaning rules, say.
        strict: refuse all new files if one can't be read. By default that one is named in the log and left for the next call.

    Returns:
        The stages that ran, as in ``runs``.

    Raises:
        ConfigError: ``cleaning.currency`` is not the currency of the stored events, and they are not derived anew.
        DataError: the source breaks the raw contract; an as-of date lies before the data.
    """
    with recorded(spark, config, "featurize") as run:
        if not rebuild:
            require_same_terms(run.lakehouse, config.cleaning)
        ingest(run, strict)
        clean(run, rebuild)
        contacts_job.contacts(run, rebuild)
        embed(run)
        find_topics(run)
        aggregate(run, rebuild)
        write_features(run, as_of)
        write_prospects(run, as_of)
        return run.records


def replay_quarantine(spark: SparkSession, config: Config) -> list[dict[str, Any]]:
    """Validate the rows in quarantine again, after a change of rules, items or rates, and move the good ones out of it.

    They go to ``events``, ``consultations`` and ``campaign_contacts``.

    Returns:
        The stages that ran, as in ``runs``.

    Raises:
        DataError: nothing was cleaned yet.
    """
    with recorded(spark, config, "quarantine replay") as run:
        replay(run)
        contacts_job.replay(run)
        embed(run)
        find_topics(run)
        aggregate(run, rebuild=False)
        return run.records


# --- user-days -----------------------------------------------------------------------------------------------------------


def aggregate(run: Run, rebuild: bool) -> None:
    """Update ``user_daily`` for the users and days whose events changed since it was last written.

    Args:
        run: the run to record the stage in.
        rebuild: derive all user-days from all events.
    """
    lakehouse, config = run.lakehouse, run.config
    model, length = texts.model_digest(config.texts), config.features.history_length
    definition = digest(user_daily.FORMAT, cleaning.FORMAT, model, length)
    with run.step("aggregate", USER_DAILY) as step:
        # after the step has looked at user_daily, so that it never looks newer than events
        version = lakehouse.version("events")
        step.inputs = digest(definition, version)
        since = step.newest.get("events") if step.newest.get("definition") == definition else None
        changed_days = None
        if not rebuild and since is not None and int(since) <= version:
            if since == version:
                return
            changed_days = _changed_days(lakehouse, int(since))
            if changed_days is None:
                step.figures["note"] = (
                    "the changes of events were cleaned away: user_daily was derived from all events anew"
                )
                # the files of the older version may be gone as well
                version = lakehouse.version("events")
        events = lakehouse.read("events", version)
        note: dict[str, Any] = {"definition": definition, "events": version}
        if changed_days is None:
            step.replace(_user_days(run, events, model), after=step.version, **note)
            step.figures["rows_in"] = events.count()
            step.figures["user_days"] = step.figures["rows_out"] = lakehouse.read("user_daily").count()
        else:
            _update_user_days(run, step, events, changed_days, model, note)


def _user_days(run: Run, events: DataFrame, model: str) -> DataFrame:
    """Return rows of USER_DAILY from events, by the stored texts and the language model's embeddings."""
    words = run.lakehouse.read("texts")
    vectors = run.lakehouse.read("text_embeddings").filter(F.col("model_digest") == model)
    return user_daily.user_daily(events, words, vectors, run.config.features.history_length)


def _update_user_days(
    run: Run, step: Step, events: DataFrame, changed_days: DataFrame, model: str, note: dict[str, Any]
) -> None:
    """Write the user-days with changed events anew, and delete those that have no event any more."""
    totals = changed_days.agg(
        F.count(F.lit(1)).alias("user_days"), F.sum("count").alias("changes"), F.collect_set("day").alias("days")
    )
    count, changes, days = totals.collect()[0]
    step.figures["user_days"] = step.figures["rows_out"] = count
    step.figures["rows_in"] = changes or 0
    if not count:
        # maintenance moved the version of events, and changed no event
        return
    days = sorted(days)
    step.figures["days"] = len(days)
    user_days = changed_days.drop("count")
    keys = broadcast_few(user_days.withColumnRenamed("day", "event_date"), count)
    on_days = events.filter(F.col("event_date").isin(days))
    with persisted(on_days.join(keys, ["user_key", "event_date"], "left_semi")) as events_of_user_days:
        rows = checkpointed(_user_days(run, events_of_user_days, model))
    deleted_keys = user_days.join(rows, user_daily.KEY, "left_anti")
    step.merge(rows, within={"day": days}, deleted_keys=deleted_keys, **note)


def _changed_days(lakehouse: Lakehouse, since: int) -> DataFrame | None:
    """Return the user-days whose events changed after a version, with the number of changes.

    Returns:
        ``None`` where the change feed is gone, by VACUUM or because Delta cleaned the log.
    """
    try:
        changes = lakehouse.changes("events", since)
        return checkpointed(changes.groupBy("user_key", F.col("event_date").alias("day")).count())
    except SPARK_ERRORS as error:
        if not is_feed_gone(error):
            raise
        return None


# --- features ------------------------------------------------------------------------------------------------------------


def write_features(run: Run, as_of: Sequence[date]) -> None:
    """Build ``user_features`` of the as-of dates whose features are missing, or were built from something else.

    Raises:
        DataError: no event lies before an as-of date.
    """
    lakehouse, config = run.lakehouse, run.config.features
    first, _ = span(lakehouse)
    for day in as_of:
        if day <= first:
            raise DataError(
                "events", f"no event lies before the as-of date {day}; the first is of {first}", column="ts"
            )
    built_from = features_digest(run)
    with run.step("featurize", catalogue.user_features_table(config), built_from) as step:
        # by the rows, not by the newest commit: that may be of other dates, and rows may have been deleted since
        built = _built_dates(lakehouse, "user_features", built_from)
        missing = [day for day in as_of if day not in built]
        step.figures["dates"] = len(missing)
        if not missing:
            return
        rows_in = lakehouse.require_whole_files("user_daily")
        user_days = lakehouse.read("user_daily")
        step.figures["rows_in"] = user_days.count() if rows_in is None else rows_in
        features = catalogue.user_features(user_days, missing, config, built_from)
        version = step.replace(features, where={"as_of_date": missing})
        step.figures["users"] = step.figures["rows_out"] = lakehouse.rows_written("user_features", version)
        incomplete = incomplete_days(user_days, max(missing))
        if incomplete:
            step.figures["incomplete_days"] = days = ", ".join(map(str, incomplete))
            logger.warning(
                "user_daily: %s brought far fewer orders than the same weekdays before: if a delivery is missing or late, "
                "features and expected spend are too low until it comes, and featurize and score are run again",
                days,
                extra={"fields": {"days": days}},
            )


def incomplete_days(user_days: DataFrame, as_of: date) -> list[date]:
    """Return the days of the last week before a date that seem to lack deliveries, rising.

    Such a day has less than half the orders of each of the same weekdays in the eight weeks before, and these have 30 orders in
    the median. So a day without a delivery is found, and a closed Sunday or the first weeks of a shop are not.

    Args:
        user_days: rows of USER_DAILY.
        as_of: the date.
    """
    first = as_of - timedelta(days=7 * (_WEEKS_COMPARED + 1))
    recent = user_days.filter((F.col("day") >= F.lit(first)) & (F.col("day") < F.lit(as_of)))
    rows = recent.groupBy("day").agg(F.sum("orders").alias("orders")).collect()
    orders = {row["day"]: row["orders"] for row in rows}
    found = []
    for back in range(7, 0, -1):
        day = as_of - timedelta(days=back)
        before = [orders.get(day - timedelta(weeks=weeks), 0) for weeks in range(1, _WEEKS_COMPARED + 1)]
        if median(before) >= _ORDERS_COMPARED and orders.get(day, 0) < min(before) / 2:
            found.append(day)
    return found


def features_digest(run: Run) -> str:
    """Return the identity of what features would be built from now: ``built_from`` of ``user_features``."""
    config = run.config.features
    return digest(
        __version__, catalogue.FORMAT, run.lakehouse.version("user_daily"), config, catalogue.catalogue(config)
    )


def _built_dates(lakehouse: Lakehouse, name: str, built_from: str) -> set[date]:
    """Return the as-of dates whose stored features are those that would be built now."""
    if not lakehouse.exists(name):
        return set()
    rows = lakehouse.read(name).filter(F.col("built_from") == built_from).select("as_of_date").distinct()
    return {row[0] for row in rows.collect()}


# --- features of prospects -----------------------------------------------------------------------------------------------


def can_have_prospects(run: Run) -> bool:
    """Return whether the platform may know users before their first purchase.

    No Spark job is needed for that, but where users alone are delivered beside purchases: whether any has registered.
    """
    lakehouse = run.lakehouse
    if not run.config.prospects.enabled:
        return False
    if any(lakehouse.exists(name) for name in prospects.PROSPECT_SOURCES):
        return True
    return (
        lakehouse.exists(RAW_USERS.name)
        and not lakehouse.read(RAW_USERS.name).filter("signup_ts IS NOT NULL").isEmpty()
    )


def write_prospects(run: Run, as_of: Sequence[date]) -> None:
    """Build ``prospect_features`` of the as-of dates whose rows are missing, or were built from something else."""
    if not can_have_prospects(run):
        return
    lakehouse, silent_days = run.lakehouse, run.config.prospects.silent_days
    others = (CONSULTATIONS, CAMPAIGN_CONTACTS, RAW_USERS)
    names = ("user_daily", *lakehouse.existing(table.name for table in others))
    versions = {name: lakehouse.version(name) for name in names}
    first_day, day_in = run.config.cleaning.first_day, run.config.cleaning.day_in
    built_from = digest(__version__, prospects.FORMAT, silent_days, first_day, day_in, sorted(versions.items()))
    with run.step("prospects", PROSPECT_FEATURES, built_from) as step:
        built = _built_dates(lakehouse, PROSPECT_FEATURES.name, built_from)
        missing = [day for day in as_of if day not in built]
        step.figures["dates"] = len(missing)
        if not missing:
            return
        lakehouse.require_whole_files("user_daily", versions["user_daily"])
        rows = {name: lakehouse.read(name, version) for name, version in versions.items()}
        users = rows.get(RAW_USERS.name)
        registered = None if users is None else prospects.registrations(users, first_day, day_in)
        talks, contacts = (rows.get(table.name) for table in (CONSULTATIONS, CAMPAIGN_CONTACTS))
        traces = prospects.traces(rows["user_daily"], talks, contacts, registered)
        features = prospects.prospect_features(traces, missing, silent_days, built_from)
        before = step.version
        version = step.replace(features, where={"as_of_date": missing})
        stored = lakehouse.read(PROSPECT_FEATURES.name, version).filter(F.col("as_of_date").isin(*missing))
        step.figures["users"] = step.figures["rows_out"] = stored.count()
        # Delta leaves out a commit that changes nothing: dates without a prospect are built again in each run
        if version == before:
            step.figures["status"] = "unchanged"
