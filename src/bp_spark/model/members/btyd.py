"""Buy till you die: expected spend from purchase days and their mean spend alone, the classic baseline of the field.

:func:`fit_btyd` reads ``frequency`` (x), ``active_span_days`` (t_x), ``tenure_days`` (T) and ``monetary_value`` of the training
users. Counts of them come to the driver. The result is a :class:`BtydMember` of seven numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from scipy.optimize import minimize
from scipy.special import betaln, expit, gammaln, hyp2f1

from bp_spark.core.errors import BundleError, DataError
from bp_spark.model.columns import ACTIVE, SILENT, Columns, to_matrix
from bp_spark.model.members.base import SPLIT, TABLE, read_json, require, write_json
from bp_spark.model.values import number, whole

FEATURES = ("frequency", "active_span_days", "tenure_days", "monetary_value")
MAX_ROWS = 200_000
"""Most rows of counts that come to the driver; where there would be more, neighbours are counted together."""

_LONGEST = 100 * 366
"""Most days of a horizon."""
_EXACT = 20
_LOG_STEP = 0.01
_LOG_BOUND = 6.0
_PRIOR_DEVIATION = 5.0
_LIKE_DEVIATION = 1.0
"""Standard deviation of a log parameter around that of another platform."""
_STARTS = ((-1.0, 0.0, -1.0, 1.0), (0.0, 0.0, 0.0, 0.0), (1.0, 1.0, -3.0, 1.0), (-2.0, -2.0, 0.0, 3.0))
_ONE_PLUS = 1.0 + 1e-6


@dataclass(frozen=True)
class BtydMember:
    """Predicts purchase days in the horizon by BG/NBD, and multiplies them by the spend of a day by Gamma-Gamma.

    *BG/NBD* (Fader, Hardie and Lee 2005, "Counting your customers" the easy way, Marketing Science 24): a customer
    buys at rate ``λ ~ Gamma(r, alpha)`` a day and drops out after each purchase with ``p ~ Beta(a, b)``. Equation 10 of the
    paper is the expectation given x repeat purchases, the last at ``t_x``, in ``T`` days.

    *Gamma-Gamma* (Fader and Hardie 2013, "The Gamma-Gamma model of monetary value"): the spend of a purchase day is
    ``Gamma(p, ν)`` with ``ν ~ Gamma(q, gamma)``, so that ``E[M] = p (gamma + n m) / (p n + q - 1)`` given the mean
    ``m`` of ``n`` purchase days. Here ``n = x + 1``: ``monetary_value`` is the mean of all purchase days, the first one
    included.

    A user without ``monetary_value`` gets the mean spend of all. A user without a count or an age counts as new. Net refunds
    count as a mean spend of 0.
    """

    name: ClassVar[str] = "btyd"
    FILE: ClassVar[str] = "btyd.json"

    horizon_days: int
    r: float
    alpha: float
    a: float
    b: float
    p: float
    q: float
    gamma: float

    def purchase_days(self, x: np.ndarray, t_x: np.ndarray, T: np.ndarray) -> np.ndarray:
        """Return the expected purchase days in the horizon, ``float64[rows]``, by equation 10.

        They have two bounds: the mean rate times the horizon, as if nobody dropped out, and ``E[1 / p]``, the mean number of
        purchases that a living customer has left. The smaller bound stands in where the series fails.
        """
        share = self.horizon_days / (self.alpha + T + self.horizon_days)
        # At a = 1 numerator and denominator both vanish; 1e-6 beside it the quotient is good to about six digits.
        a = self.a if abs(self.a - 1.0) > _ONE_PLUS - 1.0 else _ONE_PLUS
        c = a + self.b + x - 1.0
        with np.errstate(all="ignore"):
            # Euler's transformation of the paper's 2F1(r + x, b + x; c; share), which overflows where x is large.
            series = hyp2f1(a + self.b - 1.0 - self.r, a - 1.0, c, share)
            if_alive = c / (a - 1.0) * (1.0 - np.exp((a - 1.0) * np.log1p(-share)) * series)
        bound = (self.r + x) / (self.alpha + T) * self.horizon_days
        if a > 1.0:
            bound = np.minimum(bound, c / (a - 1.0))
        usable = np.isfinite(if_alive) & (if_alive >= 0.0) & (if_alive <= bound)
        return np.asarray(np.where(usable, if_alive, bound) * self.p_alive(x, t_x, T))

    def p_alive(self, x: np.ndarray, t_x: np.ndarray, T: np.ndarray) -> np.ndarray:
        """Return the probability that a user hasn't dropped out by ``T``, ``float64[rows]``; 1 without a repeat purchase."""
        repeats = np.maximum(x, 1.0)
        odds = np.log(self.a / (self.b + repeats - 1.0)) + (self.r + x) * np.log((self.alpha + T) / (self.alpha + t_x))
        return np.where(x > 0.0, expit(-odds), 1.0)

    def spend_per_day(self, n: np.ndarray, m: np.ndarray) -> np.ndarray:
        """Return the expected spend of a further purchase day, ``float64[rows]``, given the mean ``m`` of ``n`` days."""
        return np.asarray(self.p * (self.gamma + n * m) / (self.p * n + self.q - 1.0))

    def predict_activity(self, columns: Columns) -> dict[str, np.ndarray]:
        """Return the probability of a purchase in the horizon and days since the last one, ``float64[rows]`` each.

        A user who is alive buys before dropping out, after a time of Pareto's second kind: the rate is
        ``Gamma(r + x, alpha + T)``.
        """
        x, t_x, T, _ = _visits(columns)
        log_none = (self.r + x) * (np.log(self.alpha + T) - np.log(self.alpha + T + self.horizon_days))
        return {ACTIVE: self.p_alive(x, t_x, T) * -np.expm1(log_none), SILENT: T - t_x}

    @property
    def features(self) -> tuple[str, ...]:
        """Tabular features that it reads."""
        return FEATURES

    def predict(self, columns: Columns) -> np.ndarray:
        """Return the expected spend, ``float64[rows]``; see :meth:`Member.predict`."""
        x, t_x, T, m = _visits(columns)
        n = np.where(np.isnan(m), 0.0, x + 1.0)
        return np.asarray(self.purchase_days(x, t_x, T) * self.spend_per_day(n, np.maximum(np.nan_to_num(m), 0.0)))

    def set_threads(self, threads: int) -> None:
        """Do nothing: a prediction is a few passes over a column."""

    def save(self, folder: Path) -> None:
        """Write ``btyd.json``."""
        write_json(Path(folder) / self.FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``btyd.json``; see :meth:`Member.load`."""
        path = Path(folder) / cls.FILE
        document = read_json(path)
        names = [field.name for field in fields(cls)]
        if set(document) != set(names):
            raise BundleError(f"{path}: not a btyd member")
        try:
            values = {name: number(document[name]) for name in names}
            horizon_days = whole(document["horizon_days"], 1, _LONGEST)
        except (TypeError, ValueError) as error:
            raise BundleError(f"{path}: not a btyd member ({error})") from None
        if min(values.values()) <= 0 or values["q"] <= 1:
            raise BundleError(f"{path}: parameters must be positive, q above 1")
        del values["horizon_days"]
        return cls(horizon_days, **values)


def _visits(columns: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return repeat purchases, day of the last one, age and mean spend (NaN if unknown), float64 [rows] each."""
    x, t_x, T, m = to_matrix(columns, FEATURES, np.float64).T
    x, T = (np.maximum(np.nan_to_num(values), 0.0) for values in (x, T))
    return x, np.clip(np.nan_to_num(t_x), 0.0, T), T, m


def fit_btyd(df: DataFrame, horizon_days: int, like: BtydMember | None = None) -> BtydMember:
    """Fit :class:`BtydMember` by maximum likelihood on the newest cutoff of ``split = 'train'``: each user once.

    The likelihoods need no users, only how many of them have each (x, t_x, T) and each (x, monetary value). Spark counts them,
    and scipy's L-BFGS-B climbs from four starts over the logs of the parameters. Up to 20 purchases x is exact, above it is
    counted in steps of 5 %; monetary value is counted in steps of 1 %. T and t_x are whole days. Where these don't fit into
    :data:`MAX_ROWS` rows they are whole weeks, fortnights and so on, and a group stands at its mean.

    Each log parameter has a normal prior of deviation 5, which weighs less than one user. It decides only what the data leave
    open, such as drop-out where nobody ever came back. With ``like`` the prior has deviation 1 around the parameters of another
    platform's member: users may be few, and shops of one kind are alike. Amounts are in units of either platform's money.

    Args:
        df: ``as_of_date``, ``split`` and :data:`FEATURES`; rows without a tenure are left out.
        horizon_days: days that the member predicts.
        like: the member of another platform.

    Raises:
        DataError: a column is missing, no row is a training row, or no training row has a positive monetary value.
    """
    require(df, [*FEATURES, SPLIT, "as_of_date"])
    train = df.where((F.col(SPLIT) == "train") & (F.col("tenure_days") > 0))
    newest = train.agg(F.max("as_of_date")).first()
    if newest is None or newest[0] is None:
        raise DataError(TABLE, "no training row with a tenure", column="tenure_days")
    users = train.where(F.col("as_of_date") == F.lit(newest[0]))
    values = _value_counts(users)
    if values.empty:
        raise DataError(TABLE, "no training row has a positive monetary value", column="monetary_value")
    r, alpha, a, b = _fit_visits(_visit_counts(users), like)
    p, q, gamma = _fit_values(values, like)
    return BtydMember(horizon_days, r, alpha, a, b, p, q, gamma)


def _visit_counts(users: DataFrame) -> pd.DataFrame:
    """Return ``x, t_x, T, users`` in at most :data:`MAX_ROWS` rows."""
    rows = users.select(
        _whole("frequency").alias("x"), _whole("active_span_days").alias("t_x"), _whole("tenure_days").alias("T")
    )
    days = 1
    while True:
        steps = [F.floor(F.col(name) / days) for name in ("t_x", "T")]
        groups = rows.groupBy(_stepped("x").alias("_x"), steps[0].alias("_t_x"), steps[1].alias("_T")).agg(
            F.count(F.lit(1)).alias("users"), *(F.sum(name).alias(name) for name in ("x", "t_x", "T"))
        )
        if groups.limit(MAX_ROWS + 1).count() <= MAX_ROWS:
            break
        days = 7 if days == 1 else 2 * days
    # Sums of whole numbers in a fixed order: the same users give the same bits however Spark read them.
    counts = groups.toPandas().sort_values(["_x", "_t_x", "_T"]).astype(np.float64)
    means = {name: counts[name] / counts["users"] for name in ("x", "t_x", "T")}
    return pd.DataFrame(means | {"users": counts["users"]})


def _value_counts(users: DataFrame) -> pd.DataFrame:
    """Return ``n, m, users`` of the users with a positive mean spend ``m`` of ``n`` purchase days."""
    rows = users.where(F.col("monetary_value") > 0).select(
        (_whole("frequency") + 1).alias("n"), F.round(F.log("monetary_value") / _LOG_STEP).alias("_m")
    )
    groups = rows.groupBy(_stepped("n").alias("_n"), "_m").agg(F.count(F.lit(1)).alias("users"), F.sum("n").alias("n"))
    counts = groups.toPandas().sort_values(["_n", "_m"]).astype(np.float64)
    m = np.exp(counts["_m"] * _LOG_STEP)
    return pd.DataFrame({"n": counts["n"] / counts["users"], "m": m, "users": counts["users"]})


def _whole(name: str) -> Column:
    """Return a column rounded to whole numbers, at least 0; null becomes 0."""
    return F.greatest(F.coalesce(F.round(F.col(name).cast("double")).cast("long"), F.lit(0)), F.lit(0))


def _stepped(name: str) -> Column:
    """Return a count's group: exact up to :data:`_EXACT`, above in steps of 5 %."""
    value = F.col(name).cast("double")
    return F.when(value <= _EXACT, value).otherwise(_EXACT + F.ceil(F.log(value / _EXACT) / math.log(1.05)))


def _fit_visits(counts: pd.DataFrame, like: BtydMember | None) -> tuple[float, float, float, float]:
    """Fit ``r, alpha, a, b`` of BG/NBD."""
    x, t_x, T, users = (counts[name].to_numpy() for name in ("x", "t_x", "T", "users"))
    t_x = np.minimum(t_x, T)
    day = float(np.average(T, weights=users))

    def loss(logs: np.ndarray) -> float:
        r, alpha, a, b = np.exp(logs)
        return -float(users @ bgnbd_log_likelihood(x, t_x / day, T / day, r, alpha, a, b))

    prior = None if like is None else np.log([like.r, like.alpha / day, like.a, like.b])
    r, alpha, a, b = _most_likely(loss, _STARTS, users.sum(), prior)
    return r, alpha * day, a, b


def bgnbd_log_likelihood(
    x: np.ndarray, t_x: np.ndarray, T: np.ndarray, r: float, alpha: float, a: float, b: float
) -> np.ndarray:
    """Return the log likelihood of each history, ``float64[rows]``: equation 6 of Fader, Hardie and Lee (2005)."""
    repeats = np.maximum(x, 1.0)
    common = gammaln(r + x) - gammaln(r) + r * np.log(alpha) + betaln(a, b + x) - betaln(a, b)
    alive = -(r + x) * np.log(alpha + T)
    dropped = np.log(a) - np.log(b + repeats - 1.0) - (r + x) * np.log(alpha + t_x)
    return np.asarray(common + np.where(x > 0.0, np.logaddexp(alive, dropped), alive))


def _fit_values(counts: pd.DataFrame, like: BtydMember | None) -> tuple[float, float, float]:
    """Fit ``p, q, gamma`` of Gamma-Gamma; ``q > 1``, as otherwise no mean spend exists."""
    n, m, users = (counts[name].to_numpy() for name in ("n", "m", "users"))
    money = float(np.exp(np.average(np.log(m), weights=users)))

    def loss(logs: np.ndarray) -> float:
        p, q, gamma = np.exp(logs[0]), 1.0 + np.exp(logs[1]), np.exp(logs[2])
        return -float(users @ gamma_gamma_log_likelihood(n, m / money, p, q, gamma))

    # the mean of the other platform stands for its money: p * gamma / (q - 1) is 1
    prior = None if like is None else np.log([like.p, like.q - 1.0, (like.q - 1.0) / like.p])
    p, q, gamma = _most_likely(loss, [start[:3] for start in _STARTS], users.sum(), prior)
    return p, 1.0 + q, gamma * money


def gamma_gamma_log_likelihood(n: np.ndarray, m: np.ndarray, p: float, q: float, gamma: float) -> np.ndarray:
    """Return the log density of the mean spend ``m > 0`` of ``n`` purchase days, ``float64[rows]``.

    Source: Fader and Hardie (2013), equation 1a.
    """
    return np.asarray(
        q * (np.log(gamma) - np.log(gamma + n * m))
        + p * n * (np.log(n * m) - np.log(gamma + n * m))
        - np.log(m)
        - betaln(p * n, q)
    )


def _most_likely(
    loss: Callable[[np.ndarray], float],
    starts: Sequence[Sequence[float]],
    users: float,
    prior: np.ndarray | None = None,
) -> tuple[float, ...]:
    """Return the parameters, exponentials of the arguments of ``loss``, of the best optimum.

    Args:
        loss: negative log likelihood of the log parameters.
        starts: of the search.
        users: how many there are.
        prior: means of the log parameters; by default 0, with a prior that is much weaker.
    """
    deviation = _PRIOR_DEVIATION if prior is None else _LIKE_DEVIATION
    mean = np.zeros(len(starts[0])) if prior is None else np.clip(prior, -_LOG_BOUND, _LOG_BOUND)

    def penalised(logs: np.ndarray) -> float:
        return (loss(logs) + float(((logs - mean) ** 2).sum()) / (2 * deviation**2)) / users

    optima = [
        minimize(
            penalised,
            np.asarray(start),
            method="L-BFGS-B",
            jac="3-point",
            bounds=[(-_LOG_BOUND, _LOG_BOUND)] * len(start),
            options={"ftol": 1e-12, "gtol": 1e-7},
        )
        for start in starts
    ]
    return tuple(np.exp(min(optima, key=lambda result: float(result.fun)).x).tolist())
