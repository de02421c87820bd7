"""Pre-training of the language model on the platform's own texts: a snapshot of ``texts`` in, a folder with the adapted
encoder and its tokenizer out, which ``texts.model=FOLDER`` then reads.

Masked language modelling (Devlin et al. 2019), data-parallel over ranks (DDP). Every rank reads all texts once, keeps
those that fall to it by hash, tokenised, and takes the same number of steps in every epoch: its texts of a step are its
share of ``language.batch_size``, give or take a few. :mod:`bp_spark.training.fit` says how ranks step together.

Which tokens are masked is drawn anew in each epoch from (seed, epoch, rank), and always alike for the held-out texts, so
that their losses before and after can be compared, and a resumed run does what an undisturbed one does.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyspark.sql import SparkSession
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
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

from bp_spark.core.config import Config, digest
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.version import __version__
from bp_spark.ingest.texts import model_digest, model_folder
from bp_spark.training.distributed import Group, process_group, run_ranks
from bp_spark.training.fit import Loop, mean_losses, run_epochs
from bp_spark.training.loader import Feed, Snapshot, split_sizes
from bp_spark.training.progress import Progress, TrainingState, decayed, resume, seed_of

HELD_OUT = 0.05
"""Share of the texts, by hash, that the model never learns from: they tell what it has learned."""
MIN_TEXTS = 200
"""From fewer there is nothing to learn, and perhaps none to hold out."""
READ_ROWS = 10_000
"""Texts that are tokenised together."""
POOL_BATCHES = 16
"""Batches whose texts are ordered by length together: enough for little padding, few enough to stay random."""


@dataclass(frozen=True)
class LanguageResult:
    """What an adaptation came to.

    Attributes:
        folder: the adapted encoder and its tokenizer.
        model_digest: what ``texts.model_digest`` says of it.
        texts: texts learned from.
        held_out: texts held out.
        epochs: epochs run, over all resumptions.
        best_epoch: the epoch (from 1) of the least loss; 0 if none was less than that before: then the encoder is as it was.
        loss_before: cross-entropy of a masked token of the held-out texts, in nats, before the first epoch.
        loss_after: the same after the best epoch.
        history: per epoch (from 0: before the first) ``epoch``, ``valid_loss`` and, from 1, ``train_loss``,
            ``learning_rate``, ``rows_per_second``.
        seconds: of this call, from starting the ranks to the saved encoder.
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


@dataclass(frozen=True)
class Job:
    """All that a rank needs to know."""

    texts: Snapshot
    config: Config
    run_dir: Path
    output: Path
    digest: str


@dataclass(frozen=True)
class Outcome:
    """What rank 0 reports: the progress, and how many texts all ranks learned from and held out."""

    progress: Progress
    texts: int
    held_out: int


