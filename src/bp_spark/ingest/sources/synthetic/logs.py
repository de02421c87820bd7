"""The logs: what visits leave behind. Each row has the delivered columns, the ``day`` of the event and a ``key``."""

from __future__ import annotations

import numpy as np
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import SyntheticConfig
from bp_spark.ingest.sources.synthetic.currency import RATE_DAYS, cny_rates
from bp_spark.ingest.sources.synthetic.draws import normal, sigmoid, uniform, whole
from bp_spark.ingest.sources.synthetic.items import brand, item_id, type_name
from bp_spark.ingest.sources.synthetic.text import pick, pick_in, text_money, text_time

Words = tuple[tuple[str, ...], tuple[str, ...]]
"""Words in English, and in Chinese."""
# fmt: off
PREMIUM_WORDS = (("premium", "luxury", "best", "designer"), ("正品", "高端", "奢华", "旗舰"))
BARGAIN_WORDS = (("cheap", "discount", "budget", "sale"), ("便宜", "优惠", "打折", "特价"))
"""Price words of searches: English, Chinese."""
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
QUESTIONS = (
    ("delivery", ("When will the {} arrive?", "Can I have the {} by Friday?"), ("{}什么时候到？", "周五前能收到{}吗？")),
    ("return", ("How can I return the {}?", "The {} does not fit, what now?"), ("{}怎么退货？", "{}不合适，怎么办？")),
    ("advice", ("Which {} do you recommend?", "What do others say about this {}?"), ("推荐哪款{}？", "这款{}口碑怎么样？")),
)
"""Topic of a consultation, and what users ask: English, Chinese."""
PREMIUM_WISHES = (
    ("Quality matters more to me than the price.", "Do you have a finer one, of genuine materials?"),
    ("质量比价格重要。", "有没有更高档、用料更好的？"),
)
BARGAIN_WISHES = (
    ("I am looking for the lowest price.", "Is there a coupon for it?"),
    ("想要最便宜的。", "有优惠券吗？"),
)
# fmt: on
ACTIONS = ((0.6, 1.0, "browse"), (0.35, 0.3, "click"), (0.5, 0.06, "cart"), (0.06, 0.06, "favourite"))
"""Chances that an item of an order, and of another visit, leaves the action."""
REDEEMED_FROM = 0.01
"""Least worth in USD of a coupon that is redeemed."""
SEARCH_SHARE, SEARCH_CLICKED, WITH_PRICE_WORD, WITH_BRAND = 0.4, 0.6, 0.5, 0.3
"""Share of visits with a search; shares of searches with a click, a price word, a brand."""
REVIEW_SHARE, WITH_ENDING = 0.15, 0.6
"""Share of order lines with a review, and of reviews with a second sentence."""
CONSULTED, WITH_TOPIC, WITH_WISH, SOLVED = 0.1, 0.5, 0.6, 0.8
"""Shares of visits with a consultation; of consultations with a topic, with a second sentence, with an answer."""
LOW_STARS, MIDDLE_STARS = 2, 3
"""Ratings up to which a review complains, and at which it is neutral."""
WHALE = "u-whale"
"""User who leaves ``whale_events`` browse events."""


def _before(share: Column) -> Column:
    """Return a second up to an hour before the visit's order, on the same day; ``share`` of the way back."""
    return F.col("second") - whole(share * F.least(F.col("second"), F.lit(3600)))


def _words_of_power(
    config: SyntheticConfig, premium_words: Words, bargain_words: Words, premium: Column, word: Column
) -> Column:
    """Return words of quality, or of low prices, by the user's purchasing power and language.

    Args:
        config: how much words tell.
        premium_words: words of quality: English, Chinese.
        bargain_words: words of low prices: English, Chinese.
        premium: uniform that decides between the two.
        word: uniform that selects the word.
    """
    of_quality, of_price = (pick_in(F.col("chinese"), each, word) for each in (premium_words, bargain_words))
    return F.when(premium < sigmoid(config.words_of_power * F.col("z")), of_quality).otherwise(of_price)


