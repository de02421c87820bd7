"""Forecasts of weekly figures of a platform: one series in, the weeks to come with intervals and the errors of the past out.

The mean of the last 8 weeks is taken unless another candidate was better on the same series by more than chance, in a backtest
with rolling origins (Tashman 2000, "Out-of-sample tests of forecasting accuracy"). No origin sees a later week. The candidates
are models of ``statsforecast``: AutoETS, AutoTheta, and from two years on the seasonal naive forecast and MSTL, a
decomposition by loess (Bandara, Hyndman & Bergmeir 2021) of the logarithm. Whether a candidate was better is a test of the
paired differences of absolute errors (Diebold & Mariano 1995).

The choice is part of what is judged. At each origin of the backtest the method is chosen by the errors that were known by
then, and that method's forecast counts. So no week takes part both in the choice and in the reported error. The error is the
mean absolute scaled error (MASE, Hyndman & Koehler 2006): absolute errors over the in-sample mean absolute error of the
seasonal naive forecast of 52 weeks, or of the naive forecast where there are fewer than two years.

Intervals are made of the backtest's errors. Their variance is a line in the weeks ahead, and the quantile is that of Student's
distribution, because a short history has few errors that are independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls
from scipy.stats import t as student

WEEKS_AHEAD = 13
"""Weeks that are forecast."""
LEAST_WEEKS = 8
"""Weeks of history below which there is no forecast."""
LONGEST = 260
"""Most weeks of history that are used: older ones say little, and one row with a date of 1970 would cost much."""
YEAR = 52
AVERAGE, ETS, THETA = "window average", "AutoETS", "AutoTheta"
NAIVE, SEASONAL_NAIVE, DECOMPOSED = "naive", "seasonal naive", "MSTL"

_WINDOW = 8
_LEAST_HISTORY: Mapping[str, int] = {AVERAGE: 1, ETS: 13, THETA: 13, SEASONAL_NAIVE: YEAR, DECOMPOSED: 2 * YEAR}
"""Candidate -> weeks of history that it needs at an origin."""
_ENOUGH = 26
"""Weeks of history from which there is a choice."""
_TWO_YEARS = 2 * YEAR
_ORIGINS = 26
_TIMES_ERROR = 2.0
"""How many standard errors a candidate must be better by."""
_OVERLAP = 4
"""Weeks between origins whose errors count as independent: those of nearer origins are of the same weeks in part."""
_LEAST_JUDGED = 8
"""Origins with known errors from which a candidate is judged."""


@dataclass(frozen=True)
class Forecast:
    """Forecast of a weekly series.

    Attributes:
        expected: float64 [weeks ahead].
        low: lower end of the interval, likewise.
        high: upper end.
        method: the candidate.
        baseline: ``naive`` or ``seasonal naive``.
        mase: mean absolute scaled error of the backtest, with the method that was chosen at each origin; NaN without one.
        mase_baseline: the same of the baseline, at the same origins.
        origins: origins of the backtest.
    """

    expected: np.ndarray
    low: np.ndarray
    high: np.ndarray
    method: str
    baseline: str
    mase: float
    mase_baseline: float
    origins: int


def forecast(actual: np.ndarray, weeks_ahead: int = WEEKS_AHEAD, coverage: float = 0.9) -> Forecast | None:
    """Forecast a weekly series.

    With fewer than 26 weeks the method is the mean of the last 8 weeks. From two years on, seasonal candidates take part, and
    the baseline is seasonal.

    Args:
        actual: the past, oldest week first, float64 [weeks].
        weeks_ahead: weeks to forecast.
        coverage: share of weeks that shall lie in their interval.

    Returns:
        The forecast; ``None`` with fewer than 8 weeks.
    """
    if len(actual) < LEAST_WEEKS:
        return None
    past = np.asarray(actual, np.float64)[-LONGEST:]
    backtest = _Backtest.of(past, weeks_ahead)
    method = backtest.choice(len(past))
    expected = _candidate(method, past, weeks_ahead)
    if expected is None:  # the estimation failed on this series alone, not at the origins
        method, expected = AVERAGE, _average(past, weeks_ahead)
    margin = backtest.margin(method, coverage) * _level(past)
    mase, mase_baseline = backtest.scaled_errors()
    floor = 0.0 if (past >= 0).all() else -np.inf
    return Forecast(
        np.maximum(expected, floor),
        np.maximum(expected - margin, floor),
        np.maximum(expected + margin, floor),
        method,
        backtest.baseline,
        mase,
        mase_baseline,
        len(backtest.origins),
    )


@dataclass(frozen=True)
class _Backtest:
    """Forecasts of the past, from rolling origins.

    Attributes:
        past: the series.
        origins: numbers of weeks that the forecasts see, ascending, int64 [origins].
        errors: candidate -> actual minus forecast, float64 [origins, weeks ahead]; NaN where the week isn't over, or where the
            candidate has no forecast.
        baseline: ``naive`` or ``seasonal naive``.
        baseline_errors: likewise.
    """

    past: np.ndarray
    origins: np.ndarray
    errors: Mapping[str, np.ndarray]
    baseline: str
    baseline_errors: np.ndarray

    @classmethod
    def of(cls, past: np.ndarray, weeks_ahead: int) -> _Backtest:
        weeks = len(past)
        seasonal = weeks >= _TWO_YEARS
        # a quarter of differences to the year before scales the seasonal errors
        first = YEAR + WEEKS_AHEAD if seasonal else min(_ENOUGH, weeks) // 2
        # every other week reaches back a year, so that a season is judged by all its parts
        origins = np.arange(weeks - 1, first - 1, -2 if seasonal else -1)[:_ORIGINS][::-1]
        names = [name for name in _LEAST_HISTORY if weeks >= _ENOUGH or name == AVERAGE]
        if not seasonal:
            names = [name for name in names if name not in (SEASONAL_NAIVE, DECOMPOSED)]
        ahead = origins[:, None] + np.arange(weeks_ahead)
        truth = np.where(ahead < weeks, past[np.minimum(ahead, weeks - 1)], np.nan)
        baseline = SEASONAL_NAIVE if seasonal else NAIVE
        return cls(
            past,
            origins,
            {name: truth - _forecasts(name, past, origins, weeks_ahead) for name in names},
            baseline,
            truth - _forecasts(baseline, past, origins, weeks_ahead),
        )

    def choice(self, now: int) -> str:
        """Return the candidate to take after ``now`` weeks, by the errors that were known then."""
        known = self.origins[:, None] + np.arange(self.baseline_errors.shape[1]) < now
        before = self.origins < now
        absolute = {name: np.where(known, np.abs(errors), np.nan)[before] for name, errors in self.errors.items()}
        best, best_gain = AVERAGE, 0.0
        for name, errors in absolute.items():
            gains = _mean_by_row(absolute[AVERAGE] - errors)
            if len(gains) < _LEAST_JUDGED:
                continue
            error = float(gains.std(ddof=1)) / math.sqrt(self._independent(len(gains)))
            gain = float(gains.mean())
            if gain > max(best_gain, _TIMES_ERROR * error):
                best, best_gain = name, gain
        return best

    def scaled_errors(self) -> tuple[float, float]:
        """Return the MASE of the chosen methods and that of the baseline."""
        lag = YEAR if self.baseline == SEASONAL_NAIVE else 1
        scale = np.array([np.abs(self.past[lag:origin] - self.past[: origin - lag]).mean() for origin in self.origins])
        chosen = np.stack([self.errors[self.choice(origin)][row] for row, origin in enumerate(self.origins)])
        usable = scale > 0
        if not usable.any():
            return np.nan, np.nan
        chosen_error, baseline_error = (
            float(np.nanmean(np.abs(errors[usable]) / scale[usable, None])) for errors in (chosen, self.baseline_errors)
        )
        return chosen_error, baseline_error

    def margin(self, method: str, coverage: float) -> np.ndarray:
        """Return half the width of the interval by weeks ahead, over the level of the series, float64 [weeks ahead]."""
        levels = np.array([_level(self.past[:origin]) for origin in self.origins])
        squares = (self.errors[method] / levels[:, None]) ** 2
        weeks = np.arange(1, squares.shape[1] + 1)
        counts = np.isfinite(squares).sum(axis=0)
        means = np.nansum(squares, axis=0) / np.maximum(counts, 1)
        weights = np.sqrt(counts)
        line = np.stack([np.ones(len(weeks)), weeks], axis=1)
        variance = line @ nnls(line * weights[:, None], means * weights)[0]
        quantile = float(student.ppf((1 + coverage) / 2, self._independent(len(self.origins))))
        return np.asarray(quantile * np.sqrt(variance))

    def _independent(self, origins: int) -> float:
        """Return how many independent origins so many are worth."""
        step = self.origins[-1] - self.origins[-2] if len(self.origins) > 1 else 1
        return max(2.0, origins * float(step) / _OVERLAP)


def _forecasts(name: str, past: np.ndarray, origins: np.ndarray, weeks_ahead: int) -> np.ndarray:
    """Return a candidate's forecasts of each origin, float64 [origins, weeks ahead]; NaN where it has none."""
    rows = [_candidate(name, past[:origin], weeks_ahead) for origin in origins]
    return np.stack([np.full(weeks_ahead, np.nan) if row is None else row for row in rows])


