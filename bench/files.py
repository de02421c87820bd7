"""Files as shops have them, and whether each comes to the right money: ``python -m bench.files``.

In: :data:`CASES`, small files after faults that were reported in public, with what is right for each: the spend of each user,
and how many rows are in quarantine. They are read, pseudonymised and cleaned by the functions that ingest and clean call,
without tables between them. Out: a line of JSON a figure on standard output:

- ``files.cases``; ``files.right``: cases that come to what is right;
- ``files.silent_wrong``: cases whose spend is another one while no more rows than right are in quarantine;
- ``files.rows_lost``: rows that were read and are in neither events, duplicates nor quarantine.

Cases that are not right are named on standard error.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import reduce
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bench import say
from bp_spark.core import config
from bp_spark.core.session import get_session
from bp_spark.ingest import cleaning, pseudonyms
from bp_spark.ingest.sources.contract import Delivery
from bp_spark.ingest.sources.files import FilesSource

SECRET = pseudonyms.Secret(b"of the benchmark of files, 32 bytes and more")
HEADER = "at,customer,order,line,name,paid,list_price\n"
COLUMNS = {"user_id": "customer", "order_id": "order", "ts": "at", "amount": "paid"}
DAY = "2024-05-01 10:00:00"


@dataclass(frozen=True)
class Case:
    """Files, night by night, and what is right for them.

    Attributes:
        nights: file names and contents that come on each night.
        spend: user -> money.
        refused: rows in quarantine.
        columns: of the mapping, beside or in the place of :data:`COLUMNS`.
        options: of the mapping.
    """

    nights: tuple[Mapping[str, str], ...]
    spend: Mapping[str, str]
    refused: int = 0
    columns: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)


def csv(*lines: str) -> dict[str, str]:
    """One file with the columns of :data:`HEADER`; each line begins after the time."""
    return {"a.csv": HEADER + "".join(f"{DAY},{line}\n" for line in lines)}


def paid(amount: str, **rule: object) -> Case:
    """A user who paid 1.00 for sure, and an amount as a platform writes it, that is right if a rule describes it."""
    right = str(rule.pop("right", ""))
    columns = {"amount": {"column": "paid", **rule}} if rule else {}
    spend = {"u1": "1.00"} | ({"u2": right} if right else {})
    return Case((csv("u1,1,1,Mug,1,", f'u2,2,1,Cup,"{amount}",'),), spend, int(not right), columns)


def parts(*uuids: str) -> dict[str, str]:
    """The same line in one part file of each write."""
    return {f"part-{n:05d}-{uuid}-c000.csv": csv("u1,1,1,Mug,2.50,")["a.csv"] for n, uuid in enumerate(uuids)}


ONE_WRITE, OTHER_WRITE = "0a1b2c3d-0000-4000-8000-00000000000a", "0a1b2c3d-0000-4000-8000-00000000000b"
LINE = {"line_id": "line"}
NOTE = '"please call\n2024-05-01 10:00:00,u9,9,1,Mug,999.00,now"'
OPEN = (f'u1,1,1,Mug,10.00,"please call\n{DAY},u2,2,1,Cup,20.00', f'u1,1,1,"Mug,10.00,\n{DAY},u2,2,1,"Cup",20.00,')
CASES: dict[str, Case] = {
    "an unquoted comma": Case((csv("u1,1,1,Mug, 5,10.00,12.00", "u3,3,1,Pot,9.00,9.00"),), {"u3": "9.00"}, 1),
    "a line cut short": Case((csv("u2,2,1,Cup,7", "u3,3,1,Pot,9.00,9.00"),), {"u3": "9.00"}, 1),
    "a comma more at the end": Case((csv("u1,1,1,Mug,5.00,1,", "u3,3,1,Pot,9.00,"),), {"u3": "9.00"}, 1),
    "an order in a quoted note": Case((csv(f"u1,1,1,Mug,10.00,{NOTE}"),), {"u1": "10.00"}),
    "a quote open to the end": Case((csv("u0,0,1,Mug,1.00,", OPEN[0]),), {"u0": "1.00"}, 1),
    "a quote open to another": Case((csv(OPEN[1], "u0,0,1,Mug,1.00,"),), {"u0": "1.00"}, 1),
    "inches in a name": Case((csv('u1,1,1,15" screen,10.00,', 'u1,1,2,"15"" screen",5.00,'),), {"u1": "15.00"}),
    "ids with .0": Case((csv("17850.0,1,1,Mug,1.00,", "17850,2,1,Mug,2.00,"),), {"17850": "3.00"}),
    "ids that are none": Case(
        (csv(*(f"{u},1,1,Mug,1.00," for u in ("nan", "NULL", "0", "-1", "\\N", " ", "u1"))),), {"u1": "1.00"}, 6
    ),
    "blanks around ids": Case((csv("u1\t,1,1,Mug,1.00,", "\u00a0u1,2,1,Mug,2.00,"),), {"u1": "3.00"}),
    "ids in two cases": Case(
        (csv("Anna,1,1,Mug,1.00,", "anna,2,1,Mug,2.00,"),),
        {"anna": "3.00"},
        0,
        {"user_id": {"column": "customer", "lower": True}},
    ),
    "0.0045": paid("0.0045"),
    "1.234": paid("1.234"),
    "1.234 of a thousand": paid("1.234", decimal=",", thousands=".", right="1234.00"),
    "12,50": paid("12,50"),
    "12,50 described": paid("12,50", decimal=",", right="12.50"),
    "1.234,56 described": paid("1.234,56", decimal=",", thousands=".", right="1234.56"),
    "5,00- described": paid("5,00-", decimal=",", negative="trailing", right="-5.00"),
    "(5.00)": paid("(5.00)"),
    "(5.00) described": paid("(5.00)", negative="parentheses", right="-5.00"),
    "¥1,234 described": paid("¥1,234", symbol="¥", thousands=",", right="1234.00"),
    "0.1 + 0.2": paid("0.30000000000000004", right="0.30"),
    "a negative quantity alone": Case(
        (csv("u1,1,-2,Mug,5.00,", "u2,2,1,Mug,1.00,"),), {"u2": "1.00"}, 1, {"quantity": "line"}
    ),
    "parts of one write": Case((parts(ONE_WRITE, ONE_WRITE),), {"u1": "5.00"}),
    "parts of two writes": Case((parts(ONE_WRITE), parts(OTHER_WRITE)), {"u1": "2.50"}),
    "a delivery again": Case((csv("u1,1,1,Mug,5.00,"), {"b.csv": csv("u1,1,1,Mug,5.00,")["a.csv"]}), {"u1": "5.00"}),
    "a corrected line": Case(
        (csv("u1,1,1,Mug,5.00,"), {"b.csv": csv("u1,1,1,Mug,3.00,")["a.csv"]}), {"u1": "3.00"}, 0, LINE
    ),
    "a line moved over midnight": Case(
        (
            {"a.csv": HEADER + "2024-05-01 23:59:00,u1,1,1,Mug,30.00,\n"},
            {"b.csv": HEADER + "2024-05-02 00:01:00,u1,1,1,Mug,30.00,\n"},
        ),
        {"u1": "30.00"},
        0,
        LINE,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What a case comes to."""

    spend: Mapping[str, Decimal]
    refused: int
    lost: int


