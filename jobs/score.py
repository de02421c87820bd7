"""Score every user of a date. See --help."""

from bp_spark.jobs.score import main

if __name__ == "__main__":
    main()
