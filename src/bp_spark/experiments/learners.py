"""Who gains from a treatment: T- and X-learner, and the Qini curve of a ranking by them.

The T-learner is the difference of two models of spend, one of each group. The X-learner (Künzel, Sekhon, Bickel and Yu 2019,
"Metalearners for estimating heterogeneous treatment effects using machine learning") models what the T-learner leaves: each
user's spend less what the other group's model expects. Small effects beside large spend are found by it more easily.

The Qini curve (Radcliffe 2007, "Using control groups to target on predicted lift") is the gain from treating the users with the
largest predicted uplift first. Its coefficient is the area between that curve and the line of a random order. With a score
``g`` of each user whose mean is the effect on any group of users, it is a mean of ``g`` with weights that fall with the rank
(Yadlowsky, Fleming, Shah, Brunskill and Wager 2025, "Evaluating treatment prioritization rules via rank-weighted average
treatment effects").

Rankings are judged one fold after the other, by models of the folds before it. Were each fold ranked by models of all others,
every fold would have a part in the ranking of the others: intervals of their sum held no effect in 86 instead of 95 of 100
worlds without one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from bp_spark.experiments.doubly_robust import tree_inputs, trees
from bp_spark.experiments.sample import FOLDS, Sample

TENTHS = 10
_FIRST_JUDGED = 2
"""The folds before it are only learned from: 40 % of the users, so that the first models aren't too poor."""
_Z = 1.96


@dataclass(frozen=True)
class Judged:
    """Users of the folds in which rankings are judged, ranked by models of the folds before.

    Attributes:
        users: positions in the sample, shape (judged,).
        fold: fold of each, shape (judged,).
        t_learner: predicted effect of the treatment on the spend, shape (judged,).
        x_learner: the same by the X-learner.
        gain: doubly robust score, shape (judged,): its mean over any users that are chosen by what was known before is the
            effect on them, whatever the models are.
    """

    users: np.ndarray
    fold: np.ndarray
    t_learner: np.ndarray
    x_learner: np.ndarray
    gain: np.ndarray


@dataclass(frozen=True)
class Qini:
    """How much more a ranking gains than a random order.

    Attributes:
        coefficient: mean gain of a user over the curve, less that of a random order; 0 for a ranking that knows nothing.
        low: lower end of its 95 % interval.
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


def judge(sample: Sample) -> Judged:
    """Rank the users of each fold from the third on by models of the folds before it.

    Args:
        sample: users who were drawn at random; the first two folds need users of both groups.
    """
    parts = []
    for number in range(_FIRST_JUDGED, FOLDS):
        users = np.flatnonzero(sample.fold == number)
        if len(users):
            parts.append((users, np.full(len(users), number), *_predicted(sample, sample.fold < number, users)))
    users, fold, t_learner, x_learner, gain = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Judged(users, fold, t_learner, x_learner, gain)


def rank(sample: Sample) -> np.ndarray:
    """Return the uplift of each user by the X-learner, float64 of shape (users,), by models that have not seen the user."""
    predicted = np.empty(len(sample.y))
    for number in range(FOLDS):
        users = np.flatnonzero(sample.fold == number)
        if len(users):
            predicted[users] = _predicted(sample, sample.fold != number, users)[1]
    return predicted


def _predicted(sample: Sample, known: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what models of known users say of others: T-learner, X-learner and gain, shape (users,) each.

    Args:
        sample: all users.
        known: whether a user is learned from, bool of shape (all users,).
        users: positions of the others.
    """
    x, y, treated = tree_inputs(sample.x), sample.y, sample.treated
    # drawn at random: the same for all users
    share = float(treated.mean())
    of_treated, of_control = known & treated, known & ~treated
    # one thread: the same sums in the same order, and no threads that wait for each other on a busy machine
    with threadpool_limits(limits=1):
        with_it = trees().fit(x[of_treated], y[of_treated])
        without = trees().fit(x[of_control], y[of_control])
        gained = trees().fit(x[of_treated], y[of_treated] - without.predict(x[of_treated]))
        missed = trees().fit(x[of_control], with_it.predict(x[of_control]) - y[of_control])
        others = x[users]
        expected_with, expected_without = with_it.predict(others), without.predict(others)
        x_learner = share * missed.predict(others) + (1 - share) * gained.predict(others)
    t_learner = expected_with - expected_without
    surprise = np.where(
        treated[users], (y[users] - expected_with) / share, -(y[users] - expected_without) / (1 - share)
    )
    return t_learner, x_learner, t_learner + surprise


