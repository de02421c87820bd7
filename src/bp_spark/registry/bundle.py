"""Bundles: a bundle is the folder of plain files that a training writes and that scores users.

``manifest.json`` names every other file with its size and SHA-256. It also holds the input columns, the members, the stack,
the other horizons, the explanation, the metrics and the lineage. A bundle is written beside its place and renamed into it.
It is never changed afterwards, and it is refused when a single bit differs. Nothing in it is ever unpickled.

Digests reveal damage. A signature, ``manifest.sig``, proves who wrote a bundle, where keys are set; see
:mod:`bp_spark.registry.signing`. :func:`load_promoted` is how every stage gets its bundle.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bp_spark.core import disk, logs
from bp_spark.core.config import Config
from bp_spark.core.errors import BundleError, OvertakenError
from bp_spark.core.files import sync, write_synced
from bp_spark.core.locks import locked
from bp_spark.core.version import __version__
from bp_spark.model.columns import Columns
from bp_spark.model.explanation import Explanation
from bp_spark.model.horizons import Horizons
from bp_spark.model.members.base import Member, predict_all
from bp_spark.model.members.files import load_member
from bp_spark.model.prospects import FILE as PROSPECTS
from bp_spark.model.prospects import ProspectModel
from bp_spark.model.refunds import FILE as REFUNDS
from bp_spark.model.refunds import Refunds
from bp_spark.model.stack import CalibratedStack
from bp_spark.model.totals import FILE as TOTALS
from bp_spark.model.totals import Totals
from bp_spark.registry import decisions, mlflow_store
from bp_spark.registry import manifest as manifests
from bp_spark.registry.manifest import MANIFEST, NAME, OWN_FILES, SIGNATURE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

logger = logging.getLogger(__name__)

CURRENT = "current"


class Bundle:
    """A trained, calibrated model, ready to score. Get one from :func:`load_promoted`, :func:`write` or :func:`load`.

    Attributes:
        folder: where its files lie.
        manifest: the document of ``manifest.json``; don't change it.
        members: the fitted members by name.
        stack: joins the members' predictions.
        horizons: predicts the other horizons.
        explanation: takes predictions apart; ``None`` in a bundle that gives no reasons.
        prospects: predicts first purchases; ``None`` in a bundle that scores buyers alone.
        totals: errors of sums of users; ``None`` in a bundle from before there were any.
        refunds: predicts refunds; ``None`` in a bundle whose training knew too few.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        members: Sequence[Member],
        stack: CalibratedStack,
        horizons: Horizons,
        explanation: Explanation | None,
        prospects: ProspectModel | None = None,
        totals: Totals | None = None,
        refunds: Refunds | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.members = {member.name: member for member in members}
        self.stack = stack
        self.horizons = horizons
        self.explanation = explanation
        self.prospects = prospects
        self.totals = totals
        self.refunds = refunds

    @property
    def digest(self) -> str:
        """Identity of the model: SHA-256 (hex) of the canonical manifest without the time of writing."""
        return str(self.manifest["digest"])

    @property
    def horizon_days(self) -> int:
        """Days of future spend that the bundle predicts."""
        return int(self.manifest["horizon_days"])

    @property
    def test_date(self) -> str:
        """Test date of the bundle's figures, YYYY-MM-DD; a bundle that was fitted anew has that of its predecessor."""
        lineage = self.manifest["lineage"]
        return str(lineage.get("judged", lineage).get("test_date", "–"))

    @property
    def currency(self) -> str | None:
        """Currency of the spend that the bundle learned from; ``None`` for a bundle from before version 0.2.0."""
        currency: str | None = self.manifest["lineage"].get("currency")
        return currency

    @property
    def required_columns(self) -> tuple[str, ...]:
        """The input columns of all members, group after group as in ``inputs``."""
        return tuple(name for names in self.manifest["inputs"].values() for name in names)

    def check_inputs(self, available: Iterable[str]) -> None:
        """Make sure that a table can be scored.

        Args:
            available: the table's columns.

        Raises:
            BundleError: columns are missing; the message names them.
        """
        available_names = set(available)
        missing = [name for name in self.required_columns if name not in available_names]
        if missing:
            raise BundleError(f"{self.folder}: input columns missing: {', '.join(missing)}")

    def predict(self, columns: Columns, on: date | None = None) -> dict[str, np.ndarray]:
        """Score users.

        Args:
            columns: an array of ``rows`` values for each required column.
            on: the date from which the spend counts; by default that of the training.

        Returns:
            ``member_<name>`` (expected spend, ``float64[rows]``) for each member, and the arrays of
            :meth:`bp_spark.model.stack.CalibratedStack.apply`. ``expected_by_horizon``, float64 [rows, horizons], is in the
            order of ``horizons.days``; see :meth:`bp_spark.model.horizons.Horizons.apply`.

        Raises:
            BundleError: a column is missing.
        """
        self.check_inputs(columns)
        try:
            predictions = predict_all(self.members.values(), columns)
        except BundleError as error:
            raise BundleError(f"{self.folder}: {error}") from None
        steady = self.stack.apply_without_level(predictions)
        by_days = self.horizons.apply(steady["expected_spend"], predictions)
        by_horizon = np.stack(list(self.horizons.apply_level(by_days, self.stack.factor(on), on).values()), axis=1)
        members = {f"member_{name}": predictions[name] for name in self.members}
        return members | self.stack.apply_level(steady, on) | {"expected_by_horizon": by_horizon}

    def explain(
        self, columns: Columns, predicted: Mapping[str, np.ndarray], on: date | None = None
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Take predictions apart; see :class:`bp_spark.model.explanation.Explanation`.

        Args:
            columns: an array of ``rows`` values for each required column.
            predicted: what :meth:`predict` returned for the same users.
            on: the date that :meth:`predict` was called with.

        Raises:
            BundleError: the bundle gives no reasons.
        """
        if self.explanation is None:
            raise BundleError(f"{self.folder}: gives no reasons")
        predictions = {name: predicted[f"member_{name}"] for name in self.stack.members}
        by_feature, of_sequence, base = self.explanation(columns, predictions, self.members, self.stack)
        factor = self.stack.factor(on)
        return by_feature * factor, of_sequence * factor, base * factor


def write(
    folder: str | Path,
    members: Sequence[Member],
    stack: CalibratedStack,
    horizons: Horizons,
    *,
    inputs: Mapping[str, Sequence[str]],
    lineage: Mapping[str, Any],
    metrics: Mapping[str, Any],
    explanation: Explanation | None = None,
    prospects: ProspectModel | None = None,
    totals: Totals | None = None,
    refunds: Refunds | None = None,
    private_key: Ed25519PrivateKey | None = None,
) -> Bundle:
    """Write a bundle as a whole or not at all.

    Args:
        folder: where to; must not exist. Its parent is created.
        members: fitted members, names unique.
        stack: fitted on these members.
        horizons: the main one, which members and stack predict, and the ratios of the others.
        inputs: input columns by group, such as ``{"tabular": [...], "history": [...]}``.
        lineage: where the model comes from: training set and version, configuration, run. Plain JSON values.
        metrics: how good it is. Plain JSON values; NaN is written as null.
        explanation: takes its predictions apart; without one the bundle gives no reasons.
        prospects: predicts first purchases; without one the bundle scores buyers alone.
        totals: errors of sums of users; without them no total gets an interval.
        refunds: predicts refunds to come; without it no user gets a share.
        private_key: signs the bundle; without one it is unsigned.

    Raises:
        BundleError: the folder exists, its name or a file's is unfit, or a member of the stack is missing.
        PlatformError: the disk is full.
    """
    folder = Path(folder)
    names = [member.name for member in members]
    _require_writable(folder, names, stack)
    with disk.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
        draft.mkdir()
        try:
            for part in (*members, explanation, prospects, totals, refunds):
                if part is not None:
                    part.save(draft)
            manifest = manifests.seal(
                {
                    "format": manifests.FORMAT,
                    "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
                    "code_version": __version__,
                    "horizon_days": horizons.main,
                    "horizons": horizons.to_json(),
                    "inputs": inputs,
                    "members": names,
                    "fusion": stack.to_json(),
                    "explanation": {} if explanation is None else explanation.to_json(),
                    "metrics": metrics,
                    "lineage": lineage,
                    "files": _described_files(draft, folder),
                }
            )
            text = manifests.encode(manifest)
            write_synced(draft / MANIFEST, text)
            if private_key is not None:
                write_synced(draft / SIGNATURE, private_key.sign(text))
            sync(draft)
            try:
                os.rename(draft, folder)
            except OSError as error:
                if disk.is_full(error):
                    raise
                raise BundleError(f"{folder}: can't be put in place ({error.strerror})") from None
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    return Bundle(folder, manifest, members, stack, horizons, explanation, prospects, totals, refunds)


def _require_writable(folder: Path, names: Sequence[str], stack: CalibratedStack) -> None:
    """Make sure that a bundle of these members can be written into a folder."""
    if not NAME.fullmatch(folder.name):
        raise BundleError(f"{folder}: a bundle's name has letters, digits, dot, dash, underscore only")
    if folder.exists():
        raise BundleError(f"{folder}: is there already; a bundle is never changed")
    if len(set(names)) != len(names):
        raise BundleError(f"{folder}: two members of one name among {', '.join(names)}")
    absent = [name for name in stack.members if name not in names]
    if absent:
        raise BundleError(f"{folder}: the fusion needs member {absent[0]!r}")


def _described_files(draft: Path, folder: Path) -> dict[str, Any]:
    """Return ``files`` of the manifest, after making the files of a draft durable."""
    files = {path.name: manifests.describe_file(path) for path in sorted(draft.iterdir())}
    for name in files:
        if not NAME.fullmatch(name) or name in OWN_FILES:
            raise BundleError(f"{folder}: a member wrote a file {name!r}")
        sync(draft / name)
    return files


def load(folder: str | Path, public_key: Ed25519PublicKey | None = None) -> Bundle:
    """Read a bundle after proving that it is whole and unchanged.

    Args:
        folder: where its files lie.
        public_key: checks its signature; without one it may be unsigned.

    Raises:
        BundleError: it is no bundle, of another format or not signed by the key, or a file is missing, added or changed. The
            message names the file.
    """
    folder = Path(folder)
    manifest = manifests.read(folder / MANIFEST, public_key)
    manifests.require_files(folder, manifest["files"])
    try:
        stack = CalibratedStack.from_json(manifest["fusion"])
        horizons = Horizons.from_json(manifest["horizons"])
        explanation = Explanation.from_json(manifest["explanation"], folder) if manifest["explanation"] else None
    except BundleError as error:
        raise BundleError(f"{folder / MANIFEST}: {error}") from None
    absent = [name for name in stack.members if name not in manifest["members"]]
    if absent:
        raise BundleError(f"{folder / MANIFEST}: the fusion needs member {absent[0]!r}")
    members = [load_member(name, folder) for name in manifest["members"]]
    if explanation is not None:
        try:
            explanation.require({member.name: member for member in members}, stack)
        except BundleError as error:
            raise BundleError(f"{folder / MANIFEST}: {error}") from None
    # the list of files says whether there are these: bundles from before there were any have the same manifest
    files = manifest["files"]
    prospects = ProspectModel.load(folder) if PROSPECTS in files else None
    totals = Totals.load(folder) if TOTALS in files else None
    refunds = Refunds.load(folder) if REFUNDS in files else None
    return Bundle(folder, manifest, members, stack, horizons, explanation, prospects, totals, refunds)


def load_promoted(settings: Config, address: str | Path | None = None) -> Bundle:
    """Load the promoted bundle, or the one at an address, after checking its signature where a public key is set.

    Args:
        settings: the folder of bundles, the public key and the registry.
        address: a bundle's folder, or its address in the registry as ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``;
            by default the bundle that ``bundles/current`` names.

    Raises:
        BundleError: no bundle is promoted, there is none at the address, or it can't be trusted.
        ConfigError: the public key can't be used, or the address needs a registry and is malformed or there is none.
        TrackingError: the registry can't be reached.
    """
    # Only here: workers that load a bundle by its folder need no cryptography.
    from bp_spark.registry import signing

    public_key = signing.public_key(settings.signing)

    def verified(folder: str | Path) -> Bundle:
        if public_key is None:
            logs.warn_once(logger, "signing.public_key: is not set, so nothing proves who made the bundle")
        return load(folder, public_key)

    if address is not None and str(address).startswith(mlflow_store.SCHEME):
        return verified(mlflow_store.fetch(settings, str(address), lambda files: verified(files).digest))
    return verified(address or current(settings.bundles))


def profiling_parts(folder: Path) -> tuple[Totals | None, Refunds | None]:
    """Read what profiles need of a bundle, which is a matter of milliseconds; ``None`` for what it hasn't.

    Raises:
        BundleError: manifest or file are not as they were written.
    """
    files = manifests.read(folder / MANIFEST, None)["files"]
    for name in {TOTALS, REFUNDS} & set(files):
        manifests.require_file(folder / name, files[name])
    return Totals.load(folder) if TOTALS in files else None, Refunds.load(folder) if REFUNDS in files else None


@dataclass(frozen=True)
class Promoted:
    """What ``bundles/current`` said at a moment: the name of the promoted bundle, usable or not; ``None`` without one."""

    name: str | None


def promoted(bundles_dir: str | Path) -> Promoted:
    """Return what ``current`` says now, for :func:`promote` after a decision."""
    try:
        return Promoted((Path(bundles_dir) / CURRENT).read_text(encoding="utf-8", errors="replace").strip())
    except OSError:
        return Promoted(None)


def promote(bundles_dir: str | Path, bundle: Bundle, replacing: Promoted | None = None) -> None:
    """Make ``bundle`` the one that scores: ``bundles_dir/current`` names it from one moment to the next.

    Args:
        bundles_dir: folder of all bundles.
        bundle: lies directly in it.
        replacing: what ``current`` must still say; by default, whatever it says is replaced.

    Raises:
        BundleError: the bundle doesn't lie directly in ``bundles_dir``.
        OvertakenError: ``current`` says something else than ``replacing``.
        PlatformError: the disk is full.
    """
    bundles_dir = Path(bundles_dir)
    if bundle.folder.resolve().parent != bundles_dir.resolve():
        raise BundleError(f"{bundle.folder}: must lie in {bundles_dir} to be promoted")
    pointer = bundles_dir / CURRENT
    draft = bundles_dir / f".{CURRENT}.{uuid.uuid4().hex}.tmp"
    with disk.writing(pointer), locked(bundles_dir / f".{CURRENT}.lock"):
        if replacing is not None and (now := promoted(bundles_dir)) != replacing:
            raise OvertakenError(str(pointer), now.name)
        try:
            write_synced(draft, f"{bundle.folder.name}\n".encode())
            os.replace(draft, pointer)
        finally:
            draft.unlink(missing_ok=True)
    sync(bundles_dir)


def is_any_promoted(bundles_dir: str | Path) -> bool:
    """Return whether ``current`` names a bundle, usable or not."""
    return (Path(bundles_dir) / CURRENT).exists()


def current(bundles_dir: str | Path) -> Path:
    """Return the folder of the promoted bundle.

    Raises:
        BundleError: none is promoted, with the reason where the newest was refused; or the promoted one is gone.
    """
    pointer = Path(bundles_dir) / CURRENT
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise BundleError(f"{pointer}: no bundle is promoted yet; {decisions.why_none(bundles_dir)}") from None
    folder = Path(bundles_dir) / name
    if not NAME.fullmatch(name):
        raise BundleError(f"{pointer}: {name[:40]!r} is no bundle's name")
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{pointer}: names {name}, which is no bundle in {bundles_dir}")
    return folder


def find(bundles_dir: str | Path, digest: str) -> Path:
    """Return the folder of the bundle with a digest.

    Args:
        bundles_dir: folder of all bundles.
        digest: of the bundle, whole.

    Raises:
        BundleError: no readable bundle has it.
    """
    for path in sorted(Path(bundles_dir).glob(f"*/{MANIFEST}")):
        try:
            written = NAME.fullmatch(path.parent.name) and manifests.read(path, None)["digest"]
        except BundleError:
            # Damaged or of another format: not the one that the caller means.
            continue
        if written == digest:
            return path.parent
    raise BundleError(
        f"{bundles_dir}: no bundle that can be read has the digest {digest[:12]}; was it moved or deleted?"
    )
