"""Adapting the language model: what is masked, who reads what, that it learns, goes on where it stopped, and can be used."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import torch.multiprocessing as mp
from deltalake import write_deltalake
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
)

from bp_spark import pipeline
from bp_spark.core.config import Config, load
from bp_spark.core.errors import ConfigError, DataError, PlatformError
from bp_spark.ingest import texts
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.training import fit
from bp_spark.training.distributed import process_group
from bp_spark.training.fit import FitResult, in_parts
from bp_spark.training.loader import Snapshot, snapshot
from bp_spark.training.progress import TENSORBOARD_FOLDER
from bp_spark.training.tasks import masked_lm as module
from bp_spark.training.tasks.masked_lm import (
    HELD_OUT,
    MaskedLmResult,
    MaskedLmTask,
    inputs_digest,
    read_texts,
    train_masked_lm,
)
from bp_spark.training.tasks.masking import MaskedBatch, MaskedLanguageModel, Masking, TokenizedTexts
from tests.support.ranks import free_port

pytestmark = pytest.mark.slow

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOPICS = {
    "fruit": ("red sweet ripe fresh", "apple cherry plum pear mango"),
    "tool": ("steel heavy electric small", "hammer drill saw wrench file"),
    "drink": ("cold sparkling sugarfree light", "cola water juice tea lemonade"),
    "clothing": ("blue cotton warm long", "shirt sock coat scarf glove"),
}
SIZES = tuple(f"size{number}" for number in range(8))
WORDS = (*TOPICS, *SIZES, *" ".join(word for words in TOPICS.values() for word in words).split())


def all_texts() -> list[str]:
    """640 texts; each word but the size tells what the others may be."""
    return [
        f"{kind} {thing} {topic} {size}"
        for topic, (kinds, things) in TOPICS.items()
        for kind, thing, size in itertools.product(kinds.split(), things.split(), SIZES)
    ]


def write_texts(path: Path, values: list[str], files: int = 1) -> Path:
    """A table as ``texts``, in so many files, the first of them much the largest."""
    table = pa.table({"text_id": pa.array(range(len(values)), pa.int64()), "text": values})
    edges = [0, *range(len(values) - 5 * (files - 1), len(values), 5), len(values)]
    for start, end in itertools.pairwise(edges):
        write_deltalake(str(path), table.slice(start, end - start), mode="append")
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.normalizer = normalizers.Lowercase()
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=pieces, **dict(zip(names, SPECIAL, strict=True)))


def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder without a masked-language head, and a table of texts in five files."""
    path = tmp_path_factory.mktemp("language")
    torch.manual_seed(1)
    BertModel(bert_config()).save_pretrained(path / "bert")
    tokenizer().save_pretrained(path / "bert")
    write_texts(path / "texts", all_texts(), files=5)
    return path


def config(folder: Path, *overrides: str) -> Config:
    tiny = ("language.batch_size=32", "language.learning_rate=5e-3", "texts.max_tokens=8")
    return load(overrides=[f"texts.model={folder}/bert", *tiny, *overrides])


def job(folder: Path, run: str, *overrides: str) -> MaskedLmTask:
    found, conf, run_dir = snapshot(str(folder / "texts")), config(folder, *overrides), folder / run
    run_dir.mkdir(exist_ok=True)
    return MaskedLmTask(found, conf, run_dir, run_dir / "out", inputs_digest(found, conf))


