"""The files that were ingested, the versions in which they came, and the raw rows that a later version supersedes.

A file that comes again under its name is a new version of it. Days from the first to the last of its rows are then as it says:
what older versions say about these days is superseded. Their rows of other days stay, because a file may hold only the newest
weeks. A data file of a Delta table has no other meaning than the table: its newest version, and its removal from the table,
supersede all its older rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from bp_spark.ingest.sources.contract import SNAPSHOT, Delivery
from bp_spark.lakehouse.store import Lakehouse, read_as_declared
from bp_spark.lakehouse.tables import DELIVERIES, RAW_CAMPAIGNS, RAW_TABLES

GONE = "gone"
"""Fingerprint of a data file that is no part of its Delta table any more."""

_MARKS = (
    "table string, name string, ingest_id bigint, is_snapshot boolean, is_whole boolean, is_touched boolean, "
    "spans array<struct<first_day: date, last_day: date>>"
)


@dataclass(frozen=True)
class Ledger:
    """What ``deliveries`` says about the files of one source.

    Attributes:
        last: number of the last ingest of any source, 0 for none.
        newest: (raw table, name) -> number of the ingest that brought the newest version, and the fingerprints it had.
    """

    last: int
    newest: Mapping[tuple[str, str], tuple[int, frozenset[str]]]

    @classmethod
    def read(cls, lakehouse: Lakehouse, sources: Collection[str]) -> Ledger:
        """Read the ledger of a source.

        Args:
            lakehouse: the tables.
            sources: identities of the source; see :func:`bp_spark.ingest.sources.source_digests`.
        """
        rows = entries(lakehouse)
        fingerprints: dict[tuple[str, str], dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for row in rows:
            if row["source"] in sources:
                fingerprints[row["table"], row["name"]][row["ingest_id"]].add(row["fingerprint"])
        newest = {file: (max(found), frozenset(found[max(found)])) for file, found in fingerprints.items()}
        return cls(max((row["ingest_id"] for row in rows), default=0), newest)

    def fresh(self, listed: Iterable[Delivery]) -> list[Delivery]:
        """Return the listed files that were not ingested yet, or changed since."""
        return [d for d in listed if d.fingerprint not in self._fingerprints(d)]

    def repeated(self, deliveries: Iterable[Delivery]) -> list[Delivery]:
        """Return the files that came before with another fingerprint, without those of Delta tables."""
        return [d for d in deliveries if (d.table, d.name) in self.newest and not d.fingerprint.startswith(SNAPSHOT)]

    def ingest_of(self, delivery: Delivery) -> int:
        """Return the number of the ingest that brought a file's newest version."""
        return self.newest[delivery.table, delivery.name][0]

    def gone(self, listed: Collection[Delivery], snapshots: Mapping[str, str]) -> list[Delivery]:
        """Return the data files that have left their Delta tables since they were ingested.

        Args:
            listed: all files that exist now.
            snapshots: see :meth:`bp_spark.ingest.sources.contract.Source.snapshots`. A table without any file is left alone:
                it is more likely gone than empty.
        """
        now = {(d.table, d.name) for d in listed}
        listed_tables = {d.table for d in listed}
        return [
            Delivery(table, name, GONE)
            for (table, name), (_, fingerprints) in sorted(self.newest.items())
            if table in snapshots.keys() & listed_tables
            and name.startswith(snapshots[table])
            and (table, name) not in now
            and any(fingerprint.startswith(SNAPSHOT) for fingerprint in fingerprints)
        ]

    def _fingerprints(self, delivery: Delivery) -> frozenset[str]:
        return self.newest.get((delivery.table, delivery.name), (0, frozenset[str]()))[1]


