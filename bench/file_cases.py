"""Files as shops have them, one delivery each, with what is right: the cases of :mod:`bench.files`.

The first cases of each kind are faults that were reported in public. The others are variations of the same kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar

import pyarrow as pa

DAY = "2024-05-01"
HEADER = "at,customer,order,line,name,paid,list_price\n"
COLUMNS: Mapping[str, Any] = {"user_id": "customer", "order_id": "order", "ts": "at", "amount": "paid"}
TORN = "row is unreadable"
NO_USER = "user_id is missing"
Content = str | bytes | pa.Table
Counts = Mapping[str, int]


@dataclass(frozen=True)
class Case:
    """Files, their mapping, and what is right for them.

    Attributes:
        files: name -> content; of a table the content is Parquet.
        events: user, order and amount of each purchase; user and kind of other events. A day follows where it isn't DAY.
        refused: rule -> rows in quarantine.
        left_out: rows that a condition leaves out, counted for each table.
        rows: records in the files; by default their lines less the header.
        columns: of the mapping, beside or in the place of COLUMNS.
        table: other keys of the table in the mapping.
        mapping: other keys of the mapping.
        error: regular expression of the error that refuses the files or the mapping.
        hidden: text that must not stand in the error.
    """

    files: Mapping[str, Content]
    events: Sequence[str] = ()
    refused: Counts = field(default_factory=dict)
    left_out: int = 0
    rows: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    table: Mapping[str, Any] = field(default_factory=dict)
    mapping: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    hidden: str = ""
    folder: ClassVar[str] = "files/{}/"
    """Folder of the files; ``{}`` is the number of the case."""

    @property
    def yaml(self) -> str:
        """Text of the mapping, for files in the folder ``files``."""
        columns = {name: rule for name, rule in {**COLUMNS, **self.columns}.items() if rule is not None}
        kind = next(iter(self.files)).rpartition(".")[2]
        orders = {"path": "files", "format": kind, **self.table, "columns": columns}
        return json.dumps({"transactions": orders, **self.mapping})

    @property
    def records(self) -> int:
        """Records that the files have, counted for each table that reads them."""
        counted = (
            sum(_records(name, content) for name, content in self.files.items()) if self.rows is None else self.rows
        )
        return counted * len({"transactions", *self.mapping} & {"transactions", "behaviours", "searches", "reviews"})


def _records(name: str, content: Content) -> int:
    if isinstance(content, pa.Table):
        return int(content.num_rows)
    text = content.decode("latin-1") if isinstance(content, bytes) else content
    lines = sum(1 for line in text.splitlines() if line.strip())
    return lines - name.endswith(".csv")


def csv(*lines: str, header: str = HEADER) -> dict[str, Content]:
    """One file; each line begins after the time."""
    return {"a.csv": header + "".join(f"{DAY} 10:00:00,{line}\n" for line in lines)}


def jsonl(*rows: Mapping[str, Any]) -> dict[str, Content]:
    """One file of objects, with the columns of HEADER."""
    plain = {"at": f"{DAY} 10:00:00", "order": 1, "paid": 1}
    return {"a.json": "".join(json.dumps({**plain, **row}) + "\n" for row in rows)}


def table(**columns: Any) -> dict[str, Content]:
    """One Parquet file, with the columns of HEADER."""
    count = len(next(iter(columns.values())))
    plain = {"at": [f"{DAY} 10:00:00"] * count, "order": ["1"] * count, "paid": [1.0] * count}
    return {"a.parquet": pa.table({**plain, **columns})}


def money(amount: str, right: str = "", rule: str = "amount is unreadable", **marks: Any) -> Case:
    """A user who paid 1.00 for sure, and an amount as a platform writes it, right if ``marks`` describe it."""
    columns = {"amount": {"column": "paid", **marks}} if marks else {}
    events = ("u1 1 1.00", f"u2 2 {right}") if right else ("u1 1 1.00",)
    return Case(csv("u1,1,1,Mug,1,", f'u2,2,1,Cup,"{amount}",'), events, {} if right else {rule: 1}, columns=columns)


def ids(*texts: str, right: Sequence[str], none: int = 0, **rule: Any) -> Case:
    """A line for each id; ``right`` are the users of these lines, ``none`` counts the lines without one."""
    columns = {"user_id": {"column": "customer", **rule}} if rule else {}
    files = csv(*(f"{text},1,{number},Mug,1.00," for number, text in enumerate(texts)))
    return Case(files, [f"{user} 1 1.00" for user in right], {NO_USER: none} if none else {}, columns=columns)


def at(text: str, right: str = "", **rule: Any) -> Case:
    """An order at a time as a platform writes it, right on this day if ``rule`` describes it."""
    files = {"a.csv": f'at,customer,order,paid\n"{text}",u1,1,1.00\n'}
    refused = {} if right else {"ts is unreadable": 1}
    events = (f"u1 1 1.00 {right}".removesuffix(f" {DAY}"),) if right else ()
    return Case(files, events, refused, columns={"ts": {"column": "at", **rule}} if rule else {})


def option(name: str, value: Any) -> Case:
    """An option of Spark's reader that may drop rows or guess types."""
    error = rf"options.*{name} can't be set"
    return Case(csv("u1,1,1,Mug,1.00,"), error=error, table={"options": {name: value}})


