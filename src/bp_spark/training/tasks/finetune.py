"""Fine-tuning of the sequence model: a training and a validation snapshot in, a folder with the best network
out.

Every rank reads its share of the row groups; :mod:`bp_spark.training.fit` says how ranks step together.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pyspark.sql import SparkSession
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from bp_spark.core.config import Config, TrainingConfig, digest
from bp_spark.core.errors import BundleError, DataError
from bp_spark.core.version import __version__
from bp_spark.features.labels import of_days
from bp_spark.ingest.texts import model_digest, model_folder
from bp_spark.model.history import ENCODER_FILE, HistoryEncoder
from bp_spark.model.inputs import HISTORY_COLUMNS, Batch, InputSpec, collate, empty_user, tabular_matrix
from bp_spark.model.network import History, LabelStatistics, SpendNetwork, Statistics
from bp_spark.model.text_history import TextHistoryEncoder, TokenTable, adapted
from bp_spark.training.distributed import Group, process_group, run_ranks
from bp_spark.training.fit import Loop, run_epochs
from bp_spark.training.loader import Columns, Feed, Snapshot
from bp_spark.training.progress import Progress, TrainingOutcome, TrainingState, decayed, resume, warmup_cosine

LABEL = "label_spend"
MODEL_FOLDER = "model"

_LOG1P_GRID = np.linspace(0, math.log1p(1e13), 4096)
"""Upper ends of the bins in which labels are counted, for quantiles over all ranks."""
_LABEL_SUMS = 6


@dataclass(frozen=True)
class Job:
    """All that a rank needs to know."""

    train: Snapshot
    valid: Snapshot | None
    epochs: int
    spec: InputSpec
    texts: Path
    config: Config
    run_dir: Path
    digest: str
    initial: Path | None = None


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
    """Fine-tune the network of ``config.network`` as ``config.training`` says.

    A run that was stopped goes on from its last epoch if called again with the same inputs; see
    :func:`inputs_digest`.

    Args:
        spark: the running session, for starting ranks.
        train: rows to fit on: ``label_spend``, that of each of ``labels.other_horizons``, and the columns of ``spec``.
        valid: rows to stop early on; without any the network of the last epoch is taken.
        spec: what the network reads.
        texts_path: safetensors with ``ids`` (int64 [V], sorted) and ``embeddings`` (float [V, D]); for the ``text``
            backbone also with ``tokens`` and ``token_lengths``, see :class:`bp_spark.model.text_history.TokenTable`.
        config: settings.
        run_dir: folder of checkpoints, TensorBoard logs and the result; on a cluster one that all machines
            see.
        initial: folder of a pre-trained history encoder of the same sizes; ``None`` starts from random weights.
        epochs: to run, of the schedule of ``training.max_epochs``; by default until a stop.

    Raises:
        DataError: the snapshots lack a column, or the file of texts is no such file.
        BundleError: the pre-trained encoder can't be read.
        PlatformError: a rank failed.
    """
    started = time.monotonic()
    for part in (train, *([valid] if valid else [])):
        for name in (*label_columns(other_horizons(config)), *spec.columns):
            if name not in part.schema.names:
                raise DataError(part.path, "must be a column of all files", column=name)
    read_texts(Path(texts_path))
    if config.network.backbone == "text":
        read_tokens(Path(texts_path))
    run_dir = Path(run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    epochs = min(epochs or config.training.max_epochs, config.training.max_epochs)
    initial = initial and Path(initial).absolute()
    identity = digest(inputs_digest(train, valid, spec, texts_path, config, initial), epochs)
    job = Job(train, valid, epochs, spec, Path(texts_path).absolute(), config, run_dir, identity, initial)
    state = run_ranks(spark, config.training, run_dir, train_rank, job)
    return TrainingOutcome.of(state, run_dir / MODEL_FOLDER, started)


def inputs_digest(
    train: Snapshot,
    valid: Snapshot | None,
    spec: InputSpec,
    texts_path: Path,
    config: Config,
    initial: Path | None = None,
) -> str:
    """Identity of what a run depends on. Files of a table have unique names, which stand for content.

    Raises:
        BundleError: the pre-trained encoder can't be read.
    """
    texts = hashlib.sha256(Path(texts_path).read_bytes()).hexdigest()
    parts: tuple[object, ...] = (
        train.files,
        valid.files if valid else None,
        spec.to_json(),
        texts,
        config.network,
        config.training,
        other_horizons(config),
        __version__,
    )
    if config.network.backbone == "text":
        parts += (model_digest(config.texts.model_copy(update={"model": config.history_model})),)
    if initial is None:
        return digest(*parts)
    try:
        return digest(*parts, hashlib.sha256((initial / ENCODER_FILE).read_bytes()).hexdigest())
    except OSError as error:
        raise BundleError(f"{initial / ENCODER_FILE}: can't be read: {error.strerror}") from error


def other_horizons(config: Config) -> tuple[int, ...]:
    """Days of the horizons that the network learns beside the main one."""
    return config.labels.other_horizons if config.network.horizons_weight else ()


def label_columns(others: Sequence[int]) -> tuple[str, ...]:
    """The main horizon's column of labels, then those of the others."""
    return (LABEL, *(of_days(LABEL, days) for days in others))


