"""Erase users from every table and file. See --help."""

from bp_spark.cli import main

if __name__ == "__main__":
    main("forget")
