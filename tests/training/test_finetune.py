"""Fine-tuning with real ranks: exact gradients, resumption, early stopping, and that it learns."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from pyspark.sql import SparkSession
from safetensors.torch import load_file
from scipy.stats import spearmanr

from bp_spark.core.config import Config, TrainingConfig, load
from bp_spark.core.errors import DataError, PlatformError
from bp_spark.model.members.transformer import TransformerMember
from bp_spark.model.network import WEIGHTS_FILE
from bp_spark.training import fit
from bp_spark.training.distributed import process_group, run_ranks
from bp_spark.training.loader import Snapshot, snapshot
from bp_spark.training.progress import CHECKPOINT_FILE, TENSORBOARD_FOLDER, Progress, WeightAverage
from bp_spark.training.tasks import finetune as module
from bp_spark.training.tasks.finetune import FineTuneTask, finetune, inputs_digest
from tests.support.networks import assert_equal_weights
from tests.support.ranks import as_rank, free_port
from tests.support.training_rows import SPEC, make_rows, write_language_model, write_splits, write_table, write_texts

pytestmark = pytest.mark.slow

TINY = (
    "network.hidden_size=16",
    "network.layers=1",
    "network.heads=2",
    "network.intermediate_size=16",
    "network.adapter_size=16",
    "network.horizons_weight=0.1",
    "training.batch_size=32",
)


def config(*overrides: str) -> Config:
    return load(overrides=[*TINY, *overrides])


def splits(folder: Path) -> tuple[Snapshot, Snapshot]:
    return tuple(snapshot(str(folder / "table"), where={"split": name}) for name in ("train", "valid"))  # type: ignore


def job(folder: Path, run: str, *overrides: str) -> FineTuneTask:
    train, valid = splits(folder)
    conf, texts = config(*overrides), folder / "texts.safetensors"
    run_dir = folder / run
    run_dir.mkdir(exist_ok=True)
    identity = inputs_digest(train, valid, SPEC, texts, conf)
    return FineTuneTask(train, valid, conf.training.max_epochs, SPEC, texts, conf, run_dir, identity)


def train_rank(task: FineTuneTask) -> Progress:
    return fit.fit(task).progress


def weights(folder: Path) -> Path:
    return folder / module.MODEL_FOLDER / WEIGHTS_FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training rows in files of very different sizes, so that two ranks have 203 and 37 rows."""
    path = tmp_path_factory.mktemp("training")
    write_splits(path / "table", train=[200, 30, 3, 7], valid=[50, 10])
    write_texts(path / "texts.safetensors", write_language_model(path / "bert", "bert"))
    return path


def as_text_overrides(folder: Path) -> tuple[str, ...]:
    """Histories read as text by the tiny language model of the folder."""
    return ("network.backbone=text", f"network.text.model={folder / 'bert'}", "network.text.max_tokens=64")


ONE_STEP = ("training.batch_size=1000", "training.max_epochs=1", "training.optimizer=sgd", "network.dropout=0")
# of a step one rank has some fifty rows, the other ten
STEPS = ("training.batch_size=64", "training.max_epochs=2", "training.optimizer=sgd", "network.dropout=0")
SOME_STEPS = {"steps": STEPS, "steps in parts": (*STEPS, "training.rows_at_once=20")}
FEW_EPOCHS = ("training.max_epochs=4", "network.loss=mse")


class StoppedError(Exception):
    pass


def train_and_stop_after(epochs: int, stopped: FineTuneTask) -> None:
    """Train until the checkpoint of that epoch is written and another epoch is under way, then fail."""
    count, mean_losses = itertools.count(1), fit.mean_losses

    def fail_later(*args: Any) -> list[float]:
        if next(count) > epochs:
            raise StoppedError
        return mean_losses(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "mean_losses", fail_later)
        with pytest.raises(StoppedError):
            train_rank(stopped)