def part(task: int, uuid: str, folder: str = "") -> str:
    """Name of a part file of one of Spark's writes."""
    return f"{folder}part-{task:05d}-{uuid}-c000.csv"


ONE_WRITE, OTHER_WRITE = "0a1b2c3d-0000-4000-8000-00000000000a", "0a1b2c3d-0000-4000-8000-00000000000b"
MUG = csv("u1,1,1,Mug,2.50,")["a.csv"]
NOTE = f'"please call\n{DAY} 10:00:00,u9,9,1,Mug,999.00,now"'
OPEN_END = f'u1,1,1,Mug,10.00,"please call\n{DAY} 10:00:00,u2,2,1,Cup,20.00'
OPEN_NEXT = f'u1,1,1,"Mug,10.00,\n{DAY} 10:00:00,u2,2,1,"Cup",20.00,'

TORN_LINES = {
    "an unquoted comma, and a line cut short": Case(
        {
            "a.csv": "at,customer,order,name,paid,list_price\n2024-05-01 10:00:00,u1,1,Mug, 5,10.00,12.00\n"
            "2024-05-01 10:00:00,u2,2,Cup,7\n2024-05-01 10:00:00,u3,3,Pot,9.00,9.00\n"
        },
        ("u3 3 9.00",),
        {TORN: 2},
    ),
    "a comma more at the end": Case(csv("u1,1,1,Mug,5.00,1,", "u3,3,1,Pot,9.00,"), ("u3 3 9.00",), {TORN: 1}),
    "the last line half written": Case(
        {"a.csv": HEADER + f"{DAY} 10:00:00,u3,3,1,Pot,9.00,\n{DAY} 10:00:00,u1,1,1,Mug,5"}, ("u3 3 9.00",), {TORN: 1}
    ),
    "commas in a file of semicolons": Case(
        {"a.csv": f"at;customer;order;paid\n{DAY};u1;1;5.00\n{DAY},u2,2,7.00\n"},
        ("u1 1 5.00",),
        {TORN: 1},
        table={"options": {"sep": ";"}},
    ),
    "a torn line that a condition reads": Case(
        {"a.csv": f"at,customer,order,paid,status\n{DAY},u1,1,5.00,paid\n{DAY},u2,2,7.00\n{DAY},u3,3,1,500.00,paid\n"},
        ("u1 1 5.00",),
        {TORN: 2},
        table={"where": "status = 'paid'"},
    ),
}
QUOTES = {
    "an order in a quoted note": Case(csv(f"u1,1,1,Mug,10.00,{NOTE}"), ("u1 1 10.00",), rows=1),
    "a quote open to the end": Case(csv("u0,0,1,Mug,1.00,", OPEN_END), ("u0 0 1.00",), {TORN: 1}, rows=2),
    "a quote open to another": Case(csv(OPEN_NEXT, "u0,0,1,Mug,1.00,"), ("u0 0 1.00",), {TORN: 1}, rows=2),
    "inches in a name": Case(
        csv('u1,1,1,15" screen,10.00,', 'u1,1,2,"15"" screen",5.00,'), ("u1 1 10.00", "u1 1 5.00")
    ),
    "words after a closed quote": Case(
        csv('u1,1,1,"Mug" blue,10.00,', "u2,2,1,Cup,1.00,"), ("u1 1 10.00", "u2 2 1.00")
    ),
    "breaks of Windows in a note": Case(
        {
            "a.csv": f'{HEADER}{DAY},u1,1,1,"Mug\r\nblue",10.00,\r\n{DAY},u2,2,1,Cup,1.00,\r\n'.replace(
                "price\n", "price\r\n"
            )
        },
        ("u1 1 10.00", "u2 2 1.00"),
        rows=2,
    ),
    "quotes escaped by backslashes": Case(
        csv(r'u1,1,1,"a \"b\", c",10.00,', "u2,2,1,Cup,1.00,"),
        ("u1 1 10.00", "u2 2 1.00"),
        table={"options": {"escape": "\\"}},
    ),
    "an open quote without multiLine": Case(
        csv('u1,1,1,Mug,10.00,"please call', "u2,2,1,Cup,1.00,"),
        ("u2 2 1.00",),
        {TORN: 1},
        table={"options": {"multiLine": False}},
    ),
}
EQUAL_LINES = {
    "parts of one write": Case({part(0, ONE_WRITE): MUG, part(1, ONE_WRITE): MUG}, ("u1 1 2.50",) * 2),
    "equal lines in one file": Case(csv("u1,1,1,Mug,2.50,", "u1,1,1,Mug,2.50,"), ("u1 1 2.50",) * 2),
    "parts of one write in folders": Case(
        {part(0, ONE_WRITE, "shop=a/"): MUG, part(0, ONE_WRITE, "shop=b/"): MUG}, ("u1 1 2.50",) * 2
    ),
    "two parts of one write and one of another": Case(
        {part(0, ONE_WRITE): MUG, part(1, ONE_WRITE): MUG, part(0, OTHER_WRITE): MUG}, ("u1 1 2.50",) * 2
    ),
}
DECIMALS, THOUSANDS = "amount has more than 2 decimals", "amount has a point that may part thousands"
MONEY = {
    "three lines of 0.0045": Case(csv(*["u1,1,1,Mug,0.0045,"] * 3, "u2,2,1,Cup,1,"), ("u2 2 1.00",), {DECIMALS: 3}),
    "three lines of 0.0045, rounded": Case(
        csv(*["u1,1,1,Mug,0.0045,"] * 3), ("u1 1 0.00",) * 3, columns={"amount": {"column": "paid", "round": True}}
    ),
    "1.234": money("1.234", rule=THOUSANDS),
    "1.234 of a thousand": money("1.234", "1234.00", decimal=",", thousands="."),
    "12,50": money("12,50"),
    "12,50 described": money("12,50", "12.50", decimal=","),
    "1.234,56": money("1.234,56"),
    "1.234,56 described": money("1.234,56", "1234.56", decimal=",", thousands="."),
    "5,00-": money("5,00-"),
    "5,00- described": money("5,00-", "-5.00", decimal=",", negative="trailing"),
    "(5.00)": money("(5.00)"),
    "(5.00) described": money("(5.00)", "-5.00", negative="parentheses"),
    "¥1,234": money("¥1,234"),
    "¥1,234 described": money("¥1,234", "1234.00", symbol="¥", thousands=","),
    "1,234.50": money("1,234.50"),
    "1 234,50 € with a blank that doesn't break": money(
        "1\u00a0234,50 €", "1234.50", decimal=",", thousands="\u00a0", symbol="€"
    ),
    "0.1 + 0.2": money("0.30000000000000004", "0.30"),
    "12.34.56 described": money("12.34.56", decimal=",", thousands="."),
    "a negative discount": Case(
        csv("u1,1,1,Mug,5.00,-1.00", "u2,2,1,Cup,1.00,0.50"),
        ("u2 2 1.00",),
        {"discount is negative": 1},
        columns={"discount": "list_price"},
    ),
    "a discount that a refund takes back": Case(
        csv("u1,1,1,Mug,-5.00,-1.00"), ("u1 1 -5.00",), columns={"discount": "list_price"}
    ),
    "a negative quantity alone": Case(
        csv("u1,1,-2,Mug,5.00,", "u2,2,1,Mug,1.00,", "u3,3,-2,Mug,-5.00,"),
        ("u2 2 1.00", "u3 3 -5.00"),
        {"quantity is negative, amount is not": 1},
        columns={"quantity": "line"},
    ),
    "a line without a price": Case(csv("u1,1,1,Mug,,", "u2,2,1,Cup,0,"), ("u2 2 0.00",), {"amount is missing": 1}),
    "an amount beyond all bounds": Case(
        csv("u1,1,1,Mug,1e25,", "u2,2,1,Cup,1,"), ("u2 2 1.00",), {"amount is unreadable": 1}
    ),
}
NOBODY = ("nan", "NULL", "0", "-1", "\\N", " ", "")
IDS = {
    "ids with .0": ids("17850.0", "17850", right=["17850", "17850"]),
    "ids with .0 in Parquet": Case(table(customer=[17850.0, 12.5]), ("17850 1 1.00", "12.5 1 1.00")),
    "NaN in Parquet": Case(table(customer=[float("nan"), None, 3.0]), ("3 1 1.00",), {NO_USER: 2}),
    "ids that are none": ids(*NOBODY, "u1", right=["u1"], none=len(NOBODY)),
    "a user 0": ids("0", "-1", right=["0"], none=1, valid=["0"]),
    "blanks around ids": ids("u1\t", "\u00a0u1", "\u3000u1 ", right=["u1"] * 3),
    "ids in two cases": ids("Anna", "anna", right=["anna", "anna"], lower=True),
    "ids that case tells apart": ids("Anna", "anna", right=["Anna", "anna"]),
    "a customer that is an object": Case(
        jsonl({"customer": {"id": 7, "email": "a@example.com"}}, {"customer": "7"}),
        ("7 1 1.00",),
        {"user_id is unreadable": 1},
    ),
    "zeros before an id": ids("00123", "123", "123.50", right=["00123", "123", "123.50"]),
    "ids of twenty digits": Case(
        jsonl({"customer": 12345678901234567890}, {"customer": "12345678901234567891"}),
        ("12345678901234567890 1 1.00", "12345678901234567891 1 1.00"),
    ),
    "ids that are none in other programs": ids("#N/A", "<NA>", "undefined", "None", "u1", right=["u1"], none=4),
}
OPTIONS = {
    f"the option {name}": option(name, value)
    for name, value in {
        "comment": "#",
        "pathGlobFilter": "*.txt",
        "modifiedAfter": "2024-01-01T00:00:00",
        "mode": "DROPMALFORMED",
        "inferSchema": True,
        "ignoreCorruptFiles": True,
    }.items()
}

