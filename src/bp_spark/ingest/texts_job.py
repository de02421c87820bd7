"""From raw texts to ``texts`` and their embeddings, and from consultations to their topics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import digest
from bp_spark.core.session import checkpointed, parallelism, persisted
from bp_spark.ingest import cleaning, texts, topics
from bp_spark.lakehouse.run import Run, Step
from bp_spark.lakehouse.tables import CONSULTATION_TOPICS, TEXT_EMBEDDINGS, TEXTS


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
        step.append(texts.embed(_by_task(unread_texts, count, "text_id"), config))
        figures["texts"] = lakehouse.read("text_embeddings").filter(F.col("model_digest") == model).count()


def find_topics(run: Run) -> None:
    """Find topics of the consultations that the platform named none for, and that have none yet by these settings and model."""
    lakehouse, config = run.lakehouse, run.config.topics
    exists = lakehouse.exists(CONSULTATION_TOPICS.name)
    if not lakehouse.exists("consultations") or not (config.phrases or exists):
        return
    made_by = digest(texts.model_digest(run.config.texts), config)
    with run.step("topics", CONSULTATION_TOPICS, digest(made_by, lakehouse.version("consultations"))) as step:
        if step.unchanged:
            return
        names = CONSULTATION_TOPICS.schema.names
        unnamed = topics.of_platform().isNull() & F.col("text").isNotNull()
        talks = lakehouse.read("consultations").filter(unnamed).drop("topic")
        stored = (
            lakehouse.read(CONSULTATION_TOPICS.name)
            if exists
            else run.spark.createDataFrame([], CONSULTATION_TOPICS.schema)
        )
        # the text of a consultation doesn't change: another text is another consultation
        kept = stored.filter(F.col("made_by") == made_by).join(talks, "consultation_id", "left_semi").select(*names)
        new = talks.join(kept, "consultation_id", "left_anti")
        with _with_topics(run, new) as (found, count):
            rows = found.withColumn("made_by", F.lit(made_by)).select(*names)
            if not exists or kept.count() < stored.count():
                step.replace(kept.unionByName(rows), after=step.version)
            elif count:
                step.append(rows)
        step.figures["rows_in"] = step.figures["rows_out"] = count


@contextmanager
def _with_topics(run: Run, talks: DataFrame) -> Iterator[tuple[DataFrame, int]]:
    """Yield consultations with ``topic`` and ``similarity``, and their number."""
    config = run.config.topics
    with persisted(topics.with_phrase(talks, config)) as read:
        unnamed = F.col("topic").isNull() & F.col("text").isNotNull() & F.lit(bool(config.phrases))
        count, to_compare = read.select(F.count(F.lit(1)), F.count_if(unnamed)).collect()[0]
        found = read.withColumn("similarity", F.when(F.col("topic").isNotNull(), F.lit(1.0)))
        if to_compare:
            unread = _by_task(read.filter(unnamed), to_compare, "consultation_id")
            near = topics.by_meaning(unread.select("consultation_id", "text"), config, run.config.texts)
            compared = near.select("consultation_id", F.col("topic").alias("near"), F.col("similarity").alias("cosine"))
            found = found.join(compared, "consultation_id", "left").withColumns(
                {"topic": F.coalesce("topic", "near"), "similarity": F.coalesce("similarity", "cosine")}
            )
        yield found, count


def _by_task(rows: DataFrame, count: int, key: str) -> DataFrame:
    """Return the rows in few partitions: each task loads the model once. One a core, and one alone for a handful of texts."""
    tasks = min(parallelism(rows.sparkSession), math.ceil(count / texts.TEXTS_PER_TASK))
    return rows.repartition(max(1, tasks), key)
