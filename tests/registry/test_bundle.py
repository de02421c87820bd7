"""Bundles: written whole or not at all, refused when anything in them differs, scoring as before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xgboost
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bp_spark.core.config import FusionConfig
from bp_spark.core.errors import BundleError, OvertakenError, PlatformError
from bp_spark.model.curve import Curve
from bp_spark.model.horizons import EXPECTED, Horizons, Ratio
from bp_spark.model.members.linear import LinearMember
from bp_spark.model.members.trees import TreesMember
from bp_spark.model.stack import OUTPUTS, CalibratedStack
from bp_spark.registry import bundle as b
from bp_spark.registry import decisions
from bp_spark.registry.manifest import describe_file, encode, seal

HORIZONS = Horizons(
    90, (Ratio(30, EXPECTED, Curve((1.0, 3.0), (0.4, 1 / 3))), Ratio(180, EXPECTED, Curve((2.0,), (1.9,))))
)
INPUTS = {"tabular": ["recency", "monetary"], "history": []}


def columns(n: int = 300) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"recency": rng.exponential(20, n), "monetary": np.exp(rng.normal(3, 1, n))}


@pytest.fixture(scope="module")
def trees() -> TreesMember:
    values = columns()
    matrix = xgboost.DMatrix(
        np.stack(list(values.values()), axis=1), label=values["monetary"], feature_names=list(values)
    )
    return TreesMember(xgboost.train({"objective": "reg:tweedie", "max_depth": 2, "seed": 1}, matrix, 5))


@pytest.fixture(scope="module")
def linear() -> LinearMember:
    return LinearMember(("recency", "monetary"), (2.0, 3.0), (-0.1, 0.9), 0.2, 1.3, 9.0)


@pytest.fixture(scope="module")
def fusion(trees, linear) -> CalibratedStack:
    values = columns()
    frame = pd.DataFrame(
        {"label_spend": values["monetary"], "trees": trees.predict(values), "linear": linear.predict(values)}
    )
    return CalibratedStack.fit(frame, FusionConfig(members=("trees", "linear")))


@pytest.fixture
def write(trees, linear, fusion):
    def written(folder: Path, **changes) -> b.Bundle:
        arguments = {
            "inputs": INPUTS,
            "lineage": {"training_set": {"path": "lakehouse/training_set", "version": 3}, "run_id": "r1"},
            "metrics": {"fused": {"gini": np.float64(0.87), "auc": float("nan")}},
            "horizons": HORIZONS,
        }
        return b.write(folder, [trees, linear], fusion, **(arguments | changes))

    return written


@pytest.fixture(scope="module")
def pristine(trees, linear, fusion, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "good"
    b.write(folder, [trees, linear], fusion, HORIZONS, inputs=INPUTS, lineage={}, metrics={})
    return folder


@pytest.fixture
def copy(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


FILES = ("manifest.json", "trees.json", "linear.json")


def test_a_bundle_comes_back_and_scores_to_the_bit(write, tmp_path, trees, linear, fusion):
    written = write(tmp_path / "one")
    back = b.load(tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(FILES)
    assert back.digest == written.digest
    assert back.manifest == written.manifest
    assert back.stack == fusion
    assert back.horizons == HORIZONS
    assert back.horizon_days == 90
    assert back.required_columns == ("recency", "monetary")
    before, after = written.predict(columns()), back.predict(columns())
    assert tuple(after) == ("member_trees", "member_linear", *OUTPUTS, "expected_by_horizon")
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name])
    np.testing.assert_array_equal(after["member_linear"], linear.predict(columns()))
    assert back.horizons.days == (30, 90, 180)
    by_days = after["expected_by_horizon"]
    np.testing.assert_array_equal(by_days[:, 1], after["expected_spend"])
    np.testing.assert_allclose(by_days[:, 2], 1.9 * by_days[:, 1])


def test_the_manifest_says_where_the_model_comes_from(write, tmp_path):
    write(tmp_path / "one")
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["format"] == 4
    assert manifest["lineage"]["training_set"] == {"path": "lakehouse/training_set", "version": 3}
    assert manifest["metrics"] == {"fused": {"gini": 0.87, "auc": None}}
    assert manifest["members"] == ["trees", "linear"]
    assert manifest["files"]["trees.json"]["bytes"] == (tmp_path / "one" / "trees.json").stat().st_size


def test_the_digest_names_the_model_and_not_the_hour(write, tmp_path, monkeypatch):
    first = write(tmp_path / "one")

    class Later(b.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz).replace(year=2100)

    monkeypatch.setattr(b, "datetime", Later)
    second = write(tmp_path / "two")
    assert first.manifest["created_at"] != second.manifest["created_at"]
    assert first.digest == second.digest
    assert write(tmp_path / "three", horizons=Horizons(30, ())).digest != first.digest


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_refused(copy, name, place, bit):
    path = copy / name
    good = path.read_bytes()
    bad = bytearray(good)
    bad[int(place * len(bad))] ^= 1 << bit
    try:
        path.write_bytes(bad)
        with pytest.raises(BundleError, match=name):
            b.load(copy)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9999])
def test_truncated_files_are_refused(copy, name, keep):
    path = copy / name
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(BundleError, match=name):
        b.load(copy)


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_refused(copy, name):
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name):
        b.load(copy)


@pytest.mark.parametrize("name", ["extra.pkl", ".hidden", "more/"])
def test_unknown_files_are_refused(copy, name):
    (copy / name).mkdir() if name.endswith("/") else (copy / name).write_text("x")
    with pytest.raises(BundleError, match="doesn't belong"):
        b.load(copy)


def test_a_link_in_place_of_a_file_is_refused(copy, pristine):
    (copy / "trees.json").unlink()
    (copy / "trees.json").symlink_to(pristine / "trees.json")
    with pytest.raises(BundleError, match="plain file"):
        b.load(copy)


def test_no_bundle_at_all_is_a_clear_error(tmp_path):
    with pytest.raises(BundleError, match="can't be read"):
        b.load(tmp_path / "nowhere")


def reseal(folder: Path, change) -> None:
    """A manifest changed by someone who knows how it is sealed."""
    document = json.loads((folder / "manifest.json").read_text())
    content = {key: value for key, value in document.items() if key not in ("digest", "checksum")}
    change(content)
    (folder / "manifest.json").write_bytes(encode(seal(content)))


def _tree(document):
    return document["learner"]["gradient_booster"]["model"]["trees"][0]


@pytest.mark.parametrize(
    "harm",
    [
        lambda d: _tree(d)["left_children"].__setitem__(0, 10**6),
        lambda d: _tree(d)["left_children"].__setitem__(0, -7),
        lambda d: _tree(d)["right_children"].__setitem__(0, 0),
        lambda d: _tree(d)["right_children"].__setitem__(1, 0),
        lambda d: _tree(d)["right_children"].__setitem__(0, _tree(d)["left_children"][0]),
        lambda d: _tree(d)["right_children"].__setitem__(0, "x"),
        lambda d: _tree(d)["split_indices"].__setitem__(0, 2),
        lambda d: _tree(d)["split_conditions"].pop(),
        lambda d: _tree(d)["tree_param"].update(num_nodes="1000"),
        lambda d: _tree(d)["split_type"].__setitem__(0, 1),
        lambda d: d["learner"]["learner_model_param"].update(num_feature="9"),
        lambda d: d["learner"]["gradient_booster"]["model"]["trees"].pop(),
        lambda d: d["learner"]["gradient_booster"]["model"]["tree_info"].__setitem__(0, 5),
        lambda d: d["learner"].pop("gradient_booster"),
    ],
)
def test_trees_that_cannot_be_walked_are_refused_even_where_the_seal_is_right(copy, harm):
    document = json.loads((copy / "trees.json").read_text())
    harm(document)
    (copy / "trees.json").write_text(json.dumps(document))
    reseal(copy, lambda m: m["files"].update({"trees.json": describe_file(copy / "trees.json")}))
    with pytest.raises(BundleError, match=r"trees\.json: its trees are none"):
        b.load(copy)


@pytest.mark.parametrize(
    "name", ["../escape.json", "/etc/passwd", "a/b.json", "..", "manifest.json", "manifest.sig", "", "a\nb"]
)
def test_file_names_cannot_leave_the_folder(copy, name):
    reseal(copy, lambda m: m["files"].update({name: m["files"]["trees.json"]}))
    with pytest.raises(BundleError, match="not allowed"):
        b.load(copy)


def test_a_newer_format_is_refused_even_with_unknown_contents(copy):
    (copy / "manifest.json").write_text('{"format": 5, "parts": []}')
    with pytest.raises(BundleError, match="format 5 is newer"):
        b.load(copy)


def test_an_older_format_is_refused_and_says_what_to_do(copy):
    (copy / "manifest.json").write_text('{"format": 3, "members": ["trees"]}')
    with pytest.raises(BundleError, match=r"format 3 is older than .*; train a new bundle"):
        b.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="1"), "not a bundle's manifest"),
        (lambda m: m.update(extra=1), "checksum"),
        (lambda m: m.pop("lineage"), "lineage is missing"),
        (lambda m: m.update(files=[]), "files is missing or no dict"),
        (lambda m: m.update(members=["linear"]), "needs member 'trees'"),
        (lambda m: m.update(members=["trees", "linear", "oracle"]), "unknown member 'oracle'"),
        (lambda m: m.update(inputs={"tabular": "recency"}), "lists of column names"),
        (lambda m: m["fusion"].pop("risk"), "fusion"),
        (lambda m: m.pop("horizons"), "horizons is missing"),
        (lambda m: m["horizons"].pop("main"), "horizons: malformed"),
        (lambda m: m["horizons"]["ratios"][0].update(days=180), "horizons: one is there twice"),
        (lambda m: m["horizons"]["ratios"][0].update(by="oracle"), "horizons: malformed"),
        (lambda m: m["horizons"]["ratios"][0]["curve"].update(x=[3.0, 1.0]), "horizons: malformed"),
    ],
)
def test_a_resealed_manifest_that_makes_no_sense_is_refused(copy, change, message):
    reseal(copy, change)
    with pytest.raises(BundleError, match=message):
        b.load(copy)


def test_the_manifest_must_be_the_bytes_that_were_written(copy):
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(BundleError, match="checksum"):
        b.load(copy)


def test_missing_inputs_are_named(pristine):
    loaded = b.load(pristine)
    loaded.check_inputs(["monetary", "recency", "other"])
    with pytest.raises(BundleError, match=r"missing: recency$"):
        loaded.check_inputs(["monetary"])
    with pytest.raises(BundleError, match="recency"):
        loaded.predict({"monetary": np.ones(2)})


def test_a_failed_write_leaves_nothing(write, tmp_path, trees, fusion, monkeypatch):
    class Broken:
        name = "linear"

        def save(self, folder):
            (folder / "linear.json").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        b.write(tmp_path / "x", [trees, Broken()], fusion, HORIZONS, inputs={}, lineage={}, metrics={})
    assert list(tmp_path.iterdir()) == []


def test_nothing_shows_before_the_rename(write, tmp_path, monkeypatch):
    seen = []
    rename = os.rename

    def watched(source, target):
        seen.append((sorted(os.listdir(source)), Path(target).exists()))
        rename(source, target)

    monkeypatch.setattr(b.os, "rename", watched)
    write(tmp_path / "one")
    assert seen == [(sorted(FILES), False)]


def test_a_bundle_is_never_written_over(write, tmp_path):
    write(tmp_path / "one")
    before = (tmp_path / "one" / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="is there already"):
        write(tmp_path / "one", horizons=Horizons(30, ()))
    assert (tmp_path / "one" / "manifest.json").read_bytes() == before


def test_unfit_members_and_names_are_refused(tmp_path, trees, linear, fusion):
    rest = {"horizons": HORIZONS, "inputs": INPUTS, "lineage": {}, "metrics": {}}
    with pytest.raises(BundleError, match="needs member 'linear'"):
        b.write(tmp_path / "x", [trees], fusion, **rest)
    with pytest.raises(BundleError, match="two members of one name"):
        b.write(tmp_path / "x", [trees, trees], fusion, **rest)
    with pytest.raises(BundleError, match="letters, digits"):
        b.write(tmp_path / ".x", [trees, linear], fusion, **rest)


def test_promotion_points_to_one_bundle_at_any_time(write, tmp_path):
    with pytest.raises(BundleError, match="no bundle is promoted yet"):
        b.current(tmp_path / "bundles")
    first, second = write(tmp_path / "bundles" / "one"), write(tmp_path / "bundles" / "two")
    for bundle in (first, second):
        b.promote(tmp_path / "bundles", bundle)
        assert b.current(tmp_path / "bundles") == bundle.folder
    assert sorted(path.name for path in (tmp_path / "bundles").iterdir()) == [".current.lock", "current", "one", "two"]


def test_of_two_promotions_decided_beside_each_other_the_second_is_refused(write, tmp_path):
    bundles = tmp_path / "bundles"
    first, second = write(bundles / "one"), write(bundles / "two")
    before = b.promoted(bundles)
    b.promote(bundles, first, before)
    with pytest.raises(OvertakenError, match="names one now") as overtaken:
        b.promote(bundles, second, before)
    assert overtaken.value.exit_code == 7
    assert b.current(bundles) == first.folder


PROMOTES = """
import sys, time
from bp_spark.core.errors import OvertakenError
from bp_spark.registry import bundle as b

