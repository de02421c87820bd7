"""The version of the package, recorded with every row that it computes."""

__version__ = "0.1.0"
