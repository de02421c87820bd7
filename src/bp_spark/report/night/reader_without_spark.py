"""What the page of a scoring run needs of path-based tables, read without Spark: aggregates by DuckDB, rows by Arrow.

The figures are those of :mod:`bp_spark.report.population`.
"""

from __future__ import annotations

from datetime import date, datetime, timedelta
from operator import itemgetter
from typing import Any

import pandas as pd

from bp_spark.core.config import TablesConfig
from bp_spark.core.errors import MissingTableError
from bp_spark.lakehouse import without_spark
from bp_spark.lakehouse.schema import Table
from bp_spark.lakehouse.tables import METRICS, RUNS
from bp_spark.report.night.data import FRESH_DAYS
from bp_spark.report.night.reader import MAX_STAGES, REPORT, Rows, days_up_to, of_newest_date
from bp_spark.report.population import BIN, GONE, NEW, Prospects

_MOST_GROUPS = 1_000_000
_PREVIOUS_DATE = "SELECT max(score_date) AS day FROM {namespace}.scores WHERE score_date < DATE '{score_date}'"
_DISTRIBUTION = """
    SELECT score_date, level, CAST(least(floor(score / {bin}), 100 // {bin} - 1) * {bin} AS INTEGER) AS bin, risk_level,
        count(*) AS users, sum(expected_spend) AS expected_spend
    FROM {namespace}.scores WHERE score_date IN (DATE '{score_date}', DATE '{previous_date}') GROUP BY ALL"""
_MIGRATION = """
    SELECT coalesce(b.level, '{new}') AS before, coalesce(a.level, '{gone}') AS after, count(*) AS users
    FROM (SELECT user_key, level FROM {namespace}.scores WHERE score_date = DATE '{before}') AS b
    FULL OUTER JOIN (SELECT user_key, level FROM {namespace}.scores WHERE score_date = DATE '{after}') AS a
        ON a.user_key = b.user_key
    GROUP BY ALL"""
# of features that are named equally often, Spark's mode takes the first by name
_REASONS = """
    WITH each AS (SELECT unnest(reasons, recursive := true) FROM {namespace}.scores WHERE score_date = DATE '{score_date}'),
    by_feature AS (
        SELECT "group", feature, count(*) AS users, count_if(contribution > 0) AS raised, sum(abs(contribution)) AS size
        FROM each WHERE "group" IS NOT NULL GROUP BY ALL)
    SELECT "group", CAST(sum(users) AS BIGINT) AS users, CAST(sum(raised) AS BIGINT) AS raised,
        sum(size) / sum(users) AS contribution,
        first(feature ORDER BY feature IS NULL, users DESC, feature) AS feature
    FROM by_feature GROUP BY "group" """
_FRESHNESS = """
    SELECT kind, max(event_date) AS newest, count_if(event_date = DATE '{last_day}') AS last_day, count(*) AS events
    FROM {namespace}.events WHERE event_date >= DATE '{first_day}' AND event_date < DATE '{score_date}' GROUP BY kind"""
_QUARANTINED = """
    SELECT source, rule, count(*) AS rows, count_if(ingest_id IN ({new_ingests})) AS new_rows
    FROM {namespace}.quarantine GROUP BY ALL"""
_PROSPECTS = """
    SELECT count(*) AS users, sum(p_active) AS purchases, sum(expected_spend) AS spend
    FROM {namespace}.prospect_scores WHERE score_date = DATE '{score_date}'"""


