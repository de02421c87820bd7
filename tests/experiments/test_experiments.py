"""Experiments on a toy platform: who is drawn, what is read of them, and that nothing is seen beyond the span."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from scipy import stats
from typer.testing import CliRunner

from bp_spark import pipeline
from bp_spark.cli import app, common
from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.experiments import size
from bp_spark.experiments.assignment import POINTS, Definition, borders, draw, parse_groups, point
from bp_spark.experiments.estimate import Plan
from bp_spark.experiments.size import SCORE, SPEND_BEFORE
from bp_spark.features.catalogue import user_features_table
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import EVENTS, EXPERIMENTS, SCORES, TABLE_NAMES, USER_DAILY, USER_KEYS
from tests.support.rows import write_without_spark

DAY = date(2024, 3, 10)
DAYS = 30
USERS = [f"user-{number:02d}" for number in range(60)]
HALVES = {"control": 0.5, "treatment": 0.5}
DOCS = (Path(__file__).parents[2] / "docs/experiments.md").read_text(encoding="utf-8")
SETTINGS = ["features.windows=[30]", "features.history_length=4", "privacy.smallest_group=10", "tracking.uri=null"]


def after(days: int) -> date:
    return DAY + timedelta(days=days)


def bought(user: str, days: int, spend: int) -> dict[str, Any]:
    return {"user_key": user, "day": after(days), "orders": 1, "spend": Decimal(spend)}


def expected(number: int) -> float:
    return 5.0 + number**1.5


def spent(number: int) -> int:
    return 0 if number % 5 == 0 else 2 * number + number % 7


def definition(name: str = "spring", **more: Any) -> Definition:
    return Definition(**{"name": name, "day": DAY, "days": DAYS, "groups": HALVES, **more})


@pytest.fixture(scope="module")
def platform(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Sixty users, scored on a date whose 30 days are over, and on one whose days are not."""
    folder = tmp_path_factory.mktemp("experiments")
    settings = config.load(overrides=[*SETTINGS, f"tables.path={folder}/lakehouse", f"bundles={folder}/bundles"])
    tables = folder / "lakehouse"
    scores = [
        {
            "user_key": user,
            "score_date": day,
            "level": "EDCBA"[number // 12],
            "expected_spend": 3 * expected(number),
            "expected_by_horizon": {30: expected(number), 90: 3 * expected(number)},
            "bundle_digest": "gone",
        }
        for number, user in enumerate(USERS)
        for day in (DAY, after(20))
    ]
    write_without_spark(tables, SCORES, *scores)
    features = [{"user_key": user, "as_of_date": DAY, "frequency": float(n)} for n, user in enumerate(USERS)]
    write_without_spark(tables, user_features_table(settings.features), *features)
    days = [bought(user, number % 20, spent(number)) for number, user in enumerate(USERS) if spent(number)]
    days += [bought(user, -number - 1, 10 * number) for number, user in enumerate(USERS)]
    write_without_spark(tables, USER_DAILY, *days)
    write_without_spark(tables, EVENTS, *({"event_date": after(days)} for days in (-60, 45)))
    write_without_spark(tables, USER_KEYS, *({"user_key": user, "user_id": user} for user in USERS))
    return settings


@pytest.fixture
def read_anew(spark: SparkSession, platform: Config) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """A function that adds user-days and reads the experiment; the user-days are taken away again."""
    tables = folder_of(platform)
    before = DeltaTable(tables / "bp/user_daily").version()

    def read(*more: dict[str, Any]) -> list[dict[str, Any]]:
        write_without_spark(tables, USER_DAILY, *more, mode="append")
        return pipeline.read_experiment(spark, platform, "spring").rows

    yield read
    DeltaTable(tables / "bp/user_daily").restore(before)


def folder_of(settings: Config) -> Path:
    assert settings.tables.path is not None
    return Path(settings.tables.path)


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in ("run_id", "read_at")} for row in rows]


@pytest.fixture(scope="module")
def spring(spark: SparkSession, platform: Config) -> dict[str, str]:
    """User -> group of the experiment that most tests read."""
    pipeline.assign_experiment(spark, platform, definition())
    rows = Lakehouse(spark, platform.tables).read("experiments").filter("experiment = 'spring'").collect()
    return {row["user_key"]: row["group"] for row in rows}


