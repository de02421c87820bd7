"""The network and its inputs: what a user's prediction depends on, and what it must not depend on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import stats

from bp_spark.core.config import NetworkConfig
from bp_spark.core.errors import BundleError, ConfigError, DataError
from bp_spark.model.history import ENCODER_FILE, HistoryEncoder
from bp_spark.model.inputs import HISTORY_COLUMNS, Batch, InputSpec, collate, empty_user
from bp_spark.model.losses import band_loss, log_mse_loss, tweedie_loss, ziln_loss
from bp_spark.model.members.base import predict_all
from bp_spark.model.members.transformer import TransformerMember
from bp_spark.model.network import (
    DESCRIPTION_FILE,
    WEIGHTS_FILE,
    SpendNetwork,
)
from tests.support.networks import TINY, make_network
from tests.support.training_rows import SPEC, TEXT_IDS, arrays, make_rows, take


@st.composite
def histories(draw: st.DrawFn) -> list[list[dict[str, float]]]:
    event = st.fixed_dictionaries(
        {
            "seq_kind": st.integers(0, 12),
            "seq_age_days": st.floats(2**-7, 500, width=32),
            "seq_amount": st.floats(-1e4, 1e4, width=32),
            "seq_items": st.integers(0, 50).map(float),
            "seq_discount": st.floats(0, 100, width=32),
            "seq_text_id": st.sampled_from([0, 17, *TEXT_IDS.tolist()]),
            "seq_weekday": st.integers(1, 7),
            "seq_hour": st.integers(0, 23),
        }
    )
    user = st.lists(event, max_size=5).map(lambda events: sorted(events, key=lambda e: -e["seq_age_days"]))
    return draw(st.lists(user, min_size=1, max_size=6))


def signed_log(value: float) -> float:
    return math.copysign(math.log1p(abs(value)), value)


def naive_tokens(events: list[dict[str, float]], limit: int) -> list[tuple[int, int, int, int, list[float]]]:
    tokens = []
    events = events[-limit:]
    for index, event in enumerate(events):
        amount, discount, age = event["seq_amount"], event["seq_discount"], event["seq_age_days"]
        gap = events[index - 1]["seq_age_days"] - age if index else 0.0
        share = discount / (abs(amount) + discount) if abs(amount) + discount > 0 else 0.0
        text, vocabulary = int(event["seq_text_id"]), TEXT_IDS.tolist()
        tokens.append(
            (
                int(event["seq_kind"]) if event["seq_kind"] <= 8 else 0,
                vocabulary.index(text) + 1 if text in vocabulary else 0,
                int(event["seq_weekday"]),
                int(event["seq_hour"]),
                [signed_log(amount), signed_log(event["seq_items"]), share, signed_log(gap), signed_log(age)],
            )
        )
    return tokens


@settings(max_examples=60, deadline=None)
@given(users=histories(), limit=st.integers(1, 6))
def test_collate_equals_a_reading_row_by_row(users: list[list[dict[str, float]]], limit: int) -> None:
    columns = {
        name: arrays(
            [
                np.array(
                    [event[name] for event in user],
                    np.int64 if name == "seq_text_id" else np.int32 if name in INTEGERS else np.float32,
                )
                for user in users
            ]
        )
        for name in HISTORY_COLUMNS
    }
    money = np.arange(len(users), dtype=float) * 10 - 20
    columns |= {"recency": np.where(money > 0, np.nan, money), "spend_90d": money}
    for name in HISTORY_COLUMNS:
        for array in columns[name]:
            array.flags.writeable = False
    batch = collate(columns, InputSpec(SPEC.tabular, SPEC.log_scaled, limit), TEXT_IDS)

    assert batch.mask.shape == (len(users), max(min(len(user), limit) for user in users))
    for row, user in enumerate(users):
        tokens = naive_tokens(user, limit)
        assert batch.mask[row].tolist() == [place < len(tokens) for place in range(batch.mask.shape[1])]
        for place in range(batch.mask.shape[1]):
            token = tokens[place] if place < len(tokens) else (0, 0, 0, 0, [0.0] * 5)
            codes = [field[row, place].item() for field in (batch.kind, batch.text, batch.weekday, batch.hour)]
            assert codes == list(token[:4])
            assert batch.numeric[row, place].tolist() == pytest.approx(token[4], rel=1e-4, abs=1e-5)
        recency, spend = batch.tabular[row].tolist()
        assert math.isnan(recency) if money[row] > 0 else recency == money[row]
        assert spend == pytest.approx(signed_log(money[row]), rel=1e-5)


INTEGERS = ("seq_kind", "seq_weekday", "seq_hour")


def test_infinite_features_count_as_missing() -> None:
    columns = make_rows(3) | {"recency": np.array([np.inf, -np.inf, 1.0])}
    assert collate(columns, SPEC, TEXT_IDS).tabular[:, 0].isnan().tolist() == [True, True, False]


def test_a_missing_column_and_unequal_arrays_are_refused() -> None:
    rows = make_rows(5)
    with pytest.raises(DataError, match="seq_hour"):
        collate({name: values for name, values in rows.items() if name != "seq_hour"}, SPEC, TEXT_IDS)
    with pytest.raises(DataError, match="seq_items: must be parallel"):
        collate(rows | {"seq_items": arrays([np.ones(99, np.float32)] * 5)}, SPEC, TEXT_IDS)


def test_the_description_of_inputs_survives_json() -> None:
    assert InputSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC


VARIANTS = [
    {},
    {"pooling": "mean", "loss": "mse"},
    {"loss": "tweedie", "bands_weight": 0.5, "bands": 4},
    {"bands_weight": 0.5},
]


@pytest.mark.parametrize("config", [TINY.model_copy(update=variant) for variant in VARIANTS])
def test_a_prediction_does_not_depend_on_who_shares_the_batch(config: NetworkConfig) -> None:
    network, rows = make_network(config), make_rows(40)
    together = network.expected_spend(collate(rows, SPEC, TEXT_IDS))
    alone = torch.cat([network.expected_spend(collate(take(rows, [n]), SPEC, TEXT_IDS)) for n in range(40)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert together.std() > 0


def test_padding_does_not_reach_the_outputs() -> None:
    network, batch = make_network(), collate(make_rows(10), SPEC, TEXT_IDS)
    garbage = torch.where(batch.mask.unsqueeze(-1), batch.numeric, torch.tensor(1e3))
    kind = torch.where(batch.mask, batch.kind, 5)
    dirty = Batch(batch.tabular, kind, batch.text, batch.weekday, batch.hour, garbage, batch.mask)
    torch.testing.assert_close(network(dirty), network(batch), rtol=1e-5, atol=1e-5)


def test_users_without_events_or_features_get_a_prediction() -> None:
    network = make_network()
    for users in (1, 3):
        columns = {name: np.concatenate([values] * users) for name, values in empty_user(SPEC).items()}
        batch = collate(columns, SPEC, TEXT_IDS)
        assert batch.mask.shape == (users, 0)
        assert network.expected_spend(batch).isfinite().all()
    network.loss(network(batch), torch.zeros(3)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_a_value_missing_for_the_first_time_reads_as_the_mean() -> None:
    rows = make_rows(6)
    mean = rows | {"recency": np.full(6, 2.0)}
    missing = rows | {"recency": np.full(6, np.nan)}
    never_missing, often_missing = make_network(missing=0.0), make_network(missing=0.3)
    for network, equal in ((never_missing, True), (often_missing, False)):
        a, b = (network.expected_spend(collate(columns, SPEC, TEXT_IDS)) for columns in (mean, missing))
        assert torch.allclose(a, b) is equal


def test_extreme_features_do_not_explode() -> None:
    rows = make_rows(6) | {"recency": np.full(6, 1e30), "spend_90d": np.full(6, -1e30)}
    spend = make_network().expected_spend(collate(rows, SPEC, TEXT_IDS))
    assert spend.isfinite().all()
    assert (spend <= 501).all()
    assert (spend >= 0).all()


@pytest.mark.parametrize("loss", ["ziln", "tweedie", "mse"])
def test_no_prediction_exceeds_the_largest_label(loss: str) -> None:
    network = make_network(TINY.model_copy(update={"loss": loss}))
    outputs = torch.full((2, 3 if loss == "ziln" else 1), 80.0)
    assert network.to_money(outputs).tolist() == pytest.approx([500 if loss == "mse" else 501] * 2, rel=1e-3)
    assert network.to_money(-outputs).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_ziln_loss_is_the_negative_log_likelihood() -> None:
    rng = np.random.default_rng(0)
    logit, mu, raw = rng.normal(size=(3, 50))
    labels = np.where(rng.random(50) < 0.4, 0.0, np.exp(rng.normal(2, 1, 50)))
    p, sigma = 1 / (1 + np.exp(-logit)), np.log1p(np.exp(raw)) + 1e-3
    buyers = np.log(p) + stats.lognorm(s=sigma, scale=np.exp(mu)).logpdf(np.where(labels > 0, labels, 1.0))
    # The loss is of log spend: a density over spend differs by the constant log(spend).
    expected = -np.where(labels > 0, buyers, np.log1p(-p))
    outputs = torch.tensor(np.stack([logit, mu, raw], axis=1), requires_grad=True)
    loss = ziln_loss(outputs, torch.tensor(labels))
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-4)
    loss.sum().backward()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()


@pytest.mark.parametrize("power", [1.1, 1.5, 1.9])
def test_tweedie_loss_is_half_the_unit_deviance_but_for_a_constant(power: float) -> None:
    rng = np.random.default_rng(0)
    log_mean = rng.normal(size=50)
    labels = np.where(rng.random(50) < 0.3, 0.0, rng.gamma(2, 1, 50))
    mean, low, high = np.exp(log_mean), 1 - power, 2 - power
    deviance = 2 * (labels**high / (low * high) - labels * mean**low / low + mean**high / high)
    outputs = torch.tensor(log_mean, requires_grad=True)
    loss = tweedie_loss(outputs, torch.tensor(labels), power)
    np.testing.assert_allclose(loss.detach().numpy(), deviance / 2 - labels**high / (low * high), rtol=1e-4)
    loss.sum().backward()
    assert outputs.grad is not None
    # the derivative by the log of the mean: (mean - label) * mean^(1 - power)
    np.testing.assert_allclose(outputs.grad.numpy(), (mean - labels) * mean**low, rtol=1e-4, atol=1e-5)


def test_tweedie_starts_at_the_mean_label_and_does_not_depend_on_the_currency() -> None:
    network = make_network(TINY.model_copy(update={"loss": "tweedie"}))
    outputs, labels = torch.tensor([[0.0], [1.0]]), torch.tensor([40.0, 400.0])
    assert network.to_money(outputs).tolist() == pytest.approx([40, 40 * math.e])
    before = network.loss(outputs, labels)
    network.head.label_scale *= 7
    torch.testing.assert_close(network.loss(outputs, 7 * labels), before)


def test_band_loss_is_the_cross_entropy_of_the_band() -> None:
    edges, labels = torch.tensor([0.0, 10.0, 100.0]), torch.tensor([-3.0, 0.0, 0.5, 10.0, 10.5, 1e6])
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    expected = [-logits[row].log_softmax(0)[band].item() for row, band in enumerate([0, 0, 1, 1, 2, 3])]
    assert band_loss(logits, labels, edges).tolist() == pytest.approx(expected, rel=1e-5)


def test_bands_weigh_in_training_and_not_in_what_is_told() -> None:
    config = TINY.model_copy(update={"bands_weight": 0.5, "bands": 4})
    network, batch, labels = make_network(config), collate(make_rows(8), SPEC, TEXT_IDS), torch.linspace(0, 200, 8)
    outputs = network(batch)
    assert outputs.shape == (8, 3 + 4)
    expected = ziln_loss(outputs[:, :3], labels)
    torch.testing.assert_close(network.loss(outputs, labels), expected)
    bands = band_loss(outputs[:, 3:], labels, network.band_edges)
    trained = network.training_losses(outputs, labels.unsqueeze(1))
    torch.testing.assert_close(trained, (expected + 0.5 * bands).unsqueeze(1))
    plain = make_network()
    assert plain(batch).shape == (8, 3)
    trained = plain.training_losses(plain(batch), labels.unsqueeze(1))
    torch.testing.assert_close(trained.squeeze(1), plain.loss(plain(batch), labels))


@pytest.mark.parametrize("loss", ["ziln", "tweedie", "mse"])
def test_a_row_learns_from_the_horizons_that_it_has_seen_and_from_no_other(loss: str) -> None:
    config = TINY.model_copy(update={"loss": loss, "bands_weight": 0.5, "bands": 4, "horizons_weight": 0.25})
    network, batch = make_network(config, others=(30, 180)), collate(make_rows(6), SPEC, TEXT_IDS)
    main = torch.linspace(0, 200, 6)
    unseen = torch.full((6,), math.nan)
    half = torch.where(torch.arange(6) < 3, 2 * main, math.nan)
    outputs = network(batch)
    losses = network.training_losses(outputs, torch.stack([main, unseen, half], dim=1))
    plain = make_network(config)
    torch.testing.assert_close(losses[:, :1], plain.training_losses(plain(batch), main.unsqueeze(1)))
    of_half = outputs[:, 2 * plain.head.out_features : 3 * plain.head.out_features]
    assert losses[:, 1].tolist() == [0.0] * 6
    torch.testing.assert_close(losses[:3, 2], 0.25 * network.heads[2].loss(of_half[:3], half[:3]))
    assert losses[3:, 2].tolist() == [0.0] * 3

    losses.sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    # DDP waits for each parameter that the loss doesn't reach
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert not gradients["other_heads.0.weight"].any()
    assert gradients["other_heads.1.weight"].any()


def test_each_horizon_starts_at_its_own_labels_and_is_told_beside_the_main_one() -> None:
    config, rows = TINY.model_copy(update={"loss": "tweedie"}), make_rows(20)
    network = make_network(config, others=(30, 180))
    for head in network.heads:
        torch.nn.init.zeros_(head.weight)
    predictions = predict_all([TransformerMember(network, batch_events=40)], rows)
    assert {name: values.tolist() for name, values in predictions.items()} == {
        "transformer": pytest.approx([40.0] * 20),
        "transformer_30d": pytest.approx([40 / 3] * 20),
        "transformer_180d": pytest.approx([80.0] * 20),
    }


def test_other_horizons_leave_the_start_of_the_main_one_alone_and_weigh_nothing_without_a_weight() -> None:
    rows, batch = make_rows(10), collate(make_rows(10), SPEC, TEXT_IDS)
    several, plain = make_network(others=(30, 180)), make_network()
    np.testing.assert_array_equal(TransformerMember(several).predict(rows), TransformerMember(plain).predict(rows))
    without = make_network(TINY.model_copy(update={"horizons_weight": 0.0}), others=(30, 180))
    assert without(batch).shape == plain(batch).shape
    assert list(predict_all([TransformerMember(without)], rows)) == ["transformer"]


def test_expected_spend_is_the_mean_of_the_distribution() -> None:
    network = make_network(max_label=1e9)
    outputs = torch.tensor([[0.3, 2.0, 0.5], [-2.0, 4.0, -1.0]])
    for row, spend in zip(outputs.double().numpy(), network.to_money(outputs).tolist(), strict=True):
        p, sigma = 1 / (1 + math.exp(-row[0])), math.log1p(math.exp(row[2])) + 1e-3
        assert spend == pytest.approx(p * stats.lognorm(s=sigma, scale=math.exp(row[1])).mean(), rel=1e-4)


def test_log_mse_loss_reads_refunds_as_no_spend() -> None:
    loss = log_mse_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([-5.0, math.e - 1]))
    assert loss.tolist() == pytest.approx([1.0, 1.0])


def test_the_member_tells_who_will_buy_if_its_loss_knows() -> None:
    member, rows = TransformerMember(make_network(), batch_events=40), make_rows(20)
    p_active = member.p_active(rows)
    assert p_active is not None
    logit = member.network(collate(rows, SPEC, TEXT_IDS))[:, 0]
    np.testing.assert_allclose(p_active, 1 / (1 + np.exp(-logit.detach().numpy())), rtol=1e-4)
    assert TransformerMember(make_network(TINY.model_copy(update={"loss": "tweedie"}))).p_active(rows) is None


def test_a_saved_network_predicts_the_same(tmp_path: Path) -> None:
    member, rows = TransformerMember(make_network(others=(30, 180))), make_rows(30)
    member.save(tmp_path)
    loaded = TransformerMember.load(tmp_path)
    # the loaded one looks up what the other makes of a text each time
    np.testing.assert_allclose(loaded.predict(rows), member.predict(rows), rtol=1e-5)
    predictions = member.predict_horizons(rows)
    assert list(predictions) == ["transformer", "transformer_30d", "transformer_180d"]
    for name, values in loaded.predict_horizons(rows).items():
        np.testing.assert_allclose(values, predictions[name], rtol=1e-5)
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json"}
    assert json.loads((tmp_path / DESCRIPTION_FILE).read_text())["parameters"] == member.network.parameter_count
    again = tmp_path / "again"
    loaded.save(again)
    np.testing.assert_array_equal(TransformerMember.load(again).predict(rows), loaded.predict(rows))


def test_users_come_back_in_the_order_they_came_in() -> None:
    member, rows = TransformerMember(make_network(), batch_events=40), make_rows(40)
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_allclose(member.predict(take(rows, order)), member.predict(rows)[order], rtol=1e-4)
    assert member.predict(rows).dtype == np.float64
    assert len(member.predict(take(rows, slice(0)))) == 0


def _truncate(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(str(folder / WEIGHTS_FILE))
    del tensors["head.bias"]
    save_file(tensors, str(folder / WEIGHTS_FILE))


def _foreign_sizes(folder: Path) -> None:
    path = folder / DESCRIPTION_FILE
    description = json.loads(path.read_text())
    description["network"]["hidden_size"] = 32
    path.write_text(json.dumps(description))


def _fewer_texts(folder: Path) -> None:
    path = folder / DESCRIPTION_FILE
    path.write_text(path.read_text().replace('"vocabulary": 5', '"vocabulary": 4'))


def _newer_format(folder: Path) -> None:
    path = folder / DESCRIPTION_FILE
    path.write_text(path.read_text().replace('"format": 4', '"format": 5'))


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _drop_tensor,
        _foreign_sizes,
        _fewer_texts,
        _newer_format,
        lambda folder: (folder / DESCRIPTION_FILE).write_text("{"),
        lambda folder: (folder / WEIGHTS_FILE).unlink(),
        lambda folder: (folder / DESCRIPTION_FILE).unlink(),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    make_network().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(BundleError, match=r"transformer\."):
        SpendNetwork.load(tmp_path)


def test_a_bundle_from_before_projections_were_kept_predicts_the_same(tmp_path: Path) -> None:
    network, rows = make_network(), make_rows(12)
    network.save(tmp_path)
    tensors = load_file(str(tmp_path / WEIGHTS_FILE))
    kept = {name: tensor for name, tensor in tensors.items() if "projection" not in name}
    assert len(tensors) - len(kept) == 4
    save_file(kept, str(tmp_path / WEIGHTS_FILE))
    path = tmp_path / DESCRIPTION_FILE
    path.write_text(path.read_text().replace('"format": 4', '"format": 3'))
    old = SpendNetwork.load(tmp_path)
    np.testing.assert_allclose(
        TransformerMember(old).predict(rows), TransformerMember(network).predict(rows), rtol=1e-5
    )
    old.save(tmp_path / "again")
    np.testing.assert_array_equal(
        TransformerMember.load(tmp_path / "again").predict(rows), TransformerMember(old).predict(rows)
    )


def test_an_encoder_goes_from_a_bundle_into_a_training_with_or_without_its_projection(tmp_path: Path) -> None:
    network = make_network()
    network.save(tmp_path / "bundle")
    SpendNetwork.load(tmp_path / "bundle").save(tmp_path / "again")
    member = TransformerMember.load(tmp_path / "again")
    history = member.network.history
    assert isinstance(history, HistoryEncoder)
    for with_projection in (True, False):
        torch.manual_seed(1)
        started = make_network().history
        assert isinstance(started, HistoryEncoder)
        before = {name: tensor.clone() for name, tensor in started.state_dict().items()}
        history.save(tmp_path / "encoder", with_projection=with_projection)
        started.restore(tmp_path / "encoder")
        for name, tensor in started.state_dict().items():
            is_taken = with_projection or not name.startswith("text.")
            torch.testing.assert_close(tensor, network.history.state_dict()[name] if is_taken else before[name])
    history.save(tmp_path / "encoder")
    whole = load_file(str(tmp_path / "encoder" / ENCODER_FILE))
    for lost in ("text.0.weight", "text.1.bias"):
        save_file(
            {name: tensor for name, tensor in whole.items() if name != lost}, str(tmp_path / "encoder" / ENCODER_FILE)
        )
        with pytest.raises(BundleError, match="don't fit the configured network"):
            make_network().history.restore(tmp_path / "encoder")
    # of a platform that has texts, for one that has none
    history.save(tmp_path / "encoder")
    wordless = HistoryEncoder(TINY, SPEC.history_length, torch.zeros(0, 1))
    wordless.restore(tmp_path / "encoder")
    torch.testing.assert_close(wordless.kind.weight, network.history.kind.weight)


def test_sizes_that_do_not_fit_are_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="network"):
        make_network(TINY.model_copy(update={"heads": 3}))
