"""Explanation of a prediction: the expected spend of a user taken apart by groups of features.

The stack is a weighted sum of the members' root predictions, so each member has its share of it.

- *Boosted trees* are taken apart exactly, by TreeSHAP (Lundberg et al. 2020).
- *The other members* are the network, the purchase process and the linear model. Small boosted trees imitate each of them, over
  the features that it reads and no others. The Shapley values of these trees stand for the member. The rest, which the trees
  don't predict, goes to a group of its own where the member reads histories: the order and content of the last events. Else
  it is shared among the member's features, by the size of their contributions. So nothing is lost.

Contributions pass from a sum over trees to a root prediction, and from the stack to calibrated money, by the rescale rule
(Shrikumar et al. 2017, "Learning important features through propagating activation differences"): each keeps its share of the
difference to the base. So for every user ``base + sum of contributions = expected spend``.

Gradients of the network would cost several of its passes for each user. An imitation costs a look-up, and its error is
measured on users it was not fitted on. The whole explanation is measured by :meth:`Explanation.agreement`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import xgboost

from bp_spark.core.errors import BundleError
from bp_spark.model.columns import Columns, to_matrix
from bp_spark.model.members.base import HistoryMember, Member, predict_all
from bp_spark.model.members.trees import SqrtTreesMember, TreesMember
from bp_spark.model.permutation import Agreement, permutation_values, spread_rows
from bp_spark.model.stack import CalibratedStack
from bp_spark.model.values import number, texts, well_formed

SEQUENCE = "latest activity"
"""The group of the order and content of the last events, which no tabular feature holds."""
_ROUNDS, _DEPTH, _LEARNING_RATE, _LEAF_WEIGHT = 150, 4, 0.1, 20.0
_NEAR, _STEP = 1e-6, 1e-3
"""Nearer to the base than the first, rounding would rule the quotient of differences; the second is the step of its limit."""
_HELD_OUT = 5
"""One user in so many measures the imitation."""
_COMPARED, _ORDERS, _POOL = 100, 16, 1_000
"""Users that are taken apart by permutations, permutations of each (and their reverses), and users that they are drawn from."""
_NAME = re.compile(r"[a-z_]{1,40}")


class Imitation(TreesMember):
    """Small boosted trees that imitate the root predictions of a member without trees; never a member itself."""

    name: ClassVar[str] = "imitation"
    OBJECTIVE: ClassVar[str] = "reg:squarederror"

    @classmethod
    def of(cls, member: str) -> type[Imitation]:
        """Return the class of a member's imitation, which has a file of its own."""
        return type(cls.__name__, (cls,), {"FILE": f"imitation_{member}.json"})


