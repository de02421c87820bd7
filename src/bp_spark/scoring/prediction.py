"""Rows of ``scores`` from features of one date and a bundle, computed on the executors from Arrow batches.

A score depends on nothing but the bundle and the user's features. The bundle travels as one archive, which every executor
unpacks once; its Python workers map the same files into memory.
"""

from __future__ import annotations

import gc
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark import SparkFiles, TaskContext
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.functions import pandas_udf
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import StructField, StructType

from bp_spark.core import disk, temporary
from bp_spark.core.config import ScoringConfig
from bp_spark.core.errors import BundleError
from bp_spark.core.session import with_settings
from bp_spark.core.version import __version__
from bp_spark.lakehouse import parquet
from bp_spark.lakehouse.tables import SCORES
from bp_spark.model.columns import from_arrow
from bp_spark.registry import bundle as bundles
from bp_spark.registry.bundle import Bundle
from bp_spark.registry.predictions import PREDICTION_COLUMNS, as_frame, fit_to_task, predict

SHARED_COLUMNS = ("user_key", "input_digest")
"""Columns of ``user_features`` that SCORES has too."""
ROWS_AT_ONCE = 65_536
"""Most rows of an Arrow batch, however narrow they are."""

_archives: dict[tuple[str, str, str], Path] = {}
_loaded_bundles: dict[str, Bundle] = {}


