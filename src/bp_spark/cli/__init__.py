"""The ``bp-spark`` command."""

from bp_spark.cli.app import main

__all__ = ["main"]
