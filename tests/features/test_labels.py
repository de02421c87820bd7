"""Labels: which past dates, which days' spend, and which users are held out."""

from __future__ import annotations

import itertools
from datetime import date, timedelta
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import FeaturesConfig, LabelsConfig
from bp_spark.core.errors import DataError
from bp_spark.features import labels

DAY = date(2017, 10, 3)
HORIZON = 90
DAILY = "user_key string, day date, spend decimal(18,2)"

Spent = tuple[str, int, int]
"""User, days after DAY, cents."""

DAYS_AROUND = st.tuples(st.sampled_from("abc"), st.integers(-200, 200), st.integers(-100_000, 1_000_000))
INSIDE = st.tuples(st.sampled_from("abc"), st.integers(0, HORIZON - 1), st.integers(-100_000, 1_000_000))
OUTSIDE = st.tuples(
    st.sampled_from("abcd"),
    st.integers(-400, -1) | st.integers(HORIZON, 400),
    st.integers(-100_000, 1_000_000),
)
with_spark = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def daily(spark: SparkSession, spent: list[Spent]) -> DataFrame:
    rows = [(user, DAY + timedelta(days=after), Decimal(cents) / 100) for user, after, cents in spent]
    return spark.createDataFrame(rows, DAILY)


def spend(rows: DataFrame, *dates: date, horizon: int = HORIZON) -> dict[tuple[str, date], float]:
    rows_spent = labels.future_spend(rows, dates or [DAY], horizon).collect()
    answer = {(row["user_key"], row["as_of_date"]): row["label_spend"] for row in rows_spent}
    assert len(answer) == len(rows_spent)
    return answer


def test_weekly_spend_is_by_week_of_first_order_and_sees_nothing_from_the_date_on(spark: SparkSession) -> None:
    days = [
        ("a", -1, 1, "5.00"),
        ("a", -8, 1, "7.00"),
        ("b", -8, 1, "1.50"),
        ("b", -7, 0, "-0.50"),
        ("c", -1, 1, "2.00"),
    ]
    # before a first order, from the date on, without any order
    nothing = [("b", -15, 0, "-9.00"), ("c", 0, 1, "99.00"), ("d", -3, 0, "-1.00")]
    rows = [
        (user, DAY + timedelta(days=after), orders, Decimal(spent)) for user, after, orders, spent in days + nothing
    ]
    table = spark.createDataFrame(rows, "user_key string, day date, orders bigint, spend decimal(18,2)")
    cents_by_week = {
        (row["first_week"], row["week"]): row["cents"] for row in labels.weekly_spend(table, DAY).collect()
    }
    assert cents_by_week == {(1, 0): 450, (1, 1): 850, (0, 0): 200}


# --- cutoffs -----------------------------------------------------------------------------------------------------------


def test_cutoffs_step_back_from_the_newest_whose_horizon_ends_on_the_test_date() -> None:
    config = LabelsConfig(horizon_days=90, cutoffs=3, cutoff_step_days=14)
    assert labels.cutoffs(date(2016, 1, 1), DAY, config) == [date(2017, 6, 7), date(2017, 6, 21), date(2017, 7, 5)]


def test_cutoffs_without_thirty_days_of_history_are_left_out() -> None:
    config = LabelsConfig(horizon_days=90, cutoffs=8, cutoff_step_days=14)
    dates = labels.cutoffs(date(2017, 5, 8), DAY, config)
    assert dates == [date(2017, 6, 7), date(2017, 6, 21), date(2017, 7, 5)]
    assert labels.cutoffs(date(2017, 5, 9), DAY, config) == dates[1:]


@given(
    first=st.dates(date(2000, 1, 1), date(2030, 1, 1)),
    span=st.integers(-100, 3_000),
    config=st.builds(
        LabelsConfig,
        horizon_days=st.integers(1, 730),
        other_horizons=st.just(()),
        cutoffs=st.integers(1, 30),
        cutoff_step_days=st.integers(1, 120),
    ),
)
def test_every_cutoff_has_its_horizon_before_the_test_date_and_its_history(
    first: date, span: int, config: LabelsConfig
) -> None:
    test_date = first + timedelta(days=span)
    history = labels.history_days(config.horizon_days)
    if span < config.horizon_days + history:
        with pytest.raises(DataError):
            labels.cutoffs(first, test_date, config)
        return
    dates = labels.cutoffs(first, test_date, config)
    assert 1 <= len(dates) <= config.cutoffs
    assert dates[-1] + timedelta(days=config.horizon_days) == test_date
    assert dates[0] - first >= timedelta(days=history)
    steps = {later - earlier for earlier, later in itertools.pairwise(dates)}
    assert steps <= {timedelta(days=config.cutoff_step_days)}


