"""The page of a backtest: complete in itself, with the figures of the table."""

from __future__ import annotations

import re
from datetime import date
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from bp_spark.evaluation import bootstrap
from bp_spark.report import backtest as report

MEMBERS = ["linear", "fused"]
HISTORY = [{"epoch": n, "train_loss": 3.0 / n, "valid_loss": 3.5 / n} for n in (1, 2, 3)]


def predictions(users: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    expected = np.exp(rng.normal(4, 1, users))
    return pd.DataFrame(
        {
            "user_key": [f"u{n}" for n in range(users)],
            "label_spend": np.where(rng.random(users) < 0.3, 0.0, expected * np.exp(rng.normal(0, 0.5, users))),
            "seen": np.arange(users) % 4 > 0,
            "linear": expected * np.exp(rng.normal(0, 1, users)),
            "fused": expected,
            "low": expected / 3,
            "high": expected * 3,
            "p_active": np.clip(expected / 100, 0, 1),
        }
    )


def fold(users: int, day: date = date(2024, 5, 1)) -> report.Fold:
    frame = predictions(users)
    table = bootstrap.compare(frame, MEMBERS, resamples=20)
    return report.Fold(day, table, report.figures(frame, MEMBERS, 0.9, HISTORY))


class Tags(HTMLParser):
    """Open tags left at the end, and all addresses the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_beside_it_and_the_figures_lie_there_too(tmp_path):
    folds = [fold(300), fold(200, date(2024, 6, 1))]
    page = report.write(tmp_path / "deep" / "report", folds, {"fusion of": "trees & <others>"})
    text = page.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert text.count("<svg ") == 12
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in tags.addresses)
    assert "trees &amp; &lt;others&gt;" in text
    images = sorted(page.parent.glob("*.png"))
    assert len(images) == 12
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in images)


def test_the_page_shows_the_figures_of_the_table(tmp_path):
    one = fold(300)
    text = report.write(tmp_path, [one], {}).read_text(encoding="utf-8")
    own = one.table[one.table["peer"].isna()].set_index(["population", "member", "metric"])["value"]
    assert f"{own['unseen', 'fused', 'gini']:.4f}" in text
    assert f"{own['all', 'linear', 'mae']:,.2f}" in text
    assert "unseen (75 users)" in text
    assert re.search(r"fused less peer", text)


def test_the_same_backtest_gives_the_same_figures():
    assert fold(120).figures == fold(120).figures


@pytest.mark.parametrize("users", [1, 7])
def test_few_users_and_no_spend_still_make_a_page(users, tmp_path):
    frame = predictions(users).assign(label_spend=0.0)
    table = bootstrap.compare(frame, MEMBERS, resamples=5)
    drawn = report.figures(frame, MEMBERS, 0.9, [])
    assert len(drawn) == 5
    assert report.write(tmp_path, [report.Fold(date(2024, 5, 1), table, drawn)], {}).exists()
