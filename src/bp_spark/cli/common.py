"""What the commands share: their options, their settings and their Spark session."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bp_spark.core import config
from bp_spark.core.config import Config

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

DEFAULT_CONFIG = Path("conf/default.yaml")
"""Settings file that is read where no other one is given."""
MODEL_COMMANDS = ("train", "backtest", "search", "night", "score", "reproduce", "select-labels")
"""Commands whose Python workers import the model's libraries once, before the first task."""
BRIEF_COMMANDS = ("doctor",)
"""Commands whose Spark session sees a few rows, whatever the size of the tables."""


class Engine(StrEnum):
    """What reads tables for a command that only looks."""

    auto = "auto"
    duckdb = "duckdb"
    spark = "spark"


_OVERRIDES_HELP = (
    "Settings to override, as section.key=value; `bp-spark settings` prints all of them with their defaults."
)
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML file of settings; by default conf/default.yaml where it exists."),
]
Overrides = Annotated[list[str] | None, typer.Argument(help=_OVERRIDES_HELP, metavar="[KEY=VALUE]...")]

BundleOption = Annotated[
    str | None,
    typer.Option(
        help="Folder of a model bundle, or models:/NAME@ALIAS of the registry; by default the promoted bundle."
    ),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Refuse all new files if one can't be read; by default that one is left out.")
]
EngineOption = Annotated[
    Engine,
    typer.Option(help="What reads the tables; auto: DuckDB where it can, else Spark."),
]


def load_settings(file: Path | None, overrides: Sequence[str] | None) -> Config:
    """Load the settings from the given file, else from :data:`DEFAULT_CONFIG`, and apply the overrides."""
    if file is None and DEFAULT_CONFIG.exists():
        file = DEFAULT_CONFIG
    return config.load(file, overrides or ())


def start_session(settings: Config, command: str) -> SparkSession:
    """Return the Spark session that a command works in."""
    from bp_spark.core.session import BRIEF, MODEL_MODULES, get_session

    worker_imports = MODEL_MODULES if command in MODEL_COMMANDS else ()
    start_settings = BRIEF if command in BRIEF_COMMANDS else {}
    return get_session(settings, f"bp-spark {command}", worker_imports, start_settings)
