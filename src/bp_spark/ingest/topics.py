"""Topics of consultations, without a training: by phrases of the settings, and by a language model that compares meanings.

A text that contains a phrase is about its topic. All other texts are embedded, and are about the topic of the phrase with the
largest cosine (zero-shot classification by sentence embeddings: Reimers & Gurevych 2019, "Sentence-BERT"). A text with a token
that the model doesn't know, as Chinese to an English model, can only be found by a phrase.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import TextsConfig, TopicsConfig
from bp_spark.ingest import texts


def of_platform() -> Column:
    """Return the topic that the platform gave a consultation; NULL where it is blank."""
    return F.nullif(F.trim("topic"), F.lit(""))


def with_phrase(talks: DataFrame, config: TopicsConfig) -> DataFrame:
    """Add ``text`` normalised and ``topic``: that of the longest phrase in the text, or NULL.

    Args:
        talks: ``text``.
        config: settings of topics.
    """
    # of equally long phrases the first of the settings
    ranked = sorted(_phrases(config.phrases), key=lambda pair: -len(pair[0]))
    text = F.col("text")
    topics = [F.when(_contains(text, phrase), F.lit(topic)) for phrase, topic in ranked]
    named = F.coalesce(*topics, F.lit(None).cast("string"))
    return talks.withColumn("text", texts.normalised(text)).withColumn("topic", named)


def by_meaning(talks: DataFrame, config: TopicsConfig, model: TextsConfig) -> DataFrame:
    """Return texts with the topic whose phrase comes nearest to each, in a pandas UDF on the executors.

    Args:
        talks: ``consultation_id``, ``text``, normalised.
        config: settings of topics.
        model: settings of the language model.

    Returns:
        ``consultation_id``, ``topic`` (NULL: no phrase is near enough), ``similarity`` (NULL: the model can't read the text).
    """
    folder, batch_size, max_tokens = texts.model_folder(model.model), model.batch_size, config.max_tokens
    pairs, least = _phrases(config.phrases), config.least_similarity

    def run(batches: Iterable[pd.DataFrame]) -> Iterable[pd.DataFrame]:
        phrases = [phrase for phrase, _ in pairs]
        usable = [pair for pair, known in zip(pairs, texts.readable(phrases, folder), strict=True) if known]
        anchors = texts.encode([phrase for phrase, _ in usable], folder, batch_size, max_tokens) if usable else None
        for batch in batches:
            found = pd.DataFrame({"consultation_id": batch["consultation_id"], "topic": None, "similarity": None})
            known = texts.readable(batch["text"].tolist(), folder)
            if anchors is not None and known.any():
                vectors = texts.encode(batch["text"][known].tolist(), folder, batch_size, max_tokens)
                cosines = vectors @ anchors.T
                nearest, similarity = cosines.argmax(axis=1), cosines.max(axis=1)
                found.loc[known, "topic"] = [
                    usable[at][1] if cosine >= least else None for at, cosine in zip(nearest, similarity, strict=True)
                ]
                found.loc[known, "similarity"] = similarity.astype("float64")
            yield found

    return talks.mapInPandas(run, "consultation_id string, topic string, similarity double")


def _phrases(phrases: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    """Return all phrases in lower case, each with its topic."""
    return [(phrase.lower(), topic) for topic, of_topic in phrases.items() for phrase in of_topic]


def _contains(text: Column, phrase: str) -> Column:
    """Return whether a normalised text contains a phrase: as whole words, but for Chinese, which has no spaces."""
    plain = texts.normalised(F.lit(phrase))
    spaced = F.concat(F.lit(" "), text, F.lit(" "))
    words = F.when(plain.rlike(r"\p{IsHan}"), plain).otherwise(F.concat(F.lit(" "), plain, F.lit(" ")))
    return F.contains(spaced, words)
