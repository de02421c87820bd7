"""Train, evaluate and promote a model bundle. See --help."""

from bp_spark.jobs.train import main

if __name__ == "__main__":
    main()
