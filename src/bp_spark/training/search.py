"""Trials of other settings: what to try and a judge in, every trial and its figure out.

The first trial is of the settings as they are, so that a search never ends with worse ones. The others are drawn by the
tree-structured Parzen estimator (Bergstra et al. 2011, "Algorithms for hyper-parameter optimization"), as Optuna has it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from bp_spark.core.config import SearchConfig, SearchRange
from bp_spark.core.errors import BpSparkError
from bp_spark.evaluation.bootstrap import BETTER
from bp_spark.registry.searches import Settings, Trial


@dataclass
class Search:
    """A search of ``config.space``.

    Args:
        config: what to try, how often, by which metric.
        now: the settings as they are, one for each of the space.
        judge: the metric under changed settings.
        seed: of the draws.
    """

    config: SearchConfig
    now: Settings
    judge: Callable[[Settings], float]
    seed: int
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        """The best trial so far, the earlier of equals; ``None`` where none came to a figure."""
        found = [trial for trial in self.trials if not math.isnan(trial.value)]
        return min(found, key=lambda trial: (self._loss(trial.value), trial.number), default=None)

    def run(self) -> Iterator[Trial]:
        """Try, until the trials are spent or the target is reached; yields each trial as it ends."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = {name: _distribution(values) for name, values in self.config.space.items()}
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=self.seed))
        first = self._try(self.now)
        yield first
        if not math.isnan(first.value) and all(
            space[name]._contains(_inner(space[name], self.now[name])) for name in space
        ):
            study.add_trial(create_trial(params=dict(self.now), distributions=space, value=self._loss(first.value)))
        while len(self.trials) < self.config.trials and not self._reached():
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
            # a draw may fit badly together, or diverge: that is an answer, not the end of the search
            error = str(problem).splitlines()[0][:500]
        trial = Trial(len(self.trials), dict(settings), value, time.monotonic() - started, error)
        self.trials.append(trial)
        return trial

    def _loss(self, value: float) -> float:
        return -BETTER[self.config.metric] * value

    def _reached(self) -> bool:
        best, target = self.best, self.config.target
        return best is not None and target is not None and self._loss(best.value) <= self._loss(target)


def _distribution(values: SearchRange) -> BaseDistribution:
    if values.choices:
        return CategoricalDistribution(values.choices)
    assert values.low is not None
    assert values.high is not None
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _inner(distribution: BaseDistribution, value: object) -> float:
    """The value as the distribution counts it; NaN where it is none of it."""
    try:
        return float(distribution.to_internal_repr(value))
    except ValueError:
        return math.nan
