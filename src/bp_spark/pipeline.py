"""The stages, end to end: what the jobs, the ``bp-spark`` command and notebooks call.

Each function takes a session and the settings, reads tables, writes tables, and returns a summary of the run. A stage
whose inputs are unchanged is skipped. Every stage leaves a row in ``runs``.
"""

from bp_spark.evaluation.job import DriftResult, FairnessResult, check_drift, fairness
from bp_spark.experiments.assign import AssignResult
from bp_spark.experiments.assign import assign as assign_experiment
from bp_spark.experiments.campaign import CampaignResult, campaign_effect
from bp_spark.experiments.read import ReadResult
from bp_spark.experiments.read import read as read_experiment
from bp_spark.experiments.size import SizeResult
from bp_spark.experiments.size import size as size_experiment
from bp_spark.experiments.uplift import UpliftResult
from bp_spark.experiments.uplift import uplift as uplift_experiment
from bp_spark.features.job import featurize, replay_quarantine
from bp_spark.governance.erasure import forget
from bp_spark.governance.key_rotation import rotate_keys
from bp_spark.governance.maintenance import maintain
from bp_spark.governance.retention import retain
from bp_spark.ingest.quarantine import quarantine_by_rule
from bp_spark.recommend.job import recommend
from bp_spark.report.job import ReportResult, report
from bp_spark.scoring.active_learning.job import SelectResult, add_labels, select_labels
from bp_spark.scoring.counterfactual import what_if
from bp_spark.scoring.job import ScoreResult, score
from bp_spark.scoring.lineage import Reproduction, reproduce
from bp_spark.scoring.profiles.job import profile
from bp_spark.training.adapt_language import adapt_language
from bp_spark.training.backtest import BacktestResult, backtest
from bp_spark.training.job import TrainResult, train
from bp_spark.training.search import SearchResult, search

__all__ = [
    "AssignResult",
    "BacktestResult",
    "CampaignResult",
    "DriftResult",
    "FairnessResult",
    "ReadResult",
    "ReportResult",
    "Reproduction",
    "ScoreResult",
    "SearchResult",
    "SelectResult",
    "SizeResult",
    "TrainResult",
    "UpliftResult",
    "adapt_language",
    "add_labels",
    "assign_experiment",
    "backtest",
    "campaign_effect",
    "check_drift",
    "fairness",
    "featurize",
    "forget",
    "maintain",
    "profile",
    "quarantine_by_rule",
    "read_experiment",
    "recommend",
    "replay_quarantine",
    "report",
    "reproduce",
    "retain",
    "rotate_keys",
    "score",
    "search",
    "select_labels",
    "size_experiment",
    "train",
    "uplift_experiment",
    "what_if",
]
