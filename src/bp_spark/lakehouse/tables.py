"""Every table of the platform: name, columns with their comments, key and partitioning; and the lakehouse that holds them.

In: a DataFrame and a :class:`Table`. Out: a Delta table whose rows of one date (or all rows) were replaced in one commit.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pyarrow import fs
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, StructField, StructType

from bp_spark.core.config import TablesConfig
from bp_spark.core.errors import ConflictError, DataError, OccupiedError
from bp_spark.core.session import is_connect, with_settings
from bp_spark.core.spark_errors import SPARK_ERRORS, translate
from bp_spark.core.stores import UNREACHABLE, file_system, folder_of
from bp_spark.core.version import __version__
from bp_spark.lakehouse import footers, leftovers

_NOTES_SEARCHED = 100
_COMMITS_SINCE = 20
_TRANSACTIONS = "bp-spark"
"""Delta's ``txnAppId`` of this package's writes; a commit whose ``txnVersion`` is not above the table's is none."""
_CREATION_S = 10
"""How long a table's folder may be there before its first commit."""
_NO_TABLE = re.compile("DELTA_TABLE_NOT_FOUND|DELTA_MISSING_DELTA_TABLE|DELTA_PATH_DOES_NOT_EXIST|PATH_NOT_FOUND")
_LOG_ENTRY = re.compile(r"(\d{20})\.(?:json|checkpoint\..*parquet)")
_LISTED_VALUES = 200
_CLUSTER_COLUMNS = 4
"""The most columns that Delta clusters a table by."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Column:
    """One column: name, SQL type, meaning; ``required`` columns are NOT NULL in Delta."""

    name: str
    type: str
    comment: str
    required: bool = False


@dataclass(frozen=True)
class Table:
    """One table: what a row is, its columns, the columns that identify a row, the columns it is partitioned by; whether Delta
    keeps a feed of its changes, for stages that follow only these; and the date column by whose month its files are kept
    apart, so that those of other months are neither read nor written: ``month`` is added to what is written."""

    name: str
    comment: str
    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()
    partition_by: tuple[str, ...] = ()
    change_feed: bool = False
    month_of: str = ""
    skipped_by: tuple[str, ...] = ()
    rows_in_file: int | None = None

    @cached_property
    def schema(self) -> StructType:
        """The Spark schema, comments included."""
        return _schema(self.columns)

    @cached_property
    def stored_columns(self) -> tuple[Column, ...]:
        """Columns as the table has them: the month, too, by which it is partitioned."""
        return (*self.columns, _MONTH) if self.month_of else self.columns

    @cached_property
    def stored_schema(self) -> StructType:
        """The Spark schema of them."""
        return _schema(self.stored_columns)


def _schema(columns: Sequence[Column]) -> StructType:
    return StructType(
        [StructField(c.name, DataType.fromDDL(c.type), not c.required, {"comment": c.comment}) for c in columns]
    )


_MONTH = Column(
    "month", "date", "First day of the month: files hold one each, so that those of others need not be read"
)


def _columns(*rows: tuple[str, str, str]) -> tuple[Column, ...]:
    """Columns from (name, type, comment); a type that ends in ``!`` is required."""
    return tuple(Column(name, kind.rstrip("!"), comment, kind.endswith("!")) for name, kind, comment in rows)


# --- the raw contract: what a platform brings ---------------------------------------------------------------------------

_DELIVERED = (
    ("delivery", "string", "File or batch the row came in"),
    ("unreadable", "map<string,string>", "Values that are not of their column's type, as delivered"),
)
_INGESTED = (
    ("ingest_id", "bigint!", "Number of the ingest that brought the row, from 1"),
    ("ingested_at", "timestamp!", "Time of that ingest, UTC"),
)
INGEST_COLUMNS = tuple(name for name, _, _ in _INGESTED)
"""Columns of raw tables that the ingest adds; sources bring the others."""

RAW_TRANSACTIONS = Table(
    "raw_transactions",
    "Order lines as the platform delivered them",
    _columns(
        ("user_key", "string", "User; NULL where the platform gave no id"),
        ("order_id", "string", "Order (basket) the line belongs to"),
        ("line_id", "string", "Identity of the line in its order, where the platform has one"),
        ("item_id", "string", "Item bought"),
        ("ts", "timestamp", "Time of the order, UTC"),
        ("quantity", "double", "Units, pieces, litres: as the platform counts the item"),
        ("amount", "decimal(18,2)", "Money paid for the line after discounts; negative for a refund"),
        ("discount", "decimal(18,2)", "Price reduction already taken off the amount"),
        ("coupon_discount", "decimal(18,2)", "Part of the reductions that came from coupons"),
        ("currency", "string", "ISO 4217 code"),
        *_DELIVERED,
        *_INGESTED,
    ),
    partition_by=("ingest_id",),
)
RAW_BEHAVIOURS = Table(
    "raw_behaviours",
    "Browse, click, cart, favourite and coupon actions as delivered",
    _columns(
        ("user_key", "string", "User; NULL where the platform gave no id"),
        ("ts", "timestamp", "Time of the action, UTC"),
        ("action", "string", "browse, click, cart, favourite or coupon"),
        ("item_id", "string", "Item acted on, if any"),
        ("dwell_s", "double", "Seconds spent, if measured"),
        *_DELIVERED,
        *_INGESTED,
    ),
    partition_by=("ingest_id",),
)
RAW_SEARCHES = Table(
    "raw_searches",
    "Searches as delivered",
    _columns(
        ("user_key", "string", "User; NULL where the platform gave no id"),
        ("ts", "timestamp", "Time of the search, UTC"),
        ("query", "string", "What the user typed"),
        ("clicked_item_id", "string", "Item clicked in the results, if any"),
        *_DELIVERED,
        *_INGESTED,
    ),
    partition_by=("ingest_id",),
)
RAW_REVIEWS = Table(
    "raw_reviews",
    "Reviews as delivered",
    _columns(
        ("user_key", "string", "User; NULL where the platform gave no id"),
        ("ts", "timestamp", "Time of the review, UTC"),
        ("item_id", "string", "Item reviewed"),
        ("rating", "double", "Rating on the platform's scale"),
        ("text", "string", "What the user wrote"),
        *_DELIVERED,
        *_INGESTED,
    ),
    partition_by=("ingest_id",),
)
RAW_ITEMS = Table(
    "raw_items",
    "Items as delivered",
    _columns(
        ("item_id", "string", "Item"),
        ("title", "string", "What the item is called"),
        ("category", "string", "Category path from broad to narrow, joined by ' > '"),
        ("brand", "string", "Brand"),
        ("price", "decimal(18,2)", "List price, if known"),
        *_DELIVERED,
        *_INGESTED,
    ),
    partition_by=("ingest_id",),
)
RAW_USERS = Table(
    "raw_users",
    "What the platform knows of users beside events; for fairness reports only, never a feature",
    _columns(
        ("user_key", "string", "User; NULL where the platform gave no id"),
        ("signup_ts", "timestamp", "Time of registration, UTC"),
        ("segment", "map<string,string>", "Segment name to value, as income or age bracket"),
        *_DELIVERED,
        *_INGESTED,
    ),
    partition_by=("ingest_id",),
)
RAW_RATES = Table(
    "raw_rates",
    "Exchange rates as delivered",
    _columns(
        ("currency", "string", "ISO 4217 code"),
        ("day", "date", "Day from which the rate holds"),
        ("rate", "decimal(18,8)", "What one unit is worth in the platform's currency"),
        *_DELIVERED,
        *_INGESTED,
    ),
    partition_by=("ingest_id",),
)
RAW_LOGS = (RAW_TRANSACTIONS, RAW_BEHAVIOURS, RAW_SEARCHES, RAW_REVIEWS)
"""Tables of events: each of their rows ends in events, duplicates or quarantine."""
RAW_TABLES = (*RAW_LOGS, RAW_ITEMS, RAW_USERS, RAW_RATES)

# --- what the stages make ----------------------------------------------------------------------------------------------

KINDS = ("purchase", "browse", "click", "cart", "favourite", "coupon", "search", "review")
"""Kinds of events; a kind's position, from 1, is its code in ``seq_kind``."""

