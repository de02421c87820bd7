"""The version of the package, recorded with every row that it computes."""

__version__ = "0.2.0"
