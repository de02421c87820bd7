"""Shapley values by permutations: what a player adds, and how two explanations are compared."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from bp_spark.model.permutation import Agreement, permutation_values, spread_rows


def test_players_share_what_only_both_bring_and_nobody_pays_for_another() -> None:
    rng = np.random.default_rng(1)
    # all others are zeros, so that nothing depends on who is drawn
    columns = {name: np.zeros(500) for name in ("a", "b", "c1", "c2", "idle")}
    columns |= {"history": np.array([np.zeros(0)] * 500 + [None], object)[:500]}
    columns["a"][7], columns["b"][7], columns["c1"][7], columns["c2"][7], columns["idle"][7] = 5, 4, 2, 3, 9
    columns["history"][7] = np.ones(6)

    def predict(rows: Mapping[str, np.ndarray]) -> np.ndarray:
        seen = np.array([values.sum() for values in rows["history"]])
        return rows["a"] * rows["b"] + rows["c1"] * rows["c2"] + seen + 1.0

    players = [["a"], ["b"], ["c1", "c2"], ["idle"], ["history"]]
    others = {name: values[8:] for name, values in columns.items()}
    both = {name: np.concatenate([others[name], values[7:8]]) for name, values in columns.items()}
    user, others_drawn = np.array([len(both["a"]) - 1]), np.arange(8)[None]
    values = permutation_values(predict, both, players, user, others_drawn, rng)
    assert values[0] == pytest.approx([10, 10, 6, 0, 6])


def test_contributions_sum_to_the_prediction_less_that_of_the_others() -> None:
    rng = np.random.default_rng(2)
    columns = {name: rng.normal(size=4000) for name in "ab"}
    users = np.arange(50)

    def predict(rows: Mapping[str, np.ndarray]) -> np.ndarray:
        return rows["a"] + 2 * rows["b"] + 3

    others = spread_rows(predict(columns), len(users), 40, rng)
    values = permutation_values(predict, columns, ["a", "b"], users, others, rng)
    ahead = predict(columns)[users] - predict(columns).mean()
    # the others are spread over all ranks, so that their mean is the mean of all
    np.testing.assert_allclose(values.sum(axis=1), ahead, atol=0.2)
    own = np.stack([columns["a"][users], 2 * columns["b"][users]], axis=1)
    assert Agreement.of(own, values).error < 0.2
    assert Agreement.of(own, values).same_first > 0.9
    upside_down = Agreement.of(own[:, ::-1], values)
    assert upside_down.error > 0.5
    assert upside_down.same_first < 0.2


def test_contributions_of_nothing_have_no_error() -> None:
    assert Agreement.of(np.zeros((3, 2)), np.zeros((3, 2))) == Agreement(3, 0.0, 1.0)
