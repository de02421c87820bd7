"""Users forgotten, keys rotated, old rows deleted: gone from all files, and the nights go on as if nothing had been there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from safetensors.numpy import save_file

from bp_spark import pipeline
from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError, ConflictError, DataError, UnknownUserError
from bp_spark.governance import key_rotation, residue_scan
from bp_spark.ingest import job, pseudonyms
from bp_spark.lakehouse.run import Run
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import (
    COHORTS,
    EXPERIMENT_RESULTS,
    EXPERIMENTS,
    GIVEN_LABELS,
    LABEL_REQUESTS,
    MARKET_FORECAST,
    MARKET_SEGMENTS,
    PROSPECT_FEATURES,
    PROSPECT_SCORES,
    RECOMMENDATIONS,
    SCORES,
    TOTALS,
    USER_PROFILE,
)
from tests.support.histories import SECRET, sorted_rows, write_night
from tests.support.platforms import CONTACTS, DERIVED, MAPPING
from tests.support.rows import forget_column, frame

pytestmark = pytest.mark.slow

TODAY = datetime.now(UTC).date()
AS_OF = TODAY - timedelta(days=1)
GONE, STAYS = "planted-user-1", "planted-user-2"
EMAIL = "planted.address@example.org"
OTHERS = ("7", "小明")


def day(ago: int) -> str:
    return f"{TODAY - timedelta(days=ago)} 10:00:00"


def line(user: str | None, ago: int, paid: str = "5.00", **more: str) -> dict[str, Any]:
    return {"user": user, "order": f"o{ago}", "item": "i1", "time": day(ago), "n": 1, "paid": paid, **more}


def search(user: str, query: str) -> dict[str, Any]:
    return {"user": user, "time": day(9), "query": query}


def talk(user: str, text: str, **more: str) -> dict[str, Any]:
    return {"user": user, "time": day(9), "channel": "chat", "text": text, **more}


FIRST_NIGHT: dict[str, list[dict[str, Any]]] = {
    "items": [{"item": "i1", "title": "Thing", "category": "A > b", "brand": "Acme"}],
    "transactions": [
        *(line(user, ago) for user in (GONE, STAYS, *OTHERS) for ago in (5, 30, 400)),
        line(GONE, 6, f"{GONE} paid a lot"),
        line(STAYS, 6, "much"),
        line(None, 7),
    ],
    "searches": [
        search(GONE, "only mine"),
        search(GONE, "shared words"),
        search(STAYS, "shared words"),
        search(STAYS, f"write to {EMAIL}"),
    ],
    "consultations": [
        *(talk(user, f"{user[-1]} asks from {EMAIL}") for user in (GONE, STAYS)),
        talk(GONE, "whether?", solved="maybe"),
    ],
    "campaigns": [
        *({"user": user, "campaign": "c1", "from": str(TODAY - timedelta(days=300))} for user in (GONE, STAYS)),
        {"user": GONE, "campaign": "c1", "from": str(TODAY), "cost": -1},
    ],
}
CONTACT_TABLES = {"raw_consultations", "raw_campaigns", "consultations", "consultation_topics", "campaign_contacts"}


@pytest.fixture(scope="module")
def platform(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a platform, and the tables of its first night with scores of all its users."""
    folder = tmp_path_factory.mktemp("platform")
    write_night(folder / "files", 0, **FIRST_NIGHT)
    with (folder / "files/transactions/000.json").open("a", encoding="utf-8") as file:
        file.write(f'{{"user": "{GONE}", "order": \n')
    (folder / "files/source.yaml").write_text(MAPPING + CONTACTS, encoding="utf-8")
    settings = settings_of(folder / "tables")
    with chdir(folder):
        pipeline.featurize(spark, settings, [AS_OF])
    scored = [
        {"user_key": SECRET.key_of(user), "score_date": date_, "level": "E", "risk_level": "low"}
        for user in (GONE, STAYS)
        for date_ in (AS_OF, TODAY - timedelta(days=500))
    ]
    lakehouse = Lakehouse(spark, settings.tables)
    lakehouse.replace(SCORES, frame(spark, SCORES, *scored))
    profiled = [{"user_key": SECRET.key_of(user), "score_date": AS_OF} for user in (GONE, STAYS)]
    lakehouse.replace(USER_PROFILE, frame(spark, USER_PROFILE, *profiled))
    segment = {"score_date": AS_OF, "level": "E", "category": "none", "region": "all", "users": 2}
    lakehouse.replace(MARKET_SEGMENTS, frame(spark, MARKET_SEGMENTS, segment))
    totals = [{"score_date": date_, "segment": "platform"} for date_ in (AS_OF, TODAY - timedelta(days=500))]
    for table in (TOTALS, MARKET_FORECAST):
        lakehouse.replace(table, frame(spark, table, *totals))
    lakehouse.replace(
        COHORTS, frame(spark, COHORTS, *({"score_date": row["score_date"], "users": 2} for row in totals))
    )
    as_prospects = [{"user_key": row["user_key"], "score_date": row["score_date"], "level": "E"} for row in scored]
    lakehouse.replace(PROSPECT_SCORES, frame(spark, PROSPECT_SCORES, *as_prospects))
    items = [{"user_key": row["user_key"], "score_date": row["score_date"], "rank": 1} for row in scored]
    lakehouse.replace(RECOMMENDATIONS, frame(spark, RECOMMENDATIONS, *items))
    drawn = [
        {"experiment": name, "user_key": row["user_key"], "score_date": row["score_date"]}
        for row, name in zip(scored, ("both", "old", "both", "other"), strict=True)
    ]
    lakehouse.replace(EXPERIMENTS, frame(spark, EXPERIMENTS, *drawn))
    results = [{"experiment": name, "days": 30, "score_date": AS_OF} for name in ("both", "other")]
    lakehouse.replace(EXPERIMENT_RESULTS, frame(spark, EXPERIMENT_RESULTS, *results))
    labelled = [{"user_key": row["user_key"], "as_of_date": row["score_date"]} for row in scored]
    for table in (LABEL_REQUESTS, GIVEN_LABELS, PROSPECT_FEATURES):
        lakehouse.replace(table, frame(spark, table, *labelled))
    return folder


