"""Reasons of scores as sentences for people, made from the feature descriptions of the catalogue."""

from __future__ import annotations

from pyspark.sql import Column
from pyspark.sql import functions as F

from bp_spark.features.catalogue import Catalogue

_MAX_CHARACTERS = 1_000
"""More characters than the name of any group has."""


def in_words(reasons: Column, features: Catalogue) -> Column:
    """Return ``array<string>``, one sentence a reason: the group's effect on the expected spend and its strongest feature.

    For example: "Recent purchases: +48.10; above all Spend less refunds (currency, 30 days) = 512.30".

    Args:
        reasons: The column ``reasons`` of SCORES.
        features: The catalogue that names the features.
    """
    descriptions = {
        feature.name: f"{feature.description} ({feature.unit}, {_span(feature.window)})"
        for feature in features.features
    }
    names = F.create_map(*(F.lit(text) for pair in descriptions.items() for text in pair))

    def sentence(reason: Column) -> Column:
        group, feature = reason["group"], reason["feature"]
        value = F.coalesce(F.format_number(reason["value"], 2), F.lit("unknown"))
        strongest = F.concat(F.lit("; above all "), F.element_at(names, feature), F.lit(" = "), value)
        return F.concat(
            F.upper(F.left(group, F.lit(1))),
            F.substring(group, 2, _MAX_CHARACTERS),
            F.format_string(": %+,.2f", reason["contribution"]),
            F.coalesce(strongest, F.lit("")),
        )

    return F.transform(reasons, sentence)


def _span(window: str) -> str:
    return "ever" if window == "all" else window
