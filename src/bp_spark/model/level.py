"""The platform's level: the factor by which the season moves everyone's spend, and its uncertainty.

Members learn from recent cutoffs what follows a user's past. If no recent horizon had a December, they can't predict that
spend rises in December. The platform's weekly totals tell whether there is such a season, by two forecasts of the horizon:

- *Steady*: the level of the last weeks times the ratio of horizon to last weeks at the training cutoffs. It stands for the
  members' predictions.
- *Seasonal*: the level of the last weeks times the same ratio 52 weeks earlier (seasonal naive with growth; Hyndman &
  Athanasopoulos 2021, "Forecasting: Principles and Practice", 5.2).

The level is the calendar's effect in :attr:`WeeklySpend.decomposed`, which allows for the falling spend of ageing cohorts.
:meth:`Level.fit` makes both forecasts for each past week whose horizon is over. It then measures which share of the way from
the steady to the seasonal forecast was right. That share is the *evidence*, if it is significant and pays. Without a season it
is 0 and the factor is 1. From 13 to 21 months of data there is a year before, but no past week to try the seasonal forecast on.
If steady forecasts failed by more than the noise of single weeks explains, a season is *assumed* then: :func:`_assumed`.

With two years of data the factor is what the members themselves miss around the same date of the year before
(:meth:`Level.as_a_year_before`): their predictions know how many users there are and how much each buys. With less, the users'
histories were too short then. The factor goes from the members' total towards that of the weeks
(:meth:`WeeklySpend.seasonal_total`, :meth:`Level.towards`). The error of past forecasts gives the standard deviation of the
level. All users share that error, so intervals allow for it.

A season moves how often people order, too. The odds of buying at all follow the factor by a power: the one that the members
would have needed around the same date of the year before (:meth:`Level.with_odds`). A season that is assumed moves the odds as
much as the spend.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
from scipy.stats import norm

from bp_spark.core.config import FusionConfig
from bp_spark.features.labels import WEEKS_A_YEAR
from bp_spark.model.curve import Curve, as_json, curve_from_json
from bp_spark.model.odds import with_log_odds
from bp_spark.model.values import floats, number, well_formed

_WINDOWS = (4, 13, 26, 52)
"""Candidate windows, in weeks: the spend of the last weeks that stands for the level."""
PRIOR_SD, _PRIOR_WEIGHT = 0.05, 2.0
"""Standard deviation of the log level without past forecasts, and its weight in independent forecasts."""
_MOST = math.log(3.0)
"""Largest absolute log factor: a gap beyond it is an error in the data, not a season."""
_LONGEST = 8 * WEEKS_A_YEAR
"""Most weeks that are used: an older season says little, and one row with a date of 1970 would cost much."""
_ROUNDS = 100
"""Rounds of proportional fitting."""
_FLAT = Curve((0.0,), (0.0,))
_EPISODES = 2.5
"""Fewest independent past forecasts, counted in horizons, that can be evidence."""
_TIMES_ERROR = 2.0
"""How many standard errors the evidence must differ from 0 by."""
_GAIN = 0.05
"""Least gain in the standard deviation of the log level: a season that gains less isn't worth the risk of chance."""
_YEARLY = 0.8
"""Chance that what moves a shop's level beyond chance is its season, and comes back after a year."""
_LEAST_SHIFT = 0.06
"""Least standard deviation of the log factor of a season that is assumed."""
_LEAST_WEEKS = 26
"""Least changes from week to week that tell the noise of single weeks."""
_QUARTER = 13
_MARGIN = 1.25
"""Factor by which a shift may exceed the largest shift of past weeks."""
_LEAST_MOVED = 0.05
"""Least absolute log factor that a power of the odds is learned from. The power divides by it, so a smaller one gives noise."""
_MOST_ODDS = 2.0
"""Largest power of the odds. Orders at random have 1 where few buy, and 2 where four in five do."""
_BACK = 26
"""Weeks before the fit for which there is a factor, too: a bundle may be judged at an earlier date."""


