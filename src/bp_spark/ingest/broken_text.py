"""Texts of items, users and promotions in which bytes of another encoding were replaced: no rule of cleaning sees them."""

from __future__ import annotations

import logging
from functools import reduce
from operator import or_

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from bp_spark.ingest.pseudonyms import BROKEN_TEXT
from bp_spark.ingest.sources.heads import HOW_TO_ENCODE
from bp_spark.lakehouse.store import Lakehouse

TABLES = ("raw_items", "raw_users", "raw_promotions")
"""Raw tables whose texts are used as they were delivered."""

logger = logging.getLogger(__name__)


def warn(lakehouse: Lakehouse, number: int, row_counts: dict[str, int]) -> int:
    """Log for each of TABLES how many rows of an ingest have broken text, and what to set; return the number of rows.

    Args:
        lakehouse: the tables.
        number: number of the ingest.
        row_counts: raw table -> rows that the ingest wrote; other tables aren't read.
    """
    broken_rows = 0
    for table in TABLES:
        if row_counts.get(table):
            count = with_broken_text(lakehouse.read(table).filter(F.col("ingest_id") == number)).count()
            broken_rows += count
            if count:
                logger.warning(
                    "%s: %s rows have broken text: %s; then deliver the files again",
                    *(table, f"{count:,}", HOW_TO_ENCODE),
                    extra={"fields": {"table": table, "rows": count}},
                )
    return broken_rows


def with_broken_text(rows: DataFrame) -> DataFrame:
    """Return the rows with a replaced byte or a control character in a text, or in a text of a map."""
    conditions = [
        condition
        for field in rows.schema.fields
        if field.name not in ("delivery", "unreadable") and (condition := _is_broken(field)) is not None
    ]
    return rows.filter(reduce(or_, conditions))


def _is_broken(field: T.StructField) -> Column | None:
    if isinstance(field.dataType, T.StringType):
        return F.coalesce(F.col(field.name).rlike(BROKEN_TEXT), F.lit(False))
    if isinstance(field.dataType, T.MapType):
        texts = F.exists(F.map_values(field.name), lambda text: text.rlike(BROKEN_TEXT))
        return F.coalesce(texts, F.lit(False))
    return None
