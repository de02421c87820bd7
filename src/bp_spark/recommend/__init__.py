"""Recommendations: items for each scored user, with the reason.

Candidates are the user's own items, those of users alike by implicit ALS, and those that users of the same level buy
(:mod:`bp_spark.recommend.candidates`). A logistic regression ranks them. It learns from what users bought in the last 28 days
among the candidates of the day before these (:mod:`bp_spark.recommend.ranking`).
"""
