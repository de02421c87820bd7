"""DDP fine-tuning by one and by two processes of one core each, and the feed alone: ``python -m bench.training``.

Out: ``build/bench/training.json``, also on standard output: rows a second of each number of processes at the same global batch,
the losses they come to, and how many times faster Petastorm brings rows than one process learns from them. Users are random,
their spend depends on two of their features; there are no texts to speak of.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from safetensors.numpy import save_file

from bench import publish
from bench.score import users
from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.session import get_session
from bp_spark.model.inputs import HISTORY_COLUMNS, InputSpec
from bp_spark.training.loader import ShardLoader, Snapshot, snapshot
from bp_spark.training.tasks.finetune import finetune, label_columns

OUT = Path("build/bench/training.json")
GOALS = {"speed_up": 1.7, "feed": 3.0}
MEAN_EVENTS = 20
PROCESSES = (1, 2)
FILES = 8


def run(rows: int, epochs: int, rounds: int, folder: Path) -> dict[str, Any]:
    """All figures; the folder takes the tables and checkpoints of the way.

    Args:
        rows: to learn from; a quarter as many tell when to stop.
        epochs: of each training; the first, which reads the files, is not timed.
        rounds: trainings of each number of processes, alternating.
    """
    settings = config.load(overrides=["labels.other_horizons=[]", f"training.max_epochs={epochs}"])
    spark = get_session(settings, "bp-spark bench")
    spark.sparkContext.setLogLevel("ERROR")  # of this JVM: Spark Connect has no call for it
    learned = _labelled(spark, settings, folder / "train", rows)
    held_out = _labelled(spark, settings, folder / "valid", rows // 4)
    texts = folder / "texts.safetensors"
    save_file({"ids": np.arange(1, 3), "embeddings": np.zeros((2, 8), np.float32)}, texts)
    spec = InputSpec.of(settings.features)
    found: dict[int, list[dict[str, float]]] = {processes: [] for processes in PROCESSES}
    for number in range(rounds):
        for processes in PROCESSES:
            training = settings.training.model_copy(update={"processes": processes})
            changed = settings.model_copy(update={"training": training})
            with _cores(processes):
                place = folder / f"{number}-{processes}"
                result = finetune(spark, learned, held_out, spec, texts, changed, place, epochs=epochs)
            timed = [epoch["rows_per_second"] for epoch in result.history[1:]]
            found[processes].append(
                {"rows_per_second": statistics.median(timed), "valid_loss": result.history[-1]["valid_loss"]}
            )
            print(json.dumps({processes: found[processes][-1]}), file=sys.stderr, flush=True)
    speed = {n: statistics.median(one["rows_per_second"] for one in found[n]) for n in PROCESSES}
    fed = statistics.median(_feed(learned, spec, settings) for _ in range(rounds))
    speed_up, feed = speed[2] / speed[1], fed / speed[1]
    return {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "rows": rows,
        "batch_size": settings.training.batch_size,
        "trainings": {str(processes): figures for processes, figures in found.items()},
        "rows_per_second": {str(processes): speed[processes] for processes in PROCESSES} | {"feed": fed},
        "goals": {
            "speed_up": {"at_least": GOALS["speed_up"], "is": speed_up},
            "feed": {"at_least": GOALS["feed"], "is": feed},
        },
        "load_at_end": os.getloadavg(),
    }


def _labelled(spark: SparkSession, settings: Config, table: Path, rows: int) -> Snapshot:
    spend = F.coalesce("spend_30d", F.lit(0.0)) * 3 + F.coalesce("orders_90d", F.lit(0.0))
    labelled = users(spark, settings, rows, MEAN_EVENTS).withColumns(
        {"label_spend": F.when(F.col("spend_30d") > 2, spend).otherwise(0.0), "weight": F.lit(1.0)}
    )
    labelled.repartition(FILES).write.format("delta").save(str(table))
    return snapshot(str(table))


@contextmanager
def _cores(count: int) -> Iterator[None]:
    """For the block, this thread and the processes that it starts have so many cores: a rank one, and one thread."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _feed(rows: Snapshot, spec: InputSpec, settings: Config) -> float:
    """Rows a second of a pass that reads and decodes the files, as a training's first pass does."""
    feed = ShardLoader(rows.shard(0, 1), (*label_columns(()), *spec.tabular), HISTORY_COLUMNS)
    started = time.monotonic()
    with feed.batches(math.ceil(rows.rows / settings.training.batch_size), seed=1) as batches:
        read = sum(len(batch["label_spend"]) for batch in batches if batch is not None)
    return read / (time.monotonic() - started)


def main(arguments: Sequence[str] | None = None) -> None:
    """Arguments in, :func:`run`, the figures out."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000, help="rows to learn from")
    parser.add_argument("--epochs", type=int, default=4, help="of each training")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each number of processes")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figures")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bp-bench-") as folder:
        figures = run(given.rows, given.epochs, given.rounds, Path(folder))
    publish(figures, given.out)


if __name__ == "__main__":
    main()
