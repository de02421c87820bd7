"""What the tests of faults share: a tiny platform, blows at chosen writes, and the proof that tables are those of an
undisturbed run."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from bp_spark import pipeline
from bp_spark.core import config
from bp_spark.core.config import Config, FusionConfig
from bp_spark.lakehouse.schema import Table
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import SHARED_TABLES
from bp_spark.model.horizons import Horizons
from bp_spark.model.members.btyd import FEATURES, BtydMember
from bp_spark.model.refunds import Refunds
from bp_spark.model.stack import CalibratedStack
from bp_spark.model.totals import Totals
from bp_spark.registry import bundle as bundles
from bp_spark.registry.bundle import Bundle
from tests.support.histories import WRITTEN_TEXTS

AS_OF = date(2024, 3, 20)
MAPPING = (
    """
transactions:
  path: "transactions/*.json"
  format: json
  columns: {user_id: user, order_id: order, item_id: item, ts: time, quantity: n, amount: paid, currency: currency}
rates:
  path: "rates/*.json"
  format: json
  columns: {currency: currency, day: day, rate: rate}
"""
    + WRITTEN_TEXTS
)
TIMES_AND_RUNS = {"forgotten_at", "ingested_at", "scored_at", "run_id", "built_from", "features_version"}
"""Columns that differ between two runs that come to the same: when, by which run, and Delta versions."""
KEYS = {table.name: table.key for table in SHARED_TABLES if table.key} | {"user_features": ("user_key", "as_of_date")}


@dataclass(frozen=True)
class Platform:
    """Source files in one folder, lakehouses beside it."""

    folder: Path

    def config(self, lakehouse: str | Path, *overrides: str) -> Config:
        return config.load(
            overrides=[
                "source.kind=files",
                f"source.mapping={self.folder}/source.yaml",
                f"tables.path={self.folder.parent / lakehouse}",
                f"bundles={self.folder.parent}/bundles",
                f"texts.model={self.folder.parent}/language",
                "texts.max_tokens=8",
                "features.windows=[30]",
                "features.history_length=4",
                "labels.other_horizons=[]",
                "tracking.uri=null",
                *overrides,
            ]
        )

    def featurize(self, spark: SparkSession, lakehouse: str | Path, *overrides: str) -> dict[str, dict[str, Any]]:
        stages = pipeline.featurize(spark, self.config(lakehouse, *overrides), [AS_OF])
        return {stage["stage"]: stage for stage in stages}


def purchase(user: str, day: str, paid: object = "10", **more: object) -> dict[str, object]:
    return {
        "user": user,
        "order": f"{user}-{day}",
        "item": "i1",
        "time": f"{day} 10:00:00",
        "n": 1,
        "paid": paid,
        **more,
    }


def forget_cached(spark: SparkSession) -> None:
    """Let Delta look at the logs on disk anew, as another process would."""
    # the cache is Java's: SQL can't empty it
    spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()


def another(spark: SparkSession) -> SparkSession:
    """A session beside this one, with the same settings: what a second job on the machine has."""
    # classic sessions are cloned by Java alone
    return SparkSession(spark.sparkContext, spark._jsparkSession.cloneSession())


def copied(spark: SparkSession, lakehouse: Path, to: Path) -> Path:
    shutil.copytree(lakehouse, to)
    forget_cached(spark)
    return to


def new_platform(folder: Path, language: Path) -> Platform:
    folder.mkdir(parents=True)
    (folder / "source.yaml").write_text(MAPPING, encoding="utf-8")
    (folder.parent / "language").symlink_to(language)
    return Platform(folder)


@dataclass(frozen=True)
class Contents:
    """What a table holds: digest of each row -> how often it is there."""

    rows: Counter[str]

    @property
    def count(self) -> int:
        return self.rows.total()

    def differences(self, wanted: Contents) -> str:
        """Return how many rows are missing and how many are too many; :mod:`bench.faults` counts them."""
        return f"{(wanted.rows - self.rows).total()} rows lost, {(self.rows - wanted.rows).total()} rows doubled"


@dataclass(frozen=True)
class World:
    """Two nights: ``base`` is the lakehouse before the second, which is delivered; ``undisturbed`` what should come of it."""

    platform: Platform
    base: Path
    first: dict[str, Contents]
    whole: Path
    undisturbed: dict[str, Contents]

    def first_night(self, folder: Path) -> Platform:
        """A platform that has delivered the first night alone."""
        shutil.copytree(self.platform.folder, folder / "platform", ignore=shutil.ignore_patterns("001.json"))
        (folder / "language").symlink_to(self.platform.folder.parent / "language")
        return Platform(folder / "platform")


def small_bundle(folder: Path, alpha: float, totals: Totals | None = None, refunds: Refunds | None = None) -> Bundle:
    """A bundle of the purchase process alone: no library to load in a worker."""
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"btyd": rng.gamma(2, 20, 500), "label_spend": rng.gamma(2, 20, 500)})
    member = BtydMember(90, 0.8, alpha, 0.5, 3.0, 4.0, 3.0, 30.0)
    fusion = CalibratedStack.fit(frame, FusionConfig(members=("btyd",)))
    return bundles.write(
        folder,
        [member],
        fusion,
        Horizons(90, ()),
        inputs={"tabular": FEATURES},
        lineage={},
        metrics={},
        totals=totals,
        refunds=refunds,
    )


@dataclass(frozen=True)
class Scored:
    """A lakehouse of its own with features, two bundles, and what an undisturbed night of the first comes to."""

    platform: Platform
    lakehouse: Path
    bundle: Bundle
    other: Bundle
    undisturbed: dict[str, Contents]

    def score(self, spark: SparkSession, bundle: Bundle | None = None) -> pipeline.ScoreResult:
        config = self.platform.config(self.lakehouse)
        return pipeline.score(spark, config, AS_OF, (bundle or self.bundle).folder)


# --- blows ---------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What stands for kill -9 in a process that has to live on: nothing of the pipeline catches it."""


