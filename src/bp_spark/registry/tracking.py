"""Bundles -> versions of a registered model, trainings and trials -> runs, in the MLflow store at ``tracking.uri``.

A version is an MLflow ``pyfunc`` model: the bundle's own files, this package's code and the packages that it needs. MLflow
loads it where bp-spark isn't installed. Nothing is pickled, and the bundle proves itself unchanged as anywhere else.

A store receives settings, figures, names, digests, the address and version of the training set, and the bundle. It receives
no row of a user: the input example is invented. MLflow's reports on its usage are switched off, unless
``MLFLOW_DISABLE_TELEMETRY`` says otherwise.

The folder of bundles comes first. A training writes its bundle and moves ``bundles/current`` before it says anything here, so
a store that can't be reached, or a process that dies in between, leaves a store that lags behind and never a lost bundle;
:func:`publish`, called by the next training or by ``bp-spark publish``, brings it up to date.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pyspark import TaskContext

from bp_spark.core.config import Config, SearchConfig, TrackingConfig
from bp_spark.core.errors import BundleError, ConfigError, TrackingError
from bp_spark.core.version import __version__
from bp_spark.features import catalogue
from bp_spark.lakehouse.tables import SCORES
from bp_spark.model.columns import Ragged, ragged
from bp_spark.registry import bundle as bundles
from bp_spark.registry import signing
from bp_spark.registry.bundle import Bundle
from bp_spark.registry.predictions import PREDICTION_COLUMNS, as_frame, fit_to_task, predict

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.data.dataset import Dataset
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature
    from mlflow.models.model import ModelInfo


SCHEME = "models:/"
"""What the address of a bundle in the registry begins with."""

_ADDRESS = re.compile(rf"{SCHEME}(?P<name>[^/:@]+)(@(?P<alias>[A-Za-z][\w-]*)|/(?P<version>\d+))")
_SQLITE = "sqlite:///"
_MODEL = "model"
_DIGEST = "bundle_digest"
_PARAMS_AT_ONCE = 100
_PACKAGES = (
    "cryptography",
    "delta-spark",
    "mlflow-skinny",
    "numpy",
    "pandas",
    "pyarrow",
    "pydantic",
    "pyspark",
    "pyyaml",
    "scikit-learn",
    "scipy",
    "threadpoolctl",
    "xgboost-cpu",
)
"""Packages that a logged model imports; :data:`_NETWORK_PACKAGES` are added where a member is a network."""
_NETWORK_PACKAGES = ("safetensors", "torch", "transformers")
_EXAMPLES = {"int": np.int32(1), "bigint": np.int64(0), "float": np.float32(1)}
"""What the invented user of the input example has in each column, by SQL type."""
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_NOISY = ("alembic", "mlflow.pyfunc", "mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store")
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


Settings = Mapping[str, object]


@dataclass(frozen=True)
class Trial:
    """One try: its settings, its figure (NaN where the settings can't be, and why), how long it took."""

    number: int
    settings: Settings
    value: float
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class Published:
    """Where the store stands: the version that a bundle is, and the one that the alias names (``None``: no bundle)."""

    version: str
    promoted: str | None


def check(config: TrackingConfig) -> None:
    """Make sure, in seconds, that the store answers and has a place for bundles; nothing to do where tracking is off.

    Raises:
        TrackingError: it doesn't, or can't be written to for want of that place.
    """
    if config.uri is None:
        return
    # MLflow's own patience with a server that doesn't answer is four minutes, which is right once there is much to lose
    before = {name: os.environ.get(name) for name in _IMPATIENT}
    os.environ.update(_IMPATIENT)
    try:
        with _asking(config.uri) as client:
            _experiment(client, config)
            _require_model(client, config)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def publish(
    config: Config, bundle: Bundle, history: Sequence[Mapping[str, float]] = (), started: datetime | None = None
) -> Published:
    """Record a bundle of ``config.bundles`` as a run and as a version, and have the alias name what ``bundles/current`` names.

    A bundle that is a version already isn't recorded again. The alias moves last, in one step; where it has to name a bundle
    that an earlier call failed to record, that one is recorded first. Refused bundles are versions too: the tag ``decision``
    and the description say why. All bundles of a registered model belong to one folder, for its ``current`` decides.

    Args:
        bundle: what to record; its metrics, settings and lineage are those of its manifest.
        history: figures of the transformer's epochs, where they are at hand; see :func:`bp_spark.training.fit.run_epochs`.
        started: when the training began, where that is known.

    Raises:
        ConfigError: ``tracking.uri`` is null.
        TrackingError: the store can't be reached or refuses; calling again goes on from there.
    """
    settings = config.tracking
    with _asking(_uri(settings)) as client:
        experiment = _experiment(client, settings)
        _require_model(client, settings)
        version = _recorded(client, settings, experiment, bundle, history, started)
        promoted = _promoted(config, bundle)
        if promoted is None:
            return Published(version, None)
        named = version
        if promoted.digest != bundle.digest:
            named = _recorded(client, settings, experiment, promoted, (), None)
        client.set_registered_model_alias(settings.model, settings.alias, named)
        return Published(version, named)


def record_search(
    config: TrackingConfig, search: SearchConfig, run_id: str, test_date: date, trials: Sequence[Trial], ended: datetime
) -> None:
    """Record a search as a run, with one below it for each trial: its settings, its metric or error, how long it took.

    Nothing to do where tracking is off.

    Args:
        run_id: of the table ``runs``.
        ended: when the last trial did.

    Raises:
        TrackingError: the store can't be reached or refuses; the trials are in the table ``trials``.
    """
    if config.uri is None or not trials:
        return
    with _asking(config.uri) as client:
        experiment = _experiment(client, config)
        tags = {"stage": "search", "run_id": run_id, "test_date": test_date.isoformat(), "code_version": __version__}
        start = ended - timedelta(seconds=sum(trial.seconds for trial in trials))
        parent = client.create_run(experiment, _millis(start), tags, f"search-{run_id}").info.run_id
        _log_params(client, parent, {f"search.{key}": value for key, value in search.model_dump(mode="json").items()})
        for trial in trials:
            tags = {"mlflow.parentRunId": parent, "stage": "trial", **({"error": trial.error} if trial.error else {})}
            run = client.create_run(experiment, _millis(start), tags, f"trial-{trial.number}").info.run_id
            start += timedelta(seconds=trial.seconds)
            _log_params(client, run, trial.settings)
            _log_metrics(client, run, start, {search.metric: trial.value, "seconds": trial.seconds})
            client.set_terminated(run, "FAILED" if trial.error else "FINISHED", _millis(start))
        client.set_terminated(parent, "FINISHED", _millis(ended))


def fetch(config: Config, address: str) -> Bundle:
    """The bundle of a version, in a folder of ``training.work_dir`` that a later call finds it in.

    Args:
        address: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

    Raises:
        ConfigError: it is no such address, or ``tracking.uri`` is null.
        BundleError: there is no such version, it is no bundle, or not the one that was registered.
        TrackingError: the store can't be reached.
    """
    asked = _ADDRESS.fullmatch(address)
    if asked is None:
        raise ConfigError(f"bundle {address!r}: must be {SCHEME}NAME@ALIAS or {SCHEME}NAME/VERSION")
    uri = _uri(config.tracking)
    with _asking(uri) as client:
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        name = asked["name"]
        try:
            if asked["alias"]:
                version = client.get_model_version_by_alias(name, asked["alias"])
            else:
                version = client.get_model_version(name, asked["version"])
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise BundleError(f"{address}: is not in the registry at {uri}") from None
        digest = version.tags.get(_DIGEST, "")
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise BundleError(f"{address}: version {version.version} is no bundle of bp-spark")
        place = Path(config.training.work_dir).absolute() / "registry" / digest
        if not place.exists():
            # the files of Unity Catalog are handed out by the registry alone
            source = f"{SCHEME}{name}/{version.version}"
            if not uri.startswith("databricks"):
                source = client.get_model_version_download_uri(name, version.version)
            place.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=place.parent) as draft:
                found = download_artifacts(source, dst_path=draft, tracking_uri=uri, registry_uri=_registry_uri(uri))
                bundle = bundles.load(Path(found) / "data" / "bundle", signing.public_key(config.signing))
                if bundle.digest != digest:
                    raise BundleError(f"{address}: the files are those of another bundle, {bundle.digest[:12]}")
                _place(bundle.folder, place)
    return bundles.load(place, signing.public_key(config.signing))


