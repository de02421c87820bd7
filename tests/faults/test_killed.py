"""kill -9 at each place where it could hurt: the next run makes the night whole, and nothing is lost or there twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

import bp_spark
from bp_spark import pipeline
from bp_spark.core.config import TrainingConfig
from bp_spark.core.errors import PlatformError
from bp_spark.scoring import prediction
from bp_spark.training.distributed import run_ranks
from tests.support.harness import (
    AS_OF,
    Killed,
    Scored,
    World,
    Write,
    assert_same_tables,
    forget_cached,
    hooked,
    killed_before_each_commit,
    tables,
)

WRITES = [
    ("deliveries", 0),
    ("user_keys", 0),
    ("raw_transactions", 0),
    ("raw_searches", 0),
    ("deliveries", 1),
    ("events", 0),
    ("quarantine", 0),
    ("texts", 0),
    ("events", 1),
    ("text_embeddings", 0),
    ("user_daily", 0),
    ("user_features", 0),
]
"""Of a night of featurize, in order."""


SOME = [("raw_transactions", 0), ("deliveries", 1), ("events", 1), ("user_daily", 0)]
"""Of these, the last ones of their stages, and one in the middle of a stage."""


@pytest.mark.parametrize("of", [SOME, pytest.param(None, marks=pytest.mark.thorough)], ids=["some", "all"])
def test_featurize_killed_between_data_and_commit_of_each_write(
    spark: SparkSession, world: World, fresh: Path, monkeypatch: pytest.MonkeyPatch, of: list[Write] | None
) -> None:
    def featurize() -> object:
        return world.platform.featurize(spark, fresh)

    assert killed_before_each_commit(spark, monkeypatch, featurize, of) == (of or WRITES)
    assert_same_tables(fresh, world.undisturbed)
    pipeline.featurize(spark, world.platform.config(fresh), [AS_OF], rebuild=True)
    assert_same_tables(fresh, world.undisturbed)


def test_score_killed_between_data_and_commit_of_each_write(
    spark: SparkSession, unscored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck = killed_before_each_commit(spark, monkeypatch, lambda: unscored.score(spark))
    assert struck == [("scores", 0), ("scores_latest", 0)]
    assert_same_tables(unscored.lakehouse, unscored.undisturbed)


def test_a_night_killed_before_its_record_is_not_taken_for_the_one_before(
    spark: SparkSession, unscored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unscored.score(spark).written

    def strike(write: Write) -> None:
        if write[0] in ("scores_latest", "runs"):
            raise Killed

    with hooked(monkeypatch, strike), pytest.raises(Killed):
        unscored.score(spark, unscored.other)
    # the newest record is of the first bundle, the rows are of the second
    assert unscored.score(spark).written
    assert_same_tables(unscored.lakehouse, unscored.undisturbed)


FIRST_NIGHT = """
import os, sys, time
from pathlib import Path
from tests.support.harness import AS_OF, Platform
from bp_spark import pipeline
from bp_spark.core.session import get_session
from bp_spark.lakehouse.store import Lakehouse

platform, lakehouse = Platform(Path(sys.argv[1])), sys.argv[2]
settings = platform.config(lakehouse)
real = Lakehouse.replace


def half(self, table, df, **kwargs):
    if table.name != "raw_transactions":
        return real(self, table, df, **kwargs)

    def stalled(batches):
        from pyspark import TaskContext

        yield from batches
        while TaskContext.get().partitionId() == 1:
            time.sleep(1)

    # the file of one task is written, that of the other never is
    return real(self, table, df.repartition(2, "order_id").mapInArrow(stalled, df.schema), **kwargs)


Lakehouse.replace = half
pipeline.featurize(get_session(settings, "to be killed"), settings, [AS_OF])
"""


@pytest.mark.slow
def test_a_driver_killed_in_the_middle_of_a_write_of_the_first_night(
    spark: SparkSession, world: World, tmp_path: Path
) -> None:
    lakehouse = tmp_path / "lakehouse"
    raw = lakehouse / "bp/raw_transactions"
    # the first night alone: as it was before the second was delivered
    first = world.first_night(tmp_path)
    places = [str(Path(__file__).parents[2]), str(Path(bp_spark.__file__).parents[1])]
    process = subprocess.Popen(
        [sys.executable, "-c", FIRST_NIGHT, str(first.folder), str(lakehouse)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while process.poll() is None and not list(raw.rglob("part-*")):
            time.sleep(0.1)
        assert process.poll() is None, "ended by itself"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    forget_cached(spark)
    assert spark.read.format("delta").load(str(raw)).isEmpty()
    first.featurize(spark, lakehouse)
    assert_same_tables(lakehouse, world.first)


def test_a_python_worker_killed_while_it_scores_costs_the_run_and_no_row(
    spark: SparkSession, unscored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tables(unscored.lakehouse / "bp")

    def killed(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(prediction, "_predict_batch", killed)
        with pytest.raises(PlatformError, match="a Python worker was killed"):
            unscored.score(spark)
    # the table is there, without a row
    assert {**tables(unscored.lakehouse / "bp"), "scores": None} == {**before, "scores": None}
    assert spark.read.format("delta").load(f"{unscored.lakehouse}/bp/scores").isEmpty()
    unscored.score(spark)
    assert_same_tables(unscored.lakehouse, unscored.undisturbed)


def test_a_killed_rank_ends_the_training_with_a_message(spark: SparkSession, tmp_path: Path) -> None:
    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(PlatformError, match="ranks ended without saying why"):
        run_ranks(spark, TrainingConfig(processes=1), tmp_path, killed)
