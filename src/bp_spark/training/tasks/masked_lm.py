"""Go on pre-training the language model on the platform's own texts, by masked language modelling.

The input is a snapshot of ``texts``. The output is a folder with the adapted encoder and its tokenizer, which
``texts.model=FOLDER`` then reads.

Masked language modelling (Devlin et al. 2019) runs data-parallel over ranks (DDP). Every rank reads all texts once and keeps,
as tokens, those that a hash assigns to it. All ranks take the same number of steps in every epoch, and a rank's texts of a
step are about its share of ``language.batch_size``. :mod:`bp_spark.training.fit` has the loop.

The masked tokens are drawn anew in each epoch, from (seed, epoch, rank). For the validation texts they are always the same,
so that losses before and after can be compared. A resumed run does what an undisturbed run does.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pyspark.sql import SparkSession
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)
from transformers.utils import logging as transformers_logging

from bp_spark.core import disk
from bp_spark.core.config import Config, digest
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.version import __version__
from bp_spark.ingest.texts import model_digest, model_folder
from bp_spark.training.distributed import Group, run_ranks
from bp_spark.training.fit import FitSettings, fit, in_parts
from bp_spark.training.loader import ShardLoader, Snapshot, require_columns
from bp_spark.training.progress import TrainingState, decayed, seed_of
from bp_spark.training.tasks.masking import MaskedBatch, MaskedLanguageModel, Masking, TokenizedTexts

HELD_OUT = 0.05
"""Share of the texts, by hash, that the model never learns from: the validation texts."""
MIN_TEXTS = 200
"""Least number of texts: fewer teach nothing, and may leave none for validation."""
READ_ROWS = 10_000
"""Number of texts that are tokenised together."""

# transformers has no types for these
_linear_schedule: Callable[..., LRScheduler] = get_linear_schedule_with_warmup
_masked_lm_from_config: Callable[..., PreTrainedModel] = AutoModelForMaskedLM.from_config
_quiet: tuple[Callable[[], None], ...] = (
    transformers_logging.set_verbosity_error,
    transformers_logging.disable_progress_bar,
)


@dataclass(frozen=True)
class MaskedLmResult:
    """Result of an adaptation.

    Attributes:
        folder: the adapted encoder and its tokenizer.
        model_digest: ``texts.model_digest`` of the folder.
        texts: number of training texts.
        held_out: number of validation texts.
        epochs: epochs run, over all resumptions.
        best_epoch: the epoch (from 1) of the least loss; 0 if none was less than before: then the encoder is unchanged.
        loss_before: cross-entropy of a masked token of the validation texts, in nats, before the first epoch.
        loss_after: the same after the best epoch.
        history: per epoch (from 0: before the first) ``epoch``, ``valid_loss`` and, from 1, ``train_loss``,
            ``learning_rate``, ``rows_per_second``.
        seconds: seconds of this call, from starting the ranks to the saved encoder.
    """

    folder: Path
    model_digest: str
    texts: int
    held_out: int
    epochs: int
    best_epoch: int
    loss_before: float
    loss_after: float
    history: list[dict[str, float]]
    seconds: float


def train_masked_lm(
    spark: SparkSession, lakehouse_texts: Snapshot, config: Config, run_dir: Path, output: Path
) -> MaskedLmResult:
    """Go on pre-training ``texts.model`` on the platform's texts, by the settings of ``config.language``.

    The encoder starts from its checkpoint. The head that guesses masked tokens does so too if the checkpoint has one. Sentence
    encoders have no such head: then a new head is trained along. The head is left out of ``output``.

    A lower loss means that the model knows the platform's words better. It doesn't mean yet that mean-pooled embeddings
    distinguish items better: a model tuned for sentence similarity can lose some of that. On Complete Journey's 2,382 texts the
    loss fell from 11.0 to 7.6, and nearest neighbours were as often of the same department (69 %) as before: few texts change
    little. Train with both models and compare the metrics.

    A run that was stopped resumes from its last epoch if it is called again with the same inputs; see :func:`inputs_digest`.

    Args:
        spark: the running session, for starting ranks.
        lakehouse_texts: the table ``texts``: ``text_id`` bigint, ``text`` string, each text once.
        config: settings: ``texts`` names the model, ``language`` says how to train, ``training`` with which ranks.
        run_dir: folder of checkpoints and TensorBoard logs; on a cluster, a folder that all machines see.
        output: folder to write; it appears when it is complete. On a cluster the driver must see it.

    Raises:
        ConfigError: ``output`` exists already, or ``texts.model`` can't fill in masked tokens.
        DataError: the snapshot lacks a column, or has fewer than :data:`MIN_TEXTS` texts.
        PlatformError: a rank failed.
    """
    started = time.monotonic()
    require_columns([lakehouse_texts], ("text_id", "text"))
    if lakehouse_texts.rows < MIN_TEXTS:
        rule = f"must hold at least {MIN_TEXTS} texts for a language model to learn from"
        raise DataError(lakehouse_texts.path, rule, count=lakehouse_texts.rows)
    output, run_dir = Path(output).absolute(), Path(run_dir).absolute()
    if output.exists():
        raise ConfigError(f"{output}: is there already; name a folder that isn't")
    _require_masked_model(model_folder(config.texts.model))
    run_dir.mkdir(parents=True, exist_ok=True)
    task = MaskedLmTask(lakehouse_texts, config, run_dir, output, inputs_digest(lakehouse_texts, config))
    result = run_ranks(spark, config.training, run_dir, fit, task)
    progress = result.progress
    return MaskedLmResult(
        folder=output,
        model_digest=model_digest(config.texts.model_copy(update={"model": str(output)})),
        texts=result.train_rows,
        held_out=result.valid_rows,
        epochs=progress.epoch,
        best_epoch=progress.best_epoch,
        loss_before=progress.history[0]["valid_loss"],
        loss_after=progress.best_loss,
        history=progress.history,
        seconds=time.monotonic() - started,
    )


def inputs_digest(lakehouse_texts: Snapshot, config: Config) -> str:
    """Return the identity of a run's inputs. Files of a table have unique names, which stand for their content."""
    model = model_digest(config.texts)
    return digest(lakehouse_texts.files, model, config.language, config.training, __version__)


