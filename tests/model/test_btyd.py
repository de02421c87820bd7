"""BG/NBD and Gamma-Gamma: the fit recovers parameters, expectations against simulation and quadrature, and the borders."""

from __future__ import annotations

import dataclasses
from datetime import date

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import functions as F
from scipy.special import betaln

from bp_spark.core.errors import BundleError, DataError
from bp_spark.model.columns import ACTIVE
from bp_spark.model.members import btyd
from bp_spark.model.members.btyd import BtydMember
from bp_spark.model.members.files import load_member

HORIZON = 90
TRUE = BtydMember(HORIZON, r=1.2, alpha=9.0, a=0.8, b=4.0, p=4.0, q=5.0, gamma=60.0)


def simulated(users: int, horizon: float = HORIZON, seed: int = 0) -> pd.DataFrame:
    """Customers of :data:`TRUE`, as the features see them, and what they buy in the horizon."""
    rng = np.random.default_rng(seed)
    T = rng.integers(60, 300, users).astype(float)
    rate = rng.gamma(TRUE.r, 1 / TRUE.alpha, users)
    drop = rng.beta(TRUE.a, TRUE.b, users)
    purchases = rng.geometric(np.maximum(drop, 1e-12))  # the last one, 1-based, after which the customer is gone
    rows = []
    for user in range(users):
        times = np.cumsum(rng.exponential(1 / rate[user], min(int(purchases[user]), 2000)))
        past = times[times <= T[user]]
        future = int(((times > T[user]) & (times <= T[user] + horizon)).sum())
        nu = rng.gamma(TRUE.q, 1 / TRUE.gamma)
        spend = rng.gamma(TRUE.p, 1 / nu, len(past) + 1 + future)
        past_spend, later = spend[: len(past) + 1], spend[len(past) + 1 :]
        last = past[-1] if len(past) else 0.0
        rows.append((len(past), last, T[user], past_spend.mean(), future, later.sum()))
    frame = pd.DataFrame(rows, columns=[*btyd.FEATURES, "days", "label_spend"])
    return frame.assign(user_key=[f"u{n}" for n in range(users)], as_of_date=date(2024, 1, 1), split="train")


