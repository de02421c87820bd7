"""A whole synthetic platform of any size: files as a platform would deliver them, and the truth behind them.

In: a :class:`SyntheticConfig`. Out, under a folder: ``transactions``, ``behaviours``, ``searches``, ``reviews`` (Parquet, a
folder ``delivery_day=YYYY-MM-DD`` for each day on which the platform ships), ``items``, ``users``, ``rates`` (one delivery
each), ``source.yaml`` (the mapping with which :mod:`bp_spark.ingest.sources.files` reads them) and ``truth/`` (not for models).

The model. Each user has a latent purchasing power z ~ N(0, 1). Everything below that leans on z does so through a Gaussian
copula (Nelsen 2006), a normal score ``rho z + sqrt(1 - rho²) e`` put through the marginal's quantile function, so that the
published marginals stay exact.

- When: Pareto/NBD (Schmittlein, Morrison & Colombo 1987). While alive, orders are a Poisson process with rate
  lambda ~ Gamma(r, alpha), leaning on z; the lifetime from sign-up is exponential with rate mu ~ Gamma(s, beta). The shapes
  r and s are those estimated on CDNOW (Fader, Hardie & Lee 2005a); the scales make a busier shop. Users sign up and drop out
  between days. Weekdays, June 18, November 11 and December modulate the rate by thinning (Lewis & Shedler 1979), with mean 1
  over the period.
- How much: Gamma-Gamma (Fader, Hardie & Lee 2005b; p, q, gamma as estimated on CDNOW). An order's value is Gamma(p, nu) with
  nu ~ Gamma(q, gamma), leaning on z. It is split over 1-6 lines; a line's item is of the price tier that its value buys, so
  z shows in the tiers.
- What: a preferred department for each user; within a type and price tier, items by Zipf's law with exponent 1. Activity of
  users is heavy-tailed by the Gamma mixture above (r < 1).
- Around it: an order is a visit that converted; visits are a Poisson process with rate lambda / conversion. Visits leave
  browse, click, cart, favourite, coupon and search events; orders leave reviews and refunds. z moves conversion, coupon use,
  the price words of searches, ratings and the words of reviews.

Every draw is a hash of (seed, purpose, user, number of the visit, ...), never ``rand()``: the same configuration gives the same
rows on any cluster.

Dirt. A uniform per row of the four logs decides whether it is spoiled in one way (:data:`SPOILS`), delivered late, delivered a
second time, or neither; ``truth/dirt`` holds how many rows of each were written.

Fader, Hardie & Lee 2005a: "Counting your customers" the easy way, Marketing Science 24(2). 2005b: RFM and CLV: using
iso-value curves, Journal of Marketing Research 42(4), with the note "The Gamma-Gamma model of monetary value" (2013).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import yaml
from pyarrow import fs
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F
from scipy import special

from bp_spark.core.config import SyntheticConfig
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.stores import file_system

LOGS = ("transactions", "behaviours", "searches", "reviews")
Key = Column | str

# --- constants of the model; rates are per day, values in USD ------------------------------------------------------------
LAMBDA_SHAPE, LAMBDA_MEAN = 0.553, 11.0 / 365
"""r of Pareto/NBD, and the mean of lambda: orders per day while alive."""
MU_SHAPE, MU_SCALE_DAYS = 0.606, 300.0
"""s and beta of Pareto/NBD."""
VALUE_SHAPE, NU_SHAPE, NU_SCALE = 6.25, 3.74, 15.44
"""p, q and gamma of Gamma-Gamma; the mean order value is p gamma / (q - 1) = 35 USD."""
Z_IN_LAMBDA, Z_IN_VALUE = 0.5, 0.7
"""Correlations of the normal scores with z."""
SIGNED_UP_BEFORE, DAYS_BEFORE = 0.6, 730
WEEKDAYS = (0.9, 0.9, 0.95, 1.0, 1.1, 1.15, 1.0)
HOURS = (2, 1, 1, 1, 1, 2, 4, 6, 9, 11, 13, 13, 14, 13, 12, 12, 13, 14, 16, 19, 21, 19, 12, 6)
"""Weights of the hours of a day, from midnight UTC."""
MAX_DELAY = 30
MAX_LINES = 6
CNY_SHARE, CNY_RATE = 0.2, 0.14
"""Share of Chinese-language users who pay in CNY, and what one CNY is worth in USD, on average."""
RATE_DAYS = 30
SCORE_LIMIT, SCORE_STEPS = 6, 64
"""Quantile tables reach from -6 to 6 standard deviations, in steps of 1/64."""
TASKS_AT_LEAST = 8

TIER_RATIO = 1.8
"""A type's price tiers are geometric: a line of a tier costs at most its list price and more than that over TIER_RATIO."""
TIERS = 5
# fmt: off
TYPES: tuple[tuple[str, str, str, str, float], ...] = (
    ("Electronics", "Audio", "headphones", "耳机", 34), ("Electronics", "Audio", "speaker", "音箱", 38),
    ("Electronics", "Phones", "phone case", "手机壳", 12), ("Electronics", "Phones", "charger", "充电器", 14),
    ("Fashion", "Shoes", "running shoes", "跑步鞋", 32), ("Fashion", "Shoes", "boots", "靴子", 36),
    ("Fashion", "Clothing", "jacket", "外套", 34), ("Fashion", "Clothing", "shirt", "衬衫", 20),
    ("Home", "Kitchen", "frying pan", "煎锅", 22), ("Home", "Kitchen", "tea set", "茶具", 24),
    ("Home", "Bedroom", "pillow", "枕头", 18), ("Home", "Bedroom", "bed sheet", "床单", 22),
    ("Beauty", "Skin care", "face cream", "面霜", 18), ("Beauty", "Skin care", "sunscreen", "防晒霜", 14),
    ("Beauty", "Make-up", "lipstick", "口红", 15), ("Beauty", "Make-up", "perfume", "香水", 30),
    ("Grocery", "Drinks", "green tea", "绿茶", 10), ("Grocery", "Drinks", "coffee beans", "咖啡豆", 12),
    ("Grocery", "Snacks", "nuts", "坚果", 9), ("Grocery", "Snacks", "chocolate", "巧克力", 9),
    ("Sports", "Fitness", "yoga mat", "瑜伽垫", 18), ("Sports", "Fitness", "dumbbell", "哑铃", 24),
    ("Sports", "Outdoor", "tent", "帐篷", 40), ("Sports", "Outdoor", "backpack", "背包", 28),
)
"""Department, category, type, the type in Chinese, middle price in USD."""
PER_DEPARTMENT = 4
CELLS = len(TYPES) * TIERS
"""A cell is a price tier of a type; item number i is in cell i % CELLS, with popularity rank i // CELLS in it."""
BRANDS = (
    ("Basiq", "倍实", "Valu", "惠尔", "Plainly", "朴里"), ("Homely", "家悦", "Corva", "科瓦", "Tindle", "汀朵"),
    ("Solano", "索拉诺", "Brightway", "明途", "Kestrel", "凯丝"), ("Aurelle", "奥瑞", "Northmark", "北标", "Vantis", "梵缇"),
    ("Maison Roux", "若宫", "Imperia", "帝珀", "Celestine", "天纶"),
)
"""By price tier: a brand, its Chinese name, the next brand, ..."""
STYLES = (("basic", "基础款"), ("everyday", "日常款"), ("classic", "经典款"), ("signature", "典藏款"), ("prestige", "尊享款"))
PREMIUM_WORDS = (("premium", "luxury", "best", "designer"), ("正品", "高端", "奢华", "旗舰"))
BARGAIN_WORDS = (("cheap", "discount", "budget", "sale"), ("便宜", "优惠", "打折", "特价"))
TONES = (
    (("The {} broke after a week.", "Disappointed with this {}.", "Poor {}, not as described."),
     ("{}用了一周就坏了。", "对这个{}很失望。", "{}质量差，与描述不符。")),
    (("The {} is okay.", "An average {}, nothing special.", "The {} does its job."),
     ("{}还可以。", "{}一般，没什么特别。", "{}能用。")),
    (("Love this {}!", "Excellent {}, very happy.", "Great {}, works perfectly."),
     ("非常喜欢这个{}！", "{}质量很好，很满意。", "{}很棒，强烈推荐。")),
)
"""Sentences of reviews with rating 1-2, 3 and 4-5; English, Chinese."""
PREMIUM_ENDINGS = (
    ("Superb materials, worth every penny.", "Elegant packaging, I will buy the top model again."),
    ("用料考究，物有所值。", "包装精美，会再买高端款。"),
)
BARGAIN_ENDINGS = (
    ("Bought it on sale with a coupon.", "Fine for such a low price."),
    ("用优惠券买的，很划算。", "价格便宜，性价比高。"),
)
# fmt: on
ACTIONS = ((0.6, 1.0, "browse"), (0.35, 0.3, "click"), (0.5, 0.06, "cart"), (0.06, 0.06, "favourite"))
"""Chance that an item of an order, and of another visit, leaves the action."""
SEARCH_SHARE, SEARCH_CLICKED, REVIEW_SHARE = 0.4, 0.6, 0.15

