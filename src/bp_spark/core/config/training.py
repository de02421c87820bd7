"""Settings of training: fine-tuning, both kinds of pre-training, and the search of other settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bp_spark.core.config.base import Folder, Fraction, Positive, Section

SEARCHED_SECTIONS = ("trees", "linear", "network", "pretraining", "training", "fusion")
"""Sections that a search may change: none of them changes the training set."""
NOT_SEARCHED = (
    "training.work_dir",
    "training.launcher",
    "training.from_bundle",
    "network.backbone",
    "network.text.model",
)
"""Settings of these sections that a search may not change: where training runs, and what the vocabulary depends on."""


class LanguageConfig(Section):
    """Pre-training of the language model on the platform's own texts, by ``bp-spark adapt-language``.

    The task is masked language modelling (Devlin et al. 2019). Ranks, their launcher, seed, gradient clip and work folder
    are those of ``training``.
    """

    epochs: Positive = Field(3, description="Largest number of passes over the texts.")
    batch_size: Positive = Field(128, description="Texts of one step over all ranks.")
    learning_rate: float = Field(
        5e-5, gt=0, description="Highest learning rate, reached after warmup. It then falls linearly to 0."
    )
    mask_share: float = Field(
        0.15, gt=0, lt=1, description="Share of a text's tokens that are hidden and that the model predicts."
    )
    max_texts: Positive = Field(
        1_000_000, description="Approximate number of texts to read, chosen by hash, if the platform has more."
    )
    patience: Positive = Field(
        2, description="Epochs without a better loss on held-out texts after which training stops."
    )
    warmup_fraction: Fraction = Field(0.06, description="Share of the steps in which the learning rate rises.")
    weight_decay: float = Field(
        0.01, ge=0, description="L2 penalty, decoupled. Biases and the scales of norms have none."
    )


class PretrainingConfig(Section):
    """Pre-training of the sequence model's history half on histories without labels.

    Ranks, their launcher, weight decay, warmup, gradient clip, seed and work folder are those of ``training``.
    """

    max_epochs: int = Field(
        0, ge=0, description="Largest number of passes over the histories, for example 60. 0: no pre-training."
    )
    patience: Positive = Field(15, description="Epochs without a better validation loss after which training stops.")
    batch_size: Positive = Field(128, description="Users of one step over all ranks.")
    learning_rate: float = Field(
        1e-3, gt=0, description="Highest learning rate, reached after warmup. A cosine brings it down to 0."
    )
    mask_fraction: float = Field(
        0.2, gt=0, lt=1, description="Share of the events that are hidden and that the encoder predicts."
    )
    days_ahead: Positive = Field(30, description="Days after a moment of a history whose spend is predicted.")
    temperature: float = Field(
        0.1,
        gt=0,
        description="Temperature of the choice of an event's text among those of the batch. The lower it is, the more "
        "the nearest wrong texts count.",
    )


class TrainingConfig(Section):
    """Fine-tuning by distributed data-parallel training (DDP)."""

    processes: Positive = Field(
        2, description="DDP ranks: by `nccl` with one GPU each where there are GPUs, else by `gloo`."
    )
    launcher: Literal["driver", "cluster"] = Field(
        "driver",
        description="`driver`: all ranks run on the driver's machine. `cluster`: each rank is a barrier task on the "
        "executors.",
    )
    feed: Literal["petastorm", "arrow"] = Field(
        "petastorm",
        description="What reads the training set's files. `petastorm`: Petastorm. `arrow`: pyarrow alone. The rows are "
        "the same.",
    )
    batch_size: Positive = Field(256, description="Rows of one step over all ranks.")
    rows_at_once: Positive | None = Field(
        None,
        description="Rows that a rank passes through the network at once in a step of fine-tuning, and texts in a step of "
        "`bp-spark adapt-language`. Fewer than its share of the batch take less memory and more time. The step and its "
        "gradient stay those of the whole batch (gradient accumulation). Null: its whole share.",
    )
    max_epochs: Positive = Field(40, description="Largest number of passes over the training rows.")
    patience: Positive = Field(5, description="Epochs without a better validation loss after which training stops.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="Optimizer of the network.")
    learning_rate: float = Field(
        5e-4, gt=0, description="Highest learning rate, reached after warmup. A cosine brings it down to 0."
    )
    weight_decay: float = Field(0.01, ge=0, description="L2 penalty, decoupled for AdamW.")
    warmup_fraction: Fraction = Field(0.1, description="Share of the steps in which the learning rate rises.")
    gradient_clip: float = Field(
        1.0, gt=0, description="Largest norm of a step's gradient. A longer one is scaled down."
    )
    average_epochs: float = Field(
        1.0,
        ge=0,
        description="Epochs after which a step's share in the running average of weights has halved. The average is "
        "validated and saved. 0: no average.",
    )
    refit: bool = Field(
        True,
        description="Whether `train` without a test date fits a bundle that was good enough once more, as of the day "
        "after the last event. The bundle that scores has then learned from the newest horizon, too. It takes as long "
        "again.",
    )
    seed: int = Field(7, description="Random seed of initial weights, order of rows and dropout.")
    from_bundle: Folder | None = Field(
        None,
        description="Bundle of another platform that a training starts from: its folder, or its address in the registry. "
        "The history encoder of the network starts from that bundle's weights, and the purchase process and the "
        "uncertainty of the platform's level from its values. It needs a network of the same sizes. Null: from nothing.",
    )
    work_dir: Folder = Field(
        "work", description="Folder of checkpoints and TensorBoard logs. On a cluster all machines must see it."
    )


class SearchRange(Section):
    """Values of one setting that a search tries: ``choices``, or numbers from ``low`` to ``high``, both included."""

    choices: tuple[bool | int | float | str, ...] = Field((), description="Values to try.")
    low: int | float | None = Field(None, description="Smallest number to try.")
    high: int | float | None = Field(None, description="Largest number to try.")
    log: bool = Field(False, description="Whether numbers are drawn evenly by their logarithm.")

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
    """Trials of other settings, by ``bp-spark search``; out-of-fold predictions judge them, never the test date."""

    space: dict[str, SearchRange] = Field(
        {
            "trees.learning_rate": SearchRange(low=0.01, high=0.1, log=True),
            "trees.max_depth": SearchRange(low=3, high=7),
            "trees.min_child_weight": SearchRange(low=1.0, high=100.0, log=True),
            "trees.subsample": SearchRange(low=0.5, high=1.0),
            "trees.colsample_bytree": SearchRange(low=0.05, high=0.5, log=True),
            "network.hidden_size": SearchRange(choices=(32, 64, 128)),
            "network.dropout": SearchRange(low=0.0, high=0.4),
            "network.loss": SearchRange(choices=("ziln", "tweedie")),
            "training.learning_rate": SearchRange(low=1e-4, high=3e-3, log=True),
        },
        description="Settings to try, of the sections trees, linear, network, pretraining, training and fusion. Each "
        "has `choices`, or numbers from `low` to `high`, both included. `log: true` draws them evenly by their "
        "logarithm.",
    )
    trials: Positive = Field(20, description="Largest number of trials. The first one has the settings as they are.")
    metric: Literal["spearman", "gini", "decile_mape", "mae", "rmse", "rmse_log1p"] = Field(
        "gini", description="Metric of the fused prediction that judges a trial."
    )
    target: float | None = Field(
        None, description="Value of the metric at which the search stops, or any better one. Null: no such stop."
    )

    @model_validator(mode="after")
    def _only_what_is_fitted(self) -> SearchConfig:
        for key in self.space:
            section, dot, _ = key.partition(".")
            if not dot or section not in SEARCHED_SECTIONS:
                raise ValueError(f"space: {key} is no setting of {', '.join(SEARCHED_SECTIONS)}")
            if key in NOT_SEARCHED:
                raise ValueError(f"space: {key} can't be searched")
        return self
