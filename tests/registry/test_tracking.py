"""The registry and the record, in a real MLflow store: versions of bundles, the alias, and errors where there is no store."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.tracking import fluent
from pyspark.sql import SparkSession

import bp_spark
from bp_spark import pipeline
from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.errors import BundleError, ConfigError, TrackingError
from bp_spark.lakehouse.run import Run
from bp_spark.registry import bundle as bundles
from bp_spark.registry import mlflow_store
from bp_spark.registry.bundle import Bundle
from bp_spark.registry.predictions import as_frame, predict
from bp_spark.registry.publishing import Published, publish
from bp_spark.registry.searches import Trial, record_search
from bp_spark.training import promote
from tests.support.trained_bundles import features, fitted_members, write_bundle

DESCRIBED = (
    "MLmodel",
    "conda.yaml",
    "input_example.json",
    "python_env.yaml",
    "requirements.txt",
    "serving_input_example.json",
)
"""Files of a version beside the bundle and the code."""


@pytest.fixture(scope="module")
def members() -> list[Any]:
    return fitted_members()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def settings(store: Path, tmp_path: Path) -> Config:
    """A registered model of the test's own, in the store of them all."""
    return config.load(
        overrides=[
            f"tracking.uri=sqlite:///{store}/new/mlflow.db",
            f"tracking.artifacts={store}/artifacts",
            f"tracking.model={tmp_path.name}",
            f"bundles={tmp_path}/bundles",
            f"training.work_dir={tmp_path}/work",
        ]
    )


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """MLflow as another test finds it."""
    yield
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    fluent._active_experiment_id = None
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)


@pytest.fixture
def client(settings: Config) -> MlflowClient:
    """What a user of MLflow works with."""
    mlflow.set_tracking_uri(settings.tracking.uri)
    return MlflowClient()


@pytest.fixture
def trained(settings: Config, members: list[Any]) -> Callable[..., Bundle]:
    """Leaves in the folder of bundles what a training leaves."""

    def train(name: str, promoted: bool = True, reason: str = "no worse than linear 0.81") -> Bundle:
        return write_bundle(settings, members, name, promoted, reason)

    return train


def versions(client: MlflowClient, settings: Config) -> list[str]:
    return sorted(
        str(version.version) for version in client.search_model_versions(f"name = '{settings.tracking.model}'")
    )


def stored(client: MlflowClient, settings: Config, version: str) -> Path:
    """Folder of a version's files."""
    return Path(client.get_model_version_download_uri(settings.tracking.model, version).removeprefix("file://"))


def champion(client: MlflowClient, settings: Config) -> str:
    return str(client.get_model_version_by_alias(settings.tracking.model, "champion").version)


def test_a_promoted_bundle_is_the_version_that_the_alias_names_and_says_where_it_comes_from(
    settings: Config, trained: Callable[..., Bundle], client: MlflowClient
) -> None:
    bundle = trained("one")
    history = [{"epoch": epoch, "train_loss": 1.0 / epoch, "valid_loss": 2.0 / epoch} for epoch in (1, 2, 3)]
    started = datetime.now(UTC) - timedelta(minutes=5)
    assert publish(settings, bundle, history, started) == Published("1", "1")
    version = client.get_model_version_by_alias(settings.tracking.model, "champion")
    assert version.tags == {
        "bundle_digest": bundle.digest,
        "bundle": "one",
        "code_version": bundle.manifest["code_version"],
        "run_id": "one",
        "test_date": "2017-10-03",
        "training_set_version": "3",
        "decision": "promoted",
    }
    assert version.description == "no worse than linear 0.81"
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert 290_000 < run.info.end_time - run.info.start_time < 310_000
    assert run.data.params["labels.horizon_days"] == "90"
    assert len(run.data.params) > 100
    losses = client.get_metric_history(version.run_id, "transformer/valid_loss")
    assert [(loss.step, loss.value) for loss in losses] == [(1, 2.0), (2, 1.0), (3, 2.0 / 3)]
    figures = {name: value for name, value in run.data.metrics.items() if not name.startswith("transformer")}
    reasons = {"reasons/users": 100, "reasons/error": 0.25, "reasons/same_first": 0.8}
    assert figures == {"all/fused/gini": 0.87, "all/linear/gini": 0.81, **reasons}


