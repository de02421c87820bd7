"""A late night: the changes that it would follow, or the notes in a log, were cleaned away; it is made whole all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession

from bp_spark.core.session import with_settings
from bp_spark.lakehouse.store import Lakehouse
from tests.support.aged_logs import age_log
from tests.support.harness import World, assert_same_tables

KEEPS_SOME = "privacy.retention_days.raw=36500"
"""Raw rows are not all kept, so that events can't be derived from them anew."""
REBUILT = "the changes of events were cleaned away: user_daily was derived from all events anew"


def optimize_and_vacuum(spark: SparkSession, table: Path) -> None:
    spark.sql(f"OPTIMIZE delta.`{table}`")
    with with_settings(spark, {"spark.databricks.delta.retentionDurationCheck.enabled": "false"}):
        spark.sql(f"VACUUM delta.`{table}` RETAIN 0 HOURS")


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
    assert stages["aggregate"]["figures"]["note"] == REBUILT
    assert_same_tables(fresh, world.undisturbed)
    assert {stage["status"] for stage in world.platform.featurize(spark, fresh, KEEPS_SOME).values()} == {"unchanged"}


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
