"""The manifest of a bundle: it names every other file with its size and SHA-256, and carries its own checksum.

A manifest is read byte for byte: a single bit that differs is refused. Its signature, where one is asked for, is checked
before anything in it is parsed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bp_spark.core.errors import BundleError
from bp_spark.model.values import number

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

FORMAT = 4
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
OWN_FILES = frozenset({MANIFEST, SIGNATURE})
"""Files of a bundle that the manifest doesn't list."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names that a bundle and its files may have."""

_SEALS = ("digest", "checksum")
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


def read(path: Path, public_key: Ed25519PublicKey | None) -> dict[str, Any]:
    """Return a manifest after checking its signature, format, keys and checksum.

    Args:
        path: of ``manifest.json``.
        public_key: checks the signature beside it; without one the bundle may be unsigned.

    Raises:
        BundleError: the manifest is missing, damaged, of another format or not signed by the key.
    """
    text = _read_plain_file(path)
    if public_key is not None:
        _require_signature(path.with_name(SIGNATURE), text, public_key)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise BundleError(f"{path}: not JSON or cut short") from None
    manifest = _require_format(path, document)
    for key, kind in _KEYS.items():
        if type(manifest.get(key)) is not kind:
            raise BundleError(f"{path}: {key} is missing or no {kind.__name__}")
    # Byte for byte: JSON readers may take some documents differently, such as one that gives a key twice.
    content = {key: value for key, value in manifest.items() if key not in _SEALS}
    try:
        differs = set(manifest) != set(_KEYS) or encode(seal(content)) != text
    except RecursionError:
        raise BundleError(f"{path}: is nested too deeply") from None
    if differs:
        raise BundleError(f"{path}: differs from what was written (checksum)")
    _require_types(path, manifest)
    return manifest


def _read_plain_file(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        # a pipe would never end
        raise BundleError(f"{path}: can't be read (no plain file)")
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror})") from None


def _require_types(path: Path, manifest: Mapping[str, Any]) -> None:
    """Make sure that the parts of a manifest have the types that its readers expect."""
    inputs = manifest["inputs"]
    if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in inputs.values()):
        raise BundleError(f"{path}: inputs must be lists of column names")
    members = manifest["members"]
    if not all(isinstance(name, str) for name in members) or len(set(members)) != len(members):
        raise BundleError(f"{path}: members must be different names")
    if manifest["horizon_days"] != manifest["horizons"].get("main", manifest["horizon_days"]):
        raise BundleError(f"{path}: horizon_days and horizons don't fit together")
    try:
        reasons = manifest["metrics"].get("reasons") or {"error": 0.0, "same_first": 0.0}
        for name in ("error", "same_first"):
            number(reasons[name], 0.0)
    except (KeyError, TypeError, ValueError):
        raise BundleError(f"{path}: metrics of reasons are no numbers") from None
    _require_lineage(path, manifest["lineage"])


def _require_lineage(path: Path, lineage: Mapping[str, Any]) -> None:
    """Make sure that the parts of a lineage have the types that its readers expect."""
    judged = lineage.get("judged", {})
    if not isinstance(judged, dict):
        raise BundleError(f"{path}: judged is no dict")
    if judged and not (isinstance(judged.get("bundle"), str) and NAME.fullmatch(judged["bundle"])):
        raise BundleError(f"{path}: judged names no bundle")
    for values in (lineage, judged):
        try:
            date.fromisoformat(values.get("test_date", "2000-01-01"))
        except (TypeError, ValueError):
            raise BundleError(f"{path}: test_date is no date") from None
    definitions = lineage.get("features", {})
    if not (isinstance(definitions, dict) and all(isinstance(text, str) for text in definitions.values())):
        raise BundleError(f"{path}: features is no dict of texts")
    if not isinstance(lineage.get("currency"), str | None):
        raise BundleError(f"{path}: currency is no text")


def _require_format(path: Path, document: object) -> dict[str, Any]:
    """Return the document of a manifest of this version's format."""
    written = document.get("format") if isinstance(document, dict) else None
    if not isinstance(document, dict) or type(written) is not int:
        raise BundleError(f"{path}: not a bundle's manifest")
    if written > FORMAT:
        raise BundleError(f"{path}: format {written} is newer than this bp-spark reads ({FORMAT}); update it")
    if written < FORMAT:
        raise BundleError(f"{path}: format {written} is older than this bp-spark reads ({FORMAT}); train a new bundle")
    return document


def _require_signature(path: Path, manifest: bytes, public_key: Ed25519PublicKey) -> None:
    # Only here: bundles that need no signature load without cryptography.
    from bp_spark.registry.signing import is_signed

    try:
        signature = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror}), and bundles must be signed here") from None
    if not is_signed(manifest, signature, public_key):
        raise BundleError(f"{path}: is no signature of {MANIFEST} by the key in signing.public_key")


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of a content: ``digest`` covers all but the time of writing, ``checksum`` covers all."""
    plain: dict[str, Any] = _plain(content)
    timeless = {key: value for key, value in plain.items() if key != "created_at"}
    return plain | {"digest": _sha256(timeless), "checksum": _sha256(plain)}


def encode(manifest: Mapping[str, Any]) -> bytes:
    """Return the bytes of ``manifest.json``."""
    return (json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def describe_file(path: Path) -> dict[str, Any]:
    """Return the SHA-256 and the size of a file, as the manifest lists them.

    Raises:
        BundleError: it is no plain file.
    """
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path}: must be a plain file")
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def require_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Make sure that a folder holds exactly the files that its manifest lists, unchanged.

    Args:
        folder: of the bundle.
        files: ``files`` of its manifest.

    Raises:
        BundleError: a file is missing, added, changed or cut short; the message names it.
    """
    for name in files:
        if not NAME.fullmatch(name) or name in OWN_FILES:
            raise BundleError(f"{folder / MANIFEST}: file name {name!r} is not allowed")
    present = {path.name for path in folder.iterdir()}
    for name in sorted(present - set(files) - OWN_FILES):
        raise BundleError(f"{folder / name}: doesn't belong to the bundle")
    for name, listed in files.items():
        require_file(folder / name, listed)


def require_file(path: Path, listed: object) -> None:
    """Make sure that a file is the one that a manifest lists.

    Args:
        path: of the file.
        listed: its entry in ``files`` of the manifest.

    Raises:
        BundleError: it is missing, changed or cut short.
    """
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path}: is missing or not a plain file")
    if describe_file(path) != listed:
        raise BundleError(f"{path}: differs from what was written (size or SHA-256)")


def _sha256(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Return a value as it will come back from JSON; NaN and infinities become null."""
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
