"""Progress of a training run, its checkpoints, its optimizer state, and the seeds of its random numbers.

A checkpoint is one file, written under another name and then renamed. Only a run with the same inputs resumes from it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bp_spark.core import disk
from bp_spark.training.distributed import Group

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT_FILE = "checkpoint.pt"
CHECKPOINT_FORMAT = 2
"""Raise this number when the content of a checkpoint changes: a run then ignores an older checkpoint."""
TENSORBOARD_FOLDER = "tensorboard"

# torch has no types for it
_moving_average: Callable[[float], Callable[..., None]] = get_ema_multi_avg_fn


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        epoch: epochs run, over all resumptions.
        best_epoch: the epoch (from 1) of the best validation loss.
        best_loss: the best validation loss.
        history: figures of each epoch.
    """

    epoch: int
    best_epoch: int
    best_loss: float
    history: list[dict[str, float]]


@dataclass(frozen=True)
class TrainingOutcome:
    """Result of a training run, for its caller on the driver.

    Attributes:
        folder: the saved network of the best epoch.
        epochs: epochs run, over all resumptions.
        best_epoch: the epoch (from 1) of the best validation loss.
        best_validation_loss: the best validation loss.
        history: figures of each epoch; see :func:`bp_spark.training.fit.fit`.
        seconds: seconds of this call, from starting the ranks to the saved network.
    """

    folder: Path
    epochs: int
    best_epoch: int
    best_validation_loss: float
    history: list[dict[str, float]]
    seconds: float

    @classmethod
    def of(cls, progress: Progress, folder: Path, started: float) -> TrainingOutcome:
        """Return the outcome of a run that ends now.

        Args:
            progress: progress of the run.
            folder: the saved network.
            started: ``time.monotonic()`` when the run started.
        """
        seconds = time.monotonic() - started
        return cls(folder, progress.epoch, progress.best_epoch, progress.best_loss, progress.history, seconds)


def save_checkpoint(
    folder: Path, digest: str, state: TrainingState, progress: Progress, best: dict[str, Tensor]
) -> None:
    """Replace the checkpoint of a run.

    Args:
        folder: folder of the run.
        digest: identity of the run's inputs.
        state: network, optimizer, learning rate and average of the weights.
        progress: progress of the run.
        best: weights of the best epoch.

    Raises:
        PlatformError: the disk is full.
    """
    path = folder / CHECKPOINT_FILE
    temporary = path.with_suffix(".tmp")
    with disk.writing(path):
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
    """Resume from the checkpoint if there is one of the same inputs; rank 0 decides for all.

    Args:
        folder: folder of the run.
        digest: identity of the run's inputs.
        group: the ranks.
        state: state to load the checkpoint into.

    Returns:
        The progress of the run, and its best weights; before the first epoch those of the network.
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


@contextmanager
def event_writer(folder: Path, purge_step: int | None = None) -> Iterator[SummaryWriter]:
    """Open a writer of TensorBoard's events for the block.

    A writer writes behind the caller's back: it raises what went wrong at a later event, or when it is closed.

    Args:
        folder: folder of the events.
        purge_step: events from this step on that an earlier run wrote are hidden.

    Raises:
        PlatformError: the disk is full when the writer opens or closes its file.
    """
    # tensorboard belongs to the extra `train`; this module is also imported where nothing is trained
    from torch.utils.tensorboard import SummaryWriter

    with disk.writing(folder):
        writer = SummaryWriter(str(folder), purge_step=purge_step)
    try:
        yield writer
    finally:
        with disk.writing(folder):
            writer.close()


class WeightAverage:
    """Exponential moving average of a network's trained weights over the steps (Polyak and Juditsky 1992).

    A network that stops early has a high learning rate, so each step still moves its weights around a centre. The average is
    near that centre. At first the average follows faster, so that it soon forgets the first, random weights.
    """

    def __init__(self, network: nn.Module, half_life: float) -> None:
        """Start from the network's weights.

        Args:
            network: network in training.
            half_life: steps in which the share of a step halves; with 0 the average is the weights themselves.
        """
        self._weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._decay = 0.5 ** (1 / half_life) if half_life else 0.0
        self._average = [weight.detach().clone() for weight in self._weights] if half_life else []
        self._steps = 0

    def update(self) -> None:
        """Follow the weights; call this after each step of the optimizer."""
        if self._decay:
            self._steps += 1
            decay = min(self._decay, self._steps / (self._steps + 10))
            _moving_average(decay)(self._average, self._weights, self._steps)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the network the average as its weights, within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for number, average in enumerate(self._average):
            weight = self._weights[number].detach().clone()
            self._weights[number].copy_(average)
            average.copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores."""
        return {"steps": self._steps, "average": self._average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self._steps = state["steps"]
        for average, saved in zip(self._average, state["average"], strict=True):
            average.copy_(saved)


class TrainingState:
    """State that changes with each step, and that a checkpoint stores.

    Attributes:
        network: network in training, the same on all ranks.
        optimizer: optimizer of its weights.
        schedule: schedule of the learning rate, step by step.
        average: average of the weights, which is validated and saved.
    """

    def __init__(
        self, network: nn.Module, optimizer: Optimizer, schedule: LRScheduler, average_half_life: float = 0.0
    ) -> None:
        """Start before the first step.

        Args:
            network: network to train.
            optimizer: optimizer of its weights.
            schedule: schedule of the learning rate.
            average_half_life: half-life of the weights' average in steps; see :class:`WeightAverage`.
        """
        self.network, self.optimizer, self.schedule = network, optimizer, schedule
        self.average = WeightAverage(network, average_half_life)

    def step(self) -> None:
        """Take a step by the gradients that the network holds."""
        self.optimizer.step()
        self.schedule.step()
        self.average.update()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores."""
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        for name, part in vars(self).items():
            part.load_state_dict(state[name])


def weights(network: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the network's state in main memory."""
    return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}


def decayed(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return parameter groups of an optimizer: matrices decay; vectors, which are biases and scales of norms, don't."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def warmup_cosine(optimizer: Optimizer, warmup_fraction: float, steps: int) -> LRScheduler:
    """Return a schedule with a linear warmup, then a cosine that reaches zero at the last of ``steps``."""
    warmup = math.ceil(steps * warmup_fraction)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return LambdaLR(optimizer, factor)


def autocast(device: torch.device) -> torch.autocast:
    """Compute in bfloat16 on a GPU only: most CPUs have no arithmetic for it and are slower than in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def seed_of(*parts: int) -> int:
    """Mix several numbers into one seed of 32 bits, unrelated to the seeds of neighbouring numbers."""
    return int(np.random.SeedSequence([abs(part) for part in parts]).generate_state(1)[0])
