"""The sequence model: a user's events and tabular features in, expected spend in money out.

A history encoder turns the events into one vector: :class:`~bp_spark.model.history.HistoryEncoder`, or for histories read as
text :class:`~bp_spark.model.text_history.TextHistoryEncoder`. The vector is joined with the tabular features and passed
through a residual adapter. A head for each horizon follows: a zero-inflated lognormal, a log mean or a log1p value, by
configuration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from bp_spark.core.config import NetworkConfig
from bp_spark.core.errors import BundleError
from bp_spark.model.history import HistoryEncoder, read_tensors, require_same_tensors
from bp_spark.model.inputs import Batch, InputSpec
from bp_spark.model.losses import band_loss, log_mse_loss, tweedie_loss, ziln_loss, ziln_parameters
from bp_spark.model.text_history import TextHistoryEncoder, restore_text_encoder
from bp_spark.model.values import whole

WEIGHTS_FILE = "transformer.safetensors"
DESCRIPTION_FILE = "transformer.json"
FORMAT = 4
"""Format 3 lacked the projection of the texts."""

_READABLE = (3, FORMAT)
_TABULAR_LIMIT = 10.0
_MIN_STD = 1e-6
_OUTPUTS = {"ziln": 3, "tweedie": 1, "mse": 1}
_HISTORY = "history."
_PROJECTION = "history.projection.0.weight"
_LONGEST = 100 * 366
"""Most days of a horizon."""

History = HistoryEncoder | TextHistoryEncoder
"""A history encoder: users in, [B, hidden_size] out."""


@dataclass(frozen=True)
class LabelStatistics:
    """The distribution of one horizon's labels, over the rows that have one.

    Attributes:
        active_share: share of rows with a positive label.
        log_mean, log_std: mean and standard deviation of the log of positive labels.
        log1p_mean: mean of log(1 + label) over all rows.
        mean_label: mean over all rows, money.
        max_label: the largest label, money.
    """

    active_share: float
    log_mean: float
    log_std: float
    log1p_mean: float
    mean_label: float
    max_label: float


@dataclass(frozen=True)
class Statistics:
    """Scales of the training rows, as :func:`bp_spark.model.inputs.tabular_matrix` reads them.

    Attributes:
        mean, std: float64 [F], over the rows where a feature is present.
        missing: float64 [F], share of rows where a feature is missing.
        labels: statistics of each horizon, the main one first.
        band_edges: float64 [bands - 1], rising: quantiles of the main horizon's labels.
    """

    mean: np.ndarray
    std: np.ndarray
    missing: np.ndarray
    labels: tuple[LabelStatistics, ...]
    band_edges: np.ndarray


class SpendHead(nn.Linear):
    """Predicts spend over one horizon from vectors of ``size``, by the loss of the configuration.

    Its outputs are [B, 3] for ``ziln`` (see :func:`bp_spark.model.losses.ziln_loss`), else [B, 1].
    """

    log_ceiling: Tensor
    smearing: Tensor
    label_scale: Tensor

    def __init__(self, size: int, config: NetworkConfig) -> None:
        super().__init__(size, _OUTPUTS[config.loss])
        self.config = config
        # Predictions stop at the largest training label: exp() of a stray output would outweigh all other users.
        self.register_buffer("log_ceiling", torch.tensor(math.log1p(1e6)))
        self.register_buffer("smearing", torch.tensor(1.0))
        self.register_buffer("label_scale", torch.tensor(1.0))

    @torch.no_grad()
    def start_at(self, statistics: LabelStatistics) -> None:
        """Start at the distribution of the labels."""
        self.log_ceiling.fill_(math.log1p(max(statistics.max_label, 1.0)))
        if self.config.loss == "ziln":
            share = min(max(statistics.active_share, 1e-3), 1 - 1e-3)
            scale = max(statistics.log_std, 1e-2)
            bias = [math.log(share / (1 - share)), statistics.log_mean, math.log(math.expm1(scale))]
        elif self.config.loss == "tweedie":
            # In units of the mean label the loss is of the order of 1 in any currency.
            self.label_scale.fill_(max(statistics.mean_label, 1e-2))
            bias = [0.0]
        else:
            bias = [statistics.log1p_mean]
        self.bias.copy_(torch.tensor(bias))

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each row, float32 [B]; ``labels`` [B] are money."""
        if self.config.loss == "ziln":
            return ziln_loss(outputs, labels)
        if self.config.loss == "tweedie":
            return tweedie_loss(outputs.squeeze(-1), labels / self.label_scale, self.config.tweedie_power)
        return log_mse_loss(outputs, labels)

    def to_money(self, outputs: Tensor) -> Tensor:
        """Return the expected spend, float32 [B], from the head's outputs.

        ``ziln``: P(spend > 0) * exp(mu + sigma^2 / 2). ``tweedie``: exp(output) * mean label. ``mse``: exp(output) * smearing
        - 1, the retransformation of Duan, Smearing Estimate, JASA 1983, as a ratio of sums, which one outlier can't rule.
        """
        if self.config.loss == "ziln":
            logit, mu, sigma = ziln_parameters(outputs)
            log_amount = torch.minimum(mu + 0.5 * sigma**2, self.log_ceiling)
            return torch.sigmoid(logit) * torch.exp(log_amount)
        log_amount = outputs.float().squeeze(-1)
        if self.config.loss == "tweedie":
            return torch.exp(torch.minimum(log_amount + torch.log(self.label_scale), self.log_ceiling))
        log_amount = torch.minimum(log_amount + torch.log(self.smearing), self.log_ceiling)
        return torch.expm1(log_amount).clamp(min=0)


