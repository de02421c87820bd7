"""The gate: what may replace the bundle that scores, and what the reason says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bp_spark.evaluation import promotion


def frame(users: int = 800, **noise: float) -> pd.DataFrame:
    """Expected spends that miss the real one by so much log noise each."""
    rng = np.random.default_rng(0)
    spend = np.exp(rng.normal(4, 1, users))
    columns = {name: spend * np.exp(rng.normal(0, share, users)) for name, share in noise.items()}
    return pd.DataFrame({"label_spend": spend, **columns})


def judged(data: pd.DataFrame, margin: float = 0.002) -> promotion.Decision:
    return promotion.against_incumbent(data, "20240101-abc", margin=margin, resamples=200, seed=1)


def test_above_both_baselines_is_promoted():
    decision = promotion.against_baselines(frame(fused=0.3, linear=0.8, btyd=0.6))
    assert decision.promoted
    assert "no worse than linear 0." in decision.reason
    assert "btyd 0." in decision.reason


@pytest.mark.parametrize("baseline", promotion.BASELINES)
def test_below_one_baseline_is_refused_and_names_it(baseline):
    noise = {"fused": 0.5, "linear": 0.9, "btyd": 0.9} | {baseline: 0.1}
    decision = promotion.against_baselines(frame(**noise))
    assert not decision.promoted
    assert f"below {baseline} 0." in decision.reason


def test_a_fusion_that_is_the_baseline_is_no_worse_than_it():
    data = frame(linear=0.5, btyd=0.9)
    assert promotion.against_baselines(data.assign(fused=data["linear"])).promoted


def test_a_surely_worse_bundle_is_refused_and_a_surely_better_one_promoted():
    worse, better = judged(frame(fused=0.9, incumbent=0.2)), judged(frame(fused=0.2, incumbent=0.9))
    assert not worse.promoted
    assert worse.reason.startswith("worse than 20240101-abc on 800 users: norm. Gini 0.")
    assert "better in 0% of 200 resamples" in worse.reason
    assert better.promoted
    assert better.reason.startswith("better than 20240101-abc")


def test_bundles_that_cannot_be_told_apart_do_not_block_the_new_one():
    few = judged(frame(25, fused=0.52, incumbent=0.5))
    assert few.promoted
    assert few.reason.startswith("not distinguishable from")


def test_the_same_bundle_again_is_promoted():
    data = frame(fused=0.4)
    decision = judged(data.assign(incumbent=data["fused"]))
    assert decision.promoted
    assert "better in 50%" in decision.reason


def test_the_right_order_at_the_wrong_level_is_refused():
    data = frame(incumbent=0.3)
    assert not judged(data.assign(fused=data["incumbent"] * 5)).promoted


def test_a_difference_that_is_certain_but_within_the_margin_does_not_block_the_new_one():
    data = frame(incumbent=0.0)
    data = data.assign(incumbent=1.2 * data["incumbent"], fused=1.2001 * data["incumbent"])
    decision = judged(data)
    assert decision.promoted
    assert decision.reason.startswith("not surely worse by 0.2% than 20240101-abc")
    assert not judged(data, margin=0).promoted


def test_data_that_tell_nothing_block_nothing():
    data = frame(30, fused=0.3, linear=0.3, btyd=0.3).assign(label_spend=0.0)
    assert promotion.against_baselines(data).promoted
    assert judged(data.assign(incumbent=data["fused"])).promoted
