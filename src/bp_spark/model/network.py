"""The sequence model: a user's events and tabular features in, expected spend in money out.

An event is the sum of its kind, its text as a frozen language model reads it (projected), its numbers and its
calendar. A BERT encoder reads the events behind a learned token that stands for the user; pooled, joined with
the tabular features and passed through a residual adapter, they end in a zero-inflated lognormal (or one
log1p value, by configuration).

:class:`SpendNetwork` is trained; :class:`TransformerMember` is what a bundle holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from bp_spark.config import NetworkConfig
from bp_spark.errors import BundleError, ConfigError
from bp_spark.model.inputs import (
    HOURS,
    KINDS,
    NUMERIC_FEATURES,
    WEEKDAYS,
    Batch,
    Columns,
    InputSpec,
    collate,
    history_lengths,
)
from bp_spark.model.losses import log_mse_loss, ziln_loss, ziln_parameters

WEIGHTS_FILE = "transformer.safetensors"
DESCRIPTION_FILE = "transformer.json"
FORMAT = 1

_TABULAR_LIMIT = 10.0
_MIN_STD = 1e-6
_OUTPUTS = {"ziln": 3, "mse": 1}


@dataclass(frozen=True)
class Statistics:
    """What the training rows say about scales, as :func:`bp_spark.model.inputs.tabular_matrix` reads them.

    Attributes:
        mean, std, missing: float64 [F]: of the rows where a feature is present; share of rows where it is
            not.
        active_share: share of rows with a positive label.
        log_mean, log_std: of the log of positive labels.
        log1p_mean: of log(1 + label), over all rows.
        max_label: the largest label, money.
    """

    mean: np.ndarray
    std: np.ndarray
    missing: np.ndarray
    active_share: float
    log_mean: float
    log_std: float
    log1p_mean: float
    max_label: float


class SpendNetwork(nn.Module):
    """Spend of a user over the horizon.

    Args:
        spec: what is read of a user.
        config: sizes and loss.
        vocabulary_ids: int64 [V], sorted: ids of the texts.
        text_embeddings: [V, D], the frozen language model's reading of them; kept as float16.

    Raises:
        ConfigError: the sizes do not fit each other.
    """

    vocabulary_ids: Tensor
    text_embeddings: Tensor
    tabular_mean: Tensor
    tabular_std: Tensor
    missing_seen: Tensor
    log_ceiling: Tensor
    smearing: Tensor

    def __init__(self, spec: InputSpec, config: NetworkConfig, vocabulary_ids: Tensor, text_embeddings: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.config = config
        size, features = config.hidden_size, len(spec.tabular)

        # Not persistent: the texts are far larger than the weights, and a checkpoint of every epoch needs no
        # copy.
        self.register_buffer("vocabulary_ids", vocabulary_ids.long(), persistent=False)
        no_text = torch.zeros(1, text_embeddings.shape[1], dtype=torch.float16)
        table = torch.cat([no_text, text_embeddings.to(torch.float16)])
        self.register_buffer("text_embeddings", table, persistent=False)

        self.kind = nn.Embedding(KINDS, size)
        self.weekday = nn.Embedding(WEEKDAYS, size)
        self.hour = nn.Embedding(HOURS, size)
        self.text = nn.Sequential(nn.Linear(text_embeddings.shape[1], size), nn.LayerNorm(size))
        self.numeric = nn.Linear(NUMERIC_FEATURES, size)
        self.user = nn.Parameter(torch.randn(size) * 0.02)
        self.encoder = _encoder(config, spec.history_length + 1)
        self.pooling_score = nn.Linear(size, 1) if config.pooling == "attention" else None

        self.register_buffer("tabular_mean", torch.zeros(features))
        self.register_buffer("tabular_std", torch.ones(features))
        self.register_buffer("missing_seen", torch.zeros(features))
        adapter = config.adapter_size
        self.tabular = nn.Sequential(
            nn.Linear(2 * features, adapter),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(adapter, adapter),
        )
        self.join = nn.Linear(size + adapter, adapter)
        self.adapter = nn.Sequential(
            nn.LayerNorm(adapter),
            nn.Linear(adapter, adapter),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(adapter, adapter),
        )
        self.head = nn.Linear(adapter, _OUTPUTS[config.loss])
        # Spend is never predicted above the largest label seen: exp() of a stray output would outweigh all
        # other users.
        self.register_buffer("log_ceiling", torch.tensor(math.log1p(1e6)))
        self.register_buffer("smearing", torch.tensor(1.0))

    @property
    def parameter_count(self) -> int:
        """Trainable numbers; the frozen texts are not among them."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def fit_statistics(self, statistics: Statistics) -> None:
        """Take scales from the training rows, and start the head at the distribution of their labels."""
        std = np.where(statistics.std > _MIN_STD, statistics.std, 1.0)
        self.tabular_mean.copy_(torch.from_numpy(statistics.mean))
        self.tabular_std.copy_(torch.from_numpy(std))
        # An indicator that was never on has untrained weights: it stays off when scoring meets a missing
        # value.
        self.missing_seen.copy_(torch.from_numpy(statistics.missing > 0))
        self.log_ceiling.fill_(math.log1p(max(statistics.max_label, 1.0)))
        if self.config.loss == "ziln":
            share = min(max(statistics.active_share, 1e-3), 1 - 1e-3)
            scale = max(statistics.log_std, 1e-2)
            bias = [math.log(share / (1 - share)), statistics.log_mean, math.log(math.expm1(scale))]
        else:
            bias = [statistics.log1p_mean]
        self.head.bias.copy_(torch.tensor(bias))

    def forward(self, batch: Batch) -> Tensor:
        """Outputs of the head: float32 [B, 3] for ``ziln``, [B, 1] for ``mse``. See :meth:`to_money`."""
        history = self._read_history(batch)
        joined = self.join(torch.cat([history, self._read_tabular(batch.tabular)], dim=-1))
        return self.head(joined + self.adapter(joined)).float()

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of each row, float32 [B]; ``labels`` [B] are money."""
        return ziln_loss(outputs, labels) if self.config.loss == "ziln" else log_mse_loss(outputs, labels)

    def expected_spend(self, batch: Batch) -> Tensor:
        """Expected spend of each user, money, float32 [B], in 0..the largest training label."""
        return self.to_money(self(batch))

    def to_money(self, outputs: Tensor) -> Tensor:
        """Expected spend, float32 [B], from outputs of the head.

        ``ziln``: P(spend > 0) * exp(mu + sigma^2 / 2). ``mse``: exp(output) * smearing - 1, with the
        retransformation of
        Duan, Smearing Estimate, JASA 1983, as a ratio of sums, which one outlier can't rule.
        """
        ceiling = self.log_ceiling
        if self.config.loss == "ziln":
            logit, mu, sigma = ziln_parameters(outputs)
            log_amount = torch.minimum(mu + 0.5 * sigma**2, ceiling)
            return torch.sigmoid(logit) * torch.exp(log_amount)
        log_amount = torch.minimum(outputs.float().squeeze(-1) + torch.log(self.smearing), ceiling)
        return torch.expm1(log_amount).clamp(min=0)

    def save(self, folder: Path) -> None:
        """Write weights, buffers and texts (:data:`WEIGHTS_FILE`), and sizes (:data:`DESCRIPTION_FILE`)."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        tensors["vocabulary_ids"] = self.vocabulary_ids.cpu()
        tensors["text_embeddings"] = self.text_embeddings[1:].cpu().contiguous()
        save_file(tensors, str(folder / WEIGHTS_FILE))
        description = {
            "format": FORMAT,
            "input": self.spec.to_json(),
            "network": self.config.model_dump(mode="json"),
            "vocabulary": len(self.vocabulary_ids),
            "text_size": self.text_embeddings.shape[1],
            "parameters": self.parameter_count,
        }
        text = json.dumps(description, indent=2, sort_keys=True) + "\n"
        (folder / DESCRIPTION_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SpendNetwork:
        """Read what :meth:`save` wrote; the network is in evaluation mode.

        Raises:
            BundleError: a file is missing, damaged or of a newer format, or tensors don't fit the
            description.
        """
        spec, config, vocabulary, text_size = _read_description(folder / DESCRIPTION_FILE)
        path = folder / WEIGHTS_FILE
        try:
            tensors = load_file(str(path))
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{path}: can't be read: {error}") from error
        ids = tensors.pop("vocabulary_ids", torch.zeros(0))
        texts = tensors.pop("text_embeddings", torch.zeros(0))
        if ids.shape != (vocabulary,) or texts.shape != (vocabulary, text_size):
            raise BundleError(f"{path}: texts must be {vocabulary} x {text_size}, found {tuple(texts.shape)}")
        network = cls(spec, config, ids, texts)
        expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if wrong := sorted(name for name, _ in expected.items() ^ found.items()):
            raise BundleError(f"{path}: {len(set(wrong))} tensors don't fit {DESCRIPTION_FILE}, first {wrong[0]}")
        network.load_state_dict(tensors)
        return network.eval()

    def _read_history(self, batch: Batch) -> Tensor:
        text = F.embedding(batch.text, self.text_embeddings).to(self.user.dtype)
        events = (
            self.kind(batch.kind)
            + self.text(text)
            + self.numeric(batch.numeric)
            + self.weekday(batch.weekday)
            + self.hour(batch.hour)
        )
        # The user token is never masked, so a user without any event still has one token to attend to.
        tokens = torch.cat([self.user.to(events.dtype).expand(len(batch), 1, -1), events], dim=1)
        mask = F.pad(batch.mask, (1, 0), value=True)
        # Positions count back from the newest event: it is number 1 however long the history.
        length = batch.mask.sum(dim=1, keepdim=True)
        steps = torch.arange(mask.shape[1], device=mask.device)
        position = torch.where(mask & (steps > 0), length + 1 - steps, 0)
        read = self.encoder(inputs_embeds=tokens, attention_mask=mask.long(), position_ids=position).last_hidden_state
        if self.pooling_score is None:
            weight = mask.to(read.dtype)
            return (read * weight.unsqueeze(-1)).sum(dim=1) / weight.sum(dim=1, keepdim=True)
        score = self.pooling_score(read).squeeze(-1).float().masked_fill(~mask, -math.inf)
        return (read * score.softmax(dim=1).unsqueeze(-1)).sum(dim=1)

    def _read_tabular(self, values: Tensor) -> Tensor:
        missing = values.isnan()
        scaled = ((values - self.tabular_mean) / self.tabular_std).clamp(-_TABULAR_LIMIT, _TABULAR_LIMIT)
        return self.tabular(torch.cat([scaled.masked_fill(missing, 0.0), missing * self.missing_seen], dim=-1))


class TransformerMember:
    """The fine-tuned network as a member of a bundle.

    Args:
        network: a trained network.
        batch_rows: users of one forward pass (``scoring.network_batch``).
    """

    name = "transformer"

    def __init__(self, network: SpendNetwork, batch_rows: int = 256) -> None:
        self.network = network.eval()
        self.batch_rows = batch_rows

    def predict(self, columns: Columns) -> np.ndarray:
        """Expected spend, money, float64 [B].

        Users pass ordered by length of history, for little padding, and come back in the order they came in.

        Raises:
            DataError: ``columns`` lacks one that the network reads.
        """
        network = self.network
        vocabulary_ids = network.vocabulary_ids.cpu().numpy()
        out = np.empty(len(history_lengths(columns)))
        with torch.inference_mode():
            for rows in self._batches(columns):
                part = {name: columns[name][rows] for name in network.spec.columns if name in columns}
                batch = collate(part, network.spec, vocabulary_ids).to(network.user.device)
                out[rows] = network.expected_spend(batch).double().cpu().numpy()
        return out

    def save(self, folder: Path) -> None:
        """See :meth:`SpendNetwork.save`."""
        self.network.save(folder)

    @classmethod
    def load(cls, folder: Path) -> TransformerMember:
        """See :meth:`SpendNetwork.load`."""
        return cls(SpendNetwork.load(folder))

    def _batches(self, columns: Columns) -> Iterator[np.ndarray]:
        order = np.argsort(history_lengths(columns), kind="stable")
        for start in range(0, len(order), self.batch_rows):
            yield order[start : start + self.batch_rows]


def _encoder(config: NetworkConfig, positions: int) -> BertModel:
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
    # Events come as vectors. A table of words that gets no gradient would stop DDP.
    encoder.embeddings.word_embeddings = None  # type: ignore[assignment]
    return encoder


def _read_description(path: Path) -> tuple[InputSpec, NetworkConfig, int, int]:
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise BundleError(f"{path}: format {description['format']!r}, this version reads {FORMAT}")
        spec = InputSpec.from_json(description["input"])
        config = NetworkConfig.model_validate(description["network"])
        return spec, config, int(description["vocabulary"]), int(description["text_size"])
    except (OSError, KeyError, TypeError, ValueError, ValidationError) as error:
        raise BundleError(f"{path}: no description of a network: {error}") from error
