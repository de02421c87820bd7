"""Metrics against scipy, scikit-learn and brute force, and what they must do at the borders."""

from __future__ import annotations

import io
import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich.console import Console
from scipy import stats
from sklearn import metrics as sk

from bp_spark.core.errors import DataError
from bp_spark.evaluation import metrics as ev

POINT = list(ev.POINT_METRICS)


def pairs(low: int = 0, high: int = 1000) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    """Spend and predictions of the same users, with many ties and zeros."""
    values = st.integers(low, high).map(float)
    return st.integers(2, 40).flatmap(
        lambda n: st.tuples(hnp.arrays(np.float64, n, elements=values), hnp.arrays(np.float64, n, elements=values))
    )


def world(n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    predicted = np.exp(rng.normal(4, 1, n))
    return np.where(rng.random(n) < 0.3, 0.0, predicted * np.exp(rng.normal(0, 0.7, n))), predicted


@given(pairs(high=6), st.randoms(use_true_random=False))
def test_spearman_is_that_of_scipy_where_no_predictions_are_equal(both, random):
    truth, predicted = both
    predicted = np.array(random.sample(range(1000), len(predicted)), float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = stats.spearmanr(truth, predicted).statistic
    assert ev.spearman(truth, predicted) == pytest.approx(expected, nan_ok=True, abs=1e-12)


def test_spearman_of_equal_predictions_is_the_mean_over_the_orders_that_they_may_have():
    truth, predicted = np.array([0.0, 0.0, 4.0, 2.0, 9.0]), np.array([1.0, 2.0, 2.0, 2.0, 5.0])
    orders = [np.array([1.0, *middle, 5.0]) for middle in itertools.permutations((2.0, 3.0, 4.0))]
    expected = np.mean([stats.spearmanr(truth, order).statistic for order in orders])
    assert ev.spearman(truth, predicted) == pytest.approx(expected)


def test_to_tell_half_of_the_users_the_same_brings_no_better_ranks():
    rng = np.random.default_rng(3)
    spend = np.where(rng.random(4000) < 0.7, 0.0, rng.gamma(1, 50, 4000))
    predicted = np.where(spend > 0, 100.0, 0.0) + rng.gamma(1, 30, 4000)
    flat = np.maximum(predicted, np.median(predicted))
    # with mean ranks for both sides it would be better
    assert stats.spearmanr(spend, flat).statistic > stats.spearmanr(spend, predicted).statistic
    assert ev.spearman(spend, flat) <= ev.spearman(spend, predicted)


@given(pairs())
def test_rank_metrics_do_not_change_under_a_monotone_map(both):
    truth, predicted = both
    for metric in (ev.spearman, ev.normalised_gini, ev.top_decile_capture):
        before, after = metric(truth, predicted), metric(truth, predicted**3 + 2 * predicted)
        assert before == pytest.approx(after, nan_ok=True, abs=1e-12)


@given(pairs(), st.randoms(use_true_random=False))
def test_no_metric_depends_on_the_order_of_rows(both, random):
    truth, predicted = both
    order = list(range(len(truth)))
    random.shuffle(order)
    before, after = ev.evaluate(truth, predicted), ev.evaluate(truth[order], predicted[order])
    assert before == pytest.approx(after, nan_ok=True, abs=1e-9)


@given(pairs())
def test_the_perfect_prediction_has_the_best_gini_capture_and_no_error(both):
    truth, predicted = both
    perfect, other = ev.evaluate(truth, truth), ev.evaluate(truth, predicted)
    for name in ("decile_mape", "mae", "rmse", "rmse_log1p"):
        assert perfect[name] == pytest.approx(0, abs=1e-9) or math.isnan(perfect[name])
    if len(set(truth)) > 1:
        assert perfect["gini"] == pytest.approx(1)
        assert perfect["spearman"] >= other["spearman"] - 1e-12 or math.isnan(other["spearman"])
        assert other["gini"] <= 1 + 1e-12
        assert other["top_decile_capture"] <= perfect["top_decile_capture"] + 1e-12


def test_gini_is_that_of_the_gain_chart_written_out():
    truth, predicted = world()

    def gain(order_by):
        shares = pd.Series(truth)[np.argsort(-order_by, kind="stable")].cumsum() / truth.sum()
        return 2 * shares.sum() / len(shares) - 1

    assert ev.normalised_gini(truth, predicted) == pytest.approx(gain(predicted) / gain(truth))


def test_gini_of_ties_is_the_mean_over_all_orders_of_the_tied():
    truth, predicted = np.array([5.0, 0.0, 2.0, 9.0]), np.array([1.0, 1.0, 1.0, 3.0])

    def gini(order):
        return 2 * np.mean(np.cumsum(truth[list(order)]) / truth.sum()) - 1

    orders = [gini((3, *tied)) for tied in itertools.permutations((0, 1, 2))]
    assert ev.normalised_gini(truth, predicted) == pytest.approx(np.mean(orders) / gini((3, 0, 2, 1)))


def test_decile_mape_is_that_of_the_deciles_written_out():
    truth, predicted = world()
    deciles = pd.DataFrame({"t": truth, "p": predicted}).groupby(pd.qcut(predicted, 10), observed=True).mean()
    assert ev.decile_mape(truth, predicted) == pytest.approx(((deciles.p - deciles.t).abs() / deciles.t).mean())


def test_a_decile_without_spend_counts_against_the_mean_spend_of_all():
    truth = np.array([0.0] + [10.0] * 9)
    predicted = np.arange(1.0, 11.0)
    wanted = (predicted[0] / truth.mean() + np.abs(predicted[1:] - 10).sum() / 10) / 10
    assert ev.decile_mape(truth, predicted) == pytest.approx(wanted)


def test_errors_are_those_of_scikit_learn():
    truth, predicted = world()
    metrics = ev.evaluate(truth, predicted)
    assert metrics["mae"] == pytest.approx(sk.mean_absolute_error(truth, predicted))
    assert metrics["rmse"] == pytest.approx(sk.root_mean_squared_error(truth, predicted))
    assert metrics["rmse_log1p"] == pytest.approx(sk.root_mean_squared_log_error(truth, predicted))


def test_top_decile_capture_counts_the_highest_predicted_tenth_rounded_up():
    truth = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 45.0])
    assert ev.top_decile_capture(truth, truth) == pytest.approx(55 / 100)
    assert ev.top_decile_capture(truth, np.ones(11)) == pytest.approx(2 / 11)


