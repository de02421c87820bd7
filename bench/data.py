"""How fast the data half is, and how right: ``python -m bench.data``.

In: sizes. Out: ``build/bench/data.json``, also on standard output, with these figures of one run on one machine:

- ``full``: seconds of clean, aggregate and featurize on a synthetic platform, and of the same work in DuckDB on the same raw
  files with as many threads (:mod:`bench.duckdb_peer`); the features of both are compared cell by cell. Neither embeds texts:
  DuckDB is given what the language model made of them.
- ``growth``: seconds of the largest size over those of the smallest, without embedding.
- ``new_day``: of each size, a night with one more delivery day over the rebuild of the same tables.
- ``embedding``: of each size, the stage ``embed`` on a night without new texts, and on the first.
- ``dirt``: every raw row is an event, a duplicate or in quarantine, in the numbers that the generator wrote; and how well the
  features tell the purchasing power behind a user.

Start-up (the session, and a run on a toy platform that loads the classes) is measured apart. On a shared machine look at the
CPU seconds: wall-clock seconds of either side grow with what others do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyspark
from deltalake import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from scipy import stats

from bench import Usage, publish
from bench.duckdb_peer import Peer
from bp_spark import pipeline
from bp_spark.core import config
from bp_spark.core.config import Config, SyntheticConfig
from bp_spark.core.session import get_session
from bp_spark.features.aggregates import SEQUENCE_COLUMNS
from bp_spark.features.catalogue import catalogue
from bp_spark.features.categories import CATEGORY_BUCKETS
from bp_spark.ingest.pseudonyms import make_secret
from bp_spark.ingest.sources.synthetic.currency import MAX_DELAY
from bp_spark.ingest.sources.synthetic.dirt import SPOILS
from bp_spark.ingest.sources.synthetic.platform import LOGS, generate
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import RAW_TABLES

EVENTS_PER_USER_YEAR = 53.6
FIRST_DAY = date(2024, 1, 1)
OUT = Path("build/bench/data.json")
COMPARED_STAGES = ("clean", "aggregate", "featurize")
EQUAL_CELLS = 0.999
TOLERANCE = 1e-3
LATENT_USERS = 50_000
RIDGE = 0.01
DIRT = {"duplicate_rate": 0.0125, "malformed_rate": 0.0125, "late_rate": 0.025}
GOALS = {"full": 2.0, "new_day": 0.15}

RULES = {
    "missing_user": "user_id is missing",
    "unreadable_ts": "ts is unreadable",
    "future_ts": "ts is in the future",
    "unreadable_amount": "amount is unreadable",
    "huge_amount": "amount is beyond 1e+06",
    "unknown_currency": "currency has no rate",
    "unknown_item": "item is unknown",
    "unknown_action": "action is unknown",
    "empty_query": "query is missing",
    "rating_out_of_range": "rating is beyond 0..5",
}
"""Kind of malformed row -> the rule that it breaks; broken unicode breaks that of its own column."""


class BenchError(Exception):
    """What was measured is not what it should be: the figures would mean nothing."""


@dataclass(frozen=True)
class Sizes:
    """Events of each platform, the days they are spread over, and settings; 0 events leave a platform out."""

    full: tuple[int, ...] = (1_000_000, 10_000_000)
    dirt: int = 5_000_000
    warm_up: int = 5_000
    days: int = 365
    settings: tuple[str, ...] = ()

    def users(self, events: int) -> int:
        """Users that leave about so many events."""
        return max(50, round(events / EVENTS_PER_USER_YEAR * 365 / self.days))


QUICK = Sizes(
    full=(800,),
    dirt=2_400,
    warm_up=0,
    days=12,
    # few columns: to plan the rest would be most of the time of toy sizes
    settings=("features.windows=[30, 90]", "features.history_length=8", "texts.max_tokens=8"),
)


@dataclass(frozen=True)
class Platform:
    """A synthetic platform and the lakehouse that is made of it, in one folder."""

    spark: SparkSession
    root: Path
    days: int
    settings: tuple[str, ...] = ()

    @property
    def files(self) -> Path:
        """Where its deliveries are."""
        return self.root / "platform"

    @property
    def config(self) -> Config:
        """Settings that read and write this folder only."""
        return config.load(
            overrides=[
                f"tables.path={self.root}/lakehouse",
                "source.kind=files",
                f"source.mapping={self.files}/source.yaml",
                "cleaning.unknown_items=quarantine",
                f"privacy.secret=file:{self.root}/secret",
                *self.settings,
            ]
        )

    @property
    def lakehouse(self) -> Lakehouse:
        """Its tables."""
        return Lakehouse(self.spark, self.config.tables)

    @property
    def last_night(self) -> date:
        """As-of date of the full build; one day of the period is left for another night."""
        return FIRST_DAY + timedelta(self.days - 1)

    def featurize(self, as_of: date, rebuild: bool = False) -> dict[str, dict[str, Any]]:
        """One run; its stages by name."""
        return {row["stage"]: row for row in pipeline.featurize(self.spark, self.config, [as_of], rebuild)}

    def active_files(self, table: str, as_of: date | None = None) -> list[str]:
        """Parquet files of a table's newest version, or of its partition of a date."""
        files = DeltaTable(self.lakehouse.location(table)).file_uris()
        return [file for file in files if as_of is None or f"/as_of_date={as_of}/" in file]


