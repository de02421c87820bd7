"""What a batch of judged rows changes in its table: new rows are added, changed ones corrected, those that moved deleted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.ingest.identity import CHANGED, MOVED, NEW
from bp_spark.lakehouse.run import Step

OTHER_SETTINGS = "older rows were judged by other cleaning settings; featurize --rebuild judges them anew"
"""Note of a stage whose settings are not those of the stored rows."""


def count_states(judged: DataFrame) -> dict[str, int]:
    """Return the number of rows by state, without states that no row has."""
    return {row["state"]: row["count"] for row in judged.groupBy("state").count().collect()}


def store_changes(
    step: Step,
    judged: DataFrame,
    states: Collection[str],
    within: Mapping[str, Sequence[object]],
    note: Mapping[str, Any],
) -> None:
    """Store the new and changed rows of a batch, and delete those that moved.

    Args:
        step: the step that writes the table.
        judged: rows of the table, each once, with their ``state``.
        states: states that occur.
        within: column -> values, of which all judged rows and their older versions are.
        note: what to record with the commit.
    """
    if CHANGED in states or MOVED in states:
        step.merge(
            judged.filter(F.col("state").isin(NEW, CHANGED)),
            within=within,
            deleted_keys=judged.filter(F.col("state") == MOVED) if MOVED in states else None,
            **note,
        )
    else:
        step.append(judged.filter(F.col("state") == NEW), **note)
