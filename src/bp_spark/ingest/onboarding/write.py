"""Text of the files that ``bp-spark init`` writes: mapping and settings, with reasons and doubts as comments."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bp_spark.ingest.onboarding.guess import TODO, TableGuess

_WIDTH = 120
_YAML_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
_MAPPING_HEAD = """\
# Written by `bp-spark init` from a look at some rows. Each guess has its reason above it: read them, and change what is wrong.
# Then run `bp-spark check`. docs/mapping.md describes each key.
"""


def mapping_text(tables: Sequence[tuple[TableGuess, str]]) -> str:
    """Return a mapping.

    Args:
        tables: each table, with the path of its files.
    """
    return "\n".join([_MAPPING_HEAD, *("\n".join([*_table_lines(table, path), ""]) for table, path in tables)])


def settings_text(folder: Path, currency: str, why: str) -> str:
    """Return settings by which all that a platform needs lies in a folder.

    Args:
        folder: absolute path of the folder with ``shop.yaml`` and ``secret``.
        currency: the platform's currency.
        why: reason of the currency.
    """
    values: dict[str, Any] = {
        "source": {"kind": "files", "mapping": f"{folder}/shop.yaml"},
        "cleaning": {"currency": currency},
        "privacy": {"secret": f"file:{folder}/secret"},
        "tables": {"path": f"{folder}/lakehouse"},
        "bundles": f"{folder}/bundles",
        "training": {"work_dir": f"{folder}/work"},
        "evaluation": {"reports": f"{folder}/reports"},
        "tracking": {
            "uri": f"sqlite:///{folder}/tracking/mlflow.db",
            "artifacts": f"{folder}/tracking/artifacts",
        },
    }
    comments = {
        "cleaning": f"{'TODO: ' if currency == TODO else ''}currency of the amounts: {why}",
        "privacy": "it makes the users' keys: keep a copy, for another secret gives users other keys",
    }
    lines = [
        "# Written by `bp-spark init`; `bp-spark settings` prints all settings. Only what differs from them stands here."
    ]
    for key, value in values.items():
        lines += _comment_lines(comments[key], "") if key in comments else []
        if isinstance(value, Mapping):
            lines += [f"{key}:", *(f"  {name}: {flow(inner)}" for name, inner in value.items())]
        else:
            lines.append(f"{key}: {flow(value)}")
    return "\n".join([*lines, ""])


def _table_lines(table: TableGuess, path: str) -> list[str]:
    sample = table.sample
    lines = [f"{table.section}:", f"  path: {flow(path)}", f"  format: {sample.format}"]
    if sample.options:
        lines.append(f"  options: {flow(sample.options)}")
    if sample.skip_lines:
        lines.append(f"  skip_lines: {sample.skip_lines}")
    if sample.explode:
        lines.append(f"  explode: {flow(sample.explode)}")
    if table.timezone:
        lines += [*_comments(table.timezone.comments, "  "), f"  timezone: {table.timezone.value}"]
    lines += _comments(table.comments, "  ")
    if table.where:
        lines.append(f"  where: {flow(table.where)}")
    if table.per_order:
        lines.append(f"  per_order: [{', '.join(table.per_order)}]")
    lines.append("  columns:")
    for name, guess in table.columns.items():
        lines += [*_comments(guess.comments, "    "), f"    {name}: {flow(guess.value)}"]
    return lines


def _comments(comments: Sequence[str], indent: str) -> list[str]:
    return [line for comment in comments for line in _comment_lines(comment, indent)]


def _comment_lines(comment: str, indent: str) -> list[str]:
    begin = f"{indent}# "
    clean = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", comment)
    return textwrap.wrap(clean, _WIDTH, initial_indent=begin, subsequent_indent=f"{begin}  ", break_long_words=False)


def flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(inner)}" for key, inner in value.items()) + "}"
    if (
        isinstance(value, str)
        and re.fullmatch(r"[A-Za-z_][\w.]*", value, re.ASCII)
        and value.lower() not in _YAML_WORDS
    ):
        return value
    return json.dumps(value, ensure_ascii=False)
