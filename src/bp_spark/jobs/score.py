"""Score every user of a date. See --help."""

from bp_spark.cli import main

if __name__ == "__main__":
    main("score")