def qini(judged: Judged, ranked_by: np.ndarray) -> Qini:
    """Return the Qini coefficient of a ranking, with its 95 % interval.

    Args:
        judged: users of the judged folds.
        ranked_by: predicted uplift of each; the largest of a fold is treated first.
    """
    coefficient, variance = 0.0, 0.0
    for of_fold in _folds(judged):
        gain = judged.gain[of_fold]
        # ranks add up to nothing, so that a gain of all users adds nothing
        terms = (0.5 - _places(ranked_by[of_fold])) * (gain - gain.mean())
        share = len(gain) / len(judged.gain)
        coefficient += share * float(terms.mean())
        variance += share**2 * float(terms.var()) / len(terms)
    error = _Z * variance**0.5
    return Qini(coefficient, coefficient - error, coefficient + error)


def tenths(sample: Sample, judged: Judged) -> list[Tenth]:
    """Return the tenths of the judged users by the X-learner, that with the largest uplift first."""
    place = np.empty(len(judged.users))
    for of_fold in _folds(judged):
        place[of_fold] = _places(judged.x_learner[of_fold])
    number = np.minimum((place * TENTHS).astype(int), TENTHS - 1)
    return [_tenth(sample, judged, number == each) for each in range(TENTHS) if (number == each).any()]


def _tenth(sample: Sample, judged: Judged, chosen: np.ndarray) -> Tenth:
    gain, users = judged.gain[chosen], judged.users[chosen]
    mean, error = float(gain.mean()), _Z * float(gain.std()) / len(gain) ** 0.5
    control = users[~sample.treated[users]]
    return Tenth(
        users=len(users),
        predicted=float(judged.x_learner[chosen].mean()),
        gain=mean,
        low=mean - error,
        high=mean + error,
        mean_spend=float(sample.y[control].mean()) if len(control) else float("nan"),
    )


def _folds(judged: Judged) -> list[np.ndarray]:
    return [np.flatnonzero(judged.fold == number) for number in np.unique(judged.fold)]


def _places(ranked_by: np.ndarray) -> np.ndarray:
    """Return the place of each user in the order, 0 to 1; equal ones are in the order of the users."""
    places = np.empty(len(ranked_by))
    places[np.argsort(-ranked_by, kind="stable")] = (np.arange(len(ranked_by)) + 0.5) / len(ranked_by)
    return places


def separating(
    sample: Sample, predicted: np.ndarray, names: list[str], most: int = 5
) -> list[tuple[str, float, float]]:
    """Return the covariates that differ most between the tenth with the largest uplift and all others.

    Args:
        sample: users.
        predicted: uplift of each, by :func:`rank`.
        names: names of the covariates.
        most: how many to return.

    Returns:
        Name, mean in the first tenth, mean of the others; the largest difference in standard deviations first.
    """
    known = np.nan_to_num(sample.x.astype(np.float64))
    first = _places(predicted) < 1 / TENTHS
    means = known[first].mean(axis=0), known[~first].mean(axis=0)
    spread = known.std(axis=0)
    apart = np.divide(np.abs(means[0] - means[1]), spread, out=np.zeros(len(spread)), where=spread > 0)
    return [(names[i], float(means[0][i]), float(means[1][i])) for i in np.argsort(-apart, kind="stable")[:most]]
