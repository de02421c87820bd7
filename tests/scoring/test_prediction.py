"""The nightly pass: who is computed, who is carried forward, and that neither changes an answer."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark import __version__, pipeline
from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.errors import BundleError, DataError
from bp_spark.features.catalogue import catalogue, input_digest, user_features_table
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.model.columns import from_arrow
from bp_spark.model.explanation import SEQUENCE
from bp_spark.registry import bundle as bundles
from bp_spark.registry.bundle import Bundle
from bp_spark.registry.predictions import REASONS, fit_to_task
from bp_spark.scoring import prediction
from bp_spark.scoring.job import common_currency, require_same_features
from tests.support.random_users import NIGHT, make_bundles, users

pytestmark = pytest.mark.slow

SMALL = [
    "features.windows=[30, 90]",
    "features.history_length=6",
    "trees.rounds=8",
    "network.hidden_size=16",
    "network.layers=1",
    "network.heads=2",
    "network.intermediate_size=16",
    "network.adapter_size=16",
]
NEXT = NIGHT + timedelta(days=1)
NUMBERS = ["expected_spend", "low", "high", "p_active", "score"]


@dataclass
class Nights:
    """Two nights, each scored after the other: ten users go, ten come, every fifth of the others changes."""

    spark: SparkSession
    settings: Config
    lakehouse: Lakehouse
    bundles: dict[str, Bundle]
    features: dict[date, DataFrame]
    results: dict[date, pipeline.ScoreResult]

    def scores(self, day: date) -> pd.DataFrame:
        rows = self.lakehouse.read("scores").filter(F.col("score_date") == F.lit(day)).toPandas()
        return rows.set_index("user_key").sort_index()


def same_reasons(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether they name the same features, in the same order, with the same contributions but for rounding."""

    def told(frame: pd.DataFrame) -> tuple[list[Any], list[float]]:
        reasons = [reason for row in frame["reasons"] for reason in row]
        return [(r["group"], r["feature"], r["value"]) for r in reasons], [r["contribution"] for r in reasons]

    (names, sizes), (names_too, sizes_too) = told(one), told(other)
    return names == names_too and bool(np.allclose(sizes, sizes_too, rtol=1e-4, atol=1e-4))


