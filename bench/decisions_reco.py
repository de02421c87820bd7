"""How right recommendations are: a part of :mod:`bench.decisions`.

In: the demo's tables. Out: a line of JSON a figure on standard output. At the scored date and 56 days before it, users get ten
items from events before the date. What they bought in the 28 days from the date on is the truth. Means are over users who
bought something then.

- ``reco.ndcg``, ``reco.recall``: NDCG@10 and recall@10.
- ``reco.ndcg_vs_popularity``: NDCG@10 over that of the ten items that most users bought in the last 28 days.
- ``reco.ndcg_vs_buy_again``: the same over each user's own items, those bought most with recent purchases counting more.
- ``reco.ndcg_vs_als``: the same over ALS alone.
- ``reco.gain_z``: mean difference to "buy again" over its standard error, over users; each is a mean over its dates.
- ``reco.coverage``, ``reco.coverage_*``: share of the items sold in the last 90 days that somebody is recommended.
- ``reco.novelty``, ``reco.novelty_*``: mean of -log2 of the share of users who ever bought the item.
- ``reco.new_items``: share of recommended items that the user never bought.

Levels are those of the scored date at both dates: the demo scores one.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, timedelta

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from bp_spark.core.config import Config
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.recommend.candidates import candidates
from bp_spark.recommend.job import learned, scored_users
from bp_spark.recommend.ranking import bought_between, recommended

STEP = timedelta(days=56)
OWN = "own"
RANKED_BY = {"popularity": "buyers_28", "buy_again": "bought", "als": "preference"}
"""Baseline -> what orders its items."""


def reco(spark: SparkSession, settings: Config) -> dict[str, float]:
    """Return how right recommendations are at past dates."""
    lakehouse = Lakehouse(spark, settings.tables)
    scores, events = lakehouse.read("scores"), lakehouse.read("events").filter("kind = 'purchase'")
    newest: date = scores.agg(F.max("score_date")).collect()[0][0]
    users = scored_users({"scores": scores}, newest)
    found = pd.concat([of_date(events, users, day, settings) for day in (newest - STEP, newest)])
    means = found.groupby("method").mean(numeric_only=True)
    own, again = (
        found[found["method"] == method].set_index(["day", "user_key"])["ndcg"] for method in (OWN, "buy_again")
    )
    # a user counts once: what one buys at two dates is not independent
    gain = (own - again).groupby("user_key").mean()
    figures = {
        "reco.ndcg": float(means.loc[OWN, "ndcg"]),
        "reco.recall": float(means.loc[OWN, "recall"]),
        **{f"reco.ndcg_vs_{name}": float(means.loc[OWN, "ndcg"] / means.loc[name, "ndcg"]) for name in RANKED_BY},
        "reco.gain_z": float(gain.mean() / gain.sem()),
        "reco.new_items": float(means.loc[OWN, "new_items"]),
    }
    for name in (OWN, *RANKED_BY):
        suffix = "" if name == OWN else f"_{name}"
        figures |= {f"reco.{figure}{suffix}": float(means.loc[name, figure]) for figure in ("coverage", "novelty")}
    return figures


def of_date(events: DataFrame, users: DataFrame, day: date, settings: Config) -> pd.DataFrame:
    """Return ``method, day, user_key, ndcg, recall`` of each user, and figures of the method in each row."""
    config, least_users = settings.recommendations, settings.privacy.smallest_group
    ranking = learned(events, users, day, config, least_users)
    # what users were expected to spend is known of the newest date alone
    before = users.withColumn("budget", F.lit(None).cast("double"))
    buyers = before.join(
        events.filter(F.col("event_date") < F.lit(day)).select("user_key").distinct(), "user_key", "left_semi"
    )
    truth = bought_between(events, day).toPandas().groupby("user_key")["item_id"].agg(set)
    recent = F.col("event_date").between(F.lit(day - timedelta(days=config.item_days)), F.lit(day - timedelta(days=1)))
    sold = events.filter(recent).agg(F.count_distinct("item_id")).collect()[0][0]
    past = events.filter(F.col("event_date") < F.lit(day))
    shares = past.groupBy("item_id").agg(F.count_distinct("user_key").alias("users")).toPandas().set_index("item_id")
    surprise = -np.log2(shares["users"] / past.agg(F.count_distinct("user_key")).collect()[0][0])
    levels = buyers.select("user_key", "level")
    found = []
    with candidates(events, levels, buyers, day, config, least_users) as choice:
        choice.count()
        lists = {OWN: recommended(choice, ranking, day, config)} | {
            name: _ranked(choice, column, config.items) for name, column in RANKED_BY.items()
        }
        for method, rows in lists.items():
            columns = ("user_key", "rank", "item_id", "times_bought")
            frame = rows.select(*columns).orderBy("user_key", "rank").toPandas()
            of_users = _of_users(frame, truth, config.items)
            of_users["method"], of_users["day"] = method, day
            of_users["coverage"] = frame["item_id"].nunique() / sold
            of_users["novelty"] = surprise.reindex(frame["item_id"]).mean()
            of_users["new_items"] = (frame["times_bought"] == 0).mean()
            found.append(of_users)
    return pd.concat(found)


def _ranked(choice: DataFrame, column: str, most: int) -> DataFrame:
    """Return the candidates of each user with the most of a column."""
    most_first = Window.partitionBy("user_key").orderBy(F.desc(column), F.desc("last_day"), "item_id")
    ranked = choice.withColumn("rank", F.row_number().over(most_first)).filter(F.col("rank") <= most)
    return ranked.withColumn("times_bought", F.col("purchase_days"))


def _of_users(rows: pd.DataFrame, truth: Mapping[str, set[str]], most: int) -> pd.DataFrame:
    """Return NDCG and recall of each user of the truth who had a recommendation from any method."""
    discounts = 1 / np.log2(np.arange(2, most + 2))
    found = []
    for user, items in rows.groupby("user_key")["item_id"]:
        bought = truth.get(user, set())
        if bought:
            hits = np.array([item in bought for item in items], dtype=float)
            ideal = discounts[: min(most, len(bought))].sum()
            found.append(
                {"user_key": user, "ndcg": hits @ discounts[: len(hits)] / ideal, "recall": hits.sum() / len(bought)}
            )
    return pd.DataFrame(found)