_ALWAYS = {
    "missing_user": ("user_id", None),
    "unreadable_ts": ("ts", "31/02/2024 25:61"),
    "future_ts": ("ts", "2999-01-01 00:00:00"),
}
SPOILS: Mapping[str, Mapping[str, tuple[str, str | None]]] = {
    "transactions": {
        **_ALWAYS,
        "unreadable_amount": ("amount", "12,3O"),
        "huge_amount": ("amount", "999999999999.99"),
        "unknown_currency": ("currency", "XXX"),
        "unknown_item": ("item_id", "i-unknown"),
    },
    "behaviours": {**_ALWAYS, "unknown_action": ("action", "teleport"), "unknown_item": ("item_id", "i-unknown")},
    "searches": {**_ALWAYS, "empty_query": ("query", "  "), "broken_unicode": ("query", "caf\ufffd \x07\x1b[0m")},
    "reviews": {
        **_ALWAYS,
        "rating_out_of_range": ("rating", "11.0"),
        "broken_unicode": ("text", "\ufffd\ufffd good \x00\x1b[0m"),
        "unknown_item": ("item_id", "i-unknown"),
    },
}
"""Log -> kind of malformed row -> the column that is spoiled and what stands in it; kinds are equally likely."""
DELIVERED: Mapping[str, tuple[str, ...]] = {
    "transactions": (
        "user_id",
        "order_id",
        "line_id",
        "item_id",
        "ts",
        "quantity",
        "amount",
        "discount",
        "coupon_discount",
        "currency",
    ),
    "behaviours": ("user_id", "ts", "action", "item_id", "dwell_s"),
    "searches": ("user_id", "ts", "query", "clicked_item_id"),
    "reviews": ("user_id", "ts", "item_id", "rating", "text"),
    "items": ("item_id", "title", "category", "brand", "price"),
    "users": ("user_id", "signup_ts", "age", "income"),
    "rates": ("currency", "day", "rate"),
}
"""Columns of each table's files; all text but ``quantity`` (int) and ``dwell_s`` (double)."""


