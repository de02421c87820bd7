"""Pre-training: what is hidden and cut off, that ranks agree, that it learns, and that fine-tuning starts from it."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from safetensors.torch import load_file, save_file

from bp_spark.core.config import Config, NetworkConfig, PretrainingConfig, load
from bp_spark.core.errors import BundleError, ConfigError, DataError
from bp_spark.model.history import ENCODER_FILE
from bp_spark.model.inputs import HISTORY_COLUMNS
from bp_spark.model.network import SpendNetwork
from bp_spark.model.pretraining import PARTS, PretrainingNetwork, cut_histories, make_batch
from bp_spark.training import fit
from bp_spark.training.loader import Snapshot, snapshot
from bp_spark.training.progress import Progress
from bp_spark.training.tasks import finetune
from bp_spark.training.tasks import pretrain as module
from bp_spark.training.tasks.pretrain import ENCODER_FOLDER, PretrainTask, inputs_digest
from tests.support.networks import assert_equal_weights
from tests.support.ranks import as_rank, free_port
from tests.support.training_rows import SPEC, TEXT_IDS, arrays, make_rows, write_splits, write_table, write_texts

pytestmark = pytest.mark.slow

TINY = NetworkConfig(hidden_size=16, layers=1, heads=2, intermediate_size=16, adapter_size=8)
LENGTH = SPEC.history_length


def config(*overrides: str) -> Config:
    tiny = [f"network.{name}={value}" for name, value in TINY.model_dump(exclude_unset=True).items()]
    small = [f"features.history_length={LENGTH}", "pretraining.batch_size=32", "pretraining.max_epochs=3"]
    return load(overrides=[*tiny, *small, *overrides])


def splits(folder: Path) -> tuple[Snapshot, Snapshot]:
    train, valid = (snapshot(str(folder / "table"), where={"split": name}) for name in ("train", "valid"))
    return train, valid


def job(folder: Path, run: str, *overrides: str) -> PretrainTask:
    train, valid = splits(folder)
    conf, texts, run_dir = config(*overrides), folder / "texts.safetensors", folder / run
    run_dir.mkdir(exist_ok=True)
    epochs = conf.pretraining.max_epochs
    return PretrainTask(train, valid, epochs, LENGTH, texts, conf, run_dir, inputs_digest(train, valid, texts, conf))


def pretrain_rank(task: PretrainTask) -> Progress:
    return fit.fit(task).progress


def encoder(folder: Path) -> Path:
    return folder / ENCODER_FOLDER / ENCODER_FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Histories in files of very different sizes."""
    path = tmp_path_factory.mktemp("pretraining")
    write_splits(path / "table", train=[90, 20, 3, 7], valid=[30, 10])
    write_texts(path / "texts.safetensors")
    return path


def network(text_size: int = 6, temperature: float = 0.1) -> PretrainingNetwork:
    torch.manual_seed(0)
    return PretrainingNetwork(TINY, LENGTH, torch.randn(len(TEXT_IDS), text_size), temperature).eval()


# --- exercises ---------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), users=st.integers(1, 20))
@settings(deadline=None, max_examples=30)
def test_a_cut_history_knows_only_what_came_before_its_moment(seed: int, users: int) -> None:
    rows = make_rows(users, seed)
    made = cut_histories(rows, 30, np.random.default_rng(seed))
    before, after = made.before, made.after
    for row in range(users):
        whole, head, tail = (one["seq_age_days"][row] for one in (rows, before, after))
        assert len(tail) == (1 if len(whole) > 1 else 0)
        assert len(head) >= min(1, len(whole))
        for name in HISTORY_COLUMNS:
            assert len(before[name][row]) == len(head)
            if name != "seq_age_days":
                found = [*before[name][row], *after[name][row]]
                np.testing.assert_array_equal(found, rows[name][row][: len(found)])
        if len(tail):
            moment = whole[len(head)] + tail[0]
            assert made.covered[row] == (moment >= 30)
            soon = (whole <= moment) & (whole > moment - 30)
            soon[: len(head)] = False
            assert made.spend[row] == pytest.approx(rows["seq_amount"][row][soon].sum(), rel=1e-4)
            assert (head >= 0).all()
            np.testing.assert_allclose(head[-1] + tail[0], whole[len(head) - 1] - whole[len(head)], atol=1e-3)
            np.testing.assert_allclose(np.diff(head), np.diff(whole[: len(head)]), atol=1e-3)
        else:
            np.testing.assert_array_equal(head, whole)