def make_platform(spark: SparkSession, root: Path, events: int, sizes: Sizes, **dirt: float) -> Platform:
    """A platform of about so many events."""
    settings = SyntheticConfig(users=sizes.users(events), days=sizes.days, first_day=FIRST_DAY, **dirt)
    generate(spark, settings, str(root / "platform"))
    make_secret(root / "secret")
    return Platform(spark, root, sizes.days, sizes.settings)


def seconds(stages: Mapping[str, Mapping[str, Any]], *names: str) -> float:
    """Of the named stages, or of all."""
    return sum(row["seconds"] for name, row in stages.items() if not names or name in names)


# --- nights --------------------------------------------------------------------------------------------------------------


def hold_back(at: Platform, first: date) -> None:
    """Take the deliveries of a day and later out of the platform's folder."""
    for log in LOGS:
        for folder in (at.files / log).glob("delivery_day=*"):
            if date.fromisoformat(folder.name.removeprefix("delivery_day=")) >= first:
                kept = at.root / "later" / log / folder.name
                kept.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(kept)


def deliver(at: Platform, day: date) -> int:
    """Put one day's deliveries back; returns how many tables had one."""
    folders = list((at.root / "later").glob(f"*/delivery_day={day}"))
    for folder in folders:
        shutil.copytree(folder, at.files / folder.parent.name / folder.name, copy_function=shutil.copy2)
    return len(folders)


def measure_nights(at: Platform, first: Mapping[str, Any]) -> dict[str, Any]:
    """``embedding`` and ``new_day``, after the full build ``first``."""
    idle = at.featurize(at.last_night + timedelta(1))
    delivered = deliver(at, at.last_night)
    with Usage() as by_night:
        night = at.featurize(at.last_night + timedelta(1))
    with Usage() as by_rebuild:
        rebuild = at.featurize(at.last_night + timedelta(1), rebuild=True)
    return {
        "embedding": {
            "texts": int(first["embed"]["figures"]["texts"]),
            "first_seconds": first["embed"]["seconds"],
            "second_seconds": idle["embed"]["seconds"],
        },
        "new_day": {
            "deliveries": delivered,
            "events": int(night["clean"]["figures"]["events"]),
            "stages": _rounded(night),
            "rebuild_stages": _rounded(rebuild),
            "seconds": seconds(night),
            "rebuild_seconds": seconds(rebuild),
            "ratio": seconds(night) / seconds(rebuild),
            "cpu_seconds": by_night.cpu_seconds,
            "rebuild_cpu_seconds": by_rebuild.cpu_seconds,
            "cpu_ratio": by_night.cpu_seconds / by_rebuild.cpu_seconds,
        },
    }


