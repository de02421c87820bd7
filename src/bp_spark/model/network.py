"""The sequence model: a user's events and tabular features in, expected spend in money out.

The history as :class:`~bp_spark.model.history.HistoryEncoder` reads it, or as text
:class:`~bp_spark.model.text_history.TextHistoryEncoder`, joined with the tabular features and passed
through a residual adapter, ends in a head for each horizon: a zero-inflated lognormal, a log mean or a log1p value, by
configuration.

:class:`SpendNetwork` is trained; :class:`TransformerMember` is what a bundle holds.
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
from bp_spark.features.labels import of_days
from bp_spark.model.columns import Columns
from bp_spark.model.history import HistoryEncoder, read_tensors, require_same_tensors
from bp_spark.model.inputs import Batch, InputSpec, read
from bp_spark.model.losses import band_loss, log_mse_loss, tweedie_loss, ziln_loss, ziln_parameters
from bp_spark.model.text_history import TextHistoryEncoder, restored

WEIGHTS_FILE = "transformer.safetensors"
DESCRIPTION_FILE = "transformer.json"
FORMAT = 3

BATCH_EVENTS = 8192
"""Events of one forward pass: the activations of more fall out of a core's cache, those of fewer don't fill it."""
GPU_BATCH_EVENTS = 262_144

_TABULAR_LIMIT = 10.0
_MIN_STD = 1e-6
_OUTPUTS = {"ziln": 3, "tweedie": 1, "mse": 1}
_HISTORY = "history."

History = HistoryEncoder | TextHistoryEncoder
"""What reads a history: users in, [B, hidden_size] out."""


@dataclass(frozen=True)
class LabelStatistics:
    """What the labels of one horizon are like, of the rows that have one.

    Attributes:
        active_share: share of rows with a positive label.
        log_mean, log_std: of the log of positive labels.
        log1p_mean: of log(1 + label), over all rows.
        mean_label: over all rows, money.
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
    """What the training rows say about scales, as :func:`bp_spark.model.inputs.tabular_matrix` reads them.

    Attributes:
        mean, std, missing: float64 [F]: of the rows where a feature is present; share of rows where it is
            not.
        labels: of each horizon, the main one first.
        band_edges: float64 [bands - 1], rising: quantiles of the main horizon's labels.
    """

    mean: np.ndarray
    std: np.ndarray
    missing: np.ndarray
    labels: tuple[LabelStatistics, ...]
    band_edges: np.ndarray


