"""The amount of an order line: which column holds it, or which columns it is computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import pstdev
from typing import Any

from bp_spark.ingest.onboarding.columns import Columns, filled_share, sql_name
from bp_spark.ingest.onboarding.forms import NumberForm, number_form
from bp_spark.ingest.onboarding.names import NAMES, plain

_MOST = 0.9
_SOME = 0.3
_ENOUGH_ORDERS = 5
_CENTS = 2
_TOTALS = (*NAMES["order_total"], "total", "totalamount", "paid", "amountpaid", "payment")
"""Names of columns that may hold an order's total."""


@dataclass
class Amount:
    """How an amount is read.

    Attributes:
        rule: a column's name, or the keys of a rule.
        comments: reason and doubts.
        per_order: ``["amount"]`` where each line holds the order's total.
        whole_orders: whether only the first line of an order has its total, so that a row is an order.
        conditions: conditions that rows must meet.
        quantity: column of the quantity.
        discount: column or rule of the discount.
    """

    rule: str | Mapping[str, Any]
    comments: list[str] = field(default_factory=list)
    per_order: Sequence[str] = ()
    whole_orders: bool = False
    conditions: Sequence[str] = ()
    quantity: str | None = None
    discount: str | Mapping[str, Any] | None = None


def _is_number(values: Sequence[Any]) -> bool:
    return number_form(values) is not None


def amount(columns: Columns, order_id: str | None, item: str | None, *, is_event_log: bool) -> Amount:
    """Return how the amount of a line is read.

    Args:
        columns: the columns.
        order_id: column of the order.
        item: column of the item.
        is_event_log: whether rows are events: a price is then that of one piece, bought once.
    """
    quantity = columns.find("quantity", _is_number, part="line", exclude=[order_id])
    price = columns.find("unit_price", _is_number, part="line")
    total = columns.find("line_total", _is_number, part="line")
    of_order = columns.find("order_total", _is_number, part="order") or (
        total if total and columns.sample.explode and not columns.is_in_line(total) else None
    )
    on_first = _on_first_line(columns, order_id, of_order) or _on_first_line(columns, order_id, total)
    if on_first:
        found = _whole_order(columns, on_first)
    elif of_order and columns.sample.explode:
        found = _of_column(columns, of_order)
        found.per_order = ["amount"]
        found.comments.append("the order's total, shared among its lines")
    elif total and not (columns.sample.explode and not columns.is_in_line(total)):
        found = _line_total(columns, total, quantity, item, order_id)
    elif price and quantity and not is_event_log:
        found = _product(columns, quantity, price, item)
    elif price:
        found = _of_column(columns, price)
        if not is_event_log:
            found.comments.append("a price; there is no quantity, so a row is taken for one piece")
    elif of_order:
        found = _line_total(columns, of_order, quantity, item, order_id)
    else:
        names = ", ".join(repr(name) for name in columns.sample.columns[:40])
        found = Amount(
            "TODO", [f"no column looks like an amount: name it, or write {{value: 1}} to count. Columns are {names}"]
        )
    found.quantity = quantity
    found.discount = None if found.whole_orders else _discount(columns)
    return found


def _keys(*forms: NumberForm | None) -> dict[str, Any]:
    """Return the marks of the numbers of several columns."""
    return {key: value for form in forms if form for key, value in form.keys.items()}


def _of_column(columns: Columns, column: str) -> Amount:
    form = number_form(columns.sample.values(column)) or NumberForm()
    keys, comments = _keys(form), list(form.doubts)
    if form.decimals > _CENTS and not form.doubts:
        keys["round"] = True
        comments.append("some have more than two decimals: each line is rounded")
    if form.negative:
        comments.append(f"{form.negative:.1%} are negative: they count as refunds")
    if refund := _refund(columns, column):
        expr = f"{sql_name(column)} - abs(coalesce({sql_name(refund)}, 0))"
        comments.append(f"less what was paid back ({refund!r})")
        return Amount({"expr": expr, **keys}, comments)
    return Amount({"column": column, **keys} if keys else column, comments)


def _refund(columns: Columns, column: str) -> str | None:
    """Return the column of what was paid back, if it is of the same rows as the amount."""
    if columns.is_in_line(column) or plain(column).startswith("current"):
        return None
    of_lines = not any(plain(column) == name for name in NAMES["order_total"])
    refund = columns.find("refund", _is_number, least=0.0)
    if refund is None or (of_lines and plain(refund) == "refundedtotal"):
        return None
    return refund