# --- the draw -----------------------------------------------------------------------------------------------------------


def test_a_group_is_that_of_the_hash_whatever_the_order_and_the_number_of_tasks(spark: SparkSession) -> None:
    users = spark.createDataFrame([(user,) for user in USERS], "user_key string")
    shares = {"control": 0.25, "mail": 0.25, "coupon": 0.25}

    def drawn(rows: Any, name: str) -> dict[str, str]:
        return {row["user_key"]: row["group"] for row in draw(rows, name, shares).collect()}

    first = drawn(users, "spring")
    assert drawn(users.repartition(5).orderBy(F.desc("user_key")), "spring") == first
    ends = borders(shares)
    for user in USERS:
        at = point("spring", user)
        assert first.get(user) == next((group for group, end in ends.items() if at < end), None)
    assert set(first.values()) == set(shares)
    assert len(first) < len(USERS)
    assert drawn(users, "autumn") != first


def test_the_draws_of_two_experiments_are_independent_and_their_shares_hold() -> None:
    half = POINTS // 2
    spring, autumn = (np.array([point(name, f"u{n}") < half for n in range(20_000)]) for name in ("spring", "autumn"))
    assert spring.mean() == pytest.approx(0.5, abs=0.015)
    assert np.mean(spring == autumn) == pytest.approx(0.5, abs=0.015)


def test_each_drawn_user_has_the_expected_spend_of_the_horizon_that_fits_the_days(
    spark: SparkSession, platform: Config, spring: dict[str, str]
) -> None:
    assert set(spring) == set(USERS)
    rows = Lakehouse(spark, platform.tables).read("experiments").filter("experiment = 'spring'").collect()
    for row in rows:
        number = USERS.index(row["user_key"])
        assert (row["expected_spend"], row["expected_days"]) == (expected(number), 30)
        assert (row["score_date"], row["days"], row["share"]) == (DAY, DAYS, 0.5)
        assert row["is_control"] == (row["group"] == "control")
    long = pipeline.assign_experiment(spark, platform, definition("long", days=61))
    assert sum(long.users.values()) == len(USERS)
    of_long = Lakehouse(spark, platform.tables).read("experiments").filter("experiment = 'long'")
    assert {row[0] for row in of_long.select("expected_days").distinct().collect()} == {90}


def test_the_same_command_writes_nothing_and_a_name_stands_for_one_draw(
    spark: SparkSession, platform: Config, spring: dict[str, str]
) -> None:
    lakehouse = Lakehouse(spark, platform.tables)
    version = lakehouse.version("experiments")
    again = pipeline.assign_experiment(spark, platform, definition())
    assert not again.written
    assert sum(again.users.values()) == len(spring)
    for other, names in (
        (definition(days=29), "days"),
        (definition(day=after(20), where="level = 'A'"), "date, condition"),
        (definition(groups={"control": 0.4, "treatment": 0.6}), "groups"),
        (definition(groups={"control": 0.5, "mail": 0.5}), "groups"),
    ):
        with pytest.raises(ConfigError, match=f"its {names} differ;"):
            pipeline.assign_experiment(spark, platform, other)
    assert lakehouse.version("experiments") == version


def test_a_condition_chooses_users_by_scores_and_features_of_the_date(spark: SparkSession, platform: Config) -> None:
    chosen = definition("chosen", where="level IN ('A', 'B', 'C') AND frequency >= 30")
    assert sum(pipeline.assign_experiment(spark, platform, chosen).users.values()) == 30
    for where, problem in (
        ("user_key = 'user-01'", "there is no column user_key"),
        ("level =", "--where"),
        ("score > (SELECT max(score) FROM scores)", "--where"),
        ("sum(score) > 3", "--where"),
    ):
        with pytest.raises(ConfigError, match=problem):
            pipeline.assign_experiment(spark, platform, definition("never", where=where))
    with pytest.raises(DataError, match="fewer than 10 users"):
        pipeline.assign_experiment(spark, platform, definition("never", where="frequency > 45"))
    with pytest.raises(DataError, match="holds no rows of 2024-03-11"):
        pipeline.assign_experiment(spark, platform, definition("never", day=after(1)))
    assert Lakehouse(spark, platform.tables).read("experiments").filter("experiment = 'never'").isEmpty()


