"""Histories read as text: what is written, what is cut off, what is trained, and that a bundle needs no other folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config

from bp_spark.core.config import HistoryTextConfig, NetworkConfig
from bp_spark.core.errors import BundleError, ConfigError
from bp_spark.lakehouse.tables import KINDS
from bp_spark.model.inputs import Batch, collate
from bp_spark.model.members.transformer import TransformerMember
from bp_spark.model.network import DESCRIPTION_FILE, WEIGHTS_FILE, SpendNetwork
from bp_spark.model.text_history import AGES, AMOUNTS, TextHistoryEncoder, TokenTable, adapted, tokenise
from tests.support.training_rows import SPEC, TEXT_IDS, TEXTS, make_rows, take, write_language_model

CAP = 64
TINY = NetworkConfig(
    backbone="text",
    hidden_size=8,
    adapter_size=8,
    heads=1,
    text=HistoryTextConfig(max_tokens=CAP, lora_rank=2),
)


@pytest.fixture(scope="module", params=["bert", "gpt2", "qwen"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp(request.param) / "model", request.param)


def table(folder: Path) -> TokenTable:
    return tokenise(TEXTS, str(folder), 8, CAP)


def network(folder: Path, config: NetworkConfig = TINY) -> SpendNetwork:
    torch.manual_seed(0)
    history = TextHistoryEncoder(config, adapted(str(folder), config), table(folder))
    return SpendNetwork(SPEC, config, torch.from_numpy(TEXT_IDS), history).eval()


def batch(rows: dict[str, np.ndarray]) -> Batch:
    return collate(rows, SPEC, TEXT_IDS)


def sentences(rows: dict[str, np.ndarray], user: int) -> list[list[str]]:
    """Events of a user in words, each part of an event by itself, written one by one."""
    texts_by_id = dict(zip(TEXT_IDS.tolist(), TEXTS, strict=True))
    written = []
    for kind, amount, age, text in zip(
        *(rows[name][user] for name in ("seq_kind", "seq_amount", "seq_age_days", "seq_text_id")), strict=True
    ):
        price = next((str(edge) for edge in AMOUNTS if amount <= edge), "1000000")
        when = next((word for word, days in AGES.items() if age <= days), "years")
        worth = "" if amount == 0 else "refund" if amount < 0 else price
        written.append([KINDS[kind - 1], worth, when, texts_by_id.get(int(text), "")])
    return written


def test_histories_are_written_like_event_by_event_and_the_newest_are_kept(folder: Path) -> None:
    rows = make_rows(60)
    rng = np.random.default_rng(2)
    for user, events in enumerate(rows["seq_kind"]):
        amounts = rng.choice([*AMOUNTS, -3.0, 0.0, 0.4, 7.0, 1e7], len(events))
        rows["seq_amount"][user] = amounts.astype(np.float32)
        ages = np.sort(rng.choice([*AGES.values(), 0.1, 8.0, 400.0], len(events)))[::-1]
        rows["seq_age_days"][user] = ages.astype(np.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, seen = network(folder).history.tokens_of(batch(rows))
    assert ids.shape[1] <= CAP
    assert (seen[:, 1:] <= seen[:, :-1]).all()
    start, end = ([2], [3]) if tokenizer.cls_token else ([0], [])
    cut = 0
    for user in range(60):
        expected: list[int] = []
        for parts in reversed(sentences(rows, user)):
            *words, text = (
                tokenizer(f" {part}" if part else "", add_special_tokens=False)["input_ids"] for part in parts
            )
            event = [token for word in (*words, text[:8]) for token in word]
            if len(start + event + expected + end) > CAP:
                cut += 1
                break
            expected = event + expected
        assert ids[user][seen[user]].tolist() == start + expected + end
    assert 0 < cut < 60


def test_the_newest_event_is_read_however_little_room_there_is(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"network\.text\.max_tokens: must be at least \d+, for one event") as refused:
        network(folder, TINY.model_copy(update={"text": HistoryTextConfig(max_tokens=8)}))
    least = int(str(refused.value).split("least ")[1].split(",")[0])
    tight = network(folder, TINY.model_copy(update={"text": HistoryTextConfig(max_tokens=least)}))
    rows = make_rows(40)
    _, seen = tight.history.tokens_of(batch(rows))
    without_events = int(seen.sum(dim=1).min())
    assert (seen.sum(dim=1) > without_events).tolist() == [len(kinds) > 0 for kinds in rows["seq_kind"]]
    assert seen.shape[1] <= least


def test_a_prediction_does_not_depend_on_who_shares_the_batch(folder: Path) -> None:
    for pooling in ("attention", "mean"):
        net, rows = network(folder, TINY.model_copy(update={"pooling": pooling})), make_rows(30)
        together = net(batch(rows))
        assert together.shape == (30, 1)
        alone = torch.cat([net(batch(take(rows, [user]))) for user in range(30)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        assert together.std() > 0


def test_an_event_matters_and_padding_does_not(folder: Path) -> None:
    net, users = network(folder), batch(make_rows(10))
    read = net.history(users)
    assert read.shape == (10, TINY.hidden_size)
    other = replace(users, kind=torch.where(users.mask, users.kind, 5), text=torch.where(users.mask, users.text, 1))
    torch.testing.assert_close(net.history(other), read)
    changed = replace(users, kind=torch.where(users.mask, users.kind % 8 + 1, 0))
    has_events = users.mask.any(dim=1)
    assert ((net.history(changed) - read).abs().amax(dim=1) > 1e-4).tolist() == has_events.tolist()


def test_only_low_rank_changes_and_the_layers_on_top_are_trained(folder: Path) -> None:
    net = network(folder).train()
    net.training_losses(net(batch(make_rows(8))), torch.linspace(0, 200, 8).unsqueeze(1)).sum().backward()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    language = {name: p for name, p in net.named_parameters() if name.startswith("history.language.")}
    assert {name for name in language if name in trained} == {name for name in language if ".lora_" in name}
    matrices = [p for n, p in language.items() if n.endswith("base_layer.weight")]
    assert (
        len(matrices)
        == {"bert": 2 * 6, "gpt2": 2 * 4, "qwen3": 2 * 7}[net.history.bundle_description()["language"]["model_type"]]
    )
    changes = sum(p.numel() for name, p in trained.items() if name in language)
    assert changes == sum(2 * sum(p.shape) for p in matrices)
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    assert net.parameter_count == frozen + sum(p.numel() for p in trained.values())
    assert frozen > 2 * changes
    state = net.state_dict()
    assert set(trained) <= set(state)
    assert not {name for name in language if name not in trained} & set(state)


def test_activations_that_are_computed_again_give_the_same_gradients(folder: Path) -> None:
    gradients = []
    for recompute in (False, True):
        text = TINY.text.model_copy(update={"recompute": recompute, "lora_dropout": 0.0})
        net = network(folder, TINY.model_copy(update={"text": text, "dropout": 0.0})).train()
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        calls: list[object] = []
        layer = next(module for name, module in net.named_modules() if name.endswith(".base_layer"))
        layer.register_forward_hook(lambda module, *_, calls=calls: calls.append(module))
        net.training_losses(net(batch(make_rows(8))), torch.linspace(0, 200, 8).unsqueeze(1)).sum().backward()
        assert len(calls) == (2 if recompute else 1)
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_a_few_steps_lower_the_loss_and_leave_the_frozen_weights(folder: Path) -> None:
    net, rows = network(folder).train(), make_rows(64)
    users, labels = batch(rows), torch.from_numpy(rows["label_spend"]).float()
    net.head.label_scale.fill_(float(labels.mean()))
    before = {name: p.detach().clone() for name, p in net.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = net.training_losses(net(users), labels.unsqueeze(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters() if name in before)


def trained(folder: Path) -> SpendNetwork:
    """A network whose low-rank changes are not what they start as, which is nothing."""
    net = network(folder)
    for name, parameter in net.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    return net


def test_a_saved_network_predicts_the_same_without_the_folder_of_its_language_model(
    folder: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(folder, tmp_path / "model")
    member, rows = TransformerMember(trained(copied)), make_rows(30)
    expected = member.predict(rows)
    assert np.abs(expected - TransformerMember(network(copied)).predict(rows)).max() > 0.1
    member.save(tmp_path / "saved")
    shutil.rmtree(copied)
    loaded = TransformerMember.load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.predict(rows), expected, rtol=1e-3)
    assert not [name for name, _ in loaded.network.named_parameters() if "lora" in name]
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [DESCRIPTION_FILE, WEIGHTS_FILE]
    assert str(tmp_path) not in (tmp_path / "saved" / DESCRIPTION_FILE).read_text()

    loaded.save(tmp_path / "again")
    again = TransformerMember.load(tmp_path / "again")
    np.testing.assert_array_equal(again.predict(rows), loaded.predict(rows))
    first, second = (load_file(str(tmp_path / name / WEIGHTS_FILE)) for name in ("saved", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_goes_back_into_a_network_with_the_frozen_weights(folder: Path) -> None:
    net, other = trained(folder), network(folder)
    other.load_state_dict(net.state_dict())
    users = batch(make_rows(8))
    torch.testing.assert_close(other(users), net(users))
    incomplete = {
        name: tensor for name, tensor in net.state_dict().items() if not name.endswith("lora_B.default.weight")
    }
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_B"):
        other.load_state_dict(incomplete)


@pytest.mark.parametrize("what", ["token_lengths", "tokens", "language.", "history.project.0.weight", "description"])
def test_a_damaged_folder_is_refused(folder: Path, tmp_path: Path, what: str) -> None:
    network(folder).save(tmp_path)
    if what == "description":
        path = tmp_path / DESCRIPTION_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | {"language": {"model_type": "nothing"}}))
    else:
        tensors = load_file(str(tmp_path / WEIGHTS_FILE))
        del tensors[next(name for name in tensors if name.startswith(what))]
        save_file(tensors, str(tmp_path / WEIGHTS_FILE))
    with pytest.raises(BundleError, match=r"transformer\.safetensors"):
        SpendNetwork.load(tmp_path)


def test_what_cannot_read_histories_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"network\.text\.max_tokens: 97 is more than the 96 tokens"):
        tokenise(TEXTS, str(folder), 8, 97)
    with pytest.raises(ConfigError, match=r"network\.text\.model: .*nowhere is no language model"):
        tokenise(TEXTS, str(tmp_path / "nowhere"), 8, CAP)
    T5Config().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="an encoder and a decoder"):
        tokenise(TEXTS, str(tmp_path), 8, CAP)