def test_moments_are_spread_over_the_whole_history() -> None:
    ages = arrays([np.linspace(100, 1, 12, dtype=np.float32)] * 2000)
    rows = {name: arrays([np.ones(12, np.float32)] * 2000) for name in HISTORY_COLUMNS} | {"seq_age_days": ages}
    made = cut_histories(rows, 30, np.random.default_rng(0))
    counts = np.bincount([len(age) for age in made.before["seq_age_days"]], minlength=12)
    assert counts[0] == 0
    assert (np.abs(counts[1:] - 2000 / 11) < 5 * math.sqrt(2000 / 11)).all()


def test_about_the_asked_share_of_events_is_hidden_and_nothing_tells_when_they_were() -> None:
    made = make_batch(make_rows(400), LENGTH, TEXT_IDS, PretrainingConfig(mask_fraction=0.3), np.random.default_rng(0))
    events = int(made.history.mask.sum())
    assert abs(int(made.hidden.sum()) / events - 0.3) < 5 * math.sqrt(0.3 * 0.7 / events)
    assert not (made.hidden & ~made.history.mask).any()
    after_hidden = made.hidden[:, :-1]
    assert (made.history.numeric[:, 1:, 3][after_hidden] == 0).all()
    assert (made.history.numeric[:, 1:, 3][~after_hidden & made.history.mask[:, 1:]] > 0).any()


def test_a_hidden_event_does_not_reach_the_guesses() -> None:
    made = make_batch(make_rows(30), LENGTH, TEXT_IDS, PretrainingConfig(mask_fraction=0.4), np.random.default_rng(0))
    net = network()
    expected, _ = net(made)
    made.history.kind[made.hidden] = 3
    made.history.text[made.hidden] = 1
    made.history.weekday[made.hidden] = 2
    made.history.numeric[made.hidden] = 1e3
    found, _ = net(made)
    torch.testing.assert_close(found, expected)


def test_the_losses_are_those_of_a_reading_event_by_event() -> None:
    made, net = (
        make_batch(make_rows(30), LENGTH, TEXT_IDS, PretrainingConfig(mask_fraction=0.4), np.random.default_rng(0)),
        network(temperature=0.5),
    )
    sums, counts = net(made)
    encoder, history = net.history, made.history
    events = torch.where(made.hidden.unsqueeze(-1), net.hidden, encoder.events(history))
    states = encoder.read(events, history.mask)
    vectors = encoder.pool(states, history.mask)
    texts = sorted({0, *made.masked.text.tolist(), *made.following.text.tolist()})
    keys = net.key(encoder.text_embeddings[texts].float())
    keys = keys / keys.norm(dim=1, keepdim=True).clamp(min=1e-12)

    expected, numbers = [0.0] * 9, [0] * 9
    chosen = [(states[row, 1 + place], row) for row, place in made.hidden.nonzero().tolist()]
    following = [(vectors[row], row) for row in made.followed.nonzero().squeeze(1).tolist()]
    for offset, head, states_of, targets in (
        (0, net.of_masked, chosen, made.masked),
        (4, net.of_next, following, made.following),
    ):
        for index, (state, _) in enumerate(states_of):
            body = head.body(state)
            kind, amount, text = int(targets.kind[index]), float(targets.amount[index]), int(targets.text[index])
            guessed_amount, guessed_time = head.numbers(body).tolist()
            expected[offset] -= head.kind(body).log_softmax(0)[kind].item()
            numbers[offset] += 1
            if amount:
                expected[offset + 1] += 0.5 * (guessed_amount - amount) ** 2
                numbers[offset + 1] += 1
            expected[offset + 2] += 0.5 * (guessed_time - float(targets.time[index])) ** 2
            numbers[offset + 2] += 1
            if text:
                query = head.text(body)
                cosine = keys @ (query / query.norm())
                expected[offset + 3] -= (cosine / 0.5).log_softmax(0)[texts.index(text)].item()
                numbers[offset + 3] += 1
    for row, spend in zip(made.covered.nonzero().squeeze(1).tolist(), made.spend.tolist(), strict=True):
        expected[8] += 0.5 * (net.of_days(vectors[row]).item() - spend) ** 2
        numbers[8] += 1
    assert counts.tolist() == numbers
    assert min(numbers) > 0
    np.testing.assert_allclose(sums.detach().numpy(), expected, rtol=1e-4)