@pytest.mark.parametrize(
    ("days", "horizon"), [(210, 90), (209, 60), (150, 60), (149, 30), (75, 30), (74, 14), (35, 14)]
)
def test_a_young_platform_gets_the_longest_horizon_that_its_events_allow(days: int, horizon: int) -> None:
    first = DAY - timedelta(days=days)
    config = labels.with_horizon_in_reach(LabelsConfig(horizon_days=90), first, DAY)
    assert (config.horizon_days, config.is_shortened) == (horizon, horizon < 90)
    assert {30, 90, 180} <= {config.horizon_days, *config.other_horizons}, "no horizon is lost"
    assert labels.cutoffs(first, DAY - timedelta(days=horizon), config)


def test_too_young_a_platform_is_refused_with_the_days_that_the_shortest_horizon_takes() -> None:
    with pytest.raises(DataError, match=r"must reach over 35 days .*shorter_horizons, 14 days, but reach over 34$"):
        labels.with_horizon_in_reach(LabelsConfig(horizon_days=90), DAY - timedelta(days=34), DAY)


def test_without_a_shorter_horizon_the_configured_one_stays() -> None:
    for config in (LabelsConfig(shorter_horizons=()), LabelsConfig(horizon_days=14, other_horizons=(90,))):
        assert labels.with_horizon_in_reach(config, DAY - timedelta(days=20), DAY) is config


@given(
    span=st.integers(0, 900),
    config=st.builds(
        LabelsConfig,
        horizon_days=st.integers(1, 365),
        other_horizons=st.just(()),
        shorter_horizons=st.lists(st.integers(1, 365), min_size=1, max_size=5).map(tuple),
    ),
)
def test_no_longer_horizon_than_the_one_in_reach_can_be_trained(span: int, config: LabelsConfig) -> None:
    first = DAY - timedelta(days=span)
    allowed = [days for days in (config.horizon_days, *config.shorter_horizons) if days <= config.horizon_days]
    in_reach = [days for days in allowed if span >= labels.days_needed(days)]
    if not in_reach and len(allowed) > 1 and min(allowed) < config.horizon_days:
        with pytest.raises(DataError):
            labels.with_horizon_in_reach(config, first, DAY)
    elif in_reach:
        chosen = labels.with_horizon_in_reach(config, first, DAY)
        assert chosen.horizon_days == max(in_reach)
        assert labels.cutoffs(first, DAY - timedelta(days=chosen.horizon_days), chosen)
    for days in set(allowed) - set(in_reach):
        with pytest.raises(DataError):
            labels.cutoffs(first, DAY - timedelta(days=days), config.with_horizon(days))


def test_a_season_is_measured_around_the_same_weekday_of_the_year_before() -> None:
    config, dates = LabelsConfig(horizon_days=90), [date(2016, 9, 20), date(2016, 10, 4), date(2016, 10, 18)]
    assert labels.year_before(date(2016, 1, 1), DAY, config) == dates
    assert labels.year_before(date(2016, 1, 15), DAY, config) == dates[1:], "histories are long enough at each"
    assert labels.year_before(date(2017, 1, 1), DAY, config) == []


def test_a_year_before_no_label_sees_the_test_date() -> None:
    config = LabelsConfig(horizon_days=364, other_horizons=())
    assert labels.year_before(date(2010, 1, 1), DAY, config) == [date(2016, 9, 20), date(2016, 10, 4)]


def test_too_short_a_past_is_refused_with_the_days_that_are_needed() -> None:
    with pytest.raises(DataError) as refused:
        labels.cutoffs(date(2017, 9, 1), DAY, LabelsConfig(horizon_days=90))
    assert str(refused.value) == (
        "events.event_date: must reach back 120 days before 2017-10-03 to train, but begin on 2017-09-01; a shorter "
        "labels.horizon_days needs less"
    )
    assert (refused.value.table, refused.value.column) == ("events", "event_date")


# --- future spend ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "counts"), [(-1, False), (0, True), (1, True), (HORIZON - 1, True), (HORIZON, False), (400, False)]
)
def test_the_horizon_holds_the_as_of_day_and_not_the_day_after_its_end(
    spark: SparkSession, after: int, counts: bool
) -> None:
    assert spend(daily(spark, [("a", after, 500)])) == ({("a", DAY): 5.0} if counts else {})


