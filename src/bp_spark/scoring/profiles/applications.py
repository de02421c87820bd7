"""Tables that risk control and customer service read, made from the profiles."""

from __future__ import annotations

from datetime import date

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import PhrasesConfig, ProfilesConfig
from bp_spark.ingest.topics import of_platform
from bp_spark.lakehouse.tables import CUSTOMER_SERVICE, RISK_CONTROL
from bp_spark.scoring.profiles.columns import filled, shaped

SERVICE_TIERS = ("premier", "preferred", "win_back", "standard")
TALKING_POINTS = 3
"""Most talking points of a user."""
_ASKED = ("open_questions", "asked_on", "asked_about")
LOW_RATINGS, OFFERS, OVERDUE, SOON = 0.5, 0.3, 2.0, 14.0
"""Borders of talking points: share of low ratings, share of reductions, pause over the usual one, days to the next purchase."""


def risk_control(profile: DataFrame, config: ProfilesConfig) -> DataFrame:
    """Return the risk band of each row of USER_PROFILE with its reasons in words: rows of RISK_CONTROL."""

    def in_words(reason: Column) -> Column:
        value = F.format_number(reason["value"], 2)
        phrases = {
            signal: getattr(config.phrases, f"risk_{signal}") for signal in ("interval", "refunds", "volatility")
        }
        texts = [F.when(reason["signal"] == signal, filled(text, value=value)) for signal, text in phrases.items()]
        return F.struct(
            *(reason[part].alias(part) for part in ("signal", "value", "points")), F.coalesce(*texts).alias("text")
        )

    most_first = "array_sort(risk_reasons, (a, b) -> b.points - a.points)"
    rows = profile.withColumns(
        {"risk_band": F.col("risk_level"), "reasons": F.transform(F.expr(most_first), in_words)},
    )
    return shaped(rows, RISK_CONTROL)


def last_consultations(consultations: DataFrame | None, topics: DataFrame | None, day: date) -> DataFrame | None:
    """Return ``user_key``, ``open_questions``, ``asked_on``, ``asked_about`` of users with consultations before a day.

    Args:
        consultations: CONSULTATIONS; ``None`` where the platform has none, as is the result then.
        topics: CONSULTATION_TOPICS, if there is that table.
        day: The scored date.
    """
    if consultations is None:
        return None
    before = consultations.filter(F.col("event_date") < F.lit(day))
    if topics is None:
        named = before.withColumn("about", of_platform())
    else:
        by_id = topics.select("consultation_id", F.col("topic").alias("by_text"))
        named = before.join(by_id, "consultation_id", "left").withColumn("about", F.coalesce(of_platform(), "by_text"))
    newest = F.max_by(F.struct("event_date", "about"), F.struct("ts", "consultation_id"))
    return (
        named.groupBy("user_key")
        .agg(
            F.when(F.count("solved") > 0, F.count_if(~F.col("solved")).cast("int")).alias("open_questions"),
            newest.alias("last"),
        )
        .select(
            "user_key",
            "open_questions",
            F.col("last.event_date").alias("asked_on"),
            F.col("last.about").alias("asked_about"),
        )
    )


def customer_service(profile: DataFrame, config: ProfilesConfig, asked: DataFrame | None = None) -> DataFrame:
    """Return service tier, talking points and last question of each row of USER_PROFILE: rows of CUSTOMER_SERVICE.

    Args:
        profile: USER_PROFILE.
        config: Settings of profiles.
        asked: Rows of :func:`last_consultations`; ``None`` where the platform delivers none.
    """
    level, activity, is_risky = F.col("level"), F.col("activity"), F.col("risk_level") == "high"
    tier = (
        F.when((activity == "dormant") & level.isin("A", "B", "C"), "win_back")
        .when((activity == "cooling") & level.isin("A", "B"), "win_back")
        .when(level.isin("A", "B"), "premier")
        .when(level == "C", "preferred")
        .otherwise("standard")
    )
    lowered_tier = F.when(tier == "premier", "preferred").otherwise("standard")
    service_tier = F.when(is_risky, lowered_tier).otherwise(tier)
    proposals = [F.when(service_tier == each, F.lit(getattr(config.phrases, f"care_{each}"))) for each in SERVICE_TIERS]
    points = F.filter(F.array(*_talking_points(config.phrases)), lambda point: point.isNotNull())
    rows = profile.withColumns(
        {
            "service_tier": service_tier,
            "proposal": F.coalesce(*proposals),
            "talking_points": F.slice(points, 1, TALKING_POINTS),
        }
    )
    if asked is None:
        return shaped(rows.withColumns(dict.fromkeys(_ASKED, F.lit(None))), CUSTOMER_SERVICE)
    joined = rows.join(asked, "user_key", "left")
    none_open = F.when(F.col("asked_on").isNull(), 0).otherwise(F.col("open_questions"))
    return shaped(joined.withColumn("open_questions", none_open), CUSTOMER_SERVICE)


def _talking_points(phrases: PhrasesConfig) -> list[Column]:
    """Return topic and text of each talking point that applies, else NULL; the most important first."""
    pause, gap, wait = F.col("days_since_purchase"), F.col("usual_gap_days"), F.col("next_purchase_days")
    favourite = F.get("interests", F.lit(0))["category"]
    score_change = {"points": F.round(F.abs("score_change_30d")).cast("int"), "date": F.col("compared_30d")}
    topics: dict[str, tuple[Column, dict[str, Column]]] = {
        "refunds": (
            F.array_contains("risk_reasons.signal", "refunds"),
            {"share": F.round(F.col("refund_share") * 100).cast("int")},
        ),
        "ratings": (F.col("low_rating_share") >= LOW_RATINGS, {}),
        "overdue": (
            (pause >= OVERDUE * gap) & (pause > 1) & F.col("next_purchase_unknown").isNull(),
            {"days": pause, "gap": F.round(gap).cast("int")},
        ),
        "falling": (F.col("trend_30d") == "falling", score_change),
        "rising": (F.col("trend_30d") == "rising", score_change),
        "expected": (wait <= SOON, {"days": F.greatest(F.round(wait), F.lit(1)).cast("int")}),
        "favourite": (favourite.isNotNull(), {"category": favourite}),
        "offers": (F.col("discount_share") >= OFFERS, {}),
        "premium": (F.col("price_tier") == "premium", {}),
        "budget": (F.col("price_tier") == "budget", {}),
    }
    return [
        F.when(applies, F.struct(F.lit(topic).alias("topic"), filled(getattr(phrases, topic), **values).alias("text")))
        for topic, (applies, values) in topics.items()
    ]