@dataclass(frozen=True)
class Data:
    """One rank's share of a split, and how it becomes tensors."""

    feed: Feed
    steps: int
    spec: InputSpec
    labels: tuple[str, ...]
    vocabulary_ids: np.ndarray
    device: torch.device

    @contextmanager
    def epoch(self, seed: int) -> Iterator[Iterator[tuple[Batch, Tensor]]]:
        """All rows of the share in ``steps`` batches, each with its labels, float32 [rows, labels], not negative, NaN where
        spend is not known.

        Without a row left the batch has one empty user and no label: a rank takes part in every step.
        """
        with self.feed.batches(self.steps, seed) as batches:
            yield (self._tensors(columns) for columns in batches)

    def _tensors(self, columns: Columns | None) -> tuple[Batch, Tensor]:
        if columns is None:
            batch = collate(empty_user(self.spec), self.spec, self.vocabulary_ids)
            labels = torch.zeros(0, len(self.labels))
        else:
            batch = collate(columns, self.spec, self.vocabulary_ids)
            known = np.stack([columns[name] for name in self.labels], axis=1).astype(np.float32)
            labels = torch.from_numpy(known).clamp(min=0)
        return batch.to(self.device), labels.to(self.device)


def train_rank(job: Job) -> Progress:
    """What each rank runs."""
    with process_group() as group:
        return _train(job, group)


def _train(job: Job, group: Group) -> Progress:
    """From the first row to the saved network."""
    settings = job.config.training
    ids, embeddings = read_texts(job.texts)
    train = _data(job.train, job, ids, group)
    valid = None if job.valid is None else _data(job.valid, job, ids, group)

    torch.manual_seed(settings.seed)
    network = SpendNetwork(job.spec, job.config.network, ids, _history(job, embeddings), other_horizons(job.config))
    network.fit_statistics(training_statistics(train, job.config.network.bands, group))
    network.to(group.device)
    optimizer = _optimizer(network, settings)
    schedule = warmup_cosine(optimizer, settings.warmup_fraction, train.steps * settings.max_epochs)
    state = TrainingState(network, optimizer, schedule, settings.average_epochs * train.steps)
    progress, best = resume(job.run_dir, job.digest, group, state)
    loop = Loop(
        name="fine-tuning",
        section="training",
        state=state,
        parts=("spend", *(of_days("spend", days) for days in network.other_horizons)),
        losses=partial(training_losses, network),
        # The other horizons are there to help; when to stop is for the main one to say.
        judged_by=partial(main_loss, network),
        learned=train.epoch,
        held_out=None if valid is None else valid.epoch,
        steps=train.steps,
        rows=job.train.rows,
        max_epochs=job.epochs,
        patience=settings.patience,
        gradient_clip=settings.gradient_clip,
        seed=settings.seed,
        run_dir=job.run_dir,
        digest=job.digest,
        group=group,
    )
    run_epochs(loop, progress, best)
    if job.config.network.loss == "mse":
        smear(network, train, group)
    if group.rank == 0:
        network.save(job.run_dir / MODEL_FOLDER)
    return progress


def training_losses(network: SpendNetwork, model: nn.Module, batch: tuple[Batch, Tensor]) -> tuple[Tensor, Tensor]:
    """Of each horizon: the sum of the losses of the rows whose spend is known, float32 [horizons], and their number."""
    inputs, labels = batch
    outputs = model(inputs)[: len(labels)]
    return network.training_losses(outputs, labels).sum(dim=0), labels.isfinite().sum(dim=0)