class Scorer:
    """Answer for ``mlflow.pyfunc``, as :func:`bp_spark.registry.predictions.predict` does for a scoring run."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def predict(self, model_input: pd.DataFrame) -> pd.DataFrame:
        """Return a row of answers for each row of ``user_features``, under the same index."""
        columns: dict[str, np.ndarray | Ragged] = {name: model_input[name].to_numpy() for name in model_input.columns}
        for column in catalogue.SEQUENCE_COLUMNS:
            if column.type == "array<float>" and column.name in columns:
                # as the table has them: the signature takes doubles, for JSON knows no floats
                history = ragged(columns[column.name])
                columns[column.name] = Ragged(history.values.astype(np.float32), history.lengths)
        return as_frame(predict(self.bundle, columns)).set_index(model_input.index)


def _load_pyfunc(path: str) -> Scorer:
    bundle = bundles.load(path)
    if (task := TaskContext.get()) is not None:
        fit_to_task(bundle, task)
    return Scorer(bundle)


@contextmanager
def _asking(uri: str) -> Iterator[MlflowClient]:
    """A client of the store; what it fails with becomes a TrackingError that names the setting."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # mlflow takes seconds to import: other stages don't pay for it
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        if uri.startswith(_SQLITE):
            path = Path(uri.removeprefix(_SQLITE))
            path.parent.mkdir(parents=True, exist_ok=True)
            # MLflow would try for minutes to open what is no database
            with closing(sqlite3.connect(path)) as file:
                file.execute("PRAGMA schema_version")
        yield MlflowClient(uri, _registry_uri(uri))
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrackingError(f"tracking.uri {uri}: {said[:500]}") from error