def test_what_is_loaded_by_alias_answers_as_scoring_does_without_a_pickle(
    settings: Config, trained: Callable[..., Bundle], client: MlflowClient
) -> None:
    bundle, rows = trained("one"), features()
    publish(settings, bundle)
    source = stored(client, settings, "1")
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    own = {Path("data/bundle", path.name) for path in bundle.folder.iterdir()}
    package = Path(bp_spark.__file__).parent
    code = {Path("code/bp_spark", path.relative_to(package)) for path in package.rglob("*.py")}
    assert files == own | code | {Path(name) for name in DESCRIBED}
    loaded = mlflow.pyfunc.load_model(f"models:/{settings.tracking.model}@champion")
    # a user's key is none of the model's business
    answers = loaded.predict(rows.assign(user_key=rows.index))
    expected = as_frame(predict(bundle, {name: rows[name].to_numpy() for name in rows}))
    pd.testing.assert_frame_equal(answers, expected.set_axis(rows.index), check_exact=True)
    assert answers["reasons"].map(len).ge(2).all()
    with pytest.raises(mlflow.exceptions.MlflowException, match="spend_90d"):
        loaded.predict(rows.drop(columns="spend_90d"))


def test_the_training_set_is_an_input_of_the_run_by_address_and_version(
    settings: Config, trained: Callable[..., Bundle], client: MlflowClient
) -> None:
    publish(settings, trained("one"))
    run = client.get_run(client.get_model_version(settings.tracking.model, "1").run_id)
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.source_type) == ("training_set", "delta_table")
    source = json.loads(used.dataset.source)
    assert (source["path"], source["delta_table_version"]) == ("lakehouse/training_set", 3)
    assert {tag.key: tag.value for tag in used.tags} == {"mlflow.data.context": "training"}


def test_the_caller_of_a_training_keeps_the_own_store_experiment_and_run(
    settings: Config, trained: Callable[..., Bundle], tmp_path: Path
) -> None:
    own = f"sqlite:///{tmp_path}/own.db"
    mlflow.set_tracking_uri(own)
    experiment = MlflowClient(own).create_experiment("own", f"{tmp_path}/own")
    mlflow.set_experiment(experiment_id=experiment)
    import_path = list(sys.path)
    with mlflow.start_run() as run:
        publish(settings, trained("one"))
        assert mlflow.active_run().info.run_id == run.info.run_id
        mlflow.log_param("of", "the caller")
    assert (mlflow.get_tracking_uri(), sys.path) == (own, import_path)
    assert mlflow.get_run(run.info.run_id).data.params == {"of": "the caller"}


def test_a_refused_bundle_is_a_version_with_its_reason_and_the_alias_stays(
    settings: Config, trained: Callable[..., Bundle], client: MlflowClient
) -> None:
    refused = trained("zero", promoted=False, reason="below linear 0.85")
    assert publish(settings, refused) == Published("1", None)
    publish(settings, trained("one"))
    assert publish(settings, trained("two", promoted=False)) == Published("3", "2")
    assert champion(client, settings) == "2"
    version = client.get_model_version(settings.tracking.model, "1")
    assert (version.tags["decision"], version.description) == ("refused", "below linear 0.85")


def test_a_training_that_died_before_its_entry_is_made_up_for_by_the_next(
    settings: Config, trained: Callable[..., Bundle], client: MlflowClient
) -> None:
    publish(settings, trained("one"))
    unheard = trained("two")
    assert champion(client, settings) == "1"
    publish(settings, trained("three", promoted=False))
    named = client.get_model_version_by_alias(settings.tracking.model, "champion")
    assert named.tags["bundle_digest"] == unheard.digest
    before = versions(client, settings)
    assert publish(settings, unheard).promoted == str(named.version)
    assert versions(client, settings) == before == ["1", "2", "3"]


