"""Settings of governance: pseudonyms, groups too small to describe, and how long rows are kept."""

from __future__ import annotations

from pydantic import Field

from bp_spark.core.config.base import Positive, SecretAddress, Section


class RetentionConfig(Section):
    """Days after which ``bp-spark retain``, and ``forget`` at its end, delete rows; null: never."""

    raw: Positive | None = Field(
        None,
        description="Raw rows of users and rows in quarantine, from their ingest on. `featurize --rebuild` and "
        "`rotate-keys` need all of them and are refused then.",
    )
    events: Positive | None = Field(
        None,
        description="Events, the user-days made from them, and consultations, from their day on; contacts by campaigns, "
        "from their last day on.",
    )
    features: Positive | None = Field(
        None, description="Rows of `user_features` and `prospect_features`, from their as-of date on."
    )
    training: Positive | None = Field(
        None,
        description="Rows of `training_set` and `pretraining_set`, requested labels and their answers, from their "
        "as-of date on.",
    )
    scores: Positive | None = Field(
        None, description="Scores, the profiles made from them, and users of experiments, from their date on."
    )


class PrivacyConfig(Section):
    """How users stay pseudonymous, and how long their rows stay."""

    secret: SecretAddress = Field(
        "env:BP_SPARK_SECRET",
        description="Address of the secret that turns user ids into user keys: `env:NAME`, `file:PATH` or "
        "`databricks:SCOPE/KEY`. It has at least 32 bytes, as `openssl rand -hex 32` makes them. `ingest`, `forget` "
        "and `rotate-keys` need it; training and scoring don't. This package writes it to no file, table or log.",
    )
    mask_texts: bool = Field(
        True,
        description="Whether e-mail addresses, phone, card and id numbers and IBANs in queries, reviews and consultations are "
        "masked before they are stored.",
    )
    smallest_group: Positive = Field(
        10,
        description="Least number of users that a figure may describe (k): in `market_segments`, `cohorts`, `market_forecast`, "
        "`fairness`, a category's usual price, a recommended item, the groups of an experiment and a night's report.",
    )
    retention_days: RetentionConfig = RetentionConfig()