def _uri(config: TrackingConfig) -> str:
    if config.uri is None:
        raise ConfigError("tracking.uri: is null, so there is no registry of bundles")
    return config.uri


def _registry_uri(uri: str) -> str:
    """Of the registry that belongs to a store: on Databricks Unity Catalog."""
    return re.sub("^databricks", "databricks-uc", uri)


def _experiment(client: MlflowClient, config: TrackingConfig) -> str:
    found = client.get_experiment_by_name(config.experiment)
    if found is not None:
        return str(found.experiment_id)
    local = _uri(config).startswith(_SQLITE)
    return client.create_experiment(config.experiment, Path(config.artifacts).absolute().as_uri() if local else None)


def _require_model(client: MlflowClient, config: TrackingConfig) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(config.model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(config.model, description="Expected spend of users; the bundles of bp-spark.")


def _promoted(config: Config, bundle: Bundle) -> Bundle | None:
    """What ``bundles/current`` names; ``None`` where it names nothing that can be used."""
    try:
        folder = bundles.current(config.bundles)
        if folder.resolve() == bundle.folder.resolve():
            return bundle
        return bundles.load(folder, signing.public_key(config.signing))
    except BundleError:
        return None


def _recorded(
    client: MlflowClient,
    config: TrackingConfig,
    experiment: str,
    bundle: Bundle,
    history: Sequence[Mapping[str, float]],
    started: datetime | None,
) -> str:
    """The version of a bundle, which is recorded if it is none yet; a run that was left unfinished is gone on with."""
    runs = client.search_runs([experiment], f"tags.{_DIGEST} = '{bundle.digest}'")
    version = _existing(client, config.model, bundle, runs)
    if version is not None:
        _describe(client, version, bundle)
        return str(version.version)
    manifest, lineage = bundle.manifest, bundle.manifest["lineage"]
    ended = datetime.fromisoformat(manifest["created_at"])
    tags = {
        _DIGEST: bundle.digest,
        "bundle": bundle.folder.name,
        "code_version": manifest["code_version"],
        "run_id": lineage["run_id"],
        "test_date": bundle.judged_on,
        "training_set_version": str(lineage["training_set"]["version"]),
    }
    decision = bundles.decision(bundle.folder)
    verdict = {"decision": "none" if decision is None else "promoted" if decision["promoted"] else "refused"}
    if runs:
        run = runs[0]
    else:
        begun = _millis(started or ended)
        run = client.create_run(experiment, begun, {**tags, **verdict, "stage": "train"}, bundle.folder.name)
    run_id = run.info.run_id
    _log_params(client, run_id, _flat(lineage["config"]))
    rows = manifest["metrics"]["rows"]
    _log_metrics(client, run_id, ended, {f"{r['population']}/{r['member']}/{r['metric']}": r["value"] for r in rows})
    for epoch in history:
        figures = {f"transformer/{name}": value for name, value in epoch.items() if name != "epoch"}
        _log_metrics(client, run_id, ended, figures, int(epoch["epoch"]))
    with _active_run(_uri(config), run_id):
        import mlflow

        mlflow.log_input(_training_set(lineage["training_set"]), context="training")
        registered = _log_model(bundle, config.model, {**tags, **verdict}).registered_model_version
    _describe(client, client.get_model_version(config.model, str(registered)), bundle)
    client.set_terminated(run_id, "FINISHED", _millis(ended))
    return str(registered)


def _existing(client: MlflowClient, model: str, bundle: Bundle, runs: Sequence[Run]) -> ModelVersion | None:
    """Return the version of a bundle; a search in Unity Catalog gives no tags, so runs and their models tell it, too."""
    run_ids = {run.info.run_id for run in runs}
    model_ids = {output.model_id for run in runs if run.outputs for output in run.outputs.model_outputs}
    for version in client.search_model_versions(f"name = '{model}'"):
        if version.tags.get(_DIGEST) == bundle.digest or version.run_id in run_ids or version.model_id in model_ids:
            return version
    return None


def _describe(client: MlflowClient, version: ModelVersion, bundle: Bundle) -> None:
    """Give a version the reason of the bundle's decision as its description."""
    decision = bundles.decision(bundle.folder)
    reason = "" if decision is None else str(decision["reason"])
    if reason and not version.description:
        client.update_model_version(version.name, version.version, description=reason)


@contextmanager
def _active_run(uri: str, run_id: str) -> Iterator[None]:
    """Make a run MLflow's active one. The caller's own store, experiment and import path come back at the end."""
    import mlflow
    from mlflow.tracking import fluent

    store = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    experiment, import_path = fluent._active_experiment_id, list(sys.path)
    mlflow.set_tracking_uri(uri)
    registry = mlflow.get_registry_uri()
    try:
        if registry != _registry_uri(uri):
            mlflow.set_registry_uri(_registry_uri(uri))
        # MLflow refuses to activate a run of another experiment than the one that the caller has set
        fluent._active_experiment_id = None
        with mlflow.start_run(run_id=run_id, nested=True):
            yield
    finally:
        fluent._active_experiment_id = experiment
        if mlflow.get_registry_uri() != registry:
            mlflow.set_registry_uri(registry)
        mlflow.set_tracking_uri(store)  # type: ignore[arg-type]
        # MLflow loads the model once to try its example, and puts the model's code first
        sys.path[:] = import_path


def _training_set(source: Mapping[str, Any]) -> Dataset:
    """Describe the table that a bundle was trained on, by address and version: no row of it is read."""
    from mlflow.data.delta_dataset_source import DeltaDatasetSource
    from mlflow.data.meta_dataset import MetaDataset

    table = DeltaDatasetSource(path=str(source["location"]), delta_table_version=int(source["version"]))
    return MetaDataset(table, name="training_set")  # type: ignore[abstract]


def _log_model(bundle: Bundle, name: str, tags: Mapping[str, str]) -> ModelInfo:
    """Log the bundle's files, the code and the requirements as a model of the active run, and register it."""
    from mlflow import pyfunc

    with TemporaryDirectory() as folder:
        data = shutil.copytree(bundle.folder, Path(folder) / "bundle")
        code = Path(folder) / "bp_spark"
        _copy_code(resources.files("bp_spark"), code)
        return pyfunc.log_model(
            name=_MODEL,
            loader_module=__name__,
            data_path=str(data),
            code_paths=[str(code)],
            signature=_signature(bundle),
            input_example=_example(bundle),
            pip_requirements=requirements(bundle),
            registered_model_name=name,
            tags=dict(tags),
        )


def _copy_code(package: Traversable, target: Path) -> None:
    """Copy a package's modules, also out of an archive: jobs on a cluster may import this package from one."""
    target.mkdir()
    for entry in package.iterdir():
        if entry.name.endswith(".py"):
            (target / entry.name).write_bytes(entry.read_bytes())
        elif entry.is_dir() and entry.name != "__pycache__":
            _copy_code(entry, target / entry.name)


def requirements(bundle: Bundle) -> list[str]:
    """Return what a bundle needs to predict, as pip takes it: each package in the version that is installed."""
    names = _PACKAGES + (_NETWORK_PACKAGES if "transformer" in bundle.members else ())
    return sorted(_requirement(name) for name in names)


def _requirement(name: str) -> str:
    """Pin the installed version. A platform's own Spark is no installed package: this package's range is taken then."""
    with suppress(metadata.PackageNotFoundError):
        return f"{name}=={metadata.version(name).partition('+')[0]}"
    with suppress(metadata.PackageNotFoundError):
        for declared in metadata.requires("bp-spark") or ():
            if re.match(rf"{name}\s*[<>=!~]", declared):
                return declared
    return name


def _example(bundle: Bundle) -> pd.DataFrame:
    """One row of input columns that no user has: ones, and a history of one event."""
    kinds = {column.name: column.type for column in catalogue.SEQUENCE_COLUMNS}
    row: dict[str, object] = {}
    for name in bundle.required_columns:
        value = _EXAMPLES[kinds.get(name, "float").removeprefix("array<").removesuffix(">")]
        row[name] = np.array([value]) if name in kinds else value
    return pd.DataFrame({name: [value] for name, value in row.items()})


def _signature(bundle: Bundle) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array, Object, Property, TensorSpec

    # what is in a JSON list is a long or a double, and MLflow narrows neither
    elements = {"int": DataType.long, "bigint": DataType.long, "float": DataType.double}
    arrays = {
        column.name: Array(elements[column.type.removeprefix("array<").removesuffix(">")])
        for column in catalogue.SEQUENCE_COLUMNS
    }
    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(arrays.get(name, DataType.float), name) for name in dict.fromkeys(bundle.required_columns)
    ]
    reason = Object(
        [
            Property("group", DataType.string),
            Property("contribution", DataType.double),
            Property("feature", DataType.string, required=False),
            Property("value", DataType.double, required=False),
        ]
    )
    kinds: dict[str, DataType | Array] = {"double": DataType.double, "string": DataType.string, "array": Array(reason)}
    answers = {c.name: c.type.partition("<")[0] for c in SCORES.columns if c.name in PREDICTION_COLUMNS}
    # MLflow knows no map whose keys are numbers: expected_by_horizon is answered without being declared
    outputs: list[ColSpec | TensorSpec] = [
        ColSpec(kinds[kind], name) for name, kind in answers.items() if kind in kinds
    ]
    return ModelSignature(Schema(inputs), Schema(outputs))


