"""Pre-training of the history encoder: snapshots of histories in, a folder with the encoder out, which fine-tuning starts from.

No label is read: :mod:`bp_spark.model.pretraining` says what is learned. Every rank reads its share of the row groups;
:mod:`bp_spark.training.fit` says how ranks step together. Moments and masks are drawn anew in each epoch from (seed,
epoch, rank), and always alike for the held-out users.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pyspark.sql import SparkSession
from torch import Tensor, nn

from bp_spark.core.config import Config, digest
from bp_spark.core.errors import DataError
from bp_spark.core.version import __version__
from bp_spark.model.inputs import HISTORY_COLUMNS, InputSpec, empty_user
from bp_spark.model.pretraining import PARTS, Exercise, PretrainingNetwork, exercise
from bp_spark.training.distributed import Group, process_group, run_ranks
from bp_spark.training.fit import Loop, run_epochs
from bp_spark.training.loader import Columns, Feed, Snapshot
from bp_spark.training.progress import Progress, TrainingOutcome, TrainingState, decayed, resume, warmup_cosine
from bp_spark.training.tasks.finetune import read_texts

ENCODER_FOLDER = "encoder"


@dataclass(frozen=True)
class Job:
    """All that a rank needs to know."""

    train: Snapshot
    valid: Snapshot | None
    epochs: int
    history_length: int
    texts: Path
    config: Config
    run_dir: Path
    digest: str


def pretrain(
    spark: SparkSession,
    train: Snapshot,
    valid: Snapshot | None,
    texts_path: Path,
    config: Config,
    run_dir: Path,
    *,
    epochs: int | None = None,
) -> TrainingOutcome:
    """Pre-train the history half of the network of ``config.network`` as ``config.pretraining`` says.

    A better encoder is not yet a better prediction: features may say the same. On Complete Journey, with a quarter of the
    labels, a ridge regression on what the encoder makes of a history ranked spend with a Spearman of 0.79 (0.74 with random
    weights), but the network that also reads the features ranked it with 0.825 (0.824 without pre-training), and with a tenth
    of the labels no better (0.817, 0.818): within what another seed would change. Train with and without and compare.

    A run that was stopped goes on from its last epoch if called again with the same inputs; see
    :func:`inputs_digest`.

    Args:
        spark: the running session, for starting ranks.
        train: histories to learn from: the columns of :data:`HISTORY_COLUMNS`.
        valid: histories of other users, to stop early on; without any the encoder of the last epoch is taken.
        texts_path: safetensors with ``ids`` (int64 [V], sorted) and ``embeddings`` (float [V, D]).
        config: settings; ranks, optimizer's decay, warmup, gradient clip and seed are those of ``training``.
        run_dir: folder of checkpoints, TensorBoard logs and the result; on a cluster one that all machines
            see.
        epochs: to run, of the schedule of ``pretraining.max_epochs``; by default until a stop.

    Raises:
        DataError: the snapshots lack a column, or the file of texts is no such file.
        PlatformError: a rank failed.
    """
    started = time.monotonic()
    for part in (train, *([valid] if valid else [])):
        for name in HISTORY_COLUMNS:
            if name not in part.schema.names:
                raise DataError(part.path, "must be a column of all files", column=name)
    read_texts(Path(texts_path))
    run_dir = Path(run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    epochs = min(epochs or config.pretraining.max_epochs, config.pretraining.max_epochs)
    identity = digest(inputs_digest(train, valid, texts_path, config), epochs)
    length = config.features.history_length
    job = Job(train, valid, epochs, length, Path(texts_path).absolute(), config, run_dir, identity)
    state = run_ranks(spark, config.training, run_dir, pretrain_rank, job)
    return TrainingOutcome.of(state, run_dir / ENCODER_FOLDER, started)


def inputs_digest(train: Snapshot, valid: Snapshot | None, texts_path: Path, config: Config) -> str:
    """Identity of what a run depends on. Files of a table have unique names, which stand for content."""
    texts = hashlib.sha256(Path(texts_path).read_bytes()).hexdigest()
    training = config.training
    shared = (
        training.processes,
        training.weight_decay,
        training.warmup_fraction,
        training.gradient_clip,
        training.seed,
    )
    settings = (config.features.history_length, config.network, config.pretraining, shared)
    return digest(train.files, valid.files if valid else None, texts, settings, __version__)


@dataclass(frozen=True)
class Data:
    """One rank's share of a split, and how it becomes exercises."""

    feed: Feed
    steps: int
    job: Job
    vocabulary_ids: np.ndarray
    group: Group

    @contextmanager
    def epoch(self, seed: int) -> Iterator[Iterator[Exercise]]:
        """All rows of the share in ``steps`` batches.

        Without a row left the batch has one empty user and nothing to guess: a rank takes part in every step.
        """
        rng = np.random.default_rng([seed, self.group.rank, 2])
        with self.feed.batches(self.steps, seed) as batches:
            yield (self._exercise(columns, rng) for columns in batches)

    def _exercise(self, columns: Columns | None, rng: np.random.Generator) -> Exercise:
        length, settings = self.job.history_length, self.job.config.pretraining
        rows = empty_user(InputSpec((), frozenset(), length)) if columns is None else columns
        return exercise(rows, length, self.vocabulary_ids, settings, rng).to(self.group.device)


def pretrain_rank(job: Job) -> Progress:
    """What each rank runs."""
    with process_group() as group:
        return _pretrain(job, group)


def _pretrain(job: Job, group: Group) -> Progress:
    """From the first row to the saved encoder."""
    settings, training = job.config.pretraining, job.config.training
    ids, embeddings = read_texts(job.texts)
    train = _data(job.train, job, ids, group)
    valid = None if job.valid is None else _data(job.valid, job, ids, group)

    torch.manual_seed(training.seed)
    network = PretrainingNetwork(job.config.network, job.history_length, embeddings, settings.temperature)
    network.to(group.device)
    optimizer = torch.optim.AdamW(decayed(network, training.weight_decay), lr=settings.learning_rate)
    schedule = warmup_cosine(optimizer, training.warmup_fraction, train.steps * settings.max_epochs)
    state = TrainingState(network, optimizer, schedule)
    progress, best = resume(job.run_dir, job.digest, group, state)
    loop = Loop(
        name="pre-training",
        section="pretraining",
        state=state,
        parts=PARTS,
        losses=losses,
        judged_by=losses,
        learned=train.epoch,
        held_out=None if valid is None else valid.epoch,
        steps=train.steps,
        rows=job.train.rows,
        max_epochs=job.epochs,
        patience=settings.patience,
        gradient_clip=training.gradient_clip,
        seed=training.seed,
        run_dir=job.run_dir,
        digest=job.digest,
        group=group,
    )
    run_epochs(loop, progress, best)
    if group.rank == 0:
        network.history.save(job.run_dir / ENCODER_FOLDER)
    return progress


def losses(model: nn.Module, batch: Exercise) -> tuple[Tensor, Tensor]:
    """Sums of the losses of the parts, and the numbers of their targets; see :class:`PretrainingNetwork`."""
    sums, counts = model(batch)
    return sums, counts


def _data(snapshot: Snapshot, job: Job, ids: Tensor, group: Group) -> Data:
    feed = Feed(snapshot.share(group.rank, group.size), (), HISTORY_COLUMNS, job.config.training.feed)
    steps = math.ceil(snapshot.rows / job.config.pretraining.batch_size)
    return Data(feed, steps, job, ids.numpy(), group)