def test_a_batch_with_nothing_to_guess_costs_nothing_and_breaks_nothing() -> None:
    rows = {name: arrays([np.zeros(0, np.float32)] * 2) for name in HISTORY_COLUMNS}
    net = network()
    sums, counts = net(make_batch(rows, LENGTH, TEXT_IDS, PretrainingConfig(), np.random.default_rng(0)))
    assert sums.tolist() == counts.tolist() == [0.0] * len(PARTS)
    sums.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# --- training ----------------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


def stop_in_epoch(number: int, stopped: PretrainTask) -> None:
    train_epoch = fit.train_epoch

    def fail_later(*args: object) -> list[float]:
        if args[2] == number:
            raise StoppedError
        return train_epoch(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "train_epoch", fail_later)
        with pytest.raises(StoppedError):
            pretrain_rank(stopped)


def rank_scenario(rank: int, folder: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    as_rank(rank, 2)
    os.environ["MASTER_PORT"] = str(ports[0])
    pretrain_rank(job(folder, "two ranks", "pretraining.batch_size=8"))


def test_two_ranks_of_unequal_shares_finish_and_tell_the_same(folder: Path) -> None:
    mp.start_processes(rank_scenario, (folder, [free_port()]), nprocs=2, start_method="spawn")
    assert load_file(encoder(folder / "two ranks"))


def test_a_resumed_run_ends_like_an_undisturbed_one(folder: Path, single_rank: None) -> None:
    progress = pretrain_rank(job(folder, "undisturbed"))
    assert [row["epoch"] for row in progress.history] == [1, 2, 3]
    last = progress.history[-1]
    assert last["valid_loss"] == pytest.approx(sum(last[f"valid_loss_{part}"] for part in PARTS))
    os.environ["MASTER_PORT"] = str(free_port())
    stop_in_epoch(3, job(folder, "stopped"))
    os.environ["MASTER_PORT"] = str(free_port())
    pretrain_rank(job(folder, "stopped"))
    assert_equal_weights(encoder(folder / "stopped"), encoder(folder / "undisturbed"), 1e-6)


def test_histories_teach_what_spend_of_the_next_order_depends_on(tmp_path: Path, single_rank: None) -> None:
    write_table(tmp_path / "table", make_rows(400, seed=3))
    write_table(tmp_path / "table", make_rows(100, seed=4), split="valid")
    write_texts(tmp_path / "texts.safetensors")
    learn = ("pretraining.max_epochs=25", "pretraining.learning_rate=1e-2")
    progress = pretrain_rank(job(tmp_path, "run", *learn))
    best = progress.history[progress.best_epoch - 1]
    assert progress.best_loss == min(row["valid_loss"] for row in progress.history)
    # amounts of one user differ by 10 %, those of different users by a factor of e
    assert best["valid_loss_next_amount"] < 0.25
    assert best["valid_loss_masked_amount"] < 0.25
    first = progress.history[0]
    assert best["valid_loss_next_days"] < 0.7 * first["valid_loss_next_days"]


def test_a_loss_that_is_not_finite_is_an_error(folder: Path, single_rank: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "mean_losses", lambda *args: [math.nan] * len(PARTS))
        with pytest.raises(ConfigError, match=r"pretraining\.learning_rate"):
            pretrain_rank(job(folder, "wild"))


def test_fine_tuning_starts_from_the_encoder_and_takes_no_other(folder: Path, single_rank: None) -> None:
    run = job(folder, "for fine-tuning", "pretraining.max_epochs=1")
    pretrain_rank(run)
    initial = run.run_dir / ENCODER_FOLDER
    train, valid = splits(folder)
    conf = config("training.max_epochs=1", "training.learning_rate=1e-30", "training.weight_decay=0")

    def start(initial: Path | None) -> finetune.FineTuneTask:
        identity = finetune.inputs_digest(train, valid, SPEC, run.texts, conf, initial)
        return finetune.FineTuneTask(
            train, valid, conf.training.max_epochs, SPEC, run.texts, conf, folder / "fine-tuned", identity, initial
        )

    (folder / "fine-tuned").mkdir()
    assert start(initial).digest != start(None).digest
    os.environ["MASTER_PORT"] = str(free_port())
    fit.fit(start(initial))
    tuned = SpendNetwork.load(folder / "fine-tuned" / finetune.MODEL_FOLDER)
    pretrained = load_file(encoder(run.run_dir))
    for name, tensor in tuned.history.state_dict().items():
        # in a bundle the projection of the texts lies aside
        torch.testing.assert_close(tensor, pretrained[name.replace("projection.", "text.", 1)], msg=name)
    # texts are kept as the encoder reads them
    width = tuned.config.hidden_size
    no_text = F.layer_norm(pretrained["text.0.bias"], (width,), pretrained["text.1.weight"], pretrained["text.1.bias"])
    torch.testing.assert_close(tuned.history.text_embeddings[0], no_text)

    other = folder / "other"
    other.mkdir()
    save_file({"kind.weight": torch.zeros(2, 2)}, str(other / ENCODER_FILE))
    with pytest.raises(BundleError, match=r"other/encoder\.safetensors.*don't fit"):
        tuned.history.restore(other)
    (other / ENCODER_FILE).write_bytes(b"broken")
    with pytest.raises(BundleError, match="can't be read"):
        tuned.history.restore(other)


def test_pre_training_starts_from_an_encoder_too(folder: Path, tmp_path: Path) -> None:
    cold = job(folder, "warm")
    other = network().history
    other.save(tmp_path)
    digests = [inputs_digest(cold.train, cold.valid, cold.texts, cold.config, initial) for initial in (None, tmp_path)]
    assert digests[0] != digests[1]
    started = dataclasses.replace(cold, initial=tmp_path).network(None, None)  # type: ignore[arg-type]
    torch.testing.assert_close(started.history.kind.weight, other.kind.weight)
    assert not torch.equal(cold.network(None, None).history.kind.weight, other.kind.weight)  # type: ignore[arg-type]


def test_a_missing_encoder_and_a_missing_column_are_named_before_ranks_start(
    spark: SparkSession, folder: Path, tmp_path: Path
) -> None:
    train, valid = splits(folder)
    texts = folder / "texts.safetensors"
    with pytest.raises(BundleError, match=r"encoder\.safetensors: can't be read"):
        finetune.finetune(spark, train, valid, SPEC, texts, config(), tmp_path / "run", tmp_path / "nowhere")
    rows = make_rows(20)
    del rows["seq_hour"]
    write_table(tmp_path / "table", rows)
    poor = snapshot(str(tmp_path / "table"))
    with pytest.raises(DataError, match="seq_hour: must be a column"):
        module.pretrain(spark, poor, poor, texts, config(), tmp_path / "run")
