"""Consultations and campaigns end in contacts, duplicates or quarantine, in nights as all at once."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import Row, SparkSession

from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError
from bp_spark.governance.retention import ROW_DAYS
from bp_spark.ingest import clean, contacts_job, pseudonyms, quarantine, texts_job
from bp_spark.ingest.contacts import LOGS, validate
from bp_spark.ingest.sources import completejourney
from bp_spark.ingest.sources.completejourney import CompleteJourney
from bp_spark.ingest.sources.files import FilesSource
from bp_spark.lakehouse.run import Run
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import CONSULTATIONS, DELIVERIES, RAW_CONSULTATIONS, RAW_TABLES, SHARED_TABLES
from tests.support.histories import SECRET, raw_frame, sorted_rows
from tests.support.platforms import CONTACTS
from tests.support.rows import frame

TALK = {"user_id": "u1", "ts": "2024-03-01 10:00:00", "channel": "chat", "topic": "size", "text": "too small"}
MAIL = {"user_id": "u1", "campaign_id": "c1", "first_day": "2024-03-01", "last_day": "2024-03-31", "cost": "0.0045"}
LINE = {"user_id": "u1", "ts": "2024-03-01 10:00:00", "amount": "5.00", "delivery": "t"}


def numbered(base: dict[str, Any], *changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**base, **change, "delivery": f"{number:03d}"} for number, change in enumerate(changes)]


CASES: dict[str, dict[str | None, dict[str, Any]]] = {
    "raw_consultations": {
        None: {"topic": None, "text": None, "channel": None},
        "user_id is missing": {"user_id": None},
        "ts is missing": {"ts": None},
        "ts is unreadable": {"ts": "soon"},
        "ts is in the future": {"ts": "2024-06-02 00:00:00"},
        "ts is before 1995-01-01": {"ts": "1970-01-01 00:00:00"},
        "solved is unreadable": {"solved": "perhaps"},
        "text is broken text": {"text": "a\x00b"},
        "topic is broken text": {"topic": "a\ufffdb"},
    },
    "raw_campaigns": {
        # a campaign may be planned, without an end and without a cost
        None: {"first_day": "2031-01-01", "last_day": None, "cost": None},
        "user_id is missing": {"user_id": None},
        "campaign_id is missing": {"campaign_id": " "},
        "first_day is missing": {"first_day": None},
        "first_day is unreadable": {"first_day": "31.12.2024"},
        "last_day is unreadable": {"last_day": "2024-02-30"},
        "first_day is before 1995-01-01": {"first_day": "1970-01-01"},
        "first_day is after last_day": {"last_day": "2024-02-29"},
        "cost is negative": {"cost": "-0.01"},
        "cost is beyond 1e+06": {"cost": "1000000.01"},
        "cost is unreadable": {"cost": "5 EUR"},
        "kind is broken text": {"kind": "\x01"},
    },
}


@pytest.mark.parametrize("log", LOGS, ids=lambda log: log.raw.name)
def test_each_broken_rule_is_named(spark: SparkSession, log: Any) -> None:
    cases = CASES[log.raw.name]
    rows = raw_frame(spark, log.raw.name, *numbered(TALK if "ts" in log.identity else MAIL, *cases.values()))
    validated = validate(log, rows, config.load().cleaning)
    assert [row["rule"] for row in validated.orderBy("delivery").collect()] == list(cases)


NIGHTS: tuple[dict[str, list[dict[str, Any]]], ...] = (
    {
        "raw_transactions": [LINE, {**LINE, "amount": "much"}],
        "raw_consultations": numbered(
            TALK,
            {},
            {},  # the same once more
            {"ts": "2024-03-01 10:00:00.0000007"},
            {"ts": "2024-03-01 10:00:00.000001"},
            {"solved": "perhaps"},
        ),
        "raw_campaigns": numbered(MAIL, {}, {"user_id": "u2"}, {"user_id": "u3", "cost": "2000000"}),
    },
    {
        # answered since, and one that is new; the other cost is corrected
        "raw_consultations": numbered(TALK, {"solved": "yes"}, {"channel": "store", "solved": "0"}, {"user_id": None}),
        "raw_campaigns": numbered(MAIL, {}, {"user_id": "u2", "cost": "0.25"}, {"user_id": "u3", "cost": "2"}),
    },
)


def deliver(spark: SparkSession, lakehouse: Lakehouse, *nights: int) -> None:
    """Store the raw rows of some nights, as the ingest does."""
    tables = {table.name: table for table in RAW_TABLES}
    for night in nights:
        for name, rows in NIGHTS[night - 1].items():
            at = f"2024-06-0{night}"
            lakehouse.append(tables[name], raw_frame(spark, name, *rows, ingest_id=night, at=at))
        lakehouse.append(
            DELIVERIES, spark.createDataFrame([("s", "t", "n", "f", night, None, None, None)], DELIVERIES.schema)
        )


def night(
    spark: SparkSession, settings: Config, *, with_events: bool = False, rebuild: bool = False
) -> dict[str, dict[str, Any]]:
    run = Run(spark, settings)
    if with_events:
        clean.clean(run, rebuild)
    contacts_job.contacts(run, rebuild)
    return {stage["stage"]: {**stage["figures"], "status": stage["status"]} for stage in run.records}


def contents(lakehouse: Lakehouse) -> dict[str, Any]:
    frames = {name: lakehouse.read(name) for name in ("consultations", "campaign_contacts")}
    quarantined = lakehouse.read("quarantine").filter("source <> 'raw_transactions'")
    return {name: sorted_rows(frame) for name, frame in {**frames, "quarantine": quarantined}.items()}


@pytest.mark.slow
def test_nights_come_to_the_contacts_of_a_rebuild_and_a_replay_keeps_what_is_newer(
    spark: SparkSession, settings: Config, lakehouse: Lakehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver(spark, lakehouse, 1)
    first = night(spark, settings)
    balance = ("rows", "contacts", "duplicates", "quarantine")
    assert [first["consultations"][name] for name in balance] == ["5", "2", "2", "1"]
    assert [first["campaign_contacts"][name] for name in balance] == ["3", "2", "0", "1"]
    assert night(spark, settings)["consultations"]["status"] == "unchanged"

    deliver(spark, lakehouse, 2)
    # killed when the quarantine has its rows, and the table has not: the next run makes the night whole
    real = Lakehouse.merge

    def killed(self: Lakehouse, *args: Any, **kwargs: Any) -> int:
        monkeypatch.setattr(Lakehouse, "merge", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(Lakehouse, "merge", killed)
    with pytest.raises(KeyboardInterrupt):
        night(spark, settings)
    second = night(spark, settings)
    assert [second["consultations"][name] for name in (*balance, "corrections")] == ["3", "1", "1", "1", "1"]
    assert [second["campaign_contacts"][name] for name in (*balance, "corrections")] == ["3", "1", "2", "0", "1"]

    talks = {(row["channel"], row["ts"].microsecond): row for row in lakehouse.read("consultations").collect()}
    assert {key: row["solved"] for key, row in talks.items()} == {
        ("chat", 0): True,
        ("chat", 1): None,
        ("store", 0): False,
    }
    assert {(row["ingest_id"], row["ingested_at"].day) for row in talks.values()} == {(1, 1), (2, 2)}
    costs = {row["user_key"]: row["cost"] for row in lakehouse.read("campaign_contacts").collect()}
    assert costs == {"u1": Decimal("0.004500"), "u2": Decimal("0.250000"), "u3": Decimal("2.000000")}
    nightly = contents(lakehouse)
    assert "note" not in second["consultations"]
    # events are cleaned from all raw rows as well: neither stage takes the other's rows out of quarantine
    night(spark, settings, with_events=True, rebuild=True)
    assert contents(lakehouse) == nightly
    by_rule = [(row["source"], row["rule"], row["ingest_id"]) for row in lakehouse.read("quarantine").collect()]
    assert sorted(by_rule) == [
        ("raw_campaigns", "cost is beyond 1e+06", 1),
        ("raw_consultations", "solved is unreadable", 1),
        ("raw_consultations", "user_id is missing", 2),
        ("raw_transactions", "amount is unreadable", 1),
    ]

    # by other settings the first night's cost would pass; the second night corrected it
    widened = settings.model_copy(update={"cleaning": settings.cleaning.model_copy(update={"max_amount": 3e6})})
    run = Run(spark, widened)
    quarantine.replay(run)
    contacts_job.replay(run)
    figures = {stage["stage"]: stage["figures"] for stage in run.records}
    assert (figures["replay"]["rows"], figures["replay"]["quarantine"]) == ("1", "1")
    replayed = figures["replay campaign_contacts"]
    assert [replayed[name] for name in balance] == ["1", "0", "1", "0"]
    assert (figures["replay consultations"]["rows"], figures["replay consultations"]["quarantine"]) == ("2", "2")
    assert {row["user_key"]: row["cost"] for row in lakehouse.read("campaign_contacts").collect()} == costs
    assert lakehouse.read("quarantine").count() == 3

    kept_short = settings.model_copy(
        update={
            "privacy": settings.privacy.model_copy(
                update={"retention_days": settings.privacy.retention_days.model_copy(update={"raw": 9})}
            )
        }
    )
    with pytest.raises(ConfigError, match="consultations can't be derived from them anew"):
        contacts_job.contacts(Run(spark, kept_short), rebuild=True)


@pytest.mark.slow
def test_a_corrected_file_of_consultations_takes_the_place_of_the_first(
    spark: SparkSession, settings: Config, lakehouse: Lakehouse
) -> None:
    day = date(2024, 3, 1)
    for number, text in enumerate(("Where is it?", "Where is my parcel?"), start=1):
        talk = {**TALK, "text": text, "delivery": "talks.csv"}
        lakehouse.append(RAW_CONSULTATIONS, raw_frame(spark, "raw_consultations", talk, ingest_id=number))
        version = (
            "s",
            "raw_consultations",
            "talks.csv",
            text,
            number,
            *([day, day] if number > 1 else [None, None]),
            None,
        )
        lakehouse.append(DELIVERIES, spark.createDataFrame([version], DELIVERIES.schema))
        night(spark, settings)
    assert [row["text"] for row in lakehouse.read("consultations").collect()] == ["Where is my parcel?"]


def test_topics_follow_from_phrases_and_meaning_and_are_found_once(
    spark: SparkSession, settings: Config, lakehouse: Lakehouse
) -> None:
    written = {
        "Has the courier been? My order is a week late.": "delivery",
        "The zip broke after one day": "quality",
        "我的快递还没到": "delivery",  # by a phrase
        "为什么昨天更好": None,  # an English model can't read it, and doesn't guess
        "Nice weather today": None,
        "!": None,
    }
    talk = {"consultation_id": "", "user_key": "u", "event_date": date(2024, 3, 1)}
    talks = [{**talk, "consultation_id": f"c{number}", "text": text} for number, text in enumerate(written)]

    def found(*changes: str) -> tuple[dict[str, Any], list[Row]]:
        run = Run(spark, config.load(overrides=[f"tables.path={settings.tables.path}", *changes]))
        texts_job.find_topics(run)
        [stage] = run.records
        rows = lakehouse.read("consultation_topics").orderBy("consultation_id").collect()
        return {**stage, **stage["figures"]}, rows

    lakehouse.replace(CONSULTATIONS, frame(spark, CONSULTATIONS, *talks, {**talk, "consultation_id": "silent"}))
    first, rows = found()
    assert {row["consultation_id"]: row["topic"] for row in rows} == {
        talk["consultation_id"]: written[talk["text"]] for talk in talks
    }
    assert [row["similarity"] is None for row in rows] == [False, False, False, True, False, True]
    assert (rows[2]["similarity"], first["rows_in"]) == (1.0, 6)
    assert found()[0]["status"] == "unchanged"

    # one is gone, one is new
    new = {**talk, "consultation_id": "new", "text": "Can I get an invoice?"}
    lakehouse.replace(CONSULTATIONS, frame(spark, CONSULTATIONS, *talks[1:], new))
    second, rows = found()
    assert (second["rows_in"], len(rows)) == (1, 6)
    assert {row["consultation_id"]: row["topic"] for row in rows}["new"] == "payment"
    # without one that is gone, the table's rows stay and new ones are added
    more = [*talks[1:], new, {**new, "consultation_id": "newer"}]
    lakehouse.replace(CONSULTATIONS, frame(spark, CONSULTATIONS, *more))
    third, rows = found()
    assert (third["rows_in"], len(rows)) == (1, 7)

    # other settings find all anew
    own, rows = found("topics.phrases={repairs: [broke]}", "topics.least_similarity=1")
    assert (own["rows_in"], [row["topic"] for row in rows].count("repairs")) == (7, 1)

    _, rows = found("topics.phrases={}")
    assert {row["topic"] for row in rows} == {None}


def test_a_mapping_reads_contacts_and_promotions_and_texts_are_masked(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "shop.yaml").write_text(
        'transactions: {path: "*.csv", format: csv, columns: {user_id: who, ts: at, amount: paid}}'
        + CONTACTS
        + 'promotions: {path: "offers.json", format: json, columns: {item_id: sku, first_day: {column: von, format: '
        "dd.MM.yyyy}, kind: {value: shelf}, stores: n, campaign_id: c}}\n",
        encoding="utf-8",
    )
    lines = {
        "orders.csv": "who,at,paid\nu1,2024-05-01,5\n",
        "consultations/1.json": '{"user": "u1", "time": "2024-05-01T10:00:00Z", "topic": "ring 138 1234 5678", '
        '"text": "mail a@b.org", "solved": 1}\n{"user": "u2", "time": "2024-05-01 10:00", "solved": "N"}\n',
        "campaigns/1.json": '{"user": 17.0, "campaign": "7.0", "from": "2024-05-01", "to": "2024-05-09", "cost": 0.00351}\n',
        "offers.json": '{"sku": "i1", "von": "01.05.2024", "n": 3}\n{"sku": "i2", "von": "02.05.2024", "n": "many", "c": 5}\n',
    }
    for name, text in lines.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    source = FilesSource(tmp_path / "shop.yaml")
    rows = source.read(spark, source.deliveries(spark))
    talks = pseudonyms.pseudonymous(rows["raw_consultations"], "raw_consultations", SECRET, pseudonyms.mask)
    assert [tuple(row) for row in talks.select("topic", "text", "solved").orderBy("topic").collect()] == [
        (None, None, False),
        ("ring <phone>", "mail <email>", True),
    ]
    [sent] = rows["raw_campaigns"].collect()
    assert (sent.user_id, sent.campaign_id, sent.first_day, sent.last_day, sent.cost) == (
        *("17", "7"),
        *(date(2024, 5, 1), date(2024, 5, 9)),
        Decimal("0.003510"),
    )
    first, second = rows["raw_promotions"].orderBy("item_id").collect()
    assert (first.first_day, first.last_day, first.kind, first.stores) == (date(2024, 5, 1), None, "shelf", 3)
    assert (second.stores, second.unreadable, second.campaign_id) == (None, {"stores": "many"}, "5")

    lacking = tmp_path / "lacking.yaml"
    lacking.write_text((tmp_path / "shop.yaml").read_text(encoding="utf-8").replace("first_day: from, ", ""))
    with pytest.raises(ConfigError, match=r"campaigns\.columns\.first_day is missing"):
        FilesSource(lacking)


def test_the_complete_journey_brings_campaigns_promotions_and_coupons(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = {"campaign_id": 9, "campaign_type": "Type B", "start_date": datetime(2017, 3, 3)}
    files: dict[str, list[dict[str, Any]]] = {
        "campaign_descriptions": [{**described, "end_date": datetime(2017, 4, 9)}],
        "campaigns": [{"household_id": 105, "campaign_id": 9}, {"household_id": 106, "campaign_id": 10}],
        "coupons": [{"coupon_upc": 77, "product_id": 5, "campaign_id": 9}] * 2,
        "promotions": [
            {"product_id": 5, "week": week, "store_id": store, "display_location": display, "mailer_location": mailer}
            for week, store, display, mailer in ((1, 1, "9", "0"), (2, 1, "3", "A"), (2, 2, "5", "0"))
        ],
    }
    for name, rows in files.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet", coerce_timestamps="us")
    monkeypatch.setattr(completejourney, "data_folder", lambda: tmp_path)
    source = CompleteJourney()
    wanted = [d for d in source.deliveries(spark) if d.table in ("raw_campaigns", "raw_promotions")]
    rows = source.read(spark, wanted)
    columns = ("user_id", "campaign_id", "first_day", "last_day", "kind", "unreadable")
    assert sorted_rows(rows["raw_campaigns"], *columns) == [
        ("105", "9", date(2017, 3, 3), date(2017, 4, 9), "Type B", None),
        ("106", "10", None, None, None, None),
    ]
    columns = ("item_id", "first_day", "last_day", "kind", "stores", "promotion_id", "campaign_id")
    assert sorted_rows(rows["raw_promotions"], *columns) == [
        ("5", date(2016, 12, 26), date(2017, 1, 1), "display", 1, None, None),
        ("5", date(2017, 1, 2), date(2017, 1, 8), "display", 2, None, None),
        ("5", date(2017, 1, 2), date(2017, 1, 8), "mailer", 1, None, None),
        ("5", date(2017, 3, 3), date(2017, 4, 9), "coupon", None, "77", "9"),
    ]


def test_retention_covers_each_log_of_users() -> None:
    raw = {table.name for table in RAW_TABLES if "user_key" in table.schema.names} - {"raw_users"}
    assert raw | {"quarantine"} == set(ROW_DAYS["raw"])
    cleaned = {log.cleaned.name for log in LOGS}
    assert cleaned <= set(ROW_DAYS["events"])
    assert cleaned <= {table.name for table in SHARED_TABLES}
