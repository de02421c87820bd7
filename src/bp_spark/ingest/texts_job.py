"""From raw texts to ``texts`` and their embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import digest
from bp_spark.core.session import checkpointed, parallelism
from bp_spark.ingest import cleaning, texts
from bp_spark.lakehouse.run import Run, Step
from bp_spark.lakehouse.tables import TEXT_EMBEDDINGS, TEXTS


def replace_texts(run: Run, batch: Mapping[str, DataFrame], brands: DataFrame | None) -> None:
    """Store the texts of all raw rows, in the place of the stored ones."""
    step = Step.begin(run.lakehouse, TEXTS)
    step.replace(texts.distinct_texts(cleaning.texts(batch), brands, run.config.texts), after=step.version)


def add_texts(run: Run, batch: Mapping[str, DataFrame], brands: DataFrame | None) -> None:
    """Store the texts of the batch that are new."""
    step = Step.begin(run.lakehouse, TEXTS)
    batch_texts = cleaning.texts(batch).withColumn("text_id", texts.text_id(F.col("text")))
    new_texts = batch_texts.join(run.lakehouse.read("texts").select("text_id"), "text_id", "left_anti")
    rows = checkpointed(texts.distinct_texts(new_texts.drop("text_id"), brands, run.config.texts))
    if not rows.isEmpty():
        step.append(rows)


def embed(run: Run) -> None:
    """Embed the texts that the configured language model has not read yet."""
    lakehouse, config = run.lakehouse, run.config.texts
    model = texts.model_digest(config)
    with run.step("embed", TEXT_EMBEDDINGS, digest(model, lakehouse.version("texts"))) as step:
        if step.unchanged:
            return
        unread_texts, figures = lakehouse.read("texts"), step.figures
        has_embeddings = lakehouse.exists("text_embeddings")
        if has_embeddings:
            unread_texts = texts.unread(unread_texts, lakehouse.read("text_embeddings"), model)
        figures["rows_in"] = figures["rows_out"] = count = unread_texts.count()
        if not count and has_embeddings:
            # maintenance moved the version of texts, and brought no text
            return
        # each task loads the model once: one task per core, and one alone for a handful of texts
        tasks = min(parallelism(run.spark), math.ceil(count / texts.TEXTS_PER_TASK))
        step.append(texts.embed(unread_texts.repartition(max(1, tasks), "text_id"), config))
        figures["texts"] = lakehouse.read("text_embeddings").filter(F.col("model_digest") == model).count()