@pytest.mark.parametrize(
    "wrong",
    [{"name": "Spring mail"}, {"groups": {"control": 1.0}}, {"groups": {"a": 0.6, "b": 0.6}}, {"days": 0}],
    ids=str,
)
def test_a_definition_that_cannot_be_drawn_by_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="experiment:"):
        Definition(**{"name": "x", "day": DAY, "days": 30, "groups": HALVES, **wrong}).require_usable()


def test_groups_are_read_from_text() -> None:
    assert parse_groups("control=0.4, mail=0.6") == {"control": 0.4, "mail": 0.6}
    for text in ("control", "control=half", "control=0.5,control=0.5"):
        with pytest.raises(ConfigError, match="--groups"):
            parse_groups(text)


# --- the reading --------------------------------------------------------------------------------------------------------


def test_a_reading_is_that_of_the_users_spend_in_the_span(
    spark: SparkSession, platform: Config, spring: dict[str, str]
) -> None:
    result = pipeline.read_experiment(spark, platform, "spring")
    adjusted, plain = result.rows
    assert (adjusted["method"], plain["method"], adjusted["planned"]) == ("adjusted", "unadjusted", True)
    x = {group: np.array([expected(USERS.index(u)) for u in USERS if spring[u] == group]) for group in HALVES}
    y = {group: np.array([spent(USERS.index(u)) for u in USERS if spring[u] == group]) for group in HALVES}
    assert (plain["users"], plain["control_users"]) == (len(y["treatment"]), len(y["control"]))
    assert (plain["mean_spend"], plain["control_mean_spend"]) == pytest.approx(
        (y["treatment"].mean(), y["control"].mean())
    )
    welch = stats.ttest_ind(y["treatment"], y["control"], equal_var=False)
    assert plain["p_value"] == pytest.approx(welch.pvalue)
    assert (plain["low"], plain["high"]) == pytest.approx(tuple(welch.confidence_interval(0.95)))
    # the lines of both groups at the mean of all, in cents as they are summed
    everyone = np.round(np.concatenate([*x.values()]), 2).mean()
    at = {group: np.polyval(np.polyfit(np.round(x[group], 2), y[group], 1), everyone) for group in HALVES}
    assert adjusted["difference"] == pytest.approx(at["treatment"] - at["control"])
    assert adjusted["relative"] == pytest.approx(at["treatment"] / at["control"] - 1)
    assert adjusted["high"] - adjusted["low"] < plain["high"] - plain["low"]
    assert adjusted["variance_saved"] == pytest.approx(1 - (adjusted["standard_error"] / plain["standard_error"]) ** 2)
    assert not result.warnings


def test_spend_before_the_draw_and_after_the_span_changes_no_reading_and_spend_in_it_does(
    spark: SparkSession, spring: dict[str, str], read_anew: Callable[..., list[dict[str, Any]]]
) -> None:
    before = figures(read_anew())
    user = next(user for user in USERS if spring[user] == "treatment")
    assert figures(read_anew(bought(user, -1, 7_000), bought(user, DAYS, 7_000))) == before
    changed = read_anew(bought(user, 0, 7_000), bought(user, DAYS - 1, 7_000))
    treated = sum(group == "treatment" for group in spring.values())
    assert changed[1]["mean_spend"] == pytest.approx(before[1]["mean_spend"] + 14_000 / treated)


def test_a_later_score_of_the_date_is_not_the_covariate(
    spark: SparkSession, platform: Config, spring: dict[str, str]
) -> None:
    lakehouse = Lakehouse(spark, platform.tables)
    before = figures(pipeline.read_experiment(spark, platform, "spring").rows)
    later = [{"user_key": user, "score_date": DAY, "expected_spend": 1.0} for user in USERS]
    version = lakehouse.version("scores")
    write_without_spark(folder_of(platform), SCORES, *later)
    lakehouse.delete("experiment_results", "true")
    try:
        assert figures(pipeline.read_experiment(spark, platform, "spring").rows) == before
    finally:
        DeltaTable(lakehouse.location("scores")).restore(version)


