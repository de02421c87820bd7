"""Deliveries that can't be read: they are named and left, and the others are ingested.

Some fail when a source looks at their header, footer or columns. Others fail only while their rows are read, which ends the
ingest's write. Then the failing deliveries are searched by halving the batch, and the rest is written again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import digest
from bp_spark.core.errors import DataError
from bp_spark.core.session import checkpointed
from bp_spark.core.spark_errors import translate
from bp_spark.ingest.sources.contract import Delivery, Source
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import RAW_TABLES, RAW_TRANSACTIONS, USER_KEYS

_LOGGED = 20
"""Deliveries that the log names."""
_REMEMBERED = 1_000
"""Deliveries that an ingest records as left."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Deliveries that an ingest writes together.

    Attributes:
        rows: rows by raw table, as :meth:`bp_spark.ingest.sources.contract.Source.read` returns them.
        deliveries: the deliveries that the rows are from.
        unreadable: deliveries that are left, and why.
    """

    rows: Mapping[str, DataFrame]
    deliveries: Sequence[Delivery]
    unreadable: Mapping[Delivery, DataError]

    @property
    def unreadable_files(self) -> int:
        """Number of files that are left; a file that feeds two tables counts once."""
        return len({delivery.name for delivery in self.unreadable})

    @property
    def left(self) -> list[str]:
        """Identities of the transactions that are left; :func:`write_readable` of the next ingest asks for them."""
        return sorted(map(_identity, _transactions(self.unreadable)))[:_REMEMBERED]

    @property
    def no_transactions(self) -> DataError:
        """Error of a first ingest without a row of transactions: that of the first unreadable file, if there is one."""
        errors = (self.unreadable[delivery] for delivery in _transactions(self.unreadable))
        return next(errors, DataError("raw_transactions", "holds no rows; there is nobody to score"))


def write_readable(
    spark: SparkSession,
    source: Source,
    fresh: Sequence[Delivery],
    write: Callable[[Batch], None],
    undo: Callable[[], None],
    *,
    strict: bool,
    left_before: Collection[str],
) -> Batch:
    """Write the deliveries that can be read; name the others in the log.

    Args:
        spark: session to read with.
        source: where the deliveries come from.
        fresh: deliveries to write.
        write: writes a batch; it is called again with fewer deliveries if one failed while its rows were read.
        undo: takes back what a failed call of ``write`` has written.
        strict: refuse all deliveries if one can't be read. For that all rows are read once before ``write``.
        left_before: :attr:`Batch.left` of the newest ingest. Transactions that it left don't end this one.

    Returns:
        The batch that was written; without deliveries if none can be read.

    Raises:
        DataError: a delivery can't be read, with ``strict``; no delivery of transactions can be read, and the newest ingest
            didn't leave all of them; ``write`` failed for another reason.
    """
    unreadable: dict[Delivery, DataError] = {}
    while True:
        rows = source.read(spark, _readable(fresh, unreadable), unreadable.__setitem__)
        deliveries = _readable(fresh, unreadable)
        if strict and not unreadable:
            unreadable = _failing(spark, source, deliveries)
        if strict and unreadable:
            raise unreadable[min(unreadable)]
        _require_transactions(fresh, unreadable, left_before)
        batch = Batch(rows, deliveries, unreadable)
        try:
            if deliveries:
                with translate():
                    write(batch)
        except DataError:
            failing = _failing(spark, source, deliveries)
            if not failing:
                raise
            undo()
            unreadable |= failing
        else:
            _warn(unreadable)
            return batch


def undo_ingest(lakehouse: Lakehouse, number: int, reserve: Callable[[], int]) -> None:
    """Delete the raw rows and the keys that an unfinished ingest has written.

    Args:
        lakehouse: the tables.
        number: number of the ingest.
        reserve: reserves ``deliveries`` for the ingest; see :meth:`bp_spark.lakehouse.run.Step.reserve`.

    Raises:
        ConflictError: another run has begun an ingest meanwhile.
    """
    of_ingest = F.col("ingest_id") == number
    reservation = reserve()
    for table in RAW_TABLES:
        if lakehouse.exists(table.name) and not lakehouse.read(table.name).filter(of_ingest).isEmpty():
            no_rows = lakehouse.read(table.name).limit(0)
            lakehouse.replace(table, no_rows, where={"ingest_id": [number]}, after=reservation)
    if lakehouse.exists("user_keys"):
        keys = lakehouse.read("user_keys")
        new_keys = checkpointed(keys.filter(of_ingest))
        if not new_keys.isEmpty():
            # reserved once more, so that no other ingest can have counted on these keys
            lakehouse.merge(USER_KEYS, keys.limit(0), within={}, deleted_keys=new_keys, after=reserve())


def _readable(deliveries: Sequence[Delivery], unreadable: Collection[Delivery]) -> list[Delivery]:
    return [delivery for delivery in deliveries if delivery not in unreadable]


def _transactions(deliveries: Iterable[Delivery]) -> list[Delivery]:
    return sorted(delivery for delivery in deliveries if delivery.table == RAW_TRANSACTIONS.name)


def _identity(delivery: Delivery) -> str:
    return digest(delivery.table, delivery.name, delivery.fingerprint)[:16]


def _require_transactions(
    fresh: Sequence[Delivery], unreadable: Mapping[Delivery, DataError], left_before: Collection[str]
) -> None:
    """Raise the error of the first delivery of transactions if all of them are unreadable, and one wasn't left before."""
    transactions = _transactions(fresh)
    if any(delivery not in unreadable for delivery in transactions):
        return
    if any(_identity(delivery) not in left_before for delivery in transactions):
        raise unreadable[transactions[0]]


def _failing(spark: SparkSession, source: Source, deliveries: Sequence[Delivery]) -> dict[Delivery, DataError]:
    """Return the deliveries that fail while their rows are read, and why. Few that fail cost a few times one reading."""
    error = _failure(spark, source, deliveries) if deliveries else None
    if error is None:
        return {}
    if len(deliveries) == 1:
        return {deliveries[0]: error}
    middle = len(deliveries) // 2
    return _failing(spark, source, deliveries[:middle]) | _failing(spark, source, deliveries[middle:])


def _failure(spark: SparkSession, source: Source, deliveries: Sequence[Delivery]) -> DataError | None:
    """Return the error that ends the reading of these deliveries' rows, about the file that Spark names."""
    try:
        with translate():
            for rows in source.read(spark, deliveries).values():
                rows.write.format("noop").mode("overwrite").save()
    except DataError as error:
        # a Delta table is read whole, so that the file may be another one
        names = (d.name for d in deliveries if unquote(error.table).endswith(f"/{unquote(d.name)}"))
        return DataError(next(names, error.table), error.rule, column=error.column)
    return None


def _warn(unreadable: Mapping[Delivery, DataError]) -> None:
    """Log each reason once: all files of a Delta table have the same."""
    table_by_reason = {str(unreadable[delivery]): delivery.table for delivery in sorted(unreadable, reverse=True)}
    reasons = sorted(table_by_reason)
    for reason in reasons[:_LOGGED]:
        fields = {"table": table_by_reason[reason]}
        logger.warning("%s (left out; the next featurize tries it again)", reason, extra={"fields": fields})
    if len(reasons) > _LOGGED:
        logger.warning("and %s more files can't be read and are left out", f"{len(reasons) - _LOGGED:,}")
