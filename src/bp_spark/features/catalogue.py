"""``user_daily`` -> ``user_features``; the catalogue of features lives here.

Point in time: a feature for date D reads only days before D. Every sum is over whole numbers (cents, thousandths), so that
no order of addition, and so no cluster size and no rebuild, changes a feature by a bit.

A silent user's clock ticks ever slower: days of silence are kept to a few binary digits, and the user is seen as of the day
of the last tick (``seen_on``). From one tick to the next no feature changes, so neither does the score, and the night need
not compute it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from typing import Literal

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import FeaturesConfig
from bp_spark.features.aggregates import (
    SEQUENCE_COLUMNS,
    WEEKDAYS,
    Aggregate,
    Decayed,
    Largest,
    Newest,
    Oldest,
    Total,
    aggregate_days,
)
from bp_spark.lakehouse.tables import Column, Table

KEY = ["user_key", "as_of_date"]
CATEGORY_BUCKETS = 16
WEEKS = 12
FILE_ROWS = 50_000
"""Users in a file of ``user_features``: some tens of megabytes, and half a minute of one core's scoring."""


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
        group: what kind of thing it tells; reasons are given by group.
        scale: ``log`` for heavy-tailed amounts and counts (models take its signed log1p), else ``linear``.
    """

    name: str
    expression: str
    description: str
    unit: str
    window: str
    group: str
    scale: Literal["log", "linear"] = "linear"


@dataclass(frozen=True)
class Catalogue:
    """All features, with the aggregates over a user's days that their expressions read."""

    features: tuple[Feature, ...]
    aggregates: Mapping[str, Aggregate]

    @property
    def names(self) -> tuple[str, ...]:
        """Feature columns, in table order."""
        return tuple(feature.name for feature in self.features)

    @property
    def groups(self) -> dict[str, str]:
        """Feature -> group, in table order."""
        return {feature.name: feature.group for feature in self.features}


class _Builder:
    def __init__(self) -> None:
        self.features: list[Feature] = []
        self.aggregates: dict[str, Aggregate] = {}
        self.group = ""

    def total(self, measure: str, days: int) -> str:
        """Name of the sum of a daily measure over the last ``days`` days."""
        return self.aggregate(f"{measure}_in_{days}", Total(measure, days))

    def aggregate(self, name: str, aggregate: Aggregate) -> str:
        self.aggregates[f"a_{name}"] = aggregate
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
        self.features.append(Feature(name, expression, description, unit, span, self.group, scale))


def catalogue(config: FeaturesConfig) -> Catalogue:
    """All features for the configured windows."""
    b = _Builder()
    b.group = "recency, frequency, value"
    _recency_frequency_monetary(b)
    b.group = "recent purchases"
    _windows(b, config.windows)
    _decayed(b)
    b.group = "rhythm of purchases"
    _gaps(b)
    b.group = "weekly spend"
    _weekly(b)
    b.group = "order values"
    _order_values(b)
    b.group = "discounts and prices"
    _discounts_and_prices(b)
    b.group = "shopping times"
    _habits(b)
    b.group = "season"
    _season(b)
    b.group = "categories"
    _categories(b)
    b.group = "browsing and carts"
    _behaviour(b)
    b.group = "searches"
    _searches(b)
    b.group = "reviews"
    _reviews(b)
    return Catalogue(tuple(b.features), b.aggregates)


def _ratio(numerator: str, denominator: str) -> str:
    """SQL quotient; NULL where the denominator is 0 or NULL."""
    return f"try_divide({numerator}, {denominator})"


def _recency_frequency_monetary(b: _Builder) -> None:
    recency = b.aggregate("recency", Newest("orders"))
    tenure = b.aggregate("tenure", Oldest("orders"))
    days = b.aggregate("purchase_days", Total("purchase_days"))
    spend = b.aggregate("spend", Total("spend"))
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
        purchase_days = b.total("purchase_days", days)
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
            total = b.aggregate(f"{measure}_halflife_{half_life}", Decayed(measure, half_life))
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
    mean, std, longest, median, last = (f"p_{name}" for name in ("mean", "std", "max", "median", "last"))
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
        b.aggregate(f"week_{week}", Total("spend", oldest=7 * week + 7, newest=7 * week + 1)) for week in range(WEEKS)
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
    orders = b.aggregate("orders", Total("orders"))
    squares = b.aggregate("order_value_sq", Total("order_value_sq"))
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
        largest = b.aggregate(f"order_value_max_{days}", Largest("order_value_max", days))
        b.add(f"order_value_max_{days}d", f"{largest} / 100", "Largest order", "currency", days, "log")


