"""The model of prospects: calibrated on users it has not seen, the same from its files, and never from damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bp_spark.core.errors import BundleError
from bp_spark.evaluation.metrics import auc, expected_calibration_error
from bp_spark.features.prospects import FEATURES, FORMAT, SILENCE
from bp_spark.model.members.local_trees import LocalRows
from bp_spark.model.prospects import FILE, ChanceTrees, ProspectModel, SpendTrees

PLACE = {name: place for place, name in enumerate(FEATURES)}


def simulated(count: int, seed: int, level: float = -2.5) -> LocalRows:
    """Prospects who buy the likelier the more they put into carts and the less long they are silent."""
    rng = np.random.default_rng(seed)
    values = rng.poisson(2, (count, len(FEATURES))).astype(np.float32)
    values[rng.random(values.shape) < 0.05] = np.nan
    values[:, PLACE[SILENCE]] = rng.integers(1, 180, count)
    carts = np.nan_to_num(values[:, PLACE["carts_30d"]])
    chance = 1 / (1 + np.exp(-(level + 0.5 * carts - 0.02 * values[:, PLACE[SILENCE]])))
    spend = np.where(rng.random(count) < chance, rng.gamma(2, 10 * (1 + carts)), 0.0)
    fold = rng.integers(0, 2, count)
    return LocalRows(FEATURES, values, spend, np.ones(count, np.float32), fold, np.ones(count, bool))


def columns(rows: LocalRows) -> dict[str, np.ndarray]:
    return dict(zip(FEATURES, rows.values.T, strict=True))


def fitted(rows: LocalRows) -> ProspectModel:
    return ProspectModel.fit(rows, coverage=0.9, seed=1)


@pytest.fixture(scope="module")
def model() -> ProspectModel:
    return fitted(simulated(12_000, seed=1))


@pytest.fixture(scope="module")
def unseen() -> LocalRows:
    return simulated(40_000, seed=2)


def test_chances_and_money_are_right_for_users_who_were_not_seen(model: ProspectModel, unseen: LocalRows) -> None:
    predicted, bought = model.predict(columns(unseen)), unseen.spend > 0
    assert model.chance is not None
    assert model.spend is not None
    assert auc(bought, predicted["p_active"]) > 0.7
    assert expected_calibration_error(bought, predicted["p_active"], unseen.weights) < 0.01
    assert predicted["expected_spend"].sum() == pytest.approx(unseen.spend.sum(), rel=0.1)


def test_one_in_twenty_at_most_spends_less_and_one_in_ten_more_than_the_interval(
    model: ProspectModel, unseen: LocalRows
) -> None:
    predicted = model.predict(columns(unseen))
    low, expected, high = (predicted[name] for name in ("low", "expected_spend", "high"))
    assert ((low >= 0) & (low <= expected) & (expected <= high)).all()
    assert (low[predicted["p_active"] < 0.95] == 0).all()
    unlikely = predicted["p_active"] <= 0.1
    assert (high[unlikely] == expected[unlikely]).all()
    assert (unseen.spend[~unlikely] > high[~unlikely]).mean() == pytest.approx(0.1, abs=0.02)


def test_weights_stand_for_users_who_were_left_out(unseen: LocalRows) -> None:
    rows = simulated(20_000, seed=3)
    kept = (rows.spend > 0) | (np.arange(len(rows.spend)) % 4 == 0)
    weights = np.where(rows.spend > 0, 1, 4).astype(np.float32)
    sampled = LocalRows(FEATURES, rows.values[kept], rows.spend[kept], weights[kept], rows.fold[kept], kept[kept])
    predicted = fitted(sampled).predict(columns(unseen))
    assert predicted["p_active"].mean() == pytest.approx((unseen.spend > 0).mean(), rel=0.1)


@pytest.mark.parametrize(("count", "level"), [(1, -3.0), (400, -3.0), (300, -50.0)])
def test_few_first_purchases_make_rates_that_fall_with_silence(count: int, level: float, unseen: LocalRows) -> None:
    rows = simulated(count, seed=4, level=level)
    rare = fitted(rows)
    predicted = rare.predict(columns(unseen))
    assert rare.chance is None
    order = np.argsort(unseen.values[:, PLACE[SILENCE]])
    assert (np.diff(predicted["p_active"][order]) <= 0).all()
    assert predicted["p_active"].mean() == pytest.approx((rows.spend > 0).mean(), abs=0.05 + 0.5 / count)
    assert np.isfinite(list(predicted.values())).all()
    assert set(rare.reason(columns(unseen))) <= {SILENCE, None}


def test_the_same_rows_make_the_same_files_and_these_the_same_predictions(
    model: ProspectModel, unseen: LocalRows, tmp_path: Path
) -> None:
    for name, one in {"one": model, "other": fitted(simulated(12_000, seed=1))}.items():
        (tmp_path / name).mkdir()
        one.save(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted([FILE, ChanceTrees.FILE, SpendTrees.FILE])
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in files)
    loaded = ProspectModel.load(tmp_path / "one")
    for name, values in model.predict(columns(unseen)).items():
        np.testing.assert_array_equal(values, loaded.predict(columns(unseen))[name])
    np.testing.assert_array_equal(loaded.reason(columns(unseen)), model.reason(columns(unseen)))


def test_what_moved_the_chance_most_is_named(model: ProspectModel, unseen: LocalRows) -> None:
    names, counts = np.unique(model.reason(columns(unseen)).astype(str), return_counts=True)
    assert set(names[np.argsort(-counts)][:2]) == {"carts_30d", SILENCE}


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "another key": (FILE, lambda d: d.update(more=1)),
    "a missing key": (FILE, lambda d: d.pop("tail")),
    "a definition that is no number": (FILE, lambda d: d.update(definition="1")),
    "a chance above 1": (FILE, lambda d: d["calibration"]["y"].__setitem__(-1, 1.5)),
    "chances that fall": (FILE, lambda d: d["calibration"]["y"].reverse()),
    "knots that fall": (FILE, lambda d: d["calibration"]["x"].reverse()),
    "no knot": (FILE, lambda d: d.update(calibration={"x": [], "y": []})),
    "money that is none": (FILE, lambda d: d["money"].update(mean=-1.0)),
    "too few quantiles": (FILE, lambda d: d["money"]["ratios"].pop()),
    "quantiles that fall": (FILE, lambda d: d["money"]["ratios"].reverse()),
    "unknown trees": (FILE, lambda d: d.update(trees=["prospect_spend"])),
    "trees of other features": (ChanceTrees.FILE, lambda d: d["learner"]["feature_names"].reverse()),
    "trees of another loss": (ChanceTrees.FILE, lambda d: d["learner"]["objective"].update(name="reg:gamma")),
    "trees in a circle": (
        SpendTrees.FILE,
        lambda d: d["learner"]["gradient_booster"]["model"]["trees"][0]["left_children"].__setitem__(0, 0),
    ),
    "a start that is no chance": (
        ChanceTrees.FILE,
        lambda d: d["learner"]["learner_model_param"].update(base_score="[2E0]"),
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused_by_name(case: str, model: ProspectModel, tmp_path: Path) -> None:
    model.save(tmp_path)
    name, damage = DAMAGE[case]
    document = json.loads((tmp_path / name).read_text())
    damage(document)
    (tmp_path / name).write_text(json.dumps(document))
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        ProspectModel.load(tmp_path)


def test_a_model_of_another_definition_loads_and_says_so(model: ProspectModel, tmp_path: Path) -> None:
    model.save(tmp_path)
    document = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**document, "definition": FORMAT + 1}))
    assert ProspectModel.load(tmp_path).definition == FORMAT + 1
