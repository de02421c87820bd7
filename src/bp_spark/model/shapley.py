"""Shapley values of boosted trees, exact and fast enough for every user in every scoring run.

The contribution of a feature to a leaf's value depends on the user only through which conditions of the leaf's path hold
(Lundberg et al. 2020, "From local explanations to global understanding with explainable AI for trees"). A shallow tree has few
combinations of them, so all contributions can be computed once and looked up afterwards (Yang 2021, "Fast TreeSHAP").

A tree is cut into blocks of a few levels. A block's table has a row for each combination of the conditions on the way to it and
in it. A look-up costs a tenth or less of walking the paths for each user.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import factorial
from typing import Any

import numpy as np

DEEPEST = 6
"""Deeper trees have too many combinations for tables."""
_SHALLOW, _LEVELS, _LEVELS_OF_DEEP = 4, 3, 2
"""Blocks of trees up to this depth have so many levels, those of deeper trees fewer."""


@dataclass(frozen=True)
class _Tree:
    """A tree as XGBoost's JSON has it: arrays by node; the root is 0, and a leaf has no children (-1).

    Attributes:
        left, right: the children.
        feature: of an inner node's condition.
        condition: of an inner node, values below it go left; of a leaf, its value.
        missing_left: whether missing values go left.
        cover: weight of the training rows that reach a node.
    """

    left: Sequence[int]
    right: Sequence[int]
    feature: Sequence[int]
    condition: np.ndarray
    missing_left: Sequence[int]
    cover: Sequence[float]

    def is_leaf(self, node: int) -> bool:
        return self.left[node] < 0

    def children(self, node: int) -> Iterator[tuple[int, bool]]:
        """Yield both children, and whether each is the left one."""
        yield self.left[node], True
        yield self.right[node], False

    def depth(self, node: int = 0) -> int:
        return 0 if self.is_leaf(node) else 1 + max(self.depth(child) for child, _ in self.children(node))


Step = tuple[int, bool]
"""A condition on a path: an inner node, and whether the path goes left."""


@dataclass(frozen=True)
class _Block:
    """Part of a tree that one look-up covers.

    Attributes:
        nodes: inner nodes; the condition of node ``i`` is bit ``i`` of a column's number, 1 if the user goes left.
        features: features of the conditions.
        table: contributions, float32 [features, 2 ** nodes].
    """

    nodes: tuple[int, ...]
    features: tuple[int, ...]
    table: np.ndarray


class TreeShapley:
    """Computes the contributions of features to the sum over trees of a booster.

    Args:
        model: XGBoost's JSON document of a booster of numeric splits.

    Raises:
        ValueError: a tree is deeper than :data:`DEEPEST`.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._trees = [_tree(document) for document in model["learner"]["gradient_booster"]["model"]["trees"]]
        self.features = int(model["learner"]["learner_model_param"]["num_feature"])
        deepest = max((tree.depth() for tree in self._trees), default=0)
        if deepest > DEEPEST:
            raise ValueError(f"trees must be no deeper than {DEEPEST}, not {deepest}")
        height = _LEVELS if deepest <= _SHALLOW else _LEVELS_OF_DEEP
        self._blocks = [tuple(_blocks(tree, max(0, deepest - height))) for tree in self._trees]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return Shapley values, float64 [rows, features], of float32 [rows, features], NaN where missing.

        A row sums to the booster's sum over trees less its mean over the training rows.
        """
        columns = np.ascontiguousarray(values.T, dtype=np.float32)
        missing = [np.isnan(column) if np.isnan(column).any() else None for column in columns]
        contributions = np.zeros((self.features, values.shape[0]))
        for tree, blocks in zip(self._trees, self._blocks, strict=True):
            goes_left: dict[int, np.ndarray] = {}
            for block in blocks:
                row = np.zeros(values.shape[0], np.intp)
                for bit, node in enumerate(block.nodes):
                    if node not in goes_left:
                        goes_left[node] = _goes_left(tree, node, columns, missing)
                    row |= goes_left[node] << bit
                for feature, by_combination in zip(block.features, block.table, strict=True):
                    contributions[feature] += by_combination.take(row, mode="clip")
        return contributions.T


def _tree(document: Mapping[str, Any]) -> _Tree:
    return _Tree(
        left=document["left_children"],
        right=document["right_children"],
        feature=document["split_indices"],
        condition=np.asarray(document["split_conditions"], np.float32),
        missing_left=document["default_left"],
        cover=document["sum_hessian"],
    )


def _goes_left(tree: _Tree, node: int, columns: np.ndarray, missing: Sequence[np.ndarray | None]) -> np.ndarray:
    """Return whether each row goes left at a node, as 0 or 1, intp [rows]."""
    feature = tree.feature[node]
    left: np.ndarray = columns[feature] < tree.condition[node]
    absent = missing[feature]
    if tree.missing_left[node] and absent is not None:
        left |= absent
    return left.astype(np.intp)


def _blocks(tree: _Tree, level: int, node: int = 0, path: tuple[Step, ...] = ()) -> Iterator[_Block]:
    """Yield the blocks that begin at a level of the tree, or at a leaf above it."""
    if len(path) < level and not tree.is_leaf(node):
        for child, left in tree.children(node):
            yield from _blocks(tree, level, child, (*path, (node, left)))
        return
    leaves = list(_leaves(tree, node, path))
    nodes = tuple(sorted({inner for _, steps in leaves for inner, _ in steps}))
    features = tuple(sorted({tree.feature[inner] for inner in nodes}))
    if features:
        table = np.zeros((len(features), 2 ** len(nodes)))
        for leaf, steps in leaves:
            for feature, contributions in _explain_leaf(tree, leaf, steps, nodes).items():
                table[features.index(feature)] += contributions
        yield _Block(nodes, features, table.astype(np.float32))


def _leaves(tree: _Tree, node: int, path: tuple[Step, ...]) -> Iterator[tuple[int, tuple[Step, ...]]]:
    """Yield the leaves below a node, each with its path from the root."""
    if tree.is_leaf(node):
        yield node, path
        return
    for child, left in tree.children(node):
        yield from _leaves(tree, child, (*path, (node, left)))


def _explain_leaf(tree: _Tree, leaf: int, steps: Sequence[Step], nodes: Sequence[int]) -> dict[int, np.ndarray]:
    """Return each feature's contribution to a leaf, float64 [2 ** nodes], for every combination of the nodes' conditions."""
    combinations = np.arange(2 ** len(nodes))
    players = sorted({tree.feature[node] for node, _ in steps})
    holds = {player: np.ones(len(combinations), bool) for player in players}
    share = dict.fromkeys(players, 1.0)
    for node, left in steps:
        player = tree.feature[node]
        child = tree.left[node] if left else tree.right[node]
        holds[player] &= (combinations >> nodes.index(node) & 1).astype(bool) == left
        share[player] *= tree.cover[child] / tree.cover[node]
    value = float(tree.condition[leaf])
    return {
        player: value * (holds[player] - share[player]) * _mean_of_coalitions(holds, share, player)
        for player in players
    }


def _mean_of_coalitions(holds: Mapping[int, np.ndarray], share: Mapping[int, float], player: int) -> np.ndarray:
    """Return Shapley's weighted mean, over the coalitions of the other players, of the share of a leaf that they leave.

    A member of a coalition contributes whether its conditions hold, any other player the share of training rows for which its
    conditions hold.

    Args:
        holds: by player, for each combination, whether its conditions hold; bool [combinations].
        share: by player, the share of training rows.
        player: the one whose contribution is computed.
    """
    others = [name for name in holds if name != player]
    total = np.zeros(len(holds[player]))
    for members in product((False, True), repeat=len(others)):
        size = sum(members)
        weight = factorial(size) * factorial(len(others) - size) / factorial(len(others) + 1)
        product_of_shares = np.full(len(total), weight)
        for name, inside in zip(others, members, strict=True):
            product_of_shares = product_of_shares * (holds[name] if inside else share[name])
        total += product_of_shares
    return total