class Found:
    folder = b.Path(sys.argv[1], sys.argv[2])

synced = b.write_synced

def slowly(path, content):
    # the pointer was looked at, and is not written yet: without a lock, all are here at once
    time.sleep(0.3)
    synced(path, content)

b.write_synced = slowly
before = b.promoted(sys.argv[1])
print("decided", flush=True)
sys.stdin.readline()
try:
    b.promote(sys.argv[1], Found, before)
    print("promoted")
except OvertakenError as error:
    print("refused with code", error.exit_code)
"""


def test_of_promotions_at_the_same_moment_one_wins(tmp_path):
    names = ("one", "two")
    for name in names:
        (tmp_path / name).mkdir()
    trainings = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTES, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    assert [training.stdout.readline() for training in trainings] == ["decided\n"] * len(names)
    for training in trainings:
        training.stdin.write("\n")
        training.stdin.flush()
    outcomes = dict(zip(names, (training.communicate()[0].strip() for training in trainings), strict=True))
    assert sorted(outcomes.values()) == ["promoted", "refused with code 7"]
    assert outcomes[b.promoted(tmp_path).name] == "promoted"


def test_a_full_disk_ends_the_writing_of_a_bundle_with_its_path(tmp_path, trees, fusion):
    class Full:
        name = "linear"

        def save(self, folder):
            Path("/dev/full").write_text("x")

    with pytest.raises(PlatformError, match=r"bundles/x: can't be written: no space left"):
        b.write(tmp_path / "bundles/x", [trees, Full()], fusion, HORIZONS, inputs={}, lineage={}, metrics={})
    assert list((tmp_path / "bundles").iterdir()) == []


def test_where_nothing_is_promoted_the_newest_refusal_says_why(write, tmp_path):
    bundles = tmp_path / "bundles"
    for name, reason in (("one", "below linear"), ("two", "below btyd 0.85")):
        decisions.record(bundles, write(bundles / name), promoted=False, reason=reason)
    (bundles / f"broken{decisions.DECISION}").write_text("{")
    with pytest.raises(
        BundleError, match=r"no bundle is promoted yet; two, the newest, was refused: below btyd 0\.85;"
    ):
        b.current(bundles)
    assert not b.is_any_promoted(bundles)


def test_a_decision_is_recorded_beside_the_bundle_which_stays_as_it_was(write, tmp_path):
    bundle = write(tmp_path / "bundles" / "one")
    path = decisions.record(tmp_path / "bundles", bundle, promoted=True, reason="better than zero")
    decision = json.loads(path.read_text(encoding="utf-8"))
    assert (decision["bundle"], decision["digest"]) == ("one", bundle.digest)
    assert decision["promoted"] is True
    assert decision["reason"] == "better than zero"
    assert b.load(bundle.folder).digest == bundle.digest


def test_bundles_from_elsewhere_are_not_promoted(write, tmp_path):
    with pytest.raises(BundleError, match="must lie in"):
        b.promote(tmp_path / "bundles", write(tmp_path / "one"))


@pytest.mark.parametrize("text", ["", "..", "../one", "gone", "\n"])
def test_a_pointer_to_nothing_is_a_clear_error(write, tmp_path, text):
    write(tmp_path / "bundles" / "one")
    (tmp_path / "bundles" / "current").write_text(text)
    with pytest.raises(BundleError, match="current"):
        b.current(tmp_path / "bundles")


def test_torch_is_not_imported_for_a_bundle_without_a_network(pristine):
    code = f"import sys, bp_spark.registry.bundle as b; b.load({str(pristine)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
