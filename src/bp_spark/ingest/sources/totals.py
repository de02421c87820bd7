"""An order's total on each of its lines -> a share for each line, so that the shares sum to the total."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from bp_spark.ingest.sources.contract import text_map

_ORDER = ("delivery", "user_id", "order_id")
_LINE = ("line_id", "item_id", "ts", "quantity", "amount", "discount", "coupon_discount", "currency", "cost")
_MONEY = "decimal(18,2)"


def shared(df: DataFrame, columns: Sequence[str]) -> DataFrame:
    """Share totals among the lines of each order.

    Lines get equal shares. The cents that are left go to the first lines, in the order of ``line_id``, item, time and the other
    columns. A line without a total belongs to an order whose other lines have one. Where the totals of an order differ, or one
    of them is unreadable, no line gets a share, and the totals go to ``unreadable``. So does a total without an ``order_id``.

    Args:
        df: transactions in the raw contract.
        columns: columns that hold the order's total.
    """
    lines = Window.partitionBy(*_ORDER)
    place = F.row_number().over(lines.orderBy(*_LINE))
    df = df.withColumns({"_lines": F.count(F.lit(1)).over(lines), "_place": place})
    states = {f"_state of {name}": _state(name, lines) for name in columns}
    df = df.withColumns(states)
    shares = {name: F.when(_is_shared(name), _share(name)) for name in columns}
    unread = {name: F.when(_needs_text(name), _text(name)) for name in columns}
    texts = F.map_concat(F.coalesce("unreadable", text_map({})), text_map(unread))
    return df.withColumns({**shares, "unreadable": F.when(F.size(texts) > 0, texts)}).drop("_lines", "_place", *states)


def _state(name: str, lines: Any) -> Column:
    """Return least and greatest total of the order's lines, and whether one of them is unreadable."""
    unreadable = F.coalesce(F.map_contains_key("unreadable", name), F.lit(False))
    return F.struct(
        F.min(name).over(lines).alias("least"),
        F.max(name).over(lines).alias("greatest"),
        F.max(unreadable).over(lines).alias("unreadable"),
    )


def _is_shared(name: str) -> Column:
    state = F.col(f"_state of {name}")
    return F.col("order_id").isNotNull() & (state["least"] == state["greatest"]) & ~state["unreadable"]


def _needs_text(name: str) -> Column:
    """Return whether a total can't be shared, and the line doesn't hold the text of an unreadable one already."""
    state = F.col(f"_state of {name}")
    has_total = state["greatest"].isNotNull() | state["unreadable"]
    keys = F.coalesce(F.map_keys("unreadable"), F.array().cast("array<string>"))
    return (
        has_total
        & ~F.coalesce(_is_shared(name), F.lit(False))
        & ~F.arrays_overlap(keys, F.array(F.lit(name), F.lit("row")))
    )


def _text(name: str) -> Column:
    """Return the line's total as text, or those of its order."""
    state = F.col(f"_state of {name}")
    others = F.concat_ws(" | ", state["least"].cast("string"), state["greatest"].cast("string"))
    return F.coalesce(F.col(name).cast("string"), F.nullif(others, F.lit("")), F.lit("<total>"))


def _share(name: str) -> Column:
    """Return the line's share of the order's total."""
    cents = f"abs(CAST(`_state of {name}`.greatest * 100 AS BIGINT))"
    share = F.expr(f"{cents} div _lines + CASE WHEN _place <= {cents} % _lines THEN 1 ELSE 0 END")
    sign = F.when(F.col(f"_state of {name}")["greatest"] < 0, -1).otherwise(1)
    return (share * sign * F.lit(Decimal("0.01"))).cast(_MONEY)
