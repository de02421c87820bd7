"""bp-spark: the purchasing power of every user, every night, on Apache Spark."""

__version__ = "0.1.0"