class SpendNetwork(nn.Module):
    """Predicts a user's spend over all horizons, learned at once (Caruana 1997, "Multitask learning").

    Args:
        spec: the columns of a user that the network reads.
        config: sizes and loss.
        vocabulary_ids: int64 [V], sorted: ids of the texts.
        history: encoder of histories, of ``config.hidden_size``.
        other_horizons: days of each horizon that is learned beside the main one; ignored where ``horizons_weight`` is 0.
    """

    vocabulary_ids: Tensor
    tabular_mean: Tensor
    tabular_std: Tensor
    missing_seen: Tensor
    band_edges: Tensor

    def __init__(
        self,
        spec: InputSpec,
        config: NetworkConfig,
        vocabulary_ids: Tensor,
        history: History,
        other_horizons: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.spec = spec
        self.config = config
        self.other_horizons = tuple(other_horizons) if config.horizons_weight else ()
        size, features = config.hidden_size, len(spec.tabular)

        self.register_buffer("vocabulary_ids", vocabulary_ids.long(), persistent=False)
        self.history = history

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
        self.head = SpendHead(adapter, config)
        self.bands = nn.Linear(adapter, config.bands) if config.bands_weight else None
        self.other_heads = nn.ModuleList(SpendHead(adapter, config) for _ in self.other_horizons)
        self.register_buffer("band_edges", torch.arange(1.0, config.bands))

    @property
    def parameter_count(self) -> int:
        """How many weights the network has, a language model's frozen ones included, the texts' embeddings not."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def width(self) -> int:
        """How many outputs the network has for a user."""
        return self.head.out_features * len(self.heads) + (0 if self.bands is None else self.bands.out_features)

    @property
    def heads(self) -> list[SpendHead]:
        """One head for each horizon, the main one first."""
        return [self.head, *cast("Iterator[SpendHead]", iter(self.other_heads))]

    @torch.no_grad()
    def fit_statistics(self, statistics: Statistics) -> None:
        """Take the scales of the training rows, and start the heads at the distributions of their labels."""
        std = np.where(statistics.std > _MIN_STD, statistics.std, 1.0)
        self.tabular_mean.copy_(torch.from_numpy(statistics.mean))
        self.tabular_std.copy_(torch.from_numpy(std))
        # An indicator that was never on has untrained weights: it stays off when scoring meets a missing value.
        self.missing_seen.copy_(torch.from_numpy(statistics.missing > 0))
        self.band_edges.copy_(torch.from_numpy(statistics.band_edges))
        for head, labels in zip(self.heads, statistics.labels, strict=True):
            head.start_at(labels)

    def forward(self, batch: Batch) -> Tensor:
        """Return the outputs of the heads side by side, float32 [B, width], the main horizon first.

        Each horizon has [B, 3] for ``ziln``, else [B, 1]. If the network learns bands too, their logits follow.
        """
        history = self.history(batch)
        joined = self.join(torch.cat([history, self._read_tabular(batch.tabular)], dim=-1))
        adapted = joined + self.adapter(joined)
        outputs = [head(adapted) for head in self.heads]
        if self.bands is not None:
            outputs.append(self.bands(adapted))
        return torch.cat(outputs, dim=-1).float()

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each row over the main horizon, float32 [B]; ``labels`` [B] are money."""
        return self.head.loss(self._of_heads(outputs)[0], labels)

    def training_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted loss that training minimises, for each row and horizon, float32 [B, horizons].

        Args:
            outputs: see :meth:`forward`.
            labels: [B, horizons], money, the main horizon first; NaN where spend is unknown.

        Returns:
            The main horizon's loss, with the weighted loss of the bands, then the weighted loss of each other horizon; 0 where
            spend is unknown.
        """
        main = self.loss(outputs, labels[:, 0])
        if self.bands is not None:
            logits = outputs[:, -self.config.bands :]
            main = main + self.config.bands_weight * band_loss(logits, labels[:, 0], self.band_edges)
        losses = [main]
        for head, of_head, spend in zip(self.heads[1:], self._of_heads(outputs)[1:], labels.T[1:], strict=True):
            has_label = ~spend.isnan()
            # Unknown labels take 0 and are multiplied by 0: a masked NaN would still give NaN gradients. And a head without
            # any label in a batch must stay in the graph, or DDP would wait for it.
            loss = head.loss(of_head, torch.where(has_label, spend, 0.0))
            losses.append(self.config.horizons_weight * has_label * loss)
        return torch.stack(losses, dim=1)

    def expected_spend(self, batch: Batch) -> Tensor:
        """Return the expected spend of each user, money, float32 [B], from 0 to the largest training label."""
        return self.to_money(self(batch))

    def to_money(self, outputs: Tensor) -> Tensor:
        """Return the expected spend over the main horizon, float32 [B], from outputs of the network."""
        return self.head.to_money(self._of_heads(outputs)[0])

    def to_money_of_each(self, outputs: Tensor) -> Tensor:
        """Return the expected spend over each horizon, float32 [B, horizons], the main one first, from the outputs."""
        pairs = zip(self.heads, self._of_heads(outputs), strict=True)
        return torch.stack([head.to_money(of_head) for head, of_head in pairs], dim=1)

    def p_active(self, outputs: Tensor) -> Tensor:
        """Return P(spend > 0) over the main horizon, float32 [B], from the outputs of a network with the loss ``ziln``."""
        return torch.sigmoid(outputs[:, 0].float())

    def _of_heads(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of each head."""
        size = self.head.out_features
        return tuple(outputs[:, size * number : size * (number + 1)] for number in range(len(self.heads)))

    def save(self, folder: Path) -> None:
        """Write weights, buffers and texts to :data:`WEIGHTS_FILE`, sizes to :data:`DESCRIPTION_FILE`."""
        folder.mkdir(parents=True, exist_ok=True)
        history = self.history.merged()
        tensors = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(_HISTORY)}
        tensors |= {f"{_HISTORY}{name}": tensor for name, tensor in history.state_dict().items()}
        tensors |= {"vocabulary_ids": self.vocabulary_ids, **history.bundle_tensors()}
        written = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(written, str(folder / WEIGHTS_FILE))
        description = {
            "format": FORMAT,
            "input": self.spec.to_json(),
            "network": self.config.model_dump(mode="json"),
            "other_horizons": list(self.other_horizons),
            "vocabulary": len(self.vocabulary_ids),
            "parameters": self.parameter_count,
            **history.bundle_description(),
        }
        text = json.dumps(description, indent=2, sort_keys=True) + "\n"
        (folder / DESCRIPTION_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SpendNetwork:
        """Read the network that :meth:`save` wrote, in evaluation mode; it can't be trained further.

        Tensors stay in the file, mapped into memory, so that all processes of a machine share them.

        Raises:
            BundleError: a file is missing, damaged or of a newer format, or tensors don't fit the description.
        """
        spec, config, description = _read_description(folder / DESCRIPTION_FILE)
        path = folder / WEIGHTS_FILE
        tensors = read_tensors(path)
        ids = tensors.pop("vocabulary_ids", torch.zeros(0))
        if ids.shape != (description["vocabulary"],):
            raise BundleError(f"{path}: there must be {description['vocabulary']} texts, found {tuple(ids.shape)}")
        if ids.dtype != torch.int64 or not bool((ids.diff() > 0).all()):
            raise BundleError(f"{path}: ids of texts must be whole numbers that rise")

        def make() -> tuple[SpendNetwork, dict[str, Tensor]]:
            state = dict(tensors)
            history = _restored_history(spec, config, description, state, path)
            return cls(spec, config, ids, history, description["other_horizons"]), state

        # First without memory: the description may name any size, until the tensors prove it.
        with torch.device("meta"):
            require_same_tensors(*_made(make, path), path)
        network, state = make()
        network.load_state_dict(state, assign=True)
        return network.eval()

    def _read_tabular(self, values: Tensor) -> Tensor:
        """Return a vector of the tabular features, [B, adapter_size], from values [B, F]."""
        missing = values.isnan()
        scaled = ((values - self.tabular_mean) / self.tabular_std).clamp(-_TABULAR_LIMIT, _TABULAR_LIMIT)
        vectors: Tensor = self.tabular(
            torch.cat([scaled.masked_fill(missing, 0.0), missing * self.missing_seen], dim=-1)
        )
        return vectors


def _made(
    make: Callable[[], tuple[SpendNetwork, dict[str, Tensor]]], path: Path
) -> tuple[SpendNetwork, dict[str, Tensor]]:
    """Return what ``make`` does.

    Raises:
        BundleError: no network can be of the sizes in the description.
    """
    try:
        return make()
    except BundleError:
        raise
    except Exception as error:
        # Errors of torch and transformers, of any class: sizes that don't fit each other or are beyond all limits.
        raise BundleError(f"{path}: no network of these sizes: {type(error).__name__}") from error


def _restored_history(
    spec: InputSpec, config: NetworkConfig, description: Mapping[str, Any], tensors: dict[str, Tensor], path: Path
) -> History:
    """Return the history encoder of a bundle, and remove its tensors that are no state from ``tensors``."""
    if config.backbone == "text":
        return restore_text_encoder(config, description["vocabulary"], description.get("language"), tensors, path)
    texts, expected = tensors.pop("texts", torch.zeros(0)), (description["vocabulary"] + 1, config.hidden_size)
    if texts.shape != expected or texts.dtype != torch.float32:
        raise BundleError(f"{path}: texts must be of shape {expected}, found {tuple(texts.shape)}")
    if config.layers > len(tensors):
        raise BundleError(f"{path}: holds fewer tensors than the network has layers")
    weight = tensors.get(_PROJECTION)
    size = 1 if weight is None or not weight.ndim else weight.shape[-1]
    history = HistoryEncoder(config, spec.history_length, torch.zeros(0, size))
    history.take_texts(texts)
    if weight is None:
        history.projection = None
    return history


def _read_description(path: Path) -> tuple[InputSpec, NetworkConfig, dict[str, Any]]:
    try:
        description: dict[str, Any] = json.loads(path.read_bytes())
        if description["format"] not in _READABLE:
            raise BundleError(f"{path}: format {description['format']!r}, this version reads {_READABLE}")
        spec = InputSpec.from_json(description["input"])
        config = NetworkConfig.model_validate(description["network"])
        horizons = tuple(whole(days, 1, _LONGEST) for days in description["other_horizons"])
        if len(set(horizons)) != len(horizons):
            raise ValueError("a horizon is there twice")
        vocabulary = whole(description["vocabulary"], 0, 2**31)
        return spec, config, description | {"vocabulary": vocabulary, "other_horizons": horizons}
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        # The words of pydantic would quote the values.
        reason = f"{error.error_count()} settings can't be used" if isinstance(error, ValidationError) else error
        raise BundleError(f"{path}: no description of a network: {reason}") from error
