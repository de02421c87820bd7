"""Scores of a date, with the features and days they come from -> what people and applications are told of each user.

``category_affinity`` for recommendation; ``user_profile``, from which follow ``risk_control``, ``customer_service`` and, with
the users' regions, ``market_segments``. All definitions in words, and a query for each table, are in ``docs/profiles.md``.

Each is a function of its inputs' rows alone; sums over users or days are of whole numbers, so that they come out the same on
any cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from functools import reduce
from operator import or_

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from bp_spark.core.config import PhrasesConfig, ProfilesConfig
from bp_spark.features.catalogue import Catalogue
from bp_spark.lakehouse.tables import (
    CATEGORY_AFFINITY,
    CUSTOMER_SERVICE,
    MARKET_SEGMENTS,
    RISK_CONTROL,
    RISK_REASON,
    USER_PROFILE,
    Table,
)
from bp_spark.model.stack import relative_width
from bp_spark.scoring.reasons import in_words

SPANS = (30, 90)
"""Days before the score's date with which it is compared."""
NEARBY = 7
"""Days by which a scored date may miss such a day."""
TALKING_POINTS = 3
TIER_BORDER = 0.5
"""Standard deviations of log unit price from which a user's price tier is not ``standard``."""
UNKNOWN_AFFORDABILITY = 0.5
LOW_RATINGS, OFFERS, OVERDUE, SOON = 0.5, 0.3, 2.0, 14.0
"""Talking points: share of low ratings, share of reductions, pause over the usual one, and days to the next purchase."""
ONE_PURCHASE_DAY, UNLIKELY = "one purchase day", "unlikely to buy"
OTHER, UNKNOWN, ALL, NONE = "other", "unknown", "all", "none"
CELL = ("level", "category", "region")

_SOURCES = {"purchase": "purchase_weight", "click": "click_weight", "search": "search_weight"}
_CLICKS = ("browse", "click", "cart", "favourite")
_STEPS = 1_000_000
"""A weight of recency as a whole number."""


# --- recommendation ----------------------------------------------------------------------------------------------------


def category_affinity(
    scores: DataFrame,
    features: DataFrame,
    daily: DataFrame,
    events: DataFrame,
    day: date,
    config: ProfilesConfig,
    least_users: int,
) -> DataFrame:
    """The categories each user is most interested in, and how easily each is afforded.

    Affinity is the mean, by the configured weights, of the category's recency-weighted shares of what the user spent, looked
    at and searched for; a source of which the user has nothing is left out. Affordability is ``budget / (budget + price)``:
    budget is the usual order, or the expected spend where that is less; price is what the user would pay for a unit, the
    category's usual price moved by the user's price position.

    Args:
        scores: rows of SCORES of ``day``.
        features: rows of ``user_features`` of ``day``.
        daily: USER_DAILY; days before ``day`` are read.
        events: EVENTS; likewise.
        least_users: a category's usual price is of so many users at least.

    Returns:
        Rows of CATEGORY_AFFINITY, ``config.affinities`` of a user at most.
    """
    bought = _bought(daily, day, config)
    means = features.select(
        "user_key",
        F.greatest(_double("monetary_value"), F.lit(0.0)).alias("order"),
        F.coalesce(_double("price_tier_365d"), F.lit(0.0)).alias("position"),
    )
    price = F.exp(F.col("mean") + F.col("position") * F.col("std"))
    budget = F.least("order", "expected_spend")
    fit = F.col("affinity") * F.coalesce("affordability", F.lit(UNKNOWN_AFFORDABILITY))
    best = Window.partitionBy("user_key").orderBy(F.desc("fit"), F.desc("affinity"), "category")
    rows = (
        _interests(bought, _looked(events, day, config), config)
        .join(scores.select("user_key", "expected_spend").join(means, "user_key", "left"), "user_key")
        .join(F.broadcast(_usual_prices(bought, least_users)), "category", "left")
        .withColumn("affordability", F.try_divide(budget, budget + price))
        .withColumn("fit", fit)
        .withColumns({"rank": F.row_number().over(best), "score_date": F.lit(day), "usual_price": F.exp("mean")})
    )
    return _shaped(rows, CATEGORY_AFFINITY)


