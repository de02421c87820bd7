"""Write the reference pages and the file of default settings from the code: ``python docs/reference.py``, ``make reference``.

The sources are the declared tables, the sections of :mod:`bp_spark.core.config` and the ``bp-spark`` command. :data:`FILES`
lists what is written. ``bp-spark features`` writes ``docs/features.md``.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bp_spark.cli import app
from bp_spark.core.config import Config, Section, subsection
from bp_spark.features.catalogue import catalogue, user_features_table
from bp_spark.features.labels import pretraining_set_table, training_set_table
from bp_spark.lakehouse.schema import Column, Table
from bp_spark.lakehouse.tables import SCORES, SCORES_LATEST, SHARED_TABLES

ROOT = Path(__file__).parents[1]
WIDTH = 120
"""Characters of the longest comment line in the file of settings."""


def all_tables() -> list[Table]:
    """Return every table, with the columns that it has under the default settings."""
    defaults = Config()
    features = user_features_table(defaults.features)
    training = training_set_table(defaults.features, defaults.labels.other_horizons)
    return [*SHARED_TABLES, features, training, pretraining_set_table()]


def tables() -> str:
    """Return the page of the tables: what a row is, its key, how it is laid out, every column."""
    features = set(catalogue(Config().features).names)
    tables = all_tables()
    parts = [
        _head("Tables", "bp_spark/lakehouse/tables/"),
        "Delta tables of the namespace `bp`; their comments are in the tables, too (`DESCRIBE TABLE`). *Always* says which "
        "columns are never NULL.",
        _table(["table", "what it holds"], [[f"[`{table.name}`](#{table.name})", table.comment] for table in tables]),
    ]
    for table in tables:
        facts = [f"Key: {_names(table.key)}."] if table.key else []
        facts += [f"Partitioned by {_names(table.partition_by)}."] if table.partition_by else []
        facts += ["Delta keeps a feed of its changes."] if table.change_feed else []
        parts += [f"## {table.name}", f"{table.comment}. {' '.join(facts)}".strip()]
        if table.name == SCORES_LATEST.name:
            parts.append(f"Its columns are those of [`{SCORES.name}`](#{SCORES.name}).")
            continue
        has_all_features = features <= {column.name for column in table.columns}
        left_out = features if has_all_features else set()
        listed_columns = [column for column in table.stored_columns if column.name not in left_out]
        if has_all_features:
            parts.append("Beside these columns, a `float` for each of the [features](features.md).")
        parts.append(_table(["column", "type", "always", "what it is"], [_column(column) for column in listed_columns]))
    return _page(parts)


# --- settings ----------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A setting, or a section, which has no field."""

    key: str
    text: str
    schema: Mapping[str, Any]
    field: FieldInfo | None

    @property
    def default(self) -> Any:
        """The default; ``None``, too, for what follows from other settings."""
        assert self.field is not None
        return None if self.field.default_factory else self.field.default


def settings(section: type[Section] = Config, prefix: str = "") -> Iterator[Setting]:
    """Yield each section and setting, in the order of the code, a section before its settings.

    Args:
        section: where to look.
        prefix: put before each key.
    """
    schema = section.model_json_schema()
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        if nested := subsection(field.annotation):
            yield Setting(key, _plain(inspect.getdoc(nested) or ""), {}, None)
            yield from settings(nested, f"{key}.")
        else:
            yield Setting(key, field.description or "", schema["properties"][name], field)


def described_settings(section: type[Section] = Config) -> tuple[int, int]:
    """Return how many settings have exactly one description in the code, and how many settings there are.

    A docstring below a field with a ``description`` is a second one.

    Args:
        section: where to look.
    """
    all_settings = [setting for setting in settings(section) if setting.field is not None]
    docstrings = _docstrings_below_fields(section)
    return sum(bool(setting.text) and setting.key not in docstrings for setting in all_settings), len(all_settings)


def default_file() -> str:
    """Return the file of settings: each with its default, below its description as a comment."""
    lines = [
        "# Every setting with its default, written from the code by `make reference`. Change settings in a copy, given with",
        "# --config, or on the command line as section.key=value.",
    ]
    for setting in settings():
        depth = setting.key.count(".")
        indent = "  " * depth
        if not depth:
            lines.append("")
        text = setting.text if setting.field is None else _with_choices(setting)
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
        )
        name = setting.key.rpartition(".")[2]
        if setting.field is None:
            lines.append(f"{indent}{name}:")
        elif isinstance(setting.default, dict):
            lines.append(f"{indent}{name}:")
            lines += [f"{indent}  {key}: {_yaml(value)}" for key, value in setting.default.items()]
        else:
            lines.append(f"{indent}{name}: {_yaml(setting.default)}")
    return "\n".join(lines) + "\n"


