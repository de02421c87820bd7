"""Forms of times and numbers: what a mapping must say of them, and what stays open."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest

from bp_spark.ingest.onboarding.forms import currency_of, number_form, time_form

SORTED_DAYS = [f"{day}/1/2024" for day in range(1, 13)]
"""From January to December as M/d, or twelve days of January as d/M: in both the order is that of time."""


@pytest.mark.parametrize(
    ("texts", "keys"),
    [
        (["12/1/2010 8:26", "12/13/2010 10:24"], {"format": "M/d/yyyy H:mm"}),
        (["1/12/2010 8:26", "13/12/2010 10:24"], {"format": "d/M/yyyy H:mm"}),
        (["31.12.24", "1.1.25"], {"format": "d.M.yy"}),
        (["2024/05/01 10:11:12"], {"format": "yyyy/M/d H:mm:ss"}),
        (["5/13/2024 1:02 PM", "5/14/2024 11:02:03 AM"], {"format": "M/d/yyyy h:mm[:ss] a"}),
        (["31 Dec 2020 10:11"], {"format": "d MMM yyyy H:mm"}),
        (["Dec 3, 2021"], {"format": "MMM d, yyyy"}),
        (["20240501", "20241231"], {"format": "yyyyMMdd"}),
        (["20240501101112"], {"format": "yyyyMMddHHmmss"}),
        (["1511544070"], {"unit": "s"}),
        (["1511544070123"], {"unit": "ms"}),
        ([1511544070123456], {"unit": "us"}),
        (["45000.5"], {"unit": "excel_days"}),
        (["2024-05-01 10:00:11 +0200"], {}),
        (["2024-05-01T10:00:11.123Z", "2024-05-01"], {}),
        ([date(2024, 5, 1)], {}),
        ([datetime(2024, 5, 1, tzinfo=UTC)], {}),
    ],
)
def test_times_are_described_as_the_mapping_describes_them(texts: list[Any], keys: dict[str, str]) -> None:
    form = time_form(texts)
    assert form is not None
    assert form.keys == keys


@pytest.mark.parametrize("texts", [["12", "7"], ["MUG"], ["1.50", "20.00"], [], [True], ["99 Xyz 2020"]])
def test_what_is_no_time_is_taken_for_none(texts: list[Any]) -> None:
    assert time_form(texts) is None


def test_days_and_months_up_to_12_are_a_doubt_unless_the_order_of_the_rows_tells() -> None:
    by_order = time_form(["1/11/2024", "2/11/2024", "3/11/2024", "1/12/2024", "2/12/2024", "3/12/2024"])
    bare = time_form(SORTED_DAYS)
    assert by_order is not None
    assert bare is not None
    assert by_order.keys == {"format": "d/M/yyyy"}
    assert "order of the rows" in by_order.doubts[0]
    assert "bare guess" in bare.doubts[0]
    mixed = time_form(["31/12/2024", "12/31/2024"])
    assert mixed is not None
    assert "find out" in mixed.doubts[0].lower()


@pytest.mark.parametrize(
    ("texts", "keys"),
    [
        (["1.234,50", "12,00"], {"decimal": ",", "thousands": "."}),
        (["1,234.50", "12.00"], {"thousands": ","}),
        (["12,50", "7"], {"decimal": ","}),
        (["€ 12.50", "€ -3.00"], {"symbol": "€"}),
        (["5,00-", "1 234,50"], {"decimal": ",", "thousands": " ", "negative": "trailing"}),
        (["(5.00)", "7"], {"negative": "parentheses"}),
        (["1.234.567", "12"], {"decimal": ",", "thousands": "."}),
        # all below a thousand have no mark
        (["1,234", "999", "5"], {"thousands": ","}),
        (["2.55", "0.001"], {}),
        ([Decimal("2.50"), Decimal(3)], {}),
        ([1.5, float("nan")], {}),
    ],
)
def test_numbers_are_described_as_the_mapping_describes_them(texts: list[Any], keys: dict[str, str]) -> None:
    form = number_form(texts)
    assert form is not None
    assert form.keys == keys


@pytest.mark.parametrize("texts", [["1.234", "5.100"], ["1,234", "5,100"], ["1.234", "5000"]])
def test_a_mark_that_may_part_thousands_is_left_open_and_never_guessed(texts: list[str]) -> None:
    form = number_form(texts)
    assert form is not None
    assert form.keys == {}
    assert "thousand" in form.doubts[0]


def test_words_are_no_numbers_and_signs_tell_a_currency_only_if_they_are_of_one_country() -> None:
    assert number_form(["abc", "12"]) is None
    assert [currency_of(sign) for sign in ("€", "£", "PLN", "¥", "kr")] == ["EUR", "GBP", "PLN", None, None]
