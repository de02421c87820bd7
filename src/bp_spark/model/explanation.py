"""Explanation of a prediction: the expected spend of a user taken apart by groups of features.

The stack is a weighted sum of the members' root predictions, so each member has its share of it.

- *Boosted trees* are taken apart exactly, by TreeSHAP (Lundberg et al. 2020).
- *The other members* are the network, the purchase process and the linear model. Small boosted trees over the same features
  imitate them together, and the Shapley values of these trees stand for them. The rest, which these trees don't predict,
  belongs to one group of its own: the order and content of the last events. So nothing is lost.

Contributions pass from a sum over trees to a root prediction, and from the stack to calibrated money, by the rescale rule
(Shrikumar et al. 2017, "Learning important features through propagating activation differences"): each keeps its share of the
difference to the base. So for every user ``base + sum of contributions = expected spend``.

Gradients of the network would cost several of its passes for each user. The imitation costs a look-up, and its error is
measured on users it was not fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import xgboost

from bp_spark.core.errors import BundleError
from bp_spark.model.columns import Columns, to_matrix
from bp_spark.model.members.base import Member
from bp_spark.model.members.trees import SqrtTreesMember, TreesMember
from bp_spark.model.stack import CalibratedStack
from bp_spark.model.values import number, texts

SEQUENCE = "recent events"
"""The group of the order and content of the last events, which no tabular feature holds."""
_ROUNDS, _DEPTH, _LEARNING_RATE, _LEAF_WEIGHT = 150, 4, 0.1, 20.0
_NEAR, _STEP = 1e-6, 1e-3
"""Nearer to the base than the first, rounding would rule the quotient of differences; the second is the step of its limit."""
_HELD_OUT = 5
"""One user in so many measures the imitation."""


class Imitation(TreesMember):
    """Small boosted trees that imitate what the members without trees add to the stack's root; never a member itself."""

    name: ClassVar[str] = "imitation"
    FILE: ClassVar[str] = "imitation.json"
    OBJECTIVE: ClassVar[str] = "reg:squarederror"