def adapt(
    spark: SparkSession, lakehouse_texts: Snapshot, config: Config, run_dir: Path, output: Path
) -> LanguageResult:
    """Go on pre-training ``texts.model`` on the platform's texts, as ``config.language`` says.

    The encoder starts from its checkpoint. The head that guesses masked tokens does so too if the checkpoint has one;
    those of sentence encoders have none, then a fresh one learns along. The head is left out of ``output``.

    A lower loss says that the model knows the platform's words better, not yet that mean-pooled embeddings tell items
    apart better: a model tuned for sentence similarity can lose some of that. On Complete Journey's 2,382 texts the loss
    fell from 11.0 to 7.6 and nearest neighbours were as often of the same department (69 %) as before: few texts change
    little. Train with both and compare the metrics.

    A run that was stopped goes on from its last epoch if called again with the same inputs; see :func:`inputs_digest`.

    Args:
        spark: the running session, for starting ranks.
        lakehouse_texts: the table ``texts``: ``text_id`` bigint, ``text`` string, each text once.
        config: settings: ``texts`` names the model, ``language`` says how to train, ``training`` with which ranks.
        run_dir: folder of checkpoints and TensorBoard logs; on a cluster one that all machines see.
        output: folder to be made; it appears when it is complete. On a cluster the driver must see it.

    Raises:
        ConfigError: ``output`` is there already, or ``texts.model`` is no model that fills in masked tokens.
        DataError: the snapshot lacks a column, or has fewer than :data:`MIN_TEXTS` texts.
        PlatformError: a rank failed.
    """
    started = time.monotonic()
    for name in ("text_id", "text"):
        if name not in lakehouse_texts.schema.names:
            raise DataError(lakehouse_texts.path, "must be a column of all files", column=name)
    if lakehouse_texts.rows < MIN_TEXTS:
        rule = f"must hold at least {MIN_TEXTS} texts for a language model to learn from"
        raise DataError(lakehouse_texts.path, rule, count=lakehouse_texts.rows)
    output, run_dir = Path(output).absolute(), Path(run_dir).absolute()
    if output.exists():
        raise ConfigError(f"{output}: is there already; name a folder that isn't")
    _require_masked_model(model_folder(config.texts.model))
    run_dir.mkdir(parents=True, exist_ok=True)
    job = Job(lakehouse_texts, config, run_dir, output, inputs_digest(lakehouse_texts, config))
    outcome = run_ranks(spark, config.training, run_dir, adapt_rank, job)
    progress = outcome.progress
    return LanguageResult(
        folder=output,
        model_digest=model_digest(config.texts.model_copy(update={"model": str(output)})),
        texts=outcome.texts,
        held_out=outcome.held_out,
        epochs=progress.epoch,
        best_epoch=progress.best_epoch,
        loss_before=progress.history[0]["valid_loss"],
        loss_after=progress.best_loss,
        history=progress.history,
        seconds=time.monotonic() - started,
    )


def inputs_digest(lakehouse_texts: Snapshot, config: Config) -> str:
    """Identity of what a run depends on. Files of a table have unique names, which stand for content."""
    model = model_digest(config.texts)
    return digest(lakehouse_texts.files, model, config.language, config.training, __version__)


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden: each that is not special with a chance of ``share``; of those 80 % become the mask token,
    10 % another ordinary token, and 10 % stay (Devlin et al. 2019, 3.1).

    Attributes:
        share: of the tokens, to be guessed.
        mask_id: the mask token.
        special: bool [V], tokens that are never hidden nor put in another's place (mask, padding, unknown and so on).
    """

    share: float
    mask_id: int
    special: Tensor

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, share: float) -> Masking:
        """Masking with the special tokens of a tokenizer."""
        special = torch.zeros(len(tokenizer), dtype=torch.bool)
        special[tokenizer.all_special_ids] = True
        return cls(share, int(tokenizer.mask_token_id), special)

    def __call__(self, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Hide tokens.

        Args:
            ids: int64 [...], token ids.
            generator: of the random numbers.

        Returns:
            ``ids`` with tokens hidden, and which of them are to be guessed, bool, both like ``ids``.
        """
        chosen = (torch.rand(ids.shape, generator=generator) < self.share) & ~self.special[ids]
        fate = torch.rand(ids.shape, generator=generator)
        ordinary = (~self.special).nonzero().squeeze(1)
        others = ordinary[torch.randint(len(ordinary), ids.shape, generator=generator)]
        hidden = torch.where(chosen & (fate < 0.8), self.mask_id, ids)
        return torch.where(chosen & (fate >= 0.9), others, hidden), chosen


