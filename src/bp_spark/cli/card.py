"""A user's card: what the tables say of one user, in words for people.

In: a reader of rows and a user's key. Out: lines of text, by name. Only rows of that key are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from bp_spark.core.errors import DataError, MissingTableError
from bp_spark.features.stages import PROSPECT
from bp_spark.lakehouse.schema import Table
from bp_spark.lakehouse.tables import (
    CAMPAIGN_CONTACTS,
    CONSULTATION_TOPICS,
    CONSULTATIONS,
    CUSTOMER_SERVICE,
    PROSPECT_FEATURES,
    PROSPECT_SCORES,
    RECOMMENDATIONS,
    RISK_CONTROL,
    SCORES,
    USER_PROFILE,
)

NEWEST_CONTACTS = 3
"""Contacts and consultations that are named; the others are counted."""
MOST_TEXT = 120
"""Characters that are shown of an open question."""
SHOWN_ITEMS = 5
"""Recommended items that are named."""

Row = Mapping[str, Any]
Fact = tuple[str, Sequence[str]]
"""A name and its lines of text; none where nothing is known."""


@dataclass(frozen=True)
class Card:
    """Rows of one user, as of the date of the profile.

    Attributes:
        profile: Row of ``user_profile``; of a user without a purchase, the newest row of ``prospect_scores``.
        score: Row of ``scores``, if it is still there.
        risk: Row of ``risk_control``, if there is one.
        service: Row of ``customer_service``, if there is one.
        contacts: Rows of ``campaign_contacts``, newest first.
        consultations: Rows of ``consultations``, newest first.
        recommendations: Rows of ``recommendations`` of the newest date, best first.
    """

    profile: Row
    score: Row | None
    risk: Row | None
    service: Row | None
    contacts: Sequence[Row]
    consultations: Sequence[Row]
    recommendations: Sequence[Row] = ()


def read(rows_where: Callable[..., list[dict[str, Any]]], user_key: str) -> Card:
    """Return the rows of a user.

    Args:
        rows_where: Reader of the tables; see :func:`bp_spark.cli.queries.rows_where`.
        user_key: The user.

    Raises:
        MissingTableError: There is no table of profiles yet.
        DataError: The user has no profile, and no score as a prospect.
    """

    def rows(table: Table, **values: Any) -> list[dict[str, Any]]:
        try:
            return rows_where(table, user_key=user_key, **values)
        except MissingTableError:
            return []

    profiles = rows_where(USER_PROFILE, user_key=user_key)
    profiles = profiles or sorted(rows(PROSPECT_SCORES), key=lambda row: row["score_date"], reverse=True)
    if not profiles:
        # the message may end in a log, so it doesn't name the user
        raise DataError(
            USER_PROFILE.name,
            "holds no profile of that user; users have one from the first night on that scores them, and --user finds those "
            "whose keys were made with privacy.secret",
            column="user_key",
        )
    profile = profiles[0]

    def of_date(table: Table) -> Row | None:
        return next(iter(rows(table, score_date=profile["score_date"])), None)

    return Card(
        profile=profile,
        score=of_date(SCORES),
        risk=of_date(RISK_CONTROL),
        service=of_date(CUSTOMER_SERVICE),
        contacts=sorted(rows(CAMPAIGN_CONTACTS), key=lambda row: (row["first_day"], row["contact_id"]), reverse=True),
        consultations=_with_topics(rows(CONSULTATIONS), rows(CONSULTATION_TOPICS)),
        recommendations=_of_newest_date(rows(RECOMMENDATIONS)),
    )


def _with_topics(consultations: Sequence[Row], topics: Sequence[Row]) -> list[Row]:
    """Return the consultations, newest first; one without a topic of the platform's gets that of its text."""
    topic_by_id = {row["consultation_id"]: row["topic"] for row in topics}
    named = [
        {**row, "topic": (row["topic"] or "").strip() or topic_by_id.get(row["consultation_id"])}
        for row in consultations
    ]
    return sorted(named, key=lambda row: (row["ts"], row["consultation_id"]), reverse=True)


def _of_newest_date(recommendations: Sequence[Row]) -> list[Row]:
    newest = max((row["score_date"] for row in recommendations), default=None)
    return sorted((row for row in recommendations if row["score_date"] == newest), key=lambda row: row["rank"])


def facts(card: Card) -> list[tuple[str, str]]:
    """Return a card in words, most important first: a line each, the name in its first line."""
    profile = card.profile
    is_prospect = profile["stage"] == PROSPECT
    all_facts: list[Fact] = [
        ("user key", [profile["user_key"]]),
        ("stage", [profile["stage"]] if profile["stage"] else []),
        ("score", [f"{profile['score']:.1f} of 100, level {profile['level']}"]),
        ("expected spend", _expected_spend(card)),
        ("chance of a first purchase" if is_prospect else "chance of any spend", [f"{profile['p_active']:.0%}"]),
        *(_of_prospect(profile) if is_prospect else _of_buyer(card)),
        ("recommendations", [_recommendation(row) for row in card.recommendations[:SHOWN_ITEMS]]),
        ("campaigns", _newest(card.contacts, _contact)),
        ("open questions", [_question(row) for row in card.consultations if row["solved"] is False]),
        ("consultations", _newest(card.consultations, _consultation)),
    ]
    # a line break in a value would look like a line of its own
    return [
        ("" if number else name, " ".join(line.split()))
        for name, lines in all_facts
        for number, line in enumerate(lines)
    ]


