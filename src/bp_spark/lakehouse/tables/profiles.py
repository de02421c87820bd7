"""Profiles and the tables of the applications that read the scores."""

from bp_spark.lakehouse.schema import Table, columns

CATEGORY_AFFINITY = Table(
    "category_affinity",
    "For recommendation: categories that interest each user most, and how affordable each is",
    columns(
        ("user_key", "string!", "User"),
        ("score_date", "date!", "Scored date; only events before this day are used"),
        ("rank", "int!", "Rank of the category among the user's categories by fit, from 1"),
        ("category", "string!", "Category path, shortened to profiles.category_levels levels"),
        (
            "affinity",
            "double!",
            "Interest in the category, 0-1: weighted mean of purchase_share, click_share and search_share",
        ),
        (
            "affordability",
            "double",
            "0-1: budget / (budget + price) of the user's usual order value and the expected price of a unit; 0.5 where "
            "the two are equal; NULL where the category has no usual price",
        ),
        ("fit", "double!", "affinity x affordability; an unknown affordability counts as 0.5"),
        ("purchase_share", "double!", "Recency-weighted share of the user's spend, 0-1"),
        (
            "click_share",
            "double!",
            "Recency-weighted share of the user's browse, click, cart and favourite actions, 0-1",
        ),
        ("search_share", "double!", "Recency-weighted share of the user's searches with a click on a result, 0-1"),
        (
            "usual_price",
            "double",
            "Geometric mean of all users' unit prices in the category, in the platform's currency; NULL where fewer than "
            "privacy.smallest_group users bought",
        ),
    ),
    key=("user_key", "category"),
)
RISK_REASON = "struct<signal:string,value:double,points:int>"
USER_PROFILE = Table(
    "user_profile",
    "Profile of each user on the newest scored date, for people to read; docs/profiles.md defines each column",
    columns(
        ("user_key", "string!", "User"),
        ("score_date", "date!", "Scored date; only events before this day are used"),
        ("score", "double!", "Purchasing-power score 0-100, as in scores"),
        ("level", "string!", "A (score >= 80), B, C, D, E (score < 20)"),
        ("expected_spend", "double!", "Expected spend over horizon_days, in the platform's currency"),
        ("low", "double!", "Lower end of the 90 % prediction interval"),
        ("high", "double!", "Upper end of the 90 % prediction interval"),
        ("p_active", "double!", "Probability of any spend in the horizon"),
        ("horizon_days", "int", "Days of the bundle's horizon, as in scores"),
        (
            "value",
            "double",
            "Expected spend over the longest horizon, later spend discounted by profiles.discount_rate a year; NULL: the "
            "scores know no horizons",
        ),
        (
            "expected_margin",
            "double",
            "Part of the expected spend that is left once the goods are paid, in currency; NULL: no cost is known",
        ),
        ("margin_share", "double", "The same as a share of the expected spend, by the margins of the past year"),
        ("reasons", "array<string>!", "Reasons for the expected spend in words, strongest first"),
        (
            "compared_30d",
            "date",
            "Date nearest to 30 days before, at most a week off, that the same bundle scored; NULL: no such date",
        ),
        ("score_change_30d", "double", "Score minus the score of compared_30d; NULL: no score on that date"),
        (
            "trend_30d",
            "string",
            "rising, steady or falling (by profiles.trend_points); new: no score on compared_30d; NULL: no such date",
        ),
        (
            "compared_90d",
            "date",
            "Date nearest to 90 days before, at most a week off, that the same bundle scored; NULL: no such date",
        ),
        ("score_change_90d", "double", "Score minus the score of compared_90d; NULL: no score on that date"),
        (
            "trend_90d",
            "string",
            "rising, steady or falling (by profiles.trend_points); new: no score on compared_90d; NULL: no such date",
        ),
        (
            "interests",
            "array<struct<category:string,weight:double>>!",
            "Categories of most interest, highest weight first; the weight is the affinity of category_affinity",
        ),
        ("price_tier", "string", "budget, standard or premium, by price_position; NULL: price_position is unknown"),
        (
            "price_position",
            "double",
            "Mean z-score of the year's log unit prices within their categories, among all users",
        ),
        (
            "stage",
            "string",
            "new: first purchase at most profiles.active_days ago; else active, lapsing or lapsed, by the days since the "
            "last purchase",
        ),
        ("activity", "string!", "active, cooling or dormant, by the days since the last purchase or visit"),
        ("days_since_purchase", "int", "Days since the last purchase"),
        (
            "days_since_visit",
            "int",
            "Days since the last browse, click, cart, favourite or search; NULL: no such event",
        ),
        ("purchase_days", "int", "Number of days with a purchase, ever"),
        ("usual_gap_days", "double", "Mean days between purchase days; NULL: fewer than two purchase days"),
        ("usual_order_value", "double", "Mean spend of a purchase day, in the platform's currency"),
        ("refund_share", "double", "Money paid back over money paid, 365 days; NULL: nothing was paid"),
        (
            "expected_refund_share",
            "double",
            "Share of the money paid in the bundle's horizon that is expected to be paid back in it; NULL: the bundle knows "
            "too few refunds",
        ),
        ("discount_share", "double", "Reductions over undiscounted spend, 90 days; NULL: no spend"),
        ("low_rating_share", "double", "Share of ratings of 2 or less, 365 days; NULL: no rating"),
        (
            "spend_volatility",
            "double",
            "Standard deviation over mean of weekly spend, 12 weeks; NULL: no spend in these weeks",
        ),
        ("interval_width", "double!", "Width of the prediction interval over the expected spend"),
        (
            "risk_level",
            "string!",
            "low (risk_points 0-1), medium (2-3) or high (4-6); scores.risk_level uses the interval's width alone",
        ),
        ("risk_points", "int!", "Sum of the points of the three signals, each 0 to 2"),
        (
            "risk_reasons",
            f"array<{RISK_REASON}>!",
            "Signals with points: interval (interval_width), refunds (refund_share), volatility (spend_volatility)",
        ),
        (
            "next_purchase_days",
            "double",
            "Expected days from score_date to the next purchase (gamma-Poisson); NULL: see next_purchase_unknown",
        ),
        ("next_purchase_on", "date", "score_date plus next_purchase_days, rounded"),
        (
            "next_purchase_unknown",
            "string",
            "Why next_purchase_days is NULL: one purchase day, or unlikely to buy; NULL otherwise",
        ),
    ),
    key=("user_key",),
)
RISK_CONTROL = Table(
    "risk_control",
    "For risk control: the risk of relying on each user's expected spend, and its reasons",
    columns(
        ("user_key", "string!", "User"),
        ("score_date", "date!", "Scored date; only events before this day are used"),
        ("risk_band", "string!", "low, medium or high; equals risk_level of user_profile"),
        ("risk_points", "int!", "Sum of the points of the three signals, each 0 to 2"),
        (
            "reasons",
            "array<struct<signal:string,value:double,points:int,text:string>>!",
            "Signals with points, most points first: signal, value, points, and the reason in words",
        ),
        ("level", "string!", "A to E, as in scores"),
        ("expected_spend", "double!", "Expected spend over horizon_days, in the platform's currency"),
        ("low", "double!", "Lower end of the 90 % prediction interval"),
        ("p_active", "double!", "Probability of any spend in the horizon"),
        ("horizon_days", "int", "Days of the bundle's horizon, as in scores"),
        ("expected_refund_share", "double", "As in user_profile"),
    ),
    key=("user_key",),
)
CUSTOMER_SERVICE = Table(
    "customer_service",
    "For customer service: service tier and talking points of each user",
    columns(
        ("user_key", "string!", "User"),
        ("score_date", "date!", "Scored date; only events before this day are used"),
        ("service_tier", "string!", "premier, preferred, standard or win_back, by level, activity and risk"),
        ("proposal", "string!", "Delivery and care to propose to users of the tier (profiles.phrases.care_...)"),
        (
            "talking_points",
            "array<struct<topic:string,text:string>>!",
            "Topics and words for a conversation (profiles.phrases), most important first, at most three",
        ),
        ("level", "string!", "A to E, as in scores"),
        ("activity", "string!", "active, cooling or dormant, as in user_profile"),
        ("risk_level", "string!", "low, medium or high, as in user_profile"),
        (
            "open_questions",
            "int",
            "Consultations before score_date that are not solved, by the newest delivery; NULL: the platform delivers none, or "
            "doesn't say of any of the user's whether it is solved",
        ),
        ("asked_on", "date", "Day of the last consultation before score_date; NULL: none"),
        (
            "asked_about",
            "string",
            "Topic of that consultation as the platform names it, else that of consultation_topics; NULL: unknown",
        ),
    ),
    key=("user_key",),
)
MARKET_SEGMENTS = Table(
    "market_segments",
    "For market analysis: users by level, top category and region; small cells are merged into rows named other, "
    "so that no row describes fewer than privacy.smallest_group users (docs/profiles.md)",
    columns(
        ("score_date", "date!", "Scored date; only events before this day are used"),
        ("level", "string!", "A to E, as in scores; other: several levels"),
        (
            "category",
            "string!",
            "Broadest level of the users' first interest; none: no interest; other: several categories",
        ),
        (
            "region",
            "string!",
            "Region; unknown: users without a region; all: no region is configured; other: several regions",
        ),
        ("users", "bigint!", "Number of users; the rows together count each user once"),
        ("mean_score", "double!", "Mean score of these users"),
        ("mean_expected_spend", "double!", "Mean expected spend of these users, in the platform's currency"),
        ("mean_p_active", "double!", "Mean probability of any spend in the horizon of these users"),
        ("mean_value", "double", "Mean value of these users, as in user_profile; NULL: the scores know no horizons"),
        (
            "expected_by_horizon",
            "map<int,double>",
            "Days -> expected spend of these users together over that many days; NULL: the bundle knows no error of sums",
        ),
        (
            "variance_by_horizon",
            "map<int,double>",
            "Days -> variance of that sum if these users were independent of each other; add it up over rows",
        ),
    ),
    key=("level", "category", "region"),
)
TOTALS = Table(
    "totals",
    "Expected spend of groups of users together, with an interval that allows for errors that users share",
    columns(
        ("score_date", "date!", "Scored date; only events before this day are used"),
        ("horizon_days", "int!", "Days of spend from score_date on"),
        (
            "segment",
            "string!",
            "platform, level, category or region: the column of market_segments that the users share",
        ),
        ("value", "string!", "Value of that column; all: the whole platform"),
        ("users", "bigint!", "Number of users: those of rows of market_segments with this value"),
        ("expected_spend", "double!", "Expected spend of these users together, in the platform's currency"),
        ("low", "double!", "Lower end of the 90 % prediction interval of that sum"),
        ("high", "double!", "Upper end of the 90 % prediction interval of that sum"),
        ("variance", "double!", "Variance of that sum if users were independent of each other"),
        ("common_sd", "double!", "Standard deviation of the log spend that all users share"),
        (
            "segment_sd",
            "double!",
            "Standard deviation of the log spend that users of one segment share beside it; not in the platform's interval",
        ),
        ("dispersion", "double!", "Variance of a user, by the expected spend"),
        ("quadratic", "double!", "Variance of a user, by the square of the expected spend; it is the sum of both"),
        (
            "horizons",
            "double!",
            "How many errors that are independent of each other common_sd was measured on; below 2 it is mostly an assumption",
        ),
        ("quantile", "double", "Standard deviations of the log spend from the middle of the interval to its ends"),
        ("bundle_digest", "string!", "Digest of the model bundle that made the scores"),
    ),
    key=("score_date", "horizon_days", "segment", "value"),
    partition_by=("score_date",),
)
COHORTS = Table(
    "cohorts",
    "Users by the month of their first purchase: what they did by age, and what they are expected to spend; no figure tells of "
    "fewer than privacy.smallest_group users (docs/profiles.md)",
    columns(
        ("score_date", "date!", "Scored date; only events before this day are used"),
        ("cohort", "date!", "First day of the month in which the users first bought"),
        (
            "cohort_to",
            "date!",
            "First day of the last such month; later than cohort where months of few users were merged",
        ),
        ("age", "int!", "Whole periods of 30 days since each user's own first purchase"),
        (
            "horizon_days",
            "int!",
            "0: what happened before score_date; otherwise the days from score_date on whose spend is expected",
        ),
        (
            "complete",
            "boolean!",
            "Whether all users have lived through the period of that age; false in the newest row of a cohort, which holds all "
            "that came since, and where spend is expected",
        ),
        ("days", "double!", "Days since the first purchase at the end of the row, mean of the users"),
        ("users", "bigint!", "Users of the cohort"),
        (
            "active_users",
            "bigint",
            "Users with an order in the period; NULL: they or the others are too few, or spend is expected",
        ),
        ("retention", "double", "active_users over users, 0-1"),
        ("orders", "bigint", "Orders in the period; NULL: of too few users, or spend is expected"),
        (
            "spend",
            "decimal(38,2)",
            "Spend in the period, or expected over horizon_days, in the platform's currency; NULL: of too few users",
        ),
        (
            "cumulative_spend",
            "decimal(38,2)",
            "Spend since the first purchase to the end of the row, refunds taken off; NULL: it would tell of too few users",
        ),
        ("cumulative_spend_per_user", "double", "cumulative_spend over users"),
        ("low", "double", "Lower end of the 90 % interval of cumulative_spend; NULL: it happened already"),
        ("high", "double", "Upper end of the 90 % interval of cumulative_spend; NULL: it happened already"),
        (
            "variance",
            "double",
            "Variance of the expected spend if users were independent of each other, as in totals; add it up over cohorts",
        ),
        ("bundle_digest", "string!", "Digest of the model bundle that made the scores"),
    ),
    key=("cohort", "age", "horizon_days"),
)
MARKET_FORECAST = Table(
    "market_forecast",
    "Weekly revenue, orders and buyers of the platform and its categories, and revenue of its levels: 13 weeks to come with "
    "intervals, and 26 weeks of the past (docs/profiles.md)",
    columns(
        ("score_date", "date!", "Scored date; only events before this day are used"),
        ("segment", "string!", "platform, category or level"),
        (
            "value",
            "string!",
            "Broadest level of the category path, or level; all: the whole platform; none: no category; other: all other "
            "categories",
        ),
        (
            "measure",
            "string!",
            "revenue: money paid minus refunds, in the platform's currency; orders; buyers: users with an order",
        ),
        ("week_start", "date!", "First of the week's 7 days; weeks begin on the weekday of score_date"),
        ("weeks_ahead", "int!", "1 to 13: weeks from score_date on; 0: the week before it; below 0: earlier weeks"),
        ("actual", "double", "What happened, in weeks of the past; NULL: to come"),
        ("expected", "double", "Forecast; NULL: a week of the past"),
        ("low", "double", "Lower end of the 90 % prediction interval of the week"),
        ("high", "double", "Upper end of the 90 % prediction interval of the week"),
        (
            "method",
            "string",
            "window average (8 weeks), AutoETS, AutoTheta, seasonal naive (52 weeks) or MSTL; of a level: shape of the "
            "platform",
        ),
        ("baseline", "string", "naive: the last week goes on; seasonal naive: the weeks of the year before come again"),
        (
            "mase",
            "double",
            "Mean absolute scaled error of the backtest, by the method that was chosen at each origin; NULL: not backtested",
        ),
        ("mase_baseline", "double", "The same of the baseline, at the same origins"),
        ("mase_vs_naive", "double", "mase over mase_baseline; below 1 the forecasts were better"),
        ("origins", "int", "Number of past weeks from which the backtest forecast"),
        ("history_weeks", "int", "Weeks of history that the forecast is made from"),
        (
            "users_expected",
            "double",
            "Platform's revenue: expected spend of all users together by totals, over users_days days",
        ),
        ("users_days", "int", "Days of users_expected, from score_date on"),
        ("gap", "double", "Platform's revenue: the forecast of these days over users_expected, minus 1"),
        (
            "new_buyer_share",
            "double",
            "Platform's revenue: share of the past 13 weeks' revenue that came from users with their first order in them; "
            "users_expected leaves out users who first buy after score_date",
        ),
    ),
    key=("score_date", "segment", "value", "measure", "week_start"),
    partition_by=("score_date",),
)
PROFILE_TABLES = (CATEGORY_AFFINITY, USER_PROFILE, RISK_CONTROL, CUSTOMER_SERVICE, MARKET_SEGMENTS)
"""Tables that are made from the newest scores, in the order of their writes."""
