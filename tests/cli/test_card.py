"""A user's card: what it says, whose it is, and that no Spark starts for it."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from typer.testing import CliRunner, Result

from bp_spark.cli import app, card, common
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.lakehouse.tables import SCORES, USER_PROFILE
from tests.support.histories import SECRET

DAY, BEFORE = date(2024, 3, 10), date(2024, 2, 9)
ANNA, BEN = SECRET.key_of("anna"), SECRET.key_of("ben")


def profile(user_key: str, **more: Any) -> dict[str, Any]:
    row = {
        "user_key": user_key,
        "score_date": DAY,
        "score": 81.25,
        "level": "A",
        "expected_spend": 1_234.5,
        "low": 100.0,
        "high": 2_000.0,
        "p_active": 0.93,
        "reasons": ["Recent purchases: +48.10; above all Spend = 512.30"],
        "compared_30d": BEFORE,
        "score_change_30d": -6.5,
        "trend_30d": "falling",
        "interests": [{"category": "Food>Tea", "weight": 0.6}],
        "price_tier": "premium",
        "stage": "active",
        "activity": "active",
        "days_since_purchase": 3,
        "days_since_visit": 1,
        "purchase_days": 12,
        "usual_gap_days": 7.5,
        "usual_order_value": 60.0,
        "risk_level": "medium",
        "risk_points": 2,
        "expected_refund_share": 0.125,
        "next_purchase_days": 4.4,
        "next_purchase_on": date(2024, 3, 14),
    }
    return {**row, **more}


TABLES: dict[str, list[dict[str, Any]]] = {
    "user_profile": [
        profile(ANNA),
        profile(BEN, level="E", interests=[{"category": "Ben's", "weight": 1.0}]),
    ],
    "risk_control": [
        {"user_key": key, "score_date": DAY, "reasons": [{"text": text}]}
        for key, text in ((ANNA, "Refunds came to 0.30."), (BEN, "Ben's refunds"))
    ],
    # an older date, as after a profile that was stopped
    "customer_service": [
        {
            "user_key": ANNA,
            "score_date": BEFORE,
            "service_tier": "premier",
            "proposal": "Old news",
            "talking_points": [{"text": "Old news"}],
        },
        {
            "user_key": ANNA,
            "score_date": DAY,
            "service_tier": "standard",
            "proposal": "An own courier",
            "talking_points": [],
        },
    ],
    # of a user who bought since, the profile counts
    "prospect_scores": [
        {
            "user_key": key,
            "score_date": day,
            "stage": "prospect",
            "score": 12.0,
            "level": "E",
            "expected_spend": spend,
            "low": 0.0,
            "high": 40.0,
            "p_active": 0.13,
            "reason": "carts_7d",
        }
        for key, day, spend in (
            (SECRET.key_of("dora"), BEFORE, 777.0),
            (SECRET.key_of("dora"), DAY, 5.5),
            (ANNA, BEFORE, 777.0),
        )
    ],
    "recommendations": [
        {
            "user_key": key,
            "score_date": day,
            "rank": rank,
            "item_id": item,
            "score": 0.42,
            "reason": "buy_again",
            "item": "Green tea" if item == "tea-1" else None,
            "price": price,
        }
        for key, day, rank, item, price in (
            (ANNA, DAY, 2, "tea-2", None),
            (ANNA, DAY, 1, "tea-1", 3.5),
            (ANNA, BEFORE, 1, "old news", 1.0),
            (BEN, DAY, 1, "Ben's", 1.0),
        )
    ],
    "consultation_topics": [
        {"consultation_id": f"c{number}", "user_key": key, "topic": topic}
        for number, key, topic in ((4, ANNA, "not shown"), (5, ANNA, "delivery"), (3, BEN, "Ben's"))
    ],
    "consultations": [
        {
            "consultation_id": f"c{number}",
            "user_key": key,
            "ts": datetime(2024, 3, number, 8, tzinfo=UTC),
            "event_date": date(2024, 3, number),
            "channel": "chat",
            "topic": topic,
            "solved": solved,
            "text": "Does\nsize 9 fit? " + 40 * "Please. " if solved is False else "not shown",
        }
        for number, key, topic, solved in (
            (1, ANNA, "first", True),
            (2, ANNA, "size\nrisk low", False),
            (3, BEN, "Ben's", None),
            (4, ANNA, "\x1b[31mred", None),
            (5, ANNA, None, True),
        )
    ],
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "lakehouse"
    for name, rows in TABLES.items():
        write_deltalake(f"{folder}/bp/{name}", pa.Table.from_pylist(rows))
    scores = {
        "user_key": [ANNA, ANNA, BEN],
        "score_date": [DAY, BEFORE, DAY],
        "expected_by_horizon": [{30: 400.0, 90: 1_234.5}, {30: 1.0, 90: 2.0}, {30: 666.0, 90: 666.0}],
    }
    arrays = {name: pa.array(values) for name, values in scores.items() if name != "expected_by_horizon"}
    by_horizon = [list(value.items()) for value in scores["expected_by_horizon"]]
    arrays["expected_by_horizon"] = pa.array(by_horizon, pa.map_(pa.int32(), pa.float64()))
    write_deltalake(f"{folder}/bp/{SCORES.name}", pa.table(arrays), partition_by=["score_date"])
    return folder


def show(tables: Path, *words: str) -> Result:
    return CliRunner().invoke(app.app, ["profile", *words, f"tables.path={tables}"])


@pytest.fixture(autouse=True)
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a session was started")

    monkeypatch.setattr(common, "start_session", refuse)
    for name in ("PYSPARK_GATEWAY_PORT", "SPARK_REMOTE", "DATABRICKS_RUNTIME_VERSION"):
        monkeypatch.delenv(name, raising=False)


def test_a_card_says_what_the_tables_say_of_that_user_alone(tables: Path) -> None:
    result = show(tables, "--user", " anna ")
    assert result.exit_code == 0
    for text in (
        ANNA,
        "81.2 of 100, level A",
        "1,234.50 in 90 days; with 90 % between 100.00 and 2,000.00",
        "400.00 in 30 days",
        "93%",
        "Recent purchases: +48.10",
        "falling since 2024-02-09 (-6.5 points)",
        "medium (2 of 6 points)",
        "Refunds came to 0.30.",
        "active, last purchase 3 days before, last visit 1 day before",
        "about 2024-03-14, in 4 days",
        "60.00 a purchase day, every 7.5 days, 12 purchase days so far",
        "Food>Tea (60%)",
        "12.5% of what is paid",
        "Green tea (tea-1): buy again, 42% within 28 days, about 3.50",
        "tea-2: buy again, 42% within 28 days",
        "An own courier",
        "2024-03-05: chat, delivery, solved",
        "2024-03-02: Does size 9 fit? Please.",
        "and 1 earlier",
    ):
        assert text in result.output
    for text in (BEN, "Ben's", "666", "777", "2.00 in", "Old news", "old news", "not shown", "first", "campaigns"):
        assert text not in result.output


def test_a_user_without_a_purchase_has_a_card_of_the_newest_score(tables: Path) -> None:
    lines = [" ".join(line.split()) for line in show(tables, "--user", "dora").output.replace("│", " ").splitlines()]
    assert lines[0] == f"user dora on {DAY}"
    assert {
        "stage prospect",
        "score 12.0 of 100, level E",
        "expected spend 5.50; with 90 % between 0.00 and 40.00",
        "chance of a first purchase 13%",
        "because of Cart actions, 7 days",
    } < set(lines)
    assert not any(line.startswith(("risk", "activity")) for line in lines)


def test_what_users_wrote_makes_no_line_of_its_own_and_commands_no_terminal(tables: Path) -> None:
    lines = show(tables, "--key", ANNA).output.splitlines()
    assert any("2024-03-02: chat, size risk low, not solved" in line for line in lines)
    question = next(line for line in lines if "2024-03-02: Does size 9 fit?" in line)
    assert question.count("Please.") < 20
    assert any(r"2024-03-04: chat, \x1b[31mred" in line for line in lines)


def test_a_key_shows_the_same_card_as_the_id(tables: Path) -> None:
    by_id, by_key = (show(tables, *words).output.splitlines()[1:] for words in (("--user", "ben"), ("--key", BEN)))
    assert by_id == by_key
    assert any("level E" in line for line in by_key)


@pytest.mark.parametrize("words", [("--user", "carl"), ("--key", ANNA[:-1]), ("--key", "anna"), ("--user", ANNA)])
def test_an_unknown_user_is_one_clear_error_with_nobodys_data(tables: Path, words: tuple[str, str]) -> None:
    result = show(tables, *words)
    assert isinstance(result.exception, DataError)
    assert "user_profile.user_key: holds no profile of that user" in str(result.exception)
    assert words[1] not in str(result.exception)
    assert result.output == ""


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--user", "anna", "--key", ANNA), "one of --user, --key and --date"),
        (("--user", "anna", "--date", "2024-03-10"), "one of --user, --key and --date"),
        (("--key", ANNA, "--date", "2024-03-10"), "one of --user, --key and --date"),
        (("--user", " \t"), "must not be blank"),
        (("--key", ""), "must not be blank"),
    ],
)
def test_nonsense_is_refused(tables: Path, words: tuple[str, ...], reason: str) -> None:
    result = show(tables, *words)
    assert (result.exit_code, reason in result.output) == (2, True)


def test_without_the_secret_or_the_tables_the_error_says_which(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "bp.user_profile: table does not exist" in str(show(tmp_path, "--key", ANNA).exception)
    monkeypatch.delenv("BP_SPARK_SECRET")
    result = show(tables, "--user", "anna")
    assert isinstance(result.exception, ConfigError)
    assert "holds no secret" in str(result.exception)
    assert show(tables, "--key", ANNA).exit_code == 0


def test_what_is_unknown_is_left_out_of_a_card() -> None:
    unknown = dict.fromkeys(column.name for column in USER_PROFILE.columns if not column.required)
    row = profile(ANNA, reasons=[], interests=[], **unknown)
    names = [name for name, _ in card.facts(card.Card(row, None, None, None, [], []))]
    assert names == ["user key", "score", "expected spend", "chance of any spend", "risk", "activity"]
    row["next_purchase_unknown"] = "one purchase day"
    assert ("next purchase", "unknown: one purchase day") in card.facts(card.Card(row, None, None, None, [], []))


def test_a_process_of_its_own_needs_no_session(tables: Path) -> None:
    bin_folder = Path(sys.executable).parent
    command = [str(bin_folder / "bp-spark"), "profile", "--user", "anna", f"tables.path={tables}"]
    # without a Java, no session could start
    environment = {"PATH": str(bin_folder), "JAVA_HOME": "/nowhere", "BP_SPARK_SECRET": os.environ["BP_SPARK_SECRET"]}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tables, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "400.00 in 30 days" in result.stdout
