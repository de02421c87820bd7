"""Guesses: a :class:`~bp_spark.ingest.onboarding.sniff.Sample` -> tables of a mapping, each guess with reason and doubts.

No reason and no doubt quotes a value of the files. Conditions quote only words of :mod:`bp_spark.ingest.onboarding.names`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bp_spark.ingest.onboarding import amounts
from bp_spark.ingest.onboarding.columns import Columns, filled_share, is_email, sql_name
from bp_spark.ingest.onboarding.forms import TimeForm, currency_of, number_form, time_form
from bp_spark.ingest.onboarding.names import (
    ACTIONS,
    CANCELLED,
    COUNTRIES,
    PAID,
    PURCHASES,
    REFUNDED,
    SURELY_CANCELLED,
    plain,
)
from bp_spark.ingest.onboarding.sniff import Sample

TODO = "TODO"
"""Stands where nothing could be guessed; ``bp-spark check`` refuses it."""
_NO_USERS = ("0", "-1", "0.0")
_GUESTS = 0.02
"""Share of lines without a user from which an e-mail address is the better id."""
_MAJORITY = 0.5
_MANY = 0.8
_FEW = 0.02
_SEGMENT_WORDS = ("user", "customer", "client", "member", "buyer", "shopper", "visitor")
_NO_IDS = (
    "name",
    "phone",
    "city",
    "address",
    "group",
    "segment",
    "type",
    "country",
    "zip",
    "note",
    "agent",
    "age",
    "service",
)


@dataclass
class Guess:
    """A column of the contract.

    Attributes:
        value: a column's name, or the keys of a rule of the mapping.
        comments: reason and doubts.
    """

    value: str | Mapping[str, Any]
    comments: Sequence[str] = ()


@dataclass
class TableGuess:
    """A table of the mapping.

    Attributes:
        section: name of the table in the mapping, as ``transactions``.
        sample: sample that the guesses are based on.
        columns: guess by column of the contract.
        where: condition that its rows meet.
        per_order: columns that hold the order's total on each line.
        comments: reasons and doubts about the table as a whole.
        timezone: zone of its times, with the reason.
    """

    section: str
    sample: Sample
    columns: dict[str, Guess] = field(default_factory=dict)
    where: str | None = None
    per_order: Sequence[str] = ()
    comments: list[str] = field(default_factory=list)
    timezone: Guess | None = None


def orders(sample: Sample) -> list[TableGuess]:
    """Return the tables of a sample of orders, or of events with purchases among them."""
    columns = Columns(sample)
    events = _event_column(columns)
    table = TableGuess("transactions", sample, comments=list(sample.doubts))
    table.columns["user_id"] = _user(columns)
    order_id = _order_id(columns)
    item = columns.find("item_id", part="line")
    line = columns.line_id(order_id, item)
    if order_id:
        table.columns["order_id"] = Guess(order_id)
    else:
        table.comments.append("no column looks like an order's number: lines of one user and moment count as one order")
    table.columns["ts"] = _time(columns, table)
    amount = amounts.amount(columns, order_id, item, is_event_log=events is not None)
    if amount.whole_orders:
        line, item = None, None
        table.columns["line_id"] = Guess({"value": "order"}, ("so a later export of the order corrects it",))
    if line:
        table.columns["line_id"] = Guess(line, ("a newer delivery of the same line corrects it",))
    if item:
        table.columns["item_id"] = Guess(item)
    if amount.quantity and not amount.whole_orders:
        table.columns["quantity"] = Guess(amount.quantity)
    table.columns["amount"] = Guess(amount.rule, amount.comments)
    table.per_order = amount.per_order
    if amount.discount:
        table.columns["discount"] = Guess(
            amount.discount,
            ("taken for a reduction that the amount already has; remove it if the amount is before discounts",),
        )
    if currency := _currency_column(columns):
        is_upper = all(str(code).isupper() for code in sample.values(currency))
        table.columns["currency"] = Guess(currency if is_upper else {"expr": f"upper({sql_name(currency)})"})
    conditions = [*amount.conditions, *_conditions(columns, table, events)]
    if events:
        purchases, behaviours = _of_events(columns, events)
        conditions.insert(0, f"{sql_name(events)} IN ({_texts(purchases)})")
    table.where = " AND ".join(conditions) or None
    tables = [table]
    if events and behaviours:
        tables.append(_behaviours(columns, events, behaviours, table))
    items = _items(columns, columns.find("item_id", part="line"), exclude=[order_id])
    return [*tables, items] if items else tables


def log(sample: Sample, section: str) -> TableGuess:
    """Return the table of a sample of behaviours, searches, reviews or items."""
    columns = Columns(sample)
    table = TableGuess(section, sample, comments=list(sample.doubts))
    if section == "items":
        items = _items(columns, columns.find("item_id"), exclude=[])
        table.columns = items.columns if items else {"item_id": Guess(columns.find("item_id") or TODO)}
        return table
    table.columns["user_id"] = _user(columns)
    table.columns["ts"] = _time(columns, table)
    names = {
        "behaviours": ("action", "item_id", "dwell_s"),
        "searches": ("query", "clicked_item_id"),
        "reviews": ("item_id", "rating", "text"),
    }[section]
    for name in names:
        accepts = (lambda values: number_form(values) is not None) if name in ("dwell_s", "rating") else None
        if column := columns.find(name, accepts):
            table.columns[name] = Guess(column)
        elif name in ("action", "query"):
            table.columns[name] = Guess(TODO, (_no_column(columns, name),))
    action = table.columns.get("action")
    if action is not None and isinstance(action.value, str) and action.value != TODO:
        words = {str(value) for value in sample.values(action.value)}
        named = {word: ACTIONS[word.lower()] for word in sorted(words) if word.lower() in ACTIONS}
        others = len(words - set(named))
        comment = (f"{others} other actions are unknown here: their rows go to quarantine",) if others else ()
        table.columns["action"] = Guess({"column": action.value, "values": named} if named else action.value, comment)
    return table


def currency(tables: Sequence[TableGuess]) -> tuple[str, str]:
    """Return the platform's currency and the reason; TODO if nothing in the files shows it."""
    columns = Columns(tables[0].sample)
    column = _currency_column(columns)
    if column:
        code = Counter(str(value).upper() for value in columns.sample.values(column)).most_common(1)[0][0]
        return code, f"most frequent in column {column!r}; others are converted by a table of rates"
    amount = tables[0].columns["amount"].value
    symbol = amount.get("symbol") if isinstance(amount, Mapping) else None
    if symbol and (of_sign := currency_of(symbol)):
        return of_sign, "from the sign in the amounts"
    for name in columns.sample.columns:
        words = [word for word in name.upper().replace("_", " ").replace("(", " ").replace(")", " ").split() if word]
        of_name = next((word for word in words if word in {money for money, _ in COUNTRIES.values()}), None)
        if of_name:
            return of_name, f"from the name of column {name!r}"
    if country := _country(columns):
        return country[0], "a guess: the currency of the country that most rows name. Check it"
    return TODO, "nothing in the files shows it: write its code of three letters, as EUR"


