"""The jobs of ``jobs/`` as modules of the package: ``python -m bp_spark.jobs.score --help``."""
