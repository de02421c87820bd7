"""Adapt the language model to the platform's own texts: the job of ``bp-spark adapt-language``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from bp_spark.core import extras
from bp_spark.core.config import Config
from bp_spark.core.errors import DataError
from bp_spark.lakehouse.run import recorded
from bp_spark.training.loader import snapshot


def adapt_language(spark: SparkSession, config: Config, output: Path) -> list[dict[str, Any]]:
    """Go on pre-training the language model on the platform's texts; ``texts.model=OUTPUT`` then uses the adapted model.

    Embeddings carry the digest of their model, so the next featurize embeds each text again with the adapted model.

    Args:
        spark: the running session.
        config: settings.
        output: folder to write.

    Returns:
        The stage that ran, as in ``runs``.

    Raises:
        ConfigError: ``output`` exists already, or the configured model can't guess masked tokens.
        DataError: there are no texts yet, or too few.
        PlatformError: the extra ``train`` is not installed.
    """
    extras.require("train", "adapt-language")
    # torch and transformers take seconds to import: other stages don't pay for them
    from bp_spark.training.tasks import masked_lm

    with recorded(spark, config, "adapt-language") as run:
        lakehouse = run.lakehouse
        if not lakehouse.exists("texts"):
            raise DataError(f"{lakehouse.namespace}.texts", "table does not exist; run featurize first")
        lakehouse_texts = snapshot(lakehouse.location("texts"))
        inputs = masked_lm.inputs_digest(lakehouse_texts, config)
        with run.stage("adapt language", inputs) as figures:
            run_dir = Path(config.training.work_dir).absolute() / f"language-{inputs}"
            result = masked_lm.train_masked_lm(spark, lakehouse_texts, config, run_dir, output)
            figures["texts"] = figures["rows_in"] = result.texts
            figures["held_out"] = result.held_out
            figures["epochs"] = result.epochs
            figures["best_epoch"] = result.best_epoch
            figures["loss_before"] = round(result.loss_before, 4)
            figures["loss_after"] = round(result.loss_after, 4)
            figures["model_digest"] = result.model_digest
            figures["folder"] = result.folder
            if not result.best_epoch:
                figures["note"] = "no epoch was better: the folder holds the model as it was"
        return run.records
