"""Sources: each turns a platform's data into the raw contract of :mod:`bp_spark.lakehouse.tables`."""

from __future__ import annotations

from pathlib import Path

from bp_spark.core.config import SourceConfig, digest
from bp_spark.core.errors import ConfigError
from bp_spark.ingest.sources.contract import Source


def open_source(config: SourceConfig) -> Source:
    """Open the configured source.

    Raises:
        ConfigError: ``source.mapping`` is missing or wrong.
    """
    if config.kind == "completejourney":
        from bp_spark.ingest.sources.completejourney import CompleteJourney

        return CompleteJourney()
    from bp_spark.ingest.sources.files import FilesSource

    if config.mapping is None:
        raise ConfigError("source.mapping: must name the YAML file that describes the files")
    return FilesSource(config.mapping)


def source_digests(config: SourceConfig) -> tuple[str, ...]:
    """Return the identities of a source in ``deliveries``: first the identity to write, then those of earlier versions.

    A mapping is identified by its file's name. So it stays the same when it is named from another folder or by a link, or moved
    with its files.
    """
    if config.mapping is None:
        return (digest(config),)
    named = config.model_copy(update={"mapping": Path(config.mapping).resolve().name})
    return (digest(named), digest(config))
