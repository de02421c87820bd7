"""The artefact of training: a folder of plain files that scores users, proves itself unchanged and says where
it is from.

``manifest.json`` names every other file with its size and SHA-256, the input columns, the members, the fusion, the other
horizons, the explanation, the metrics and the lineage. A bundle is written beside its place and renamed into it, never
changed afterwards, and refused when a single bit differs. Nothing in it is ever unpickled. Digests tell damage; who wrote a
bundle is told by a signature, ``manifest.sig``, where keys are set (see :mod:`bp_spark.registry.signing`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bp_spark.core.errors import BundleError
from bp_spark.core.version import __version__
from bp_spark.model.columns import Columns
from bp_spark.model.explanation import Explanation
from bp_spark.model.horizons import Horizons
from bp_spark.model.members.base import Member, predict_all
from bp_spark.model.members.files import load_member
from bp_spark.model.stack import CalibratedStack

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FORMAT = 3
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
CURRENT = "current"
DECISION = ".promotion.json"
"""Ending of the file beside a bundle that says whether it was promoted, and why."""

_OWN = {MANIFEST, SIGNATURE}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_KEYS: dict[str, type] = {
    "format": int,
    "created_at": str,
    "code_version": str,
    "horizon_days": int,
    "horizons": dict,
    "inputs": dict,
    "members": list,
    "fusion": dict,
    "explanation": dict,
    "metrics": dict,
    "lineage": dict,
    "files": dict,
    "digest": str,
    "checksum": str,
}


class Bundle:
    """A trained, calibrated model, ready to score. Get one from :func:`write` or :func:`load`.

    Attributes:
        folder: where it lies.
        manifest: the document of ``manifest.json``; don't change it.
        members: the fitted members by name.
        fusion: what joins them.
        horizons: what tells of other horizons.
        explanation: what takes predictions apart; ``None`` in a bundle that gives no reasons.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        members: Sequence[Member],
        fusion: CalibratedStack,
        horizons: Horizons,
        explanation: Explanation | None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.members = {member.name: member for member in members}
        self.fusion = fusion
        self.horizons = horizons
        self.explanation = explanation

    @property
    def digest(self) -> str:
        """Identity of the model: SHA-256 (hex) of the canonical manifest, time of writing apart."""
        return str(self.manifest["digest"])

    @property
    def horizon_days(self) -> int:
        """Days of future spend that the bundle predicts."""
        return int(self.manifest["horizon_days"])

    @property
    def judged_on(self) -> str:
        """The test date, YYYY-MM-DD, that its figures are of; of a bundle that was fitted anew a horizon before that fit."""
        lineage = self.manifest["lineage"]
        return str(lineage.get("judged", lineage).get("test_date", "–"))

    @property
    def required_columns(self) -> tuple[str, ...]:
        """The input columns of all members, group after group as in ``inputs``."""
        return tuple(name for names in self.manifest["inputs"].values() for name in names)

    def check_inputs(self, available: Iterable[str]) -> None:
        """Make sure a table can be scored.

        Raises:
            BundleError: columns are missing; the message names them.
        """
        there = set(available)
        missing = [name for name in self.required_columns if name not in there]
        if missing:
            raise BundleError(f"bundle {self.digest[:12]}: input columns missing: {', '.join(missing)}")

    def predict(self, columns: Columns, on: date | None = None) -> dict[str, np.ndarray]:
        """Score users.

        Args:
            columns: an array of ``rows`` values per required column.
            on: the date from which the spend counts; by default that of the training.

        Returns:
            ``member_<name>`` (expected spend, ``float64[rows]``) per member, the arrays of
            :meth:`bp_spark.model.stack.CalibratedStack.apply`, and ``expected_by_horizon``, float64 [rows, horizons], in the
            order of ``horizons.days``; see :meth:`bp_spark.model.horizons.Horizons.apply`.

        Raises:
            BundleError: a column is missing.
        """
        self.check_inputs(columns)
        predictions = predict_all(self.members.values(), columns)
        steady = self.fusion.steady(predictions)
        by_horizon = np.stack(list(self.horizons.apply(steady["expected_spend"], predictions).values()), axis=1)
        members = {f"member_{name}": predictions[name] for name in self.members}
        moved = {"expected_by_horizon": by_horizon * self.fusion.factor(on)}
        return members | self.fusion.moved(steady, on) | moved

    def explain(
        self, columns: Columns, predicted: Mapping[str, np.ndarray], on: date | None = None
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Take predictions apart; see :class:`bp_spark.model.explanation.Explanation`.

        Args:
            predicted: what :meth:`predict` said of the same users.
            on: the date it was asked for.

        Raises:
            BundleError: the bundle gives no reasons.
        """
        if self.explanation is None:
            raise BundleError(f"{self.folder}: gives no reasons")
        predictions = {name: predicted[f"member_{name}"] for name in self.fusion.members}
        given, rest, base = self.explanation(columns, predictions, self.members, self.fusion)
        factor = self.fusion.factor(on)
        return given * factor, rest * factor, base * factor


def write(
    folder: str | Path,
    members: Sequence[Member],
    fusion: CalibratedStack,
    horizons: Horizons,
    *,
    inputs: Mapping[str, Sequence[str]],
    lineage: Mapping[str, Any],
    metrics: Mapping[str, Any],
    explanation: Explanation | None = None,
    private_key: Ed25519PrivateKey | None = None,
) -> Bundle:
    """Write a bundle; it is there whole or not at all.

    Args:
        folder: where to; must not exist. Its parent is created.
        members: fitted members, names unique.
        fusion: fitted on these members.
        horizons: the main one, which members and fusion are of, and what tells of others.
        inputs: input columns by group, such as ``{"tabular": [...], "history": [...]}``.
        lineage: where the model comes from: training set and version, configuration, run. Plain JSON values.
        metrics: how good it is. Plain JSON values; NaN is written as null.
        explanation: what takes its predictions apart, if it is to give reasons.
        private_key: what to sign it with, if it is to be signed.

    Raises:
        BundleError: the folder exists, its name or a file's is unfit, or the fusion needs a member that isn't
            given.
    """
    folder = Path(folder)
    names = [member.name for member in members]
    if not _NAME.fullmatch(folder.name):
        raise BundleError(f"{folder}: a bundle's name has letters, digits, dot, dash, underscore only")
    if folder.exists():
        raise BundleError(f"{folder}: is there already; a bundle is never changed")
    if len(set(names)) != len(names):
        raise BundleError(f"{folder}: two members of one name among {', '.join(names)}")
    absent = [name for name in fusion.members if name not in names]
    if absent:
        raise BundleError(f"{folder}: the fusion needs member {absent[0]!r}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    draft.mkdir()
    try:
        for member in members:
            member.save(draft)
        if explanation is not None:
            explanation.save(draft)
        files = {path.name: _describe(path) for path in sorted(draft.iterdir())}
        for name in files:
            if not _NAME.fullmatch(name) or name in _OWN:
                raise BundleError(f"{folder}: a member wrote a file {name!r}")
            _sync(draft / name)
        manifest = _sealed(
            {
                "format": FORMAT,
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "code_version": __version__,
                "horizon_days": horizons.main,
                "horizons": horizons.to_json(),
                "inputs": inputs,
                "members": names,
                "fusion": fusion.to_json(),
                "explanation": {} if explanation is None else explanation.to_json(),
                "metrics": metrics,
                "lineage": lineage,
                "files": files,
            }
        )
        (draft / MANIFEST).write_bytes(_text(manifest))
        _sync(draft / MANIFEST)
        if private_key is not None:
            (draft / SIGNATURE).write_bytes(private_key.sign(_text(manifest)))
            _sync(draft / SIGNATURE)
        _sync(draft)
        try:
            os.rename(draft, folder)
        except OSError as error:
            raise BundleError(f"{folder}: can't be put in place ({error.strerror})") from None
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return Bundle(folder, manifest, members, fusion, horizons, explanation)


def load(folder: str | Path, public_key: Ed25519PublicKey | None = None) -> Bundle:
    """Read a bundle after proving that it is whole and unchanged.

    Args:
        public_key: what its signature is checked with; without one it may be unsigned.

    Raises:
        BundleError: it is no bundle, of another format, not signed for the key, or anything in it differs from
            what was written: a file missing, added, changed or cut short. The message names the file.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST, public_key)
    files: dict[str, Any] = manifest["files"]
    for name in files:
        if not _NAME.fullmatch(name) or name in _OWN:
            raise BundleError(f"{folder / MANIFEST}: file name {name!r} is not allowed")
    there = {path.name for path in folder.iterdir()}
    for name in sorted(there - set(files) - _OWN):
        raise BundleError(f"{folder / name}: doesn't belong to the bundle")
    for name, described in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise BundleError(f"{path}: is missing or not a plain file")
        if _describe(path) != described:
            raise BundleError(f"{path}: differs from what was written (size or SHA-256)")
    fusion = CalibratedStack.from_json(manifest["fusion"])
    absent = [name for name in fusion.members if name not in manifest["members"]]
    if absent:
        raise BundleError(f"{folder / MANIFEST}: the fusion needs member {absent[0]!r}")
    horizons = Horizons.from_json(manifest["horizons"])
    told = manifest["explanation"]
    explanation = Explanation.from_json(told, folder) if told else None
    members = [load_member(name, folder) for name in manifest["members"]]
    return Bundle(folder, manifest, members, fusion, horizons, explanation)