def _candidate(name: str, past: np.ndarray, weeks_ahead: int) -> np.ndarray | None:
    """Return the forecast of a candidate; ``None`` where it needs more history, or can't be estimated."""
    if len(past) < _LEAST_HISTORY.get(name, 1):
        return None
    if name == AVERAGE:
        return _average(past, weeks_ahead)
    from statsforecast import models

    model = {
        ETS: lambda: models.AutoETS(season_length=1),
        THETA: lambda: models.AutoTheta(season_length=1),
        NAIVE: models.Naive,
        SEASONAL_NAIVE: lambda: models.SeasonalNaive(season_length=YEAR),
        DECOMPOSED: lambda: models.MSTL(season_length=YEAR, trend_forecaster=models.AutoETS(model="ZZN")),
    }[name]()
    # a season multiplies: it grows with the platform
    in_logs = name == DECOMPOSED and bool((past > 0).all())
    try:
        mean = model.forecast(y=np.log(past) if in_logs else past, h=weeks_ahead)["mean"]
        expected = np.asarray(np.exp(mean) if in_logs else mean, np.float64)
    except Exception:  # a library's own errors, of series such as one of zeros
        return None
    if not np.isfinite(expected).all():
        return None
    return np.maximum(expected, 0.0) if (past >= 0).all() else expected


def _average(past: np.ndarray, weeks_ahead: int) -> np.ndarray:
    return np.full(weeks_ahead, past[-_WINDOW:].mean())


def _level(past: np.ndarray) -> float:
    """Return what errors are relative to: the mean absolute value of the last weeks, or of all where these are 0."""
    recent = float(np.abs(past[-_WINDOW:]).mean())
    return recent or float(np.abs(past).mean()) or 1.0


def _mean_by_row(values: np.ndarray) -> np.ndarray:
    """Return the mean of each row with a value, NaN left out."""
    rows = values[np.isfinite(values).any(axis=1)]
    return np.nanmean(rows, axis=1) if len(rows) else np.zeros(0)