def test_a_horizon_of_one_day_is_the_as_of_day(spark: SparkSession) -> None:
    rows = daily(spark, [("a", -1, 100), ("a", 0, 200), ("a", 1, 400)])
    assert spend(rows, horizon=1) == {("a", DAY): 2.0}


def test_refunds_are_taken_off(spark: SparkSession) -> None:
    rows = daily(spark, [("a", 0, 1_000), ("a", 5, -400), ("b", 3, -500)])
    assert spend(rows) == {("a", DAY): 6.0, ("b", DAY): -5.0}


def test_a_day_counts_for_every_date_whose_horizon_holds_it(spark: SparkSession) -> None:
    later = DAY + timedelta(days=30)
    rows = daily(spark, [("a", 0, 100), ("a", 30, 200), ("a", 89, 400), ("a", 90, 800), ("b", 119, 1_600)])
    assert spend(rows, later, DAY) == {("a", DAY): 7.0, ("a", later): 14.0, ("b", later): 16.0}


def test_a_date_given_twice_counts_once(spark: SparkSession) -> None:
    assert spend(daily(spark, [("a", 0, 100)]), DAY, DAY) == {("a", DAY): 1.0}


def test_cents_add_up_exactly(spark: SparkSession) -> None:
    rows = daily(spark, [("a", number % HORIZON, 10) for number in range(1_000)] + [("b", 0, 99_999_999_999)])
    assert spend(rows) == {("a", DAY): 100.0, ("b", DAY): 999_999_999.99}


@with_spark
@given(spent=st.lists(DAYS_AROUND, max_size=20))
def test_labels_are_the_sum_over_the_days_of_the_horizon(spark: SparkSession, spent: list[Spent]) -> None:
    expected: dict[tuple[str, date], int] = {}
    for user, after, cents in spent:
        if 0 <= after < HORIZON:
            expected[user, DAY] = expected.get((user, DAY), 0) + cents
    assert spend(daily(spark, spent)) == {key: cents / 100 for key, cents in expected.items()}


@with_spark
@given(inside=st.lists(INSIDE, max_size=8), outside=st.lists(OUTSIDE, min_size=1, max_size=8))
def test_days_before_the_date_and_from_the_horizons_end_on_change_nothing(
    spark: SparkSession, inside: list[Spent], outside: list[Spent]
) -> None:
    assert spend(daily(spark, inside + outside)) == spend(daily(spark, inside))


# --- labels on features ------------------------------------------------------------------------------------------------


def test_every_user_keeps_a_row_and_who_did_nothing_spent_0(spark: SparkSession) -> None:
    later = DAY + timedelta(days=14)
    users = spark.createDataFrame(
        [("a", DAY, 1.0), ("b", DAY, 2.0), ("browser", DAY, 3.0), ("a", later, 4.0)],
        "user_key string, as_of_date date, recency_days double",
    )
    days = daily(spark, [("a", 3, 250), ("b", -3, 100), ("stranger", 3, 100)]).union(
        spark.createDataFrame([("browser", DAY, None)], DAILY)
    )
    labelled = labels.join_labels(users, labels.future_spend(days, [DAY, later], HORIZON)).collect()
    assert {(row["user_key"], row["as_of_date"], row["recency_days"]): row["label_spend"] for row in labelled} == {
        ("a", DAY, 1.0): 2.5,
        ("b", DAY, 2.0): 0.0,
        ("browser", DAY, 3.0): 0.0,
        ("a", later, 4.0): 0.0,
    }
    assert len(labelled) == 4


def test_the_training_set_is_the_features_with_label_and_fold() -> None:
    table = labels.training_set_table(FeaturesConfig(), [30, 180])
    names = table.schema.names
    others = ["label_spend_30d", "label_spend_180d"]
    assert names[-8:] == ["label_spend", *others, "exposure_days", "weight", "complete", "given", "fold"]
    assert set(table.key) == {"user_key", "as_of_date"}
    assert not table.schema["label_spend"].nullable
    assert all(table.schema[name].nullable and table.schema[name].metadata["comment"] for name in others)


def test_rows_without_holdout_users_say_which_fold_the_others_are_in(spark: SparkSession) -> None:
    rows = spark.createDataFrame([("1",), ("小明",), ("7",)], "user_key string")
    fold_by_user = {
        row["user_key"]: row["fold"] for row in labels.without_holdout(rows, LabelsConfig(folds=3)).collect()
    }
    assert fold_by_user == {"1": 0, "小明": 1}


# --- horizons that were not over -----------------------------------------------------------------------------------------


