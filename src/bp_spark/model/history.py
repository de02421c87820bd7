"""The history encoder: a user's events in, one vector out. It needs no label and so can be pre-trained.

An event is the sum of embeddings of its kind, its text (projected from a frozen language model), its numbers and its calendar.
A BERT encoder (Devlin et al. 2019, arXiv:1810.04805) reads the events behind a learned token that stands for the user. Its
states are pooled.
"""

from __future__ import annotations

import copy
import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from bp_spark.core.config import NetworkConfig
from bp_spark.core.errors import BundleError, ConfigError
from bp_spark.model.inputs import HOURS, KINDS, NUMERIC_FEATURES, WEEKDAYS, Batch

ENCODER_FILE = "encoder.safetensors"
_TEXTS_AT_ONCE = 4096
_TEXT, _WEIGHT = "text.", "text.0.weight"


class HistoryEncoder(nn.Module):
    """Reads histories.

    Args:
        config: sizes and pooling.
        history_length: events of the longest history.
        text_embeddings: [V, D], the frozen language model's embeddings of the texts; stored as float16.

    Raises:
        ConfigError: the sizes do not fit each other.
    """

    text_embeddings: Tensor

    def __init__(self, config: NetworkConfig, history_length: int, text_embeddings: Tensor) -> None:
        super().__init__()
        size = config.hidden_size
        # Not persistent: the texts are far larger than the weights, and a checkpoint of every epoch needs no copy.
        no_text = torch.zeros(1, text_embeddings.shape[1], dtype=torch.float16)
        table = torch.cat([no_text, text_embeddings.to(torch.float16)])
        self.register_buffer("text_embeddings", table, persistent=False)
        self.kind = nn.Embedding(KINDS, size)
        self.weekday = nn.Embedding(WEEKDAYS, size)
        self.hour = nn.Embedding(HOURS, size)
        self.text: nn.Module = nn.Sequential(nn.Linear(text_embeddings.shape[1], size), nn.LayerNorm(size))
        self.projection: nn.Module | None = None
        self.numeric = nn.Linear(NUMERIC_FEATURES, size)
        self.user = nn.Parameter(torch.randn(size) * 0.02)
        self.encoder = _bert(config, history_length + 1)
        self.pooling_score = nn.Linear(size, 1) if config.pooling == "attention" else None

    def forward(self, batch: Batch) -> Tensor:
        """Return one vector for each user, [B, size]."""
        return self.pool(self.read(self.events(batch), batch.mask), batch.mask)

    def events(self, batch: Batch) -> Tensor:
        """Return a vector for each event, [B, L, size], without regard to the other events."""
        text = F.embedding(batch.text, self.text_embeddings).to(self.user.dtype)
        vectors: Tensor = (
            self.kind(batch.kind)
            + self.text(text)
            + self.numeric(batch.numeric)
            + self.weekday(batch.weekday)
            + self.hour(batch.hour)
        )
        return vectors

    def read(self, events: Tensor, mask: Tensor) -> Tensor:
        """Return contextual states of the user token and the events, [B, 1 + L, size], from [B, L, size]."""
        # The user token is never masked, so a user without any event still has one token to attend to.
        tokens = torch.cat([self.user.to(events.dtype).expand(len(events), 1, -1), events], dim=1)
        seen = F.pad(mask, (1, 0), value=True)
        # Positions count back from the newest event: it is number 1 however long the history.
        length = mask.sum(dim=1, keepdim=True)
        steps = torch.arange(seen.shape[1], device=seen.device)
        position = torch.where(seen & (steps > 0), length + 1 - steps, 0)
        read: Tensor = self.encoder(
            inputs_embeds=tokens, attention_mask=seen.long(), position_ids=position
        ).last_hidden_state
        return read

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return one vector for each user, [B, size], from the states of :meth:`read` and the mask of the histories."""
        return pooled(states, F.pad(mask, (1, 0), value=True), self.pooling_score)

    def widths(self, lengths: np.ndarray) -> np.ndarray:
        """Return the tokens of histories of so many events, int64 [B]: the user's and one for each event."""
        return lengths + 1

    @torch.no_grad()
    def merged(self) -> HistoryEncoder:
        """Return the encoder as a bundle holds it: the projections of the texts are looked up, not computed."""
        if isinstance(self.text, nn.Identity):
            return self
        twin = copy.deepcopy(self)
        parts: tuple[Tensor, ...] = torch.split(self.text_embeddings, _TEXTS_AT_ONCE)
        twin.take_texts(torch.cat([self.text(part.to(self.user.dtype)) for part in parts]).float())
        return twin

    def take_texts(self, table: Tensor) -> None:
        """Look up texts in the table of :meth:`bundle_tensors`, float32 [V + 1, size]: for scoring, not for training.

        The projection stays as ``projection``, for trainings of other platforms that start from this encoder.
        """
        self.text_embeddings = table
        self.projection, self.text = self.text, nn.Identity()

    def bundle_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a bundle holds beside the state of a merged encoder."""
        return {"texts": self.text_embeddings}

    def bundle_description(self) -> dict[str, Any]:
        """Return nothing: the network's sizes are enough to make an encoder like this one."""
        return {}

    def save(self, folder: Path, *, with_projection: bool = True) -> None:
        """Write the weights (:data:`ENCODER_FILE`), without the texts.

        Args:
            folder: where to; it is made.
            with_projection: whether to write the projection of the texts, if the encoder has one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # in a bundle's encoder the projection lies aside
        named = {name.replace("projection.", _TEXT, 1): tensor for name, tensor in self.state_dict().items()}
        written = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        if not with_projection:
            written = {name: tensor for name, tensor in written.items() if not name.startswith(_TEXT)}
        save_file(written, str(folder / ENCODER_FILE))

    def restore(self, folder: Path) -> None:
        """Load the weights that :meth:`save` wrote for an encoder of the same sizes.

        The projection of the texts stays where the file has none, or one of other embeddings: a platform without texts has
        embeddings of width 1.

        Raises:
            BundleError: the file is missing or damaged, or of other sizes.
        """
        path = folder / ENCODER_FILE
        tensors = read_tensors(path)
        own = {name: tensor for name, tensor in self.state_dict().items() if name.startswith(_TEXT)}
        has_none = not any(name.startswith(_TEXT) for name in tensors)
        if has_none or tensors.get(_WEIGHT, own[_WEIGHT]).shape[-1:] != own[_WEIGHT].shape[-1:]:
            tensors |= own
        require_same_tensors(self, tensors, path)
        self.load_state_dict(tensors)


def digests_of(initial: Path | None) -> tuple[str, ...]:
    """Return the SHA-256 (hex) of the weights that :meth:`HistoryEncoder.save` wrote; of none, nothing.

    Raises:
        BundleError: the file can't be read.
    """
    if initial is None:
        return ()
    try:
        return (hashlib.sha256((initial / ENCODER_FILE).read_bytes()).hexdigest(),)
    except OSError as error:
        raise BundleError(f"{initial / ENCODER_FILE}: can't be read: {error.strerror}") from error


def pooled(states: Tensor, seen: Tensor, score: nn.Linear | None) -> Tensor:
    """Pool the states of sequences: their mean, or their sum weighted by the softmax of a score.

    Args:
        states: [B, T, D].
        seen: bool [B, T], the states that count; at least one in each sequence.
        score: of a state; without one the mean is taken.

    Returns:
        [B, D].
    """
    if score is None:
        weight = seen.to(states.dtype)
        return (states * weight.unsqueeze(-1)).sum(dim=1) / weight.sum(dim=1, keepdim=True)
    logits: Tensor = score(states).squeeze(-1).float().masked_fill(~seen, -math.inf)
    return (states * logits.softmax(dim=1).unsqueeze(-1)).sum(dim=1)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        BundleError: the file is missing or damaged, or a number is not finite.
    """
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BundleError(f"{path}: can't be read: {error}") from error
    for name, tensor in tensors.items():
        # The extremes, and not a mask of all: a table of texts may be large.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise BundleError(f"{path}: tensor {name} has numbers that are not finite")
    return tensors


def require_same_tensors(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Make sure that tensors have the names, shapes and types of a module's state.

    Args:
        module: the module.
        tensors: by name.
        path: file of the tensors, for the message.

    Raises:
        BundleError: names, shapes or types differ.
    """
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in module.state_dict().items()}
    actual = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if wrong := sorted({name for name, _ in expected.items() ^ actual.items()}):
        raise BundleError(f"{path}: {len(wrong)} tensors don't fit the configured network, first {wrong[0]}")


def _bert(config: NetworkConfig, positions: int) -> BertModel:
    try:
        encoder = BertModel(
            BertConfig(
                vocab_size=1,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.intermediate_size,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
                max_position_embeddings=positions,
                type_vocab_size=1,
                pad_token_id=None,
                attn_implementation="sdpa",  # type: ignore[call-arg]
            ),
            add_pooling_layer=False,
        )
    except ValueError as error:
        raise ConfigError(f"network: {error}") from error
    # Events are vectors already. A table of words that gets no gradient would stop DDP.
    encoder.embeddings.word_embeddings = None  # type: ignore[assignment]
    return encoder
