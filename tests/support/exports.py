"""A made-up export in the shape of UCI's Online Retail, and the truth about it, by pandas."""

from __future__ import annotations

import csv
import io
import random
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pandas as pd

HEADER = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country")


class Truth(NamedTuple):
    """What the good lines hold."""

    orders: int
    users: int
    money: float
    refunds: float


def write_online_retail(path: Path, users: int = 40, seed: int = 7) -> None:
    """Write an export of a year: cancellations, lines without a user, equal lines, free lines, and pound signs in cp1252."""
    draw = random.Random(seed)
    orders = [
        (
            datetime(2010, 12, 1, 8) + timedelta(minutes=draw.randrange(370 * 24 * 60)),
            draw.choice([None, *range(users)]),
        )
        for _ in range(6 * users)
    ]
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(HEADER)
    for number, (at, user) in enumerate(sorted(orders, key=lambda order: order[0]), 536365):
        moment = f"{at.month}/{at.day}/{at.year} {at.hour}:{at.minute:02d}"
        # as pandas writes whole numbers in a column with gaps
        owner = ("" if user is None else f"{12346 + user}.0", "United Kingdom")
        for _ in range(draw.randrange(1, 5)):
            item = draw.randrange(30)
            title = "POT, £5 OFF" if item == 3 else f"MUG {item}"
            # one article has three decimals, as a few have in the real file
            price = 0 if item == 29 else 0.125 if item == 28 else round(0.85 + 0.4 * item, 2)
            line = (f"{20000 + item}A", title, draw.randrange(1, 13), moment, price, *owner)
            rows.writerow((number, *line))
            if item == 5:
                rows.writerow((number, *line))
        if draw.random() < 0.1:
            rows.writerow((f"C{number}", "20001A", "MUG 1", -1, moment, 1.25, *owner))
    path.write_text(text.getvalue(), encoding="cp1252", newline="")


def truth(path: Path) -> Truth:
    """Return orders, users and money of an export, computed without bp-spark."""
    lines = pd.read_csv(path, encoding="cp1252", dtype={"InvoiceNo": str})
    lines = lines[lines["CustomerID"].notna()]
    cents = (lines["Quantity"] * (lines["UnitPrice"] * 1000).round()).map(lambda mills: int(mills))
    amount = cents.map(lambda mills: (abs(mills) + 5) // 10 * (1 if mills >= 0 else -1)) / 100
    paid = lines[amount > 0]
    return Truth(
        paid["InvoiceNo"].nunique(),
        lines["CustomerID"].nunique(),
        round(amount.sum(), 2),
        round(amount[amount < 0].sum(), 2),
    )