def _log_params(client: MlflowClient, run_id: str, values: Mapping[str, object]) -> None:
    from mlflow.entities import Param

    params = [Param(key, value if isinstance(value, str) else json.dumps(value)) for key, value in values.items()]
    for first in range(0, len(params), _PARAMS_AT_ONCE):
        client.log_batch(run_id, params=params[first : first + _PARAMS_AT_ONCE])


def _log_metrics(
    client: MlflowClient, run_id: str, at: datetime, figures: Mapping[str, float | None], step: int = 0
) -> None:
    """Log what is a number; a figure that the data can't tell is left out."""
    from mlflow.entities import Metric

    known = {name: value for name, value in figures.items() if value is not None and not math.isnan(value)}
    client.log_batch(run_id, [Metric(name, value, _millis(at), step) for name, value in known.items()])


def _flat(settings: Mapping[str, Any]) -> dict[str, object]:
    """``section.key`` -> value."""
    flat: dict[str, object] = {}
    for section, values in settings.items():
        flat |= {f"{section}.{key}": v for key, v in values.items()} if isinstance(values, dict) else {section: values}
    return flat


def _millis(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def _place(found: Path, place: Path) -> None:
    """Put a folder where it belongs in one step; another process may have been faster."""
    try:
        found.rename(place)
    except OSError:
        if not place.exists():
            raise
