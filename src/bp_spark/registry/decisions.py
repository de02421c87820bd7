"""Decisions about bundles: each lies beside its bundle's folder, which itself never changes."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bp_spark.core import disk
from bp_spark.core.errors import BundleError

if TYPE_CHECKING:
    from bp_spark.registry.bundle import Bundle

DECISION = ".promotion.json"
"""Ending of the file beside a bundle that says whether it was promoted, and why."""


def record(bundles_dir: str | Path, bundle: Bundle, *, promoted: bool, reason: str) -> Path:
    """Write the decision about a bundle beside its folder, which itself never changes; return the file.

    Args:
        bundles_dir: folder of all bundles.
        bundle: the bundle.
        promoted: the decision.
        reason: why, for people.

    Raises:
        BundleError: the file can't be written.
        PlatformError: the disk is full.
    """
    path = Path(bundles_dir) / f"{bundle.folder.name}{DECISION}"
    document = {
        "bundle": bundle.folder.name,
        "digest": bundle.digest,
        "promoted": promoted,
        "reason": reason,
        "decided_at": datetime.now(UTC).isoformat(),
    }
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with disk.writing(path):
            draft.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(draft, path)
    except OSError as error:
        raise BundleError(f"{path}: can't be written ({error.strerror})") from None
    finally:
        draft.unlink(missing_ok=True)
    return path


def decision(folder: Path) -> Mapping[str, Any] | None:
    """Return what :func:`record` wrote about the bundle in a folder; ``None`` where no readable decision lies."""
    try:
        document = json.loads(folder.with_name(f"{folder.name}{DECISION}").read_bytes())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) and {"promoted", "reason"} <= set(document) else None


def why_none(bundles_dir: str | Path) -> str:
    """Return why no bundle is promoted, and what to do."""
    refusals = []
    for path in Path(bundles_dir).glob(f"*{DECISION}"):
        document = decision(path.with_name(path.name.removesuffix(DECISION)))
        if document is not None and not document["promoted"] and {"decided_at", "bundle"} <= set(document):
            refusals.append((str(document["decided_at"]), str(document["bundle"]), str(document["reason"])))
    if not refusals:
        return "train one first"
    _, name, reason = max(refusals)
    return f"{name}, the newest, was refused: {reason}; train another, or name a bundle's folder"