def _discounts_and_prices(b: _Builder) -> None:
    for days in (30, 90, 365):
        spend, discount, coupon = (b.total(m, days) for m in ("spend", "discount", "coupon_discount"))
        items, refunds = b.total("items", days), b.total("refunds", days)
        gross = f"(greatest({spend}, 0) + {discount})"
        paid = f"(greatest({spend}, 0) + {refunds})"
        discounted = b.total("discounted_items", days)
        b.add(f"discount_share_{days}d", _ratio(discount, gross), "Reductions over undiscounted spend", "share", days)
        b.add(
            f"coupon_share_{days}d", _ratio(coupon, gross), "Coupon reductions over undiscounted spend", "share", days
        )
        b.add(f"discounted_items_{days}d", _ratio(discounted, items), "Lines bought at a reduction", "share", days)
        b.add(f"coupons_{days}d", b.total("coupons", days), "Coupons redeemed", "coupons", days, "log")
        b.add(f"refund_share_{days}d", _ratio(refunds, paid), "Money paid back over money paid", "share", days)
    for days in (90, 365):
        b.add(
            f"price_tier_{days}d",
            # in twentieths: every night's purchases of others move the reference a little
            f"round({_ratio(f'c_tier_{days} / 50', f'c_tiered_{days}')}) / 20",
            "Mean price position within the item's category: z-score of log unit price among all users' lines of a year",
            "z-score",
            days,
        )
    b.add(
        "premium_share_365d",
        _ratio("c_premium", "c_total_365"),
        "Share of spend in categories where the user buys half a standard deviation above the mean price",
        "share",
        365,
    )


def _habits(b: _Builder) -> None:
    span = 180
    spend = b.total("paid", span)
    for name in WEEKDAYS:
        part = b.total(f"paid_{name}", span)
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
    season = b.aggregate("same_period_last_year", Total("spend", oldest=365, newest=276))
    orders = b.aggregate("orders_same_period_last_year", Total("orders", oldest=365, newest=276))
    year = b.total("spend", 365)
    window = "276 to 365 days"
    known = "a_tenure >= 365"
    b.add(
        "spend_same_period_last_year",
        f"if({known}, {season} / 100, null)",
        "Spend in the 90 days that began a year before the as-of date",
        "currency",
        window,
        "log",
    )
    b.add(
        "orders_same_period_last_year",
        f"if({known}, {orders}, null)",
        "Orders in the 90 days that began a year before the as-of date",
        "orders",
        window,
        "log",
    )
    b.add(
        "season_share_last_year",
        f"if({known}, {_ratio(season, year)}, null)",
        "Share of the year's spend in the 90 days that began a year before the as-of date",
        "share",
        365,
    )


def _categories(b: _Builder) -> None:
    for days in (90, 365):
        b.add(f"categories_{days}d", f"c_count_{days}", "Top-level categories bought from", "categories", days, "log")
        b.add(
            f"category_entropy_{days}d",
            f"c_entropy_{days}",
            "Shannon entropy of spend over top-level categories",
            "nats",
            days,
        )
    b.add("category_types_365d", "c_types", "Full category paths bought from", "categories", 365, "log")
    for rank in (1, 2, 3):
        share = _ratio(f"coalesce(get(c_ranked, {rank - 1}), 0)", "c_total_365")
        b.add(f"category_share_top{rank}", share, f"Share of spend in the user's category number {rank}", "share", 365)
    for bucket in range(CATEGORY_BUCKETS):
        b.add(
            f"category_share_hash{bucket:02d}",
            _ratio(f"c_bucket_{bucket}", "c_total_365"),
            f"Share of spend in categories with hash {bucket} of {CATEGORY_BUCKETS} (Weinberger et al. 2009)",
            "share",
            365,
        )


