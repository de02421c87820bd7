"""The profile of each user: trends, interests, activity, risk and next purchase beside the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import ProfilesConfig
from bp_spark.features.catalogue import Catalogue
from bp_spark.features.refunds import knows_past, past_year
from bp_spark.features.stages import buyer_stage
from bp_spark.lakehouse.tables import RISK_REASON, USER_PROFILE
from bp_spark.model.refunds import Refunds
from bp_spark.model.stack import relative_width
from bp_spark.scoring.profiles.columns import as_double, as_long, shaped
from bp_spark.scoring.profiles.margins import with_margin_share
from bp_spark.scoring.reasons import in_words

SPANS = (30, 90)
"""Days before the score's date with which the score is compared."""
TIER_BORDER = 0.5
"""Standard deviations of log unit price beyond which a user's price tier is not ``standard``."""
ONE_PURCHASE_DAY, UNLIKELY = "one purchase day", "unlikely to buy"
"""Why no next purchase is expected."""
DAYS_A_YEAR = 365
_HIGH_RISK_POINTS, _MEDIUM_RISK_POINTS = 4, 2


def user_profile(
    scores: DataFrame,
    earlier: Mapping[int, tuple[date, DataFrame]],
    features: DataFrame,
    affinity: DataFrame,
    events: DataFrame,
    day: date,
    config: ProfilesConfig,
    catalogue: Catalogue,
    refunds: Refunds | None = None,
) -> DataFrame:
    """Return one profile for each score of ``day``.

    The next purchase is expected by the gamma-Poisson model of Ehrenberg (1959). A user has ``x`` repeat purchase days in the
    ``T`` days since the first one. Such a user buys at a rate of Gamma(``a + 1 + x``, ``a M + T``), so the expected wait is
    ``(a M + T) / (a + x)``. ``M`` is the population's days per repeat purchase day, and ``a`` is ``config.prior_purchases``.

    Args:
        scores: Rows of SCORES of ``day``.
        earlier: Days of SPANS -> the date with which the score is compared, and rows of SCORES of that date.
        features: Rows of ``user_features`` of ``day``.
        affinity: CATEGORY_AFFINITY of ``day``.
        events: EVENTS, for margins.
        day: The date.
        config: Settings of the profiles.
        catalogue: Names the features in reasons.
        refunds: Predicts refunds to come; without it they are NULL.

    Returns:
        Rows of USER_PROFILE.
    """
    rows = (
        scores.withColumnRenamed("risk_level", "interval_risk")
        .join(_facts(features, refunds), "user_key", "left")
        .join(_top_interests(affinity, config.interests), "user_key", "left")
        .transform(with_margin_share, events, day)
        .transform(lambda df: reduce(lambda one, span: _with_trend(one, span, earlier.get(span), config), SPANS, df))
        .withColumns(
            {
                "score_date": F.lit(day),
                "reasons": in_words(F.col("reasons"), catalogue),
                "interests": F.coalesce("interests", F.array().cast(USER_PROFILE.schema["interests"].dataType)),
                "price_tier": price_tier(F.col("price_position")),
                "stage": buyer_stage(
                    F.col("tenure"), F.col("days_since_purchase"), config.active_days, config.dormant_days
                ),
                "activity": _activity(config),
                "expected_margin": F.col("expected_spend") * F.col("margin_share"),
                "value": discounted_value(F.col("expected_by_horizon"), config.discount_rate),
                "interval_width": relative_width({name: F.col(name) for name in ("expected_spend", "low", "high")}),
            }
        )
    )
    return (
        rows.transform(_with_risk, config).transform(_with_next_purchase, day, config).transform(shaped, USER_PROFILE)
    )


def discounted_value(expected_by_horizon: Column, rate: float) -> Column:
    """Return the expected spend over the longest horizon, discounted to the score's date; NULL without a horizon.

    The horizons cut the time into spans. What is expected in a span is discounted at its middle, which is the net present
    value of customer lifetime value (Gupta and Lehmann 2003, "Customers as assets") with a span for each horizon::

        sum((expected(k) - expected(k - 1)) / (1 + rate) ** (middle(k) / 365))

    Args:
        expected_by_horizon: Days -> expected spend over that many days, in the platform's currency.
        rate: Discount rate a year.
    """
    horizons = F.array_sort(F.map_entries(expected_by_horizon))
    start = F.struct(F.lit(0).alias("days"), F.lit(0.0).alias("expected"), F.lit(0.0).alias("value"))

    def with_span(before: Column, horizon: Column) -> Column:
        middle = (before["days"] + horizon["key"]) / 2
        increment = (horizon["value"] - before["expected"]) / F.pow(F.lit(1 + rate), middle / DAYS_A_YEAR)
        return F.struct(
            horizon["key"].alias("days"),
            horizon["value"].alias("expected"),
            (before["value"] + increment).alias("value"),
        )

    return F.when(F.size(horizons) > 0, F.aggregate(horizons, start, with_span)["value"])