def columns(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    return {name: frame[name].to_numpy(dtype=float) for name in btyd.FEATURES}


def histories(*rows: tuple[float, float, float, float]) -> dict[str, np.ndarray]:
    return dict(zip(btyd.FEATURES, np.array(rows, dtype=float).T, strict=True))


@pytest.fixture(scope="module")
def world() -> pd.DataFrame:
    return simulated(6000)


@pytest.fixture(scope="module")
def fitted(spark, world) -> BtydMember:
    return btyd.fit_btyd(spark.createDataFrame(world), HORIZON)


def test_parameters_of_simulated_customers_are_found_again(fitted):
    assert fitted.r == pytest.approx(TRUE.r, rel=0.1)
    assert fitted.alpha == pytest.approx(TRUE.alpha, rel=0.1)
    assert fitted.a / (fitted.a + fitted.b) == pytest.approx(TRUE.a / (TRUE.a + TRUE.b), rel=0.1)
    assert fitted.p == pytest.approx(TRUE.p, rel=0.1)
    assert fitted.q == pytest.approx(TRUE.q, rel=0.1)
    assert fitted.gamma == pytest.approx(TRUE.gamma, rel=0.15)


def test_expectations_are_what_simulated_customers_do(fitted):
    fresh = simulated(12_000, seed=1)
    values = columns(fresh)
    for member in (TRUE, fitted):
        days = member.purchase_days(*(values[name] for name in btyd.FEATURES[:3]))
        spend = member.predict(values)
        assert days.mean() == pytest.approx(fresh["days"].mean(), rel=0.05)
        assert spend.mean() == pytest.approx(fresh["label_spend"].mean(), rel=0.05)
        fifth = pd.qcut(spend, 5, labels=False)
        means = pd.DataFrame({"predicted": spend, "actual": fresh["label_spend"]}).groupby(fifth).mean()
        np.testing.assert_allclose(means["predicted"], means["actual"], rtol=0.15, atol=1.0)


@pytest.mark.parametrize("a", [0.05, 0.8, 1.0, 1.0 + 1e-9, 3.0, 60.0])
@pytest.mark.parametrize(("r", "alpha", "b"), [(1.2, 9.0, 4.0), (0.01, 100.0, 0.3), (50.0, 300.0, 60.0)])
def test_the_closed_form_is_the_mean_over_the_posterior_of_drop_out(a, r, alpha, b):
    member = BtydMember(HORIZON, r, alpha, a, b, 1.0, 2.0, 1.0)
    for x, t_x, T in ((0.0, 0.0, 5.0), (1.0, 3.0, 200.0), (12.0, 80.0, 100.0), (700.0, 1990.0, 2000.0)):
        # given a rate λ and p, a living customer makes (1 - exp(-λ p t)) / p purchases; λ integrated out by hand
        logit = np.linspace(-600.0, 100.0, 200_001)
        p, log_p, log_rest = 1 / (1 + np.exp(-logit)), -np.logaddexp(0, -logit), -np.logaddexp(0, logit)
        weight = np.exp(a * log_p + (b + x) * log_rest - betaln(a, b + x))
        mean = (weight * -np.expm1(-(r + x) * np.log1p(p * HORIZON / (alpha + T))) / p).sum() / weight.sum()
        history = [np.array([value]) for value in (x, t_x, T)]
        assert member.purchase_days(*history)[0] == pytest.approx(mean * member.p_alive(*history)[0], rel=1e-4)


def test_who_paused_long_is_less_likely_to_be_there_and_who_paid_more_will_again():
    spend = TRUE.predict(histories((10, 199, 200, 20), (10, 100, 200, 20), (10, 20, 200, 20), (10, 20, 200, 40)))
    assert spend[0] > spend[1] > spend[2]
    assert spend[3] > spend[2]


def test_missing_values_and_net_refunds_have_an_answer():
    nan = np.nan
    whole, no_money, refund, nothing, odd = TRUE.predict(
        histories((3, 50, 60, 15), (3, 50, 60, nan), (3, 50, 60, -9), (nan, nan, nan, nan), (-1, 70, 60, np.inf))
    )
    days = TRUE.purchase_days(np.array([3.0]), np.array([50.0]), np.array([60.0]))[0]
    assert no_money == pytest.approx(days * TRUE.p * TRUE.gamma / (TRUE.q - 1))
    assert 0 < refund < whole
    assert np.isfinite([nothing, odd]).all()
    assert min(nothing, odd) >= 0


@pytest.mark.parametrize("horizon", [1, 90, 3650])
def test_the_wildest_histories_give_finite_spend(horizon):
    rng = np.random.default_rng(0)
    T = rng.integers(0, 20_000, 3000).astype(float)
    x = np.floor(rng.random(3000) * (T + 1))
    values = histories(*zip(x, np.floor(rng.random(3000) * T), T, np.exp(rng.normal(0, 8, 3000)), strict=True))
    corners = np.exp(rng.uniform(-6, 6, (60, 6)))
    for r, alpha, a, b, p, q in corners:
        spend = BtydMember(horizon, r, alpha, a, b, p, 1 + q, 10.0).predict(values)
        assert np.isfinite(spend).all()
        assert (spend >= 0).all()


def rows(spark, *given: tuple[int, int, int, float]):
    frame = pd.DataFrame(given, columns=list(btyd.FEATURES)).astype(float)
    return spark.createDataFrame(frame.assign(as_of_date=date(2024, 1, 1), split="train"))


@pytest.mark.parametrize(
    "given",
    [
        [(0, 0, 30 + n, 10.0 + n) for n in range(40)],  # nobody came back
        [(4, 50, 60, 12.5)],  # one user
        [(5, 30, 40, 20.0)] * 30,  # all alike
        [(60, 60, 60, 3.0)] * 20 + [(0, 0, 1, 3.0)],  # every day
        [(2, 20, 30, 8.0), (3, 20, 40, -5.0), (1, 5, 40, 0.0)],  # refunds
    ],
)
def test_degenerate_platforms_still_give_a_sensible_spend(spark, given):
    member = btyd.fit_btyd(rows(spark, *given), HORIZON)
    values = histories(*given)
    spend = member.predict(values)
    assert np.isfinite(spend).all()
    assert (spend >= 0).all()
    # at most somewhat above what their own pace would bring
    pace = (values["frequency"] + 1) / values["tenure_days"] * HORIZON * np.abs(values["monetary_value"]).max()
    assert (spend <= 2 * pace).all()


def test_a_few_customers_are_taken_for_those_of_the_other_platform_and_many_are_not(spark, world, fitted):
    # the same shop in another currency
    other = dataclasses.replace(TRUE, gamma=TRUE.gamma * 7)
    few, fresh = spark.createDataFrame(world.head(15)), columns(simulated(1000, seed=2))
    truth = TRUE.predict(fresh)
    alone, like = (btyd.fit_btyd(few, HORIZON, given).predict(fresh) for given in (None, other))
    assert np.abs(like - truth).mean() < 0.8 * np.abs(alone - truth).mean()
    # of another kind of shop, many customers of one's own take no notice
    strange = BtydMember(HORIZON, r=5.0, alpha=5.0, a=3.0, b=1.0, p=1.0, q=12.0, gamma=1.0)
    beside = btyd.fit_btyd(spark.createDataFrame(world), HORIZON, strange)
    assert beside.predict(fresh).mean() == pytest.approx(fitted.predict(fresh).mean(), rel=0.01)


def test_what_cannot_be_fitted_is_refused_in_words(spark):
    with pytest.raises(DataError, match="no training row has a positive monetary value"):
        btyd.fit_btyd(rows(spark, (2, 10, 30, 0.0), (3, 10, 30, -2.0)), HORIZON)
    with pytest.raises(DataError, match="no training row"):
        btyd.fit_btyd(rows(spark, (2, 10, 30, 5.0)).withColumn("split", F.lit("valid")), HORIZON)
    with pytest.raises(DataError, match=r"training_set\.tenure_days: column is missing"):
        btyd.fit_btyd(rows(spark, (2, 10, 30, 5.0)).drop("tenure_days"), HORIZON)


def test_each_user_counts_once_at_the_newest_cutoff_and_only_training_users(spark, world, fitted):
    old = world.head(2000).assign(as_of_date=date(2023, 12, 1), frequency=1, active_span_days=2.0)
    valid = world.head(2000).assign(split="valid", monetary_value=900.0)
    again = btyd.fit_btyd(spark.createDataFrame(pd.concat([valid, old, world])).repartition(5), HORIZON)
    assert again == fitted


def test_a_platform_too_large_to_count_exactly_is_counted_in_groups(spark, world, fitted, monkeypatch):
    monkeypatch.setattr(btyd, "MAX_ROWS", 1500)
    df = spark.createDataFrame(world)
    counts = btyd._visit_counts(df)
    assert len(counts) <= 1500
    assert counts["users"].sum() == len(world)
    coarse = btyd.fit_btyd(df, HORIZON)
    np.testing.assert_allclose(coarse.predict(columns(world)).mean(), fitted.predict(columns(world)).mean(), rtol=0.05)


def test_a_row_is_predicted_alike_alone_and_in_any_batch(fitted, world):
    values = columns(world.head(300))
    alone = [fitted.predict({k: v[i : i + 1] for k, v in values.items()})[0] for i in range(300)]
    assert fitted.predict(values).tobytes() == np.array(alone).tobytes()
    assert fitted.predict({k: v[:0] for k, v in values.items()}).shape == (0,)


def test_a_saved_member_comes_back_to_the_bit(fitted, world, tmp_path):
    fitted.save(tmp_path)
    back = load_member("btyd", tmp_path)
    assert back == fitted
    assert back.predict(columns(world)).tobytes() == fitted.predict(columns(world)).tobytes()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"r": 1}', "[" * 100_000])
