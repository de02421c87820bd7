"""Data of the page of a scoring run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import pandas as pd

from bp_spark.report.population import Prospects

FRESH_DAYS = 28
"""Days before the score date in which the newest events are looked for."""


@dataclass(frozen=True)
class PageData:
    """Data of the page of a scoring run.

    Attributes:
        score_date: The scored date.
        previous_date: The scored date before it, if there is one.
        currency: Currency of money.
        smallest_group: Least users of a group that has figures.
        stages: Rows of RUNS since the scoring run before, oldest first, and ``started``, the time in words.
        distribution: See :func:`bp_spark.report.population.distribution`, of both dates.
        migration: See :func:`bp_spark.report.population.migration`; empty without a date before.
        history: A row a date, oldest first: ``score_date, expected_spend, users, bundle``.
        reasons: See :func:`bp_spark.report.population.reasons`.
        descriptions: Feature -> its description.
        freshness: See :func:`bp_spark.report.population.freshness`.
        quarantine: See :func:`bp_spark.report.population.quarantined`; ``None`` where nothing was cleaned yet.
        model: Facts of the bundle, as name -> value, ``horizon_days`` among them.
        metrics: Rows of METRICS of the bundle.
        prospects: Sums over the prospects; ``None`` where none was scored.
        totals: Rows of TOTALS of the date and the bundle; none where the bundle knows no error of sums.
        cohorts: Rows of COHORTS of the date and the bundle; none where the table holds another date.
        market: Rows of MARKET_FORECAST of the date; none where nothing was forecast.
        decisions: See :func:`bp_spark.report.night.decisions.read`.
        watched: ``drift`` and ``fairness``, where there are such tables: their rows of the date.
    """

    score_date: date
    previous_date: date | None
    currency: str
    smallest_group: int
    stages: Sequence[Mapping[str, Any]]
    distribution: pd.DataFrame
    migration: pd.DataFrame
    history: pd.DataFrame
    reasons: pd.DataFrame
    descriptions: Mapping[str, str]
    freshness: pd.DataFrame
    quarantine: pd.DataFrame | None
    model: Mapping[str, object]
    metrics: pd.DataFrame
    prospects: Prospects | None = None
    totals: pd.DataFrame = field(default_factory=pd.DataFrame)
    cohorts: pd.DataFrame = field(default_factory=pd.DataFrame)
    market: pd.DataFrame = field(default_factory=pd.DataFrame)
    decisions: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    watched: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def current(self) -> pd.DataFrame:
        """Rows of ``distribution`` of the score date."""
        return self.distribution[self.distribution["score_date"] == self.score_date]

    @property
    def previous(self) -> pd.DataFrame:
        """Rows of ``distribution`` of the date before."""
        return self.distribution[self.distribution["score_date"] == self.previous_date]

    @property
    def spend_name(self) -> str:
        """Heading of a column of expected spend."""
        return f"expected spend of {self.model['horizon_days']} days, {self.currency}"