def _facts(features: DataFrame, refunds: Refunds | None) -> DataFrame:
    """Return facts from the features as of the as-of date, not as of the last tick of the user's clock."""
    # days without events that the user's clock has not counted yet
    silent_days = F.datediff("as_of_date", "seen_on")
    columns = {
        "days_since_purchase": as_long("recency_days") + silent_days,
        "days_since_visit": as_long("activity_recency_days") + silent_days,
        "purchase_days": as_long("frequency") + 1,
        "tenure": as_long("tenure_days") + silent_days,
        "price_position": F.round(as_double("price_tier_365d"), 2),
        "usual_gap_days": F.round(as_double("gap_mean_days"), 1),
        "usual_order_value": F.round(as_double("monetary_value"), 2),
        "refund_share": F.round(as_double("refund_share_365d"), 4),
        "expected_refund_share": _expected_refund_share(features, refunds),
        "discount_share": F.round(as_double("discount_share_90d"), 4),
        "low_rating_share": F.round(as_double("low_ratings_365d"), 4),
        "spend_volatility": F.round(as_double("weekly_spend_variation"), 4),
    }
    facts = features.select("user_key", *(value.alias(name) for name, value in columns.items()))
    repeats = F.sum(F.col("purchase_days") - 1)
    population = facts.agg(F.try_divide(F.sum("tenure"), repeats).cast("double").alias("population_gap"))
    return facts.crossJoin(F.broadcast(population))


def _expected_refund_share(features: DataFrame, refunds: Refunds | None) -> Column:
    if refunds is None or not knows_past(features.columns):
        return F.lit(None).cast("double")
    return F.round(refunds.share_of(*past_year()), 4)


def _top_interests(affinity: DataFrame, most: int) -> DataFrame:
    # negated, because arrays sort upwards
    entry = F.struct((-F.col("affinity")).alias("order"), "category")
    first = F.slice(F.array_sort(F.collect_list(entry)), 1, most)
    interests = F.transform(first, lambda e: F.struct(e["category"].alias("category"), (-e["order"]).alias("weight")))
    return affinity.groupBy("user_key").agg(interests.alias("interests"))


def _with_trend(
    rows: DataFrame, span: int, compared: tuple[date, DataFrame] | None, config: ProfilesConfig
) -> DataFrame:
    date_column, change_column, trend_column = f"compared_{span}d", f"score_change_{span}d", f"trend_{span}d"
    if compared is None:
        types = {date_column: "date", change_column: "double", trend_column: "string"}
        return rows.withColumns({name: F.lit(None).cast(type_) for name, type_ in types.items()})
    earlier_date, earlier_scores = compared
    change = F.col("score") - F.col("earlier_score")
    trend = (
        F.when(change >= config.trend_points, "rising")
        .when(change <= -config.trend_points, "falling")
        .when(change.isNotNull(), "steady")
        .otherwise("new")
    )
    return (
        rows.join(earlier_scores.select("user_key", F.col("score").alias("earlier_score")), "user_key", "left")
        .withColumns({date_column: F.lit(earlier_date), change_column: change, trend_column: trend})
        .drop("earlier_score")
    )


def price_tier(position: Column) -> Column:
    """Return budget, standard or premium by standard deviations of log prices within their category; NULL stays NULL."""
    tier = F.when(position >= TIER_BORDER, "premium").when(position <= -TIER_BORDER, "budget")
    return tier.when(position.isNotNull(), "standard")


def _activity(config: ProfilesConfig) -> Column:
    # least passes over NULL: purchases alone decide for a user who never visited
    silent_days = F.least("days_since_purchase", "days_since_visit")
    return (
        F.when(silent_days <= config.active_days, "active")
        .when(silent_days <= config.dormant_days, "cooling")
        .otherwise("dormant")
    )


def _with_risk(rows: DataFrame, config: ProfilesConfig) -> DataFrame:
    def points(value: str, borders: Sequence[float]) -> Column:
        first, second = borders
        return F.when(F.col(value) >= second, 2).when(F.col(value) >= first, 1).otherwise(0)

    by_interval = F.when(F.col("interval_risk") == "high", 2).when(F.col("interval_risk") == "medium", 1).otherwise(0)
    signals = (
        ("interval", "interval_width", by_interval),
        ("refunds", "refund_share", points("refund_share", config.refund_borders)),
        ("volatility", "spend_volatility", points("spend_volatility", config.volatility_borders)),
    )
    reasons = F.array(
        *(
            F.struct(F.lit(name).alias("signal"), F.col(value).alias("value"), n.alias("points"))
            for name, value, n in signals
        )
    ).cast(f"array<{RISK_REASON}>")
    total = F.aggregate("risk_reasons", F.lit(0), lambda sum_, reason: sum_ + reason["points"])
    level = (
        F.when(F.col("risk_points") >= _HIGH_RISK_POINTS, "high")
        .when(F.col("risk_points") >= _MEDIUM_RISK_POINTS, "medium")
        .otherwise("low")
    )
    return (
        rows.withColumn("risk_reasons", F.filter(reasons, lambda reason: reason["points"] > 0))
        .withColumn("risk_points", total)
        .withColumn("risk_level", level)
    )


def _with_next_purchase(rows: DataFrame, day: date, config: ProfilesConfig) -> DataFrame:
    repeats, prior = F.col("purchase_days") - 1, config.prior_purchases
    unknown = F.when(F.coalesce(repeats, F.lit(0)) < 1, ONE_PURCHASE_DAY).when(
        F.col("p_active") < config.likely_active, UNLIKELY
    )
    wait = F.round((prior * F.col("population_gap") + F.col("tenure")) / (prior + repeats), 1)
    return (
        rows.withColumn("next_purchase_unknown", unknown)
        .withColumn("next_purchase_days", F.when(unknown.isNull(), wait))
        .withColumn("next_purchase_on", F.date_add(F.lit(day), F.round("next_purchase_days").cast("int")))
    )
