"""Fine-tune the sequence model: train on one snapshot, stop early by another, write a folder with the best network.

Every rank reads its shard of the row groups. :mod:`bp_spark.training.fit` has the loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pyspark.sql import SparkSession
from torch import Tensor, nn
from torch.optim import Optimizer

from bp_spark.core.config import Config, TrainingConfig, digest
from bp_spark.core.errors import DataError
from bp_spark.core.version import __version__
from bp_spark.features.labels import horizon_column
from bp_spark.ingest.texts import model_digest, model_folder
from bp_spark.model.history import HistoryEncoder, digests_of
from bp_spark.model.inputs import HISTORY_COLUMNS, Batch, InputSpec, collate, empty_user, tabular_matrix
from bp_spark.model.network import History, LabelStatistics, SpendNetwork, Statistics
from bp_spark.model.text_history import TextHistoryEncoder, adapted
from bp_spark.training.distributed import Group, run_ranks
from bp_spark.training.fit import FitSettings, fit, in_parts
from bp_spark.training.loader import Columns, ShardLoader, Snapshot, require_columns
from bp_spark.training.progress import TrainingOutcome, TrainingState, decayed, warmup_cosine
from bp_spark.training.tasks.vocabulary import read_tokens, read_vocabulary, vocabulary_digest

LABEL = "label_spend"
MODEL_FOLDER = "model"

_LOG1P_GRID = np.linspace(0, math.log1p(1e13), 4096)
"""Upper ends of the bins in which labels are counted, for quantiles over all ranks."""
_LABEL_SUMS = 6

LabelledBatch = tuple[Batch, Tensor]
"""Inputs of the network, and labels, float32 [rows, horizons], not negative, NaN where the spend is not known."""


def finetune(
    spark: SparkSession,
    train: Snapshot,
    valid: Snapshot | None,
    spec: InputSpec,
    texts_path: Path,
    config: Config,
    run_dir: Path,
    initial: Path | None = None,
    *,
    epochs: int | None = None,
) -> TrainingOutcome:
    """Fine-tune the network of ``config.network`` by the settings of ``config.training``.

    A run that was stopped resumes from its last epoch if it is called again with the same inputs; see :func:`inputs_digest`.

    Args:
        spark: the running session, for starting ranks.
        train: rows to fit on: ``label_spend``, the label of each of ``labels.other_horizons``, and the columns of ``spec``.
        valid: rows to stop early on; without any the network of the last epoch is saved.
        spec: the inputs of the network.
        texts_path: safetensors with ``ids`` (int64 [V], sorted) and ``embeddings`` (float [V, D]); for the ``text``
            backbone also with ``tokens`` and ``token_lengths``, see :class:`bp_spark.model.text_history.TokenTable`.
        config: settings.
        run_dir: folder of checkpoints, TensorBoard logs and the result; on a cluster, a folder that all machines see.
        initial: folder of a pre-trained history encoder of the same sizes; ``None`` starts from random weights.
        epochs: number of epochs to run, of the schedule of ``training.max_epochs``; by default until training stops early.

    Raises:
        DataError: the snapshots lack a column, or the file of texts is malformed.
        BundleError: the pre-trained encoder can't be read.
        PlatformError: a rank failed.
    """
    started = time.monotonic()
    snapshots = [train] if valid is None else [train, valid]
    require_columns(snapshots, (*label_columns(other_horizons(config)), *spec.columns))
    read_vocabulary(texts_path)
    if config.network.backbone == "text":
        read_tokens(texts_path)
    run_dir = Path(run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    epochs = min(epochs or config.training.max_epochs, config.training.max_epochs)
    initial = initial and Path(initial).absolute()
    identity = digest(inputs_digest(train, valid, spec, texts_path, config, initial), epochs)
    task = FineTuneTask(train, valid, epochs, spec, Path(texts_path).absolute(), config, run_dir, identity, initial)
    result = run_ranks(spark, config.training, run_dir, fit, task)
    return TrainingOutcome.of(result.progress, run_dir / MODEL_FOLDER, started)


def inputs_digest(
    train: Snapshot,
    valid: Snapshot | None,
    spec: InputSpec,
    texts_path: Path,
    config: Config,
    initial: Path | None = None,
) -> str:
    """Return the identity of a run's inputs. Files of a table have unique names, which stand for their content.

    Raises:
        BundleError: the pre-trained encoder can't be read.
    """
    parts: tuple[object, ...] = (
        train.files,
        valid.files if valid else None,
        spec.to_json(),
        vocabulary_digest(texts_path),
        config.network,
        config.training,
        other_horizons(config),
        __version__,
    )
    if config.network.backbone == "text":
        parts += (model_digest(config.texts.model_copy(update={"model": config.history_model})),)
    return digest(*parts, *digests_of(initial))


def other_horizons(config: Config) -> tuple[int, ...]:
    """Return the days of the horizons that the network learns beside the main horizon."""
    return config.labels.other_horizons if config.network.horizons_weight else ()


def label_columns(others: Sequence[int]) -> tuple[str, ...]:
    """Return the label columns: that of the main horizon, then those of the others."""
    return (LABEL, *(horizon_column(LABEL, days) for days in others))


@dataclass(frozen=True)
class LabelledSplit:
    """One rank's labelled rows, and how they become tensors; see :class:`bp_spark.training.fit.Split`."""

    loader: ShardLoader
    steps: int
    rows: int
    spec: InputSpec
    labels: tuple[str, ...]
    vocabulary_ids: np.ndarray
    device: torch.device

    @contextmanager
    def epoch(self, seed: int) -> Iterator[Iterator[LabelledBatch]]:
        """Open one pass over the rows of the shard.

        Without a row left, a batch has one empty user and no label: a rank takes part in every step.
        """
        with self.loader.batches(self.steps, seed) as batches:
            yield (self._tensors(columns) for columns in batches)

    def _tensors(self, columns: Columns | None) -> LabelledBatch:
        if columns is None:
            batch = collate(empty_user(self.spec), self.spec, self.vocabulary_ids)
            labels = torch.zeros(0, len(self.labels))
        else:
            batch = collate(columns, self.spec, self.vocabulary_ids)
            spend = np.stack([columns[name] for name in self.labels], axis=1).astype(np.float32)
            labels = torch.from_numpy(spend).clamp(min=0)
        return batch.to(self.device), labels.to(self.device)


