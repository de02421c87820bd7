"""Events -> ``user_daily`` -> ``user_features``; the catalogue of features lives here.

Point in time: a feature for date D reads only days before D. Every sum is over whole numbers (cents, thousandths), so that
no order of addition, and so no cluster size and no rebuild, changes a feature by a bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from typing import Literal

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from bp_spark.config import FeaturesConfig
from bp_spark.tables import KINDS, USER_DAILY, Column, Table

MONEY = "decimal(18,2)"
CATEGORY_BUCKETS = 16
WEEKS = 12


# --- the catalogue -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    """One feature.

    Args:
        name: column of ``user_features``.
        expression: SQL over the user's aggregates.
        description: what it is, in words an analyst reads.
        unit: currency, orders, items, days, share, ...
        window: the days before the as-of date that it sees.
        scale: ``log`` for heavy-tailed amounts and counts (models take its signed log1p), else ``linear``.
    """

    name: str
    expression: str
    description: str
    unit: str
    window: str
    scale: Literal["log", "linear"] = "linear"


@dataclass(frozen=True)
class Catalogue:
    """All features, with the SQL aggregates over a user's days that their expressions read."""

    features: tuple[Feature, ...]
    aggregates: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Feature columns, in table order."""
        return tuple(feature.name for feature in self.features)


class _Builder:
    def __init__(self) -> None:
        self.features: list[Feature] = []
        self.aggregates: dict[str, str] = {}

    def total(self, measure: str, days: int) -> str:
        """Name of the sum of a daily measure over the last ``days`` days."""
        return self.aggregate(f"{measure}_in_{days}", f"sum(if(age <= {days}, {measure}, 0))")

    def aggregate(self, name: str, sql: str) -> str:
        self.aggregates[f"a_{name}"] = sql
        return f"a_{name}"

    def add(
        self,
        name: str,
        expression: str,
        description: str,
        unit: str,
        window: str | int,
        scale: Literal["log", "linear"] = "linear",
    ) -> None:
        span = f"{window} days" if isinstance(window, int) else window
        self.features.append(Feature(name, expression, description, unit, span, scale))


def catalogue(config: FeaturesConfig) -> Catalogue:
    """All features for the configured windows."""
    b = _Builder()
    _recency_frequency_monetary(b)
    _windows(b, config.windows)
    _decayed(b)
    _gaps(b)
    _weekly(b)
    _order_values(b)
    _discounts_and_prices(b)
    _habits(b)
    _season(b)
    _categories(b)
    _behaviour(b)
    return Catalogue(tuple(b.features), b.aggregates)


def _ratio(numerator: str, denominator: str) -> str:
    """SQL quotient; NULL where the denominator is 0 or NULL."""
    return f"try_divide({numerator}, {denominator})"


def _recency_frequency_monetary(b: _Builder) -> None:
    recency = b.aggregate("recency", "min(if(orders > 0, age, null))")
    tenure = b.aggregate("tenure", "max(if(orders > 0, age, null))")
    days = b.aggregate("purchase_days", "count_if(orders > 0)")
    spend = b.aggregate("spend", "sum(spend)")
    b.add("recency_days", recency, "Days since the last purchase", "days", "all", "log")
    b.add(
        "tenure_days",
        tenure,
        "Days since the first purchase seen (T of Fader, Hardie & Lee 2005)",
        "days",
        "all",
        "log",
    )
    b.add(
        "active_span_days",
        f"{tenure} - {recency}",
        "Days between first and last purchase (t_x)",
        "days",
        "all",
        "log",
    )
    b.add("frequency", f"{days} - 1", "Days with a repeat purchase", "days", "all", "log")
    b.add("purchase_day_rate", _ratio(days, tenure), "Purchase days per day since the first one", "share", "all")
    b.add("monetary_value", _ratio(f"{spend} / 100", days), "Mean spend of a purchase day", "currency", "all", "log")
    b.add("spend_total", f"{spend} / 100", "Spend less refunds", "currency", "all", "log")


def _windows(b: _Builder, windows: Sequence[int]) -> None:
    for days in windows:
        spend, orders, items = (b.total(measure, days) for measure in ("spend", "orders", "items"))
        purchase_days = b.aggregate(f"purchase_days_in_{days}", f"count_if(age <= {days} and orders > 0)")
        exposure = f"least({days}, a_tenure)"
        b.add(f"spend_{days}d", f"{spend} / 100", "Spend less refunds", "currency", days, "log")
        b.add(f"orders_{days}d", orders, "Orders", "orders", days, "log")
        b.add(f"items_{days}d", items, "Order lines", "items", days, "log")
        if days >= 30:
            b.add(
                f"spend_rate_{days}d",
                _ratio(f"{spend} / 100", exposure),
                "Spend per day on which the user was a customer",
                "currency/day",
                days,
                "log",
            )
            b.add(f"purchase_days_{days}d", purchase_days, "Days with a purchase", "days", days, "log")
            b.add(
                f"order_value_{days}d",
                _ratio(f"{spend} / 100", orders),
                "Mean order value",
                "currency",
                days,
                "log",
            )
            b.add(f"items_per_order_{days}d", _ratio(items, orders), "Lines per order", "items", days, "log")
    for short, long in pairwise(windows):
        recent, base = b.total("spend", short), b.total("spend", long)
        b.add(
            f"trend_{short}d_{long}d",
            f"ln((greatest({recent}, 0) / 100 / least({short}, a_tenure) + 1)"
            f" / (greatest({base}, 0) / 100 / least({long}, a_tenure) + 1))",
            f"Log of the daily spend rate of {short} days over that of {long} days",
            "log ratio",
            long,
        )


def _decayed(b: _Builder) -> None:
    for measure, scale, unit in (("spend", 100, "currency/day"), ("orders", 1, "orders/day")):
        for half_life in (7, 30, 90):
            total = b.aggregate(
                f"{measure}_halflife_{half_life}",
                f"sum(cast(round({measure} * 1000 * pow(0.5, age / {half_life})) as bigint))",
            )
            x = f"pow(0.5, 1 / {half_life})"
            weights = f"({x} * (1 - pow({x}, a_tenure)) / (1 - {x}))"
            b.add(
                f"{measure}_rate_halflife_{half_life}d",
                f"{total} / {1000 * scale} / {weights}",
                f"Exponentially weighted {measure} per day, half-life {half_life} days, over the days as a customer",
                unit,
                "all",
                "log",
            )


def _gaps(b: _Builder) -> None:
    mean = b.aggregate("gap_mean", "avg(gap)")
    std = b.aggregate("gap_std", "sqrt(greatest(avg(gap * gap) - avg(gap) * avg(gap), 0))")
    longest = b.aggregate("gap_max", "max(gap)")
    median = b.aggregate("gap_median", "percentile(gap, 0.5)")
    last = b.aggregate("gap_last", "min_by(gap, if(orders > 0, age, null))")
    b.add("gap_mean_days", mean, "Mean days between purchase days", "days", "all", "log")
    b.add("gap_median_days", median, "Median days between purchase days", "days", "all", "log")
    b.add("gap_std_days", std, "Standard deviation of the days between purchase days", "days", "all", "log")
    b.add("gap_max_days", longest, "Longest pause between purchase days", "days", "all", "log")
    b.add("gap_last_days", last, "Pause before the last purchase day", "days", "all", "log")
    b.add("gap_variation", _ratio(std, mean), "Coefficient of variation of the pauses", "ratio", "all")
    b.add("overdue", _ratio("a_recency", mean), "Current pause over the mean pause", "ratio", "all", "log")
    b.add(
        "overdue_longest",
        _ratio("a_recency", longest),
        "Current pause over the longest one",
        "ratio",
        "all",
        "log",
    )


def _weekly(b: _Builder) -> None:
    span = 7 * WEEKS
    weeks = [
        b.aggregate(f"week_{week}", f"sum(if(age between {7 * week + 1} and {7 * week + 7}, spend, 0))")
        for week in range(WEEKS)
    ]
    array = f"array({', '.join(weeks)})"
    total = f"aggregate({array}, 0L, (s, x) -> s + x)"
    squares = f"aggregate({array}, 0D, (s, x) -> s + x / 100 * (x / 100))"
    mean = f"({total} / {100 * WEEKS})"
    std = f"sqrt(greatest({squares} / {WEEKS} - {mean} * {mean}, 0))"
    # least-squares slope against the week's distance from the middle, newest week positive
    middle = (WEEKS - 1) / 2
    norm = sum((week - middle) ** 2 for week in range(WEEKS))
    slope = " + ".join(f"{name} * {middle - week}D" for week, name in enumerate(weeks))
    b.add("weekly_spend_mean", mean, "Mean weekly spend", "currency", span, "log")
    b.add("weekly_spend_std", std, "Standard deviation of weekly spend", "currency", span, "log")
    b.add(
        "weekly_spend_variation",
        _ratio(std, mean),
        "Coefficient of variation of weekly spend",
        "ratio",
        span,
    )
    b.add("weekly_spend_max", f"array_max({array}) / 100", "Largest weekly spend", "currency", span, "log")
    b.add(
        "weekly_spend_median",
        f"array_sort({array})[{WEEKS // 2}] / 100",
        "Median weekly spend",
        "currency",
        span,
        "log",
    )
    b.add(
        "weekly_spend_slope",
        f"({slope}) / {100 * norm}",
        "Change of weekly spend per week",
        "currency/week",
        span,
        "log",
    )
    b.add("weeks_active", f"size(filter({array}, x -> x > 0))", "Weeks with spend", "weeks", span)


def _order_values(b: _Builder) -> None:
    orders = b.aggregate("orders", "sum(orders)")
    squares = b.aggregate("order_value_sq", "sum(order_value_sq)")
    mean = _ratio("a_spend / 100", orders)
    b.add(
        "order_value_std",
        f"sqrt(greatest({_ratio(squares, orders)} - {mean} * {mean}, 0))",
        "Standard deviation of order values",
        "currency",
        "all",
        "log",
    )
    for days in (90, 365):
        largest = b.aggregate(f"order_value_max_{days}", f"max(if(age <= {days}, order_value_max, null))")
        b.add(f"order_value_max_{days}d", f"{largest} / 100", "Largest order", "currency", days, "log")


def _discounts_and_prices(b: _Builder) -> None:
    for days in (30, 90, 365):
        spend, discount, coupon = (b.total(m, days) for m in ("spend", "discount", "coupon_discount"))
        items, refunds = b.total("items", days), b.total("refunds", days)
        gross = f"greatest({spend}, 0) + {discount}"
        b.add(
            f"discount_share_{days}d",
            _ratio(discount, gross),
            "Reductions over undiscounted spend",
            "share",
            days,
        )
        b.add(
            f"coupon_share_{days}d",
            _ratio(coupon, gross),
            "Coupon reductions over undiscounted spend",
            "share",
            days,
        )
        b.add(
            f"discounted_items_{days}d",
            _ratio(b.total("discounted_items", days), items),
            "Share of order lines bought at a reduction",
            "share",
            days,
        )
        b.add(f"coupons_{days}d", b.total("coupons", days), "Coupons redeemed", "coupons", days, "log")
        b.add(
            f"refund_share_{days}d",
            _ratio(refunds, f"greatest({spend}, 0) + {refunds}"),
            "Money paid back over money paid",
            "share",
            days,
        )
        tiered = b.total("tier_items", days)
        b.add(
            f"price_tier_{days}d",
            _ratio(f"{b.total('tier_milli', days)} / 1000", tiered),
            "Mean price position within the item's category: z-score of log unit price against earlier days",
            "z-score",
            days,
        )
        b.add(
            f"premium_share_{days}d",
            _ratio(b.total("premium_items", days), tiered),
            "Share of lines priced more than half a standard deviation over their category",
            "share",
            days,
        )


def _habits(b: _Builder) -> None:
    span = 180
    spend = b.aggregate("weekday_spend", f"sum(if(age <= {span}, greatest(spend, 0), 0))")
    for number, name in enumerate(("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")):
        part = b.aggregate(
            f"weekday_{number}", f"sum(if(age <= {span} and weekday(day) = {number}, greatest(spend, 0), 0))"
        )
        b.add(
            f"share_{name}",
            _ratio(part, spend),
            f"Share of spend on a {name.capitalize()}",
            "share",
            span,
        )
    orders = b.total("orders", span)
    for part in ("morning", "afternoon", "evening", "night"):
        count = b.total(f"{part}_orders", span)
        b.add(
            f"share_{part}",
            _ratio(count, orders),
            f"Share of orders in the {part} (UTC)",
            "share",
            span,
        )


def _season(b: _Builder) -> None:
    last_year = b.aggregate("same_period_last_year", "sum(if(age between 276 and 365, spend, 0))")
    b.add(
        "spend_same_period_last_year",
        f"if(a_tenure >= 365, {last_year} / 100, null)",
        "Spend in the 90 days that began a year before the as-of date",
        "currency",
        "276 to 365 days",
        "log",
    )


def _categories(b: _Builder) -> None:
    for days in (90, 365):
        b.add(
            f"categories_{days}d",
            f"c_count_{days}",
            "Top-level categories bought from",
            "categories",
            days,
            "log",
        )
        b.add(
            f"category_entropy_{days}d",
            f"c_entropy_{days}",
            "Shannon entropy of spend over top-level categories",
            "nats",
            days,
        )
    for rank in (1, 2, 3):
        b.add(
            f"category_share_top{rank}",
            f"c_top_{rank}",
            f"Share of spend in the user's category number {rank}",
            "share",
            365,
        )
    for bucket in range(CATEGORY_BUCKETS):
        b.add(
            f"category_share_hash{bucket:02d}",
            f"c_hash_{bucket}",
            f"Share of spend in categories with hash {bucket} of {CATEGORY_BUCKETS} (Weinberger et al. 2009)",
            "share",
            365,
        )


def _behaviour(b: _Builder) -> None:
    for days in (30, 90):
        for measure in ("browses", "clicks", "carts", "favourites", "searches", "reviews"):
            b.add(f"{measure}_{days}d", b.total(measure, days), measure.capitalize(), measure, days, "log")
        orders, carts, browses = (b.total(m, days) for m in ("orders", "carts", "browses"))
        b.add(
            f"orders_per_browse_{days}d",
            _ratio(orders, browses),
            "Orders per browse",
            "ratio",
            days,
            "log",
        )
        b.add(
            f"cart_abandonment_{days}d",
            f"if({carts} > 0, greatest(1 - {_ratio(orders, carts)}, 0), null)",
            "Share of cart actions beyond the number of orders",
            "share",
            days,
        )
    reviews = b.aggregate("reviews", "sum(reviews)")
    b.add(
        "rating_mean",
        _ratio(f"{b.aggregate('rating', 'sum(rating_milli)')} / 1000", reviews),
        "Mean rating given",
        "rating",
        "all",
    )
    dwell, browses = b.total("dwell_milli", 90), b.total("browses", 90)
    b.add(
        "dwell_mean_90d",
        _ratio(f"{dwell} / 1000", browses),
        "Mean seconds of a browse",
        "seconds",
        90,
        "log",
    )


SEQUENCE_COLUMNS = (
    Column(
        "seq_kind",
        "array<int>",
        f"Kind of each history token, oldest first: {', '.join(KINDS)} as 1..{len(KINDS)}",
    ),
    Column("seq_age_days", "array<float>", "Days from the token to the as-of date"),
    Column("seq_amount", "array<float>", "Spend of the order"),
    Column("seq_items", "array<float>", "Lines of the order"),
    Column("seq_discount", "array<float>", "Reductions of the order"),
    Column("seq_text_id", "array<bigint>", "Text of the order's largest line, or of the event; 0 for none"),
    Column("seq_weekday", "array<int>", "1 Monday to 7 Sunday, UTC"),
    Column("seq_hour", "array<int>", "Hour of day, UTC"),
)


def user_features_table(config: FeaturesConfig) -> Table:
    """The table of the catalogue: a commented column for each feature, then the history as parallel arrays."""
    return Table(
        "user_features",
        "What is known of each user on as_of_date, from events before it; users with a purchase before it",
        (
            Column("user_key", "string", "User", required=True),
            Column("as_of_date", "date", "Only events before this day are seen", required=True),
            *(Column(f.name, "float", f"{f.description} [{f.unit}; {f.window}]") for f in catalogue(config).features),
            *SEQUENCE_COLUMNS,
            Column(
                "built_from",
                "string",
                "Digest of the events' version, the catalogue and the code",
                required=True,
            ),
        ),
        key=("user_key", "as_of_date"),
        partition_by=("as_of_date",),
    )


# --- events -> user_daily ----------------------------------------------------------------------------------------------


def history_tokens(events: DataFrame) -> DataFrame:
    """One row for each order and day, and for each other event: what the history arrays are made of.

    An order is split at midnight UTC, so that a token never holds events of two days and the history before a date is the
    same whatever comes after it.
    """
    purchase = F.col("kind") == "purchase"
    code = F.array_position(F.array(*(F.lit(kind) for kind in KINDS)), F.col("kind")).cast("int")
    return (
        events.withColumn("token", F.when(purchase, F.col("order_id")).otherwise(F.col("event_id")))
        .groupBy("user_key", F.col("event_date").alias("day"), code.alias("kind"), "token")
        .agg(
            F.min("ts").alias("ts"),
            F.coalesce(F.sum(_cents("amount")), F.lit(0)).alias("amount"),
            F.count(F.when(purchase, 1)).alias("items"),
            F.coalesce(F.sum(_cents("discount")), F.lit(0)).alias("discount"),
            F.coalesce(F.max_by("text_id", F.struct("amount", "text_id")), F.lit(0)).alias("text_id"),
        )
    )


def user_daily(events: DataFrame) -> DataFrame:
    """EVENTS -> USER_DAILY."""
    purchase = F.col("kind") == "purchase"

    def counted(kind: str) -> SparkColumn:
        return F.count_if(F.col("kind") == kind)

    lines = _with_price_position(events)
    per_day = lines.groupBy("user_key", F.col("event_date").alias("day")).agg(
        F.count_if(purchase).alias("items"),
        _total(F.when(purchase, _cents("amount"))).alias("spend"),
        _total(F.when(purchase, F.greatest(-_cents("amount"), F.lit(0)))).alias("refunds"),
        _total(_cents("discount")).alias("discount"),
        _total(_cents("coupon_discount")).alias("coupon_discount"),
        F.count_if(F.col("discount") > 0).alias("discounted_items"),
        _total(F.round(F.col("tier") * 1000).cast("long")).alias("tier_milli"),
        F.count("tier").alias("tier_items"),
        F.count_if(F.col("tier") > 0.5).alias("premium_items"),
        counted("browse").alias("browses"),
        counted("click").alias("clicks"),
        counted("cart").alias("carts"),
        counted("favourite").alias("favourites"),
        counted("coupon").alias("coupons"),
        counted("search").alias("searches"),
        counted("review").alias("reviews"),
        _total(F.round(F.col("rating") * 1000).cast("long")).alias("rating_milli"),
        _total(F.round(F.col("dwell_s") * 1000).cast("long")).alias("dwell_milli"),
    )
    return (
        per_day.join(_order_days(events), ["user_key", "day"], "left")
        .join(_category_days(events), ["user_key", "day"], "left")
        .select(*(_stored(column) for column in USER_DAILY.columns))
    )


def _cents(column: str) -> SparkColumn:
    return F.round(F.col(column).cast("double") * 100).cast("long")


def _total(column: SparkColumn) -> SparkColumn:
    return F.coalesce(F.sum(column), F.lit(0))


def _stored(column: Column) -> SparkColumn:
    """A computed column in its stored type: cents become money, a missing count becomes 0."""
    if column.type == MONEY:
        return (F.coalesce(F.col(column.name), F.lit(0)).cast("decimal(20,0)") / 100).cast(MONEY).alias(column.name)
    if column.type == "bigint":
        return F.coalesce(F.col(column.name), F.lit(0)).cast("bigint").alias(column.name)
    return F.col(column.name)


def _with_price_position(events: DataFrame) -> DataFrame:
    """Add ``tier``: z-score of the line's log unit price in its category against all days before the line's own.

    Only the past is compared with, so a tier never changes when later prices come in. NULL where fewer than 10 earlier
    lines exist or the unit price is not positive; clipped to -3..3.
    """
    price = (F.col("amount") + F.coalesce("discount", F.lit(0))).cast("double") / F.col("quantity")
    priced = (F.col("kind") == "purchase") & (F.col("quantity") > 0) & (price > 0)
    with_price = events.withColumn("micro", F.when(priced, F.round(F.ln(price) * 1e6).cast("long")))
    earlier = Window.partitionBy("category").orderBy("event_date").rowsBetween(Window.unboundedPreceding, -1)
    milli = F.col("micro") / 1000
    reference = (
        with_price.filter(F.col("micro").isNotNull() & F.col("category").isNotNull())
        .groupBy("category", "event_date")
        .agg(
            F.count("micro").alias("n"),
            F.sum("micro").alias("s"),
            F.sum(F.round(milli * milli).cast("long")).alias("q"),
        )
        .select(
            "category",
            "event_date",
            F.sum("n").over(earlier).alias("n"),
            (F.sum("s").over(earlier) / 1e6).alias("s"),
            (F.sum("q").over(earlier) / 1e6).alias("q"),
        )
        .filter(F.col("n") >= 10)
    )
    mean = F.col("s") / F.col("n")
    std = F.sqrt(F.greatest(F.col("q") / F.col("n") - mean * mean, F.lit(0.0)))
    position = (F.col("micro") / 1e6 - mean) / std
    return (
        with_price.join(reference, ["category", "event_date"], "left")
        .withColumn("tier", F.when(std > 1e-3, F.greatest(F.least(position, F.lit(3.0)), F.lit(-3.0))))
        .drop("micro", "n", "s", "q")
    )


def _order_days(events: DataFrame) -> DataFrame:
    """Per user and day: number, largest, squared sum and hours of orders."""
    hour = F.hour("ts")

    def between(first: int, last: int) -> SparkColumn:
        return F.count_if(hour.between(first, last))

    orders = history_tokens(events.filter(F.col("kind") == "purchase"))
    return orders.groupBy("user_key", "day").agg(
        F.count(F.lit(1)).alias("orders"),
        F.max("amount").alias("order_value_max"),
        F.sum(F.round((F.col("amount") / 100) * (F.col("amount") / 100)).cast("long")).alias("order_value_sq"),
        between(5, 10).alias("morning_orders"),
        between(11, 16).alias("afternoon_orders"),
        between(17, 22).alias("evening_orders"),
        F.count_if((hour >= 23) | (hour < 5)).alias("night_orders"),
    )


def _category_days(events: DataFrame) -> DataFrame:
    top_level = F.split("category", " > ")[0]
    spend = (F.sum(_cents("amount")).cast("decimal(20,0)") / 100).cast(MONEY)
    return (
        events.filter((F.col("kind") == "purchase") & (F.col("amount") > 0) & F.col("category").isNotNull())
        .groupBy("user_key", F.col("event_date").alias("day"), top_level.alias("category"))
        .agg(spend.alias("spend"))
        .groupBy("user_key", "day")
        .agg(F.map_from_entries(F.array_sort(F.collect_list(F.struct("category", "spend")))).alias("category_spend"))
    )


# --- user_daily -> user_features ---------------------------------------------------------------------------------------


def user_features(
    events: DataFrame, daily: DataFrame, as_of: Sequence[date], config: FeaturesConfig, built_from: str
) -> DataFrame:
    """Features of every user with a purchase before each as-of date, from what happened before it.

    Args:
        events: EVENTS, read for the history arrays.
        daily: USER_DAILY, read for everything else.
        built_from: identity of the inputs, stored with each row.
    """
    features = catalogue(config)
    past = _before(_in_cents(daily), as_of).transform(_with_gaps)
    aggregated = past.groupBy("user_key", "as_of_date").agg(
        *(F.expr(sql).alias(name) for name, sql in features.aggregates.items())
    )
    keys = ["user_key", "as_of_date"]
    return (
        aggregated.filter(F.col("a_tenure").isNotNull())
        .join(_category_features(past), keys, "left")
        .join(_history(events, as_of, config.history_length), keys, "left")
        .select(
            *keys,
            *(F.expr(f.expression).cast("float").alias(f.name) for f in features.features),
            *(
                F.coalesce(F.col(column.name), F.array().cast(column.type)).alias(column.name)
                for column in SEQUENCE_COLUMNS
            ),
            F.lit(built_from).alias("built_from"),
        )
    )


def _in_cents(daily: DataFrame) -> DataFrame:
    money = [column.name for column in USER_DAILY.columns if column.type == MONEY]
    return daily.withColumns({name: _cents(name) for name in money})


def _before(df: DataFrame, as_of: Sequence[date]) -> DataFrame:
    """Each row once for every as-of date after its day, with ``as_of_date`` and its ``age`` in days (>= 1)."""
    dates = F.array(*(F.lit(day) for day in sorted(as_of)))
    return df.withColumn("as_of_date", F.explode(F.filter(dates, lambda d: d > F.col("day")))).withColumn(
        "age", F.datediff("as_of_date", "day")
    )


def _with_gaps(past: DataFrame) -> DataFrame:
    """Add ``gap``: days since the user's previous purchase day, on purchase days after the first."""
    order = Window.partitionBy("user_key", "as_of_date", F.col("orders") > 0).orderBy("day")
    return past.withColumn("gap", F.when(F.col("orders") > 0, F.datediff("day", F.lag("day").over(order))))


