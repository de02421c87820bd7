"""Contacts of the shop with its users: what the cleaning of consultations and campaigns writes."""

from bp_spark.lakehouse.schema import Table, columns

CONSULTATIONS = Table(
    "consultations",
    "One row per consultation of a user; for analysts, and for features of prospects",
    columns(
        ("consultation_id", "string!", "SHA-256 of user, ts, channel, topic and text"),
        ("user_key", "string!", "User"),
        ("ts", "timestamp!", "Time at which the consultation began, UTC"),
        ("event_date", "date!", "UTC day of ts"),
        ("channel", "string", "Chat, telephone, e-mail, store, as the platform names it"),
        ("topic", "string", "What it was about, as the platform names it"),
        ("text", "string", "Text that the user wrote or said"),
        (
            "solved",
            "boolean",
            "Whether the user's question was answered, as the newest delivery says; NULL if unknown",
        ),
        ("ingest_id", "bigint!", "First ingest that brought the consultation"),
        ("ingested_at", "timestamp!", "Time of that ingest, UTC"),
    ),
    key=("consultation_id",),
    partition_by=("month",),
    month_of="event_date",
    skipped_by=("event_date",),
)
CONSULTATION_TOPICS = Table(
    "consultation_topics",
    "What each consultation with a text and without a topic of the platform's is about, by phrases and a language model",
    columns(
        ("consultation_id", "string!", "As in consultations"),
        ("user_key", "string!", "User"),
        ("event_date", "date!", "UTC day of the consultation"),
        (
            "topic",
            "string",
            "Name of the topic in topics.phrases; NULL: none of them, or a text that the model can't read",
        ),
        (
            "similarity",
            "double",
            "1: the text contains a phrase of the topic; else its cosine to the nearest phrase of all topics; NULL: the model "
            "can't read the text",
        ),
        ("made_by", "string!", "Digest of the language model and the settings of topics"),
    ),
    key=("consultation_id",),
)
CAMPAIGN_CONTACTS = Table(
    "campaign_contacts",
    "One row per user, campaign, first day and kind of contact; for analysts, and for features of prospects",
    columns(
        ("contact_id", "string!", "SHA-256 of user, campaign, first_day and kind"),
        ("user_key", "string!", "User"),
        ("campaign_id", "string!", "Campaign"),
        ("first_day", "date!", "First day on which the campaign addressed the user; may lie ahead, as planned"),
        ("last_day", "date", "Last day of the campaign for the user, inclusive, by the newest delivery"),
        ("kind", "string", "E-mail, letter, message, or a type of the platform's own"),
        ("cost", "decimal(18,6)", "Cost in the platform's currency, by the newest delivery"),
        ("ingest_id", "bigint!", "First ingest that brought the contact"),
        ("ingested_at", "timestamp!", "Time of that ingest, UTC"),
    ),
    key=("contact_id",),
    partition_by=("month",),
    month_of="first_day",
    skipped_by=("first_day",),
)