def as_rank(rank: int, ranks: int, port: int) -> None:
    """Pretend that torchrun started this process."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")


@pytest.fixture
def single_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    as_rank(0, 1, free_port())
    torch.set_num_threads(1)


# --- masking -----------------------------------------------------------------------------------------------------------


def masking(share: float = 0.15, words: int = 1000) -> Masking:
    return Masking(share, mask_id=4, special=torch.arange(words) < len(SPECIAL))


@given(
    ids=st.lists(st.integers(0, 19), min_size=1, max_size=40),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
@hypothesis_settings(deadline=None)
def test_special_tokens_are_never_masked_and_what_is_not_chosen_stays(ids: list[int], share: float, seed: int) -> None:
    given_ids = torch.tensor([ids])
    hidden, chosen = masking(share, words=20)(given_ids, torch.Generator().manual_seed(seed))
    assert not (chosen & (given_ids < len(SPECIAL))).any()
    assert torch.equal(hidden[~chosen], given_ids[~chosen])
    put = hidden[chosen]
    assert ((put == 4) | (put >= len(SPECIAL))).all(), "the mask token or an ordinary one"


@pytest.mark.parametrize("share", [0.15, 0.4])
def test_of_the_chosen_tokens_80_percent_are_masked_10_changed_and_10_kept(share: float) -> None:
    ids = torch.randint(0, 1000, (2000, 100), generator=torch.Generator().manual_seed(1))
    hidden, chosen = masking(share)(ids, torch.Generator().manual_seed(2))

    def assert_share(part: torch.Tensor, whole: torch.Tensor, expected: float) -> None:
        found, rows = float(part.sum() / whole.sum()), float(whole.sum())
        assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / rows)

    assert_share(chosen, ids >= len(SPECIAL), share)
    assert_share(chosen & (hidden == 4), chosen, 0.8)
    # one in 995 of the tokens that are put in another's place is the same token
    assert_share(chosen & (hidden != 4) & (hidden != ids), chosen, 0.1 * 994 / 995)
    assert_share(chosen & (hidden == ids), chosen, 0.1 + 0.1 / 995)


def test_the_tokenizer_says_which_tokens_are_special() -> None:
    found = Masking.of(tokenizer(), 0.15)
    assert found.special.nonzero().squeeze(1).tolist() == list(range(len(SPECIAL)))
    assert (found.mask_id, len(found.special)) == (4, len(SPECIAL) + len(WORDS))


def test_scores_of_chosen_tokens_are_those_of_the_whole_model() -> None:
    model = BertForMaskedLM(bert_config()).eval()
    ids = torch.tensor([[2, 9, 4, 7, 3], [2, 4, 3, 0, 0]])
    attention = (ids != 0).long()
    whole = model(input_ids=ids, attention_mask=attention).logits
    narrowed = MaskedLanguageModel(model)
    for chosen in (ids == 4, torch.zeros_like(ids, dtype=torch.bool)):
        torch.testing.assert_close(narrowed(ids, attention, chosen), whole[chosen])


# --- two ranks ---------------------------------------------------------------------------------------------------------


def rank_scenario(rank: int, folder: Path, ports: list[int]) -> None:
    """What each of two ranks reads in two epochs, as JSON; then a whole adaptation."""
    torch.set_num_threads(1)
    as_rank(rank, 2, ports[0])
    words = AutoTokenizer.from_pretrained(folder / "bert")
    with process_group() as group:
        learned, held_out = read_texts(job(folder, "read"), words, group)
        seen = {"held out": [decoded(words, ids) for ids, _ in held_out.epoch(0)]}
        for epoch in (1, 2):
            seen[str(epoch)] = [decoded(words, ids) for ids, _ in learned.epoch(epoch)]
        few = replace(learned, tokens=learned.tokens[:3], steps=20)
        seen["few"] = [decoded(words, ids) for ids, _ in few.epoch(0)]
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    as_rank(rank, 2, ports[1])
    fit.fit(job(folder, "two ranks", "language.epochs=1"))


def decoded(words: Any, ids: torch.Tensor) -> list[str]:
    return [text for row in ids if (text := words.decode(row, skip_special_tokens=True))]


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, list[list[str]]]]:
    mp.spawn(rank_scenario, (folder, [free_port(), free_port()]), nprocs=2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_two_ranks_see_each_text_once_per_epoch_in_equally_many_steps(seen: list[dict[str, list[list[str]]]]) -> None:
    def everything(epoch: str) -> list[str]:
        return [text for rank in seen for batch in rank[epoch] for text in batch]

    held_out = everything("held out")
    assert 0.5 * HELD_OUT < len(held_out) / len(all_texts()) < 2 * HELD_OUT
    for epoch in ("1", "2"):
        assert sorted(held_out + everything(epoch)) == sorted(all_texts())
        assert len(seen[0][epoch]) == len(seen[1][epoch]) == math.ceil(len(everything(epoch)) / 32)
        counts = [sum(map(len, rank[epoch])) for rank in seen]
        assert 0.4 < counts[0] / sum(counts) < 0.6, "though nearly all texts are in one file"
        assert {len(batch) for rank in seen for batch in rank[epoch]} <= set(range(12, 21))
    assert everything("1") != everything("2")


def test_a_rank_without_a_text_left_takes_part(seen: list[dict[str, list[list[str]]]], folder: Path) -> None:
    for rank in seen:
        assert sorted(map(len, rank["few"])) == [0] * 17 + [1] * 3
    assert (folder / "two ranks" / "out" / "model.safetensors").exists()


def test_parts_of_a_batch_have_the_targets_of_their_texts() -> None:
    chosen = torch.rand(7, 5, generator=torch.Generator().manual_seed(1)) < 0.4
    ids = torch.arange(35).view(7, 5)
    whole = MaskedBatch(ids, torch.ones_like(ids), chosen, ids[chosen])
    parts = [whole[rows] for rows in in_parts(7, 3)]
    assert [len(part.ids) for part in parts] == [3, 3, 1]
    assert all(torch.equal(part.targets, part.ids[part.chosen]) for part in parts)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    assert in_parts(0, 3) == [slice(0, 3)]
    assert in_parts(9, None) == [slice(0, 9)]


def test_batches_hold_texts_of_like_length() -> None:
    rng = np.random.default_rng(1)
    tokens = np.empty(600, object)
    tokens[:] = [np.full(length, 9, np.int32) for length in rng.integers(3, 30, 600)]
    batches = list(TokenizedTexts(tokens, 60, 600, padding_id=0, filler_id=4).epoch(1))
    assert sum(attention.numel() for _, attention in batches) < 1.3 * sum(int(a.sum()) for _, a in batches)
    assert all(torch.equal(ids == 0, attention == 0) for ids, attention in batches)
    widths = [ids.shape[1] for ids, _ in batches]
    assert widths != sorted(widths)


def test_no_more_texts_than_allowed_are_read_chosen_by_hash(folder: Path, single_rank: None) -> None:
    words = AutoTokenizer.from_pretrained(folder / "bert")
    with process_group() as group:
        for limit in (100, 300):
            learned, held_out = read_texts(job(folder, "limit", f"language.max_texts={limit}"), words, group)
            assert 0.7 * limit < learned.rows + held_out.rows < 1.3 * limit
            assert 0 < held_out.rows < 0.15 * limit


# --- learning ----------------------------------------------------------------------------------------------------------


def test_two_ranks_adapt_a_model_that_texts_can_be_embedded_with(
    spark: SparkSession, folder: Path, tmp_path: Path
) -> None:
    conf = config(folder, "language.epochs=8", "language.patience=8")
    result = train_masked_lm(
        spark, snapshot(str(folder / "texts")), conf, tmp_path / "run", tmp_path / "models" / "adapted"
    )

    uniform = math.log(len(WORDS))
    assert result.loss_before > 0.9 * uniform
    assert result.loss_after < 0.7 * result.loss_before
    assert [row["epoch"] for row in result.history] == list(range(result.epochs + 1))
    assert result.loss_after == min(row["valid_loss"] for row in result.history)
    assert result.texts + result.held_out == len(all_texts())
    assert list((tmp_path / "run" / TENSORBOARD_FOLDER).iterdir())

    assert {path.suffix for path in result.folder.iterdir()} <= {".safetensors", ".json", ".txt"}
    assert [path.name for path in result.folder.parent.iterdir()] == ["adapted"], "no draft is left"
    assert (
        AutoTokenizer.from_pretrained(result.folder)("red apple")["input_ids"] == tokenizer()("red apple")["input_ids"]
    )
    _, loading = AutoModel.from_pretrained(result.folder, output_loading_info=True)
    assert not any(loading.values()), "every weight of the encoder is there, and no other"

    adapted = conf.texts.model_copy(update={"model": str(result.folder)})
    assert texts.model_digest(adapted) == result.model_digest != texts.model_digest(conf.texts)
    rows = spark.createDataFrame([(1, "red apple fruit"), (2, "steel saw tool")], "text_id bigint, text string")
    embedded = texts.embed(rows, adapted).collect()
    assert {row["model_digest"] for row in embedded} == {result.model_digest}
    np.testing.assert_allclose([np.linalg.norm(row["embedding"]) for row in embedded], 1, rtol=1e-5)


class StoppedError(Exception):
    pass


def adapt_and_stop_after(epochs: int, stopped: MaskedLmTask) -> None:
    """Adapt until the checkpoint of that epoch is written and another epoch is under way, then fail."""
    count, mean_losses = itertools.count(1), fit.mean_losses

    def fail_later(*args: Any) -> list[float]:
        if next(count) > epochs + 1:  # one more before the first epoch
            raise StoppedError
        return mean_losses(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "mean_losses", fail_later)
        with pytest.raises(StoppedError):
            fit.fit(stopped)
    assert not stopped.output.exists()


def test_a_stopped_run_goes_on_where_it_was(folder: Path, single_rank: None) -> None:
    stopped = job(folder, "stopped", "language.epochs=3")
    adapt_and_stop_after(2, stopped)
    epochs: list[int] = []
    train_epoch = fit.train_epoch

    def counted(*args: Any) -> list[float]:
        epochs.append(args[2])
        return train_epoch(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "train_epoch", counted)
        resumed = fit.fit(stopped)
    assert epochs == [3]
    undisturbed_job = job(folder, "undisturbed", "language.epochs=3")
    undisturbed = fit.fit(undisturbed_job)
    assert losses(resumed) == losses(undisturbed)
    found, expected = (load_file(str(one.output / "model.safetensors")) for one in (stopped, undisturbed_job))
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def losses(outcome: FitResult) -> list[float]:
    return [row["valid_loss"] for row in outcome.progress.history]


def test_a_model_that_gets_no_better_stays_as_it_is(folder: Path, single_rank: None) -> None:
    useless = job(folder, "useless", "language.learning_rate=1e-30", "language.epochs=5", "language.patience=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "mean_losses", lambda *args: [3.0])
        progress = fit.fit(useless).progress
    assert (progress.epoch, progress.best_epoch) == (1, 0)
    before, after = (load_file(str(path / "model.safetensors")) for path in (folder / "bert", useless.output))
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, msg=name)


def test_a_loss_that_is_not_finite_is_an_error(folder: Path, single_rank: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "mean_losses", lambda *args: [math.nan])
        with pytest.raises(ConfigError, match=r"language\.learning_rate"):
            fit.fit(job(folder, "wild", "language.epochs=1"))


@pytest.mark.parametrize("writes", ["fsync", "mkdir"])
def test_a_full_disk_names_the_adapted_model_and_leaves_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    adapted = BertModel(bert_config())
    monkeypatch.setattr(os, writes, full)
    with pytest.raises(PlatformError, match=r"out/adapted: can't be written: no space"):
        module._save(adapted, str(folder / "bert"), tmp_path / "out/adapted")
    monkeypatch.undo()
    assert not list(tmp_path.glob("out/*"))


# --- as a stage --------------------------------------------------------------------------------------------------------


def test_the_stage_reads_the_table_of_texts_and_records_what_came_out(
    lakehouse: Lakehouse, settings: Config, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = settings.model_copy(update={"texts": config(folder).texts})
    with pytest.raises(DataError, match="texts: table does not exist; run featurize"):
        pipeline.adapt_language(lakehouse.spark, conf, tmp_path / "out")
    write_texts(Path(lakehouse.location("texts")), all_texts())

    def adapted(spark: SparkSession, found: Snapshot, config: Config, run_dir: Path, output: Path) -> MaskedLmResult:
        assert found.rows == len(all_texts())
        assert run_dir.is_relative_to(tmp_path / "work")
        return MaskedLmResult(output, "digest", 600, 40, 3, 0, 4.0, 4.0, [], 1.0)

    monkeypatch.setattr(module, "train_masked_lm", adapted)
    (stage,) = pipeline.adapt_language(lakehouse.spark, conf, tmp_path / "out")
    assert (stage["stage"], stage["status"], stage["figures"]["held_out"]) == ("adapt language", "done", "40")
    assert "no epoch was better" in stage["figures"]["note"]
    assert lakehouse.read("runs").filter("stage = 'adapt language'").count() == 1


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_without_a_table_of_texts_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be a Delta table"):
        snapshot(str(tmp_path / "texts"))


def test_an_empty_table_or_too_few_texts_are_refused(spark: SparkSession, folder: Path, tmp_path: Path) -> None:
    empty = pa.table({"text_id": pa.array([], pa.int64()), "text": pa.array([], pa.string())})
    write_deltalake(str(tmp_path / "empty"), empty)
    with pytest.raises(DataError, match="must have rows"):
        snapshot(str(tmp_path / "empty"))
    few = snapshot(str(write_texts(tmp_path / "few", all_texts()[:20])))
    with pytest.raises(DataError, match="at least 200 texts"):
        train_masked_lm(spark, few, config(folder), tmp_path / "run", tmp_path / "out")


def test_a_table_without_texts_is_refused(spark: SparkSession, folder: Path, tmp_path: Path) -> None:
    write_deltalake(str(tmp_path / "other"), pa.table({"text_id": pa.array(range(300), pa.int64())}))
    with pytest.raises(DataError, match=r"\.text: must be a column"):
        train_masked_lm(spark, snapshot(str(tmp_path / "other")), config(folder), tmp_path / "run", tmp_path / "out")


def test_an_output_that_is_there_is_left_alone(spark: SparkSession, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        train_masked_lm(spark, snapshot(str(folder / "texts")), config(folder), tmp_path / "run", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_model_that_guesses_no_masked_tokens_is_refused(spark: SparkSession, folder: Path, tmp_path: Path) -> None:
    GPT2Model(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt")
    tokenizer().save_pretrained(tmp_path / "gpt")
    conf = config(folder, f"texts.model={tmp_path}/gpt")
    with pytest.raises(ConfigError, match=r"texts\.model.*masked"):
        train_masked_lm(spark, snapshot(str(folder / "texts")), conf, tmp_path / "run", tmp_path / "out")


def test_ids_of_neighbouring_numbers_are_spread_evenly() -> None:
    hashes = pd.util.hash_array(np.arange(100_000))
    assert abs((hashes / 2.0**64 < HELD_OUT).mean() - HELD_OUT) < 0.005
    assert abs((hashes % np.uint64(3) == 1).mean() - 1 / 3) < 0.01