@given(hnp.arrays(np.int64, 30, elements=st.integers(0, 1)), hnp.arrays(np.int64, 30, elements=st.integers(0, 5)))
def test_auc_and_brier_are_those_of_scikit_learn(active, tenths):
    p = tenths / 5
    assert ev.brier(active > 0, p) == pytest.approx(np.mean((p - active) ** 2))
    if 0 < active.sum() < len(active):
        assert ev.auc(active > 0, p) == pytest.approx(sk.roc_auc_score(active, p))
    else:
        assert math.isnan(ev.auc(active > 0, p))


def test_coverage_counts_both_ends_and_width_is_in_money():
    metrics = ev.evaluate(
        np.array([0.0, 5.0, 9.0, 20.0]),
        np.ones(4),
        low=np.array([0.0, 1.0, 1.0, 1.0]),
        high=np.array([2.0, 5.0, 5.0, 5.0]),
    )
    assert metrics["coverage"] == 0.5
    assert metrics["interval_width"] == 3.5


def test_the_interval_score_fines_users_outside_by_their_distance_and_the_promise():
    truth, low, high = np.array([0.0, 5.0, 9.0]), np.array([1.0, 1.0, 1.0]), np.array([5.0, 5.0, 5.0])
    for promised, fine in ((0.9, 20.0), (0.8, 10.0)):
        metrics = ev.evaluate(truth, np.ones(3), low=low, high=high, promised=promised)
        assert metrics["interval_score"] == pytest.approx(4 + fine * (1 + 0 + 4) / 3)


