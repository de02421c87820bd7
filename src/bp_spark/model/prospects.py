"""The model of prospects: the chance of a first purchase within the horizon, and what a first purchaser spends in it.

Both parts are cross-fitted by the users' folds, and all that turns them into money is fitted on out-of-fold predictions:

1. *Chance*: boosted trees with the logistic loss. With fewer than :data:`LEAST_BUYERS` first purchasers the days since the
   prospect was last seen stand in for them. Either one is calibrated: a monotone share of purchasers by bins (isotonic
   regression, Zadrozny and Elkan 2002).
2. *Spend given a purchase*: the mean of first purchasers. With :data:`LEAST_SPENDERS` of them, boosted trees with the gamma
   loss. One factor makes all predictions together as large as what was spent.
3. *Interval*: the quantiles of what first purchasers spent over what was expected of them. The tails are those of buyers
   (:mod:`bp_spark.model.intervals`): an interval from 0 has both tails above its upper end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import xgboost
from sklearn.isotonic import isotonic_regression

from bp_spark.core.errors import BundleError
from bp_spark.features.prospects import FEATURES, FORMAT, SILENCE
from bp_spark.model.bins import quantile_bins
from bp_spark.model.columns import Columns, to_matrix
from bp_spark.model.curve import Curve, curve_from_json
from bp_spark.model.intervals import upper_tails
from bp_spark.model.members.base import read_json, write_json
from bp_spark.model.members.local_trees import LocalRows, fit_threads
from bp_spark.model.members.trees import TreesMember
from bp_spark.model.values import floats, number, require_rising, well_formed, whole

FILE = "prospects.json"
"""File of a bundle that has a model of prospects."""
LEAST_BUYERS = 50
"""First purchasers from which trees are fitted; half as many must be left where a fold is left out."""
LEAST_SPENDERS = 300
"""First purchasers from which trees are fitted for their spend."""

_BINS, _BUYERS_PER_BIN = 50, 10
_QUANTILES = 201
_OUTER = 0.01
"""Quantile of first purchasers' spend, at either end, beyond which the trees' expectation isn't followed."""
_LARGEST = 1e15
"""Largest money and ratio that a file may hold."""
_SETTINGS: Mapping[str, Any] = {
    "max_depth": 3,
    "learning_rate": 0.1,
    "min_child_weight": 10.0,
    "tree_method": "hist",
    "device": "cpu",
    "disable_default_eval_metric": True,
}
_CHANCE_ROUNDS, _SPEND_ROUNDS = 100, 50


class ChanceTrees(TreesMember):
    """Boosted trees of the chance of a purchase; :meth:`predict` returns probabilities."""

    name: ClassVar[str] = "prospect_chance"
    FILE: ClassVar[str] = "prospect_chance.json"
    OBJECTIVE: ClassVar[str] = "binary:logistic"


class SpendTrees(TreesMember):
    """Boosted trees of the spend of first purchasers."""

    name: ClassVar[str] = "prospect_spend"
    FILE: ClassVar[str] = "prospect_spend.json"
    OBJECTIVE: ClassVar[str] = "reg:gamma"


AnyTrees = TypeVar("AnyTrees", ChanceTrees, SpendTrees)


