"""Search for better settings: try some, judge each by out-of-fold predictions, record every trial.

The first trial has the settings as they are, so a search never ends with worse ones. The others are drawn by the
tree-structured Parzen estimator (Bergstra et al. 2011, "Algorithms for hyper-parameter optimization") of Optuna.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pandas as pd
from pyspark.sql import SparkSession

from bp_spark.core import disk, extras
from bp_spark.core.config import Config, SearchConfig, SearchRange, changed
from bp_spark.core.errors import BpSparkError, ConfigError
from bp_spark.evaluation import metrics
from bp_spark.evaluation.bootstrap import BETTER
from bp_spark.features import labels
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.tables import TRIALS
from bp_spark.model.stack import CalibratedStack
from bp_spark.registry import mlflow_store
from bp_spark.registry.searches import Settings, Trial, record_search
from bp_spark.training.cross_fit import cross_fit
from bp_spark.training.dataset import plan, prepare
from bp_spark.training.warm_start import SIZES, warm_start

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_MESSAGE = 500
"""Characters of an error that a trial records."""


@dataclass(frozen=True)
class SearchResult:
    """Result of a search: every trial, the best one, and the stages that ran."""

    trials: Sequence[Trial]
    best: Trial
    stages: list[dict[str, Any]]


def search(spark: SparkSession, config: Config, test_date: date | None = None) -> SearchResult:
    """Try other settings with what is known as of a date, and return the best.

    A trial is judged by the stacked prediction of users whom its members were not fitted on, at past cutoffs. Nothing from the
    test date on is seen. Each trial writes a row to ``trials``, and its settings to TensorBoard, beside the checkpoints. When
    the search ends, well or not, all trials become runs of MLflow (see :mod:`bp_spark.registry.searches`).

    Args:
        spark: the running session.
        config: settings; ``search`` says what to try.
        test_date: as in :func:`bp_spark.training.job.train`.

    Raises:
        DataError: there are no events, or too little history for one cutoff.
        BundleError: the bundle of ``training.from_bundle`` can't be used.
        ConfigError: every trial failed, or ``search.space`` has sizes that such a bundle decides.
        TrackingError: the store at ``tracking.uri`` can't be reached. It is raised before anything is done, or when all trials
            are in the table ``trials``.
        PlatformError: the extra ``train`` is not installed, or the disk is full.
    """
    extras.require("train", "search")
    _require_sizes_stay(config)
    mlflow_store.check(config.tracking)
    # tqdm belongs to the extra `train`
    from tqdm import tqdm

    from bp_spark.training.progress import event_writer

    with recorded(spark, config, "search") as run:
        first, _, day, config = plan(run.lakehouse, config, test_date)
        run.config = config
        version, vocabulary, folder = prepare(run, labels.cutoffs(first, day, config.labels), day)
        rows, start = run.lakehouse.read("training_set", version), warm_start(run)

        def judge(settings: Mapping[str, object]) -> float:
            trial_run = Run(spark, changed(config, settings))
            with TemporaryDirectory(dir=folder) as work_dir:
                _, out_of_fold, _ = cross_fit(
                    trial_run, rows, day, vocabulary, Path(work_dir), version=version, refit=False, start=start
                )
            return _metric(out_of_fold, trial_run.config)

        now = {key: reduce(getattr, key.split("."), config) for key in config.search.space}
        trials = Search(config.search, now, judge, config.training.seed)
        events = folder / "search"
        with run.stage("search") as figures, event_writer(events) as writer:
            try:
                for trial in tqdm(
                    trials.run(), total=config.search.trials, desc="search", unit="trial", file=sys.stderr
                ):
                    _record_trial(run, trial, day)
                    shown = {
                        key: value if isinstance(value, (bool, int, float)) else str(value)
                        for key, value in trial.settings.items()
                    }
                    with disk.writing(events):
                        writer.add_hparams(shown, {config.search.metric: trial.value}, run_name=str(trial.number))
            finally:
                record_search(config.tracking, config.search, run.run_id, day, trials.trials, ended=datetime.now(UTC))
            best = trials.best
            if best is None:
                raise ConfigError(f"search: no trial came to a figure; the first: {trials.trials[0].error}")
            figures["trials"], figures["best"] = len(trials.trials), best.number
            figures[config.search.metric] = best.value
        return SearchResult(trials.trials, best, run.records)


def _require_sizes_stay(config: Config) -> None:
    """Make sure that no trial changes the sizes of a network that starts from a bundle.

    Raises:
        ConfigError: one would.
    """
    fixed = [f"network.{name}" for name in SIZES if f"network.{name}" in config.search.space]
    if config.training.from_bundle is not None and fixed:
        raise ConfigError(f"search.space: {fixed[0]} is that of the bundle of training.from_bundle; leave it out")


def _metric(out_of_fold: pd.DataFrame, config: Config) -> float:
    """Return ``search.metric`` of the stacked out-of-fold predictions."""
    fusion = CalibratedStack.fit(out_of_fold, config.fusion)
    inputs = fusion.inputs_from(out_of_fold)
    expected = fusion.apply(inputs)["expected_spend"]
    return metrics.evaluate(out_of_fold["label_spend"].to_numpy(), expected)[config.search.metric]


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


@dataclass
class Search:
    """A search of ``config.space``.

    Attributes:
        config: what to try, how often, and the metric.
        now: the settings as they are, one for each key of the space.
        judge: returns the metric under changed settings.
        seed: seed of the draws.
        trials: the trials so far.
    """

    config: SearchConfig
    now: Settings
    judge: Callable[[Settings], float]
    seed: int
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        """The best trial so far, the earlier of equals; ``None`` if all have failed."""
        succeeded = [trial for trial in self.trials if not math.isnan(trial.value)]
        return min(succeeded, key=lambda trial: (self._loss(trial.value), trial.number), default=None)

    def run(self) -> Iterator[Trial]:
        """Try settings until the number of trials or the target is reached; yield each trial as it ends."""
        # optuna takes seconds to import, and belongs to the extra `train`
        import optuna
        from optuna.trial import TrialState, create_trial

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = {name: _distribution(values) for name, values in self.config.space.items()}
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=self.seed))
        first = self._try(self.now)
        yield first
        if not math.isnan(first.value) and all(
            space[name]._contains(_internal_value(space[name], self.now[name])) for name in space
        ):
            study.add_trial(create_trial(params=dict(self.now), distributions=space, value=self._loss(first.value)))
        while len(self.trials) < self.config.trials and not self._target_reached():
            asked = study.ask(space)
            trial = self._try(asked.params)
            if math.isnan(trial.value):
                study.tell(asked, state=TrialState.FAIL)
            else:
                study.tell(asked, self._loss(trial.value))
            yield trial

    def _try(self, settings: Settings) -> Trial:
        started, value, error = time.monotonic(), math.nan, None
        try:
            value = self.judge(settings)
        except BpSparkError as problem:
            # drawn settings may not fit together, or diverge: the search records that and goes on
            error = str(problem).splitlines()[0][:_MESSAGE]
        trial = Trial(len(self.trials), dict(settings), value, time.monotonic() - started, error)
        self.trials.append(trial)
        return trial

    def _loss(self, value: float) -> float:
        return -BETTER[self.config.metric] * value

    def _target_reached(self) -> bool:
        best, target = self.best, self.config.target
        return best is not None and target is not None and self._loss(best.value) <= self._loss(target)


def _distribution(values: SearchRange) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if values.choices:
        return CategoricalDistribution(values.choices)
    assert values.low is not None
    assert values.high is not None
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _internal_value(distribution: BaseDistribution, value: object) -> float:
    """Return the value as the distribution stores it; NaN if it is outside the distribution."""
    try:
        return float(distribution.to_internal_repr(value))
    except ValueError:
        return math.nan
