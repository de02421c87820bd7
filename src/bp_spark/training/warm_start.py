"""Warm start: what a training takes from the bundle of another platform (``training.from_bundle``).

A young platform has few histories and fewer labels. The history encoder starts from the weights of the other platform's. The
purchase process and the uncertainty of the platform's level get its values as priors. Trees and stack are fitted on own rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError
from bp_spark.ingest import texts
from bp_spark.lakehouse.run import Run
from bp_spark.model.history import HistoryEncoder
from bp_spark.model.level import PRIOR_SD
from bp_spark.model.members.btyd import BtydMember
from bp_spark.model.members.transformer import TransformerMember
from bp_spark.registry.bundle import Bundle, load_promoted

SIZES = ("backbone", "hidden_size", "layers", "heads", "intermediate_size", "pooling")
"""Settings of ``network`` that decide the weights of an encoder."""


@dataclass(frozen=True)
class WarmStart:
    """Values of another platform's bundle that a training starts from; the defaults are those of a cold start.

    Attributes:
        bundle: of the other platform.
        encoder: of its network.
        with_projection: whether the encoder's projection of texts is of the same language model.
        purchases: its purchase process.
        level_sd: standard deviation of a platform's log level before anything is known of it.
    """

    bundle: Bundle | None = None
    encoder: HistoryEncoder | None = None
    with_projection: bool = False
    purchases: BtydMember | None = None
    level_sd: float = PRIOR_SD

    @property
    def digest(self) -> str | None:
        """Identity of the bundle."""
        return None if self.bundle is None else self.bundle.digest

    @property
    def figures(self) -> dict[str, object]:
        """What is taken, for the table ``runs``."""
        if self.bundle is None:
            return {}
        return {
            "bundle": self.bundle.folder.name,
            "digest": self.bundle.digest,
            "encoder": self.encoder is not None,
            "projection": self.with_projection,
            "purchase_process": self.purchases is not None,
            "level_sd": f"{self.level_sd:.3f}",
        }

    def write_encoder(self, folder: Path) -> Path | None:
        """Write the encoder's weights for the ranks of a training; return their folder, or ``None`` without an encoder."""
        if self.encoder is None:
            return None
        into = folder / "warm-start"
        self.encoder.save(into, with_projection=self.with_projection)
        return into


def warm_start(run: Run) -> WarmStart:
    """Return what a training starts from: a cold start, unless ``training.from_bundle`` names a bundle.

    Args:
        run: the running job.

    Raises:
        BundleError: no bundle is at the address, or it can't be trusted.
        ConfigError: the bundle learned from this lakehouse, or its network has other sizes or reads histories as text; the
            public key or the address can't be used.
        TrackingError: the registry can't be reached.
    """
    config, address = run.config, run.config.training.from_bundle
    if address is None:
        return WarmStart()
    bundle = load_promoted(config, address)
    lineage = bundle.manifest["lineage"]
    # its weights know spend by which the training would be judged
    own = run.lakehouse.location("training_set") if run.lakehouse.exists("training_set") else None
    if lineage["training_set"]["location"] == own:
        raise ConfigError(
            f"training.from_bundle: {bundle.folder.name} learned from this platform; it must be of another one"
        )
    encoder = _encoder(bundle, config)
    same_texts = lineage.get("text_model") == texts.model_digest(config.texts)
    purchases, level = bundle.members.get(BtydMember.name), bundle.stack.level
    # the level of a shorter horizon is less certain
    is_measured = level is not None and level.forecasts and bundle.horizon_days == config.labels.horizon_days
    return WarmStart(
        bundle,
        encoder,
        encoder is not None and encoder.projection is not None and same_texts,
        purchases if isinstance(purchases, BtydMember) else None,
        level.sd if level is not None and is_measured else PRIOR_SD,
    )


def _encoder(bundle: Bundle, config: Config) -> HistoryEncoder | None:
    """Return the encoder of a bundle for a network of the same sizes; ``None`` where either has no network.

    Raises:
        ConfigError: the sizes differ, or a network reads histories as text.
    """
    member = bundle.members.get(TransformerMember.name)
    if TransformerMember.name not in config.fusion.members or not isinstance(member, TransformerMember):
        return None
    network = member.network
    sizes = {f"network.{name}": (getattr(config.network, name), getattr(network.config, name)) for name in SIZES}
    sizes["features.history_length"] = (config.features.history_length, network.spec.history_length)
    for name, (own, other) in sizes.items():
        if own != other:
            raise ConfigError(f"training.from_bundle: that bundle has {name} {other}, and not {own}")
    if not isinstance(network.history, HistoryEncoder):
        raise ConfigError("training.from_bundle: network.backbone must be events; text starts from network.text.model")
    return network.history
