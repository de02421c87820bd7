"""The three jobs on a cluster: a standalone master, two worker processes, and ``spark-submit`` as docs/cluster.md gives it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from subprocess import Popen

import pandas as pd
import psutil
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.ingest.sources.completejourney import data_folder
from bp_spark.registry import bundle as bundles
from bp_spark.scoring import prediction
from tests.support.clusters import Cluster
from tests.support.small_package import household_ids, write_small_package

DAY = "2017-10-03"
WORKERS = 2
SMALL = [
    "labels.cutoffs=1",
    "labels.recent_cutoffs=1",
    "labels.other_horizons=[]",
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
    # on the executors, as a platform with more rows would
    "trees.max_local_values=0",
    "tracking.uri=null",
]
JOBS = ("featurize", "train", "score")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Night:
    """What the three jobs left; an executor was killed while ``score`` ran."""

    cluster: Cluster
    tables: Path
    bundle: Path
    households: list[str]
    killed: list[int]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    cluster = Cluster(folder, WORKERS, python_path=folder / "packages")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def night(cluster: Cluster) -> Night:
    folder, households, killed = cluster.folder, household_ids()[::27], list[int]()
    write_small_package(folder / "packages", households)
    settings = [f"tables.path={folder}/lakehouse", f"bundles={folder}/bundles", f"training.work_dir={folder}/ddp"]

    def run(job: str, *arguments: str, meanwhile: Callable[[Popen[str]], None] = lambda _: None) -> None:
        result = cluster.submit(job, *arguments, *SMALL, *settings, meanwhile=meanwhile)
        assert result.returncode == 0, f"{job}:\n{result.stdout[-2000:]}\n{result.stderr[-6000:]}"

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

    run("featurize", "--as-of", DAY)
    run("train", "--test-date", DAY)
    bundle = next(folder.glob("bundles/*/manifest.json")).parent
    # such small models may rank worse than the linear one and not be promoted: the bundle is named
    run("score", "--date", DAY, "--bundle", str(bundle), meanwhile=kill_an_executor)
    return Night(cluster, folder / "lakehouse/bp", bundle, households, killed)


def test_every_user_with_a_purchase_before_the_date_is_scored_once(night: Night) -> None:
    scores = _rows(night.tables / "scores", "user_key", "expected_spend")
    events = _rows(night.tables / "events", "user_key", "kind", "event_date")
    buyers = events[(events["kind"] == "purchase") & (events["event_date"] < date.fromisoformat(DAY))]
    assert sorted(scores["user_key"]) == sorted(buyers["user_key"].unique())
    assert scores["expected_spend"].ge(0).all()
    # and what is made from the scores came with them
    for name in ("user_profile", "risk_control", "customer_service"):
        assert sorted(_rows(night.tables / name, "user_key")["user_key"]) == sorted(scores["user_key"])


def test_the_users_are_those_of_the_raw_data(night: Night) -> None:
    raw = pd.read_parquet(data_folder() / "transactions.parquet", columns=["household_id", "transaction_timestamp"])
    before = set(raw.loc[raw["transaction_timestamp"] < DAY, "household_id"].astype(str))
    assert set(_rows(night.tables / "user_keys", "user_id")["user_id"]) == set(night.households)
    assert len(_rows(night.tables / "scores", "user_key")) == len(before & set(night.households)) > 80


def test_a_night_outlives_one_of_its_workers(night: Night, spark: SparkSession) -> None:
    """Its scores are those of local mode, which lost no worker."""
    assert night.killed
    bundle = bundles.load(night.bundle)
    users = spark.read.format("delta").load(str(night.tables / "user_features")).filter(F.col("as_of_date") == DAY)
    local = prediction.score(users, bundle, date.fromisoformat(DAY), 0).select("user_key", "expected_spend").toPandas()
    there = _rows(night.tables / "scores", "user_key", "expected_spend").set_index("user_key").sort_index()
    pd.testing.assert_frame_equal(local.set_index("user_key").sort_index(), there, rtol=1e-5)


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
        return any("bp_spark.core.daemon" in " ".join(child.cmdline()) for child in executor.children(recursive=True))
    return False


def test_every_job_had_an_executor_on_each_worker(night: Night) -> None:
    finished = sorted(night.cluster.state()["completedapps"], key=lambda app: app["starttime"])
    assert [(app["name"], app["state"]) for app in finished] == [(f"bp-spark {job}", "FINISHED") for job in JOBS]
    for app in finished:
        executors = [list((night.cluster.work_dir(number) / app["id"]).iterdir()) for number in range(1, WORKERS + 1)]
        # and one more in the place of that which was killed
        assert sorted(map(len, executors)) == ([1, 2] if app["name"] == "bp-spark score" else [1, 1])
        assert all("CoarseGrainedExecutorBackend" in _said(executor) for there in executors for executor in there)


def test_the_two_ranks_of_the_training_ran_on_the_two_workers(night: Night) -> None:
    (app,) = [app for app in night.cluster.state()["completedapps"] if app["name"] == "bp-spark train"]
    ranks: list[list[str]] = []
    for number in range(1, WORKERS + 1):
        (executor,) = (night.cluster.work_dir(number) / app["id"]).iterdir()
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
