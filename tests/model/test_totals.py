"""Errors of sums: what users share is found among what each has alone, and intervals of groups hold what they promise."""

from __future__ import annotations

import json
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bp_spark.core.errors import BundleError
from bp_spark.model.totals import FILE, TotalError, Totals, interval

DAYS = 90
USERS = 4_000


def shop(seed: int, cutoffs: int, common: float, own: float) -> tuple[pd.DataFrame, np.ndarray]:
    """Users of a gamma population at past cutoffs, moved together by a normal log level, and by one of their fifth.

    Spend is a Poisson number of orders of about 30 each.
    """
    rng = np.random.default_rng(seed)
    frames, expected = [], []
    for step in range(cutoffs):
        mean = rng.gamma(0.5, 200.0, USERS)
        fifth = np.searchsorted(np.quantile(mean, [0.2, 0.4, 0.6, 0.8]), mean)
        level = np.exp(rng.normal(-(common**2) / 2, common) + rng.normal(-(own**2) / 2, own, 5)[fifth])
        orders = rng.poisson(mean * level / 30)
        spend = np.where(orders > 0, rng.gamma(np.maximum(4 * orders, 1), 7.5), 0.0)
        day = date(2024, 1, 1) - timedelta(days=DAYS * step)
        frames.append(pd.DataFrame({"as_of_date": day, "label_spend": spend, "fifth": fifth}))
        expected.append(mean)
    return pd.concat(frames, ignore_index=True), np.concatenate(expected)


def fit(frame: pd.DataFrame, expected: np.ndarray, **more: float) -> Totals:
    arguments = {"main": DAYS, "level_sd": 0.1, "forecasts": 30.0, "coverage": 0.9} | more
    return Totals.fit(frame, {DAYS: expected}, np.ones(len(frame)), **arguments)  # type: ignore[arg-type]


def test_the_variance_of_a_user_is_that_of_orders_at_random() -> None:
    (error,) = fit(*shop(1, 8, 0.0, 0.0)).errors
    # orders of 30 in the mean, whose square has a mean near 1,100: a variance of some 37 times the mean
    assert error.dispersion == pytest.approx(37, rel=0.1)
    assert error.quadratic < 0.02
    assert error.segment_sd < 0.03


def test_what_is_not_known_of_a_user_grows_with_the_square_of_the_expected_spend() -> None:
    frame, expected = shop(9, 8, 0.0, 0.0)
    frame["label_spend"] *= np.random.default_rng(9).gamma(4, 1 / 4, len(frame))
    (error,) = fit(frame, expected).errors
    assert error.quadratic == pytest.approx(1 / 4, rel=0.2)


def test_what_users_of_a_segment_share_is_told_from_chance() -> None:
    (error,) = fit(*shop(2, 30, 0.1, 0.08)).errors
    # between two cutoffs both move; the ratio is to all, most of whose spend is that of one fifth
    assert 0.05 < error.segment_sd < 0.15


def test_nine_of_ten_sums_lie_in_their_interval() -> None:
    totals = fit(*shop(3, 40, 0.1, 0.06), level_sd=0.1)
    (error,) = totals.errors
    later, expected = shop(4, 200, 0.1, 0.06)
    later["expected"] = expected
    later["variance"] = error.variance(expected)
    inside = {}
    for everyone, group in ((True, ["as_of_date"]), (False, ["as_of_date", "fifth"])):
        sums = later.groupby(group)[["label_spend", "expected", "variance"]].sum()
        ends = [
            interval(mean, variance, error, totals.coverage, everyone=everyone)
            for mean, variance in zip(sums["expected"], sums["variance"], strict=True)
        ]
        inside[everyone] = np.mean(
            [low <= spent <= high for spent, (low, high) in zip(sums["label_spend"], ends, strict=True)]
        )
    assert inside[True] == pytest.approx(0.9, abs=0.07)
    assert inside[False] == pytest.approx(0.9, abs=0.07)


@pytest.mark.parametrize("errors", [0, 1, 4])
def test_an_interval_allows_for_a_variance_that_few_errors_tell(errors: int) -> None:
    rng = np.random.default_rng(errors)
    # of worlds whose variance lies about the assumed one as much as two errors would tell
    variances = 0.05**2 * 2 / rng.chisquare(2, 20_000)
    seen = rng.normal(0.0, np.sqrt(variances), (errors, len(variances)))
    learned = np.sqrt((np.square(seen).sum(axis=0) + 2 * 0.05**2) / (errors + 2))
    surprise = np.abs(rng.normal(0.0, np.sqrt(variances))) / learned
    quantile = TotalError(DAYS, 0.05, 0.0, 0.0, 0.0, errors).quantile(0.9)
    assert np.mean(surprise <= quantile) == pytest.approx(0.9, abs=0.01)
    assert np.mean(surprise <= 1.645) < 0.87


def test_another_horizon_leans_on_the_level_until_it_has_horizons_of_its_own() -> None:
    frame, expected = shop(5, 12, 0.3, 0.0)
    frame["label_spend_30d"] = frame["label_spend"] / 3
    both = {DAYS: expected, 30: expected / 3}
    weights = np.ones(len(frame))
    of_many = Totals.fit(frame, both, weights, main=DAYS, level_sd=0.1, forecasts=0.0, coverage=0.9).errors
    assert [error.days for error in of_many] == [30, DAYS]
    assert of_many[1].common_sd == 0.1
    assert of_many[0].common_sd == pytest.approx(0.3, rel=0.5)
    one = frame["as_of_date"] == frame["as_of_date"].max()
    (alone, _) = Totals.fit(
        frame[one],
        {days: values[one.to_numpy()] for days, values in both.items()},
        weights[one.to_numpy()],
        main=DAYS,
        level_sd=0.1,
        forecasts=0.0,
        coverage=0.9,
    ).errors
    assert alone.horizons == 0
    assert alone.common_sd < of_many[0].common_sd


def test_where_nobody_spends_there_is_no_error_but_that_of_the_level() -> None:
    frame, expected = shop(6, 2, 0.0, 0.0)
    frame["label_spend"] = 0.0
    (error,) = fit(frame, np.zeros_like(expected), level_sd=0.2).errors
    assert (error.common_sd, error.segment_sd, error.dispersion) == (0.2, 0.05, 0.0)


def test_the_interval_of_nothing_is_nothing_and_that_of_one_user_is_wide() -> None:
    totals = fit(*shop(7, 4, 0.0, 0.0))
    (error,) = totals.errors
    assert interval(0.0, 0.0, error, totals.coverage) == (0.0, 0.0)
    low, high = interval(100.0, 100 * error.dispersion + 10_000 * error.quadratic, error, totals.coverage)
    assert 0 < low < 40
    assert 150 < high < 400


def test_a_file_comes_back_bit_for_bit_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    totals = fit(*shop(8, 3, 0.1, 0.1))
    totals.save(tmp_path)
    assert Totals.load(tmp_path) == totals
    document = json.loads((tmp_path / FILE).read_text())
    for wrong in (
        {**document, "coverage": 2},
        {**document, "errors": [{**document["errors"][0], "quadratic": -1}]},
        {**document, "errors": [{"days": 90}]},
        {"errors": []},
        {**document, "errors": 5},
    ):
        (tmp_path / FILE).write_text(json.dumps(wrong))
        with pytest.raises(BundleError, match=r"totals\.json: malformed"):
            Totals.load(tmp_path)
