"""What a platform may deliver: each row is an event, a duplicate or in quarantine with its rule, and the night ends well."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark import pipeline
from bp_spark.core import config
from bp_spark.core.config import TablesConfig
from bp_spark.core.errors import ConfigError
from bp_spark.ingest.clean import currency_of
from bp_spark.lakehouse.schema import Column, Table
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import TABLE_NAMES
from tests.support.harness import AS_OF, Platform, another, new_platform, purchase, tables
from tests.support.histories import SECRET, write_night

INJECTIONS = [
    "'; DROP TABLE events; --",
    'a" OR "1"="1',
    "`user`",
    "../../etc/passwd",
    "%s%n{0}${x}",
    "\\' OR 1=1",
    "牛奶 🥛",
]
MONEY = ["NaN", "Infinity", "-Infinity", "1e300", "1e17", "9" * 40, "0x10", "1,000", "--5", ""]
LONG = "word " * 2_000_000
DAY = "2024-03-01"


@dataclass(frozen=True)
class Dirty:
    """A lakehouse after two nights of dirt, and the figures of cleaning each."""

    lakehouse: Lakehouse
    figures: list[dict[str, str]]
    again: set[str]

    def rules(self) -> Counter[str]:
        return Counter(row["rule"] for row in self.lakehouse.read("quarantine").select("rule").collect())

    def events(self, user: str) -> list[Any]:
        """Purchases of a user of the platform."""
        theirs = (F.col("user_key") == SECRET.key_of(user)) & (F.col("kind") == "purchase")
        return self.lakehouse.read("events").filter(theirs).collect()


@pytest.fixture(scope="module")
def dirty(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, language: Path) -> Dirty:
    folder = tmp_path_factory.mktemp("dirt")
    platform: Platform = new_platform(folder / "platform", language)
    lines = [purchase("plain", DAY)]
    lines += [purchase(f"money{n}", DAY, paid) for n, paid in enumerate(MONEY)]
    lines += [purchase(user, DAY, item=user) for user in INJECTIONS]
    # a rate that makes money of the platform's own kind that no column can hold
    lines += [purchase("rich", DAY, "999999", currency="XXX"), purchase("poor", DAY, "2", currency="YYY")]
    lines += [purchase("future", "2999-01-01"), purchase("ancient", "0001-01-01"), purchase("never", "2024-02-30")]
    lines += [purchase("broken\ufffdtext", DAY), purchase("half\ud800", DAY), purchase("nul\x00", DAY)]
    twice = purchase("twice", "2024-03-05")
    shuffled = [purchase("order", f"2024-03-{day:02d}", str(day)) for day in (9, 2, 7)]
    reviews = [{"user": "long", "time": f"{DAY} 10:00:00", "item": "i1", "stars": 4, "text": LONG}]
    reviews += [{"user": "stars", "time": f"{DAY} 10:00:00", "item": "i1", "stars": "NaN", "text": "good"}]
    rates = [{"currency": "XXX", "day": "2024-01-01", "rate": "9999999999"}]
    rates += [{"currency": "YYY", "day": "2024-01-01", "rate": "0.5"}]
    searches = [{"user": "plain", "time": f"{DAY} 11:00:00", "query": text} for text in INJECTIONS]
    _write(platform.folder, 0, transactions=[*lines, twice, *shuffled], reviews=reviews, rates=rates, searches=searches)
    figures = [platform.featurize(spark, "lakehouse")["clean"]["figures"]]
    # the next night's file has other columns, and brings late rows and repeated ones
    drifted = [
        {**purchase("added", DAY), "colour": "red", "nested": {"a": [1]}},
        {key: value for key, value in purchase("dropped", DAY).items() if key != "paid"},
        purchase("retyped", DAY, 12.5, n="three"),
        purchase("nested", DAY, {"value": 3}),
        twice,
        purchase("late", "2024-01-02"),
    ]
    _write(platform.folder, 1, transactions=drifted)
    figures.append(platform.featurize(spark, "lakehouse")["clean"]["figures"])
    before = tables(folder / "lakehouse/bp")
    again = {stage["status"] for stage in platform.featurize(spark, "lakehouse").values()}
    assert tables(folder / "lakehouse/bp") == before
    return Dirty(Lakehouse(spark, platform.config("lakehouse").tables), figures, again)


def _write(folder: Path, night: int, **rows: list[dict[str, Any]]) -> None:
    """As JSON in ASCII: half of a surrogate pair has no other form in a file."""
    write_night(folder, night, **{table: [] for table in rows})
    for table, found in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (folder / table / f"{night:03d}.json").write_text(text, encoding="ascii")


def test_every_row_is_an_event_a_duplicate_or_in_quarantine(dirty: Dirty) -> None:
    for figures in dirty.figures:
        counted = sum(int(figures[name]) for name in ("events", "duplicates", "quarantine"))
        assert int(figures["rows"]) == counted > 0
    raw = sum(dirty.lakehouse.read(name).count() for name in ("raw_transactions", "raw_searches", "raw_reviews"))
    assert raw == sum(int(figures["rows"]) for figures in dirty.figures)
    assert dirty.again == {"unchanged"}


def test_amounts_that_are_no_money_are_refused_and_the_rest_of_the_night_is_not(dirty: Dirty) -> None:
    assert not [row for n in range(len(MONEY)) for row in dirty.events(f"money{n}")]
    assert dirty.rules()["amount is unreadable"] + dirty.rules()["amount is missing"] >= len(MONEY)
    assert [float(row["amount"]) for row in dirty.events("plain")] == [10.0]


def test_a_rate_that_makes_more_money_than_fits_costs_that_row_alone(dirty: Dirty) -> None:
    assert dirty.events("rich") == []
    assert dirty.rules()["amount is beyond 1e+06"] == 1
    assert [float(row["amount"]) for row in dirty.events("poor")] == [1.0]


def test_future_ancient_and_impossible_times_are_refused_by_name(dirty: Dirty) -> None:
    rules = dirty.rules()
    assert (rules["ts is in the future"], rules["ts is before 1995-01-01"], rules["ts is unreadable"]) == (1, 1, 1)


def test_broken_unicode_is_refused(dirty: Dirty) -> None:
    assert dirty.rules()["user_id is unreadable"] == 2
    # half of a surrogate pair is a question mark before anything of this package sees it
    assert len(dirty.events("half?")) == 1


def test_ids_that_look_like_code_are_ids(dirty: Dirty) -> None:
    for user in INJECTIONS:
        assert [row["item_id"] for row in dirty.events(user)] == [user]


def test_a_text_of_ten_megabytes_is_read_to_its_limit(dirty: Dirty) -> None:
    assert dirty.lakehouse.read("raw_reviews").agg(F.max(F.length("text"))).first()[0] == len(LONG)
    assert dirty.lakehouse.read("texts").agg(F.max(F.length("text"))).first()[0] <= 2000


def test_added_dropped_and_retyped_columns_of_a_file_cost_only_what_cannot_be_read(dirty: Dirty) -> None:
    assert [float(row["amount"]) for row in dirty.events("added")] == [10.0]
    assert dirty.rules()["amount is missing"] >= 1
    assert dirty.events("dropped") == dirty.events("nested") == dirty.events("retyped") == []
    assert dirty.rules()["quantity is unreadable"] == 1


def test_late_and_repeated_rows_count_once_on_their_own_day(dirty: Dirty) -> None:
    assert [row["event_date"] for row in dirty.events("late")] == [date(2024, 1, 2)]
    assert len(dirty.events("twice")) == 1
    assert dirty.figures[1]["duplicates"] == "1"


def test_rows_out_of_order_are_histories_in_order(dirty: Dirty) -> None:
    days = sorted(row["event_date"].day for row in dirty.events("order"))
    assert days == [2, 7, 9]
    (key,) = {row["user_key"] for row in dirty.events("order")}
    features = dirty.lakehouse.read("user_features").filter((F.col("user_key") == key) & (F.col("as_of_date") == AS_OF))
    assert [row["seq_amount"] for row in features.collect()] == [[2.0, 7.0, 9.0]]


@pytest.mark.parametrize("name", ["bp; DROP TABLE x", "bp`", "../bp", "a.b.c", "bp'--", ""])
def test_a_namespace_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"tables\.namespace"):
        config.load(overrides=[f"tables.namespace={json.dumps(name)}"])


def test_a_folder_whose_name_looks_like_code_is_a_folder(spark: SparkSession, tmp_path: Path) -> None:
    path = tmp_path / "it's; DROP TABLE x --"
    lakehouse = Lakehouse(another(spark), TablesConfig(namespace="odd", path=str(path)))
    table = Table(
        "runs", "Any", (Column("name", "string", "Name"), Column("day", "string", "Day")), partition_by=("day",)
    )
    for value in INJECTIONS:
        rows = spark.createDataFrame([(value, value)], "name string, day string")
        lakehouse.replace(table, rows, where={"day": [value]})
    assert lakehouse.register(TABLE_NAMES) == ["runs"]
    assert {row["name"] for row in lakehouse.spark.sql("SELECT name FROM odd.runs").collect()} == set(INJECTIONS)


def test_events_stay_in_their_currency_until_they_are_derived_anew(
    spark: SparkSession, tmp_path: Path, language: Path
) -> None:
    platform = new_platform(tmp_path / "platform", language)
    write_night(platform.folder, 0, transactions=[purchase("a", DAY, "10"), purchase("b", DAY, "20", currency="EUR")])
    platform.featurize(spark, "lakehouse", "cleaning.currency=USD")
    before = tables(tmp_path / "lakehouse/bp")
    with pytest.raises(ConfigError, match=r"cleaning\.currency: is EUR, and events are in USD"):
        platform.featurize(spark, "lakehouse", "cleaning.currency=EUR")
    assert tables(tmp_path / "lakehouse/bp") == before
    settings = platform.config("lakehouse", "cleaning.currency=EUR")
    pipeline.featurize(spark, settings, [AS_OF], rebuild=True)
    assert currency_of(Lakehouse(spark, settings.tables)) == "EUR"
    # a line that names no currency is in the platform's own
    assert sorted(row["amount"] for row in Lakehouse(spark, settings.tables).read("events").collect()) == [10, 20]
