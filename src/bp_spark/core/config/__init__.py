"""Typed settings: a YAML file and ``key=value`` overrides in, a validated :class:`Config` out.

Each setting stands once in code, with its default and its description. ``conf/default.yaml`` and ``docs/configuration.md``
are generated from that by ``make reference``. An unknown key, a wrong type or a value out of range is a
:class:`~bp_spark.core.errors.ConfigError` that names the key.

Sections stand here in one file per subject, not beside their owners, because :class:`Config` holds all of them and core
imports nothing from above.
"""

from bp_spark.core.config.base import Folder, Fraction, Positive, SecretAddress, Section
from bp_spark.core.config.composed import Config, all_keys, subsection
from bp_spark.core.config.evaluation import DriftConfig, EvaluationConfig, FairnessConfig, FairnessFigure
from bp_spark.core.config.features import FeaturesConfig, LabelsConfig
from bp_spark.core.config.governance import PrivacyConfig, RetentionConfig
from bp_spark.core.config.loading import (
    DEFAULT_FILE,
    DEMO_FILE,
    RENAMED,
    SECRETS,
    changed,
    digest,
    load,
    parse_date,
    parse_yaml,
)
from bp_spark.core.config.model import (
    SIZES,
    FusionConfig,
    HistoryTextConfig,
    LinearConfig,
    MemberName,
    NetworkConfig,
    TreesConfig,
)
from bp_spark.core.config.prospects import ProspectsConfig
from bp_spark.core.config.recommendations import RecommendationsConfig
from bp_spark.core.config.registry import SigningConfig, TrackingConfig
from bp_spark.core.config.scoring import (
    FILLED_IN,
    FeatureReader,
    LabellingConfig,
    PhrasesConfig,
    ProfilesConfig,
    ScoringConfig,
)
from bp_spark.core.config.sources import CleaningConfig, Delivered, SourceConfig, SyntheticConfig, TextsConfig
from bp_spark.core.config.tables import TablesConfig
from bp_spark.core.config.topics import TopicsConfig
from bp_spark.core.config.training import (
    NOT_SEARCHED,
    SEARCHED_SECTIONS,
    LanguageConfig,
    PretrainingConfig,
    SearchConfig,
    SearchRange,
    TrainingConfig,
)

__all__ = [
    "DEFAULT_FILE",
    "DEMO_FILE",
    "FILLED_IN",
    "NOT_SEARCHED",
    "RENAMED",
    "SEARCHED_SECTIONS",
    "SECRETS",
    "SIZES",
    "CleaningConfig",
    "Config",
    "Delivered",
    "DriftConfig",
    "EvaluationConfig",
    "FairnessConfig",
    "FairnessFigure",
    "FeatureReader",
    "FeaturesConfig",
    "Folder",
    "Fraction",
    "FusionConfig",
    "HistoryTextConfig",
    "LabellingConfig",
    "LabelsConfig",
    "LanguageConfig",
    "LinearConfig",
    "MemberName",
    "NetworkConfig",
    "PhrasesConfig",
    "Positive",
    "PretrainingConfig",
    "PrivacyConfig",
    "ProfilesConfig",
    "ProspectsConfig",
    "RecommendationsConfig",
    "RetentionConfig",
    "ScoringConfig",
    "SearchConfig",
    "SearchRange",
    "SecretAddress",
    "Section",
    "SigningConfig",
    "SourceConfig",
    "SyntheticConfig",
    "TablesConfig",
    "TextsConfig",
    "TopicsConfig",
    "TrackingConfig",
    "TrainingConfig",
    "TreesConfig",
    "all_keys",
    "changed",
    "digest",
    "load",
    "parse_date",
    "parse_yaml",
    "subsection",
]
