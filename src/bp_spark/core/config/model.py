"""Settings of the model: the members, and how their predictions become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from bp_spark.core.config.base import Fraction, Positive, Section, distinct

MemberName = Literal["linear", "btyd", "trees", "sqrt_trees", "transformer"]
SIZES: Mapping[str, Mapping[str, int]] = {
    "tiny": {"hidden_size": 64, "layers": 2, "heads": 4, "intermediate_size": 128, "adapter_size": 64},
    "base": {"hidden_size": 256, "layers": 4, "heads": 8, "intermediate_size": 1024, "adapter_size": 128},
    "large": {"hidden_size": 512, "layers": 8, "heads": 8, "intermediate_size": 2048, "adapter_size": 256},
}
"""Value of ``network.size`` -> the five sizes that it sets."""


class HistoryTextConfig(Section):
    """How a language model reads histories as text; for ``backbone: text``.

    Low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685) tunes it.
    """

    model: str | None = Field(
        None,
        description="Language model, as in `texts.model`: any `AutoModel` of the BERT, the GPT-2 or the Qwen kind. Null: "
        "that of `texts.model`.",
    )
    max_tokens: Positive = Field(
        128, description="Tokens of a history that the model reads. The oldest events are left out."
    )
    lora_rank: Positive = Field(8, description="Rank of the change of each weight matrix.")
    lora_alpha: float = Field(
        16.0, gt=0, description="Scale of the change: it is multiplied by `lora_alpha / lora_rank`."
    )
    lora_dropout: Fraction = Field(
        0.05, description="Share of a layer's inputs that the change doesn't see in training."
    )
    recompute: bool = Field(
        False,
        description="Whether the backward pass computes the language model's activations again, layer by layer, instead of "
        "keeping them: much less memory for about a third more time (Chen et al. 2016, arXiv:1604.06174).",
    )


def _by_size(name: str) -> Callable[[dict[str, Any]], int]:
    return lambda values: SIZES[values["size"]][name]


def _sizes(name: str) -> str:
    return "{}, {} or {} by `size`".format(*(SIZES[size][name] for size in ("tiny", "base", "large")))


class NetworkConfig(Section):
    """The sequence model; sizes are those of ``transformers.BertConfig``."""

    backbone: Literal["events", "text"] = Field(
        "events",
        description="What reads a history. `events`: an encoder of events, trained from scratch. `text`: a language "
        "model, tuned.",
    )
    size: Literal["tiny", "base", "large"] = Field(
        "tiny", description="Sets each of the five sizes below that is missing or null; see docs/sizes.md."
    )
    hidden_size: Positive = Field(
        default_factory=_by_size("hidden_size"),
        description=f"Width of a token's vector, a multiple of `heads`. Null: {_sizes('hidden_size')}.",
    )
    layers: Positive = Field(
        default_factory=_by_size("layers"),
        description=f"Transformer layers of the events backbone. Null: {_sizes('layers')}.",
    )
    heads: Positive = Field(
        default_factory=_by_size("heads"), description=f"Attention heads of a layer. Null: {_sizes('heads')}."
    )
    intermediate_size: Positive = Field(
        default_factory=_by_size("intermediate_size"),
        description=f"Width of a layer's feed-forward part. Null: {_sizes('intermediate_size')}.",
    )
    adapter_size: Positive = Field(
        default_factory=_by_size("adapter_size"),
        description="Width of the adapter that joins the history with the tabular features. Null: "
        f"{_sizes('adapter_size')}.",
    )
    text: HistoryTextConfig = HistoryTextConfig()
    dropout: Fraction = Field(0.1, description="Share of activations dropped in training.")
    pooling: Literal["attention", "mean"] = Field("attention", description="How a history becomes one vector.")
    loss: Literal["ziln", "tweedie", "mse"] = Field(
        "tweedie",
        description="Loss of spend. `ziln`: zero-inflated lognormal (Wang et al. 2019). `tweedie`: compound "
        "Poisson-gamma with a log link. `mse`: squared error of log1p spend.",
    )
    tweedie_power: float = Field(
        1.5, gt=1, lt=2, description="Variance power of the `tweedie` loss, between 1 (Poisson) and 2 (gamma)."
    )
    bands: int = Field(10, ge=2, description="Number of spend bands, of equally many training rows each.")
    bands_weight: float = Field(
        0.0,
        ge=0,
        description="Weight in the training loss of a second task, which predicts a user's band. 0 leaves it out.",
    )
    horizons_weight: float = Field(
        0.0,
        ge=0,
        description="Weight in the training loss of each of `labels.other_horizons`, for example 0.1. 0: a ratio by "
        "expected spend gives them instead.",
    )

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


class TreesConfig(Section):
    """The gradient-boosted trees, trained by XGBoost."""

    rounds: Positive = Field(600, description="Largest number of boosting rounds. Validation users stop it earlier.")
    max_depth: Positive = Field(4, description="Largest number of splits from a tree's root to a leaf.")
    learning_rate: float = Field(0.02, gt=0, description="Shrinkage of each tree.")
    min_child_weight: float = Field(20.0, ge=0, description="Least sum of second derivatives in a leaf.")
    subsample: float = Field(0.7, gt=0, le=1, description="Share of rows that each tree sees.")
    colsample_bytree: float = Field(0.1, gt=0, le=1, description="Share of features that each tree sees.")
    reg_lambda: float = Field(1.0, ge=0, description="L2 penalty on leaf values.")
    tweedie_variance_power: float = Field(
        1.5, gt=1, lt=2, description="Variance power of the Tweedie loss, between 1 (Poisson) and 2 (gamma)."
    )
    max_local_values: int = Field(
        50_000_000,
        ge=0,
        description="Most values (training rows times features) that are fitted on the driver, outside Spark: fitting them "
        "takes about 35 bytes of memory for each. Spark's executors fit more. 0: always Spark's executors.",
    )
    workers: Positive = Field(2, description="Spark tasks that train together, beyond `max_local_values`.")


class LinearConfig(Section):
    """Ridge regression on log recency, frequency and monetary value."""

    l2: float = Field(0.01, ge=0, description="Ridge penalty.")


class FusionConfig(Section):
    """How the members' predictions become one expected spend."""

    members: Annotated[tuple[MemberName, ...], AfterValidator(distinct)] = Field(
        ("btyd", "trees", "sqrt_trees", "transformer"), description="Members that are stacked."
    )
    shrinkage: float = Field(
        0.003,
        ge=0,
        description="How strongly the members' weights are drawn towards equal ones, relative to the mean square of a "
        "prediction.",
    )
    half_life_days: float | None = Field(
        28.0,
        gt=0,
        description="Days after which the weight of a past prediction has halved in the members' weights, the level, "
        "calibration and intervals. Null: all weigh the same.",
    )
    coverage: float = Field(0.9, gt=0, lt=1, description="Share of users whose spend should fall inside `low`..`high`.")
    season: bool = Field(
        True,
        description="Whether the same weeks of the year before move everyone's expected spend, as far as they foretold "
        "past weeks. With 13 to 21 months of data, whether they do where the platform's level moves beyond chance.",
    )
