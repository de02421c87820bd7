"""Erase users from every table and file. See --help."""

from bp_spark.jobs.forget import main

if __name__ == "__main__":
    main()