USER_KEYS = Table(
    "user_keys",
    "Which user has which key: the only table with user ids",
    _columns(
        ("user_id", "string!", "Platform's user id, without surrounding spaces"),
        ("user_key", "string!", "HMAC-SHA256 of user_id by the secret, hexadecimal"),
        ("key_id", "string!", "Tells which secret that was"),
        ("ingest_id", "bigint!", "First ingest that brought the user"),
    ),
    key=("user_key",),
    skipped_by=("key_id",),
)
FORGOTTEN = Table(
    "forgotten",
    "Users who were erased: rows of theirs that are delivered later are left out. Nobody's id or key can be told from it",
    _columns(
        ("key_hash", "string!", "SHA-256 of the user's key"),
        ("key_id", "string!", "Tells which secret the key was made with"),
        ("known", "boolean!", "Whether anybody had the id when it was given to forget"),
        ("forgotten_at", "timestamp!", "When that was, UTC"),
    ),
    key=("key_hash",),
)
DELIVERIES = Table(
    "deliveries",
    "Files that were ingested; a file with the same fingerprint is never read again",
    _columns(
        ("source", "string!", "Digest of the source's settings"),
        ("table", "string!", "Raw table that its rows went to"),
        ("name", "string!", "What the platform calls it"),
        ("fingerprint", "string!", "Changes when its content does"),
        ("ingest_id", "bigint!", "Number of the ingest that read it, from 1"),
    ),
    key=("source", "table", "name", "fingerprint"),
)
EVENTS = Table(
    "events",
    "One log of everything users did; a refund is a purchase with a negative amount",
    _columns(
        ("event_id", "string!", "SHA-256 of the event's identity: the same delivery twice is one event"),
        ("user_key", "string!", "User"),
        ("ts", "timestamp!", "Time, UTC"),
        ("event_date", "date!", "UTC day of ts"),
        ("kind", "string!", "purchase, browse, click, cart, favourite, coupon, search or review"),
        ("order_id", "string", "Order of a purchase"),
        ("item_id", "string", "Item"),
        ("category", "string", "Category path of the item, from broad to narrow, as known when the event came in"),
        ("text_id", "bigint", "Normalised text of the item, query or review, in texts"),
        ("amount", "decimal(18,2)", "Money paid, in the platform's currency; negative for a refund"),
        ("quantity", "double", "Units of a purchase"),
        ("discount", "decimal(18,2)", "Reduction already taken off the amount"),
        ("coupon_discount", "decimal(18,2)", "Part of the reduction that came from coupons"),
        ("rating", "double", "Rating of a review"),
        ("dwell_s", "double", "Seconds of a browse, if measured"),
        ("ingest_id", "bigint!", "First ingest that brought it"),
    ),
    key=("event_id",),
    change_feed=True,
    partition_by=("month",),
    month_of="event_date",
    skipped_by=("event_date",),
)
QUARANTINE = Table(
    "quarantine",
    "Rows that broke a rule, whole, with the reason",
    _columns(
        ("source", "string!", "Raw table the row came from"),
        ("rule", "string!", "First rule it broke"),
        ("row", "string!", "The raw row as JSON"),
        ("ingest_id", "bigint!", "Ingest that brought it"),
    ),
    partition_by=("ingest_id",),
)
TEXTS = Table(
    "texts",
    "Each distinct normalised text once, with the words in it that tell of price",
    _columns(
        ("text_id", "bigint!", "xxhash64 of the text"),
        ("text", "string!", "Normalised text"),
        ("ingest_id", "bigint!", "First ingest that brought it"),
        ("cheap_words", "int!", "Words that ask for a low price"),
        ("premium_words", "int!", "Words that ask for high quality"),
        ("brand_words", "int!", "Names of brands that were known by that ingest"),
    ),
    key=("text_id",),
)
TEXT_EMBEDDINGS = Table(
    "text_embeddings",
    "What the language model made of each text; a text is read once per model",
    _columns(
        ("text_id", "bigint!", "Text, in texts"),
        ("model_digest", "string!", "Digest of the language model's files and settings"),
        ("embedding", "array<float>!", "Mean-pooled, length-normalised vector"),
        ("sentiment", "float!", "Nearer to praise (up to 1) or to complaint (down to -1)"),
    ),
    key=("text_id", "model_digest"),
)
TOKEN = "struct<ts:timestamp,kind:int,amount:bigint,items:bigint,discount:bigint,text_id:bigint>"  # noqa: S105
CATEGORY_DAY = "struct<category:string,spend:bigint,priced:bigint,price_micro:bigint,price_sq:bigint>"
USER_DAILY = Table(
    "user_daily",
    "What each user did on each day: the pre-aggregates from which every window is built",
    _columns(
        ("user_key", "string!", "User"),
        ("day", "date!", "UTC day"),
        ("orders", "bigint!", "Orders; a refund is none, nor is an order of which nothing was paid"),
        ("items", "bigint!", "Lines of them, without refunds"),
        ("spend", "decimal(18,2)!", "Money paid less refunds"),
        ("refunds", "decimal(18,2)!", "Money paid back, positive"),
        ("discount", "decimal(18,2)!", "Reductions"),
        ("coupon_discount", "decimal(18,2)!", "Reductions from coupons"),
        ("discounted_items", "bigint!", "Order lines with a reduction"),
        ("order_value_max", "decimal(18,2)!", "Largest order"),
        ("order_value_sq", "bigint!", "Sum of squared order values, each square rounded to a whole number"),
        ("morning_orders", "bigint!", "Orders from 05:00 to 10:59 UTC"),
        ("afternoon_orders", "bigint!", "Orders from 11:00 to 16:59 UTC"),
        ("evening_orders", "bigint!", "Orders from 17:00 to 22:59 UTC"),
        ("night_orders", "bigint!", "Orders from 23:00 to 04:59 UTC"),
        ("browses", "bigint!", "Browse actions"),
        ("clicks", "bigint!", "Click actions"),
        ("carts", "bigint!", "Cart actions"),
        ("favourites", "bigint!", "Favourite actions"),
        ("coupons", "bigint!", "Coupons redeemed"),
        ("dwelled", "bigint!", "Browse actions of measured length"),
        ("dwell_milli", "bigint!", "Milliseconds of them"),
        ("items_browsed", "bigint!", "Distinct items browsed, clicked or marked as favourite"),
        ("items_browsed_bought", "bigint!", "Those of them bought on the same day"),
        ("items_carted", "bigint!", "Distinct items put into the cart"),
        ("items_carted_bought", "bigint!", "Those of them bought on the same day"),
        ("searches", "bigint!", "Searches"),
        ("searches_clicked", "bigint!", "Searches with a click on a result"),
        ("searches_cheap", "bigint!", "Searches with a word that asks for a low price"),
        ("searches_premium", "bigint!", "Searches with a word that asks for high quality"),
        ("searches_brand", "bigint!", "Searches that name a brand"),
        ("reviews", "bigint!", "Reviews"),
        ("rated", "bigint!", "Reviews with a rating"),
        ("rating_milli", "bigint!", "Sum of 1000 x rating"),
        ("low_ratings", "bigint!", "Ratings of 2 or less"),
        ("worded_reviews", "bigint!", "Reviews with a text"),
        ("sentiment_centi", "bigint!", "Sum over them of 100 x sentiment"),
        (
            "categories",
            f"array<{CATEGORY_DAY}>!",
            "By category path: positive spend in cents; priced lines, sum and sum of squares of their log unit price "
            "(in millionths, and in squared thousandths)",
        ),
        ("tokens", f"array<{TOKEN}>!", "The day's last orders and other events, oldest first; money in cents"),
    ),
    key=("user_key", "day"),
    partition_by=("month",),
    month_of="day",
    skipped_by=("day",),
)
SCORES = Table(
    "scores",
    "Purchasing power of each user, as predicted on score_date",
    _columns(
        ("user_key", "string!", "User"),
        ("score_date", "date!", "The prediction sees only events before this day"),
        ("expected_spend", "double!", "Expected spend over the bundle's horizon, in the platform's currency"),
        ("low", "double!", "Lower end of the 90 % prediction interval"),
        ("high", "double!", "Upper end of the 90 % prediction interval"),
        ("p_active", "double!", "Probability of any spend in the horizon"),
        ("score", "double!", "Percentile 0-100 of expected_spend in the bundle's reference population"),
        ("level", "string!", "A (score >= 80), B, C, D, E (score < 20)"),
        ("risk_level", "string!", "low, medium or high: how wide the interval is for the expected spend"),
        (
            "expected_by_horizon",
            "map<int,double>",
            "Days -> expected spend over so many days; the bundle's horizon has expected_spend, a longer one never less than a "
            "shorter one",
        ),
        ("base_spend", "double", "Expected spend of whom nothing is known: what reasons count from"),
        (
            "reasons",
            "array<struct<group:string,contribution:double,feature:string,value:double>>!",
            "The groups of features that moved expected_spend most: by how much money, and the feature that did most of it, "
            "none for the order and content of recent events",
        ),
        (
            "other_reasons",
            "double",
            "What all other groups came to: base_spend + contributions + other_reasons = expected_spend",
        ),
        ("bundle_digest", "string!", "Model bundle that made the row"),
        ("input_digest", "bigint", "input_digest of the user's features"),
        (
            "computed_on",
            "date",
            "Night that computed the score: earlier than score_date where the same features gave it then",
        ),
        ("run_id", "string", "Run that computed the score, in runs"),
        ("features_version", "bigint!", "Delta version of user_features that was read then"),
        ("code_version", "string!", "Version of bp-spark then"),
        ("scored_at", "timestamp!", "When that was, UTC"),
    ),
    key=("user_key", "score_date"),
    partition_by=("score_date",),
)
SCORES_LATEST = Table("scores_latest", "The rows of scores of the newest score_date", SCORES.columns, key=("user_key",))
CATEGORY_AFFINITY = Table(
    "category_affinity",
    "For recommendation: the categories that each user is most interested in, and how easily each is afforded",
    _columns(
        ("user_key", "string!", "User"),
        ("score_date", "date!", "Only events before this day are seen"),
        ("rank", "int!", "Place of the category among the user's, by fit, from 1"),
        ("category", "string!", "Category path, cut to profiles.category_levels levels"),
        (
            "affinity",
            "double!",
            "Interest in it, 0-1: weighted, recency-weighted share of purchases, clicks and searches",
        ),
        (
            "affordability",
            "double",
            "0-1: budget / (budget + price) of the user's usual order and what the user would pay for a unit there; 0.5 where "
            "these are equal; NULL where the category has no usual price",
        ),
        ("fit", "double!", "affinity x affordability, of which an unknown one counts as 0.5"),
        ("purchase_share", "double!", "Recency-weighted share of the user's spend, 0-1"),
        (
            "click_share",
            "double!",
            "Recency-weighted share of the user's browse, click, cart and favourite actions, 0-1",
        ),
        ("search_share", "double!", "Recency-weighted share of the user's searches with a click on a result, 0-1"),
        (
            "usual_price",
            "double",
            "Geometric mean of all users' unit prices there, in the platform's currency; NULL where fewer than "
            "privacy.smallest_group bought",
        ),
    ),
    key=("user_key", "category"),
)
RISK_REASON = "struct<signal:string,value:double,points:int>"
USER_PROFILE = Table(
    "user_profile",
    "What is known of each user on the newest scored date, for people to read; docs/profiles.md defines each part",
    _columns(
        ("user_key", "string!", "User"),
        ("score_date", "date!", "Only events before this day are seen"),
        ("score", "double!", "Purchasing-power score 0-100, as in scores"),
        ("level", "string!", "A (score >= 80), B, C, D, E (score < 20)"),
        ("expected_spend", "double!", "Expected spend over the bundle's horizon, in the platform's currency"),
        ("low", "double!", "Lower end of the 90 % prediction interval"),
        ("high", "double!", "Upper end of the 90 % prediction interval"),
        ("p_active", "double!", "Probability of any spend in the horizon"),
        ("reasons", "array<string>!", "Why that much is expected, in words, what moved it most first"),
        ("compared_30d", "date", "Scored date nearest to 30 days before, a week off at most; NULL: there is none"),
        ("score_change_30d", "double", "Score less that of compared_30d; NULL: the user had none then"),
        (
            "trend_30d",
            "string",
            "rising, steady or falling (by profiles.trend_points), or new: no score on compared_30d; NULL without that",
        ),
        ("compared_90d", "date", "Scored date nearest to 90 days before, a week off at most; NULL: there is none"),
        ("score_change_90d", "double", "Score less that of compared_90d; NULL: the user had none then"),
        (
            "trend_90d",
            "string",
            "rising, steady or falling (by profiles.trend_points), or new: no score on compared_90d; NULL without that",
        ),
        (
            "interests",
            "array<struct<category:string,weight:double>>!",
            "Categories of most interest, greatest weight first: the affinity of category_affinity",
        ),
        ("price_tier", "string", "budget, standard or premium, by price_position; NULL: no price can be placed"),
        (
            "price_position",
            "double",
            "Mean position of the year's prices within their categories: z-score of log unit price among all users",
        ),
        ("activity", "string!", "active, cooling or dormant, by the days since the last purchase or visit"),
        ("days_since_purchase", "int", "Days since the last purchase"),
        (
            "days_since_visit",
            "int",
            "Days since the last browse, click, cart, favourite or search; NULL: none was seen",
        ),
        ("purchase_days", "int", "Days with a purchase, ever"),
        ("usual_gap_days", "double", "Mean days between purchase days; NULL: one such day"),
        ("usual_order_value", "double", "Mean spend of a purchase day, in the platform's currency"),
        ("refund_share", "double", "Money paid back over money paid, 365 days; NULL: none was paid"),
        ("discount_share", "double", "Reductions over undiscounted spend, 90 days; NULL: no spend"),
        ("low_rating_share", "double", "Share of ratings of 2 or less, 365 days; NULL: no rating"),
        (
            "spend_volatility",
            "double",
            "Standard deviation over mean of weekly spend, 12 weeks; NULL: no spend in them",
        ),
        ("interval_width", "double!", "Width of the prediction interval over the expected spend"),
        (
            "risk_level",
            "string!",
            "low (risk_points 0-1), medium (2-3) or high (4-6); scores.risk_level, the interval's width alone, is one signal",
        ),
        ("risk_points", "int!", "Points of the three signals, each 0 to 2, together"),
        (
            "risk_reasons",
            f"array<{RISK_REASON}>!",
            "Signals with points: interval (interval_width), refunds (refund_share), volatility (spend_volatility)",
        ),
        (
            "next_purchase_days",
            "double",
            "Days from score_date to the next purchase, in expectation (gamma-Poisson); NULL: see next_purchase_unknown",
        ),
        ("next_purchase_on", "date", "score_date and so many days, rounded"),
        (
            "next_purchase_unknown",
            "string",
            "Why no next purchase is expected: one purchase day, or unlikely to buy; NULL where it is",
        ),
    ),
    key=("user_key",),
)
RISK_CONTROL = Table(
    "risk_control",
    "For risk control: how risky it is to count on each user's spend, and why",
    _columns(
        ("user_key", "string!", "User"),
        ("score_date", "date!", "Only events before this day are seen"),
        ("risk_band", "string!", "low, medium or high: risk_level of user_profile"),
        ("risk_points", "int!", "Points of the three signals, each 0 to 2, together"),
        (
            "reasons",
            "array<struct<signal:string,value:double,points:int,text:string>>!",
            "Signals with points, most first: which, its value, its points, and in words",
        ),
        ("level", "string!", "A to E, as in scores"),
        ("expected_spend", "double!", "Expected spend over the bundle's horizon, in the platform's currency"),
        ("low", "double!", "Lower end of the 90 % prediction interval: what can be counted on"),
        ("p_active", "double!", "Probability of any spend in the horizon"),
    ),
    key=("user_key",),
)
CUSTOMER_SERVICE = Table(
    "customer_service",
    "For customer service: how each user is to be served, and what to speak of",
    _columns(
        ("user_key", "string!", "User"),
        ("score_date", "date!", "Only events before this day are seen"),
        ("service_tier", "string!", "premier, preferred, standard or win_back, by level, activity and risk"),
        (
            "talking_points",
            "array<struct<topic:string,text:string>>!",
            "What to speak of, most important first, three at most: topic and words (profiles.phrases)",
        ),
        ("level", "string!", "A to E, as in scores"),
        ("activity", "string!", "active, cooling or dormant, as in user_profile"),
        ("risk_level", "string!", "low, medium or high, as in user_profile"),
    ),
    key=("user_key",),
)
MARKET_SEGMENTS = Table(
    "market_segments",
    "For market analysis: users by level, top category and region; no row stands for fewer than privacy.smallest_group users, "
    "for small cells are merged into rows named other (docs/profiles.md)",
    _columns(
        ("score_date", "date!", "Only events before this day are seen"),
        ("level", "string!", "A to E, as in scores; other: several"),
        ("category", "string!", "Broadest level of the users' first interest; none: no interest; other: several"),
        ("region", "string!", "Region; unknown: not known of these users; all: none is configured; other: several"),
        ("users", "bigint!", "Users; over all rows each user is counted once"),
        ("mean_score", "double!", "Their mean score"),
        ("mean_expected_spend", "double!", "Their mean expected spend, in the platform's currency"),
        ("mean_p_active", "double!", "Their mean probability of any spend in the horizon"),
    ),
    key=("level", "category", "region"),
)
PROFILE_TABLES = (CATEGORY_AFFINITY, USER_PROFILE, RISK_CONTROL, CUSTOMER_SERVICE, MARKET_SEGMENTS)
"""What is made from the newest scores, in the order in which it is written."""
RUNS = Table(
    "runs",
    "What ran, on what, with which figures",
    _columns(
        ("run_id", "string!", "Run: one call of a job"),
        ("job", "string", "What was called: featurize, train, score, ..."),
        (
            "stage",
            "string!",
            "ingest, clean, featurize, label, score, ...; the job's name for an error between two stages",
        ),
        ("started_at", "timestamp!", "Start, UTC"),
        ("seconds", "double!", "Duration"),
        ("status", "string!", "done, unchanged or failed"),
        ("error", "string", "Why it failed, in one line"),
        ("rows_in", "bigint", "Rows it worked on, where it counts them"),
        ("rows_out", "bigint", "Rows it came to, where it counts them"),
        ("read", "map<string,bigint>", "Table -> Delta version, of what was read since the stage before"),
        ("written", "map<string,bigint>", "Table -> Delta version that it wrote"),
        ("inputs", "string", "Digest of what the stage read: the same digest, the same result"),
        ("code_version", "string!", "Version of bp-spark"),
        ("config_digest", "string", "Digest of all settings of the run"),
        ("figures", "map<string,string>", "Other results"),
    ),
    key=("run_id", "stage"),
)
METRICS = Table(
    "metrics",
    "How good each trained bundle and its members are",
    _columns(
        ("run_id", "string!", "Training run"),
        ("bundle_digest", "string!", "Bundle; one that was fitted anew has the figures of the one that was judged"),
        ("test_date", "date!", "Evaluation date; what was judged was not trained on the horizon after it"),
        ("population", "string!", "all, seen or unseen users"),
        (
            "member",
            "string!",
            "linear, btyd, trees, sqrt_trees, transformer or fused; fused_30d and transformer_30d are of 30 days' spend",
        ),
        ("metric", "string!", "Name of the figure"),
        ("value", "double", "Figure"),
        ("users", "bigint!", "Users it was computed over"),
    ),
    key=("run_id", "population", "member", "metric"),
)
BACKTESTS = Table(
    "backtests",
    "How good the pipeline would have been at past dates, and how sure that is",
    _columns(
        ("backtest_id", "string!", "Backtest; its report's folder bears the name"),
        ("run_id", "string!", "Training run at the test date"),
        ("test_date", "date!", "Evaluation date; models were trained on what was known by then"),
        ("population", "string!", "all, seen or unseen users, or the segment whose bracket scores were held against"),
        ("member", "string!", "linear, btyd, trees, transformer, mean of trees and transformer, or fused"),
        ("peer", "string", "NULL for the member's own figure; else value is the member's figure less the peer's"),
        ("metric", "string!", "Name of the figure"),
        ("value", "double", "Figure"),
        ("low", "double", "Lower end of its 90 % bootstrap interval, users drawn anew (percentile method)"),
        ("high", "double", "Upper end"),
        ("better", "double", "Share of resamples in which the member is better than the peer, ties half"),
        ("resamples", "int!", "Resamples behind the interval"),
        ("users", "bigint!", "Users it was computed over"),
    ),
    key=("backtest_id", "test_date", "population", "member", "peer", "metric"),
)
TRIALS = Table(
    "trials",
    "What a search for better settings tried",
    _columns(
        ("run_id", "string!", "Run of the search"),
        ("test_date", "date!", "Nothing from this day on was seen"),
        ("trial", "int!", "Number of the trial, from 0: the settings as they were"),
        ("settings", "map<string,string>", "Settings that were tried"),
        ("metric", "string!", "Name of the figure that was searched for"),
        ("value", "double", "Figure of the fused prediction of users out of fold; NULL where the settings can't be"),
        ("seconds", "double!", "Duration"),
        ("error", "string", "Why the settings can't be"),
    ),
    key=("run_id", "trial"),
)
DRIFT_REFERENCE = Table(
    "drift_reference",
    "How features and score were spread over the users that a bundle learned from: what nights are compared with",
    _columns(
        ("bundle_digest", "string!", "Bundle"),
        ("subject", "string!", "Feature, or score"),
        (
            "edges",
            "array<double>!",
            "Borders between bins, rising; a bin holds values above the border before it, up to its own",
        ),
        (
            "counts",
            "array<bigint>!",
            "Rows in each bin; two more than edges: one above the last border, and last the missing values",
        ),
        ("run_id", "string!", "Run that counted them"),
    ),
    key=("bundle_digest", "subject"),
    partition_by=("bundle_digest",),
)
DRIFT = Table(
    "drift",
    "How far the population, the scores and their errors have moved, night by night",
    _columns(
        ("run_id", "string!", "Run of the check"),
        ("score_date", "date!", "Night that was checked"),
        ("bundle_digest", "string!", "Bundle that made its scores"),
        (
            "kind",
            "string!",
            "feature or score: how it is spread; levels: who is on which level now; stability: scores that moved; realised: "
            "an earlier night, whose horizon is over, held against what was spent",
        ),
        (
            "subject",
            "string!",
            "Feature, score, level before and now as A>B (new: no score before, gone: none now), or the earlier night",
        ),
        ("metric", "string!", "psi, ks; share; moved, changed_level; spearman, gini, mae, coverage, calibration, ..."),
        ("against", "string", "training, or the date of the night before; NULL where neither is meant"),
        ("value", "double", "Figure; NULL where it can't be told"),
        (
            "reference",
            "double",
            "What the figure should be near: coverage as set, calibration 1, ranks of the test date",
        ),
        ("threshold", "double", "Border beyond which the figure alarms; NULL: it never does"),
        ("broken", "boolean!", "Whether it is beyond"),
        ("users", "bigint!", "Users it was computed over"),
        ("note", "string", "What has to be known of the figure"),
    ),
    key=("score_date", "kind", "subject", "metric", "against"),
    partition_by=("score_date",),
)
FAIRNESS = Table(
    "fairness",
    "Scores and their errors by segment of users, each group beside all others; for people, never for models",
    _columns(
        ("run_id", "string!", "Run of the report"),
        ("score_date", "date!", "Night that the report is of"),
        ("measured_date", "date!", "Night whose scores are measured: score_date, or the newest whose horizon was over"),
        ("bundle_digest", "string!", "Bundle that made these scores"),
        ("segment", "string!", "Segment of raw_users"),
        (
            "group",
            "string!",
            "Its value; (all): all users but suppressed ones, (not given): users without it, (small groups): joined ones",
        ),
        ("users", "bigint!", "Users of the group"),
        ("small", "boolean!", "Whether they are too few to rely on the interval"),
        (
            "metric",
            "string!",
            "score, level_A to level_E; where the horizon was over mae, relative_error, calibration, coverage, top_found",
        ),
        ("value", "double", "Figure; NULL where it can't be told"),
        ("low", "double", "Lower end of its 90 % interval (delta method; of shares Wilson's)"),
        ("high", "double", "Upper end"),
        ("ratio", "double", "Figure of the group over that of all other users of the segment"),
        ("ratio_low", "double", "Lower end of the ratio's 90 % interval (delta method on logarithms)"),
        ("ratio_high", "double", "Upper end"),
        ("threshold_low", "double", "Least ratio that is fair; NULL where the figure is not watched"),
        ("threshold_high", "double", "Largest ratio that is fair"),
        ("broken", "boolean!", "Whether the ratio's whole interval lies outside, for a group that is not small"),
    ),
    key=("score_date", "measured_date", "segment", "group", "metric"),
    partition_by=("score_date",),
)
LABEL_REQUESTS = Table(
    "label_requests",
    "Users whose label would help most: what a survey or a reviewer is asked",
    _columns(
        ("user_key", "string!", "User"),
        ("as_of_date", "date!", "Asked is what the user spends over the horizon from this day on"),
        ("rank", "int!", "Place among those asked for together, by disagreement, from 1"),
        (
            "disagreement",
            "double!",
            "Weighted standard deviation of the members' predictions, each as the square root of money",
        ),
        ("expected_spend", "double!", "What the bundle expects, in the platform's currency"),
        ("bundle_digest", "string!", "Model bundle whose members disagree"),
        ("run_id", "string!", "Run that asked, in runs"),
        ("requested_at", "timestamp!", "When that was, UTC"),
    ),
    key=("user_key", "as_of_date"),
)
GIVEN_LABELS = Table(
    "given_labels",
    "Labels that a survey or a reviewer gave: what trainings learn from beside what was spent",
    _columns(
        ("user_key", "string!", "User"),
        ("as_of_date", "date!", "The spend is that of the horizon from this day on"),
        ("spend", "double!", "Spend over the horizon, as given, in the platform's currency"),
        ("source", "string", "Who says so: survey, review, ..., as given"),
        ("given_at", "timestamp!", "When it was given, UTC: trainings whose test date is later may see it"),
        ("run_id", "string!", "Run that stored it, in runs"),
    ),
    key=("user_key", "as_of_date"),
)
SHARED_TABLES = (
    *RAW_TABLES,
    USER_KEYS,
    FORGOTTEN,
    DELIVERIES,
    EVENTS,
    QUARANTINE,
    TEXTS,
    TEXT_EMBEDDINGS,
    USER_DAILY,
    SCORES,
    SCORES_LATEST,
    *PROFILE_TABLES,
    RUNS,
    METRICS,
    TRIALS,
    BACKTESTS,
    DRIFT_REFERENCE,
    DRIFT,
    FAIRNESS,
    LABEL_REQUESTS,
    GIVEN_LABELS,
)