def _behaviour(b: _Builder) -> None:
    for days in (30, 90):
        for measure in ("browses", "clicks", "carts", "favourites"):
            b.add(f"{measure}_{days}d", b.total(measure, days), f"{measure.capitalize()}", measure, days, "log")
        orders, carts, browses = (b.total(m, days) for m in ("orders", "carts", "browses"))
        looked, looked_bought = b.total("items_browsed", days), b.total("items_browsed_bought", days)
        carted, carted_bought = b.total("items_carted", days), b.total("items_carted_bought", days)
        b.add(f"orders_per_browse_{days}d", _ratio(orders, browses), "Orders per browse", "ratio", days, "log")
        b.add(f"orders_per_cart_{days}d", _ratio(orders, carts), "Orders per cart action", "ratio", days, "log")
        b.add(f"items_browsed_{days}d", looked, "Items looked at, counted once a day", "items", days, "log")
        b.add(
            f"browse_to_buy_{days}d",
            _ratio(looked_bought, looked),
            "Share of items looked at that were bought on the same day",
            "share",
            days,
        )
        b.add(
            f"cart_abandonment_{days}d",
            f"1 - {_ratio(carted_bought, carted)}",
            "Share of items put into the cart that were not bought on the same day",
            "share",
            days,
        )
        dwelled, dwell = b.total("dwelled", days), b.total("dwell_milli", days)
        b.add(
            f"dwell_mean_{days}d", _ratio(f"{dwell} / 1000", dwelled), "Mean length of a browse", "seconds", days, "log"
        )
        b.add(f"dwell_total_{days}d", f"{dwell} / 1000", "Time spent browsing", "seconds", days, "log")
    active = b.aggregate("activity_recency", Newest("activity"))
    b.add(
        "activity_recency_days",
        active,
        "Days since the last browse, click, cart, favourite or search",
        "days",
        "all",
        "log",
    )


def _searches(b: _Builder) -> None:
    words = {
        "cheap": "a word that asks for a low price",
        "premium": "a word that asks for high quality",
        "brand": "a brand",
    }
    for days in (30, 90):
        searches = b.total("searches", days)
        b.add(f"searches_{days}d", searches, "Searches", "searches", days, "log")
        clicked = _ratio(b.total("searches_clicked", days), searches)
        b.add(f"search_clicks_{days}d", clicked, "Share of searches with a click on a result", "share", days)
        for word, meaning in words.items():
            share = _ratio(b.total(f"searches_{word}", days), searches)
            b.add(f"{word}_searches_{days}d", share, f"Share of searches with {meaning}", "share", days)
    recency = b.aggregate("search_recency", Newest("searches"))
    b.add("search_recency_days", recency, "Days since the last search", "days", "all", "log")


def _reviews(b: _Builder) -> None:
    for days in (90, 365):
        reviews, rated, worded = (b.total(m, days) for m in ("reviews", "rated", "worded_reviews"))
        b.add(f"reviews_{days}d", reviews, "Reviews", "reviews", days, "log")
        rating = _ratio(f"{b.total('rating_milli', days)} / 1000", rated)
        b.add(f"rating_mean_{days}d", rating, "Mean rating given", "rating", days)
        low = _ratio(b.total("low_ratings", days), rated)
        b.add(f"low_ratings_{days}d", low, "Share of ratings of 2 or less", "share", days)
        sentiment = _ratio(f"{b.total('sentiment_centi', days)} / 100", worded)
        b.add(
            f"review_sentiment_{days}d",
            sentiment,
            "Mean sentiment of review texts, from complaint (-1) to praise (1), by the language model's embedding",
            "cosine",
            days,
        )
    per_order = _ratio(b.total("reviews", 365), b.total("orders", 365))
    b.add("reviews_per_order_365d", per_order, "Reviews per order", "ratio", 365, "log")


