"""The page of a night: the figures of its tables, no group of few, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from bp_spark.report import page
from bp_spark.report.job import _history
from bp_spark.report.night.data import PageData
from bp_spark.report.night.document import document
from bp_spark.report.population import Prospects
from tests.support.browsers import CHROMIUM, HEADLESS

NIGHT, BEFORE = date(2024, 5, 2), date(2024, 5, 1)
LEVELS = "ABCDE"


def stage(name: str, status: str = "done", **figures: object) -> dict[str, Any]:
    return {
        "run_id": "0123456789ab",
        "job": "score" if name == "score" else "featurize",
        "stage": name,
        "started": "2024-05-02 01:30",
        "seconds": 61.25,
        "status": status,
        "error": "DataError: bp.events: <rule>" if status == "failed" else None,
        "rows_in": 12_345,
        "rows_out": None,
        "figures": {key: str(value) for key, value in figures.items()},
    }


def distribution(users: int, seed: int) -> pd.DataFrame:
    """Of two nights: as many users with uniform scores, and one user alone above 95."""
    rng = np.random.default_rng(seed)
    frames = []
    for day in (BEFORE, NIGHT):
        scores = pd.DataFrame({"score": [*rng.uniform(0, 94, users - 1), 97.0]})
        scores["bin"] = (scores["score"] // 5 * 5).astype(int)
        scores["level"] = scores["score"].map(lambda score: LEVELS[4 - int(score // 20)])
        scores["risk_level"] = rng.choice(["low", "medium", "high"], users)
        scores["expected_spend"] = np.exp(scores["score"] / 20 + 2)
        found = scores.groupby(["level", "bin", "risk_level"])["expected_spend"].agg(["size", "sum"]).reset_index()
        frames.append(found.rename(columns={"size": "users", "sum": "expected_spend"}).assign(score_date=day))
    return pd.concat(frames, ignore_index=True)


def drift() -> pd.DataFrame:
    rows = [("feature", f"orders_{days}d", "psi", "training", days / 1000, 0.25, days > 250) for days in (30, 90, 365)]
    rows += [
        ("score", "score", "ks", str(BEFORE), np.nan, 0.1, False),
        ("levels", "A>E", "share", None, 0.0001, None, False),
    ]
    names = ["kind", "subject", "metric", "against", "value", "threshold", "broken"]
    return pd.DataFrame(rows, columns=names).assign(users=5_000, note=None)


def fairness() -> pd.DataFrame:
    rows = [
        ("income", group, users, "coverage", 0.9, ratio)
        for group, users, ratio in (("35-49K", 900, 1.02), ("250K+", 4, 0.1))
    ]
    names = ["segment", "group", "users", "metric", "value", "ratio"]
    return pd.DataFrame(rows, columns=names).assign(
        small=False, ratio_low=0.98, ratio_high=1.07, threshold_low=0.8, threshold_high=1.25, broken=False
    )


def a_night(users: int = 5_000) -> PageData:
    days = [NIGHT - timedelta(days=back) for back in reversed(range(30))]
    spend = 1.2e6 * (1 + 0.02 * np.sin(np.arange(30) / 4))
    history = pd.DataFrame(
        {"score_date": days, "expected_spend": spend, "users": users, "bundle": ["a" * 64] * 20 + ["b" * 64] * 10}
    )
    moved = pd.DataFrame(
        [(b, a, 900 if b == a else 40) for b in LEVELS for a in LEVELS]
        + [("new", "C", 30), ("A", "gone", 3), ("E", "gone", 25)],
        columns=["before", "after", "users"],
    )
    features = [f"spend_rate_halflife_{n}d" for n in range(20)]
    reasons = pd.DataFrame(
        {
            "group": [f"group {n}" for n in range(20)],
            "feature": features,
            "users": [2_000 // (n + 1) for n in range(20)],
            "raised": [900 // (n + 1) for n in range(20)],
            "contribution": 12.345,
        }
    )
    metrics = [("all", 4_000), ("seen", 3_600), ("unseen", 400)]
    return PageData(
        score_date=NIGHT,
        previous_date=BEFORE,
        currency="USD",
        smallest_group=10,
        stages=[
            stage("ingest", ingest_id=7),
            stage("clean", rows=12_345, events=12_000, duplicates=300, quarantine=45),
            stage("featurize"),
            stage("score", computed=1_234),
        ],
        distribution=distribution(users, seed=1),
        migration=moved,
        history=history,
        reasons=reasons,
        descriptions={
            features[0]: "Exponentially weighted spend per day, half-life 30 days & <more> [currency/day; all]"
        },
        freshness=pd.DataFrame(
            {
                "kind": ["purchase", "browse"],
                "newest": [BEFORE, BEFORE - timedelta(days=3)],
                "last_day": [9_876, 0],
                "events": [276_543, 1_234],
            }
        ),
        quarantine=pd.DataFrame(
            {
                "source": ["raw_transactions"] * 2,
                "rule": ["amount is too large", "ts is in the future"],
                "rows": [40, 120],
                "new_rows": [0, 45],
            }
        ),
        model={
            "digest": "b" * 64,
            "bundle": "20240201-0123456789ab",
            "horizon_days": 90,
            "promoted": "normalised Gini 0.8707, no worse than linear 0.8606, btyd 0.8452",
        },
        metrics=pd.DataFrame(
            [(p, "fused", m, 0.8341, n) for p, n in metrics for m in ("spearman", "gini", "mae")],
            columns=["population", "member", "metric", "value", "users"],
        ),
        watched={"drift": drift(), "fairness": fairness()},
    )


@pytest.fixture(scope="module")
def night() -> PageData:
    return a_night()


@pytest.fixture(scope="module")
def text(night: PageData) -> str:
    return document(night)


def cells(text: str, caption: str) -> list[list[str]]:
    """The rows of a table of the page."""
    table = text[text.index(f'<table aria-label="{caption}') :].split("</table>")[0]
    rows = re.findall("<tr>(.*?)</tr>", table, re.DOTALL)
    return [[re.sub("<[^>]+>", "", cell) for cell in re.findall("<t[hd].*?>(.*?)</t[hd]>", row)] for row in rows]


def test_the_page_shows_the_figures_of_the_tables(night: PageData, text: str) -> None:
    tonight = night.current
    assert f"<strong>{tonight['users'].sum():,}</strong>" in text
    assert f"<strong>{tonight['expected_spend'].sum():,.0f}</strong>" in text
    levels = {row[0]: row for row in cells(text, "Users by level")}
    of_b = tonight[tonight["level"] == "B"]
    assert levels["B"][1:3] == [f"{of_b['users'].sum():,}", f"{of_b['users'].sum() / tonight['users'].sum():.1%}"]
    assert ["clean", "featurize", "done", "2024-05-02 01:30", "61.2", "12,345", "–"] in cells(text, "Stages since")
    assert "12,345 rows in = 12,000 events + 300 duplicates + 45 in quarantine" in text
    assert ["purchase", "2024-05-01", "up to date", "9,876", "276,543"] in cells(text, "How fresh")
    assert ["browse", "2024-04-28", "3 days behind", "0", "1,234"] in cells(text, "How fresh")
    assert ["ts is in the future", "raw_transactions", "45", "120"] in cells(text, "Rows in quarantine")
    assert cells(text, "The most frequent reasons")[1][:4] == ["group 0", "40.0%", "45%", "12.35"]
    assert "half-life 30 days &amp; &lt;more&gt;" in text
    assert ["unseen (400)", "0.8341", "0.8341", "–", "0.83", "–", "–"] in cells(text, "How good it was")


def test_what_is_watched_stands_with_what_broke_first(text: str) -> None:
    drifted = cells(text, "Figures that are watched")[1:]
    assert [row[0] for row in drifted] == ["orders_365d", "orders_90d", "orders_30d", "score"]
    assert [row[5] for row in drifted] == ["beyond", "within", "within", "within"]
    groups = cells(text, "Groups held against all other users")[1:]
    # the other one has four users
    assert [row[1] for row in groups] == ["35-49K"]


def test_what_nobody_watches_has_no_section(night: PageData) -> None:
    text = document(replace(night, watched={}))
    assert "Drift" not in text
    assert "Fairness" not in text


def test_a_failed_stage_is_told_with_its_error(night: PageData) -> None:
    text = document(replace(night, stages=[*night.stages, stage("embed", "failed")]))
    assert "1 of 5 stages failed" in text
    assert "DataError: bp.events: &lt;rule&gt;" in text


def test_no_figure_of_a_group_of_few_is_told_nor_can_be_reckoned(night: PageData) -> None:
    few = night.distribution.copy()
    # all of level A but three users of tonight fall to B
    fallen = few["level"].eq("A") & few["score_date"].eq(NIGHT)
    few.loc[fallen, "level"] = "B"
    few = pd.concat(
        [
            few,
            pd.DataFrame(
                [("A", 90, "low", 3, 4_567.0, NIGHT)],
                columns=["level", "bin", "risk_level", "users", "expected_spend", "score_date"],
            ),
        ]
    )
    levels = {row[0]: row for row in cells(document(replace(night, distribution=few)), "Users by level")[1:]}
    withheld = [level for level, row in levels.items() if row[1] == "*"]
    # of one withheld level alone the total would tell
    assert withheld == ["A", "D"]
    assert all(levels[level][1:5] == ["*"] * 4 for level in withheld)
    moved = cells(document(night), "Users by level on")[1:]
    gone = {row[0]: row[6] for row in moved}
    # three of A went; of 28 in all, 25 of E would tell
    assert (gone["A"], gone["E"]) == ("*", "*")
    assert all(row.count("*") != 1 for row in moved[:5])


def test_whom_a_feature_raised_is_told_only_of_many(night: PageData) -> None:
    few = night.reasons.assign(raised=[3, *night.reasons["raised"][1:]])
    told = cells(document(replace(night, reasons=few)), "The most frequent reasons")[1:]
    assert [row[2] for row in told[:3]] == ["*", "45%", "45%"]


def test_a_first_night_has_no_night_before(night: PageData) -> None:
    first = replace(
        night,
        previous_date=None,
        distribution=night.current,
        migration=pd.DataFrame(),
        history=night.history.tail(1),
        freshness=night.freshness.head(0),
        quarantine=None,
        metrics=night.metrics.head(0),
        reasons=night.reasons.head(0),
    )
    text = document(first)
    assert "the first night that was scored" in text
    assert "A curve comes with the second night." in text
    assert "No event in the 28 days before the night." in text


def test_nights_of_another_horizon_are_not_in_the_curve() -> None:
    horizons = {1: None, 2: 14, 3: 30, 4: 30}
    runs = [
        {"score_date": date(2024, 5, day), "expected_spend": 10.0, "users": 5, "bundle": "b", "horizon_days": days}
        for day, days in horizons.items()
    ]
    tonight = pd.DataFrame([{"score_date": date(2024, 5, 4), "expected_spend": 12.0, "users": 6}])
    curve = _history(runs, tonight, date(2024, 5, 4))
    assert curve["score_date"].tolist() == [date(2024, 5, day) for day in (1, 3, 4)]
    assert curve["expected_spend"].tolist() == [10.0, 10.0, 12.0]


def test_the_same_night_is_the_same_page(night: PageData, text: str) -> None:
    assert document(night) == text


# --- in a browser ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page: its picture [height, width, 3], what it wrote to the console, what it asked for."""

    picture: np.ndarray
    console: list[str]
    requests: list[str]