@dataclass(frozen=True)
class Explanation:
    """Takes predictions of a bundle apart.

    Attributes:
        features: tabular features of the bundle, in their order.
        groups: the group of each feature.
        imitations: of each member without trees that has a weight in the stack, by name.
        r_squared: coefficient of determination of each imitation, on users it was not fitted on.
        sequence: whether one of these members reads histories.
    """

    features: tuple[str, ...]
    groups: tuple[str, ...]
    imitations: Mapping[str, Imitation]
    r_squared: Mapping[str, float]
    sequence: bool

    @property
    def group_names(self) -> tuple[str, ...]:
        """Distinct groups in the order of their first feature; where a member reads histories, :data:`SEQUENCE` is the last."""
        names = tuple(dict.fromkeys(self.groups))
        return (*names, SEQUENCE) if self.sequence else names

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
        """Fit the imitations and measure them.

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
        # Sorted, so that the held-out users don't depend on the order of the rows.
        _, number = np.unique(users.astype(str), return_inverse=True)
        held_out = number % _HELD_OUT == 0
        imitations, r_squared = {}, {}
        imitated = _without_trees(stack, {member.name: member for member in members})
        for member in imitated.values():
            features = tuple(name for name in groups if name in member.features)
            values = to_matrix(columns, features, np.float32)
            roots = np.sqrt(predictions[member.name])
            fit = partial(_fit_imitation, Imitation.of(member.name), features=features, seed=seed, threads=threads)
            trained = fit(values[~held_out], roots[~held_out])
            predicted = trained.predict({name: values[held_out, n] for n, name in enumerate(features)})
            r_squared[member.name] = _r_squared(roots[held_out], predicted)
            imitations[member.name] = fit(values, roots)
        sequence = any(isinstance(member, HistoryMember) for member in imitated.values())
        return cls(tuple(groups), tuple(groups.values()), imitations, r_squared, sequence)

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
        by_feature, of_sequence = np.zeros((len(self.features), rows)), np.zeros(rows)
        base = 0.0
        for name, weight in zip(stack.members, stack.weights, strict=True):
            if weight <= 0:
                continue
            member, roots = members[name], np.sqrt(predictions[name])
            if isinstance(member, TreesMember):
                shares, root = _explain_trees(member, columns, roots, self.features)
                by_feature += weight * shares
            else:
                imitation = self.imitations[name]
                shares, rest, root = _explain_imitated(imitation, columns, roots)
                if isinstance(member, HistoryMember):
                    of_sequence += weight * rest
                else:
                    shares += rest * _sizes(shares)
                by_feature[[self.features.index(feature) for feature in imitation.features]] += weight * shares
            base += weight * root
        roots = _weighted_roots(dict(zip(stack.members, stack.weights, strict=True)), predictions)
        slope = _slope(stack.expected, roots, stack.expected(roots), base)
        expected_base = float(stack.expected(np.array([base]))[0])
        return by_feature * slope, of_sequence * slope, expected_base

    def save(self, folder: Path) -> None:
        """Write a file for each imitation."""
        for imitation in self.imitations.values():
            imitation.save(folder)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for the manifest; imitations have files of their own."""
        return {
            "features": list(self.features),
            "groups": list(self.groups),
            "r_squared": dict(self.r_squared),
            "sequence": self.sequence,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], folder: Path) -> Self:
        """Return the explanation that :meth:`to_json` and :meth:`save` wrote.

        Args:
            document: of :meth:`to_json`.
            folder: with the imitations' files.

        Raises:
            BundleError: a key or a file is missing or malformed, or their features differ.
        """
        with well_formed("explanation"):
            r_squared = {_member_name(name): number(value) for name, value in document["r_squared"].items()}
            explanation = cls(
                features=texts(document["features"]),
                groups=tuple(map(str, document["groups"])),
                imitations={name: Imitation.of(name).load(folder) for name in r_squared},
                r_squared=r_squared,
                sequence=bool(document["sequence"]),
            )
        if len(explanation.groups) != len(explanation.features):
            raise BundleError("explanation: features and groups don't fit together")
        for imitation in explanation.imitations.values():
            if tuple(name for name in explanation.features if name in imitation.features) != imitation.features:
                raise BundleError("explanation: its groups and its trees are of other features")
        return explanation

    def require(self, members: Mapping[str, Member], stack: CalibratedStack) -> None:
        """Make sure that the predictions of a stack can be taken apart.

        Args:
            members: of the stack, by name.
            stack: joins the members' predictions.

        Raises:
            BundleError: a member without trees has no imitation, or the group of the last events isn't where it belongs.
        """
        imitated = _without_trees(stack, members)
        for name in imitated:
            if name not in self.imitations:
                raise BundleError(f"explanation: has no imitation of member {name!r}")
        if self.sequence != any(isinstance(member, HistoryMember) for member in imitated.values()):
            raise BundleError("explanation: is of members that read histories, and the stack's don't, or the reverse")

    def agreement(
        self,
        columns: Mapping[str, np.ndarray],
        members: Mapping[str, Member],
        stack: CalibratedStack,
        *,
        seed: int,
    ) -> Agreement:
        """Compare the contributions of groups with Shapley values by permutations of the expected spend itself.

        Args:
            columns: the features and histories of users and dates, some of whom are compared.
            members: of the stack, by name.
            stack: joins the members' predictions.
            seed: draws users and permutations.
        """
        rng = np.random.default_rng(seed)
        rows = len(next(iter(columns.values())))
        chosen = rng.choice(rows, min(rows, _COMPARED), replace=False)
        weights = {name: weight for name, weight in zip(stack.members, stack.weights, strict=True) if weight > 0}
        in_stack = [members[name] for name in weights]

        def expected(values: Mapping[str, np.ndarray]) -> np.ndarray:
            return stack.expected(_weighted_roots(weights, predict_all(in_stack, values)))

        pool = rng.choice(rows, min(rows, _POOL), replace=False)
        in_pool = expected({name: values[pool] for name, values in columns.items()})
        others = pool[spread_rows(in_pool, len(chosen), _ORDERS, rng)]
        by_permutations = permutation_values(expected, columns, self._players(in_stack), chosen, others, rng)
        own = {name: values[chosen] for name, values in columns.items()}
        predictions = predict_all([members[name] for name in stack.members], own)
        contributions, _ = self.by_group(own, predictions, members, stack)
        return Agreement.of(contributions.T, by_permutations)

    def _players(self, members: Sequence[Member]) -> list[list[str]]:
        """Return the columns of each of :attr:`group_names`."""
        history = {name for member in members if isinstance(member, HistoryMember) for name in member.history}
        of_group = {name: list[str]() for name in self.group_names}
        for feature, group in zip(self.features, self.groups, strict=True):
            of_group[group].append(feature)
        return [sorted(history) if name == SEQUENCE else of_group[name] for name in of_group]

    def by_group(
        self,
        columns: Columns,
        predictions: Mapping[str, np.ndarray],
        members: Mapping[str, Member],
        stack: CalibratedStack,
    ) -> tuple[np.ndarray, float]:
        """Return the contributions of groups, float64 [groups, rows], in the order of :attr:`group_names`, and the base."""
        by_feature, of_sequence, base = self(columns, predictions, members, stack)
        groups = np.array(self.groups)
        sums = [
            of_sequence if name == SEQUENCE else by_feature[groups == name].sum(axis=0) for name in self.group_names
        ]
        return np.stack(sums), base


