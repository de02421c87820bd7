"""The stages end to end, on real data: a tenth of the Complete Journey's households, small models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from deltalake import DeltaTable
from mlflow import MlflowClient
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from safetensors.numpy import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from bp_spark import __version__, pipeline
from bp_spark import night as whole_night
from bp_spark.cli import app
from bp_spark.core import config
from bp_spark.core.config import Config, LabelsConfig, SearchConfig, SearchRange
from bp_spark.core.errors import BundleError, ConfigError, DataError
from bp_spark.features import labels
from bp_spark.features.catalogue import catalogue
from bp_spark.governance import residue_scan
from bp_spark.ingest import job as ingest_job
from bp_spark.ingest import texts
from bp_spark.ingest.clean import span
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import TABLE_NAMES
from bp_spark.model.level import PRIOR_SD
from bp_spark.registry import bundle as bundles
from bp_spark.registry import decisions, signing
from bp_spark.registry import manifest as manifests
from bp_spark.registry.predictions import REASONS, as_frame, predict
from bp_spark.scoring import prediction
from bp_spark.scoring.counterfactual import one_more_order
from bp_spark.training import backtest, cross_fit, dataset, promote
from bp_spark.training.loader import snapshot
from bp_spark.training.warm_start import warm_start
from tests.support.histories import SECRET
from tests.support.signing_keys import new_keys
from tests.support.small_package import household_ids, write_small_package

TEST_DATE = date(2017, 10, 3)
SAMPLE = 0.1
WINDOWS = "features.windows=[30, 90]"
SMALL = [
    f"source.sample={SAMPLE}",
    "labels.cutoffs=2",
    "labels.cutoff_step_days=30",
    "labels.folds=2",
    # fewer dates and columns: to plan more would be most of the time
    "labels.recent_cutoffs=1",
    WINDOWS,
    # seen whole by both cutoffs, by the older one, by none
    "labels.other_horizons=[30, 120, 180]",
    # of 239 users chance is as large as what the default members are better than the linear baseline by
    "fusion.members=[linear, btyd, trees, sqrt_trees, transformer]",
    # two ranks learn in test_cluster.py
    "training.processes=1",
    "training.max_epochs=4",
    "training.learning_rate=0.005",
    "training.batch_size=64",
    "network.hidden_size=16",
    "network.layers=1",
    "network.heads=2",
    "network.intermediate_size=16",
    "network.adapter_size=16",
    "network.horizons_weight=0.1",
    "features.history_length=16",
    "trees.rounds=60",
    "trees.learning_rate=0.1",
]
OF_FEATURES = ("raw_transactions", "events", "quarantine", "texts", "text_embeddings", "user_daily", "user_features")

pytestmark = pytest.mark.slow


@dataclass
class Line:
    """A platform on which all stages ran once."""

    spark: SparkSession
    config: Config
    lakehouse: Lakehouse
    trained: pipeline.TrainResult
    before: dict[str, int]
    """Versions of the tables of features, before the night."""
    night: whole_night.NightResult

    @property
    def scored(self) -> pipeline.ScoreResult:
        return self.night.scored


@pytest.fixture(scope="module")
def sampled(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package of the data with those households that ``source.sample`` takes, and no other to be read and left out."""
    ids = spark.createDataFrame([(household,) for household in household_ids()], "user_id string")
    chosen = [row["user_id"] for row in ingest_job.sampled(ids, SAMPLE).collect()]
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(write_small_package(tmp_path_factory.mktemp("packages"), chosen))
        yield


@pytest.fixture(scope="module")
def line(spark: SparkSession, sampled: None, tmp_path_factory: pytest.TempPathFactory) -> Line:
    folder = tmp_path_factory.mktemp("line")
    keys = new_keys(folder / "keys")
    settings = config.load(
        overrides=[
            *SMALL,
            f"tables.path={folder}/lakehouse",
            f"bundles={folder}/bundles",
            f"training.work_dir={folder}/work",
            f"evaluation.reports={folder}/reports",
            f"tracking.uri=sqlite:///{folder}/tracking/mlflow.db",
            f"tracking.artifacts={folder}/tracking/artifacts",
            "evaluation.external_segment=income",
            "evaluation.resamples=20",
            f"signing.private_key={keys.private_key}",
            f"signing.public_key={keys.public_key}",
        ]
    )
    pipeline.featurize(spark, settings, [TEST_DATE])
    trained = pipeline.train(spark, settings, TEST_DATE)
    lakehouse = Lakehouse(spark, settings.tables)
    before = _versions(lakehouse, *OF_FEATURES)
    night = whole_night.night(spark, settings, TEST_DATE)
    return Line(spark, settings, lakehouse, trained, before, night)


@pytest.fixture
def registry(line: Line) -> Iterator[MlflowClient]:
    """The registry as a user of MLflow sees it."""
    mlflow.set_tracking_uri(line.config.tracking.uri)
    yield MlflowClient()
    mlflow.set_tracking_uri(None)


def _champion(registry: MlflowClient) -> dict[str, str]:
    return dict(registry.get_model_version_by_alias("purchasing-power", "champion").tags)


def _versions(lakehouse: Lakehouse, *names: str) -> dict[str, int]:
    return {name: lakehouse.version(name) for name in names}


def _night(lakehouse: Lakehouse, day: date) -> pd.DataFrame:
    rows = lakehouse.read("scores").filter(F.col("score_date") == F.lit(day)).toPandas()
    return rows.sort_values("user_key").reset_index(drop=True)


def test_every_user_with_a_purchase_before_the_date_has_exactly_one_score(line: Line) -> None:
    buyers = (
        line.lakehouse.read("events")
        .filter((F.col("kind") == "purchase") & (F.col("ts") < F.lit(str(TEST_DATE)).cast("timestamp")))
        .select("user_key")
        .distinct()
        .toPandas()["user_key"]
    )
    night = _night(line.lakehouse, TEST_DATE)
    assert sorted(night["user_key"]) == sorted(buyers)
    assert line.scored.users == len(buyers) > 200