WHALE = "u-whale"
HOT_ITEM = "i00000000"


@dataclass(frozen=True)
class Summary:
    """What was written: rows of each table, rows of each (log, kind of dirt), and how long it took."""

    folder: str
    rows: Mapping[str, int]
    dirt: Mapping[tuple[str, str], int]
    seconds: float


def generate(spark: SparkSession, config: SyntheticConfig, folder: str) -> Summary:
    """Write the files of a synthetic platform.

    Args:
        folder: where to; absent or empty. A path, or an address that Spark and pyarrow know.

    Returns:
        Counts of rows and dirt, as also in ``truth/dirt`` (table, kind, rows).

    Raises:
        ConfigError: too few items for one of each type and price tier.
        DataError: the folder holds something.
    """
    started = time.monotonic()
    if config.item_count < CELLS:
        raise ConfigError(f"synthetic.items ({config.item_count}): must be {CELLS} at least, one of each type and tier")
    folder = folder.rstrip("/")
    _require_empty(folder)
    # read back, so that no optimiser computes a user's latent truth anew for each filter that follows
    _users(spark, config).write.parquet(f"{folder}/truth/users")
    users = spark.read.parquet(f"{folder}/truth/users")
    lines = _lines(_visits(users, config), config)
    make = {"transactions": _transactions, "behaviours": _behaviours, "searches": _searches, "reviews": _reviews}
    rows: dict[str, int] = {}
    dirt: dict[tuple[str, str], int] = {}
    for log in LOGS:
        if log in config.kinds:
            counts = _write_log(_soiled(make[log](lines, config), log, config), log, config, folder)
            rows[log] = counts.pop("rows")
            dirt.update({(log, kind): count for kind, count in counts.items()})
    tables = {"users": users, "rates": _rates(spark, config)}
    if "items" in config.kinds:
        tables["items"] = _items(spark, config)
    for name, df in tables.items():
        delivery = f"{folder}/{name}/delivery_day={config.first_day}"
        df.select(*DELIVERED[name]).coalesce(max(1, config.users // 1_000_000)).write.parquet(delivery)
        rows[name] = spark.read.parquet(delivery).count()
    counted = spark.createDataFrame([(*of, n) for of, n in dirt.items()], "table string, kind string, rows bigint")
    counted.coalesce(1).write.parquet(f"{folder}/truth/dirt")
    _write_text(f"{folder}/source.yaml", yaml.safe_dump(mapping(list(rows)), sort_keys=False))
    return Summary(folder, rows, dirt, time.monotonic() - started)


def mapping(tables: Sequence[str]) -> dict[str, Any]:
    """The configuration of the ``files`` source for these tables; paths are relative to the folder."""
    found: dict[str, Any] = {"timezone": "UTC"}
    for table in (name for name in DELIVERED if name in tables):
        columns: dict[str, Any] = {column: column for column in DELIVERED[table]}
        for column in ("ts", "signup_ts"):
            if column in columns:
                columns[column] = {"column": column, "format": "yyyy-MM-dd HH:mm:ss"}
        if table == "users":
            columns["segment"] = {"columns": {name: columns.pop(name) for name in ("age", "income")}}
        found[table] = {"path": f"{table}/*/*.parquet", "format": "parquet", "columns": columns}
    return found


# --- draws ---------------------------------------------------------------------------------------------------------------


def _uniform(config: SyntheticConfig, purpose: str, *key: Key) -> Column:
    """Uniform on (0, 1), the same for the same seed, purpose and key: 52 bits of a hash."""
    bits = F.shiftrightunsigned(F.xxhash64(F.lit(f"{config.seed}/{purpose}"), *key), 12)
    return (bits.cast("double") + 0.5) / 2.0**52


def _normal(config: SyntheticConfig, purpose: str, *key: Key) -> Column:
    """Standard normal (Box & Muller 1958)."""
    radius = F.sqrt(-2.0 * F.log(_uniform(config, f"{purpose} radius", *key)))
    return radius * F.cos(2 * math.pi * _uniform(config, f"{purpose} angle", *key))


def _gamma(shape: float, score: Column) -> Column:
    """Gamma(shape, 1) at the quantile of a normal score, by a table of log quantiles that is interpolated linearly."""
    grid = np.linspace(-SCORE_LIMIT, SCORE_LIMIT, 2 * SCORE_LIMIT * SCORE_STEPS + 1)
    # from the nearer tail: 1 - p has no digits left where p is close to 1
    lower, upper = special.gammaincinv(shape, special.ndtr(grid)), special.gammainccinv(shape, special.ndtr(-grid))
    logs = np.log(np.where(grid < 0, lower, upper))
    bounded = F.greatest(F.least(score, F.lit(SCORE_LIMIT - 1e-9)), F.lit(-float(SCORE_LIMIT)))
    position = (bounded + SCORE_LIMIT) * SCORE_STEPS
    below = F.floor(position).cast("int")
    low, high = F.get(F.lit(logs), below), F.get(F.lit(logs), below + 1)
    return F.exp(low + (position - below) * (high - low))


def _poisson(mean: Column, uniform: Column, normal: Column) -> Column:
    """Poisson counts by inversion; beyond a mean of 50 by the normal approximation."""
    small = F.least(mean, F.lit(50.0))
    p0 = F.exp(-small)
    start = F.struct(p0.alias("p"), p0.alias("below"), F.lit(0).alias("n"))

    def step(found: Column, k: Column) -> Column:
        p = found["p"] * small / k
        more = F.struct(p.alias("p"), (found["below"] + p).alias("below"), (found["n"] + 1).alias("n"))
        return F.when(found["below"] < uniform, more).otherwise(found)

    most = F.ceil(small + 7 * F.sqrt(small) + 8).cast("int")
    inverted = F.aggregate(F.sequence(F.lit(1), most), start, step)["n"]
    approximate = F.floor(mean + F.sqrt(mean) * normal + 0.5).cast("int")
    return F.when(mean > 50, F.greatest(approximate, F.lit(0))).otherwise(inverted)


def _sigmoid(x: Column) -> Column:
    return 1 / (1 + F.exp(-x))


def _whole(x: Column) -> Column:
    return F.floor(x).cast("int")


def _pick(words: Sequence[str], uniform: Column) -> Column:
    return F.get(F.lit(list(words)), _whole(uniform * len(words)))


def _pick_in(language: Column, words: Sequence[Sequence[str]], uniform: Column) -> Column:
    """A word of ``words[1]`` (Chinese) where ``language``, else of ``words[0]``."""
    return F.when(language, _pick(words[1], uniform)).otherwise(_pick(words[0], uniform))


# --- users, visits, visited items ----------------------------------------------------------------------------------------


def _users(spark: SparkSession, config: SyntheticConfig) -> DataFrame:
    """The latent truth, one row per user; rates per day, money in USD, days counted from the first one of the period.

    ``lambda``, ``mu``, ``mean_value`` and ``conversion`` (orders per visit) as above; signed up on ``signup_day``; alive in the
    period for ``alive_days`` from ``first_alive_day`` on; ``candidates``: visits before thinning; ``expected_spend_90d``: of 90
    days alive, before refunds.
    """

    def u(purpose: str) -> Column:
        return _uniform(config, purpose, "id")

    def leaning(purpose: str, rho: float) -> Column:
        return rho * F.col("z") + math.sqrt(1 - rho**2) * _normal(config, purpose, "id")

    recent = u("signed up before") >= SIGNED_UP_BEFORE
    since = F.when(recent, _whole(u("signup") * config.days)).otherwise(-1 - _whole(u("signup") * DAYS_BEFORE))
    lifetime = F.least(F.ceil(-F.log(u("lifetime")) / F.col("mu")), F.lit(10_000_000)).cast("int")
    last = F.least(F.col("signup_day") + lifetime, F.lit(config.days))
    low, high = (F.col("income_score") < bound for bound in (-0.43, 0.43))
    visits = F.col("lambda") / F.col("conversion") * F.col("alive_days") * float(season(config).max())
    return (
        spark.range(0, config.users, 1, max(TASKS_AT_LEAST, config.users // 100_000))
        .withColumns(
            {
                "user_id": F.concat(F.lit("u"), F.lpad(F.col("id").cast("string"), 9, "0")),
                "z": _normal(config, "z", "id"),
                "mu": _gamma(MU_SHAPE, _normal(config, "mu", "id")) / MU_SCALE_DAYS,
                "signup_day": since,
                "chinese": u("language") < config.chinese_share,
                "department": _whole(u("department") * (len(TYPES) // PER_DEPARTMENT)),
                "age": _pick(("18-24", "25-34", "35-44", "45-54", "55-64", "65+"), u("age")),
            }
        )
        .withColumns(
            {
                "lambda": _gamma(LAMBDA_SHAPE, leaning("lambda", Z_IN_LAMBDA)) * (LAMBDA_MEAN / LAMBDA_SHAPE),
                # values fall with nu: the low half of its scores makes the high half of values
                "mean_value": VALUE_SHAPE * NU_SCALE / _gamma(NU_SHAPE, -leaning("nu", Z_IN_VALUE)),
                "conversion": 0.15 + 0.5 * _sigmoid(0.5 * F.col("z") + _normal(config, "conversion", "id")),
                "cny": F.col("chinese") & (u("currency") < CNY_SHARE),
                "income_score": leaning("income", 0.6),
                "first_alive_day": F.greatest(F.col("signup_day"), F.lit(0)),
                "signup_ts": _text_time(config, F.col("signup_day"), _whole(u("signup time") * 86400)),
            }
        )
        .withColumns(
            {
                "alive_days": F.greatest(last - F.col("first_alive_day"), F.lit(0)),
                "income": F.when(low, "low").when(high, "middle").otherwise("high"),
                "expected_spend_90d": 90 * F.col("lambda") * F.col("mean_value"),
            }
        )
        .withColumn("candidates", _poisson(visits, u("visits"), _normal(config, "visits", "id")))
        .drop("income_score")
    )


def season(config: SyntheticConfig) -> np.ndarray:
    """Relative activity of each day of the period, float64 ``(days,)`` with mean 1."""
    weights = np.empty(config.days)
    for number in range(config.days):
        day = config.first_day + timedelta(number)
        weights[number] = WEEKDAYS[day.weekday()] * (1.3 if day.month == 12 and day.day <= 24 else 1.0)
        for month, peak in ((6, 18), (11, 11)):
            if day.month == month and peak - 3 <= day.day <= peak:
                weights[number] *= 2.2 if day.day == peak else 1.5
    return weights / weights.mean()


def _visits(users: DataFrame, config: SyntheticConfig) -> DataFrame:
    """One row per visit: the user's columns, ``visit`` (its number), ``day``, ``second`` of it, ``bought``, ``value`` (USD)."""
    key = ("id", "visit")
    weights = season(config)
    hours = F.lit(np.repeat(np.arange(24), HOURS).astype("int32"))
    hour = F.get(hours, _whole(_uniform(config, "hour", *key) * sum(HOURS)))
    kept = _uniform(config, "thinning", *key) * float(weights.max()) < F.get(F.lit(weights), F.col("day"))
    return (
        users.repartition(max(TASKS_AT_LEAST, config.users // 25_000), "id")
        .filter("candidates > 0")
        .withColumn("visit", F.explode(F.sequence(F.lit(1), F.col("candidates"))))
        .withColumn("day", F.col("first_alive_day") + _whole(_uniform(config, "day", *key) * F.col("alive_days")))
        .filter(kept)
        .withColumns(
            {
                "second": hour * 3600 + _whole(_uniform(config, "second", *key) * 3600),
                "bought": _uniform(config, "bought", *key) < F.col("conversion"),
                "value": F.col("mean_value") * _gamma(VALUE_SHAPE, _normal(config, "value", *key)) / VALUE_SHAPE,
            }
        )
    )


def _lines(visits: DataFrame, config: SyntheticConfig) -> DataFrame:
    """One row per item of a visit; where ``bought``, an order line.

    Adds ``line`` (from 1), ``type``, ``tier``, ``item``, ``quantity``, ``paid``, ``discount`` and ``coupon`` (USD).
    """
    key = ("id", "visit", "line")

    def u(purpose: str) -> Column:
        return _uniform(config, purpose, *key)

    most = F.when(F.col("bought"), MAX_LINES).otherwise(3)
    wanted = 1 + _whole(-F.log(_uniform(config, "lines", "id", "visit")) * F.when(F.col("bought"), 1.6).otherwise(0.6))
    shares = F.transform(
        F.sequence(F.lit(1), F.least(wanted, most)),
        lambda line: 0.3 - F.log(_uniform(config, "share", "id", "visit", line)),
    )
    own = F.col("department") * PER_DEPARTMENT + _whole(u("own type") * PER_DEPARTMENT)
    several = F.when(u("several") < 0.15, 2 + _whole(u("how many") * 3)).otherwise(1)
    price, dearest = F.lit(np.array([kind[4] for kind in TYPES])), TIER_RATIO ** (TIERS / 2)
    middle = F.get(price, F.col("type"))
    tier = _whole(F.log(F.col("paid") / F.col("quantity") / middle) / math.log(TIER_RATIO) + TIERS / 2)
    promoted = u("promotion") < 0.4
    reduction = F.greatest(F.col("quantity") * _list_price(config) - F.col("paid"), F.lit(0.0))
    coupon = u("coupon") < _sigmoid(-0.5 - 0.8 * F.col("z"))
    return (
        visits.withColumn("shares", shares)
        .withColumn("total", F.aggregate("shares", F.lit(0.0), lambda total, share: total + share))
        .select("*", F.posexplode("shares").alias("position", "share"))
        .drop("shares")
        .withColumn("line", F.col("position") + 1)
        .withColumns(
            {
                "type": F.when(u("own department") < 0.5, own).otherwise(_whole(u("type") ** 1.5 * len(TYPES))),
                "paid": F.greatest(F.col("value") * F.col("share") / F.col("total"), F.lit(0.5)),
            }
        )
        .withColumn("quantity", F.greatest(several, F.ceil(F.col("paid") / (middle * dearest)).cast("int")))
        .withColumn("tier", F.least(F.greatest(tier, F.lit(0)), F.lit(TIERS - 1)))
        .withColumn("item", _popular_item(config, u("item"), u("hot")))
        .withColumn("discount", F.when(F.col("bought") & promoted, reduction).otherwise(0.0))
        .withColumn("coupon", F.when(coupon, F.col("discount") / 2).otherwise(0.0))
    )


def _popular_item(config: SyntheticConfig, uniform: Column, hot: Column) -> Column:
    """An item of the row's ``type`` and ``tier``: by Zipf's law, P(rank = k) ~ log(1 + 1/k), about 1/k."""
    cell = F.col("tier") * len(TYPES) + F.col("type")
    count = F.floor((config.item_count - 1 - cell) / CELLS) + 1
    rank = F.least(F.floor(F.pow(count + 1, uniform)), count)
    return F.when(hot < config.hot_item_share, F.lit(0)).otherwise(((rank - 1) * CELLS + cell).cast("int"))


# --- items, rates --------------------------------------------------------------------------------------------------------


def _item_id(item: Column) -> Column:
    return F.concat(F.lit("i"), F.lpad(item.cast("string"), 8, "0"))


def _list_price(config: SyntheticConfig) -> Column:
    """List price in USD of ``item``: the upper end of its tier, give or take 5 %."""
    cell = F.col("item") % CELLS
    tier, kind = _whole(cell / len(TYPES)), cell % len(TYPES)
    middle = F.get(F.lit(np.array([kind[4] for kind in TYPES])), kind)
    return middle * F.pow(F.lit(TIER_RATIO), tier - (TIERS / 2 - 1)) * (0.95 + 0.1 * _uniform(config, "price", "item"))


def _brand(config: SyntheticConfig, chinese: Column, tier: Column) -> Column:
    """The brand of ``item``, by its Chinese name where ``chinese``."""
    each = len(BRANDS[0]) // 2
    names = F.lit([name for brands in BRANDS for name in brands])
    position = tier * each + _whole(_uniform(config, "brand", "item") * each)
    return F.get(names, 2 * position + chinese.cast("int"))


def _type_name(chinese: Column) -> Column:
    return F.get(F.lit([name for row in TYPES for name in row[2:4]]), 2 * F.col("type") + chinese.cast("int"))


def _items(spark: SparkSession, config: SyntheticConfig) -> DataFrame:
    item, tier = F.col("item"), F.col("tier")
    chinese = _uniform(config, "title language", "item") < config.chinese_share
    style = F.get(F.lit([word for words in STYLES for word in words]), 2 * tier + chinese.cast("int"))
    words = (_brand(config, chinese, tier), style, _type_name(chinese), F.floor(item / CELLS) + 1)
    paths = F.lit([f"{department} > {category} > {name}" for department, category, name, *_ in TYPES])
    return (
        spark.range(config.item_count)
        .select(F.col("id").cast("int").alias("item"))
        .withColumns({"type": item % len(TYPES), "tier": _whole(item % CELLS / len(TYPES))})
        .select(
            _item_id(item).alias("item_id"),
            F.concat_ws(" ", *words).alias("title"),
            F.get(paths, F.col("type")).alias("category"),
            _brand(config, F.lit(False), tier).alias("brand"),
            _money(_list_price(config)).alias("price"),
        )
    )


def _cny_rates(config: SyntheticConfig) -> list[float]:
    """Worth in USD of one CNY in each 30 days of the period and of the deliveries after it."""
    return [round(CNY_RATE * (1 + 0.03 * math.sin(n)), 8) for n in range((config.days + MAX_DELAY) // RATE_DAYS + 1)]


def _rates(spark: SparkSession, config: SyntheticConfig) -> DataFrame:
    days = [config.first_day + timedelta(n * RATE_DAYS) for n in range(len(_cny_rates(config)))]
    rows = [("CNY", str(day), f"{rate:.8f}") for day, rate in zip(days, _cny_rates(config), strict=True)]
    return spark.createDataFrame(rows, "currency string, day string, rate string")


# --- logs: the delivered columns, ``day`` of the event, ``key`` of the row ------------------------------------------------


def _text_time(config: SyntheticConfig, day: Column, second: Column) -> Column:
    # by a timestamp without zone: the text does not depend on the session's time zone
    midnight = F.date_add(F.lit(config.first_day), day).cast("timestamp_ntz")
    return (midnight + F.make_dt_interval(secs=second)).cast("string")


def _money(value: Column) -> Column:
    return value.cast("decimal(18,2)").cast("string")


def _before(share: Column) -> Column:
    """A second up to an hour before the visit's order, on the same day; ``share`` of the way back."""
    return F.col("second") - _whole(share * F.least(F.col("second"), F.lit(3600)))


def _transactions(lines: DataFrame, config: SyntheticConfig) -> DataFrame:
    key = ("id", "visit", "line")
    delay = 1 + _whole(_uniform(config, "refund delay", *key) * 14)
    refunded = _uniform(config, "refund", *key) < config.refund_rate
    worth = F.get(F.lit(np.array(_cny_rates(config))), _whole(F.col("day") / RATE_DAYS))
    to_currency = F.when(F.col("cny"), 1 / worth).otherwise(1.0)
    refund, sign = F.col("after") > 0, F.when(F.col("after") > 0, -1.0).otherwise(1.0)
    return (
        lines.filter("bought")
        .withColumn("factor", to_currency)
        .withColumn("after", F.explode(F.when(refunded, F.array(F.lit(0), delay)).otherwise(F.array(F.lit(0)))))
        .filter(F.col("day") + F.col("after") < config.days)
        .select(
            "user_id",
            F.concat_ws("-", F.lit("o"), F.col("id"), F.col("visit")).alias("order_id"),
            F.concat(F.col("line"), F.when(refund, "R").otherwise("")).alias("line_id"),
            _item_id(F.col("item")).alias("item_id"),
            _text_time(config, F.col("day") + F.col("after"), F.col("second")).alias("ts"),
            F.when(refund, -F.col("quantity")).otherwise(F.col("quantity")).alias("quantity"),
            _money(F.col("paid") * F.col("factor") * sign).alias("amount"),
            _money(F.when(refund, 0.0).otherwise(F.col("discount") * F.col("factor"))).alias("discount"),
            _money(F.when(refund, 0.0).otherwise(F.col("coupon") * F.col("factor"))).alias("coupon_discount"),
            F.when(F.col("cny"), "CNY").otherwise("USD").alias("currency"),
            (F.col("day") + F.col("after")).alias("day"),
            F.xxhash64("id", "visit", "line", "after").alias("key"),
        )
    )


def _behaviours(lines: DataFrame, config: SyntheticConfig) -> DataFrame:
    key = ("id", "visit", "line")
    chosen = [
        F.when(_uniform(config, action, *key) < F.when(F.col("bought"), of_order).otherwise(of_visit), F.lit(action))
        for of_order, of_visit, action in ACTIONS
    ]
    redeemed = F.when(F.col("coupon") >= 0.01, F.lit("coupon"))
    # browse is furthest from the order, coupon next to it
    order = F.get(F.lit([0.8, 0.5, 0.3, 0.2, 0.0]), F.col("step"))
    own = ("id", "visit", "line", "step")
    dwell = F.round(F.exp(3.0 + 0.8 * _normal(config, "dwell", *own)), 1)
    found = (
        lines.select("*", F.posexplode(F.array(*chosen, redeemed)).alias("step", "action"))
        .filter("action IS NOT NULL")
        .select(
            "user_id",
            _text_time(config, F.col("day"), _before(order + 0.1 * _uniform(config, "offset", *own))).alias("ts"),
            "action",
            _item_id(F.col("item")).alias("item_id"),
            F.when(F.col("action") == "browse", dwell).alias("dwell_s"),
            "day",
            F.xxhash64(*own).alias("key"),
        )
    )
    return found.unionByName(_whale(found.sparkSession, config)) if config.whale_events else found


def _whale(spark: SparkSession, config: SyntheticConfig) -> DataFrame:
    """A robot that is logged in as one user and browses."""

    def u(purpose: str) -> Column:
        return _uniform(config, f"whale {purpose}", "id")

    return (
        spark.range(0, config.whale_events, 1, max(2, config.whale_events // 1_000_000))
        .withColumn("day", _whole(u("day") * config.days))
        .select(
            F.lit(WHALE).alias("user_id"),
            _text_time(config, F.col("day"), _whole(u("second") * 86400)).alias("ts"),
            F.lit("browse").alias("action"),
            _item_id(_whole(u("item") * config.item_count)).alias("item_id"),
            F.round(0.2 + u("dwell"), 2).alias("dwell_s"),
            "day",
            F.xxhash64(F.lit("whale"), "id").alias("key"),
        )
    )


def _searches(lines: DataFrame, config: SyntheticConfig) -> DataFrame:
    key = ("id", "visit")

    def u(purpose: str) -> Column:
        return _uniform(config, f"search {purpose}", *key)

    chinese = F.col("chinese")
    premium = u("premium") < _sigmoid(1.5 * F.col("z"))
    price_word = F.when(premium, _pick_in(chinese, PREMIUM_WORDS, u("word"))).otherwise(
        _pick_in(chinese, BARGAIN_WORDS, u("word"))
    )
    brand = _brand(config, chinese, F.col("tier"))
    words = (
        F.when(u("has price word") < 0.5, price_word),
        F.when(u("has brand") < 0.3, brand),
        _type_name(chinese),
    )
    return lines.filter((F.col("line") == 1) & (u("made") < SEARCH_SHARE)).select(
        "user_id",
        _text_time(config, F.col("day"), _before(0.9 + 0.1 * u("offset"))).alias("ts"),
        F.when(chinese, F.concat_ws("", *words)).otherwise(F.concat_ws(" ", *words)).alias("query"),
        F.when(u("clicked") < SEARCH_CLICKED, _item_id(F.col("item"))).alias("clicked_item_id"),
        "day",
        F.xxhash64(*key).alias("key"),
    )


def _reviews(lines: DataFrame, config: SyntheticConfig) -> DataFrame:
    key = ("id", "visit", "line")

    def u(purpose: str) -> Column:
        return _uniform(config, f"review {purpose}", *key)

    chinese = F.col("chinese")
    opinion = F.round(3.9 + 0.4 * F.col("z") + _normal(config, "rating", *key)).cast("int")
    low, middle, high = (_pick_in(chinese, words, u("sentence")) for words in TONES)
    sentence = F.when(F.col("stars") <= 2, low).when(F.col("stars") == 3, middle).otherwise(high)
    premium = u("premium") < _sigmoid(1.5 * F.col("z"))
    ending = F.when(premium, _pick_in(chinese, PREMIUM_ENDINGS, u("ending"))).otherwise(
        _pick_in(chinese, BARGAIN_ENDINGS, u("ending"))
    )
    words = (F.replace(sentence, F.lit("{}"), _type_name(chinese)), F.when(u("has ending") < 0.6, ending))
    return (
        lines.filter(F.col("bought") & (u("made") < REVIEW_SHARE))
        .withColumn("day", F.col("day") + 1 + _whole(u("delay") * 20))
        .filter(F.col("day") < config.days)
        .withColumn("stars", F.least(F.greatest(opinion, F.lit(1)), F.lit(5)))
        .select(
            "user_id",
            _text_time(config, F.col("day"), _whole(u("second") * 86400)).alias("ts"),
            _item_id(F.col("item")).alias("item_id"),
            F.col("stars").cast("double").cast("string").alias("rating"),
            F.concat_ws(" ", *words).alias("text"),
            "day",
            F.xxhash64(*key).alias("key"),
        )
    )


# --- dirt and files ------------------------------------------------------------------------------------------------------


def _soiled(df: DataFrame, log: str, config: SyntheticConfig) -> DataFrame:
    """The rows as delivered: ``delivery_day`` and ``dirt`` (its kind, or NULL) beside the columns of the file."""
    kinds = list(SPOILS[log])
    u = _uniform(config, f"dirt of {log}", "key")
    late = config.malformed_rate + config.late_rate
    twice = late + config.duplicate_rate
    dirt = (
        F.when(u < config.malformed_rate, _pick(kinds, _uniform(config, f"spoil of {log}", "key")))
        .when(u < late, F.lit("late"))
        .when(u < twice, F.lit("duplicate"))
    )
    delay = 1 + _whole(_uniform(config, f"delay of {log}", "key") * MAX_DELAY)
    delays = (
        F.when(F.col("dirt") == "late", F.array(delay))
        .when(F.col("dirt") == "duplicate", F.array(F.lit(0), delay))
        .otherwise(F.array(F.lit(0)))
    )
    spoiled = {name: F.col(name) for name in DELIVERED[log]}
    for kind, (column, value) in SPOILS[log].items():
        spoiled[column] = F.when(F.col("dirt") == kind, F.lit(value)).otherwise(spoiled[column])
    first_of_two = (F.col("dirt") == "duplicate") & (F.col("delay") == 0)
    return (
        df.withColumn("dirt", dirt)
        .withColumn("delay", F.explode(delays))
        .select(
            *(value.alias(name) for name, value in spoiled.items()),
            F.date_add(F.lit(config.first_day), F.col("day") + F.col("delay")).alias("delivery_day"),
            F.when(first_of_two, None).otherwise(F.col("dirt")).alias("dirt"),
        )
    )


def _write_log(df: DataFrame, log: str, config: SyntheticConfig, folder: str) -> dict[str, int]:
    """Write a log by delivery day; returns its ``rows`` and the rows of each kind of dirt."""
    kinds = (*SPOILS[log], "late", "duplicate")
    counted = [F.count_if(F.coalesce(F.col("dirt") == kind, F.lit(False))).alias(kind) for kind in kinds]
    counts = Observation(log)
    (
        # a day in one task, a large day in several: else every task would leave a file for every day (without adaptive
        # execution, which splits and joins tasks by size, Spark ignores the hint)
        df.hint("rebalance", "delivery_day")
        # counted behind the shuffle: a retried task before it would count twice
        .observe(counts, F.count(F.lit(1)).alias("rows"), *counted)
        .drop("dirt")
        .write.partitionBy("delivery_day")
        .option("maxRecordsPerFile", 5_000_000)
        .parquet(f"{folder}/{log}")
    )
    return {name: int(count) for name, count in counts.get.items()}


def _require_empty(folder: str) -> None:
    files, path = file_system(folder)
    there = files.get_file_info(path)
    if there.is_file or files.get_file_info(fs.FileSelector(path, allow_not_found=True)):
        raise DataError(folder, "must be absent or an empty folder: nothing is overwritten")


def _write_text(address: str, text: str) -> None:
    files, path = file_system(address)
    with files.open_output_stream(path) as stream:
        stream.write(text.encode())