def configuration() -> str:
    """Return the page of the settings: default, values and description of each."""
    head = ["setting", "default", "values", "what it is"]
    parts = [
        _head("Settings", "bp_spark/core/config"),
        "Give a file of your own with `--config`, or any of these as `section.key=value`, the value in YAML syntax. An unknown "
        "key or a wrong value is an error that names it (exit code 2).",
    ]
    rows: list[list[str]] = []
    for setting in settings():
        is_section, depth = setting.field is None, setting.key.count(".")
        if rows and (is_section or not depth):
            parts.append(_table(head, rows))
            rows = []
        text = re.sub(r"\bdocs/([\w-]+\.md)", r"[docs/\1](\1)", setting.text)
        if is_section:
            parts += [f"##{'#' * depth} {setting.key}", text]
        else:
            parts += [] if depth else ["## Others"]
            default = "see the file" if isinstance(setting.default, dict) else f"`{_yaml(setting.default)}`"
            rows.append([f"`{setting.key}`", default, _values(setting.schema), text])
    return _page([*parts, _table(head, rows)])


def _plain(docstring: str) -> str:
    return " ".join(docstring.replace("``", "`").split())


def _docstrings_below_fields(section: type[Section], prefix: str = "") -> set[str]:
    """Return the keys of the fields that a text follows in the source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    keys = {
        f"{prefix}{statement.target.id}"
        for statement, following in pairwise(definition.body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }
    for name, field in section.model_fields.items():
        if nested := subsection(field.annotation):
            keys |= _docstrings_below_fields(nested, f"{prefix}{name}.")
    return keys


def _with_choices(setting: Setting) -> str:
    """Return the description, and the choices that a setting has unless the description names each of them."""
    choices = setting.schema.get("enum") or setting.schema.get("items", {}).get("enum") or []
    if all(f"`{choice}`" in setting.text for choice in choices):
        return setting.text
    return f"{setting.text} {'One' if 'enum' in setting.schema else 'Any'} of: {', '.join(choices)}."


def _yaml(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
    if isinstance(value, float):
        # YAML takes 5e-05 for a text
        return f"{Decimal(repr(value)):f}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, str) and " " in value:
        return json.dumps(value, ensure_ascii=False)
    return yaml.safe_dump(value, allow_unicode=True, width=1000).removesuffix("\n").removesuffix("\n...")


def _values(schema: Mapping[str, Any]) -> str:
    """Return what values a setting takes, in words."""
    if "anyOf" in schema:
        return " or ".join(_values(alternative) for alternative in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type", "object")
    if kind == "array":
        parts = schema.get("prefixItems") or [schema["items"]]
        return f"list of: {', '.join(_values(part) for part in parts)}"
    if kind == "object":
        return "mapping"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[bound]:g}" for bound, sign in signs.items() if bound in schema]
    words = {"null": "`null`", "string": schema.get("format", "text"), "boolean": "`true`, `false`"}
    return f"{words.get(kind, kind)} {', '.join(bounds)}".strip()


# --- the command -------------------------------------------------------------------------------------------------------


def commands() -> str:
    """Return the page of the command: arguments and options of each subcommand, with its examples."""
    group: Any = typer.main.get_command(app.app)
    parts = [
        _head("The command", "bp_spark/cli"),
        "`bp-spark COMMAND --help` says the same. Each command takes settings as `section.key=value` "
        "([all of them](configuration.md)) and, but for `demo`, a file of settings by `--config`. "
        "`init` and `settings` take none.",
        _table(["option before the command", "what it does"], [_option(parameter) for parameter in group.params]),
    ]
    for name, command in _subcommands(group):
        purpose, _, example = (command.help or "").partition("Example: ")
        parts += [f"## {name}", _unwrapped(purpose)]
        if example:
            lines = re.split(r", then ", " ".join(example.split()))
            parts.append(
                "\n".join(["```bash", *(line if "bp-spark" in line else f"bp-spark {line}" for line in lines), "```"])
            )
        parameters = [p for p in command.params if p.name not in ("overrides", "config_file")]
        parts += [_table(["argument or option", "what it is"], [_option(p) for p in parameters])] if parameters else []
    return _page(parts)


def _subcommands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each command with its name, as ``experiment read`` for one of a group."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _subcommands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _option(parameter: Any) -> list[str]:
    # an argument has no name but that of the Python parameter
    name = ", ".join(f"`{each}`" if each.startswith("-") else f"`{each.upper()}`" for each in parameter.opts)
    return [name, (parameter.help or "completion of the shell") + (" Required." if parameter.required else "")]


def _unwrapped(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


# --- Markdown ----------------------------------------------------------------------------------------------------------


def _column(column: Column) -> list[str]:
    return [f"`{column.name}`", f"`{column.type}`", "yes" if column.required else "", column.comment]


def _names(columns: tuple[str, ...]) -> str:
    return ", ".join(f"`{column}`" for column in columns)


def _head(title: str, origin: str) -> str:
    return f"# {title}\n\n<!-- written from {origin} by `make reference`: change it there -->"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _page(parts: list[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


FILES: Mapping[str, Callable[[], str]] = {
    "docs/tables.md": tables,
    "docs/configuration.md": configuration,
    "docs/commands.md": commands,
    "src/bp_spark/conf/default.yaml": default_file,
}
"""File, relative to the checkout -> the function that returns its text."""


if __name__ == "__main__":
    for path, content in FILES.items():
        (ROOT / path).write_text(content(), encoding="utf-8")
