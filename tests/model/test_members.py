"""The linear and the boosted-trees member: fitted in Spark, saved as JSON, predicting with numpy."""

from __future__ import annotations

import json
from datetime import date

import numpy as np
import pandas as pd
import pytest
import xgboost
from pyspark.sql import functions as F
from scipy.stats import spearmanr

from bp_spark.core.config import LinearConfig, TreesConfig
from bp_spark.core.errors import BundleError, DataError, PlatformError
from bp_spark.model.members.base import Member
from bp_spark.model.members.files import load_member
from bp_spark.model.members.linear import LinearMember, fit_linear
from bp_spark.model.members.spark_trees import fit_trees_in_spark, task_slots
from bp_spark.model.members.trees import SqrtTreesMember, TreesMember

FEATURES = ("recency", "frequency", "monetary")
SMALL = TreesConfig(rounds=60, learning_rate=0.15, min_child_weight=5)


def users(n: int = 1500, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frequency = rng.poisson(6, n).astype(float)
    monetary = np.exp(rng.normal(3, 0.7, n))
    active = rng.random(n) < 1 - np.exp(-frequency / 3)
    frame = pd.DataFrame(
        {
            "user_key": [f"u{i}" for i in range(n)],
            "as_of_date": date(2024, 1, 1),
            "split": np.where(rng.random(n) < 0.2, "valid", "train"),
            "recency": rng.exponential(20, n),
            "frequency": frequency,
            "monetary": monetary,
            "label_spend": np.where(active, frequency * monetary * np.exp(rng.normal(0, 0.4, n)), 0.0),
        }
    )
    frame.loc[rng.random(n) < 0.1, "monetary"] = np.nan
    frame.loc[:4, "label_spend"] = -3.0
    return frame


def columns(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    return {name: frame[name].to_numpy() for name in FEATURES}


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return users()


@pytest.fixture(scope="module")
def training_set(spark, frame):
    return spark.createDataFrame(frame).cache()


@pytest.fixture(scope="module")
def linear(training_set) -> LinearMember:
    return fit_linear(training_set, FEATURES, LinearConfig())


@pytest.fixture(scope="module")
def trees(training_set) -> TreesMember:
    return fit_trees_in_spark(training_set, FEATURES, SMALL, seed=7)


@pytest.fixture(scope="module")
def sqrt_trees(training_set) -> SqrtTreesMember:
    return fit_trees_in_spark(training_set, FEATURES, SMALL, seed=7, kind=SqrtTreesMember)


def saved_bytes(member: Member, folder) -> bytes:
    folder.mkdir()
    member.save(folder)
    (path,) = folder.iterdir()
    return path.read_bytes()


# linear


def test_linear_is_ridge_on_the_training_rows_written_out(frame, linear):
    train = frame[frame["split"] == "train"]
    logs = np.log1p(train[list(FEATURES)])
    x = logs.fillna(logs.mean()).to_numpy()
    y = np.log1p(train["label_spend"].clip(lower=0)).to_numpy()
    scale = x.std(axis=0, ddof=1)
    z = (x - x.mean(axis=0)) / scale
    penalty = LinearConfig().l2 / y.std(ddof=1) * np.eye(3)
    beta = np.linalg.solve(z.T @ z / len(z) + penalty, z.T @ (y - y.mean()) / len(z))
    np.testing.assert_allclose(linear.means, logs.mean(), rtol=1e-9)
    np.testing.assert_allclose(linear.coefficients, beta / scale, rtol=2e-3)
    fitted = np.minimum(linear.intercept + x @ np.array(linear.coefficients), linear.ceiling)
    assert linear.smearing == pytest.approx(np.exp(y).sum() / np.exp(fitted).sum(), rel=1e-9)
    wanted = np.maximum(np.exp(fitted) * linear.smearing - 1, 0)
    np.testing.assert_allclose(linear.predict(columns(train)), wanted, rtol=1e-9)


def test_linear_ranks_users(frame, linear):
    assert spearmanr(linear.predict(columns(frame)), frame["label_spend"]).statistic > 0.6


def test_linear_reads_a_missing_value_as_the_mean_and_holds_outliers(linear):
    mean = float(np.expm1(linear.means[2]))
    base = {"recency": np.full(4, 3.0), "frequency": np.full(4, 5.0)}
    a, b, c, d = linear.predict(base | {"monetary": np.array([np.nan, mean, np.inf, 1e300])})
    assert a == pytest.approx(b)
    assert a == c
    assert d == pytest.approx(np.exp(linear.ceiling) * linear.smearing - 1)


def test_linear_with_a_feature_nobody_has_and_one_that_never_varies(training_set):
    odd = training_set.withColumn("recency", F.lit(None).cast("double")).withColumn("frequency", F.lit(2.0))
    member = fit_linear(odd, FEATURES, LinearConfig())
    values = {
        "recency": np.array([1.0, np.nan]),
        "frequency": np.array([2.0, 2.0]),
        "monetary": np.full(2, 9.0),
    }
    spend = member.predict(values)
    assert np.isfinite(spend).all()
    assert spend[0] == spend[1]


# trees


def test_trees_rank_users_and_keep_the_level(frame, trees):
    spend = trees.predict(columns(frame))
    assert spend.dtype == np.float64
    assert (spend >= 0).all()
    assert spearmanr(spend, frame["label_spend"]).statistic > 0.6
    assert spend.mean() == pytest.approx(frame["label_spend"].clip(lower=0).mean(), rel=0.15)


def test_trees_stop_early_and_keep_the_best_rounds_only(training_set):
    member = fit_trees_in_spark(training_set, FEATURES, SMALL.model_copy(update={"rounds": 300}), seed=7, patience=5)
    assert member.rounds < 100


def test_trees_of_a_given_number_of_rounds_need_no_validation_rows(training_set):
    everyone = training_set.withColumn("split", F.lit("train"))
    assert fit_trees_in_spark(everyone, FEATURES, SMALL, seed=7, rounds=11).rounds == 11


def test_trees_on_the_root_of_spend_rank_users_and_keep_the_level(frame, sqrt_trees, tmp_path):
    spend = sqrt_trees.predict(columns(frame))
    assert spend.dtype == np.float64
    assert (spend >= 0).all()
    assert spearmanr(spend, frame["label_spend"]).statistic > 0.6
    train = frame["split"] == "train"
    assert spend[train].sum() == pytest.approx(frame["label_spend"].clip(lower=0)[train].sum(), rel=1e-6)
    assert (
        saved_bytes(load_member("sqrt_trees", _saved(sqrt_trees, tmp_path / "a")), tmp_path / "b")
        == (tmp_path / "a" / "sqrt_trees.json").read_bytes()
    )


def test_rows_of_no_weight_change_neither_trees_nor_their_level(spark, frame, tmp_path):
    ghosts = frame.assign(user_key="g" + frame["user_key"], label_spend=1e5, weight=0.0)
    both = spark.createDataFrame(pd.concat([frame.assign(weight=1.0), ghosts]))
    member = fit_trees_in_spark(both, FEATURES, SMALL, seed=7, kind=SqrtTreesMember, weight="weight")
    spend = member.predict(columns(frame))
    assert spend.mean() == pytest.approx(frame["label_spend"].clip(lower=0).mean(), rel=0.15)


def test_a_booster_of_another_loss_or_without_smearing_is_refused(trees, sqrt_trees, tmp_path):
    folder = _saved(trees, tmp_path / "a")
    (folder / "trees.json").rename(folder / "sqrt_trees.json")
    with pytest.raises(BundleError, match=r"sqrt_trees\.json: not a booster of reg:squarederror"):
        SqrtTreesMember.load(folder)
    folder = _saved(sqrt_trees, tmp_path / "b")
    document = json.loads((folder / "sqrt_trees.json").read_text())
    document["learner"]["attributes"].pop("smearing")
    (folder / "sqrt_trees.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"sqrt_trees\.json: must have an attribute smearing"):
        SqrtTreesMember.load(folder)


def _saved(member: Member, folder):
    folder.mkdir()
    member.save(folder)
    return folder


def test_trees_are_the_same_however_spark_laid_out_the_rows(spark, frame, trees, tmp_path):
    shuffled = spark.createDataFrame(frame.sample(frac=1, random_state=1)).repartition(5)
    again = fit_trees_in_spark(shuffled, FEATURES, SMALL, seed=7)
    assert saved_bytes(again, tmp_path / "a") == saved_bytes(trees, tmp_path / "b")


def test_contributions_add_up_to_the_log_of_the_prediction(frame, trees):
    shap = trees.contributions(columns(frame))
    assert shap.shape == (len(frame), len(FEATURES) + 1)
    np.testing.assert_allclose(shap.sum(axis=1), np.log(trees.predict(columns(frame))), atol=1e-4)
    importance = trees.importance()
    assert set(importance) <= set(FEATURES)
    assert sum(importance.values()) == pytest.approx(1)


def test_weights_count(training_set, frame, trees):
    weighted = training_set.withColumn("w", F.when(F.col("frequency") > 5, 20.0).otherwise(0.05))
    heavy = fit_trees_in_spark(weighted, FEATURES, SMALL, seed=7, weight="w")
    assert not np.allclose(heavy.predict(columns(frame)), trees.predict(columns(frame)))


def test_more_workers_than_task_slots_do_not_wait_forever(training_set, spark):
    slots = task_slots(spark)
    assert slots >= 1
    greedy = SMALL.model_copy(update={"workers": slots + 50, "rounds": 2})
    assert fit_trees_in_spark(training_set, FEATURES, greedy, seed=1).rounds == 2


def test_trees_without_validation_rows_use_every_round(training_set):
    train = training_set.where("split = 'train'")
    assert fit_trees_in_spark(train, FEATURES, SMALL.model_copy(update={"rounds": 4}), seed=1).rounds == 4


def test_training_sets_that_teach_nothing_are_refused(training_set):
    with pytest.raises(DataError, match=r"training_set\.split: no training row"):
        fit_trees_in_spark(training_set.where("split = 'valid'"), FEATURES, SMALL, seed=1)
    with pytest.raises(DataError, match=r"training_set\.split: no training row"):
        fit_linear(training_set.where("split = 'valid'"), FEATURES, LinearConfig())
    with pytest.raises(DataError, match="no training row has any spend"):
        fit_trees_in_spark(training_set.withColumn("label_spend", F.lit(0.0)), FEATURES, SMALL, seed=1)
    with pytest.raises(DataError, match=r"training_set\.age: column is missing"):
        fit_linear(training_set, ("age",), LinearConfig())


def test_a_session_without_spark_context_is_named():
    class Connect:
        @property
        def sparkContext(self):  # noqa: N802 (what a session of Spark Connect says when it is asked)
            raise AttributeError("JVM_ATTRIBUTE_NOT_SUPPORTED")

    with pytest.raises(PlatformError, match="Spark Connect"):
        task_slots(Connect())


# both


@pytest.fixture(params=["linear", "trees"])
def member(request) -> Member:
    return request.getfixturevalue(request.param)


def test_a_row_is_predicted_alike_alone_and_in_any_batch(member, frame):
    values = columns(frame.head(200))
    whole = member.predict(values)
    alone = [member.predict({k: v[i : i + 1] for k, v in values.items()})[0] for i in range(200)]
    assert whole.tobytes() == np.array(alone).tobytes()


def test_no_rows_give_no_predictions(member):
    assert member.predict({name: np.empty(0) for name in FEATURES}).shape == (0,)


def test_saved_members_come_back_to_the_bit(member, frame, tmp_path):
    member.save(tmp_path)
    back = load_member(member.name, tmp_path)
    assert back.predict(columns(frame)).tobytes() == member.predict(columns(frame)).tobytes()
    assert saved_bytes(back, tmp_path / "again") == (tmp_path / member.FILE).read_bytes()


def test_threads_do_not_change_predictions(trees, frame, tmp_path):
    trees.save(tmp_path)
    back = TreesMember.load(tmp_path)
    back.set_threads(2)
    assert back.predict(columns(frame)).tobytes() == trees.predict(columns(frame)).tobytes()


def test_a_missing_column_is_named(member):
    with pytest.raises(BundleError, match="recency, monetary"):
        member.predict({"frequency": np.ones(3)})


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_files_are_refused_by_name(member, tmp_path, share):
    member.save(tmp_path)
    path = tmp_path / member.FILE
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(BundleError, match=member.FILE):
        load_member(member.name, tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"learner": {}}', '{"learner": 3}', "\x80\x04K\x01.", "[" * 100_000])
def test_foreign_files_are_refused_by_name(member, tmp_path, text):
    (tmp_path / member.FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=member.FILE):
        load_member(member.name, tmp_path)


def test_a_booster_of_another_objective_is_refused(tmp_path):
    data = xgboost.DMatrix(np.arange(20.0).reshape(10, 2), label=np.arange(10.0), feature_names=["a", "b"])
    xgboost.train({"objective": "reg:squarederror"}, data, 2).save_model(tmp_path / "trees.json")
    with pytest.raises(BundleError, match=r"trees\.json: not a booster of reg:tweedie"):
        TreesMember.load(tmp_path)


def test_a_booster_that_lost_its_trees_is_refused(trees, tmp_path):
    trees.save(tmp_path)
    path = tmp_path / "trees.json"
    document = json.loads(path.read_text())
    del document["learner"]["gradient_booster"]
    path.write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"trees\.json"):
        TreesMember.load(tmp_path)


def test_missing_files_and_unknown_members_are_refused(tmp_path):
    for name in ("linear", "trees", "astrologer"):
        with pytest.raises(BundleError, match=name):
            load_member(name, tmp_path)
