"""A sample of the files, read as an ingest would: figures of each column, rows that rules refuse, orders and money.

The sample goes through the code of the ingest: the source, pseudonyms and the rules of cleaning.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config
from bp_spark.core.errors import DataError
from bp_spark.core.session import persisted
from bp_spark.core.spark_errors import translate
from bp_spark.ingest import cleaning, contacts
from bp_spark.ingest.onboarding.preflight import Preflight
from bp_spark.ingest.onboarding.sampling import SampleFiles, copy_sample, renamed
from bp_spark.ingest.pseudonyms import as_written, load_secret, pseudonymous
from bp_spark.ingest.sources.contract import Delivery
from bp_spark.ingest.sources.files import FilesSource
from bp_spark.ingest.sources.mapping import ColumnRule, SegmentsRule, TableMapping
from bp_spark.ingest.sources.selection import FileCounts

_MONEY = ("amount", "discount", "coupon_discount", "price", "cost")
_DELIVERIES = 20
"""Deliveries of a table that are read where files can't be copied."""
_CODES = 8
"""Currencies that are named."""


@dataclass(frozen=True)
class ColumnFigures:
    """How one column of the contract is read.

    Attributes:
        table: section of the mapping.
        column: column of the contract.
        rows: rows of the table in the sample.
        unreadable: rows whose value is not of the column's type.
        missing: rows without a value.
        odd: what else a person should look at.
    """

    table: str
    column: str
    rows: int
    unreadable: int
    missing: int
    odd: Sequence[str] = ()


@dataclass(frozen=True)
class TableFigures:
    """Rows of one table.

    Attributes:
        table: section of the mapping.
        rows: rows in the sample.
        left_out: rows that ``where`` leaves out.
        refused: rule -> rows that it would send to quarantine.
        equal_lines: rows of a log that have an equal row before them in their file. Without a line_id both are events.
        share: share of the files' bytes in the sample; ``None`` if the table is read where it lies.
        files: number of files in the sample, and of all; ``None`` if the table is read where it lies.
    """

    table: str
    rows: int
    left_out: int
    refused: Mapping[str, int]
    equal_lines: int
    share: float | None
    files: tuple[int, int] | None


@dataclass(frozen=True)
class Purchases:
    """What the good order lines of the sample hold.

    Attributes:
        orders: orders with a positive amount.
        users: users with an order line.
        money: sum of the amounts, less refunds.
        refunds: sum of the negative amounts.
        first_day: day of the first order line.
        last_day: day of the last one.
    """

    orders: int
    users: int
    money: float
    refunds: float
    first_day: date | None
    last_day: date | None


@dataclass(frozen=True)
class Check:
    """Result of a check.

    Attributes:
        tables: figures of each table.
        columns: figures of each column.
        purchases: what the order lines hold.
        currency: the platform's currency.
        unreadable: name of a file -> why an ingest would leave it out.
        warnings: what else a person should look at.
    """

    tables: Sequence[TableFigures]
    columns: Sequence[ColumnFigures]
    purchases: Purchases
    currency: str
    unreadable: Mapping[str, str]
    warnings: Sequence[str]

    @property
    def share(self) -> float | None:
        """Share of the files of transactions in the sample."""
        return next(table.share for table in self.tables if table.table == "transactions")

    def require_good_rows(self) -> None:
        """Raise an error if no order line would be accepted.

        Raises:
            DataError: there is none, with the most frequent rules.
        """
        orders = next(table for table in self.tables if table.table == "transactions")
        refused = sum(orders.refused.values())
        if not orders.rows:
            where = f"; where leaves out all {orders.left_out:,}" if orders.left_out else ""
            raise DataError("transactions", f"no row in the sample{where}")
        if refused == orders.rows:
            rules = ", ".join(
                f"{rule} ({count:,})" for rule, count in sorted(orders.refused.items(), key=_by_count)[:3]
            )
            raise DataError("transactions", f"all rows of the sample would be refused: {rules}")


def _by_count(rule: tuple[str, int]) -> tuple[int, str]:
    return -rule[1], rule[0]


