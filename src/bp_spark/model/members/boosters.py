"""XGBoost's JSON documents, checked before XGBoost reads them: it trusts indices and sizes.

With a wrong index it would read beyond its memory, and in a circle it would never come back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bp_spark.model.values import floats, number, texts, whole

DEEPEST = 100
"""Most conditions on a path: XGBoost walks trees by recursion."""
_NO_CHILD = -1
_NO_PARENT = (-1, 2**31 - 1)
_INDICES = ("left_children", "right_children", "parents")
_FLAGS = ("default_left", "split_type")
_NUMBERS = ("base_weights", "loss_changes", "split_conditions")
_LARGEST = 3.4e38
"""Largest number that float32 holds, rounded down."""
_CATEGORIES = ("categories", "categories_nodes", "categories_segments", "categories_sizes")


def require_sound(document: Mapping[str, Any], objective: str) -> None:
    """Make sure that a document is a booster of numeric splits whose paths all end in a leaf.

    Args:
        document: XGBoost's JSON.
        objective: name of the loss.

    Raises:
        ValueError: it isn't; the message names the rule.
    """
    try:
        learner = document["learner"]
        if learner["objective"]["name"] != objective or not learner["feature_names"]:
            raise ValueError
        features = len(texts(learner["feature_names"]))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"not a booster of {objective} with feature names") from None
    try:
        _require_trees(learner, features)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError):
        rule = "arrays of other lengths, an index beyond them, a circle, or a value of another type"
        raise ValueError(f"its trees are none: {rule}") from None


def _require_trees(learner: Mapping[str, Any], features: int) -> None:
    _require(set(learner["feature_types"]) <= {"float", "int", "q", "i"})
    _require(len(learner["feature_types"]) in (0, features))
    _require(all(isinstance(value, str) for value in learner["attributes"].values()))
    _require(_settings(learner["learner_model_param"]) == {"num_class": 0, "num_feature": features, "num_target": 1})
    score = learner["learner_model_param"]["base_score"]
    number(float(score.removeprefix("[").removesuffix("]")), -_LARGEST, _LARGEST)
    for settings in learner["objective"].values():
        if isinstance(settings, Mapping):
            floats(map(float, settings.values()))
    _require(learner["gradient_booster"]["name"] == "gbtree")
    model = learner["gradient_booster"]["model"]
    trees = model["trees"]
    _require(_settings(model["gbtree_model_param"]) == {"num_parallel_tree": 1, "num_trees": len(trees)})
    _require(model["tree_info"] == [0] * len(trees) and _are_integers(model["tree_info"]))
    # Older versions of XGBoost write neither of these.
    if "iteration_indptr" in model:
        ends = model["iteration_indptr"]
        _require(ends == list(range(len(trees) + 1)) and _are_integers(ends))
    _require(not any(model.get("cats", {}).values()))
    for position, tree in enumerate(trees):
        _require_tree(tree, position, features)


def _settings(values: Mapping[str, str]) -> dict[str, int]:
    """Return the counts among settings, which XGBoost writes as texts."""
    return {name: int(value) for name, value in values.items() if name.startswith("num_")}


def _require_tree(tree: Mapping[str, Any], position: int, features: int) -> None:
    settings = tree["tree_param"]
    nodes = int(settings["num_nodes"])
    _require(int(settings["num_feature"]) == features and int(settings["size_leaf_vector"]) in (0, 1))
    _require(0 <= int(settings["num_deleted"]) < nodes)
    whole(tree["id"], position, position)
    for name in (*_INDICES, *_FLAGS, *_NUMBERS, "sum_hessian", "split_indices"):
        _require(isinstance(tree[name], list) and len(tree[name]) == nodes)
    for name in _NUMBERS:
        floats(tree[name], -_LARGEST, _LARGEST)
    floats(tree["sum_hessian"], 0.0, _LARGEST)
    for name in (*_INDICES, "split_indices"):
        _require(_are_integers(tree[name]))
        _require(all(-1 <= index < 2**32 for index in tree[name]))
    _require(all(type(flag) in (int, bool) and flag in (0, 1) for flag in tree["default_left"]))
    _require(_are_integers(tree["split_type"]) and not any(tree["split_type"]))
    _require(not any(tree.get(name) for name in _CATEGORIES))
    _require_walkable(tree["left_children"], tree["right_children"], tree["parents"], tree["split_indices"], features)


def _require_walkable(
    left: Sequence[int], right: Sequence[int], parents: Sequence[int], split: Sequence[int], features: int
) -> None:
    """Make sure that each path from the root ends in a leaf, and that no node has two parents."""
    seen: set[int] = set()
    waiting = [(0, 0, 0)]
    _require(parents[0] in _NO_PARENT)
    while waiting:
        node, parent, depth = waiting.pop()
        _require(0 <= node < len(left) and node not in seen and depth <= DEEPEST)
        _require(node == 0 or parents[node] == parent)
        seen.add(node)
        children = (left[node], right[node])
        if children == (_NO_CHILD, _NO_CHILD):
            continue
        _require(0 <= split[node] < features)
        waiting += [(child, node, depth + 1) for child in children]


def _are_integers(values: Sequence[object]) -> bool:
    # Python takes true and 1.0 for the whole number 1, and XGBoost doesn't.
    return all(type(value) is int for value in values)


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError
