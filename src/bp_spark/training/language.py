"""The language model, adapted to the platform's own texts."""

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
    """Go on pre-training the language model on the platform's texts; ``texts.model=OUTPUT`` then uses what came out.

    Embeddings bear the digest of their model: the next featurize reads each text anew with the adapted one.

    Args:
        output: folder to be made.

    Returns:
        The stage that ran, as in ``runs``.

    Raises:
        ConfigError: ``output`` is there already; the configured model can't guess masked tokens.
        DataError: no texts yet, or too few.
        PlatformError: the extra ``train`` is not installed.
    """
    extras.require("train", "adapt-language")
    # torch and transformers take seconds to import: other stages don't pay for them
    from bp_spark.training.tasks import masked_lm

    with recorded(spark, config, "adapt-language") as run:
        lakehouse = run.lakehouse
        if not lakehouse.exists("texts"):
            raise DataError(f"{lakehouse.namespace}.texts", "table does not exist; run featurize first")
        found = snapshot(lakehouse.location("texts"))
        inputs = masked_lm.inputs_digest(found, config)
        with run.stage("adapt language", inputs) as figures:
            work = Path(config.training.work_dir).absolute() / f"language-{inputs}"
            result = masked_lm.adapt(spark, found, config, work, output)
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