def settings_of(tables: Path, *overrides: str) -> Config:
    """Of the platform in the folder where we are: by the name of its mapping a source is known again."""
    return config.load(
        overrides=[
            "source.kind=files",
            "source.mapping=files/source.yaml",
            f"tables.path={tables}/lakehouse",
            f"training.work_dir={tables}/work",
            f"bundles={tables}/bundles",
            f"evaluation.reports={tables}/reports",
            *overrides,
        ]
    )


@pytest.fixture
def at(platform: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Settings of a platform and tables of the test's own, as the first night left them."""
    shutil.copytree(platform / "tables", tmp_path / "tables")
    shutil.copytree(platform / "files", tmp_path / "files", copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: settings_of(tmp_path / "tables", *overrides)


def found(spark: SparkSession, folder: Path, *words: str, ids: tuple[str, ...] = ()) -> set[str]:
    """Tables and folders in whose files a word or an id stands."""
    files = residue_scan.search(spark, [str(folder)], words, ids).files_with_residue
    return {
        next(part for part in Path(file).relative_to(folder).parts if part not in ("lakehouse", "bp")) for file in files
    }


def contents(lakehouse: Lakehouse) -> dict[str, list[tuple[Any, ...]]]:
    frames = {name: lakehouse.read(name).drop("built_from") for name in DERIVED}
    return {name: sorted_rows(frame) for name, frame in frames.items()}


@contextmanager
def stopped_at(monkeypatch: pytest.MonkeyPatch, method: str, table: str) -> Iterator[None]:
    """The block ends where it would call a method of the lakehouse for a table."""
    original = getattr(Lakehouse, method)

    def stopping(self: Lakehouse, name: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(name, "name", name) == table:
            raise KeyboardInterrupt
        return original(self, name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Lakehouse, method, stopping)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_ids_stand_in_user_keys_only_and_secret_and_addresses_nowhere(
    spark: SparkSession, platform: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = platform / "tables"
    assert found(spark, tables, ids=(GONE, STAYS, *OTHERS)) == {"user_keys"}
    secret = SECRET.value.decode()
    assert found(spark, tables, EMAIL, secret, SECRET.value.hex()) == set()
    # what is searched is there to be found: a key, a masked word, and in what isn't Parquet a table's name
    assert found(spark, tables, SECRET.key_of(GONE)) >= {
        *("raw_transactions", "events", "quarantine", "user_features"),
        *CONTACT_TABLES,
    }
    assert found(spark, tables, "shared") == {"raw_searches", "texts"}
    assert "events" in found(spark, tables, "delta.enableChangeDataFeed")
    lakehouse = Lakehouse(spark, settings_of(tables).tables)
    keys = {row["user_id"]: row["user_key"] for row in lakehouse.read("user_keys").collect()}
    assert keys == {user: SECRET.key_of(user) for user in (GONE, STAYS, *OTHERS)}
    refused = [row["rule"] for row in lakehouse.read("quarantine").orderBy("rule").collect()]
    assert refused == [
        *("amount is unreadable", "amount is unreadable", "cost is negative", "row is unreadable"),
        *("solved is unreadable", "user_id is missing"),
    ]
    monkeypatch.setenv("BP_SPARK_SECRET", "another-secret-of-more-than-32-bytes")
    with pytest.raises(ConfigError, match="rotate-keys"):
        pipeline.forget(spark, settings_of(tables), [GONE])


def test_a_forgotten_user_is_in_no_file_stays_forgotten_and_the_nights_go_on(
    spark: SparkSession, tmp_path: Path, at: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, tables = at(), tmp_path / "tables"
    lakehouse = Lakehouse(spark, settings.tables)
    ids = {row["text"]: row["text_id"] for row in lakehouse.read("texts").collect()}
    for name, texts in {"stale": ("only mine", "shared words"), "fresh": ("shared words", "thing")}.items():
        (tables / "work" / name).mkdir(parents=True)
        save_file({"ids": np.array([ids[text] for text in texts])}, tables / "work" / name / "texts.safetensors")

    with stopped_at(monkeypatch, "erase", "texts"):
        pipeline.forget(spark, settings, [GONE])
    assert found(spark, tables, SECRET.key_of(GONE)) >= {"events"}
    copy = tables / "lakehouse/bp/copy"
    lakehouse.read("user_keys").withColumn("user_id", F.lit(GONE)).write.parquet(str(copy))
    with pytest.raises(DataError, match=r"bp/copy/.*still holds what was to be erased"):
        pipeline.forget(spark, settings, [GONE])
    shutil.rmtree(copy)
    # the error names positions of unknown ids, and comes after all other users are forgotten
    with pytest.raises(
        UnknownUserError, match=r"nobody has 1 of the 4 ids given \(those at the positions 3\)"
    ) as raised:
        pipeline.forget(spark, settings, [f" {GONE} ", "", "nobody-17", GONE])
    assert "nobody-17" not in str(raised.value)
    assert found(spark, tables, SECRET.key_of(GONE), GONE, "mine", ids=(GONE,)) == set()
    assert [folder.name for folder in (tables / "work").iterdir()] == ["fresh"]
    assert {row["text"] for row in lakehouse.read("texts").collect()} == {*ids} - {"only mine"}
    of_prospects = ("prospect_scores", "prospect_features")
    of_scores = ("scores", "user_profile", "recommendations", "experiments")
    for name in (*of_scores, "label_requests", "given_labels", *of_prospects, *CONTACT_TABLES):
        assert {row[0] for row in lakehouse.read(name).select("user_key").collect()} == {SECRET.key_of(STAYS)}
    # what counted the user is not to be held against what does not
    assert lakehouse.read("market_segments").isEmpty()
    assert [row["score_date"] for row in lakehouse.read("totals").collect()] == [TODAY - timedelta(days=500)]
    assert [row["experiment"] for row in lakehouse.read("experiment_results").collect()] == ["other"]
    for name in ("market_segments", "cohorts", "market_forecast"):
        assert lakehouse.read(name).isEmpty()
        files = Path(lakehouse.location(name)).glob("*.parquet")
        assert sum(pq.read_metadata(file).num_rows for file in files) == 0
    assert {row[0] for row in lakehouse.read("user_keys").select("user_id").collect()} == {STAYS, *OTHERS}

    # known to have been forgotten; who never was there is unknown again, whatever was tried before
    with pytest.raises(UnknownUserError, match=r"\(those at the positions 2\)"):
        pipeline.forget(spark, settings, [GONE, "nobody-17"])
    proofs = lakehouse.read("runs").filter("stage = 'prove' AND status = 'done'").orderBy("started_at").collect()
    assert int(proofs[-1]["figures"]["parquet_files"]) > 10
    assert proofs[-1]["figures"]["found"] == "0"
    assert sorted(row["known"] for row in lakehouse.read("forgotten").collect()) == [False, True]

    # a file that is delivered again brings no forgotten user back; the nights have the rows of a rebuild
    first = tmp_path / "files/transactions/000.json"
    shutil.copy(first, first.with_name("000-again.json"))
    first.touch()
    write_night(
        tmp_path / "files",
        1,
        transactions=[line(GONE, 2), line("nobody-17", 2), line(STAYS, 3), line(OTHERS[0], 31)],
    )
    night = {stage["stage"]: stage["figures"] for stage in pipeline.featurize(spark, settings, [AS_OF])}
    assert (night["ingest"]["deliveries"], night["ingest"]["forgotten_users"]) == ("3", "2")
    assert night["clean"]["events"] == "2"
    assert night["aggregate"]["user_days"] == "2"
    assert {row["user_id"] for row in lakehouse.read("user_keys").collect()} == {STAYS, *OTHERS}
    nightly = contents(lakehouse)
    pipeline.featurize(spark, settings, [AS_OF], rebuild=True)
    assert contents(lakehouse) == nightly
    assert found(spark, tables, SECRET.key_of(GONE), ids=(GONE,)) == set()


def test_rotated_keys_are_in_no_file_and_known_events_stay_known(
    spark: SparkSession, tmp_path: Path, at: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, tables = at(), tmp_path / "tables"
    lakehouse = Lakehouse(spark, settings.tables)

    def scored() -> list[tuple[Any, ...]]:
        users = lakehouse.read("user_keys").select("user_id", "user_key")
        return sorted_rows(lakehouse.read("scores").join(users, "user_key").drop("user_key", "horizon_days"))

    forget_column(lakehouse, SCORES, "horizon_days")
    before = scored()
    events = lakehouse.read("events").count()
    assert not lakehouse.read("user_profile").isEmpty()
    pseudonyms.make_secret(tmp_path / "new")
    new = pseudonyms.load_secret(f"file:{tmp_path}/new")
    with pytest.raises(ConfigError, match="only 30 days are kept"):
        pipeline.rotate_keys(spark, at("privacy.retention_days.raw=30"), f"file:{tmp_path}/new")

    # an ingest beside a rotation ends it with a conflict, and the next one takes its rows too
    write_night(tmp_path / "files", 1, transactions=[line(STAYS, 3), line("new-user-3", 3)])
    real = key_rotation.embed

    def beside(run: Any) -> None:
        monkeypatch.setattr(key_rotation, "embed", real)
        # an ingest of another process: raw rows with old keys, after the raw tables were rewritten
        job.ingest(Run(spark, settings, "featurize"))
        real(run)

    monkeypatch.setattr(key_rotation, "embed", beside)
    with pytest.raises((ConflictError, DataError)):
        pipeline.rotate_keys(spark, settings, f"file:{tmp_path}/new")
    with stopped_at(monkeypatch, "replace", "user_keys"):
        pipeline.rotate_keys(spark, settings, f"file:{tmp_path}/new")
    pipeline.rotate_keys(spark, settings, f"file:{tmp_path}/new")
    assert found(spark, tables, *(SECRET.key_of(user) for user in (GONE, STAYS, "new-user-3", *OTHERS))) == set()
    assert found(spark, tables, new.key_of(STAYS)) >= {
        "raw_transactions",
        "events",
        "user_daily",
        "scores",
        "prospect_scores",
        "recommendations",
        "experiments",
        "given_labels",
        *CONTACT_TABLES,
        "quarantine",
    }
    assert lakehouse.read("label_requests").isEmpty()
    assert lakehouse.read("prospect_features").isEmpty()
    of_users = ("given_labels", "prospect_scores", "recommendations", "experiments")
    assert [lakehouse.read(name).count() for name in of_users] == [4, 4, 4, 4]
    assert len(before) == 4
    assert scored() == before
    assert "horizon_days" in lakehouse.read("scores").columns
    assert lakehouse.read("events").count() == events + 2
    write_night(tmp_path / "files", 2, transactions=[line(STAYS, 5), line(STAYS, 2)])
    with pytest.raises(ConfigError, match="rotate-keys"):
        pipeline.featurize(spark, settings, [AS_OF])
    night = pipeline.featurize(spark, at(f"privacy.secret=file:{tmp_path}/new"), [AS_OF])
    figures = next(stage["figures"] for stage in night if stage["stage"] == "clean")
    assert (figures["events"], figures["duplicates"]) == ("1", "1")
    assert lakehouse.read("events").count() == events + 3

    # what nobody has is no proof
    orphan = lakehouse.read("given_labels").limit(1).withColumn("user_key", F.lit("0" * 64))
    lakehouse.append(GIVEN_LABELS, orphan)
    with pytest.raises(DataError, match=r"given_labels\.user_key: holds keys that nobody in user_keys has.*\(1 rows\)"):
        pipeline.rotate_keys(spark, settings, f"file:{tmp_path}/new")


def test_rows_beyond_their_time_are_deleted_with_their_files(
    spark: SparkSession, tmp_path: Path, at: Callable[..., Config]
) -> None:
    settings = at(
        *(f"privacy.retention_days.{name}=100" for name in ("events", "features", "scores", "training")),
        "privacy.retention_days.raw=1",
    )
    lakehouse = Lakehouse(spark, settings.tables)
    old = lakehouse.read("user_profile").withColumn("score_date", F.lit(TODAY - timedelta(days=500)))
    lakehouse.replace(USER_PROFILE, old)
    stages = {stage["stage"]: stage for stage in pipeline.retain(spark, settings)}
    assert {
        name: stages["retain"]["figures"][name]
        for name in (
            "events",
            "scores",
            "prospect_scores",
            "prospect_features",
            "user_profile",
            "experiments",
            "totals",
            "cohorts",
            "market_forecast",
            "recommendations",
            "given_labels",
            "label_requests",
            "raw_transactions",
            "raw_consultations",
            "raw_campaigns",
            "consultations",
            "consultation_topics",
            "campaign_contacts",
            "quarantine",
        )
    } == {
        "events": "4",
        "scores": "2",
        "prospect_scores": "2",
        "prospect_features": "2",
        "user_profile": "2",
        "experiments": "2",
        "totals": "1",
        "cohorts": "1",
        "market_forecast": "1",
        "recommendations": "2",
        "given_labels": "2",
        "label_requests": "2",
        "raw_transactions": "0",
        "raw_consultations": "0",
        "raw_campaigns": "0",
        "consultations": "0",
        "consultation_topics": "0",
        "campaign_contacts": "2",
        "quarantine": "0",
    }
    oldest = [
        lakehouse.read(name).agg(F.min(day)).first() for name, day in (("events", "event_date"), ("user_daily", "day"))
    ]
    assert [row[0] for row in oldest if row] == [TODAY - timedelta(days=30)] * 2
    dates = [
        date.fromisoformat(path.name.removeprefix("score_date="))
        for path in Path(lakehouse.location("scores")).glob("score*")
    ]
    assert [
        found for found in dates if any(Path(lakehouse.location("scores")).glob(f"score_date={found}/*.parquet"))
    ] == [AS_OF]
    with pytest.raises(ConfigError, match="can't be derived from them anew"):
        pipeline.featurize(spark, settings, [AS_OF], rebuild=True)