@dataclass(frozen=True)
class FineTuneTask:
    """Fine-tuning, as each rank runs it; see :class:`bp_spark.training.fit.Task`."""

    train: Snapshot
    valid: Snapshot | None
    epochs: int
    spec: InputSpec
    texts: Path
    config: Config
    run_dir: Path
    digest: str
    initial: Path | None = None

    @property
    def settings(self) -> FitSettings:
        """How the network is fitted."""
        training = self.config.training
        return FitSettings(
            title="fine-tuning",
            section="training",
            loss_names=("spend", *(horizon_column("spend", days) for days in other_horizons(self.config))),
            max_epochs=self.epochs,
            patience=training.patience,
            gradient_clip=training.gradient_clip,
            seed=training.seed,
            run_dir=self.run_dir,
            digest=self.digest,
        )

    def splits(self, group: Group) -> tuple[LabelledSplit, LabelledSplit | None]:
        """Return this rank's labelled rows."""
        valid = None if self.valid is None else self.split(self.valid, group)
        return self.split(self.train, group), valid

    def split(self, snapshot: Snapshot, group: Group) -> LabelledSplit:
        """Return this rank's rows of a snapshot."""
        ids, _ = read_vocabulary(self.texts)
        labels = label_columns(other_horizons(self.config))
        shard = snapshot.shard(group.rank, group.size)
        loader = ShardLoader(shard, (*labels, *self.spec.tabular), HISTORY_COLUMNS, self.config.training.feed)
        steps = math.ceil(snapshot.rows / self.config.training.batch_size)
        return LabelledSplit(loader, steps, snapshot.rows, self.spec, labels, ids.numpy(), group.device)

    def network(self, train: LabelledSplit, group: Group) -> SpendNetwork:
        """Return the network with the statistics of all training rows, its encoder pre-trained or random."""
        config = self.config.network
        ids, embeddings = read_vocabulary(self.texts)
        network = SpendNetwork(self.spec, config, ids, self._history(embeddings), other_horizons(self.config))
        network.fit_statistics(training_statistics(train, config.bands, group))
        return network

    def _history(self, embeddings: Tensor) -> History:
        config = self.config.network
        if config.backbone == "text":
            language_model = adapted(model_folder(self.config.history_model), config)
            return TextHistoryEncoder(config, language_model, read_tokens(self.texts))
        history = HistoryEncoder(config, self.spec.history_length, embeddings)
        if self.initial is not None:
            history.restore(self.initial)
        return history

    def state(self, network: SpendNetwork, steps: int) -> TrainingState:
        """Return the optimizer with a warmup and a cosine, and the average over ``training.average_epochs``."""
        training = self.config.training
        optimizer = _optimizer(network, training)
        schedule = warmup_cosine(optimizer, training.warmup_fraction, steps * training.max_epochs)
        return TrainingState(network, optimizer, schedule, training.average_epochs * steps)

    def parts(self, batch: LabelledBatch) -> list[LabelledBatch]:
        """Return the batch in parts of ``training.rows_at_once`` rows."""
        inputs, labels = batch
        return [(inputs[rows], labels[rows]) for rows in in_parts(len(inputs), self.config.training.rows_at_once)]

    def targets(self, batch: LabelledBatch) -> Tensor:
        """Return the number of rows with known spend per horizon, [horizons]."""
        return batch[1].isfinite().sum(dim=0)

    def train_losses(self, network: SpendNetwork, model: nn.Module, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        """Return per horizon the sum of the losses of the rows with known spend, float32 [horizons], and their number."""
        inputs, labels = batch
        outputs = model(inputs)[: len(labels)]
        return network.training_losses(outputs, labels).sum(dim=0), labels.isfinite().sum(dim=0)

    def valid_losses(self, network: SpendNetwork, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        """Return the sum of the main horizon's losses, float32 [1], and the number of its labels, [1].

        The other horizons only help the network to learn; the main horizon decides when to stop.
        """
        inputs, labels = batch
        loss = network.loss(network(inputs)[: len(labels)], labels[:, 0]).sum()
        return loss.unsqueeze(0), loss.new_tensor([len(labels)])

    def save(self, network: SpendNetwork, train: LabelledSplit, group: Group) -> None:
        """Write the network, after a squared error of logs with its factors back to money."""
        if self.config.network.loss == "mse":
            fit_smearing(network, train, group)
        if group.rank == 0:
            network.save(self.run_dir / MODEL_FOLDER)


@torch.inference_mode()
def fit_smearing(network: SpendNetwork, split: LabelledSplit, group: Group) -> None:
    """Set the factor on ``exp`` of a predicted log1p spend, by horizon, so that predicted spend sums to the real spend."""
    network.eval()
    total = torch.zeros(2, len(split.labels), dtype=torch.float64, device=group.device)
    with split.epoch(seed=0) as batches:
        for batch, labels in batches:
            predicted = network(batch)[: len(labels), : len(split.labels)].double().exp()
            total += torch.stack(
                [(1 + labels.double()).nansum(dim=0), predicted.where(labels.isfinite(), 0.0).sum(dim=0)]
            )
    for head, (actual, expected) in zip(network.heads, group.sum(total).T.tolist(), strict=True):
        head.smearing.fill_(actual / expected if expected else 1.0)


def training_statistics(split: LabelledSplit, bands: int, group: Group) -> Statistics:
    """Return moments of features and labels over the rows of all ranks, from sums in float64.

    Args:
        split: rows of this rank.
        bands: number of bands with equally many labels of the main horizon; their edges are exact to 1 %.
        group: the ranks.

    Raises:
        DataError: a label of the main horizon is missing, or one of any horizon is infinite.
    """
    features = len(split.spec.tabular)
    present, first, second = np.zeros(features), np.zeros(features), np.zeros(features)
    labels, largest = np.zeros((len(split.labels), _LABEL_SUMS)), np.zeros(len(split.labels))
    counts = np.zeros(len(_LOG1P_GRID) + 1)
    with split.loader.batches(split.steps, seed=0) as batches:
        for columns in filter(None, batches):
            values = tabular_matrix(columns, split.spec).astype(np.float64)
            present += (~np.isnan(values)).sum(axis=0)
            first += np.nansum(values, axis=0)
            second += np.nansum(values**2, axis=0)
            spend_by_horizon = [_known_spend(columns, name) for name in split.labels]
            labels += [_label_sums(spend) for spend in spend_by_horizon]
            largest = np.maximum(largest, [spend.max(initial=0.0) for spend in spend_by_horizon])
            main_spend = np.log1p(spend_by_horizon[0])
            counts += np.bincount(np.searchsorted(_LOG1P_GRID, main_spend), minlength=len(counts))
    sums = group.sum(torch.from_numpy(np.concatenate([present, first, second, counts, labels.ravel()]))).numpy()
    present, first, second = sums[: 3 * features].reshape(3, features)
    counts, labels = sums[3 * features :][: len(counts)], sums[-labels.size :].reshape(labels.shape)
    rows = labels[0, 0]
    shares = np.arange(1, bands) / bands
    edges = np.searchsorted(counts.cumsum(), shares * rows).clip(max=len(_LOG1P_GRID) - 1)
    mean, std = _moments(present, first, second)
    maxima = group.max(torch.from_numpy(largest)).tolist()
    return Statistics(
        mean=mean,
        std=std,
        missing=1 - present / rows,
        labels=tuple(_label_statistics(one, largest) for one, largest in zip(labels, maxima, strict=True)),
        band_edges=np.expm1(_LOG1P_GRID[edges]),
    )


def _known_spend(columns: Columns, name: str) -> np.ndarray:
    """Return the labels of the rows that have seen the horizon, negative ones as 0."""
    spend = columns[name].astype(np.float64)
    if name != LABEL:
        spend = spend[~np.isnan(spend)]
    if not np.isfinite(spend).all():
        raise DataError("training set", "must be a finite number", column=name)
    return spend.clip(min=0)


def _label_sums(spend: np.ndarray) -> np.ndarray:
    """Return rows, positive rows, sum and sum of squares of their logs, sum of log1p, and sum: float64 [_LABEL_SUMS]."""
    logs = np.log(spend[spend > 0])
    return np.array([len(spend), len(logs), logs.sum(), (logs**2).sum(), np.log1p(spend).sum(), spend.sum()])


def _label_statistics(sums: np.ndarray, largest: float) -> LabelStatistics:
    rows, active, log_sum, log_squares, log1p_sum, total = sums
    rows = max(rows, 1.0)  # no row may have seen a horizon
    log_mean, log_std = _moments(active, log_sum, log_squares)
    return LabelStatistics(
        active_share=active / rows,
        log_mean=float(log_mean),
        log_std=float(log_std),
        log1p_mean=log1p_sum / rows,
        mean_label=total / rows,
        max_label=largest,
    )


def _moments(count: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = first / np.maximum(count, 1)
    return mean, np.sqrt(np.maximum(second / np.maximum(count, 1) - mean**2, 0))


def _optimizer(network: nn.Module, settings: TrainingConfig) -> Optimizer:
    groups = decayed(network, settings.weight_decay)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
