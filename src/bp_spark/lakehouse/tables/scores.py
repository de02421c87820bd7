"""Scores, and the labels that people are asked for and give."""

from bp_spark.lakehouse.schema import Table, columns

SCORES = Table(
    "scores",
    "One row per user and scored date: the predicted purchasing power",
    columns(
        ("user_key", "string!", "User"),
        ("score_date", "date!", "Scored date; the prediction uses only events before this day"),
        ("expected_spend", "double!", "Expected spend over horizon_days, in the platform's currency"),
        ("low", "double!", "Lower end of the 90 % prediction interval; 0 where the chance of nothing is above 5 %"),
        ("high", "double!", "Upper end of the 90 % prediction interval"),
        ("p_active", "double!", "Probability of any spend in the horizon"),
        ("score", "double!", "Percentile 0-100 of expected_spend in the bundle's reference population"),
        ("level", "string!", "A (score >= 80), B, C, D, E (score < 20)"),
        ("risk_level", "string!", "low, medium or high: width of the interval relative to the expected spend"),
        (
            "expected_by_horizon",
            "map<int,double>",
            "Days -> expected spend over that many days; equals expected_spend at the bundle's horizon, and never falls with "
            "longer horizons",
        ),
        ("base_spend", "double", "Expected spend of a user without any information: the baseline of reasons"),
        (
            "reasons",
            "array<struct<group:string,contribution:double,feature:string,value:double>>!",
            "Groups of features with the largest contributions to expected_spend, in money, and the strongest feature of "
            "each; NULL for the order and content of recent events",
        ),
        (
            "other_reasons",
            "double",
            "Sum of all other groups' contributions: base_spend + contributions + other_reasons = expected_spend",
        ),
        (
            "horizon_days",
            "int",
            "Days of the bundle's horizon, from score_date on: expected_spend, interval, p_active and level are of so many; "
            "NULL in rows of older versions",
        ),
        ("bundle_digest", "string!", "Digest of the model bundle that made the row"),
        ("input_digest", "bigint", "Digest of the user's features: input_digest of user_features"),
        (
            "computed_on",
            "date",
            "Date on which the score was computed; earlier than score_date where features have not changed since",
        ),
        ("run_id", "string", "Run that computed the score: run_id of runs"),
        ("features_version", "bigint!", "Delta version of user_features that the run read"),
        ("code_version", "string!", "Version of bp-spark that computed the score"),
        ("scored_at", "timestamp!", "Time of the computation, UTC"),
    ),
    key=("user_key", "score_date"),
    partition_by=("score_date",),
)
SCORES_LATEST = Table("scores_latest", "Rows of scores with the newest score_date", SCORES.columns, key=("user_key",))
LABEL_REQUESTS = Table(
    "label_requests",
    "Users whose label would help the model most: questions for a survey or a reviewer",
    columns(
        ("user_key", "string!", "User"),
        ("as_of_date", "date!", "First day of the horizon whose spend is asked for"),
        ("rank", "int!", "Rank by disagreement among the users of one request, from 1"),
        (
            "disagreement",
            "double!",
            "Weighted standard deviation of the members' predictions, each as the square root of money",
        ),
        ("expected_spend", "double!", "Expected spend by the bundle, in the platform's currency"),
        ("bundle_digest", "string!", "Digest of the model bundle whose members disagree"),
        ("run_id", "string!", "Run that made the request: run_id of runs"),
        ("requested_at", "timestamp!", "Time of the request, UTC"),
    ),
    key=("user_key", "as_of_date"),
)
GIVEN_LABELS = Table(
    "given_labels",
    "Labels from a survey or a reviewer, which trainings use beside observed spend",
    columns(
        ("user_key", "string!", "User"),
        ("as_of_date", "date!", "First day of the horizon that the spend is of"),
        ("spend", "double!", "Spend over the horizon as given, in the platform's currency"),
        ("source", "string", "Origin of the label as given: survey, review, ..."),
        ("given_at", "timestamp!", "Time when the label was given, UTC; trainings with a later test date may use it"),
        ("run_id", "string!", "Run that stored the label: run_id of runs"),
    ),
    key=("user_key", "as_of_date"),
)