def outcome(spark: SparkSession, folder: Path, case: Case) -> Outcome:
    """Deliver the files of a case night by night, and clean all that was read."""
    table = {"path": "*.csv", "format": "csv", "options": dict(case.options), "columns": {**COLUMNS, **case.columns}}
    folder.mkdir(parents=True)
    (folder / "shop.yaml").write_text(json.dumps({"transactions": table}), encoding="utf-8")
    source, known, nights = FilesSource(folder / "shop.yaml"), set[Delivery](), list[DataFrame]()
    for number, files in enumerate(case.nights, start=1):
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
        fresh = [delivery for delivery in source.deliveries(spark) if delivery not in known]
        known.update(fresh)
        rows = source.read(spark, fresh)["raw_transactions"]
        stored = pseudonyms.pseudonymous(rows, "raw_transactions", SECRET, pseudonyms.mask)
        added = {"ingest_id": F.lit(number).cast("bigint"), "ingested_at": F.lit(datetime(2024, 6, 1, tzinfo=UTC))}
        nights.append(stored.withColumns(added))
    raw = reduce(DataFrame.unionByName, nights).localCheckpoint()
    judged = cleaning.validate({"raw_transactions": raw}, {}, config.load().cleaning)
    events = cleaning.events(judged).localCheckpoint()
    refused = cleaning.quarantine(judged).count()
    users = {SECRET.key_of(user): user for user in case.spend}
    sums = events.filter("copy = 1").groupBy("user_key").agg(F.sum("amount").alias("spend")).collect()
    spend = {users.get(row["user_key"], row["user_key"]): row["spend"] for row in sums}
    return Outcome(spend, refused, raw.count() - events.count() - refused)


def figures(outcomes: Mapping[str, Outcome]) -> dict[str, int]:
    """The figures of the cases' outcomes; cases that are not right are named on standard error."""
    right, silent = 0, 0
    for name, found in outcomes.items():
        case = CASES[name]
        same = found.spend == {user: Decimal(money) for user, money in case.spend.items()}
        if same and found.refused == case.refused:
            right += 1
            continue
        silent += not same and found.refused <= case.refused
        print(
            f"{name}: {dict(found.spend)}, {found.refused} refused; right is {case.spend}, {case.refused}",
            file=sys.stderr,
        )
    lost = sum(found.lost for found in outcomes.values())
    return {"files.cases": len(outcomes), "files.right": right, "files.silent_wrong": silent, "files.rows_lost": lost}


def main() -> None:
    """Run all cases."""
    spark = get_session(config.load(), "bench-files")
    with tempfile.TemporaryDirectory() as folder:
        outcomes = {name: outcome(spark, Path(folder) / str(n), case) for n, (name, case) in enumerate(CASES.items())}
    spark.stop()
    for name, value in figures(outcomes).items():
        say(name, value)


if __name__ == "__main__":
    main()