def user_features_table(config: FeaturesConfig) -> Table:
    """The table of the catalogue: a commented column for each feature, then the history as parallel arrays."""
    return Table(
        "user_features",
        "What is known of each user on as_of_date, from events before it; users with a purchase before it",
        (
            Column("user_key", "string", "User", required=True),
            Column("as_of_date", "date", "Only events before this day are seen", required=True),
            Column("seen_on", "date", "Last tick of the user's clock: as_of_date, or earlier for users long silent"),
            *(Column(f.name, "float", f"{f.description} [{f.unit}; {f.window}]") for f in catalogue(config).features),
            *SEQUENCE_COLUMNS,
            Column(
                "input_digest",
                "bigint",
                "xxhash64 of features and history: as long as it is the same, a bundle's answer is the same",
            ),
            Column(
                "built_from",
                "string",
                "Digest of the events' version, the catalogue and the code",
                required=True,
            ),
        ),
        key=("user_key", "as_of_date"),
        partition_by=("as_of_date",),
        rows_in_file=FILE_ROWS,
    )


# --- user_daily -> user_features ---------------------------------------------------------------------------------------


def user_features(
    daily: DataFrame, as_of: Sequence[date], config: FeaturesConfig, built_from: str, of: DataFrame | None = None
) -> DataFrame:
    """Features of every user with a purchase before each as-of date, from what happened before it.

    Args:
        daily: USER_DAILY.
        built_from: identity of the inputs, stored with each row.
        of: ``user_key`` of the users that are asked for; of the others only the usual prices are learned.
    """
    features = catalogue(config)
    theirs = daily if of is None else daily.join(of, "user_key", "left_semi")
    clocks = _clocks(daily, as_of, config.recency_precision_bits)
    return (
        aggregate_days(
            theirs,
            as_of,
            features.aggregates,
            recency_precision_bits=config.recency_precision_bits,
            history_length=config.history_length,
        )
        .join(_category_features(daily, clocks), KEY, "left")
        .select(
            *KEY,
            "seen_on",
            *(F.expr(f.expression).cast("float").alias(f.name) for f in features.features),
            *(column.name for column in SEQUENCE_COLUMNS),
            F.lit(built_from).alias("built_from"),
        )
        .withColumn("input_digest", input_digest(features))
    )


def input_digest(features: Catalogue) -> SparkColumn:
    """xxhash64 of the features and the history of a row of ``user_features``."""
    # xxhash64 skips NULL, so that it would not matter which of two features has none
    values = (F.coalesce(F.col(name), F.lit(float("nan")).cast("float")) for name in features.names)
    return F.xxhash64(*values, *(F.col(column.name) for column in SEQUENCE_COLUMNS))


def _clocks(daily: DataFrame, as_of: Sequence[date], digits: int | None) -> DataFrame:
    """``user_key, as_of_date, seen_on`` of each user with a day before the as-of date."""
    dates = F.array(*(F.lit(day) for day in sorted(as_of)))
    last = F.max(F.when(F.col("day") < F.col("as_of_date"), F.col("day"))).alias("last")
    days = daily.select("user_key", "day").filter(F.col("day") < F.lit(max(as_of)))
    return (
        days.withColumn("as_of_date", F.explode(dates))
        .groupBy(*KEY)
        .agg(last)
        .filter(F.col("last").isNotNull())
        .select(
            *KEY, F.expr(f"date_add(last, {quantize_recency('datediff(as_of_date, last)', digits)})").alias("seen_on")
        )
    )


def quantize_recency(days: str, digits: int | None) -> str:
    """SQL of a number of days, at least 1, of which the leading binary digits are kept and the rest are 0."""
    if digits is None:
        return days
    return f"({days} - {days} % shiftleft(1, greatest(length(bin({days})) - {digits}, 0)))"


def _before(df: DataFrame, clocks: DataFrame) -> DataFrame:
    """Each row once for every as-of date after its day, with ``as_of_date``, ``seen_on`` and its ``age`` in days (>= 1)."""
    return (
        # clocks are narrow and days are wide: hashed, neither is sorted
        df.join(clocks.hint("shuffle_hash"), "user_key")
        .filter(F.col("day") < F.col("as_of_date"))
        .withColumn("age", F.datediff("seen_on", "day"))
    )


