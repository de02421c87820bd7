"""Settings of evaluation: promotion and backtests, drift, fairness."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bp_spark.core.config.base import Folder, Fraction, Positive, Section

FairnessFigure = Literal[
    "score",
    "level_A",
    "level_B",
    "level_C",
    "level_D",
    "level_E",
    "mae",
    "relative_error",
    "calibration",
    "coverage",
    "top_found",
]


class EvaluationConfig(Section):
    """How a trained bundle is judged."""

    max_users: Positive = Field(
        200_000,
        description="Users brought to the driver for exact metrics and calibration. A larger platform is sampled by "
        "hash.",
    )
    resamples: Positive = Field(500, description="Resamples of users behind each interval and comparison.")
    margin: Fraction = Field(
        0.002,
        description="Share of the promoted bundle's normalised Gini and MAE by which a new one may surely be worse and "
        "still be promoted. With many users every difference is certain, however small.",
    )
    external_segment: str | None = Field(
        None,
        description="Segment of `raw_users` with an ordered bracket, such as income, to compare scores with. Null: "
        "none.",
    )
    reports: Folder = Field("reports", description="Folder of the reports of backtests and nights.")


class DriftConfig(Section):
    """What ``bp-spark drift`` compares, and from which values on it alarms; see docs/monitoring.md."""

    max_users: Positive = Field(
        200_000,
        description="Largest number of users of a night, and of rows of the training set, whose features are counted "
        "into bins. Also of users of a past night whose spend is compared with its scores. More are sampled by hash.",
    )
    max_psi: float = Field(
        0.25,
        gt=0,
        description="Largest population stability index of a feature or the score against training. Above 0.25 is by "
        "custom a large shift.",
    )
    max_ks: float = Field(0.3, gt=0, le=1, description="Largest Kolmogorov-Smirnov distance against training.")
    max_psi_night: float = Field(
        0.1,
        gt=0,
        description="Largest population stability index against the night before. Below 0.1 is by custom no shift.",
    )
    max_ks_night: float = Field(
        0.1, gt=0, le=1, description="Largest Kolmogorov-Smirnov distance against the night before."
    )
    not_watched: tuple[str, ...] = Field(
        (),
        description="Features that are recorded but never alarm, such as windows longer than the platform's history.",
    )
    moved_points: float = Field(
        10.0, gt=0, lt=100, description="A score has moved if it differs by more points from that of the night before."
    )
    max_moved: float = Field(
        0.005, ge=0, le=1, description="Largest share of users whose score moved without any new event."
    )
    max_calibration_error: float = Field(
        0.2, gt=0, description="Largest difference between mean expected and mean actual spend, relative to the actual."
    )
    max_coverage_gap: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="How far the share of users whose spend was inside `low`..`high` may be below `fusion.coverage`.",
    )
    max_rank_loss: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="How far Spearman's correlation and the normalised Gini may be below the bundle's on its test "
        "date.",
    )


class FairnessConfig(Section):
    """The report by segments of ``raw_users``, by ``bp-spark fairness``; see docs/monitoring.md.

    No setting makes a segment a feature.
    """

    every_days: Positive | None = Field(
        7,
        description="Days from one report to the next that `bp-spark night` makes, if users have segments. 1: every night; "
        "null: only `bp-spark fairness` makes them.",
    )
    small_below: Positive = Field(
        100,
        description="Groups of fewer users are marked as small and never alarm, because their intervals say little.",
    )
    min_ratio: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="Least ratio of a group's figure to that of all others: the four-fifths rule (29 CFR 1607.4 D).",
    )
    max_ratio: float = Field(1.25, gt=1, description="Largest ratio of a group's figure to that of all others.")
    watched: tuple[FairnessFigure, ...] = Field(
        ("relative_error", "calibration", "coverage", "top_found"),
        description="Figures whose ratio must lie between the two. By default not the score and levels, because groups "
        "that spend more score higher.",
    )
