"""What histories teach without labels: events with some of them hidden in, losses of guessing them out.

Three tasks on the same history, cut off at a moment drawn at random between its first and its last event:

- *masked events* (BERT, Devlin et al. 2019, arXiv:1810.04805; BERT4Rec, Sun et al. 2019, arXiv:1904.06690): some events are
  replaced by a learned vector, and what the encoder makes of their places tells what they were;
- *the next event*: the user's vector tells what comes after the moment, and how soon;
- *the next days*: it tells the log of 1 + what is spent in the days after the moment, where the history covers them.

Of an event its kind is guessed (cross-entropy), its log amount and a log time (squared error), and its text: among the
texts of the batch the right one is to be found by its frozen embedding (InfoNCE, van den Oord et al. 2018,
arXiv:1807.03748). Amounts count for events that have one, texts for those that have one.
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
"""Of the loss."""


@dataclass(frozen=True)
class Targets:
    """N events to be guessed: kind and text int64 [N], log amount and log time in days float32 [N]."""

    kind: Tensor
    amount: Tensor
    time: Tensor
    text: Tensor

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        return Targets(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Exercise:
    """Histories with what is to be guessed of them.

    Attributes:
        history: B users up to their moment, L events of the longest.
        hidden: bool [B, L], which events the network doesn't see.
        masked: those events, row by row.
        followed: bool [B], who has an event after the moment.
        following: the next event of each of those.
        covered: bool [B], whose days after the moment are over.
        spend: log(1 + spend) of those days, float32 [covered].
    """

    history: Batch
    hidden: Tensor
    masked: Targets
    followed: Tensor
    following: Targets
    covered: Tensor
    spend: Tensor

    def to(self, device: torch.device) -> Exercise:
        """The same on another device."""
        return Exercise(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Cut:
    """Histories of B users cut at a moment.

    Attributes:
        before: history columns of the events before the moment.
        after: history columns of the next event; none of a history that stayed whole.
        covered: bool [B], whose ``days`` after the moment lie before the as-of date.
        spend: float64 [B], money spent in those days.

    ``seq_age_days`` are the days to the moment, in either direction.
    """

    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    covered: np.ndarray
    spend: np.ndarray


def cut(columns: Mapping[str, np.ndarray], days: float, rng: np.random.Generator) -> Cut:
    """Cut histories at a moment.

    The moment is uniform between a user's first and last event, as an as-of date would be. Histories of fewer than two
    events stay whole.

    Args:
        columns: at least the history columns, an array of arrays each.
        days: after the moment, whose spend is added up.
        rng: of the moments.
    """
    ages = columns["seq_age_days"]
    places, moments, spend = [len(age) for age in ages], np.zeros(len(ages)), np.zeros(len(ages))
    for row, (age, share) in enumerate(zip(ages, rng.random(len(ages)), strict=True)):
        if len(age) > 1:
            moments[row] = moment = age[-1] + share * (age[0] - age[-1])
            places[row] = place = min(max(1, int((age > moment).sum())), len(age) - 1)
            soon = age[place:] > moment - days
            spend[row] = np.nansum(columns["seq_amount"][row][place:][soon], dtype=np.float64)
    before, after = ({name: np.empty(len(ages), object) for name in HISTORY_COLUMNS} for _ in range(2))
    for name in HISTORY_COLUMNS:
        for row, (values, place) in enumerate(zip(columns[name], places, strict=True)):
            before[name][row], after[name][row] = values[:place], values[place : place + 1]
    for row, moment in enumerate(moments):
        before["seq_age_days"][row] = (before["seq_age_days"][row] - moment).clip(0)
        after["seq_age_days"][row] = (moment - after["seq_age_days"][row]).clip(0)
    return Cut(before, after, moments >= days, spend)


def exercise(
    columns: Mapping[str, np.ndarray],
    history_length: int,
    vocabulary_ids: np.ndarray,
    config: PretrainingConfig,
    rng: np.random.Generator,
) -> Exercise:
    """Cut histories and hide events.

    Args:
        columns: at least the history columns, an array of arrays each.
        history_length: the most recent events before the moment that are read.
        vocabulary_ids: int64 [V], sorted: the texts the network knows.
        config: how many events to hide, and how many days to look ahead.
        rng: of moments and masks.

    Raises:
        DataError: the arrays of a history differ in length.
    """
    spec = InputSpec((), frozenset(), history_length)
    parts = cut(columns, config.days_ahead, rng)
    history, following = (collate(part, spec, vocabulary_ids) for part in (parts.before, parts.after))
    hidden = history.mask & torch.from_numpy(rng.random(tuple(history.mask.shape)) < config.mask_fraction)
    # The gap of the event after a hidden one would tell when that was.
    numeric = history.numeric.clone()
    numeric[..., GAP].masked_fill_(F.pad(hidden, (1, 0))[:, :-1], 0.0)
    spend = np.log1p(parts.spend[parts.covered].clip(min=0))
    return Exercise(
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
    """A history encoder with the heads that guess events.

    Args:
        config: sizes of the encoder.
        history_length: events of the longest history.
        text_embeddings: [V, D], the frozen language model's reading of the texts.
        temperature: of the choice among texts; the lower, the more the nearest wrong ones count.
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

    def forward(self, batch: Exercise) -> tuple[Tensor, Tensor]:
        """Sums of the losses of the :data:`PARTS`, float32 [9], and the numbers of their targets, float32 [9]."""
        encoder, mask = self.history, batch.history.mask
        events = encoder.events(batch.history)
        events = torch.where(batch.hidden.unsqueeze(-1), self.hidden.to(events.dtype), events)
        states = encoder.read(events, mask)
        # The text that stands for none is always among the wrong ones, so that there is one to compare with.
        texts = torch.cat([batch.masked.text, batch.following.text, batch.masked.text.new_zeros(1)]).unique()
        keys = F.normalize(self.key(F.embedding(texts, encoder.text_embeddings).to(self.hidden.dtype)), dim=-1)
        masked = self.of_masked(states[:, 1:][batch.hidden], batch.masked, texts, keys)
        users = encoder.pool(states, mask)
        following = self.of_next(users[batch.followed], batch.following, texts, keys)
        spend = self.of_days(users[batch.covered]).float().squeeze(-1)
        days = (0.5 * ((spend - batch.spend) ** 2).sum(dim=0, keepdim=True), batch.covered.sum(dim=0, keepdim=True))
        sums, counts = zip(masked, following, days, strict=True)
        return torch.cat(sums), torch.cat(counts)


class EventHead(nn.Module):
    """Guesses events from vectors of ``size``."""

    def __init__(self, size: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.body = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size))
        self.kind = nn.Linear(size, KINDS)
        self.numbers = nn.Linear(size, 2)
        self.text = nn.Linear(size, size)

    def forward(self, states: Tensor, targets: Targets, texts: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of N guesses.

        Args:
            states: [N, size].
            targets: what to guess.
            texts: int64 [U], sorted: the texts to choose among; those of the targets are in it.
            keys: [U, size], of length 1.

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