class Lakehouse:
    """The tables of one namespace, by path or managed by the metastore.

    Every write is one Delta commit; readers see the state before or after it, nothing between. A write that replaces all rows,
    or all rows of given partition values, leaves the same rows when a stage is repeated. One that adds to what the table
    held when the stage looked is given ``after``, the version it looked at: if another run has written since, it adds nothing
    and ends with :class:`ConflictError`, whether the two overlapped or followed each other.
    """

    def __init__(self, spark: SparkSession, config: TablesConfig) -> None:
        self.spark = spark
        self.namespace = config.namespace
        self._root = None if config.path is None else folder_of(config.path, config.namespace)

    def location(self, name: str) -> str:
        """Folder or object-store address of a table."""
        if self._root is not None:
            return f"{self._root}/{name}"
        detail = self.spark.sql(f"DESCRIBE DETAIL {self._identifier(name)}").select("location").first()
        assert detail is not None
        return str(detail[0]).removeprefix("file:")

    def exists(self, name: str) -> bool:
        """Whether the table is there."""
        if self._root is None:
            return self.spark.catalog.tableExists(self._identifier(name))
        try:
            logged = self._logged_version(name) is not None
        except UNREACHABLE:
            return self._is_known_to_spark(name)
        return logged or (self._is_elsewhere and self._is_known_to_spark(name))

    def read(self, name: str, version: int | None = None) -> DataFrame:
        """A table, as it is now or as of a version.

        Raises:
            DataError: there is no such table.
        """
        self._require(name)
        reader = self.spark.read.format("delta")
        if version is not None:
            reader = reader.option("versionAsOf", version)
        return reader.load(self.location(name)) if self._root is not None else reader.table(self._identifier(name))

    def require_whole_files(
        self, name: str, version: int | None = None, where: Mapping[str, str] | None = None
    ) -> None:
        """Hold the footers of a version's files, or of those with the given partition values, against the table's log.

        Where files or log can't be read from here, nothing is held against anything.

        Raises:
            DataError: a footer is damaged: see :mod:`bp_spark.lakehouse.footers`.
        """
        # a logged model is loaded where deltalake is not installed
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError

        try:
            table = DeltaTable(self.location(name), version=version)
            chosen = [(column, "=", value) for column, value in (where or {}).items()]
            footers.read(table, table.file_uris(file_pruning_predicate=chosen or None))
        except (DeltaError, *UNREACHABLE) as error:
            _logger.info(
                "%s: footers were not held against its log, which can't be read from here (%s)",
                self._named(name),
                type(error).__name__,
            )

    def is_plain(self, name: str) -> bool:
        """Whether a table's Parquet files hold its rows under its columns' names, all of them: no deletion vectors, no column
        mapping. Delta's protocol asks more than the first version of who reads any of these."""
        return bool(self._detail(name, "minReaderVersion") == 1)

    def version(self, name: str) -> int:
        """Newest Delta version of a table.

        Raises:
            DataError: there is no such table.
        """
        try:
            if (logged := self._logged_version(name)) is not None:
                return logged
        except UNREACHABLE:
            pass
        self._require(name)
        return int(self._history(name, 1).select("version").collect()[0][0])

    def commit_metadata(self, name: str, **said: str) -> dict[str, Any]:
        """What the newest write by this package recorded in its commit, and as ``version`` that write's Delta version.

        Without such a commit ``version`` is the table's newest and all there is; without a table it is -1.

        Args:
            said: only writes that noted these values.
        """
        if not self.exists(name):
            return {"version": -1}
        # maintenance commits (OPTIMIZE, VACUUM, table properties) carry no note
        for version, noted in self._noted_commits(name, _NOTES_SEARCHED):
            try:
                found = json.loads(noted)
            except json.JSONDecodeError:
                # somebody else's
                continue
            if all(found.get(key) == value for key, value in said.items()):
                return {**found, "version": version}
        return {"version": self.version(name)}

    def inputs(self, name: str, **said: str) -> str | None:
        """The inputs digest that the newest (such) write of the table recorded, ``None`` without table or digest."""
        return self.commit_metadata(name, **said).get("inputs")

    def replace(
        self,
        table: Table,
        df: DataFrame,
        *,
        where: Mapping[str, Sequence[object]] | None = None,
        inputs: str = "",
        note: Mapping[str, object] | None = None,
        after: int | None = None,
    ) -> int:
        """Replace a table's rows, or those with the given partition values, by ``df`` in one commit.

        Args:
            where: partition column -> values; rows of ``df`` must all have one of them (Delta checks it).
            inputs: digest of what ``df`` was made from, recorded with the commit.
            note: more to record with it.
            after: the ``version`` of the note that the rows follow from, or that :meth:`reserve` gave.

        Returns:
            The version written.

        Raises:
            DataError: ``df`` lacks a column or has one of another type.
            ConflictError: another run wrote the table meanwhile.
        """
        self._create(table)
        writer = self._writer(df, table).mode("overwrite")
        if where:
            writer = writer.option("replaceWhere", " AND ".join(_one_of(*item) for item in where.items()))
            # a feature added to the catalogue becomes a new column; older dates hold NULL in it
            writer = writer.option("mergeSchema", "true")
        elif self._stored_otherwise(table):
            writer = writer.option("overwriteSchema", "true")
        if table.partition_by:
            writer = writer.partitionBy(*table.partition_by)
        if table.rows_in_file:
            writer = writer.option("maxRecordsPerFile", table.rows_in_file)
        return self._save(writer, table.name, _noted(inputs, note), after)

    def append(
        self,
        table: Table,
        df: DataFrame,
        *,
        inputs: str = "",
        note: Mapping[str, object] | None = None,
        after: int | None = None,
    ) -> int:
        """Add rows to a table in one commit, with a note of what they were made from; see :meth:`replace`."""
        self._create(table)
        # a column that a newer version of this package knows is added; older rows hold NULL in it
        writer = self._writer(df, table).mode("append").option("mergeSchema", "true")
        return self._save(writer, table.name, _noted(inputs, note), after)

    def reserve(self, table: Table, note: Mapping[str, Any]) -> int:
        """Say in a table's log that a run is about to write it, and tables before it: an older claim ends with that.

        The run commits all that belongs together by its write of this table, last and ``after`` the version that this gives;
        what it writes to other tables before, ``after`` it too, no run with an older claim can overwrite.

        Args:
            note: what :meth:`commit_metadata` said of the table when the run looked; it stays as it was.

        Returns:
            The claim's version, above that of any claim or write before.

        Raises:
            ConflictError: another run has written or claimed the table since.
        """
        if note["version"] < 0:
            try:
                with translate(self._named(table.name)):
                    self.spark.sql(f"CREATE TABLE {self._definition(table)}")
                    self.declare_extras(table)
            except OccupiedError as error:
                self._await_creation(table.name, error)
                raise ConflictError(self._named(table.name)) from None
            return self.version(table.name)
        kept = {key: value for key, value in note.items() if key not in ("version", "write")}
        return self.append(table, self._nothing(table), note=kept, after=note["version"])

    def invalidate_writers(self, table: Table, claim: int) -> None:
        """Let no run write a table that is written under claims, ``after`` an older one than this."""
        kept = {
            key: value for key, value in self.commit_metadata(table.name).items() if key not in ("version", "write")
        }
        self.append(table, self._nothing(table), note=kept, after=claim)

    def _nothing(self, table: Table) -> DataFrame:
        return self.spark.range(0).select(*map(_typed_null, table.schema.fields))

    def merge(
        self,
        table: Table,
        df: DataFrame,
        *,
        within: Mapping[str, Sequence[object]],
        gone: DataFrame | None = None,
        inputs: str = "",
        note: Mapping[str, object] | None = None,
        after: int | None = None,
    ) -> int:
        """Update the rows that have the keys of ``df``, insert those that are new, in one commit; see :meth:`replace`.

        Args:
            df: rows, each key once.
            within: column -> the values that it has in ``df``: only files that can hold them are read.
            gone: keys, not in ``df``, whose rows are deleted.
        """
        self._create(table)
        source = _as_stored(df, table).withColumn("_gone", F.lit(False))
        if gone is not None:
            keys = [
                F.col(field.name) if field.name in table.key else _typed_null(field) for field in table.stored_schema
            ]
            source = source.unionByName(gone.select(*keys).withColumn("_gone", F.lit(True)))
        same = [f"t.`{column}` = s.`{column}`" for column in table.key]
        narrowed = [_narrowed(f"t.`{column}`", values) for column, values in within.items()]
        # made by an older version of this package, it has no month
        has_month = _MONTH.name in self.read(table.name).columns
        names = (table.stored_schema if has_month else table.schema).names
        columns = [f"`{name}`" for name in names]
        updates = ", ".join(f"{column} = s.{column}" for column in columns)
        values = ", ".join(f"s.{column}" for column in columns)
        clauses = (
            "WHEN MATCHED AND s._gone THEN DELETE "  # noqa: S608 (names of a declared table's columns)
            f"WHEN MATCHED THEN UPDATE SET {updates} "
            f"WHEN NOT MATCHED AND NOT s._gone THEN INSERT ({', '.join(columns)}) VALUES ({values})"
        )
        noted = _noted(inputs, note)
        settings = {"spark.databricks.delta.commitInfo.userMetadata": noted}
        if table.month_of:
            settings["spark.databricks.delta.optimizeWrite.enabled"] = "true"
        if after is not None:
            settings["spark.databricks.delta.write.txnAppId"] = _TRANSACTIONS
            settings["spark.databricks.delta.write.txnVersion"] = str(after + 1)
        with translate(self._named(table.name)), with_settings(self.spark, settings):
            self._merge(table.name, source, " AND ".join([*narrowed, *same]), clauses)
        return self._committed(table.name, noted, after)

    def changes(self, name: str, since: int) -> DataFrame:
        """Rows written, in their old and new form, or deleted by the commits after version ``since``."""
        if self.version(name) <= since:
            return self.read(name).limit(0)
        reader = self.spark.read.format("delta").option("readChangeFeed", "true").option("startingVersion", since + 1)
        return reader.load(self.location(name)) if self._root is not None else reader.table(self._identifier(name))

    def erase(self, name: str, gone: DataFrame, same: str) -> int:
        """Delete the rows that match one of ``gone`` in one commit; without any there is none. The newest note stays that of
        the commit before.

        Args:
            same: SQL condition over a row ``t`` of the table and a row ``s`` of ``gone``.

        Returns:
            How many were deleted.
        """
        rows = self.read(name).alias("t").join(gone.alias("s"), F.expr(same), "left_semi").count()
        if rows:
            with translate(self._named(name)):
                self._merge(name, gone, same, "WHEN MATCHED THEN DELETE")
        return rows

    def delete(self, name: str, condition: str) -> int:
        """Delete the rows that meet a SQL condition in one commit, as :meth:`erase` does; returns how many."""
        rows = self.read(name).filter(condition).count()
        if rows:
            with translate(self._named(name)):
                self.spark.sql(f"DELETE FROM {self._sql_name(name)} WHERE {condition}")  # noqa: S608 (the caller's)
        return rows

    def fence(self, name: str) -> str:
        """End all writes of a table that are under way: Delta lets none commit that began before a change of the metadata.

        Returns:
            A text that the commit of the change holds, and no other.
        """
        token = uuid.uuid4().hex
        with translate(self._named(name)):
            self.spark.sql(f"ALTER TABLE {self._sql_name(name)} SET TBLPROPERTIES ('bp-spark.fence' = '{token}')")
        return token

    def vacuum(self, name: str) -> int:
        """Delete all files that the newest version doesn't need, those of the change feed too: older versions are gone then.

        Other jobs may run. Who reads an older version, or began to write before the fence, ends with an error; what is written
        later is left alone: see :mod:`bp_spark.lakehouse.leftovers`.

        Returns:
            How many files were deleted; 0 where Delta had to do it.
        """
        with translate(self._named(name)):
            if not self.is_plain(name):
                # a row that a deletion vector hides still stands in its file
                self.spark.sql(f"REORG TABLE {self._sql_name(name)} APPLY (PURGE)")
            location = self.location(name)
            try:
                listed = leftovers.data_files(location)
                leftovers.require_commit(location, self.fence(name))
            except UNREACHABLE as error:
                self._vacuum_by_delta(name, error)
                return 0
            return leftovers.delete(location, listed, self.read(name).inputFiles())

    def _vacuum_by_delta(self, name: str, reason: Exception) -> None:
        """Delete the files that commits removed; what never was in the log stays for a later VACUUM, for only a clock could
        tell it from what a job is writing."""
        _logger.warning(
            "%s: its folder can't be listed from here (%s): what killed runs left in it stays until Delta's VACUUM finds it",
            self._named(name),
            type(reason).__name__,
        )
        settings = {
            "spark.databricks.delta.retentionDurationCheck.enabled": "false",
            "spark.databricks.delta.vacuum.logging.enabled": "false",
        }
        with with_settings(self.spark, settings):
            try:
                self.spark.sql(f"VACUUM {self._sql_name(name)} LITE RETAIN 0 HOURS")
            except SPARK_ERRORS as error:
                if "DELTA_CANNOT_VACUUM_LITE" not in str(error):
                    raise
                _logger.warning(
                    "%s: its log was cleaned, so that files of older versions stay for the table's own retention time",
                    self._named(name),
                )
                self.spark.sql(f"VACUUM {self._sql_name(name)}")

    def folders(self) -> list[str]:
        """Where all files of the tables are: one folder, or one of each table that the metastore manages."""
        return [self.location(name) for name in self.names()] if self._root is None else [self._root]

    def register(self) -> list[str]:
        """Make path-based tables known by name to this session, for SQL; returns the names."""
        names = self.names()
        for statement in self.ddl(names):
            self.spark.sql(statement)
        return names

    def ddl(self, names: list[str]) -> list[str]:
        """SQL that makes path-based tables known by name, in any Spark SQL client."""
        return [
            f"CREATE SCHEMA IF NOT EXISTS {_quoted(self.namespace)}",
            *(
                f"CREATE TABLE IF NOT EXISTS {self._identifier(name)} USING DELTA LOCATION {_literal(self.location(name))}"
                for name in names
            ),
        ]

    def names(self) -> list[str]:
        """The tables that are there."""
        known = [table.name for table in SHARED_TABLES] + ["user_features", "training_set", "pretraining_set"]
        return [name for name in known if self.exists(name)]

    def _sql_name(self, name: str) -> str:
        return f"delta.`{self.location(name).replace('`', '``')}`" if self._root is not None else self._identifier(name)

    def _identifier(self, name: str) -> str:
        return f"{_quoted(self.namespace)}.`{name}`"

    def _require(self, name: str) -> None:
        if not self.exists(name):
            raise DataError(self._named(name), "table does not exist; run the stage that makes it first")

    def _named(self, name: str) -> str:
        return f"{self.namespace}.{name}"

    def _create(self, table: Table) -> None:
        if not self.exists(table.name):
            try:
                with translate(self._named(table.name)):
                    self.spark.sql(f"CREATE TABLE IF NOT EXISTS {self._definition(table)}")
                    self.declare_extras(table)
                if not self.exists(table.name):
                    # Delta takes any folder with a log for a table, and leaves it alone
                    raise OccupiedError(self._named(table.name))
            except ConflictError:
                # created by another run in the same moment, which is as good
                if not self.exists(table.name):
                    raise
            except OccupiedError as error:
                self._await_creation(table.name, error)
            except AnalysisException as error:
                # or it finds that no table is in it
                if not _NO_TABLE.search(str(error)):
                    raise
                self._await_creation(table.name, OccupiedError(self._named(table.name)))

    def declare_extras(self, table: Table) -> None:
        """Run :func:`managed_extras` for a new table of Unity Catalog; elsewhere there is nothing to do.

        They change no row. A catalog that refuses one, such as ``hive_metastore``, gets a warning and the table goes without.
        """
        if self._root is not None or "DATABRICKS_RUNTIME_VERSION" not in os.environ:
            return
        for statement in managed_extras(table, self._identifier(table.name)):
            try:
                self.spark.sql(statement)
            except PySparkException as error:
                _logger.warning(
                    "%s: goes without %r: %s", self._named(table.name), statement, str(error).split("\n")[0]
                )

    def _await_creation(self, name: str, error: OccupiedError) -> None:
        """Wait for the first commit of another run that has made the table's folder; raise the error if none comes."""
        end = time.monotonic() + _CREATION_S
        while not self._begun(name):
            if time.monotonic() > end:
                raise error
            time.sleep(0.1)

    def _begun(self, name: str) -> bool:
        """Whether a table has a first commit, by its log as it is now: of a folder without one Delta remembers just that."""
        try:
            # the schema makes Delta look: in a Spark Connect session a frame is no more than a plan
            _ = self.spark.read.format("delta").load(self.location(name)).schema
        except AnalysisException:
            return False
        return self.exists(name)

    def _definition(self, table: Table) -> str:
        """What follows ``CREATE TABLE``: name, columns with their comments, layout, properties."""
        if self._root is None:
            self.spark.sql(f"CREATE SCHEMA IF NOT EXISTS {_quoted(self.namespace)}")
        columns = ", ".join(
            f"`{column.name}` {column.type}{' NOT NULL' if column.required else ''} COMMENT {_literal(column.comment)}"
            for column in table.stored_columns
        )
        # Petastorm reads Parquet files and knows nothing of deletion vectors.
        properties = {"delta.enableDeletionVectors": "false"}
        if table.skipped_by:
            properties["delta.dataSkippingStatsColumns"] = ",".join(table.skipped_by)
        else:
            properties["delta.dataSkippingNumIndexedCols"] = "0"
        if table.change_feed:
            properties["delta.enableChangeDataFeed"] = "true"
        told = ", ".join(f"{_literal(name)} = {_literal(value)}" for name, value in properties.items())
        layout = (
            f"PARTITIONED BY ({', '.join(f'`{name}`' for name in table.partition_by)})" if table.partition_by else ""
        )
        return (
            f"{self._sql_name(table.name)} ({columns}) USING DELTA {layout} "
            f"COMMENT {_literal(table.comment)} TBLPROPERTIES ({told})"
        )

    def _merge(self, name: str, source: DataFrame, condition: str, clauses: str) -> None:
        """Merge rows ``s`` into rows ``t`` of a table, by SQL."""
        with _named_view(source) as view:
            self.spark.sql(f"MERGE INTO {self._sql_name(name)} AS t USING {view} AS s ON {condition} {clauses}")

    def _writer(self, df: DataFrame, table: Table) -> Any:
        """Of the rows in files of about equal size, whatever tasks made them, where these would leave a file in each month."""
        writer = _as_stored(df, table).write.format("delta")
        return writer.option("optimizeWrite", "true") if table.month_of else writer

    def _stored_otherwise(self, table: Table) -> bool:
        """Whether an older version of this package made the table, with other columns or another layout."""
        if _types(self.read(table.name).schema) != _types(table.stored_schema):
            return True
        if not table.month_of:
            return False
        return tuple(self._detail(table.name, "partitionColumns")) != table.partition_by

    def _save(self, writer: Any, name: str, noted: str, after: int | None) -> int:
        """Commit; the version. With ``after`` Delta itself refuses what isn't newer than the newest such commit."""
        writer = writer.option("userMetadata", noted)
        if after is not None:
            writer = writer.option("txnAppId", _TRANSACTIONS).option("txnVersion", after + 1)
        with translate(self._named(name)):
            if self._root is not None:
                writer.save(self.location(name))
            else:
                writer.saveAsTable(self._identifier(name))
        return self._committed(name, noted, after)

    def _committed(self, name: str, noted: str, after: int | None) -> int:
        """Version of the commit with that note; the newest, where there was nothing to commit.

        Raises:
            ConflictError: there is none. Delta passes over a transaction that comes too late without a word.
        """
        for version, theirs in self._noted_commits(name, _COMMITS_SINCE):
            if theirs == noted:
                return version
        if after is not None:
            raise ConflictError(self._named(name))
        # without a transaction Delta leaves out a commit that would change nothing
        return self.version(name)

    def _noted_commits(self, name: str, most: int) -> Iterator[tuple[int, str]]:
        """Version and note of those of the newest ``most`` commits that have one, newest first."""
        newest = self.version(name)
        for version in range(newest, max(-1, newest - most), -1):
            try:
                noted = self._commit_info(name, version).get("userMetadata")
            except UNREACHABLE:
                # a table of the metastore, a store that only Spark can read, or a log that was cleaned: Delta's own job tells
                history = self._history(name, most).filter(f"version <= {version} AND userMetadata IS NOT NULL")
                yield from map(tuple, history.orderBy(F.desc("version")).select("version", "userMetadata").collect())
                return
            if noted is not None:
                yield version, noted

    def rows_written(self, name: str, version: int) -> int:
        """Rows that the commit of a :meth:`replace` or :meth:`append` ``after`` a version wrote, as Delta counted them."""
        try:
            metrics = self._commit_info(name, version)["operationMetrics"]
        except (*UNREACHABLE, KeyError):
            history = self._history(name).filter(F.col("version") == version)
            metrics = history.select("operationMetrics").collect()[0][0]
        return int(metrics["numOutputRows"])

    def _detail(self, name: str, column: str) -> Any:
        """A column of Delta's description of a table."""
        return self.spark.sql(f"DESCRIBE DETAIL {self._sql_name(name)}").select(column).collect()[0][0]

    def _history(self, name: str, most: int | None = None) -> DataFrame:
        """The newest commits of a table, or all that its log still has, as Delta tells them: by a Spark job."""
        limit = "" if most is None else f" LIMIT {most}"
        return self.spark.sql(f"DESCRIBE HISTORY {self._sql_name(name)}{limit}")

    @cached_property
    def _files(self) -> tuple[Any, str]:
        """What pyarrow reads the tables' folder by, and its path."""
        assert self._root is not None
        return file_system(self._root)

    @property
    def _is_elsewhere(self) -> bool:
        """Whether Spark may see tables where this process sees none: in a store, or by the server of Spark Connect."""
        return self._root is not None and ("://" in self._root or is_connect(self.spark))

    def _is_known_to_spark(self, name: str) -> bool:
        try:
            # of a folder with other files Delta tells something too
            return bool(self._detail(name, "format") == "delta")
        except AnalysisException as error:
            if not _NO_TABLE.search(str(error)):
                raise
            return False

    def _logged_version(self, name: str) -> int | None:
        """The newest version by the names of the log's files: milliseconds, where Delta's history is a Spark job.

        ``None`` where none are there.

        Raises:
            OSError, ValueError, pyarrow.ArrowException: they can't be listed from here.
        """
        if self._root is None:
            raise FileNotFoundError(self._named(name))
        system, path = self._files
        listed = system.get_file_info(fs.FileSelector(f"{path}/{name}/_delta_log", allow_not_found=True))
        entries = (_LOG_ENTRY.fullmatch(info.base_name) for info in listed)
        return max((int(entry[1]) for entry in entries if entry), default=None)

    def _commit_info(self, name: str, version: int) -> dict[str, Any]:
        """The ``commitInfo`` of a commit, from its file, as :meth:`_logged_version`.

        Raises:
            OSError, ValueError, pyarrow.ArrowException: it can't be read from here.
        """
        if self._root is None:
            raise FileNotFoundError(self._named(name))
        system, path = self._files
        with system.open_input_stream(f"{path}/{name}/_delta_log/{version:020d}.json") as stream:
            for line in io.TextIOWrapper(stream, "utf-8"):
                info: dict[str, Any] | None = json.loads(line).get("commitInfo")
                if info is not None:
                    return info
        return {}


