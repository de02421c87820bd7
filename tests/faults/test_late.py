"""A late night: the changes that it would follow, or the notes in a log, were cleaned away; it is made whole all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession

from bench.long_lived import Platform as LongLived
from bench.long_lived import day
from bp_spark import pipeline
from bp_spark.lakehouse.store import Lakehouse
from tests.support.aged_logs import age_log, optimize_and_vacuum
from tests.support.harness import World, assert_same_tables, small_bundle, tables

KEEPS_SOME = "privacy.retention_days.raw=36500"
"""Raw rows are not all kept, so that events can't be derived from them anew."""
REBUILT = "the changes of events were cleaned away: user_daily was derived from all events anew"


CLEANINGS: dict[str, Callable[[SparkSession, Path], None]] = {
    "OPTIMIZE and VACUUM": optimize_and_vacuum,
    "log cleaned": age_log,
}


@pytest.mark.slow
@pytest.mark.parametrize("how", CLEANINGS)
def test_user_days_whose_changes_were_cleaned_away_are_derived_from_all_events(
    spark: SparkSession, world: World, fresh: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    real = Lakehouse.changes

    def changes(self: Lakehouse, name: str, since: int) -> DataFrame:
        CLEANINGS[how](spark, fresh / "bp/events")
        return real(self, name, since)

    with monkeypatch.context() as patch:
        patch.setattr(Lakehouse, "changes", changes)
        stages = world.platform.featurize(spark, fresh, KEEPS_SOME)
    assert stages["aggregate"]["figures"].get("note") == REBUILT
    assert_same_tables(fresh, world.undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("override", ["privacy.retention_days.raw=null", KEEPS_SOME])
def test_a_night_after_delta_cleaned_all_logs_is_that_of_an_undisturbed_run(
    spark: SparkSession, world: World, fresh: Path, override: str
) -> None:
    for log in (fresh / "bp").glob("*/_delta_log"):
        age_log(spark, log.parent)
    stages = world.platform.featurize(spark, fresh, override)
    assert_same_tables(fresh, world.undisturbed)
    cleaned: dict[str, Any] = stages["clean"]["figures"]
    # derived from all raw rows anew, or from those of the ingests that no event is of
    assert ("note" in cleaned) is (override == KEEPS_SOME)
    assert {stage["status"] for stage in world.platform.featurize(spark, fresh, override).values()} == {"unchanged"}


NIGHTS = 1_000


@pytest.mark.slow
@pytest.mark.thorough
def test_nights_after_three_years_are_those_of_a_rebuild(spark: SparkSession, tmp_path: Path) -> None:
    platform = LongLived(tmp_path, small_bundle(tmp_path / "bundles/small", 20.0).folder)
    platform.live(spark, "old", NIGHTS)
    log = tmp_path / "old/bp/events/_delta_log"
    assert (log / f"{NIGHTS:020d}.json").exists()
    assert not (log / f"{NIGHTS // 2:020d}.json").exists()
    for night in (NIGHTS, NIGHTS + 1):
        platform.night(spark, "old", night)
    nightly = tables(tmp_path / "old/bp")
    assert (nightly["events"].count, nightly["deliveries"].count) == (NIGHTS + 9, NIGHTS + 2)
    pipeline.featurize(spark, platform.settings("old"), [day(NIGHTS + 2)], rebuild=True)
    assert_same_tables(tmp_path / "old", nightly)
