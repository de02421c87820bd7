"""The raw contract: rows as a platform delivers them."""

from bp_spark.lakehouse.schema import Table, columns

_DELIVERED = (
    ("delivery", "string", "File or batch the row came in"),
    ("unreadable", "map<string,string>", "Column -> value as delivered, where it is not of the column's type"),
)
_INGESTED = (
    ("ingest_id", "bigint!", "Ingest that brought the row, numbered from 1"),
    ("ingested_at", "timestamp!", "Time of the ingest, UTC"),
)
INGEST_COLUMNS = tuple(name for name, _, _ in _INGESTED)
"""Columns of raw tables that the ingest adds; sources bring the others."""
RAW_TRANSACTIONS = Table(
    "raw_transactions",
    "Order lines as the platform delivered them",
    columns(
        ("user_key", "string", "Key of the user; NULL where the platform gave no id"),
        ("order_id", "string", "Order (basket) the line belongs to"),
        ("line_id", "string", "Number of the line in its order, where the platform has one"),
        ("item_id", "string", "Item bought"),
        ("ts", "timestamp", "Time of the order, UTC"),
        ("quantity", "double", "Units, pieces or litres, as the platform counts the item"),
        ("amount", "decimal(18,2)", "Money paid for the line after discounts; negative for a refund"),
        ("discount", "decimal(18,2)", "Price reduction already taken off the amount"),
        ("coupon_discount", "decimal(18,2)", "Part of the reductions that came from coupons"),
        (
            "cost",
            "decimal(18,2)",
            "What the line cost the shop, in the currency of the amount; negative for goods that came back",
        ),
        ("currency", "string", "ISO 4217 code"),
        *_DELIVERED,
        *_INGESTED,
    ),
    partition_by=("ingest_id",),
)
RAW_BEHAVIOURS = Table(
    "raw_behaviours",
    "Browse, click, cart, favourite and coupon actions as delivered",
    columns(
        ("user_key", "string", "Key of the user; NULL where the platform gave no id"),
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
    columns(
        ("user_key", "string", "Key of the user; NULL where the platform gave no id"),
        ("ts", "timestamp", "Time of the search, UTC"),
        ("query", "string", "Text that the user typed"),
        ("clicked_item_id", "string", "Item clicked in the results, if any"),
        *_DELIVERED,
        *_INGESTED,
    ),
    partition_by=("ingest_id",),
)
RAW_REVIEWS = Table(
    "raw_reviews",
    "Reviews as delivered",
    columns(
        ("user_key", "string", "Key of the user; NULL where the platform gave no id"),
        ("ts", "timestamp", "Time of the review, UTC"),
        ("item_id", "string", "Item reviewed"),
        ("rating", "double", "Rating on the platform's scale"),
        ("text", "string", "Text that the user wrote"),
        *_DELIVERED,
        *_INGESTED,
    ),
    partition_by=("ingest_id",),
)
RAW_ITEMS = Table(
    "raw_items",
    "Items as delivered",
    columns(
        ("item_id", "string", "Item"),
        ("title", "string", "Name of the item"),
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
    "Users as the platform delivers them; segments are for fairness reports and regions only, never a feature",
    columns(
        ("user_key", "string", "Key of the user; NULL where the platform gave no id"),
        ("signup_ts", "timestamp", "Time of registration, UTC"),
        ("segment", "map<string,string>", "Name of a segment (income, age, region) -> its value"),
        *_DELIVERED,
        *_INGESTED,
    ),
    partition_by=("ingest_id",),
)
RAW_RATES = Table(
    "raw_rates",
    "Exchange rates as delivered",
    columns(
        ("currency", "string", "ISO 4217 code"),
        ("day", "date", "Day from which the rate holds"),
        ("rate", "decimal(18,8)", "Value of one unit in the platform's currency"),
        *_DELIVERED,
        *_INGESTED,
    ),
    partition_by=("ingest_id",),
)
RAW_CONSULTATIONS = Table(
    "raw_consultations",
    "Consultations as delivered: talks of users with the shop's staff or its assistant",
    columns(
        ("user_key", "string", "Key of the user; NULL where the platform gave no id"),
        ("ts", "timestamp", "Time at which the consultation began, UTC"),
        ("channel", "string", "Chat, telephone, e-mail, store, as the platform names it"),
        ("topic", "string", "What it was about, as the platform names it"),
        ("text", "string", "Text that the user wrote or said"),
        ("solved", "boolean", "Whether the user's question was answered; NULL if unknown"),
        *_DELIVERED,
        *_INGESTED,
    ),
    partition_by=("ingest_id",),
)
RAW_CAMPAIGNS = Table(
    "raw_campaigns",
    "Campaigns as delivered: one row per user and campaign that addressed the user",
    columns(
        ("user_key", "string", "Key of the user; NULL where the platform gave no id"),
        ("campaign_id", "string", "Campaign"),
        ("first_day", "date", "First day on which the campaign addressed the user; may lie ahead, as planned"),
        ("last_day", "date", "Last day of the campaign for the user, inclusive"),
        ("kind", "string", "E-mail, letter, message, or a type of the platform's own"),
        ("cost", "decimal(18,6)", "Cost of addressing the user, in the platform's currency"),
        *_DELIVERED,
        *_INGESTED,
    ),
    partition_by=("ingest_id",),
)
RAW_PROMOTIONS = Table(
    "raw_promotions",
    "Promotions of items as delivered: offers to everybody, and the items that a campaign's coupons are for",
    columns(
        ("item_id", "string", "Item"),
        ("first_day", "date", "First day of the promotion"),
        ("last_day", "date", "Last day of the promotion, inclusive"),
        ("kind", "string", "Display, mailer, coupon, or a kind of the platform's own"),
        ("promotion_id", "string", "Number of the promotion or the coupon, where the platform has one"),
        ("campaign_id", "string", "Campaign that the coupon belongs to"),
        ("stores", "int", "Number of stores that had the promotion, where the platform counts them"),
        *_DELIVERED,
        *_INGESTED,
    ),
    partition_by=("ingest_id",),
)
RAW_LOGS = (RAW_TRANSACTIONS, RAW_BEHAVIOURS, RAW_SEARCHES, RAW_REVIEWS)
"""Tables of events: each of their rows ends in events, duplicates or quarantine."""
RAW_CONTACTS = (RAW_CONSULTATIONS, RAW_CAMPAIGNS)
"""Tables of contacts with users: each of their rows ends in a table of contacts, duplicates or quarantine."""
RAW_TABLES = (*RAW_LOGS, RAW_ITEMS, RAW_USERS, RAW_RATES, *RAW_CONTACTS, RAW_PROMOTIONS)