@contextmanager
def _named_view(df: DataFrame) -> Iterator[str]:
    """A name by which SQL of the frame's session knows it, for the block."""
    name = f"bp_spark_{uuid.uuid4().hex}"
    df.createOrReplaceTempView(name)
    try:
        yield name
    finally:
        df.sparkSession.catalog.dropTempView(name)


def managed_extras(table: Table, name: str) -> list[str]:
    """Return the SQL that gives a managed table its primary key and, where it has no partitions, liquid clustering by it.

    Databricks trusts the key (``RELY``) and doesn't enforce it. A key with a column that may be NULL is none.

    Args:
        name: the table as SQL names it.
    """
    required = {column.name for column in table.stored_columns if column.required}
    if not table.key or not required.issuperset(table.key):
        return []
    key = ", ".join(f"`{column}`" for column in table.key)
    primary = f"ALTER TABLE {name} ADD CONSTRAINT `{table.name}_key` PRIMARY KEY ({key}) NOT ENFORCED RELY"
    if table.partition_by:
        return [primary]
    cluster = table.key[:_CLUSTER_COLUMNS]
    # Delta clusters by columns that have statistics, and these tables have them for few
    indexed = ",".join(dict.fromkeys((*table.skipped_by, *cluster)))
    return [
        f"ALTER TABLE {name} SET TBLPROPERTIES ('delta.dataSkippingStatsColumns' = '{indexed}')",
        f"ALTER TABLE {name} CLUSTER BY ({', '.join(f'`{column}`' for column in cluster)})",
        primary,
    ]