# --- columns -------------------------------------------------------------------------------------------------------------


def _no_column(columns: Columns, name: str) -> str:
    names = ", ".join(repr(column) for column in columns.sample.columns[:40])
    return f"no column looks like {name}: name it. Columns are {names}"


def _user(columns: Columns) -> Guess:
    column = columns.find("user_id", part="order") or columns.containing(_SEGMENT_WORDS, _NO_IDS)
    email = columns.find_email()
    comments: list[str] = []
    if column and email and column != email and _guests(columns, column) > _GUESTS:
        if filled_share(columns.sample, email) > 1 - _guests(columns, column):
            comments.append(f"column {column!r} is missing or 0 for guests, so the e-mail address is the id")
            column = email
        else:
            comments.append("many rows have no user")
    column = column or email
    if column is None:
        return Guess(TODO, (_no_column(columns, "a user's id"),))
    share = _guests(columns, column)
    if share:
        comments.append(
            f"{share:.1%} of the rows looked at have none: they go to quarantine (rule: user_id is missing)"
        )
    values = columns.sample.values(column)
    if any(isinstance(value, str) and value.endswith(".0") for value in values):
        comments.append("some ids end in .0: 17850.0 and 17850 are one user, so there is nothing to do")
    if is_email(values):
        return Guess({"column": column, "lower": True}, (*comments, "Anna@… and anna@… are one user"))
    return Guess(column, comments)


def _guests(columns: Columns, column: str) -> float:
    """Return the share of rows without a user."""
    users = sum(str(value) not in _NO_USERS for value in columns.sample.values(column))
    return 1 - users / len(columns.sample.rows)


def _order_id(columns: Columns) -> str | None:
    if columns.has("lineitemname") and (name := columns.named("name")):
        # an export of Shopify
        return name
    return columns.find("order_id", part="order", least=_MANY)


def _time(columns: Columns, table: TableGuess) -> Guess:
    column = columns.find("ts", lambda values: time_form(values) is not None, part="order")
    column = column or columns.of_form(lambda values: time_form(values) is not None)
    if column is None:
        return Guess(TODO, (_no_column(columns, "the time of the order"),))
    form = time_form(columns.sample.values(column)) or TimeForm()
    comments = list(form.doubts)
    if not form.has_zone:
        country = _country(columns)
        zone = country[1] if country else None
        if zone:
            table.timezone = Guess(zone, ("times have no zone; a guess from the country that most rows name",))
        else:
            comments.append(
                "times have no zone and are taken for UTC; if they aren't, write timezone: Europe/Berlin or the like"
            )
    return Guess({"column": column, **form.keys} if form.keys else column, comments)


def _country(columns: Columns) -> tuple[str, str | None] | None:
    column = columns.find("country")
    if column is None:
        return None
    name, count = Counter(str(value).lower() for value in columns.sample.values(column)).most_common(1)[0]
    return COUNTRIES.get(name) if count > _MAJORITY * len(columns.sample.rows) else None