def _of_prospect(score: Row) -> list[Fact]:
    reasons = [column.comment for column in PROSPECT_FEATURES.columns if column.name == score["reason"]]
    return [("because of", reasons)]


def _of_buyer(card: Card) -> list[Fact]:
    profile = card.profile
    return [
        ("because of", profile["reasons"]),
        ("trend", _trends(profile)),
        ("risk", _risk(card)),
        ("activity", _activity(profile)),
        ("next purchase", _next_purchase(profile)),
        ("usual order", _usual_order(profile)),
        ("interests", [f"{interest['category']} ({interest['weight']:.0%})" for interest in profile["interests"]]),
        ("prices", [profile["price_tier"]] if profile["price_tier"] else []),
        ("refunds to come", _refunds(profile)),
        *_service(card.service),
    ]


def _expected_spend(card: Card) -> list[str]:
    profile = card.profile
    spend = profile["expected_spend"]
    by_horizon = sorted(((card.score or {}).get("expected_by_horizon") or {}).items())
    own = (card.score or {}).get("horizon_days")
    # rows of older versions don't say which horizon is the bundle's own
    main_horizons = [own] if own else [days for days, expected in by_horizon if expected == spend]
    over = f" in {main_horizons[0]} days" if len(main_horizons) == 1 else ""
    others = [f"{expected:,.2f} in {days} days" for days, expected in by_horizon if days not in main_horizons]
    return [f"{spend:,.2f}{over}; with 90 % between {profile['low']:,.2f} and {profile['high']:,.2f}", *others]


def _trends(profile: Row) -> list[str]:
    lines = []
    for span in (30, 90):
        trend, change = profile[f"trend_{span}d"], profile[f"score_change_{span}d"]
        if trend is not None:
            points = "" if change is None else f" ({change:+.1f} points)"
            lines.append(f"{trend} since {profile[f'compared_{span}d']}{points}")
    return lines


def _risk(card: Card) -> list[str]:
    profile = card.profile
    reasons = card.risk["reasons"] if card.risk else []
    return [f"{profile['risk_level']} ({profile['risk_points']} of 6 points)", *(reason["text"] for reason in reasons)]


def _activity(profile: Row) -> list[str]:
    silent_days = {"last purchase": profile["days_since_purchase"], "last visit": profile["days_since_visit"]}
    pauses = [f"{what} {_days(days)} before" for what, days in silent_days.items() if days is not None]
    return [", ".join([profile["activity"], *pauses])]


def _next_purchase(profile: Row) -> list[str]:
    if profile["next_purchase_on"] is not None:
        return [f"about {profile['next_purchase_on']}, in {_days(round(profile['next_purchase_days']))}"]
    return [f"unknown: {profile['next_purchase_unknown']}"] if profile["next_purchase_unknown"] else []


def _days(count: int) -> str:
    return "1 day" if count == 1 else f"{count:,} days"


def _usual_order(profile: Row) -> list[str]:
    parts = (
        ("usual_order_value", "{:,.2f} a purchase day"),
        ("usual_gap_days", "every {:,.1f} days"),
        ("purchase_days", "{:,} purchase days so far"),
    )
    texts = [text.format(profile[name]) for name, text in parts if profile[name] is not None]
    return [", ".join(texts)] if texts else []


def _refunds(profile: Row) -> list[str]:
    # a table from before there were any hasn't the column
    share = profile.get("expected_refund_share")
    return [] if share is None else [f"{share:.1%} of what is paid"]


def _service(service: Row | None) -> list[Fact]:
    if service is None:
        return []
    points = [point["text"] for point in service["talking_points"]]
    # nor has that of an older night
    proposal = service.get("proposal")
    return [
        ("service tier", [service["service_tier"]]),
        ("propose", [proposal] if proposal else []),
        ("talking points", points),
    ]


def _newest(rows: Sequence[Row], in_words: Callable[[Row], str]) -> list[str]:
    more = len(rows) - NEWEST_CONTACTS
    return [*map(in_words, rows[:NEWEST_CONTACTS]), *([f"and {more:,} earlier"] if more > 0 else [])]


def _contact(row: Row) -> str:
    kind = f", {row['kind']}" if row["kind"] else ""
    return f"{row['first_day']}: {row['campaign_id']}{kind}"


def _consultation(row: Row) -> str:
    solved = {True: "solved", False: "not solved"}.get(row["solved"])
    return f"{row['event_date']}: " + ", ".join(part for part in (row["channel"], row["topic"], solved) if part)


def _question(row: Row) -> str:
    asked = row["text"] or row["topic"] or row["channel"] or ""
    return f"{row['event_date']}: {shorten(asked, MOST_TEXT, placeholder=' …')}"


def _recommendation(row: Row) -> str:
    price = "" if row["price"] is None else f", about {row['price']:,.2f}"
    # rows of an older night have no names
    item = f"{row['item']} ({row['item_id']})" if row.get("item") else row["item_id"]
    return f"{item}: {row['reason'].replace('_', ' ')}, {row['score']:.0%} within 28 days{price}"
