"""Make a synthetic platform of any size. See --help."""

from bp_spark.cli import main

if __name__ == "__main__":
    main("generate")