@dataclass(frozen=True)
class Explanation:
    """Takes predictions of a bundle apart.

    Attributes:
        features: tabular features of the bundle, in their order.
        groups: the group of each feature.
        imitation: of the members without trees; ``None`` where the stack has no such member.
        r_squared: coefficient of determination of the imitation, on users it was not fitted on; 1 without an imitation.
    """

    features: tuple[str, ...]
    groups: tuple[str, ...]
    imitation: Imitation | None
    r_squared: float

    @property
    def group_names(self) -> tuple[str, ...]:
        """Distinct groups in the order of their first feature; with an imitation, :data:`SEQUENCE` is the last."""
        names = tuple(dict.fromkeys(self.groups))
        return names if self.imitation is None else (*names, SEQUENCE)

    @classmethod
    def fit(
        cls,
        columns: Columns,
        predictions: Mapping[str, np.ndarray],
        users: np.ndarray,
        members: Sequence[Member],
        stack: CalibratedStack,
        groups: Mapping[str, str],
        *,
        seed: int,
        threads: int,
    ) -> Self:
        """Fit the imitation and measure it.

        Args:
            columns: the features of ``rows`` users and dates.
            predictions: float64 [rows] of each of the stack's members.
            users: object [rows], the user of each row: a user is for fitting or for measuring, never for both.
            members: of the stack.
            stack: fitted on these members.
            groups: feature -> group.
            seed: of XGBoost, which gives the same trees for the same seed and threads.
            threads: of XGBoost.
        """
        features = tuple(groups)
        imitated = _without_trees(stack, members)
        if not imitated:
            return cls(features, tuple(groups.values()), None, 1.0)
        target = _weighted_roots(imitated, predictions)
        values = to_matrix(columns, features, np.float32)
        # Sorted, so that the held-out users don't depend on the order of the rows.
        _, number = np.unique(users.astype(str), return_inverse=True)
        held_out = number % _HELD_OUT == 0
        settings = {
            "objective": Imitation.OBJECTIVE,
            "max_depth": _DEPTH,
            "eta": _LEARNING_RATE,
            "min_child_weight": _LEAF_WEIGHT,
            "tree_method": "hist",
            "nthread": threads,
            "seed": seed,
        }

        def fitted(rows: np.ndarray) -> Imitation:
            matrix = xgboost.DMatrix(
                values[rows], label=target[rows], missing=np.nan, feature_names=list(features), nthread=threads
            )
            return Imitation(xgboost.train(settings, matrix, _ROUNDS))

        predicted = fitted(~held_out).predict({name: values[held_out, n] for n, name in enumerate(features)})
        truth = target[held_out]
        variation = float(((truth - truth.mean()) ** 2).sum()) if len(truth) else 0.0
        error = float(((truth - predicted) ** 2).sum())
        r_squared = 1.0 - error / variation if variation > 0 else 1.0
        return cls(features, tuple(groups.values()), fitted(np.ones(len(target), bool)), r_squared)

    def __call__(
        self,
        columns: Columns,
        predictions: Mapping[str, np.ndarray],
        members: Mapping[str, Member],
        stack: CalibratedStack,
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Take predictions apart.

        Args:
            columns: the features of users.
            predictions: float64 [rows] of each of the stack's members.
            members: of the stack, by name.
            stack: joins the members' predictions.

        Returns:
            Contributions of features, float64 [features, rows]; of the order and content of the last events, float64 [rows];
            and the base: the expected spend of a user about whom nothing is known. All in money.
        """
        rows = len(next(iter(predictions.values())))
        by_feature = np.zeros((len(self.features), rows))
        base = 0.0
        for name, weight in zip(stack.members, stack.weights, strict=True):
            member = members[name]
            if isinstance(member, TreesMember) and weight > 0:
                shares, root = _explain_trees(member, columns, np.sqrt(predictions[name]), self.features)
                by_feature += weight * shares
                base += weight * root
        of_sequence = np.zeros(rows)
        if self.imitation is not None:
            imitated = self.imitation.contributions(columns)
            target = _weighted_roots(_without_trees(stack, list(members.values())), predictions)
            by_feature += imitated[:, :-1].T
            of_sequence = target - imitated.sum(axis=1)
            base += float(imitated[0, -1]) if rows else 0.0
        roots = _weighted_roots(dict(zip(stack.members, stack.weights, strict=True)), predictions)
        slope = _slope(stack.expected, roots, stack.expected(roots), base)
        expected_base = float(stack.expected(np.array([base]))[0])
        return by_feature * slope, of_sequence * slope, expected_base

    def save(self, folder: Path) -> None:
        """Write the imitation's file, if there is one."""
        if self.imitation is not None:
            self.imitation.save(folder)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for the manifest; the imitation has a file of its own."""
        return {
            "features": list(self.features),
            "groups": list(self.groups),
            "imitation": self.imitation is not None,
            "r_squared": self.r_squared,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], folder: Path) -> Self:
        """Return the explanation that :meth:`to_json` and :meth:`save` wrote.

        Args:
            document: of :meth:`to_json`.
            folder: with the imitation's file.

        Raises:
            BundleError: a key or the file is missing or malformed, or their features differ.
        """
        try:
            explanation = cls(
                features=texts(document["features"]),
                groups=tuple(map(str, document["groups"])),
                imitation=Imitation.load(folder) if document["imitation"] else None,
                r_squared=number(document["r_squared"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"explanation: malformed ({error!r})") from None
        if len(explanation.groups) != len(explanation.features):
            raise BundleError("explanation: features and groups don't fit together")
        if explanation.imitation is not None and explanation.imitation.features != explanation.features:
            raise BundleError("explanation: its groups and its trees are of other features")
        return explanation


def _without_trees(stack: CalibratedStack, members: Sequence[Member]) -> dict[str, float]:
    """Return the weight of each member of the stack that isn't made of boosted trees."""
    trees = {member.name for member in members if isinstance(member, TreesMember)}
    weights = zip(stack.members, stack.weights, strict=True)
    return {name: weight for name, weight in weights if name not in trees and weight > 0}


def _weighted_roots(weights: Mapping[str, float], predictions: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the weighted sum of members' root predictions, float64 [rows]."""
    rows = len(next(iter(predictions.values())))
    return sum((w * np.sqrt(predictions[name]) for name, w in weights.items()), np.zeros(rows))


def _explain_trees(
    member: TreesMember, columns: Columns, roots: np.ndarray, features: Sequence[str]
) -> tuple[np.ndarray, float]:
    """Return the contributions to a member's root predictions, float64 [features, rows], and the member's base."""
    if member.features != tuple(features):
        raise BundleError(f"explanation: member {member.name!r} reads other features than those it has groups of")
    contributions = member.contributions(columns)
    if not len(contributions):
        return contributions[:, :-1].T, 0.0
    base = contributions[0, -1]

    def root(at: np.ndarray) -> np.ndarray:
        if isinstance(member, SqrtTreesMember):
            return np.asarray(np.maximum(at, 0.0) * np.sqrt(member.smearing))
        return np.asarray(np.exp(at / 2))

    slope = _slope(root, contributions.sum(axis=1), roots, base)
    return contributions[:, :-1].T * slope, float(root(base))


def _slope(
    function: Callable[[np.ndarray], np.ndarray], points: np.ndarray, values: np.ndarray, base: float
) -> np.ndarray:
    """Return the mean slope of a function between the base and each point; at the base itself, the function's slope.

    Args:
        function: of float64 arrays.
        points: float64 [rows].
        values: of the function at the points, float64 [rows].
        base: the point to compare with.
    """
    distances = points - base
    limit = np.diff(function(np.array([base - _STEP, base + _STEP])))[0] / (2 * _STEP)
    far = np.abs(distances) > _NEAR
    at_base = function(np.array([base]))
    return np.asarray(np.divide(values - at_base, distances, out=np.full(len(points), limit), where=far))
