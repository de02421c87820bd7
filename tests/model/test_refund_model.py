"""Refunds to come: users are told apart as far as their past tells, all expected refunds are those that came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from bp_spark.core.errors import BundleError
from bp_spark.model.refunds import FILE, LEAST_USERS, Refunds

RATE = 0.05


class Shop(NamedTuple):
    """Rate of refunds of each user, and money before a date and from it on."""

    own: np.ndarray
    paid: np.ndarray
    refunded: np.ndarray
    later_paid: np.ndarray
    later_refunded: np.ndarray

    def fit(self) -> Refunds | None:
        return Refunds.fit(*self[1:], weights=np.ones(len(self.own)))


def shop(seed: int, spread: float, users: int = 4_000) -> Shop:
    """Users whose rates of refunds are log-normal; orders come at random, of about 30 each."""
    rng = np.random.default_rng(seed)
    mean = rng.gamma(0.5, 400.0, users)
    own = np.minimum(RATE * np.exp(spread * rng.normal(size=users) - spread**2 / 2), 0.95)

    def money(days: int) -> tuple[np.ndarray, np.ndarray]:
        orders = rng.poisson(mean * days / 365 / 30)
        paid = np.where(orders > 0, rng.gamma(2.0 * np.maximum(orders, 1), 15.0), 0.0)
        return paid, rng.binomial(orders, own) / np.maximum(orders, 1) * paid

    return Shop(own, *money(365), *money(90))


def test_where_all_users_are_alike_nobody_is_told_from_the_platform() -> None:
    found = shop(1, 0.0)
    model = found.fit()
    assert model is not None
    assert model.share == pytest.approx(RATE, rel=0.1)
    assert np.ptp(model.share_of(found.paid, found.refunded)) < 0.03


def test_a_user_who_returns_much_is_told_by_the_own_share_the_more_was_paid() -> None:
    model = shop(2, 1.0).fit()
    assert model is not None
    little, much = (float(model.share_of(paid, 0.5 * paid)) for paid in (20.0, 5_000.0))
    assert model.share < little < 0.15
    assert 0.4 < much < 0.5
    assert model.share_of(0.0, 0.0) == model.share


def test_shares_of_later_users_follow_their_rates_better_than_past_shares_do() -> None:
    model, later = shop(3, 1.0).fit(), shop(4, 1.0)
    assert model is not None
    expected = model.share_of(later.paid, later.refunded)
    past = np.where(later.paid > 0, later.refunded / np.maximum(later.paid, 1e-9), RATE)
    error = {name: np.mean((share - later.own) ** 2) for name, share in {"expected": expected, "past": past}.items()}
    assert error["expected"] < 0.5 * error["past"]
    # calibrated: also among the tenth that is told the largest share
    top = (expected >= np.quantile(expected, 0.9)) & (later.later_paid > 0)
    promised = float((expected * later.later_paid)[top].sum())
    assert promised == pytest.approx(float(later.later_refunded[top].sum()), rel=0.25)


def test_all_expected_refunds_together_are_those_that_came() -> None:
    found = shop(5, 1.0)
    # the shop has become stricter: half as much is paid back as before
    strict = found._replace(later_refunded=found.later_refunded / 2)
    model = strict.fit()
    assert model is not None
    promised = float((model.share_of(found.paid, found.refunded) * found.later_paid).sum())
    assert promised == pytest.approx(float(strict.later_refunded.sum()))


def test_a_large_refund_of_an_earlier_order_hardly_moves_what_others_are_told() -> None:
    found = shop(6, 1.0)
    later_paid, later_refunded = found.later_paid.copy(), found.later_refunded.copy()
    later_paid[0], later_refunded[0] = 0.01, 500.0
    model, usual = found._replace(later_paid=later_paid, later_refunded=later_refunded).fit(), found.fit()
    assert model is not None
    assert usual is not None
    assert model.prior_paid == pytest.approx(usual.prior_paid, rel=0.2)


def test_few_refunds_are_not_learned_from() -> None:
    found = shop(7, 1.0)
    rows = np.flatnonzero(found.later_refunded > 0)
    later_refunded = found.later_refunded.copy()
    later_refunded[rows[LEAST_USERS - 1 :]] = 0.0
    assert found._replace(later_refunded=later_refunded).fit() is None
    assert shop(8, 1.0, users=0).fit() is None


def test_a_file_that_is_not_as_written_is_refused(tmp_path: Path) -> None:
    model = Refunds(0.05, 400.0)
    model.save(tmp_path)
    assert Refunds.load(tmp_path) == model
    for broken in ({"share": 0.05}, {"share": 1.5, "prior_paid": 400.0}, {"share": 0.05, "prior_paid": 0.0}):
        (tmp_path / FILE).write_text(json.dumps(broken))
        with pytest.raises(BundleError, match=rf"{FILE}: malformed"):
            Refunds.load(tmp_path)
