"""From a YAML file and ``key=value`` overrides to a :class:`Config`, and from a configuration to its digest."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from bp_spark.core.config.composed import Config, all_keys, suggestion
from bp_spark.core.errors import ConfigError

DEFAULT_FILE = Path(__file__).parents[2] / "conf" / "default.yaml"
"""Every setting with its default and its description; ``conf/default.yaml`` of a checkout is a link to it."""
DEMO_FILE = DEFAULT_FILE.with_name("demo.yaml")
"""The settings of ``bp-spark demo``: the defaults, with all that it writes under ``demo/`` of the working folder."""
SECRETS = ("privacy.secret", "signing.private_key", "signing.public_key")
"""Settings whose value no message shows, because it may be the secret itself."""
RENAMED: Mapping[str, str] = {"features.silence_digits": "features.recency_precision_bits"}
"""Old name of a setting -> its new name, in the same section. Files and overrides may go on using the old one."""

logger = logging.getLogger(__name__)


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: a YAML file with any subset of the keys; ``None`` for the defaults.
        overrides: ``section.key=value`` strings, values in YAML syntax, applied last.

    Raises:
        ConfigError: the file is missing or no YAML mapping; a key is unknown; a value has the wrong type or range; a
            setting has both its old and its new name.

    >>> load(overrides=["labels.horizon_days=60"]).labels.horizon_days
    60
    """
    source = "configuration" if path is None else str(path)
    values = {} if path is None else _read(Path(path), source)
    _use_new_names(values, source)
    given_keys = []
    for number, override in enumerate(overrides, 1):
        key, text = _split(override, number)
        given_keys.append(key)
        _set(values, RENAMED.get(key, key), text)
        # old names may stand in the value, too, where it is a whole section
        _use_new_names(values, f"override {number}")
    for key in RENAMED.keys() & given_keys:
        _announce("override", key, given_keys)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(source, error)) from None


def parse_yaml(text: str) -> Any:
    """Return the values of a YAML text.

    Raises:
        ValueError: the text is no YAML or is nested too deeply, or a value is none of its kind, as ``2024-13-45`` is no date.
    """
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        # without the line itself: it may hold a secret
        place = (
            f" in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
            if error.problem_mark
            else ""
        )
        raise ValueError(f"{error.problem or error.context}{place}") from None
    except Exception as error:  # PyYAML lets Python's own errors of all kinds through where it can't make a value
        raise ValueError(str(error) or type(error).__name__) from error


def changed(config: Config, settings: Mapping[str, object]) -> Config:
    """Return the configuration with other values of some settings.

    Args:
        config: the configuration to change.
        settings: ``section.key`` -> value.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or range.
    """
    # a value that was not given may follow from a changed one, as the sizes do from network.size
    values = config.model_dump(exclude_unset=True)
    for key, value in settings.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain("search", error)) from None


def digest(*parts: object) -> str:
    """Return a short SHA-256 of anything that JSON can hold, sections included: the identity of a stage's inputs."""

    def plain(value: object) -> object:
        return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)

    text = json.dumps(parts, default=plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_date(text: str) -> date:
    """Return the date of a text ``YYYY-MM-DD``.

    Raises:
        ConfigError: the text is no such date.
    """
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"date {text!r}: must be YYYY-MM-DD") from None


# --- reading -----------------------------------------------------------------------------------------------------------


def _read(path: Path, source: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{source}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: must be UTF-8 text: {error}") from error
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{source}: not YAML: {error}") from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{source}: must be a mapping of sections, not a {type(values).__name__}")
    return values or {}


def _split(override: str, number: int) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    if not equals:
        # the message shows no more than a key, because the rest may be a secret
        likely_key = max((each for each in all_keys() if override.startswith(each)), key=len, default="")
        of_key = f", of {likely_key}," if likely_key else ""
        raise ConfigError(f"override {number}{of_key}: must be section.key=value")
    return key.strip(), text


def _set(values: dict[str, Any], key: str, text: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {key}: {parent} is a value, not a section")
        values = child
    try:
        values[last] = parse_yaml(text)
    except ValueError:
        shown_text = "what was given" if _may_hold_secret(key) else repr(_redacted(text))
        raise ConfigError(f"override {key}: {shown_text} is not a YAML value") from None


def _use_new_names(values: dict[str, Any], source: str) -> None:
    """Rename the settings that a file or an override gives by their old names, in place."""
    for old, new in RENAMED.items():
        *parents, old_name = old.split(".")
        new_name = new.rpartition(".")[2]
        section: Any = values
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and old_name in section:
            _announce(source, old, [new] if new_name in section else [])
            section[new_name] = section.pop(old_name)


def _announce(source: str, old: str, given_keys: Collection[str]) -> None:
    """Log the new name of a setting, or raise ``ConfigError`` if the setting is given by that name, too."""
    new = RENAMED[old]
    if new in given_keys:
        raise ConfigError(f"{source}: {old} is the old name of {new}: give the new one only")
    logger.warning("%s: %s is now called %s", source, old, new)


# --- messages ----------------------------------------------------------------------------------------------------------


def _explain(source: str, error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{source}: unknown key {key}{suggestion(key)}")
        elif not key:
            lines.append(f"{source}: {problem['msg']}")
        elif key in SECRETS:  # the value may be the secret itself
            lines.append(
                f"{source}: {key}: must be env:NAME, file:PATH or databricks:SCOPE/KEY, which says where the secret is"
            )
        elif problem["type"] != "default_factory_not_called":  # it follows from another problem of the same section
            shown_value = "" if _may_hold_secret(key) else f" (got {_redacted(repr(problem['input']))})"
            lines.append(f"{source}: {key}: {problem['msg']}{shown_value}")
    return "\n".join(lines)


def _may_hold_secret(key: str) -> bool:
    return any(f"{secret}.".startswith(f"{key}.") for secret in SECRETS)


def _redacted(text: str) -> str:
    """Return the text without possible passwords of an address: before its ``@``, and after its ``?``."""
    return re.sub(r"(://\S*)\?[^\s'\"]*", r"\1?…", re.sub(r"://\S*@", "://…@", text))
