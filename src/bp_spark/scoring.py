"""Features of one date and a bundle -> rows of ``scores``, computed by an iterator pandas UDF on the executors.

The bundle travels as one broadcast; each Python worker process unpacks and loads it once and keeps it for later batches and
tasks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pyspark import TaskContext
from pyspark.errors import PySparkAttributeError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark import __version__
from bp_spark.config import ScoringConfig
from bp_spark.errors import PlatformError
from bp_spark.model import bundle as bundles
from bp_spark.model.bundle import Bundle

if TYPE_CHECKING:
    from pyspark import Broadcast

REASONS = 3
ANSWERS = (
    "struct<expected_spend:double, low:double, high:double, p_active:double, score:double, level:string, "
    "risk_level:string, expected_by_horizon:map<int,double>, "
    "reasons:array<struct<feature:string,value:double,contribution:double>>>"
)

_loaded: dict[str, Bundle] = {}


def score(
    features: DataFrame, bundle: Bundle, score_date: date, features_version: int, config: ScoringConfig
) -> DataFrame:
    """Score every row of ``features``.

    Args:
        features: rows of ``user_features`` of one date.
        bundle: the model.
        features_version: Delta version of ``features``, recorded with each score.

    Returns:
        Rows of SCORES.

    Raises:
        BundleError: ``features`` lacks a column that the bundle reads.
        PlatformError: the session can't broadcast (Spark Connect).
    """
    bundle.check_inputs(features.columns)
    spark = features.sparkSession
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", str(config.batch_rows))
    answer = prediction_udf(spark, bundle)
    inputs = F.struct(*(F.col(name) for name in dict.fromkeys(bundle.required_columns)))
    return features.select("user_key", answer(inputs).alias("answer")).select(
        "user_key",
        F.lit(score_date).alias("score_date"),
        "answer.*",
        F.lit(bundle.digest).alias("bundle_digest"),
        F.lit(features_version).cast("bigint").alias("features_version"),
        F.lit(__version__).alias("code_version"),
        F.current_timestamp().alias("scored_at"),
    )


def prediction_udf(spark: SparkSession, bundle: Bundle) -> Any:
    """An iterator pandas UDF from a struct of the bundle's input columns to a struct of answers (see ANSWERS).

    Usable in SQL too: ``spark.udf.register("purchasing_power", prediction_udf(spark, bundle))``.

    Raises:
        PlatformError: the session can't broadcast (Spark Connect).
    """
    carried = _broadcast(spark, bundle)
    digest = bundle.digest

    @F.pandas_udf(ANSWERS)  # type: ignore[call-overload]
    def answer(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        loaded = _load_once(digest, carried)
        for batch in batches:
            yield answers(loaded, {name: batch[name].to_numpy() for name in batch.columns})

    return answer


def answers(bundle: Bundle, columns: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """What the UDF returns for a batch: a row of ANSWERS for each row of ``columns``."""
    predicted = bundle.predict(columns)
    frame = pd.DataFrame({name: values for name, values in predicted.items() if not name.startswith("member_")})
    return frame.assign(reasons=pd.Series(_reasons(bundle, columns, len(frame)), index=frame.index, dtype=object))


def _reasons(bundle: Bundle, columns: Mapping[str, np.ndarray], rows: int) -> list[list[dict[str, Any]]]:
    """The features with the largest TreeSHAP contributions of each row; none where the bundle has no trees."""
    trees: Any = bundle.members.get("trees")
    if trees is None or rows == 0:
        return [[] for _ in range(rows)]
    shares = trees.contributions(columns)[:, :-1]
    top = np.argsort(-np.abs(shares), axis=1, kind="stable")[:, :REASONS]
    names = np.asarray(trees.features, dtype=object)[top]
    contributions = np.take_along_axis(shares, top, axis=1)
    values = np.take_along_axis(np.stack([np.asarray(columns[n], np.float64) for n in trees.features], 1), top, axis=1)
    return [
        [
            {"feature": name, "value": None if np.isnan(value) else value, "contribution": contribution}
            for name, value, contribution in zip(*row, strict=True)
        ]
        for row in zip(names.tolist(), values.tolist(), contributions.tolist(), strict=True)
    ]


def _broadcast(spark: SparkSession, bundle: Bundle) -> Broadcast[dict[str, bytes]]:
    try:
        context = spark.sparkContext
    except PySparkAttributeError:
        raise PlatformError(
            "scoring broadcasts the bundle, which Spark Connect can't: run it in a classic session"
        ) from None
    return context.broadcast({path.name: path.read_bytes() for path in sorted(bundle.folder.iterdir())})


def _load_once(digest: str, carried: Broadcast[dict[str, bytes]]) -> Bundle:
    """The bundle, unpacked and loaded by the first task of this worker process, verified as any bundle is."""
    if digest not in _loaded:
        _loaded.clear()
        with tempfile.TemporaryDirectory(prefix="bp-spark-") as folder:
            for name, content in carried.value.items():
                (Path(folder) / name).write_bytes(content)
            _loaded[digest] = bundles.load(folder)
        _pin_threads(_loaded[digest])
    return _loaded[digest]


def _pin_threads(bundle: Bundle) -> None:
    """As many threads as the task has cores; more would take those of the next task."""
    context = TaskContext.get()
    cores = context.cpus() if context else 1
    trees: Any = bundle.members.get("trees")
    if trees is not None:
        trees.set_threads(cores)
    if "transformer" in bundle.members:
        import torch

        torch.set_num_threads(cores)