def score(
    users: DataFrame,
    bundle: Bundle,
    score_date: date,
    features_version: int,
    run_id: str | None = None,
    row_locations: DataFrame | None = None,
    batch_mb: int = ScoringConfig().batch_mb,
) -> DataFrame:
    """Compute the score of every row of ``users``, or of the rows at ``row_locations``.

    Args:
        users: Rows of ``user_features`` of one date.
        bundle: The model.
        score_date: The date.
        features_version: Delta version of ``user_features``, recorded with each score.
        run_id: The run that computes the scores, recorded with each.
        row_locations: SHARED_COLUMNS and the location of all rows of ``users`` or some of them, as
            :func:`bp_spark.lakehouse.parquet.row_locations` gives them. The workers then read the features themselves, and
            raise FileReadError where they can't.
        batch_mb: Megabytes of features that a worker reads at once, where it reads them itself.

    Returns:
        Rows of SCORES.

    Raises:
        BundleError: ``users`` lacks a column that the bundle reads.
    """
    bundle.check_inputs(users.columns)
    name, digest = distribute(users.sparkSession, bundle), bundle.digest
    features = users.select(*dict.fromkeys(bundle.required_columns))
    inputs = users.select(*SHARED_COLUMNS, *features.columns) if row_locations is None else row_locations
    read: Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]] = iter
    if row_locations is not None:
        schema = to_arrow_schema(features.schema)
        read = partial(parquet.read, schema=schema, batch_bytes=batch_mb << 20, most_rows=ROWS_AT_ONCE)

    def predict_batches(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        loaded = load_once(name, digest)
        for batch in read(batches):
            yield _predict_batch(loaded, batch, score_date)

    return inputs.mapInArrow(predict_batches, _schema(*SHARED_COLUMNS, *PREDICTION_COLUMNS)).withColumns(
        {
            "score_date": F.lit(score_date),
            "horizon_days": F.lit(bundle.horizon_days),
            "bundle_digest": F.lit(digest),
            "run_id": F.lit(run_id).cast("string"),
            "features_version": F.lit(features_version).cast("bigint"),
            "code_version": F.lit(__version__),
            "computed_on": F.lit(score_date),
            "scored_at": F.current_timestamp(),
        }
    )


@contextmanager
def batch_sizes(spark: SparkSession, config: ScoringConfig) -> Iterator[None]:
    """Let Spark cut tasks and Arrow batches by bytes, as configured, for the block."""
    settings = {
        "spark.sql.files.maxPartitionBytes": f"{config.partition_mb}MB",
        "spark.sql.execution.arrow.maxBytesPerBatch": f"{config.batch_mb}MB",
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(ROWS_AT_ONCE),
        # above 100 columns Spark would build every row whole before it asks whether the user changed
        "spark.sql.codegen.maxFields": "1000",
    }
    with with_settings(spark, settings):
        yield


def prediction_udf(spark: SparkSession, bundle: Bundle, name: str | None = None, on: date | None = None) -> Any:
    """Return an iterator pandas UDF from a struct of ``user_features`` to a struct of PREDICTION_COLUMNS.

    :func:`score` gives the same predictions without the way through pandas. The bundle goes to each executor once. A Python
    worker loads it once and shares the memory of its weights with the other workers of the machine.

    Args:
        spark: The session.
        bundle: The model.
        name: Name of the function in SQL; without one it isn't registered. ``predict_spend(struct(*))`` reads the columns
            that the bundle needs and ignores the others.
        on: The date from which the spend counts; by default that of the bundle's training.
    """
    folder, digest, inputs = distribute(spark, bundle), bundle.digest, tuple(dict.fromkeys(bundle.required_columns))

    def predict_frames(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        loaded = load_once(folder, digest)
        for batch in batches:
            yield as_frame(predict(loaded, {column: batch[column].to_numpy() for column in inputs}, on))

    udf: Any = pandas_udf(predict_frames, _schema(*PREDICTION_COLUMNS))  # type: ignore[call-overload]
    return udf if name is None else spark.udf.register(name, udf)


def _schema(*names: str) -> StructType:
    """Return columns of SCORES as nullable: Spark accepts no NOT NULL from Python."""
    return StructType([StructField(name, SCORES.schema[name].dataType) for name in names])


def _predict_batch(bundle: Bundle, batch: pa.RecordBatch, score_date: date) -> pa.RecordBatch:
    """Return ``user_key``, ``input_digest`` and PREDICTION_COLUMNS; compute users with the same features once."""
    inputs = batch.select([name for name in batch.schema.names if name not in SHARED_COLUMNS])
    first_rows, own_position = _distinct(batch.column("input_digest"))
    if len(first_rows) < batch.num_rows:
        distinct = predict(bundle, from_arrow(inputs.take(pa.array(first_rows))), score_date)
        predictions = {name: array.take(pa.array(own_position)) for name, array in distinct.items()}
    else:
        predictions = predict(bundle, from_arrow(inputs), score_date)
    return pa.RecordBatch.from_pydict(
        {"user_key": batch.column("user_key"), "input_digest": batch.column("input_digest"), **predictions}
    )


def _distinct(digests: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row of each digest, and for each row the position of its own digest among them."""
    if digests.null_count:
        # features of an older version have no digest, so no two users are known to be alike
        all_rows = np.arange(len(digests))
        return all_rows, all_rows
    _, first_rows, own_position = np.unique(digests.to_numpy(), return_index=True, return_inverse=True)
    return first_rows, own_position


# --- the bundle on the executors ---------------------------------------------------------------------------------------


def distribute(spark: SparkSession, bundle: Bundle) -> str:
    """Send the bundle to present and future executors, once a session; return the name of its folder there."""
    name = f"bp-spark-bundle-{bundle.digest[:32]}"
    # a Spark Connect session has its own artifacts
    key = (str(spark.conf.get("spark.app.id")), str(getattr(spark, "session_id", "")), name)
    if key not in _archives:
        # executors that start later fetch it too, so it stays as long as this process
        packed = Path(tempfile.mkdtemp(dir=temporary.folder("bundles"))) / f"{name}.zip"
        with disk.writing(packed), zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(bundle.folder.iterdir()):
                archive.write(path, path.name)
        spark.addArtifact(f"{packed}#{name}", archive=True)
        _archives[key] = packed
    return name


def load_once(name: str, digest: str) -> Bundle:
    """Return the bundle, which the first task of this worker process verifies and loads.

    Args:
        name: Folder of the bundle on the executor, as :func:`distribute` returns it.
        digest: Digest that the bundle must have.

    Raises:
        BundleError: It has another digest, or can't be trusted.
    """
    if digest not in _loaded_bundles:
        _loaded_bundles.clear()
        bundle = bundles.load(SparkFiles.get(name))
        if bundle.digest != digest:
            raise BundleError(f"{bundle.folder}: is bundle {bundle.digest[:12]}, not the one sent, {digest[:12]}")
        _loaded_bundles[digest] = bundle
        # a worker collects garbage after each task, and would look at all objects of all libraries each time
        gc.freeze()
    fit_to_task(_loaded_bundles[digest], TaskContext.get())
    return _loaded_bundles[digest]
