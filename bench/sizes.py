"""What the networks of each size cost: ``python -m bench.sizes``.

In: settings. Out: ``build/bench/sizes.json``, also on standard output: for ``network.size`` of the events backbone, and for
the text backbone, the numbers of weights, how many of them are trained, and, on one thread, CPU milliseconds of a forward pass
for each user and of a training step for each row (forward, backward, AdamW). Every history is full:
``features.history_length`` events, ``network.text.max_tokens`` tokens. CPU time: seconds of the clock grow with what others do.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bench import publish
from bp_spark.core import config
from bp_spark.core.config import SIZES, Config
from bp_spark.features.catalogue import catalogue
from bp_spark.ingest.texts import model_folder
from bp_spark.model.history import HistoryEncoder
from bp_spark.model.inputs import HISTORY_COLUMNS, Batch, InputSpec, collate
from bp_spark.model.network import SpendNetwork
from bp_spark.model.text_history import TextHistoryEncoder, adapted, tokenise

OUT = Path("build/bench/sizes.json")
TEXTS = tuple(f"{brand} {thing}" for brand in ("fresh", "frozen", "organic") for thing in ("milk", "bread", "fruit"))
TEXT_SIZE = 384
"""Of the default language model's vectors."""


def networks(settings: Config) -> Iterator[tuple[str, SpendNetwork]]:
    """The networks of all sizes, and the one that reads text, each with random weights where it has no others."""
    ids = torch.arange(1, len(TEXTS) + 1)
    spec = InputSpec.of(settings.features)
    for size in SIZES:
        sized = config.changed(settings, {"network.size": size, "network.backbone": "events"}).network
        encoder = HistoryEncoder(sized, spec.history_length, torch.randn(len(TEXTS), TEXT_SIZE))
        yield size, SpendNetwork(spec, sized, ids, encoder)
    as_text = config.changed(settings, {"network.backbone": "text", "pretraining.max_epochs": 0})
    folder, network = model_folder(as_text.history_model), as_text.network
    table = tokenise(TEXTS, folder, settings.texts.max_tokens, network.text.max_tokens)
    yield "text", SpendNetwork(spec, network, ids, TextHistoryEncoder(network, adapted(folder, network), table))


def full_histories(users: int, spec: InputSpec) -> Batch:
    """Users with as many random events as a history holds."""
    rng = np.random.default_rng(0)
    shape = (users, spec.history_length)
    values = {
        "seq_kind": rng.integers(1, 9, shape),
        "seq_age_days": -np.sort(-rng.random(shape) * 200),
        "seq_amount": rng.lognormal(3, 1, shape),
        "seq_items": rng.integers(1, 20, shape),
        "seq_discount": rng.random(shape),
        "seq_text_id": rng.integers(1, len(TEXTS) + 1, shape),
        "seq_weekday": rng.integers(1, 8, shape),
        "seq_hour": rng.integers(0, 24, shape),
    }
    columns = {name: np.empty(users, object) for name in HISTORY_COLUMNS}
    for name, column in columns.items():
        column[:] = list(values[name])
    return collate(columns | {name: rng.random(users) for name in spec.tabular}, spec, np.arange(1, len(TEXTS) + 1))


def measure(network: SpendNetwork, users: int, repeats: int) -> dict[str, float]:
    """Weights, and CPU milliseconds of the middle one of ``repeats`` passes over a batch of ``users``."""
    batch, labels = full_histories(users, network.spec), torch.linspace(0, 500, users)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        network.training_losses(network(batch), labels.unsqueeze(1)).mean().backward()
        optimizer.step()

    figures: dict[str, float] = {
        "parameters": network.parameter_count,
        "trained": sum(parameter.numel() for parameter in trained),
        "training_ms_per_row": _milliseconds(step, repeats) / users,
    }
    network.eval()
    with torch.inference_mode():
        figures["forward_ms_per_user"] = _milliseconds(lambda: network(batch), repeats) / users
    return figures


def _milliseconds(work: Callable[[], object], repeats: int) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return 1000 * median(seconds)


def run(settings: Config, users: int, repeats: int) -> dict[str, Any]:
    """All figures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()},
        "torch": torch.__version__,
        "features": len(catalogue(settings.features).names),
        "history_length": settings.features.history_length,
        "max_tokens": settings.network.text.max_tokens,
        "users": users,
        "networks": {name: measure(network.train(), users, repeats) for name, network in networks(settings)},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Arguments in, :func:`run`, the figures out."""
    parser = argparse.ArgumentParser(prog="python -m bench.sizes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    parser.add_argument("--users", type=int, default=32, help="users of a batch")
    parser.add_argument("--repeats", type=int, default=5, help="passes, of which the middle one counts")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figures")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    given = parser.parse_args(arguments)
    publish(run(config.load(given.config, given.overrides), given.users, given.repeats), given.out)


if __name__ == "__main__":
    main()
