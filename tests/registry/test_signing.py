"""A bundle that another key signed, or none, is not loaded where a public key is set; keys stay out of sight."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bp_spark.core import config
from bp_spark.core.config import FusionConfig, SigningConfig
from bp_spark.core.errors import BundleError, ConfigError
from bp_spark.model.horizons import Horizons
from bp_spark.model.members.linear import LinearMember
from bp_spark.model.stack import CalibratedStack
from bp_spark.registry import bundle as bundles
from bp_spark.registry import signing
from tests.support.signing_keys import new_keys

SAID = {"linear": [1.0, 2.0, 4.0] * 40, "label_spend": [0.0, 2.0, 5.0] * 40}


@pytest.fixture
def keys(tmp_path: Path) -> SigningConfig:
    return new_keys(tmp_path / "keys")


def write(folder: Path, keys: SigningConfig) -> Path:
    import pandas as pd

    member = LinearMember(("recency", "monetary"), (2.0, 3.0), (-0.1, 0.9), 0.2, 1.3, 9.0)
    fusion = CalibratedStack.fit(pd.DataFrame(SAID), FusionConfig(members=("linear",)))
    rest = {"inputs": {"tabular": ["recency", "monetary"]}, "lineage": {}, "metrics": {}}
    return bundles.write(
        folder, [member], fusion, Horizons(90, ()), **rest, private_key=signing.private_key(keys)
    ).folder


def load(folder: Path, keys: SigningConfig) -> bundles.Bundle:
    return bundles.load(folder, signing.public_key(keys))


def test_a_signed_bundle_is_loaded_with_and_without_the_key(tmp_path: Path, keys: SigningConfig) -> None:
    folder = write(tmp_path / "one", keys)
    assert sorted(path.name for path in folder.iterdir()) == ["linear.json", "manifest.json", "manifest.sig"]
    assert load(folder, keys).digest == bundles.load(folder).digest


def test_a_bundle_without_signature_is_refused_where_a_key_is_set(tmp_path: Path, keys: SigningConfig) -> None:
    folder = write(tmp_path / "one", SigningConfig())
    assert bundles.load(folder).manifest["members"] == ["linear"]
    with pytest.raises(BundleError, match=r"manifest\.sig: can't be read .* bundles must be signed here"):
        load(folder, keys)


def test_what_another_key_signed_is_refused(tmp_path: Path, keys: SigningConfig) -> None:
    folder = write(tmp_path / "one", new_keys(tmp_path / "other"))
    with pytest.raises(BundleError, match=r"manifest\.sig: is no signature of manifest\.json"):
        load(folder, keys)


def test_the_signature_of_another_bundle_is_refused(tmp_path: Path, keys: SigningConfig) -> None:
    signed, unsigned = write(tmp_path / "signed", keys), write(tmp_path / "unsigned", SigningConfig())
    manifest = (unsigned / "manifest.json").read_bytes()
    content = manifest.replace(b'"lineage": {}', b'"lineage": {"run_id": "forged"}')
    (unsigned / "manifest.json").write_bytes(content)
    shutil.copy(signed / "manifest.sig", unsigned)
    with pytest.raises(BundleError, match=r"manifest\.sig"):
        load(unsigned, keys)


def test_a_signed_bundle_whose_weights_were_exchanged_is_refused(tmp_path: Path, keys: SigningConfig) -> None:
    folder = write(tmp_path / "one", keys)
    weights = folder / "linear.json"
    weights.write_text(weights.read_text().replace("0.9", "0.8"))
    with pytest.raises(BundleError, match=r"linear\.json: differs"):
        load(folder, keys)


def test_openssl_agrees(tmp_path: Path, keys: SigningConfig) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    folder = write(tmp_path / "one", keys)
    public = str(keys.public_key).removeprefix("file:")
    command = f"openssl pkeyutl -verify -pubin -inkey {public} -rawin -in {folder}/manifest.json"
    verification = subprocess.run(
        [*command.split(), "-sigfile", f"{folder}/manifest.sig"], capture_output=True, check=False
    )
    assert b"Verified Successfully" in verification.stdout


def test_keys_may_come_from_the_environment(
    tmp_path: Path, keys: SigningConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, address in (("PRIVATE", keys.private_key), ("PUBLIC", keys.public_key)):
        monkeypatch.setenv(name, Path(str(address).removeprefix("file:")).read_text())
    named = SigningConfig(private_key="env:PRIVATE", public_key="env:PUBLIC")
    assert load(write(tmp_path / "one", named), keys).members


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"public_key": "env:BP_SPARK_NO_SUCH"}, r"signing\.public_key: env:BP_SPARK_NO_SUCH holds no secret"),
        ({"public_key": "file:/nowhere/key"}, r"signing\.public_key: file:/nowhere/key holds no secret"),
        ({"public_key": "file:{keys}/signing.pem"}, "is no Ed25519 public key"),
        ({"private_key": "file:{keys}/signing.pub"}, "is no Ed25519 private key"),
        ({"private_key": "file:{keys}/../other/signing.pem", "public_key": "file:{keys}/signing.pub"}, "other half"),
    ],
)
def test_keys_that_cannot_be_used_are_named_by_setting(
    tmp_path: Path, keys: SigningConfig, given: dict[str, str], message: str
) -> None:
    new_keys(tmp_path / "other")
    settings = SigningConfig(**{name: text.format(keys=tmp_path / "keys") for name, text in given.items()})
    with pytest.raises(ConfigError, match=message):
        (signing.private_key(settings), signing.public_key(settings))


def test_a_key_given_in_place_of_its_address_is_not_shown(tmp_path: Path, keys: SigningConfig) -> None:
    secret = Path(str(keys.private_key).removeprefix("file:")).read_text().splitlines()[1]
    with pytest.raises(ConfigError, match=r"signing\.private_key") as caught:
        config.load(overrides=[f"signing.private_key={secret}"])
    assert secret not in str(caught.value)
