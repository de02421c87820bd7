"""Self-supervised pre-training of the history encoder: histories with hidden events in, losses of predicting them out.

Each history is cut off at a moment drawn at random between its first and its last event. Three tasks follow:

- *masked events* (BERT, Devlin et al. 2019, arXiv:1810.04805; BERT4Rec, Sun et al. 2019, arXiv:1904.06690): some events are
  replaced by a learned vector, and the encoder's states at their positions predict them;
- *the next event*: the user's vector predicts the event after the moment, and how soon it comes;
- *the next days*: the user's vector predicts log(1 + spend) of the days after the moment, where the history covers them.

Predicted are an event's kind (cross-entropy), its log amount and a log time (squared error), and its text. The right text is to
be found among the texts of the batch by its frozen embedding (InfoNCE, van den Oord et al. 2018, arXiv:1807.03748). Amounts and
texts count only for events that have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bp_spark.core.config import NetworkConfig, PretrainingConfig
from bp_spark.model.history import HistoryEncoder
from bp_spark.model.inputs import AGE, AMOUNT, GAP, HISTORY_COLUMNS, KINDS, Batch, InputSpec, collate

PARTS = (
    "masked_kind",
    "masked_amount",
    "masked_gap",
    "masked_text",
    "next_kind",
    "next_amount",
    "next_wait",
    "next_text",
    "next_days",
)
"""Parts of the loss."""


@dataclass(frozen=True)
class Targets:
    """N events to predict: kind and text int64 [N], log amount and log time in days float32 [N]."""

    kind: Tensor
    amount: Tensor
    time: Tensor
    text: Tensor

    def to(self, device: torch.device) -> Targets:
        """Return the same tensors on another device."""
        return Targets(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class PretrainingBatch:
    """Histories with the targets of their predictions.

    Attributes:
        history: B users up to their moment, L events of the longest.
        hidden: bool [B, L], whether an event is hidden from the network.
        masked: the hidden events, row by row.
        followed: bool [B], whether the user has an event after the moment.
        following: the next event of each followed user.
        covered: bool [B], whether the days after the moment are over.
        spend: log(1 + spend) of these days, float32 [covered users].
    """

    history: Batch
    hidden: Tensor
    masked: Targets
    followed: Tensor
    following: Targets
    covered: Tensor
    spend: Tensor

    def to(self, device: torch.device) -> PretrainingBatch:
        """Return the same tensors on another device."""
        return PretrainingBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class CutHistories:
    """Histories of B users cut at a moment.

    Attributes:
        before: history columns of the events before the moment.
        after: history columns of the next event; empty for a history that stayed whole.
        covered: bool [B], whether the ``days`` after the moment lie before the as-of date.
        spend: float64 [B], money spent in these days.

    ``seq_age_days`` are the days to the moment, in either direction.
    """

    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    covered: np.ndarray
    spend: np.ndarray


def cut_histories(columns: Mapping[str, np.ndarray], days: float, rng: np.random.Generator) -> CutHistories:
    """Cut histories at a moment.

    The moment is uniform between a user's first and last event, as an as-of date would be. Histories of fewer than two
    events stay whole.

    Args:
        columns: at least the history columns, an array of arrays each.
        days: after the moment, over which spend is summed.
        rng: draws the moments.
    """
    ages = columns["seq_age_days"]
    positions, moments, spend = [len(age) for age in ages], np.zeros(len(ages)), np.zeros(len(ages))
    for row, (age, share) in enumerate(zip(ages, rng.random(len(ages)), strict=True)):
        if len(age) > 1:
            moments[row] = moment = age[-1] + share * (age[0] - age[-1])
            positions[row] = position = min(max(1, int((age > moment).sum())), len(age) - 1)
            soon = age[position:] > moment - days
            spend[row] = np.nansum(columns["seq_amount"][row][position:][soon], dtype=np.float64)
    before, after = ({name: np.empty(len(ages), object) for name in HISTORY_COLUMNS} for _ in range(2))
    for name in HISTORY_COLUMNS:
        for row, (values, position) in enumerate(zip(columns[name], positions, strict=True)):
            before[name][row], after[name][row] = values[:position], values[position : position + 1]
    for row, moment in enumerate(moments):
        before["seq_age_days"][row] = (before["seq_age_days"][row] - moment).clip(0)
        after["seq_age_days"][row] = (moment - after["seq_age_days"][row]).clip(0)
    return CutHistories(before, after, moments >= days, spend)


def make_batch(
    columns: Mapping[str, np.ndarray],
    history_length: int,
    vocabulary_ids: np.ndarray,
    config: PretrainingConfig,
    rng: np.random.Generator,
) -> PretrainingBatch:
    """Cut histories and hide events.

    Args:
        columns: at least the history columns, an array of arrays each.
        history_length: the most recent events before the moment that are read.
        vocabulary_ids: int64 [V], sorted: ids of the texts of the vocabulary.
        config: the share of events to hide, and the days to look ahead.
        rng: draws moments and masks.

    Raises:
        DataError: the arrays of a history differ in length.
    """
    spec = InputSpec((), frozenset(), history_length)
    parts = cut_histories(columns, config.days_ahead, rng)
    history, following = (collate(part, spec, vocabulary_ids) for part in (parts.before, parts.after))
    hidden = history.mask & torch.from_numpy(rng.random(tuple(history.mask.shape)) < config.mask_fraction)
    # The gap of the event after a hidden one would reveal the time of the hidden one.
    numeric = history.numeric.clone()
    numeric[..., GAP].masked_fill_(F.pad(hidden, (1, 0))[:, :-1], 0.0)
    spend = np.log1p(parts.spend[parts.covered].clip(min=0))
    return PretrainingBatch(
        history=replace(history, numeric=numeric),
        hidden=hidden,
        masked=_targets(history, hidden, GAP),
        followed=following.mask.any(dim=1),
        following=_targets(following, following.mask, AGE),
        covered=torch.from_numpy(parts.covered),
        spend=torch.from_numpy(spend.astype(np.float32)),
    )


def _targets(batch: Batch, chosen: Tensor, time: int) -> Targets:
    numbers = batch.numeric[chosen]
    return Targets(batch.kind[chosen], numbers[:, AMOUNT], numbers[:, time], batch.text[chosen])


class PretrainingNetwork(nn.Module):
    """A history encoder with the heads that predict events.

    Args:
        config: sizes of the encoder.
        history_length: events of the longest history.
        text_embeddings: [V, D], the frozen language model's embeddings of the texts.
        temperature: of the choice among texts; the lower, the more the nearest wrong texts count.
    """

    def __init__(self, config: NetworkConfig, history_length: int, text_embeddings: Tensor, temperature: float) -> None:
        super().__init__()
        size = config.hidden_size
        self.history = HistoryEncoder(config, history_length, text_embeddings)
        self.hidden = nn.Parameter(torch.randn(size) * 0.02)
        self.of_masked = EventHead(size, temperature)
        self.of_next = EventHead(size, temperature)
        self.of_days = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size), nn.Linear(size, 1))
        self.key = nn.Linear(text_embeddings.shape[1], size)

    def forward(self, batch: PretrainingBatch) -> tuple[Tensor, Tensor]:
        """Return the sums of the losses of the :data:`PARTS` and the numbers of their targets, float32 [9] each."""
        encoder, mask = self.history, batch.history.mask
        events = encoder.events(batch.history)
        events = torch.where(batch.hidden.unsqueeze(-1), self.hidden.to(events.dtype), events)
        states = encoder.read(events, mask)
        # The text that stands for none is always among the wrong ones, so that there is one to compare with.
        every_text = torch.cat([batch.masked.text, batch.following.text, batch.masked.text.new_zeros(1)])
        texts: Tensor = torch.unique(every_text)
        keys = F.normalize(self.key(F.embedding(texts, encoder.text_embeddings).to(self.hidden.dtype)), dim=-1)
        masked = self.of_masked(states[:, 1:][batch.hidden], batch.masked, texts, keys)
        users = encoder.pool(states, mask)
        following = self.of_next(users[batch.followed], batch.following, texts, keys)
        spend = self.of_days(users[batch.covered]).float().squeeze(-1)
        days = (0.5 * ((spend - batch.spend) ** 2).sum(dim=0, keepdim=True), batch.covered.sum(dim=0, keepdim=True))
        sums, counts = zip(masked, following, days, strict=True)
        return torch.cat(sums), torch.cat(counts)


class EventHead(nn.Module):
    """Predicts events from vectors of ``size``."""

    def __init__(self, size: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.body = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size))
        self.kind = nn.Linear(size, KINDS)
        self.numbers = nn.Linear(size, 2)
        self.text = nn.Linear(size, size)

    def forward(self, states: Tensor, targets: Targets, texts: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses of N predictions.

        Args:
            states: [N, size].
            targets: the events to predict.
            texts: int64 [U], sorted: the texts to choose among, the targets' included.
            keys: of the texts, [U, size], of length 1.

        Returns:
            Sums of the losses of kind, amount, time and text, float32 [4], and the numbers of targets, float32 [4].
        """
        body = self.body(states)
        amount, time = self.numbers(body).float().unbind(-1)
        priced, worded = targets.amount != 0, targets.text > 0
        scores = (F.normalize(self.text(body), dim=-1) @ keys.T).float() / self.temperature
        right = torch.searchsorted(texts, targets.text)
        sums = (
            F.cross_entropy(self.kind(body).float(), targets.kind, reduction="sum"),
            0.5 * ((amount - targets.amount) ** 2 * priced).sum(),
            0.5 * ((time - targets.time) ** 2).sum(),
            (F.cross_entropy(scores, right, reduction="none") * worded).sum(),
        )
        counts = (len(states), priced.sum(), len(states), worded.sum())
        return torch.stack(sums), torch.stack([sums[0].new_tensor(float(count)) for count in counts])
