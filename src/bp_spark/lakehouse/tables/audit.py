"""The record: runs, metrics, trials, drift and fairness."""

from bp_spark.lakehouse.schema import Table, columns

RUNS = Table(
    "runs",
    "One row per stage that ran: its input and output versions, status and figures",
    columns(
        ("run_id", "string!", "Identity of the run: one call of a job"),
        ("job", "string", "Name of the job: featurize, train, score, ..."),
        (
            "stage",
            "string!",
            "ingest, clean, featurize, label, score, ...; the name of the job for an error between two stages",
        ),
        ("started_at", "timestamp!", "Start, UTC"),
        ("seconds", "double!", "Duration in seconds"),
        ("status", "string!", "done, unchanged or failed"),
        ("error", "string", "Error in one line, where the stage failed"),
        ("rows_in", "bigint", "Rows read, where the stage counts them"),
        ("rows_out", "bigint", "Rows produced, where the stage counts them"),
        ("read", "map<string,bigint>", "Table -> Delta version of each table read since the stage before"),
        ("written", "map<string,bigint>", "Table -> Delta version of each table written"),
        ("inputs", "string", "Digest of the stage's inputs; the same digest gives the same result"),
        ("code_version", "string!", "Version of bp-spark"),
        ("config_digest", "string", "Digest of all settings of the run"),
        ("figures", "map<string,string>", "Other figures of the stage"),
    ),
    key=("run_id", "stage"),
)
METRICS = Table(
    "metrics",
    "Evaluation of each trained bundle and its members",
    columns(
        ("run_id", "string!", "Training run"),
        ("bundle_digest", "string!", "Digest of the bundle; a refitted bundle has the figures of the evaluated one"),
        ("test_date", "date!", "Evaluation date; the evaluated models were not trained on the horizon after it"),
        ("population", "string!", "all, seen or unseen users"),
        (
            "member",
            "string!",
            "linear, btyd, trees, sqrt_trees, transformer or fused; fused_30d and transformer_30d predict 30 days",
        ),
        ("metric", "string!", "Name of the metric"),
        ("value", "double", "Value of the metric"),
        ("users", "bigint!", "Users that the value is computed over"),
    ),
    key=("run_id", "population", "member", "metric"),
)
BACKTESTS = Table(
    "backtests",
    "Evaluation of the pipeline at past dates, with bootstrap intervals",
    columns(
        ("backtest_id", "string!", "Identity of the backtest; names the folder of its report"),
        ("run_id", "string!", "Training run at the test date"),
        ("test_date", "date!", "Evaluation date; models were trained on data known by then"),
        ("population", "string!", "all, seen or unseen users, or the segment that scores were compared with"),
        ("member", "string!", "linear, btyd, trees, transformer, mean of trees and transformer, or fused"),
        ("peer", "string", "NULL: value is the member's own; otherwise value is the member's minus the peer's"),
        ("metric", "string!", "Name of the metric"),
        ("value", "double", "Value of the metric"),
        ("low", "double", "Lower end of the 90 % bootstrap interval over users (percentile method)"),
        ("high", "double", "Upper end of the bootstrap interval"),
        ("better", "double", "Share of resamples in which the member is better than the peer; ties count half"),
        ("resamples", "int!", "Number of resamples behind the interval"),
        ("users", "bigint!", "Users that the value is computed over"),
    ),
    key=("backtest_id", "test_date", "population", "member", "peer", "metric"),
)
TRIALS = Table(
    "trials",
    "Trials of a search for better settings",
    columns(
        ("run_id", "string!", "Run of the search"),
        ("test_date", "date!", "Evaluation date; only data before this day were used"),
        ("trial", "int!", "Number of the trial; 0 is the settings before the search"),
        ("settings", "map<string,string>", "Setting -> value that was tried"),
        ("metric", "string!", "Name of the metric that the search optimises"),
        ("value", "double", "Value of the metric for the fused out-of-fold predictions; NULL where the trial failed"),
        ("seconds", "double!", "Duration in seconds"),
        ("error", "string", "Why the trial failed"),
    ),
    key=("run_id", "trial"),
)
DRIFT_REFERENCE = Table(
    "drift_reference",
    "Histograms of features and score over a bundle's training users; drift checks compare with them",
    columns(
        ("bundle_digest", "string!", "Digest of the bundle"),
        ("subject", "string!", "Name of the feature, or score"),
        (
            "edges",
            "array<double>!",
            "Rising borders between bins; a bin holds values above its lower border, up to its upper border",
        ),
        (
            "counts",
            "array<bigint>!",
            "Rows in each bin; two more than edges: the bin above the last border, then missing values",
        ),
        ("run_id", "string!", "Run that counted the rows"),
    ),
    key=("bundle_digest", "subject"),
    partition_by=("bundle_digest",),
)
DRIFT = Table(
    "drift",
    "Drift of population, scores and errors, by scored date",
    columns(
        ("run_id", "string!", "Run of the drift check"),
        ("score_date", "date!", "Scored date that was checked"),
        ("bundle_digest", "string!", "Digest of the bundle that made the scores"),
        (
            "kind",
            "string!",
            "feature or score: distribution; levels: changes of level; stability: scores that moved; realised: scores of an "
            "earlier date, whose horizon is over, against actual spend",
        ),
        (
            "subject",
            "string!",
            "Feature, score, level before and now as A>B (new: no score before, gone: no score now), or the earlier date",
        ),
        ("metric", "string!", "psi, ks; share; moved, changed_level; spearman, gini, mae, coverage, calibration, ..."),
        ("against", "string", "What the value compares with: training, or the date scored before; NULL: neither"),
        ("value", "double", "Value of the metric; NULL where it is undefined"),
        (
            "reference",
            "double",
            "Expected value: coverage as set, calibration 1, rank metrics of the test date",
        ),
        ("threshold", "double", "Threshold beyond which the value raises an alarm; NULL: never"),
        ("broken", "boolean!", "Whether the value is beyond the threshold"),
        ("users", "bigint!", "Users that the value is computed over"),
        ("note", "string", "Remark on the value"),
    ),
    key=("score_date", "kind", "subject", "metric", "against"),
    partition_by=("score_date",),
)
FAIRNESS = Table(
    "fairness",
    "Scores and errors by segment of users, each group against all others; for people, never for models",
    columns(
        ("run_id", "string!", "Run of the fairness report"),
        ("score_date", "date!", "Scored date of the report"),
        (
            "measured_date",
            "date!",
            "Date whose scores are measured: score_date, or the newest date whose horizon was over",
        ),
        ("bundle_digest", "string!", "Digest of the bundle that made these scores"),
        ("segment", "string!", "Segment of raw_users"),
        (
            "group",
            "string!",
            "Value of the segment; (all): all but suppressed users; (not given): no value; (small groups): merged groups",
        ),
        ("users", "bigint!", "Number of users in the group"),
        ("small", "boolean!", "Whether the group is too small to rely on the interval"),
        (
            "metric",
            "string!",
            "score, level_A to level_E; after the horizon also mae, relative_error, calibration, coverage, top_found",
        ),
        ("value", "double", "Value of the metric; NULL where it is undefined"),
        ("low", "double", "Lower end of the 90 % interval (delta method; Wilson's for shares)"),
        ("high", "double", "Upper end of the interval"),
        ("ratio", "double", "Value of the group over the value of all other users of the segment"),
        ("ratio_low", "double", "Lower end of the 90 % interval of the ratio (delta method on logarithms)"),
        ("ratio_high", "double", "Upper end of the interval of the ratio"),
        ("threshold_low", "double", "Smallest fair ratio; NULL where the metric is not watched"),
        ("threshold_high", "double", "Largest fair ratio"),
        (
            "broken",
            "boolean!",
            "Whether the whole interval of the ratio lies outside the thresholds, for a group that is not small",
        ),
    ),
    key=("score_date", "measured_date", "segment", "group", "metric"),
    partition_by=("score_date",),
)