def _bought(daily: DataFrame, day: date, config: ProfilesConfig) -> DataFrame:
    """``user_key, category`` with the spend, weighted by recency, and the prices paid, in the window."""
    entries = _recent(daily, "day", day, config).select("user_key", "age", F.inline("categories"))
    sums = ("priced", "price_micro", "price_sq")
    return entries.groupBy("user_key", _cut("category", config.category_levels)).agg(
        F.sum(_weighted(F.col("spend") / 100, config)).alias("value"), *(F.sum(name).alias(name) for name in sums)
    )


def _looked(events: DataFrame, day: date, config: ProfilesConfig) -> DataFrame:
    """``user_key, source, category, value``: weighted numbers of actions and of searches in the window."""
    kinds = events.filter(F.col("kind").isin(*_CLICKS, "search") & F.col("category").isNotNull())
    source = F.when(F.col("kind") == "search", "search").otherwise("click").alias("source")
    return (
        _recent(kinds, "event_date", day, config)
        .groupBy("user_key", source, _cut("category", config.category_levels))
        .agg(F.sum(_weighted(F.lit(1.0), config)).alias("value"))
    )


def _recent(df: DataFrame, column: str, day: date, config: ProfilesConfig) -> DataFrame:
    """Rows of the window before ``day``, with their ``age`` in days."""
    first, last = day - timedelta(days=config.window_days), day - timedelta(days=1)
    within = F.col(column).between(F.lit(first), F.lit(last))
    return df.filter(within).withColumn("age", F.datediff(F.lit(day), column))


def _weighted(value: Column, config: ProfilesConfig) -> Column:
    return F.round(value * _STEPS * F.pow(F.lit(0.5), F.col("age") / config.half_life_days)).cast("decimal(28,0)")


def _cut(category: str, levels: int) -> Column:
    """A category path's broadest levels."""
    return F.array_join(F.slice(F.split(category, " > "), 1, levels), " > ").alias("category")


def _interests(bought: DataFrame, looked: DataFrame, config: ProfilesConfig) -> DataFrame:
    """``user_key, category, affinity`` and the share of each source, of the categories of most interest."""
    purchases = bought.select("user_key", F.lit("purchase").alias("source"), "category", "value")
    by_category = (
        purchases.unionByName(looked)
        .groupBy("user_key", "category")
        .agg(*(F.sum(F.when(F.col("source") == name, F.col("value")).otherwise(0)).alias(name) for name in _SOURCES))
    )
    user = Window.partitionBy("user_key")
    shares = by_category.select(
        "user_key",
        "category",
        *(
            F.coalesce(
                F.try_divide(F.col(name).cast("double"), F.sum(name).over(user).cast("double")), F.lit(0.0)
            ).alias(f"{name}_share")
            for name in _SOURCES
        ),
        # of the sources of which the user has anything
        sum(
            (
                F.when(F.sum(name).over(user) > 0, getattr(config, weight)).otherwise(0.0)
                for name, weight in _SOURCES.items()
            ),
            start=F.lit(0.0),
        ).alias("weights"),
    )
    weighted = sum(
        (F.col(f"{name}_share") * getattr(config, weight) for name, weight in _SOURCES.items()), start=F.lit(0.0)
    )
    most = Window.partitionBy("user_key").orderBy(F.desc("affinity"), "category")
    return (
        shares.withColumn("affinity", F.try_divide(weighted, F.col("weights")))
        .filter(F.col("affinity") > 0)
        .withColumn("place", F.row_number().over(most))
        .filter(F.col("place") <= config.affinities)
        .drop("weights", "place")
    )


def _usual_prices(bought: DataFrame, least_users: int) -> DataFrame:
    """``category, mean, std`` of log unit prices, where at least so many users bought."""
    n = F.sum("priced")
    mean = F.try_divide(F.sum("price_micro") / 1e6, n)
    variance = F.try_divide(F.sum("price_sq") / 1e6, n) - mean * mean
    return (
        bought.groupBy("category")
        .agg(
            F.count_if(F.col("priced") > 0).alias("users"),
            mean.alias("mean"),
            F.sqrt(F.greatest(variance, F.lit(0.0))).alias("std"),
        )
        .filter(F.col("users") >= least_users)
        .drop("users")
    )


# --- the profile -------------------------------------------------------------------------------------------------------