@dataclass
class _Rows:
    """Rows of the sample by raw table, what the source counts in its files, and files that can't be read."""

    frames: Mapping[str, DataFrame]
    counts: Mapping[str, FileCounts]
    unreadable: dict[str, str] = field(default_factory=dict)


def check(spark: SparkSession, config: Config, found: Preflight, rows: int) -> Check:
    """Read a sample of the files as an ingest would, and return its figures.

    Args:
        spark: session to read with.
        config: all settings; the source is one of files.
        found: what :func:`bp_spark.ingest.onboarding.preflight.look_at_files` found.
        rows: rows to read of each table.

    Raises:
        DataError: no file of transactions can be read.
        ConfigError: the mapping doesn't fit the files.
    """
    mapping = config.source.mapping or ""
    with ExitStack() as stack:
        target = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bp-spark-check-")))
        is_local = _shares_files(spark)
        sample = copy_sample(mapping, found, rows, target) if is_local else SampleFiles(FilesSource(mapping))
        with _read(spark, sample, rows) as read:
            read.unreadable |= {name: error.rule for name, error in found.unreadable.items()}
            return _checked(config, sample, read, found.warnings)


def _shares_files(spark: SparkSession) -> bool:
    """Return whether the session reads the temporary files of this process."""
    remote = os.environ.get("SPARK_REMOTE", "").startswith("sc:") or "DATABRICKS_RUNTIME_VERSION" in os.environ
    return not remote and str(spark.conf.get("spark.master", "")).startswith("local")


@contextmanager
def _read(spark: SparkSession, sample: SampleFiles, rows: int) -> Iterator[_Rows]:
    """Read the sample; of tables that were not copied, read ``rows`` rows of some files where they lie."""
    errors: dict[Delivery, DataError] = {}
    source = sample.source
    try:
        deliveries = _spread(source.deliveries(spark), sample)
        with translate():
            counts = source.counts(spark, deliveries, errors.__setitem__, rows)
            readable = [delivery for delivery in deliveries if delivery not in errors]
            frames = source.read(spark, readable)
            frames = {name: df if name in sample.files else df.limit(rows) for name, df in frames.items()}
            with ExitStack() as stack:
                kept = {name: stack.enter_context(persisted(df)) for name, df in frames.items()}
                unreadable = {sample.names.get(one.name, one.name): error.rule for one, error in errors.items()}
                if not any(delivery.table == "raw_transactions" for delivery in readable):
                    raise errors[min(errors)]
                yield _Rows(kept, counts, unreadable)
    except DataError as error:
        raise renamed(sample.names, error) from None


def _spread(deliveries: Sequence[Delivery], sample: SampleFiles) -> list[Delivery]:
    """Return all deliveries of copied tables, and some of each other table."""
    chosen: list[Delivery] = []
    for table in sorted({delivery.table for delivery in deliveries}):
        of_table = [delivery for delivery in deliveries if delivery.table == table]
        step = 1 if table in sample.files else math.ceil(len(of_table) / _DELIVERIES)
        chosen += of_table[::step]
    return chosen


def _checked(config: Config, sample: SampleFiles, read: _Rows, warnings: Sequence[str]) -> Check:
    now = F.lit(datetime.now(UTC))
    secret = load_secret(config.privacy.secret)
    raw = {
        name: pseudonymous(df, name, secret, as_written).withColumns(
            {"ingest_id": F.lit(1).cast("bigint"), "ingested_at": now}
        )
        for name, df in read.frames.items()
    }
    validated = cleaning.validate(raw, raw, config.cleaning)
    by_rule = {name: df for name, df in validated.items()}
    by_rule |= {
        log.raw.name: contacts.validate(log, raw[log.raw.name], config.cleaning)
        for log in contacts.LOGS
        if log.raw.name in raw
    }
    refused = {name: _by_rule(df) for name, df in by_rule.items()}
    tables, columns = [], []
    for name, mapping in sample.source.tables.items():
        counts = read.counts.get(name, FileCounts(0, 0, {}))
        df = read.frames.get(name)
        rows, equal, figures = (0, 0, []) if df is None else _column_figures(df, name, mapping, counts)
        section = name.removeprefix("raw_")
        share, files = sample.shares.get(name), sample.files.get(name)
        tables.append(TableFigures(section, rows, counts.left_out, refused.get(name, {}), equal, share, files))
        columns += figures
    purchases = _purchases(cleaning.events({"raw_transactions": validated["raw_transactions"]}))
    return Check(tables, columns, purchases, config.cleaning.currency, read.unreadable, list(warnings))


