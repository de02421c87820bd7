"""What the page of a scoring run needs of the tables, and how Spark reads it."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import Any, Protocol

import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.ingest.clean import currency_of
from bp_spark.lakehouse.schema import Table, rows_of_date
from bp_spark.lakehouse.store import Lakehouse, read_as_declared
from bp_spark.lakehouse.tables import METRICS, RUNS
from bp_spark.report import population
from bp_spark.report.night.data import FRESH_DAYS
from bp_spark.report.population import Prospects

REPORT = "report"
"""Job whose stages no page shows."""
MAX_STAGES = 200
"""Most stages of a page."""
Rows = list[dict[str, Any]]


class NightReader(Protocol):
    """Reader of figures of a scoring run: as many rows as there are groups, not users."""

    def scoring_runs(self) -> Rows:
        """Return the scoring runs that ended well, oldest first: some hundreds a year.

        Returns:
            ``run_id, started_at, status, score_date, bundle, users, expected_spend, horizon_days``, a row for each run and
            repetition. ``horizon_days`` is ``None`` in runs of older versions.
        """

    def stages(self, scoring_run: dict[str, Any], after: datetime | None) -> Rows:
        """Return the stages up to the end of a scoring run, oldest first; at most the newest MAX_STAGES.

        Args:
            scoring_run: Row of :meth:`scoring_runs`; all its stages are among them.
            after: Time after which the other stages started; ``None``: any.

        Returns:
            Rows of RUNS and ``started``, the time in words.
        """

    def previous_date(self, score_date: date) -> date | None:
        """Return the newest scored date before another."""

    def distribution(self, score_date: date, previous_date: date | None) -> pd.DataFrame:
        """Return :func:`bp_spark.report.population.distribution` of a date and the one before it."""

    def migration(self, before: date, after: date) -> pd.DataFrame:
        """Return :func:`bp_spark.report.population.migration` between two dates."""

    def reasons(self, score_date: date) -> pd.DataFrame:
        """Return :func:`bp_spark.report.population.reasons` of a date."""

    def freshness(self, score_date: date) -> pd.DataFrame:
        """Return :func:`bp_spark.report.population.freshness` of the FRESH_DAYS days before a date."""

    def quarantine(self, new_ingests: list[int]) -> pd.DataFrame | None:
        """Return :func:`bp_spark.report.population.quarantined`; ``None`` where nothing was cleaned yet."""

    def metrics(self, bundle_digest: str) -> pd.DataFrame:
        """Return the rows of METRICS of a bundle."""

    def prospects(self, score_date: date) -> Prospects | None:
        """Return :func:`bp_spark.report.population.prospects_of` of a date."""

    def rows_of(self, table: Table, score_date: date, days_before: int = 0) -> pd.DataFrame:
        """Return a date's rows of a table of figures; none without the table.

        Args:
            table: declaration of the table.
            score_date: the date.
            days_before: where the date has no rows, those of the newest of so many days before it are returned.
        """

    def aggregate(self, table: Table, query: str) -> pd.DataFrame:
        """Return the rows of an aggregate, in the SQL that Spark and DuckDB share; none without the table.

        Args:
            table: declaration of the table.
            query: names it ``{table}``.
        """

    def currency(self) -> str | None:
        """Return the currency that events are in, if their cleaning recorded it."""


def days_up_to(day: date, days_before: int) -> list[date]:
    """Return a date and so many days before it."""
    return [day - timedelta(days=days) for days in range(days_before + 1)]


def of_newest_date(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the newest ``score_date``."""
    return rows[rows["score_date"] == rows["score_date"].max()].reset_index(drop=True) if len(rows) else rows


