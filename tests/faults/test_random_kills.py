"""Random commands killed at random moments, with OPTIMIZE and VACUUM beside them: run again, tables are as if undisturbed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from tests.support.harness import Scored, World, copied, differences, forget_cached, purchase
from tests.support.histories import write_night
from tests.support.random_kills import Setting, Step, killed_at_random, killed_process, undisturbed

FEW = ("featurize", "score", "forget")
ALL = ("featurize", "score", "forget", "deliver and featurize", "retain", "score")
ROUNDS, KILLS_A_ROUND, KILLED_PROCESSES = 20, 25, 12

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a third night: late rows, repeated ones, dirt, and rows of the user who was forgotten."""
    folder = tmp_path_factory.mktemp("waiting")
    lines = [purchase(f"u{n}", f"2024-03-{n + 1:02d}", f"{n}.25") for n in range(12)]
    late = [purchase("u5", "2024-01-05", "3"), purchase("u6", "2024-02-01", "4"), purchase("u7", "2024-02-01", "many")]
    searches = [{"user": f"u{n}", "time": "2024-03-12 09:00:00", "query": f"premium milk {n % 2}"} for n in range(4)]
    write_night(folder, 2, transactions=[*lines, *lines[:3], *late], searches=searches)
    return folder


@pytest.fixture(scope="module")
def setting(world: World, night: Scored, waiting: Path) -> Iterator[Callable[[Path], Setting]]:
    def at(lakehouse: Path) -> Setting:
        found = Setting(world.platform, waiting, lakehouse, night.bundle.folder)
        found.withdraw()
        return found

    yield at
    at(world.base)


Undisturbed = Callable[[Sequence[str]], list[Step]]


@pytest.fixture(scope="module")
def steps(
    spark: SparkSession, world: World, setting: Callable[[Path], Setting], tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    """What some commands do undisturbed."""
    known: dict[Sequence[str], list[Step]] = {}

    def of(commands: Sequence[str]) -> list[Step]:
        if commands not in known:
            lakehouse = copied(spark, world.base, tmp_path_factory.mktemp("undisturbed") / "lakehouse")
            with pytest.MonkeyPatch.context() as patch:
                # forget searches the folders of work and reports too
                patch.chdir(lakehouse.parent)
                known[commands] = undisturbed(spark, setting(lakehouse), commands)
        return known[commands]

    return of


CASES = [
    pytest.param(FEW, 4, 4, id="few"),
    *(pytest.param(ALL, KILLS_A_ROUND, seed, marks=pytest.mark.thorough, id=f"all-{seed}") for seed in range(ROUNDS)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("commands", "kills", "seed"), CASES)
def test_commands_killed_at_random_come_to_what_they_do_undisturbed(
    spark: SparkSession,
    steps: Undisturbed,
    fresh: Path,
    setting: Callable[[Path], Setting],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
    commands: Sequence[str],
    kills: int,
    seed: int,
) -> None:
    monkeypatch.chdir(fresh.parent)
    outcome = killed_at_random(spark, setting(fresh), steps(commands), kills, random.Random(seed))
    record_property("kills", outcome.kills)
    record_property("differences", len(outcome.differences))
    assert outcome.differences == []
    # a command that goes on from where it was makes fewer calls, and may end before its moment
    assert outcome.kills >= kills // 2


@pytest.mark.slow
@pytest.mark.thorough
def test_processes_killed_at_random_come_to_what_they_do_undisturbed(
    spark: SparkSession,
    steps: Undisturbed,
    fresh: Path,
    setting: Callable[[Path], Setting],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    monkeypatch.chdir(fresh.parent)
    generator, here = random.Random(7), setting(fresh)
    kills, found = 0, dict[str, str]()
    for step in steps(ALL):
        for _ in range(KILLED_PROCESSES // len(ALL)):
            kills += killed_process(here, step, generator)
        forget_cached(spark)
        here.run(spark, step.command)
        found |= {f"{step.command}: {name}": rows for name, rows in differences(fresh, step.tables).items()}
    record_property("kills", kills)
    record_property("differences", len(found))
    assert found == {}
    assert kills
