"""Secrets by address: where one is stands in the settings, what it is nowhere but in memory."""

from __future__ import annotations

import os
from pathlib import Path

from bp_spark.core.errors import ConfigError

_SUSPICIOUS = 32
"""Characters of a name that may be a secret: privacy.secret has as many at least."""


def read(setting: str, address: str) -> bytes:
    """What lies at an address, without blanks around it.

    Args:
        setting: name of the setting, for messages.
        address: ``env:NAME``, ``file:PATH`` or ``databricks:SCOPE/KEY``, see :data:`bp_spark.core.config.SecretAddress`.

    Raises:
        ConfigError: nothing is there. No message holds any of a secret.
    """
    kind, _, name = address.partition(":")
    if kind == "env":
        found = os.environ.get(name, "").encode()
    elif kind == "file":
        try:
            found = Path(name).expanduser().read_bytes()
        except OSError as error:
            raise ConfigError(f"{setting}: {_shown(address)} holds no secret ({error.strerror})") from None
    else:
        found = _in_scope(setting, name)
    if not found.strip():
        raise ConfigError(f"{setting}: {_shown(address)} holds no secret")
    return found.strip()


def _shown(address: str) -> str:
    """The address; without its name where that may be a secret, which a shell put in the place of the name."""
    kind, _, name = address.partition(":")
    is_path = kind == "file" and "/" in name and Path(name).expanduser().parent.is_dir()
    return address if is_path or len(name) < _SUSPICIOUS else f"{kind}:(a name of {len(name)} characters)"


def _in_scope(setting: str, name: str) -> bytes:
    try:
        from pyspark.dbutils import DBUtils  # type: ignore[import-not-found]
    except ImportError:
        raise ConfigError(f"{setting}: databricks:{name} can be read on Databricks only") from None
    from pyspark.sql import SparkSession

    scope, _, key = name.partition("/")
    try:
        return str(DBUtils(SparkSession.getActiveSession()).secrets.get(scope, key)).encode()
    except Exception:
        # what Databricks says of a missing scope is an error of Java, with a page of trace
        return b""