def whole(lakehouse: Lakehouse, table: Table) -> DataFrame:
    """A table with all columns of today, NULL where it was written before there were any."""
    none = lakehouse.spark.createDataFrame([], table.schema)
    return none.unionByName(lakehouse.read(table.name), allowMissingColumns=True)


def conform(df: DataFrame, table: Table) -> DataFrame:
    """``df`` with exactly the table's columns, in its order.

    Raises:
        DataError: a column is missing or its type is not the table's.
    """
    present = {field.name: field.dataType for field in df.schema.fields}
    selected: list[SparkColumn] = []
    for field in table.schema.fields:
        if field.name not in present:
            raise DataError(table.name, "column is missing", column=field.name)
        found, wanted = present[field.name].simpleString(), field.dataType.simpleString()
        if found != wanted:
            raise DataError(table.name, f"must be {wanted}, is {found}", column=field.name)
        selected.append(F.col(field.name).alias(field.name, metadata=field.metadata))
    return df.select(*selected)


def _as_stored(df: DataFrame, table: Table) -> DataFrame:
    """``df`` by :func:`conform`, with the month where the table has one."""
    rows = conform(df, table)
    if not table.month_of:
        return rows
    month = F.trunc(table.month_of, "MONTH").alias(_MONTH.name, metadata={"comment": _MONTH.comment})
    return rows.select("*", month)


