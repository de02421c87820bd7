"""Files that come again: corrected, cut, grown, touched, rewritten by Delta; after each night spend is as the files are."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.ingest import cleaning
from bp_spark.ingest.clean import require_same_terms
from bp_spark.ingest.quarantine import replay
from bp_spark.lakehouse.run import Run
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import EVENTS, RAW_TRANSACTIONS
from tests.support.histories import sorted_rows
from tests.support.platforms import cleaned
from tests.support.rows import forget_column

pytestmark = pytest.mark.slow

MAPPING = """
timezone: UTC
transactions:
  path: "{path}"
  format: {format}
  columns: {{user_id: user, order_id: order{line}, ts: at, amount: paid}}
"""
HEADER = "user,order,line,at,paid"


def settings_of(folder: Path, path: str, file_format: str = "csv", line: str = "", *overrides: str) -> Config:
    (folder / "shop.yaml").write_text(MAPPING.format(path=path, format=file_format, line=line), encoding="utf-8")
    source = ["source.kind=files", f"source.mapping={folder}/shop.yaml", f"tables.path={folder}/lake"]
    return config.load(overrides=[*source, *overrides])


@pytest.fixture
def night(spark: SparkSession) -> Callable[..., dict[str, dict[str, Any]]]:
    """Ingest and clean; return the figures of both stages."""

    def run_night(settings: Config, *, rebuild: bool = False) -> dict[str, dict[str, Any]]:
        return {name: stage["figures"] for name, stage in cleaned(spark, settings, rebuild=rebuild).items()}

    return run_night


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")


def spend(spark: SparkSession, settings: Config) -> list[tuple[str, float]]:
    """Return local time and amount of each event, in order."""
    rows = Lakehouse(spark, settings.tables).read("events").select(F.col("ts").cast("string").alias("ts"), "amount")
    return sorted((row["ts"], float(row["amount"])) for row in rows.collect())


def contents(spark: SparkSession, settings: Config) -> dict[str, list[tuple[Any, ...]]]:
    lakehouse = Lakehouse(spark, settings.tables)
    return {name: sorted_rows(lakehouse.read(name)) for name in ("events", "quarantine", "texts")}


def test_a_night_whose_rows_do_not_balance_is_judged_again_until_they_do(
    spark: SparkSession,
    tmp_path: Path,
    night: Callable[..., dict[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_of(tmp_path, "orders/*.csv")
    quarantine = cleaning.quarantine
    # the first night, and one that adds to it
    for number, attempts in ((1, 1), (2, 2)):
        good, refused = f"u1,o{number},,2024-05-0{number} 10:00:00,20.00", f"u2,p{number},,2024-05-05 11:00:00,a lot"
        write(tmp_path / f"orders/{number}.csv", good, refused)
        with monkeypatch.context() as broken:
            broken.setattr(cleaning, "quarantine", lambda validated: quarantine(validated).limit(0))
            for _ in range(attempts):
                with pytest.raises(DataError, match=r"rows in \(2\) must equal .* \(1 rows\)"):
                    night(settings)
        assert night(settings)["clean"]["quarantine"] == "1"
        assert [amount for _, amount in spend(spark, settings)] == [20.0] * number


def test_tables_from_before_there_were_costs_are_gone_on_with(
    spark: SparkSession, tmp_path: Path, night: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    settings = settings_of(tmp_path, "orders/*.csv", "csv", ", cost: {column: line}")
    write(tmp_path / "orders/1.csv", "u1,o1,,2024-05-01 10:00:00,10.00", "u2,o2,,2024-05-01 11:00:00,a lot")
    night(settings)
    lakehouse = Lakehouse(spark, settings.tables)
    for table in (RAW_TRANSACTIONS, EVENTS):
        forget_column(lakehouse, table, "cost")
    # a day with an event that is known, and one that comes with its cost
    write(tmp_path / "orders/2.csv", "u1,o1,,2024-05-01 10:00:00,10.00", "u3,o3,12.00,2024-05-01 12:00:00,30.00")
    figures = night(settings)["clean"]
    assert (figures["events"], figures["duplicates"], figures["quarantine"]) == ("1", "1", "0")
    costs = [(float(row["amount"]), row["cost"]) for row in lakehouse.read("events").orderBy("amount").collect()]
    assert costs == [(10.0, None), (30.0, Decimal(12))]
    # all anew from raw rows of which some have no such column
    night(settings, rebuild=True)
    again = [(float(row["amount"]), row["cost"]) for row in lakehouse.read("events").orderBy("amount").collect()]
    assert again == costs


def test_a_file_that_comes_again_supersedes_its_days_and_a_touched_one_brings_nothing(
    spark: SparkSession, tmp_path: Path, night: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    settings = settings_of(tmp_path, "orders/*.csv")
    file = tmp_path / "orders/may.csv"
    first = [f"u{n},o{n},,2024-05-0{n} 10:00:00,{n}0.00" for n in range(1, 6)]
    write(file, *first, "u9,o9,,2024-05-03 11:00:00,a lot")
    night(settings)

    # the line of the 3rd is corrected, that of the 4th is gone, so is the one in quarantine; the 1st isn't in the file now
    write(file, *first[1:2], "u3,o3,,2024-05-03 10:00:00,31.00", *first[4:])
    figures = night(settings)["clean"]
    days = [(f"2024-05-0{day} 10:00:00", paid) for day, paid in ((1, 10.0), (2, 20.0), (3, 31.0), (5, 50.0))]
    assert spend(spark, settings) == days
    assert (figures["events"], figures["duplicates"], figures["removed"]) == ("1", "2", "2")
    assert contents(spark, settings)["quarantine"] == []

    # a copy without times
    file.write_bytes(file.read_bytes())
    versions = {name: Lakehouse(spark, settings.tables).version(name) for name in ("events", "raw_transactions")}
    figures = night(settings)["ingest"]
    assert figures["unchanged_files"] == "1"
    assert {name: Lakehouse(spark, settings.tables).version(name) for name in versions} == versions
    assert night(settings)["ingest"]["deliveries"] == "0"

    nightly = contents(spark, settings)
    figures = night(settings, rebuild=True)["clean"]
    assert (figures["superseded"], contents(spark, settings)) == ("5", nightly)


def test_a_mapping_that_is_renamed_or_moved_alone_has_the_same_deliveries(
    spark: SparkSession, tmp_path: Path, night: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    settings = settings_of(tmp_path, "orders/*.csv")
    file, unmoved = tmp_path / "orders/may.csv", "u1,o1,,2024-05-01 10:00:00,10.00"
    write(file, unmoved, "u2,o2,,2024-05-02 10:00:00,20.00", "u9,o9,,2024-05-02 11:00:00,a lot")
    night(settings)
    # speaks about the 2nd alone
    write(file, "u2,o2,,2024-05-02 10:00:00,21.00", "u9,o9,,2024-05-02 11:00:00,a lot")
    night(settings)
    nightly, version = contents(spark, settings), Lakehouse(spark, settings.tables).version("raw_transactions")

    def by(mapping: str, path: str) -> Config:
        (tmp_path / mapping).parent.mkdir(exist_ok=True)
        (tmp_path / mapping).write_text(MAPPING.format(path=path, format="csv", line=""), encoding="utf-8")
        return settings_of(tmp_path, "orders/*.csv", "csv", "", f"source.mapping={tmp_path / mapping}")

    everywhere = f"{tmp_path}/orders/*.csv"
    renamed, moved = by("new.yaml", "orders/*.csv"), by("elsewhere/shop.yaml", everywhere)
    for mapping in (renamed, moved):
        assert night(mapping)["ingest"]["unchanged_files"] == "1"
        assert Lakehouse(spark, settings.tables).version("raw_transactions") == version
        assert contents(spark, settings) == nightly

    # what other mappings have brought is superseded, and a touch is seen
    write(file, "u1,o1,,2024-05-01 10:00:00,11.00", "u2,o2,,2024-05-02 10:00:00,22.00")
    night(moved)
    assert spend(spark, settings) == [("2024-05-01 10:00:00", 11.0), ("2024-05-02 10:00:00", 22.0)]
    assert contents(spark, settings)["quarantine"] == []
    file.write_bytes(file.read_bytes())
    assert night(moved)["ingest"]["unchanged_files"] == "1"
    # another mapping of the same file is another delivery, if it reads other rows
    other = by("other.yaml", "orders/*.csv")
    text = (tmp_path / "other.yaml").read_text(encoding="utf-8").replace("paid}", "{value: 1}}")
    (tmp_path / "other.yaml").write_text(text, encoding="utf-8")
    assert "unchanged_files" not in night(other)["ingest"]


def test_a_line_that_moves_over_midnight_is_one_line(
    spark: SparkSession, tmp_path: Path, night: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    settings = settings_of(tmp_path, "orders/*.csv", "csv", ", line_id: line", "cleaning.day_in=Asia/Shanghai")
    # 15:59 UTC is 23:59 in Shanghai
    write(tmp_path / "orders/1.csv", "u1,o1,1,2024-05-01 15:59:00,30.00", "u2,o2,1,2024-05-01 15:59:00,5.00")
    night(settings)
    write(tmp_path / "orders/2.csv", "u1,o1,1,2024-05-01 16:01:00,30.00", "u2,o2,1,2024-05-03 15:59:00,5.00")
    figures = night(settings)["clean"]
    moved = [("2024-05-01 23:59:00", 5.0), ("2024-05-02 00:01:00", 30.0), ("2024-05-03 23:59:00", 5.0)]
    assert (figures["moved"], spend(spark, settings)) == ("1", moved)
    # and back
    write(tmp_path / "orders/3.csv", "u1,o1,1,2024-05-01 15:58:00,30.00")
    night(settings)
    back = [("2024-05-01 23:58:00", 30.0), *moved[::2]]
    assert spend(spark, settings) == back
    nightly = contents(spark, settings)
    night(settings, rebuild=True)
    assert contents(spark, settings) == nightly
    days = Lakehouse(spark, settings.tables).read("events").select(F.col("event_date").cast("string")).collect()
    assert sorted(row[0] for row in days) == ["2024-05-01", "2024-05-01", "2024-05-03"]
    with pytest.raises(
        ConfigError, match=r"cleaning\.day_in: is UTC, and the days of events are those of Asia/Shanghai"
    ):
        require_same_terms(Lakehouse(spark, settings.tables), config.load().cleaning)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(2, 6))])
def test_random_nights_of_changed_files_come_to_what_a_rebuild_gives(
    spark: SparkSession, tmp_path: Path, night: Callable[..., dict[str, dict[str, Any]]], seed: int
) -> None:
    settings = settings_of(tmp_path, "orders/*.csv", "csv", ", line_id: line")
    rng = np.random.default_rng(seed)

    def line() -> str:
        at = datetime(2024, 5, 1, 18) + timedelta(minutes=int(rng.integers(0, 5 * 1440)))
        number = rng.integers(0, 4) if rng.random() < 0.7 else ""
        paid = "a lot" if rng.random() < 0.1 else f"{rng.integers(1, 4)}.00"
        return f"u{rng.integers(0, 2)},o{rng.integers(0, 3)},{number},{at},{paid}"

    files = {"a": [line() for _ in range(12)], "b": [line() for _ in range(12)]}
    for name, lines in files.items():
        write(tmp_path / f"orders/{name}.csv", *lines)
    night(settings)
    for step in range(3):
        changed = ["a", "b"][step % 2]
        kept = [old for old in files[changed] if rng.random() < 0.7]
        files[changed] = [*kept, *(line() for _ in range(int(rng.integers(1, 6)))), *kept[:1]]
        files[f"new{step}"] = [line() for _ in range(3)]
        for name in (changed, f"new{step}"):
            write(tmp_path / f"orders/{name}.csv", *files[name])
        night(settings)
        if step == 1:
            replay(Run(spark, settings))
    nightly = contents(spark, settings)
    night(settings, rebuild=True)
    assert contents(spark, settings) == nightly


def test_spend_follows_the_rows_of_a_delta_table_and_not_its_files(
    spark: SparkSession, tmp_path: Path, night: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    table = tmp_path / "orders delta"
    settings = settings_of(tmp_path, "orders delta", "delta")

    def lines(*rows: tuple[str, str, str, str]) -> None:
        money = Decimal("5.00")
        df = spark.createDataFrame(
            [(*row[:3], money) for row in rows], "user string, order string, at string, paid decimal(18,2)"
        )
        df.coalesce(1).write.format("delta").mode("append").save(str(table))

    def paid() -> float:
        night(settings)
        return sum(amount for _, amount in spend(spark, settings))

    one, two, three = (("u1", f"o{n}", f"2024-05-0{n} 10:00:00", "") for n in (1, 2, 3))
    lines(one, two)
    assert paid() == 10.0
    # an equal line in another file is another line
    lines(two, three)
    assert paid() == 20.0
    # to rewrite files changes nothing
    spark.sql(f"OPTIMIZE delta.`{table}`").collect()
    spark.sql(f"UPDATE delta.`{table}` SET paid = 7.00 WHERE order = 'o3'")
    assert paid() == 22.0
    spark.sql(f"ALTER TABLE delta.`{table}` SET TBLPROPERTIES ('delta.enableDeletionVectors' = true)")
    assert paid() == 22.0
    # from now on a row can be taken out of a file that stays
    spark.sql(f"UPDATE delta.`{table}` SET paid = 8.00 WHERE order = 'o3'")
    assert paid() == 23.0
    spark.sql(f"DELETE FROM delta.`{table}` WHERE order = 'o2'")
    assert paid() == 13.0
    spark.sql(f"RESTORE TABLE delta.`{table}` TO VERSION AS OF 1").collect()
    assert paid() == 20.0
    nightly = spend(spark, settings)
    night(settings, rebuild=True)
    assert spend(spark, settings) == nightly
