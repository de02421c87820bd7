"""What the training jobs share: where a run stands, its checkpoints, and how its random numbers are seeded.

A checkpoint is one file, written beside its place and renamed into it, that only a run of the same inputs goes on from.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bp_spark.training.distributed import Group

CHECKPOINT_FILE = "checkpoint.pt"
CHECKPOINT_FORMAT = 2
"""Raised when a checkpoint holds something else than before: a run then doesn't go on from an older one."""
TENSORBOARD_FOLDER = "tensorboard"


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        epoch: epochs run, over all resumptions.
        best_epoch: the epoch (from 1) of the best validation loss.
        best_loss: that loss.
        history: figures of each epoch.
    """

    epoch: int
    best_epoch: int
    best_loss: float
    history: list[dict[str, float]]


@dataclass(frozen=True)
class TrainingOutcome:
    """What a training run came to.

    Attributes:
        folder: what was saved of the best epoch.
        epochs: epochs run, over all resumptions.
        best_epoch: the epoch (from 1) of the best validation loss.
        best_validation_loss: that loss.
        history: figures of each epoch; see :func:`bp_spark.training.fit.run_epochs`.
        seconds: of the call, from starting the ranks to the saved network.
    """

    folder: Path
    epochs: int
    best_epoch: int
    best_validation_loss: float
    history: list[dict[str, float]]
    seconds: float

    @classmethod
    def of(cls, progress: Progress, folder: Path, started: float) -> TrainingOutcome:
        """The outcome of a run that started at that time of ``time.monotonic`` and ends now."""
        seconds = time.monotonic() - started
        return cls(folder, progress.epoch, progress.best_epoch, progress.best_loss, progress.history, seconds)


def save_checkpoint(
    folder: Path, digest: str, state: TrainingState, progress: Progress, best: dict[str, Tensor]
) -> None:
    """Write where a run stands over where it stood.

    Args:
        folder: of the run.
        digest: identity of the run's inputs.
        best: weights of the best epoch.
    """
    path = folder / CHECKPOINT_FILE
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(
            {
                "format": CHECKPOINT_FORMAT,
                "digest": digest,
                "progress": asdict(progress),
                "state": state.state_dict(),
                "best": best,
            },
            file,
        )
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def resume(folder: Path, digest: str, group: Group, state: TrainingState) -> tuple[Progress, dict[str, Tensor]]:
    """Go on from the checkpoint if there is one of the same inputs; rank 0 decides for all.

    Returns:
        Where the run stands, and the best weights; those of the network before the first epoch.
    """
    path = folder / CHECKPOINT_FILE
    epoch = 0
    if group.rank == 0 and path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.get("format") == CHECKPOINT_FORMAT and saved["digest"] == digest:
            epoch = saved["progress"]["epoch"]
    if not group.from_first(epoch):
        return Progress(0, 0, math.inf, []), weights(state.network)
    saved = torch.load(path, map_location="cpu", weights_only=True)
    state.load_state_dict(saved["state"])
    return Progress(**saved["progress"]), saved["best"]


class WeightAverage:
    """Exponential moving average of a network's trained weights over the steps (Polyak and Juditsky 1992).

    A network that stops early stops at a high learning rate, where each step still moves it about; the average stands where
    it moves about. Early on it follows faster, so that the first, random weights are soon forgotten.
    """

    def __init__(self, network: nn.Module, half_life: float) -> None:
        """Args: half_life: steps in which a step's share halves; 0: the average is the weights themselves."""
        self._weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._decay = 0.5 ** (1 / half_life) if half_life else 0.0
        self._average = [weight.detach().clone() for weight in self._weights] if half_life else []
        self._steps = 0

    def update(self) -> None:
        """After each step of the optimizer."""
        if self._decay:
            self._steps += 1
            decay = min(self._decay, self._steps / (self._steps + 10))
            get_ema_multi_avg_fn(decay)(self._average, self._weights, self._steps)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """For the block the network has the average for its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for number, average in enumerate(self._average):
            kept = self._weights[number].detach().clone()
            self._weights[number].copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"steps": self._steps, "average": self._average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._steps = state["steps"]
        for average, saved in zip(self._average, state["average"], strict=True):
            average.copy_(saved)


class TrainingState:
    """What each step moves on, and a checkpoint keeps.

    Attributes:
        network: being trained, the same on all ranks.
        optimizer: of its weights.
        schedule: of the learning rate, step by step.
        average: of the weights; it is what is judged and kept.
    """

    def __init__(
        self, network: nn.Module, optimizer: Optimizer, schedule: LRScheduler, average_half_life: float = 0.0
    ) -> None:
        """Args: average_half_life: in steps; see :class:`WeightAverage`."""
        self.network, self.optimizer, self.schedule = network, optimizer, schedule
        self.average = WeightAverage(network, average_half_life)

    def step(self) -> None:
        """Move on by the gradients that the network holds."""
        self.optimizer.step()
        self.schedule.step()
        self.average.update()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        for name, part in vars(self).items():
            part.load_state_dict(state[name])


def weights(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the network's state in main memory."""
    return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}


def decayed(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups of an optimizer: weights decay; biases and the scales of norms, all vectors, don't."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def warmup_cosine(optimizer: Optimizer, warmup_fraction: float, steps: int) -> LRScheduler:
    """Linear warmup, then a cosine to zero at the last of ``steps``."""
    warmup = math.ceil(steps * warmup_fraction)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return LambdaLR(optimizer, factor)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; most CPUs have no arithmetic for it and are slower than in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def seed_of(*parts: int) -> int:
    """One seed of 32 bits from several numbers, unrelated to that of their neighbours."""
    return int(np.random.SeedSequence([abs(part) for part in parts]).generate_state(1)[0])
