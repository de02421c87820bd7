"""Settings of features and labels: how much of the past is read, and what is predicted from it."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from bp_spark.core.config.base import Fraction, Positive, Section, distinct


class FeaturesConfig(Section):
    """How much of a user's past is read."""

    windows: Annotated[tuple[Positive, ...], AfterValidator(distinct)] = Field(
        (7, 14, 30, 60, 90, 180, 365), description="Look-back windows, in days."
    )
    history_length: Positive = Field(
        64, description="Number of newest history tokens (orders and other events) that the sequence model sees."
    )
    recency_precision_bits: int | None = Field(
        4,
        ge=2,
        description="Binary digits to which the number of days without any event is rounded down. With 4 it is exact "
        "up to 15, by twos up to 31, by fours up to 63. Features, and so scores, of silent users then rarely change "
        "from night to night. Null: every day counts.",
    )


class LabelsConfig(Section):
    """What is predicted, for whom, and from which past dates."""

    horizon_days: Positive = Field(
        90,
        description="Days of spend to predict, from the as-of date on. Scores, intervals and levels refer to this "
        "horizon, or to one of `shorter_horizons` on a young platform.",
    )
    other_horizons: tuple[Positive, ...] = Field(
        (30, 180), description="Further horizons, in days, whose spend is predicted, too. May be empty."
    )
    shorter_horizons: tuple[Positive, ...] = Field(
        (60, 30, 14),
        description="Horizons, in days. Where events don't reach back far enough for `horizon_days`, `train` and `search` "
        "without a test date predict the longest of these that they allow. `horizon_days` is then one of the other "
        "horizons. Empty: an error instead.",
    )
    holdout_fraction: Fraction = Field(
        0.1,
        description="Share of users, chosen by hash, that no model is ever fitted on. They show how good a model is "
        "for users it has not seen.",
    )
    folds: int = Field(
        2,
        ge=2,
        description="Number of parts into which a hash divides all other users. Models of the remaining parts predict "
        "each part, for stacking, calibration and intervals.",
    )
    cutoffs: Positive = Field(8, description="Number of past as-of dates with a whole horizon that are labelled.")
    recent_cutoffs: int = Field(
        4,
        ge=0,
        description="Largest number of newer as-of dates that are labelled once a third of their horizon is over. The "
        "trees learn from them.",
    )
    cutoff_step_days: Positive = Field(14, description="Days between two as-of dates.")
    recency_half_life_days: Positive | None = Field(
        None, description="Days after which the weight of a past label has halved. Null: its age doesn't count."
    )
    given_weight: float = Field(
        1.0,
        gt=0,
        description="Weight in fitting of a label from a survey or a review (`bp-spark add-labels`). A label whose "
        "whole horizon was seen weighs 1.",
    )

    _configured_days: int | None = PrivateAttr(None)

    @property
    def is_shortened(self) -> bool:
        """Whether another horizon is configured, which is out of reach: see :meth:`with_horizon`."""
        return self._configured_days is not None

    @model_validator(mode="after")
    def _each_horizon_once(self) -> LabelsConfig:
        if self.horizon_days in self.other_horizons:
            raise ValueError(f"other_horizons {self.other_horizons} must not hold horizon_days ({self.horizon_days})")
        if len(set(self.other_horizons)) < len(self.other_horizons):
            raise ValueError(f"other_horizons {self.other_horizons} must hold each horizon once")
        return self

    def with_horizon(self, days: int) -> LabelsConfig:
        """Return these settings with another horizon; the configured one becomes one of the others.

        As-of dates lie closer together if half of the horizon is shorter than the step between them.
        """
        if days == self.horizon_days:
            return self
        others = sorted({*self.other_horizons, self.horizon_days} - {days})
        step = min(self.cutoff_step_days, max(1, days // 2))
        update = {"horizon_days": days, "other_horizons": tuple(others), "cutoff_step_days": step}
        shortened = self.model_copy(update=update)
        shortened._configured_days = self.horizon_days
        return shortened
