"""Section of what teams can act on: items that most users are recommended, margins by level, and open questions by topic.

The queries are read by Spark and by DuckDB. None tells of fewer than the smallest group of users.
"""

from __future__ import annotations

import math
from datetime import date, timedelta

import pandas as pd

from bp_spark.lakehouse.schema import Table
from bp_spark.lakehouse.tables import CUSTOMER_SERVICE, RECOMMENDATIONS, USER_PROFILE
from bp_spark.report import page
from bp_spark.report.night.data import PageData
from bp_spark.report.night.reader import NightReader
from bp_spark.report.page import Markup

_OFFERS = """
    SELECT item_id, max(item) AS item, count(*) AS users, sum(CASE WHEN reason = 'buy_again' THEN 1 ELSE 0 END) AS again,
        avg(score) AS chance, max(price) AS price
    FROM {table}
    WHERE score_date = (SELECT max(score_date) FROM {table} WHERE score_date BETWEEN DATE '{first}' AND DATE '{day}')
    GROUP BY item_id HAVING count(*) >= {least_users} ORDER BY users DESC, item_id LIMIT 10"""
_MARGINS = """
    SELECT level, sum(expected_margin) / sum(expected_spend) AS share
    FROM {table} WHERE score_date = DATE '{day}' AND expected_margin IS NOT NULL
    GROUP BY level HAVING count(*) >= {least_users} ORDER BY level"""
_QUESTIONS = """
    SELECT coalesce(asked_about, 'unknown') AS topic, count(*) AS users, sum(open_questions) AS questions
    FROM {table} WHERE score_date = DATE '{day}' AND open_questions > 0
    GROUP BY coalesce(asked_about, 'unknown') HAVING count(*) >= {least_users} ORDER BY users DESC, topic LIMIT 10"""
_QUERIES: dict[str, tuple[Table, str]] = {
    "offers": (RECOMMENDATIONS, _OFFERS),
    "margins": (USER_PROFILE, _MARGINS),
    "questions": (CUSTOMER_SERVICE, _QUESTIONS),
}


def read(reader: NightReader, day: date, every_days: int, least_users: int) -> dict[str, pd.DataFrame]:
    """Return ``offers``, ``margins`` and ``questions`` of a night, those of them that have rows.

    Args:
        reader: Reader of the tables.
        day: The scored date.
        every_days: Days from one ``recommendations`` to the next.
        least_users: Least users of a group that is shown.
    """
    values = {"day": day, "first": day - timedelta(days=every_days - 1), "least_users": least_users}
    rows_by_part = {
        name: reader.aggregate(table, query.format(table="{table}", **values))
        for name, (table, query) in _QUERIES.items()
    }
    return {name: rows for name, rows in rows_by_part.items() if len(rows)}


def section(data: PageData) -> list[Markup]:
    """Return the tables of what can be acted on, those that there are."""
    parts = {"offers": _offers, "margins": _margins, "questions": _questions}
    return [part(data, data.decisions[name]) for name, part in parts.items() if name in data.decisions]


def _offers(data: PageData, rows: pd.DataFrame) -> Markup:
    cells = []
    for row in rows.to_dict("records"):
        users, again = int(row["users"]), int(row["again"])
        is_shown = all(part == 0 or part >= data.smallest_group for part in (again, users - again))
        price = row["price"]
        cells.append(
            [
                row["item"] or row["item_id"],
                f"{users:,}",
                f"{again / users:.0%}" if is_shown else "*",
                f"{row['chance']:.0%}",
                "–" if price is None or math.isnan(price) else f"{price:,.2f}",
            ]
        )
    headings = ["item", "users", "bought it before", "mean chance within 28 days", f"usual price, {data.currency}"]
    return page.table("Items that most users are recommended", headings, cells, sentences=(0,))


def _margins(_: PageData, rows: pd.DataFrame) -> Markup:
    # a number of users or a sum of money would tell of those without a margin, by its difference to the other tables
    cells = [[row["level"], f"{row['share']:.1%}"] for row in rows.to_dict("records") if not math.isnan(row["share"])]
    return page.table(
        "What is left of the expected spend once the goods are paid", ["level", "share of the expected spend"], cells
    )


def _questions(data: PageData, rows: pd.DataFrame) -> Markup:
    cells = [[row["topic"], f"{row['users']:,}", f"{int(row['questions']):,}"] for row in rows.to_dict("records")]
    headings = ["last asked about", "users", "open questions"]
    return page.table(f"Users who wait for an answer, groups of {data.smallest_group} or more", headings, cells)
