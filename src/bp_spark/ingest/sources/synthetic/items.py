"""The catalogue of items: types, price tiers, brands, titles and prices."""

from __future__ import annotations

import numpy as np
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import SyntheticConfig
from bp_spark.ingest.sources.synthetic.draws import uniform, whole
from bp_spark.ingest.sources.synthetic.text import text_money

TIER_RATIO = 1.8
"""Ratio of the prices of neighbouring tiers of a type.

A line of a tier costs at most the list price of the tier, and more than the list price over TIER_RATIO.
"""
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
"""Types of each department."""
CELLS = len(TYPES) * TIERS
"""A cell is a price tier of a type; item number i is in cell i % CELLS, with popularity rank i // CELLS in it."""
BRANDS = (
    ("Basiq", "倍实", "Valu", "惠尔", "Plainly", "朴里"), ("Homely", "家悦", "Corva", "科瓦", "Tindle", "汀朵"),
    ("Solano", "索拉诺", "Brightway", "明途", "Kestrel", "凯丝"), ("Aurelle", "奥瑞", "Northmark", "北标", "Vantis", "梵缇"),
    ("Maison Roux", "若宫", "Imperia", "帝珀", "Celestine", "天纶"),
)
"""Brands of each price tier: a brand, its Chinese name, the next brand, ..."""
STYLES = (("basic", "基础款"), ("everyday", "日常款"), ("classic", "经典款"), ("signature", "典藏款"), ("prestige", "尊享款"))
"""Style words of each price tier: English, Chinese."""
# fmt: on
HOT_ITEM = "i00000000"
"""Id of the item that ``hot_item_share`` of visits look at."""


def popular_item(config: SyntheticConfig, place: Column, hot: Column) -> Column:
    """Return an item of the row's ``type`` and ``tier``, by Zipf's law: P(rank = k) ~ log(1 + 1/k), about 1/k.

    Args:
        config: number of items, share of the hot one.
        place: uniform that selects the rank.
        hot: uniform that selects the hot item.
    """
    cell = F.col("tier") * len(TYPES) + F.col("type")
    count = F.floor((config.item_count - 1 - cell) / CELLS) + 1
    rank = F.least(F.floor(F.pow(count + 1, place)), count)
    return F.when(hot < config.hot_item_share, F.lit(0)).otherwise(((rank - 1) * CELLS + cell).cast("int"))


def item_id(item: Column) -> Column:
    """Return the id of an item from its number."""
    return F.concat(F.lit("i"), F.lpad(item.cast("string"), 8, "0"))


def list_price(config: SyntheticConfig) -> Column:
    """Return the list price of ``item`` in USD: the upper end of its tier, give or take 5 %."""
    cell = F.col("item") % CELLS
    tier, kind = whole(cell / len(TYPES)), cell % len(TYPES)
    middle = F.get(F.lit(np.array([kind[4] for kind in TYPES])), kind)
    return middle * F.pow(F.lit(TIER_RATIO), tier - (TIERS / 2 - 1)) * (0.95 + 0.1 * uniform(config, "price", "item"))


def brand(config: SyntheticConfig, chinese: Column, tier: Column) -> Column:
    """Return the brand of ``item``, by its Chinese name where ``chinese``."""
    each = len(BRANDS[0]) // 2
    names = F.lit([name for brands in BRANDS for name in brands])
    position = tier * each + whole(uniform(config, "brand", "item") * each)
    return F.get(names, 2 * position + chinese.cast("int"))


def type_name(chinese: Column) -> Column:
    """Return the name of the row's ``type``, in Chinese where ``chinese``."""
    return F.get(F.lit([name for row in TYPES for name in row[2:4]]), 2 * F.col("type") + chinese.cast("int"))


def items(spark: SparkSession, config: SyntheticConfig) -> DataFrame:
    """Return the delivered items: id, title, category, brand and price in USD."""
    item, tier = F.col("item"), F.col("tier")
    chinese = uniform(config, "title language", "item") < config.chinese_share
    style = F.get(F.lit([word for words in STYLES for word in words]), 2 * tier + chinese.cast("int"))
    words = (brand(config, chinese, tier), style, type_name(chinese), F.floor(item / CELLS) + 1)
    paths = F.lit([f"{department} > {category} > {name}" for department, category, name, *_ in TYPES])
    return (
        spark.range(config.item_count)
        .select(F.col("id").cast("int").alias("item"))
        .withColumns({"type": item % len(TYPES), "tier": whole(item % CELLS / len(TYPES))})
        .select(
            item_id(item).alias("item_id"),
            F.concat_ws(" ", *words).alias("title"),
            F.get(paths, F.col("type")).alias("category"),
            brand(config, F.lit(False), tier).alias("brand"),
            text_money(list_price(config)).alias("price"),
        )
    )