def user_profile(
    scores: DataFrame,
    earlier: Mapping[int, tuple[date, DataFrame]],
    features: DataFrame,
    affinity: DataFrame,
    day: date,
    config: ProfilesConfig,
    catalogue: Catalogue,
) -> DataFrame:
    """One row for each score of ``day``.

    The next purchase is expected by the gamma-Poisson model of Ehrenberg (1959): a user with ``x`` repeat purchase days in
    ``T`` days since the first one has purchases at a rate of Gamma(``a + 1 + x``, ``a M + T``), where ``M`` is the
    population's days per repeat purchase day and ``a`` is ``config.prior_purchases``; the expected wait is
    ``(a M + T) / (a + x)``.

    Args:
        scores: rows of SCORES of ``day``.
        earlier: days of SPANS -> the date that the score is compared with, and rows of SCORES of it.
        features: rows of ``user_features`` of ``day``.
        affinity: CATEGORY_AFFINITY of ``day``.
        catalogue: what reasons call the features.

    Returns:
        Rows of USER_PROFILE.
    """
    rows = (
        scores.withColumnRenamed("risk_level", "interval_risk")
        .join(_facts(features), "user_key", "left")
        .join(_top_interests(affinity, config.interests), "user_key", "left")
        .transform(lambda df: reduce(lambda one, span: _with_trend(one, span, earlier.get(span), config), SPANS, df))
        .withColumns(
            {
                "score_date": F.lit(day),
                "reasons": in_words(F.col("reasons"), catalogue),
                "interests": F.coalesce("interests", F.array().cast(USER_PROFILE.schema["interests"].dataType)),
                "price_tier": _price_tier(),
                "activity": _activity(config),
                "interval_width": relative_width({name: F.col(name) for name in ("expected_spend", "low", "high")}),
            }
        )
    )
    return (
        rows.transform(_with_risk, config).transform(_with_next_purchase, day, config).transform(_shaped, USER_PROFILE)
    )


def _facts(features: DataFrame) -> DataFrame:
    """What a profile tells of the features, as of the as-of date and not of the last tick of the user's clock."""
    # days of silence that the clock has not told yet
    silent = F.datediff("as_of_date", "seen_on")
    columns = {
        "days_since_purchase": _whole("recency_days") + silent,
        "days_since_visit": _whole("activity_recency_days") + silent,
        "purchase_days": _whole("frequency") + 1,
        "tenure": _whole("tenure_days") + silent,
        "price_position": F.round(_double("price_tier_365d"), 2),
        "usual_gap_days": F.round(_double("gap_mean_days"), 1),
        "usual_order_value": F.round(_double("monetary_value"), 2),
        "refund_share": F.round(_double("refund_share_365d"), 4),
        "discount_share": F.round(_double("discount_share_90d"), 4),
        "low_rating_share": F.round(_double("low_ratings_365d"), 4),
        "spend_volatility": F.round(_double("weekly_spend_variation"), 4),
    }
    facts = features.select("user_key", *(value.alias(name) for name, value in columns.items()))
    repeats = F.sum(F.col("purchase_days") - 1)
    rhythm = facts.agg(F.try_divide(F.sum("tenure"), repeats).cast("double").alias("population_gap"))
    return facts.crossJoin(F.broadcast(rhythm))


def _top_interests(affinity: DataFrame, most: int) -> DataFrame:
    # negated: arrays sort upwards
    entry = F.struct((-F.col("affinity")).alias("order"), "category")
    first = F.slice(F.array_sort(F.collect_list(entry)), 1, most)
    as_told = F.transform(first, lambda e: F.struct(e["category"].alias("category"), (-e["order"]).alias("weight")))
    return affinity.groupBy("user_key").agg(as_told.alias("interests"))


def _with_trend(
    rows: DataFrame, span: int, compared: tuple[date, DataFrame] | None, config: ProfilesConfig
) -> DataFrame:
    names = {"then": f"compared_{span}d", "change": f"score_change_{span}d", "trend": f"trend_{span}d"}
    if compared is None:
        nothing = {"then": "date", "change": "double", "trend": "string"}
        return rows.withColumns({names[part]: F.lit(None).cast(kind) for part, kind in nothing.items()})
    then, scores = compared
    change = F.col("score") - F.col("score_then")
    trend = (
        F.when(change >= config.trend_points, "rising")
        .when(change <= -config.trend_points, "falling")
        .when(change.isNotNull(), "steady")
        .otherwise("new")
    )
    before = scores.select("user_key", F.col("score").alias("score_then"))
    return (
        rows.join(before, "user_key", "left")
        .withColumns({names["then"]: F.lit(then), names["change"]: change, names["trend"]: trend})
        .drop("score_then")
    )


