"""Who gains from a treatment: T- and X-learner, and the Qini curve of a ranking by them.

The T-learner is the difference of two models of spend, one of each group. The X-learner (Künzel, Sekhon, Bickel and Yu 2019,
"Metalearners for estimating heterogeneous treatment effects using machine learning") models what the T-learner leaves: each
user's spend less what the other group's model expects. Small effects beside large spend are found by it more easily.

The Qini curve (Radcliffe 2007, "Using control groups to target on predicted lift") is the gain from treating the users with the
largest predicted uplift first. Its coefficient is the area between that curve and the line of a random order. With a score
``g`` of each user whose mean is the effect on any group of users, it is a mean of ``g`` with weights that fall with the rank
(Yadlowsky, Fleming, Shah, Brunskill and Wager 2025, "Evaluating treatment prioritization rules via rank-weighted average
treatment effects").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from bp_spark.experiments.doubly_robust import tree_inputs, trees
from bp_spark.experiments.sample import FOLDS, Sample

_RESAMPLES = 500
_SEED = 7
TENTHS = 10


@dataclass(frozen=True)
class Uplift:
    """What models say of each user of a random experiment, by models that have not seen the user.

    Attributes:
        t_learner: predicted effect of the treatment on the spend, shape (users,).
        x_learner: the same by the X-learner.
        gain: doubly robust score of each user, shape (users,): its mean over any users that are chosen by what was known
            before is the effect on them, whatever the models are.
    """

    t_learner: np.ndarray
    x_learner: np.ndarray
    gain: np.ndarray


@dataclass(frozen=True)
class Qini:
    """How much more a ranking gains than a random order.

    Attributes:
        coefficient: mean gain of a user over the curve, less that of a random order; 0 for a ranking that knows nothing.
        low: lower end of its 95 % interval, by resampling users.
        high: upper end.
    """

    coefficient: float
    low: float
    high: float

    @property
    def is_sure(self) -> bool:
        """Whether the ranking surely finds who gains more."""
        return self.low > 0


@dataclass(frozen=True)
class Tenth:
    """A tenth of the users, by predicted uplift; the first gains most.

    Attributes:
        users: number of users.
        predicted: mean predicted uplift.
        gain: mean effect on them, by the random groups.
        low: lower end of its 95 % interval.
        high: upper end.
        mean_spend: mean spend of the control users among them.
    """

    users: int
    predicted: float
    gain: float
    low: float
    high: float
    mean_spend: float


def fit(sample: Sample) -> Uplift:
    """Fit both learners, cross-fitted, on users who were drawn at random.

    Args:
        sample: users; each fold needs users of both groups outside of it.
    """
    # one thread: the same sums in the same order, and no threads that wait for each other on a busy machine
    with threadpool_limits(limits=1):
        return _fit(sample)


def _fit(sample: Sample) -> Uplift:
    x, y, treated = tree_inputs(sample.x), sample.y, sample.treated
    # drawn at random: the same for all users
    share = float(treated.mean())
    t_learner, x_learner, gain = (np.empty(len(y)) for _ in range(3))
    for number in range(FOLDS):
        held_out = sample.fold == number
        if not held_out.any():
            continue
        of_treated, of_control = ~held_out & treated, ~held_out & ~treated
        with_it = trees().fit(x[of_treated], y[of_treated])
        without = trees().fit(x[of_control], y[of_control])
        gained = trees().fit(x[of_treated], y[of_treated] - without.predict(x[of_treated]))
        missed = trees().fit(x[of_control], with_it.predict(x[of_control]) - y[of_control])
        of_users = x[held_out]
        expected_with, expected_without = with_it.predict(of_users), without.predict(of_users)
        t_learner[held_out] = expected_with - expected_without
        x_learner[held_out] = share * missed.predict(of_users) + (1 - share) * gained.predict(of_users)
        left = np.where(
            treated[held_out],
            (y[held_out] - expected_with) / share,
            -(y[held_out] - expected_without) / (1 - share),
        )
        gain[held_out] = expected_with - expected_without + left
    return Uplift(t_learner, x_learner, gain)


def qini(ranked_by: np.ndarray, gain: np.ndarray) -> Qini:
    """Return the Qini coefficient of a ranking, with its 95 % interval.

    Args:
        ranked_by: predicted uplift, shape (users,); the largest is treated first. Equal ones are in the order of the users.
        gain: :attr:`Uplift.gain` of the same users.
    """
    ordered = gain[np.argsort(-ranked_by, kind="stable")]
    random = np.random.default_rng(_SEED)
    ones = np.ones(len(ordered))
    resampled = [_coefficient(ordered, random.poisson(1.0, len(ordered))) for _ in range(_RESAMPLES)]
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Qini(_coefficient(ordered, ones), float(low), float(high))


def _coefficient(ordered: np.ndarray, times: np.ndarray) -> float:
    """Return the coefficient where each user counts so many times."""
    total = max(float(times.sum()), 1.0)
    rank = (np.cumsum(times) - times / 2) / total
    return float(times @ ((0.5 - rank) * ordered)) / total


def tenths(sample: Sample, ranked_by: np.ndarray, gain: np.ndarray) -> list[Tenth]:
    """Return the tenths of the users by predicted uplift, that with the largest first."""
    found = []
    for users in np.array_split(np.argsort(-ranked_by, kind="stable"), TENTHS):
        mean, error = float(gain[users].mean()), float(gain[users].std(ddof=1)) / len(users) ** 0.5
        control = users[~sample.treated[users]]
        found.append(
            Tenth(
                users=len(users),
                predicted=float(ranked_by[users].mean()),
                gain=mean,
                low=mean - 1.96 * error,
                high=mean + 1.96 * error,
                mean_spend=float(sample.y[control].mean()) if len(control) else float("nan"),
            )
        )
    return found


def separating(
    sample: Sample, ranked_by: np.ndarray, names: list[str], most: int = 5
) -> list[tuple[str, float, float]]:
    """Return the covariates that differ most between the tenth with the largest uplift and all others.

    Returns:
        Name, mean in the first tenth, mean of the others; the largest difference in standard deviations first.
    """
    known = np.nan_to_num(sample.x.astype(np.float64))
    first = np.zeros(len(known), bool)
    first[np.argsort(-ranked_by, kind="stable")[: max(1, len(known) // TENTHS)]] = True
    means = known[first].mean(axis=0), known[~first].mean(axis=0)
    spread = known.std(axis=0)
    apart = np.divide(np.abs(means[0] - means[1]), spread, out=np.zeros(len(spread)), where=spread > 0)
    return [(names[i], float(means[0][i]), float(means[1][i])) for i in np.argsort(-apart, kind="stable")[:most]]
