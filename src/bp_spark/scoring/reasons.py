"""Reasons of scores -> sentences that people read.

In: the column ``reasons`` of SCORES. Out: an array of as many sentences, made from the descriptions of the catalogue.
"""

from __future__ import annotations

from pyspark.sql import Column
from pyspark.sql import functions as F

from bp_spark.features.catalogue import Catalogue

_LONGEST = 1_000


def in_words(reasons: Column, features: Catalogue) -> Column:
    """``array<string>``, a sentence for each reason: what its group did to the expected spend, and the feature that did most.

    For example: "Recent purchases: +48.10; above all Spend less refunds (currency, 30 days) = 512.30".
    """
    named = {each.name: f"{each.description} ({each.unit}, {_span(each.window)})" for each in features.features}
    names = F.create_map(*(F.lit(text) for pair in named.items() for text in pair))

    def sentence(reason: Column) -> Column:
        group, feature = reason["group"], reason["feature"]
        value = F.coalesce(F.format_number(reason["value"], 2), F.lit("unknown"))
        foremost = F.concat(F.lit("; above all "), F.element_at(names, feature), F.lit(" = "), value)
        return F.concat(
            F.upper(F.left(group, F.lit(1))),
            F.substring(group, 2, _LONGEST),
            F.format_string(": %+,.2f", reason["contribution"]),
            F.coalesce(foremost, F.lit("")),
        )

    return F.transform(reasons, sentence)


def _span(window: str) -> str:
    return "ever" if window == "all" else window
