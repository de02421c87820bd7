"""Items for each scored user."""

from bp_spark.lakehouse.schema import Table, columns

RECOMMENDATIONS = Table(
    "recommendations",
    "One row per user, scored date and rank: an item that the user is likely to buy, with the reason",
    columns(
        ("user_key", "string!", "User"),
        ("score_date", "date!", "Scored date; only events before this day are used"),
        ("rank", "int!", "Rank by score among the user's items, from 1"),
        ("item_id", "string!", "Item, as in events"),
        ("item", "string", "Its newest title, else its category path; NULL: the platform delivers neither"),
        (
            "score",
            "double!",
            "Probability that the user buys the item in the next 28 days, as learned from the last 28 days",
        ),
        (
            "reason",
            "string!",
            "buy_again: the user bought it before; looked_at: put into the cart, marked as favourite or viewed; "
            "similar_users: users alike took it; popular_in_level: users of the same level buy it most",
        ),
        (
            "price",
            "double",
            "Geometric mean of all users' unit prices of the item, in the platform's currency; NULL where fewer than "
            "privacy.smallest_group users bought it",
        ),
        ("price_tier", "string", "budget, standard or premium among the prices of its category; NULL: no price"),
        (
            "affordability",
            "double",
            "0-1: order / (order + price) of the user's mean spend of a purchase day and the price; NULL: one is unknown",
        ),
        ("times_bought", "int!", "Days on which the user bought the item, within recommendations.window_days"),
        ("days_since_bought", "int", "Days since the user last bought it; NULL: never in that time"),
        (
            "usual_interval_days",
            "double",
            "Days after which the user buys the item again: the user's own, with two repeat purchases at the item's usual "
            "interval; NULL: never bought",
        ),
    ),
    key=("user_key", "score_date", "rank"),
    partition_by=("score_date",),
)