class MaskedLanguageModel(nn.Module):
    """Any ``AutoModelForMaskedLM``, asked for chosen tokens only.

    A head over a vocabulary of tens of thousands costs as much as a small encoder: for tokens that nobody has to guess
    it would be waste. So the encoder's states are narrowed to the chosen ones before the head sees them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._chosen: Tensor | None = None
        model.base_model.register_forward_hook(self._narrow)

    def _narrow(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        outputs.last_hidden_state = outputs.last_hidden_state[self._chosen].unsqueeze(0)
        return outputs

    def forward(self, ids: Tensor, attention: Tensor, chosen: Tensor) -> Tensor:
        """Scores of every token of the vocabulary in the chosen places, [chosen, V]."""
        self._chosen = chosen
        logits: Tensor = self.model(input_ids=ids, attention_mask=attention).logits
        return logits.squeeze(0)


@dataclass(frozen=True)
class Data:
    """One rank's texts, tokenised, and in how many steps all ranks pass over theirs.

    Attributes:
        tokens: object [N] of int32 arrays, special tokens included.
        steps: of one pass.
        total: texts of all ranks.
        padding_id: the padding token.
        filler_id: the token of a batch without a text.
    """

    tokens: np.ndarray
    steps: int
    total: int
    padding_id: int
    filler_id: int

    def epoch(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All texts, each once, in ``steps`` batches: ids int64 and attention int64, both [texts, longest].

        Ranks that pass the same seed meet batches of like length at the same step. Without a text left the batch is
        one filler, a special token, of which nothing is to be guessed: a rank takes part in every step.
        """
        of_texts = np.random.default_rng([seed, len(self.tokens)])
        of_batches = np.random.default_rng(seed)
        edges = np.cumsum([0, *split_sizes(len(self.tokens), self.steps)])
        order = of_texts.permutation(len(self.tokens))
        for first in range(0, self.steps, POOL_BATCHES):
            pool = edges[first : first + POOL_BATCHES + 1]
            picked = order[pool[0] : pool[-1]]
            by_length = picked[np.argsort([len(self.tokens[text]) for text in picked], kind="stable")]
            parts = np.split(by_length, pool[1:-1] - pool[0])
            for part in of_batches.permutation(len(parts)):
                yield self._padded(self.tokens[parts[part]])

    def _padded(self, texts: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = list(texts) or [np.array([self.filler_id])]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), self.padding_id)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        return ids, (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()


@dataclass(frozen=True)
class Masked:
    """Texts with tokens hidden: ids int64, attention int64 and chosen bool, all [texts, longest]; wanted int64 [chosen]."""

    ids: Tensor
    attention: Tensor
    chosen: Tensor
    wanted: Tensor


def adapt_rank(job: Job) -> Outcome:
    """What each rank runs."""
    with process_group() as group:
        return _adapt(job, group)


def _adapt(job: Job, group: Group) -> Outcome:
    """From the first text to the saved encoder."""
    settings, training = job.config.language, job.config.training
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = model_folder(job.config.texts.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    masking = Masking.of(tokenizer, settings.mask_share)
    learned, held_out = read_texts(job, tokenizer, group)

    torch.manual_seed(training.seed)
    pretrained = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    network = MaskedLanguageModel(pretrained).to(group.device)
    optimizer = torch.optim.AdamW(decayed(network, settings.weight_decay), lr=settings.learning_rate)
    steps = learned.steps * settings.epochs
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(steps * settings.warmup_fraction), steps)
    state = TrainingState(network, optimizer, schedule)
    progress, best = resume(job.run_dir, job.digest, group, state)
    held_out_pass = partial(masked, held_out, masking, group)
    loop = Loop(
        name="adapting the language model",
        section="language",
        state=state,
        parts=("tokens",),
        losses=losses,
        judged_by=losses,
        learned=partial(masked, learned, masking, group),
        held_out=held_out_pass,
        steps=learned.steps,
        rows=learned.total,
        max_epochs=settings.epochs,
        patience=settings.patience,
        gradient_clip=training.gradient_clip,
        seed=training.seed,
        run_dir=job.run_dir,
        digest=job.digest,
        group=group,
    )
    if not progress.epoch:
        (progress.best_loss,) = mean_losses(network, losses, held_out_pass, group)
        progress.history.append({"epoch": 0, "valid_loss": progress.best_loss})
    run_epochs(loop, progress, best)
    if group.rank == 0:
        _save(network.model.base_model, folder, job.output)
    return Outcome(progress, learned.total, held_out.total)


@contextmanager
def masked(data: Data, masking: Masking, group: Group, seed: int) -> Iterator[Iterator[Masked]]:
    """A pass over a rank's texts with tokens hidden; what is hidden depends on the seed and the rank."""
    generator = torch.Generator().manual_seed(seed_of(seed, group.rank))

    def hide(ids: Tensor, attention: Tensor) -> Masked:
        hidden, chosen = masking(ids, generator)
        tensors = (hidden, attention, chosen, ids[chosen])
        return Masked(*(tensor.to(group.device) for tensor in tensors))

    yield (hide(ids, attention) for ids, attention in data.epoch(seed))


def losses(model: nn.Module, batch: Masked) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of the masked tokens of a batch, float32 [1], and their number, [1]."""
    scores = model(batch.ids, batch.attention, batch.chosen)
    loss = cross_entropy(scores.float(), batch.wanted, reduction="sum")
    return loss.unsqueeze(0), loss.new_tensor([len(batch.wanted)])


def read_texts(job: Job, tokenizer: PreTrainedTokenizerBase, group: Group) -> tuple[Data, Data]:
    """This rank's texts to learn from and its held-out ones, tokenised, in the order of their ids.

    A hash of a text's id says whether it is among the ``language.max_texts``, is held out, and whose it is. To divide
    the row groups would be no use: a table that grows night by night has one large and many small ones.

    Raises:
        DataError: no text is held out, or none is left.
    """
    settings = job.config.language
    taken = min(1.0, settings.max_texts / job.texts.rows)
    feed = Feed(job.texts.share(0, 1), ("text_id", "text"), (), job.config.training.feed)
    found: list[tuple[int, float, np.ndarray]] = []
    with feed.batches(math.ceil(job.texts.rows / READ_ROWS), seed=0) as batches:
        for columns in filter(None, batches):
            hashes = pd.util.hash_array(columns["text_id"])
            places = hashes / 2.0**64
            own = np.flatnonzero((places < taken) & (hashes % np.uint64(group.size) == group.rank))
            if not len(own):
                continue
            ids = tokenizer(
                list(columns["text"][own]),
                truncation=True,
                max_length=job.config.texts.max_tokens,
                return_attention_mask=False,
            )["input_ids"]
            tokens = (np.array(one, np.int32) for one in ids)
            found += zip(columns["text_id"][own].tolist(), places[own].tolist(), tokens, strict=True)
    found.sort(key=lambda text: text[0])

    def data(part: list[np.ndarray]) -> Data:
        tokens = np.empty(len(part), object)
        tokens[:] = part
        total = int(group.sum(torch.tensor(float(len(part)), dtype=torch.float64)))
        if not total:
            raise DataError(job.texts.path, "must hold more texts: none is left to learn from, or none held out")
        return Data(
            tokens, math.ceil(total / settings.batch_size), total, tokenizer.pad_token_id, tokenizer.mask_token_id
        )

    border = HELD_OUT * taken
    learned = data([tokens for _, place, tokens in found if place >= border])
    return learned, data([tokens for _, place, tokens in found if place < border])


def _require_masked_model(folder: str) -> None:
    """Say so before ranks start if the model can't guess masked tokens."""
    try:
        with torch.device("meta"):
            AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"texts.model: {folder} is no model that fills in masked tokens: {reason}") from error
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        raise ConfigError(f"texts.model: the tokenizer of {folder} has no token for masks or for padding")


def _save(adapted: nn.Module, source: str, output: Path) -> None:
    """The encoder, with what of it was not trained (BERT's pooler) as the source has it, and the tokenizer."""
    encoder = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    state = {name: tensor.cpu() for name, tensor in adapted.state_dict().items()}
    strange = encoder.load_state_dict(state, strict=False).unexpected_keys
    if strange:
        raise ConfigError(f"texts.model: {source} has no {strange[0]} outside masked language modelling")
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.parent / f".{output.name}.{uuid.uuid4().hex}.tmp"
    try:
        encoder.save_pretrained(draft)
        # anew: the one that was used remembers how it cut texts
        AutoTokenizer.from_pretrained(source).save_pretrained(draft)
        for path in draft.iterdir():
            # safetensors leaves its file to its owner alone, but executors may be another user's; the folder has its mode
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        draft.rename(output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