def rank_scenarios(rank: int, folder: Path, ports: list[int]) -> None:
    """All that needs two ranks, in one pair of processes: starting them costs more than the training."""
    torch.set_num_threads(1)
    as_rank(rank, 2)

    def port() -> None:
        os.environ["MASTER_PORT"] = str(ports.pop(0))

    port()
    train_rank(job(folder, "uneven", *ONE_STEP))
    port()
    train_rank(job(folder, "in parts", *ONE_STEP, "training.rows_at_once=30"))
    for run, overrides in SOME_STEPS.items():
        port()
        train_rank(job(folder, run, *overrides))
    port()
    one_file = job(folder, "starved", "training.max_epochs=1")
    train_rank(replace(one_file, train=snapshot(str(folder / "table"), where={"split": "valid"}, version=4)))
    port()
    train_rank(job(folder, "undisturbed", *FEW_EPOCHS))
    port()
    train_and_stop_after(2, job(folder, "stopped", *FEW_EPOCHS))
    port()
    progress = train_rank(job(folder, "stopped", *FEW_EPOCHS))
    assert [row["epoch"] for row in progress.history] == [1, 2, 3, 4]
    port()
    as_text = job(folder, "text", "training.max_epochs=2", *as_text_overrides(folder))
    train_rank(replace(as_text, train=snapshot(str(folder / "table"), where={"split": "valid"}, version=4)))


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Path:
    ports = [free_port() for _ in range(9)]
    mp.start_processes(rank_scenarios, (folder, ports), nprocs=2, start_method="spawn")
    return folder


def test_uneven_ranks_make_the_step_of_one_process_with_all_rows(two_ranks: Path, single_rank: None) -> None:
    shares = [splits(two_ranks)[0].shard(rank, 2).rows for rank in range(2)]
    assert max(shares) > 5 * min(shares)
    train_rank(job(two_ranks, "alone", *ONE_STEP))
    assert_equal_weights(weights(two_ranks / "uneven"), weights(two_ranks / "alone"), 1e-5)


def test_a_step_in_parts_is_that_of_all_rows_at_once(
    two_ranks: Path, single_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one rank has seven parts and the other two; in the other runs one has several parts and the other a single one
    assert_equal_weights(weights(two_ranks / "in parts"), weights(two_ranks / "uneven"), 1e-5)
    assert_equal_weights(weights(two_ranks / "steps in parts"), weights(two_ranks / "steps"), 1e-5)
    sizes, real = [], FineTuneTask.train_losses

    def seen(task: FineTuneTask, network: Any, model: Any, batch: Any) -> Any:
        sizes.append(len(batch[1]))
        return real(task, network, model, batch)

    monkeypatch.setattr(FineTuneTask, "train_losses", seen)
    train_rank(job(two_ranks, "alone in parts", *ONE_STEP, "training.rows_at_once=100"))
    assert sizes == [100, 100, 40]


def test_a_rank_without_rows_does_not_stop_the_others(two_ranks: Path) -> None:
    assert (two_ranks / "starved" / module.MODEL_FOLDER / WEIGHTS_FILE).exists()


def test_a_language_model_is_tuned_by_ranks_of_which_one_has_no_rows(two_ranks: Path) -> None:
    run = two_ranks / "text"
    saved = torch.load(run / CHECKPOINT_FILE, weights_only=True)
    assert saved["progress"]["epoch"] == 2
    changes = [name for name in saved["state"]["network"] if ".language." in name]
    assert changes
    assert all(".lora_" in name for name in changes)
    assert any(saved["state"]["network"][name].any() for name in changes if ".lora_B." in name)
    predicted = TransformerMember.load(run / module.MODEL_FOLDER).predict(make_rows(20))
    assert predicted.std() > 0


def test_a_resumed_run_ends_like_an_undisturbed_one(two_ranks: Path) -> None:
    assert_equal_weights(weights(two_ranks / "stopped"), weights(two_ranks / "undisturbed"), 1e-6)


def test_squared_error_of_logs_still_predicts_money(two_ranks: Path) -> None:
    rows = make_rows(240, seed=1)
    member = TransformerMember.load(two_ranks / "undisturbed" / module.MODEL_FOLDER)
    assert member.predict(rows).sum() == pytest.approx(rows["label_spend"].sum(), rel=0.05)
    known = ~np.isnan(rows["label_spend_180d"])
    said = member.predict_horizons(rows)["transformer_180d"][known]
    assert said.sum() == pytest.approx(rows["label_spend_180d"][known].sum(), rel=0.05)


def test_a_checkpoint_of_other_inputs_is_ignored(folder: Path, single_rank: None) -> None:
    train_rank(job(folder, "reused", "training.max_epochs=2"))
    os.environ["MASTER_PORT"] = str(free_port())
    progress = train_rank(job(folder, "reused", "training.max_epochs=1", "training.seed=8"))
    assert progress.epoch == 1
    os.environ["MASTER_PORT"] = str(free_port())
    train_rank(job(folder, "fresh", "training.max_epochs=1", "training.seed=8"))
    assert_equal_weights(weights(folder / "reused"), weights(folder / "fresh"), 0)
    assert not list((folder / "reused").glob("*.tmp"))


def test_a_checkpoint_of_an_older_version_is_ignored(folder: Path, single_rank: None) -> None:
    upgraded = job(folder, "upgraded", "training.max_epochs=1")
    train_rank(upgraded)
    path = folder / "upgraded" / CHECKPOINT_FILE
    saved = torch.load(path, weights_only=True)
    torch.save({name: saved[name] for name in ("digest", "progress", "best")}, path)
    os.environ["MASTER_PORT"] = str(free_port())
    train_rank(upgraded)
    assert torch.load(path, weights_only=True).keys() == saved.keys()


def test_training_stops_early_and_keeps_the_best_epoch(tmp_path: Path, single_rank: None) -> None:
    rows = make_rows(64)
    write_table(tmp_path / "table", rows | {"label_spend": np.full(64, 100.0)})
    write_table(tmp_path / "table", rows | {"label_spend": np.zeros(64)}, split="valid")
    write_texts(tmp_path / "texts.safetensors")
    progress = train_rank(job(tmp_path, "run", "training.max_epochs=30", "training.patience=2"))
    losses = [row["valid_loss"] for row in progress.history]
    assert progress.best_loss == min(losses) == losses[progress.best_epoch - 1]
    assert progress.epoch == progress.best_epoch + 2 < 30


def test_the_average_of_weights_follows_faster_at_first_and_halves_in_its_half_life() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0.0)
    average = WeightAverage(network, half_life=4)
    network.weight.data.fill_(1.0)
    for step in range(1, 101):
        average.update()
        if step == 1:
            with average.in_place():
                first = network.weight.item()
    assert first == pytest.approx(10 / 11)
    network.weight.data.fill_(3.0)
    for _ in range(4):
        average.update()
    with average.in_place():
        assert network.weight.item() == pytest.approx(2.0, abs=1e-2)
    assert network.weight.item() == 3.0


