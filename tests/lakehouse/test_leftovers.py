"""Clean-up of a table's folder: all that its newest version doesn't need goes, and nothing that a job is writing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from bp_spark.core.config import Config, TablesConfig
from bp_spark.core.errors import ConflictError, PlatformError
from bp_spark.lakehouse import commits, leftovers
from bp_spark.lakehouse.schema import Column, Table
from bp_spark.lakehouse.store import Lakehouse
from tests.support.aged_logs import age_log

THINGS = Table(
    "things",
    "Things by kind",
    (
        Column("kind", "string", "Kind", required=True),
        Column("name", "string", "Name"),
        Column("n", "bigint", "Number"),
    ),
    key=("name",),
    partition_by=("kind",),
    change_feed=True,
)
KINDS = ("plain", "with space", "a/b: 100%", "小明", "=x", "_y", ".z")


def things(spark: SparkSession, *names: str, kind: str = "plain", n: int = 1):  # type: ignore[no-untyped-def]
    return spark.createDataFrame([(kind, name, n) for name in names], "kind string, name string, n bigint")


def names(lakehouse: Lakehouse) -> list[str]:
    return sorted(row["name"] for row in lakehouse.read("things").collect())


def on_disk(lakehouse: Lakehouse) -> set[str]:
    """Data files and checksums in the table's folder, the change feed's too."""
    folder = Path(lakehouse.location("things"))
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if path.parts[0] != "_delta_log"}


def needed(lakehouse: Lakehouse) -> set[str]:
    """Names of the newest version's data files and their checksums."""
    found = [uri.rpartition("/")[2] for uri in lakehouse.read("things").inputFiles()]
    return {*found, *(f".{name}.crc" for name in found)}


