"""Secrets by address: settings hold the address of a secret, and only memory holds the secret."""

from __future__ import annotations

import os
from pathlib import Path

from bp_spark.core.errors import ConfigError

_SUSPICIOUS = 32
"""Length from which a name may be a secret: privacy.secret has at least as many characters."""


def read(setting: str, address: str) -> bytes:
    """Return the secret at an address, without surrounding blanks.

    Args:
        setting: name of the setting, for messages.
        address: ``env:NAME``, ``file:PATH`` or ``databricks:SCOPE/KEY``, see :data:`bp_spark.core.config.SecretAddress`.

    Raises:
        ConfigError: the address holds nothing. No message shows any part of a secret.
    """
    kind, _, name = address.partition(":")
    if kind == "env":
        value = os.environ.get(name, "").encode()
    elif kind == "file":
        try:
            value = Path(name).expanduser().read_bytes()
        except OSError as error:
            raise ConfigError(f"{setting}: {_shown(address)} holds no secret ({error.strerror})") from None
    else:
        value = _in_scope(setting, name)
    if not value.strip():
        raise ConfigError(f"{setting}: {_shown(address)} holds no secret")
    return value.strip()


def _shown(address: str) -> str:
    """Return the address for messages; without its name where a shell may have put a secret in the name's place."""
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
        # for a missing scope Databricks raises an error of Java, with a page of trace
        return b""
