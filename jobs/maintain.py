"""Join small files and delete old ones. See --help."""

from bp_spark.jobs.maintain import main

if __name__ == "__main__":
    main()