LINES = (
    "at,customer,order,Quantity,UnitPrice,status\n",
    "u1,1,6,2.55,paid",
    "u2,C2,-1,2.50,refunded",
    "u3,3,2,5.00,voided",
)
PRICED: Mapping[str, Any] = {"amount": {"expr": "Quantity * UnitPrice"}}
LOG = {
    "a.csv": f"at,customer,event,price\n{DAY},u1,view,5\n{DAY},u1,cart,5\n{DAY},u1,purchase,5\n{DAY},u2,view,\n{DAY},u2\n"
}
ORDER: dict[str, Any] = {
    "customer": {"id": 7},
    "items": [{"sku": "a", "price": 2.5, "qty": 2}, {"sku": "b", "price": 1.1, "qty": 3}],
}
INSTANT = datetime(2024, 5, 1, 10, tzinfo=UTC)
LANGUAGE = {
    "amounts of an expression": Case(
        csv(*LINES[1:], header=LINES[0]), ("u1 1 15.30", "u2 C2 -2.50", "u3 3 10.00"), columns=PRICED
    ),
    "a condition": Case(
        csv(*LINES[1:], header=LINES[0]),
        ("u1 1 15.30", "u2 C2 -2.50"),
        left_out=1,
        columns=PRICED,
        table={"where": "status NOT IN ('cancelled', 'voided')"},
    ),
    "a condition on a word in the place of a number": Case(
        csv("u1,1,1,Mug,5.00,x", "u2,2,1,Cup,1.00,3", "u3,3,1,Cup,1.00,0"),
        ("u2 2 1.00",),
        {"where is unreadable": 1},
        left_out=1,
        table={"where": "list_price > 1"},
    ),
    "a price with a comma in an expression": Case(
        csv('u1,1,6,"2,55",paid', header=LINES[0]), (), {"amount is unreadable": 1}, columns=PRICED
    ),
    "one log for several tables": Case(
        LOG,
        (f"u1 {DAY}T00:00:00 5.00", "u1 browse", "u1 cart", "u2 browse"),
        {TORN: 2},
        left_out=3 + 1,
        columns={"order_id": None, "amount": "price"},
        table={"where": "event = 'purchase'"},
        mapping={
            "behaviours": {
                "path": "files",
                "format": "csv",
                "where": "event IN ('view', 'cart')",
                "columns": {
                    "user_id": "customer",
                    "ts": "at",
                    "action": {"column": "event", "values": {"view": "browse"}},
                },
            }
        },
    ),
    "nested fields": Case(
        jsonl({"customer": {"id": 7}, "paid": {"gross": "7.50"}}, {"customer": None, "paid": {"gross": 2}}),
        ("7 1 7.50",),
        {NO_USER: 1},
        columns={"user_id": "customer.id", "amount": "paid.gross"},
    ),
    "arrays": Case(
        jsonl(ORDER, {**ORDER, "items": []}),
        ("7 1 5.00", "7 1 3.30"),
        left_out=1,
        rows=3,
        columns={"user_id": "customer.id", "amount": {"expr": "items.price * items.qty"}},
        table={"explode": "items"},
    ),
    "cents": Case(
        csv("u1,1,1,Mug,1999,", "u2,2,1,Mug,-5,", "u3,3,1,Mug,1999.5,"),
        ("u1 1 19.99", "u2 2 -0.05"),
        {"amount is unreadable": 1},
        columns={"amount": {"column": "paid", "scale": 0.01}},
    ),
    "lines before the header": Case(
        {"a.csv": f"Orders of May\n\n{HEADER}{DAY},u1,1,1,Mug,5.00,\n"}, ("u1 1 5.00",), rows=1, table={"skip_lines": 2}
    ),
    "values in a path": Case(
        {"day=2024-05-02/shop=b%2Fc/a.csv": "customer,paid\nu1,5.00\n"},
        ("u1 b/c 5.00 2024-05-02",),
        columns={"ts": "day", "order_id": "shop"},
    ),
    "a total on each line": Case(
        csv("u1,1,1,Mug,10.00,", "u1,1,2,Cup,10.00,", "u1,1,3,Pot,10.00,", "u2,2,1,Cup,1.00,"),
        ("u1 1 3.34", "u1 1 3.33", "u1 1 3.33", "u2 2 1.00"),
        table={"per_order": ["amount"]},
    ),
    "two totals of one order": Case(
        csv("u1,1,1,Mug,10.00,", "u1,1,2,Cup,11.00,", "u2,2,1,Cup,1.00,"),
        ("u2 2 1.00",),
        {"amount is unreadable": 2},
        table={"per_order": ["amount"]},
    ),
    "a query in a condition": Case(LOG, error="where.*has a query", table={"where": "event IN (SELECT 1)"}),
    "a file in an expression": Case(
        LOG, error="input_file_name can't be used", columns={"amount": {"expr": "length(input_file_name())"}}
    ),
    "an amount at random": Case(LOG, error="rand gives another value", columns={"amount": {"expr": "rand() * price"}}),
    "a function of Java": Case(
        LOG, error="java_method can't be used", columns={"amount": {"expr": "java_method('java.lang.Math', 'random')"}}
    ),
}
TIMES = {
    "nanoseconds": at("1714557600000000000", DAY, unit="ns"),
    "milliseconds": at("1714557600000", DAY, unit="ms"),
    "days of Excel": at("45413.4166666667", DAY, unit="excel_days"),
    "23:30 in Shanghai": at("2024-05-02 07:30:00", DAY, timezone="Asia/Shanghai"),
    "a zone in brackets": at("2024-05-02T00:30+02:00[Europe/Berlin]", DAY),
    "small letters": at("2024-05-01t23:59:59z", DAY),
    "IST described": at("2024-05-02 04:00 IST", DAY, zones={"IST": "Asia/Kolkata"}),
    "IST": at("2024-05-02 04:00 IST"),
    "an offset without a colon": at("2024-05-02 00:30:00 +0200", DAY),
    "an American date": at("05/01/2024 10:00"),
    "an American date described": at("5/1/2024 10:00", DAY, format="M/d/yyyy H:mm"),
    "the 31st of a month of 30 days": at("2024-04-31 10:00:00"),
}
NANOSECONDS = pa.array([int(INSTANT.timestamp()) * 10**9], pa.timestamp("ns", "UTC"))
FRENCH = "at,customer,order,paid\n2024-05-01,Zoë,1,5.00\n"
ERRORS = {
    "a column that isn't there": Case(
        csv("u1,1,1,Mug,5.00,"),
        error="total: column is missing; there are 'at', 'customer'",
        columns={"amount": "total"},
    ),
    "a column in other letters": Case(csv("u1,1,1,Mug,5.00,"), error="did you mean 'paid'", columns={"amount": "Paid"}),
    "a file without a header": Case(
        {"a.csv": f"{DAY},user-4711,1,5.00\n{DAY},u2,1,5.00\n"}, error="header: false", hidden="4711"
    ),
    "semicolons": Case(
        {"a.csv": f"at;customer;order;paid\n{DAY};user-4711;1;5.00\n"}, error="options: {sep: ", hidden="4711"
    ),
    "nanoseconds in Parquet": Case(table(customer=["u1"], at=NANOSECONDS), ("u1 1 1.00",)),
    "nanoseconds in Parquet without a zone": Case(
        table(customer=["u1"], at=pa.array([1714557600 * 10**9], pa.timestamp("ns"))), ("u1 1 1.00",)
    ),
    "cp1252": Case({"a.csv": FRENCH.encode("cp1252")}, error="encoding", hidden="Zo"),
    "cp1252 in a column that nothing reads": Case(
        {"a.csv": f"{FRENCH[:-1]},Zoé\n".replace("paid\n", "paid,name\n").replace("Zoë", "u1").encode("cp1252")},
        ("u1 1 5.00",),
    ),
    "one broken name among many": Case(
        {"a.csv": (FRENCH + f"{DAY},u1,1,1.00\n" * 200).encode("cp1252")},
        ("u1 1 1.00",) * 200,
        {"user_id is unreadable": 1},
    ),
    "cp1252 described": Case(
        {"a.csv": FRENCH.encode("cp1252")}, ("Zoë 1 5.00",), table={"options": {"encoding": "cp1252"}}
    ),
    "UTF-16": Case({"a.csv": FRENCH.encode("utf-16")}, error="encoding", hidden="Zo"),
    "UTF-16 described": Case(
        {"a.csv": FRENCH.encode("utf-16")}, ("Zoë 1 5.00",), rows=1, table={"options": {"encoding": "UTF-16"}}
    ),
    "UTF-8 with its mark": Case({"a.csv": FRENCH.encode("utf-8-sig")}, ("Zoë 1 5.00",)),
    "a damaged Parquet file": Case(
        {"a.parquet": b"PAR1 user-4711 PAR1"}, error="a.parquet.*can't be read", hidden="4711"
    ),
}
KINDS = {
    "torn lines": TORN_LINES,
    "open quotes": QUOTES,
    "equal lines": EQUAL_LINES,
    "money": MONEY,
    "ids": IDS,
    "options": OPTIONS,
    "the language": LANGUAGE,
    "times": TIMES,
    "errors": ERRORS,
}
"""Kind -> name -> case."""
CASES = {f"{kind}: {name}": case for kind, cases in KINDS.items() for name, case in cases.items()}