def _typed_null(field: StructField) -> SparkColumn:
    return F.lit(None).cast(field.dataType).alias(field.name)


def _noted(inputs: str, note: Mapping[str, object] | None) -> str:
    """A commit's note; ``write`` tells it from all others."""
    return json.dumps({"inputs": inputs, "code_version": __version__, **(note or {}), "write": uuid.uuid4().hex})


def _narrowed(column: str, values: Sequence[object]) -> str:
    """A condition that Delta can skip files by; for many values their range, which it can still use."""
    texts = sorted({str(value) for value in values})
    if not texts:
        return "false"
    if len(texts) > _LISTED_VALUES:
        return f"{column} BETWEEN {_literal(texts[0])} AND {_literal(texts[-1])}"
    return f"{column} IN ({', '.join(map(_literal, texts))})"


def _one_of(column: str, values: Sequence[object]) -> str:
    return f"`{column}` IN ({', '.join(_literal(str(value)) for value in values)})"


def _literal(text: str) -> str:
    """A string of Spark SQL, which would put a variable's value in the place of ``${name}``."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("$", "\\u0024") + "'"


def _types(schema: StructType) -> list[tuple[str, str]]:
    return [(field.name, field.dataType.simpleString()) for field in schema.fields]


def _quoted(namespace: str) -> str:
    return ".".join(f"`{part}`" for part in namespace.split("."))