def test_newer_cutoffs_have_seen_a_third_of_the_horizon_at_least() -> None:
    config = LabelsConfig(horizon_days=90, recent_cutoffs=9, cutoff_step_days=14)
    newest = DAY - timedelta(days=90)
    recent = labels.recent_cutoffs(newest, DAY, config)
    assert [(DAY - day).days for day in recent] == [76, 62, 48, 34]
    assert labels.recent_cutoffs(newest, DAY, config.model_copy(update={"recent_cutoffs": 2})) == recent[:2]
    assert labels.recent_cutoffs(newest, DAY, config.model_copy(update={"recent_cutoffs": 0})) == []


def test_a_label_of_a_part_of_the_horizon_is_scaled_up_and_weighs_less(spark: SparkSession) -> None:
    config = LabelsConfig(horizon_days=90)
    old, recent = DAY - timedelta(days=100), DAY - timedelta(days=30)
    rows = spark.createDataFrame(
        [("a", old, 7.0), ("a", recent, 20.0)], "user_key string, as_of_date date, label_spend double"
    )
    whole, part = labels.add_weights(rows, DAY, config, {30: 2.5}).orderBy("as_of_date").collect()
    assert (whole["label_spend"], whole["exposure_days"], whole["complete"], whole["weight"]) == (7.0, 90, True, 1.0)
    assert (part["label_spend"], part["exposure_days"], part["complete"]) == (50.0, 30, False)
    assert part["weight"] == pytest.approx(1 / 3)


def test_spend_so_far_is_scaled_up_as_spend_went_on_before(spark: SparkSession) -> None:
    config = LabelsConfig(horizon_days=HORIZON, folds=3)
    complete, ages = DAY - timedelta(days=HORIZON), (30, 45, 60)
    dates = [complete, *(DAY - timedelta(days=age) for age in ages)]
    # user 7 is held out, and what is spent from the test date on isn't known
    spent = [("1", -90, 6_000), ("1", -50, 2_000), ("1", -31, 1_000), ("7", -20, 90_000), ("1", 0, 50_000)]
    users = spark.createDataFrame([(user, day) for user in "17" for day in dates], "user_key string, as_of_date date")
    factors = labels.exposure_factors(users, daily(spark, spent), dates, DAY, config)
    assert factors == pytest.approx({30: 9 / 6, 45: 9 / 8, 60: 1.0})
    # spend that has only begun late: never more than twice what a steady rate would bring
    late = daily(spark, [("1", -90, 1), ("1", -1, 100_000)])
    assert labels.exposure_factors(users, late, dates, DAY, config) == pytest.approx({30: 6.0, 45: 4.0, 60: 3.0})
    nobody = daily(spark, [("2", -50, 1)])
    assert labels.exposure_factors(users, nobody, dates, DAY, config) == pytest.approx({30: 3.0, 45: 2.0, 60: 1.5})
    assert labels.exposure_factors(users, nobody, dates[:1], DAY, config) == {}


def test_older_labels_weigh_less_where_a_half_life_is_set(spark: SparkSession) -> None:
    config = LabelsConfig(horizon_days=90, recency_half_life_days=60)
    dates = [DAY - timedelta(days=days) for days in (210, 150, 90, 45)]
    rows = spark.createDataFrame(
        [("a", day, 1.0) for day in dates], "user_key string, as_of_date date, label_spend double"
    )
    weighted = labels.add_weights(rows, DAY, config, {45: 2.0}).orderBy("as_of_date").collect()
    assert [row["weight"] for row in weighted] == pytest.approx([0.25, 0.5, 1.0, 0.5])


def test_spend_from_the_test_date_on_is_never_seen(spark: SparkSession) -> None:
    as_of = DAY - timedelta(days=10)
    days = daily(spark, [("a", -5, 300), ("a", -1, 50), ("a", 0, 1_000), ("a", 40, 1_000), ("b", 0, 70)])
    labelled = labels.future_spend(days, [as_of], HORIZON, DAY).collect()
    assert [(row["user_key"], row["label_spend"]) for row in labelled] == [("a", 3.5)]


# --- other horizons ------------------------------------------------------------------------------------------------------


def other_labels(
    spark: SparkSession, spent: list[Spent], ages: list[int], horizons: list[int]
) -> dict[tuple[str, int], dict[int, float | None]]:
    """Return (user, age of the cutoff in days) -> horizon -> label as seen on DAY, for the users a to d at each cutoff."""
    users = [(user, DAY - timedelta(days=age)) for user in "abcd" for age in ages]
    rows = spark.createDataFrame(users, "user_key string, as_of_date date")
    dates = [DAY - timedelta(days=age) for age in ages]
    labelled = labels.with_other_horizons(rows, daily(spark, spent), dates, horizons, DAY).collect()
    assert len(labelled) == len(users)
    return {
        (row["user_key"], (DAY - row["as_of_date"]).days): {days: row[f"label_spend_{days}d"] for days in horizons}
        for row in labelled
    }


