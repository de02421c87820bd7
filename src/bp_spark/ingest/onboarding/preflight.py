"""Mistakes that show before a Spark session starts: in the mapping, the secret, the currency, and the files' heads."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pyspark.sql import types as T

from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.stores import UNREACHABLE
from bp_spark.ingest.onboarding import sniff
from bp_spark.ingest.onboarding.guess import TODO
from bp_spark.ingest.onboarding.listing import FoundFile, files_matching
from bp_spark.ingest.sources.fields import partitions_of, require_columns
from bp_spark.ingest.sources.heads import likely_encoding, parquet_footer, require_utf8
from bp_spark.ingest.sources.lines import names_in_header
from bp_spark.ingest.sources.mapping import MappingFile, TableMapping, load_mapping

_HEADERS = 200
"""Files of a table whose header or footer is read."""
_LOOKED_AT = 5
"""Files of a table whose bytes are looked at."""
_TRIMMING = ("ignoreleadingwhitespace", "ignoretrailingwhitespace", "linesep")
"""Options with which Spark takes a header apart otherwise."""


@dataclass
class Preflight:
    """What the files' names and heads tell.

    Attributes:
        files: files by raw table; a Delta table has none here.
        unreadable: name of a file -> why the ingest would leave it out.
        warnings: what is no mistake for sure.
    """

    files: dict[str, list[FoundFile]] = field(default_factory=dict)
    unreadable: dict[str, DataError] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def require_ready(config: Config) -> MappingFile | None:
    """Require what an ingest needs beside data: a mapping without mistakes, a secret, a currency.

    Returns:
        The mapping, where the source has one.

    Raises:
        ConfigError: one of them is missing or wrong.
    """
    mapping = None
    if config.source.kind == "files":
        if config.source.mapping is None:
            raise ConfigError("source.mapping: must name the YAML file that describes the files")
        mapping = load_mapping(Path(config.source.mapping))
    if config.cleaning.currency == TODO:
        raise ConfigError("cleaning.currency: is TODO; write the currency of the amounts, as EUR, into the settings")
    # a secret of Databricks needs a session
    if not config.privacy.secret.startswith("databricks:"):
        from bp_spark.ingest.pseudonyms import load_secret

        load_secret(config.privacy.secret)
    return mapping


def look_at_files(name: str, mapping: MappingFile) -> Preflight:
    """List the files of a mapping, and look at their headers and first bytes.

    Args:
        name: path of the mapping file.
        mapping: what it says.

    Raises:
        DataError: there is no file of transactions, or none of those looked at can be read.
    """
    found = Preflight()
    folder = folder_of(name)
    for table, rules in mapping.tables.items():
        if rules.format in ("csv", "json") and not _is_known_encoding(rules):
            found.warnings.append(f"{rules.path}: only Spark can tell whether {rules.encoding} is an encoding")
        if rules.format == "delta":
            continue
        try:
            files = files_matching(folder, rules.path)
        except UNREACHABLE as error:
            found.warnings.append(f"{rules.path}: can't be listed without Spark ({type(error).__name__})")
            continue
        if not files and table == "raw_transactions":
            raise DataError(name, f"has no file of transactions: {rules.path!r} matches no {rules.format}")
        if not files:
            found.warnings.append(f"{table.removeprefix('raw_')}: {rules.path!r} matches no file")
        found.files[table] = files
        _look_at_table(found, rules, files, folder)
    orders = found.files.get("raw_transactions")
    if orders and all(shown(file, folder) in found.unreadable for file in orders if file.size):
        if any(file.size for file in orders):
            raise found.unreadable[next(shown(file, folder) for file in orders if file.size)]
        raise DataError(name, "all files of transactions are empty")
    return found


def folder_of(mapping: str) -> str:
    """Return the address of a mapping's folder, as :class:`bp_spark.ingest.sources.files.FilesSource` has it."""
    return f"file:{Path(mapping).resolve().parent.as_posix().rstrip('/')}/"


def shown(file: FoundFile, folder: str) -> str:
    """Return the name by which a file's delivery is called."""
    return file.address.removeprefix(folder)


def _look_at_table(found: Preflight, rules: TableMapping, files: Sequence[FoundFile], folder: str) -> None:
    filled = [file for file in files if file.size]
    for file in filled[:_HEADERS]:
        name = shown(file, folder)
        try:
            _require_encoding(found, rules, file, name, is_looked_at=file in filled[:_LOOKED_AT])
            schema = _schema(rules, file)
            if schema is not None:
                require_columns(schema, rules, name, partitions_of(file.address))
        except DataError as error:
            found.unreadable.setdefault(name, DataError(name, error.rule, column=error.column))


def _schema(rules: TableMapping, file: FoundFile) -> T.StructType | None:
    """Return the columns of a file; ``None`` where only Spark can tell them."""
    if rules.format == "parquet":
        return _parquet_schema(file)
    if rules.format != "csv" or any(option in rules.reader_options for option in _TRIMMING):
        return None
    with suppress(ValueError, LookupError):
        lines = sniff.first_lines(file, rules.encoding, rules.skip_lines + 1)
        names = names_in_header(rules, lines[-1]) if len(lines) > rules.skip_lines else []
        if names:
            return T.StructType([T.StructField(name, T.StringType()) for name in names])
    return None


def _parquet_schema(file: FoundFile) -> T.StructType | None:
    from pyspark.errors import PySparkException
    from pyspark.sql.pandas.types import from_arrow_schema

    try:
        arrow = parquet_footer(file.address).schema_arrow
    except UNREACHABLE:
        raise DataError(file.address, "can't be read: it is damaged, cut short or of another format") from None
    try:
        return from_arrow_schema(arrow)
    except PySparkException:
        return None


def _is_known_encoding(rules: TableMapping) -> bool:
    try:
        codecs.lookup(rules.encoding)
    except LookupError:
        return False
    return True


def _require_encoding(found: Preflight, rules: TableMapping, file: FoundFile, name: str, *, is_looked_at: bool) -> None:
    """Name the remedy for a file of texts in another encoding."""
    if rules.format not in ("csv", "json") or not is_looked_at:
        return
    require_utf8(rules, name, file.address)
    given, parts = rules.encoding, sniff.parts_of(file)
    likely = likely_encoding(parts)
    remedy = f"options: {{encoding: {likely}}}"
    if likely.startswith("UTF-16") and not re.match("utf-?(16|32)", given, re.IGNORECASE):
        raise DataError(name, f"is in {likely}, not in {given}: set {remedy}")
    if likely != "UTF-8" and given.upper().replace("-", "") == "UTF8":
        found.warnings.append(
            f"{name}: has bytes that are no UTF-8, and may be {likely}; if names are broken, set {remedy}"
        )
    elif likely == "UTF-8" and given.upper().replace("-", "") not in ("UTF8", "USASCII") and not _is_ascii(parts):
        found.warnings.append(f"{name}: looks like UTF-8, and the mapping says {given}")


def _is_ascii(parts: Sequence[bytes]) -> bool:
    return all(part.isascii() for part in parts)