Write = tuple[str, int]
"""A table, and which of a run's writes of it: a claim is the first, the rows are the second."""


@contextmanager
def hooked(monkeypatch: pytest.MonkeyPatch, before: Callable[[Write], None], instead: Any = None) -> Iterator[None]:
    """Call ``before`` each write of a run, and ``instead`` of it, where given, with the write and what would do it."""
    with monkeypatch.context() as patch:
        for name in ("append", "replace", "merge"):
            real = getattr(Lakehouse, name)

            def call(self: Lakehouse, table: Table, *args: Any, _real: Any = real, **kwargs: Any) -> Any:
                counts = self.__dict__.setdefault("_writes_of_the_test", Counter())
                write = (table.name, counts[table.name])
                counts[table.name] += 1
                before(write)
                if instead is None:
                    return _real(self, table, *args, **kwargs)
                return instead(self, write, lambda: _real(self, table, *args, **kwargs))

            patch.setattr(Lakehouse, name, call)
        yield


def commit_undone(spark: SparkSession, lakehouse: Lakehouse, name: str, version: int) -> None:
    """What kill -9 between the data files and the commit leaves: the files are there, the log's entry is not."""
    for path in Path(lakehouse.location(name), "_delta_log").glob(f"*{version:020d}*"):
        path.unlink()
    forget_cached(spark)


def killed_before_each_commit(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], of: Collection[Write] | None = None
) -> list[Write]:
    """Run again and again, killed each time when the data of one more write (``of`` some) lie there without a commit; then to
    the end."""
    struck: list[Write] = []
    dead = False

    def strike(lakehouse: Lakehouse, write: Write, real: Callable[[], int]) -> int:
        nonlocal dead
        if dead or write[0] == "runs":
            # a process that was killed writes no record of itself
            return -1
        version = real()
        if write not in struck and (of is None or write in of):
            struck.append(write)
            dead = True
            commit_undone(spark, lakehouse, write[0], version)
            raise Killed
        return version

    with hooked(monkeypatch, lambda write: None, strike):
        while True:
            dead = False
            try:
                run()
            except Killed:
                continue
            return struck


# --- proof ---------------------------------------------------------------------------------------------------------------


def tables(lakehouse: Path) -> dict[str, Contents]:
    """Contents of each table but ``runs``, read without Spark from its active files; a key that is there twice fails."""
    found = {}
    for log in sorted(lakehouse.glob("*/_delta_log")):
        name = log.parent.name
        if name == "runs":
            continue
        rows = _rows(log.parent)
        if name in KEYS:
            doubled = [
                key for key, n in Counter(tuple(str(row[c]) for c in KEYS[name]) for row in rows).items() if n > 1
            ]
            assert not doubled, f"{name}: 0 rows lost, {len(doubled)} rows doubled: {doubled[:3]}"
        texts = (json.dumps(_lasting(row), sort_keys=True, default=str) for row in rows)
        found[name] = Contents(
            Counter(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts)
        )
    return found


def differences(lakehouse: Path, undisturbed: dict[str, Contents]) -> dict[str, str]:
    """Return each table that is not as in an undisturbed run, with the rows that differ."""
    found, none = tables(lakehouse / "bp"), Contents(Counter())
    return {
        name: found.get(name, none).differences(undisturbed.get(name, none))
        for name in sorted(found.keys() | undisturbed.keys())
        if found.get(name) != undisturbed.get(name)
    }


def assert_same_tables(lakehouse: Path, undisturbed: dict[str, Contents]) -> None:
    assert differences(lakehouse, undisturbed) == {}


def _rows(table: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for uri in DeltaTable(str(table)).file_uris():
        partition = {key: unquote(value) for key, value in re.findall(r"([^/=]+)=([^/]*)/", uri[len(str(table)) :])}
        rows += [{**row, **partition} for row in pq.ParquetFile(uri).read().to_pylist()]
    return rows


def _lasting(row: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key not in TIMES_AND_RUNS}
    if "fingerprint" in kept:
        # a digest of the source's settings, with the folder it lies in
        del kept["source"]
    if "rule" in kept:
        kept["row"] = {key: value for key, value in json.loads(kept["row"]).items() if key not in TIMES_AND_RUNS}
    return kept
