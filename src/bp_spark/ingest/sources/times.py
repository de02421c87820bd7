"""Times and days of a platform -> instants and dates, by the rules of a mapping. No name of a zone is guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql import types as T

from bp_spark.ingest.sources.lines import quoted_column
from bp_spark.ingest.sources.mapping import DayRule, TimeRule

MICROS = {"s": Decimal(1_000_000), "ms": Decimal(1_000), "us": Decimal(1), "ns": Decimal("0.001")}
"""Microseconds of each unit of an epoch."""
DATE_AND_TIME = r"^\d{4}-\d\d?-\d\d?([T ]\d\d?:\d\d?(:\d\d?(\.\d+)?)?"
ZONE_LETTERS = "[VzOXxZ]"
"""Letters of a pattern of Spark that stand for a zone or an offset."""
_OFFSET = r"[+-]\d[\d:]*"
_ZONE = rf"(?:Z|(?:UTC|GMT|UT)(?:{_OFFSET})?|{_OFFSET}|[A-Za-z_]+(?:/[A-Za-z0-9_+-]+)+)"
"""Zones that have one meaning. Java would take IST for the zone of India, or of Israel, and CST for one of three."""
_SHORT_NAMES = r"\b(?:EST|MST|HST|CET|EET|MET|WET)\b"
"""Names that the database of zones has, though others use them, too."""
_EXCEL_DAYS = (61, 2_958_466)
"""First and last day that Excel counts right: it has a 29 February 1900."""


class RuleError(ValueError):
    """A rule doesn't fit the type of its column.

    Args:
        name: column of the contract.
        origin: what the value is read from, as ``column paid``.
        problem: end of a sentence that begins with the origin.
    """

    def __init__(self, name: str, origin: str, problem: str) -> None:
        super().__init__(f"{origin} {problem}")
        self.name = name


def moment(name: str, rule: TimeRule | DayRule, text: Column, kind: T.DataType, zone: str, origin: str) -> Column:
    """Return a time or date from its column's text and type; NULL where it can't be read.

    Args:
        name: column of the contract.
        rule: its rule.
        text: the value as text.
        kind: type of the platform's column.
        zone: zone of times without an offset where the rule has none.
        origin: what the value is read from, as errors name it.

    Raises:
        RuleError: the type of the column doesn't fit the rule.
    """
    if isinstance(rule, DayRule):
        if isinstance(kind, T.TimestampType):
            raise RuleError(name, origin, "is an instant; a day must be a date or a text")
        return _day(rule, text, kind)
    zone = rule.timezone or zone
    if isinstance(kind, T.TimestampType):
        return quoted_column(rule.column or "")
    if isinstance(kind, T.TimestampNTZType | T.DateType):
        return _in_zone(quoted_column(rule.column or "").cast("timestamp_ntz"), zone)
    text = F.trim(text)
    if rule.unit:
        return _counted(text, rule.unit, zone)
    text = _with_zones(text, rule.zones)
    if rule.format:
        return _formatted(text, rule.format, zone)
    if isinstance(kind, T.NumericType):
        raise RuleError(name, origin, "is a number: say its unit (s, ms, us, ns, excel_days) or its format")
    return _iso_8601(text, zone)


def _day(rule: DayRule, text: Column, kind: T.DataType) -> Column:
    if rule.format and isinstance(kind, T.StringType):
        return F.try_to_timestamp(F.trim(text), F.lit(rule.format)).cast("date")
    return F.when(text.rlike(r"^\s*\d{4}-\d\d?-\d\d?"), text.try_cast("date"))


def _counted(text: Column, unit: str, zone: str) -> Column:
    """Return the time of an epoch, or of a serial number of Excel: days since 1900, with the time of day as fraction."""
    if unit != "excel_days":
        micros = text.try_cast("decimal(26,6)") * F.lit(MICROS[unit])
        return F.timestamp_micros(micros.try_cast("bigint"))
    days = text.try_cast("decimal(20,12)")
    # a double of Excel is exact to about a microsecond
    seconds = F.round(days * 86_400, 3).cast("decimal(18,6)")
    wall_clock = F.lit("1899-12-30").cast("timestamp_ntz") + F.make_dt_interval(secs=seconds)
    return F.when((days >= _EXCEL_DAYS[0]) & (days < _EXCEL_DAYS[1]), _in_zone(wall_clock, zone))


def _with_zones(text: Column, zones: Mapping[str, str]) -> Column:
    """Return a text in which the zones that the mapping names stand in the place of their short names."""
    for short, zone in zones.items():
        text = F.regexp_replace(text, rf"(?<![A-Za-z_/]){short}(?![A-Za-z_/])", zone)
    return text


def _iso_8601(text: Column, zone: str) -> Column:
    # RFC 3339 has small letters, Java a zone in brackets
    capital = F.regexp_replace(F.regexp_replace(text, r"^([\d-]+)t", "$1T"), "z$", "Z")
    offset = rf"(Z|{_OFFSET})\s*\[[^\[\]]+\]$"
    plain = F.regexp_replace(F.regexp_replace(capital, offset, "$1"), r"\s*\[([^\[\]]+)\]$", " $1")
    return _plain_iso_8601(text, zone).when(text.rlike(r"[tz\]]"), _plain_iso_8601(plain, zone))


def _plain_iso_8601(text: Column, zone: str) -> Column:
    local = F.when(text.rlike(f"{DATE_AND_TIME})?$"), _in_zone(text.try_cast("timestamp_ntz"), zone))
    zoned = F.regexp_replace(text, r"^(\S+[T ]\d\d?:\d\d?)( ?[A-Za-z+-])", "$1:00$2")
    return local.when(text.rlike(f"{DATE_AND_TIME} ?{_ZONE})$"), zoned.try_cast("timestamp"))


def _in_zone(wall_clock: Column, zone: str) -> Column:
    return F.concat(wall_clock.cast("string"), F.lit(f" {zone}")).try_cast("timestamp")


def _formatted(text: Column, pattern: str, zone: str) -> Column:
    """Return the time of a text by a pattern; the pattern's zone is missing, optional (in brackets) or mandatory."""
    bare = re.sub(rf"\[[^\[\]']*{ZONE_LETTERS}[^\[\]']*\]", "", pattern)
    # for z Java takes IST for the zone of Israel; VV takes whole names only
    whole_names = re.sub(r"('[^']*')|z+", lambda found: found[1] or "VV", pattern)
    with_zone = F.try_to_timestamp(text, F.lit(whole_names))
    if re.search("[zV]", re.sub("'[^']*'", "", pattern)):
        with_zone = F.when(~text.rlike(_SHORT_NAMES), with_zone)
    if re.search(ZONE_LETTERS, re.sub("'[^']*'", "", bare)):
        return with_zone
    local = F.try_to_timestamp(F.concat(text, F.lit(f" {zone}")), F.lit(f"{bare} VV"))
    return local if bare == pattern else F.coalesce(local, with_zone)
