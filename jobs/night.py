"""Run a whole night. See --help."""

from bp_spark.jobs.night import main

if __name__ == "__main__":
    main()
