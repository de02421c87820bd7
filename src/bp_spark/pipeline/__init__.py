"""The stages, end to end: what the jobs, the ``bp-spark`` command and notebooks call.

Each function takes a session and a configuration, reads tables, writes tables, and returns what a person wants to know of
the run. A stage whose inputs are unchanged is skipped; every stage leaves a row in ``runs``.
"""

from bp_spark.pipeline.backtesting import BacktestResult, backtest
from bp_spark.pipeline.erasing import forget, retain, rotate_keys
from bp_spark.pipeline.featurizing import featurize, quarantine_by_rule, replay_quarantine
from bp_spark.pipeline.imagining import what_if
from bp_spark.pipeline.labelling import SelectResult, add_labels, select_labels
from bp_spark.pipeline.language import adapt_language
from bp_spark.pipeline.lineage import Origin, Reproduction, explain_run, explain_score, reproduce
from bp_spark.pipeline.monitoring import DriftResult, FairnessResult, check_drift, fairness
from bp_spark.pipeline.nights import ScoreResult, score
from bp_spark.pipeline.profiling import profile
from bp_spark.pipeline.reporting import ReportResult, report
from bp_spark.pipeline.searching import SearchResult, search
from bp_spark.pipeline.training import TrainResult, train

__all__ = [
    "BacktestResult",
    "DriftResult",
    "FairnessResult",
    "Origin",
    "ReportResult",
    "Reproduction",
    "ScoreResult",
    "SearchResult",
    "SelectResult",
    "TrainResult",
    "adapt_language",
    "add_labels",
    "backtest",
    "check_drift",
    "explain_run",
    "explain_score",
    "fairness",
    "featurize",
    "forget",
    "profile",
    "quarantine_by_rule",
    "replay_quarantine",
    "report",
    "reproduce",
    "retain",
    "rotate_keys",
    "score",
    "search",
    "select_labels",
    "train",
    "what_if",
]
