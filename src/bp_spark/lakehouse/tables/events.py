"""Users, deliveries, events and texts: what the ingest writes."""

from bp_spark.lakehouse.schema import Table, columns

KINDS = ("purchase", "browse", "click", "cart", "favourite", "coupon", "search", "review")
"""Kinds of events; a kind's position, from 1, is its code in ``seq_kind``."""
USER_KEYS = Table(
    "user_keys",
    "Keys of users: the only table with user ids",
    columns(
        ("user_id", "string!", "User id of the platform, without surrounding blanks"),
        ("user_key", "string!", "HMAC-SHA256 of user_id with the secret, hexadecimal"),
        ("key_id", "string!", "Identity of the secret"),
        ("ingest_id", "bigint!", "First ingest that brought the user"),
    ),
    key=("user_key",),
    skipped_by=("key_id",),
)
FORGOTTEN = Table(
    "forgotten",
    "Erased users; an ingest leaves out their rows. Neither an id nor a key can be derived from this table",
    columns(
        ("key_hash", "string!", "SHA-256 of the user's key"),
        ("key_id", "string!", "Identity of the secret that the key was made with"),
        ("known", "boolean!", "Whether a user had the id when its erasure was asked for"),
        ("forgotten_at", "timestamp!", "Time of the erasure, UTC"),
    ),
    key=("key_hash",),
)
DELIVERIES = Table(
    "deliveries",
    "Files that were ingested, one row per version; a file is read again when its fingerprint isn't that of its newest version",
    columns(
        ("source", "string!", "Digest of the source's settings"),
        ("table", "string!", "Raw table that holds the rows"),
        ("name", "string!", "Name that the platform gave"),
        ("fingerprint", "string!", "Changes with the content; gone for a data file that has left its Delta table"),
        ("ingest_id", "bigint!", "Ingest that read the file, numbered from 1"),
        ("first_day", "date", "UTC day of the file's first row, where the file came again with other rows"),
        ("last_day", "date", "UTC day of its last row, likewise"),
        (
            "stored_as",
            "string",
            "Delivery of its rows, if a mapping with another name or folder delivered the file first",
        ),
    ),
    key=("source", "table", "name", "fingerprint", "ingest_id"),
)
EVENTS = Table(
    "events",
    "One row per event of a user; a refund is a purchase with a negative amount",
    columns(
        ("event_id", "string!", "SHA-256 of the event's identity; an event that is delivered twice has one row"),
        ("user_key", "string!", "User"),
        ("ts", "timestamp!", "Time, UTC"),
        ("event_date", "date!", "UTC day of ts"),
        ("kind", "string!", "purchase, browse, click, cart, favourite, coupon, search or review"),
        ("order_id", "string", "Order of a purchase"),
        ("item_id", "string", "Item"),
        ("category", "string", "Category path of the item, from broad to narrow, as known at the ingest"),
        ("text_id", "bigint", "Normalised text of the item, query or review: key of texts"),
        ("amount", "decimal(18,2)", "Money paid, in the platform's currency; negative for a refund"),
        ("quantity", "double", "Units of a purchase"),
        ("discount", "decimal(18,2)", "Reduction already taken off the amount"),
        ("coupon_discount", "decimal(18,2)", "Part of the reduction that came from coupons"),
        ("cost", "decimal(18,2)", "What a purchase cost the shop, in the platform's currency; NULL: unknown"),
        ("rating", "double", "Rating of a review"),
        ("dwell_s", "double", "Seconds of a browse, if measured"),
        ("ingest_id", "bigint!", "First ingest that brought the event"),
    ),
    key=("event_id",),
    change_feed=True,
    partition_by=("month",),
    month_of="event_date",
    skipped_by=("event_date",),
)
QUARANTINE = Table(
    "quarantine",
    "Raw rows that broke a cleaning rule, with the rule",
    columns(
        ("source", "string!", "Raw table the row came from"),
        ("rule", "string!", "First rule that the row broke"),
        ("row", "string!", "Raw row as JSON"),
        ("ingest_id", "bigint!", "Ingest that brought the row"),
    ),
    partition_by=("ingest_id",),
)
TEXTS = Table(
    "texts",
    "Distinct normalised texts, with counts of words that hint at a price level",
    columns(
        ("text_id", "bigint!", "xxhash64 of the text"),
        ("text", "string!", "Normalised text"),
        ("ingest_id", "bigint!", "First ingest that brought the event"),
        ("cheap_words", "int!", "Number of words that ask for a low price"),
        ("premium_words", "int!", "Number of words that ask for high quality"),
        ("brand_words", "int!", "Number of brand names, of brands known by that ingest"),
    ),
    key=("text_id",),
)
TEXT_EMBEDDINGS = Table(
    "text_embeddings",
    "Embedding and sentiment of each text; a model reads a text once",
    columns(
        ("text_id", "bigint!", "Key of texts"),
        ("model_digest", "string!", "Digest of the language model's files and settings"),
        ("embedding", "array<float>!", "Mean-pooled, length-normalised vector"),
        ("sentiment", "float!", "From -1 (near to complaints) to 1 (near to praise)"),
    ),
    key=("text_id", "model_digest"),
)