def promote(bundles_dir: str | Path, bundle: Bundle) -> None:
    """Make ``bundle`` the one that scores: ``bundles_dir/current`` names it from one moment to the next.

    Raises:
        BundleError: the bundle doesn't lie directly in ``bundles_dir``.
    """
    bundles_dir = Path(bundles_dir)
    if bundle.folder.resolve().parent != bundles_dir.resolve():
        raise BundleError(f"{bundle.folder}: must lie in {bundles_dir} to be promoted")
    draft = bundles_dir / f".{CURRENT}.{uuid.uuid4().hex}.tmp"
    try:
        draft.write_text(bundle.folder.name + "\n", encoding="utf-8")
        _sync(draft)
        os.replace(draft, bundles_dir / CURRENT)
    finally:
        draft.unlink(missing_ok=True)
    _sync(bundles_dir)


def record(bundles_dir: str | Path, bundle: Bundle, *, promoted: bool, reason: str) -> Path:
    """Write what was decided of a bundle beside its folder, which itself never changes; returns the file.

    Raises:
        BundleError: the file can't be written.
    """
    path = Path(bundles_dir) / f"{bundle.folder.name}{DECISION}"
    decision = {
        "bundle": bundle.folder.name,
        "digest": bundle.digest,
        "promoted": promoted,
        "reason": reason,
        "decided_at": datetime.now(UTC).isoformat(),
    }
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        draft.write_text(json.dumps(decision, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise BundleError(f"{path}: can't be written ({error.strerror})") from None
    return path


def decision(folder: Path) -> Mapping[str, Any] | None:
    """What :func:`record` wrote of the bundle in a folder; ``None`` where nothing that can be read was."""
    try:
        found = json.loads(folder.with_name(f"{folder.name}{DECISION}").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"promoted", "reason"} <= set(found) else None


def is_any_promoted(bundles_dir: str | Path) -> bool:
    """Whether ``current`` names a bundle, usable or not."""
    return (Path(bundles_dir) / CURRENT).exists()


def current(bundles_dir: str | Path) -> Path:
    """Folder of the promoted bundle.

    Raises:
        BundleError: none is promoted, with the reason where the newest was refused; or the promoted one is gone.
    """
    pointer = Path(bundles_dir) / CURRENT
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise BundleError(f"{pointer}: no bundle is promoted yet; {_why_none(Path(bundles_dir))}") from None
    folder = Path(bundles_dir) / name
    if not _NAME.fullmatch(name):
        raise BundleError(f"{pointer}: {name[:40]!r} is no bundle's name")
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{pointer}: names {name}, which is no bundle in {bundles_dir}")
    return folder


def find(bundles_dir: str | Path, digest: str) -> Path:
    """Folder of the bundle with a digest.

    Raises:
        BundleError: none that can be read has it.
    """
    for path in sorted(Path(bundles_dir).glob(f"*/{MANIFEST}")):
        try:
            found = _NAME.fullmatch(path.parent.name) and _read_manifest(path, None)["digest"]
        except BundleError:
            # damaged or of another format: not the one that was meant
            continue
        if found == digest:
            return path.parent
    raise BundleError(
        f"{bundles_dir}: no bundle that can be read has the digest {digest[:12]}; was it moved or deleted?"
    )


def _why_none(bundles_dir: Path) -> str:
    refused = []
    for path in bundles_dir.glob(f"*{DECISION}"):
        found = decision(path.with_name(path.name.removesuffix(DECISION)))
        if found is not None and not found["promoted"] and {"decided_at", "bundle"} <= set(found):
            refused.append((str(found["decided_at"]), str(found["bundle"]), str(found["reason"])))
    if not refused:
        return "train one first"
    _, name, reason = max(refused)
    return f"{name}, the newest, was refused: {reason}; train another, or name a bundle's folder"


def _read_manifest(path: Path, public_key: Ed25519PublicKey | None) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror})") from None
    if public_key is not None:
        _require_signature(path.with_name(SIGNATURE), text, public_key)
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        raise BundleError(f"{path}: not JSON or cut short") from None
    written = manifest.get("format") if isinstance(manifest, dict) else None
    if type(written) is not int:
        raise BundleError(f"{path}: not a bundle's manifest")
    if written > FORMAT:
        raise BundleError(f"{path}: format {written} is newer than this bp-spark reads ({FORMAT}); update it")
    if written < FORMAT:
        raise BundleError(f"{path}: format {written} is older than this bp-spark reads ({FORMAT}); train a new bundle")
    for key, kind in _KEYS.items():
        if not isinstance(manifest.get(key), kind):
            raise BundleError(f"{path}: {key} is missing or no {kind.__name__}")
    # Byte for byte, so that nothing passes that JSON readers may take differently, such as a key given twice.
    content = {key: value for key, value in manifest.items() if key not in ("digest", "checksum")}
    if set(manifest) != set(_KEYS) or _text(_sealed(content)) != text:
        raise BundleError(f"{path}: differs from what was written (checksum)")
    inputs = manifest["inputs"]
    if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in inputs.values()):
        raise BundleError(f"{path}: inputs must be lists of column names")
    return manifest


def _require_signature(path: Path, manifest: bytes, public_key: Ed25519PublicKey) -> None:
    from bp_spark.registry.signing import is_signed

    try:
        signature = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror}), and bundles must be signed here") from None
    if not is_signed(manifest, signature, public_key):
        raise BundleError(f"{path}: is no signature of {MANIFEST} by the key in signing.public_key")


def _sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of that content: with ``digest`` over all but the time, ``checksum`` over all."""
    plain: dict[str, Any] = _plain(content)
    timeless = {key: value for key, value in plain.items() if key != "created_at"}
    return plain | {"digest": _sha256(timeless), "checksum": _sha256(plain)}


def _sha256(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _text(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    """``value`` as it will come back from JSON; NaN and infinities as null."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return str(value)


def _describe(path: Path) -> dict[str, Any]:
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path}: must be a plain file")
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
