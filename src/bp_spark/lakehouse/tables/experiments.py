"""Experiments: who is in which group, and what the groups spent."""

from bp_spark.lakehouse.schema import Table, columns

EXPERIMENTS = Table(
    "experiments",
    "One row per experiment and user: the group that the user was drawn into, and what was expected of the user then",
    columns(
        ("experiment", "string!", "Name of the experiment"),
        ("user_key", "string!", "User"),
        ("group", "string!", "Group of the user, drawn by a hash of the experiment's name and user_key"),
        ("score_date", "date!", "Scored date of the draw; spend counts from this day on"),
        (
            "expected_spend",
            "double!",
            "Spend that the score expected then, over expected_days, in the platform's currency",
        ),
        ("expected_days", "int!", "Days of expected_spend: the scored horizon that is nearest to days"),
        ("days", "int!", "Planned days of spend, from score_date on; the same for all users of the experiment"),
        ("share", "double!", "Share of the selected users that the group was drawn to have"),
        ("selection", "string!", "Condition by which users were selected; the same for all users of the experiment"),
        ("is_control", "boolean!", "Whether the group is the one that all others are compared with"),
        ("bundle_digest", "string!", "Digest of the model bundle that made the score"),
        ("run_id", "string!", "Run that drew the user: run_id of runs"),
        ("assigned_at", "timestamp!", "Time of the draw, UTC"),
    ),
    key=("experiment", "user_key"),
    partition_by=("experiment",),
)
EXPERIMENT_RESULTS = Table(
    "experiment_results",
    "One row per experiment, span, group and method: mean spend of the group beside that of the control group",
    columns(
        ("experiment", "string!", "Name of the experiment"),
        ("days", "int!", "Days of spend, from score_date on"),
        ("group", "string!", "Group that is compared with the control group"),
        (
            "method",
            "string!",
            "adjusted: with the score at the draw as covariate; unadjusted: plain means",
        ),
        ("score_date", "date!", "First day of the spend"),
        ("planned", "boolean!", "Whether days are those that were planned; decide by these rows"),
        ("control", "string!", "Name of the control group"),
        ("users", "bigint!", "Users of the group"),
        ("control_users", "bigint!", "Users of the control group"),
        ("mean_spend", "double!", "Mean spend of a user of the group less refunds, in the platform's currency"),
        ("control_mean_spend", "double!", "The same of the control group"),
        ("difference", "double!", "mean_spend minus control_mean_spend"),
        ("low", "double!", "Lower end of the 95 % interval of the difference"),
        ("high", "double!", "Upper end of the interval"),
        ("relative", "double", "difference over control_mean_spend; NULL where that is not above 0"),
        ("relative_low", "double", "Lower end of the 95 % interval of relative (delta method)"),
        ("relative_high", "double", "Upper end of the interval"),
        ("standard_error", "double!", "Standard error of the difference"),
        ("p_value", "double!", "Probability of at least such a difference, up or down, without an effect (Welch's t)"),
        (
            "variance_saved",
            "double",
            "Share of the unadjusted variance that the method takes out, and of the users it saves; NULL where nothing varies",
        ),
        (
            "sample_ratio_p",
            "double!",
            "p-value of the shares of all groups' users (chi-squared); below 0.001 trust no figure of the experiment",
        ),
        ("earlier_looks", "int!", "Number of shorter spans that were read before the planned end"),
        ("run_id", "string!", "Run that read the experiment: run_id of runs"),
        ("read_at", "timestamp!", "Time of the reading, UTC"),
    ),
    key=("experiment", "days", "group", "method"),
    partition_by=("experiment", "days"),
)
