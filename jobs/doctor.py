"""Check whether the cluster is fit for a night. See --help."""

from bp_spark.jobs.doctor import main

if __name__ == "__main__":
    main()