def main_loss(network: SpendNetwork, model: nn.Module, batch: tuple[Batch, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of the main horizon's losses of the rows that have a label, float32 [1], and their number, [1]."""
    inputs, labels = batch
    loss = network.loss(model(inputs)[: len(labels)], labels[:, 0]).sum()
    return loss.unsqueeze(0), loss.new_tensor([len(labels)])


@torch.inference_mode()
def smear(network: SpendNetwork, data: Data, group: Group) -> None:
    """Set what ``exp`` of a predicted log1p spend is multiplied by, so that known spend sums to what it was, by horizon."""
    network.eval()
    total = torch.zeros(2, len(data.labels), dtype=torch.float64, device=group.device)
    with data.epoch(seed=0) as batches:
        for batch, labels in batches:
            said = network(batch)[: len(labels), : len(data.labels)].double().exp()
            total += torch.stack([(1 + labels.double()).nansum(dim=0), said.where(labels.isfinite(), 0.0).sum(dim=0)])
    for head, (actual, predicted) in zip(network.heads, group.sum(total).T.tolist(), strict=True):
        head.smearing.fill_(actual / predicted if predicted else 1.0)


def training_statistics(data: Data, bands: int, group: Group) -> Statistics:
    """Moments of features and labels over the rows of all ranks, from sums in float64.

    The edges of ``bands`` bands of equally many labels of the main horizon are exact to 1 %.

    Raises:
        DataError: a label of the main horizon is missing, or one of any horizon is infinite.
    """
    features = len(data.spec.tabular)
    present, first, second = np.zeros(features), np.zeros(features), np.zeros(features)
    labels, largest = np.zeros((len(data.labels), _LABEL_SUMS)), np.zeros(len(data.labels))
    counts = np.zeros(len(_LOG1P_GRID) + 1)
    with data.feed.batches(data.steps, seed=0) as batches:
        for columns in filter(None, batches):
            values = tabular_matrix(columns, data.spec).astype(np.float64)
            present += (~np.isnan(values)).sum(axis=0)
            first += np.nansum(values, axis=0)
            second += np.nansum(values**2, axis=0)
            known = [_known_spend(columns, name) for name in data.labels]
            labels += [_label_sums(spend) for spend in known]
            largest = np.maximum(largest, [spend.max(initial=0.0) for spend in known])
            counts += np.bincount(np.searchsorted(_LOG1P_GRID, np.log1p(known[0])), minlength=len(counts))
    sums = group.sum(torch.from_numpy(np.concatenate([present, first, second, counts, labels.ravel()]))).numpy()
    present, first, second = sums[: 3 * features].reshape(3, features)
    counts, labels = sums[3 * features :][: len(counts)], sums[-labels.size :].reshape(labels.shape)
    rows = labels[0, 0]
    shares = np.arange(1, bands) / bands
    edges = np.searchsorted(counts.cumsum(), shares * rows).clip(max=len(_LOG1P_GRID) - 1)
    mean, std = _moments(present, first, second)
    tops = group.max(torch.from_numpy(largest)).tolist()
    return Statistics(
        mean=mean,
        std=std,
        missing=1 - present / rows,
        labels=tuple(_label_statistics(of_one, top) for of_one, top in zip(labels, tops, strict=True)),
        band_edges=np.expm1(_LOG1P_GRID[edges]),
    )


def _known_spend(columns: Columns, name: str) -> np.ndarray:
    spend = columns[name].astype(np.float64)
    if name != LABEL:
        spend = spend[~np.isnan(spend)]
    if not np.isfinite(spend).all():
        raise DataError("training set", "must be a finite number", column=name)
    return spend.clip(min=0)


def _label_sums(spend: np.ndarray) -> np.ndarray:
    """Rows, positive ones, sum and sum of squares of their logs, sum of log1p, sum: float64 [_LABEL_SUMS]."""
    logs = np.log(spend[spend > 0])
    return np.array([len(spend), len(logs), logs.sum(), (logs**2).sum(), np.log1p(spend).sum(), spend.sum()])


def _label_statistics(sums: np.ndarray, largest: float) -> LabelStatistics:
    rows, active, log_sum, log_squares, log1p_sum, total = sums
    rows = max(rows, 1.0)  # of a horizon that no row has seen
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


def _history(job: Job, embeddings: Tensor) -> History:
    config = job.config.network
    if config.backbone == "text":
        language = adapted(model_folder(job.config.history_model), config)
        return TextHistoryEncoder(config, language, read_tokens(job.texts))
    history = HistoryEncoder(config, job.spec.history_length, embeddings)
    if job.initial is not None:
        history.restore(job.initial)
    return history


def _data(snapshot: Snapshot, job: Job, ids: Tensor, group: Group) -> Data:
    labels = label_columns(other_horizons(job.config))
    feed = Feed(
        snapshot.share(group.rank, group.size), (*labels, *job.spec.tabular), HISTORY_COLUMNS, job.config.training.feed
    )
    steps = math.ceil(snapshot.rows / job.config.training.batch_size)
    return Data(feed, steps, job.spec, labels, ids.numpy(), group.device)


def _optimizer(network: nn.Module, settings: TrainingConfig) -> Optimizer:
    groups = decayed(network, settings.weight_decay)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def read_texts(path: Path) -> tuple[Tensor, Tensor]:
    """Ids, int64 [V], and embeddings, [V, D]."""
    try:
        tensors = load_file(str(path))
        ids, embeddings = tensors["ids"], tensors["embeddings"]
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(str(path), f"must be a safetensors file of ids and embeddings: {error}") from error
    if ids.ndim != 1 or embeddings.ndim != 2 or len(ids) != len(embeddings):
        raise DataError(str(path), "must have one embedding per id")
    if (ids.diff() <= 0).any():
        raise DataError(str(path), "must be sorted and distinct", column="ids")
    return ids, embeddings


def read_tokens(path: Path) -> TokenTable:
    """What events are written with, of the texts of :func:`read_texts` from the same file."""
    tensors = load_file(str(path))
    try:
        table = TokenTable(tensors["tokens"], tensors["token_lengths"])
    except (KeyError, ValueError) as error:
        raise DataError(str(path), f"must hold the tokens of words and texts: {error}") from error
    if table.texts != len(tensors["ids"]):
        raise DataError(str(path), "must have tokens of each text", column="tokens")
    return table