def _rounded(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {name: round(row["seconds"], 2) for name, row in stages.items()}


# --- side by side with DuckDB --------------------------------------------------------------------------------------------


def measure_full(at: Platform, events: int, threads: int, memory: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``full`` of one size, and the stages of its build.

    Raises:
        BenchError: DuckDB's features aren't Spark's.
    """
    day = at.last_night
    hold_back(at, day)
    with Usage() as by_spark:
        first = at.featurize(day)
    known_texts, buckets = _given(at)
    peer_file = at.root / "peer.parquet"
    raw = {table.name: at.active_files(table.name) for table in RAW_TABLES if at.lakehouse.exists(table.name)}
    with Usage() as by_duckdb:
        peer = Peer(at.root / "peer.duckdb", at.config, threads, memory)
        peer.run(raw, known_texts, buckets, day, peer_file)
        peer.close()
    ours = pq.read_table(at.active_files("user_features", day), partitioning=None)
    compared = compare(ours, pq.read_table(peer_file), at.config)
    spark_seconds, duckdb_seconds = seconds(first, *COMPARED_STAGES), sum(peer.seconds.values())
    return {
        "requested_events": events,
        "rows": int(first["clean"]["figures"]["rows"]),
        "events": int(first["clean"]["figures"]["events"]),
        "spark_stages": _rounded(first),
        "spark_seconds": spark_seconds,
        "spark_cpu_seconds_with_ingest": by_spark.cpu_seconds,
        "duckdb_stages": {name: round(value, 2) for name, value in peer.seconds.items()},
        "duckdb_seconds": duckdb_seconds,
        "duckdb_cpu_seconds": by_duckdb.cpu_seconds,
        "ratio": spark_seconds / duckdb_seconds,
        "compared": compared,
    }, first


def _given(at: Platform) -> tuple[Path, Path]:
    """What DuckDB is given: the model's reading of each text, and the hash bucket of each top-level category."""
    texts, buckets = at.root / "known_texts.parquet", at.root / "buckets.parquet"
    lakehouse = at.lakehouse
    read = lakehouse.read("text_embeddings").select("text_id", "sentiment")
    known = lakehouse.read("texts").select("text", "text_id").join(read, "text_id", "left")
    top = F.split("category", " > ")[0]
    numbered = lakehouse.read("raw_items").select(top.alias("top")).filter("top IS NOT NULL").distinct()
    bucket = F.pmod(F.xxhash64("top"), F.lit(CATEGORY_BUCKETS)).cast("int").alias("bucket")
    for df, path in ((known, texts), (numbered.select("top", bucket), buckets)):
        pq.write_table(pa.Table.from_pandas(df.toPandas(), preserve_index=False), path)
    return texts, buckets


def compare(ours: pa.Table, theirs: pa.Table, settings: Config) -> dict[str, Any]:
    """Share of the users' cells (features, and histories as one cell each) that are equal within the tolerance.

    Raises:
        BenchError: the users differ, or too few cells are equal.
    """
    ours, theirs = ours.sort_by("user_key"), theirs.sort_by("user_key")
    if not ours["user_key"].combine_chunks().equals(theirs["user_key"].combine_chunks()):
        raise BenchError(
            f"Spark has features of {ours.num_rows} users and DuckDB of {theirs.num_rows}, not of the same ones"
        )
    shares = {
        feature.name: float(_equal(ours[feature.name], theirs[feature.name]).mean())
        for feature in catalogue(settings.features).features
    }
    shares |= {c.name: float(_equal_lists(ours[c.name], theirs[c.name]).mean()) for c in SEQUENCE_COLUMNS}
    equal = float(np.mean(list(shares.values())))
    worst = dict(sorted(shares.items(), key=lambda item: item[1])[:5])
    if not equal > EQUAL_CELLS:
        raise BenchError(f"only {equal:.5f} of the cells of Spark and DuckDB are equal; the worst columns: {worst}")
    return {
        "users": ours.num_rows,
        "cells": ours.num_rows * len(shares),
        "equal_cells": equal,
        "worst_columns": {name: share for name, share in worst.items() if share < 1},
    }


def _equal(one: pa.ChunkedArray, other: pa.ChunkedArray) -> np.ndarray:
    a, b = (np.asarray(column.cast(pa.float64()).fill_null(np.nan)) for column in (one, other))
    return _close(a, b)


def _close(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= TOLERANCE * np.maximum(1, np.abs(a)))


def _equal_lists(one: pa.ChunkedArray, other: pa.ChunkedArray) -> np.ndarray:
    a, b = one.combine_chunks(), other.combine_chunks()
    equal = np.asarray(a.value_lengths()) == np.asarray(b.value_lengths())
    same_size = pa.array(equal)
    a, b = a.filter(same_size), b.filter(same_size)
    # as they are: a double would lose digits of 64-bit ids
    values = [np.asarray(column.flatten()) for column in (a, b)]
    owner = np.repeat(np.arange(len(a)), np.asarray(a.value_lengths()))
    alike = values[0] == values[1] if values[0].dtype.kind == "i" else _close(*values)
    differing = np.bincount(owner[~alike], minlength=len(a)) > 0
    equal[equal] = ~differing
    return equal


# --- dirt ----------------------------------------------------------------------------------------------------------------


def measure_dirt(at: Platform) -> dict[str, Any]:
    """``dirt``.

    Raises:
        BenchError: a row is missing or was judged otherwise than it was spoiled.
    """
    as_of = FIRST_DAY + timedelta(at.days + MAX_DELAY + 1)
    figures = {name: int(value) for name, value in at.featurize(as_of)["clean"]["figures"].items()}
    truth = pq.read_table(at.files / "truth" / "dirt").to_pylist()
    written = {(f"raw_{row['table']}", row["kind"]): row["rows"] for row in truth}
    duplicates = sum(count for (_, kind), count in written.items() if kind == "duplicate")
    late = sum(count for (_, kind), count in written.items() if kind == "late")
    wanted = {
        (f"raw_{log}", _rule(kind, column)): written[f"raw_{log}", kind]
        for log in LOGS
        for kind, (column, _) in SPOILS[log].items()
        if written[f"raw_{log}", kind]
    }
    found = {(source, rule): count for source, rule, count in pipeline.quarantine_by_rule(at.spark, at.config)}
    kept = figures["events"] + figures["duplicates"] + figures["quarantine"]
    if found != wanted or figures["duplicates"] != duplicates or kept != figures["rows"]:
        off = {
            str(key): (wanted.get(key), found.get(key))
            for key in {*wanted, *found}
            if wanted.get(key) != found.get(key)
        }
        raise BenchError(
            f"dirt is not accounted for: {figures}; duplicates written {duplicates}; rules (written, found) {off}"
        )
    return {
        **figures,
        "late": late,
        "share": (duplicates + late + figures["quarantine"]) / figures["rows"],
        "rules": len(found),
        "balanced": True,
        "latent": latent_power(at, as_of),
    }


def _rule(kind: str, column: str) -> str:
    return f"{column} is broken text" if kind == "broken_unicode" else RULES[kind]


def latent_power(at: Platform, as_of: date) -> dict[str, float]:
    """Spearman's correlation of the latent purchasing power with its estimate by a ridge regression on the features."""
    features = catalogue(at.config.features).features
    known = at.lakehouse.read("user_features").filter(F.col("as_of_date") == F.lit(as_of))
    share = min(1.0, LATENT_USERS / max(1, known.count()))
    sampled = known.filter(F.pmod(F.xxhash64("user_key"), F.lit(1_000_000)) < int(share * 1_000_000))
    latent = at.spark.read.parquet(f"{at.files}/truth/users").select("user_id", "z")
    truth = latent.join(at.lakehouse.read("user_keys"), "user_id").select("user_key", "z")
    rows = sampled.select("user_key", *(f.name for f in features)).join(truth, "user_key").toPandas()
    rows = rows.sort_values("user_key", ignore_index=True)
    x = rows[[f.name for f in features]].to_numpy(np.float64)
    logged = np.array([f.scale == "log" for f in features])
    x[:, logged] = np.sign(x[:, logged]) * np.log1p(np.abs(x[:, logged]))
    z = rows["z"].to_numpy()
    fit = np.random.default_rng(7).permutation(len(rows)) < len(rows) // 2
    mean, std = (_each_column(measure, x[fit]) for measure in (np.nanmean, np.nanstd))
    x = np.nan_to_num((x - mean) / np.where(std > 0, std, 1))
    weights = np.linalg.solve(x[fit].T @ x[fit] / fit.sum() + RIDGE * np.eye(x.shape[1]), x[fit].T @ z[fit] / fit.sum())
    spearman = stats.spearmanr(x[~fit] @ weights, z[~fit]).statistic
    return {"users_fitted": int(fit.sum()), "users_tested": int((~fit).sum()), "spearman": float(spearman)}


def _each_column(measure: Any, x: np.ndarray) -> np.ndarray:
    """A measure of each column's known values, 0 where none is known."""
    return np.array([measure(column[~np.isnan(column)]) if (~np.isnan(column)).any() else 0.0 for column in x.T])


# --- the run -------------------------------------------------------------------------------------------------------------


def run(sizes: Sizes, folder: Path, threads: int, memory: str) -> dict[str, Any]:
    """All figures; the folder holds nothing of it afterwards."""
    clock = time.monotonic()
    spark = get_session(config.load(), "bp-spark bench")
    spark.sparkContext.setLogLevel("ERROR")  # of this JVM: Spark Connect has no call for it
    if sizes == QUICK:
        # to compile would be most of the time of toy sizes
        spark.conf.set("spark.sql.codegen.wholeStage", "false")
        spark.conf.set("spark.sql.codegen.factoryMode", "NO_CODEGEN")
    if sizes.warm_up:
        at = make_platform(spark, folder / "warm-up", sizes.warm_up, sizes)
        at.featurize(at.last_night)
        shutil.rmtree(at.root)
    figures: dict[str, Any] = {
        "machine": _machine(threads, memory),
        "start_up_seconds": time.monotonic() - clock,
        "full": {},
        "new_day": {},
        "embedding": {},
    }
    builds: dict[int, float] = {}
    for events in sorted(sizes.full):
        at = make_platform(spark, folder / str(events), events, sizes)
        figures["full"][str(events)], first = measure_full(at, events, threads, memory)
        builds[events] = seconds(first) - seconds(first, "embed")
        for name, measured in measure_nights(at, first).items():
            figures[name][str(events)] = measured
        shutil.rmtree(at.root)
        _say(figures["full"][str(events)])
        _say(figures["new_day"][str(events)])
    smallest, largest = min(builds), max(builds)
    figures["growth"] = {"from": smallest, "to": largest, "ratio": builds[largest] / builds[smallest]}
    if sizes.dirt:
        at = make_platform(spark, folder / "dirt", sizes.dirt, sizes, **DIRT)
        figures["dirt"] = measure_dirt(at)
        shutil.rmtree(at.root)
    figures["goals"] = {
        "full": {"at_most": GOALS["full"], "is": figures["full"][str(largest)]["ratio"]},
        "new_day": {"at_most": GOALS["new_day"], "is": figures["new_day"][str(largest)]["ratio"]},
    }
    figures["load_at_end"] = os.getloadavg()
    return figures


def _machine(threads: int, memory: str) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "pyspark": pyspark.__version__, "duckdb": duckdb.__version__}
    return {
        "cores": os.cpu_count(),
        "duckdb_threads": threads,
        "duckdb_memory": memory,
        "load": os.getloadavg(),
        **versions,
    }


def _say(figures: Mapping[str, Any]) -> None:
    print(json.dumps(figures), file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Arguments in, :func:`run`, the figures out."""
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, nargs="+", default=Sizes.full, help="events of the full builds")
    parser.add_argument(
        "--dirt-events", type=int, default=Sizes.dirt, help="events of the dirty platform; 0 to leave it out"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of DuckDB; Spark takes all cores")
    parser.add_argument("--memory", default="4GB", help="memory of DuckDB")
    parser.add_argument("--folder", type=Path, help="where to work: a new folder in it, removed afterwards")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figures")
    parser.add_argument("--quick", action="store_true", help="toy sizes: whether it works, not how fast it is")
    given = parser.parse_args(arguments)
    sizes = QUICK if given.quick else Sizes(full=tuple(given.events), dirt=given.dirt_events)
    with tempfile.TemporaryDirectory(prefix="bp-bench-", dir=given.folder) as folder:
        figures = run(sizes, Path(folder), given.threads, given.memory)
    publish(figures, given.out)


if __name__ == "__main__":
    main()