class DuckdbReader:
    """Reads without a session; see :class:`bp_spark.report.night.reader.NightReader`.

    All methods raise :class:`bp_spark.lakehouse.without_spark.UnreadableError` where a table is left to Spark.
    """

    def __init__(self, config: TablesConfig) -> None:
        self.config = config

    def scoring_runs(self) -> Rows:
        """See :meth:`NightReader.scoring_runs`."""
        rows = [
            {
                "run_id": row["run_id"],
                "started_at": row["started_at"],
                "status": row["status"],
                "score_date": date.fromisoformat(figures["score_date"]),
                "bundle": figures.get("bundle"),
                "users": None if figures.get("users") is None else int(figures["users"]),
                "expected_spend": None if figures.get("expected_spend") is None else float(figures["expected_spend"]),
                "horizon_days": None if figures.get("horizon_days") is None else int(figures["horizon_days"]),
            }
            for row in without_spark.rows_where(self.config, RUNS, stage="score")
            if row["status"] != "failed" and (figures := row["figures"] or {}).get("score_date")
        ]
        return sorted(rows, key=itemgetter("started_at"))

    def stages(self, scoring_run: dict[str, Any], after: datetime | None) -> Rows:
        """See :meth:`NightReader.stages`."""
        rows = [
            {**row, "started": f"{row['started_at']:%Y-%m-%d %H:%M}"}
            for row in without_spark.rows_where(self.config, RUNS)
            if (row["job"] or "") != REPORT
            and (
                row["run_id"] == scoring_run["run_id"]
                or (row["started_at"] <= scoring_run["started_at"] and (after is None or row["started_at"] > after))
            )
        ]
        return sorted(rows, key=itemgetter("started_at", "stage"))[-MAX_STAGES:]

    def previous_date(self, score_date: date) -> date | None:
        """See :meth:`NightReader.previous_date`."""
        day = self._query(_PREVIOUS_DATE, score_date=score_date)["day"][0]
        return day if isinstance(day, date) else None

    def distribution(self, score_date: date, previous_date: date | None) -> pd.DataFrame:
        """See :meth:`NightReader.distribution`."""
        return self._query(_DISTRIBUTION, bin=BIN, score_date=score_date, previous_date=previous_date or score_date)

    def migration(self, before: date, after: date) -> pd.DataFrame:
        """See :meth:`NightReader.migration`."""
        return self._query(_MIGRATION, new=NEW, gone=GONE, before=before, after=after)

    def reasons(self, score_date: date) -> pd.DataFrame:
        """See :meth:`NightReader.reasons`."""
        return self._query(_REASONS, score_date=score_date)

    def freshness(self, score_date: date) -> pd.DataFrame:
        """See :meth:`NightReader.freshness`."""
        last_day, first_day = score_date - timedelta(days=1), score_date - timedelta(days=FRESH_DAYS)
        return self._query(_FRESHNESS, last_day=last_day, first_day=first_day, score_date=score_date)

    def quarantine(self, new_ingests: list[int]) -> pd.DataFrame | None:
        """See :meth:`NightReader.quarantine`."""
        try:
            return self._query(_QUARANTINED, new_ingests=", ".join(map(str, new_ingests)) or "NULL")
        except MissingTableError:
            return None

    def metrics(self, bundle_digest: str) -> pd.DataFrame:
        """See :meth:`NightReader.metrics`."""
        return self._rows(METRICS, bundle_digest=bundle_digest)

    def prospects(self, score_date: date) -> Prospects | None:
        """See :meth:`NightReader.prospects`."""
        try:
            sums = self._query(_PROSPECTS, score_date=score_date)
        except MissingTableError:
            return None
        users, purchases, spend = sums.iloc[0]
        return Prospects(int(users), purchases, spend) if users else None

    def rows_of(self, table: Table, score_date: date, days_before: int = 0) -> pd.DataFrame:
        """See :meth:`NightReader.rows_of`."""
        return of_newest_date(self._rows(table, score_date=days_up_to(score_date, days_before)))

    def aggregate(self, table: Table, query: str) -> pd.DataFrame:
        """See :meth:`NightReader.aggregate`; a table from before one of the columns is left to Spark."""
        try:
            return self._query(query, table=f"{self.config.namespace}.{table.name}")
        except MissingTableError:
            return pd.DataFrame()

    def currency(self) -> str | None:
        """See :meth:`NightReader.currency`."""
        return without_spark.commit_metadata(self.config, "events").get("currency")

    def _query(self, query: str, **values: Any) -> pd.DataFrame:
        filled = query.format(namespace=self.config.namespace, **values)
        columns, rows = without_spark.query_in_duckdb(self.config, filled, _MOST_GROUPS)
        return pd.DataFrame(rows, columns=columns)

    def _rows(self, table: Table, **values: Any) -> pd.DataFrame:
        try:
            rows = without_spark.rows_where(self.config, table, **values)
        except MissingTableError:
            rows = []
        frame = pd.DataFrame(rows, columns=[column.name for column in table.columns])
        # a column of NULLs would be one of objects
        return frame.astype({column.name: "float64" for column in table.columns if column.type.startswith("double")})