@dataclass(frozen=True)
class MaskedTexts:
    """One rank's texts, with tokens hidden anew in each pass; see :class:`bp_spark.training.fit.Split`."""

    texts: TokenizedTexts
    masking: Masking
    group: Group

    @property
    def steps(self) -> int:
        """Number of batches of one pass."""
        return self.texts.steps

    @property
    def rows(self) -> int:
        """Number of texts of all ranks."""
        return self.texts.rows

    @contextmanager
    def epoch(self, seed: int) -> Iterator[Iterator[MaskedBatch]]:
        """Open one pass over the texts; the hidden tokens depend on the seed and the rank."""
        generator = torch.Generator().manual_seed(seed_of(seed, self.group.rank))
        yield (self._mask(ids, attention, generator) for ids, attention in self.texts.epoch(seed))

    def _mask(self, ids: Tensor, attention: Tensor, generator: torch.Generator) -> MaskedBatch:
        hidden, chosen = self.masking(ids, generator)
        tensors = (hidden, attention, chosen, ids[chosen])
        return MaskedBatch(*(tensor.to(self.group.device) for tensor in tensors))


@dataclass(frozen=True)
class MaskedLmTask:
    """Masked language modelling, as each rank runs it; see :class:`bp_spark.training.fit.Task`."""

    texts: Snapshot
    config: Config
    run_dir: Path
    output: Path
    digest: str

    @property
    def settings(self) -> FitSettings:
        """How the language model is fitted."""
        return FitSettings(
            title="adapting the language model",
            section="language",
            loss_names=("tokens",),
            max_epochs=self.config.language.epochs,
            patience=self.config.language.patience,
            gradient_clip=self.config.training.gradient_clip,
            seed=self.config.training.seed,
            run_dir=self.run_dir,
            digest=self.digest,
            starts_trained=True,
        )

    @property
    def _model(self) -> str:
        return model_folder(self.config.texts.model)

    def splits(self, group: Group) -> tuple[MaskedTexts, MaskedTexts]:
        """Return this rank's texts."""
        for make_quiet in _quiet:
            make_quiet()
        tokenizer = AutoTokenizer.from_pretrained(self._model)
        masking = Masking.of(tokenizer, self.config.language.mask_share)
        train, valid = read_texts(self, tokenizer, group)
        return MaskedTexts(train, masking, group), MaskedTexts(valid, masking, group)

    def network(self, train: MaskedTexts, group: Group) -> MaskedLanguageModel:
        """Return the model of ``texts.model``, with a new head if its checkpoint has none."""
        return MaskedLanguageModel(
            AutoModelForMaskedLM.from_pretrained(self._model, dtype=torch.float32, use_safetensors=True)
        )

    def state(self, network: MaskedLanguageModel, steps: int) -> TrainingState:
        """Return AdamW with a warmup and a linear decay."""
        settings = self.config.language
        optimizer = torch.optim.AdamW(decayed(network, settings.weight_decay), lr=settings.learning_rate, fused=True)
        all_steps = steps * settings.epochs
        schedule = _linear_schedule(optimizer, math.ceil(all_steps * settings.warmup_fraction), all_steps)
        return TrainingState(network, optimizer, schedule)

    def parts(self, batch: MaskedBatch) -> list[MaskedBatch]:
        """Return the batch in parts of ``training.rows_at_once`` texts."""
        slices = in_parts(len(batch.ids), self.config.training.rows_at_once)
        # to count the targets of a part, a step on a GPU would wait
        return [batch] if len(slices) == 1 else [batch[rows] for rows in slices]

    def targets(self, batch: MaskedBatch) -> Tensor:
        """Return the number of chosen tokens, [1]."""
        return batch.chosen.sum().unsqueeze(0)

    def train_losses(self, network: MaskedLanguageModel, model: nn.Module, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """Return the sum of the cross-entropies of a batch's chosen tokens, float32 [1], and their number, [1]."""
        scores = model(batch.ids, batch.attention, batch.chosen)
        loss = cross_entropy(scores.float(), batch.targets, reduction="sum")
        return loss.unsqueeze(0), loss.new_tensor([len(batch.targets)])

    def valid_losses(self, network: MaskedLanguageModel, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """Return the same loss as in training."""
        return self.train_losses(network, network, batch)

    def save(self, network: MaskedLanguageModel, train: MaskedTexts, group: Group) -> None:
        """Write the encoder and its tokenizer."""
        if group.rank == 0:
            _save(network.model.base_model, self._model, self.output)


def read_texts(
    task: MaskedLmTask, tokenizer: PreTrainedTokenizerBase, group: Group
) -> tuple[TokenizedTexts, TokenizedTexts]:
    """Return this rank's training texts and validation texts as tokens, in the order of their ids.

    A hash of a text's id decides three things: whether the text is among the ``language.max_texts``, whether it is for
    validation, and which rank reads it. Dividing the row groups would not balance the ranks, because a table that grows with
    each scoring run has one large row group and many small ones.

    Args:
        task: the task, with the snapshot of ``texts``.
        tokenizer: tokenizer of the language model.
        group: the ranks.

    Raises:
        DataError: there is no text for training, or none for validation.
    """
    settings = task.config.language
    used_share = min(1.0, settings.max_texts / task.texts.rows)
    loader = ShardLoader(task.texts.shard(0, 1), ("text_id", "text"), (), task.config.training.feed)
    tokens_by_text: list[tuple[int, float, np.ndarray]] = []
    with loader.batches(math.ceil(task.texts.rows / READ_ROWS), seed=0) as batches:
        for columns in filter(None, batches):
            hashes = pd.util.hash_array(columns["text_id"])
            fractions = hashes / 2.0**64
            own = np.flatnonzero((fractions < used_share) & (hashes % np.uint64(group.size) == group.rank))
            if not len(own):
                continue
            ids = tokenizer(
                list(columns["text"][own]),
                truncation=True,
                max_length=task.config.texts.max_tokens,
                return_attention_mask=False,
            )["input_ids"]
            tokens = (np.array(one, np.int32) for one in ids)
            tokens_by_text += zip(columns["text_id"][own].tolist(), fractions[own].tolist(), tokens, strict=True)
    tokens_by_text.sort(key=lambda text: text[0])

    def split(part: list[np.ndarray]) -> TokenizedTexts:
        tokens = np.empty(len(part), object)
        tokens[:] = part
        rows = int(group.sum(torch.tensor(float(len(part)), dtype=torch.float64)))
        if not rows:
            raise DataError(task.texts.path, "must hold more texts: none is left to learn from, or none held out")
        steps = math.ceil(rows / settings.batch_size)
        return TokenizedTexts(tokens, steps, rows, tokenizer.pad_token_id, tokenizer.mask_token_id)

    border = HELD_OUT * used_share
    train = split([tokens for _, fraction, tokens in tokens_by_text if fraction >= border])
    return train, split([tokens for _, fraction, tokens in tokens_by_text if fraction < border])


def _require_masked_model(folder: str) -> None:
    """Raise before ranks start if the model can't guess masked tokens."""
    try:
        with torch.device("meta"):
            _masked_lm_from_config(AutoConfig.from_pretrained(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"texts.model: {folder} is no model that fills in masked tokens: {reason}") from error
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        raise ConfigError(f"texts.model: the tokenizer of {folder} has no token for masks or for padding")


def _save(adapted: nn.Module, source: str, output: Path) -> None:
    """Write the encoder and the tokenizer; weights that were not trained (BERT's pooler) are those of the source.

    Raises:
        ConfigError: the source lacks some of the adapted weights.
        PlatformError: the disk is full.
    """
    encoder = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    state = {name: tensor.cpu() for name, tensor in adapted.state_dict().items()}
    unexpected_weights = encoder.load_state_dict(state, strict=False).unexpected_keys
    if unexpected_weights:
        raise ConfigError(f"texts.model: {source} has no {unexpected_weights[0]} outside masked language modelling")
    with disk.writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = output.parent / f".{output.name}.{uuid.uuid4().hex}.tmp"
        try:
            encoder.save_pretrained(draft)
            # a tokenizer that was used remembers how it truncated texts: load a new one
            AutoTokenizer.from_pretrained(source).save_pretrained(draft)
            for path in draft.iterdir():
                # safetensors lets only the owner read its file, but executors may run as another user
                path.chmod(0o644)
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            draft.rename(output)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