def test_an_entry_that_was_cut_short_is_gone_on_with(
    settings: Config, trained: Callable[..., Bundle], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = trained("one")

    def full(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_model_artifacts", full)
        with pytest.raises(TrackingError, match=r"tracking\.uri sqlite.*disk full"):
            publish(settings, bundle)
    assert versions(client, settings) == []
    assert publish(settings, bundle) == Published("1", "1")
    experiment = client.get_experiment_by_name("bp-spark")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.bundle_digest = '{bundle.digest}'")
    assert [run.info.status for run in runs] == ["FINISHED"]


def test_a_version_is_fetched_once_and_verified(
    settings: Config, trained: Callable[..., Bundle], client: MlflowClient
) -> None:
    first, second = trained("one"), trained("two")
    for bundle in (first, second):
        publish(settings, bundle)
    name = settings.tracking.model
    fetched = bundles.load_promoted(settings, f"models:/{name}@champion")
    assert fetched.digest == second.digest
    assert fetched.folder.is_relative_to(settings.training.work_dir)
    places = [stored(client, settings, number) / "data/bundle" for number in ("1", "2")]
    shutil.rmtree(places[1])
    assert bundles.load_promoted(settings, f"models:/{name}/2").digest == second.digest
    # the files of another bundle, whole as they are, in the place of the first
    shutil.rmtree(places[0])
    shutil.copytree(second.folder, places[0])
    with pytest.raises(
        BundleError, match=f"models:/{name}/1: the files are those of another bundle, {second.digest[:12]}"
    ):
        bundles.load_promoted(settings, f"models:/{name}/1")
    assert [path.name for path in fetched.folder.parent.iterdir()] == [second.digest]


@pytest.mark.parametrize("which", ["@champion", "/7"])
def test_a_version_that_is_not_there_is_named(settings: Config, client: MlflowClient, which: str) -> None:
    with pytest.raises(BundleError, match=f"models:/nobody{which}: is not in the registry at sqlite"):
        bundles.load_promoted(settings, f"models:/nobody{which}")


@pytest.mark.parametrize("address", ["models:/", "models:/a", "models:/a/b/1", "models:/a@", "models:/a/latest"])
def test_what_is_no_address_is_refused(settings: Config, address: str) -> None:
    with pytest.raises(ConfigError, match="must be models:/NAME@ALIAS or models:/NAME/VERSION"):
        bundles.load_promoted(settings, address)


def test_every_trial_is_a_run_below_that_of_its_search(settings: Config, client: MlflowClient) -> None:
    trials = [
        Trial(0, {"trees.max_depth": 3, "network.loss": "ziln"}, 0.8, 20.0),
        Trial(1, {"trees.max_depth": 9, "network.loss": "mse"}, float("nan"), 10.0, "the loss is not finite"),
    ]
    search = settings.search.model_copy(update={"metric": "spearman"})
    record_search(settings.tracking, search, "run7", date(2017, 10, 3), trials, datetime.now(UTC))
    experiment = client.get_experiment_by_name("bp-spark")
    assert experiment is not None
    (parent,) = client.search_runs([experiment.experiment_id], "tags.run_id = 'run7'")
    below = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    first, second = sorted(below, key=lambda run: run.info.start_time)
    assert first.data.params == {"trees.max_depth": "3", "network.loss": "ziln"}
    assert first.data.metrics == {"spearman": 0.8, "seconds": 20.0}
    assert second.data.metrics == {"seconds": 10.0}
    assert second.data.tags["error"] == "the loss is not finite"
    assert [run.info.status for run in (first, second, parent)] == ["FINISHED", "FAILED", "FINISHED"]
    assert parent.info.end_time - parent.info.start_time == 30_000


def test_a_store_that_is_not_there_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database" * 100)
    nobody = cast(SparkSession, None)
    for uri in ("http://127.0.0.1:9", f"sqlite:///{tmp_path}/file", f"sqlite:///{tmp_path}/file/mlflow.db"):
        settings = config.load(overrides=[f"tracking.uri={uri}"])
        for stage in (pipeline.train, pipeline.search):
            with pytest.raises(TrackingError, match=f"tracking.uri {uri}: "):
                stage(nobody, settings)


class Overloaded(BaseHTTPRequestHandler):
    """A server that refuses every request, and how often it did."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_error(503)

    do_POST = do_GET  # noqa: N815 as the server calls it

    def log_message(self, format: str, *args: object) -> None:
        """The test's output is no place for it."""


def test_a_server_that_has_no_time_is_not_asked_for_minutes() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Overloaded) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            settings = config.load(overrides=[f"tracking.uri=http://127.0.0.1:{server.server_port}"])
            with pytest.raises(TrackingError, match=r"tracking\.uri"):
                mlflow_store.check(settings.tracking)
        finally:
            server.shutdown()
    # MLflow itself would ask eight times, pausing twice as long each time
    assert 1 <= Overloaded.asked <= 2


def test_a_store_that_went_away_costs_an_entry_and_no_bundle(
    settings: Config, trained: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = trained("one")
    (tmp_path / "file").touch()
    gone = config.changed(settings, {"tracking.uri": f"sqlite:///{tmp_path}/file/mlflow.db"})
    run = Run(cast(SparkSession, None), gone)
    with run.stage("train"):
        pass
    with pytest.raises(TrackingError, match=f"bundle is written: bp-spark publish --bundle {bundle.folder}$"):
        promote.enter_registry(run, bundle, ())
    assert bundles.load(bundles.current(settings.bundles)).digest == bundle.digest


def test_without_a_store_there_is_neither_record_nor_registry(
    settings: Config, trained: Callable[..., Bundle], tmp_path: Path
) -> None:
    off = config.changed(settings, {"tracking.uri": None})
    mlflow_store.check(off.tracking)
    with pytest.raises(ConfigError, match=r"tracking\.uri: is null"):
        publish(off, trained("one"))
    with pytest.raises(ConfigError, match=r"tracking\.uri: is null"):
        bundles.load_promoted(off, "models:/purchasing-power@champion")
