"""Resampled metrics against the plain ones of copied rows, and what intervals and differences must say."""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich.console import Console

from bp_spark.core.errors import DataError
from bp_spark.evaluation import bootstrap as bs
from bp_spark.evaluation import metrics as ev


def population(n: int = 400, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    good = np.exp(rng.normal(4, 1, n))
    truth = np.where(rng.random(n) < 0.3, 0.0, good * np.exp(rng.normal(0, 0.5, n)))
    return pd.DataFrame(
        {
            "user_key": [f"u{i}" for i in range(n)],
            "label_spend": truth,
            "seen": np.arange(n) % 4 > 0,
            "rough": good * np.exp(rng.normal(0, 1.5, n)),
            "same": good,
            "fused": good,
            "low": good / 3,
            "high": good * 3,
            "p_active": np.clip(good / 200, 0, 1),
        }
    )


@st.composite
def drawn(draw):
    n = draw(st.integers(2, 30))
    small = st.integers(0, draw(st.sampled_from([2, 1000]))).map(float)
    values = hnp.arrays(np.float64, n, elements=small)
    counts = draw(hnp.arrays(np.int64, n, elements=st.integers(0, 3)))
    counts[0] += counts.sum() == 0
    return draw(values), draw(values), draw(values), counts


@settings(max_examples=200)
@given(drawn())
def test_a_resample_has_the_metrics_of_its_users_copied_out(case):
    truth, predicted, other, counts = case
    more = {"low": predicted * 0.5, "high": predicted + 1, "p_active": other / 1000}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bs.resampled_metrics(counts[None, :] * 1.0, truth, predicted, **more)
        copied = {name: np.repeat(values, counts) for name, values in more.items()}
        expected = ev.evaluate(np.repeat(truth, counts), np.repeat(predicted, counts), **copied)
    assert {name: values[0] for name, values in found.items()} == pytest.approx(expected, nan_ok=True, abs=1e-9)


def test_draws_are_of_all_users_with_replacement_and_the_seed_decides(monkeypatch):
    monkeypatch.setattr(bs, "_CELLS", 130)
    parts = list(bs.draws(50, 7, seed=3))
    counts = np.concatenate(parts)
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    assert (counts.sum(axis=1) == 50).all()
    assert (counts == 0).any()
    monkeypatch.setattr(bs, "_CELLS", 10**6)
    assert (np.concatenate(list(bs.draws(50, 7, seed=3))) == counts).all()
    assert (np.concatenate(list(bs.draws(50, 7, seed=4))) != counts).any()


def test_intervals_hold_their_figure_and_narrow_with_more_users():
    small, large = (bs.compare(population(n), ["rough", "fused"], resamples=200) for n in (100, 1600))
    for table in (small, large):
        own = table[table["peer"].isna() & (table["metric"] == "mae")]
        assert ((own["low"] < own["value"]) & (own["value"] < own["high"])).all()
    width = [t.query("member == 'fused' and population == 'all' and metric == 'gini'") for t in (small, large)]
    narrow, wide = ((t["high"] - t["low"]).iloc[0] for t in reversed(width))
    assert narrow < wide / 2


def test_an_interval_of_the_mean_is_that_of_the_normal_approximation():
    frame = population(3000)
    error = np.abs(frame["fused"] - frame["label_spend"])
    table = bs.compare(frame, ["fused"], resamples=1500).set_index(["population", "metric"])
    found = table.loc[("all", "mae"), ["low", "high"]].to_numpy(float)
    half = 1.645 * error.std() / math.sqrt(len(frame))
    np.testing.assert_allclose(found, [error.mean() - half, error.mean() + half], atol=0.15 * half)


def test_a_better_member_is_better_in_every_resample_and_an_equal_one_in_half():
    table = bs.compare(population(), ["rough", "same", "fused"], resamples=200)
    pairs = table[table["peer"].notna() & (table["population"] == "all")].set_index(["peer", "metric"])
    assert set(pairs["member"]) == {"fused"}
    assert pairs.loc[("rough", "gini"), "better"] == 1.0
    assert pairs.loc[("rough", "gini"), "low"] > 0
    assert pairs.loc[("rough", "mae"), "better"] == 1.0
    assert pairs.loc[("rough", "mae"), "high"] < 0
    assert (pairs.loc["same", "better"] == 0.5).all()
    assert (pairs.loc["same", ["value", "low", "high"]] == 0).all(axis=None)


def test_figures_are_those_of_the_table_of_metrics():
    members = ["rough", "fused"]
    table = bs.compare(population(), members, resamples=5)
    own = table[table["peer"].isna()].set_index(["member", "population", "metric"])[["value", "users"]]
    plain = ev.metrics_table(population(), members).set_index(["member", "population", "metric"])[["value", "users"]]
    pd.testing.assert_frame_equal(own, plain, check_like=True)


def test_the_order_of_peers_does_not_change_a_figure():
    one = bs.compare(population(), ["rough", "same", "fused"], resamples=30)
    other = bs.compare(population(), ["fused", "rough"], resamples=30)
    key = ["population", "member", "peer", "metric"]
    both = one.merge(other, on=key, suffixes=("", "_other"))
    assert len(both) == len(other)
    np.testing.assert_array_equal(both["low"], both["low_other"])


@pytest.mark.parametrize(("users", "spend"), [(1, 5.0), (30, 0.0), (30, 7.0)])
def test_what_no_resample_can_tell_is_nan_without_a_warning(users, spend):
    frame = population(30).head(users).assign(label_spend=spend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = bs.compare(frame, ["rough", "fused"], resamples=20)
    gini = table[table["metric"] == "gini"]
    assert gini[["value", "low", "high"]].isna().all(axis=None)


def test_a_missing_column_is_named():
    with pytest.raises(DataError, match=r"predictions\.fused: column is missing"):
        bs.compare(population(), ["rough"])
    with pytest.raises(DataError, match=r"predictions\.linear: column is missing"):
        bs.compare(population(), ["linear", "fused"])


def test_a_score_that_follows_the_bracket_is_told_from_one_that_does_not():
    frame = population(1000)
    brackets = np.array(["Under 15K", "15-24K", "25-49K", "250K+"])
    frame["bracket"] = brackets[pd.qcut(frame["fused"], 4, labels=False)]
    frame.loc[frame.index % 3 == 0, "bracket"] = None
    frame["noise"] = np.random.default_rng(5).random(1000)
    table = bs.compare_with_brackets(frame, ["noise", "fused"], "income", resamples=100)
    assert set(table["population"]) == {"income"}
    assert set(table["users"]) == {int(frame["bracket"].notna().sum())}
    found = table.set_index(["member", "metric"])
    assert found.loc[("fused", "bracket_auc"), "value"] == 1.0
    assert found.loc[("fused", "bracket_spearman"), "low"] > 0.9
    assert found.loc[("noise", "bracket_auc"), "low"] < 0.5 < found.loc[("noise", "bracket_auc"), "high"]
    with pytest.raises(DataError, match="two brackets"):
        bs.compare_with_brackets(frame.assign(bracket="Unknown"), ["fused"], "income")


def test_the_rendered_table_shows_intervals_and_differences():
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(bs.render(bs.compare(population(), ["rough", "fused"], resamples=20), "test"))
    text = console.export_text()
    for words in ("all (400)", "unseen (100)", "rough", "fused − rough", "100%", "…", "norm. Gini"):
        assert words in text
