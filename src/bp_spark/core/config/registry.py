"""Settings of the registry: the record in MLflow, and the signatures of bundles."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from bp_spark.core.config.base import Folder, SecretAddress, Section


def _unreserved(alias: str) -> str:
    if re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise ValueError("must not be latest or a version as v3, which MLflow keeps for itself")
    return alias


class TrackingConfig(Section):
    """The registry of bundles and the record of trainings and trials, in MLflow; events for OpenLineage."""

    uri: str | None = Field(
        "sqlite:///tracking/mlflow.db",
        pattern=r"^(sqlite:///[^?]+|https?://[^@?]+|databricks(://[^@?]+)?)$",
        description="`sqlite:///` and the path of a file, `http(s)://` of a server, or `databricks`. Null: neither "
        "record nor registry. No password: MLflow reads `MLFLOW_TRACKING_USERNAME`, `_PASSWORD` and `_TOKEN` from the "
        "environment.",
    )
    experiment: str = Field("bp-spark", min_length=1, description="Name of the experiment that holds all runs.")
    model: str = Field(
        "purchasing-power",
        pattern=r"^[^/:@']+$",
        description="Registered model whose versions are the bundles of one folder `bundles`.",
    )
    alias: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$"), AfterValidator(_unreserved)] = Field(
        "champion", description="Alias of the promoted version."
    )
    artifacts: Folder = Field(
        "tracking/artifacts",
        description="Folder of the bundles of a SQLite store, fixed by the experiment's first run. A server has its "
        "own place.",
    )
    openlineage: bool = Field(
        False,
        description="Whether each run sends what its stages read and wrote as events of OpenLineage, to where "
        "`OPENLINEAGE_URL` or `openlineage.yml` say. It takes the extra `openlineage`.",
    )


class SigningConfig(Section):
    """Signatures of bundles (Ed25519).

    Keys are in PEM, as OpenSSL makes them. A setting says where a key is: ``env:NAME``, ``file:PATH`` or
    ``databricks:SCOPE/KEY``.
    """

    private_key: SecretAddress | None = Field(
        None, description="Address of the key that `train` signs bundles with. Null: bundles are not signed."
    )
    public_key: SecretAddress | None = Field(
        None,
        description="Address of the key that must match a bundle's signature before it is loaded. Null: any bundle is "
        "loaded.",
    )
