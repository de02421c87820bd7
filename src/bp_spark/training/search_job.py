"""Trials of other settings, judged out of fold."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pyspark.sql import SparkSession

from bp_spark.core import extras
from bp_spark.core.config import Config, changed
from bp_spark.core.errors import ConfigError
from bp_spark.evaluation import metrics
from bp_spark.features import labels
from bp_spark.features.job import span
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.tables import TRIALS
from bp_spark.model.stack import CalibratedStack
from bp_spark.registry import mlflow_store
from bp_spark.registry.searches import Trial, record_search
from bp_spark.training.job import cross_fit, prepare


@dataclass(frozen=True)
class SearchResult:
    """What a search came to: every trial, the best one, the stages."""

    trials: Sequence[Trial]
    best: Trial
    stages: list[dict[str, Any]]


def search(spark: SparkSession, config: Config, test_date: date | None = None) -> SearchResult:
    """Try other settings on what is known as of a date, and tell which are best.

    A trial is judged by the fused prediction of users whom its members were not fitted on, at past cutoffs: nothing from
    the test date on is seen. Each leaves a row in ``trials`` and its settings in TensorBoard, beside the checkpoints; when
    the search ends, well or not, all become runs of MLflow (see :mod:`bp_spark.registry.searches`).

    Args:
        test_date: as in :func:`train`.

    Raises:
        DataError: no events, or too little history for one cutoff.
        ConfigError: no trial came to a figure.
        TrackingError: the store at ``tracking.uri`` can't be reached: before anything is done, or when all trials are in
            the table ``trials``.
        PlatformError: the extra ``train`` is not installed.
    """
    extras.require("train", "search")
    mlflow_store.check(config.tracking)
    # optuna and torch take seconds to import: other stages don't pay for them
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    from bp_spark.training.search import Search

    with recorded(spark, config, "search") as run:
        first, last = span(run.lakehouse)
        day = test_date or last - timedelta(days=config.labels.horizon_days)
        version, vocabulary, folder = prepare(run, labels.cutoffs(first, day, config.labels), day)
        rows = run.lakehouse.read("training_set", version)

        def judge(settings: Mapping[str, object]) -> float:
            trial = Run(spark, changed(config, settings))
            with TemporaryDirectory(dir=folder) as place:
                _, out_of_fold, _ = cross_fit(trial, rows, day, vocabulary, Path(place), version=version, refit=False)
            fusion = CalibratedStack.fit(out_of_fold, trial.config.fusion)
            said = fusion.apply(fusion.inputs_from(out_of_fold))["expected_spend"]
            return metrics.evaluate(out_of_fold["label_spend"].to_numpy(), said)[config.search.metric]

        now = {key: reduce(getattr, key.split("."), config) for key in config.search.space}
        found = Search(config.search, now, judge, config.training.seed)
        with run.stage("search") as figures, SummaryWriter(str(folder / "search")) as writer:
            try:
                for trial in tqdm(
                    found.run(), total=config.search.trials, desc="search", unit="trial", file=sys.stderr
                ):
                    _record_trial(run, trial, day)
                    shown = {
                        key: value if isinstance(value, (bool, int, float)) else str(value)
                        for key, value in trial.settings.items()
                    }
                    writer.add_hparams(shown, {config.search.metric: trial.value}, run_name=str(trial.number))
            finally:
                record_search(config.tracking, config.search, run.run_id, day, found.trials, ended=datetime.now(UTC))
            best = found.best
            if best is None:
                raise ConfigError(f"search: no trial came to a figure; the first: {found.trials[0].error}")
            figures["trials"], figures["best"], figures[config.search.metric] = (
                len(found.trials),
                best.number,
                best.value,
            )
        return SearchResult(found.trials, best, run.records)


def _record_trial(run: Run, trial: Trial, test_date: date) -> None:
    row = {
        "run_id": run.run_id,
        "test_date": test_date,
        "trial": trial.number,
        "settings": {key: str(value) for key, value in trial.settings.items()},
        "metric": run.config.search.metric,
        "value": None if math.isnan(trial.value) else trial.value,
        "seconds": trial.seconds,
        "error": trial.error,
    }
    run.lakehouse.append(TRIALS, run.spark.createDataFrame([row], TRIALS.schema))