def transactions(lines: DataFrame, config: SyntheticConfig) -> DataFrame:
    """Return a row per order line, and one per refund on a later day."""
    key = ("id", "visit", "line")
    delay = 1 + whole(uniform(config, "refund delay", *key) * 14)
    spread = config.refund_spread
    own_rate = config.refund_rate * F.exp(spread * normal(config, "refunds", "id") - spread**2 / 2)
    is_refunded = uniform(config, "refund", *key) < own_rate
    worth = F.get(F.lit(np.array(cny_rates(config))), whole(F.col("day") / RATE_DAYS))
    to_currency = F.when(F.col("cny"), 1 / worth).otherwise(1.0)
    is_refund = F.col("after") > 0
    sign = F.when(is_refund, -1.0).otherwise(1.0)
    return (
        lines.filter("bought")
        .withColumn("factor", to_currency)
        .withColumn("after", F.explode(F.when(is_refunded, F.array(F.lit(0), delay)).otherwise(F.array(F.lit(0)))))
        .filter(F.col("day") + F.col("after") < config.days)
        .select(
            "user_id",
            F.concat_ws("-", F.lit("o"), F.col("id"), F.col("visit")).alias("order_id"),
            F.concat(F.col("line"), F.when(is_refund, "R").otherwise("")).alias("line_id"),
            item_id(F.col("item")).alias("item_id"),
            text_time(config, F.col("day") + F.col("after"), F.col("second")).alias("ts"),
            F.when(is_refund, -F.col("quantity")).otherwise(F.col("quantity")).alias("quantity"),
            text_money(F.col("paid") * F.col("factor") * sign).alias("amount"),
            text_money(F.when(is_refund, 0.0).otherwise(F.col("discount") * F.col("factor"))).alias("discount"),
            text_money(F.when(is_refund, 0.0).otherwise(F.col("coupon") * F.col("factor"))).alias("coupon_discount"),
            F.when(F.col("cny"), "CNY").otherwise("USD").alias("currency"),
            (F.col("day") + F.col("after")).alias("day"),
            F.xxhash64("id", "visit", "line", "after").alias("key"),
        )
    )


def behaviours(lines: DataFrame, config: SyntheticConfig) -> DataFrame:
    """Return a row per browse, click, cart, favourite and redeemed coupon, with those of the whale."""
    key = ("id", "visit", "line")
    actions = [
        F.when(uniform(config, action, *key) < F.when(F.col("bought"), of_order).otherwise(of_visit), F.lit(action))
        for of_order, of_visit, action in ACTIONS
    ]
    redeemed = F.when(F.col("coupon") >= REDEEMED_FROM, F.lit("coupon"))
    # browse is furthest from the order, coupon next to it
    distance = F.get(F.lit([0.8, 0.5, 0.3, 0.2, 0.0]), F.col("step"))
    own = ("id", "visit", "line", "step")
    dwell = F.round(F.exp(3.0 + 0.8 * normal(config, "dwell", *own)), 1)
    rows = (
        lines.select("*", F.posexplode(F.array(*actions, redeemed)).alias("step", "action"))
        .filter("action IS NOT NULL")
        .select(
            "user_id",
            text_time(config, F.col("day"), _before(distance + 0.1 * uniform(config, "offset", *own))).alias("ts"),
            "action",
            item_id(F.col("item")).alias("item_id"),
            F.when(F.col("action") == "browse", dwell).alias("dwell_s"),
            "day",
            F.xxhash64(*own).alias("key"),
        )
    )
    return rows.unionByName(_whale(rows.sparkSession, config)) if config.whale_events else rows