def test_a_repeated_reading_writes_nothing_and_looks_before_the_end_are_counted(
    spark: SparkSession, platform: Config, spring: dict[str, str]
) -> None:
    lakehouse = Lakehouse(spark, platform.tables)
    first = pipeline.read_experiment(spark, platform, "spring")
    version = lakehouse.version("experiment_results")
    assert figures(pipeline.read_experiment(spark, platform, "spring").rows) == figures(first.rows)
    assert lakehouse.version("experiment_results") == version
    looks = [pipeline.read_experiment(spark, platform, "spring", days).warnings for days in (10, 20)]
    assert [re.search(r"look (\d) before the end", found[0])[1] for found in looks] == ["1", "2"]  # type: ignore[index]
    rows = lakehouse.read("experiment_results").collect()
    assert {row["days"]: row["planned"] for row in rows} == {10: False, 20: False, DAYS: True}
    lakehouse.delete("experiment_results", f"days = {DAYS}")
    assert "before the end: 2." in pipeline.read_experiment(spark, platform, "spring").warnings[0]
    lakehouse.delete("experiment_results", "true")


def test_a_span_that_is_not_over_an_unknown_name_and_a_small_group_are_refused(
    spark: SparkSession, platform: Config, spring: dict[str, str]
) -> None:
    with pytest.raises(DataError, match=r"46 days from 2024-03-10 are not over.*--days 45 reads what is there"):
        pipeline.read_experiment(spark, platform, "spring", 46)
    assert pipeline.read_experiment(spark, platform, "spring", 45).rows
    with pytest.raises(DataError, match="holds no user of nothing"):
        pipeline.read_experiment(spark, platform, "nothing")
    lakehouse = Lakehouse(spark, platform.tables)
    few = [user for user in USERS if spring[user] == "treatment"][:9]
    rows = lakehouse.read("experiments").filter("experiment = 'spring'").withColumn("experiment", F.lit("few"))
    lakehouse.append(EXPERIMENTS, rows.filter(F.col("user_key").isin(few) | F.col("is_control")))
    with pytest.raises(DataError, match=r"a group of few has fewer than 10 users"):
        pipeline.read_experiment(spark, platform, "few")


def test_groups_that_lost_users_are_told_of(spark: SparkSession, platform: Config, spring: dict[str, str]) -> None:
    lakehouse = Lakehouse(spark, platform.tables)
    rows = lakehouse.read("experiments").filter("experiment = 'spring'")
    shares = F.when(F.col("is_control"), 0.8).otherwise(0.2)
    lakehouse.append(EXPERIMENTS, rows.withColumns({"experiment": F.lit("lopsided"), "share": shares}))
    (warning,) = pipeline.read_experiment(spark, platform, "lopsided").warnings
    assert "don't have the users that their shares let expect" in warning


# --- the size -----------------------------------------------------------------------------------------------------------


def test_a_size_comes_from_the_newest_score_whose_days_are_over(
    spark: SparkSession, platform: Config, read_anew: Callable[..., list[dict[str, Any]]], spring: dict[str, str]
) -> None:
    found = pipeline.size_experiment(spark, platform, 0.1, Plan(), days=DAYS)
    x, y = (np.array([of(number) for number in range(60)], float) for of in (expected, spent))
    assert (found.day, found.covariate, found.users) == (DAY, SCORE, 60)
    assert (found.mean_spend, found.sd_spend) == pytest.approx((y.mean(), y.std(ddof=1)))
    assert found.correlation == pytest.approx(np.corrcoef(np.round(x, 2), y)[0, 1])
    assert found.adjusted[0] == pytest.approx(found.unadjusted[0] * (1 - found.saved), rel=0.01)
    assert found.effect_adjusted < found.effect_unadjusted
    read_anew(bought(USERS[3], -1, 7_000), bought(USERS[3], DAYS, 7_000))
    assert pipeline.size_experiment(spark, platform, 0.1, Plan(), days=DAYS).sd_spend == found.sd_spend
    assert pipeline.size_experiment(spark, platform, 0.1, Plan(), days=20).day == after(20)
    some = pipeline.size_experiment(spark, platform, 0.1, Plan(), day=DAY, days=DAYS, where="frequency >= 30")
    assert (some.users, some.selection) == (30, "frequency >= 30")
    with pytest.raises(DataError, match="not over"):
        pipeline.size_experiment(spark, platform, 0.1, Plan(), day=after(20), days=DAYS)
    with pytest.raises(ConfigError, match="effect must be above 0"):
        pipeline.size_experiment(spark, platform, 0.0, Plan())


