"""The epochs of a data-parallel job: passes over the data and a loss in, the network with its best weights out.

Fine-tuning, pre-training and the adaptation of the language model differ in what a batch is and what is lost on it; how
ranks step together, when they stop and what they keep is here, once.

Data-parallel over ranks (DDP), all of which take the same number of steps. Each part of a loss is the mean over its
targets (rows, masked tokens) of all ranks together, however many of them each rank has: each rank divides its sum by the
targets of all, counted in the same step, and undoes DDP's division by the number of ranks. A rank without a target takes
part with a weight of zero. So each target counts once per epoch, nobody waits for a rank that has run out, and the
gradient is that of one process with the whole batch.

Every epoch starts from random numbers of (seed, epoch, rank) and reads rows in an order of (seed, epoch), so a checkpoint
needs no state of generators, and a resumed run does what an undisturbed one does.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from bp_spark.core.errors import ConfigError
from bp_spark.training.distributed import Group
from bp_spark.training.progress import (
    TENSORBOARD_FOLDER,
    Progress,
    TrainingState,
    autocast,
    save_checkpoint,
    seed_of,
    weights,
)

SECONDS_PER_LINE = 10
"""Least time between two lines of progress."""

Pass = Callable[[int], AbstractContextManager[Iterator[Any]]]
"""One pass over a rank's share in the order of a seed: the same number of batches on each rank."""

Losses = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
"""Network and batch to sums of losses [K] and the numbers of their targets [K], one entry for each part of the loss."""


@dataclass(frozen=True)
class Loop:
    """What the epochs of a job are made of.

    Attributes:
        name: what progress is shown as.
        section: of the configuration that has the learning rate.
        state: network, optimizer, schedule of the learning rate, average of the weights.
        parts: names of the K parts of the loss; the loss is the sum of their means.
        losses: how a batch becomes losses to learn from.
        judged_by: how a held-out batch becomes the losses that tell when to stop.
        learned: passes over what is learned from.
        held_out: passes over what tells when to stop; without any the last epoch is the best one.
        steps: batches of a pass over ``learned``.
        rows: of all ranks in such a pass.
        max_epochs, patience: when to stop: at the latest, and without a better loss on ``held_out``.
        gradient_clip: largest norm of a step's gradient.
        seed: of the run.
        run_dir: of checkpoints and TensorBoard logs.
        digest: identity of the run's inputs.
    """

    name: str
    section: str
    state: TrainingState
    parts: tuple[str, ...]
    losses: Losses
    judged_by: Losses
    learned: Pass
    held_out: Pass | None
    steps: int
    rows: int
    max_epochs: int
    patience: int
    gradient_clip: float
    seed: int
    run_dir: Path
    digest: str
    group: Group


def run_epochs(loop: Loop, progress: Progress, best: dict[str, Tensor]) -> None:
    """Train until ``loop`` says stop, and leave the network with its best weights.

    Args:
        loop: what to do.
        progress: where the run stands; moved on. An epoch adds ``epoch``, ``train_loss``, ``valid_loss`` (of what is
            learned from, where nothing is held out),
            ``learning_rate``, ``rows_per_second`` to its history and, of several parts, ``valid_loss_PART``.
        best: weights of the best epoch so far.

    Raises:
        ConfigError: a loss is not finite.
    """
    state, network, group = loop.state, loop.state.network, loop.group
    # Buffers are constant and equal on all ranks; to send the texts at each step would cost more than it.
    # The newest torch has another name for that.
    known = signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    setting: dict[str, Any] = {name: False}
    model = DistributedDataParallel(network, **setting)
    with _report(loop, progress) as (step_done, epoch_done):
        while progress.epoch < loop.max_epochs and progress.epoch - progress.best_epoch < loop.patience:
            started, epoch = time.monotonic(), progress.epoch + 1
            parts = train_epoch(loop, model, epoch, step_done)
            train_loss, seconds = sum(parts), time.monotonic() - started
            with state.average.in_place():
                if loop.held_out is not None:
                    parts = mean_losses(network, loop.judged_by, loop.held_out, group)
                valid_loss = sum(parts)
                if not math.isfinite(train_loss + valid_loss):
                    raise ConfigError(
                        f"{loop.section}.learning_rate: the loss is not finite after epoch {epoch}, try less"
                    )
                if loop.held_out is None or valid_loss < progress.best_loss:
                    progress.best_loss, progress.best_epoch, best = valid_loss, epoch, weights(network)
            progress.epoch = epoch
            named = zip(loop.parts, parts, strict=True) if len(parts) > 1 else ()
            progress.history.append(
                {
                    "epoch": epoch,
                    "train_loss": train_loss,
                    "valid_loss": valid_loss,
                    "learning_rate": float(state.schedule.get_last_lr()[0]),
                    "rows_per_second": loop.rows / seconds,
                    **{f"valid_loss_{name}": value for name, value in named},
                }
            )
            epoch_done()
            if group.rank == 0:
                save_checkpoint(loop.run_dir, loop.digest, state, progress, best)
    network.load_state_dict(best)


