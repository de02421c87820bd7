"""Why a user is expected to spend what he is: the fused prediction taken apart by groups of features.

The stack is a weighted sum of the members' root predictions, so each member's share of it is known. Boosted trees are taken
apart exactly, by TreeSHAP (Lundberg et al. 2020). What the other members add (the network, the purchase process, the linear
model) is imitated by small boosted trees over the same features, whose Shapley values stand for it; what these trees can't
tell is given to one group of its own, the order and content of the last events, so that nothing is lost. From a sum over trees
to a root prediction, and from the stack to calibrated money, contributions are carried by the rescale rule (Shrikumar et al.
2017, "Learning important features through propagating activation differences"): each keeps its share of the difference to the
base. So for every user ``base + sum of contributions = expected spend``.

Gradients of the network would cost several of its passes for each user; the imitation costs a look-up, and its error is
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
from bp_spark.model.columns import Columns, stack
from bp_spark.model.members.base import Member
from bp_spark.model.members.trees import SqrtTreesMember, TreesMember
from bp_spark.model.stack import CalibratedStack

SEQUENCE = "recent events"
"""The group of what no tabular feature tells: order and content of the last events."""
_ROUNDS, _DEPTH, _LEARNING_RATE, _LEAF_WEIGHT = 150, 4, 0.1, 20.0
_NEAR, _STEP = 1e-6, 1e-3
"""Nearer to the base than the first, rounding would rule the quotient of differences; the second is for its limit."""
_HELD_OUT = 5
"""Of so many users one tells how good the imitation is."""


class Imitation(TreesMember):
    """Small boosted trees that say what the members without trees add to the stack's root; never a member of a fusion."""

    name: ClassVar[str] = "imitation"
    FILE: ClassVar[str] = "imitation.json"
    OBJECTIVE: ClassVar[str] = "reg:squarederror"