@pytest.fixture(scope="module")
def nights(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Nights:
    folder = tmp_path_factory.mktemp("scoring")
    settings = config.load(overrides=[*SMALL, f"tables.path={folder}/lakehouse", f"bundles={folder}/bundles"])
    lakehouse = Lakehouse(spark, settings.tables)
    made = make_bundles(folder / "bundles", settings, texts=20)
    table = user_features_table(settings.features)
    before = users(spark, settings, 60, mean=3).localCheckpoint()
    number = F.substring("user_key", 5, 9).cast("int")
    stirred = F.when(number % 5 == 0, F.lit(100.0)).otherwise(F.col("spend_30d")).cast("float")
    after = (
        users(spark, settings, 70, mean=3, night=NEXT)
        .filter(number >= 10)
        .withColumn("spend_30d", stirred)
        .withColumn("input_digest", input_digest(catalogue(settings.features)))
        .localCheckpoint()
    )
    found = Nights(spark, settings, lakehouse, made, {NIGHT: before, NEXT: after}, {})
    for day, rows in found.features.items():
        lakehouse.replace(table, rows, where={"as_of_date": [day]})
        found.results[day] = pipeline.score(spark, settings, day, made["whole"].folder)
    return found


def test_only_new_and_changed_users_are_computed(nights: Nights) -> None:
    assert (nights.results[NIGHT].users, nights.results[NIGHT].computed) == (60, 60)
    scores = nights.scores(NEXT)
    number = scores.index.str.removeprefix("user").astype(int)
    fresh = (number % 5 == 0) | (number >= 60)
    assert (nights.results[NEXT].users, nights.results[NEXT].computed) == (60, fresh.sum())
    assert (scores["computed_on"] == np.where(fresh, NEXT, NIGHT)).all()
    # a score that is carried forward leads back to what it was made from
    origin = nights.scores(NIGHT)["features_version"].iloc[0]
    assert (scores.loc[~fresh, "features_version"] == origin).all()
    assert (scores.loc[fresh, "features_version"] > origin).all()


def test_a_night_of_carried_scores_is_a_full_night(nights: Nights, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bp_spark")
    carried = nights.scores(NEXT)
    version = nights.lakehouse.version("scores")
    full = pipeline.score(nights.spark, nights.settings, NEXT, nights.bundles["whole"].folder, full=True)
    assert (full.users, full.computed) == (60, 60)
    assert f"scoring 60 users of {NEXT}: at most about 0:0" in caplog.text
    anew = nights.scores(NEXT)
    assert (anew["computed_on"] == NEXT).all()
    np.testing.assert_allclose(anew[NUMBERS], carried[NUMBERS], rtol=1e-5)
    for name in ("level", "risk_level", "input_digest"):
        assert (anew[name] == carried[name]).all()
    by_horizon = [pd.DataFrame(dict(row) for row in frame["expected_by_horizon"]) for frame in (anew, carried)]
    np.testing.assert_allclose(by_horizon[0], by_horizon[1], rtol=1e-5)
    # who did nothing new is expected to spend more all the same: the platform's level has risen
    still = carried.index[carried["computed_on"] == NIGHT]
    risen = carried.loc[still, "expected_spend"] / nights.scores(NIGHT).loc[still, "expected_spend"]
    np.testing.assert_allclose(risen, nights.bundles["whole"].stack.factor(NEXT), rtol=1e-9)
    assert risen.min() > 1.01
    assert same_reasons(anew, carried)
    nights.spark.sql(f"RESTORE delta.`{nights.lakehouse.location('scores')}` TO VERSION AS OF {version}")


def test_a_night_comes_out_again_and_scores_are_only_read(nights: Nights) -> None:
    version = nights.lakehouse.version("scores")
    again = pipeline.reproduce(nights.spark, nights.settings, NEXT)
    assert nights.lakehouse.version("scores") == version
    assert (again.rows, again.other_code) == (60, [])
    assert 0 <= again.largest < 1e-5
    assert again.bundle.digest == nights.bundles["whole"].digest
    assert again.features_version == nights.scores(NEXT)["features_version"].max()


def test_a_night_that_was_tampered_with_does_not_come_out_again(nights: Nights) -> None:
    version, scores = nights.lakehouse.version("scores"), f"delta.`{nights.lakehouse.location('scores')}`"
    one, other, lost = nights.scores(NEXT).query("low > 1").index[:3]
    for change, user in (
        ("UPDATE {} SET low = low * 0.9999", one),
        ("UPDATE {} SET level = if(level = 'A', 'B', 'A')", other),
        ("DELETE FROM {}", lost),
    ):
        statement = change.format(scores)
        nights.spark.sql(f"{statement} WHERE score_date = '{NEXT}' AND user_key = '{user}'")
    with pytest.raises(DataError) as error:
        pipeline.reproduce(nights.spark, nights.settings, NEXT)
    nights.spark.sql(f"RESTORE {scores} TO VERSION AS OF {version}")
    assert error.value.column == "user_key"
    assert "of 60 rows differ user_key of 1, " in str(error.value)
    assert ", low of 2, " in str(error.value)
    assert ", level of 2, " in str(error.value)
    assert ", high of 1, " in str(error.value)
    assert not re.search(r"user\d", str(error.value))


def test_a_night_is_computed_from_the_features_of_then_as_long_as_they_are_kept_and_other_code_is_told(
    nights: Nights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(nights.settings.tables.path or "", tmp_path / "lakehouse")
    settings = config.changed(nights.settings, {"tables.path": f"{tmp_path}/lakehouse"})
    lakehouse, spark = Lakehouse(nights.spark, settings.tables), nights.spark
    corrected = nights.features[NIGHT].withColumn("spend_30d", F.lit(7.0).cast("float"))
    lakehouse.replace(user_features_table(settings.features), corrected, where={"as_of_date": [NIGHT]})
    monkeypatch.setattr("bp_spark.scoring.lineage.__version__", "99")
    again = pipeline.reproduce(spark, settings, NIGHT)
    assert (again.rows, again.other_code) == (60, [__version__])
    spark.conf.set("spark.databricks.delta.retentionDurationCheck.enabled", "false")
    spark.sql(f"VACUUM delta.`{lakehouse.location('user_features')}` RETAIN 0 HOURS")
    spark.conf.unset("spark.databricks.delta.retentionDurationCheck.enabled")
    with pytest.raises(DataError, match=r"user_features: version 1, .* is vacuumed"):
        pipeline.reproduce(spark, settings, NIGHT)


def test_a_night_without_its_bundle_or_its_run_is_refused(nights: Nights, tmp_path: Path) -> None:
    elsewhere = config.changed(nights.settings, {"bundles": str(tmp_path)})
    with pytest.raises(BundleError, match=f"has the digest {nights.bundles['whole'].digest[:12]}"):
        pipeline.reproduce(nights.spark, elsewhere, NIGHT)
    with pytest.raises(DataError, match="doesn't say from what 2020-01-01 was scored"):
        pipeline.reproduce(nights.spark, nights.settings, date(2020, 1, 1))


def test_a_score_leads_to_the_run_that_computed_it(nights: Nights) -> None:
    scores, runs = nights.scores(NEXT), nights.lakehouse.read("runs").toPandas().set_index("run_id")
    computed = runs.loc[scores["run_id"]]
    assert (
        computed["figures"].map(lambda figures: figures["score_date"]) == scores["computed_on"].map(str).values
    ).all()
    read = computed["read"].map(lambda versions: dict(versions)["user_features"])
    assert (read.to_numpy() == scores["features_version"].to_numpy()).all()
    assert set(computed["config_digest"]) == {config.digest(nights.settings)}
    assert (set(computed["job"]), set(computed["rows_in"]), set(computed["rows_out"])) == ({"score"}, {60}, {60})


def test_a_stage_and_a_failure_are_a_line_and_a_row_each(nights: Nights, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bp_spark")
    pipeline.score(nights.spark, nights.settings, NIGHT, nights.bundles["whole"].folder)
    with pytest.raises(DataError):
        pipeline.score(nights.spark, nights.settings, date(2020, 1, 1), nights.bundles["whole"].folder)
    told = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert [line["status"] for line in told] == ["started", "unchanged", "failed"]
    assert told[1].keys() == {"run_id", "job", "stage", "status", "seconds", "rows_in", "rows_out"}
    assert (told[1]["rows_in"], told[1]["rows_out"]) == (60, 0)
    assert "holds no rows of 2020-01-01" in told[2]["error"]
    assert not re.search(r"user\d", caplog.text)
    row = nights.lakehouse.read("runs").filter(F.col("run_id") == told[2]["run_id"]).first()
    assert row is not None
    assert (row["job"], row["stage"], row["status"], row["error"]) == ("score", "score", "failed", told[2]["error"])


def test_another_bundle_computes_everyone(nights: Nights, tmp_path: Path) -> None:
    settings = nights.settings.model_copy(
        update={"tables": nights.settings.tables.model_copy(update={"path": str(tmp_path)})}
    )
    lakehouse = Lakehouse(nights.spark, settings.tables)
    table = user_features_table(settings.features)
    for day, name in ((NIGHT, "whole"), (NEXT, "network")):
        rows = nights.features[NIGHT].limit(5).withColumn("as_of_date", F.lit(day))
        lakehouse.replace(table, rows, where={"as_of_date": [day]})
        assert pipeline.score(nights.spark, settings, day, nights.bundles[name].folder).computed == 5


def by_reader(night: pipeline.ScoreResult) -> list[str]:
    return [stage["figures"]["reader"] for stage in night.stages]


@pytest.fixture
def elsewhere(nights: Nights, tmp_path: Path) -> tuple[Config, str]:
    """Settings of a platform without tables yet, and where its ``user_features`` will be."""
    settings = config.changed(nights.settings, {"tables.path": str(tmp_path)})
    return settings, Lakehouse(nights.spark, settings.tables).location("user_features")


def test_whatever_reads_the_features_the_scores_are_the_same(nights: Nights, tmp_path: Path) -> None:
    assert [by_reader(result) for result in nights.results.values()] == [["files"], ["files"]]
    found, third = {}, NEXT + timedelta(days=1)
    for reader in ("files", "spark"):
        shutil.copytree(nights.settings.tables.path or "", tmp_path / reader)
        changed = {"tables.path": f"{tmp_path}/{reader}", "scoring.reader": reader}
        settings = config.changed(nights.settings, changed)
        lakehouse = Lakehouse(nights.spark, settings.tables)
        rows = nights.features[NIGHT].withColumn("as_of_date", F.lit(third))
        lakehouse.replace(user_features_table(settings.features), rows, where={"as_of_date": [third]})
        night = pipeline.score(nights.spark, settings, third, nights.bundles["whole"].folder)
        # ten came back, and every fifth of the others is as before
        assert (by_reader(night), night.users, night.computed) == ([reader], 60, 20)
        scores = lakehouse.read("scores").filter(F.col("score_date") == F.lit(third)).toPandas()
        found[reader] = scores.set_index("user_key").sort_index()
    files, spark = found.values()
    np.testing.assert_allclose(files[NUMBERS], spark[NUMBERS], rtol=1e-5)
    assert same_reasons(files, spark)
    for name in ("level", "risk_level", "input_digest", "computed_on"):
        assert (files[name] == spark[name]).all()


def test_rows_that_a_deletion_vector_hides_are_not_scored(nights: Nights, elsewhere: tuple[Config, str]) -> None:
    settings, location = elsewhere
    Lakehouse(nights.spark, settings.tables).replace(user_features_table(settings.features), nights.features[NIGHT])
    table = f"delta.`{location}`"
    nights.spark.sql(f"ALTER TABLE {table} SET TBLPROPERTIES (delta.enableDeletionVectors = true)")
    nights.spark.sql(f"DELETE FROM {table} WHERE user_key = 'user7'")
    night = pipeline.score(nights.spark, settings, NIGHT, nights.bundles["network"].folder)
    assert (by_reader(night), night.users) == (["spark"], 59)


def test_features_that_workers_can_not_read_themselves_are_brought_by_spark(
    nights: Nights, elsewhere: tuple[Config, str], caplog: pytest.LogCaptureFixture
) -> None:
    settings, location = elsewhere
    # of a time before there was such a feature: Spark takes it for missing
    rows = nights.features[NIGHT]
    rows.drop("spend_30d").write.format("delta").partitionBy("as_of_date").save(location)
    nights.spark.sql(f"ALTER TABLE delta.`{location}` ADD COLUMN spend_30d FLOAT")
    night = pipeline.score(nights.spark, settings, NIGHT, nights.bundles["whole"].folder)
    assert (by_reader(night), night.computed) == (["spark"], 60)
    assert "holds no column spend_30d of the type float" in caplog.text
    bundle = nights.bundles["whole"]
    without = rows.withColumn("spend_30d", F.lit(None).cast("float"))
    wanted = prediction.score(without, bundle, NIGHT, 0).toPandas().set_index("user_key").sort_index()
    found = Lakehouse(nights.spark, settings.tables).read("scores").toPandas().set_index("user_key").sort_index()
    np.testing.assert_allclose(found[NUMBERS], wanted[NUMBERS], rtol=1e-5)


def test_the_pandas_udf_answers_as_the_night_does(nights: Nights) -> None:
    bundle = nights.bundles["whole"]
    udf = prediction.prediction_udf(nights.spark, bundle)
    inputs = F.struct(*bundle.required_columns)
    said = nights.features[NIGHT].select("user_key", udf(inputs).alias("answer")).select("user_key", "answer.*")
    frame = said.toPandas().set_index("user_key").sort_index()
    scores = nights.scores(NIGHT)
    np.testing.assert_allclose(frame[NUMBERS], scores[NUMBERS], rtol=1e-5)
    assert same_reasons(frame, scores)


def test_sql_knows_the_pandas_udf_by_its_name_and_any_columns_may_come_with_it(nights: Nights) -> None:
    prediction.prediction_udf(nights.spark, nights.bundles["whole"], "predict_spend")
    nights.features[NIGHT].createOrReplaceTempView("features_of_the_night")
    predicted = "SELECT user_key, predict_spend(struct(*)) AS predicted FROM features_of_the_night"
    try:
        frame = nights.spark.sql(f"SELECT user_key, predicted.* FROM ({predicted})").toPandas()
    finally:
        nights.spark.catalog.dropTempView("features_of_the_night")
    frame, scores = frame.set_index("user_key").sort_index(), nights.scores(NIGHT)
    np.testing.assert_allclose(frame[NUMBERS], scores[NUMBERS], rtol=1e-5)
    assert frame["level"].tolist() == scores["level"].tolist()


def test_reasons_add_up_to_the_score_and_say_which_feature_did_most(nights: Nights) -> None:
    frame = nights.features[NIGHT].toPandas().set_index("user_key").sort_index()
    groups = catalogue(nights.settings.features).groups
    scores = nights.scores(NIGHT)
    listed = scores["reasons"].map(lambda reasons: sum(reason["contribution"] for reason in reasons))
    np.testing.assert_allclose(
        scores["base_spend"] + listed + scores["other_reasons"], scores["expected_spend"], rtol=1e-6
    )
    for user, reasons in scores["reasons"].items():
        sizes = [abs(reason["contribution"]) for reason in reasons]
        assert sizes == sorted(sizes, reverse=True)
        assert len(reasons) == len({reason["group"] for reason in reasons}) == REASONS
        for reason in reasons:
            if reason["group"] == SEQUENCE:
                assert reason["feature"] is None
                continue
            assert groups[reason["feature"]] == reason["group"]
            value = frame.loc[user, reason["feature"]]
            assert reason["value"] == pytest.approx(value) or (reason["value"] is None and np.isnan(value))


def arrow(df: DataFrame, bundle: Bundle) -> pa.RecordBatch:
    names = ["user_key", "input_digest", *dict.fromkeys(bundle.required_columns)]
    return df.select(*names).toArrow().combine_chunks().to_batches()[0]


def test_a_user_is_answered_alike_alone_and_in_company(nights: Nights) -> None:
    bundle = bundles.load(nights.bundles["whole"].folder)
    batch = arrow(nights.features[NIGHT], bundle)
    together = bundle.predict(from_arrow(batch))
    for row in range(0, batch.num_rows, 7):
        alone = bundle.predict(from_arrow(batch.slice(row, 1)))
        for name in NUMBERS:
            assert alone[name][0] == pytest.approx(together[name][row], rel=1e-5), name


def test_users_with_the_same_features_are_computed_once(nights: Nights) -> None:
    bundle = bundles.load(nights.bundles["whole"].folder)
    batch = arrow(nights.features[NIGHT], bundle)
    twice = pa.Table.from_batches([batch, batch.slice(3, 9)]).combine_chunks().to_batches()[0]
    asked: list[int] = []
    predict = bundle.predict

    def counted(columns: Any, on: date | None) -> Any:
        asked.append(len(columns["recency_days"]))
        return predict(columns, on)

    bundle.predict = counted  # type: ignore[method-assign]
    said = prediction._predict_batch(bundle, twice, NIGHT).to_pandas()
    assert asked == [60]
    pd.testing.assert_frame_equal(said.iloc[3:12].reset_index(drop=True), said.iloc[60:].reset_index(drop=True))
    assert said["user_key"].tolist() == twice.column("user_key").to_pylist()
    # without a digest nobody is taken for another
    nulls = pa.nulls(twice.num_rows, pa.int64())
    unknown = pa.Table.from_batches([twice]).set_column(1, "input_digest", nulls).combine_chunks().to_batches()[0]
    anew = prediction._predict_batch(bundle, unknown, NIGHT).to_pandas()
    assert asked == [60, 69]
    np.testing.assert_allclose(anew[NUMBERS], said[NUMBERS], rtol=1e-5)


def test_the_weights_stay_in_the_file_that_all_workers_of_a_machine_share(nights: Nights) -> None:
    bundle = bundles.load(nights.bundles["network"].folder)
    member: Any = bundle.members["transformer"]
    address = member.network.history.text_embeddings.data_ptr()
    mapped = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    (file,) = [line[5] for line in mapped if int(line[0].split("-")[0], 16) <= address < int(line[0].split("-")[1], 16)]
    assert file == str(bundle.folder / "transformer.safetensors")


def test_a_task_with_a_gpu_computes_there(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundles.load(nights.bundles["whole"].folder)
    moved: list[str] = []
    monkeypatch.setattr(bundle.members["transformer"], "move_to", moved.append)
    task = SimpleNamespace(cpus=lambda: 1, resources=lambda: {"gpu": SimpleNamespace(addresses=["3"])})
    fit_to_task(bundle, task)  # type: ignore[arg-type]
    assert moved == ["cuda:3"]


@pytest.mark.parametrize(
    ("trained", "stored", "common"),
    [("USD", "USD", "USD"), (None, "EUR", "EUR"), ("EUR", None, "EUR"), (None, None, None)],
)
def test_money_is_in_the_currency_that_bundle_and_events_agree_on(
    trained: str | None, stored: str | None, common: str | None
) -> None:
    bundle: Any = SimpleNamespace(currency=trained, folder="bundles/x")
    assert common_currency(bundle, stored) == common


def test_a_bundle_of_another_currency_scores_nobody() -> None:
    bundle: Any = SimpleNamespace(currency="USD", folder="bundles/x")
    with pytest.raises(BundleError, match="bundles/x: predicts USD, and events are in EUR; train again"):
        common_currency(bundle, "EUR")


def test_a_bundle_of_features_that_mean_something_else_now_is_refused(tmp_path: Path) -> None:
    settings = config.load()
    now = catalogue(settings.features).definitions

    def bundle(**definitions: str) -> Bundle:
        return cast(Bundle, SimpleNamespace(folder=tmp_path, manifest={"lineage": {"features": definitions}}))

    # a feature that isn't computed any more is a missing column, and named as such
    require_same_features(bundle(**now, spend_11d="other"), settings)
    with pytest.raises(BundleError, match="another definition of weekly_spend_median: train again"):
        require_same_features(bundle(**now | {"weekly_spend_median": "other"}), settings)
    with pytest.raises(BundleError, match="recency_days, tenure_days, active_span_days and 174 more: train again"):
        require_same_features(bundle(**dict.fromkeys(now, "other")), settings)