def test_the_average_of_weights_is_kept_and_without_one_the_weights_are(folder: Path, single_rank: None) -> None:
    for run, epochs, kept in (("averaged", 1, False), ("plain", 0, True)):
        os.environ["MASTER_PORT"] = str(free_port())
        train_rank(job(folder, run, "training.max_epochs=1", f"training.average_epochs={epochs}"))
        last = torch.load(folder / run / CHECKPOINT_FILE, weights_only=True)["state"]["network"]
        saved = load_file(weights(folder / run))
        assert all(torch.equal(saved[name], last[name]) for name in saved.keys() & last.keys()) == kept


def test_a_run_without_validation_rows_is_that_of_so_many_epochs(folder: Path, single_rank: None) -> None:
    with_validation = job(folder, "watched", "training.max_epochs=4", "training.patience=4")
    progress = train_rank(with_validation)
    os.environ["MASTER_PORT"] = str(free_port())
    (folder / "unwatched").mkdir()
    again = train_rank(replace(with_validation, valid=None, epochs=progress.best_epoch, run_dir=folder / "unwatched"))
    assert again.epoch == again.best_epoch == progress.best_epoch
    assert_equal_weights(weights(folder / "watched"), weights(folder / "unwatched"), 0)


def test_a_loss_that_is_not_finite_is_an_error(folder: Path, single_rank: None) -> None:
    wild = job(folder, "wild", "training.optimizer=sgd", "training.learning_rate=1e30", "training.gradient_clip=1e30")
    with pytest.raises(Exception, match=r"training\.learning_rate"):
        train_rank(wild)


def test_statistics_are_those_of_all_rows(folder: Path, single_rank: None) -> None:
    rows = make_rows(240, seed=1)
    with process_group() as group:
        rows_of_rank = job(folder, "statistics").split(splits(folder)[0], group)
        found = module.training_statistics(rows_of_rank, 4, group)
    spend, label = np.log1p(rows["spend_90d"]), rows["label_spend"]
    logs = np.log(label[label > 0])
    main, month, half_year = found.labels
    np.testing.assert_allclose(found.mean, [np.nanmean(rows["recency"]), spend.mean()], rtol=1e-5)
    np.testing.assert_allclose(found.std, [np.nanstd(rows["recency"]), spend.std()], rtol=1e-4)
    np.testing.assert_allclose(found.missing, [np.isnan(rows["recency"]).mean(), 0])
    assert main.active_share == pytest.approx((label > 0).mean())
    assert (main.log_mean, main.log_std) == pytest.approx((logs.mean(), logs.std()))
    assert (main.log1p_mean, main.max_label) == pytest.approx((np.log1p(label).mean(), label.max()))
    assert main.mean_label == pytest.approx(label.mean())
    assert (month.mean_label, month.max_label) == pytest.approx((0.4 * label.mean(), 0.4 * label.max()))
    known = label[~np.isnan(rows["label_spend_180d"])]
    assert len(known) == 192
    assert (half_year.mean_label, half_year.max_label) == pytest.approx((2 * known.mean(), 2 * known.max()))
    assert half_year.active_share == pytest.approx((known > 0).mean())
    np.testing.assert_allclose(found.band_edges, np.quantile(label, [0.25, 0.5, 0.75]), rtol=0.05)