def opened(file: Path, folder: Path, width: int = 1280, height: int = 2000) -> Seen:
    """Open a file in headless Chromium, without a network."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (make browser installs Debian's where CI=true)")
    profile = folder / "profile"
    command = [
        *(CHROMIUM, *HEADLESS, "--enable-logging=stderr", "--v=0", "--allow-file-access-from-files"),
        *(f"--user-data-dir={profile}", f"--log-net-log={profile}.json", f"--screenshot={profile}.png"),
        *(f"--window-size={width},{height}", file.as_uri()),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    log = json.loads(Path(f"{profile}.json").read_text(encoding="utf-8"))
    starts = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = [event["params"] for event in log["events"] if event["type"] == starts and "url" in event.get("params", {})]
    return Seen(
        matplotlib.image.imread(f"{profile}.png")[..., :3],
        re.findall(r"CONSOLE[:(]\d+\)?\] (.*)", result.stderr),
        # the browser's own errands have no page behind them
        [params["url"] for params in asked if params.get("initiator") != "not an origin"],
    )


@pytest.mark.integration
def test_a_browser_shows_the_page_and_asks_for_nothing(text: str, tmp_path: Path) -> None:
    seen = opened(page.write(tmp_path / "night.html", text), tmp_path)
    assert seen.console == []
    assert seen.requests == []
    assert seen.picture.shape == (2000, 1280, 3)
    # words and charts cover a part of the ground all the way down
    ground = seen.picture[0, 0]
    drawn = (np.abs(seen.picture - ground).max(axis=2) > 0.1).mean(axis=1)
    for part in np.array_split(drawn, 5):
        assert 0.01 < part.mean() < 0.7
    colours = {tuple(int(c * 255) for c in pixel) for pixel in seen.picture[::7, ::7].reshape(-1, 3)}
    # the first colour of the charts is among them
    assert (0x1B, 0x66, 0xB0) in colours


@pytest.mark.integration
def test_what_is_wrong_with_a_page_would_be_seen(tmp_path: Path) -> None:
    spoiled = '<body><img src="http://example.invalid/x.png"><script>console.error("boom")</script></body>'
    seen = opened(page.write(tmp_path / "spoiled.html", spoiled), tmp_path)
    assert any("boom" in line for line in seen.console)
    assert seen.requests == ["http://example.invalid/x.png"]


@pytest.mark.integration
def test_on_a_phone_only_tables_are_wider_than_the_screen(text: str, tmp_path: Path) -> None:
    page.write(tmp_path / "night.html", text)
    frame = (
        '<iframe src="night.html" style="width:390px;height:800px" '
        "onload=\"console.log('width', this.contentDocument.documentElement.scrollWidth)\"></iframe>"
    )
    seen = opened(page.write(tmp_path / "frame.html", frame), tmp_path)
    (told,) = [line for line in seen.console if "width" in line]
    assert int(re.findall(r"width (\d+)", told)[0]) <= 390


@pytest.mark.integration
def test_a_script_of_a_page_does_not_run(tmp_path: Path) -> None:
    html = page.page("Title", [page.Markup('<script>console.log("ran")</script>')], [])
    seen = opened(page.write(tmp_path / "page.html", html), tmp_path)
    assert not any('"ran"' in line for line in seen.console)
    assert any("Content Security Policy" in line for line in seen.console)


def test_prospects_have_a_line_where_there_are_some_and_no_figures_where_they_are_few(
    night: PageData, text: str
) -> None:
    assert "prospects" not in text
    many, few = (document(replace(night, prospects=Prospects(users, 36.4, 990.0))) for users in (1_200, 9))
    assert "1,200 prospects: 36 first purchases and 990 USD expected." in many
    assert "fewer than 10 prospects." in few
