"""Refunds to come: the share of what a user pays that will be paid back, by the user's own past and that of the platform.

Few users have returned enough to be judged by their own share of the past year. So it is a credibility estimate
(:func:`bp_spark.model.credibility.credible_share`), in which the platform's share weighs as much as some of the user's money.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
from scipy.optimize import minimize_scalar

from bp_spark.model.credibility import Money, credible_share
from bp_spark.model.members.base import read_json, write_json
from bp_spark.model.values import number, well_formed

FILE = "refunds.json"
"""File of a bundle that knows refunds to come."""
LEAST_USERS = 100
"""Users with a refund in the horizon that it takes to learn from."""
_LEAST_PRIOR, _MOST_PRIOR = 1e-2, 1e4
"""Bounds of ``prior_paid``, by the mean money of a user."""
_LARGEST = 1e15


@dataclass(frozen=True)
class Refunds:
    """Predicts the share of a user's money that is paid back within the horizon. Frozen; see :meth:`fit`.

    Attributes:
        share: the platform's share, 0 to 1.
        prior_paid: money of a user that it weighs as much as, in the platform's currency.
    """

    share: float
    prior_paid: float

    @staticmethod
    def fit(
        paid: np.ndarray,
        refunded: np.ndarray,
        later_paid: np.ndarray,
        later_refunded: np.ndarray,
        weights: np.ndarray,
    ) -> Refunds | None:
        """Fit on users at past dates; ``None`` where fewer than ``LEAST_USERS`` rows have a refund in the horizon.

        ``prior_paid`` is where squared errors of refunds are least, each over the user's money in the horizon: refunds of
        orders at random have a variance that grows with it. The mean user's money is added to that, so that a refund of an
        earlier order by somebody who hardly bought since weighs little. For each ``prior_paid``, ``share`` makes all expected
        refunds together those that came.

        Args:
            paid: money that each user paid in the year before the date, before refunds, float64 [rows].
            refunded: what of it was paid back, at most ``paid``, float64 [rows].
            later_paid: money paid in the horizon, before refunds, float64 [rows].
            later_refunded: what was paid back in it, float64 [rows].
            weights: of the rows, float64 [rows].
        """
        mean = float(later_paid.mean()) if len(later_paid) else 0.0
        if np.count_nonzero(later_refunded > 0) < LEAST_USERS or mean <= 0:
            return None

        def with_prior(prior_paid: float) -> Refunds:
            own = later_paid / (prior_paid + paid)
            by_platform = prior_paid * float(weights @ own)
            share = float(weights @ (later_refunded - own * refunded)) / by_platform
            return Refunds(min(max(share, 0.0), 1.0), prior_paid)

        def error(log_prior: float) -> float:
            expected = later_paid * with_prior(math.exp(log_prior)).share_of(paid, refunded)
            return float(weights @ ((later_refunded - expected) ** 2 / (later_paid + mean)))

        bounds = math.log(_LEAST_PRIOR * mean), math.log(_MOST_PRIOR * mean)
        return with_prior(math.exp(minimize_scalar(error, bounds=bounds, method="bounded").x))

    def share_of(self, paid: Money, refunded: Money) -> Money:
        """Return the share that will be paid back, 0 to 1: an array for arrays, a column of Spark for columns.

        Args:
            paid: money paid in the year before, before refunds; 0 for users who paid nothing.
            refunded: what of it was paid back, at most ``paid``.
        """
        return credible_share(refunded, paid, self.share, self.prior_paid)

    def save(self, folder: Path) -> None:
        """Write the file into an existing folder."""
        write_json(Path(folder) / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            BundleError: the file is missing, cut short or malformed.
        """
        path = Path(folder) / FILE
        document = read_json(path)
        with well_formed(path):
            if set(document) != {"share", "prior_paid"}:
                raise ValueError("not the keys of refunds")
            prior_paid = number(document["prior_paid"], 1e-9, _LARGEST)
            return cls(number(document["share"], 0.0, 1.0), prior_paid)