def _by_rule(validated: DataFrame) -> dict[str, int]:
    rows = validated.filter("rule IS NOT NULL").groupBy("rule").count().collect()
    return dict(sorted(((row["rule"], row["count"]) for row in rows), key=_by_count))


def _purchases(events: DataFrame) -> Purchases:
    paid = F.col("amount") > 0
    row = (
        events.filter("copy = 1")
        .agg(
            F.count_distinct(F.when(paid, F.struct("user_key", "order_id"))).alias("orders"),
            F.count_distinct("user_key").alias("users"),
            F.coalesce(F.sum("amount"), F.lit(0)).cast("double").alias("money"),
            F.coalesce(F.sum(F.when(~paid, F.col("amount"))), F.lit(0)).cast("double").alias("refunds"),
            F.min("event_date").alias("first_day"),
            F.max("event_date").alias("last_day"),
        )
        .collect()[0]
    )
    return Purchases(**row.asDict())


def _column_figures(
    df: DataFrame, table: str, mapping: TableMapping, counts: FileCounts
) -> tuple[int, int, list[ColumnFigures]]:
    """Return rows, equal lines, and the figures of each mapped column."""
    mapped = [name for name, rule in mapping.columns if isinstance(rule, ColumnRule | SegmentsRule)]
    sums: dict[str, Column] = {"rows": F.count(F.lit(1))}
    for name in mapped:
        unreadable = F.coalesce(F.map_contains_key("unreadable", name), F.lit(False))
        whole_row = F.coalesce(F.map_contains_key("unreadable", F.lit("row")), F.lit(False))
        empty = F.size(name) == 0 if name == "segment" else F.col(name).isNull()
        sums[f"unreadable {name}"] = F.count_if(unreadable)
        sums[f"missing {name}"] = F.count_if(empty & ~unreadable & ~whole_row)
        if name in (*_MONEY, "quantity"):
            sums[f"negative {name}"] = F.count_if(F.col(name) < 0)
            sums[f"zero {name}"] = F.count_if(F.col(name) == 0)
        if name == "currency":
            sums["currencies"] = F.collect_set(F.col(name).substr(1, 16))
    if table in cleaning.LOGS:
        # of items and the like, equal lines mean nothing
        sums["different"] = F.count_distinct(F.sha2(F.to_json(F.struct(*df.columns)), 256))
    row: Any = df.agg(*(column.alias(name) for name, column in sums.items())).collect()[0]
    figures = [
        ColumnFigures(
            table.removeprefix("raw_"),
            name,
            row["rows"],
            row[f"unreadable {name}"],
            row[f"missing {name}"],
            _odd(name, row, counts),
        )
        for name in mapped
    ]
    return row["rows"], row["rows"] - row["different"] if "different" in sums else 0, figures


def _odd(name: str, row: Any, counts: FileCounts) -> list[str]:
    """Return what is odd about a column, in words that quote no value."""
    odd = []
    if decimals := counts.decimal_ids.get(name):
        odd.append(f"{decimals:,} end in .0, which is taken off")
    if name in (*_MONEY, "quantity"):
        odd += [f"{row[f'negative {name}']:,} negative"] if row[f"negative {name}"] else []
        odd += [f"{row[f'zero {name}']:,} are 0"] if row[f"zero {name}"] and name == "amount" else []
    if name == "currency" and len(row["currencies"]) > 1:
        codes = sorted(code for code in row["currencies"] if re.fullmatch("[A-Z]{3}", code))
        odd.append(f"{len(row['currencies'])} currencies: {', '.join(codes[:_CODES])}")
    return odd
