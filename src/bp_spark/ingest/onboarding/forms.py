"""Forms of values: how times and numbers of a column are written, and what stays open.

In: values of a column as a :class:`~bp_spark.ingest.onboarding.sniff.Sample` holds them. Out: keys of a rule of the mapping
language, with doubts. No doubt quotes a value.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise
from typing import Any

_MOST = 0.9
"""Share of the values that a form must fit."""
_UNITS = {10: "s", 13: "ms", 16: "us", 19: "ns"}
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = 12
_ZONE = r"\s?(?:[Zz]|[A-Z]{3,4}|[+-]\d[\d:]*|[A-Za-z_]+/\S+)"
_ISO = re.compile(rf"\d{{4}}-\d\d?-\d\d?(?:[Tt ]\d\d?:\d\d?(?::\d\d?(?:\.\d+)?)?(?P<zone>{_ZONE})?)?")
_NUMERIC = re.compile(
    r"(?P<a>\d{1,4})(?P<mark>[./-])(?P<b>\d{1,2})(?P=mark)(?P<c>\d{4}|\d{2})(?P<between>,? |T)?"
    r"(?P<time>\d{1,2}:\d\d(?::\d\d)?(?P<fraction>\.\d+)?)?(?P<half> ?[AaPp][Mm])?"
)
_NAMED = re.compile(
    r"(?:(?P<day>\d{1,2})(?P<m1>[ -])(?P<month>[A-Za-z]{3})[ -](?P<year>\d{4}|\d{2})|"
    r"(?P<month2>[A-Za-z]{3}) (?P<day2>\d{1,2}), (?P<year2>\d{4}))"
    r"(?P<between>,? )?(?P<time>\d{1,2}:\d\d(?::\d\d)?)?(?P<half> ?[AaPp][Mm])?"
)
_THOUSAND_DIGITS = 3
_OPEN_MARK = (
    'is 1{mark}234 a thousand and more, or a decimal? Add thousands: "{mark}" with decimal: "{other}", or decimal: "{mark}"; '
    "until then such rows are refused"
)
_SIGNS = {"€": "EUR", "£": "GBP", "$": "USD", "₹": "INR", "₩": "KRW", "zł": "PLN", "R$": "BRL", "₺": "TRY"}
"""Signs of money -> the currency that they usually stand for; ¥ is of two countries."""


@dataclass(frozen=True)
class TimeForm:
    """How times are written.

    Attributes:
        keys: keys of a rule: ``format``, or ``unit``; none for ISO 8601.
        has_zone: whether the values hold their zone or offset.
        doubts: what is open.
    """

    keys: dict[str, str] = field(default_factory=dict)
    has_zone: bool = False
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class NumberForm:
    """How numbers are written.

    Attributes:
        keys: keys of a rule of money: ``decimal``, ``thousands``, ``symbol``, ``negative``.
        decimals: most decimals of a value.
        negative: share of negative values.
        zero: share of values that are 0.
        symbol: sign or code of the currency.
        doubts: what is open.
    """

    keys: dict[str, str] = field(default_factory=dict)
    decimals: int = 0
    negative: float = 0.0
    zero: float = 0.0
    symbol: str | None = None
    doubts: tuple[str, ...] = ()


# --- times ---------------------------------------------------------------------------------------------------------------


def time_form(values: Sequence[Any]) -> TimeForm | None:
    """Return how times are written; ``None`` if the values are no times."""
    if not values:
        return None
    if isinstance(values[0], datetime.date):
        zoned = isinstance(values[0], datetime.datetime) and values[0].tzinfo is not None
        return TimeForm(has_zone=zoned)
    if not isinstance(values[0], str | int | float) or isinstance(values[0], bool):
        return None
    texts = [str(value) for value in values]
    iso = [match for text in texts if (match := _ISO.fullmatch(text))]
    if len(iso) >= _MOST * len(texts):
        return TimeForm(has_zone=all(match["zone"] for match in iso), doubts=_without_time(texts))
    return _counted_form(texts) or _numeric_form(texts) or _named_form(texts)


def _without_time(texts: Sequence[str]) -> tuple[str, ...]:
    return (
        ()
        if any(":" in text for text in texts)
        else ("days without a time of day: all orders of a day count from 00:00",)
    )


def _counted_form(texts: Sequence[str]) -> TimeForm | None:
    """Return the form of an epoch, of digits without marks, or of Excel's days."""
    digits = [text.removesuffix(".0") for text in texts]
    if not all(re.fullmatch(r"\d+(\.\d+)?", text) for text in digits):
        return None
    lengths = {len(text.partition(".")[0]) for text in digits}
    if lengths == {8} and all("19000000" < text < "21000000" and "01" <= text[4:6] <= "12" for text in digits):
        return TimeForm({"format": "yyyyMMdd"}, doubts=_without_time(digits))
    if lengths == {14}:
        return TimeForm({"format": "yyyyMMddHHmmss"})
    if len(lengths) == 1 and (unit := _UNITS.get(next(iter(lengths)))):
        return TimeForm({"unit": unit}, has_zone=True)
    if lengths == {5} and all(20_000 < float(text) < 60_000 for text in digits):  # noqa: PLR2004
        return TimeForm({"unit": "excel_days"}, doubts=("numbers of five digits: taken for Excel's days since 1900",))
    return None


