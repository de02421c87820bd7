"""One platform of a few users with two nights, and what an undisturbed run makes of it: built once for all faults."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import SparkSession

from tests.support.harness import Scored, World, copied, new_platform, purchase, small_bundle, tables
from tests.support.histories import write_night
from tests.support.training_rows import write_language_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("model") / "language", "bert")


@pytest.fixture(scope="session")
def world(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, language: Path) -> World:
    platform = new_platform(tmp_path_factory.mktemp("faults") / "platform", language)
    rng = np.random.default_rng(5)

    def day(number: int) -> str:
        return str(date(2024, 1, 1) + timedelta(days=number))

    lines = [purchase(f"u{rng.integers(0, 24)}", day(int(rng.integers(0, 60))), f"{n}.50") for n in range(80)]
    refused = [purchase("u1", day(3), "much"), purchase("", day(4))]
    searches = [{"user": f"u{n}", "time": f"{day(n)} 09:00:00", "query": f"cheap milk {n % 3}"} for n in range(6)]
    write_night(platform.folder, 0, transactions=[*lines, *refused], searches=searches)
    platform.featurize(spark, "base")
    base = platform.folder.parent / "base"
    first = tables(base / "bp")
    late = [purchase(f"u{n}", day(10 + n), "7") for n in range(5)]
    new = [purchase(f"u{n}", day(70), "9.99") for n in range(20, 30)]
    searched = [{"user": "u25", "time": f"{day(70)} 09:00:00", "query": "premium bread"}]
    write_night(platform.folder, 1, transactions=[*lines[:9], *late, *new, *refused], searches=searched)
    whole = copied(spark, base, platform.folder.parent / "whole")
    figures = platform.featurize(spark, whole)["clean"]["figures"]
    assert {name: figures[name] for name in ("rows", "duplicates", "quarantine")} == {
        "rows": "27",
        "duplicates": "9",
        "quarantine": "2",
    }
    return World(platform, base, first, whole, tables(whole / "bp"))


@pytest.fixture
def fresh(spark: SparkSession, world: World, tmp_path: Path) -> Path:
    """A lakehouse of its own before the second night."""
    return copied(spark, world.base, tmp_path / "lakehouse")


@pytest.fixture(scope="session")
def night(spark: SparkSession, world: World, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    folder = tmp_path_factory.mktemp("night")
    lakehouse = copied(spark, world.whole, folder / "lakehouse")
    made = [small_bundle(folder / f"bundles/{name}", alpha) for name, alpha in (("one", 20.0), ("two", 5.0))]
    found = Scored(world.platform, lakehouse, made[0], made[1], {})
    assert found.score(spark).written
    return Scored(world.platform, lakehouse, made[0], made[1], tables(lakehouse / "bp"))


@pytest.fixture
def unscored(spark: SparkSession, world: World, night: Scored, tmp_path: Path) -> Scored:
    lakehouse = copied(spark, world.whole, tmp_path / "lakehouse")
    return Scored(night.platform, lakehouse, night.bundle, night.other, night.undisturbed)
