"""The job that writes ``recommendations`` of a scored date."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, RecommendationsConfig, digest
from bp_spark.core.errors import PlatformError
from bp_spark.core.session import is_connect, persisted
from bp_spark.core.version import __version__
from bp_spark.evaluation.realised import bundle_of
from bp_spark.lakehouse.run import is_written_lately, recorded
from bp_spark.lakehouse.schema import rows_of_date
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import EVENTS, PROSPECT_SCORES, RAW_ITEMS, RECOMMENDATIONS, SCORES
from bp_spark.recommend.candidates import candidates
from bp_spark.recommend.ranking import LEARN_DAYS, Ranking, bought_between, learn, names_of, recommended

_HASHES = 1_000_000

logger = logging.getLogger(__name__)


def recommend(spark: SparkSession, config: Config, day: date) -> list[dict[str, Any]]:
    """Write the items that each scored user is likely to buy, unless the inputs are unchanged.

    Users are those of ``scores`` and of ``prospect_scores`` of the date. Only the rows of that date are replaced.

    Args:
        spark: The session.
        config: All settings.
        day: A scored date.

    Returns:
        The stages that ran, as in ``runs``.

    Raises:
        DataError: The date has no scores.
        PlatformError: The session is one of Spark Connect.
        ConflictError: Another run wrote the table meanwhile.
    """
    if is_connect(spark):
        raise PlatformError(
            "recommend needs a classic session, not Spark Connect: Spark's ML library fits ALS in the driver"
        )
    with recorded(spark, config, "recommend") as run:
        lakehouse = run.lakehouse
        with run.step("recommend", RECOMMENDATIONS, score_date=str(day)) as step:
            # after the step has looked at its table: users who are forgotten meanwhile are gone here, or the write is refused
            inputs = [
                table.name for table in (SCORES, EVENTS, PROSPECT_SCORES, RAW_ITEMS) if lakehouse.exists(table.name)
            ]
            versions = {name: lakehouse.version(name) for name in inputs}
            least_users = config.privacy.smallest_group
            step.inputs = digest(__version__, day, config.recommendations, least_users, sorted(versions.items()))
            step.figures["score_date"] = day
            if step.unchanged:
                return run.records
            tables = {name: lakehouse.read(name, version) for name, version in versions.items()}
            bundle_of(tables[SCORES.name], day)
            users, events = scored_users(tables, day), tables[EVENTS.name]
            ranking = learned(events, users, day, config.recommendations, least_users)
            step.figures |= {"candidates": ranking.candidates, "purchases": ranking.purchases}
            levels = users.select("user_key", "level")
            names = names_of(tables[RAW_ITEMS.name]) if RAW_ITEMS.name in tables else None
            with (
                candidates(events, levels, users, day, config.recommendations, least_users) as choice,
                persisted(recommended(choice, ranking, day, config.recommendations, names)) as rows,
            ):
                step.replace(rows, where={"score_date": [day]}, after=step.version)
                counts = rows.agg(
                    F.count(F.lit(1)), F.count_distinct("user_key"), F.count_distinct("item_id")
                ).collect()[0]
            step.figures |= dict(zip(("rows_out", "users", "items"), counts, strict=True))
        return run.records


def is_due(lakehouse: Lakehouse, config: Config, day: date) -> bool:
    """Return whether a night has to make recommendations: there are none of the last ``recommendations.every_days``.

    In a session of Spark Connect, which can't, they never are.
    """
    every = config.recommendations.every_days
    if every is None:
        return False
    if is_connect(lakehouse.spark):
        logger.info("there are no recommendations: a session of Spark Connect can't make them")
        return False
    return not is_written_lately(lakehouse, RECOMMENDATIONS.name, day, every)


def scored_users(tables: Mapping[str, DataFrame], day: date) -> DataFrame:
    """Return ``user_key, level, budget`` of the users of a date.

    The budget is the upper end of the expected spend, or the expected spend of a user who buys at all, where that is more: the
    upper end is near 0 for users who will hardly buy.

    Args:
        tables: SCORES by its name, and PROSPECT_SCORES if there is such a table.
        day: A scored date.
    """
    if_active = F.try_divide("expected_spend", "p_active")
    scored = [
        rows_of_date(tables[table.name], day).select("user_key", "level", F.greatest("high", if_active).alias("budget"))
        for table in (SCORES, PROSPECT_SCORES)
        if table.name in tables
    ]
    users = scored[0]
    for more in scored[1:]:
        users = users.unionByName(more)
    return users


def learned(events: DataFrame, users: DataFrame, day: date, config: RecommendationsConfig, least_users: int) -> Ranking:
    """Return the ranking, learned from candidates of 28 days before and from what was bought since.

    Args:
        events: EVENTS; days before ``day`` are read.
        users: ``user_key, level``.
        day: The date.
        config: Settings of the recommendations.
        least_users: Least users of a group.
    """
    start = day - timedelta(days=LEARN_DAYS)
    before = events.filter((F.col("event_date") < F.lit(start)) & (F.col("kind") == "purchase"))
    buyers = users.join(before.select("user_key").distinct(), "user_key", "left_semi")
    with persisted(buyers.withColumn("place", F.pmod(F.xxhash64("user_key"), F.lit(_HASHES)))) as known:
        share = config.learning_users / max(known.count(), 1)
        # what the user was expected to spend then isn't known any more
        chosen = known.filter(F.col("place") < share * _HASHES).select(
            "user_key", "level", F.lit(None).cast("double").alias("budget")
        )
        levels = known.select("user_key", "level")
        with candidates(events, levels, chosen, start, config, least_users) as choice:
            return learn(choice, bought_between(events, start))
