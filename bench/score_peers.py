"""Other ways to apply the same network to the same rows, as their documentation shows them: the peers of ``bench.score``.

Each takes a frame of synthetic ``user_features`` and a bundle's folder and returns a frame with the network's expected spend.
None orders users by length of history; that is the point. The limit, the same network in plain torch, does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import FloatType

from bp_spark.model.columns import Ragged, from_arrow
from bp_spark.model.inputs import HISTORY_COLUMNS

BATCH = 256
"""Users of one forward pass of the peers."""


def in_order(member: Any, columns: dict[str, np.ndarray | Ragged]) -> np.ndarray:
    """Expected spend, in batches of users as they come."""
    import torch

    from bp_spark.model.inputs import read

    network = member.network
    users = read(columns, network.spec, network.vocabulary_ids.numpy())
    with torch.inference_mode():
        said = [
            network.expected_spend(users.batch(np.arange(start, min(start + BATCH, len(users))))).double().numpy()
            for start in range(0, len(users), BATCH)
        ]
    return np.concatenate(said) if said else np.zeros(0)


def load_network(folder: str) -> Any:
    """The network of a bundle, on one thread."""
    import torch

    from bp_spark.model.members.transformer import TransformerMember

    torch.set_num_threads(1)
    return TransformerMember.load(Path(folder))


def predict_batch(users: DataFrame, folder: str, cap: int) -> DataFrame:
    """Spark's ``predict_batch_udf``: tensors of one shape, so that every history is padded to the cap."""
    member = load_network(folder)
    tabular = member.network.spec.tabular

    def make() -> Callable[..., np.ndarray]:
        member = load_network(folder)

        # Spark counts the parameters
        def predict(  # type: ignore[no-untyped-def]
            features, kind, age, amount, items, discount, text, weekday, hour
        ) -> np.ndarray:
            histories = (kind, age, amount, items, discount, text, weekday, hour)
            padded = dict(zip(HISTORY_COLUMNS, histories, strict=True))
            there = padded["seq_kind"] > 0
            lengths = there.sum(axis=1)
            columns: dict[str, np.ndarray | Ragged] = dict(zip(tabular, features.T, strict=True))
            columns |= {name: Ragged(values[there], lengths) for name, values in padded.items()}
            return in_order(member, columns).astype(np.float32)

        return predict

    udf = predict_batch_udf(
        make,
        return_type=FloatType(),
        batch_size=BATCH,
        input_tensor_shapes=[[len(tabular)], *[[cap]] * len(HISTORY_COLUMNS)],
    )
    features = F.array(*(F.coalesce(F.col(name), F.lit(float("nan"))) for name in tabular))
    kinds = {field.name: field.dataType.simpleString() for field in users.schema.fields}
    padding = {name: F.array_repeat(F.lit(0).cast(kinds[name][6:-1]), cap) for name in HISTORY_COLUMNS}
    histories = [F.slice(F.concat(F.col(name), padding[name]), 1, cap) for name in HISTORY_COLUMNS]
    return users.select("user_key", udf(features, *histories).alias("expected_spend"))


class PyfuncNetwork:
    """What :func:`_load_pyfunc` gives MLflow: columns of a pandas frame in, expected spend out."""

    def __init__(self, folder: str) -> None:
        self.member = load_network(folder)

    def predict(self, frame: pd.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        """Expected spend, float64 [rows]."""
        return in_order(self.member, {name: frame[name].to_numpy() for name in frame.columns})


def _load_pyfunc(folder: str) -> PyfuncNetwork:
    """MLflow calls this, by the module's name, where the model is loaded."""
    return PyfuncNetwork(folder)


def mlflow_spark_udf(users: DataFrame, folder: str, place: Path) -> DataFrame:
    """``mlflow.pyfunc.spark_udf`` of the network as an MLflow model, saved in ``place`` the first time."""
    from mlflow import pyfunc

    if not place.exists():
        pyfunc.save_model(str(place), loader_module="bench.score_peers", data_path=folder)
    spec = load_network(folder).network.spec
    udf = pyfunc.spark_udf(users.sparkSession, str(place), result_type="double", env_manager="local")
    return users.select("user_key", udf(F.struct(*spec.columns)).alias("expected_spend"))


def naive(users: DataFrame, folder: str) -> DataFrame:
    """A pandas UDF that loads the model for each batch."""

    @F.pandas_udf("double")  # type: ignore[call-overload]
    def predict(frame: pd.DataFrame) -> pd.Series:
        member = load_network(folder)
        return pd.Series(in_order(member, {name: frame[name].to_numpy() for name in frame.columns}))

    spec = load_network(folder).network.spec
    return users.select("user_key", predict(F.struct(*spec.columns)).alias("expected_spend"))


def torch_share(folder: str, files: list[str], barrier: Barrier, answers: Any) -> None:
    """One process of the limit: its files in memory, then, when all are ready, the network over its rows.

    Puts ``(rows, seconds, start, end)`` into the queue ``answers``, once for each time that the barrier opens, until it breaks.
    """
    import threading

    member = load_network(folder)
    table = pa.concat_tables([pq.ParquetFile(file).read() for file in files]).combine_chunks()
    # as Arrow batches hold them: nothing of a batch larger than the caches is left to gain
    parts = [from_arrow(batch) for batch in table.to_batches(max_chunksize=4096)]
    member.predict(parts[0])
    while True:
        try:
            barrier.wait()
        except threading.BrokenBarrierError:
            return
        start = time.monotonic()
        for part in parts:
            member.predict(part)
        answers.put((table.num_rows, start, time.monotonic()))


def of_processes(counts: list[tuple[int, float, float]]) -> float:
    """Users a second of processes that began together."""
    rows = sum(count for count, _, _ in counts)
    return rows / (max(end for _, _, end in counts) - min(start for _, start, _ in counts))


def chunks(files: list[str], parts: int) -> Iterator[list[str]]:
    """The files, dealt to so many parts."""
    for part in range(parts):
        yield files[part::parts]
