"""bp-spark: the purchasing power of every user, every night, on Apache Spark."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from bp_spark.core.version import __version__

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from bp_spark.shop import Shop

# `open` is left out: a star import would replace Python's own.
__all__ = ["__version__", "open_demo"]


def open(
    settings: str | PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    spark: SparkSession | None = None,
) -> Shop:
    """Open a platform: its settings, tables and stages in one object.

    Only the settings are read. Spark starts at the first use.

    Args:
        settings: YAML file with any subset of the settings; without one, the defaults. `bp-spark settings` prints them all.
        overrides: Settings as `section.key=value`, applied last.
        spark: Session to work in; by default the active one (Databricks, a notebook), else a new local one.

    Raises:
        ConfigError: The file can't be read, a setting is unknown, or a value has the wrong type or range.

    Example:
        ```python
        import bp_spark

        shop = bp_spark.open("settings.yaml")
        shop.score("2024-10-01")
        shop.table("scores_latest").show()
        ```
    """
    from bp_spark.core import config
    from bp_spark.shop import Shop

    return Shop(config.load(None if settings is None else str(settings), overrides), spark)


def open_demo(overrides: Sequence[str] = (), spark: SparkSession | None = None) -> Shop:
    """Open the platform of `bp-spark demo`: public data of a grocer, with all tables in `demo/` of the working folder.

    Needs `pip install 'bp-spark[demo]'`. The environment variable `BP_SPARK_SETTINGS` may hold more settings, as a shell
    splits them.

    Args:
        overrides: Settings as `section.key=value`, applied last.
        spark: As in `open`.

    Example:
        ```python
        import bp_spark

        shop = bp_spark.open_demo(["source.sample=0.1"])
        shop.featurize("2017-10-03")
        ```
    """
    from bp_spark import shop

    return shop.open_demo(overrides, spark)
