"""The files that were ingested, the versions in which they came, and the raw rows that a later version supersedes.

A file that comes again under its name is a new version of it. Days from the first to the last of its rows are then as it says:
what older versions say about these days is superseded. Their rows of other days stay, because a file may hold only the newest
weeks. A data file of a Delta table has no other meaning than the table: its newest version, and its removal from the table,
supersede all its older rows.

A mapping that was renamed, or moved without its files, is another source. A file that it delivers is known if another source
delivered it before, with the same fingerprint and the same rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from bp_spark.ingest.sources.contract import SNAPSHOT, Delivery
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import DELIVERIES, RAW_CAMPAIGNS, RAW_TABLES

GONE = "gone"
"""Fingerprint of a data file that is no part of its Delta table any more."""

_MARKS = (
    "table string, name string, ingest_id bigint, is_snapshot boolean, is_whole boolean, is_touched boolean, "
    "spans array<struct<first_day: date, last_day: date>>"
)

Mark = tuple[bool, bool, bool, list[tuple[date, date]]]
"""Columns of _MARKS from ``is_snapshot`` on."""


@dataclass(frozen=True)
class Ledger:
    """What ``deliveries`` says about the files of one source.

    Attributes:
        last: number of the last ingest of any source, 0 for none.
        versions: (raw table, name) -> versions of a file of the source, the newest last.
        versions_elsewhere: (raw table, a fingerprint of the newest version) -> versions of each such file of other sources.
    """

    last: int
    versions: Mapping[tuple[str, str], Sequence[Row]]
    versions_elsewhere: Mapping[tuple[str, str], Sequence[Sequence[Row]]]

    @classmethod
    def read(cls, lakehouse: Lakehouse, sources: Collection[str]) -> Ledger:
        """Read the ledger of a source.

        Args:
            lakehouse: the tables.
            sources: identities of the source; see :func:`bp_spark.ingest.sources.source_digests`.
        """
        files: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
        for row in sorted(entries(lakehouse), key=lambda row: int(row["ingest_id"])):
            source = "" if row["source"] in sources else row["source"]
            files[source, row["table"], row["name"]].append(row)
        elsewhere: dict[tuple[str, str], list[list[Row]]] = defaultdict(list)
        for (source, table, _), rows in files.items():
            for fingerprint in _newest_fingerprints(rows) if source else ():
                elsewhere[table, fingerprint].append(rows)
        own = {(table, name): rows for (source, table, name), rows in files.items() if not source}
        return cls(max((rows[-1]["ingest_id"] for rows in files.values()), default=0), own, elsewhere)

    def fresh(self, listed: Iterable[Delivery]) -> list[Delivery]:
        """Return the listed files that were not ingested yet, or changed since."""
        return [
            d for d in listed if d.fingerprint not in _newest_fingerprints(self.versions.get((d.table, d.name), ()))
        ]

    def repeated(self, deliveries: Iterable[Delivery]) -> list[Delivery]:
        """Return the files that came before with another fingerprint, without those of Delta tables."""
        return [d for d in deliveries if (d.table, d.name) in self.versions and not d.fingerprint.startswith(SNAPSHOT)]

    def stored(self, deliveries: Iterable[Delivery], listed: Iterable[Delivery]) -> dict[Delivery, Sequence[Row]]:
        """Return the versions of the files whose rows may be stored already: repeated, moved, or another mapping's.

        A mapping that was renamed is another source with the same files. One that was moved without its files names them
        otherwise.

        Args:
            deliveries: the files.
            listed: all files that the source has now: one that is still there was not moved.
        """
        deliveries, there = list(deliveries), {(d.table, d.name) for d in listed}
        left: dict[tuple[str, str], list[Sequence[Row]]] = defaultdict(list)
        for (table, name), rows in self.versions.items():
            for fingerprint in _newest_fingerprints(rows) if (table, name) not in there else ():
                left[table, fingerprint].append(rows)
        found = {d: self.versions[d.table, d.name] for d in self.repeated(deliveries)}
        for delivery in deliveries:
            if (delivery.table, delivery.name) not in self.versions:
                key = (delivery.table, delivery.fingerprint)
                same_fingerprint = [*self.versions_elsewhere.get(key, ()), *left.get(key, ())]
                same_file = [rows for rows in same_fingerprint if _same_path(rows[-1]["name"], delivery.name)]
                if same_file:
                    found[delivery] = max(same_file, key=lambda rows: (rows[-1]["ingest_id"], rows[-1]["source"]))
        return found

    def unchanged_rows(self, source: str, delivery: Delivery, versions: Sequence[Row]) -> list[tuple[object, ...]]:
        """Return the rows of DELIVERIES for a file whose rows are stored already."""
        if (delivery.table, delivery.name) in self.versions:
            newest = versions[-1]
            stored_as = (newest["ingest_id"], None, None, newest["stored_as"])
            return [(source, delivery.table, delivery.name, delivery.fingerprint, *stored_as)]
        # with all its versions, so that a later one supersedes what the other mapping brought
        facts = ("fingerprint", "ingest_id", "first_day", "last_day")
        return [
            (source, delivery.table, delivery.name, *(row[fact] for fact in facts), stored_name(row))
            for row in versions
        ]

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
            for (table, name), versions in sorted(self.versions.items())
            if table in snapshots.keys() & listed_tables
            and name.startswith(snapshots[table])
            and (table, name) not in now
            and any(fingerprint.startswith(SNAPSHOT) for fingerprint in _newest_fingerprints(versions))
        ]


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
    def of(cls, recorded: Iterable[Row], sources: Collection[str], first: int, last: int) -> Versions:
        """Return the versions of all files.

        Args:
            recorded: what :func:`entries` returns.
            sources: identities of one source that count as one; see :func:`bp_spark.ingest.sources.source_digests`.
            first: first of the ingests whose versions are touched.
            last: last of them. Later ones don't count.
        """
        files: dict[tuple[str, str, str], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in recorded:
            if row["ingest_id"] <= last:
                source = "" if row["source"] in sources else row["source"]
                files[source, row["table"], row["name"]][row["ingest_id"]].append(row)
        marks: dict[tuple[str, str, int], Mark] = {}
        for (_, table, _), by_ingest in files.items():
            newest = max(by_ingest)
            is_snapshot = any(row["fingerprint"].startswith(SNAPSHOT) for rows in by_ingest.values() for row in rows)
            if len(by_ingest) == 1 and not is_snapshot:
                continue
            spans: list[tuple[date, date]] = []
            for number in sorted(by_ingest, reverse=True):
                rows = by_ingest[number]
                mark = (is_snapshot, is_snapshot and number < newest, newest >= first, list(spans))
                for name in {stored_name(row) for row in rows}:
                    # two mappings may have delivered the file
                    marks[table, name, number] = _joined(mark, marks.get((table, name, number), mark))
                for row in rows:
                    _add_span(spans, row["first_day"], row["last_day"])
        every = [(*place, *mark) for place, mark in marks.items()]
        return cls(every, any(is_touched for *_, is_touched, _ in every))

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
    return lakehouse.collect(DELIVERIES)


def stored_name(row: Row) -> str:
    """Return the name that the rows of a file's version have, from its row of DELIVERIES."""
    return str(row["stored_as"] or row["name"])


def _newest_fingerprints(versions: Sequence[Row]) -> set[str]:
    """Return the fingerprints that a file's newest version had: a file that is touched has another one."""
    return {row["fingerprint"] for row in versions if row["ingest_id"] == versions[-1]["ingest_id"]}


def _same_path(name: str, other: str) -> bool:
    """Return whether two names may be those of one file, from different folders."""
    return name == other or name.endswith(f"/{other}") or other.endswith(f"/{name}")


def _joined(mark: Mark, other: Mark) -> Mark:
    return (
        mark[0] or other[0],
        mark[1] or other[1],
        mark[2] or other[2],
        [*mark[3], *(s for s in other[3] if s not in mark[3])],
    )


def _add_span(spans: list[tuple[date, date]], first: date | None, last: date | None) -> None:
    """Add the days of a version, unless a later one has all of them: a file that grows has one span then."""
    if first is not None and last is not None and not any(a <= first and last <= b for a, b in spans):
        spans.append((first, last))


def _frame(spark: SparkSession, marks: Sequence[tuple[object, ...]]) -> DataFrame:
    return spark.createDataFrame(marks, _MARKS)