def test_scores_keep_their_promises_row_by_row(line: Line) -> None:
    night = _night(line.lakehouse, TEST_DATE)
    assert ((night["low"] >= 0) & (night["low"] <= night["expected_spend"])).all()
    assert (night["expected_spend"] <= night["high"]).all()
    assert night["p_active"].between(0, 1).all()
    assert night["score"].between(0, 100).all()
    assert (night.sort_values("score")["expected_spend"].diff().dropna() >= 0).all()
    assert (night.loc[night["score"] >= 80, "level"] == "A").all()
    assert (night.loc[night["score"] < 20, "level"] == "E").all()
    assert set(night["risk_level"]) <= {"low", "medium", "high"}
    assert (night["bundle_digest"] == line.trained.bundle.digest).all()
    assert (night["reasons"].map(len) == REASONS).all()
    listed = night["reasons"].map(lambda reasons: sum(reason["contribution"] for reason in reasons))
    summed = night["base_spend"] + listed + night["other_reasons"]
    np.testing.assert_allclose(summed, night["expected_spend"], rtol=1e-6, atol=1e-6)
    by_days = pd.DataFrame([dict(row) for row in night["expected_by_horizon"]])
    assert list(by_days.columns) == [30, 90, 120]
    assert (by_days[90] == night["expected_spend"]).all()
    assert (by_days.diff(axis=1).drop(columns=30) >= 0).all(axis=None)
    assert (by_days[30] < by_days[90]).mean() > 0.9


def test_a_second_run_of_the_same_night_changes_no_row(line: Line) -> None:
    before, versions = _night(line.lakehouse, TEST_DATE), _versions(line.lakehouse, "scores", "scores_latest")
    assert not pipeline.score(line.spark, line.config, TEST_DATE, "models:/purchasing-power/1").written
    assert _versions(line.lakehouse, "scores", "scores_latest") == versions
    pd.testing.assert_frame_equal(_night(line.lakehouse, TEST_DATE), before)


def test_a_second_featurize_changes_no_table(line: Line) -> None:
    stages = [stage for stage in line.night.stages if stage["job"] == "featurize"]
    assert {stage["stage"]: stage["status"] for stage in stages} == dict.fromkeys(
        ("ingest", "clean", "campaign_contacts", "embed", "aggregate", "featurize", "prospects"), "unchanged"
    )
    assert _versions(line.lakehouse, *OF_FEATURES) == line.before