@dataclass(frozen=True)
class Explanation:
    """What takes predictions of a bundle apart.

    Attributes:
        features: tabular features of the bundle, in their order.
        groups: the group of each.
        imitation: of the members without trees; ``None`` where the stack has none.
        r_squared: share of the variance of what it imitates that it tells, of users it was not fitted on; 1 without one.
    """

    features: tuple[str, ...]
    groups: tuple[str, ...]
    imitation: Imitation | None
    r_squared: float

    @property
    def group_names(self) -> tuple[str, ...]:
        """Distinct groups in the order of their first feature, and last, where there is an imitation, :data:`SEQUENCE`."""
        named = tuple(dict.fromkeys(self.groups))
        return named if self.imitation is None else (*named, SEQUENCE)

    @classmethod
    def fit(
        cls,
        columns: Columns,
        predictions: Mapping[str, np.ndarray],
        users: np.ndarray,
        members: Sequence[Member],
        fusion: CalibratedStack,
        groups: Mapping[str, str],
        *,
        seed: int,
        threads: int,
    ) -> Self:
        """Fit the imitation and measure it.

        Args:
            columns: the features of ``rows`` users and dates.
            predictions: float64 [rows] of each of the fusion's members.
            users: object [rows], the user of each row: a user is learned from or measured by, never both.
            members: of the fusion.
            groups: feature -> group.
            seed, threads: of XGBoost, which gives the same trees for the same two.
        """
        features = tuple(groups)
        other = _without_trees(fusion, members)
        if not other:
            return cls(features, tuple(groups.values()), None, 1.0)
        target = _weighted_roots(other, predictions)
        values = stack(columns, features, np.float32)
        # sorted, so that the users held out don't depend on how rows came
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

        measured = fitted(~held_out).predict({name: values[held_out, n] for n, name in enumerate(features)})
        truth = target[held_out]
        spread = float(((truth - truth.mean()) ** 2).sum()) if len(truth) else 0.0
        error = float(((truth - measured) ** 2).sum())
        r_squared = 1.0 - error / spread if spread > 0 else 1.0
        return cls(features, tuple(groups.values()), fitted(np.ones(len(target), bool)), r_squared)

    def __call__(
        self,
        columns: Columns,
        predictions: Mapping[str, np.ndarray],
        members: Mapping[str, Member],
        fusion: CalibratedStack,
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Take predictions apart.

        Args:
            columns: the features of users.
            predictions: float64 [rows] of each of the fusion's members.

        Returns:
            Contributions of features, float64 [features, rows]; of the order and content of the last events, float64 [rows];
            and the base: the expected spend of a user of whom nothing is known. All in money.
        """
        rows = len(next(iter(predictions.values())))
        given = np.zeros((len(self.features), rows))
        base = 0.0
        for name, weight in zip(fusion.members, fusion.weights, strict=True):
            member = members[name]
            if isinstance(member, TreesMember) and weight > 0:
                shares, root = _of_trees(member, columns, np.sqrt(predictions[name]), self.features)
                given += weight * shares
                base += weight * root
        rest = np.zeros(rows)
        if self.imitation is not None:
            said = self.imitation.contributions(columns)
            target = _weighted_roots(_without_trees(fusion, list(members.values())), predictions)
            given += said[:, :-1].T
            rest = target - said.sum(axis=1)
            base += float(said[0, -1]) if rows else 0.0
        roots = _weighted_roots(dict(zip(fusion.members, fusion.weights, strict=True)), predictions)
        slope = _slope(fusion.expected, roots, fusion.expected(roots), base)
        empty = float(fusion.expected(np.array([base]))[0])
        return given * slope, rest * slope, empty

    def save(self, folder: Path) -> None:
        """Write the imitation's file, if there is one."""
        if self.imitation is not None:
            self.imitation.save(folder)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the manifest; the imitation has a file of its own."""
        return {
            "features": list(self.features),
            "groups": list(self.groups),
            "imitation": self.imitation is not None,
            "r_squared": self.r_squared,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], folder: Path) -> Self:
        """What :meth:`to_json` gave and :meth:`save` wrote.

        Raises:
            BundleError: a key or the file is missing, or is none of an explanation's.
        """
        try:
            explanation = cls(
                features=tuple(map(str, document["features"])),
                groups=tuple(map(str, document["groups"])),
                imitation=Imitation.load(folder) if document["imitation"] else None,
                r_squared=float(document["r_squared"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"explanation: malformed ({error!r})") from None
        if len(explanation.groups) != len(explanation.features):
            raise BundleError("explanation: features and groups don't fit together")
        if explanation.imitation is not None and explanation.imitation.features != explanation.features:
            raise BundleError("explanation: its groups and its trees are of other features")
        return explanation


def _without_trees(fusion: CalibratedStack, members: Sequence[Member]) -> dict[str, float]:
    """Weight of each member of the stack that is no boosted trees."""
    trees = {member.name for member in members if isinstance(member, TreesMember)}
    weighed = zip(fusion.members, fusion.weights, strict=True)
    return {name: weight for name, weight in weighed if name not in trees and weight > 0}


def _weighted_roots(weights: Mapping[str, float], predictions: Mapping[str, np.ndarray]) -> np.ndarray:
    rows = len(next(iter(predictions.values())))
    return sum((w * np.sqrt(predictions[name]) for name, w in weights.items()), np.zeros(rows))


def _of_trees(
    member: TreesMember, columns: Columns, roots: np.ndarray, features: Sequence[str]
) -> tuple[np.ndarray, float]:
    """Contributions to a member's root predictions, float64 [features, rows], and its base."""
    if member.features != tuple(features):
        raise BundleError(f"explanation: member {member.name!r} reads other features than those it has groups of")
    said = member.contributions(columns)
    if not len(said):
        return said[:, :-1].T, 0.0
    base = said[0, -1]

    def root(at: np.ndarray) -> np.ndarray:
        if isinstance(member, SqrtTreesMember):
            return np.maximum(at, 0.0) * np.sqrt(member.smearing)
        return np.exp(at / 2)

    slope = _slope(root, said.sum(axis=1), roots, base)
    return said[:, :-1].T * slope, float(root(base))


def _slope(of: Callable[[np.ndarray], np.ndarray], at: np.ndarray, there: np.ndarray, base: float) -> np.ndarray:
    """Mean slope of a function between the base and each point, where it is ``there``; at the base itself its slope."""
    apart = at - base
    limit = np.diff(of(np.array([base - _STEP, base + _STEP])))[0] / (2 * _STEP)
    far = np.abs(apart) > _NEAR
    return np.divide(there - of(np.array([base])), apart, out=np.full(len(at), limit), where=far)
