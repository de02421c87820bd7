"""All sections in one: :class:`Config`."""

from __future__ import annotations

import difflib
from functools import reduce

from pydantic import Field, model_validator

from bp_spark.core.config.base import Folder, Section
from bp_spark.core.config.evaluation import DriftConfig, EvaluationConfig, FairnessConfig
from bp_spark.core.config.features import FeaturesConfig, LabelsConfig
from bp_spark.core.config.governance import PrivacyConfig
from bp_spark.core.config.model import FusionConfig, LinearConfig, NetworkConfig, TreesConfig
from bp_spark.core.config.prospects import ProspectsConfig
from bp_spark.core.config.recommendations import RecommendationsConfig
from bp_spark.core.config.registry import SigningConfig, TrackingConfig
from bp_spark.core.config.scoring import LabellingConfig, ProfilesConfig, ScoringConfig
from bp_spark.core.config.sources import CleaningConfig, SourceConfig, SyntheticConfig, TextsConfig
from bp_spark.core.config.tables import TablesConfig
from bp_spark.core.config.topics import TopicsConfig
from bp_spark.core.config.training import LanguageConfig, PretrainingConfig, SearchConfig, TrainingConfig


class Config(Section):
    """All settings of the platform, in sections."""

    tables: TablesConfig = TablesConfig()
    source: SourceConfig = SourceConfig()
    cleaning: CleaningConfig = CleaningConfig()
    texts: TextsConfig = TextsConfig()
    topics: TopicsConfig = TopicsConfig()
    language: LanguageConfig = LanguageConfig()
    features: FeaturesConfig = FeaturesConfig()
    labels: LabelsConfig = LabelsConfig()
    labelling: LabellingConfig = LabellingConfig()
    network: NetworkConfig = NetworkConfig()
    pretraining: PretrainingConfig = PretrainingConfig()
    training: TrainingConfig = TrainingConfig()
    trees: TreesConfig = TreesConfig()
    linear: LinearConfig = LinearConfig()
    fusion: FusionConfig = FusionConfig()
    scoring: ScoringConfig = ScoringConfig()
    prospects: ProspectsConfig = ProspectsConfig()
    profiles: ProfilesConfig = ProfilesConfig()
    recommendations: RecommendationsConfig = RecommendationsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    drift: DriftConfig = DriftConfig()
    fairness: FairnessConfig = FairnessConfig()
    search: SearchConfig = SearchConfig()
    tracking: TrackingConfig = TrackingConfig()
    signing: SigningConfig = SigningConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    synthetic: SyntheticConfig = SyntheticConfig()
    bundles: Folder = Field("bundles", description="Folder of model bundles. `bundles/current` names the promoted one.")

    @property
    def history_model(self) -> str:
        """The language model of the ``text`` backbone, as in ``texts.model``."""
        return self.network.text.model or self.texts.model

    @model_validator(mode="after")
    def _only_settings_are_searched(self) -> Config:
        for key in self.search.space:
            if key not in all_keys():
                raise ValueError(f"search.space: unknown key {key}{suggestion(key)}")
            if isinstance(reduce(getattr, key.split("."), self), Section):
                raise ValueError(f"search.space: {key} is a section, not a setting")
        return self

    @model_validator(mode="after")
    def _only_events_are_pretrained(self) -> Config:
        if self.pretraining.max_epochs and self.network.backbone != "events":
            raise ValueError(
                f"pretraining.max_epochs ({self.pretraining.max_epochs}) must be 0 where network.backbone is "
                f"{self.network.backbone}: only the events backbone is pre-trained here"
            )
        return self


def subsection(annotation: object) -> type[Section] | None:
    """Return the section that a field of this type holds, or ``None`` if the field is a setting."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def all_keys(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Return the dotted keys of all sections and settings, in their order.

    Args:
        section: where to look.
        prefix: put before each key.
    """
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if nested := subsection(field.annotation):
            keys += all_keys(nested, f"{prefix}{name}.")
    return keys


def suggestion(unknown_key: str) -> str:
    """Return the end of a message, "; did you mean KEY?", or an empty text if no key is like the unknown one."""
    close_keys = difflib.get_close_matches(unknown_key, all_keys(), n=1)
    return f"; did you mean {close_keys[0]}?" if close_keys else ""
