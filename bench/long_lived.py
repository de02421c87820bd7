"""A small platform after years of nights, made in minutes: a line a night, and each table as its nights would have left it.

The rows come from the pipeline itself, which reads all files at once. They are then written again night by night, each night a
commit of each table with what this package records. Each commit bears the date of its night, so that logs are cleaned as Delta
cleans them, after 30 days.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction, write_deltalake
from pyspark.sql import SparkSession

from bp_spark import pipeline
from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.features.catalogue import user_features_table
from bp_spark.lakehouse.commits import TRANSACTIONS
from bp_spark.lakehouse.schema import Table
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import (
    DELIVERIES,
    EVENTS,
    RAW_TRANSACTIONS,
    RUNS,
    SCORES,
    SCORES_LATEST,
    USER_DAILY,
)

FIRST = date(2021, 1, 1)
USERS = 8
SECRET = "the-secret-of-long-lived-platforms-0123456789"  # noqa: S105 (of a made-up platform)
_MAPPING = """
transactions:
  path: "orders/*.json"
  format: json
  columns: {user_id: user, order_id: order, ts: time, quantity: n, amount: paid}
"""
_A_DAY = 86_400
_CHECKPOINT = 10
"""Nights between two checkpoints of a log."""
_NO_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)


@dataclass(frozen=True)
class Platform:
    """A platform of a few users: files, tables and a bundle below one folder."""

    folder: Path
    bundle: Path

    def settings(self, lakehouse: str) -> Config:
        """Return the settings of one of its lakehouses."""
        return config.load(
            overrides=[
                "source.kind=files",
                f"source.mapping={self.folder}/{lakehouse}-files/source.yaml",
                f"tables.path={self.folder}/{lakehouse}",
                f"bundles={self.folder}/bundles",
                f"training.work_dir={self.folder}/work",
                "features.windows=[30]",
                "features.history_length=8",
                "labels.other_horizons=[]",
                "tracking.uri=null",
            ]
        )

    def deliver(self, lakehouse: str, night: int) -> None:
        """Write the file of a night: a line, on the first night one of each user."""
        files = self.folder / f"{lakehouse}-files"
        (files / "orders").mkdir(parents=True, exist_ok=True)
        (files / "source.yaml").write_text(_MAPPING, encoding="utf-8")
        users = range(USERS) if night == 0 else [night % USERS]
        lines = [
            {
                "user": f"u{user}",
                "order": f"o{night}",
                "time": f"{day(night)} 10:00:00",
                "n": 1,
                "paid": f"{user + 5}.50",
            }
            for user in users
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (files / f"orders/{night:05d}.json").write_text(text, encoding="utf-8")

    def night(self, spark: SparkSession, lakehouse: str, night: int) -> float:
        """Deliver, featurize and score a night; return the seconds of the last two."""
        self.deliver(lakehouse, night)
        settings = self.settings(lakehouse)
        started = time.monotonic()
        pipeline.featurize(spark, settings, [day(night + 1)])
        pipeline.score(spark, settings, day(night + 1), self.bundle)
        return time.monotonic() - started

    def live(self, spark: SparkSession, lakehouse: str, nights: int) -> None:
        """Make a lakehouse after so many nights."""
        for night in range(nights):
            self.deliver(lakehouse, night)
        settings = self.settings(lakehouse)
        pipeline.featurize(spark, settings, [day(nights)])
        pipeline.score(spark, settings, day(nights), self.bundle)
        at_once = Lakehouse(spark, settings.tables)
        rows = {name: DeltaTable(at_once.location(name)).to_pyarrow_table() for name in _NIGHTLY}
        metadata = {name: at_once.commit_metadata(name) for name in _NIGHTLY}
        tables = {**_TABLES, "user_features": user_features_table(settings.features)}
        for name, of_night in _NIGHTLY.items():
            shutil.rmtree(at_once.location(name))
            at_once.reserve(tables[name], {"version": -1})
            _write_nights(Path(at_once.location(name)), rows[name], of_night, metadata[name], nights)
        # Delta's cache knows the logs that were deleted
        spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()
        for name in _NIGHTLY:
            for interval in (1, _CHECKPOINT):
                # with a checkpoint at each commit, this commit makes one, and Delta cleans the log
                spark.sql(
                    f"ALTER TABLE delta.`{at_once.location(name)}` "
                    f"SET TBLPROPERTIES ('delta.checkpointInterval' = '{interval}')"
                )


def day(night: int) -> date:
    """Return the day of a night's lines."""
    return FIRST + timedelta(days=night)


