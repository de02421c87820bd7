"""Distinct texts -> embeddings by a frozen, pre-trained language model; each text is read once per model, ever.

In: ``texts`` (text_id, text). Out: rows of ``text_embeddings`` for those texts that the model has not read yet.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.config import TextsConfig, digest
from bp_spark.errors import PlatformError

if TYPE_CHECKING:
    import torch

MAX_CHARACTERS = 2_000


def normalised(text: Column) -> Column:
    """Lower case, letters and digits of any script, single spaces; NULL where nothing is left."""
    plain = F.regexp_replace(F.lower(F.substring(text, 1, MAX_CHARACTERS)), r"[^\p{L}\p{N}]+", " ")
    return F.nullif(F.trim(plain), F.lit(""))


def text_id(text: Column) -> Column:
    """Identity of a normalised text (xxhash64); NULL for NULL."""
    return F.when(text.isNotNull(), F.xxhash64(text))


def distinct_texts(texts: DataFrame) -> DataFrame:
    """Rows of TEXTS from a column ``text`` of normalised texts, each once."""
    known = texts.filter(F.col("text").isNotNull()).select(text_id(F.col("text")).alias("text_id"), "text")
    return known.groupBy("text_id").agg(F.min("text").alias("text"))


def unread(texts: DataFrame, embeddings: DataFrame, model_digest: str) -> DataFrame:
    """The texts that the model with this digest has not embedded."""
    read = embeddings.filter(F.col("model_digest") == model_digest).select("text_id")
    return texts.join(read, "text_id", "left_anti")


def embed(texts: DataFrame, config: TextsConfig) -> DataFrame:
    """Embed texts with the configured model, in a pandas UDF on the executors.

    Args:
        texts: ``text_id``, ``text``.

    Returns:
        ``text_id``, ``model_digest``, ``embedding`` (float32 [D], mean over tokens, unit length: Reimers & Gurevych 2019).
    """
    folder, batch_size, max_tokens = model_folder(config.model), config.batch_size, config.max_tokens

    def run(batches: Iterable[pd.DataFrame]) -> Iterable[pd.DataFrame]:
        for batch in batches:
            vectors = _encode(batch["text"].tolist(), folder, batch_size, max_tokens)
            yield pd.DataFrame({"text_id": batch["text_id"], "embedding": list(vectors)})

    return texts.mapInPandas(run, "text_id bigint, embedding array<float>").select(
        "text_id", F.lit(model_digest(config)).alias("model_digest"), "embedding"
    )


def _encode(texts: list[str], folder: str, batch_size: int, max_tokens: int) -> Any:
    import numpy as np
    import torch

    tokenizer, model = _model(folder)
    order = np.argsort([len(text) for text in texts], kind="stable")
    vectors = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            rows = order[start : start + batch_size]
            tokens = tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=max_tokens,
                return_tensors="pt",
            )
            vectors[rows] = _mean_pooled(model(**tokens).last_hidden_state, tokens["attention_mask"]).numpy()
    return vectors


def _mean_pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    import torch

    weights = mask.unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)


@lru_cache(maxsize=1)
def _model(folder: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    # One task has one core: more threads would only fight for it.
    torch.set_num_threads(1)
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def model_folder(name: str) -> str:
    """Folder or hub name of a configured model; ``package:NAME`` asks the package for its folder.

    Raises:
        PlatformError: the package is not installed.
    """
    if not name.startswith("package:"):
        return name
    package = name.removeprefix("package:")
    try:
        return str(importlib.import_module(package).get_model_path())
    except ImportError as error:
        raise PlatformError(f"texts.model: the package {package} is not installed") from error


def model_digest(config: TextsConfig) -> str:
    """Identity of the embeddings: digest of the model's files (or its hub name) and of the settings that change them."""
    folder = Path(model_folder(config.model))
    if not folder.is_dir():
        return digest(config.model, config.max_tokens)
    weights = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        weights.update(f"{file.relative_to(folder)}:{file.stat().st_size}".encode())
        if file.suffix in (".safetensors", ".json", ".txt"):
            with file.open("rb") as stream:
                weights.update(hashlib.file_digest(stream, "sha256").digest())
    return digest(weights.hexdigest(), config.max_tokens)
