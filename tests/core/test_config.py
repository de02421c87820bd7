"""Settings: what is accepted, what is refused in which words, and that the files in conf/ say what the code does."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from bp_spark.core import config, secret
from bp_spark.core.config import Config, digest
from bp_spark.core.errors import ConfigError
from docs import reference

CONF = Path(__file__).parents[2] / "conf"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        # these are values, if ones of several parts
        section = isinstance(value, dict) and prefix + name not in ("search.space", "topics.phrases")
        found += keys(value, f"{prefix}{name}.") if section else [prefix + name]
    return found


# --- the files in conf/ ------------------------------------------------------------------------------------------------


def test_the_default_file_lists_all_keys_with_the_defaults_of_the_code() -> None:
    listed = yaml.safe_load((CONF / "default.yaml").read_text(encoding="utf-8"))
    assert keys(listed) == keys(Config().model_dump())
    assert config.load(CONF / "default.yaml") == Config()


def test_every_setting_has_exactly_one_description() -> None:
    with_one_description, all_settings = reference.described_settings()
    assert with_one_description == all_settings == len(keys(Config().model_dump()))


def test_every_section_has_a_docstring() -> None:
    assert all(setting.text for setting in reference.settings() if setting.field is None)


class Described(config.Section):
    """Settings with one, two and no descriptions."""

    once: int = Field(1, description="The only one.")
    twice: int = Field(2, description="The first.")
    """The second."""
    never: int = 3


def test_a_missing_and_a_second_description_are_noticed() -> None:
    assert reference.described_settings(Described) == (1, 3)


def test_the_demo_writes_under_its_own_folder_and_adds_only_the_bracket_of_its_data() -> None:
    demo, defaults = config.load(CONF / "demo.yaml"), Config()
    moved = (demo.tables.path, demo.training.work_dir, demo.bundles, demo.evaluation.reports, demo.tracking.artifacts)
    assert all(str(folder).startswith("demo/") for folder in moved)
    assert str(demo.tracking.uri).startswith("sqlite:///demo/")
    assert demo == defaults.model_copy(
        update={
            "tables": defaults.tables.model_copy(update={"path": demo.tables.path}),
            "training": defaults.training.model_copy(update={"work_dir": demo.training.work_dir}),
            "bundles": demo.bundles,
            "tracking": defaults.tracking.model_copy(
                update={"uri": demo.tracking.uri, "artifacts": demo.tracking.artifacts}
            ),
            "evaluation": defaults.evaluation.model_copy(
                update={"reports": demo.evaluation.reports, "external_segment": "income"}
            ),
            "privacy": defaults.privacy.model_copy(update={"secret": "file:demo/secret"}),
        }
    )


# --- what a file and overrides come to ---------------------------------------------------------------------------------


def test_no_file_and_an_empty_file_are_the_defaults(tmp_path: Path) -> None:
    assert config.load() == config.load(written(tmp_path, "# nothing yet\n")) == Config()


def test_a_file_may_hold_any_subset(tmp_path: Path) -> None:
    loaded = config.load(written(tmp_path, "labels:\n  horizon_days: 60\n"))
    assert loaded.labels.horizon_days == 60
    assert loaded.labels.cutoffs == Config().labels.cutoffs
    assert loaded.training == Config().training


def test_an_override_beats_the_file_and_leaves_its_other_keys(tmp_path: Path) -> None:
    path = written(tmp_path, "labels:\n  horizon_days: 45\n  cutoffs: 3\n")
    loaded = config.load(path, ["labels.horizon_days=60"])
    assert (loaded.labels.horizon_days, loaded.labels.cutoffs) == (60, 3)


def test_the_last_of_two_overrides_counts() -> None:
    assert config.load(overrides=["labels.cutoffs=3", "labels.cutoffs=5"]).labels.cutoffs == 5


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("tables.path=null", "tables", "path", None),
        ("tables.path=s3a://bucket/a=b", "tables", "path", "s3a://bucket/a=b"),
        ("tables.namespace=main.bp", "tables", "namespace", "main.bp"),
        (" tables.path =/data", "tables", "path", "/data"),
        ("features.windows=[7, 30]", "features", "windows", (7, 30)),
        ("fusion.members=[linear]", "fusion", "members", ("linear",)),
        # YAML 1.1 reads 1e-3 as text
        ("training.learning_rate=1e-3", "training", "learning_rate", 0.001),
    ],
)
def test_override_values_are_yaml(override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(config.load(overrides=[override]), section), key) == value


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config.load().labels.horizon_days = 1  # type: ignore[misc]


# --- sizes of the network ----------------------------------------------------------------------------------------------


def sizes(of: Config) -> tuple[int, ...]:
    network = of.network
    return network.hidden_size, network.layers, network.heads, network.intermediate_size, network.adapter_size


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tiny", (64, 2, 4, 128, 64)), ("base", (256, 4, 8, 1024, 128)), ("large", (512, 8, 8, 2048, 256))],
)
def test_a_size_stands_for_five_numbers(name: str, expected: tuple[int, ...]) -> None:
    for path in (None, CONF / "default.yaml"):
        assert sizes(config.load(path, [f"network.size={name}"])) == expected


def test_a_number_that_is_given_beats_the_size_wherever_the_two_stand(tmp_path: Path) -> None:
    expected = (256, 3, 8, 1024, 128)
    assert sizes(config.load(overrides=["network.layers=3", "network.size=base"])) == expected
    assert sizes(config.load(written(tmp_path, "network:\n  layers: 3\n"), ["network.size=base"])) == expected
    assert sizes(config.load(written(tmp_path, "network:\n  size: base\n"), ["network.layers=3"])) == expected
    assert sizes(config.load(overrides=["network.size=base", "network.layers=null"])) == (256, 4, 8, 1024, 128)


def test_a_trial_may_change_the_size_or_a_number_and_what_was_given_stays() -> None:
    base = config.load(CONF / "default.yaml", ["network.size=base", "network.layers=3", "labels.cutoffs=5"])
    larger = config.changed(base, {"network.size": "large"})
    assert sizes(larger) == (512, 3, 8, 2048, 256)
    assert larger.labels.cutoffs == 5
    assert sizes(config.changed(base, {"network.hidden_size": 128})) == (128, 3, 8, 1024, 128)
    assert config.changed(base, {"network.text.lora_rank": 4}).network.text.lora_rank == 4
    assert config.changed(base, {}) == base


def test_sizes_survive_a_dump_and_count_in_a_digest() -> None:
    base = config.load(overrides=["network.size=base", "network.layers=3"])
    assert Config.model_validate(base.model_dump(mode="json")) == base
    assert digest(base.network) != digest(config.load(overrides=["network.size=base"]).network)


def test_only_the_events_backbone_is_pretrained() -> None:
    with pytest.raises(ConfigError, match=r"^configuration: .*pretraining\.max_epochs \(3\) must be 0 where .*text"):
        config.load(overrides=["network.backbone=text", "pretraining.max_epochs=3"])
    assert config.load(overrides=["network.backbone=text"]).history_model == Config().texts.model
    assert config.load(overrides=["network.backbone=text", "network.text.model=./gpt2"]).history_model == "./gpt2"


def test_a_wrong_size_is_one_problem() -> None:
    with pytest.raises(ConfigError, match=r"^configuration: network\.size: .*\(got 'huge'\)$"):
        config.load(overrides=["network.size=huge"])


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("scoring.batch_m=7", "scoring.batch_mb"),
        ("label.horizon_days=7", "label"),
        ("bundle=x", "bundles"),
        ("tables.paths=x", "tables.path"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(override: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key .*; did you mean {suggestion}.*\?$"):
        config.load(overrides=[override])


def test_an_unknown_key_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown key qqqq$"):
        config.load(overrides=["qqqq=1"])


def test_an_unknown_key_of_a_file_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "labels:\n  horizon: 30\n")
    with pytest.raises(ConfigError) as refused:
        config.load(path)
    assert str(refused.value) == f"{path}: unknown key labels.horizon; did you mean labels.horizon_days?"


@pytest.mark.parametrize(
    "override",
    [
        "labels.horizon_days=soon",
        "labels.horizon_days=1.5",
        "labels.horizon_days=null",
        "features.windows=7",
        "features.windows=[7, x]",
        "tables.namespace=3",
        "tables=lakehouse",
        "source.kind=oracle",
        "network.pooling=max",
        "fusion.members=[forest]",
        "training.optimizer=adam",
    ],
)
def test_a_wrong_type_or_choice_is_refused_by_name(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^configuration: {key}[.\d]*: .*\(got "):
        config.load(overrides=[override])


@pytest.mark.parametrize(
    "override",
    [
        "labels.horizon_days=0",
        "labels.holdout_fraction=1",
        "labels.folds=1",
        "source.sample=0",
        "source.sample=1.01",
        "fusion.coverage=1",
        "network.dropout=1",
        "training.learning_rate=0",
        "training.processes=0",
        "trees.tweedie_variance_power=2",
        "features.windows=[7, 0]",
        "cleaning.max_amount=-1",
        "cleaning.max_amount=.nan",
        "tables.namespace=a.b.c",
        'tables.namespace="bp; DROP TABLE x"',
        "tracking.uri=work/mlflow.db",
        "tracking.alias=latest",
        "tracking.model=a/b",
    ],
)
def test_a_value_out_of_range_is_refused_by_name_and_value(override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError, match=rf"^configuration: {key}[.\d]*: .*\(got ") as refused:
        config.load(overrides=[override])
    assert refused.value.exit_code == 2
    assert value.strip('[".').split(", ")[-1].rstrip('"]') in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["labels.other_horizons=[30, 90]"], r"other_horizons \(30, 90\) must not hold horizon_days \(90\)"),
        (["labels.horizon_days=30"], r"other_horizons \(30, 180\) must not hold horizon_days \(30\)"),
        (["labels.other_horizons=[30, 30]"], r"other_horizons \(30, 30\) must hold each horizon once"),
        (["labels.other_horizons=[0]"], r"labels\.other_horizons\.0: .*greater than or equal to 1"),
    ],
)
def test_horizons_must_differ(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.load(overrides=overrides)
    assert config.load(overrides=["labels.other_horizons=[]"]).labels.other_horizons == ()


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(overrides=["labels.horizon_days=0", "labels.cutof=2", "training.seed=x"])
    assert len(str(refused.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("labels: [1\n", "not YAML"),
        ("\tlabels:\n", "not YAML"),
        ("- labels\n", "must be a mapping of sections, not a list"),
        ("just words\n", "must be a mapping of sections, not a str"),
        ("labels:\n", "labels: "),
        ("1: 2\n", "1"),
        ("!!python/object/apply:os.system ['true']\n", "not YAML"),
    ],
)
def test_a_file_that_is_no_settings_is_refused_by_its_name(tmp_path: Path, content: str, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ConfigError) as refused:
        config.load(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert message in str(refused.value)


def test_a_file_of_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("bundles: Bündel\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml"):
        config.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: can't be read"):
        config.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("labels.horizon_days", "must be section.key=value"),
        ("", "must be section.key=value"),
        ("bundles.folder=x", "bundles"),
        ("labels.cutoffs=[1", "is not a YAML value"),
        ("=3", "unknown key"),
    ],
)
def test_an_override_of_another_form_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(overrides=[override])


def test_an_override_below_a_value_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bundles is a value, not a section"):
        config.load(written(tmp_path, "bundles: here\n"), ["bundles.folder=x"])


# --- settings that were renamed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), config.RENAMED.items())
def test_a_renamed_setting_exists_by_its_new_name_only_and_stays_in_its_section(old: str, new: str) -> None:
    assert new in config.all_keys()
    assert old not in config.all_keys()
    assert old.rpartition(".")[0] == new.rpartition(".")[0]


@pytest.mark.parametrize(
    ("content", "overrides"),
    [
        ("features:\n  silence_digits: 3\n", []),
        ("", ["features.silence_digits=3"]),
        ("", ["features={silence_digits: 3}"]),
        ("features:\n  silence_digits: 2\n", ["features.silence_digits=3"]),
        ("features:\n  silence_digits: 2\n", ["features.recency_precision_bits=3"]),
        ("features:\n  recency_precision_bits: 2\n", ["features.silence_digits=3"]),
    ],
)
def test_the_old_name_of_a_setting_is_accepted_with_a_warning_that_names_the_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str, overrides: list[str]
) -> None:
    caplog.set_level(logging.WARNING, "bp_spark")
    assert config.load(written(tmp_path, content), overrides).features.recency_precision_bits == 3
    assert "features.silence_digits is now called features.recency_precision_bits" in caplog.text


@pytest.mark.parametrize(
    ("content", "overrides"),
    [
        ("features:\n  silence_digits: 3\n  recency_precision_bits: 3\n", []),
        ("", ["features.silence_digits=3", "features.recency_precision_bits=3"]),
        ("", ["features={silence_digits: 3, recency_precision_bits: 3}"]),
    ],
)
def test_the_old_and_the_new_name_of_a_setting_together_are_refused(
    tmp_path: Path, content: str, overrides: list[str]
) -> None:
    with pytest.raises(
        ConfigError, match=r"silence_digits is the old name of features\.recency_precision_bits: give the"
    ):
        config.load(written(tmp_path, content), overrides)


def test_a_file_with_current_names_brings_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "bp_spark")
    config.load(CONF / "default.yaml", ["features.recency_precision_bits=3"])
    assert not caplog.records


# --- digest and dates --------------------------------------------------------------------------------------------------


def test_a_digest_is_the_same_in_every_process() -> None:
    code = "from bp_spark.core.config import digest; print(digest('events', 3, {'b': 1, 'a': [2.5, None]}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    # pinned: a changed digest makes every platform redo all its stages
    assert other == digest("events", 3, {"a": [2.5, None], "b": 1}) == "98609451c543e02f"


def test_equal_settings_have_equal_digests_and_any_changed_value_another() -> None:
    assert digest(config.load()) == digest(Config())
    changed = ["bundles=x", "labels.cutoffs=9", "features.windows=[7]", "tables.path=null"]
    digests = {digest(config.load(overrides=[override])) for override in changed}
    assert len(digests | {digest(Config())}) == len(changed) + 1


def test_sections_inside_a_digest_count_by_value() -> None:
    assert digest(1, Config().labels) == digest(1, config.load().labels)
    assert digest(1, Config().labels) != digest(1, config.load(overrides=["labels.cutoffs=9"]).labels)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_a_digest_does_not_depend_on_the_order_of_keys(values: dict[str, Any]) -> None:
    assert digest(values) == digest(dict(reversed(values.items())))


@given(JSON, JSON)
def test_parts_are_not_run_together(first: Any, second: Any) -> None:
    assert digest(first, second) != digest([first, second])
    assert digest(first, second) != digest(first)


def test_a_date_is_read_and_anything_else_refused() -> None:
    assert config.parse_date("2017-10-03").isoformat() == "2017-10-03"
    for text in ("2017-02-29", "03.10.2017", "2017-10", "today", ""):
        with pytest.raises(ConfigError, match="must be YYYY-MM-DD"):
            config.parse_date(text)


def test_every_section_refuses_unknown_keys_and_changes() -> None:
    sections = [field.annotation for field in Config.model_fields.values()]
    for section in [Config, *(each for each in sections if isinstance(each, type) and issubclass(each, BaseModel))]:
        assert section.model_config.get("extra") == "forbid"
        assert section.model_config.get("frozen")


HIDDEN = "a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90"


@pytest.mark.parametrize(
    "override",
    [
        HIDDEN,
        f"privacy.secret {HIDDEN}",
        f"privacy.secret:{HIDDEN}",
        f"privacy.secret=@{HIDDEN}",
        f"privacy.secret=[{HIDDEN}]",
        f"privacy={HIDDEN}",
        f"signing={{private_key: {HIDDEN}}}",
        f"signing=[{HIDDEN}]",
        f"tracking.uri=https://user:{HIDDEN}@registry.example",
        f"tracking.uri=https://registry.example/?token={HIDDEN}",
        f"tables.path=s3a://key:{HIDDEN}@bucket/lakehouse",
    ],
)
def test_no_message_shows_a_secret_that_was_given_in_a_wrong_way(override: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(overrides=[override])
    assert HIDDEN not in str(refused.value)


def test_a_file_that_is_no_yaml_is_refused_by_line_without_what_stands_there(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(f"privacy:\n  secret: @{HIDDEN}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"not YAML: .* in line 2, column 11") as refused:
        config.load(tmp_path / "settings.yaml")
    assert HIDDEN not in str(refused.value)


@pytest.mark.parametrize("kind", ["env", "file"])
def test_a_secret_in_the_place_of_its_address_is_not_shown(kind: str) -> None:
    with pytest.raises(ConfigError, match="holds no secret") as refused:
        secret.read("privacy.secret", f"{kind}:{HIDDEN}")
    assert HIDDEN not in str(refused.value)
