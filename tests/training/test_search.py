"""The search for better settings: what it tries, what it takes for best, and when it stops."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from bp_spark.core import config
from bp_spark.core.config import SearchConfig, SearchRange
from bp_spark.core.errors import ConfigError
from bp_spark.training.search import Search

SPACE = {
    "trees.max_depth": SearchRange(low=1, high=8),
    "trees.learning_rate": SearchRange(low=1e-3, high=1.0, log=True),
    "network.loss": SearchRange(choices=("ziln", "tweedie")),
}
NOW: Mapping[str, object] = {"trees.max_depth": 1, "trees.learning_rate": 0.5, "network.loss": "ziln"}


def hill(settings: Mapping[str, object]) -> float:
    """1 at depth 6, rate 0.05 and tweedie."""
    depth, rate = float(str(settings["trees.max_depth"])), float(str(settings["trees.learning_rate"]))
    off = abs(depth - 6) / 8 + abs(math.log10(rate / 0.05)) / 3 + 0.3 * (settings["network.loss"] == "ziln")
    return 1 - off


def test_the_settings_as_they_are_come_first_and_the_search_climbs() -> None:
    search = Search(SearchConfig(space=SPACE, trials=40), NOW, hill, seed=1)
    trials = list(search.run())
    assert [trial.number for trial in trials] == list(range(40))
    assert trials[0].settings == NOW
    assert search.best is not None
    assert search.best.value == max(trial.value for trial in trials) > trials[0].value + 0.3
    for trial in trials:
        config.changed(config.load(), trial.settings)


def test_the_same_seed_makes_the_same_trials() -> None:
    one, other = (
        [trial.settings for trial in Search(SearchConfig(space=SPACE, trials=12), NOW, hill, seed=3).run()]
        for _ in range(2)
    )
    assert one == other


def test_a_search_stops_at_its_target() -> None:
    search = Search(SearchConfig(space=SPACE, trials=100, target=0.6), NOW, hill, seed=1)
    trials = list(search.run())
    assert trials[-1].value >= 0.6
    assert all(trial.value < 0.6 for trial in trials[:-1])
    assert len(trials) < 100


def test_of_an_error_less_is_better() -> None:
    settings = SearchConfig(space=SPACE, trials=40, metric="mae", target=0.4)
    search = Search(settings, NOW, lambda given: 1 - hill(given), seed=1)
    trials = list(search.run())
    assert search.best is not None
    assert search.best.value == min(trial.value for trial in trials) <= 0.4


def test_settings_that_cannot_be_are_a_failed_trial_and_not_the_end() -> None:
    def judge(given: Mapping[str, object]) -> float:
        if given["network.loss"] == "tweedie":
            raise ConfigError("network.loss: not today")
        return hill(given)

    search = Search(SearchConfig(space=SPACE, trials=15), NOW, judge, seed=1)
    trials = list(search.run())
    failed = [trial for trial in trials if trial.error]
    assert failed
    assert all(math.isnan(trial.value) and trial.error == "network.loss: not today" for trial in failed)
    assert search.best is not None
    assert search.best.settings["network.loss"] == "ziln"


def test_settings_outside_the_space_are_still_the_first_trial() -> None:
    now = {**NOW, "trees.max_depth": 30}
    trials = list(Search(SearchConfig(space=SPACE, trials=3), now, hill, seed=1).run())
    assert trials[0].settings == now
    assert len(trials) == 3


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"labels.horizon_days": {"low": 1, "high": 9}}, "labels.horizon_days is no setting of"),
        ({"trees": {"low": 1, "high": 9}}, "trees is no setting of"),
        ({"training.work_dir": {"choices": ["a", "b"]}}, "training.work_dir can't be searched"),
        ({"network.backbone": {"choices": ["events", "text"]}}, "network.backbone can't be searched"),
        ({"trees.max_depth": {"low": 9, "high": 1}}, "must have choices, or a low below a high"),
        ({"trees.max_depth": {"low": 1, "high": 3, "choices": [1]}}, "not both"),
        ({"trees.learning_rate": {"low": 0, "high": 3, "log": True}}, "log needs a low above 0"),
    ],
)
def test_a_space_that_cannot_be_is_refused(space: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(overrides=[f"search.space={space}".replace("True", "true")])


def test_a_value_that_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match=r"search: network.dropout: .*less than 1"):
        config.changed(config.load(), {"network.dropout": 3})