def _whale(spark: SparkSession, config: SyntheticConfig) -> DataFrame:
    """Return the events of a robot that is logged in as one user and browses."""

    def u(purpose: str) -> Column:
        return uniform(config, f"whale {purpose}", "id")

    return (
        spark.range(0, config.whale_events, 1, max(2, config.whale_events // 1_000_000))
        .withColumn("day", whole(u("day") * config.days))
        .select(
            F.lit(WHALE).alias("user_id"),
            text_time(config, F.col("day"), whole(u("second") * 86400)).alias("ts"),
            F.lit("browse").alias("action"),
            item_id(whole(u("item") * config.item_count)).alias("item_id"),
            F.round(0.2 + u("dwell"), 2).alias("dwell_s"),
            "day",
            F.xxhash64(F.lit("whale"), "id").alias("key"),
        )
    )


def searches(lines: DataFrame, config: SyntheticConfig) -> DataFrame:
    """Return a row per search; a visit has at most one."""
    key = ("id", "visit")

    def u(purpose: str) -> Column:
        return uniform(config, f"search {purpose}", *key)

    chinese = F.col("chinese")
    price_word = _words_of_power(config, PREMIUM_WORDS, BARGAIN_WORDS, u("premium"), u("word"))
    words = (
        F.when(u("has price word") < WITH_PRICE_WORD, price_word),
        F.when(u("has brand") < WITH_BRAND, brand(config, chinese, F.col("tier"))),
        type_name(chinese),
    )
    return lines.filter((F.col("line") == 1) & (u("made") < SEARCH_SHARE)).select(
        "user_id",
        text_time(config, F.col("day"), _before(0.9 + 0.1 * u("offset"))).alias("ts"),
        F.when(chinese, F.concat_ws("", *words)).otherwise(F.concat_ws(" ", *words)).alias("query"),
        F.when(u("clicked") < SEARCH_CLICKED, item_id(F.col("item"))).alias("clicked_item_id"),
        "day",
        F.xxhash64(*key).alias("key"),
    )


def reviews(lines: DataFrame, config: SyntheticConfig) -> DataFrame:
    """Return a row per review, 1 to 20 days after the order."""
    key = ("id", "visit", "line")

    def u(purpose: str) -> Column:
        return uniform(config, f"review {purpose}", *key)

    chinese = F.col("chinese")
    opinion = F.round(3.9 + 0.4 * F.col("z") + normal(config, "rating", *key)).cast("int")
    low, middle, high = (pick_in(chinese, words, u("sentence")) for words in TONES)
    sentence = F.when(F.col("stars") <= LOW_STARS, low).when(F.col("stars") == MIDDLE_STARS, middle).otherwise(high)
    ending = _words_of_power(config, PREMIUM_ENDINGS, BARGAIN_ENDINGS, u("premium"), u("ending"))
    words = (F.replace(sentence, F.lit("{}"), type_name(chinese)), F.when(u("has ending") < WITH_ENDING, ending))
    return (
        lines.filter(F.col("bought") & (u("made") < REVIEW_SHARE))
        .withColumn("day", F.col("day") + 1 + whole(u("delay") * 20))
        .filter(F.col("day") < config.days)
        .withColumn("stars", F.least(F.greatest(opinion, F.lit(1)), F.lit(5)))
        .select(
            "user_id",
            text_time(config, F.col("day"), whole(u("second") * 86400)).alias("ts"),
            item_id(F.col("item")).alias("item_id"),
            F.col("stars").cast("double").cast("string").alias("rating"),
            F.concat_ws(" ", *words).alias("text"),
            "day",
            F.xxhash64(*key).alias("key"),
        )
    )


def consultations(lines: DataFrame, config: SyntheticConfig) -> DataFrame:
    """Return a row per consultation, up to 6 days after the visit that it is about; a visit has at most one."""
    key = ("id", "visit")

    def u(purpose: str) -> Column:
        return uniform(config, f"consultation {purpose}", *key)

    chinese, topic = F.col("chinese"), whole(u("topic") * len(QUESTIONS))
    asked = F.coalesce(*(F.when(topic == n, pick_in(chinese, q[1:], u("question"))) for n, q in enumerate(QUESTIONS)))
    wish = _words_of_power(config, PREMIUM_WISHES, BARGAIN_WISHES, u("premium"), u("wish"))
    words = (F.replace(asked, F.lit("{}"), type_name(chinese)), F.when(u("has wish") < WITH_WISH, wish))
    return (
        lines.filter((F.col("line") == 1) & (u("made") < CONSULTED))
        .withColumn("day", F.col("day") + whole(u("delay") * 7))
        .filter(F.col("day") < config.days)
        .select(
            "user_id",
            text_time(config, F.col("day"), whole(u("second") * 86400)).alias("ts"),
            pick(("chat", "telephone", "e-mail"), u("channel")).alias("channel"),
            F.when(u("has topic") < WITH_TOPIC, F.get(F.lit([name for name, *_ in QUESTIONS]), topic)).alias("topic"),
            F.concat_ws(" ", *words).alias("text"),
            (u("solved") < SOLVED).cast("string").alias("solved"),
            "day",
            F.xxhash64(*key).alias("key"),
        )
    )