def test_a_night_run_again_goes_through_its_steps_and_writes_no_score(
    line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("events", "user_features", "scores", "scores_latest", "user_profile", "recommendations", "fairness")
    versions = _versions(line.lakehouse, *names)
    with caplog.at_level("INFO", whole_night.logger.name):
        result = whole_night.night(line.spark, line.config, TEST_DATE, page=tmp_path / "night.html")
    said = [record.getMessage() for record in caplog.records if record.name == whole_night.logger.name]
    assert [words.split(":")[0] for words in said] == [f"night {TEST_DATE}, step {n} of 7" for n in range(1, 8)]
    assert [words.split(": ")[1].split(",")[0] for words in said] == list(whole_night.STEPS)
    assert all("by the last nights" in words for words in said)
    assert (result.scored.users, result.scored.written) == (line.scored.users, False)
    assert result.report.page.stat().st_size > 10_000
    assert _versions(line.lakehouse, *names) == versions
    assert set(whole_night.seconds_of_last_runs(line.lakehouse)) == set(whole_night.STEPS)


def test_the_vocabulary_brings_tokens_where_a_language_model_reads_histories(line: Line, tmp_path: Path) -> None:
    settings = config.changed(line.config, {"network.backbone": "text"})
    found = load_file(dataset.write_vocabulary(Run(line.spark, settings), TEST_DATE, tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(texts.model_folder(settings.history_model))
    known = {row["text_id"]: row["text"] for row in line.lakehouse.read("texts").collect()}
    count = len(found["ids"])
    assert count > 100
    rows = zip(found["tokens"][-count:], found["token_lengths"][-count:], strict=True)
    written = tokenizer.batch_decode([tokens[:length] for tokens, length in rows])
    assert written == [known[number] for number in found["ids"].tolist()]


def test_scoring_another_date_leaves_the_first_one_alone(line: Line) -> None:
    other = TEST_DATE - timedelta(days=30)
    before = _night(line.lakehouse, TEST_DATE)
    pipeline.featurize(line.spark, line.config, [other])
    pipeline.score(line.spark, line.config, other)
    pd.testing.assert_frame_equal(_night(line.lakehouse, TEST_DATE), before)
    assert len(_night(line.lakehouse, other)) > 0
    latest = line.lakehouse.read("scores_latest").select("score_date").distinct().collect()
    assert [row[0] for row in latest] == [TEST_DATE]


def test_a_bundle_that_another_key_signed_scores_nobody(line: Line, tmp_path: Path) -> None:
    settings = line.config.model_copy(update={"signing": new_keys(tmp_path / "others")})
    for chosen in (None, "models:/purchasing-power@champion"):
        with pytest.raises(BundleError, match=r"manifest\.sig: is no signature"):
            pipeline.score(line.spark, settings, TEST_DATE, chosen)


@pytest.mark.parametrize("override", ["features.recency_precision_bits=null", "features.history_length=17"])
def test_a_bundle_of_features_that_meant_something_else_scores_nobody(line: Line, override: str) -> None:
    name, _, value = override.removeprefix("features.").partition("=")
    features = line.config.features.model_copy(update={name: None if value == "null" else int(value)})
    with pytest.raises(BundleError, match=rf"features\.{name}=\d+, and now it is"):
        pipeline.score(line.spark, line.config.model_copy(update={"features": features}), TEST_DATE)


def test_the_udf_scores_as_the_bundle_does_in_this_process(line: Line) -> None:
    features = line.lakehouse.read("user_features").filter(F.col("as_of_date") == F.lit(TEST_DATE)).toPandas()
    bundle = bundles.load(bundles.current(line.config.bundles))
    here = as_frame(predict(bundle, {name: features[name].to_numpy() for name in features.columns}))
    here.index = pd.Index(features["user_key"])
    night = _night(line.lakehouse, TEST_DATE).set_index("user_key")
    np.testing.assert_allclose(
        night["expected_spend"], here.loc[night.index, "expected_spend"].astype(float), rtol=1e-4
    )


def test_a_version_of_the_registry_scores_as_the_night_did_in_a_udf_of_mlflow(
    line: Line, registry: MlflowClient
) -> None:
    users = line.lakehouse.read("user_features").filter(F.col("as_of_date") == F.lit(TEST_DATE))
    answer = mlflow.pyfunc.spark_udf(line.spark, "models:/purchasing-power/1", env_manager="local")
    inputs = F.struct(*line.trained.bundle.required_columns)
    answers = users.select("user_key", answer(inputs).alias("answer")).select("user_key", "answer.*").toPandas()
    answers = answers.sort_values("user_key").reset_index(drop=True)
    night = _night(line.lakehouse, TEST_DATE)[list(answers.columns)]
    pd.testing.assert_frame_equal(answers, night, rtol=1e-4)


def test_a_user_scores_the_same_whoever_shares_the_batch(line: Line) -> None:
    users = line.lakehouse.read("user_features").filter(F.col("as_of_date") == F.lit(TEST_DATE))
    bundle = line.trained.bundle
    alone = prediction.score(users.orderBy("user_key").limit(3), bundle, TEST_DATE, 0).toPandas()
    night = _night(line.lakehouse, TEST_DATE).set_index("user_key")
    np.testing.assert_allclose(alone["expected_spend"], night.loc[alone["user_key"], "expected_spend"], rtol=1e-4)


def test_training_stores_what_nights_are_compared_with(line: Line) -> None:
    stored = line.lakehouse.read("drift_reference").toPandas().set_index("subject")
    manifest = line.trained.bundle.manifest
    assert set(stored["bundle_digest"]) == {line.trained.bundle.digest}
    assert sorted(stored.index) == sorted([*manifest["inputs"]["tabular"], "score"])
    assert manifest["lineage"]["features"] == catalogue(line.config.features).definitions
    rows = line.lakehouse.read("training_set", manifest["lineage"]["training_set"]["version"]).count()
    assert set(stored["counts"].drop("score").map(sum)) == {rows}


def test_training_tells_how_right_its_reasons_are(line: Line) -> None:
    reasons = line.trained.bundle.manifest["metrics"]["reasons"]
    assert reasons["users"] == 100
    assert 0 < reasons["error"] < 1.5
    assert 0.3 < reasons["same_first"] <= 1
    (stage,) = [stage for stage in line.trained.stages if stage["stage"] == "explain"]
    assert stage["figures"]["reasons_error"] == f"{reasons['error']:.4g}"
    imitated = line.trained.bundle.explanation
    assert imitated is not None
    assert {f"r_squared_{name}" for name in imitated.r_squared} <= set(stage["figures"])


def test_training_never_sees_holdout_users_or_the_test_horizon(line: Line) -> None:
    rows = line.lakehouse.read("training_set")
    fold = labels.fold(line.config.labels)
    assert rows.filter(fold == labels.HOLDOUT).isEmpty()
    assert rows.filter(fold != F.col("fold")).isEmpty()
    assert rows.filter(F.date_add("as_of_date", F.col("exposure_days")) > F.lit(TEST_DATE)).isEmpty()
    dates = [row[0] for row in rows.select("as_of_date").distinct().collect()]
    everyone, days = (line.lakehouse.read(name) for name in ("user_features", "user_daily"))
    users = everyone.filter(F.col("as_of_date").isin(dates)).select("user_key", "as_of_date")
    factors = labels.exposure_factors(users, days, dates, TEST_DATE, line.config.labels)
    assert all(1 <= factor <= 6 for factor in factors.values())
    factor = F.coalesce(*(F.when(F.col("exposure_days") == age, value) for age, value in factors.items()), F.lit(1.0))
    seen = rows.agg(F.sum(F.col("label_spend") / factor)).first()
    days = line.lakehouse.read("user_daily").filter(F.col("day") < F.lit(TEST_DATE))
    joined = rows.select("user_key", "as_of_date", "exposure_days").join(days, "user_key")
    within = F.datediff("day", "as_of_date").between(0, F.col("exposure_days") - 1)
    spent = joined.filter(within).agg(F.sum("spend")).first()
    assert seen is not None
    assert spent is not None
    assert seen[0] == pytest.approx(float(spent[0]))
    assert {row[0] for row in rows.select("complete").distinct().collect()} == {True, False}
    for other in line.config.labels.other_horizons:
        known = F.col(f"label_spend_{other}d").isNotNull()
        assert rows.filter(known != (F.date_add("as_of_date", other) <= F.lit(TEST_DATE))).isEmpty()
        told = rows.filter(known).agg(F.sum(f"label_spend_{other}d")).first()
        within = F.datediff("day", "as_of_date").between(0, other - 1)
        spent = rows.filter(known).select("user_key", "as_of_date").join(days, "user_key").filter(within)
        total = spent.agg(F.sum("spend")).first()
        assert told is not None
        assert total is not None
        if other == 180:
            assert told[0] is None
        else:
            assert told[0] == pytest.approx(float(total[0]))


def test_pre_training_reads_what_is_known_on_the_test_date_of_users_that_are_not_held_out(
    line: Line, tmp_path: Path
) -> None:
    pretraining = line.config.pretraining.model_copy(update={"max_epochs": 2})
    run = Run(line.spark, line.config.model_copy(update={"pretraining": pretraining}))
    vocabulary = dataset.write_vocabulary(run, TEST_DATE, tmp_path)
    encoder, epochs = cross_fit.pretrain_encoder(run, TEST_DATE, vocabulary, fold=0, epochs=None)
    assert (encoder / "encoder.safetensors").exists()
    assert 1 <= epochs <= 2
    rows, fold = line.lakehouse.read("pretraining_set"), labels.fold(line.config.labels)
    users = line.lakehouse.read("user_features").filter(F.col("as_of_date") == F.lit(TEST_DATE))
    assert rows.count() == users.filter(fold != labels.HOLDOUT).count()
    assert rows.filter((fold != F.col("fold")) | (F.col("as_of_date") != F.lit(TEST_DATE))).isEmpty()
    assert not any(name.startswith("label") for name in rows.columns)


def test_what_is_said_of_a_user_out_of_fold_leans_on_no_label_of_the_fold(line: Line, tmp_path: Path) -> None:
    settings = line.config.model_copy(update={"fusion": line.config.fusion.model_copy(update={"members": ("linear",)})})
    run = Run(line.spark, settings)
    rows = line.lakehouse.read("training_set")
    in_fold = F.col("fold") == 0
    spoiled = rows.withColumn(
        "label_spend", F.when(in_fold, F.col("label_spend") * 50 + 1000).otherwise(F.col("label_spend"))
    )
    said = [
        cross_fit.cross_fit(run, labelled, TEST_DATE, tmp_path, tmp_path)[1]
        .set_index(["user_key", "as_of_date"])
        .sort_index()
        for labelled in (rows, spoiled)
    ]
    folds = rows.filter("complete").select("user_key", "as_of_date", "fold").toPandas()
    held_out = folds.set_index(["user_key", "as_of_date"]).sort_index()["fold"] == 0
    assert held_out.any()
    for member in ("linear", "btyd"):
        np.testing.assert_allclose(said[0].loc[held_out, member], said[1].loc[held_out, member], rtol=1e-6)
    assert not np.allclose(said[0].loc[~held_out, "linear"], said[1].loc[~held_out, "linear"], rtol=0.5)


def test_a_network_starts_from_the_encoder_of_another_bundle_of_its_sizes_and_of_no_other(
    line: Line, tmp_path: Path
) -> None:
    # steps too short to be seen
    steps = {"max_epochs": 1, "learning_rate": 1e-30, "weight_decay": 0.0, "average_epochs": 0.0}
    donated = _of_another_platform(line, tmp_path / "donor")
    training = line.config.training.model_copy(update={**steps, "from_bundle": str(donated)})
    fusion = line.config.fusion.model_copy(update={"members": ("transformer",)})
    settings = line.config.model_copy(update={"training": training, "fusion": fusion})
    run = Run(line.spark, settings)
    vocabulary = dataset.write_vocabulary(run, TEST_DATE, tmp_path)
    cross_fit.cross_fit(run, line.lakehouse.read("training_set"), TEST_DATE, vocabulary, tmp_path, refit=False)
    donor = load_file(line.trained.bundle.folder / "transformer.safetensors")
    started = load_file(tmp_path / "without-0" / "model" / "transformer.safetensors")
    of_encoder = [name for name in donor if name.startswith("history.")]
    assert "history.projection.0.weight" in of_encoder
    for name in of_encoder:
        np.testing.assert_allclose(started[name], donor[name], rtol=1e-6, err_msg=name)
    assert not np.array_equal(started["head.weight"], donor["head.weight"])

    start = warm_start(run)
    level = line.trained.bundle.stack.level
    assert level is not None
    assert (start.with_projection, start.level_sd) == (True, level.sd if level.forecasts else PRIOR_SD)
    for changes, message in (
        ({"network.hidden_size": 32}, r"that bundle has network\.hidden_size 16, and not 32"),
        ({"features.history_length": 8}, r"that bundle has features\.history_length 16, and not 8"),
        ({"training.from_bundle": str(line.trained.bundle.folder)}, "learned from this platform"),
    ):
        with pytest.raises(ConfigError, match=rf"training\.from_bundle: .*{message}"):
            warm_start(Run(line.spark, config.changed(settings, changes)))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        warm_start(Run(line.spark, config.changed(settings, {"training.from_bundle": str(tmp_path)})))
    with pytest.raises(ConfigError, match=r"search\.space: network\.hidden_size is that of the bundle"):
        pipeline.search(line.spark, settings)
    other_words = config.changed(settings, {"texts.max_tokens": 7})
    assert not warm_start(Run(line.spark, other_words)).with_projection


def test_a_night_reports_by_segments_of_users(line: Line) -> None:
    assert line.night.fairness is not None
    groups = line.lakehouse.read("fairness").filter(F.col("score_date") == F.lit(TEST_DATE)).toPandas()
    assert line.night.fairness.report.count() == len(groups)
    assert {"age", "income"} <= set(groups["segment"])


def test_the_page_of_a_night_tells_of_all_users_and_of_none(line: Line) -> None:
    told = line.night.report
    night = _night(line.lakehouse, TEST_DATE)
    assert told.levels.groupby("level")["users"].sum().to_dict() == night["level"].value_counts().to_dict()
    assert told.levels["expected_spend"].sum() == pytest.approx(night["expected_spend"].sum())
    text = told.page.read_text(encoding="utf-8")
    assert f"<strong>{len(night):,}</strong>" in text
    assert f"{night['expected_spend'].sum():,.0f}" in text
    assert line.trained.bundle.folder.name in text
    assert "normalised Gini" in text
    for name in ("ingest", "clean", "featurize", "fit trees", "score"):
        assert f'<th scope="row" class="words">{name}</th>' in text
    rows = sum(line.lakehouse.read(name).count() for name in ("raw_transactions", "raw_behaviours"))
    assert f"{rows:,} rows in = " in text
    assert "balanced" in text
    keys = set(night["user_key"])
    assert not any(word in keys for word in re.findall(r"\w+", text))


def test_a_night_that_nobody_scored_has_no_page(line: Line, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished scoring of 2020-01-01"):
        pipeline.report(line.spark, line.config, date(2020, 1, 1), tmp_path / "night.html")
    assert not (tmp_path / "night.html").exists()


def test_what_if_says_of_the_past_as_it_is_what_the_night_said(line: Line) -> None:
    night = _night(line.lakehouse, TEST_DATE).set_index("user_key")
    user = str(night["expected_spend"].idxmin())
    more = one_more_order(datetime(2017, 10, 2, 18, tzinfo=UTC), times=3.0)
    found = pipeline.what_if(line.spark, line.config, user, TEST_DATE, more)
    assert found.predictions.loc["before", "expected_spend"] == pytest.approx(
        night.loc[user, "expected_spend"], rel=1e-4
    )
    assert found.predictions.loc["before", "level"] == night.loc[user, "level"]
    assert found.features.loc["recency_days", "after"] == 1
    assert found.features.loc["spend_30d", "after"] > found.features.loc["spend_30d", "before"]
    assert found.predictions.loc["after", "expected_spend"] > found.predictions.loc["before", "expected_spend"]
    with pytest.raises(DataError, match="holds no row of that user"):
        pipeline.what_if(line.spark, line.config, "nobody", TEST_DATE, more)


def test_no_file_of_the_whole_line_holds_the_secret_and_only_user_keys_holds_ids(line: Line) -> None:
    root = Path(line.config.bundles).parent
    ids = [row["user_id"] for row in line.lakehouse.read("user_keys").collect()]
    secret = residue_scan.search(line.spark, [str(root)], [SECRET.value.decode()], [])
    assert secret.files_with_residue == []
    assert secret.other_files > 100
    theirs = residue_scan.search(line.spark, [str(root)], [], ids)
    assert theirs.files_with_residue
    assert all("/bp/user_keys/" in path for path in theirs.files_with_residue)
    # what is looked for would be found: a user's key stands in the scores
    key = residue_scan.search(line.spark, [line.lakehouse.location("scores")], [SECRET.key_of(ids[0])], [])
    assert key.files_with_residue


def test_labels_are_the_spend_of_the_horizon_in_the_events(line: Line) -> None:
    row = line.lakehouse.read("training_set").filter("complete").orderBy(F.desc("label_spend")).first()
    assert row is not None
    end = row["as_of_date"] + timedelta(days=line.config.labels.horizon_days)
    spent = (
        line.lakehouse.read("events")
        .filter((F.col("user_key") == row["user_key"]) & (F.col("kind") == "purchase"))
        .filter((F.col("event_date") >= F.lit(row["as_of_date"])) & (F.col("event_date") < F.lit(end)))
        .agg(F.sum("amount"))
        .first()
    )
    assert spent is not None
    assert row["label_spend"] == pytest.approx(float(spent[0]))


def test_metrics_cover_all_members_and_seen_and_unseen_users(line: Line) -> None:
    metrics = line.trained.metrics
    members = {"linear", "btyd", "trees", "sqrt_trees", "transformer", "fused"}
    # the 120 days from the test date on are not over
    assert set(metrics["member"]) == members | {"transformer_30d", "fused_30d"}
    users = metrics.drop_duplicates("population").set_index("population")["users"]
    assert users["seen"] + users["unseen"] == users["all"] == line.scored.users
    stored = line.lakehouse.read("metrics").filter(F.col("bundle_digest") == line.trained.bundle.digest)
    assert stored.count() == len(metrics)
    spearman = metrics[(metrics["metric"] == "spearman") & (metrics["population"] == "all")].set_index("member")[
        "value"
    ]
    assert spearman["fused"] > 0.6
    assert spearman["fused_30d"] > 0.5
    night = _night(line.lakehouse, TEST_DATE)
    end = TEST_DATE + timedelta(days=30)
    within = (F.col("day") >= F.lit(TEST_DATE)) & (F.col("day") < F.lit(end))
    spent = line.lakehouse.read("user_daily").filter(within).groupBy("user_key").agg(F.sum("spend").cast("double"))
    truth = night["user_key"].map(dict(map(tuple, spent.collect()))).fillna(0.0).clip(lower=0.0)
    error = (night["expected_by_horizon"].map(lambda by_days: by_days[30]) - truth).abs().mean()
    mae = metrics.set_index(["metric", "population", "member"]).sort_index()["value"]["mae", "all"]
    assert mae["fused_30d"] == pytest.approx(error, rel=1e-3)
    assert mae["fused_30d"] < mae["fused"]


def test_a_horizon_that_no_cutoff_has_seen_whole_is_left_out_and_the_summary_says_so(line: Line) -> None:
    assert line.trained.bundle.horizons.days == (30, 90, 120)
    (stage,) = [stage for stage in line.trained.stages if stage["stage"] == "fit horizons"]
    assert stage["figures"]["180_days"].startswith("LEFT OUT: 0 rows have seen 180 days whole")
    rows = line.lakehouse.read("training_set").filter("complete")
    assert stage["figures"]["30_days"] == f"from {rows.count():,} rows"
    assert stage["figures"]["120_days"] == f"from {rows.filter('label_spend_120d IS NOT NULL').count():,} rows"


def test_a_backtest_tells_how_sure_each_figure_is_and_promotes_nothing(line: Line) -> None:
    bundles_before = sorted(path.name for path in Path(line.config.bundles).iterdir())
    pointer = (Path(line.config.bundles) / "current").read_text()
    result = pipeline.backtest(line.spark, line.config, [TEST_DATE])
    assert sorted(path.name for path in Path(line.config.bundles).iterdir()) == bundles_before
    assert (Path(line.config.bundles) / "current").read_text() == pointer
    stored = line.lakehouse.read("backtests").toPandas()
    assert len(stored) == len(result.tables[TEST_DATE])
    assert set(stored["member"]) == {"linear", "btyd", "trees", "sqrt_trees", "transformer", backtest.MEAN, "fused"}
    assert set(stored["population"]) == {"all", "seen", "unseen", "income"}
    own = stored[stored["peer"].isna()].set_index(["population", "member", "metric"]).sort_index()
    # trained on the same rows, with the same seed: the figures are those of train
    trained = line.trained.metrics.set_index(["population", "member", "metric"])["value"]
    trained = trained[~trained.index.get_level_values("member").str.endswith("_30d")]
    assert own.loc[trained.index, "value"].to_numpy() == pytest.approx(trained.to_numpy(), nan_ok=True)
    gini = own.loc[("all", "fused", "gini")]
    assert gini["low"] < gini["value"] < gini["high"]
    pairs = stored[stored["peer"].notna()]
    assert set(pairs["member"]) == {"fused"}
    assert pairs["better"].dropna().between(0, 1).all()
    users = own["users"]
    assert users[("income", "fused", "bracket_auc")] < users[("all", "fused", "auc")]
    assert result.report.exists()
    assert len(list(result.report.parent.glob("*.png"))) == 6


def test_a_search_judges_settings_out_of_fold_and_records_every_trial(line: Line, registry: MlflowClient) -> None:
    space = {"trees.max_depth": SearchRange(low=1, high=3), "linear.l2": SearchRange(choices=(0.01, 1.0))}
    settings = line.config.model_copy(
        update={
            "fusion": line.config.fusion.model_copy(update={"members": ("linear", "trees")}),
            "trees": line.config.trees.model_copy(update={"rounds": 10}),
            "search": SearchConfig(space=space, trials=2, metric="spearman"),
        }
    )
    version = line.lakehouse.version("training_set")
    result = pipeline.search(line.spark, settings, TEST_DATE)
    assert line.lakehouse.version("training_set") == version
    assert [trial.settings["trees.max_depth"] for trial in result.trials[:1]] == [settings.trees.max_depth]
    assert 0.4 < result.best.value == max(trial.value for trial in result.trials) < 1
    stored = line.lakehouse.read("trials").toPandas().sort_values("trial")
    assert stored["value"].tolist() == [trial.value for trial in result.trials]
    assert set(dict(stored["settings"].iloc[1])) == set(space)
    (experiment,) = registry.search_experiments(filter_string="name = 'bp-spark'")
    runs = registry.search_runs([experiment.experiment_id], "tags.stage = 'trial'")
    assert sorted(run.data.metrics["spearman"] for run in runs) == sorted(stored["value"])


@pytest.mark.parametrize(
    ("dates", "folds", "words"), [([date(2017, 10, 4)], 1, "newest test date"), ([], 20, "reach back")]
)
def test_a_backtest_that_cannot_be_done_is_refused_before_it_trains(
    line: Line, dates: list[date], folds: int, words: str
) -> None:
    version = line.lakehouse.version("training_set")
    evaluation = line.config.evaluation.model_copy(update={"external_segment": "wealth"})
    wealth = line.config.model_copy(update={"evaluation": evaluation})
    with pytest.raises(DataError, match=words):
        pipeline.backtest(line.spark, line.config, dates, folds)
    with pytest.raises(DataError, match="no user has a segment 'wealth'"):
        pipeline.backtest(line.spark, wealth, [TEST_DATE])
    assert line.lakehouse.version("training_set") == version


def test_the_bundle_says_where_it_comes_from(line: Line) -> None:
    lineage = line.trained.bundle.manifest["lineage"]
    training_set = snapshot(lineage["training_set"]["location"], lineage["training_set"]["version"])
    assert training_set.rows == line.lakehouse.read("training_set").count()
    assert Config.model_validate(lineage["config"]) == line.config
    assert not [path for path in line.trained.bundle.folder.iterdir() if path.suffix in (".pkl", ".pt", ".joblib")]


def test_a_run_and_a_score_are_explained_and_the_night_comes_out_again(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as the command would, but for its log lines, in this process and session
    monkeypatch.setattr("bp_spark.core.logs.listen", lambda form: None)
    places = [f"tables.path={line.config.tables.path}", f"bundles={line.config.bundles}"]

    def said(*arguments: str) -> list[str]:
        result = CliRunner().invoke(app.app, [*arguments, *places])
        assert result.exit_code == 0, result.output
        return [" ".join(row.split()) for row in re.sub("[│┃]", " ", result.stdout).splitlines()]

    bundle, settings = line.trained.bundle, config.digest(line.config)
    training_set = bundle.manifest["lineage"]["training_set"]
    trained = said("explain-run", line.trained.stages[0]["run_id"])
    assert {"job train", f"bundle {bundle.digest}", f"config digest {settings}"} <= set(trained)
    (labelled,) = [row for row in trained if row.startswith("label done")]
    assert f"training_set@{training_set['version']}" in labelled
    user = _night(line.lakehouse, TEST_DATE).iloc[7]
    run_id = line.scored.stages[0]["run_id"]
    traced = said("explain-score", "--user", user["user_key"], "--date", str(TEST_DATE))
    assert f"by run {run_id}, bp-spark {__version__}, config digest {settings}" in traced
    assert {f"bundle {bundle.digest}", f"in folder {bundle.folder}"} <= set(traced)
    assert f"on version {training_set['version']} of {training_set['location']}" in traced
    (features,) = [row for row in traced if row.startswith("features version ")]
    assert features.split()[2] == str(user["features_version"])
    assert any(row.startswith("unseen (") for row in traced)
    assert (
        f"{line.scored.users} rows of {TEST_DATE} came out again"
        in said("reproduce", "--score-date", str(TEST_DATE))[0]
    )


def test_scores_are_readable_without_spark_and_by_sql(line: Line) -> None:
    table = DeltaTable(line.lakehouse.location("scores_latest")).to_pandas()
    assert len(table) == line.scored.users
    line.lakehouse.register(TABLE_NAMES)
    row = line.spark.sql("SELECT count(*), avg(score) FROM bp.scores_latest").first()
    assert row is not None
    assert row[0] == line.scored.users
    assert row[1] == pytest.approx(50, abs=2)


def test_runs_tell_what_ran_with_which_figures(line: Line) -> None:
    runs = line.lakehouse.read("runs").orderBy("started_at").toPandas()
    cleaned = runs[(runs["stage"] == "clean") & (runs["status"] == "done")].iloc[0]
    figures = dict(cleaned["figures"])
    assert int(figures["rows"]) == sum(int(figures[name]) for name in ("events", "duplicates", "quarantine"))
    assert {"ingest", "clean", "embed", "aggregate", "featurize", "label", "score"} <= set(runs["stage"])
    assert (cleaned["rows_in"], cleaned["rows_out"]) == (int(figures["rows"]), int(figures["events"]))
    assert {"events", "quarantine", "texts"} <= set(dict(cleaned["written"]))
    # the first one wrote the only date that was there then
    featurized = runs[(runs["stage"] == "featurize") & (runs["status"] == "done")].iloc[0]
    assert (featurized["job"], featurized["config_digest"]) == ("featurize", config.digest(line.config))
    days = line.lakehouse.read("user_daily", dict(featurized["read"])["user_daily"])
    users = line.lakehouse.read("user_features", dict(featurized["written"])["user_features"])
    assert (featurized["rows_in"], featurized["rows_out"]) == (days.count(), users.count())


def test_no_stage_after_cleaning_reads_more_of_users_than_when_they_registered(line: Line) -> None:
    runs = line.lakehouse.read("runs").filter(F.col("job").isin("featurize", "train", "score")).collect()
    stages = {row["stage"]: set(row["read"] or {}) for row in runs if row["status"] == "done"}
    assert "user_daily" in stages["featurize"]
    assert {stage for stage, tables in stages.items() if "raw_users" in tables} == {"clean", "prospects"}


def test_each_text_is_read_once(line: Line) -> None:
    embeddings = line.lakehouse.read("text_embeddings")
    assert embeddings.count() == embeddings.select("text_id", "model_digest").distinct().count()
    assert embeddings.count() == line.lakehouse.read("texts").count()


def test_an_as_of_date_before_the_data_is_refused_and_leaves_tables_alone(line: Line) -> None:
    versions = _versions(line.lakehouse, "user_features")
    with pytest.raises(DataError, match="2016-12-31"):
        pipeline.featurize(line.spark, line.config, [date(2016, 12, 31)])
    assert _versions(line.lakehouse, "user_features") == versions


def test_a_date_without_features_is_refused_and_leaves_scores_alone(line: Line) -> None:
    versions = _versions(line.lakehouse, "scores")
    with pytest.raises(DataError, match="run featurize"):
        pipeline.score(line.spark, line.config, date(2017, 11, 11))
    assert _versions(line.lakehouse, "scores") == versions


def test_a_flipped_bit_in_the_bundle_is_refused_and_leaves_scores_alone(line: Line, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(line.trained.bundle.folder, copy)
    weights = copy / "transformer.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    versions = _versions(line.lakehouse, "scores")
    with pytest.raises(BundleError, match=r"transformer\.safetensors"):
        pipeline.score(line.spark, line.config, TEST_DATE, copy)
    assert _versions(line.lakehouse, "scores") == versions


def test_a_bundle_that_wants_a_column_the_features_lack_is_refused(line: Line) -> None:
    users = line.lakehouse.read("user_features").drop("recency_days")
    with pytest.raises(BundleError, match="recency_days"):
        prediction.score(users, line.trained.bundle, TEST_DATE, 0)


def test_training_without_enough_history_is_refused(line: Line) -> None:
    with pytest.raises(DataError, match="must reach back"):
        pipeline.train(line.spark, line.config, date(2017, 3, 1))


def test_the_first_bundle_is_promoted_above_the_baselines_and_says_so(line: Line, registry: MlflowClient) -> None:
    assert line.trained.promoted
    assert "no worse than linear 0." in line.trained.reason
    assert "no other bundle is promoted" in line.trained.reason
    record = Path(f"{line.trained.bundle.folder}{decisions.DECISION}")
    assert json.loads(record.read_text(encoding="utf-8"))["reason"] == line.trained.reason
    stage = line.lakehouse.read("runs").filter("stage = 'promote'").orderBy("started_at").first()
    assert stage is not None
    assert stage["figures"]["reason"] == line.trained.reason
    version = registry.get_model_version("purchasing-power", "1")
    assert (version.tags["bundle_digest"], version.description) == (line.trained.bundle.digest, line.trained.reason)
    run = registry.get_run(version.run_id)
    metrics = line.trained.metrics.set_index(["population", "member", "metric"])["value"]
    assert run.data.metrics["unseen/fused/gini"] == metrics["unseen", "fused", "gini"]
    assert len(registry.get_metric_history(version.run_id, "transformer/valid_loss")) >= 1


def _copied(line: Line, folder: Path, **lineage: Any) -> Path:
    """Copy the trained bundle into a folder, with other entries in its lineage."""
    shutil.copytree(line.trained.bundle.folder, folder)
    content = {key: value for key, value in line.trained.bundle.manifest.items() if key not in ("digest", "checksum")}
    text = manifests.encode(manifests.seal(content | {"lineage": content["lineage"] | lineage}))
    private_key = signing.private_key(line.config.signing)
    assert private_key is not None
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sig").write_bytes(private_key.sign(text))
    return folder


def _of_another_platform(line: Line, folder: Path) -> Path:
    """Copy the trained bundle as if another lakehouse had taught it."""
    taught = line.trained.bundle.manifest["lineage"]["training_set"] | {"location": "/another/lakehouse/training_set"}
    return _copied(line, folder, training_set=taught)


def test_a_bundle_that_cannot_be_told_from_the_promoted_one_replaces_it(line: Line, registry: MlflowClient) -> None:
    old = line.trained.bundle.folder
    # of another training that came to the same
    new = _copied(line, old.with_name(f"again-{old.name}"), again=True)
    bundle = bundles.load_promoted(line.config, new)
    with recorded(line.spark, line.config, "train") as run:
        decision = promote.promote(run, bundle, lambda: promote.decide(run, line.trained.fitted, True))
        promote.enter_registry(run, bundle, line.trained.fitted.history)
    assert decision.promoted
    assert f"not distinguishable from {old.name}" in decision.reason
    assert bundles.current(line.config.bundles) == new
    champion = _champion(registry)
    assert (champion["bundle"], champion["bundle_digest"]) == (new.name, bundle.digest)
    assert bundle.digest != line.trained.bundle.digest


def _stump(line: Line, folder: Path) -> Config:
    """Settings of a model that ranks worse than any baseline."""
    return line.config.model_copy(
        update={
            "bundles": str(folder),
            "fusion": line.config.fusion.model_copy(update={"members": ("trees",)}),
            "trees": line.config.trees.model_copy(update={"rounds": 1, "max_depth": 1}),
        }
    )


@pytest.fixture(scope="module")
def refused(line: Line, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, pipeline.TrainResult]:
    """A training that came to a model worse than any baseline, where no bundle is promoted."""
    settings = _stump(line, tmp_path_factory.mktemp("refused"))
    return settings, pipeline.train(line.spark, settings, TEST_DATE)


def test_a_bundle_below_the_baselines_is_refused_and_score_says_why(
    line: Line, refused: tuple[Config, pipeline.TrainResult]
) -> None:
    settings, trained = refused
    assert not trained.promoted
    assert "below linear" in trained.reason
    with pytest.raises(BundleError, match=f"{trained.bundle.folder.name}, the newest, was refused: .*below linear"):
        pipeline.score(line.spark, settings, TEST_DATE)


def test_a_worse_bundle_does_not_replace_the_promoted_one(
    line: Line,
    refused: tuple[Config, pipeline.TrainResult],
    registry: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = bundles.current(line.config.bundles)
    monkeypatch.setattr("bp_spark.evaluation.promotion.BASELINES", ())
    settings, trained = refused
    # the gate again, of the same fit, where a better bundle is promoted; it reads histories, which the new one does not
    with recorded(line.spark, line.config.model_copy(update={"fusion": settings.fusion}), "train") as run:
        again = promote.promote(run, trained.bundle, lambda: promote.decide(run, trained.fitted, True))
        promote.enter_registry(run, trained.bundle, trained.fitted.history)
    assert not again.promoted
    assert f"worse than {before.name}" in again.reason
    assert bundles.current(line.config.bundles) == before
    assert _champion(registry)["bundle"] == before.name
    # nor would it, had it been fitted anew
    decision = promote.decide_refit(
        Run(line.spark, line.config), trained.bundle, line.trained.fitted, line.trained.bundle, line.trained.reason
    )
    assert not decision.promoted
    assert f"worse than {line.trained.bundle.folder.name}" in decision.reason


SHARED = (
    "spend_",
    "orders_",
    "items_",
    "recency",
    "tenure",
    "frequency",
    "monetary",
    "gap_",
    "overdue",
    "weekly_",
    "trend_",
)
OF_ITEMS = ("items_browsed", "orders_per_browse", "orders_per_cart")


def test_a_bare_order_log_gives_the_features_that_the_whole_source_gives(line: Line, tmp_path: Path) -> None:
    raw, keys = line.lakehouse.read("raw_transactions"), line.lakehouse.read("user_keys")
    some = ingest_job.sampled(keys.select("user_id", "user_key"), 0.03)
    log = raw.join(some, "user_key").select("user_id", "order_id", "ts", "amount")
    log.write.csv(str(tmp_path / "log"), header=True, timestampFormat="yyyy-MM-dd HH:mm:ss")
    columns = "{user_id: user_id, order_id: order_id, ts: ts, amount: amount}"
    (tmp_path / "source.yaml").write_text(
        f"transactions: {{path: 'log/*.csv', format: csv, columns: {columns}}}\n", encoding="utf-8"
    )
    settings = config.load(
        overrides=[
            f"tables.path={tmp_path}/lakehouse",
            "source.kind=files",
            f"source.mapping={tmp_path}/source.yaml",
            WINDOWS,
        ]
    )
    pipeline.featurize(line.spark, settings, [TEST_DATE])
    both = [
        lakehouse.read("user_features").filter(F.col("as_of_date") == F.lit(TEST_DATE)).toPandas().set_index("user_key")
        for lakehouse in (line.lakehouse, Lakehouse(line.spark, settings.tables))
    ]
    names = [name for name in both[0] if name.startswith(SHARED) and not name.startswith(OF_ITEMS)]
    assert len(names) > 25
    bare = both[1].sort_index()[names]
    assert len(bare) > 50
    whole = both[0].loc[bare.index, names]
    pd.testing.assert_frame_equal(whole, bare)


def test_six_weeks_of_events_are_enough_for_scores_of_two_weeks_by_a_model_fitted_anew_with_all_that_is_known(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bp_spark.evaluation.promotion.BASELINES", ())
    first, last = span(line.lakehouse)[0], date(2017, 2, 12)
    monkeypatch.setattr("bp_spark.training.dataset.span", lambda _: (first, last))
    donor = _of_another_platform(line, tmp_path / "donor")
    updates = {
        "bundles": str(tmp_path / "bundles"),
        "labels": LabelsConfig(cutoffs=2),
        "fusion": line.config.fusion.model_copy(update={"members": ("linear",)}),
        "tracking": line.config.tracking.model_copy(update={"uri": None}),
        "training": line.config.training.model_copy(update={"from_bundle": str(donor)}),
        # of fewer than 200 users, a linear model's ranks differ from those of its refit by chance
        "evaluation": line.config.evaluation.model_copy(update={"margin": 0.1}),
    }
    settings, tomorrow = line.config.model_copy(update=updates), last + timedelta(days=1)
    trained = pipeline.train(line.spark, settings)
    days = (last - first).days
    assert f"events reach over {days} days; to predict 90 takes 210, and they allow 14: scores" in caplog.text
    assert trained.promoted, trained.reason
    assert (trained.bundle.horizon_days, trained.bundle.horizons.main) == (14, 14)
    assert bundles.current(settings.bundles) == trained.bundle.folder

    # what passed is fitted anew, without a test date
    lineage, horizon = trained.bundle.manifest["lineage"], timedelta(days=14)
    assert lineage["started_from"] == bundles.load(donor).digest
    started = [stage["figures"] for stage in trained.stages if stage["stage"] == "warm start"]
    # a linear model has no encoder; the level of 90 days is not taken for 14 days, which start at the default
    expected = {"purchase_process": "True", "encoder": "False", "projection": "False", "level_sd": "0.050"}
    assert [{name: stage[name] for name in expected} for stage in started] == [expected] * 2
    assert lineage["test_date"] == str(tomorrow), "the later fit has the same horizon"
    learned = line.lakehouse.read("training_set", lineage["training_set"]["version"]).filter("complete")
    assert learned.agg(F.max("as_of_date")).collect()[0][0] == tomorrow - horizon
    assert trained.bundle.test_date == str(trained.fitted.test_date) == str(last - horizon)
    judged = bundles.load(tmp_path / "bundles" / lineage["judged"]["bundle"])
    assert judged.manifest["lineage"]["test_date"] == trained.bundle.test_date
    decision = decisions.decision(judged.folder)
    assert decision is not None
    assert not decision["promoted"]
    assert f"to be fitted anew as of {tomorrow}" in decision["reason"]
    metrics = line.lakehouse.read("metrics").drop("run_id").toPandas().set_index("bundle_digest")
    pd.testing.assert_frame_equal(*(metrics.loc[[b.digest]].reset_index(drop=True) for b in (judged, trained.bundle)))

    assert pipeline.score(line.spark, settings, tomorrow).users > 100
    scores = _night(line.lakehouse, tomorrow)
    assert set(scores["horizon_days"]) == {14}
    assert [dict(spend)[14] for spend in scores["expected_by_horizon"]] == list(scores["expected_spend"])

    # what came true is held against it as soon as its own days are over
    drift = pipeline.check_drift(line.spark, settings, tomorrow)
    (calibration,) = [row["value"] for row in drift.rows if (row["kind"], row["metric"]) == ("realised", "calibration")]
    spend = labels.future_spend(line.lakehouse.read("user_daily"), [tomorrow], 14).toPandas().set_index("user_key")
    spent = spend["label_spend"].reindex(scores["user_key"]).clip(lower=0).sum()
    assert calibration == pytest.approx(scores["expected_spend"].sum() / spent)

    # the next one takes its place; it is compared with the judged one, which has not seen what both are judged by
    again = pipeline.train(line.spark, settings)
    assert f"from {judged.folder.name}, which {trained.bundle.folder.name} was fitted anew from, on" in again.reason
    assert "was trained on labels" not in again.reason
    assert bundles.current(settings.bundles) == again.bundle.folder != trained.bundle.folder

    # fewer days don't take its place
    fewer = settings.labels.model_copy(update={"shorter_horizons": (7,)})
    with pytest.raises(DataError, match="they allow 7, but the promoted bundle predicts 14 and stays"):
        pipeline.train(line.spark, settings.model_copy(update={"labels": fewer}))
