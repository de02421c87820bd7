"""Keys instead of ids, texts without numbers that tell who wrote them; and that neither gets around it."""

from __future__ import annotations

import hashlib
import hmac
import stat
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.core import config
from bp_spark.core.errors import ConfigError
from bp_spark.ingest import pseudonyms
from bp_spark.ingest.sources.contract import in_contract
from tests.support.histories import SECRET

MASKED = {
    "write to anna.b+x@example.co.uk please": "write to <email> please",
    "我的邮箱是zhang_3@qq.com谢谢": "我的邮箱是<email>谢谢",
    "josé@exämple.de": "<email>",
    "电话１３８００１３８０００，谢谢": "电话<phone>，谢谢",
    "打我电话13800138000吧": "打我电话<phone>吧",
    "call +86 138-0013-8000": "call <phone>",
    "my number is 138 0013 8000.": "my number is <phone>.",
    "座机010-12345678": "座机<phone>",
    "+49 30 1234567 after six": "<phone> after six",
    "+1 (555) 123-4567": "<phone>",
    "or (555) 123-4567, or 555-123-4567": "or <phone>, or <phone>",
    "0044 20 7946 0958": "<phone>",
    "card 4111 1111 1111 1111 was declined": "card <card> was declined",
    "信用卡6222021234567890128被拒": "信用卡<card>被拒",
    "amex 3782-822463-10005": "amex <card>",
    "身份证11010519491231002X号": "身份证<id>号",
    "pay to GB82 WEST 1234 5698 7654 32 today": "pay to <iban> today",
    "DE89370400440532013000": "<iban>",
    "a@b.org or 13912345678, 4111111111111111": "<email> or <phone>, <card>",
}
UNTOUCHED = (
    None,
    "",
    "red shoes size 42",
    "iphone 15 pro 256gb",
    "iPhone 15 128GB 黑色",
    "牛奶 250ml*24",
    "price was $1,299.00 in 2023, 1.099,00 € in 2024",
    "order 20240501123456 never came",
    "订单号2024050112345678还没到",
    "order 4111111111111112",
    "订单110105194912310021",
    "SM-G998B, WH-1000XM4, 990-1000-22",
    "1080p 144hz 27 inch, 2560x1440, 16:9",
    "from 12:30 to 18:45 on 2024-05-01",
    "ISBN 978-3-16-148410-0, EAN 4006381333931",
    "DE12345678901234567890 is no account",
    "5000000 points @ home",
    "2.5米*1.8米 100-200元",
)


def test_numbers_that_tell_who_wrote_a_text_are_masked_and_ordinary_texts_stay(spark: SparkSession) -> None:
    wanted = {**MASKED, **{text: text for text in UNTOUCHED}}
    rows = spark.createDataFrame([(text,) for text in wanted], "text string")
    found = {row[0]: row[1] for row in rows.select("text", pseudonyms.mask(F.array("text"))[0]).collect()}
    assert found == wanted


def test_a_huge_text_is_masked_in_time(spark: SparkSession) -> None:
    text = F.concat(F.repeat(F.lit("a1"), 500_000), F.lit(" x@y.org "), F.repeat(F.lit("9"), 500_000))
    row = spark.range(1).select(pseudonyms.mask(F.array(text))[0].alias("text")).first()
    assert row is not None
    assert row["text"].count("<email>") == 1
    assert "x@y.org" not in row["text"]


def test_a_row_is_stored_without_its_users_id(spark: SparkSession) -> None:
    rows = [
        ("1", " user-17 ", "1.50", "2024-05-01", None),
        ("2", "小明", "user-17", "user-17 at a@b.org", None),
        ("3", "user-17", "1x", "at user-17, 13800138000", None),
        ("4", "  ", "1", "2024-05-01", None),
        ("5", None, "1", None, "4;user-17;a@b.org"),
        ("6", "u\ufffd1", "1", "2024-05-01", None),
        ("7", "u\u00001", "much", "2024-05-01", None),
    ]
    df = spark.createDataFrame(rows, "n string, who string, paid string, at string, line string")
    columns = {"user_id": "who", "ts": "at", "amount": "paid", "order_id": "n"}
    lines = F.when(F.col("line").isNotNull(), F.create_map(F.lit("row"), F.col("line")))
    raw = in_contract(df, "raw_transactions", lines, **{name: F.col(column) for name, column in columns.items()})
    stored = pseudonyms.pseudonymous(raw, "raw_transactions", SECRET, pseudonyms.mask)
    found = {row["order_id"]: (row["user_key"], row["unreadable"]) for row in stored.collect()}
    key = hmac.new(SECRET.value, b"user-17", hashlib.sha256).hexdigest()
    assert key == SECRET.key_of(" user-17 ")
    assert found == {
        "1": (key, None),
        "2": (SECRET.key_of("小明"), {"amount": "user-17", "ts": "user-17 at <email>"}),
        "3": (key, {"amount": "1x", "ts": "at <user>, <phone>"}),
        "4": (None, None),
        "5": (None, {"row": "<17 characters>"}),
        "6": (None, {"user_id": "<broken text>"}),
        "7": (None, {"user_id": "<broken text>", "amount": "much"}),
    }
    assert "user_id" not in stored.columns
    plan = stored._jdf.queryExecution().toString()
    assert SECRET.value.decode() not in plan
    assert SECRET.value.hex() not in plan


