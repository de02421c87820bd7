"""The page of a scoring run: what ran, users and money, reasons, data quality, drift and fairness, and the model.

It is one HTML document, made from few rows of the tables and of :mod:`bp_spark.report.population`. No user is in it. Groups
with fewer than ``privacy.smallest_group`` users have no figures, and neither have groups that would reveal them. Rows in
quarantine and events are counted whole: they are not users.
"""