def _category_features(past: DataFrame) -> DataFrame:
    spend = F.col("spend")
    recent = F.when(F.col("age") <= 90, spend).otherwise(0)
    bucket = F.pmod(F.xxhash64("category"), F.lit(CATEGORY_BUCKETS)).cast("int")
    totals = (
        past.filter("age <= 365")
        .select("user_key", "as_of_date", "age", F.explode("category_spend").alias("category", "money"))
        .withColumn("spend", _cents("money"))
        .groupBy("user_key", "as_of_date", "category")
        .agg(F.sum("spend").alias("spend_365"), F.sum(recent).alias("spend_90"))
        .withColumn("bucket", bucket)
    )
    ranked = "array_sort(collect_list(spend_365), (a, b) -> cast(sign(b - a) as int))"
    aggregates = [
        *(F.count_if(F.col(f"spend_{days}") > 0).alias(f"c_count_{days}") for days in (90, 365)),
        *(F.sum(f"spend_{days}").alias(f"c_total_{days}") for days in (90, 365)),
        *(F.array_sort(F.collect_list(f"spend_{days}")).alias(f"c_spends_{days}") for days in (90, 365)),
        F.expr(ranked).alias("c_ranked"),
        *(
            F.sum(F.when(F.col("bucket") == n, F.col("spend_365")).otherwise(0)).alias(f"c_bucket_{n}")
            for n in range(CATEGORY_BUCKETS)
        ),
    ]
    return (
        totals.groupBy("user_key", "as_of_date")
        .agg(*aggregates)
        .select(
            "user_key",
            "as_of_date",
            *(f"c_count_{days}" for days in (90, 365)),
            *(F.expr(_entropy(days)).alias(f"c_entropy_{days}") for days in (90, 365)),
            *(
                F.expr(_ratio(f"coalesce(get(c_ranked, {rank - 1}), 0)", "c_total_365")).alias(f"c_top_{rank}")
                for rank in (1, 2, 3)
            ),
            *(F.expr(_ratio(f"c_bucket_{n}", "c_total_365")).alias(f"c_hash_{n}") for n in range(CATEGORY_BUCKETS)),
        )
    )


