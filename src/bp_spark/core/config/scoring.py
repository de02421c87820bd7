"""Settings of scoring: the scoring run, what profiles say of users, whose label is worth most."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from bp_spark.core.config.base import Positive, Section

FeatureReader = Literal["files", "spark"]
FILLED_IN: Mapping[str, set[str]] = {
    "refunds": {"share"},
    "overdue": {"days", "gap"},
    "falling": {"points", "date"},
    "rising": {"points", "date"},
    "expected": {"days"},
    "favourite": {"category"},
    "risk_interval": {"value"},
    "risk_refunds": {"value"},
    "risk_volatility": {"value"},
}
"""Phrase -> the words in braces that it may have."""


class LabellingConfig(Section):
    """Whose label to ask for (``bp-spark select-labels``), and which answers to accept (``bp-spark add-labels``)."""

    candidates_per_label: Positive = Field(
        2,
        description="Number of users to consider for each requested label: those on whom the members disagree most. "
        "Those who differ most from each other are picked. 1: disagreement alone decides.",
    )
    max_spend: float = Field(
        1_000_000.0,
        gt=0,
        le=1e12,
        description="Largest spend over the horizon that a label may have, in the platform's currency.",
    )


class ScoringConfig(Section):
    """The nightly scoring run."""

    batch_mb: Positive = Field(8, description="Megabytes of Arrow data handed to Python at once.")
    partition_mb: Positive = Field(
        32,
        description="Megabytes of compressed features that one task reads, or one file where files are larger. Small "
        "enough that no task holds the whole night.",
    )
    reader: FeatureReader = Field(
        "files",
        description="What brings features to the model. `files`: its workers read the table's Parquet files "
        "themselves, several times cheaper than through Spark. Where they can't, Spark reads them after all. `spark`: "
        "always Spark, for executors that have no access of their own to the store.",
    )


class PhrasesConfig(Section):
    """What customer service and risk control read about a user, in plain words.

    Write the phrases in your language. Words in braces are filled in; a phrase may have those of its default only.
    """

    refunds: str = Field(
        "Has returned {share} % of what was bought in the past year: ask what went wrong.",
        description="Talking point: how much the user returned.",
    )
    ratings: str = Field(
        "Gave mostly low ratings in the past year: listen first.", description="Talking point: low ratings."
    )
    overdue: str = Field(
        "Last bought {days} days ago, where every {gap} days is usual: give a reason to come back.",
        description="Talking point: a longer pause than usual.",
    )
    falling: str = Field(
        "The score has fallen by {points} points since {date}: ask what is missing.",
        description="Talking point: a score that fell.",
    )
    rising: str = Field(
        "The score has risen by {points} points since {date}: show something new.",
        description="Talking point: a score that rose.",
    )
    expected: str = Field(
        "Is expected to buy again in about {days} days.", description="Talking point: the next purchase."
    )
    favourite: str = Field("Is most interested in {category}.", description="Talking point: the first interest.")
    offers: str = Field(
        "Buys mostly at reduced prices: speak of offers.", description="Talking point: mostly reduced prices."
    )
    premium: str = Field(
        "Buys in the upper price range: speak of quality.", description="Talking point: the upper price tier."
    )
    budget: str = Field(
        "Buys in the lower price range: speak of value for money.", description="Talking point: the lower price tier."
    )
    care_premier: str = Field(
        "Express delivery at no charge, and one person to turn to.",
        description="Delivery and care to propose to users of the tier premier.",
    )
    care_preferred: str = Field(
        "A delivery window of the user's choice.",
        description="Delivery and care to propose to users of the tier preferred.",
    )
    care_win_back: str = Field(
        "Ask what was missing; no delivery charge on the next order.",
        description="Delivery and care to propose to users of the tier win_back.",
    )
    care_standard: str = Field(
        "Standard delivery.", description="Delivery and care to propose to users of the tier standard."
    )
    risk_interval: str = Field(
        "What the user will spend is uncertain: the interval is {value} times the expected spend wide.",
        description="Reason of risk: a wide interval.",
    )
    risk_refunds: str = Field(
        "Refunds of the past year came to {value} times what was paid.", description="Reason of risk: refunds."
    )
    risk_volatility: str = Field(
        "Weekly spend varies: its standard deviation is {value} times its mean.",
        description="Reason of risk: volatile spend.",
    )

    @model_validator(mode="after")
    def _only_what_is_filled_in(self) -> PhrasesConfig:
        for name, phrase in self:
            allowed_words = FILLED_IN.get(name, set())
            unknown_words = set(re.findall(r"{(.*?)}", phrase)) - allowed_words
            if unknown_words:
                allowed = ", ".join(sorted(f"{{{word}}}" for word in allowed_words)) or "nothing"
                raise ValueError(f"{name} names {{{min(unknown_words)}}}; what can be filled in there is {allowed}")
        return self


class ProfilesConfig(Section):
    """What profiles add to each user's score (``bp-spark profile``, after each ``score``); see docs/profiles.md."""

    window_days: Positive = Field(180, description="Days before the score's date in which interests are looked for.")
    half_life_days: Positive = Field(
        60, description="Days after which the weight of a purchase, a view or a search has halved."
    )
    purchase_weight: float = Field(
        0.6,
        ge=0,
        description="Weight, in the interest in a category, of its share of the user's spend. The three weights are "
        "relative to each other.",
    )
    click_weight: float = Field(
        0.25,
        ge=0,
        description="Weight, in that interest, of its share of the user's browse, click, cart and favourite actions.",
    )
    search_weight: float = Field(
        0.15,
        ge=0,
        description="Weight, in that interest, of its share of the user's searches with a click on a result.",
    )
    category_levels: Positive = Field(2, description="Levels of a category path, from the broadest on, to distinguish.")
    interests: Positive = Field(5, description="Largest number of interests in a profile.")
    affinities: Positive = Field(20, description="Largest number of a user's categories in `category_affinity`.")
    trend_points: float = Field(
        5.0, gt=0, description="Points by which a score must have changed to be called rising or falling."
    )
    active_days: Positive = Field(
        30,
        description="Users are active if their last purchase or visit was at most this many days ago. `stage` goes by "
        "purchases alone: a user whose first purchase is at most so many days ago is new.",
    )
    dormant_days: Positive = Field(
        90,
        description="Users are dormant if their last purchase or visit was more days ago than this. In between, they "
        "are cooling. `stage` goes by purchases alone: lapsed, and lapsing in between.",
    )
    prior_purchases: float = Field(
        2.0,
        gt=0,
        description="Weight of the population's rhythm beside the user's own in the expected next purchase, in "
        "purchases.",
    )
    likely_active: float = Field(
        0.5, ge=0, le=1, description="Least `p_active` of users for whom a next purchase is expected."
    )
    refund_borders: tuple[float, float] = Field(
        (0.05, 0.2),
        description="Shares of the past year's money paid back, from which refunds are one and two points of risk.",
    )
    volatility_borders: tuple[float, float] = Field(
        (1.5, 2.5),
        description="Ratios of weekly spend's standard deviation to its mean, from which it is one and two points of "
        "risk.",
    )
    discount_rate: float = Field(
        0.10,
        ge=0,
        le=10,
        description="Rate a year by which later spend counts less in `value`: 0.10 is a usual cost of capital, 0 counts all "
        "spend alike.",
    )
    history_every_days: int = Field(
        7,
        ge=1,
        description="Days from one `cohorts` and `market_forecast` to the next. Both read all events, and move little "
        "in a night. 1: every night.",
    )
    region_segment: str | None = Field(
        None, description="Segment of `raw_users` that holds the region. Null: all users are in one."
    )
    phrases: PhrasesConfig = PhrasesConfig()

    @model_validator(mode="after")
    def _borders_rise(self) -> ProfilesConfig:
        if self.dormant_days < self.active_days:
            raise ValueError(f"dormant_days ({self.dormant_days}) must not be below active_days ({self.active_days})")
        for name in ("refund_borders", "volatility_borders"):
            first, second = getattr(self, name)
            if not 0 < first <= second:
                raise ValueError(f"{name} must be above 0 and rise")
        if not self.purchase_weight + self.click_weight + self.search_weight > 0:
            raise ValueError("purchase_weight, click_weight and search_weight must not all be 0")
        if self.interests > self.affinities:
            raise ValueError(f"interests ({self.interests}) must not be above affinities ({self.affinities})")
        return self
