"""The reference pages of this folder, written from the code: ``python docs/reference.py``, or ``make reference``.

In: the declared tables, ``conf/default.yaml`` with the types of :mod:`bp_spark.core.config`, the ``bp-spark`` command. Out:
:data:`PAGES`. ``docs/features.md`` is written by ``bp-spark features``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from bp_spark.cli import app
from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.features.catalogue import catalogue, user_features_table
from bp_spark.features.labels import pretraining_set_table, training_set_table
from bp_spark.lakehouse.tables import SCORES, SCORES_LATEST, SHARED_TABLES, Column, Table

FOLDER = Path(__file__).parent
DEFAULTS = FOLDER.parent / "conf/default.yaml"
SETTING = re.compile(r"^( *)([\w.]+):(?: (.+?))?(?:  # (.+))?$")


def all_tables() -> list[Table]:
    """Every table, with the columns that it has under the default settings."""
    defaults = config.load()
    features = user_features_table(defaults.features)
    training = training_set_table(defaults.features, defaults.labels.other_horizons)
    return [*SHARED_TABLES, features, training, pretraining_set_table()]


def tables() -> str:
    """The page of the tables: what a row is, its key, how it is laid out, every column."""
    features = set(catalogue(config.load().features).names)
    found = all_tables()
    parts = [
        _head("Tables", "bp_spark/lakehouse/tables.py"),
        "Delta tables of the namespace `bp`; their comments are in the tables, too (`DESCRIBE TABLE`). *Always* says which "
        "columns are never NULL.",
        _table(["table", "what it holds"], [[f"[`{t.name}`](#{t.name})", t.comment] for t in found]),
    ]
    for table in found:
        facts = [f"Key: {_names(table.key)}."] if table.key else []
        facts += [f"Partitioned by {_names(table.partition_by)}."] if table.partition_by else []
        facts += ["Delta keeps a feed of its changes."] if table.change_feed else []
        parts += [f"## {table.name}", f"{table.comment}. {' '.join(facts)}".strip()]
        if table.name == SCORES_LATEST.name:
            parts.append(f"Its columns are those of [`{SCORES.name}`](#{SCORES.name}).")
            continue
        shown = [column for column in table.stored_columns if column.name not in features]
        if len(shown) < len(table.stored_columns):
            parts.append("Beside these columns, a `float` for each of the [features](features.md).")
        parts.append(_table(["column", "type", "always", "what it is"], [_column(column) for column in shown]))
    return _page(parts)


def configuration() -> str:
    """The page of the settings: default, values and meaning of each."""
    schema = Config.model_json_schema()
    parts = [
        _head("Settings", "conf/default.yaml"),
        "Give a file of your own with `--config`, or any of these as `section.key=value`, the value in YAML syntax. An unknown "
        "key or a wrong value is an error that names it (exit code 2).",
    ]
    rows: list[list[str]] = []
    for key, default, meaning in settings(DEFAULTS.read_text(encoding="utf-8")):
        described = _described(schema, key)
        if "properties" in described:
            parts += [_table(["setting", "default", "values", "what it is"], rows)] if rows else []
            rows = []
            parts += [f"## {key}" if "." not in key else f"### {key}", meaning]
        else:
            if "." not in key:
                parts += [_table(["setting", "default", "values", "what it is"], rows), "## Others"]
                rows = []
            rows.append([f"`{key}`", f"`{default}`" if default else "see the file", _values(described), meaning])
    return _page([*parts, _table(["setting", "default", "values", "what it is"], rows)])


def commands() -> str:
    """The page of the command: arguments and options of each subcommand, with its examples."""
    group: Any = typer.main.get_command(app.app)
    parts = [
        _head("The command", "bp_spark/cli/app.py"),
        "`bp-spark COMMAND --help` says the same. Each command takes settings as `section.key=value` "
        "([all of them](configuration.md)) and, but for `demo`, a file of settings by `--config`.",
        _table(["option before the command", "what it does"], [_option(p) for p in group.params]),
    ]
    for name, command in group.commands.items():
        said, _, example = (command.help or "").partition("Example: ")
        parts += [f"## {name}", _unwrapped(said)]
        if example:
            lines = re.split(r", then ", " ".join(example.split()))
            parts.append(
                "\n".join(["```bash", *(line if "bp-spark" in line else f"bp-spark {line}" for line in lines), "```"])
            )
        parameters = [p for p in command.params if p.name not in ("overrides", "config_file")]
        parts += [_table(["argument or option", "what it is"], [_option(p) for p in parameters])] if parameters else []
    return _page(parts)


def settings(text: str) -> Iterator[tuple[str, str, str]]:
    """Each setting and section of a commented YAML file: dotted key, default as written, meaning.

    Keys inside of a setting's own value, as those of ``search.space``, are no settings.
    """
    known = set(config._all_keys(Config))
    above: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            comment.append(line.lstrip("# "))
        elif found := SETTING.match(line):
            indent, name, default, remark = found.groups()
            above = [*above[: len(indent) // 2], name]
            if (key := ".".join(above)) in known:
                yield key, default or "", " ".join(comment) or remark or ""
            comment = []
        else:
            comment = []


PAGES: Mapping[str, Callable[[], str]] = {
    "tables.md": tables,
    "configuration.md": configuration,
    "commands.md": commands,
}
"""Page -> what writes it."""


def _described(schema: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """JSON schema of a setting; of a section, with its ``properties``."""
    found: Mapping[str, Any] = schema
    for part in key.split("."):
        found = found["properties"][part]
        if "$ref" in found:
            found = schema["$defs"][found["$ref"].rpartition("/")[2]]
    return found


def _values(described: Mapping[str, Any]) -> str:
    if "anyOf" in described:
        return " or ".join(_values(one) for one in described["anyOf"])
    if "enum" in described:
        return ", ".join(f"`{value}`" for value in described["enum"])
    kind = described.get("type", "object")
    if kind == "array":
        parts = described.get("prefixItems") or [described["items"]]
        return f"list of: {', '.join(_values(part) for part in parts)}"
    if kind == "object":
        return "mapping"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    said = [f"{sign} {described[bound]:g}" for bound, sign in bounds.items() if bound in described]
    words = {"null": "`null`", "string": described.get("format", "text"), "boolean": "`true`, `false`"}
    return f"{words.get(kind, kind)} {', '.join(said)}".strip()


def _column(column: Column) -> list[str]:
    return [f"`{column.name}`", f"`{column.type}`", "yes" if column.required else "", column.comment]


def _option(parameter: Any) -> list[str]:
    # an argument's only name is that of the Python parameter
    name = ", ".join(f"`{one}`" if one.startswith("-") else f"`{one.upper()}`" for one in parameter.opts)
    return [name, (parameter.help or "completion of the shell") + (" Required." if parameter.required else "")]


def _names(columns: tuple[str, ...]) -> str:
    return ", ".join(f"`{column}`" for column in columns)


def _unwrapped(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


def _head(title: str, origin: str) -> str:
    return f"# {title}\n\n<!-- written from {origin} by `make reference`: change it there -->"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _page(parts: list[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
