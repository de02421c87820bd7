"""The page of a night without Spark: the same as Spark's, from the same tables."""

from __future__ import annotations

import json
import re
import shutil
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from typer.testing import CliRunner

from bp_spark.cli import app, common
from bp_spark.core.config import Config, TablesConfig
from bp_spark.core.errors import DataError
from bp_spark.lakehouse import without_spark
from bp_spark.lakehouse.schema import Table
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import (
    COHORTS,
    CUSTOMER_SERVICE,
    DRIFT,
    EVENTS,
    MARKET_FORECAST,
    PROSPECT_SCORES,
    QUARANTINE,
    RECOMMENDATIONS,
    RUNS,
    SCORES,
    TOTALS,
    USER_PROFILE,
)
from bp_spark.report.job import ReportResult, report, report_without_spark
from tests.support.rows import frame

pytestmark = pytest.mark.slow

NIGHT, BEFORE = date(2024, 3, 10), date(2024, 3, 9)
USERS = 60


def scores(day: date, users: range) -> list[dict[str, Any]]:
    return [
        {
            "user_key": f"u{user}",
            "score_date": day,
            "score": (user * 37 + day.day) % 101 * 1.0,
            "level": "EDCBA"[min(4, (user * 37 + day.day) % 101 // 20)],
            "risk_level": ("low", "medium", "high")[user % 3],
            # sums of such numbers are the same in any order
            "expected_spend": user * 1.25,
            "reasons": [
                # two features as often as one another, and a group without one
                {"group": "visits", "contribution": 1.5 - user % 3, "feature": f"f{user % 2}", "value": 1.0},
                {"group": "recent events", "contribution": -0.25, "feature": None, "value": None},
            ],
        }
        for user in users
    ]


def stage(name: str, hour: int, day: date = NIGHT, **figures: object) -> dict[str, Any]:
    return {
        "run_id": f"run-{day}",
        "job": name,
        "stage": name,
        "status": "done",
        "started_at": datetime(day.year, day.month, day.day, hour, tzinfo=UTC),
        "seconds": 1.5,
        "figures": {key: str(value) for key, value in figures.items()},
        "rows_in": 10,
    }


def scoring(day: date) -> dict[str, Any]:
    return stage("score", 2, day, score_date=day, bundle="b" * 64, users=USERS, expected_spend=1_234.5, computed=7)


def cohort(age: int, retention: float | None, spend: float | None) -> dict[str, Any]:
    return {
        "score_date": NIGHT,
        "cohort": date(2023, 11, 1),
        "cohort_to": date(2023, 12, 1) if age else date(2024, 2, 1),
        "age": age,
        "days": 30.0 * (age + 1),
        "users": USERS,
        "retention": retention,
        "cumulative_spend_per_user": spend,
        "bundle_digest": "b" * 64,
    }


@pytest.fixture(scope="module")
def written(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of a night, which each test copies."""
    folder = tmp_path_factory.mktemp("written")
    lakehouse = Lakehouse(spark, TablesConfig(path=str(folder)))
    rows: dict[Table, list[dict[str, Any]]] = {
        SCORES: [
            *scores(BEFORE, range(USERS)),
            *scores(NIGHT, range(3, USERS + 9)),
            *scores(NIGHT - timedelta(9), range(2)),
        ],
        RUNS: [
            scoring(BEFORE),
            stage("ingest", 1, ingest_id=2),
            {**stage("clean", 1), "status": "failed", "error": "DataError: bp.events: <rule>"},
            scoring(NIGHT),
            {**stage("score", 3), "status": "failed"},
        ],
        EVENTS: [
            {"event_id": f"e{n}", "event_date": NIGHT - timedelta(n), "kind": "purchase" if n % 2 else "search"}
            for n in range(40)
        ],
        QUARANTINE: [
            {"source": "raw_reviews", "rule": f"rule {n % 2}", "ingest_id": n, "row": json.dumps({})} for n in range(5)
        ],
        PROSPECT_SCORES: [
            {"user_key": f"p{n}", "score_date": day, "p_active": 0.25, "expected_spend": 2.5}
            for n in range(12)
            for day in (BEFORE, NIGHT)
        ],
        TOTALS: [
            {
                "score_date": day,
                "horizon_days": days,
                "segment": segment,
                "value": value,
                "users": USERS,
                "expected_spend": days * 1_000.0,
                "low": days * 900.0,
                "high": days * 1_200.0,
                "bundle_digest": bundle * 64,
            }
            for day, bundle in ((BEFORE, "b"), (NIGHT, "b"), (NIGHT, "c"))
            for days in (30, 90)
            for segment, value in (("platform", "all"), ("level", "B"), ("level", "A"), ("region", "north"))
        ],
        COHORTS: [
            {**cohort(age=0, retention=1.0, spend=10.0), "complete": True},
            {**cohort(age=1, retention=0.4, spend=16.0), "complete": True},
            {**cohort(age=2, retention=None, spend=None), "complete": True},
            cohort(age=3, retention=0.1, spend=1_234.5),
            {**cohort(age=3, retention=None, spend=1_300.0), "horizon_days": 90, "low": 30_000.0, "high": 40_000.0},
            {**cohort(age=0, retention=1.0, spend=5.0), "cohort": date(2024, 2, 1)},
            {**cohort(age=0, retention=1.0, spend=98.7), "bundle_digest": "c" * 64},
        ],
        MARKET_FORECAST: [
            {
                "score_date": NIGHT,
                "segment": segment,
                "value": value,
                "measure": "revenue",
                "weeks_ahead": week,
                "week_start": NIGHT + timedelta(weeks=week - 1),
                **(
                    {"actual": 700.0}
                    if week < 1
                    else {
                        "expected": 721.0,
                        "low": 600.0,
                        "high": 800.0 + week,
                        "method": "AutoETS",
                        "mase_vs_naive": 0.9,
                    }
                ),
                **({"users_expected": 8_000.0, "users_days": 90, "gap": 0.25} if segment == "platform" else {}),
            }
            for segment, value in (("platform", "all"), ("category", "Food"), ("level", "B"))
            for week in range(-25 if segment != "level" else 1, 14)
        ],
        RECOMMENDATIONS: [
            {
                "user_key": f"u{n}",
                "score_date": NIGHT - timedelta(3),
                "rank": 1,
                "item_id": "i1" if n < 25 else "rare item",
                "item": "Green tea" if n % 2 else None,
                "score": 0.25,
                "reason": "buy_again" if n < 10 else "similar_users",
                "price": 3.5,
            }
            for n in range(30)
        ],
        USER_PROFILE: [
            {
                "user_key": f"u{n}",
                "score_date": NIGHT,
                "level": "A" if n < 20 else "B",
                "expected_spend": 10.0,
                "expected_margin": 2.5 if n < 25 else None,
            }
            for n in range(30)
        ],
        CUSTOMER_SERVICE: [
            {
                "user_key": f"u{n}",
                "score_date": NIGHT,
                "open_questions": n % 3,
                "asked_about": "delivery" if n < 40 else None,
            }
            for n in range(50)
        ],
        DRIFT: [
            {
                "score_date": NIGHT,
                "kind": "feature",
                "subject": "f0",
                "metric": "psi",
                "value": 0.3,
                "threshold": 0.2,
                "broken": True,
            }
        ],
    }
    for table, some in rows.items():
        lakehouse.replace(table, frame(spark, table, *some))
    return folder


@pytest.fixture
def tables(written: Path, settings: Config) -> Config:
    shutil.copytree(written, str(settings.tables.path))
    return settings


def text(result: ReportResult) -> str:
    return result.page.read_text(encoding="utf-8")


def test_the_page_is_that_of_spark(spark: SparkSession, tables: Config, tmp_path: Path) -> None:
    without = report_without_spark(tables, NIGHT, tmp_path / "without.html")
    by_spark = report(spark, tables, NIGHT, tmp_path / "spark.html")
    assert text(without) == text(by_spark)
    assert "2024-03-09" in text(without)
    assert "rule 1" in text(without)
    assert "12 prospects: 3 first purchases and 30 " in text(without)
    # what the weeks forecast beside the sum over users, and each series beside its past
    assert re.search(r">90</th><td>10,000</td><td>8,000</td><td>\+25\.0%</td><td>–<", text(without))
    weeks = re.findall(r"<td>721</td><td>(.*?)</td><td>600 to 801</td><td>600 to 813</td>", text(without))
    assert weeks == ["+3.0%", "+3.0%", "–"]
    totals = re.findall(r"90,000</td><td>81,000 to 108,000", text(without))
    # of the platform and two levels; one region alone is the platform, and another bundle's rows are not this night's
    assert len(totals) == 3
    # a share, a withheld one, and the spend so far; nothing that isn't complete has a share
    assert re.findall(r"2023-11 to 2023-12</th><td>60</td><td>1,234.50</td>(.*?)</tr>", text(without)) == [
        '<td><span class="heat" style="--part:60%">40%</span></td><td>*</td>'
    ]
    assert "2024-02</th><td>60</td><td>5.00</td><td></td><td></td>" in text(without)
    assert "98.70" not in text(without)
    assert "Spend of a user since the first purchase" in text(without)
    # an item, a level or a topic of fewer than ten users isn't told
    assert re.search(r"Green tea</th><td>25</td><td>40%</td><td>25%</td><td>3\.50<", text(without))
    assert "rare item" not in text(without)
    assert re.findall(r"([AB])</th><td>(\d+\.\d%)<", text(without)) == [("A", "25.0%")]
    assert re.search(r"delivery</th><td>26</td><td>39<", text(without))
    keys = ["level", "bin", "risk_level"]
    figures = [result.levels.sort_values(keys).reset_index(drop=True) for result in (without, by_spark)]
    assert (figures[0][[*keys, "users"]] == figures[1][[*keys, "users"]]).all(axis=None)
    assert without.currency == by_spark.currency
    assert (without.stages, len(by_spark.stages)) == ([], 1)


def test_the_command_reads_without_spark_and_leaves_to_spark_what_it_must(
    tables: Config, spark: SparkSession, lakehouse: Lakehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sessions() -> int:
        words = [
            "report",
            "--date",
            str(NIGHT),
            "--output",
            f"{tmp_path}/page.html",
            f"tables.path={tables.tables.path}",
        ]
        started: list[str] = []
        monkeypatch.setattr(common, "start_session", lambda _, command: started.append(command) or spark)
        result = CliRunner().invoke(app.app, words)
        assert (result.exit_code, "Report: " in result.output) == (0, True)
        return len(started)

    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    assert sessions() == 0
    location = lakehouse.location("scores")
    spark.sql(f"ALTER TABLE delta.`{location}` SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')")
    assert sessions() == 1


def test_the_currency_is_that_of_the_newest_cleaning(lakehouse: Lakehouse, tables: Config) -> None:
    lakehouse.reserve(EVENTS, {"version": lakehouse.version("events"), "currency": "EUR"})
    # maintenance is newer and records nothing
    lakehouse.spark.sql(f"ALTER TABLE delta.`{lakehouse.location('events')}` SET TBLPROPERTIES ('a' = 'b')")
    recorded = without_spark.commit_metadata(tables.tables, "events")
    assert recorded["currency"] == "EUR"
    assert {**recorded, "version": 1} == {**lakehouse.commit_metadata("events"), "version": 1}


def test_a_first_night_is_alike_too(spark: SparkSession, lakehouse: Lakehouse, tables: Config, tmp_path: Path) -> None:
    lakehouse.delete("scores", f"score_date < '{NIGHT}'")
    without = report_without_spark(tables, NIGHT, tmp_path / "without.html")
    assert text(without) == text(report(spark, tables, NIGHT, tmp_path / "spark.html"))


def test_a_date_without_scores_is_the_same_error(spark: SparkSession, tables: Config, tmp_path: Path) -> None:
    day, page = NIGHT + timedelta(1), tmp_path / "none.html"
    for refused in (lambda: report_without_spark(tables, day, page), lambda: report(spark, tables, day, page)):
        with pytest.raises(DataError, match=f"knows no finished scoring of {day}"):
            refused()
    assert not page.exists()