@pytest.fixture(scope="module")
def template(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with awkward partitions, older versions, a change feed and what a killed run left."""
    lakehouse = Lakehouse(spark, TablesConfig(path=str(tmp_path_factory.mktemp("template"))))
    rows = [(kind, f"{age} {kind}", 1) for kind in KINDS for age in ("old", "gone")]
    lakehouse.append(THINGS, spark.createDataFrame(rows, "kind string, name string, n bigint"))
    lakehouse.merge(THINGS, things(spark, "old plain", n=2), within={"kind": ["plain"]})
    assert lakehouse.delete("things", "name LIKE 'gone%'") == len(KINDS)
    folder = Path(lakehouse.location("things"))
    shutil.copy(next(folder.glob("kind=plain/*.parquet")), folder / "kind=plain/part-00000-killed.snappy.parquet")
    (folder / "_kept").mkdir()
    for name in ("_kept/index", ".hidden"):
        (folder / name).touch()
    return folder


@pytest.fixture
def grown(lakehouse: Lakehouse, template: Path) -> Lakehouse:
    shutil.copytree(template, lakehouse.location("things"))
    return lakehouse


def test_older_versions_the_change_feed_and_what_killed_runs_left_go_and_the_newest_version_stays(
    grown: Lakehouse,
) -> None:
    before = names(grown)
    assert any(path.startswith("_change_data/") for path in on_disk(grown))
    deleted = grown.vacuum("things")
    assert deleted > len(KINDS)
    assert {Path(path).name for path in on_disk(grown)} == needed(grown) | {"index", ".hidden"}
    assert names(grown) == before == sorted(f"old {kind}" for kind in KINDS)
    assert grown.vacuum("things") == 0


def test_a_table_whose_log_was_cleaned_is_cleaned_up(spark: SparkSession, grown: Lakehouse) -> None:
    age_log(spark, Path(grown.location("things")))
    grown.vacuum("things")
    assert {Path(path).name for path in on_disk(grown)} == needed(grown) | {"index", ".hidden"}
    assert names(grown) == sorted(f"old {kind}" for kind in KINDS)


def test_rows_that_a_deletion_vector_hides_go_too(spark: SparkSession, lakehouse: Lakehouse) -> None:
    plain = dataclasses.replace(THINGS, partition_by=())
    lakehouse.append(plain, things(spark, "stays", "goes").coalesce(1))
    where = f"delta.`{lakehouse.location('things')}`"
    spark.sql(f"ALTER TABLE {where} SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')")
    assert lakehouse.delete("things", "name = 'goes'") == 1
    assert any(path.endswith(".bin") for path in on_disk(lakehouse))
    lakehouse.vacuum("things")
    files = [path for path in on_disk(lakehouse) if path.endswith(".parquet")]
    held = pd.concat(pd.read_parquet(Path(lakehouse.location("things"), path)) for path in files)
    assert list(held["name"]) == names(lakehouse) == ["stays"]


def test_a_job_that_begins_to_write_before_the_fence_and_commits_after_it_is_refused_and_the_table_stays_whole(
    spark: SparkSession, lakehouse: Lakehouse, tmp_path: Path
) -> None:
    lakehouse.append(THINGS, things(spark, "first"))
    go, begun = tmp_path / "go", tmp_path / "begun"

    def slowly(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        yield from batches
        begun.touch()
        while not go.exists():
            time.sleep(0.05)

    outcome: list[BaseException | int] = []

    def write() -> None:
        rows = things(spark, "second").coalesce(1)
        try:
            outcome.append(lakehouse.append(THINGS, rows.mapInPandas(slowly, rows.schema)))
        except ConflictError as error:
            outcome.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    while not begun.exists():
        time.sleep(0.05)
    lakehouse.vacuum("things")
    go.touch()
    writer.join()
    assert isinstance(outcome[0], ConflictError)
    assert names(lakehouse) == ["first"]
    lakehouse.vacuum("things")
    assert {Path(path).name for path in on_disk(lakehouse)} == needed(lakehouse)


@pytest.fixture
def beside_the_fence(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Let a job of another process do something right after the fence."""

    def install(job: Callable[[], object]) -> None:
        real = Lakehouse.fence

        def fence(self: Lakehouse, name: str) -> str:
            token = real(self, name)
            job()
            return token

        monkeypatch.setattr(Lakehouse, "fence", fence)

    return install


def test_a_file_that_a_job_writes_after_the_fence_and_commits_after_the_clean_up_is_there(
    spark: SparkSession, grown: Lakehouse, beside_the_fence: Callable[[Callable[[], object]], None]
) -> None:
    folder = Path(grown.location("things"))
    fresh = folder / "kind=plain/part-00000-fresh.snappy.parquet"

    def write() -> None:
        shutil.copy(next(folder.glob("kind=plain/part*.parquet")), fresh)
        # of any age: a store's clock, or a copy with its times, may be hours off
        os.utime(fresh, (0, 0))

    beside_the_fence(write)
    grown.vacuum("things")
    assert fresh.exists()
    added = {
        "path": str(fresh.relative_to(folder)),
        "partitionValues": {"kind": "plain"},
        "size": fresh.stat().st_size,
        "modificationTime": 0,
        "dataChange": True,
    }
    entry = folder / f"_delta_log/{grown.version('things') + 1:020d}.json"
    entry.write_text(f"{json.dumps({'commitInfo': {'timestamp': 0}})}\n{json.dumps({'add': added})}\n")
    assert len(names(grown)) > len(KINDS)


def test_what_a_job_commits_between_the_listing_and_the_fence_is_there(
    spark: SparkSession, grown: Lakehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = leftovers.data_files

    def listed(address: str) -> list[str]:
        grown.append(THINGS, things(spark, "before"))
        found = real(address)
        grown.append(THINGS, things(spark, "after"))
        return found

    monkeypatch.setattr(leftovers, "data_files", listed)
    grown.vacuum("things")
    # by their files: a table that lacks one can't be read
    assert needed(grown) <= {Path(path).name for path in on_disk(grown)}
    assert {"before", "after"} <= set(names(grown))


def test_a_folder_that_cannot_be_listed_from_here_is_cleaned_up_by_delta(
    spark: SparkSession,
    settings: Config,
    grown: Lakehouse,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refused(address: str) -> None:
        raise PermissionError(address)

    def holding(word: str) -> list[Path]:
        files = [path for path in Path(grown.location("things")).rglob("*.parquet") if "_delta_log" not in path.parts]
        return [path for path in files if pd.read_parquet(path)["name"].str.contains(word).any()]

    killed = Path(grown.location("things"), "kind=plain/part-00000-killed.snappy.parquet")
    for module in (commits, leftovers):
        monkeypatch.setattr(module, "file_system", refused)
    blind = Lakehouse(spark, settings.tables)
    assert len(holding("gone")) >= len(KINDS)
    assert blind.vacuum("things") == 0
    assert "bp.things: its folder can't be listed from here (PermissionError)" in caplog.text
    assert set(holding("gone")) <= {killed}
    assert killed.exists()
    age_log(spark, Path(grown.location("things")))
    assert blind.vacuum("things") == 0
    assert "stay for the table's own retention time" in caplog.text
    assert names(grown) == sorted(f"old {kind}" for kind in KINDS)


def test_a_folder_of_the_same_name_on_another_machine_is_left_alone(
    spark: SparkSession, grown: Lakehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = on_disk(grown)
    monkeypatch.setattr(Lakehouse, "fence", lambda self, name: "a commit that the folder here lacks")
    monkeypatch.setattr(Lakehouse, "_vacuum_by_delta", lambda self, name, reason: None)
    assert grown.vacuum("things") == 0
    assert on_disk(grown) == before


def test_a_file_that_cannot_be_deleted_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadOnly:
        def delete_file(self, path: str) -> None:
            raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(leftovers, "file_system", lambda address: (ReadOnly(), address))
    with pytest.raises(PlatformError, match=r"/x/a\.parquet: can't be deleted \(Permission denied\)"):
        leftovers.delete("/x", ["/x/a.parquet"], needed=[])
