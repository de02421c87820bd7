"""Write the page of a night. See --help."""

from bp_spark.jobs.report import main

if __name__ == "__main__":
    main()
