"""Ranking of candidates by the probability that the user buys the item in the next 28 days.

A logistic regression over what is known of user, item and both. It learns from candidates of a past date, and from what their
users bought since. Few such purchases leave the coefficients that were measured on the Complete Journey.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta

import numpy as np
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from bp_spark.core.config import RecommendationsConfig
from bp_spark.lakehouse.tables import RECOMMENDATIONS
from bp_spark.recommend.history import RECENT_DAYS
from bp_spark.scoring.profiles.columns import shaped
from bp_spark.scoring.profiles.user_profile import price_tier

LEARN_DAYS = RECENT_DAYS
"""Days whose purchases the ranking learns from."""
LEAST_PURCHASES = 200
"""Purchased candidates, and others, that the ranking needs to learn from."""
BUY_AGAIN, LOOKED_AT, SIMILAR_USERS, POPULAR = "buy_again", "looked_at", "similar_users", "popular_in_level"
"""Reasons."""
_ITERATIONS = 300
_DIGITS = 4
"""Digits of a coefficient: the sums of ALS come in any order, and their last bits are no knowledge."""


def features() -> dict[str, Column]:
    """Return the features of a candidate by name: doubles, without NULL."""
    bought = F.col("purchase_days") > 0

    def own(value: Column) -> Column:
        """Return a value that only items have that the user bought."""
        return F.when(bought, value).otherwise(0.0)

    def known(column: str) -> Column:
        return F.coalesce(F.col(column), F.lit(0.0))

    age, interval = F.col("days_since_bought"), F.col("usual_interval")
    overdue = F.ln((age + 1) / (interval + 1))
    user_days = F.greatest(F.col("user_days"), F.lit(1))
    off_tier = F.abs(F.coalesce(F.col("price_position") - F.col("user_position"), F.lit(0.0)))
    values = {
        "is_bought": bought.cast("double"),
        "purchase_days": F.log1p("purchase_days"),
        "bought": own(F.ln(F.col("bought") + 0.01)),
        "days_28": F.log1p("days_28"),
        "days_84": F.log1p("days_84"),
        "age": own(F.log1p(age)),
        "overdue": own(overdue),
        "long_overdue": own(F.greatest(overdue - F.ln(F.lit(2.0)), F.lit(0.0))),
        "early": own(F.least(overdue, F.lit(0.0))),
        "share_of_days": own(F.ln(F.col("purchase_days") / user_days)),
        "visit_rate": F.coalesce(F.ln(user_days / F.col("user_span")), F.lit(0.0)),
        "user_days_28": F.log1p(known("user_days_28")),
        "intent": F.log1p("intent"),
        "viewed": F.log1p("viewed"),
        "buyers": F.log1p("buyers"),
        "trend": F.log1p("buyers_28") - F.log1p("buyers"),
        "repeat_share": F.col("repeat_share"),
        "preference": F.col("preference"),
        "level_share": F.col("level_share"),
        "affordability": F.coalesce(affordability(), F.lit(0.5)),
        "off_tier": off_tier,
        "off_tier_new": F.when(bought, 0.0).otherwise(off_tier),
        "buyers_new": F.when(bought, 0.0).otherwise(F.log1p("buyers")),
        "preference_new": F.when(bought, 0.0).otherwise(F.col("preference")),
    }
    return {name: value.cast("double") for name, value in values.items()}


def affordability() -> Column:
    """Return ``budget / (budget + price)`` of the user's usual order value, as in CATEGORY_AFFINITY; NULL: unknown."""
    return F.try_divide(F.col("order_value"), F.col("order_value") + F.col("price"))


@dataclass(frozen=True)
class Ranking:
    """Coefficients of the logistic regression.

    Attributes:
        intercept: Of the regression.
        coefficients: Feature -> coefficient.
        candidates: Candidates that it learned from; 0: the measured coefficients.
        purchases: Those that were bought.
    """

    intercept: float
    coefficients: Mapping[str, float] = field(default_factory=dict)
    candidates: int = 0
    purchases: int = 0

    def probability(self) -> Column:
        """Return the probability of a purchase in the next 28 days."""
        by_name = features()
        log_odds = F.lit(self.intercept)
        for name, coefficient in self.coefficients.items():
            log_odds = log_odds + by_name[name] * coefficient
        return 1 / (1 + F.exp(-log_odds))