@dataclass(frozen=True)
class WeeklySpend:
    """Spend of the platform by week, counted back: week 0 is the seven days before ``end``.

    Attributes:
        end: the first day that the data don't have.
        cohorts: money, float64 [weeks, weeks]: by week of the user's first order (the last row holds older ones, too), and by
            week of the spend. Whole weeks only, the newest eight years.
    """

    end: date
    cohorts: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int, int]], first: date, end: date) -> Self:
        """Gather rows of :func:`bp_spark.features.labels.weekly_spend`.

        Args:
            rows: week of the first order, week of the spend, cents.
            first: the first day with events.
            end: the first day that the data don't have.
        """
        weeks = min(max(0, (end - first).days // 7), _LONGEST)
        cohorts = np.zeros((weeks, weeks))
        for first_week, week, cents in rows:
            if week < weeks:
                # Cents are whole numbers, so their order changes no bit of the sum.
                cohorts[min(first_week, weeks - 1), week] += cents
        return cls(end, cohorts / 100)

    @cached_property
    def decomposed(self) -> Decomposition:
        """Effects of the users' ages and of the calendar on the spend of the weeks.

        The model of a cohort's spend in a week is a product: the cohort's size, an effect of its age (users come back less and
        less), and an effect of the calendar. They are fitted by maximum likelihood of a Poisson model (iterative proportional
        fitting, Deming & Stephan 1940). So a shop whose users are all new isn't mistaken for one in low season.
        """
        count = len(self.cohorts)
        first, week = np.meshgrid(np.arange(count), np.arange(count), indexing="ij")
        lived = first >= week
        spent = np.where(lived, np.maximum(self.cohorts, 0.0), 0.0)
        age = np.where(lived, first - week, 0)
        size, by_age, calendar = np.ones(count), np.ones(count), np.ones(count)
        by_age_spent = np.bincount(age[lived], spent[lived], count)
        for _ in range(_ROUNDS):
            size = _shares(spent.sum(axis=1), (by_age[age] * calendar * lived).sum(axis=1))
            fitted = size[:, None] * calendar * lived
            by_age = _shares(by_age_spent, np.bincount(age[lived], fitted[lived], count))
            calendar = _shares(spent.sum(axis=0), (size[:, None] * by_age[age] * lived).sum(axis=0))
            calendar /= max(calendar.mean(), 1e-300)
        return Decomposition(size, by_age, calendar)

    def seasonal_total(self, horizon_days: int) -> float | None:
        """Return what the users seen so far will spend together in the horizon, if the season of the year before comes back.

        Cohorts go on as older ones did at their age. The calendar goes on from the last weeks as it did a year before.

        Args:
            horizon_days: days from ``end`` on.

        Returns:
            Money; ``None`` without the whole horizon of the year before and the weeks before it.
        """
        horizon, weeks, recent = max(1, round(horizon_days / 7)), len(self.cohorts), _WINDOWS[0]
        if weeks < WEEKS_A_YEAR + recent or not self.cohorts.any():
            return None
        parts = self.decomposed
        before = _before(parts.calendar, recent)
        log_calendar = before[0] + _after(parts.calendar, horizon)[WEEKS_A_YEAR] - before[WEEKS_A_YEAR]
        # the mean of the oldest quarter stands for higher ages
        by_age = np.concatenate([parts.by_age, np.full(horizon, parts.by_age[-_QUARTER:].mean())])
        age = np.arange(weeks)[:, None] + 1 + np.arange(horizon)
        total = float((parts.size[:, None] * by_age[age]).sum()) * math.exp(log_calendar)
        return total if math.isfinite(total) else None


class Decomposition(NamedTuple):
    """Effects whose product is the spend of a cohort in a week; see :attr:`WeeklySpend.decomposed`.

    Attributes:
        size: of cohorts, by week of the first order, float64 [weeks].
        by_age: effect of the weeks since the first order, float64 [weeks].
        calendar: effect of each week, float64 [weeks], mean 1.
    """

    size: np.ndarray
    by_age: np.ndarray
    calendar: np.ndarray


@dataclass(frozen=True)
class Level:
    """Factor of everyone's spend by date. Frozen; see :meth:`fit`.

    Attributes:
        as_of: the date of the fit, as YYYY-MM-DD.
        evidence: which share of the way to the seasonal forecast was right in past weeks, or is assumed to be; 0: the season
            isn't followed.
        reach: largest absolute ``log_factor``: no season has moved the past weeks much further.
        log_factor: natural logarithm of the factor, by days since ``as_of``.
        sd: standard deviation of the log level's error.
        odds: power by which the odds of buying follow the factor; 0: they stay.
        forecasts: how many independent past forecasts ``sd`` was measured on.
    """

    as_of: str
    evidence: float
    reach: float
    log_factor: Curve
    sd: float
    odds: float = 0.0
    forecasts: float = 0.0

    @classmethod
    def fit(
        cls, spend: WeeklySpend, horizon_days: int, ages: Sequence[int], conf: FusionConfig, prior_sd: float = PRIOR_SD
    ) -> Self:
        """Fit the evidence for a season and the remaining error.

        The factor is relative to that of ``as_of``: :meth:`as_a_year_before` or :meth:`towards` completes it.

        Args:
            spend: of the platform, up to the date of the fit.
            horizon_days: days of spend that the model predicts.
            ages: days between a date and each of the cutoffs that a training as of that date uses.
            conf: how fast cutoffs lose weight, and whether there may be a season.
            prior_sd: standard deviation of the log level without past forecasts.
        """
        horizon = max(1, round(horizon_days / 7))
        as_of = spend.end.isoformat()
        if not spend.cohorts.any():
            return cls(as_of, 0.0, 0.0, _FLAT, prior_sd)
        index = spend.decomposed.calendar
        ratios = {weeks: _after(index, horizon) - _before(index, weeks) for weeks in _WINDOWS}
        steady = {weeks: _steady(ratio, ages, conf.half_life_days) for weeks, ratio in ratios.items()}
        errors = {weeks: ratios[weeks] - steady[weeks] for weeks in _WINDOWS}
        # With less than two years of data, a long window leaves too few weeks to judge by.
        by = _best({w: error for w, error in errors.items() if _independent(error, horizon) >= _EPISODES} or errors)
        sd = _sd(errors[by], horizon, prior_sd)
        year_ago = {weeks: _shifted(ratio, WEEKS_A_YEAR) for weeks, ratio in ratios.items()}
        misses = {
            weeks: miss
            for weeks, ratio in ratios.items()
            if _independent(miss := ratio - year_ago[weeks], horizon) >= _EPISODES
        }
        if misses:
            seasonal_by = _best(misses)
            seasonal = _before(index, seasonal_by) + year_ago[seasonal_by]
            by = _best(
                {weeks: np.where(np.isfinite(misses[seasonal_by]), error, np.nan) for weeks, error in errors.items()}
            )
            shifts = seasonal - (_before(index, by) + steady[by])
            evidence = _evidence(errors[by], shifts, horizon)
            sd_left = _sd(errors[by] - evidence * shifts, horizon, prior_sd)
            evidence = evidence if sd - sd_left >= _GAIN else 0.0
        else:
            # how far the level moved stands for how far a season moves it
            shifts = np.where(np.arange(len(steady[by])) == 0, year_ago[by] - steady[by], errors[by])
            evidence, sd_left = _assumed(index, sd, by, horizon)
        forecasts = _independent(errors[by], horizon)
        if not conf.season or evidence == 0 or not np.isfinite(shifts[0]):
            return cls(as_of, 0.0, 0.0, _FLAT, sd, forecasts=forecasts)
        reach = min(_MARGIN * float(np.nanmax(np.abs(shifts))), _MOST)
        ahead = np.arange(-_BACK, WEEKS_A_YEAR - horizon + 1)
        ahead = ahead[WEEKS_A_YEAR - ahead < len(index)]
        # Change of last year's ratio from the week of the fit to each other week, which members don't predict.
        changes = evidence * (ratios[by][WEEKS_A_YEAR - ahead] - ratios[by][WEEKS_A_YEAR])
        return cls(as_of, evidence, reach, _course(7.0 * ahead, changes), sd_left, forecasts=forecasts)

    def of_horizon(self, spend: WeeklySpend, horizon_days: int) -> Self:
        """Return the level of another horizon, to be completed: the same evidence, and the course of that horizon.

        Args:
            spend: that this level was fitted on.
            horizon_days: days of the other horizon.
        """
        horizon, days = max(1, round(horizon_days / 7)), np.array(self.log_factor.x)
        index = spend.decomposed.calendar
        # members follow the level of about the last quarter
        ratio = _after(index, horizon) - _before(index, _QUARTER)
        weeks = np.clip(WEEKS_A_YEAR - np.round(days / 7).astype(int), 0, len(ratio) - 1)
        changes = self.evidence * (ratio[weeks] - ratio[min(WEEKS_A_YEAR, len(ratio) - 1)])
        return replace(self, log_factor=_course(days, changes))

    def as_a_year_before(self, spent: float, expected: float) -> Self:
        """Return the level with the factor that members would have needed a year before; 1 without evidence or a comparison.

        Args:
            spent: in the horizons from these dates on, in money.
            expected: the members' predictions of that, without any factor.
        """
        return self._completed(spent, expected, 1.0)

    def towards(self, total: float, expected: float) -> Self:
        """Return the level with a factor that leads from the members' total to another forecast, by the share ``evidence``.

        Args:
            total: :meth:`WeeklySpend.seasonal_total`.
            expected: the members' predictions of the same, without any factor.
        """
        return replace(self._completed(total, expected, self.evidence), odds=1.0)

    def with_odds(self, p_active: np.ndarray, bought: np.ndarray) -> Self:
        """Return the level whose odds of buying are right in total around the same date of the year before.

        Args:
            p_active: the members' P(spend > 0), without any factor, float64 [rows].
            bought: whether they spent anything, boolean [rows].
        """
        log_factor = math.log(self.factor())
        if abs(log_factor) < _LEAST_MOVED:
            return replace(self, odds=0.0)
        # the number of buyers rises with the power, or falls with it where the season is low
        sign, powers = math.copysign(1.0, log_factor), np.linspace(0.0, _MOST_ODDS, 201)
        buyers = [sign * float(with_log_odds(p_active, power * log_factor).sum()) for power in powers]
        return replace(self, odds=float(np.interp(sign * bought.sum(), buyers, powers)))

    def _completed(self, actual: float, expected: float, share: float) -> Self:
        if not self.evidence or actual <= 0 or expected <= 0:
            return replace(self, evidence=0.0, reach=0.0, log_factor=_FLAT)
        missed = share * math.log(actual / expected)
        log_factors = np.clip(missed + np.array(self.log_factor.y), -self.reach, self.reach)
        return replace(self, log_factor=Curve(self.log_factor.x, floats(log_factors)))

    def factor(self, on: date | None = None) -> float:
        """Return the factor of the spend from a date on, by default from ``as_of``."""
        days = 0 if on is None else (on - date.fromisoformat(self.as_of)).days
        return math.exp(float(self.log_factor(np.array(float(days)))))

    def log_odds(self, on: date | None = None) -> float:
        """Return what is added to everyone's log odds of buying from a date on, by default from ``as_of``."""
        return self.odds * math.log(self.factor(on))

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a JSON file; floats come back bit for bit."""
        return as_json(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Return the level that :meth:`to_json` wrote; ``BundleError`` where it is malformed."""
        with well_formed("level"):
            # a level of an older bundle leaves the odds where they are
            added = {"odds": 0.0, "forecasts": 0.0}
            if set(document) | set(added) != {field.name for field in fields(cls)}:
                raise ValueError("not the keys of a level")
            document = added | dict(document)
            as_of = date.fromisoformat(document["as_of"]).isoformat()
            evidence, reach = number(document["evidence"], 0, 1), number(document["reach"], 0, _MOST)
            log_factor, sd = curve_from_json(document["log_factor"], -_MOST, _MOST), number(document["sd"], 0)
            odds, forecasts = number(document["odds"], 0, _MOST_ODDS), number(document["forecasts"], 0, _LONGEST)
            return cls(as_of, evidence, reach, log_factor, sd, odds, forecasts)


def _course(days: np.ndarray, changes: np.ndarray) -> Curve:
    """Return the curve of the changes that are known, by days since the fit; flat where none is."""
    usable = np.isfinite(changes)
    return Curve(floats(days[usable]), floats(changes[usable])) if usable.any() else _FLAT


def _steady(ratio: np.ndarray, ages: Sequence[int], half_life_days: float | None) -> np.ndarray:
    """Return the weighted mean log ratio at the training cutoffs of each week, of those that the data have."""
    summed, weights = np.zeros(len(ratio)), np.zeros(len(ratio))
    for age in ages:
        at_cutoff = _shifted(ratio, round(age / 7))
        weight = 1.0 if half_life_days is None else 0.5 ** ((age - min(ages)) / half_life_days)
        usable = np.isfinite(at_cutoff)
        summed[usable] += weight * at_cutoff[usable]
        weights[usable] += weight
    return np.asarray(np.divide(summed, weights, out=np.full(len(ratio), np.nan), where=weights > 0))


def _best(errors: Mapping[int, np.ndarray]) -> int:
    """Return the window of least mean square error, over the weeks with errors of most windows; else the shortest window."""
    has_error = np.array([np.isfinite(error) for error in errors.values()])
    common = has_error.sum(axis=0) == max(has_error.sum(axis=0).max(), 1)
    squares = {weeks: error[common & np.isfinite(error)] ** 2 for weeks, error in errors.items()}
    return min(squares, key=lambda weeks: (float(squares[weeks].mean()) if len(squares[weeks]) else math.inf, weeks))


def _independent(errors: np.ndarray, horizon: int) -> float:
    """Return how many independent forecasts weekly ones are worth: those whose horizons overlap count as one."""
    count = int(np.isfinite(errors).sum())
    return 1 + (count - 1) / horizon if count else 0.0


def _evidence(steady_errors: np.ndarray, seasonal_shifts: np.ndarray, horizon: int) -> float:
    """Return the share of the way to the seasonal forecast that was right, 0 to 1; 0 where it isn't significant.

    Args:
        steady_errors: log truth less log steady forecast of each week; NaN where unknown.
        seasonal_shifts: log seasonal less log steady forecast; NaN where unknown.
        horizon: weeks of a forecast.
    """
    usable = np.isfinite(steady_errors) & np.isfinite(seasonal_shifts)
    errors, shifts = steady_errors[usable], seasonal_shifts[usable]
    independent = _independent(errors, horizon)
    if independent < _EPISODES or not shifts.any():
        return 0.0
    slope = float(shifts @ errors) / float(shifts @ shifts)
    variance = float(np.mean((errors - slope * shifts) ** 2)) * independent / (independent - 1)
    squared_error = variance / (independent * float(np.mean(shifts**2)))
    return min(slope, 1.0) if slope > 0 and slope**2 > _TIMES_ERROR**2 * squared_error else 0.0


def _assumed(index: np.ndarray, sd: float, by: int, horizon: int) -> tuple[float, float]:
    """Return the share of the way to a seasonal forecast that is followed untried, and the remaining error.

    Steady forecasts err by the noise of single weeks, and by what moves the level. The latter comes back after a year with
    the chance :data:`_YEARLY`; otherwise the movement of the year before says nothing. Of the two, and of the noise in the
    seasonal forecast, the share is that of the least expected square error.

    Args:
        index: of the weeks, the newest first.
        sd: of the errors of steady forecasts.
        by: window of these, in weeks.
        horizon: weeks of a forecast.
    """
    with np.errstate(divide="ignore"):
        logs = np.log(index)
    steps = np.abs(np.diff(logs[np.isfinite(logs)]))
    if len(steps) < _LEAST_WEEKS:
        return 0.0, sd
    # the median, which a few weeks of a promotion don't move, as a normal standard deviation
    week_variance = float((np.median(steps) / norm.ppf(0.75)) ** 2 / 2)
    # a forecast has the noise of its own weeks and of those that it learned from
    noise = 2 * week_variance * (1 / horizon + 1 / by)
    moved = max(0.0, sd**2 - noise)
    share = _YEARLY * moved / (moved + noise) if moved else 0.0
    if share * math.sqrt(moved) < _LEAST_SHIFT:
        return 0.0, sd
    left = moved * (_YEARLY * (1 - share) ** 2 + (1 - _YEARLY) * (1 + share**2)) + noise * (1 + share**2)
    return share, min(sd, math.sqrt(left))


def _sd(errors: np.ndarray, horizon: int, prior_sd: float) -> float:
    """Return the standard deviation of the log level by the errors of past forecasts, shrunk to a prior."""
    independent = _independent(errors, horizon)
    squares = independent * float(np.mean(errors[np.isfinite(errors)] ** 2)) if independent else 0.0
    return math.sqrt((squares + _PRIOR_WEIGHT * prior_sd**2) / (independent + _PRIOR_WEIGHT))


def _before(index: np.ndarray, weeks: int) -> np.ndarray:
    """Return the log mean index of ``weeks`` weeks before each date, the newest date first; NaN where there are fewer."""
    total = np.concatenate([[0.0], np.cumsum(index)])
    means = np.full(len(index) + 1, np.nan)
    if weeks <= len(index):
        means[: len(index) + 1 - weeks] = (total[weeks:] - total[: len(total) - weeks]) / weeks
    return np.log(np.where(means > 0, means, np.nan))


def _after(index: np.ndarray, weeks: int) -> np.ndarray:
    """Return the log mean index of ``weeks`` weeks from each date on, the newest date first; NaN where they aren't over."""
    means = np.full(len(index) + 1, np.nan)
    means[weeks:] = _before(index, weeks)[: max(0, len(index) + 1 - weeks)]
    return means


def _shares(spent: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Return the ratio of actual to fitted spend; 0 where nothing is fitted."""
    return np.asarray(np.divide(spent, fitted, out=np.zeros(len(spent)), where=fitted > 0))


def _shifted(values: np.ndarray, weeks: int) -> np.ndarray:
    """Return for each date the value of ``weeks`` weeks before it; NaN where there is none."""
    shifted = np.full(len(values), np.nan)
    if weeks < len(values):
        shifted[: len(values) - weeks] = values[weeks:]
    return shifted
