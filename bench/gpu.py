"""What a GPU makes of the network's work, beside the processor of its machine: ``python -m bench.gpu``.

In: sizes. Out: ``build/bench/gpu.json``, also on standard output; for each ``network.size``

- ``training``: rows a second of fine-tuning by one rank, files through Petastorm, on the GPU (``nccl``, bfloat16) and on the
  processor (``gloo``, all cores), and the loss of the last epoch on each;
- ``scoring``: users a second of :class:`TransformerMember`, from columns to money, on each, and the
  largest relative difference between the two answers to a user.

Needs no Spark. Rows are random; their spend depends on one feature. Weights are the same on both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import socket
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from bench import publish
from bp_spark.core import config
from bp_spark.core.config import SIZES, Config
from bp_spark.model.history import HistoryEncoder
from bp_spark.model.inputs import HISTORY_COLUMNS, InputSpec
from bp_spark.model.members.transformer import TransformerMember
from bp_spark.model.network import SpendNetwork
from bp_spark.training.fit import fit
from bp_spark.training.loader import Columns, RowGroup, Snapshot
from bp_spark.training.tasks.finetune import FineTuneTask

OUT = Path("build/bench/gpu.json")
TEXTS, TEXT_SIZE = 10_000, 384
MEAN_EVENTS = 20
FILES = 8
SEED = 0
DEVICES = ("cpu", "cuda:0")
_BYTES_OF_ROW = 4_000
_TYPES = {"seq_kind": pa.int32(), "seq_text_id": pa.int64(), "seq_weekday": pa.int32(), "seq_hour": pa.int32()}


def users(count: int, spec: InputSpec) -> Columns:
    """Random users as the network reads them, with ``label_spend``; histories are exponentially distributed up to the cap."""
    rng = np.random.default_rng(SEED)
    lengths = np.minimum(spec.history_length, 1 + rng.exponential(MEAN_EVENTS, count)).astype(int)
    ends, total = np.cumsum(lengths), int(lengths.sum())
    events = {
        "seq_kind": rng.integers(1, 9, total),
        "seq_age_days": rng.uniform(0, 400, total),
        "seq_amount": rng.exponential(30, total),
        "seq_items": rng.integers(1, 6, total),
        "seq_discount": rng.random(total),
        "seq_text_id": rng.integers(0, TEXTS, total),
        "seq_weekday": rng.integers(1, 8, total),
        "seq_hour": rng.integers(0, 24, total),
    }
    columns: Columns = {name: rng.exponential(10, count).astype(np.float32) for name in spec.tabular}
    for name in HISTORY_COLUMNS:
        values = events[name].astype(_TYPES.get(name, pa.float32()).to_pandas_dtype())
        columns[name] = np.empty(count, object)
        columns[name][:] = np.split(values, ends[:-1])
    level = columns[spec.tabular[0]]
    columns["label_spend"] = np.where(level > 4, level * rng.lognormal(1, 0.5, count), 0.0)
    return columns


def snapshot(folder: Path, columns: Columns) -> Snapshot:
    """The users as files of one row group each."""
    folder.mkdir(parents=True)
    arrays = {
        name: pa.array(list(values), pa.list_(_TYPES.get(name, pa.float32())))
        if name in HISTORY_COLUMNS
        else pa.array(values)
        for name, values in columns.items()
    }
    table = pa.table(arrays)
    bounds = np.linspace(0, len(table), FILES + 1).astype(int)
    files = []
    for start, end in pairwise(bounds):
        path = (folder / f"{start:09d}.parquet").absolute()
        pq.write_table(table.slice(start, end - start), path, row_group_size=len(table))
        files.append(path.as_uri())
    groups = tuple(RowGroup(int(rows), int(rows) * _BYTES_OF_ROW) for rows in np.diff(bounds))
    return Snapshot(str(folder), 0, tuple(files), table.schema, groups)


def train(task: FineTuneTask, device: str, answers: Any) -> None:
    """The one rank of a job, in a process of its own; puts its epochs."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    answers.put(fit(task).progress.history)


def training(settings: Config, rows: Snapshot, spec: InputSpec, folder: Path, devices: Sequence[str]) -> dict[str, Any]:
    """Rows a second and losses of each device."""
    texts = folder / "texts.safetensors"
    if not texts.exists():
        save_file({"ids": torch.arange(1, TEXTS + 1), "embeddings": torch.randn(TEXTS, TEXT_SIZE)}, str(texts))
    context, found = multiprocessing.get_context("spawn"), {}
    for device in devices:
        run_dir = folder / f"{settings.network.size}-{device.partition(':')[0]}"
        run_dir.mkdir()
        task = FineTuneTask(rows, None, settings.training.max_epochs, spec, texts, settings, run_dir, "bench")
        answers = context.Queue()
        rank = context.Process(target=train, args=(task, device, answers))
        rank.start()
        # the first epoch decodes the files
        history = answers.get()[1:]
        rank.join()
        speed = median(epoch["rows_per_second"] for epoch in history)
        found[device] = {"rows_per_second": speed, "train_loss": history[-1]["train_loss"]}
    return found


def scoring(settings: Config, columns: Columns, spec: InputSpec, devices: Sequence[str]) -> dict[str, Any]:
    """Users a second of each device, the middle one of three passes, and how far their answers lie apart."""
    torch.manual_seed(SEED)
    history = HistoryEncoder(settings.network, spec.history_length, torch.randn(TEXTS, TEXT_SIZE))
    member = TransformerMember(SpendNetwork(spec, settings.network, torch.arange(1, TEXTS + 1), history))
    found: dict[str, Any] = {}
    said = {}
    for device in devices:
        member.move_to(device)
        seconds = []
        for _ in range(4):
            started = time.monotonic()
            said[device] = member.predict(columns)
            seconds.append(time.monotonic() - started)
        found[device] = {"users_per_second": len(said[device]) / median(seconds[1:])}
    first, *others = said.values()
    apart = [np.abs(other - first) / np.maximum(np.abs(first), 1e-9) for other in others]
    return found | {"largest_relative_difference": max((float(each.max()) for each in apart), default=0.0)}


def run(rows: int, epochs: int, sizes: Sequence[str], devices: Sequence[str], folder: Path) -> dict[str, Any]:
    """All figures; the folder takes the files of the way.

    Args:
        rows: to learn from, and users to score.
        epochs: of each training; the first is not timed.
    """
    settings = config.load(overrides=["labels.other_horizons=[]", f"training.max_epochs={epochs}"])
    spec = InputSpec.of(settings.features)
    columns = users(rows, spec)
    files = snapshot(folder / "rows", columns)
    figures: dict[str, Any] = {}
    for size in sizes:
        sized = config.changed(settings, {"network.size": size})
        figures[size] = {
            "training": training(sized, files, spec, folder, devices),
            "scoring": scoring(sized, columns, spec, devices),
        }
    return {
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        },
        "torch": torch.__version__,
        "rows": rows,
        "batch_size": settings.training.batch_size,
        "sizes": figures,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Arguments in, :func:`run`, the figures out."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000, help="rows to learn from, and users to score")
    parser.add_argument("--epochs", type=int, default=4, help="of each training")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="of the network")
    parser.add_argument("--devices", nargs="+", default=list(DEVICES), help="to compare")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figures")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available() and any(device.startswith("cuda") for device in given.devices):
        parser.error("there is no GPU here; --devices cpu measures the processor alone")
    with tempfile.TemporaryDirectory(prefix="bp-bench-") as folder:
        figures = run(given.rows, given.epochs, given.sizes, given.devices, Path(folder))
    publish(figures, given.out)


if __name__ == "__main__":
    main()
