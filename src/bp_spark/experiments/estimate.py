"""Compare mean spend between the groups of an experiment, with and without the score as covariate; sums in, no users.

Let ``y`` be what a user spent since the assignment and ``x`` what the score expected then. Users are drawn at random, so ``x``
is about the same in all groups. What it explains of ``y`` is noise that can be taken out: a share ``rho²`` of the variance,
where ``rho`` is the correlation of both (CUPED: Deng, Xu, Kohavi and Walker 2013, "Improving the sensitivity of online
controlled experiments by utilizing pre-experiment data").

The adjusted mean of a group is the value of its own least-squares line at the mean ``x`` of all users. The difference of two
such means is the coefficient of the treatment in a regression on treatment, centred ``x`` and their product. It never has a
larger asymptotic variance than the plain difference, whatever the true relation is (Lin 2013, "Agnostic notes on regression
adjustments to experimental data", Annals of Applied Statistics 7(1)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

SAMPLE_RATIO_ALARM = 0.001
"""Below this p-value, users of the groups are not in the shares that they were drawn in (Fabijan et al. 2019)."""
_LEAST_GAP = 1e-12
"""Added to what a leverage lacks to 1: a user who alone decides a slope has no residual, and 0 / 0 would be nothing."""


# --- sums of a group ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Sums over the users of a group, in whole numbers (cents), so that differences of large sums are exact.

    Attributes:
        users: number of users.
        x: sum of the expected spend at the assignment.
        y: sum of the spend since.
        xx: sum of squares of ``x``.
        xy: sum of products.
        yy: sum of squares of ``y``.
    """

    users: int
    x: int
    y: int
    xx: int
    xy: int
    yy: int

    def __add__(self, other: Moments) -> Moments:
        """Return the sums over the users of both groups."""
        return Moments(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def mean_x(self) -> float:
        """Mean expected spend."""
        return self.x / self.users

    @property
    def mean_y(self) -> float:
        """Mean spend."""
        return self.y / self.users

    @property
    def sxx(self) -> float:
        """Sum of squared deviations of ``x``."""
        return (self.users * self.xx - self.x * self.x) / self.users

    @property
    def sxy(self) -> float:
        """Sum of products of deviations."""
        return (self.users * self.xy - self.x * self.y) / self.users

    @property
    def syy(self) -> float:
        """Sum of squared deviations of ``y``."""
        return (self.users * self.yy - self.y * self.y) / self.users

    @property
    def correlation(self) -> float:
        """Correlation of ``x`` and ``y``; 0 where one of them is constant."""
        scale = math.sqrt(self.sxx) * math.sqrt(self.syy)
        return self.sxy / scale if scale > 0 else 0.0

    @property
    def sd_y(self) -> float:
        """Standard deviation of ``y`` between users; 0 for one user."""
        return math.sqrt(self.syy / (self.users - 1)) if self.users > 1 else 0.0


@dataclass(frozen=True)
class Line:
    """The least-squares line of ``y`` on ``x`` within a group, and the point at which groups are compared.

    Attributes:
        users: number of users of the group.
        mean_x: mean of ``x``.
        mean_y: mean of ``y``.
        slope: slope; 0 where all ``x`` are equal.
        inverse_sxx: 1 over the sum of squared deviations of ``x``; 0 where all are equal.
        at: mean ``x`` of the users of all groups.
    """

    users: int
    mean_x: float
    mean_y: float
    slope: float
    inverse_sxx: float
    at: float

    @property
    def value(self) -> float:
        """The adjusted mean: the line at ``at``."""
        return self.mean_y + self.slope * (self.at - self.mean_x)

    def squared_influence(self, x: Any, y: Any) -> Any:
        """Return what a user adds to the variance of the adjusted mean, by the sandwich estimator HC2.

        With leverage ``h`` and residual ``e`` that is ``w² e² / (1 - h)``, where ``w`` is the user's weight in the adjusted
        mean (MacKinnon and White 1985; the default of ``estimatr::lm_lin``). It allows for residuals that spread more
        where more is expected.

        Args:
            x: expected spend: a number, an array or a column of Spark.
            y: spend, likewise.
        """
        apart = x - self.mean_x
        residual = y - self.mean_y - apart * self.slope
        weight = apart * ((self.at - self.mean_x) * self.inverse_sxx) + 1 / self.users
        gap = 1 + _LEAST_GAP - 1 / self.users - apart * apart * self.inverse_sxx
        return weight * weight * residual * residual / gap


def lines(groups: Mapping[str, Moments]) -> dict[str, Line]:
    """Return the line of each group, to be compared at the mean ``x`` of all users together.

    Args:
        groups: group -> sums over its users.
    """
    everyone = sum(groups.values(), start=Moments(0, 0, 0, 0, 0, 0))
    return {
        name: Line(
            users=group.users,
            mean_x=group.mean_x,
            mean_y=group.mean_y,
            slope=group.sxy / group.sxx if group.sxx > 0 else 0.0,
            inverse_sxx=1 / group.sxx if group.sxx > 0 else 0.0,
            at=everyone.mean_x,
        )
        for name, group in groups.items()
    }


# --- two groups beside each other ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """The mean spend of a group.

    Attributes:
        value: the mean.
        variance: of the mean, not of users.
        degrees: degrees of freedom of the variance.
    """

    value: float
    variance: float
    degrees: int


@dataclass(frozen=True)
class Comparison:
    """Mean spend of a group beside that of the control group.

    Attributes:
        difference: mean minus mean of the control group.
        low: lower end of its interval.
        high: upper end.
        standard_error: of the difference.
        relative: difference over the control group's mean; NaN where that is not above 0.
        relative_low: lower end of its interval.
        relative_high: upper end.
        p_value: probability of a difference at least as large, up or down, if there is no effect.
    """

    difference: float
    low: float
    high: float
    standard_error: float
    relative: float
    relative_low: float
    relative_high: float
    p_value: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval of the difference lies on one side of 0."""
        return self.low > 0 or self.high < 0


def unadjusted(group: Moments) -> Mean:
    """Return the plain mean of a group."""
    variance = group.syy / (group.users - 1) / group.users if group.users > 1 else 0.0
    return Mean(group.mean_y, variance, max(group.users - 1, 1))


def adjusted(line: Line, variance: float) -> Mean:
    """Return the adjusted mean of a group.

    Args:
        line: the group's line.
        variance: sum of :meth:`Line.squared_influence` over its users.
    """
    return Mean(line.value, variance, max(line.users - 2, 1))


def compare(control: Mean, treatment: Mean, confidence: float = 0.95) -> Comparison:
    """Compare two means of different users by Welch's t (1947).

    The interval of the relative difference is that of the delta method (Deng, Knoblich and Lu 2018, "Applying the delta method
    in metric analytics").

    Args:
        control: mean of the control group.
        treatment: mean of the other group.
        confidence: of the intervals.
    """
    difference = treatment.value - control.value
    error = math.sqrt(control.variance + treatment.variance)
    if error == 0:
        quantile, p_value = 0.0, 1.0 if difference == 0 else 0.0
    else:
        parts = sum(mean.variance**2 / mean.degrees for mean in (control, treatment))
        degrees = (control.variance + treatment.variance) ** 2 / parts
        quantile = float(stats.t.ppf((1 + confidence) / 2, degrees))
        p_value = float(2 * stats.t.sf(abs(difference) / error, degrees))
    half = quantile * error
    relative = relative_half = math.nan
    if control.value > 0:
        ratio = treatment.value / control.value
        relative = ratio - 1
        relative_half = quantile * math.sqrt(treatment.variance + ratio**2 * control.variance) / control.value
    return Comparison(
        difference=difference,
        low=difference - half,
        high=difference + half,
        standard_error=error,
        relative=relative,
        relative_low=relative - relative_half,
        relative_high=relative + relative_half,
        p_value=p_value,
    )


def sample_ratio_p(users: Sequence[int], shares: Sequence[float]) -> float:
    """Return the p-value of Pearson's chi-squared test that groups have the users that their shares let expect.

    A mismatch says that the groups differ by more than the treatment, so no figure can be trusted (Fabijan et al. 2019,
    "Diagnosing sample ratio mismatch in online controlled experiments").

    Args:
        users: users of each group.
        shares: share in which each group was drawn; they need not add up to 1.
    """
    total = sum(users) / sum(shares)
    return float(stats.chisquare(users, [share * total for share in shares]).pvalue)


# --- how many users -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A planned test of two groups, two-sided.

    Attributes:
        alpha: share of false alarms.
        power: probability to see the effect if it is there.
        share: share of the treatment group among both.
    """

    alpha: float = 0.05
    power: float = 0.8
    share: float = 0.5

    def users(self, spread: float, effect: float, correlation: float = 0.0) -> tuple[int, int]:
        """Return the users of the control group and of the treatment group that the plan takes.

        ``users = (z_(1 - alpha / 2) + z_power)² sd² (1 - rho²) (1 / share + 1 / (1 - share)) / effect²`` for both groups
        together (van Belle 2008, "Statistical rules of thumb", ch. 2; ``1 - rho²`` by Deng et al. 2013).

        Args:
            spread: standard deviation of the spend of users over its mean.
            effect: relative difference of mean spend to be seen.
            correlation: of the spend with the covariate; 0 without one.
        """
        everyone = self._factor(correlation) * (spread / effect) ** 2
        return math.ceil(everyone * (1 - self.share)), math.ceil(everyone * self.share)

    def effect(self, spread: float, users: int, correlation: float = 0.0) -> float:
        """Return the smallest relative difference that the plan sees with so many users in both groups together.

        Args:
            spread: as in :meth:`users`.
            users: users of both groups.
            correlation: as in :meth:`users`.
        """
        return spread * math.sqrt(self._factor(correlation) / users)

    def _factor(self, correlation: float) -> float:
        quantiles = stats.norm.ppf(1 - self.alpha / 2) + stats.norm.ppf(self.power)
        return float(quantiles**2 * (1 - correlation**2) * (1 / self.share + 1 / (1 - self.share)))