@dataclass(frozen=True)
class Versions:
    """Versions of files that came more than once, and data files of Delta tables.

    Attributes:
        marks: for each version the columns of ``_MARKS``: ``spans`` are days that later versions hold; ``is_whole`` says that
            a later version supersedes all rows; ``is_touched`` says that the ingests asked for bring a version of the file.
        changes_older: whether the ingests asked for may supersede, or number anew, what older ingests brought.
    """

    marks: Sequence[tuple[str, str, int, bool, bool, bool, list[tuple[date, date]]]]
    changes_older: bool

    @classmethod
    def read(cls, lakehouse: Lakehouse, sources: Collection[str], first: int, last: int) -> Versions:
        """Read the versions of all files.

        Args:
            lakehouse: the tables.
            sources: identities of one source that count as one; see :func:`bp_spark.ingest.sources.source_digests`.
            first: first of the ingests whose versions are touched.
            last: last of them. Later ones don't count.
        """
        files: dict[tuple[str, str, str], dict[int, Row]] = defaultdict(dict)
        for row in entries(lakehouse):
            if row["ingest_id"] <= last:
                source = "" if row["source"] in sources else row["source"]
                files[source, row["table"], row["name"]].setdefault(row["ingest_id"], row)
        marks = []
        for (_, table, name), by_ingest in files.items():
            is_snapshot = any(row["fingerprint"].startswith(SNAPSHOT) for row in by_ingest.values())
            if len(by_ingest) == 1 and not is_snapshot:
                continue
            is_touched = max(by_ingest) >= first
            spans: list[tuple[date, date]] = []
            for number in sorted(by_ingest, reverse=True):
                is_whole = is_snapshot and number < max(by_ingest)
                marks.append((table, name, number, is_snapshot, is_whole, is_touched, list(spans)))
                _add_span(spans, by_ingest[number]["first_day"], by_ingest[number]["last_day"])
        return cls(marks, any(is_touched for *_, is_touched, _ in marks))

    @property
    def touched_ingests(self) -> list[int]:
        """Numbers of the ingests that brought versions of the touched files."""
        return sorted({number for _, _, number, _, _, is_touched, _ in self.marks if is_touched})

    def supersedes(self, table: str) -> bool:
        """Return whether the ingests asked for bring later versions of files of a raw table."""
        return any(
            of_table == table and is_touched and (is_whole or spans)
            for of_table, _, _, _, is_whole, is_touched, spans in self.marks
        )

    def mark(self, rows: DataFrame, table: str, day: Column | None = None) -> DataFrame:
        """Add ``superseded``, ``touched`` (a version of the row's file is) and ``snapshot`` (of a Delta table) to raw rows.

        Args:
            rows: raw rows, at least ``delivery`` and ``ingest_id``.
            table: raw table.
            day: UTC day of a row, by default :func:`day_of`. A row without a day is superseded by any later version that has
                a day.
        """
        of_table = [mark for mark in self.marks if mark[0] == table]
        if not of_table:
            no = F.lit(False)
            return rows.withColumns({"superseded": no, "touched": no, "snapshot": no})
        marks = _frame(rows.sparkSession, of_table).select(
            F.col("name").alias("delivery"), "ingest_id", "is_snapshot", "is_whole", "is_touched", "spans"
        )
        joined = rows.join(F.broadcast(marks), ["delivery", "ingest_id"], "left")
        if day is None:
            day = day_of(table)
        if day is None:
            day = F.lit(None).cast("date")
        in_span = F.exists("spans", lambda span: day.between(span["first_day"], span["last_day"]))
        superseded = F.col("is_whole") | ((F.size("spans") > 0) & (day.isNull() | in_span))
        columns = {"superseded": superseded, "touched": F.col("is_touched"), "snapshot": F.col("is_snapshot")}
        marked = joined.withColumns({name: F.coalesce(column, F.lit(False)) for name, column in columns.items()})
        return marked.select(*rows.columns, *columns)


def day_of(table: str) -> Column | None:
    """Return the UTC day of a raw table's rows; ``None`` where its rows have none."""
    if table == RAW_CAMPAIGNS.name:
        return F.col("first_day")
    names = next(declared.schema.names for declared in RAW_TABLES if declared.name == table)
    return F.to_date("ts") if "ts" in names else None


def entries(lakehouse: Lakehouse) -> list[Row]:
    """Return the rows of ``deliveries``: one per file and version."""
    return read_as_declared(lakehouse, DELIVERIES).collect() if lakehouse.exists("deliveries") else []


def _add_span(spans: list[tuple[date, date]], first: date | None, last: date | None) -> None:
    """Add the days of a version, unless a later one has all of them: a file that grows has one span then."""
    if first is not None and last is not None and not any(a <= first and last <= b for a, b in spans):
        spans.append((first, last))


def _frame(spark: SparkSession, marks: Sequence[tuple[object, ...]]) -> DataFrame:
    return spark.createDataFrame(marks, _MARKS)
