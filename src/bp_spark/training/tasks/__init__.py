"""The three kinds of training that :func:`bp_spark.training.fit.fit` runs."""