@pytest.mark.parametrize(
    ("truth", "predicted", "undefined"),
    [
        ([], [], POINT),
        ([7.0], [3.0], ["spearman", "gini"]),
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0], ["spearman", "gini", "decile_mape", "top_decile_capture"]),
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], ["spearman"]),
        ([4.0, 4.0], [1.0, 2.0], ["spearman", "gini"]),
    ],
)
def test_what_the_data_cannot_tell_is_nan_without_a_warning(truth, predicted, undefined):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = ev.evaluate(np.array(truth), np.array(predicted))
    assert [name for name, value in metrics.items() if math.isnan(value)] == undefined


def test_net_refunds_count_as_no_spend():
    truth, predicted = np.array([-30.0, 10.0, 40.0]), np.array([1.0, 8.0, 50.0])
    assert ev.evaluate(truth, predicted) == ev.evaluate(np.maximum(truth, 0), predicted)


def test_predictions_that_do_not_fit_are_refused_by_name():
    with pytest.raises(DataError, match=r"predictions\.low"):
        ev.evaluate(np.ones(3), np.ones(3), low=np.ones(2), high=np.ones(3))
    with pytest.raises(DataError, match=r"predictions\.predicted: must be finite \(1 rows\)"):
        ev.evaluate(np.ones(2), np.array([1.0, np.nan]))


def frame() -> pd.DataFrame:
    truth, predicted = world(60)
    return pd.DataFrame(
        {
            "user_key": [f"u{i}" for i in range(60)],
            "label_spend": truth,
            "seen": np.arange(60) % 3 > 0,
            "trees": predicted[::-1],
            "fused": predicted,
            "low": predicted / 3,
            "high": predicted * 3,
            "p_active": np.linspace(0, 1, 60),
        }
    )


def test_the_table_has_every_member_and_population():
    data = frame()
    table = ev.metrics_table(data, ["trees", "fused"])
    assert list(table.columns) == ["member", "population", "metric", "value", "users"]
    assert table.groupby("population")["users"].first().to_dict() == {"all": 60, "seen": 40, "unseen": 20}
    indexed = table.set_index(["member", "population", "metric"])["value"]
    unseen = data[~data["seen"]]
    assert indexed["trees", "unseen", "mae"] == ev.mae(unseen["label_spend"].to_numpy(), unseen["trees"].to_numpy())
    assert ("fused", "all", "coverage") in indexed.index
    assert ("trees", "all", "coverage") not in indexed.index


def test_a_population_without_users_is_left_out():
    table = ev.metrics_table(frame().assign(seen=True), ["fused"])
    assert set(table["population"]) == {"all", "seen"}


def test_a_missing_column_is_named():
    with pytest.raises(DataError, match=r"predictions\.linear"):
        ev.metrics_table(frame(), ["linear"])


def test_the_rendered_table_shows_members_by_population():
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(ev.render(ev.metrics_table(frame(), ["trees", "fused"]), "test"))
    text = console.export_text()
    for words in ("all (60)", "seen (40)", "unseen (20)", "trees", "fused", "norm. Gini", "–"):
        assert words in text


INCOMES = ["Under 15K", "15-24K", "25-34K", "75-99K", "100-124K", "250K+"]


@pytest.mark.parametrize(
    "brackets",
    [
        INCOMES,
        ["19-24", "25-34", "65+"],
        ["1", "2", "10", "10+"],
        ["less than $50,000", "$50,000 to $75,000", "over $75,000", "1.5M+"],
    ],
)
def test_brackets_are_ordered_by_the_numbers_in_their_text(brackets):
    shuffled = [brackets[n] for n in np.random.default_rng(1).permutation(len(brackets))]
    assert [brackets[int(place)] for place in ev.bracket_order(shuffled)] == shuffled


def test_users_without_a_number_have_no_bracket():
    order = ev.bracket_order(["250K+", None, "Unknown", float("nan"), "Under 15K"])
    np.testing.assert_array_equal(order, [1.0, math.nan, math.nan, math.nan, 0.0])


def test_halves_of_brackets_are_as_equal_as_they_can_be_without_parting_one():
    order = np.array([0.0] * 5 + [1.0] * 30 + [2.0] * 25)
    assert ev.upper_half(order).sum() == 25
    with pytest.raises(DataError, match="two brackets"):
        ev.upper_half(np.zeros(4))
