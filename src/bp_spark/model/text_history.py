"""The history encoder that reads events as text by a language model: a user's events in, one vector out.

An event is written in four parts: its kind, a round amount, a round age and its text, as in *purchase 20 2 weeks soft
drinks*. Each part is a row of a :class:`TokenTable` that :func:`tokenise` makes once, so a batch of histories becomes
tokens by look-ups alone. The language model's own weights are frozen. Low-rank adaptation (LoRA, Hu et al. 2021,
arXiv:2106.09685) tunes the model, and is merged into the weights for scoring.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig
from transformers import logging as transformers_logging
from transformers.pytorch_utils import Conv1D

from bp_spark.core.config import NetworkConfig
from bp_spark.core.errors import BundleError, ConfigError
from bp_spark.lakehouse.tables import KINDS
from bp_spark.model.history import pooled
from bp_spark.model.inputs import AGE, AMOUNT, Batch

AMOUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000)
"""Round amounts: an amount is written as the next one, if it is none itself."""
AGES = {
    "1 day": 1,
    "3 days": 3,
    "1 week": 7,
    "2 weeks": 14,
    "1 month": 30,
    "2 months": 60,
    "3 months": 90,
    "6 months": 180,
    "1 year": 365,
}
"""Round ages in days: an age is written as the next one, if it is none itself."""

_KINDS = ("event", *KINDS)
_AMOUNTS = ("refund", "", *map(str, AMOUNTS), "1000000")
_AGES = (*AGES, "years")
_WORDS = (*_KINDS, *_AMOUNTS, *_AGES)
_AMOUNT_ROW, _AGE_ROW = len(_KINDS), len(_KINDS) + len(_AMOUNTS)
_START, _END, _TEXT_ROW = len(_WORDS), len(_WORDS) + 1, len(_WORDS) + 2
_SMALLEST = 1e-6
_EVENT_TOKENS = 8
"""Mean tokens of an event with its text, for an estimate of a history's length."""
_LANGUAGE = "language."
_LARGEST, _POSITIONS = 1_000_000, 262_144
"""Largest number and most tokens of a history in a language model's configuration."""
_REASON = 200


@dataclass(frozen=True)
class TokenTable:
    """The parts of events in tokens.

    Attributes:
        tokens: int32 [R, W], padded with 0. First the words of kinds, amounts and ages, then the start and the end of a
            history. An empty row for no text follows, then the V texts of the vocabulary in its order.
        lengths: int32 [R], tokens of each row.
    """

    tokens: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 + self.lengths.ndim or self.lengths.shape != self.tokens.shape[:1] or self.texts < 0:
            raise ValueError("must have a length for each row, and a row for each word")

    @property
    def texts(self) -> int:
        """How many texts the table has, V."""
        return len(self.lengths) - _TEXT_ROW - 1


def tokenise(texts: Sequence[str], folder: str, text_tokens: int, history_tokens: int) -> TokenTable:
    """Write words and texts in the tokens of a language model.

    Args:
        texts: in the order of the vocabulary.
        folder: of the model and its tokenizer, or its hub name.
        text_tokens: most tokens of a text; the rest is cut off.
        history_tokens: most tokens of a whole history; the model must be able to read so many.

    Raises:
        ConfigError: the model can't read histories as text, or none of that length.
    """
    try:
        config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"network.text.model: {folder} is no language model with a tokenizer: {reason}") from error
    if config.is_encoder_decoder:
        raise ConfigError(f"network.text.model: {folder} has an encoder and a decoder; only one of them can be used")
    limit = min(getattr(config, "max_position_embeddings", history_tokens), tokenizer.model_max_length)
    if history_tokens > limit:
        raise ConfigError(
            f"network.text.max_tokens: {history_tokens} is more than the {limit} tokens {folder} can read"
        )
    # The leading space marks the beginning of a word for tokenizers of the GPT-2 kind.
    written = tokenizer(
        [f" {text}" for text in (*_WORDS, *texts)], add_special_tokens=False, truncation=True, max_length=history_tokens
    )["input_ids"]
    start, end = _frame(tokenizer, folder)
    rows = [*written[: len(_WORDS)], start, end, [], *(ids[:text_tokens] for ids in written[len(_WORDS) :])]
    rows[_AMOUNT_ROW + _AMOUNTS.index("")] = []
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    tokens = np.zeros((len(rows), int(lengths.max())), np.int32)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = np.concatenate([np.array(row, np.int32) for row in rows])
    return TokenTable(torch.from_numpy(tokens), torch.from_numpy(lengths))