def _entropy(days: int) -> str:
    # spends are sorted, so that the floating-point sum has one order
    share = _ratio("x", f"c_total_{days}")
    return f"aggregate(filter(c_spends_{days}, x -> x > 0), 0D, (s, x) -> s - {share} * ln({share}))"


def _history(events: DataFrame, as_of: Sequence[date], length: int) -> DataFrame:
    """The last ``length`` tokens of each user before each date, oldest first, as parallel arrays."""
    newest = Window.partitionBy("user_key", "as_of_date").orderBy(
        F.col("ts").desc(), F.col("kind").desc(), F.col("token").desc()
    )
    start = F.to_timestamp("as_of_date")
    age = (F.unix_micros(start) - F.unix_micros("ts")) / 86_400_000_000
    tokens = (
        _before(history_tokens(events), as_of)
        .withColumn("n", F.row_number().over(newest))
        .filter(F.col("n") <= length)
        .withColumn(
            "entry",
            F.struct(
                (-F.col("n")).alias("n"),
                F.col("kind").alias("seq_kind"),
                age.cast("float").alias("seq_age_days"),
                (F.col("amount") / 100).cast("float").alias("seq_amount"),
                F.col("items").cast("float").alias("seq_items"),
                (F.col("discount") / 100).cast("float").alias("seq_discount"),
                F.col("text_id").alias("seq_text_id"),
                (F.weekday("ts") + 1).cast("int").alias("seq_weekday"),
                F.hour("ts").cast("int").alias("seq_hour"),
            ),
        )
    )
    return (
        tokens.groupBy("user_key", "as_of_date")
        .agg(F.array_sort(F.collect_list("entry")).alias("entries"))
        .select("user_key", "as_of_date", *(F.col(f"entries.{c.name}").alias(c.name) for c in SEQUENCE_COLUMNS))
    )
