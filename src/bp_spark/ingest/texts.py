"""Texts of the platform -> ``texts``, each distinct text once, and ``text_embeddings`` by a language model.

The language model is pre-trained and frozen. It reads each text once.
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

from bp_spark.core.config import TextsConfig, digest
from bp_spark.core.errors import PlatformError

if TYPE_CHECKING:
    import torch

MAX_CHARACTERS = 2_000
TEXTS_PER_TASK = 500
"""Texts per task; to embed fewer takes less time than to load the model."""
_RUN_LENGTHS = (2, 3, 4)
"""Lengths of the runs of Chinese characters that may be a term."""
PRAISE = (
    "excellent quality i love it",
    "great product works perfectly highly recommended",
    "very satisfied will buy again",
    "质量很好 非常喜欢",
    "很满意 值得推荐 会再次购买",
)
COMPLAINT = (
    "terrible quality i hate it",
    "broken product does not work waste of money",
    "very disappointed will never buy again",
    "质量很差 非常失望",
    "不满意 浪费钱 不会再买",
)


def normalised(text: Column) -> Column:
    """Return a text in lower case, with letters (and their marks), digits and single spaces only; NULL where that is empty."""
    # from the first character that belongs to no letter or digit to the next letter or digit
    between = r"^[^\p{L}\p{N}]+|[^\p{L}\p{M}\p{N}][^\p{L}\p{N}]*"
    plain = F.regexp_replace(F.lower(F.substring(text, 1, MAX_CHARACTERS)), between, " ")
    return F.nullif(F.trim(plain), F.lit(""))


def text_id(text: Column) -> Column:
    """Return the identity of a normalised text (xxhash64); NULL for NULL."""
    return F.when(text.isNotNull(), F.xxhash64(text))


def terms(text: Column) -> Column:
    """Return the terms of a normalised text: each may be a price word or a brand.

    Terms are words and pairs of neighbouring words. Chinese is written without spaces, so words with Chinese characters also
    give their runs of 2 to 4 characters.
    """
    words = F.split(text, " ")
    after = F.concat(F.slice(words, 2, F.size(words)), F.array(F.lit("")))
    pairs = F.zip_with(words, after, lambda one, other: F.trim(F.concat_ws(" ", one, other)))

    def runs(word: Column) -> Column:
        starts = F.sequence(F.lit(1), F.length(word))

        def of_length(size: int) -> Column:
            return F.transform(starts, lambda at: word.substr(at, F.lit(size)))

        all_runs = F.concat(*(of_length(size) for size in _RUN_LENGTHS))
        whole_runs = F.filter(all_runs, lambda run: F.length(run) >= min(_RUN_LENGTHS))
        return F.when(word.rlike(r"\p{IsHan}"), whole_runs).otherwise(F.array().cast("array<string>"))

    return F.array_distinct(F.concat(words, pairs, F.flatten(F.transform(words, runs))))


def distinct_texts(rows: DataFrame, brands: DataFrame | None, config: TextsConfig) -> DataFrame:
    """Return rows of TEXTS, each text once.

    Args:
        rows: ``text``, normalised, and ``ingest_id``; a text may repeat.
        brands: ``brand``, normalised, and ``known_from``: the source's brands, where it has items.
        config: settings of texts.
    """
    distinct = rows.groupBy("text").agg(F.min("ingest_id").alias("ingest_id"))
    identified = distinct.select(text_id(F.col("text")).alias("text_id"), "text", "ingest_id")
    # two texts with one hash would be one; with 64 bits that is all but impossible
    once = identified.groupBy("text_id").agg(F.min_by(F.struct("text", "ingest_id"), "text").alias("t"))
    counted = once.select("text_id", "t.*").withColumn("terms", terms(F.col("text")))
    for column, words in (("cheap_words", config.cheap_words), ("premium_words", config.premium_words)):
        price_words = F.array(*(normalised(F.lit(word)) for word in words)).cast("array<string>")
        counted = counted.withColumn(column, F.size(F.array_intersect("terms", price_words)))
    if brands is None:
        return counted.withColumn("brand_words", F.lit(0)).drop("terms")
    named = (
        counted.select("text_id", "ingest_id", F.explode("terms").alias("brand"))
        .join(brands, "brand")
        .filter(F.col("known_from") <= F.col("ingest_id"))
        .groupBy("text_id")
        .agg(F.count(F.lit(1)).cast("int").alias("brand_words"))
    )
    return counted.drop("terms").join(named, "text_id", "left").fillna(0, ["brand_words"])


def unread(texts: DataFrame, embeddings: DataFrame, model_digest: str) -> DataFrame:
    """Return the texts that the model with this digest has not embedded."""
    embedded = embeddings.filter(F.col("model_digest") == model_digest).select("text_id")
    return texts.join(embedded, "text_id", "left_anti")


def embed(texts: DataFrame, config: TextsConfig) -> DataFrame:
    """Embed texts with the configured model, in a pandas UDF on the executors.

    Args:
        texts: ``text_id``, ``text``.
        config: settings of texts.

    Returns:
        ``text_id``, ``model_digest``, ``embedding`` (float32 [D], mean over tokens, unit length: Reimers & Gurevych 2019),
        ``sentiment``: half of the cosine to the mean of praising sentences minus that to the mean of complaining sentences.
    """
    folder, batch_size, max_tokens = model_folder(config.model), config.batch_size, config.max_tokens

    def run(batches: Iterable[pd.DataFrame]) -> Iterable[pd.DataFrame]:
        axis = None
        for batch in batches:
            if axis is None:
                praise, complaint = (
                    encode(list(anchors), folder, batch_size, max_tokens) for anchors in (PRAISE, COMPLAINT)
                )
                axis = (praise.mean(0) - complaint.mean(0)) / 2
            vectors = encode(batch["text"].tolist(), folder, batch_size, max_tokens)
            yield pd.DataFrame({"text_id": batch["text_id"], "embedding": list(vectors), "sentiment": vectors @ axis})

    return texts.mapInPandas(run, "text_id bigint, embedding array<float>, sentiment float").select(
        "text_id", F.lit(model_digest(config)).alias("model_digest"), "embedding", "sentiment"
    )


def encode(texts: list[str], folder: str, batch_size: int, max_tokens: int) -> Any:
    """Return the embeddings of texts, float32 [texts, D] of unit length, by the model in a folder."""
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


def readable(texts: list[str], folder: str) -> Any:
    """Return which texts the model in a folder can read: it knows all their tokens. Boolean [texts].

    An English model knows hardly a Chinese character: to it, all Chinese texts are alike.
    """
    import numpy as np

    tokenizer, _ = _model(folder)
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.array([tokenizer.unk_token_id not in ids for ids in tokens], dtype=bool)


def _mean_pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    import torch

    weights = mask.unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)


@lru_cache(maxsize=1)
def _model(folder: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    # a task has one core, and more threads would only compete for it
    torch.set_num_threads(1)
    # a bar for each worker, which is full at once
    disable_progress_bar()  # type: ignore[no-untyped-call]
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, use_safetensors=True).eval()


def model_folder(name: str) -> str:
    """Return the folder or hub name of a configured model; ``package:NAME`` asks the package for its folder.

    Raises:
        PlatformError: the folder is missing, the package is not installed or holds no model, or the weights are no safetensors:
            other weights would be unpickled.
    """
    folder = _named_folder(name)
    if Path(folder).is_dir() and not any(Path(folder).glob("*.safetensors")):
        raise PlatformError(f"texts.model: {folder} holds no safetensors, and weights in another form are not loaded")
    return folder


def _named_folder(name: str) -> str:
    if not name.startswith("package:"):
        if name.startswith(("/", "./", "../")) and not Path(name).is_dir():
            raise PlatformError(f"texts.model: there is no folder {name}")
        return name
    package = name.removeprefix("package:")
    try:
        return str(importlib.import_module(package).get_model_path())
    except ImportError as error:
        raise PlatformError(f"texts.model: the package {package} is not installed") from error
    except AttributeError as error:
        raise PlatformError(f"texts.model: the package {package} has no get_model_path()") from error


def model_digest(config: TextsConfig) -> str:
    """Return the identity of the embeddings: a digest of the model's files (or hub name) and of the settings that matter."""
    folder = Path(model_folder(config.model))
    if not folder.is_dir():
        return digest(config.model, config.max_tokens, PRAISE, COMPLAINT)
    weights = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        weights.update(f"{file.relative_to(folder)}:{file.stat().st_size}".encode())
        if file.suffix in (".safetensors", ".json", ".txt"):
            with file.open("rb") as stream:
                weights.update(hashlib.file_digest(stream, "sha256").digest())
    return digest(weights.hexdigest(), config.max_tokens, PRAISE, COMPLAINT)