def _frame(tokenizer: Any, folder: str) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer puts before and behind a text.

    There is at least one before it, so that an empty history has a token too.
    """
    example = tokenizer(f" {KINDS[0]}", return_special_tokens_mask=True)
    ids, added = list(example["input_ids"]), list(example["special_tokens_mask"])
    start, end = ids[: added.index(0)], ids[len(ids) - added[::-1].index(0) :]
    if not start:
        ends = (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        start = [token for token in ends if token is not None][:1]
    if not start:
        raise ConfigError(f"network.text.model: the tokenizer of {folder} has no token for the start of a text")
    return start, end


class TextHistoryEncoder(nn.Module):
    """Reads histories as text. The frozen weights of the language model are not part of its state.

    Args:
        config: sizes and pooling.
        language: the language model, of :func:`adapted` or :func:`restore_text_encoder`.
        table: the parts of events in tokens.

    Raises:
        ConfigError: a history has too few tokens for one event.
    """

    tokens: Tensor
    lengths: Tensor
    amount_edges: Tensor
    age_edges: Tensor

    def __init__(self, config: NetworkConfig, language: nn.Module, table: TokenTable) -> None:
        super().__init__()
        self.config = config
        self.language = language
        lengths = table.lengths.long()
        self.room = config.text.max_tokens - int(lengths[_START] + lengths[_END])
        parts = (lengths[:_AMOUNT_ROW], lengths[_AMOUNT_ROW:_AGE_ROW], lengths[_AGE_ROW:_START])
        for_text = self.room - sum(int(part.max()) for part in parts)
        if for_text < 1:
            least = config.text.max_tokens - for_text + 1
            raise ConfigError(f"network.text.max_tokens: must be at least {least}, for one event")
        self.register_buffer("tokens", table.tokens, persistent=False)
        self.register_buffer("lengths", lengths.clamp(max=for_text).int(), persistent=False)
        self.register_buffer("amount_edges", _log1p(-_SMALLEST, 0, *AMOUNTS), persistent=False)
        self.register_buffer("age_edges", _log1p(*AGES.values()), persistent=False)
        language_config: Any = language.config
        width, self.padding = language_config.hidden_size, language_config.pad_token_id or 0
        self.pooling_score = nn.Linear(width, 1) if config.pooling == "attention" else None
        self.project = nn.Sequential(nn.Linear(width, config.hidden_size), nn.LayerNorm(config.hidden_size))
        module: Any = self
        module.register_state_dict_post_hook(_leave_out_frozen)
        module.register_load_state_dict_pre_hook(_put_in_frozen)

    def forward(self, batch: Batch) -> Tensor:
        """Return one vector for each user, [B, hidden_size]."""
        ids, seen = self.tokens_of(batch)
        states = self.language(input_ids=ids, attention_mask=seen.long()).last_hidden_state
        vectors: Tensor = self.project(pooled(states, seen, self.pooling_score))
        return vectors

    def tokens_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Write histories as tokens, oldest event first; the oldest events are left out where there is no room.

        Returns:
            Ids, int64 [B, T], and whether each is a token, bool [B, T]; padding follows the tokens.
        """
        amount, age = batch.numeric[..., AMOUNT].contiguous(), batch.numeric[..., AGE].contiguous()
        parts = (
            batch.kind,
            _AMOUNT_ROW + torch.bucketize(amount, self.amount_edges),
            _AGE_ROW + torch.bucketize(age, self.age_edges),
            _TEXT_ROW + batch.text,
        )
        rows = torch.stack(parts, dim=-1)
        lengths = self.lengths[rows] * batch.mask.unsqueeze(-1)
        up_to_now = lengths.sum(dim=-1).flip(1).cumsum(dim=1).flip(1)
        lengths = lengths * (up_to_now <= self.room).unsqueeze(-1)

        start, end = (rows.new_full((len(rows), 1), row) for row in (_START, _END))
        rows = torch.cat([start, rows.flatten(1), end], dim=1)
        lengths = torch.cat([self.lengths[start], lengths.flatten(1), self.lengths[end]], dim=1)
        ends = lengths.cumsum(dim=1)
        positions = torch.arange(int(ends[:, -1].max()), device=rows.device).expand(len(rows), -1).contiguous()
        part = torch.searchsorted(ends, positions, right=True)
        seen = part < rows.shape[1]
        part = part.clamp(max=rows.shape[1] - 1)
        column = (positions - (ends - lengths).gather(1, part)).clamp(max=self.tokens.shape[1] - 1)
        return self.tokens[rows.gather(1, part), column].long().masked_fill(~seen, self.padding), seen

    def widths(self, lengths: np.ndarray) -> np.ndarray:
        """Return estimates of the tokens of histories of so many events, int64 [B], capped at ``text.max_tokens``."""
        return np.asarray(np.minimum((lengths + 1) * _EVENT_TOKENS, self.config.text.max_tokens))

    def merged(self) -> TextHistoryEncoder:
        """Return the same encoder with the low-rank changes merged into the language model's weights."""
        merge = getattr(self.language, "merge_and_unload", None)
        if merge is None:
            return self
        twin = copy.deepcopy(self)
        twin.language = twin.language.merge_and_unload().requires_grad_(False)  # type: ignore[operator]
        return twin

    def bundle_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a bundle holds beside the state of a merged encoder; see :func:`restore_text_encoder`."""
        weights = {f"{_LANGUAGE}{name}": tensor for name, tensor in self.language.state_dict().items()}
        return {"tokens": self.tokens, "token_lengths": self.lengths, **weights}

    def bundle_description(self) -> dict[str, Any]:
        """Return the language model's configuration as plain JSON."""
        config: dict[str, Any] = json.loads(self.language.config.to_json_string(use_diff=False))  # type: ignore
        return {"language": {key: value for key, value in config.items() if key != "_name_or_path"}}


