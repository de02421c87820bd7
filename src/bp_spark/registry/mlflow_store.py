"""A client of the MLflow store at ``tracking.uri``: a SQLite file, a server or Databricks.

MLflow's reports on its usage are switched off, unless ``MLFLOW_DISABLE_TELEMETRY`` says otherwise. Whatever a store fails
with becomes a TrackingError that names the setting.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bp_spark.core import disk
from bp_spark.core.config import Config, TrackingConfig
from bp_spark.core.errors import BundleError, ConfigError, TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

SCHEME = "models:/"
"""What the address of a bundle in the registry begins with."""
FETCHED = "registry"
"""Folder of ``training.work_dir`` that holds bundles of the registry."""
DIGEST_TAG = "bundle_digest"
"""Tag of runs and versions: the digest of their bundle."""

_ADDRESS = re.compile(rf"{SCHEME}(?P<name>[^/:@]+)(@(?P<alias>[A-Za-z][\w-]*)|/(?P<version>\d+))")
_SQLITE = "sqlite:///"
_PARAMS_AT_ONCE = 100
_MESSAGE_LENGTH = 500
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_NOISY = ("alembic", "mlflow.pyfunc", "mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store")
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


def check(config: TrackingConfig) -> None:
    """Make sure, in seconds, that the store answers and has a place for bundles; do nothing where tracking is off.

    Raises:
        TrackingError: the store doesn't answer, or refuses to make that place.
    """
    if config.uri is None:
        return
    # MLflow waits four minutes for a server that doesn't answer: right once there is much to lose, wrong before a training.
    before = {name: os.environ.get(name) for name in _IMPATIENT}
    os.environ.update(_IMPATIENT)
    try:
        with connected(config.uri) as client:
            experiment_id(client, config)
            require_model(client, config)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def connected(uri: str) -> Iterator[MlflowClient]:
    """Give the block a client of the store.

    Raises:
        TrackingError: the store can't be reached or refuses a call of the block.
        PlatformError: a disk is full.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # Only here: mlflow takes seconds to import, and most stages need none.
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        if uri.startswith(_SQLITE):
            path = Path(uri.removeprefix(_SQLITE))
            path.parent.mkdir(parents=True, exist_ok=True)
            # MLflow would try for minutes to open a file that is no database.
            with closing(sqlite3.connect(path)) as file:
                file.execute("PRAGMA schema_version")
        yield MlflowClient(uri, registry_uri(uri))
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        if disk.is_full(error):
            raise disk.no_space(uri) from error
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrackingError(f"tracking.uri {uri}: {first_line[:_MESSAGE_LENGTH]}") from error


def required_uri(config: TrackingConfig) -> str:
    """Return the address of the store.

    Raises:
        ConfigError: ``tracking.uri`` is null.
    """
    if config.uri is None:
        raise ConfigError("tracking.uri: is null, so there is no registry of bundles")
    return config.uri


def registry_uri(uri: str) -> str:
    """Return the address of the registry that belongs to a store: Unity Catalog on Databricks, else the store itself."""
    return re.sub("^databricks", "databricks-uc", uri)


def experiment_id(client: MlflowClient, config: TrackingConfig) -> str:
    """Return the identity of the configured experiment, which is created if it doesn't exist."""
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is not None:
        return str(experiment.experiment_id)
    local = required_uri(config).startswith(_SQLITE)
    return client.create_experiment(config.experiment, Path(config.artifacts).absolute().as_uri() if local else None)


