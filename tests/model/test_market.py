"""Weekly forecasts: what a series does is followed, what it does later isn't seen, and intervals hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from bp_spark.model import market
from bp_spark.model.market import forecast

pytest.importorskip("statsforecast")


def noise(seed: int, weeks: int, sd: float = 0.05) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(0, sd, weeks))


def test_a_shop_that_grows_has_a_forecast_that_grows_and_a_flat_one_has_its_mean() -> None:
    weeks = np.arange(93)
    growing = 1000 * np.exp(0.02 * weeks) * noise(1, 93)
    grown = forecast(growing[:80])
    flat = forecast(1000 * noise(2, 80))
    assert grown is not None
    assert flat is not None
    assert grown.method in (market.ETS, market.THETA)
    assert grown.expected == pytest.approx(growing[80:], rel=0.2)
    assert (np.diff(grown.expected) > 0).all()
    assert grown.mase < grown.mase_baseline
    assert flat.expected == pytest.approx([1000.0] * 13, rel=0.03)
    assert (grown.baseline, flat.baseline) == (market.NAIVE, market.NAIVE)


def test_three_years_show_a_season_that_comes_back() -> None:
    weeks = np.arange(169)
    seasonal = 1000 * np.exp(0.4 * np.sin(2 * np.pi * weeks / 52) + 0.005 * weeks) * noise(3, 169, 0.03)
    found = forecast(seasonal[:156])
    assert found is not None
    assert (found.method, found.baseline, found.origins) == (market.DECOMPOSED, market.SEASONAL_NAIVE, 26)
    assert found.expected == pytest.approx(seasonal[156:], rel=0.2)
    assert found.mase < found.mase_baseline


def test_no_origin_sees_a_later_week(monkeypatch: pytest.MonkeyPatch) -> None:
    past = 1000 * noise(4, 40)
    seen: list[np.ndarray] = []
    candidate = market._candidate

    def recorded(name: str, past: np.ndarray, weeks_ahead: int) -> np.ndarray | None:
        seen.append(past)
        return candidate(name, past, weeks_ahead)

    monkeypatch.setattr(market, "_candidate", recorded)
    before = market._Backtest.of(past[:39], 13)
    after = market._Backtest.of(np.append(past[:39], 1e9), 13)
    assert all((one == past[: len(one)]).all() for one in seen if len(one) < 40)
    # a week beyond reason changes the errors of that week, and no forecast or choice of an earlier origin
    for origin in range(20, 39):
        assert before.choice(origin) == after.choice(origin)
        rows = [list(test.origins).index(origin) for test in (before, after)]
        for name in before.errors:
            first, second = (test.errors[name][row] for test, row in zip((before, after), rows, strict=True))
            known = 39 - origin
            np.testing.assert_array_equal(first[:known], second[:known])


def test_the_reported_error_is_of_the_method_that_was_chosen_with_what_was_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    past = 1000 * noise(5, 52)
    lucky = past[-1] * 3

    def candidate(name: str, past: np.ndarray, weeks_ahead: int) -> np.ndarray:
        # knows the future in the newest weeks only: too late to have been chosen for these
        perfect = name == market.ETS and len(past) > 44
        return np.full(weeks_ahead, 1000.0 if perfect or name != market.ETS else lucky)

    monkeypatch.setattr(market, "_candidate", candidate)
    found = forecast(past)
    assert found is not None
    assert found.method == market.AVERAGE
    # forecasts of 1000 at all origins, as the baseline's
    assert found.mase == pytest.approx(found.mase_baseline)


def test_intervals_cover_nine_weeks_of_ten_and_widen_where_less_is_known() -> None:
    inside, widths = [], {12: [], 24: [], 52: []}
    for seed in range(12):
        series = 1000 * noise(seed, 65) * np.exp(np.cumsum(np.random.default_rng(seed).normal(0, 0.02, 65)))
        for weeks in widths:
            found = forecast(series[:weeks], weeks_ahead=8)
            assert found is not None
            actual = series[weeks : weeks + 8]
            inside += list((found.low <= actual) & (actual <= found.high))
            widths[weeks].append(float(np.mean((found.high - found.low) / found.expected)))
            assert (found.low < found.expected).all()
            assert (found.expected < found.high).all()
    assert 0.85 <= np.mean(inside) <= 0.98
    assert np.median(widths[12]) > np.median(widths[52])


def test_a_short_history_has_the_simplest_method_and_almost_none_has_no_forecast() -> None:
    series = 100 * noise(6, 25)
    assert forecast(series[:7]) is None
    for weeks in (8, 25):
        found = forecast(series[:weeks])
        assert found is not None
        assert found.method == market.AVERAGE
        assert found.expected == pytest.approx(series[weeks - 8 : weeks].mean())


@pytest.mark.parametrize(
    "series",
    [np.zeros(40), np.full(40, 7.0), np.r_[np.zeros(39), 5.0], np.tile([-3.0, 9.0], 60)],
    ids=["zeros", "equal", "one", "signs"],
)
def test_odd_series_have_finite_forecasts(series: np.ndarray) -> None:
    found = forecast(series)
    assert found is not None
    ends = np.stack([found.low, found.expected, found.high])
    assert np.isfinite(ends).all()
    assert (np.diff(ends, axis=0) >= 0).all()
    assert series.min() < 0 or ends.min() >= 0
