"""Boosted trees that are fitted on the driver, outside Spark."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession
from scipy.stats import spearmanr

from bp_spark.core.config import TreesConfig
from bp_spark.core.errors import DataError
from bp_spark.model.members import local_trees
from bp_spark.model.members.local_trees import LocalRows, LocalTreesFit, collect_rows, fits_driver
from bp_spark.model.members.trees import SqrtTreesMember, TreesMember

FEATURES = ("recency", "frequency", "monetary")
SMALL = TreesConfig(rounds=60, learning_rate=0.15, min_child_weight=5, colsample_bytree=0.7)


def rows(count: int = 1500, seed: int = 0) -> LocalRows:
    rng = np.random.default_rng(seed)
    frequency = rng.poisson(6, count).astype(float)
    monetary = np.exp(rng.normal(3, 0.7, count))
    active = rng.random(count) < 1 - np.exp(-frequency / 3)
    values = np.column_stack([rng.exponential(20, count), frequency, monetary]).astype(np.float32)
    values[rng.random(count) < 0.1, 2] = np.nan
    return LocalRows(
        FEATURES,
        values,
        np.where(active, frequency * monetary * np.exp(rng.normal(0, 0.4, count)), 0.0),
        np.ones(count, dtype=np.float32),
        rng.integers(0, 2, count),
        rng.random(count) < 0.9,
    )


def columns(of: LocalRows) -> dict[str, np.ndarray]:
    return dict(zip(of.features, of.values.T, strict=True))


def changed(of: LocalRows, **arrays: np.ndarray) -> LocalRows:
    return LocalRows(**{**vars(of), **arrays})


def saved(member: TreesMember, folder: Path) -> bytes:
    folder.mkdir(exist_ok=True)
    member.save(folder)
    return (folder / member.FILE).read_bytes()


@pytest.fixture(scope="module")
def training_rows() -> LocalRows:
    return rows()


@pytest.mark.parametrize("kind", [TreesMember, SqrtTreesMember])
def test_trees_rank_the_users_of_the_fold_left_out_and_keep_the_level(
    training_rows: LocalRows, kind: type[TreesMember]
) -> None:
    spend = LocalTreesFit(training_rows, SMALL, seed=7).fit(kind, 0).predict(columns(training_rows))
    left_out = training_rows.fold == 0
    assert (spend >= 0).all()
    assert spearmanr(spend[left_out], training_rows.spend[left_out]).statistic > 0.6
    level = 1e-6 if kind is SqrtTreesMember else 0.15
    assert spend[~left_out].sum() == pytest.approx(training_rows.spend[~left_out].sum(), rel=level)


def test_the_same_rows_give_the_same_trees_whatever_was_fitted_before_and_beside(
    training_rows: LocalRows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone = [
        saved(LocalTreesFit(training_rows, SMALL, seed=7).fit(kind, fold), tmp_path / "alone")
        for kind in (TreesMember, SqrtTreesMember)
        for fold in (0, 1)
    ]
    monkeypatch.setattr(local_trees, "_VALUES_PER_THREAD", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    shared = LocalTreesFit(training_rows, SMALL, seed=7)
    again = []
    for kind in (TreesMember, SqrtTreesMember):
        with ThreadPoolExecutor(2) as pool:
            members = list(pool.map(lambda fold, kind=kind: shared.fit(kind, fold, at_once=2), (0, 1)))
        again += [saved(member, tmp_path / "shared") for member in members]
    assert again == alone
    assert saved(LocalTreesFit(training_rows, SMALL, seed=8).fit(TreesMember, 0), tmp_path / "alone") != alone[0]


def test_complete_rows_of_the_fold_left_out_stop_the_fit_and_teach_nothing(
    training_rows: LocalRows, tmp_path: Path
) -> None:
    conf = SMALL.model_copy(update={"rounds": 300})
    member = LocalTreesFit(training_rows, conf, seed=7, patience=5).fit(TreesMember, 0)
    assert member.rounds < 100
    unused = (training_rows.fold == 0) & ~training_rows.complete
    other = changed(training_rows, spend=np.where(unused, 1e6, training_rows.spend))
    again = LocalTreesFit(other, conf, seed=7, patience=5).fit(TreesMember, 0)
    assert saved(again, tmp_path) == saved(member, tmp_path)


def test_trees_of_all_folds_have_the_rounds_that_were_asked(training_rows: LocalRows) -> None:
    assert LocalTreesFit(training_rows, SMALL, seed=7).fit(TreesMember, None, rounds=11).rounds == 11


def test_rows_of_no_weight_teach_nothing(training_rows: LocalRows) -> None:
    ghosts = changed(
        training_rows, spend=np.full_like(training_rows.spend, 1e5), weights=np.zeros_like(training_rows.weights)
    )
    both = LocalRows(
        FEATURES,
        *(np.concatenate([vars(training_rows)[name], vars(ghosts)[name]]) for name in list(vars(ghosts))[1:]),
    )
    spend = LocalTreesFit(both, SMALL, seed=7).fit(SqrtTreesMember, None).predict(columns(training_rows))
    assert spend.sum() == pytest.approx(training_rows.spend.sum(), rel=1e-6)


def test_rows_that_teach_nothing_are_refused(training_rows: LocalRows) -> None:
    with pytest.raises(DataError, match=r"training_set\.split: no training row"):
        LocalTreesFit(changed(training_rows, fold=np.zeros(1500, dtype=int)), SMALL, seed=1).fit(TreesMember, 0)
    with pytest.raises(DataError, match="no training row has any spend"):
        LocalTreesFit(changed(training_rows, spend=np.zeros(1500)), SMALL, seed=1).fit(TreesMember, None)


@pytest.fixture(scope="module")
def frame(training_rows: LocalRows) -> pd.DataFrame:
    frame = pd.DataFrame(columns(training_rows)).astype(np.float64)
    frame["user_key"] = [f"u{number}" for number in range(len(frame))]
    frame["as_of_date"] = date(2024, 1, 1)
    frame["label_spend"] = np.where(frame.index < 5, -3.0, training_rows.spend)
    frame["fold"], frame["complete"] = training_rows.fold, training_rows.complete
    frame["weight"] = 1.0 + training_rows.fold
    frame.loc[7, "recency"] = np.inf
    frame.loc[8, "recency"] = 1e300
    return frame


def test_rows_come_from_spark_in_one_order_however_they_lie_there(spark: SparkSession, frame: pd.DataFrame) -> None:
    here = collect_rows(spark.createDataFrame(frame), FEATURES, weight="weight")
    shuffled = spark.createDataFrame(frame.sample(frac=1, random_state=1)).repartition(5)
    again = collect_rows(shuffled, FEATURES, weight="weight")
    for name, array in list(vars(here).items())[1:]:
        np.testing.assert_array_equal(array, vars(again)[name])
    assert (here.values.dtype, here.values.shape) == (np.float32, (len(frame), 3))
    assert (here.spend.min(), sorted(here.weights)) == (0.0, sorted(frame["weight"]))
    by_frequency = frame.assign(recency=frame["recency"].where(frame["recency"] < 1e30)).sort_values("frequency")
    order = np.argsort(here.values[:, 1], kind="stable")
    assert np.isnan(here.values[:, 0]).sum() == 2
    assert np.nansum(here.values) == pytest.approx(float(np.nansum(by_frequency[list(FEATURES)])), rel=1e-4)
    np.testing.assert_array_equal(here.values[order, 1], by_frequency["frequency"].to_numpy(np.float32))
    with pytest.raises(DataError, match=r"training_set\.fold: column is missing"):
        collect_rows(shuffled.drop("fold"), FEATURES)


def test_rows_beyond_the_setting_are_left_to_spark(spark: SparkSession) -> None:
    ten = spark.range(10)
    assert fits_driver(ten, FEATURES, TreesConfig(max_local_values=30))
    assert not fits_driver(ten, FEATURES, TreesConfig(max_local_values=29))
    assert not fits_driver(ten, FEATURES, TreesConfig(max_local_values=0))
