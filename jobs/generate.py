"""Make a synthetic platform of any size. See --help."""

from bp_spark.jobs.generate import main

if __name__ == "__main__":
    main()
