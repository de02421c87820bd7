"""Night by night: each touches only what it must, and together they come to what a rebuild from the raw tables gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark import pipeline
from bp_spark.core.config import Config
from bp_spark.core.errors import DataError
from bp_spark.ingest import job
from bp_spark.lakehouse.store import Lakehouse
from tests.support.histories import clock_at, sorted_rows, write_night
from tests.support.platforms import DERIVED, MAPPING, cleaned, settings_in

pytestmark = pytest.mark.slow

FIRST = date(2024, 2, 1)
NIGHTS = 4
AS_OF = FIRST + timedelta(days=40 + NIGHTS)


def random_night(rng: np.random.Generator, night: int, before: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What is delivered on a night: its day's rows (40 days on the first), late ones, repeated ones, corrections, dirt."""
    newest = datetime(FIRST.year, FIRST.month, FIRST.day) + timedelta(days=40 + night)

    def when() -> str:
        days = rng.integers(0, 40) if night == 0 or rng.random() < 0.3 else 0
        return str(newest - timedelta(days=int(days), seconds=int(rng.integers(1, 80_000))))

    def user() -> str:
        return f"u{rng.integers(0, 8)}"

    count = 60 if night == 0 else 15
    lines = [
        {
            "user": user(),
            "order": f"o{rng.integers(0, 40)}",
            "line": f"{rng.integers(0, 500)}" if rng.random() < 0.5 else None,
            "item": f"i{rng.integers(0, 6)}",
            "time": when(),
            "n": int(rng.integers(1, 4)),
            "paid": str(round(float(rng.lognormal(2, 1)), 2)) if rng.random() > 0.1 else "a lot",
        }
        for _ in range(count)
    ]
    again = [dict(before[index]) for index in rng.permutation(len(before))[:6]]
    corrected = [{**row, "paid": "1.23"} for row in again if row["line"]]
    twice = lines[:2]
    actions = [
        {"user": user(), "time": when(), "action": str(rng.choice(["browse", "cart", "stare"])), "item": "i1"}
        for _ in range(8)
    ]
    searches = [
        {"user": user(), "time": when(), "query": str(rng.choice(["cheap milk", "Acme", "", "牛奶 便宜"]))}
        for _ in range(5)
    ]
    reviews = [{"user": user(), "time": when(), "item": "i2", "stars": 4, "text": f"good {night}"} for _ in range(3)]
    before += lines
    return {
        "transactions": [*lines, *twice, *again, *corrected],
        "behaviours": actions,
        "searches": searches,
        "reviews": reviews,
    }


def new_platform(folder: Path) -> Path:
    (folder / "platform").mkdir()
    (folder / "platform/source.yaml").write_text(MAPPING, encoding="utf-8")
    return folder


@pytest.fixture
def platform(tmp_path: Path) -> Callable[..., Config]:
    """Settings of a platform whose files lie in a folder, with its tables in another."""
    return partial(settings_in, new_platform(tmp_path))


def items() -> list[dict[str, Any]]:
    return [{"item": f"i{n}", "title": f"Thing {n}", "category": f"A > b{n % 3}", "brand": "Acme"} for n in range(5)]


def contents(lakehouse: Lakehouse, *without: str) -> dict[str, list[tuple[Any, ...]]]:
    found = {}
    for name in DERIVED:
        df = lakehouse.read(name)
        found[name] = sorted_rows(df, *(c for c in df.columns if c not in (*without, "built_from")))
    return found


LATE = {
    "user": "u1",
    "order": "late",
    "line": None,
    "item": "i1",
    "time": "2024-02-20 10:00:00",
    "n": 1,
    "paid": "5",
}
"""The only row of the last night."""


@dataclass(frozen=True)
class Nights:
    """Some nights of a platform, and what the last one changed."""

    folder: Path
    lakehouse: Lakehouse
    stages: list[dict[str, dict[str, Any]]]
    changed_events: list[tuple[str, str]]


