"""Shapley values by permutations: what an explanation of a model is measured by, however that explanation is made.

Any function of columns can be taken apart so, without a look inside it (Strumbelj and Kononenko 2014, "Explaining prediction
models and individual predictions with feature contributions"). It takes hundreds of predictions for a user: much for every
user, little for a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Predict = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""Function from columns of rows to float64 [rows]."""


def permutation_values(
    predict: Predict,
    columns: Mapping[str, np.ndarray],
    players: Sequence[Sequence[str]],
    users: np.ndarray,
    others: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return what each player adds to the predictions of users, float64 [users, players].

    A user's values take the place of another user's, player after player in a random order. A player adds what its turn
    changes, in the mean over orders. Each order also counts backwards, which takes noise away (Mitchell et al. 2022, "Sampling
    permutations for Shapley value estimation"). A row sums to the user's prediction less the mean of those others.

    Args:
        predict: the model.
        columns: values of all rows.
        players: columns of each player, whose values change together.
        users: rows to take apart, [users].
        others: rows of other users, [users, orders]; see :func:`spread_rows`.
        rng: draws orders.
    """
    order = rng.permuted(np.broadcast_to(np.arange(len(players)), (*others.shape, len(players))), axis=2)
    turns = np.concatenate([order, order[:, :, ::-1]], axis=1).reshape(-1, len(players))
    own = np.repeat(users, 2 * others.shape[1])
    names = [name for player in players for name in player]
    mixed = {name: columns[name][np.tile(others, 2).ravel()] for name in names}
    before = predict(mixed)
    added = np.zeros(turns.shape)
    for turn in turns.T:
        for player, members in enumerate(players):
            rows = turn == player
            for name in members:
                mixed[name][rows] = columns[name][own[rows]]
        after = predict(mixed)
        added[np.arange(len(turn)), turn] = after - before
        before = after
    return np.asarray(added.reshape(len(users), -1, len(players)).mean(axis=1))


def spread_rows(values: np.ndarray, users: int, orders: int, rng: np.random.Generator) -> np.ndarray:
    """Draw rows for each user, spread evenly over the ranks of their values: int64 [users, orders].

    Spend has a long tail. Rows drawn without regard to it would make most of the noise of :func:`permutation_values`.

    Args:
        values: float64 [rows], such as predictions.
        users: how many users need rows.
        orders: rows of each user.
        rng: draws within equal parts of the ranks.
    """
    place = (np.arange(orders) + rng.random((users, orders))) / orders
    return np.asarray(np.argsort(values, kind="stable")[(place * len(values)).astype(np.int64)])


@dataclass(frozen=True)
class Agreement:
    """How well contributions agree with those by permutations.

    Attributes:
        users: how many were compared.
        error: mean absolute difference, over the mean absolute contribution by permutations.
        same_first: share of users for whom both give the same player the largest contribution.
    """

    users: int
    error: float
    same_first: float

    @classmethod
    def of(cls, contributions: np.ndarray, by_permutations: np.ndarray) -> Agreement:
        """Compare contributions, float64 [users, players] each."""
        size = float(np.abs(by_permutations).mean())
        error = float(np.abs(contributions - by_permutations).mean()) / size if size > 0 else 0.0
        first = [np.argmax(np.abs(values), axis=1) for values in (contributions, by_permutations)]
        return cls(len(contributions), error, float((first[0] == first[1]).mean()))
