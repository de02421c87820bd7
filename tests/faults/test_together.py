"""Two jobs at once: one wins, the other ends with a message that names the table; no row is lost or there twice."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from delta.exceptions import DeltaConcurrentModificationException
from pyspark.sql import SparkSession

from bp_spark import pipeline
from bp_spark.core.config import TablesConfig
from bp_spark.core.errors import BpSparkError, ConflictError, DataError
from bp_spark.lakehouse.schema import Column, Table
from bp_spark.lakehouse.store import Lakehouse
from tests.support.aged_logs import optimize_and_vacuum
from tests.support.harness import Scored, World, Write, another, assert_same_tables, copied, hooked, tables
from tests.support.histories import SECRET

NUMBERS = Table("numbers", "Numbers", (Column("n", "bigint", "Number"),), key=("n",))


def numbers(spark: SparkSession, *values: int) -> Any:
    return spark.createDataFrame([(value,) for value in values], "n bigint")


def test_of_featurizes_at_once_one_wins_and_the_others_say_so(
    spark: SparkSession, world: World, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {("deliveries", 1), ("events", 1)}
    told: list[str] = []

    def overtake(write: Write) -> None:
        # while one is about to commit what it worked on, another goes the whole way: the first at the end of ingest, the
        # second, which has ingested, at the end of cleaning; the third does the rest
        if write in places:
            places.remove(write)
            featurize()

    def featurize() -> None:
        try:
            world.platform.featurize(spark, fresh)
        except ConflictError as error:
            told.append(str(error))

    with hooked(monkeypatch, overtake):
        featurize()
    assert [text.split(",")[0] for text in told] == [
        "bp.events: another run wrote this table meanwhile",
        "bp.deliveries: another run wrote this table meanwhile",
    ]
    assert_same_tables(fresh, world.undisturbed)
    assert {stage["status"] for stage in world.platform.featurize(spark, fresh).values()} == {"unchanged"}


def test_score_and_score_at_once_leave_one_whole_night(spark: SparkSession, unscored: Scored) -> None:
    def score(session: SparkSession) -> str:
        try:
            unscored.score(session)
        except ConflictError as error:
            return str(error)
        return "done"

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(score, [another(spark), another(spark)]))
    assert "done" in said
    assert all(one == "done" or "another run wrote this table" in one for one in said)
    unscored.score(spark)
    assert_same_tables(unscored.lakehouse, unscored.undisturbed)


@pytest.mark.parametrize(("place", "stands"), [(("scores", 0), "first"), (("scores_latest", 0), "second")])
def test_scores_of_two_bundles_at_once_do_not_mix(
    spark: SparkSession, unscored: Scored, monkeypatch: pytest.MonkeyPatch, place: Write, stands: str
) -> None:
    places = {place}

    def overtake(write: Write) -> None:
        # right before a write of the first, the second goes the whole way
        if write in places:
            places.remove(write)
            unscored.score(spark, unscored.other)

    conflicts = 0
    with hooked(monkeypatch, overtake):
        try:
            unscored.score(spark)
        except ConflictError:
            conflicts = 1
    assert conflicts == (stands == "second")
    wanted = {"first": unscored.bundle, "second": unscored.other}[stands].digest
    for name in ("scores", "scores_latest"):
        rows = spark.read.format("delta").load(f"{unscored.lakehouse}/bp/{name}").select("user_key", "bundle_digest")
        found = rows.collect()
        assert {row["bundle_digest"] for row in found} == {wanted}
        assert len(found) == len({row["user_key"] for row in found}) == unscored.undisturbed[name].count


@pytest.mark.thorough
def test_featurize_score_forget_and_optimize_at_once_come_to_what_they_do_one_by_one(
    spark: SparkSession, world: World, night: Scored, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # forget searches the folders of work and reports too
    monkeypatch.chdir(tmp_path)
    alone = copied(spark, world.base, tmp_path / "alone")

    def featurize(session: SparkSession, lakehouse: Path) -> object:
        return world.platform.featurize(session, lakehouse)

    def score(session: SparkSession, lakehouse: Path) -> object:
        return Scored(world.platform, lakehouse, night.bundle, night.other, {}).score(session)

    def forget(session: SparkSession, lakehouse: Path) -> object:
        return pipeline.forget(session, world.platform.config(lakehouse), ["u3"])

    def optimize(session: SparkSession, lakehouse: Path) -> object:
        names = [path.name for path in (lakehouse / "bp").iterdir()]
        return [session.sql(f"OPTIMIZE delta.`{lakehouse}/bp/{name}`").collect() for name in names]

    def tried(job: Callable[[SparkSession, Path], object]) -> str:
        try:
            job(another(spark), fresh)
        except (BpSparkError, DeltaConcurrentModificationException) as error:
            return type(error).__name__
        return "done"

    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(tried, (featurize, score, forget, optimize)))
    assert "done" in said
    for lakehouse in (fresh, alone):
        for job in (featurize, forget, featurize, score):
            job(spark, lakehouse)
    assert tables(fresh / "bp") == tables(alone / "bp")
    left = spark.read.format("delta").load(f"{fresh}/bp/scores_latest").select("user_key").collect()
    assert SECRET.key_of("u3") not in {row["user_key"] for row in left}
    assert len(left) == world.undisturbed["user_features"].count - 1


def test_features_written_while_they_are_scored_do_not_mix_into_the_night(
    spark: SparkSession, unscored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = f"{unscored.lakehouse}/bp/user_features"

    def overtake(write: Write) -> None:
        if write == ("scores", 0):
            spark.sql(f"DELETE FROM delta.`{features}` WHERE orders_30d > 0")

    with hooked(monkeypatch, overtake):
        unscored.score(spark)
    left = spark.read.format("delta").load(features).count()
    assert 0 < left < unscored.undisturbed["scores"].count
    assert tables(unscored.lakehouse / "bp")["scores"] == unscored.undisturbed["scores"]


@pytest.mark.slow
def test_maintenance_between_the_stages_of_a_night_changes_no_row(
    spark: SparkSession, world: World, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [("events", 1), ("user_daily", 0)]

    def maintain(write: Write) -> None:
        if places and write == places[0]:
            del places[0]
            for name in ("raw_transactions", "events", "user_daily", "texts"):
                optimize_and_vacuum(spark, fresh / "bp" / name)

    with hooked(monkeypatch, maintain):
        while True:
            # VACUUM without its seven days takes files that a running job still reads
            with suppress(DataError):
                world.platform.featurize(spark, fresh)
                break
    assert places == []
    assert_same_tables(fresh, world.undisturbed)
    assert {stage["status"] for stage in world.platform.featurize(spark, fresh).values()} == {"unchanged"}


@pytest.fixture
def pair(spark: SparkSession, tmp_path: Path) -> tuple[Lakehouse, Lakehouse]:
    """One table as two processes see it."""
    config = TablesConfig(path=str(tmp_path / "lakehouse"))
    first, second = (Lakehouse(session, config) for session in (another(spark), another(spark)))
    first.append(NUMBERS, numbers(spark, 0))
    return first, second


WRITES: dict[str, Callable[[Lakehouse, int, int], int]] = {
    "append": lambda at, n, after: at.append(NUMBERS, numbers(at.spark, n), after=after),
    "replace": lambda at, n, after: at.replace(NUMBERS, numbers(at.spark, n), after=after),
    "merge": lambda at, n, after: at.merge(NUMBERS, numbers(at.spark, n), within={}, after=after),
}


@pytest.mark.parametrize("way", WRITES)
def test_what_follows_from_an_older_state_of_the_table_is_refused(pair: tuple[Lakehouse, Lakehouse], way: str) -> None:
    first, second = pair
    seen = [at.commit_metadata("numbers")["version"] for at in pair]
    first.spark.sql(f"OPTIMIZE delta.`{first.location('numbers')}`")
    version = WRITES[way](first, 1, seen[0])
    assert version == first.version("numbers")
    with pytest.raises(ConflictError, match=r"bp\.numbers"):
        WRITES[way](second, 2, seen[1])
    assert first.version("numbers") == version
    WRITES[way](second, 2, second.commit_metadata("numbers")["version"])
    assert 2 in {row["n"] for row in second.read("numbers").collect()}


def test_an_older_claim_can_write_nothing_after_a_newer_one(pair: tuple[Lakehouse, Lakehouse]) -> None:
    first, second = pair
    other = Table("others", "Others", NUMBERS.columns)
    older = first.reserve(NUMBERS, first.commit_metadata("numbers"))
    newer = second.reserve(NUMBERS, second.commit_metadata("numbers"))
    assert newer > older
    first.replace(other, numbers(first.spark, 1), after=older)
    second.replace(other, numbers(first.spark, 2), after=newer)
    with pytest.raises(ConflictError, match=r"bp\.others"):
        first.replace(other, numbers(first.spark, 3), after=older)
    with pytest.raises(ConflictError, match=r"bp\.numbers"):
        first.append(NUMBERS, numbers(first.spark, 3), after=older)
    second.append(NUMBERS, numbers(first.spark, 4), after=newer)
    assert [row["n"] for row in second.read("others").collect()] == [2]
    assert {row["n"] for row in second.read("numbers").collect()} == {0, 4}


def test_of_writes_that_overlap_one_is_there_and_the_others_are_conflicts(pair: tuple[Lakehouse, Lakehouse]) -> None:
    def write(at: Lakehouse) -> str:
        try:
            at.append(NUMBERS, numbers(at.spark, 7), after=0)
        except ConflictError:
            return "conflict"
        return "done"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(write, pair)) == ["conflict", "done"]
    assert sorted(row["n"] for row in pair[0].read("numbers").collect()) == [0, 7]