class SparkReader:
    """Reads by a Spark session; see :class:`NightReader`."""

    def __init__(self, lakehouse: Lakehouse) -> None:
        self.lakehouse = lakehouse

    def scoring_runs(self) -> Rows:
        """See :meth:`NightReader.scoring_runs`."""
        figures = F.col("figures")
        runs = read_as_declared(self.lakehouse, RUNS)
        ended_well = runs.filter((F.col("stage") == "score") & (F.col("status") != "failed"))
        rows = (
            ended_well.select(
                "run_id",
                "started_at",
                "status",
                F.to_date(figures["score_date"]).alias("score_date"),
                figures["bundle"].alias("bundle"),
                figures["users"].cast("long").alias("users"),
                figures["expected_spend"].cast("double").alias("expected_spend"),
                figures["horizon_days"].cast("int").alias("horizon_days"),
            )
            .filter("score_date IS NOT NULL")
            .orderBy("started_at")
            .collect()
        )
        return [row.asDict() for row in rows]

    def stages(self, scoring_run: dict[str, Any], after: datetime | None) -> Rows:
        """See :meth:`NightReader.stages`."""
        stages = read_as_declared(self.lakehouse, RUNS).filter(F.coalesce("job", F.lit("")) != REPORT)
        is_own = F.col("run_id") == scoring_run["run_id"]
        stages = stages.filter(is_own | (F.col("started_at") <= F.lit(scoring_run["started_at"])))
        if after is not None:
            stages = stages.filter(is_own | (F.col("started_at") > F.lit(after)))
        # formatted by Spark: Python would use the time zone of the machine
        stages = stages.withColumn("started", F.date_format("started_at", "yyyy-MM-dd HH:mm"))
        return [
            row.asDict()
            for row in stages.orderBy(F.desc("started_at"), F.desc("stage")).limit(MAX_STAGES).collect()[::-1]
        ]

    def previous_date(self, score_date: date) -> date | None:
        """See :meth:`NightReader.previous_date`."""
        newest = self._scores().filter(F.col("score_date") < F.lit(score_date)).agg(F.max("score_date")).first()
        return None if newest is None else newest[0]

    def distribution(self, score_date: date, previous_date: date | None) -> pd.DataFrame:
        """See :meth:`NightReader.distribution`."""
        both = self._scores(score_date).unionByName(rows_of_date(self._scores(), previous_date))
        return population.distribution(both).toPandas()

    def migration(self, before: date, after: date) -> pd.DataFrame:
        """See :meth:`NightReader.migration`."""
        return population.migration(self._scores(before), self._scores(after)).toPandas()

    def reasons(self, score_date: date) -> pd.DataFrame:
        """See :meth:`NightReader.reasons`."""
        return population.reasons(self._scores(score_date)).toPandas()

    def freshness(self, score_date: date) -> pd.DataFrame:
        """See :meth:`NightReader.freshness`."""
        return population.freshness(self.lakehouse.read("events"), score_date, FRESH_DAYS).toPandas()

    def quarantine(self, new_ingests: list[int]) -> pd.DataFrame | None:
        """See :meth:`NightReader.quarantine`."""
        if not self.lakehouse.exists("quarantine"):
            return None
        return population.quarantined(self.lakehouse.read("quarantine"), new_ingests).toPandas()

    def metrics(self, bundle_digest: str) -> pd.DataFrame:
        """See :meth:`NightReader.metrics`."""
        if not self.lakehouse.exists("metrics"):
            return pd.DataFrame(columns=[column.name for column in METRICS.columns])
        rows = read_as_declared(self.lakehouse, METRICS)
        return rows.filter(F.col("bundle_digest") == bundle_digest).toPandas()

    def prospects(self, score_date: date) -> Prospects | None:
        """See :meth:`NightReader.prospects`."""
        return population.prospects_of(self.lakehouse, score_date)

    def rows_of(self, table: Table, score_date: date, days_before: int = 0) -> pd.DataFrame:
        """See :meth:`NightReader.rows_of`."""
        if not self.lakehouse.exists(table.name):
            return pd.DataFrame()
        of_dates = F.col("score_date").isin(days_up_to(score_date, days_before))
        return of_newest_date(read_as_declared(self.lakehouse, table).filter(of_dates).toPandas())

    def aggregate(self, table: Table, query: str) -> pd.DataFrame:
        """See :meth:`NightReader.aggregate`."""
        if not self.lakehouse.exists(table.name):
            return pd.DataFrame()
        return self.lakehouse.spark.sql(query, table=read_as_declared(self.lakehouse, table)).toPandas()

    def currency(self) -> str | None:
        """See :meth:`NightReader.currency`."""
        return currency_of(self.lakehouse)

    def _scores(self, score_date: date | None = None) -> DataFrame:
        scores = self.lakehouse.read("scores")
        return scores if score_date is None else rows_of_date(scores, score_date)