@pytest.fixture(scope="module")
def nights(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Nights:
    folder = new_platform(tmp_path_factory.mktemp("nights"))
    rng, before = np.random.default_rng(1), list[dict[str, Any]]()
    settings = settings_in(folder)
    lakehouse, stages, seen = Lakehouse(spark, settings.tables), list[dict[str, dict[str, Any]]](), 0
    write_night(folder / "platform", 0, items=items())
    for night in range(NIGHTS):
        last = night == NIGHTS - 1
        rows = {"transactions": [LATE]} if last else random_night(rng, night, before)
        write_night(folder / "platform", night, **rows)
        if last:
            seen = lakehouse.version("events")
        stages.append({stage["stage"]: stage for stage in pipeline.featurize(spark, settings, [AS_OF])})
    changed = [(row["order_id"], row["_change_type"]) for row in lakehouse.changes("events", seen).collect()]
    return Nights(folder, lakehouse, stages, changed)


def test_a_new_day_touches_its_own_rows_only(spark: SparkSession, nights: Nights) -> None:
    last = nights.stages[-1]
    assert last["ingest"]["figures"] == {"ingest_id": f"{NIGHTS}", "deliveries": "1", "raw_transactions": "1"}
    assert last["aggregate"]["figures"] == {"user_days": "1", "days": "1"}
    assert nights.changed_events == [("late", "insert")]
    again = {stage["status"] for stage in pipeline.featurize(spark, settings_in(nights.folder), [AS_OF])}
    assert again == {"unchanged"}


def test_nights_come_to_what_a_rebuild_gives(spark: SparkSession, nights: Nights) -> None:
    for stages in nights.stages:
        figures = stages["clean"]["figures"]
        counted = sum(int(figures[name]) for name in ("events", "duplicates", "quarantine"))
        assert int(figures["rows"]) == counted > 0
    lakehouse, nightly = nights.lakehouse, contents(nights.lakehouse)
    assert {row[0] for row in lakehouse.read("quarantine").select("rule").distinct().collect()} == {
        "amount is unreadable",
        "action is unknown",
        "query is missing",
    }

    pipeline.featurize(spark, settings_in(nights.folder), [AS_OF], rebuild=True)
    assert contents(lakehouse) == nightly

    # delivered at once to an empty lakehouse: all the same but for the number of the ingest
    at_once = settings_in(nights.folder, "other")
    pipeline.featurize(spark, at_once, [AS_OF])
    everything = contents(Lakehouse(spark, at_once.tables), "ingest_id", "row")
    assert everything == {name: contents(lakehouse, "ingest_id", "row")[name] for name in DERIVED}


def test_a_replay_moves_rows_that_are_good_by_now(
    spark: SparkSession, tmp_path: Path, platform: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = platform("lakehouse", "cleaning.max_amount=10", "cleaning.unknown_items=quarantine")
    line = {"user": "u1", "order": "a", "line": None, "item": "i1", "time": "2024-02-20 10:00:00", "n": 1, "paid": "5"}
    rows = [line, {**line, "paid": "50"}, {**line, "item": "i9"}, {**line, "paid": "much"}]
    rows += [{**line, "time": "2024-02-25 10:00:00", "paid": "7"}]
    write_night(tmp_path / "platform", 0, transactions=rows, items=items())

    with monkeypatch.context() as patch:
        patch.setattr(job, "datetime", clock_at(datetime(2024, 2, 21, tzinfo=UTC)))
        pipeline.featurize(spark, strict, [AS_OF])
    assert pipeline.quarantine_by_rule(spark, strict) == [
        ("raw_transactions", "amount is beyond 10", 1),
        ("raw_transactions", "amount is unreadable", 1),
        ("raw_transactions", "item is unknown", 1),
        ("raw_transactions", "ts is in the future", 1),
    ]
    write_night(tmp_path / "platform", 1, items=[{"item": "i9", "title": "New", "category": "C > d", "brand": "B"}])
    cleaned(spark, strict)
    relaxed = platform("lakehouse", "cleaning.max_amount=100", "cleaning.unknown_items=quarantine")
    stages = {stage["stage"]: stage for stage in pipeline.replay_quarantine(spark, relaxed)}
    assert stages["replay"]["figures"]["events"] == "3"
    lakehouse = Lakehouse(spark, relaxed.tables)
    assert pipeline.quarantine_by_rule(spark, relaxed) == [("raw_transactions", "amount is unreadable", 1)]
    assert float(lakehouse.read("user_daily").agg(F.sum("spend")).first()[0]) == 67.0  # type: ignore[index]
    assert pipeline.replay_quarantine(spark, relaxed)[0]["figures"]["events"] == "0"


def test_a_mapping_by_another_path_brings_nothing_new(
    spark: SparkSession, tmp_path: Path, platform: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"user": "u1", "order": "o", "item": "i1", "time": "2024-02-20 10:00:00", "n": 1, "paid": "1"}
    write_night(tmp_path / "platform", 0, transactions=[line])
    assert cleaned(spark, platform())["ingest"]["status"] == "done"
    (tmp_path / "link.yaml").symlink_to(tmp_path / "platform/source.yaml")
    monkeypatch.chdir(tmp_path / "platform")
    for path in ("source.yaml", "../platform/source.yaml", f"{tmp_path}/link.yaml"):
        assert cleaned(spark, platform("lakehouse", f"source.mapping={path}"))["ingest"]["status"] == "unchanged"
    # the platform's folder is moved, times and all
    monkeypatch.chdir(tmp_path)
    (tmp_path / "platform").rename(tmp_path / "moved")
    moved = platform("lakehouse", f"source.mapping={tmp_path}/moved/source.yaml")
    assert cleaned(spark, moved)["ingest"]["status"] == "unchanged"


def test_a_platform_without_a_row_is_refused_and_leaves_no_table(
    spark: SparkSession, tmp_path: Path, platform: Callable[..., Config]
) -> None:
    settings = platform()
    with pytest.raises(DataError, match="transactions"):
        pipeline.featurize(spark, settings, [AS_OF])
    write_night(tmp_path / "platform", 0, transactions=[])
    with pytest.raises(DataError):
        pipeline.featurize(spark, settings, [AS_OF])
    lakehouse = Lakehouse(spark, settings.tables)
    assert not any(lakehouse.exists(name) for name in ("raw_transactions", "deliveries", "events"))


def test_a_platform_of_nothing_but_refused_rows_is_told_so(
    spark: SparkSession, tmp_path: Path, platform: Callable[..., Config]
) -> None:
    line = {"user": "u1", "order": "o", "item": "i1", "time": "2024-02-20 10:00:00", "n": 1, "paid": "a lot"}
    broken = [
        {"user": ""},
        {"paid": ""},
        {"time": "2001-01-01", "user": None},
        {"time": "1970-01-01"},
        {"time": ""},
        {"n": "x"},
    ]
    write_night(
        tmp_path / "platform", 0, transactions=[line, line, line, *({**line, "paid": "1", **one} for one in broken)]
    )
    settings = platform()
    with pytest.raises(DataError, match="events: holds no rows") as caught:
        pipeline.featurize(spark, settings, [AS_OF])
    most = "amount is unreadable (3 of raw_transactions), user_id is missing (2 of raw_transactions), amount is missing (1 of"
    assert most in str(caught.value)
    assert "quarantine show" in str(caught.value)
    assert "a lot" not in str(caught.value)
    lakehouse = Lakehouse(spark, settings.tables)
    assert lakehouse.read("quarantine").count() == 9
    # a later night of that kind ends well, and says so
    write_night(tmp_path / "platform", 1, transactions=[{**line, "paid": "1"}])
    cleaned(spark, settings)
    write_night(tmp_path / "platform", 2, transactions=[line])
    stages = {stage["stage"]: stage for stage in pipeline.featurize(spark, settings, [AS_OF])}
    assert "most of them for: amount is unreadable (1 of raw_transactions)" in stages["clean"]["figures"]["note"]
