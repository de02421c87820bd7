"""Two nights in a session of Spark Connect, whose server is another process, come to what they come to in a classic one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark import pipeline
from bp_spark.core.config import Config, FusionConfig, changed
from bp_spark.core.errors import ConflictError, DataError, PlatformError
from bp_spark.core.session import DELTA_SETTINGS, get_session, is_connect, java_home, persisted, spark_jars
from bp_spark.core.spark_errors import translate
from bp_spark.ingest.onboarding.check import check
from bp_spark.ingest.onboarding.preflight import look_at_files
from bp_spark.ingest.sources.mapping import load_mapping
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import SCORES_LATEST, TABLE_NAMES
from bp_spark.model.horizons import Horizons
from bp_spark.model.members.btyd import FEATURES, BtydMember
from bp_spark.model.stack import CalibratedStack
from bp_spark.registry import bundle as bundles
from tests.support.clusters import SHORT, TEST_SETTINGS
from tests.support.histories import WRITTEN_TEXTS, sorted_rows, write_night
from tests.support.platforms import settings_in
from tests.support.training_rows import write_language_model

pytestmark = pytest.mark.integration

FIRST, SECOND = date(2024, 3, 20), date(2024, 3, 21)
MAPPING = (
    """
transactions:
  path: "transactions/*.json"
  format: json
  columns: {user_id: user, order_id: order, line_id: line, item_id: item, ts: time, quantity: n, amount: paid}
items:
  path: "items/*.csv"
  format: csv
  columns: {item_id: item, title: title}
"""
    + WRITTEN_TEXTS
)
GONE = "u3"
OF_THE_RUN = {
    "run_id",
    "fingerprint",
    "forgotten_at",
    "ingested_at",
    "scored_at",
    "started_at",
    "seconds",
    "config_digest",
    "read",
    "written",
}
"""Columns that say when, by which run and from which writing of a file, not what came of it."""
QUERY = "SELECT level, count(*) AS users FROM bp.scores_latest GROUP BY level ORDER BY level"


def settings_of(folder: Path, lakehouse: str) -> Config:
    return settings_in(
        folder,
        lakehouse,
        f"evaluation.reports={folder}/{lakehouse}-reports",
        f"texts.model={folder}/language",
        "features.windows=[30]",
        "features.history_length=4",
        "labels.other_horizons=[]",
        "tracking.uri=null",
    )


def write_platform(folder: Path) -> None:
    (folder / "platform/items").mkdir(parents=True)
    (folder / "platform/source.yaml").write_text(MAPPING, encoding="utf-8")
    (folder / "platform/items/000.csv").write_text("item,title\ni1,milk\ni2,cheese\n", encoding="utf-8")
    write_language_model(folder / "language", "bert")
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"btyd": rng.gamma(2, 20, 500), "label_spend": rng.gamma(2, 20, 500)})
    member = BtydMember(90, 0.8, 20.0, 0.5, 3.0, 4.0, 3.0, 30.0)
    fusion = CalibratedStack.fit(frame, FusionConfig(members=("btyd",)))
    how: dict[str, Any] = {"inputs": {"tabular": FEATURES}, "lineage": {}, "metrics": {}}
    bundle = bundles.write(folder / "bundles/small", [member], fusion, Horizons(90, ()), **how)
    bundles.promote(folder / "bundles", bundle)


def deliveries(night: int) -> dict[str, list[dict[str, Any]]]:
    """On the second night: a new user, a known line corrected, one delivered again, one that can't be read."""
    rng = np.random.default_rng(2)
    lines = [
        {
            "user": f"u{rng.integers(0, 9)}",
            "order": f"o{number}",
            "line": "1",
            "item": f"i{rng.integers(1, 3)}",
            "time": f"{date(2024, 1, 1) + timedelta(days=int(rng.integers(0, 70)))} 10:00:00",
            "n": 1,
            "paid": f"{rng.integers(1, 50)}.50",
        }
        for number in range(40)
    ]
    if night == 0:
        searches = [
            {"user": f"u{n}", "time": f"{date(2024, 3, 1)} 09:00:00", "query": f"cheap milk {n}"} for n in range(5)
        ]
        return {"transactions": lines, "searches": searches}
    fresh = {**lines[0], "user": "u20", "order": "new", "time": "2024-03-20 08:00:00"}
    return {"transactions": [{**lines[0], "paid": "1.00"}, lines[1], fresh, {**fresh, "order": "bad", "paid": "much"}]}


def nights(spark: SparkSession, settings: Config) -> dict[str, Any]:
    """Run both nights, their reports and the erasure of a user, and return what these say beside the tables."""
    for night, day in enumerate((FIRST, SECOND)):
        if night:
            write_night(Path(settings.source.mapping or "").parent, night, **deliveries(night))
        pipeline.featurize(spark, settings, [day])
        result = pipeline.score(spark, settings, day)
    pipeline.profile(spark, settings)
    drifted = pipeline.check_drift(spark, settings, SECOND)
    page = pipeline.report(spark, settings, SECOND).page
    forgotten = {stage["stage"]: stage for stage in pipeline.forget(spark, settings, [GONE])}
    Lakehouse(spark, settings.tables).register(TABLE_NAMES)
    return {
        "users": result.users,
        "computed": result.computed,
        "drift": len(drifted.rows),
        "page": page.stat().st_size > 10_000,
        "forgotten": forgotten["forget"]["figures"],
        "found": forgotten["prove"]["figures"]["found"],
        "sql": [list(row) for row in spark.sql(QUERY).collect()],
        "check": checked(spark, settings),
    }


