"""A platform's folder: mapping, settings and secret, written from a look at the platform's files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from bp_spark.core.errors import ConfigError
from bp_spark.core.stores import UNREACHABLE, file_system
from bp_spark.ingest.onboarding import guess, write
from bp_spark.ingest.onboarding.guess import TODO, TableGuess
from bp_spark.ingest.onboarding.listing import files_matching, is_absolute
from bp_spark.ingest.onboarding.sniff import Sample, delta_sample, sample_of

MAPPING, SETTINGS, SECRET = "shop.yaml", "settings.yaml", "secret"
"""Names of the files in the folder."""


@dataclass(frozen=True)
class Start:
    """What was written.

    Attributes:
        tables: guesses for each table.
        currency: the platform's currency; TODO if nothing tells it.
        open: what a person must fill in, as ``transactions.user_id``.
    """

    tables: list[TableGuess]
    currency: str
    open: list[str]


def start(folder: Path, patterns: Mapping[str, str], currency: str | None = None, *, force: bool = False) -> Start:
    """Look at files, and write mapping, settings and secret into a folder.

    Args:
        folder: folder to write to; it is made.
        patterns: section of the mapping (``transactions``, ``items``, ...) -> path or pattern of its files, from the working
            folder.
        currency: the platform's currency; by default it is guessed.
        force: write mapping and settings anew where they exist. A secret is never replaced.

    Raises:
        ConfigError: the folder has a mapping or settings; the currency is no code of three letters.
        DataError: no file matches, or the first one can't be read.
    """
    if currency is not None and not re.fullmatch("[A-Z]{3}", currency):
        raise ConfigError("--currency: must be a code of three capital letters, as EUR")
    folder = folder.resolve()
    existing = [name for name in (MAPPING, SETTINGS) if (folder / name).exists()]
    if existing and not force:
        raise ConfigError(
            f"{folder}: has {' and '.join(existing)} already; --force writes them anew (the secret stays)"
        )
    tables: list[tuple[TableGuess, str]] = []
    for section, pattern in patterns.items():
        path = _pattern(pattern)
        sample = _look(path, f"--{'orders' if section == 'transactions' else section} {pattern}")
        guesses = guess.orders(sample) if section == "transactions" else [guess.log(sample, section)]
        # what a file of its own brings is not taken from the orders
        guesses = [table for table in guesses if table.section == section or table.section not in patterns]
        tables += [(table, _within(folder, path)) for table in guesses]
    found, why = (
        guess.currency([table for table, _ in tables]) if currency is None else (currency, "as --currency gave it")
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MAPPING).write_text(write.mapping_text(tables), encoding="utf-8")
    (folder / SETTINGS).write_text(write.settings_text(folder, found, why), encoding="utf-8")
    from bp_spark.ingest.pseudonyms import make_secret

    make_secret(folder / SECRET)
    todo = [
        f"{table.section}.{name}" for table, _ in tables for name, one in table.columns.items() if one.value == TODO
    ]
    return Start([table for table, _ in tables], found, [*todo, *(["cleaning.currency"] if found == TODO else [])])


def _pattern(pattern: str) -> str:
    """Return a pattern from the working folder as an absolute one."""
    if is_absolute(pattern):
        return pattern
    here = re.sub(r"([\[\]{}*?\\])", r"\\\1", os.getcwd())
    return os.path.normpath(f"{here}/{pattern}")


def _within(folder: Path, pattern: str) -> str:
    """Return a pattern as the mapping writes it: from the mapping's folder, if the files are in there."""
    prefix = re.sub(r"([\[\]{}*?\\])", r"\\\1", folder.as_posix()) + "/"
    return pattern.removeprefix(prefix)


def _look(pattern: str, name: str) -> Sample:
    if _is_delta(pattern):
        return delta_sample(pattern)
    return sample_of(files_matching("file:/", pattern), name)


def _is_delta(path: str) -> bool:
    """Return whether a path is the folder of a Delta table, on this machine or in an object store."""
    with suppress(*UNREACHABLE):
        files, folder = file_system(path)
        log = files.get_file_info(f"{folder.rstrip('/')}/_delta_log")
        return bool(log.type == fs.FileType.Directory)
    return False