def test_without_such_a_score_the_spend_before_stands_in_for_it(spark: SparkSession, platform: Config) -> None:
    # of 50 days: 2024-03-05 to 04-23, and as many before; nothing was scored by then
    found = pipeline.size_experiment(spark, platform, 0.1, Plan(), days=50)
    assert (found.day, found.covariate) == (after(-5), SPEND_BEFORE)
    # users whose first purchase came after that date aren't there
    assert found.users == 55
    with pytest.raises(DataError, match="--where needs a scored date"):
        pipeline.size_experiment(spark, platform, 0.1, Plan(), days=50, where="frequency > 1")
    with pytest.raises(DataError, match="must reach back"):
        pipeline.size_experiment(spark, platform, 0.1, Plan(), days=60)


@pytest.mark.parametrize(("test_date", "is_warned"), [(after(1), True), (DAY, False)])
def test_a_bundle_that_has_seen_the_spend_is_warned_of(
    spark: SparkSession,
    platform: Config,
    test_date: date,
    is_warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(size, "folder_here", lambda config, digest: Path())
    monkeypatch.setattr(size.manifests, "read", lambda *_: {"lineage": {"test_date": str(test_date)}})
    pipeline.size_experiment(spark, platform, 0.1, Plan(), days=DAYS)
    assert ("has learned from spend up to" in caplog.text) == is_warned


# --- command and queries -------------------------------------------------------------------------------------------------


def test_the_commands_draw_and_read(
    spark: SparkSession, platform: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "start_session", lambda *_: spark)
    options = [f"tables.path={platform.tables.path}", "privacy.smallest_group=10", "features.windows=[30]"]
    runner = CliRunner()

    def run(*words: str) -> str:
        result = runner.invoke(app.app, ["experiment", *words, *options])
        assert result.exit_code == 0, result.output
        return result.output

    assert "drawn" in run("assign", "by-command", "--date", str(DAY), "--days", "30")
    assert "nothing changed" in run("assign", "by-command", "--date", str(DAY), "--days", "30")
    shown = run("read", "by-command")
    assert "unadjusted" in shown
    assert "narrower" in shown
    assert '"variance_saved"' in run("read", "by-command", "--json")
    assert "adjusted by the score" in run("size", "--effect", "0.1", "--days", "30")


def test_the_documented_queries_run_in_duckdb_and_in_spark(
    spark: SparkSession, platform: Config, spring: dict[str, str]
) -> None:
    pipeline.read_experiment(spark, platform, "spring")
    queries = [
        query.replace("spring-mail", "spring") for query in re.findall(r"^```sql\n(.*?)^```$", DOCS, re.M | re.S)
    ]
    lakehouse = Lakehouse(spark, platform.tables)
    with duckdb.connect() as connection:
        connection.sql("CREATE SCHEMA bp")
        for name in ("experiments", "experiment_results", "user_keys", "user_daily"):
            connection.register(f"{name}_rows", DeltaTable(lakehouse.location(name)).to_pyarrow_table())
            connection.sql(f"CREATE VIEW bp.{name} AS SELECT * FROM {name}_rows")
        by_duckdb = [sorted(connection.sql(query).fetchall()) for query in queries]
    lakehouse.register(TABLE_NAMES)
    by_spark = [sorted(map(tuple, spark.sql(query).collect())) for query in queries]
    assert by_duckdb == by_spark
    treated, results, orders = by_spark
    assert {row[0] for row in treated} == {user for user in USERS if spring[user] == "treatment"}
    assert any(row[0] == "spring" for row in results)
    assert sum(row[2] for row in orders) == sum(spent(number) > 0 for number in range(60))
