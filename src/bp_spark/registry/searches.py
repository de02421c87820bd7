"""Searches of settings as MLflow runs: one run for a search, one below it for each trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from bp_spark.core.config import SearchConfig, TrackingConfig
from bp_spark.core.version import __version__
from bp_spark.registry.mlflow_store import connected, experiment_id, log_metrics, log_params, milliseconds

Settings = Mapping[str, object]


@dataclass(frozen=True)
class Trial:
    """One trial of a search.

    Attributes:
        number: from 0 on.
        settings: those that were tried.
        value: the search's metric; NaN where the settings can't be used.
        seconds: how long it took.
        error: why the settings can't be used.
    """

    number: int
    settings: Settings
    value: float
    seconds: float
    error: str | None = None


def record_search(
    config: TrackingConfig, search: SearchConfig, run_id: str, test_date: date, trials: Sequence[Trial], ended: datetime
) -> None:
    """Record a search as a run, with one below it for each trial: its settings, its metric or error, its seconds.

    Does nothing where tracking is off.

    Args:
        config: the store.
        search: settings of the search.
        run_id: of the table ``runs``.
        test_date: the date that trials were judged on.
        trials: in their order.
        ended: when the last trial ended.

    Raises:
        TrackingError: the store can't be reached or refuses; the trials are in the table ``trials``.
    """
    if config.uri is None or not trials:
        return
    with connected(config.uri) as client:
        experiment = experiment_id(client, config)
        tags = {"stage": "search", "run_id": run_id, "test_date": test_date.isoformat(), "code_version": __version__}
        start = ended - timedelta(seconds=sum(trial.seconds for trial in trials))
        parent = client.create_run(experiment, milliseconds(start), tags, f"search-{run_id}").info.run_id
        log_params(client, parent, {f"search.{key}": value for key, value in search.model_dump(mode="json").items()})
        for trial in trials:
            tags = {"mlflow.parentRunId": parent, "stage": "trial", **({"error": trial.error} if trial.error else {})}
            run = client.create_run(experiment, milliseconds(start), tags, f"trial-{trial.number}").info.run_id
            start += timedelta(seconds=trial.seconds)
            log_params(client, run, trial.settings)
            log_metrics(client, run, start, {search.metric: trial.value, "seconds": trial.seconds})
            client.set_terminated(run, "FAILED" if trial.error else "FINISHED", milliseconds(start))
        client.set_terminated(parent, "FINISHED", milliseconds(ended))
