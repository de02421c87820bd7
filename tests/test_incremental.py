"""Night by night: each touches only what it must, and together they come to what a rebuild from the raw tables gives."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark import config, pipeline
from bp_spark.config import Config
from bp_spark.errors import DataError
from bp_spark.tables import EVENTS, USER_DAILY, Lakehouse
from histories import WRITTEN_TEXTS, sorted_rows, write_night

FIRST = date(2024, 2, 1)
NIGHTS = 3
AS_OF = FIRST + timedelta(days=40 + NIGHTS)
MAPPING = (
    """
timezone: UTC
transactions:
  path: "transactions/*.json"
  format: json
  columns: {user_id: user, order_id: order, line_id: line, item_id: item, ts: time, quantity: n, amount: paid}
behaviours:
  path: "behaviours/*.json"
  format: json
  columns: {user_id: user, ts: time, action: action, item_id: item}
items:
  path: "items/*.json"
  format: json
  columns: {item_id: item, title: title, category: category, brand: brand}
"""
    + WRITTEN_TEXTS
)
DERIVED = ("events", "quarantine", "texts", "user_daily", "user_features")


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


@pytest.fixture
def platform(tmp_path: Path) -> Callable[..., Config]:
    """Settings of a platform whose files lie in a folder, with its tables in another."""
    folder = tmp_path / "platform"
    folder.mkdir()
    (folder / "source.yaml").write_text(MAPPING, encoding="utf-8")

    def settings(lakehouse: str = "lakehouse", *overrides: str) -> Config:
        return config.load(
            overrides=[
                "source.kind=files",
                f"source.mapping={folder}/source.yaml",
                f"tables.path={tmp_path}/{lakehouse}",
                f"bundles={tmp_path}/bundles",
                f"training.work_dir={tmp_path}/work",
                # few columns: to plan the rest would be most of the time
                "features.windows=[30, 90]",
                "texts.max_tokens=8",
                *overrides,
            ]
        )

    return settings


def items() -> list[dict[str, Any]]:
    return [{"item": f"i{n}", "title": f"Thing {n}", "category": f"A > b{n % 3}", "brand": "Acme"} for n in range(5)]


def contents(lakehouse: Lakehouse, *without: str) -> dict[str, list[tuple[Any, ...]]]:
    found = {}
    for name in DERIVED:
        df = lakehouse.read(name)
        found[name] = sorted_rows(df, *(c for c in df.columns if c not in (*without, "built_from")))
    return found


def test_nights_come_to_what_a_rebuild_gives(
    spark: SparkSession, tmp_path: Path, platform: Callable[..., Config]
) -> None:
    rng, before = np.random.default_rng(1), list[dict[str, Any]]()
    settings = platform()
    lakehouse = Lakehouse(spark, settings.tables)
    write_night(tmp_path / "platform", 0, items=items())
    for night in range(NIGHTS):
        write_night(tmp_path / "platform", night, **random_night(rng, night, before))
        stages = {stage["stage"]: stage for stage in pipeline.featurize(spark, settings, [AS_OF])}
        figures = stages["clean"]["figures"]
        counted = sum(int(figures[name]) for name in ("events", "duplicates", "quarantine"))
        assert int(figures["rows"]) == counted > 0
    nightly = contents(lakehouse)
    assert {row[0] for row in lakehouse.read("quarantine").select("rule").distinct().collect()} == {
        "amount is unreadable",
        "action is unknown",
        "query is missing",
    }

    pipeline.featurize(spark, settings, [AS_OF], rebuild=True)
    assert contents(lakehouse) == nightly

    # delivered at once to an empty lakehouse: all the same but for the number of the ingest
    at_once = platform("other")
    pipeline.featurize(spark, at_once, [AS_OF])
    everything = contents(Lakehouse(spark, at_once.tables), "ingest_id", "row")
    assert everything == {name: contents(lakehouse, "ingest_id", "row")[name] for name in DERIVED}


def test_a_new_day_touches_its_own_rows_only(
    spark: SparkSession, tmp_path: Path, platform: Callable[..., Config]
) -> None:
    settings = platform()
    lakehouse = Lakehouse(spark, settings.tables)
    rng, before = np.random.default_rng(3), list[dict[str, Any]]()
    write_night(tmp_path / "platform", 0, **random_night(rng, 0, before))
    pipeline.featurize(spark, settings, [AS_OF])
    versions = {name: lakehouse.version(name) for name in ("events", "user_daily")}
    late = {
        "user": "u1",
        "order": "late",
        "line": None,
        "item": "i1",
        "time": "2024-02-20 10:00:00",
        "n": 1,
        "paid": "5",
    }
    write_night(tmp_path / "platform", 1, transactions=[late])
    stages = {stage["stage"]: stage for stage in pipeline.featurize(spark, settings, [AS_OF])}
    assert stages["ingest"]["figures"] == {"ingest_id": "2", "deliveries": "1", "raw_transactions": "1"}
    assert stages["aggregate"]["figures"] == {"user_days": "1", "days": "1"}
    added = lakehouse.changes("events", versions["events"]).collect()
    assert [(row["order_id"], row["_change_type"]) for row in added] == [("late", "insert")]
    again = {stage["stage"]: stage["status"] for stage in pipeline.featurize(spark, settings, [AS_OF])}
    assert set(again.values()) == {"unchanged"}


def test_a_night_stopped_between_its_tables_is_made_whole_by_the_next_run(
    spark: SparkSession, tmp_path: Path, platform: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = platform()
    rng, before = np.random.default_rng(4), list[dict[str, Any]]()
    write_night(tmp_path / "platform", 0, **random_night(rng, 0, before))
    pipeline.featurize(spark, settings, [AS_OF])
    write_night(tmp_path / "platform", 1, **random_night(rng, 1, before))
    append, merge = Lakehouse.append, Lakehouse.merge

    def stop_before(wanted: str) -> None:
        def stopping(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(self: Lakehouse, table: Any, *args: Any, **kwargs: Any) -> Any:
                if table.name == wanted:
                    raise KeyboardInterrupt
                return method(self, table, *args, **kwargs)

            return call

        monkeypatch.setattr(Lakehouse, "append", stopping(append))
        monkeypatch.setattr(Lakehouse, "merge", stopping(merge))

    for table in ("deliveries", EVENTS.name, USER_DAILY.name):
        stop_before(table)
        with pytest.raises(KeyboardInterrupt):
            pipeline.featurize(spark, settings, [AS_OF])
    monkeypatch.undo()
    pipeline.featurize(spark, settings, [AS_OF])
    found = contents(Lakehouse(spark, settings.tables))
    assert len(found["events"]) > 60
    pipeline.featurize(spark, settings, [AS_OF], rebuild=True)
    assert contents(Lakehouse(spark, settings.tables)) == found


def test_a_replay_moves_rows_that_are_good_by_now(
    spark: SparkSession, tmp_path: Path, platform: Callable[..., Config]
) -> None:
    strict = platform("lakehouse", "cleaning.max_amount=10", "cleaning.unknown_items=quarantine")
    line = {"user": "u1", "order": "a", "line": None, "item": "i1", "time": "2024-02-20 10:00:00", "n": 1, "paid": "5"}
    rows = [line, {**line, "paid": "50"}, {**line, "item": "i9"}, {**line, "paid": "much"}]
    write_night(tmp_path / "platform", 0, transactions=rows, items=items())
    pipeline.featurize(spark, strict, [AS_OF])
    assert pipeline.quarantine_by_rule(spark, strict) == [
        ("raw_transactions", "amount is beyond 10", 1),
        ("raw_transactions", "amount is unreadable", 1),
        ("raw_transactions", "item is unknown", 1),
    ]
    write_night(tmp_path / "platform", 1, items=[{"item": "i9", "title": "New", "category": "C > d", "brand": "B"}])
    pipeline.featurize(spark, strict, [AS_OF])
    relaxed = platform("lakehouse", "cleaning.max_amount=100", "cleaning.unknown_items=quarantine")
    stages = {stage["stage"]: stage for stage in pipeline.replay_quarantine(spark, relaxed)}
    assert stages["replay"]["figures"]["events"] == "2"
    lakehouse = Lakehouse(spark, relaxed.tables)
    assert pipeline.quarantine_by_rule(spark, relaxed) == [("raw_transactions", "amount is unreadable", 1)]
    assert float(lakehouse.read("user_daily").agg(F.sum("spend")).first()[0]) == 60.0  # type: ignore[index]
    assert pipeline.replay_quarantine(spark, relaxed)[0]["figures"]["events"] == "0"


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
    write_night(tmp_path / "platform", 0, transactions=[line, line])
    settings = platform()
    with pytest.raises(DataError, match="events: holds no rows"):
        pipeline.featurize(spark, settings, [AS_OF])
    assert Lakehouse(spark, settings.tables).read("quarantine").count() == 2