class SpendHead(nn.Linear):
    """Spend over one horizon, from vectors of ``size``, by the loss of the configuration.

    Its outputs are [B, 3] for ``ziln`` (see :func:`bp_spark.model.losses.ziln_loss`), else [B, 1].
    """

    log_ceiling: Tensor
    smearing: Tensor
    label_scale: Tensor

    def __init__(self, size: int, config: NetworkConfig) -> None:
        super().__init__(size, _OUTPUTS[config.loss])
        self.config = config
        # Spend is never predicted above the largest label seen: exp() of a stray output would outweigh all
        # other users.
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
        """Loss of each row, float32 [B]; ``labels`` [B] are money."""
        if self.config.loss == "ziln":
            return ziln_loss(outputs, labels)
        if self.config.loss == "tweedie":
            return tweedie_loss(outputs.squeeze(-1), labels / self.label_scale, self.config.tweedie_power)
        return log_mse_loss(outputs, labels)

    def to_money(self, outputs: Tensor) -> Tensor:
        """Expected spend, float32 [B], from the head's outputs.

        ``ziln``: P(spend > 0) * exp(mu + sigma^2 / 2). ``tweedie``: exp(output) * mean label.
        ``mse``: exp(output) * smearing - 1, with the
        retransformation of
        Duan, Smearing Estimate, JASA 1983, as a ratio of sums, which one outlier can't rule.
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
    """Spend of a user over the horizon, and over others, learned at once (Caruana 1997, "Multitask learning").

    Args:
        spec: what is read of a user.
        config: sizes and loss.
        vocabulary_ids: int64 [V], sorted: ids of the texts.
        history: what reads histories, of ``config.hidden_size``.
        other_horizons: days of each horizon that is learned beside the main one; none is where ``horizons_weight`` is 0.
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
        """Numbers of all weights, a language model's frozen ones among them; the texts' are not."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def width(self) -> int:
        """Outputs of a user."""
        return self.head.out_features * len(self.heads) + (0 if self.bands is None else self.bands.out_features)

    @property
    def heads(self) -> list[SpendHead]:
        """One for each horizon, the main one first."""
        return [self.head, *cast("Iterator[SpendHead]", iter(self.other_heads))]

    @torch.no_grad()
    def fit_statistics(self, statistics: Statistics) -> None:
        """Take scales from the training rows, and start the heads at the distributions of their labels."""
        std = np.where(statistics.std > _MIN_STD, statistics.std, 1.0)
        self.tabular_mean.copy_(torch.from_numpy(statistics.mean))
        self.tabular_std.copy_(torch.from_numpy(std))
        # An indicator that was never on has untrained weights: it stays off when scoring meets a missing
        # value.
        self.missing_seen.copy_(torch.from_numpy(statistics.missing > 0))
        self.band_edges.copy_(torch.from_numpy(statistics.band_edges))
        for head, labels in zip(self.heads, statistics.labels, strict=True):
            head.start_at(labels)

    def forward(self, batch: Batch) -> Tensor:
        """Outputs of the heads side by side, float32: [B, 3] of each horizon for ``ziln``, else [B, 1], the main one first. If
        the network learns bands too, their logits follow.
        """
        history = self.history(batch)
        joined = self.join(torch.cat([history, self._read_tabular(batch.tabular)], dim=-1))
        adapted = joined + self.adapter(joined)
        outputs = [head(adapted) for head in self.heads]
        if self.bands is not None:
            outputs.append(self.bands(adapted))
        return torch.cat(outputs, dim=-1).float()

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of each row's spend over the main horizon, float32 [B]; ``labels`` [B] are money."""
        return self.head.loss(self._of_heads(outputs)[0], labels)

    def training_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """What training makes small, of each row and horizon, float32 [B, horizons].

        Args:
            outputs: see :meth:`forward`.
            labels: [B, horizons], money, the main horizon first; NaN where spend is not known.

        Returns:
            :meth:`loss`, with that of the bands, weighted, then the loss of each other horizon, weighted; 0 where spend is
            not known.
        """
        main = self.loss(outputs, labels[:, 0])
        if self.bands is not None:
            logits = outputs[:, -self.config.bands :]
            main = main + self.config.bands_weight * band_loss(logits, labels[:, 0], self.band_edges)
        losses = [main]
        for head, of_head, spend in zip(self.heads[1:], self._of_heads(outputs)[1:], labels.T[1:], strict=True):
            known = ~spend.isnan()
            # Unknown labels take 0 and are multiplied away: a masked NaN would still give NaN gradients, and a head that no
            # label of a batch reaches must stay in the graph, or DDP would wait for it.
            loss = head.loss(of_head, torch.where(known, spend, 0.0))
            losses.append(self.config.horizons_weight * known * loss)
        return torch.stack(losses, dim=1)

    def expected_spend(self, batch: Batch) -> Tensor:
        """Expected spend of each user, money, float32 [B], in 0..the largest training label."""
        return self.to_money(self(batch))

    def to_money(self, outputs: Tensor) -> Tensor:
        """Expected spend over the main horizon, float32 [B], from outputs of the network."""
        return self.head.to_money(self._of_heads(outputs)[0])

    def to_money_of_each(self, outputs: Tensor) -> Tensor:
        """Expected spend over each horizon, float32 [B, horizons], the main one first, from outputs of the network."""
        pairs = zip(self.heads, self._of_heads(outputs), strict=True)
        return torch.stack([head.to_money(of_head) for head, of_head in pairs], dim=1)

    def p_active(self, outputs: Tensor) -> Tensor:
        """P(spend > 0) over the main horizon, float32 [B], from outputs of the network; of ``ziln`` only."""
        return torch.sigmoid(outputs[:, 0].float())

    def _of_heads(self, outputs: Tensor) -> tuple[Tensor, ...]:
        size = self.head.out_features
        return outputs[:, : size * len(self.heads)].split(size, dim=1)

    def save(self, folder: Path) -> None:
        """Write weights, buffers and texts (:data:`WEIGHTS_FILE`), and sizes (:data:`DESCRIPTION_FILE`)."""
        folder.mkdir(parents=True, exist_ok=True)
        history = self.history.merged()
        tensors = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(_HISTORY)}
        tensors |= {f"{_HISTORY}{name}": tensor for name, tensor in history.state_dict().items()}
        tensors |= {"vocabulary_ids": self.vocabulary_ids, **history.carried()}
        written = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(written, str(folder / WEIGHTS_FILE))
        description = {
            "format": FORMAT,
            "input": self.spec.to_json(),
            "network": self.config.model_dump(mode="json"),
            "other_horizons": list(self.other_horizons),
            "vocabulary": len(self.vocabulary_ids),
            "parameters": self.parameter_count,
            **history.described(),
        }
        text = json.dumps(description, indent=2, sort_keys=True) + "\n"
        (folder / DESCRIPTION_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SpendNetwork:
        """Read what :meth:`save` wrote; the network is in evaluation mode and can't be trained further.

        Tensors stay in the file, mapped into memory, so that all processes of a machine share them.

        Raises:
            BundleError: a file is missing, damaged or of a newer format, or tensors don't fit the
            description.
        """
        spec, config, description = _read_description(folder / DESCRIPTION_FILE)
        path = folder / WEIGHTS_FILE
        tensors = read_tensors(path)
        ids = tensors.pop("vocabulary_ids", torch.zeros(0))
        if ids.shape != (description["vocabulary"],):
            raise BundleError(f"{path}: there must be {description['vocabulary']} texts, found {tuple(ids.shape)}")
        network = cls(
            spec,
            config,
            ids,
            _restored_history(spec, config, description, tensors, path),
            description["other_horizons"],
        )
        require_same_tensors(network, tensors, path)
        network.load_state_dict(tensors, assign=True)
        return network.eval()

    def _read_tabular(self, values: Tensor) -> Tensor:
        missing = values.isnan()
        scaled = ((values - self.tabular_mean) / self.tabular_std).clamp(-_TABULAR_LIMIT, _TABULAR_LIMIT)
        return self.tabular(torch.cat([scaled.masked_fill(missing, 0.0), missing * self.missing_seen], dim=-1))


class TransformerMember:
    """The fine-tuned network as a member of a bundle.

    Args:
        network: a trained network.
        batch_events: events of one forward pass at most, padding and user tokens included; tokens of histories read as text.
    """

    name = "transformer"

    def __init__(self, network: SpendNetwork, batch_events: int = BATCH_EVENTS) -> None:
        self.network = network.eval()
        self.batch_events = batch_events

    def predict(self, columns: Columns) -> np.ndarray:
        """Expected spend, money, float64 [B].

        Users pass ordered by length of history, for little padding, and come back in the order they came in.

        Raises:
            DataError: ``columns`` lacks one that the network reads.
        """
        return self._each(columns, self.network.to_money)

    def predict_horizons(self, columns: Columns) -> dict[str, np.ndarray]:
        """Expected spend over each horizon; see :meth:`bp_spark.model.members.base.HorizonsMember.predict_horizons`.

        Raises:
            DataError: ``columns`` lacks one that the network reads.
        """
        names = [self.name, *(of_days(self.name, days) for days in self.network.other_horizons)]
        return dict(zip(names, self._each(columns, self.network.to_money_of_each).T, strict=True))

    def p_active(self, columns: Columns) -> np.ndarray | None:
        """P(spend > 0) as the network sees it, float64 [B]; ``None`` if its loss has no such part.

        Raises:
            DataError: ``columns`` lacks one that the network reads.
        """
        if self.network.config.loss != "ziln":
            return None
        return self._each(columns, self.network.p_active)

    def _each(self, columns: Columns, answer: Callable[[Tensor], Tensor]) -> np.ndarray:
        """What ``answer`` makes of the outputs of each user."""
        network = self.network
        users = read(columns, network.spec, network.vocabulary_ids.cpu().numpy())
        out = torch.empty(len(users), network.width, device=network.vocabulary_ids.device)
        with torch.inference_mode():
            for rows in self._batches(network.history.widths(users.lengths)):
                out[rows] = network(users.batch(rows).to(out.device))
            return answer(out).double().cpu().numpy()

    def set_threads(self, threads: int) -> None:
        """Use that many threads of this process in torch from now on."""
        torch.set_num_threads(threads)

    def move_to(self, device: str) -> None:
        """Compute there from now on, as ``cuda:0``; a GPU takes more events at once."""
        self.network.to(device)
        self.batch_events = GPU_BATCH_EVENTS if device.startswith("cuda") else BATCH_EVENTS

    def save(self, folder: Path) -> None:
        """See :meth:`SpendNetwork.save`."""
        self.network.save(folder)

    @classmethod
    def load(cls, folder: Path) -> TransformerMember:
        """See :meth:`SpendNetwork.load`."""
        return cls(SpendNetwork.load(folder))

    def _batches(self, widths: np.ndarray) -> Iterator[np.ndarray]:
        """Positions of users of like width, as many as make a full batch."""
        order = np.argsort(widths, kind="stable")
        start = 0
        while start < len(order):
            # the widest of the batch is its last, and the batch has at least one user
            padded = widths[order[start:]] * np.arange(1, len(order) - start + 1)
            end = start + max(1, int(np.searchsorted(padded, self.batch_events, side="right")))
            yield order[start:end]
            start = end


def _restored_history(
    spec: InputSpec, config: NetworkConfig, description: Mapping[str, Any], tensors: dict[str, Tensor], path: Path
) -> History:
    """The history half, of which the tensors that are no state of it are taken out."""
    if config.backbone == "text":
        return restored(config, description["vocabulary"], description.get("language"), tensors, path)
    texts, expected = tensors.pop("texts", torch.zeros(0)), (description["vocabulary"] + 1, config.hidden_size)
    if texts.shape != expected:
        raise BundleError(f"{path}: texts must be of shape {expected}, found {tuple(texts.shape)}")
    history = HistoryEncoder(config, spec.history_length, torch.zeros(0, 1))
    history.take_texts(texts)
    return history


def _read_description(path: Path) -> tuple[InputSpec, NetworkConfig, dict[str, Any]]:
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise BundleError(f"{path}: format {description['format']!r}, this version reads {FORMAT}")
        spec = InputSpec.from_json(description["input"])
        config = NetworkConfig.model_validate(description["network"])
        numbers = {
            "vocabulary": int(description["vocabulary"]),
            "other_horizons": tuple(int(days) for days in description["other_horizons"]),
        }
        return spec, config, description | numbers
    except (OSError, KeyError, TypeError, ValueError, ValidationError) as error:
        raise BundleError(f"{path}: no description of a network: {error}") from error