def adapted(folder: str, config: NetworkConfig) -> nn.Module:
    """Return a pre-trained language model whose linear layers are tuned by low-rank adaptation, all else frozen.

    Args:
        folder: of the model, or its hub name.
        config: rank, scale and dropout of the adaptation.
    """
    from peft import LoraConfig, get_peft_model

    quiet: Any = transformers_logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    model = _without_unused_layers(AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True))
    settings = config.text
    if settings.recompute:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    low_rank = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return get_peft_model(model, low_rank)


def restore_text_encoder(
    config: NetworkConfig, vocabulary: int, language: Any, tensors: dict[str, Tensor], path: Path
) -> TextHistoryEncoder:
    """Return the encoder of a bundle's tensors; the encoder's own layers are still untrained.

    Args:
        config: sizes and pooling.
        vocabulary: number of texts.
        language: the language model's configuration, of :meth:`TextHistoryEncoder.bundle_description`.
        tensors: of the bundle; those of :meth:`TextHistoryEncoder.bundle_tensors` are removed.
        path: file of the tensors, for the message.

    Raises:
        BundleError: the tensors don't make a language model and a table of tokens.
    """
    weights = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_LANGUAGE)}
    try:
        table = TokenTable(tensors.pop("tokens"), tensors.pop("token_lengths"))
        if table.texts != vocabulary:
            raise ValueError(f"tokens of {table.texts} texts, not {vocabulary}")
        if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in weights.values()):
            raise ValueError("weights must be of float32")
        language_config = _language_config(language, config.text.max_tokens, len(weights))
        _require_tokens(table, int(language_config.vocab_size))
        auto_model: Any = AutoModel
        model = _without_unused_layers(auto_model.from_config(language_config)).requires_grad_(False)
        model.load_state_dict({name.removeprefix(_LANGUAGE): tensor for name, tensor in weights.items()}, assign=True)
        return TextHistoryEncoder(config, model, table)
    except Exception as error:
        # Transformers raises errors of any class for a configuration that makes no sense.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleError(f"{path}: no language model that reads histories: {reason[:_REASON]}") from error


def _language_config(language: Any, max_tokens: int, tensors: int) -> PreTrainedConfig:
    """Return a language model's configuration.

    Args:
        language: its JSON.
        max_tokens: tokens of the longest history.
        tensors: how many tensors the language model has.

    Raises:
        ValueError: a size is beyond all limits, or the configuration would fetch another model.
    """
    values = dict(language)
    if any("backbone" in name or (isinstance(value, int) and abs(value) > _LARGEST) for name, value in values.items()):
        raise ValueError("its configuration has a part of another model, or a number beyond all limits")
    config: PreTrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
    if not 0 < int(config.num_hidden_layers) <= tensors:
        raise ValueError("there are fewer tensors than layers")
    if not max_tokens <= int(getattr(config, "max_position_embeddings", max_tokens)) <= _POSITIONS:
        raise ValueError("it can't read so many tokens")
    return config


def _require_tokens(table: TokenTable, vocabulary: int) -> None:
    """Make sure that rows of a table lie within it, and its tokens within a language model's vocabulary."""
    if not table.tokens.numel() or {table.tokens.dtype, table.lengths.dtype} != {torch.int32}:
        raise ValueError("tokens must be rows of whole numbers")
    lengths, tokens = (torch.stack(tensor.aminmax()).tolist() for tensor in (table.lengths, table.tokens))
    if lengths[0] < 0 or lengths[1] > table.tokens.shape[1] or tokens[0] < 0 or tokens[1] >= vocabulary:
        raise ValueError("tokens are beyond the table or the vocabulary")


def _without_unused_layers(model: Any) -> Any:
    """Return the model without its pooler and cache; a layer that gets no gradient would stop DDP."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    model.config.use_cache = False
    return model


def _log1p(*values: float) -> Tensor:
    numbers = np.asarray(values, np.float64)
    return torch.from_numpy((np.sign(numbers) * np.log1p(np.abs(numbers))).astype(np.float32))


def _frozen(module: nn.Module) -> Mapping[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}


def _leave_out_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for name in _frozen(module):
        del state[prefix + name]


def _put_in_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    state.update({prefix + name: parameter.data for name, parameter in _frozen(module).items()})
