"""How fast the nightly pass is, and what it costs as users grow and as less changes: ``python -m bench.score``.

In: sizes. Out: ``build/bench/score.json``, also on standard output, with these figures of one run on one machine:

- ``contest``: users a second of the network alone, by :func:`bp_spark.scoring.prediction.score` and by the peers of
  :mod:`bench.score_peers`, and of plain torch without Spark, the limit; alternating, medians; at histories of 20 events in the
  mean and at the cap. Whole Spark jobs are timed, from the plan to the last row; torch has its rows in memory. ``whole`` is the
  whole bundle (network, trees, purchase process, fusion, reasons).
- ``prediction_udf_ratio``: users a second of :func:`bp_spark.scoring.prediction.prediction_udf` over those of
  :func:`bp_spark.scoring.prediction.score`, of the same network and rows.
- ``growth``: of each number of users, a full night from features to ``scores``, and the peak memory of the driver and of the
  largest Python worker.
- ``nights``: a night with a share of the users changed, over a full one.
- ``exactness``: the largest relative difference between a user's answer in any company and alone.

Features and models are random, of the catalogue's columns and the default sizes: what they say means nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pyspark
import torch
from deltalake import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bench import Usage, publish, score_peers
from bp_spark import pipeline
from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.session import MODEL_MODULES, get_session
from bp_spark.features.catalogue import user_features_table
from bp_spark.lakehouse import parquet
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.model.columns import from_arrow
from bp_spark.registry.bundle import Bundle
from bp_spark.scoring import prediction
from tests.support.random_users import NIGHT, make_bundles, users

OUT = Path("build/bench/score.json")
MEAN_EVENTS = 20
_WARM_UP = (5_000, 50)
"""Users of the nights that come first: one that loads the classes, one that is nothing but start-up."""
GOALS = {"share_of_torch": 0.85, "times_peer": 2.5, "growth": 1.1, "night_10": 0.15, "night_1": 0.06}


@dataclass(frozen=True)
class Sizes:
    """Users of each measurement, rounds of the contest, texts that the network knows."""

    mean: int = 100_000
    cap: int = 30_000
    rounds: int = 5
    growth: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    nights: int = 300_000
    texts: int = 50_000


QUICK = Sizes(mean=200, cap=100, rounds=1, growth=(100, 200), nights=200, texts=50)


# --- random users and models -------------------------------------------------------------------------------------------


# --- contest -----------------------------------------------------------------------------------------------------------


def contest(
    spark: SparkSession, settings: Config, made: dict[str, Bundle], table: Path, sizes: Sizes
) -> dict[str, Any]:
    """Users a second of each contender, alternating: medians over the rounds and shares of them."""
    rows = spark.read.format("delta").load(str(table))
    files = DeltaTable(str(table)).file_uris()
    count, cores = rows.count(), os.cpu_count() or 1
    folder, cap = str(made["network"].folder), settings.features.history_length

    def by_files(bundle: str) -> DataFrame:
        """As a night does it."""
        return prediction.score(
            rows, made[bundle], NIGHT, 0, row_locations=parquet.row_locations(rows, *prediction.SHARED_COLUMNS)
        )

    frames: dict[str, Callable[[], DataFrame]] = {
        "bp-spark": lambda: by_files("network"),
        "bp-spark, whole bundle": lambda: by_files("whole"),
        "bp-spark, features by Spark": lambda: prediction.score(rows, made["network"], NIGHT, 0),
        "bp-spark, pandas UDF": lambda: rows.select(
            "user_key", prediction.prediction_udf(spark, made["network"])(F.struct(*made["network"].required_columns))
        ),
        "predict_batch_udf": lambda: score_peers.predict_batch(rows, folder, cap),
        "mlflow spark_udf": lambda: score_peers.mlflow_spark_udf(
            rows, folder, made["network"].folder.parent / "mlflow"
        ),
        "naive pandas UDF": lambda: score_peers.naive(rows, folder),
    }
    rates: dict[str, list[float]] = {name: [] for name in ("torch", *frames)}
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(cores + 1), context.Queue()
    processes = [
        context.Process(target=score_peers.torch_share, args=(folder, part, barrier, answers), daemon=True)
        for part in score_peers.chunks(files, cores)
    ]
    for process in processes:
        process.start()
    try:
        for _ in range(sizes.rounds):
            barrier.wait()
            rates["torch"].append(score_peers.of_processes([answers.get() for _ in processes]))
            for name, frame in frames.items():
                rates[name].append(count / _seconds(spark, settings, frame))
            _say({name: round(values[-1]) for name, values in rates.items()})
    finally:
        barrier.abort()
        for process in processes:
            process.join(30)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "users": count,
        "users_per_second": {name: [round(rate) for rate in values] for name, values in rates.items()},
        "median": {name: round(rate) for name, rate in medians.items()},
        "share_of_torch": {name: medians[name] / medians["torch"] for name in frames},
        "times_score": {name: medians[name] / medians["bp-spark"] for name in frames if name.startswith("bp-spark,")},
        "times_peer": {name: medians["bp-spark"] / medians[name] for name in frames if not name.startswith("bp-spark")},
    }


def _seconds(spark: SparkSession, settings: Config, frame: Callable[[], DataFrame]) -> float:
    """Of a whole job whose rows go nowhere."""
    clock = time.monotonic()
    with prediction.batch_sizes(spark, settings.scoring):
        frame().write.format("noop").mode("overwrite").save()
    return time.monotonic() - clock


# --- nights ------------------------------------------------------------------------------------------------------------


def night(spark: SparkSession, settings: Config, bundle: Bundle, day: date, full: bool = False) -> dict[str, float]:
    """Seconds of a night, and what it took."""
    clock = time.monotonic()
    with Usage() as used:
        result = pipeline.score(spark, settings, day, bundle.folder, full)
    return {
        "seconds": time.monotonic() - clock,
        "cpu_seconds": used.cpu_seconds,
        "users": result.users,
        "computed": result.computed,
        "driver_mb": used.driver_peak / 1e6,
        "worker_mb": used.worker_peak / 1e6,
    }


def growth(spark: SparkSession, folder: Path, bundle: Bundle, sizes: Sizes) -> dict[str, Any]:
    """Full nights of more and more users, and what a user costs beyond start-up: the time of a night of a handful."""
    measured = {}
    for count in (*_WARM_UP, *sizes.growth):
        settings = _settings(folder / f"growth-{count}")
        _write(spark, settings, users(spark, settings, count, MEAN_EVENTS), NIGHT)
        measured[count] = night(spark, settings, bundle, NIGHT)
        _say(measured[count])
        shutil.rmtree(folder / f"growth-{count}")
    start_up = measured.pop(_WARM_UP[-1])
    sized = {count: figures for count, figures in measured.items() if count in sizes.growth}

    def each(kind: str) -> dict[int, float]:
        return {count: (figures[kind] - start_up[kind]) / count for count, figures in sized.items()}

    return {
        "start_up_seconds": start_up["seconds"],
        "nights": {str(count): figures for count, figures in sized.items()},
        "microseconds_per_user_beyond_start_up": {
            kind: {str(count): 1e6 * seconds for count, seconds in each(kind).items()}
            for kind in ("seconds", "cpu_seconds")
        },
        "ratio": _spread(each("seconds")),
        "cpu_ratio": _spread(each("cpu_seconds")),
    }


def _spread(each: Mapping[int, float]) -> float:
    return max(each.values()) / min(each.values())


def nights(spark: SparkSession, folder: Path, bundle: Bundle, sizes: Sizes) -> dict[str, Any]:
    """A full night, then nights with a share of changed users."""
    settings = _settings(folder / "nights")
    before = users(spark, settings, sizes.nights, MEAN_EVENTS)
    _write(spark, settings, before, NIGHT)
    full = night(spark, settings, bundle, NIGHT)
    _say(full)
    found = {}
    for number, share in enumerate((0.1, 0.01, 0.0), start=1):
        day = NIGHT + timedelta(days=number)
        changed = F.pmod(F.xxhash64("user_key"), F.lit(1000)) < share * 1000
        rows = before.withColumn("as_of_date", F.lit(day)).withColumn(
            "input_digest", F.when(changed, F.col("input_digest") + number).otherwise(F.col("input_digest"))
        )
        _write(spark, settings, rows, day)
        found[f"{share:.0%}"] = measured = night(spark, settings, bundle, day)
        # the next night compares with this one, whose changed users have another digest
        before = rows
        _say(measured)
    return {
        "full": full,
        "changed": found,
        "ratio": {share: figures["seconds"] / full["seconds"] for share, figures in found.items()},
        "cpu_ratio": {share: figures["cpu_seconds"] / full["cpu_seconds"] for share, figures in found.items()},
    }


def exactness(table: Path, bundle: Bundle) -> dict[str, float]:
    """The largest relative difference of a user's expected spend in company and alone."""
    batch = pq.ParquetFile(DeltaTable(str(table)).file_uris()[0]).read().combine_chunks().to_batches()[0]
    together = bundle.predict(from_arrow(batch))["expected_spend"]
    few = range(0, batch.num_rows, max(1, batch.num_rows // 50))
    alone = np.array([bundle.predict(from_arrow(batch.slice(row, 1)))["expected_spend"][0] for row in few])
    return {"largest_relative_difference": float(np.max(np.abs(together[list(few)] / alone - 1)))}


def _settings(folder: Path) -> Config:
    return config.load(overrides=[f"tables.path={folder}/lakehouse", f"bundles={folder}/bundles", "tracking.uri=null"])


def _write(spark: SparkSession, settings: Config, rows: DataFrame, day: date) -> None:
    Lakehouse(spark, settings.tables).replace(
        user_features_table(settings.features), rows, where={"as_of_date": [day]}, inputs="bench"
    )


# --- the run -----------------------------------------------------------------------------------------------------------


def run(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """All figures."""
    settings = config.load(overrides=["trees.rounds=5" if sizes == QUICK else "trees.rounds=250"])
    spark = get_session(settings, "bp-spark bench", MODEL_MODULES)
    spark.sparkContext.setLogLevel("ERROR")  # of this JVM: Spark Connect has no call for it
    made = make_bundles(folder / "bundles", settings, sizes.texts)
    figures: dict[str, Any] = {
        "machine": {
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
            "python": platform.python_version(),
            "pyspark": pyspark.__version__,
            "torch": torch.__version__,
        },
        "contest": {},
    }
    for name, count, mean in (("mean of 20 events", sizes.mean, MEAN_EVENTS), ("cap", sizes.cap, None)):
        table = folder / "contest"
        parts = 2 * (os.cpu_count() or 1)
        rows = users(spark, settings, count, mean).repartition(parts)
        rows.write.format("delta").save(str(table))
        if "exactness" not in figures:
            figures["exactness"] = exactness(table, made["whole"])
        figures["contest"][name] = contest(spark, settings, made, table, sizes)
        shutil.rmtree(table)
    figures["prediction_udf_ratio"] = {
        name: found["times_score"]["bp-spark, pandas UDF"] for name, found in figures["contest"].items()
    }
    figures["growth"] = growth(spark, folder, made["whole"], sizes)
    figures["nights"] = nights(spark, folder, made["whole"], sizes)
    figures["goals"] = {
        "share_of_torch": {
            "at_least": GOALS["share_of_torch"],
            "is": {name: found["share_of_torch"]["bp-spark"] for name, found in figures["contest"].items()},
        },
        "times_peer": {
            "at_least": GOALS["times_peer"],
            "is": {name: found["times_peer"] for name, found in figures["contest"].items()},
        },
        "growth": {"at_most": GOALS["growth"], "is": figures["growth"]["ratio"]},
        "night_10": {"at_most": GOALS["night_10"], "is": figures["nights"]["ratio"]["10%"]},
        "night_1": {"at_most": GOALS["night_1"], "is": figures["nights"]["ratio"]["1%"]},
    }
    figures["load_at_end"] = os.getloadavg()
    return figures


def _say(figures: dict[str, Any]) -> None:
    print(json.dumps(figures), file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Arguments in, :func:`run`, the figures out."""
    parser = argparse.ArgumentParser(prog="python -m bench.score", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--users", type=int, default=Sizes.mean, help="users of the contest at 20 events in the mean")
    parser.add_argument("--cap-users", type=int, default=Sizes.cap, help="users of the contest at the cap")
    parser.add_argument("--rounds", type=int, default=Sizes.rounds, help="rounds of the contest")
    parser.add_argument("--growth", type=int, nargs="+", default=Sizes.growth, help="users of the full nights")
    parser.add_argument("--nights", type=int, default=Sizes.nights, help="users of the nights with few changes")
    parser.add_argument("--folder", type=Path, help="where to work: a new folder in it, removed afterwards")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figures")
    parser.add_argument("--quick", action="store_true", help="toy sizes: whether it works, not how fast it is")
    given = parser.parse_args(arguments)
    sizes = Sizes(given.users, given.cap_users, given.rounds, tuple(given.growth), given.nights)
    with tempfile.TemporaryDirectory(prefix="bp-bench-", dir=given.folder) as folder:
        figures = run(QUICK if given.quick else sizes, Path(folder))
    publish(figures, given.out)


if __name__ == "__main__":
    main()