def _category_features(daily: DataFrame, clocks: DataFrame) -> DataFrame:
    """Diversity and shares of categories, and the position of prices within them, per user and date.

    The reference of a price is what all users paid for lines of the category in the year before the as-of date: mean and
    standard deviation of the log unit price. NULL where a category has fewer than 10 such lines.
    """
    entries = (
        _before(daily.filter(F.size("categories") > 0).select("user_key", "day", "categories"), clocks)
        .filter(F.col("age") <= 365)
        .select(*KEY, "age", F.inline("categories"))
    )
    sums = ("spend", "priced", "price_micro")
    recent = F.col("age") <= 90
    by_category = entries.groupBy(*KEY, "category").agg(
        *(F.sum(name).alias(f"{name}_365") for name in sums),
        *(F.sum(F.when(recent, F.col(name)).otherwise(0)).alias(f"{name}_90") for name in sums),
        F.sum("price_sq").alias("price_sq"),
    )
    n = F.sum("priced_365")
    mean = F.try_divide(F.sum("price_micro_365") / 1e6, n)
    variance = F.try_divide(F.sum("price_sq") / 1e6, n) - mean * mean
    reference = (
        by_category.groupBy("as_of_date", "category")
        .agg(n.alias("n"), mean.alias("mean"), F.sqrt(F.greatest(variance, F.lit(0.0))).alias("std"))
        .filter((F.col("n") >= 10) & (F.col("std") > 1e-3))
        .select("as_of_date", "category", "mean", "std")
    )
    joined = by_category.join(reference, ["as_of_date", "category"], "left")
    top_level = F.split("category", " > ")[0]
    bucket = F.pmod(F.xxhash64(top_level), F.lit(CATEGORY_BUCKETS)).cast("int")
    mean, std = F.col("mean"), F.col("std")
    positions = {d: (F.col(f"price_micro_{d}") / 1e6 - F.col(f"priced_{d}") * mean) / std for d in (90, 365)}
    # rounded before they are added up: the sum is then the same in any order
    milli = {days: F.round(position * 1000).cast("long") for days, position in positions.items()}
    premium = F.col("spend_365") * (positions[365] > 0.5 * F.col("priced_365")).cast("int")
    tops = (
        joined.withColumn("bucket", bucket)
        .groupBy(*KEY, top_level.alias("top"), "bucket")
        .agg(
            F.sum("spend_365").alias("spend_365"),
            F.sum("spend_90").alias("spend_90"),
            F.count_if(F.col("spend_365") > 0).alias("types"),
            *(F.sum(value).alias(f"tier_{days}") for days, value in milli.items()),
            *(
                F.sum(F.when(F.col("std").isNotNull(), F.col(f"priced_{days}"))).alias(f"tiered_{days}")
                for days in (90, 365)
            ),
            F.sum(premium).alias("premium"),
        )
    )
    ranked = "array_sort(collect_list(spend_365), (a, b) -> cast(sign(b - a) as int))"
    return (
        tops.groupBy(*KEY)
        .agg(
            *(F.count_if(F.col(f"spend_{days}") > 0).alias(f"c_count_{days}") for days in (90, 365)),
            *(F.sum(f"spend_{days}").alias(f"c_total_{days}") for days in (90, 365)),
            *(F.array_sort(F.collect_list(f"spend_{days}")).alias(f"c_spends_{days}") for days in (90, 365)),
            F.sum("types").alias("c_types"),
            *(F.sum(f"tier_{days}").alias(f"c_tier_{days}") for days in (90, 365)),
            *(F.sum(f"tiered_{days}").alias(f"c_tiered_{days}") for days in (90, 365)),
            F.sum("premium").alias("c_premium"),
            F.expr(ranked).alias("c_ranked"),
            *(
                F.sum(F.when(F.col("bucket") == n, F.col("spend_365")).otherwise(0)).alias(f"c_bucket_{n}")
                for n in range(CATEGORY_BUCKETS)
            ),
        )
        .withColumns({f"c_entropy_{days}": F.expr(_entropy(days)) for days in (90, 365)})
    )


def _entropy(days: int) -> str:
    # spends are sorted, so that the floating-point sum has one order
    share = _ratio("x", f"c_total_{days}")
    return f"aggregate(filter(c_spends_{days}, x -> x > 0), 0D, (s, x) -> s - {share} * ln({share}))"
