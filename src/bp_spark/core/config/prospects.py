"""Settings of prospects: users who are known and have not bought yet."""

from __future__ import annotations

from pydantic import Field

from bp_spark.core.config.base import Positive, Section


class ProspectsConfig(Section):
    """Scores of prospects: users who registered or have an event, a consultation or a contact, and no purchase yet."""

    enabled: bool = Field(
        True,
        description="Whether prospects get features, a model and scores. A platform that delivers purchases alone has no "
        "prospects and pays nothing for this.",
    )
    silent_days: Positive = Field(
        180, description="Days since a prospect was last seen, after which the prospect gets no score any more."
    )
    max_training_rows: Positive = Field(
        200_000,
        description="Largest number of rows, each a prospect at a past date, that the model learns from. With more, a hash "
        "chooses among those who did not buy, and the chosen ones weigh more.",
    )