def train_epoch(loop: Loop, model: DistributedDataParallel, epoch: int, step_done: Callable[[], None]) -> list[float]:
    """One pass over what is learned from: the mean of each part of the loss over all ranks."""
    group = loop.group
    torch.manual_seed(seed_of(loop.seed, epoch, group.rank))
    model.train()
    total = torch.zeros(2, len(loop.parts), dtype=torch.float64, device=group.device)
    with loop.learned(seed_of(loop.seed, epoch)) as batches:
        for batch in batches:
            with autocast(group.device):
                sums, counts = loop.losses(model, batch)
            counts_of_all = group.sum(counts.float()).clamp(min=1)
            loop.state.optimizer.zero_grad()
            (sums * group.size / counts_of_all).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), loop.gradient_clip)
            loop.state.step()
            total += torch.stack([sums.detach().double(), counts.double()])
            step_done()
    return _means(total, group)


@torch.inference_mode()
def mean_losses(network: nn.Module, losses: Losses, held_out: Pass, group: Group) -> list[float]:
    """Mean of each part of the loss over all ranks, in evaluation mode, with the random numbers of seed 0."""
    network.eval()
    total: Tensor | None = None
    with held_out(0) as batches:
        for batch in batches:
            with autocast(group.device):
                sums, counts = losses(network, batch)
            both = torch.stack([sums.double(), counts.double()])
            total = both if total is None else total + both
    assert total is not None, "a snapshot has rows, so a pass has batches"
    return _means(total, group)


def _means(total: Tensor, group: Group) -> list[float]:
    sums, counts = group.sum(total)
    means: list[float] = (sums / counts.clamp(min=1)).tolist()
    return means


@contextmanager
def _report(loop: Loop, progress: Progress) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """From rank 0: lines on standard error as steps are done, and TensorBoard scalars per epoch."""
    if loop.group.rank != 0:
        yield lambda: None, lambda: None
        return
    # of the extra `train`: this module is also imported where nothing is trained
    from torch.utils.tensorboard import SummaryWriter

    with (
        SummaryWriter(str(loop.run_dir / TENSORBOARD_FOLDER), purge_step=progress.epoch + 1) as writer,
        tqdm(
            total=loop.max_epochs * loop.steps,
            initial=progress.epoch * loop.steps,
            desc=loop.name,
            unit="step",
            mininterval=SECONDS_PER_LINE,
            miniters=1,
        ) as bar,
    ):

        def step_done() -> None:
            # The launcher passes output on line by line: without a line's end the bar would show at the end.
            if bar.update():
                print(file=sys.stderr, flush=True)

        def epoch_done() -> None:
            last = progress.history[-1]
            for name, value in last.items():
                if name != "epoch":
                    writer.add_scalar(name, value, progress.epoch)
            bar.set_postfix(
                epoch=progress.epoch,
                train=f"{last['train_loss']:.4f}",
                valid=f"{last['valid_loss']:.4f}",
                best=progress.best_epoch,
                refresh=False,
            )

        yield step_done, epoch_done
