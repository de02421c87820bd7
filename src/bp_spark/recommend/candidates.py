"""Candidates: the items among which the ranking chooses, with what is known of user and item."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import date, timedelta

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from bp_spark.core.config import RecommendationsConfig
from bp_spark.core.session import persisted
from bp_spark.recommend import factors
from bp_spark.recommend.factors import Factors
from bp_spark.recommend.history import PRIOR_REPEATS, History, history, pairs_of, users_of, weight

_OF_PAIR = ("purchase_days", "first_day", "last_day", "bought", "intent", "viewed", "days_28", "days_84")


@contextmanager
def candidates(
    events: DataFrame,
    levels: DataFrame,
    users: DataFrame,
    day: date,
    config: RecommendationsConfig,
    least_users: int,
) -> Iterator[DataFrame]:
    """Yield the candidates of each user.

    An item is a candidate if somebody bought it in the last ``item_days``, and the user didn't in the last ``rest_days``.
    An item that fewer than ``least_users`` users bought is one for these users only: it could tell of them.

    Args:
        events: EVENTS; days before ``day`` are read.
        levels: ``user_key, level`` of all users.
        users: ``user_key, level, budget`` of those who get candidates. ``budget`` is the most that the user is expected to
            spend; an item that the user never bought isn't a candidate if it costs more. NULL: unknown.
        day: The date.
        config: Settings of the recommendations.
        least_users: Least users of a group.

    Yields:
        ``user_key, item_id``, the columns of :class:`bp_spark.recommend.history.History`, ``preference`` of users alike,
        ``level_share`` of the level's users who bought the item (0: not among the items that they buy most), and ``is_alike``:
        whether users alike propose it.
    """
    with ExitStack() as stack:

        def once(df: DataFrame) -> DataFrame:
            return stack.enter_context(persisted(df))

        pairs = once(pairs_of(events, day, config))
        past = history(pairs, users_of(events, day, config), day, least_users)
        past = replace(past, items=once(past.items), users=once(past.users))
        common = once(past.items.filter((F.col("buyers") >= least_users) & _is_sold(day, config)).select("item_id"))
        alike = factors.fit(
            pairs.join(common, "item_id", "left_semi").select(
                "user_key", "item_id", F.log1p(2 * weight()).alias("rating")
            ),
            once(factors.dense_ids(pairs, "user_key", "user_id")),
            once(factors.dense_ids(common, "item_id", "item_number")),
            config,
        )
        popular = _popular(past, levels, common, config.candidates, least_users)
        proposed = _proposed(pairs, users, popular, alike, config)
        rows = _eligible(proposed, past, users, config, least_users)
        yield once(rows.withColumn("preference", F.lit(0.0)) if alike is None else alike.with_preference(rows))


def _proposed(
    pairs: DataFrame, users: DataFrame, popular: DataFrame, alike: Factors | None, config: RecommendationsConfig
) -> DataFrame:
    """Return the items of all sources, one row for each user and item, with what any of them knows."""
    keys = users.select("user_key")
    own = _own(pairs.join(keys, "user_key", "left_semi"), config.own_candidates)
    of_level = users.select("user_key", "level").join(F.broadcast(popular), "level").drop("level")
    no_share, no, yes = F.lit(0.0).alias("level_share"), F.lit(False).alias("is_alike"), F.lit(True).alias("is_alike")
    rows = own.select("*", no_share, no).unionByName(of_level.select("*", no), allowMissingColumns=True)
    if alike is not None:
        best = alike.best_items(keys, config.candidates).select("*", no_share, yes)
        rows = rows.unionByName(best, allowMissingColumns=True)
    columns = (*_OF_PAIR, "level_share", "is_alike")
    merged = rows.groupBy("user_key", "item_id").agg(*(F.max(name).alias(name) for name in columns))
    return merged.fillna(0, [name for name in _OF_PAIR if not name.endswith("_day")])


def _is_sold(day: date, config: RecommendationsConfig) -> Column:
    return F.col("sold_on") >= F.lit(day - timedelta(days=config.item_days))


def _own(pairs: DataFrame, most: int) -> DataFrame:
    """Return the pairs of each user with most weight."""
    heaviest = Window.partitionBy("user_key").orderBy(weight().desc(), "item_id")
    return (
        pairs.select("user_key", "item_id", *_OF_PAIR)
        .withColumn("position", F.row_number().over(heaviest))
        .filter(F.col("position") <= most)
        .drop("position")
    )


def _popular(past: History, levels: DataFrame, common: DataFrame, most: int, least_users: int) -> DataFrame:
    """Return ``level, item_id, level_share``: what most users of a level bought in the last 28 days, at least so many users."""
    recent = past.pairs.filter("days_28 > 0").join(common, "item_id", "left_semi")
    most_first = Window.partitionBy("level").orderBy(F.desc("level_buyers"), "item_id")
    sizes = levels.groupBy("level").agg(F.count(F.lit(1)).alias("level_users"))
    return (
        recent.join(levels.select("user_key", "level"), "user_key")
        .groupBy("level", "item_id")
        .agg(F.count(F.lit(1)).alias("level_buyers"))
        .filter(F.col("level_buyers") >= least_users)
        .withColumn("position", F.row_number().over(most_first))
        .filter(F.col("position") <= most)
        .join(F.broadcast(sizes), "level")
        .select("level", "item_id", (F.col("level_buyers") / F.col("level_users")).alias("level_share"))
    )


def _eligible(
    rows: DataFrame, past: History, users: DataFrame, config: RecommendationsConfig, least_users: int
) -> DataFrame:
    """Return the candidates that may be recommended, with the columns of user and item."""
    bought_before = F.col("purchase_days") > 0
    rested = F.datediff(F.lit(past.day), "last_day") > config.rest_days
    affordable = F.col("budget").isNull() | F.col("price").isNull() | (F.col("price") <= F.col("budget"))
    others = (F.col("buyers") >= least_users) & affordable
    joined = (
        rows.join(past.items.filter(_is_sold(past.day, config)), "item_id")
        .join(users, "user_key")
        .join(past.users, "user_key", "left")
    )
    repeats = F.greatest(F.col("purchase_days") - 1, F.lit(0))
    own_days = F.coalesce(F.datediff("last_day", "first_day"), F.lit(0))
    usual = (own_days + PRIOR_REPEATS * F.col("interval")) / (repeats + PRIOR_REPEATS)
    return joined.filter(F.when(bought_before, rested).otherwise(others)).withColumns(
        {
            "days_since_bought": F.datediff(F.lit(past.day), "last_day"),
            "usual_interval": F.when(bought_before, usual),
        }
    )