def _price_tier() -> Column:
    position = F.col("price_position")
    tier = F.when(position >= TIER_BORDER, "premium").when(position <= -TIER_BORDER, "budget")
    return tier.when(position.isNotNull(), "standard")


def _activity(config: ProfilesConfig) -> Column:
    # least passes over NULL: who never visited is judged by purchases
    silent = F.least("days_since_purchase", "days_since_visit")
    return (
        F.when(silent <= config.active_days, "active")
        .when(silent <= config.dormant_days, "cooling")
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
    level = F.when(F.col("risk_points") >= 4, "high").when(F.col("risk_points") >= 2, "medium").otherwise("low")
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


# --- risk control and customer service ---------------------------------------------------------------------------------


def risk_control(profile: DataFrame, config: ProfilesConfig) -> DataFrame:
    """The risk band of each row of USER_PROFILE with its reasons in words: rows of RISK_CONTROL."""

    def in_words(reason: Column) -> Column:
        value = F.format_number(reason["value"], 2)
        phrases = {
            signal: getattr(config.phrases, f"risk_{signal}") for signal in ("interval", "refunds", "volatility")
        }
        texts = [F.when(reason["signal"] == signal, _filled(text, value=value)) for signal, text in phrases.items()]
        return F.struct(
            *(reason[part].alias(part) for part in ("signal", "value", "points")), F.coalesce(*texts).alias("text")
        )

    most = "array_sort(risk_reasons, (a, b) -> b.points - a.points)"
    rows = profile.withColumns(
        {"risk_band": F.col("risk_level"), "reasons": F.transform(F.expr(most), in_words)},
    )
    return _shaped(rows, RISK_CONTROL)


def customer_service(profile: DataFrame, config: ProfilesConfig) -> DataFrame:
    """Service tier and talking points of each row of USER_PROFILE: rows of CUSTOMER_SERVICE."""
    level, activity, risky = F.col("level"), F.col("activity"), F.col("risk_level") == "high"
    tier = (
        F.when((activity == "dormant") & level.isin("A", "B", "C"), "win_back")
        .when((activity == "cooling") & level.isin("A", "B"), "win_back")
        .when(level.isin("A", "B"), "premier")
        .when(level == "C", "preferred")
        .otherwise("standard")
    )
    # one step down
    lowered = F.when(tier == "premier", "preferred").otherwise("standard")
    points = F.filter(F.array(*_talking_points(config.phrases)), lambda point: point.isNotNull())
    rows = profile.withColumns(
        {"service_tier": F.when(risky, lowered).otherwise(tier), "talking_points": F.slice(points, 1, TALKING_POINTS)}
    )
    return _shaped(rows, CUSTOMER_SERVICE)


def _talking_points(phrases: PhrasesConfig) -> list[Column]:
    """Topic and words where they are to the point, else NULL; most important first."""
    pause, gap, wait = F.col("days_since_purchase"), F.col("usual_gap_days"), F.col("next_purchase_days")
    favourite = F.get("interests", F.lit(0))["category"]
    moved = {"points": F.round(F.abs("score_change_30d")).cast("int"), "date": F.col("compared_30d")}
    topics: dict[str, tuple[Column, dict[str, Column]]] = {
        "refunds": (
            F.array_contains("risk_reasons.signal", "refunds"),
            {"share": F.round(F.col("refund_share") * 100).cast("int")},
        ),
        "ratings": (F.col("low_rating_share") >= LOW_RATINGS, {}),
        "overdue": (
            (pause >= OVERDUE * gap) & (pause > 1) & F.col("next_purchase_unknown").isNull(),
            {"days": pause, "gap": F.round(gap).cast("int")},
        ),
        "falling": (F.col("trend_30d") == "falling", moved),
        "rising": (F.col("trend_30d") == "rising", moved),
        "expected": (wait <= SOON, {"days": F.greatest(F.round(wait), F.lit(1)).cast("int")}),
        "favourite": (favourite.isNotNull(), {"category": favourite}),
        "offers": (F.col("discount_share") >= OFFERS, {}),
        "premium": (F.col("price_tier") == "premium", {}),
        "budget": (F.col("price_tier") == "budget", {}),
    }
    return [
        F.when(holds, F.struct(F.lit(topic).alias("topic"), _filled(getattr(phrases, topic), **values).alias("text")))
        for topic, (holds, values) in topics.items()
    ]


def _filled(phrase: str, **values: Column) -> Column:
    """The phrase with ``{name}`` replaced by each value."""
    text = F.lit(phrase)
    for name, value in values.items():
        if f"{{{name}}}" in phrase:
            text = F.replace(text, F.lit(f"{{{name}}}"), value.cast("string"))
    return text


# --- market analysis ---------------------------------------------------------------------------------------------------


def market_segments(profile: DataFrame, regions: DataFrame | None, day: date, least_users: int) -> DataFrame:
    """Users of USER_PROFILE by level, top category and region, none of the rows of fewer than ``least_users`` users.

    The rows are a partition of all users: cells that are too small are merged, first with those of other regions, then of other
    categories, then of other levels, and where that is still too small, with the smallest cell that is large enough. So
    whatever is added up or subtracted from rows and their totals is of none or of at least so many users. Where all users
    are fewer there is no row.

    Args:
        regions: ``user_key, region``, a user once; ``None``: all are in one.

    Returns:
        Rows of MARKET_SEGMENTS.
    """
    if regions is None:
        placed = profile.withColumn("region", F.lit(ALL))
    else:
        theirs = regions.select("user_key", "region")
        placed = profile.join(theirs, "user_key", "left").withColumn("region", F.coalesce("region", F.lit(UNKNOWN)))
    first = F.get("interests", F.lit(0))["category"]
    # whole numbers: their sums don't depend on the order
    figures = {"score": 10_000, "expected_spend": 100, "p_active": 1_000_000}
    sums = [F.sum(F.round(F.col(name) * by).cast("decimal(28,0)")).alias(name) for name, by in figures.items()]
    cells = (
        placed.withColumn("category", F.coalesce(F.split(first, " > ")[0], F.lit(NONE)))
        .groupBy(*CELL)
        .agg(F.count(F.lit(1)).alias("users"), *sums)
    )
    for depth in (2, 1, 0):
        cells = _merged(cells, CELL[:depth], [*figures], least_users)
    means = {f"mean_{name}": F.col(name).cast("double") / by / F.col("users") for name, by in figures.items()}
    rows = cells.filter(F.col("users") >= least_users).withColumns({**means, "score_date": F.lit(day)})
    return _shaped(rows, MARKET_SEGMENTS)


def _merged(cells: DataFrame, within: Sequence[str], figures: Sequence[str], least_users: int) -> DataFrame:
    """Cells of which those that are too small are one in each group of the columns ``within``, the rest of the cell's columns
    being ``other``; with the smallest that is large enough, if they are too small together."""
    # a few cells of all users, not the users
    group = Window.partitionBy(*within) if within else Window.partitionBy(F.lit(0))
    small = F.col("users") < least_users
    together = F.coalesce(F.sum(F.when(small, F.col("users"))).over(group), F.lit(0))
    place = F.row_number().over(group.orderBy(small, "users", *CELL))
    needs_one = (together > 0) & (together < least_users)
    joins = reduce(or_, [small, needs_one & (place == 1)])
    return (
        cells.withColumn("joins", joins)
        .withColumns(
            {name: F.when(F.col("joins"), OTHER).otherwise(F.col(name)) for name in CELL if name not in within}
        )
        .groupBy(*CELL)
        .agg(*(F.sum(name).alias(name) for name in ("users", *figures)))
    )


# --- shapes ------------------------------------------------------------------------------------------------------------


def _shaped(rows: DataFrame, table: Table) -> DataFrame:
    """The table's columns in their types."""
    return rows.select(*(F.col(field.name).cast(field.dataType).alias(field.name) for field in table.schema))


def _double(feature: str) -> Column:
    return F.col(feature).cast("double")


def _whole(feature: str) -> Column:
    return F.col(feature).cast("long")
