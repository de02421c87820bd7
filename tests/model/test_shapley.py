"""Shapley values by tables: those of XGBoost's own walk, whatever the trees."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xgboost
from hypothesis import given, settings
from hypothesis import strategies as st

from bp_spark.model.shapley import DEEPEST, TreeShapley


def booster(depth: int, seed: int = 0, rounds: int = 8, features: int = 4, **more: object) -> xgboost.Booster:
    """A booster on few features, so that paths ask of one feature more than once."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(500, features)).astype(np.float32)
    values[rng.random(values.shape) < 0.2] = np.nan
    label = np.exp(np.nan_to_num(values[:, 0]) * np.nan_to_num(values[:, -1] + 1)) * rng.gamma(2, 1, 500)
    settings = {"objective": "reg:tweedie", "max_depth": depth, "seed": seed, "eta": 0.3, **more}
    return xgboost.train(settings, xgboost.DMatrix(values, label=label), rounds)


def by_tables(model: xgboost.Booster, values: np.ndarray) -> np.ndarray:
    return TreeShapley(json.loads(model.save_raw("json")))(values)


@settings(max_examples=25, deadline=None)
@given(depth=st.integers(1, DEEPEST), seed=st.integers(0, 1000), features=st.integers(1, 6), pruned=st.booleans())
def test_tables_give_what_walking_the_paths_gives(depth: int, seed: int, features: int, pruned: bool) -> None:
    model = booster(depth, seed, features=features, gamma=3.0 if pruned else 0.0)
    rng = np.random.default_rng(seed + 1)
    values = rng.normal(size=(60, features)).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = np.nan
    walked = model.predict(xgboost.DMatrix(values), pred_contribs=True)[:, :-1]
    np.testing.assert_allclose(by_tables(model, values), walked, atol=2e-5)


def test_a_value_at_the_border_goes_where_xgboost_sends_it() -> None:
    model = booster(3)
    splits = sorted({float(x) for x in model.trees_to_dataframe()["Split"].dropna()})
    values = np.array([[x, x, x, x] for x in splits], np.float32)
    walked = model.predict(xgboost.DMatrix(values), pred_contribs=True)[:, :-1]
    np.testing.assert_allclose(by_tables(model, values), walked, atol=2e-5)


def test_nobody_and_a_booster_without_a_split() -> None:
    assert by_tables(booster(2), np.zeros((0, 4), np.float32)).shape == (0, 4)
    stump = booster(2, gamma=1e9)
    np.testing.assert_array_equal(by_tables(stump, np.ones((3, 4), np.float32)), np.zeros((3, 4)))


def test_trees_too_deep_for_tables_are_refused() -> None:
    with pytest.raises(ValueError, match=f"no deeper than {DEEPEST}"):
        TreeShapley(json.loads(booster(DEEPEST + 2, features=6).save_raw("json")))
