"""Labels by asking: whom, what may be answered, and what trainings make of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession

from bp_spark import pipeline
from bp_spark.core import config
from bp_spark.core.config import Config, FusionConfig, LabellingConfig
from bp_spark.core.errors import BundleError, ConfigError, DataError
from bp_spark.features import labels, user_daily
from bp_spark.features.catalogue import catalogue, user_features_table
from bp_spark.features.job import write_features
from bp_spark.lakehouse.run import Run
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import EVENTS, GIVEN_LABELS, USER_DAILY, USER_KEYS
from bp_spark.model.horizons import Horizons
from bp_spark.model.members.base import Member
from bp_spark.model.members.btyd import BtydMember
from bp_spark.model.members.linear import LinearMember
from bp_spark.model.stack import CalibratedStack
from bp_spark.registry import bundle as bundles
from bp_spark.registry.bundle import Bundle
from bp_spark.scoring.active_learning import files, selection
from bp_spark.training import cross_fit, dataset
from tests.support.histories import AS_OF, SECRET, embeddings_frame, events_frame, random_events, rows_of, texts_frame
from tests.support.random_users import NIGHT, users

pytestmark = pytest.mark.slow

SMALL = ["features.windows=[30, 90]", "features.history_length=6"]
TODAY = date(2024, 6, 1)
FIRST = date(2024, 1, 1)
HEAD = "user_key,as_of_date,spend"


# --- disagreement and diversity ----------------------------------------------------------------------------------------


def test_users_whom_members_disagree_on_come_before_those_they_agree_on() -> None:
    said = {"a": np.array([100.0, 100.0, 0.0]), "b": np.array([100.0, 144.0, 100.0])}
    apart = selection.disagreement(said, {"a": 0.5, "b": 0.5})
    np.testing.assert_allclose(apart, [0.0, 1.0, 5.0])


def test_a_member_without_weight_has_no_say_and_weights_need_not_sum_to_one() -> None:
    said = {"a": np.array([4.0]), "b": np.array([16.0]), "mute": np.array([1e6])}
    assert selection.disagreement(said, {"a": 3.0, "b": 1.0}) == pytest.approx([np.sqrt(0.75)])


def clusters(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Five clusters of twenty rows; all rows of most weight are in the first."""
    rng = np.random.default_rng(seed)
    points = np.repeat(rng.normal(0, 10, (5, 4)), 20, axis=0) + rng.normal(0, 0.1, (100, 4))
    return points, np.concatenate([np.full(20, 2.0), np.full(80, 1.0)])


