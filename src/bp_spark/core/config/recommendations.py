"""Settings of recommendations: items for each scored user."""

from __future__ import annotations

from pydantic import Field

from bp_spark.core.config.base import Positive, Section


class RecommendationsConfig(Section):
    """Items for each scored user (``bp-spark recommend``); see docs/profiles.md."""

    every_days: Positive | None = Field(
        7,
        description="Days from one `recommendations` to the next that `bp-spark night` makes. 1: every night; null: only "
        "`bp-spark recommend` makes them.",
    )
    items: Positive = Field(10, description="Largest number of items that are recommended to a user.")
    window_days: Positive = Field(365, description="Days before the date whose purchases, carts and views count.")
    half_life_days: Positive = Field(
        60, description="Days after which the weight of a purchase, a cart, a favourite or a view has halved."
    )
    item_days: Positive = Field(
        90, description="An item without a purchase in so many days counts as sold out, and isn't recommended."
    )
    rest_days: int = Field(
        1,
        ge=0,
        description="An item that the user bought in so many days before the date isn't recommended to that user.",
    )
    candidates: Positive = Field(
        20,
        description="Items a user that each source proposes: users alike, and the user's level. The ranking chooses among "
        "them and the user's own items.",
    )
    own_candidates: Positive = Field(
        100,
        description="Items a user that the user bought or looked at before, those with most weight, to choose among.",
    )
    learning_users: Positive = Field(
        2_000, description="Users, chosen by a hash, whose purchases of the last 28 days the ranking learns from."
    )
    rank: Positive = Field(32, description="Length of the vectors of users and items (ALS).")
    iterations: Positive = Field(8, description="Iterations of ALS.")