def _write_nights(folder: Path, rows: pa.Table, of_night: _OfNight, metadata: Mapping[str, Any], nights: int) -> None:
    """Write the rows of each night in a commit of its own, with the night's date."""
    table, now = DeltaTable(str(folder)), time.time()
    for path in (folder / "_delta_log").iterdir():
        os.utime(path, (now - (nights + 1) * _A_DAY,) * 2)
    mode = "overwrite" if folder.name == SCORES_LATEST.name else "append"
    for night in range(nights):
        recorded = {key: value for key, value in metadata.items() if key not in ("version", "write")}
        # what the stages say of ingests and versions
        recorded |= {"through": night + 1} if "through" in recorded else {}
        recorded |= {"ingest_id": night + 1} if "ingest_id" in recorded else {}
        recorded |= {"events": night + 1} if "events" in recorded else {}
        recorded |= {"score_date": str(day(night + 1))} if "score_date" in recorded else {}
        version = table.version()
        write_deltalake(
            table,
            of_night(rows, night),
            mode=mode,
            commit_properties=CommitProperties(
                {"userMetadata": json.dumps({**recorded, "write": uuid.uuid4().hex})},
                app_transactions=[Transaction(TRANSACTIONS, version + 1)],
            ),
            post_commithook_properties=_NO_HOOKS,
        )
        table.update_incremental()
        then = now - (nights - night) * _A_DAY
        os.utime(folder / f"_delta_log/{table.version():020d}.json", (then, then))
        if night % _CHECKPOINT == _CHECKPOINT - 1:
            table.create_checkpoint()
            os.utime(folder / f"_delta_log/{table.version():020d}.checkpoint.parquet", (then, then))


_OfNight = Callable[[pa.Table, int], pa.Table]


def _in(column: str) -> _OfNight:
    """Return the rows whose time or day is of the night, numbered by its ingest."""

    def of_night(rows: pa.Table, night: int) -> pa.Table:
        found = rows.filter(pc.equal(rows[column].cast(pa.date32()), pa.scalar(day(night), pa.date32())))
        return _with(found, "ingest_id", night + 1) if "ingest_id" in found.column_names else found

    return of_night


def _delivered(rows: pa.Table, night: int) -> pa.Table:
    name = pa.scalar(f"orders/{night:05d}.json")
    return _with(rows.filter(pc.equal(rows["name"], name)), "ingest_id", night + 1)


def _dated(column: str) -> _OfNight:
    """Return all rows, with the date of the night after."""
    return lambda rows, night: _with(rows, column, day(night + 1))


def _whole(rows: pa.Table, night: int) -> pa.Table:
    return rows


def _with(rows: pa.Table, column: str, value: object) -> pa.Table:
    place = rows.schema.get_field_index(column)
    field = rows.schema.field(place)
    return rows.set_column(place, field, pa.array([value] * len(rows), field.type))


_NIGHTLY: Mapping[str, _OfNight] = {
    "raw_transactions": _in("ts"),
    "deliveries": _delivered,
    "events": _in("event_date"),
    "user_daily": _in("day"),
    "user_features": _dated("as_of_date"),
    "scores": _dated("score_date"),
    "scores_latest": _dated("score_date"),
    "runs": _whole,
}
"""Tables that each night writes -> its rows, from those of all nights."""
_TABLES: Mapping[str, Table] = {
    table.name: table for table in (RAW_TRANSACTIONS, DELIVERIES, EVENTS, USER_DAILY, SCORES, SCORES_LATEST, RUNS)
}