def _currency_column(columns: Columns) -> str | None:
    def codes(values: Sequence[Any]) -> bool:
        return all(len(str(value)) == 3 and str(value).isalpha() for value in values)  # noqa: PLR2004

    return columns.find("currency", codes)


def _conditions(columns: Columns, table: TableGuess, events: str | None) -> list[str]:
    """Return conditions that leave out unpaid rows."""
    conditions = []
    for name in columns.all_named("status"):
        if name == events:
            continue
        words = {str(value).lower() for value in columns.sample.values(name)}
        is_known = any(word in words for word in (*CANCELLED, *REFUNDED, *PAID))
        cancelled = [word for word in CANCELLED if word in words or (is_known and word in SURELY_CANCELLED)]
        column = sql_name(name)
        if cancelled:
            conditions.append(f"({column} IS NULL OR lower({column}) NOT IN ({_texts(cancelled)}))")
            table.comments.append(
                f"where: leaves out rows whose {name!r} says that nobody paid; check whether its words are the right ones"
            )
        else:
            table.comments.append(
                f"{name!r} has no word for a cancelled order among the rows looked at. If there is one: "
                f"where: \"{column} <> 'cancelled'\""
            )
        if any(word in words for word in REFUNDED):
            table.comments.append(f"{name!r} has refunded orders: is the amount before or after the refund?")
        break
    if parent := columns.named("parentitemid"):
        conditions.append(f"{sql_name(parent)} IS NULL")
        table.comments.append(
            f"where: a row with a {parent!r} is a variant or part of another row, which has the price"
        )
    for kind in ("cancelled_at", "test"):
        if flag := columns.find(kind, least=0.0):
            column = sql_name(flag)
            flags = {str(value).lower() for value in columns.sample.values(flag)} <= {
                "true",
                "false",
                "yes",
                "no",
                "0",
                "1",
            }
            is_unset = f"lower({column}) NOT IN ('true', 'yes', '1')"
            conditions.append(f"({column} IS NULL OR {is_unset})" if flags else f"{column} IS NULL")
    return conditions


def _texts(words: Sequence[str]) -> str:
    return ", ".join("'" + word.replace("'", "''") + "'" for word in words)


# --- logs of events, items -----------------------------------------------------------------------------------------------


def _event_column(columns: Columns) -> str | None:
    """Return the column with kinds of events, if purchases and other kinds are among them."""
    for name in columns.sample.columns:
        words = Counter(str(value).lower() for value in columns.sample.values(name))
        known = sum(count for word, count in words.items() if word in ACTIONS or word in PURCHASES)
        kinds = {word in PURCHASES for word in words if word in ACTIONS or word in PURCHASES}
        if kinds == {True, False} and known > _MAJORITY * words.total():
            return name
    return None


def _of_events(columns: Columns, column: str) -> tuple[list[str], list[str]]:
    """Return the words of purchases and of behaviours, as the files write them."""
    words = sorted({str(value) for value in columns.sample.values(column)})
    purchases = [word for word in words if word.lower() in PURCHASES]
    return purchases, [word for word in words if word.lower() in ACTIONS and word not in purchases]


def _behaviours(columns: Columns, events: str, words: Sequence[str], orders_table: TableGuess) -> TableGuess:
    actions = {word: ACTIONS[word.lower()] for word in words if ACTIONS[word.lower()] != word}
    shared = {name: guess for name, guess in orders_table.columns.items() if name in ("user_id", "ts", "item_id")}
    return TableGuess(
        "behaviours",
        columns.sample,
        {
            "user_id": shared["user_id"],
            "ts": shared["ts"],
            "action": Guess({"column": events, **({"values": actions} if actions else {})}),
            **({"item_id": shared["item_id"]} if "item_id" in shared else {}),
        },
        where=f"{sql_name(events)} IN ({_texts(words)})",
        comments=["other events of the same files; kinds of events that are in neither list are not read"],
        timezone=orders_table.timezone,
    )


def _items(columns: Columns, item: str | None, exclude: Sequence[str | None]) -> TableGuess | None:
    """Return the table of items; ``None`` if the files hold nothing but their ids."""
    if item is None:
        return None
    table = TableGuess("items", columns.sample, {"item_id": Guess(item)})
    for name in ("title", "category", "brand"):
        column = columns.find(name, exclude=[item, *exclude], part="line")
        if column is None:
            continue
        table.columns[name] = Guess(column)
        values = [str(value) for value in columns.sample.values(column)]
        if name == "category" and sum("." in value and " " not in value for value in values) > _MAJORITY * len(values):
            rule = {"expr": f"replace({sql_name(column)}, '.', ' > ')"}
            table.columns[name] = Guess(rule, ("a path from broad to narrow",))
    if len(table.columns) == 1:
        return None
    price = columns.find("price", lambda values: number_form(values) is not None, part="line")
    if price and plain(price) not in ("unitprice",):
        form = number_form(columns.sample.values(price))
        if form and not form.keys:
            table.columns["price"] = Guess(price)
    return table
