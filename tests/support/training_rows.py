"""Small synthetic training tables, shared by the tests of the loader, the network and the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from deltalake import write_deltalake
from safetensors.torch import save_file

from bp_spark.model.inputs import InputSpec

SPEC = InputSpec(tabular=("recency", "spend_90d"), log_scaled=frozenset({"spend_90d"}), history_length=12)
TEXT_IDS = np.array([-700, -5, 3, 40, 2**60], np.int64)
TEXTS = ("milk", "oat milk", "bread", "tea", "a rather long text")
"""Of those ids."""

_TYPES = {
    "seq_kind": pa.int32(),
    "seq_age_days": pa.float32(),
    "seq_amount": pa.float32(),
    "seq_items": pa.float32(),
    "seq_discount": pa.float32(),
    "seq_text_id": pa.int64(),
    "seq_weekday": pa.int32(),
    "seq_hour": pa.int32(),
}


def arrays(values: Sequence[np.ndarray]) -> np.ndarray:
    """An object array of arrays, whatever their lengths."""
    out = np.empty(len(values), object)
    for index, value in enumerate(values):
        out[index] = value
    return out


def make_rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Users whose spend follows from their last order and a feature; about a fifth has no history and no spend."""
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(count) < 0.2, 0, rng.integers(1, SPEC.history_length + 1, count))
    level = np.exp(rng.normal(3, 1, count))
    columns: dict[str, np.ndarray] = {"user_key": np.array([f"user{n}" for n in range(count)])}
    columns["row"] = np.arange(count, dtype=np.float64)
    columns["label_spend"] = np.where(lengths > 0, level * np.exp(rng.normal(0, 0.2, count)), 0.0)
    columns["label_spend_30d"] = 0.4 * columns["label_spend"]
    # seen whole of the older cutoffs only
    columns["label_spend_180d"] = np.where(columns["row"] < 0.8 * count, 2 * columns["label_spend"], np.nan)
    columns["recency"] = np.where(rng.random(count) < 0.1, np.nan, rng.random(count) * 100)
    columns["spend_90d"] = np.where(lengths > 0, level * np.exp(rng.normal(0, 0.5, count)), 0.0)
    make = {
        "seq_kind": lambda n, _: rng.integers(1, 9, n),
        "seq_age_days": lambda n, _: np.sort(rng.random(n) * 200 + 0.1)[::-1],
        "seq_amount": lambda n, user: level[user] * np.exp(rng.normal(0, 0.1, n)),
        "seq_items": lambda n, _: rng.integers(1, 20, n),
        "seq_discount": lambda n, _: rng.random(n),
        "seq_text_id": lambda n, _: rng.choice([0, 17, *TEXT_IDS], n),
        "seq_weekday": lambda n, _: rng.integers(1, 8, n),
        "seq_hour": lambda n, _: rng.integers(0, 24, n),
    }
    for name, one in make.items():
        dtype = _TYPES[name].to_pandas_dtype()
        columns[name] = arrays([one(n, user).astype(dtype) for user, n in enumerate(lengths)])
    return columns


def take(columns: dict[str, np.ndarray], rows: np.ndarray | slice) -> dict[str, np.ndarray]:
    """Some of the rows."""
    return {name: values[rows] for name, values in columns.items()}


def write_table(
    path: Path, columns: dict[str, np.ndarray], split: str = "train", files: Sequence[int] | None = None
) -> None:
    """Append the rows to a Delta table, as files of the given numbers of rows (one file if not given)."""
    table = pa.table(
        {
            name: pa.array(list(values), pa.list_(_TYPES[name])) if name in _TYPES else pa.array(values)
            for name, values in columns.items()
        }
    )
    table = table.append_column("split", pa.array([split] * len(table)))
    start = 0
    for rows in files or [len(table)]:
        write_deltalake(str(path), table.slice(start, rows), mode="append", partition_by=["split"])
        start += rows
    assert start == len(table)


def write_splits(path: Path, train: Sequence[int], valid: Sequence[int]) -> None:
    """Write rows to train on and rows to validate by, as files of the given numbers of rows."""
    for seed, (split, files) in enumerate({"train": train, "valid": valid}.items(), start=1):
        write_table(path, make_rows(sum(files), seed), split, files)


def write_texts(path: Path, model: Path | None = None) -> Path:
    """A vocabulary with embeddings of 6 numbers and, for a language model, the tokens of :data:`TEXTS`."""
    embeddings = torch.from_numpy(np.random.default_rng(1).normal(size=(len(TEXT_IDS), 6)).astype(np.float32))
    tensors = {"ids": torch.from_numpy(TEXT_IDS), "embeddings": embeddings}
    if model is not None:
        from bp_spark.model.text_history import tokenise

        table = tokenise(TEXTS, str(model), 8, 64)
        tensors |= {"tokens": table.tokens, "token_lengths": table.lengths}
    save_file(tensors, str(path))
    return path


def write_language_model(path: Path, kind: str) -> Path:
    """A tiny ``bert``, ``gpt2`` or ``qwen`` of random weights with a tokenizer of letters and the word *milk*."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2Model,
        PreTrainedTokenizerFast,
        Qwen3Config,
        Qwen3Model,
    )

    torch.manual_seed(1)
    if kind == "bert":
        letters = "abcdefghijklmnopqrstuvwxyz0123456789"
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        words = [*special.values(), "milk", *letters, *(f"##{letter}" for letter in letters)]
        vocabulary = {word: number for number, word in enumerate(words)}
        pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        pieces.pre_tokenizer = pre_tokenizers.Whitespace()
        frame = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
        pieces.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
        pieces.decoder = decoders.WordPiece()
        BertModel(
            BertConfig(
                vocab_size=len(words),
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=96,
            )
        ).save_pretrained(path)
    else:
        special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        words = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "mi", "lk", "milk"]
        vocabulary = {word: number for number, word in enumerate(words)}
        pieces = Tokenizer(models.BPE(vocabulary, [("m", "i"), ("l", "k"), ("mi", "lk")]))
        pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        pieces.decoder = decoders.ByteLevel()
        if kind == "gpt2":
            sizes = GPT2Config(
                vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, n_positions=96, bos_token_id=0, eos_token_id=0
            )
            GPT2Model(sizes).save_pretrained(path)
        else:
            # a start token is none of Qwen's: its texts begin with their first word
            special["pad_token"] = special.pop("bos_token")
            rotated = Qwen3Config(
                vocab_size=len(words),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=40_960,
            )
            Qwen3Model(rotated).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=pieces, model_max_length=96, **special).save_pretrained(path)
    return path