def learn(candidates: DataFrame, bought_since: DataFrame) -> Ranking:
    """Fit the ranking.

    Args:
        candidates: Candidates of a past date, of so few users that they fit into memory.
        bought_since: ``user_key, item_id`` of what was bought in the 28 days from that date on, each once.

    Returns:
        The fitted ranking; the measured one where fewer than ``LEAST_PURCHASES`` were bought, or as few were not.
    """
    label = F.coalesce(F.col("is_label"), F.lit(0.0)).alias("label")
    labelled = candidates.join(bought_since.withColumn("is_label", F.lit(1.0)), ["user_key", "item_id"], "left")
    names = list(features())
    columns = [value.cast("float").alias(name) for name, value in features().items()]
    rows = labelled.select(*columns, label).toPandas()
    labels = rows["label"].to_numpy()
    purchases = int(labels.sum())
    if min(purchases, len(rows) - purchases) < LEAST_PURCHASES:
        return MEASURED_RANKING
    x = rows[names].to_numpy(np.float64)
    scaler = StandardScaler().fit(x)
    with threadpool_limits(1):
        fitted = LogisticRegression(max_iter=_ITERATIONS).fit(scaler.transform(x), labels)
    slopes = fitted.coef_[0] / scaler.scale_
    intercept = float(fitted.intercept_[0] - slopes @ scaler.mean_)
    coefficients = {name: round(float(slope), _DIGITS) for name, slope in zip(names, slopes, strict=True)}
    return Ranking(round(intercept, _DIGITS), coefficients, len(rows), purchases)


def bought_between(events: DataFrame, day: date, days: int = LEARN_DAYS) -> DataFrame:
    """Return ``user_key, item_id`` of what was bought in so many days from a day on, each once."""
    end = day + timedelta(days=days)
    in_days = (F.col("event_date") >= F.lit(day)) & (F.col("event_date") < F.lit(end))
    paid = (F.col("kind") == "purchase") & (F.col("amount") > 0) & F.col("item_id").isNotNull()
    return events.filter(in_days & paid).select("user_key", "item_id").distinct()


def names_of(raw_items: DataFrame) -> DataFrame:
    """Return ``item_id, item``: the newest title of each item, or its newest category path."""

    def newest(column: str) -> Column:
        text = F.nullif(F.trim(column), F.lit(""))
        return F.max_by(text, F.when(text.isNotNull(), F.struct("ingest_id", "delivery", column)))

    items = raw_items.filter(F.col("item_id").isNotNull()).groupBy("item_id")
    return items.agg(F.coalesce(newest("title"), newest("category")).alias("item"))


def recommended(
    candidates: DataFrame, ranking: Ranking, day: date, config: RecommendationsConfig, names: DataFrame | None = None
) -> DataFrame:
    """Return the best candidates of each user as rows of RECOMMENDATIONS.

    Args:
        candidates: See :func:`bp_spark.recommend.candidates.candidates`.
        ranking: Fitted.
        day: The date.
        config: Settings of the recommendations.
        names: See :func:`names_of`; ``None``: items have no names.
    """
    best_first = Window.partitionBy("user_key").orderBy(F.desc("score"), "item_id")
    values = {
        "score_date": F.lit(day),
        "reason": reason(),
        "price_tier": price_tier(F.col("price_position")),
        "affordability": affordability(),
        "times_bought": F.col("purchase_days"),
        "usual_interval_days": F.round("usual_interval", 1),
    }
    ranked = (
        candidates.withColumn("score", F.round(ranking.probability(), 6))
        .withColumn("rank", F.row_number().over(best_first))
        .filter(F.col("rank") <= config.items)
        .withColumns(values)
    )
    named = ranked.withColumn("item", F.lit(None)) if names is None else ranked.join(names, "item_id", "left")
    return shaped(named, RECOMMENDATIONS)


def reason() -> Column:
    """Return why a candidate is one: what the user did comes before what others do."""
    return (
        F.when(F.col("purchase_days") > 0, BUY_AGAIN)
        .when(F.col("intent") + F.col("viewed") > 0, LOOKED_AT)
        .when(F.col("is_alike"), SIMILAR_USERS)
        .otherwise(POPULAR)
    )


# of the Complete Journey, 28 days before 2017-10-03; it has neither carts nor views, so that their coefficients are assumptions
MEASURED_RANKING = Ranking(
    -4.79,
    {
        "is_bought": 0.87,
        "purchase_days": 0.94,
        "bought": 0.35,
        "days_28": 0.40,
        "days_84": 0.16,
        "overdue": -0.45,
        "early": 0.45,
        "share_of_days": 0.20,
        "visit_rate": 0.09,
        "user_days_28": 0.22,
        "intent": 1.0,
        "viewed": 0.3,
        "trend": 0.28,
        "repeat_share": 1.10,
        "preference": 0.21,
        "affordability": 0.95,
        "off_tier_new": -0.24,
        "preference_new": 2.69,
    },
)
"""Coefficients for a platform with too little history to learn from."""