@pytest.mark.parametrize("content", [None, "", "  \n", "0123456789abcdef0123456789abcde\n"])
def test_a_missing_or_short_secret_is_refused_and_the_message_says_how_to_make_one(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.delenv("OURS", raising=False)
    if content is not None:
        (tmp_path / "secret").write_text(content)
        monkeypatch.setenv("OURS", content)
    for place in ("env:OURS", f"file:{tmp_path}/secret"):
        with pytest.raises(ConfigError, match="openssl rand -hex 32") as refused:
            pseudonyms.load_secret(place)
        assert place in str(refused.value)
        assert "abcdef" not in str(refused.value)


def test_a_secret_that_is_made_is_its_owners_and_stays(spark: SparkSession, tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret"
    pseudonyms.make_secret(path)
    made = pseudonyms.load_secret(f"file:{path}")
    pseudonyms.make_secret(path)
    assert pseudonyms.load_secret(f"file:{path}") == made
    assert len(made.value) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert made.value.decode() not in f"{made}"
    assert made.key_id != SECRET.key_id


def test_a_scope_of_databricks_gives_the_secret(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="on Databricks only"):
        pseudonyms.load_secret("databricks:scope/key")
    scopes = {("scope", "key"): SECRET.value.decode()}

    def utilities(_: Any) -> Any:
        return SimpleNamespace(secrets=SimpleNamespace(get=lambda scope, key: scopes[scope, key]))

    module = ModuleType("pyspark.dbutils")
    module.DBUtils = utilities  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyspark.dbutils", module)
    assert pseudonyms.load_secret("databricks:scope/key") == SECRET
    with pytest.raises(ConfigError, match="databricks:scope/other holds no secret"):
        pseudonyms.load_secret("databricks:scope/other")


def test_a_secret_in_the_place_of_its_name_is_not_printed() -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(overrides=[f"privacy.secret={SECRET.value.hex()}"])
    assert "must be env:NAME" in str(refused.value)
    assert SECRET.value.hex() not in str(refused.value)


TABLES = st.lists(st.lists(st.integers(0, 40), min_size=4, max_size=4), min_size=2, max_size=5)


@given(TABLES)
def test_no_withheld_group_can_be_reckoned_from_a_row_or_a_column(table: list[list[int]]) -> None:
    counts = {(row, column): users for row, cells in enumerate(table) for column, users in enumerate(cells)}
    rows = [[(row, column) for column in range(4)] for row in range(len(table))]
    columns = [[(row, column) for row in range(len(table))] for column in range(4)]
    hidden = pseudonyms.withheld(counts, [*rows, *columns], 10)
    assert hidden >= {group for group, users in counts.items() if 0 < users < 10}
    assert all(counts[group] for group in hidden)
    for total in (*rows, *columns):
        withheld = [group for group in total if group in hidden]
        told = [group for group in total if counts[group] and group not in hidden]
        if withheld and told:
            assert len(withheld) > 1
            assert sum(counts[group] for group in withheld) >= 10


def test_large_groups_are_told() -> None:
    counts = {"A": 10, "B": 11, "C": 0}
    assert pseudonyms.withheld(counts, [counts], 10) == set()
    assert pseudonyms.withheld({**counts, "D": 9}, [[*counts, "D"]], 10) == {"A", "D"}
    # one alone that is small: nothing told gives it away
    assert pseudonyms.withheld({**counts, "D": 9}, [], 10) == {"D"}