@dataclass(frozen=True)
class Money:
    """What first purchasers spend in the horizon.

    Attributes:
        mean: mean spend; 0 where nobody bought.
        least: smallest expectation of the trees that is followed.
        most: largest expectation of the trees that is followed.
        factor: from the expectation to one whose total is right.
        ratios: quantiles of spend over expectation, at evenly spaced probabilities from 0 to 1.
    """

    mean: float
    least: float
    most: float
    factor: float
    ratios: tuple[float, ...]

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Return the fields of a JSON document.

        Raises:
            KeyError, TypeError, ValueError: they are not these fields.
        """
        mean, least, most, factor = (
            number(document[name], 0.0, _LARGEST) for name in ("mean", "least", "most", "factor")
        )
        ratios = floats(document["ratios"], 0.0, _LARGEST)
        require_rising(ratios)
        require_rising((least, most))
        if len(ratios) != _QUANTILES or len(document) != len(cls.__dataclass_fields__):
            raise ValueError("not the fields of money")
        return cls(mean, least, most, factor, ratios)


@dataclass(frozen=True)
class ProspectModel:
    """Predicts first purchases. A prediction depends on its own row only.

    Attributes:
        definition: :data:`bp_spark.features.prospects.FORMAT` of the features that it was fitted on.
        tail: share of users beyond each end of the interval, where both can be missed.
        calibration: index -> P(spend > 0). The index is the trees' probability, or minus the days since last seen.
        money: spend given a purchase.
        chance: trees of the index; ``None`` where there were too few first purchasers.
        spend: trees of the spend; ``None``: ``money.mean`` holds for all.
    """

    definition: int
    tail: float
    calibration: Curve
    money: Money
    chance: ChanceTrees | None
    spend: SpendTrees | None

    @classmethod
    def fit(cls, rows: LocalRows, *, coverage: float, seed: int) -> Self:
        """Fit on labelled prospects of past dates.

        Args:
            rows: features FEATURES, at least one row, and no user who is held out.
            coverage: share of users whose spend lies in the interval.
            seed: of the trees.
        """
        weights = rows.weights.astype(np.float64)
        bought = rows.spend > 0
        folds = np.unique(rows.fold)
        chance, index = None, _recency(rows.values[:, rows.features.index(SILENCE)])
        fewest = min(int(bought[rows.fold != fold].sum()) for fold in folds)
        if bought.sum() >= LEAST_BUYERS and fewest >= LEAST_BUYERS // 2:
            rate = float(np.average(bought, weights=weights))
            chance, index = _cross_fit(ChanceTrees, rows, bought, rate, _CHANCE_ROUNDS, seed)
        calibration = _calibration(index, bought, weights)
        expected = calibration(index)
        mean = float(np.average(rows.spend[bought], weights=weights[bought])) if bought.any() else 0.0
        least, most = np.quantile(rows.spend[bought], [_OUTER, 1 - _OUTER]).tolist() if bought.any() else (0.0, 0.0)
        spend, given = None, np.full(len(bought), mean)
        if chance is not None and bought.sum() >= LEAST_SPENDERS:
            spend, given = _cross_fit(SpendTrees, rows, rows.spend, mean, _SPEND_ROUNDS, seed, bought)
            given = np.clip(given, least, most)
        total = float(weights @ (expected * given))
        factor = float(weights @ rows.spend) / total if total > 0 else 1.0
        ratios = np.ones(_QUANTILES)
        if bought.any():
            ratios = np.quantile(rows.spend[bought] / (given[bought] * factor), np.linspace(0.0, 1.0, _QUANTILES))
        money = Money(mean, least, most, factor, floats(ratios))
        return cls(FORMAT, (1 - coverage) / 2, calibration, money, chance, spend)

    def predict(self, columns: Columns) -> dict[str, np.ndarray]:
        """Return ``expected_spend``, ``low``, ``high`` and ``p_active`` of prospects, float64 [rows] each.

        Args:
            columns: an array of ``rows`` values for each of FEATURES; NaN is a missing value.

        Raises:
            BundleError: a column is missing.
        """
        p_active = self.calibration(self._index(columns))
        given = np.full(len(p_active), self.money.mean)
        if self.spend is not None:
            given = np.clip(np.nan_to_num(self.spend.predict(columns)), self.money.least, self.money.most)
        given = given * self.money.factor
        expected = p_active * given
        tail, nothing = self.tail, 1.0 - p_active
        above = upper_tails(p_active, tail)
        # of all users so many lie below or above the end; of those who buy, so many more
        buys = np.maximum(p_active, tail)
        high = np.where(p_active > above, given * self._ratio(1.0 - above / buys), expected)
        low = np.where(nothing <= tail, given * self._ratio((tail - nothing) / buys), 0.0)
        return {
            "expected_spend": expected,
            "low": np.minimum(low, expected),
            "high": np.maximum(high, expected),
            "p_active": p_active,
        }

    def reason(self, columns: Columns) -> np.ndarray:
        """Return the feature that moved the chance of each prospect most, str objects [rows]; ``None`` where none did."""
        rows = len(np.asarray(columns[SILENCE]))
        if self.chance is None:
            return np.full(rows, SILENCE if len(self.calibration.x) > 1 else None, dtype=object)
        moved = np.abs(self.chance.contributions(columns)[:, :-1])
        foremost: np.ndarray = np.array(self.chance.features, dtype=object)[moved.argmax(axis=1)]
        foremost[~moved.any(axis=1)] = None
        return foremost

    def save(self, folder: Path) -> None:
        """Write the model's files into an existing folder."""
        trees = [part for part in (self.chance, self.spend) if part is not None]
        document = {
            "definition": self.definition,
            "tail": self.tail,
            "calibration": asdict(self.calibration),
            "money": asdict(self.money),
            "trees": [part.name for part in trees],
        }
        write_json(Path(folder) / FILE, document)
        for part in trees:
            part.save(folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the model that :meth:`save` wrote.

        Raises:
            BundleError: a file is missing, cut short or not this model's; the message names it.
        """
        path = Path(folder) / FILE
        document = read_json(path)
        with well_formed(path):
            if set(document) != {"definition", "tail", "calibration", "money", "trees"}:
                raise ValueError("not the keys of a model of prospects")
            names = document["trees"]
            if names not in ([], [ChanceTrees.name], [ChanceTrees.name, SpendTrees.name]):
                raise ValueError("not the names of its trees")
            calibration = curve_from_json(document["calibration"], 0.0, 1.0)
            require_rising(calibration.y)
            fields = (
                whole(document["definition"], 1, 2**31),
                number(document["tail"], 0.0, 0.5),
                calibration,
                Money.from_json(document["money"]),
            )
        definition = fields[0]
        chance = _load_trees(ChanceTrees, folder, definition) if ChanceTrees.name in names else None
        spend = _load_trees(SpendTrees, folder, definition) if SpendTrees.name in names else None
        return cls(*fields, chance, spend)

    def _index(self, columns: Columns) -> np.ndarray:
        if self.chance is not None:
            return np.asarray(np.nan_to_num(self.chance.predict(columns)))
        return _recency(to_matrix(columns, (SILENCE,), np.float32)[:, 0])

    def _ratio(self, probability: np.ndarray) -> np.ndarray:
        return np.asarray(np.interp(probability, np.linspace(0.0, 1.0, _QUANTILES), self.money.ratios))


def _recency(days: np.ndarray) -> np.ndarray:
    """Return an index that falls with the days since last seen, float64 [rows]."""
    return np.asarray(-np.nan_to_num(days.astype(np.float64)))


def _cross_fit(
    kind: type[AnyTrees],
    rows: LocalRows,
    label: np.ndarray,
    start: float,
    rounds: int,
    seed: int,
    chosen: np.ndarray | None = None,
) -> tuple[AnyTrees, np.ndarray]:
    """Fit trees on all folds, and predict each row by trees that were fitted without its fold.

    Args:
        kind: the class of the trees, which decides the loss.
        rows: the training rows.
        label: what is predicted, [rows].
        start: what the trees predict before the first of them.
        rounds: number of trees.
        seed: of the trees.
        chosen: rows to learn from, boolean [rows]; ``None`` for all.
    """
    learned = np.ones(len(label), dtype=bool) if chosen is None else chosen
    names = list(rows.features)
    settings = {
        **_SETTINGS,
        "objective": kind.OBJECTIVE,
        "base_score": start,
        "seed": seed,
        "nthread": fit_threads(rows.values.size),
    }

    def fit(of: np.ndarray) -> AnyTrees:
        matrix = xgboost.QuantileDMatrix(
            rows.values[of],
            label=label[of].astype(np.float64),
            weight=rows.weights[of],
            feature_names=names,
            nthread=settings["nthread"],
        )
        return kind(xgboost.train(settings, matrix, rounds))

    predicted = np.empty(len(label))
    for fold in np.unique(rows.fold):
        held_out = rows.fold == fold
        columns = dict(zip(names, rows.values[held_out].T, strict=True))
        predicted[held_out] = fit(learned & ~held_out).predict(columns)
    return fit(learned), predicted


def _calibration(index: np.ndarray, bought: np.ndarray, weights: np.ndarray) -> Curve:
    """Fit the rising share of purchasers by the index: a knot for each block of bins that isotonic regression pools.

    A bin has some purchasers. One more user, who buys at the rate of all, keeps bins without a purchaser above 0.
    """
    buyers = int(bought.sum())
    least_rows = math.ceil(_BUYERS_PER_BIN * len(index) / max(buyers, 1))
    group = np.unique(quantile_bins(index, _BINS, least_rows), return_inverse=True)[1]
    rows = np.bincount(group, weights)
    overall = (float(weights[bought].sum()) + 0.5) / (float(weights.sum()) + 1.0)
    share = (np.bincount(group, weights * bought) + overall) / (rows + 1.0)
    pooled = isotonic_regression(share, y_min=0.0, y_max=1.0, sample_weight=rows + 1.0)
    block = np.unique(pooled, return_inverse=True)[1]
    x = np.bincount(block, np.bincount(group, weights * index)) / np.bincount(block, rows)
    return Curve(floats(x), floats(np.unique(pooled)))


def _load_trees(kind: type[AnyTrees], folder: Path, definition: int) -> AnyTrees:
    trees, path = kind.load(folder), Path(folder) / kind.FILE
    if definition == FORMAT and trees.features != FEATURES:
        raise BundleError(f"{path}: not the features of prospects")
    try:
        # XGBoost looks at the start of the trees when they predict for the first time
        trees.predict({name: np.zeros(1) for name in trees.features})
    except xgboost.core.XGBoostError as error:
        raise BundleError(f"{path}: XGBoost refuses it: {str(error).splitlines()[0]}") from None
    return trees