def test_a_selection_spreads_over_clusters_where_most_disagreement_is_in_one() -> None:
    points, weights = clusters()
    chosen = selection.select_diverse(points, weights, 5)
    assert sorted(chosen // 20) == [0, 1, 2, 3, 4]
    assert set(np.argsort(-weights, kind="stable")[:5] // 20) == {0}


def test_the_row_nearest_to_a_centre_stands_for_it() -> None:
    points = np.array([[0.0], [1.0], [2.0], [100.0], [103.0], [104.0]])
    assert selection.select_diverse(points, np.ones(6), 2).tolist() == [1, 4]


@pytest.mark.parametrize("count", [1, 7, 99, 100, 200])
def test_a_selection_has_as_many_rows_as_asked_for_each_once_and_comes_out_again(count: int) -> None:
    points, weights = clusters()
    chosen = selection.select_diverse(points, weights, count)
    assert len(set(chosen)) == len(chosen) == min(count, 100)
    assert (selection.select_diverse(points, weights, count) == chosen).all()


def test_where_rows_are_alike_those_of_most_weight_fill_the_selection() -> None:
    points = np.array([[0.0]] * 6 + [[9.0]] * 2)
    chosen = selection.select_diverse(points, np.array([1.0, 1, 1, 5, 1, 4, 1, 1]), 4)
    assert {3, 5} <= set(chosen)
    assert len({*chosen} & {6, 7}) == 1


def test_nobody_disagreed_on_is_no_reason_to_ask_nobody() -> None:
    points, _ = clusters()
    assert sorted(selection.select_diverse(points, np.zeros(100), 5) // 20) == [0, 1, 2, 3, 4]


def test_features_are_compared_by_logarithm_where_skewed_and_missing_ones_stand_at_the_mean() -> None:
    found = catalogue(config.load(overrides=SMALL).features)
    skewed = next(feature.name for feature in found.features if feature.scale == "log")
    place = found.names.index(skewed)
    frame = pd.DataFrame({name: [1.0, 1.0, 1.0, 1.0] for name in found.names})
    frame[skewed] = [0.0, np.e - 1, np.nan, np.inf]
    points = selection.standardise(frame, found)
    np.testing.assert_allclose(points[:, place], [-1, 1, 0, 0])
    assert not np.delete(points, place, axis=1).any()


# --- who is asked ------------------------------------------------------------------------------------------------------


@dataclass
class Platform:
    """Features of 80 users on NIGHT, and a promoted bundle of two members, ``whole``."""

    spark: SparkSession
    settings: Config
    lakehouse: Lakehouse
    bundles: dict[str, Bundle]
    users: DataFrame

    def select(self, budget: int, *overrides: str, output: Path | None = None) -> pipeline.SelectResult:
        settings = config.changed(self.settings, dict(one.split("=") for one in overrides))
        return pipeline.select_labels(self.spark, settings, NIGHT, budget, output)

    def add(self, path: Path, *lines: str, head: str = HEAD) -> dict[str, Any]:
        path.write_text("\n".join([head, *lines]), encoding="utf-8")
        (stage,) = pipeline.add_labels(self.spark, self.settings, path)
        return stage

    def given(self) -> dict[str, Any]:
        return {row["user_key"]: row for row in self.lakehouse.read("given_labels").collect()}


BUNDLES = {"whole": ("linear", "btyd"), "alone": ("btyd",)}


def bundle(folder: Path, settings: Config, *names: str) -> Bundle:
    """Of members that need no training."""
    rfm = tuple(name for name in cross_fit.RFM if name in catalogue(settings.features).names)
    slopes = tuple(0.1 * place for place in range(len(rfm)))
    members: dict[str, Member] = {
        "linear": LinearMember(rfm, slopes, slopes, intercept=1.0, smearing=1.1, ceiling=9.0),
        "btyd": BtydMember(90, 0.8, 20.0, 0.5, 3.0, 4.0, 3.0, 30.0),
    }
    rng = np.random.default_rng(1)
    spend = rng.gamma(2, 20, 2000)
    said = pd.DataFrame({name: spend * rng.gamma(9, 1 / 9, 2000) for name in names}).assign(label_spend=spend)
    fusion = CalibratedStack.fit(said, FusionConfig(members=names))
    assert min(fusion.weights) > 0.2
    inputs = {"tabular": catalogue(settings.features).names}
    chosen = [members[name] for name in names]
    return bundles.write(folder, chosen, fusion, Horizons(90, ()), inputs=inputs, lineage={}, metrics={})


@pytest.fixture(scope="module")
def made(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    folder = tmp_path_factory.mktemp("labelling")
    settings = config.load(overrides=[*SMALL, f"tables.path={folder}/lakehouse", f"bundles={folder}/bundles"])
    lakehouse = Lakehouse(spark, settings.tables)
    bundles_made = {name: bundle(folder / "bundles" / name, settings, *of) for name, of in BUNDLES.items()}
    bundles.promote(settings.bundles, bundles_made["whole"])
    rows = users(spark, settings, 80, mean=3).localCheckpoint()
    lakehouse.replace(user_features_table(settings.features), rows, where={"as_of_date": [NIGHT]})
    keys = [{"user_id": f"id{n}", "user_key": f"user{n}", "key_id": SECRET.key_id} for n in range(80)]
    keys.append({"user_id": "小明", "user_key": SECRET.key_of("小明"), "key_id": SECRET.key_id})
    lakehouse.replace(USER_KEYS, rows_of(spark, USER_KEYS, keys))
    event = {"event_id": "e", "user_key": "user0", "event_date": NIGHT - timedelta(days=200), "kind": "purchase"}
    lakehouse.replace(EVENTS, rows_of(spark, EVENTS, [event]))
    return Platform(spark, settings, lakehouse, bundles_made, rows)


@pytest.fixture
def platform(made: Platform) -> Platform:
    """Without a question or an answer."""
    for name in ("label_requests", "given_labels"):
        if made.lakehouse.exists(name):
            made.lakehouse.delete(name, "true")
    return made


def test_asked_are_the_users_of_most_disagreement_but_the_holdout(platform: Platform, tmp_path: Path) -> None:
    file = tmp_path / "out" / "questions.csv"
    result = platform.select(12, "labelling.candidates_per_label=1", output=file)
    open_to = labels.without_holdout(platform.users, platform.settings.labels).toPandas()
    assert len(open_to) < 80
    said = platform.bundles["whole"].predict({str(name): open_to[name].to_numpy() for name in open_to})
    fusion = platform.bundles["whole"].stack
    members = {name: said[f"member_{name}"] for name in fusion.members}
    apart = pd.Series(
        selection.disagreement(members, dict(zip(fusion.members, fusion.weights, strict=True))),
        open_to["user_key"],
    )
    most = apart.sort_values(ascending=False).head(12)
    assert result.asked["user_key"].tolist() == most.index.tolist()
    np.testing.assert_allclose(result.asked["disagreement"], most, rtol=1e-4)
    assert result.asked["rank"].tolist() == list(range(1, 13))
    stored = platform.lakehouse.read("label_requests").toPandas()
    assert set(stored["user_key"]) == set(most.index)
    assert set(stored["bundle_digest"]) == {platform.bundles["whole"].digest}
    assert file.read_text(encoding="utf-8").splitlines()[:2] == [
        "user_key,as_of_date,rank,spend",
        f"{most.index[0]},{NIGHT},1,",
    ]


def test_the_same_questions_are_asked_once_and_answers_bring_further_ones(platform: Platform, tmp_path: Path) -> None:
    first = platform.select(10)
    assert first.written
    version = platform.lakehouse.version("label_requests")
    again = platform.select(10)
    assert not again.written
    pd.testing.assert_frame_equal(again.asked, first.asked)
    assert platform.lakehouse.version("label_requests") == version

    answered = first.asked["user_key"].head(4).tolist()
    platform.add(tmp_path / "answers.csv", *(f"{user},{NIGHT},12.5" for user in answered))
    further = platform.select(10)
    assert further.written
    # whoever hasn't answered is not asked twice, and whoever has needn't be
    assert not set(further.asked["user_key"]) & set(first.asked["user_key"])
    assert platform.lakehouse.read("label_requests").count() == 20
    everyone = labels.without_holdout(platform.users, platform.settings.labels).count()
    assert len(platform.select(100).asked) == everyone - 20


def test_the_same_selection_comes_out_of_the_same_users_and_bundle(platform: Platform) -> None:
    open_to = labels.without_holdout(platform.users, platform.settings.labels)
    settings = platform.settings
    found = [
        selection.select_users(
            rows, platform.bundles["whole"], catalogue(settings.features), 8, LabellingConfig(candidates_per_label=4)
        )
        for rows in (open_to.repartition(3), open_to.coalesce(1))
    ]
    assert found[0]["user_key"].tolist() == found[1]["user_key"].tolist()
    assert found[0]["disagreement"].is_monotonic_decreasing
    assert len(found[0]) == 8


def test_a_bundle_of_one_member_has_nobody_to_disagree(platform: Platform) -> None:
    with pytest.raises(BundleError, match="only btyd has weight in the fusion"):
        selection.most_disputed_users(platform.users, platform.bundles["alone"], 3)


def test_without_features_or_with_a_budget_out_of_bounds_nobody_is_asked(platform: Platform) -> None:
    other = NIGHT - timedelta(days=1)
    with pytest.raises(DataError, match=rf"user_features.as_of_date: holds no rows of {other}; run featurize"):
        pipeline.select_labels(platform.spark, platform.settings, other, 5)
    with pytest.raises(ConfigError, match=r"budget must be 1 to 5,000, is 5,001"):
        platform.select(5_001)


# --- what is answered --------------------------------------------------------------------------------------------------


def read(path: Path, *lines: str, head: str = HEAD) -> files.LabelFile:
    path.write_text("\n".join([head, *lines]), encoding="utf-8")
    return files.read_labels(path, FIRST, TODAY, LabellingConfig(max_spend=1000))


def test_a_file_is_read_as_spreadsheets_write_it_and_lines_without_an_answer_are_passed_over(tmp_path: Path) -> None:
    head = "\ufeffspend,rank,user_id,as_of_date,source,given_at"
    lines = ['"10.50",1," 小明 ",2024-05-01,"survey, by phone",2024-05-02\r', ",2,u2,2024-05-01,,\r", "\r"]
    file = read(tmp_path / "labels.csv", *lines, "0,3,u3,2024-05-01,,", head=f"{head}\r")
    assert (file.user_column, file.unanswered) == ("user_id", 1)
    told = datetime(2024, 5, 2, tzinfo=UTC)
    day = date(2024, 5, 1)
    assert list(file.labels) == [
        files.SurveyLabel(2, "小明", day, 10.5, "survey, by phone", told),
        files.SurveyLabel(5, "u3", day, 0.0, None, None),
    ]


@pytest.mark.parametrize(
    ("column", "line", "rule"),
    [
        ("spend", "u,2024-05-01,-1", "must be a number from 0 to 1,000 (labelling.max_spend)"),
        ("spend", "u,2024-05-01,nan", "must be a number from 0 to 1,000"),
        ("spend", "u,2024-05-01,inf", "must be a number from 0 to 1,000"),
        ("spend", "u,2024-05-01,1000.01", "must be a number from 0 to 1,000"),
        ("spend", "u,2024-05-01,1_0", "must be a number from 0 to 1,000"),
        ("spend", "u,2024-05-01,much", "must be a number from 0 to 1,000"),
        ("as_of_date", "u,01.05.2024,1", "must be a date, as YYYY-MM-DD"),
        ("as_of_date", "u,2024-02-30,1", "must be a date, as YYYY-MM-DD"),
        ("as_of_date", "u,,1", "must be a date, as YYYY-MM-DD"),
        ("as_of_date", "u,2024-01-01,1", "must be after the first event, of 2024-01-01, and not after tomorrow"),
        ("as_of_date", "u,2024-06-03,1", "must be after the first event"),
        ("user_key", ",2024-05-01,1", "must name a user"),
        ("user_key", "known,2024-05-01,1", "a user has one label of a date, and this one stands in line 2 too"),
    ],
)
def test_a_line_that_breaks_a_rule_is_named_with_file_column_and_rule(
    tmp_path: Path, column: str, line: str, rule: str
) -> None:
    path = tmp_path / "labels.csv"
    with pytest.raises(DataError) as refused:
        read(path, "known,2024-05-01,5", line)
    assert str(refused.value).startswith(f"{path}.{column}: line 3: {rule}")


@pytest.mark.parametrize(
    ("head", "line", "rule"),
    [
        ("user_key,as_of_date", "u,2024-05-01", ".spend: line 1: column is missing"),
        ("as_of_date,spend", "2024-05-01,1", ": line 1: must have user_key or user_id; neither is there"),
        ("user_key,user_id,as_of_date,spend", "u,u,2024-05-01,1", ": line 1: must have user_key or user_id; both are"),
        ("user_key,as_of_date,spend,souce", "u,2024-05-01,1,me", ".souce: line 1: isn't a column of labels; these are"),
        ("user_key,as_of_date,spend,spend", "u,2024-05-01,1,1", ".spend: line 1: must be there once"),
        (HEAD, "u,2024-05-01,1,2", ": line 2: must have 3 values, as the first line; has 4"),
        (HEAD, "u,2024-05-01,", ".spend: must hold a spend: none of its 1 lines does"),
        (HEAD, 'u,2024-05-01,"1', ": must be CSV"),
        (f"{HEAD},given_at", "u,2024-05-01,1,2024-06-02", ".given_at: line 2: must not be in the future"),
        ("", "", ": is empty"),
    ],
)
def test_a_file_that_is_no_file_of_labels_is_refused(tmp_path: Path, head: str, line: str, rule: str) -> None:
    path = tmp_path / "labels.csv"
    with pytest.raises(DataError) as refused:
        read(path, line, head=head)
    assert str(refused.value).startswith(f"{path}{rule}")


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: can't be read \(No such file or directory\)"):
        files.read_labels(tmp_path / "none.csv", FIRST, TODAY, LabellingConfig())
    (tmp_path / "labels.csv").write_bytes(b"user_key,as_of_date,spend\n\xff,2024-05-01,1\n")
    with pytest.raises(DataError, match=r"labels\.csv: must be text in UTF-8"):
        files.read_labels(tmp_path / "labels.csv", FIRST, TODAY, LabellingConfig())


def test_labels_of_strangers_are_refused_and_nothing_is_written(platform: Platform, tmp_path: Path) -> None:
    before = platform.lakehouse.version("given_labels") if platform.lakehouse.exists("given_labels") else None
    with pytest.raises(DataError, match=r"labels\.csv\.user_key: line 3: must be a user that was ingested.*\(2 rows\)"):
        platform.add(
            tmp_path / "labels.csv", f"user1,{NIGHT},1", f"stranger,{NIGHT},1", f"user2,{NIGHT},1", f"id3,{NIGHT},1"
        )
    after = platform.lakehouse.version("given_labels") if platform.lakehouse.exists("given_labels") else None
    assert before == after


def test_a_newer_label_replaces_the_older_one_and_the_same_file_twice_changes_nothing(
    platform: Platform, tmp_path: Path
) -> None:
    path = tmp_path / "labels.csv"
    head = f"{HEAD},source,given_at"
    lines = [f"user1,{NIGHT},10,survey,", f"user2,{NIGHT},20,survey,2023-01-02", f"user3,{NIGHT},,,"]
    stage = platform.add(path, *lines, head=head)
    assert (stage["rows_in"], stage["rows_out"], stage["figures"]["unanswered"]) == (2, 2, "1")
    given, version = platform.given(), platform.lakehouse.version("given_labels")
    assert {user: (row["spend"], row["source"]) for user, row in given.items()} == {
        "user1": (10.0, "survey"),
        "user2": (20.0, "survey"),
    }
    assert given["user2"]["given_at"].astimezone(UTC) == datetime(2023, 1, 2, tzinfo=UTC)
    assert platform.add(path, *lines, head=head)["status"] == "unchanged"
    assert platform.lakehouse.version("given_labels") == version
    assert platform.given() == given

    stage = platform.add(path, f"user1,{NIGHT},11,review,", f"user2,{NIGHT},5,review,2022-12-31", head=head)
    assert stage["rows_out"] == 1
    now = platform.given()
    assert (now["user1"]["spend"], now["user1"]["source"]) == (11.0, "review")
    assert now["user1"]["given_at"] > given["user1"]["given_at"]
    assert now["user2"] == given["user2"]


def test_users_named_by_id_are_stored_by_key(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = "user_id,as_of_date,spend"
    platform.add(tmp_path / "labels.csv", f"小明,{NIGHT},3", head=head)
    assert set(platform.given()) == {SECRET.key_of("小明")}
    with pytest.raises(DataError, match=r"\.user_id: line 2: must be a user") as refused:
        platform.add(tmp_path / "labels.csv", f"stranger,{NIGHT},3", head=head)
    assert "stranger" not in str(refused.value)
    monkeypatch.setenv("BP_SPARK_SECRET", "another-secret-of-more-than-32-bytes")
    with pytest.raises(ConfigError, match="rotate-keys"):
        platform.add(tmp_path / "labels.csv", f"小明,{NIGHT},3", head=head)


# --- what trainings make of it -----------------------------------------------------------------------------------------

TEST_DATE = AS_OF
COMPLETE, RECENT, BETWEEN = (TEST_DATE - timedelta(days=days) for days in (30, 15, 9))
DATES = [COMPLETE, RECENT]
EARLY, MIDNIGHT = datetime(2024, 3, 1, tzinfo=UTC), datetime(AS_OF.year, AS_OF.month, AS_OF.day, tzinfo=UTC)


@pytest.fixture(scope="module")
def line(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("given")
    settings = config.load(
        overrides=[
            "features.windows=[30, 90]",
            "features.history_length=8",
            "labels.horizon_days=30",
            "labels.other_horizons=[7]",
            "labels.given_weight=2.5",
            "fusion.members=[linear, btyd]",
            f"tables.path={folder}/lakehouse",
            f"training.work_dir={folder}/work",
        ]
    )
    run = Run(spark, settings)
    events = events_frame(spark, random_events(5, users=40)).localCheckpoint()
    run.lakehouse.replace(EVENTS, events)
    days = user_daily.user_daily(events, texts_frame(spark), embeddings_frame(spark), 8)
    run.lakehouse.replace(USER_DAILY, days)
    write_features(run, DATES)
    return run


def give(run: Run, *given: tuple[str, date, float, datetime]) -> None:
    rows = [dict(zip(("user_key", "as_of_date", "spend", "given_at"), one, strict=True)) for one in given]
    run.lakehouse.replace(GIVEN_LABELS, rows_of(run.spark, GIVEN_LABELS, rows))


@dataclass
class Labelled:
    """Training sets without and with given labels, the users these are of, and what is said out of fold by each."""

    before: pd.DataFrame
    after: pd.DataFrame
    users: list[str]
    versions: list[int]
    said: list[pd.DataFrame]


@pytest.fixture(scope="module")
def labelled(line: Run, tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    folder, rows, versions, said = tmp_path_factory.mktemp("work"), [], [], []
    users: list[str] = []
    for given in (False, True):
        if given:
            users = rows[0].xs(RECENT, level=1).index[:7].tolist()
            features = line.lakehouse.read("user_features").select("user_key").distinct()
            fitted_on = labels.without_holdout(features, line.config.labels)
            holdout = features.join(fitted_on, "user_key", "left_anti").first()
            assert holdout is not None
            give(
                line,
                (users[0], RECENT, 111.0, EARLY),
                (users[1], BETWEEN, 222.0, MIDNIGHT - timedelta(seconds=1)),
                # what was spent has been seen whole by the test date
                (users[2], COMPLETE, 333.0, EARLY),
                # told too late, or of what is to come
                (users[3], RECENT, 444.0, MIDNIGHT),
                (users[4], RECENT, 555.0, MIDNIGHT + timedelta(days=5)),
                (users[5], TEST_DATE, 666.0, EARLY),
                (holdout["user_key"], BETWEEN, 777.0, EARLY),
                ("nobody", BETWEEN, 888.0, EARLY),
            )
        versions.append(dataset.write_training_set(line, DATES, TEST_DATE))
        read = line.lakehouse.read("training_set", versions[-1])
        rows.append(read.toPandas().set_index(["user_key", "as_of_date"]).sort_index())
        said.append(cross_fit.cross_fit(line, read, TEST_DATE, folder, folder, refit=False)[1])
    return Labelled(*rows, users, versions, said)


def test_given_labels_join_the_training_set_with_their_weight_and_are_never_complete(labelled: Labelled) -> None:
    before, rows, (one, two, *_) = labelled.before, labelled.after, labelled.users
    assert not before["given"].any()
    given = rows[rows["given"]]
    assert given["label_spend"].to_dict() == {(one, RECENT): 111.0, (two, BETWEEN): 222.0}
    assert not given["complete"].any()
    assert (given["weight"] == 2.5).all()
    assert given["exposure_days"].to_dict() == {(one, RECENT): 15, (two, BETWEEN): 9}
    # the seven days from the date on are over: what was spent in them is known
    assert given["label_spend_7d"].notna().all()
    assert given["frequency"].notna().all()
    assert given.loc[(one, RECENT), "input_digest"] == before.loc[(one, RECENT), "input_digest"]


def test_of_users_without_a_usable_label_nothing_changes(labelled: Labelled) -> None:
    """Those given on or after the test date, of it, of the holdout, of strangers, or of what was seen whole."""
    rows, before, one = labelled.after, labelled.before, labelled.users[0]
    pd.testing.assert_frame_equal(rows[~rows["given"]], before.drop(index=[(one, RECENT)]))


def test_nothing_is_calibrated_by_given_labels_and_the_baselines_do_not_change(labelled: Labelled) -> None:
    before, after = (frame.sort_values(["user_key", "as_of_date"]).reset_index(drop=True) for frame in labelled.said)
    assert set(after["as_of_date"]) == {COMPLETE}
    pd.testing.assert_frame_equal(before, after, rtol=1e-9)


def test_the_training_set_is_written_anew_when_a_label_it_sees_changes_and_only_then(
    labelled: Labelled, line: Run
) -> None:
    assert len(set(labelled.versions)) == 2
    assert dataset.write_training_set(line, DATES, TEST_DATE) == labelled.versions[1]
    user, late = labelled.users[0], MIDNIGHT + timedelta(days=1)
    seen = []
    for given in ([], [(user, RECENT, 1.0, late)], [(user, RECENT, 1.0, EARLY)], [(user, RECENT, 2.0, EARLY)]):
        give(line, *given)
        found = dataset.survey_labels(line, TEST_DATE)
        seen.append(found and found.digest)
    assert seen[:2] == [None, None]
    assert len({*seen}) == 3