def _without_trees(stack: CalibratedStack, members: Mapping[str, Member]) -> dict[str, Member]:
    """Return the members with a weight in the stack that aren't made of boosted trees, by name."""
    weights = zip(stack.members, stack.weights, strict=True)
    return {
        name: members[name] for name, weight in weights if weight > 0 and not isinstance(members[name], TreesMember)
    }


def _member_name(name: str) -> str:
    """Return a name that may be part of a file's name.

    Raises:
        ValueError: it may not.
    """
    if not _NAME.fullmatch(name):
        raise ValueError("a member's name has odd characters")
    return name


def _fit_imitation(
    kind: type[Imitation], values: np.ndarray, roots: np.ndarray, *, features: Sequence[str], seed: int, threads: int
) -> Imitation:
    """Fit small trees to root predictions, float64 [rows], of features, float32 [rows, features]."""
    settings = {
        "objective": kind.OBJECTIVE,
        "max_depth": _DEPTH,
        "eta": _LEARNING_RATE,
        "min_child_weight": _LEAF_WEIGHT,
        "tree_method": "hist",
        "nthread": threads,
        "seed": seed,
    }
    matrix = xgboost.DMatrix(values, label=roots, missing=np.nan, feature_names=list(features), nthread=threads)
    return kind(xgboost.train(settings, matrix, _ROUNDS))


def _r_squared(truth: np.ndarray, predicted: np.ndarray) -> float:
    variation = float(((truth - truth.mean()) ** 2).sum()) if len(truth) else 0.0
    return 1.0 - float(((truth - predicted) ** 2).sum()) / variation if variation > 0 else 1.0


def _weighted_roots(weights: Mapping[str, float], predictions: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the weighted sum of members' root predictions, float64 [rows]."""
    rows = len(next(iter(predictions.values())))
    return sum((w * np.sqrt(predictions[name]) for name, w in weights.items()), np.zeros(rows))


def _explain_imitated(
    imitation: Imitation, columns: Columns, roots: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return contributions to a member's root predictions, float64 [features, rows], their rest [rows], and the base."""
    contributions = imitation.contributions(columns)
    base = float(contributions[0, -1]) if len(contributions) else 0.0
    return contributions[:, :-1].T.copy(), roots - contributions.sum(axis=1), base


def _sizes(shares: np.ndarray) -> np.ndarray:
    """Return the part of each feature in the sum of absolute shares, float64 [features, rows]; equal parts where all are 0."""
    sizes = np.abs(shares)
    total = sizes.sum(axis=0)
    return np.asarray(np.divide(sizes, total, out=np.full(shares.shape, 1.0 / len(shares)), where=total > 0))


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