def require_model(client: MlflowClient, config: TrackingConfig) -> None:
    """Create the configured registered model if it doesn't exist."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(config.model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(config.model, description="Expected spend of users; the bundles of bp-spark.")


def fetch(config: Config, address: str, digest_of: Callable[[Path], str]) -> Path:
    """Return a folder of ``training.work_dir`` with the bundle of a version; later calls find it there.

    Args:
        config: the store and the folder.
        address: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        digest_of: verifies the bundle in a folder and returns its digest.

    Raises:
        ConfigError: the address is malformed, or ``tracking.uri`` is null.
        BundleError: there is no such version, it is no bundle, or not the one that was registered.
        TrackingError: the store can't be reached.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(f"bundle {address!r}: must be {SCHEME}NAME@ALIAS or {SCHEME}NAME/VERSION")
    uri = required_uri(config.tracking)
    with connected(uri) as client:
        version = _find_version(client, match["name"], match["alias"], match["version"])
        if version is None:
            raise BundleError(f"{address}: is not in the registry at {uri}")
        digest = version.tags.get(DIGEST_TAG, "")
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise BundleError(f"{address}: version {version.version} is no bundle of bp-spark")
        folder = Path(config.training.work_dir).absolute() / FETCHED / digest
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with disk.writing(folder), TemporaryDirectory(dir=folder.parent) as draft:
                files = _download(client, uri, version, draft) / "data" / "bundle"
                if (downloaded := digest_of(files)) != digest:
                    raise BundleError(f"{address}: the files are those of another bundle, {downloaded[:12]}")
                _rename_unless_present(files, folder)
    return folder


def _find_version(client: MlflowClient, name: str, alias: str | None, version: str) -> ModelVersion | None:
    """Return the version that an alias names, or that of a number; ``None`` where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _download(client: MlflowClient, uri: str, version: ModelVersion, target: str) -> Path:
    """Download the files of a version into a folder; return where they lie."""
    from mlflow.artifacts import download_artifacts

    # Unity Catalog hands out files by the registry's own address only.
    source = f"{SCHEME}{version.name}/{version.version}"
    if not uri.startswith("databricks"):
        source = client.get_model_version_download_uri(version.name, version.version)
    return Path(download_artifacts(source, dst_path=target, tracking_uri=uri, registry_uri=registry_uri(uri)))


def _rename_unless_present(folder: Path, target: Path) -> None:
    """Move a folder in one step; another process may have put the same bundle there first."""
    try:
        folder.rename(target)
    except OSError:
        if not target.exists():
            raise


@contextmanager
def active_run(uri: str, run_id: str) -> Iterator[None]:
    """Make a run MLflow's active one for the block.

    The caller's own store, experiment and import path come back at the end.
    """
    import mlflow
    from mlflow.tracking import fluent

    tracking: Any = mlflow
    store = mlflow.get_tracking_uri() if tracking.is_tracking_uri_set() else None
    experiment, import_path = fluent._active_experiment_id, list(sys.path)
    mlflow.set_tracking_uri(uri)
    registry = mlflow.get_registry_uri()
    try:
        if registry != registry_uri(uri):
            mlflow.set_registry_uri(registry_uri(uri))
        # MLflow refuses to activate a run of another experiment than the one that the caller has set.
        fluent._active_experiment_id = None
        with mlflow.start_run(run_id=run_id, nested=True):
            yield
    finally:
        fluent._active_experiment_id = experiment
        if mlflow.get_registry_uri() != registry:
            mlflow.set_registry_uri(registry)
        tracking.set_tracking_uri(store)
        # MLflow loads the model once to try its example, and puts the model's code first.
        sys.path[:] = import_path


def log_params(client: MlflowClient, run_id: str, values: Mapping[str, object]) -> None:
    """Log settings: texts as they are, other values as JSON."""
    from mlflow.entities import Param

    params = [Param(key, value if isinstance(value, str) else json.dumps(value)) for key, value in values.items()]
    for first in range(0, len(params), _PARAMS_AT_ONCE):
        client.log_batch(run_id, params=params[first : first + _PARAMS_AT_ONCE])


def log_metrics(
    client: MlflowClient, run_id: str, at: datetime, figures: Mapping[str, float | None], step: int = 0
) -> None:
    """Log figures; those that the data couldn't give (``None`` and NaN) are left out."""
    from mlflow.entities import Metric

    numbers = {name: value for name, value in figures.items() if value is not None and not math.isnan(value)}
    client.log_batch(run_id, [Metric(name, value, milliseconds(at), step) for name, value in numbers.items()])


def milliseconds(moment: datetime) -> int:
    """Return a moment as MLflow counts it, from 1970."""
    return int(moment.timestamp() * 1000)
