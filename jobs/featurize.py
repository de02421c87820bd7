"""Ingest, clean, and build user features for as-of dates. See --help."""

from bp_spark.jobs.featurize import main

if __name__ == "__main__":
    main()
