"""Sources: each brings a platform's data into the raw contract of :mod:`bp_spark.tables`.

A source is a module with ``read(spark, config) -> dict[table name, DataFrame]`` and ``fingerprint() -> str`` (the same
fingerprint and settings, the same rows: the ingest of an unchanged source is skipped).
"""

from __future__ import annotations

from types import ModuleType

from bp_spark.config import SourceConfig
from bp_spark.sources import completejourney


def open_source(config: SourceConfig) -> ModuleType:
    """The module that reads the configured source."""
    return {"completejourney": completejourney}[config.kind]
