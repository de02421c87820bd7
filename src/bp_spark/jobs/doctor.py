"""Is the cluster fit for a night? See --help."""

from bp_spark.cli import main

if __name__ == "__main__":
    main("doctor")