def _numeric_form(texts: Sequence[str]) -> TimeForm | None:
    matches = [match for text in texts if (match := _NUMERIC.fullmatch(text))]
    if len(matches) < _MOST * len(texts):
        return None
    mark = matches[0]["mark"]
    no_doubts: tuple[str, ...] = ()
    if len(matches[0]["a"]) == 4:  # noqa: PLR2004
        pattern, doubts = f"yyyy{mark}M{mark}d", no_doubts
    else:
        year = "yyyy" if len(matches[0]["c"]) == 4 else "yy"  # noqa: PLR2004
        first, doubts = _first_part([(int(m["a"]), int(m["b"]), int(m["c"])) for m in matches], mark)
        pattern = f"{first}{mark}{'M' if first == 'd' else 'd'}{mark}{year}"
    return TimeForm({"format": pattern + _clock(matches)}, doubts=(*doubts, *_without_time(texts)))


def _first_part(dates: Sequence[tuple[int, int, int]], mark: str) -> tuple[str, tuple[str, ...]]:
    """Return whether ``d`` or ``M`` comes first in dates, and doubts."""
    day_first = any(a > _MONTH for a, _, _ in dates)
    month_first = any(b > _MONTH for _, b, _ in dates)
    if day_first and month_first:
        return "d", (
            "some dates have the day first and some the month: 12/31/2010 and 31/12/2010. Find out which is right",
        )
    if day_first or month_first:
        return ("d" if day_first else "M"), ()
    # in an export that is sorted by time, the right order of day and month makes fewer steps back
    backwards = {
        "d": _steps_back([(year, b, a) for a, b, year in dates]),
        "M": _steps_back([(year, a, b) for a, b, year in dates]),
    }
    if backwards["d"] != backwards["M"]:
        first = min(backwards, key=lambda part: backwards[part])
        return first, (
            "all numbers are <= 12, day or month first? Taken from the order of the rows: look at some dates",
        )
    first = "M" if mark == "/" else "d"
    return first, ("all numbers are <= 12, so day or month first is a bare guess: M/d/yyyy or d/M/yyyy?",)


def _steps_back(days: Sequence[tuple[int, int, int]]) -> int:
    return sum(after < before for before, after in pairwise(days))


def _clock(matches: Sequence[re.Match[str]]) -> str:
    """Return the pattern of the time of day, with the text before it."""
    timed = [match for match in matches if match["time"]]
    if not timed:
        return ""
    half = bool(timed[0]["half"])
    seconds = {match["time"].count(":") == 2 for match in timed}  # noqa: PLR2004
    clock = ("h" if half else "H") + ":mm" + ("[:ss]" if len(seconds) > 1 else ":ss" if True in seconds else "")
    if "fraction" in timed[0].re.groupindex and any(match["fraction"] for match in timed):
        clock += "[." + "S" * max(len(match["fraction"] or ".") - 1 for match in timed) + "]"
    if half:
        clock += " a" if timed[0]["half"].startswith(" ") else "a"
    between = (timed[0]["between"] or "").replace("T", "'T'")
    return f"{between}{clock}" if len(timed) == len(matches) else f"[{between}{clock}]"


