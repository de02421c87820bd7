"""Train, evaluate and promote a model bundle. See --help."""

from bp_spark.cli import main

if __name__ == "__main__":
    main("train")
