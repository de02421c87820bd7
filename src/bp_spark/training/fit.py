"""Train a task on every rank: the loop that fine-tuning, pre-training and the language model share.

A :class:`Task` says which network learns from which rows, by which losses, and what is saved. :func:`fit` does the rest: the
process group, checkpoints, resumption, early stopping and progress.

Training is data-parallel (DDP), and all ranks take the same number of steps. Each part of a loss is the mean over its targets
(rows, masked tokens) of all ranks together. Each rank divides its sum by the number of targets of all ranks, counted in the
same step. It also undoes DDP's division by the number of ranks. A rank without a target takes part with a weight of zero. So
each target counts once per epoch, and no rank waits for one that has run out of rows. The gradient is that of one process
with the whole batch. A rank may pass its rows of a step through the network in several parts, one after the other, which takes
less memory. Their gradients add up, and ranks exchange them once, with the last part.

Every epoch draws its random numbers from (seed, epoch, rank) and orders its rows by (seed, epoch). So a checkpoint needs no
state of generators, and a resumed run does what an undisturbed run does.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from bp_spark.core import disk
from bp_spark.core.errors import ConfigError
from bp_spark.training.distributed import Group, process_group
from bp_spark.training.progress import (
    TENSORBOARD_FOLDER,
    Progress,
    TrainingState,
    autocast,
    event_writer,
    resume,
    save_checkpoint,
    seed_of,
    weights,
)

SECONDS_PER_LINE = 10
"""Least seconds between two lines of progress."""


@dataclass(frozen=True)
class FitSettings:
    """How a task is fitted, whatever its network.

    Attributes:
        title: name of the task in progress lines.
        section: section of the configuration that has the learning rate, for messages.
        loss_names: names of the K parts of the training loss, which is the sum of their means.
        max_epochs: epochs to run at most.
        patience: epochs without a better validation loss after which training stops.
        gradient_clip: largest norm of a step's gradient.
        seed: seed of the run.
        run_dir: folder of checkpoints and TensorBoard logs.
        digest: identity of the run's inputs: a checkpoint of another digest is ignored.
        starts_trained: whether the network starts from trained weights, which stay unless an epoch is better.
    """

    title: str
    section: str
    loss_names: tuple[str, ...]
    max_epochs: int
    patience: int
    gradient_clip: float
    seed: int
    run_dir: Path
    digest: str
    starts_trained: bool = False


class Split(Protocol):
    """The training or validation rows that one rank reads."""

    @property
    def steps(self) -> int:
        """Number of batches of one pass, the same on each rank."""

    @property
    def rows(self) -> int:
        """Number of rows of all ranks together."""

    def epoch(self, seed: int) -> AbstractContextManager[Iterator[Any]]:
        """Open one pass: all rows of this rank, each once, in ``steps`` batches ordered by ``seed``.

        A rank without a row left yields a batch without targets: it takes part in every step.
        """


NetworkT = TypeVar("NetworkT", bound=nn.Module)
SplitT = TypeVar("SplitT", bound=Split)


class Task(Protocol[NetworkT, SplitT]):
    """One kind of training. It is pickled, sent to every rank, and builds there what the rank needs."""

    @property
    def settings(self) -> FitSettings:
        """How the task is fitted."""

    def splits(self, group: Group) -> tuple[SplitT, SplitT | None]:
        """Return this rank's training rows, and its validation rows if there are any."""

    def network(self, train: SplitT, group: Group) -> NetworkT:
        """Return the network before the first step, with the same weights on each rank."""

    def state(self, network: NetworkT, steps: int) -> TrainingState:
        """Return optimizer, learning rates and average of the weights; an epoch has so many ``steps``."""

    def parts(self, batch: Any) -> Sequence[Any]:
        """Return the batch in parts that pass through the network one after the other; at least one."""

    def targets(self, batch: Any) -> Tensor | None:
        """Return the numbers of targets of the whole batch, [K].

        ``None``: only the losses tell them. Then no batch of any rank has several parts.
        """

    def train_losses(self, network: NetworkT, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return sums of the losses, float [K], and the numbers of their targets, [K].

        Args:
            network: the network of this rank.
            model: the same network, wrapped by DDP: call this one, so that ranks exchange gradients.
            batch: a part of a batch of the training rows.
        """

    def valid_losses(self, network: NetworkT, batch: Any) -> tuple[Tensor, Tensor]:
        """Return sums of the losses by which training stops early, float [L], and the numbers of their targets, [L]."""

    def save(self, network: NetworkT, train: SplitT, group: Group) -> None:
        """Finish the network with its best weights, on all ranks together, and write it on rank 0."""


@dataclass(frozen=True)
class FitResult:
    """Result of a fit: its progress, and how many rows all ranks trained and validated on."""

    progress: Progress
    train_rows: int
    valid_rows: int


@dataclass(frozen=True)
class _Rank(Generic[NetworkT, SplitT]):
    """One rank's side of a run."""

    task: Task[NetworkT, SplitT]
    settings: FitSettings
    group: Group
    network: NetworkT
    state: TrainingState
    train: SplitT
    valid: SplitT | None


def fit(task: Task[NetworkT, SplitT]) -> FitResult:
    """Train a task until it stops, and save the network with its best weights. Each rank calls this.

    A run that was stopped goes on from its last checkpoint if its digest is the same. An epoch adds a row to the history of
    the progress: ``epoch``, ``train_loss``, ``valid_loss`` (the training loss where there are no validation rows),
    ``learning_rate``, ``rows_per_second`` and, for several parts, ``valid_loss_PART``.

    Args:
        task: the task; see :class:`Task`.

    Raises:
        ConfigError: a loss is not finite.
    """
    with process_group() as group:
        return _fit(task, group)


def _fit(task: Task[NetworkT, SplitT], group: Group) -> FitResult:
    settings = task.settings
    train, valid = task.splits(group)
    torch.manual_seed(settings.seed)
    network = task.network(train, group).to(group.device)
    state = task.state(network, train.steps)
    progress, best_weights = resume(settings.run_dir, settings.digest, group, state)
    rank = _Rank(task, settings, group, network, state, train, valid)
    if settings.starts_trained and valid is not None and not progress.epoch:
        progress.best_loss = sum(mean_losses(rank, valid))
        progress.history.append({"epoch": 0, "valid_loss": progress.best_loss})
    run_epochs(rank, progress, best_weights)
    with disk.writing(settings.run_dir):
        task.save(network, train, group)
    return FitResult(progress, train.rows, valid.rows if valid is not None else 0)


def run_epochs(rank: _Rank[NetworkT, SplitT], progress: Progress, best_weights: dict[str, Tensor]) -> None:
    """Run epochs until the settings say stop, and leave the network with its best weights."""
    settings, state, group, network = rank.settings, rank.state, rank.group, rank.network
    model = _data_parallel(network)
    with _report(rank, progress) as (step_done, epoch_done):
        while progress.epoch < settings.max_epochs and progress.epoch - progress.best_epoch < settings.patience:
            started, epoch = time.monotonic(), progress.epoch + 1
            train_losses = train_epoch(rank, model, epoch, step_done)
            seconds = time.monotonic() - started
            with state.average.in_place():
                valid_losses = train_losses if rank.valid is None else mean_losses(rank, rank.valid)
                train_loss, valid_loss = sum(train_losses), sum(valid_losses)
                if not math.isfinite(train_loss + valid_loss):
                    raise ConfigError(
                        f"{settings.section}.learning_rate: the loss is not finite after epoch {epoch}, try less"
                    )
                # without validation rows the last epoch is the best
                if rank.valid is None or valid_loss < progress.best_loss:
                    progress.best_loss, progress.best_epoch, best_weights = valid_loss, epoch, weights(network)
            progress.epoch = epoch
            progress.history.append(
                {
                    "epoch": epoch,
                    "train_loss": train_loss,
                    "valid_loss": valid_loss,
                    "learning_rate": float(state.schedule.get_last_lr()[0]),
                    "rows_per_second": rank.train.rows / seconds,
                    **_by_part(settings.loss_names, valid_losses),
                }
            )
            epoch_done()
            if group.rank == 0:
                save_checkpoint(settings.run_dir, settings.digest, state, progress, best_weights)
    network.load_state_dict(best_weights)


def train_epoch(
    rank: _Rank[NetworkT, SplitT], model: DistributedDataParallel, epoch: int, step_done: Callable[[], None]
) -> list[float]:
    """Train on all rows once; return the mean of each part of the loss over all ranks."""
    settings, group = rank.settings, rank.group
    torch.manual_seed(seed_of(settings.seed, epoch, group.rank))
    rank.network.train()
    total = torch.zeros(2, len(settings.loss_names), dtype=torch.float64, device=group.device)
    with rank.train.epoch(seed_of(settings.seed, epoch)) as batches:
        for batch in batches:
            rank.state.optimizer.zero_grad()
            total += _gradients(rank, model, batch)
            nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
            rank.state.step()
            step_done()
    return _means(total, group)


def _gradients(rank: _Rank[NetworkT, SplitT], model: DistributedDataParallel, batch: Any) -> Tensor:
    """Add up the gradients of the step, over parts and ranks; return this rank's losses and targets, [2, K]."""
    task, group = rank.task, rank.group
    *earlier, last = task.parts(batch)
    # before the first forward on every rank, however many parts its batch has: DDP exchanges data in a forward, too, and all
    # ranks must exchange in one order
    targets = task.targets(batch)
    counts_of_all = None if targets is None else group.sum(targets.float()).clamp(min=1)
    seen = []
    for part in (*earlier, last):
        # ranks exchange the gradients of the whole step with its last part
        with nullcontext() if part is last else model.no_sync():
            with autocast(group.device):
                sums, counts = task.train_losses(rank.network, model, part)
            if counts_of_all is None:
                counts_of_all = group.sum(counts.float()).clamp(min=1)
            torch.autograd.backward((sums * group.size / counts_of_all).sum())
        seen.append(torch.stack([sums.detach().double(), counts.double()]))
    return torch.stack(seen).sum(dim=0)


def in_parts(rows: int, at_once: int | None) -> list[slice]:
    """Return slices of so many rows each, the last one of what is left; a single one without a limit, or without a row."""
    size = max(rows, 1) if at_once is None else at_once
    return [slice(start, start + size) for start in range(0, max(rows, 1), size)]


@torch.inference_mode()
def mean_losses(rank: _Rank[NetworkT, SplitT], split: SplitT) -> list[float]:
    """Return the mean of each validation loss over all ranks, in evaluation mode, with the random numbers of seed 0."""
    rank.network.eval()
    total: Tensor | None = None
    with split.epoch(0) as batches:
        for batch in batches:
            with autocast(rank.group.device):
                sums, counts = rank.task.valid_losses(rank.network, batch)
            both = torch.stack([sums.double(), counts.double()])
            total = both if total is None else total + both
    assert total is not None, "a snapshot has rows, so a pass has batches"
    return _means(total, rank.group)


def _data_parallel(network: nn.Module) -> DistributedDataParallel:
    """Wrap the network; buffers are not sent, as they are constant, equal on all ranks, and large (the texts)."""
    # the newest torch renamed the argument
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    no_buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(network, **no_buffers)


def _means(total: Tensor, group: Group) -> list[float]:
    sums, counts = group.sum(total)
    means: list[float] = (sums / counts.clamp(min=1)).tolist()
    return means


def _by_part(names: Sequence[str], losses: Sequence[float]) -> dict[str, float]:
    """Name the validation losses of several parts; one loss needs no name."""
    if len(losses) == 1:
        return {}
    return {f"valid_loss_{name}": loss for name, loss in zip(names, losses, strict=True)}


@contextmanager
def _report(
    rank: _Rank[NetworkT, SplitT], progress: Progress
) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Report from rank 0: lines on standard error as steps are done, and TensorBoard scalars per epoch."""
    if rank.group.rank != 0:
        yield lambda: None, lambda: None
        return
    settings, steps = rank.settings, rank.train.steps
    folder = settings.run_dir / TENSORBOARD_FOLDER
    with (
        event_writer(folder, progress.epoch + 1) as writer,
        tqdm(
            total=settings.max_epochs * steps,
            initial=progress.epoch * steps,
            desc=settings.title,
            unit="step",
            mininterval=SECONDS_PER_LINE,
            miniters=1,
        ) as bar,
    ):

        def step_done() -> None:
            # the launcher passes output on line by line: without the newline, the bar would only show at the end
            if bar.update():
                print(file=sys.stderr, flush=True)

        def epoch_done() -> None:
            record = progress.history[-1]
            with disk.writing(folder):
                for name, value in record.items():
                    if name != "epoch":
                        writer.add_scalar(name, value, progress.epoch)
            bar.set_postfix(
                epoch=progress.epoch,
                train=f"{record['train_loss']:.4f}",
                valid=f"{record['valid_loss']:.4f}",
                best=progress.best_epoch,
                refresh=False,
            )

        yield step_done, epoch_done