def _on_first_line(columns: Columns, order_id: str | None, total: str | None) -> str | None:
    """Return the column of totals if later lines of an order have none."""
    if order_id is None or total is None:
        return None
    orders = columns.orders(order_id, total)
    first_only = sum(values[0] is not None and all(value is None for value in values[1:]) for values in orders)
    return total if orders and first_only >= _MOST * len(orders) else None


def _whole_order(columns: Columns, total: str) -> Amount:
    found = _of_column(columns, total)
    found.whole_orders = True
    found.conditions = [f"{sql_name(total)} IS NOT NULL"]
    found.comments.append("only the first row of an order has its total, so an order is one event, without its items")
    return found


def _line_total(columns: Columns, total: str, quantity: str | None, item: str | None, order_id: str | None) -> Amount:
    if quantity and _is_per_piece(columns, quantity, total, item) is True:
        found = _product(columns, quantity, total, item)
        found.comments.insert(
            0, f"{total!r} stays the same whatever the quantity, so it is taken for a price per piece"
        )
        return found
    found = _of_column(columns, total)
    orders = columns.orders(order_id, total) if order_id else []
    repeated = sum(values[0] is not None and len(set(values)) == 1 for values in orders)
    if orders and repeated >= _MOST * len(orders):
        if plain(total) in _TOTALS or len(orders) >= _ENOUGH_ORDERS:
            found.per_order = ["amount"]
            found.comments.append(
                "all lines of an order have the same amount: taken for the order's total, which per_order shares among "
                "them. Remove per_order if it is the line's own"
            )
    elif plain(total) in ("total", "totalprice"):
        found.comments.append("taken for the line's total; if it is the order's, add per_order: [amount]")
    if quantity and "expr" not in found.rule:
        found.comments.append(
            "taken for the total of the line; if it is the price of a piece, multiply by the quantity"
        )
    return found


def _product(columns: Columns, quantity: str, price: str, item: str | None) -> Amount:
    form, of_quantity = (number_form(columns.sample.values(name)) for name in (price, quantity))
    if plain(price) == "price" and _is_per_piece(columns, quantity, price, item) is False:
        found = _of_column(columns, price)
        found.comments.append("grows with the quantity, so it is taken for the total of the line")
        return found
    comments = [*(form.doubts if form else ()), "price of a piece times quantity, rounded for each line"]
    if of_quantity and of_quantity.negative:
        comments.append(
            f"{of_quantity.negative:.1%} of the quantities are negative: cancellations, which count as refunds"
        )
    if form and form.zero:
        comments.append(
            f"{form.zero:.1%} of the prices are 0: gifts or corrections of the stock. cleaning.free_lines can refuse them"
        )
    rule = {"expr": f"{sql_name(quantity)} * {sql_name(price)}", **_keys(form), "round": True}
    return Amount(rule, comments)


def _is_per_piece(columns: Columns, quantity: str, money: str, item: str | None) -> bool | None:
    """Return whether money stays the same when more pieces of an item are bought; ``None`` if that is open."""
    if item is None:
        return None
    by_item: dict[Any, list[tuple[float, float]]] = {}
    for row in columns.sample.rows:
        pieces, value = _float(row.get(quantity)), _float(row.get(money))
        if row.get(item) is not None and pieces and pieces > 0 and value and value > 0:
            by_item.setdefault(row[item], []).append((pieces, value))
    same, grows = 0, 0
    for pairs in by_item.values():
        if len({pieces for pieces, _ in pairs}) < 2:  # noqa: PLR2004
            continue
        values, per_piece = [value for _, value in pairs], [value / pieces for pieces, value in pairs]
        spread = pstdev(values) / (sum(values) / len(values))
        spread_per_piece = pstdev(per_piece) / (sum(per_piece) / len(per_piece))
        same += spread < spread_per_piece
        grows += spread_per_piece < spread
    if same + grows < 2 or abs(same - grows) < _SOME * (same + grows):  # noqa: PLR2004
        return None
    return same > grows


def _float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _discount(columns: Columns) -> str | Mapping[str, Any] | None:
    """Return the column of reductions, where none is negative."""
    column = columns.find("discount", _is_number, part="line")
    if column is None or (columns.sample.explode and not columns.is_in_line(column)):
        return None
    form = number_form(columns.sample.values(column)) or NumberForm()
    if form.negative or form.doubts or filled_share(columns.sample, column) < _MOST:
        return None
    keys = _keys(form) | ({"round": True} if form.decimals > _CENTS else {})
    return {"column": column, **keys} if keys else column
