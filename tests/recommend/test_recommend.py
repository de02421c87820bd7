"""Recommendations of a toy shop: whose items, in which order, and what is never recommended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F

from bp_spark import pipeline
from bp_spark.core.config import Config, RecommendationsConfig
from bp_spark.core.errors import DataError
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import EVENTS, PROSPECT_SCORES, RAW_ITEMS, RECOMMENDATIONS, SCORES
from bp_spark.recommend import ranking
from bp_spark.recommend.candidates import candidates
from bp_spark.recommend.factors import dense_ids
from bp_spark.recommend.job import is_due, learned
from bp_spark.recommend.ranking import Ranking, names_of, recommended
from tests.support.rows import frame, write_without_spark

DAY = date(2024, 3, 10)
K = 3
SETTINGS = RecommendationsConfig(rank=2, iterations=1, candidates=4, items=2)
MILK, TEA, SOAP = [f"u{n}" for n in range(6)], ["u0", "u1", "u2", "u3"], ["u4", "u5"]


def done(user: str, item: str, days_before: int, amount: int = 2, kind: str = "purchase") -> dict[str, Any]:
    return {
        "user_key": user,
        "event_date": DAY - timedelta(days=days_before),
        "kind": kind,
        "item_id": item,
        "category": "Food",
        "amount": Decimal(amount) if kind == "purchase" else None,
        "quantity": 1.0,
    }


def shop() -> list[dict[str, Any]]:
    """Milk is bought each week by six users, tea by four of them every four weeks, and soap by two."""
    weekly = [done(user, "milk", days) for user in MILK for days in range(7, 100, 7)]
    monthly = [done(user, "tea", days, 8) for user in TEA for days in (10, 38, 66)]
    return [*weekly, *monthly, *(done(user, "soap", days) for user in SOAP for days in (20, 40))]


def users(*names: str, budget: float | None = None) -> list[tuple[str, str, float | None]]:
    return [(name, "A", budget) for name in names]


EVERYONE = users(*MILK, "new")


def choice(
    spark: SparkSession,
    lines: Sequence[Mapping[str, Any]],
    chosen: Sequence[tuple[str, str, float | None]] = EVERYONE,
) -> dict[str, dict[str, Row]]:
    """User -> item -> candidate."""
    of_users = spark.createDataFrame(list(chosen), "user_key string, level string, budget double")
    levels = spark.createDataFrame([row[:2] for row in EVERYONE], "user_key string, level string")
    with candidates(frame(spark, EVENTS, *map(dict, lines)), levels, of_users, DAY, SETTINGS, K) as rows:
        found: dict[str, dict[str, Row]] = {row[0]: {} for row in chosen}
        for row in rows.collect():
            assert row["item_id"] not in found[row["user_key"]]
            found[row["user_key"]][row["item_id"]] = row
        return found


@pytest.fixture(scope="module")
def plain(spark: SparkSession) -> dict[str, dict[str, Row]]:
    return choice(spark, [*shop(), done("u0", "tea", 10, 8), done("u0", "tea", 5, -8)])


def test_keys_are_numbered_without_a_gap(spark: SparkSession) -> None:
    keys = spark.range(500).select(F.format_string("key %d", "id").alias("user_key"))
    numbered = dense_ids(keys.unionByName(keys), "user_key", "user_id").collect()
    assert sorted(row["user_id"] for row in numbered) == list(range(500))
    assert len({row["user_key"] for row in numbered}) == 500


def test_a_pair_has_its_days_and_an_item_its_interval_and_price_if_enough_users_tell_of_it(
    plain: dict[str, dict[str, Row]],
) -> None:
    tea, milk, soap = plain["u0"]["tea"], plain["u0"]["milk"], plain["u4"]["soap"]
    # two lines of a day are one purchase, and a refund is none
    assert (tea["purchase_days"], tea["days_28"], tea["days_84"], tea["days_since_bought"]) == (3, 1, 3, 10)
    assert tea["bought"] == pytest.approx(sum(0.5 ** (days / 60) for days in (10, 38, 66)), abs=1e-5)
    assert (tea["interval"], milk["interval"]) == (28.0, 7.0)
    assert (tea["price"], tea["buyers"]) == (pytest.approx(8.0), 4)
    assert tea["price_position"] > 0 > milk["price_position"]
    # two users bought soap: neither its price nor its interval of 20 days is told
    assert soap["price"] is None
    assert soap["interval"] < 20
    assert (soap["user_days"], soap["user_days_28"], soap["user_span"]) == (16, 5, 98)
    assert soap["order_value"] == pytest.approx(2.0)


def test_an_interval_is_the_users_own_beside_the_items(plain: dict[str, dict[str, Row]]) -> None:
    # two repeats of 28 days, and two at the item's 28
    assert plain["u0"]["tea"]["usual_interval"] == pytest.approx(28.0)
    assert plain["u4"]["tea"]["usual_interval"] is None


def test_an_item_of_few_users_is_recommended_to_these_alone(
    plain: dict[str, dict[str, Row]], changed: dict[str, dict[str, Row]]
) -> None:
    # in the other shop u0 put it into the cart, and is another user still
    for found in (plain, changed):
        assert {user for user, items in found.items() if "soap" in items} == set(SOAP)
    # three bought nails
    assert "nails" in changed["new"]


def test_a_user_without_a_purchase_gets_what_the_level_buys(plain: dict[str, dict[str, Row]]) -> None:
    assert set(plain["new"]) == {"milk", "tea"}
    assert plain["new"]["milk"]["level_share"] == pytest.approx(6 / 7)
    assert plain["new"]["milk"]["preference"] == 0.0


@pytest.fixture(scope="module")
def changed(spark: SparkSession) -> dict[str, dict[str, Row]]:
    """A shop where some just bought milk, coal was last sold 91 days ago, and some users will spend little."""
    lines = [
        *shop(),
        *(done(user, "coal", days) for user in MILK for days in (91, 98)),
        *(done(user, "wood", days) for user in MILK for days in (90, 98)),
        *(done(user, "nails", 20) for user in MILK[:3]),
        done("u0", "soap", 3, kind="cart"),
        done("u0", "milk", 1),
        done("u1", "milk", 2),
    ]
    return choice(spark, lines, [*users("u0", "u4", "new", budget=5.0), *users("u1", "u5", budget=9.0)])


def test_what_the_user_just_bought_and_what_nobody_buys_any_more_is_left_out(
    changed: dict[str, dict[str, Row]],
) -> None:
    assert "milk" not in changed["u0"]
    assert "milk" in changed["u1"]
    assert all("wood" in items and "coal" not in items for user, items in changed.items() if user != "new")


def test_an_item_that_costs_more_than_the_user_will_spend_is_recommended_only_if_bought_before(
    changed: dict[str, dict[str, Row]],
) -> None:
    # tea costs 8; u0 and u1 bought it before
    assert {user for user, items in changed.items() if "tea" in items} == {"u0", "u1", "u5"}


def ranked(spark: SparkSession, lines: Sequence[Mapping[str, Any]]) -> tuple[Ranking, list[Row]]:
    events = frame(spark, EVENTS, *map(dict, lines))
    of_users = spark.createDataFrame(EVERYONE, "user_key string, level string, budget double")
    levels = of_users.select("user_key", "level")
    found = learned(events, levels, DAY, SETTINGS, K)
    with candidates(events, levels, of_users, DAY, SETTINGS, K) as rows:
        return found, recommended(rows, found, DAY, SETTINGS).orderBy("user_key", "rank").collect()


@pytest.fixture(scope="module", autouse=True)
def few_purchases_are_enough() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ranking, "LEAST_PURCHASES", 2)
        yield


@pytest.fixture(scope="module")
def of_shop(spark: SparkSession) -> tuple[Ranking, list[Row]]:
    return ranked(spark, [*shop(), done("u4", "tea", 3, kind="favourite")])


def test_events_on_the_date_or_later_change_nothing(spark: SparkSession, of_shop: tuple[Ranking, list[Row]]) -> None:
    later = [done(user, item, -days, 500) for days in (0, 1, 20) for user in MILK for item in ("milk", "cake", "tea")]
    favourites = [done("u4", "tea", days, kind="favourite") for days in (3, 0)]
    assert ranked(spark, [*shop(), *later, *favourites]) == of_shop


def test_the_ranking_learns_at_a_past_date_what_users_bought_since(
    spark: SparkSession, of_shop: tuple[Ranking, list[Row]]
) -> None:
    found, _ = of_shop
    # milk of six users, tea of four and soap of two; the other two could have had tea
    assert (found.candidates, found.purchases) == (14, 12)
    # the candidates of 28 days before see nothing of what came then
    more = [done(user, "milk", days) for user in MILK for days in range(1, 28)]
    levels = spark.createDataFrame([row[:2] for row in EVERYONE], "user_key string, level string")
    assert learned(frame(spark, EVENTS, *shop(), *more), levels, DAY, SETTINGS, K) == found


def test_items_are_named_by_their_newest_title_or_their_category(spark: SparkSession) -> None:
    items = [
        {"item_id": "tea", "title": "Tea", "ingest_id": 1},
        {"item_id": "tea", "title": "Green tea", "category": "Food > Tea", "ingest_id": 2},
        {"item_id": "tea", "title": " ", "category": "Food > Tea", "ingest_id": 3},
        {"item_id": "soap", "category": "Home > Soap", "ingest_id": 1},
        {"item_id": "milk", "ingest_id": 1},
        {"item_id": None, "title": "of nothing", "ingest_id": 1},
    ]
    rows = names_of(frame(spark, RAW_ITEMS, *items)).collect()
    assert {row["item_id"]: row["item"] for row in rows} == {"tea": "Green tea", "soap": "Home > Soap", "milk": None}


def test_rows_have_rank_and_reason_and_no_more_than_asked_for(of_shop: tuple[Ranking, list[Row]]) -> None:
    by_user: dict[str, list[Row]] = {}
    for row in of_shop[1]:
        by_user.setdefault(row["user_key"], []).append(row)
    assert set(by_user) == {*MILK, "new"}
    for of_user in by_user.values():
        assert [row["rank"] for row in of_user] == list(range(1, len(of_user) + 1))
        assert len(of_user) <= SETTINGS.items
        scores = [row["score"] for row in of_user]
        assert scores == sorted(scores, reverse=True)
        assert all(0 <= score <= 1 for score in scores)
    # u4 has three candidates
    assert len(by_user["u4"]) == 2
    milk = next(row for row in by_user["u0"] if row["item_id"] == "milk")
    assert (milk["reason"], milk["times_bought"], milk["days_since_bought"]) == ("buy_again", 14, 7)
    assert (milk["price"], milk["price_tier"], milk["usual_interval_days"]) == (pytest.approx(2.0), "standard", 7.0)
    assert {row["reason"] for row in by_user["new"]} == {"popular_in_level"}


def test_a_reason_is_what_the_user_did_before_what_others_do(spark: SparkSession) -> None:
    proposed = [
        (1, 1.0, 1.0, True),
        (0, 1.0, 0.0, True),
        (0, 0.0, 1.0, True),
        (0, 0.0, 0.0, True),
        (0, 0.0, 0.0, False),
    ]
    rows = spark.createDataFrame(proposed, "purchase_days long, intent double, viewed double, is_alike boolean")
    reasons = [row[0] for row in rows.select(ranking.reason()).collect()]
    assert reasons == ["buy_again", "looked_at", "looked_at", "similar_users", "popular_in_level"]


@pytest.fixture
def scored(settings: Config, tmp_path: Path) -> Config:
    folder = tmp_path / "lakehouse"
    shown = [{"user_key": user, "score_date": DAY, "level": "A", "high": 100.0} for user in MILK]
    write_without_spark(folder, SCORES, *shown, {**shown[0], "score_date": DAY - timedelta(days=1)})
    write_without_spark(
        folder,
        PROSPECT_SCORES,
        {"user_key": "new", "score_date": DAY, "level": "A", "high": 0.1, "expected_spend": 0.1, "p_active": 0.02},
    )
    write_without_spark(folder, EVENTS, *shop())
    changed = {"recommendations": SETTINGS, "privacy": settings.privacy.model_copy(update={"smallest_group": K})}
    return settings.model_copy(update=changed)


def test_the_job_writes_a_date_once_and_a_night_every_few_days(
    spark: SparkSession, scored: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    # so few purchases are too few to learn from, and the measured ranking is taken
    monkeypatch.setattr(ranking, "LEAST_PURCHASES", 200)
    lakehouse = Lakehouse(spark, scored.tables)
    assert is_due(lakehouse, scored, DAY)
    (stage,) = pipeline.recommend(spark, scored, DAY)
    assert (stage["status"], stage["figures"]["users"], stage["figures"]["purchases"]) == ("done", "7", "0")
    rows = lakehouse.read(RECOMMENDATIONS.name).collect()
    assert {row["user_key"] for row in rows} == {*MILK, "new"}
    assert len(rows) == stage["rows_out"]
    # a prospect who will hardly buy, and would spend 5
    assert [row["item_id"] for row in rows if row["user_key"] == "new"] == ["milk"]
    (again,) = pipeline.recommend(spark, scored, DAY)
    assert (again["status"], again["written"]) == ("unchanged", {})
    # the night that is run again asks again; the next ones rest
    dates = [DAY + timedelta(days=days) for days in (-1, 0, 1, 6, 7)]
    assert [is_due(lakehouse, scored, day) for day in dates] == [True, True, False, False, True]
    never = scored.model_copy(update={"recommendations": SETTINGS.model_copy(update={"every_days": None})})
    assert not is_due(lakehouse, never, DAY + timedelta(days=7))
    with pytest.raises(DataError, match=r"scores\.score_date: holds no rows of 2024-03-11; run score for it"):
        pipeline.recommend(spark, scored, DAY + timedelta(days=1))
    assert lakehouse.read(RECOMMENDATIONS.name).count() == len(rows)
