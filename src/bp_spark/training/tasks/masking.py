"""Hide tokens of texts, and let a language model guess them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bp_spark.training.loader import split_sizes

POOL_BATCHES = 16
"""Batches whose texts are sorted by length together: enough for little padding, few enough to stay random."""

_MASKED, _MASKED_OR_KEPT = 0.8, 0.9
"""Shares of the chosen tokens that become the mask token, and that become it or stay."""


@dataclass(frozen=True)
class Masking:
    """Rule by which tokens are hidden (Devlin et al. 2019, 3.1).

    Each token that is not special is chosen with a chance of ``share``. Of the chosen tokens, 80 % become the mask token, 10 %
    become another ordinary token, and 10 % stay.

    Attributes:
        share: share of the tokens that the model has to guess.
        mask_id: the mask token.
        special: bool [V], tokens that are never hidden and never replace others (mask, padding, unknown and so on).
    """

    share: float
    mask_id: int
    special: Tensor

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, share: float) -> Masking:
        """Return the rule with the special tokens of a tokenizer."""
        special = torch.zeros(len(tokenizer), dtype=torch.bool)
        special[tokenizer.all_special_ids] = True
        return cls(share, int(tokenizer.mask_token_id), special)

    def __call__(self, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Hide tokens.

        Args:
            ids: int64 [...], token ids.
            generator: source of the random numbers.

        Returns:
            ``ids`` with tokens hidden, and which tokens were chosen, bool; both have the shape of ``ids``.
        """
        chosen = (torch.rand(ids.shape, generator=generator) < self.share) & ~self.special[ids]
        fate = torch.rand(ids.shape, generator=generator)
        ordinary = (~self.special).nonzero().squeeze(1)
        others = ordinary[torch.randint(len(ordinary), ids.shape, generator=generator)]
        hidden = torch.where(chosen & (fate < _MASKED), self.mask_id, ids)
        return torch.where(chosen & (fate >= _MASKED_OR_KEPT), others, hidden), chosen


class MaskedLanguageModel(nn.Module):
    """Any ``AutoModelForMaskedLM`` whose head reads the chosen tokens only.

    A head over a vocabulary of tens of thousands costs as much as a small encoder. Tokens that the model need not guess would
    waste that work, so the encoder's states are narrowed to the chosen tokens before the head reads them.
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
        """Return scores of every token of the vocabulary at the chosen positions, [chosen, V]."""
        self._chosen = chosen
        logits: Tensor = self.model(input_ids=ids, attention_mask=attention).logits
        return logits.squeeze(0)


@dataclass(frozen=True)
class TokenizedTexts:
    """One rank's texts as tokens, and the number of steps in which all ranks pass over their texts.

    Attributes:
        tokens: object [N] of int32 arrays, with special tokens.
        steps: number of batches of one pass.
        rows: number of texts of all ranks.
        padding_id: the padding token.
        filler_id: the token of a batch without a text.
    """

    tokens: np.ndarray
    steps: int
    rows: int
    padding_id: int
    filler_id: int

    def epoch(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all texts, each once, in ``steps`` batches: ids int64 and attention int64, both [texts, longest].

        Ranks that pass the same seed get batches of similar length at the same step. Without a text left, the batch is one
        filler. That is a special token, which the model never has to guess: a rank takes part in every step.
        """
        text_rng = np.random.default_rng([seed, len(self.tokens)])
        batch_rng = np.random.default_rng(seed)
        edges = np.cumsum([0, *split_sizes(len(self.tokens), self.steps)])
        order = text_rng.permutation(len(self.tokens))
        for first in range(0, self.steps, POOL_BATCHES):
            pool = edges[first : first + POOL_BATCHES + 1]
            picked = order[pool[0] : pool[-1]]
            by_length = picked[np.argsort([len(self.tokens[text]) for text in picked], kind="stable")]
            parts = np.split(by_length, pool[1:-1] - pool[0])
            for part in batch_rng.permutation(len(parts)):
                yield self._padded(self.tokens[parts[part]])

    def _padded(self, texts: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = list(texts) or [np.array([self.filler_id])]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), self.padding_id)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        return ids, (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()


@dataclass(frozen=True)
class MaskedBatch:
    """A batch with hidden tokens: ids int64, attention int64 and chosen bool, all [texts, longest]; targets int64 [chosen]."""

    ids: Tensor
    attention: Tensor
    chosen: Tensor
    targets: Tensor

    def __getitem__(self, rows: slice) -> MaskedBatch:
        """Return some of the texts."""
        before = int(self.chosen[: rows.start].sum())
        chosen = self.chosen[rows]
        return MaskedBatch(
            self.ids[rows], self.attention[rows], chosen, self.targets[before : before + int(chosen.sum())]
        )
