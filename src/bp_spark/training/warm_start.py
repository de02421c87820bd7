"""Warm start: what a training takes from the bundle of another platform (``training.from_bundle``).

A young platform has few histories and fewer labels. Taken are the weights of the history encoder, the parameters of the
purchase process as a prior, and the uncertainty of the platform's level as another. Trees and stack are fitted on own rows
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError
from bp_spark.ingest import texts
from bp_spark.model.history import HistoryEncoder
from bp_spark.model.level import PRIOR_SD
from bp_spark.model.members.btyd import BtydMember
from bp_spark.model.members.transformer import TransformerMember
from bp_spark.model.network import SpendNetwork
from bp_spark.registry.bundle import Bundle, load_promoted

SIZES = ("backbone", "hidden_size", "layers", "heads", "intermediate_size", "pooling")
"""Settings of ``network`` that say what the weights of an encoder are."""


@dataclass(frozen=True)
class WarmStart:
    """What there is to take. Without a bundle it is nothing.

    Attributes:
        config: settings of the training.
        bundle: of the other platform.
    """

    config: Config
    bundle: Bundle | None

    @classmethod
    def of(cls, config: Config) -> WarmStart:
        """Load the bundle that ``training.from_bundle`` names.

        Raises:
            BundleError: there is no such bundle, or it can't be trusted.
            ConfigError: its network has other sizes than ``network``, or one of both reads histories as text.
        """
        address = config.training.from_bundle
        if address is None:
            return cls(config, None)
        start = cls(config, load_promoted(config, address))
        if (network := start._network) is not None:
            start._require_same_sizes(network)
        return start

    @property
    def digest(self) -> str | None:
        """Identity of the bundle."""
        return None if self.bundle is None else self.bundle.digest

    @property
    def purchases(self) -> BtydMember | None:
        """The other platform's purchase process."""
        member = None if self.bundle is None else self.bundle.members.get(BtydMember.name)
        return member if isinstance(member, BtydMember) else None

    @property
    def level_sd(self) -> float:
        """Standard deviation of a platform's log level before anything is known of it."""
        level = None if self.bundle is None else self.bundle.stack.level
        return PRIOR_SD if level is None or not level.forecasts else level.sd

    @property
    def has_same_texts(self) -> bool:
        """Whether both platforms embed texts by the same language model, so that one's projection fits the other's."""
        return self.bundle is not None and self.bundle.manifest["lineage"].get("text_model") == texts.model_digest(
            self.config.texts
        )

    @property
    def figures(self) -> dict[str, object]:
        """What is taken, for the table ``runs``."""
        if self.bundle is None:
            return {}
        return {
            "bundle": self.bundle.folder.name,
            "digest": self.bundle.digest,
            "encoder": self._network is not None,
            "projection": self._network is not None and self.has_same_texts,
            "purchase_process": self.purchases is not None,
            "level_sd": f"{self.level_sd:.3f}",
        }

    def write_encoder(self, folder: Path) -> Path | None:
        """Write the encoder's weights for the ranks of a training; return their folder, or ``None`` without any."""
        network = self._network
        if network is None or not isinstance(network.history, HistoryEncoder):
            return None
        into = folder / "warm-start"
        network.history.save(into, with_projection=self.has_same_texts)
        return into

    @property
    def _network(self) -> SpendNetwork | None:
        member = None if self.bundle is None else self.bundle.members.get(TransformerMember.name)
        if "transformer" not in self.config.fusion.members:
            return None
        return member.network if isinstance(member, TransformerMember) else None

    def _require_same_sizes(self, network: SpendNetwork) -> None:
        here, there = self.config.network, network.config
        pairs = {f"network.{name}": (getattr(here, name), getattr(there, name)) for name in SIZES}
        pairs["features.history_length"] = (self.config.features.history_length, network.spec.history_length)
        for name, (own, others) in pairs.items():
            if own != others:
                raise ConfigError(f"training.from_bundle: that bundle has {name} {others}, and not {own}")
        if here.backbone != "events":
            raise ConfigError(
                "training.from_bundle: network.backbone must be events; text starts from network.text.model"
            )