def _named_form(texts: Sequence[str]) -> TimeForm | None:
    matches = [match for text in texts if (match := _NAMED.fullmatch(text))]
    if len(matches) < _MOST * len(texts):
        return None
    if any((m["month"] or m["month2"]).lower() not in _MONTHS for m in matches):
        return None
    if matches[0]["month2"]:
        pattern = "MMM d, yyyy"
    else:
        pattern = f"d{matches[0]['m1']}MMM{matches[0]['m1']}{'y' * len(matches[0]['year'])}"
    return TimeForm({"format": pattern + _clock(matches)}, doubts=_without_time(texts))


# --- numbers -------------------------------------------------------------------------------------------------------------


def number_form(values: Sequence[Any]) -> NumberForm | None:
    """Return how numbers are written; ``None`` if the values are no numbers."""
    if not values or isinstance(values[0], bool):
        return None
    if isinstance(values[0], int | float | Decimal):
        return _form_of_numbers([float(value) for value in values])
    if not isinstance(values[0], str):
        return None
    # what is left of a number without its sign and symbol
    symbols = [symbol for text in values if (symbol := _symbol(text))]
    symbol = max(set(symbols), key=symbols.count) if len(symbols) > len(values) / 2 else None
    cores, negative = [], []
    for text in values:
        core = text.replace(symbol, "").strip() if symbol else text
        is_negative = core.startswith(("-", "(")) or core.endswith("-")
        core = core.strip("-+() \u00a0")
        if re.fullmatch(r"\d[\d., '\u00a0]*|\.\d+", core):
            cores.append(core)
            negative.append(is_negative)
    if len(cores) < _MOST * len(values):
        return None
    keys, doubts = _marks(cores)
    if symbol:
        keys["symbol"] = symbol
    if any(text.rstrip().endswith("-") for text in values):
        keys["negative"] = "trailing"
    elif any("(" in text for text in values):
        keys["negative"] = "parentheses"
    point = keys.get("decimal", ".")
    decimals = max((len(core.rpartition(point)[2]) for core in cores if point in core), default=0)
    zero = sum(not re.search("[1-9]", core) for core in cores) / len(cores)
    return NumberForm(keys, decimals, sum(negative) / len(cores), zero, symbol, doubts)


def _form_of_numbers(numbers: Sequence[float]) -> NumberForm:
    finite = [number for number in numbers if math.isfinite(number)]
    if not finite:
        return NumberForm()
    decimals = max(min(9, len(f"{number:.9f}".rstrip("0").rpartition(".")[2])) for number in finite)
    negative = sum(number < 0 for number in finite) / len(finite)
    return NumberForm({}, decimals, negative, sum(number == 0 for number in finite) / len(finite))


def _symbol(text: str) -> str | None:
    match = re.search(r"[^\d\s.,'()+-][^\d.,'()+-]*", text)
    return match[0].strip() if match else None


def _marks(cores: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return decimal and thousands mark, and doubts."""
    both = [core for core in cores if "." in core and "," in core]
    if both:
        decimal = both[0][max(both[0].rfind("."), both[0].rfind(","))]
        return _keys(decimal, "," if decimal == "." else "."), ()
    spaced = next((mark for mark in (" ", "\u00a0", "'") if any(mark in core for core in cores)), None)
    mark = "," if any("," in core for core in cores) else "."
    groups = [core.split(mark)[1:] for core in cores if mark in core]
    if any(len(group) > 1 for group in groups):
        return _thousands(mark), ()
    if groups and all(len(group[0]) == _THOUSAND_DIGITS for group in groups):
        plain = [core for core in cores if mark not in core]
        if plain and all(len(core) <= _THOUSAND_DIGITS for core in plain):
            return _thousands(mark), (
                f"the mark in 1{mark}234 is taken for one of thousands: all other numbers are below 1000",
            )
        return {}, (_OPEN_MARK.format(mark=mark, other="," if mark == "." else "."),)
    return _keys(mark if groups else ".", spaced), ()


def _thousands(mark: str) -> dict[str, str]:
    return _keys("," if mark == "." else ".", mark)


def _keys(decimal: str, thousands: str | None) -> dict[str, str]:
    keys = {"decimal": decimal} if decimal != "." else {}
    return {**keys, "thousands": thousands} if thousands else keys


def currency_of(symbol: str) -> str | None:
    """Return the currency that a sign or a code stands for, if it stands for one."""
    return symbol if re.fullmatch("[A-Z]{3}", symbol) else _SIGNS.get(symbol)