def test_foreign_and_truncated_files_are_refused_by_name(fitted, tmp_path, text):
    (tmp_path / "btyd.json").write_text(text)
    with pytest.raises(BundleError, match=r"btyd\.json"):
        load_member("btyd", tmp_path)


@pytest.mark.parametrize(("key", "value"), [("q", "1.0"), ("alpha", "-3"), ("r", '"much"'), ("b", "1e999")])
def test_impossible_parameters_are_refused_by_name(fitted, tmp_path, key, value):
    fitted.save(tmp_path)
    path = tmp_path / "btyd.json"
    lines = [f' "{key}": {value},' if f'"{key}"' in line else line for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    with pytest.raises(BundleError, match=r"btyd\.json"):
        load_member("btyd", tmp_path)


def test_a_missing_column_is_named(fitted):
    with pytest.raises(BundleError, match="tenure_days"):
        fitted.predict({name: np.ones(2) for name in btyd.FEATURES if name != "tenure_days"})


def test_the_probability_of_a_purchase_is_the_share_of_customers_who_buy(world: pd.DataFrame) -> None:
    p_active = TRUE.predict_activity(columns(world))[ACTIVE]
    bought = world["days"].to_numpy() > 0
    assert ((p_active >= 0) & (p_active <= 1)).all()
    for part in np.array_split(np.argsort(p_active), 8):
        assert p_active[part].mean() == pytest.approx(bought[part].mean(), abs=0.05)
    # nobody buys in no time, and who is alive buys in the end
    nobody = BtydMember(0, TRUE.r, TRUE.alpha, TRUE.a, TRUE.b, TRUE.p, TRUE.q, TRUE.gamma)
    assert (nobody.predict_activity(columns(world))[ACTIVE] == 0).all()
    ever = BtydMember(10**9, TRUE.r, TRUE.alpha, TRUE.a, TRUE.b, TRUE.p, TRUE.q, TRUE.gamma)
    assert ever.predict_activity(histories((0.0, 0.0, 30.0, 9.0)))[ACTIVE][0] == pytest.approx(1.0, abs=1e-6)
