"""Read the file of texts that a network knows: their ids, their embeddings and, for a language model, their tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bp_spark.core.errors import DataError
from bp_spark.model.text_history import TokenTable


def read_vocabulary(path: Path) -> tuple[Tensor, Tensor]:
    """Return the ids of the texts, int64 [V], sorted, and their embeddings, float [V, D].

    Raises:
        DataError: the file is no such file.
    """
    try:
        tensors = load_file(str(path))
        ids, embeddings = tensors["ids"], tensors["embeddings"]
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(str(path), f"must be a safetensors file of ids and embeddings: {error}") from error
    if (ids.ndim, embeddings.ndim) != (1, 2) or len(ids) != len(embeddings):
        raise DataError(str(path), "must have one embedding per id")
    if (ids.diff() <= 0).any():
        raise DataError(str(path), "must be sorted and distinct", column="ids")
    return ids, embeddings


def read_tokens(path: Path) -> TokenTable:
    """Return the tokens that events are written with, for the texts of :func:`read_vocabulary` from the same file.

    Raises:
        DataError: the file holds no tokens, or not those of each text.
    """
    tensors = load_file(str(path))
    try:
        table = TokenTable(tensors["tokens"], tensors["token_lengths"])
    except (KeyError, ValueError) as error:
        raise DataError(str(path), f"must hold the tokens of words and texts: {error}") from error
    if table.texts != len(tensors["ids"]):
        raise DataError(str(path), "must have tokens of each text", column="tokens")
    return table


def vocabulary_digest(path: Path) -> str:
    """Return the SHA-256 of the file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