def checked(spark: SparkSession, settings: Config) -> dict[str, Any]:
    """Return figures of a check. In a remote session the files are read where they lie, else copies of their heads."""
    mapping = settings.source.mapping or ""
    figures = check(spark, settings, look_at_files(mapping, load_mapping(Path(mapping))), 1_000)
    refused = {table.table: [table.rows, dict(table.refused)] for table in figures.tables}
    return {"refused": refused, "orders": figures.purchases.orders, "money": figures.purchases.money}


def refusals(spark: SparkSession, settings: Config) -> list[str]:
    """What is refused, and by which error."""
    lakehouse, raised = Lakehouse(spark, settings.tables), []
    latest = lakehouse.read("scores_latest")
    version = lakehouse.version("scores_latest")
    lakehouse.append(SCORES_LATEST, latest.limit(0), after=version)

    def overtaken() -> None:
        lakehouse.append(SCORES_LATEST, latest, after=version)

    def damaged() -> None:
        Path(lakehouse.read("runs").inputFiles()[0].removeprefix("file:")).unlink()
        with translate():
            lakehouse.read("runs").collect()

    for ask in (
        overtaken,
        lambda: lakehouse.read("nothing"),
        lambda: pipeline.score(spark, settings, date(2020, 1, 1)),
        lambda: pipeline.train(spark, changed(settings, {"trees.max_local_values": 0})),
        damaged,
    ):
        try:
            ask()
        except (ConflictError, DataError, PlatformError) as error:
            raised.append(f"{type(error).__name__}: {error}")
    return raised


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Spark Connect server with Delta, as an operator starts one."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    given = {
        **SHORT,
        **DELTA_SETTINGS,
        "spark.connect.grpc.binding.port": str(port),
        "spark.sql.warehouse.dir": f"{folder}/warehouse",
    }
    command = [str(spark_jars().parent / "bin/spark-submit"), "--master", "local[2]", "--driver-memory", "2g"]
    command += [part for key, value in given.items() for part in ("--conf", f"{key}={value}")]
    command += ["--class", "org.apache.spark.sql.connect.service.SparkConnectServer", "spark-internal"]
    environment = {**os.environ, "JAVA_HOME": java_home(), "PYSPARK_PYTHON": sys.executable}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        while not answers(port):
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"sc://localhost:{port}"
    finally:
        process.terminate()
        process.wait()


def answers(port: int) -> bool:
    with closing(socket.socket()) as tried:
        return tried.connect_ex(("localhost", port)) == 0


def test_nights_in_spark_connect_are_those_of_a_classic_session(
    spark: SparkSession, server: str, tmp_path: Path
) -> None:
    write_platform(tmp_path)
    write_night(tmp_path / "platform", 0, **deliveries(0))
    environment = {**os.environ, "SPARK_REMOTE": server, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, str(tmp_path)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-5000:]
    said = json.loads(finished.stdout.splitlines()[-1])
    (tmp_path / "platform/transactions/001.json").unlink()
    classic = settings_of(tmp_path, "classic")
    assert said["nights"] == json.loads(json.dumps(nights(spark, classic)))
    conflict, no_table, no_features, no_trees, no_file = said["refusals"]
    assert conflict.startswith("ConflictError: bp.scores_latest")
    assert no_table.startswith("MissingTableError: bp.nothing: table does not exist")
    assert no_features.startswith("DataError: user_features")
    assert no_trees.startswith("PlatformError: trees and sqrt_trees")
    assert no_file.startswith(f"DataError: file:{tmp_path}/connect/bp/runs/")
    here, there = (Lakehouse(spark, settings_of(tmp_path, name).tables) for name in ("classic", "connect"))
    assert here.existing(TABLE_NAMES) == there.existing(TABLE_NAMES)
    for name in here.existing(TABLE_NAMES):
        assert there.read(name).schema == here.read(name).schema, name
        if name != "runs":
            assert contents(there, name) == contents(here, name), name


def contents(lakehouse: Lakehouse, name: str) -> list[tuple[Any, ...]]:
    rows = lakehouse.read(name).drop(*OF_THE_RUN)
    if name == "quarantine":
        # the raw row as JSON, with the time of its ingest
        rows = rows.withColumn("row", F.regexp_replace("row", '"ingested_at":"[^"]*"', ""))
    return sorted_rows(rows)


def main(folder: Path) -> None:
    settings = settings_of(folder, "connect")
    spark = get_session(settings)
    assert is_connect(spark)
    for key, value in TEST_SETTINGS.items():
        spark.conf.set(key, value)
    with persisted(spark.range(3)) as rows:
        assert rows.count() == 3
    print(json.dumps({"nights": nights(spark, settings), "refusals": refusals(spark, settings)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
