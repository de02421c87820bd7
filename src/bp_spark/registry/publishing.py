"""Bundles become versions of a registered model, and trainings become runs, in the MLflow store at ``tracking.uri``.

A store receives settings, figures, names, digests, the address and version of the training set, and the bundle. It receives
no row of a user: the input example is invented.

The folder of bundles comes first. A training writes its bundle and moves ``bundles/current`` before it calls
:func:`publish`. So a store that can't be reached, or a process that dies in between, leaves a store that lags behind and never
a lost bundle. The next :func:`publish`, by a training or by ``bp-spark publish``, brings the store up to date.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bp_spark.core.config import Config, TrackingConfig
from bp_spark.core.errors import BundleError
from bp_spark.registry import bundle as bundles
from bp_spark.registry import decisions
from bp_spark.registry.bundle import Bundle
from bp_spark.registry.logged_model import log_model
from bp_spark.registry.mlflow_store import (
    DIGEST_TAG,
    FETCHED,
    active_run,
    connected,
    experiment_id,
    log_metrics,
    log_params,
    milliseconds,
    require_model,
    required_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.data.dataset import Dataset
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Published:
    """Versions after a call of :func:`publish`.

    Attributes:
        version: of the bundle.
        promoted: the version that the alias names; ``None`` where no bundle is promoted.
    """

    version: str
    promoted: str | None


def folder_here(config: Config, digest: str) -> Path | None:
    """Return the folder of a bundle that was trained here or fetched from the registry; ``None`` if it isn't here any more."""
    for root in (Path(config.bundles), Path(config.training.work_dir) / FETCHED):
        try:
            return bundles.find(root, digest)
        except BundleError:
            continue
    return None


def publish(
    config: Config, bundle: Bundle, history: Sequence[Mapping[str, float]] = (), started: datetime | None = None
) -> Published:
    """Record a bundle of ``config.bundles`` as a run and a version, and have the alias name the promoted bundle.

    A bundle that is a version already isn't recorded again. The alias moves last, in one step. If it has to name a bundle that
    an earlier call failed to record, that one is recorded first. Refused bundles are versions too: the tag ``decision`` and
    the description give the reason. All bundles of a registered model belong to one folder, for its ``current`` decides.

    Args:
        config: the store, and the folder of bundles.
        bundle: its metrics, settings and lineage are those of its manifest.
        history: figures of the transformer's epochs, where they are at hand; see :func:`bp_spark.training.fit.fit`.
        started: when the training began, if the caller knows.

    Raises:
        ConfigError: ``tracking.uri`` is null.
        TrackingError: the store can't be reached or refuses; calling again goes on from there.
    """
    settings = config.tracking
    with connected(required_uri(settings)) as client:
        experiment = experiment_id(client, settings)
        require_model(client, settings)
        version = _require_version(client, settings, experiment, bundle, history, started)
        promoted = _promoted(config, bundle)
        if promoted is None:
            return Published(version, None)
        champion = version
        if promoted.digest != bundle.digest:
            champion = _require_version(client, settings, experiment, promoted, (), None)
        client.set_registered_model_alias(settings.model, settings.alias, champion)
        return Published(version, champion)


def _promoted(config: Config, bundle: Bundle) -> Bundle | None:
    """Return the bundle that ``bundles/current`` names; ``None`` where that is none that can be used."""
    try:
        if bundles.current(config.bundles).resolve() == bundle.folder.resolve():
            return bundle
        return bundles.load_promoted(config)
    except BundleError:
        return None


def _require_version(
    client: MlflowClient,
    config: TrackingConfig,
    experiment: str,
    bundle: Bundle,
    history: Sequence[Mapping[str, float]],
    started: datetime | None,
) -> str:
    """Return the version of a bundle, which is recorded if it has none; a run that was left unfinished is completed."""
    runs = client.search_runs([experiment], f"tags.{DIGEST_TAG} = '{bundle.digest}'")
    version = _find_version(client, config.model, bundle, runs)
    if version is not None:
        _describe(client, version, bundle)
        return str(version.version)
    manifest, lineage = bundle.manifest, bundle.manifest["lineage"]
    ended = datetime.fromisoformat(manifest["created_at"])
    tags = {
        DIGEST_TAG: bundle.digest,
        "bundle": bundle.folder.name,
        "code_version": manifest["code_version"],
        "run_id": lineage["run_id"],
        "test_date": bundle.test_date,
        "training_set_version": str(lineage["training_set"]["version"]),
    }
    decision = decisions.decision(bundle.folder)
    verdict = {"decision": "none" if decision is None else "promoted" if decision["promoted"] else "refused"}
    if runs:
        run = runs[0]
    else:
        begun = milliseconds(started or ended)
        run = client.create_run(experiment, begun, {**tags, **verdict, "stage": "train"}, bundle.folder.name)
    run_id = run.info.run_id
    log_params(client, run_id, _flat(lineage["config"]))
    rows = manifest["metrics"]["rows"]
    log_metrics(client, run_id, ended, {f"{r['population']}/{r['member']}/{r['metric']}": r["value"] for r in rows})
    reasons = manifest["metrics"].get("reasons") or {}
    log_metrics(client, run_id, ended, {f"reasons/{name}": value for name, value in reasons.items()})
    for epoch in history:
        figures = {f"transformer/{name}": value for name, value in epoch.items() if name != "epoch"}
        log_metrics(client, run_id, ended, figures, int(epoch["epoch"]))
    with active_run(required_uri(config), run_id):
        import mlflow

        mlflow.log_input(_training_set(lineage["training_set"]), context="training")
        registered = log_model(bundle, config.model, {**tags, **verdict}).registered_model_version
    _describe(client, client.get_model_version(config.model, str(registered)), bundle)
    client.set_terminated(run_id, "FINISHED", milliseconds(ended))
    return str(registered)


def _find_version(client: MlflowClient, model: str, bundle: Bundle, runs: Sequence[Run]) -> ModelVersion | None:
    """Return the version of a bundle; ``None`` where it has none.

    A search in Unity Catalog returns no tags, so the runs and their models identify a version too.
    """
    run_ids = {run.info.run_id for run in runs}
    model_ids = {output.model_id for run in runs if run.outputs for output in run.outputs.model_outputs}
    for version in client.search_model_versions(f"name = '{model}'"):
        if version.tags.get(DIGEST_TAG) == bundle.digest or version.run_id in run_ids or version.model_id in model_ids:
            return version
    return None


def _describe(client: MlflowClient, version: ModelVersion, bundle: Bundle) -> None:
    """Give a version the reason of the bundle's decision as its description."""
    decision = decisions.decision(bundle.folder)
    reason = "" if decision is None else str(decision["reason"])
    if reason and not version.description:
        client.update_model_version(version.name, version.version, description=reason)


def _training_set(source: Mapping[str, Any]) -> Dataset:
    """Describe the table that a bundle was trained on by address and version, without reading a row of it."""
    from mlflow.data.delta_dataset_source import DeltaDatasetSource
    from mlflow.data.meta_dataset import MetaDataset

    table = DeltaDatasetSource(path=str(source["location"]), delta_table_version=int(source["version"]))
    return MetaDataset(table, name="training_set")  # type: ignore[abstract]


def _flat(settings: Mapping[str, Any]) -> dict[str, object]:
    """Return settings by ``section.key``."""
    flat: dict[str, object] = {}
    for section, values in settings.items():
        flat |= {f"{section}.{key}": v for key, v in values.items()} if isinstance(values, dict) else {section: values}
    return flat