def test_two_ranks_learn_what_spend_depends_on(spark: SparkSession, tmp_path: Path) -> None:
    write_table(tmp_path / "table", make_rows(800, seed=3), files=[500, 200, 100])
    write_table(tmp_path / "table", make_rows(200, seed=4), split="valid")
    write_texts(tmp_path / "texts.safetensors")
    conf = config("training.max_epochs=15", "training.learning_rate=5e-3")
    train, valid = splits(tmp_path)
    result = finetune(spark, train, valid, SPEC, tmp_path / "texts.safetensors", conf, tmp_path / "run")

    unseen = make_rows(300, seed=5)
    predicted, actual = TransformerMember.load(result.folder).predict(unseen), unseen["label_spend"]
    mean_error = np.abs(np.log1p(actual) - np.log1p(actual).mean()).mean()
    assert np.abs(np.log1p(predicted) - np.log1p(actual)).mean() < 0.5 * mean_error
    assert 0.7 < predicted.sum() / actual.sum() < 1.3
    months = TransformerMember.load(result.folder).predict_horizons(unseen)["transformer_30d"]
    assert spearmanr(months, actual).statistic > 0.8
    assert 0.7 < months.sum() / (0.4 * actual.sum()) < 1.3
    assert result.epochs == len(result.history) <= 15
    assert result.best_validation_loss == min(row["valid_loss"] for row in result.history)
    assert list((tmp_path / "run" / TENSORBOARD_FOLDER).iterdir())


@pytest.mark.parametrize("loss", ["tweedie", "ziln"])
def test_bands_and_tweedie_learn_too(tmp_path: Path, single_rank: None, loss: str) -> None:
    write_table(tmp_path / "table", make_rows(400, seed=3))
    write_table(tmp_path / "table", make_rows(100, seed=4), split="valid")
    write_texts(tmp_path / "texts.safetensors")
    learn = (
        "training.max_epochs=10",
        "training.learning_rate=5e-3",
        "network.bands_weight=0.3",
        f"network.loss={loss}",
    )
    train_rank(job(tmp_path, "run", *learn))
    unseen = make_rows(300, seed=5)
    predicted, actual = (
        TransformerMember.load(tmp_path / "run" / module.MODEL_FOLDER).predict(unseen),
        unseen["label_spend"],
    )
    assert spearmanr(predicted, actual).statistic > 0.8
    assert 0.7 < predicted.sum() / actual.sum() < 1.3


def test_a_failed_rank_says_why_in_a_few_lines(spark: SparkSession, tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError("no such luck")

    with pytest.raises(PlatformError, match="no such luck") as caught:
        run_ranks(spark, TrainingConfig(), tmp_path, fail)
    assert len(str(caught.value).splitlines()) <= 10


def test_ranks_run_as_tasks_of_executors(spark: SparkSession, tmp_path: Path) -> None:
    def add_ranks() -> float:
        from bp_spark.training.distributed import process_group

        with process_group() as group:
            return float(group.sum(torch.tensor(group.rank + 1.0)))

    assert run_ranks(spark, TrainingConfig(launcher="cluster"), tmp_path, add_ranks) == 3.0


def test_a_missing_column_is_named_before_ranks_start(spark: SparkSession, folder: Path, tmp_path: Path) -> None:
    train, valid = splits(folder)
    spec = replace(SPEC, tabular=(*SPEC.tabular, "no_such_feature"))
    with pytest.raises(DataError, match="no_such_feature"):
        finetune(spark, train, valid, spec, folder / "texts.safetensors", config(), tmp_path)


def test_texts_must_be_sorted_embeddings(folder: Path, tmp_path: Path, spark: SparkSession) -> None:
    path = tmp_path / "texts.safetensors"
    path.write_bytes(b"no safetensors")
    with pytest.raises(DataError, match="safetensors file of ids and embeddings"):
        finetune(spark, *splits(folder), SPEC, path, config(), tmp_path)
    with pytest.raises(DataError, match="tokens of words and texts"):
        finetune(spark, *splits(folder), SPEC, write_texts(path), config("network.backbone=text"), tmp_path)