@with_spark
@given(
    spent=st.lists(DAYS_AROUND, max_size=20),
    ages=st.lists(st.integers(1, 200), min_size=1, max_size=4, unique=True),
    horizons=st.lists(st.integers(1, 200), min_size=1, max_size=3, unique=True),
)
def test_another_horizon_has_its_whole_spend_or_none_at_all(
    spark: SparkSession, spent: list[Spent], ages: list[int], horizons: list[int]
) -> None:
    by_cutoff = other_labels(spark, spent, ages, horizons)
    for (user, age), by_horizon in by_cutoff.items():
        for days, label in by_horizon.items():
            within = sum(cents for who, after, cents in spent if who == user and 0 <= after + age < days)
            assert label == (within / 100 if days <= age else None)


def test_a_horizon_as_long_as_the_main_one_has_its_labels(spark: SparkSession) -> None:
    spent = [("a", -95, 100), ("a", -80, 200), ("a", -10, -50), ("b", -1, 70)]
    main = spend(daily(spark, spent), DAY - timedelta(days=HORIZON))
    by_cutoff = other_labels(spark, spent, [HORIZON], [HORIZON])
    assert {user: label[HORIZON] for (user, _), label in by_cutoff.items()} == {
        user: main.get((user, DAY - timedelta(days=HORIZON)), 0.0) for user in "abcd"
    }


def test_without_other_horizons_rows_stay_as_they_are(spark: SparkSession) -> None:
    rows = spark.createDataFrame([("a", DAY)], "user_key string, as_of_date date")
    assert labels.with_other_horizons(rows, daily(spark, []), [DAY], [], DAY).columns == rows.columns


# --- folds ---------------------------------------------------------------------------------------------------------------


def folds(spark: SparkSession, users: list[str], config: LabelsConfig) -> dict[str, int]:
    rows = spark.createDataFrame([(user,) for user in users], "user_key string")
    return {row[0]: row[1] for row in rows.select("user_key", labels.fold(config)).collect()}


def test_a_user_stays_in_one_fold_for_ever(spark: SparkSession) -> None:
    users = ["1", "1001", "u-42", "小明", "", "7"]
    fold_by_user = folds(spark, users, LabelsConfig(folds=3))
    # pinned: another hash would let models of tomorrow learn from holdout users of today
    assert [fold_by_user[user] for user in users] == [0, 0, 2, 1, 2, labels.HOLDOUT]
    assert folds(spark, users[::-1], LabelsConfig(folds=3)) == fold_by_user
    assert folds(spark, users[:1], LabelsConfig(horizon_days=7, cutoffs=1, folds=3)) == {"1": fold_by_user["1"]}


@pytest.mark.parametrize(("holdout", "number"), [(0.2, 3), (0.5, 2), (0.0, 5)])
def test_shares_are_near_those_configured(spark: SparkSession, holdout: float, number: int) -> None:
    config = LabelsConfig(holdout_fraction=holdout, folds=number)
    users = spark.range(20_000).select(F.concat(F.lit("user-"), F.col("id").cast("string")).alias("user_key"))
    counted = users.groupBy(labels.fold(config).alias("fold")).count().collect()
    shares = {row["fold"]: row["count"] / 20_000 for row in counted}
    assert shares.pop(labels.HOLDOUT, 0) == pytest.approx(holdout, abs=0.015 if holdout else 0)
    assert shares == pytest.approx(dict.fromkeys(range(number), (1 - holdout) / number), abs=0.015)


def test_another_number_of_folds_leaves_the_holdout_alone(spark: SparkSession) -> None:
    users = [str(number) for number in range(2_000)]
    few, many = (folds(spark, users, LabelsConfig(folds=number)) for number in (2, 7))
    held_out = {user for user in users if few[user] == labels.HOLDOUT}
    assert held_out == {user for user in users if many[user] == labels.HOLDOUT} != set()


def test_the_user_column_may_have_another_name(spark: SparkSession) -> None:
    rows = spark.createDataFrame([("1001",)], "who string")
    row = rows.select(labels.fold(LabelsConfig(), "who")).first()
    assert row is not None
    assert row[0] == folds(spark, ["1001"], LabelsConfig())["1001"]
