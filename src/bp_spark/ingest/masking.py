"""Find personal numbers and addresses in a text: e-mail addresses, phones, cards, Chinese identity numbers and IBANs.

Numbers are read as people write them: groups of digits with spaces, dots, dashes, slashes or brackets between them. A card, an
identity number of 18 digits and an IBAN are known by their check digits. A phone number is known by its form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

_SPACES = r" \t\u00A0\u2007\u2009\u202F\u3000"
_DASHES = r"\-\u2010-\u2015\u2212"
_BETWEEN = rf"[{_SPACES}{_DASHES}./()\uFF08\uFF09]{{0,3}}"
"""What may stand between two digits of one number. ``SUSPECT`` and the patterns below share it."""
_WIDE_SIGNS = "０１２３４５６７８９＠＋－．Ｘｘ"
_PLAIN = str.maketrans(_WIDE_SIGNS, "0123456789@+-.Xx")
SUSPECT = (
    rf"[@\uFF20]|[0-9\uFF10-\uFF19](?:[{_SPACES}{_DASHES}./()\uFF08\uFF09\uFF0D\uFF0E]{{0,3}}[0-9\uFF10-\uFF19]){{6}}"
)
"""Pattern, for Java and Python alike, of every text that may hold one of these. Few texts match."""

Span = tuple[int, int, str]
"""Start and end of a part of a text, and the word that replaces it."""


def masked(text: str) -> str:
    """Return a text with ``<email>``, ``<phone>``, ``<card>``, ``<id>`` and ``<iban>`` in the place of such values.

    >>> masked("call 030 / 1234567 or 4111.1111.1111.1111")
    'call <phone> or <card>'
    """
    # One sign for one sign, so that a place in the plain text is that place in the text.
    plain = text.translate(_PLAIN)
    spans = list[Span]()
    for find in (_emails, _ibans, _numbers):
        found = list(find(plain))
        spans += found
        plain = _replaced(plain, [(start, end, "|" * (end - start)) for start, end, _ in found])
    return _replaced(text, sorted(spans))


def _replaced(text: str, spans: Iterable[Span]) -> str:
    parts, last = list[str](), 0
    for start, end, word in spans:
        parts += text[last:start], word
        last = end
    return "".join([*parts, text[last:]])


# --- e-mail addresses --------------------------------------------------------------------------------------------------

# Scripts that are written without spaces: a word beside an address would be taken for a part of it.
_UNSPACED = r"\u0E00-\u0E7F\u3040-\u30FF\u3400-\u9FFF\uF900-\uFAFF"
_MARKED = r"[\u0900-\u0DFF]"
"""Scripts of India, whose vowel signs are no letters to Python."""
_NO_LETTER = r"\s\u0000-\u002C/:-@\[-^`{-~\u00A0-\u00BF\u2000-\u206F\u3000-\u303F\uFF00-\uFFEF"
_LOCAL = rf"(?:[^{_NO_LETTER}{_UNSPACED}]|[!#$%&'*+])"
_LONGEST_LOCAL = 64
_LOCAL_BEFORE = re.compile(rf"{_LOCAL}{{1,{_LONGEST_LOCAL}}}\Z")
_UNSPACED_LOCAL_BEFORE = re.compile(rf"[{_UNSPACED}]{{1,{_LONGEST_LOCAL}}}\Z")
_LABEL = rf"[^{_NO_LETTER}{_UNSPACED}._]{{1,63}}"
_ANY_LABEL = rf"[^{_NO_LETTER}._]{{1,63}}"
_UNSPACED_ENDINGS = (
    "中国|中國|公司|网络|網絡|在线|网址|网站|网店|商城|商店|中文网|香港|台湾|台灣|新加坡|信息|集团|移动|手机|企业|购物|"
    "我爱你|政务|公益|世界|みんな|コム|ストア|クラウド|ไทย"
)
_OTHER_LETTER = rf"(?:[^\W_\d\x00-\x7F{_UNSPACED}]|{_MARKED})"
_ENDING = rf"(?:xn--[A-Za-z0-9-]{{2,59}}|[A-Za-z]{{2,24}}|{_UNSPACED_ENDINGS}|{_OTHER_LETTER}{{2,24}})"
_DOMAINS = tuple(re.compile(rf"(?:{label}\.){{1,8}}{_ENDING}") for label in (_LABEL, _ANY_LABEL))


def _emails(text: str) -> Iterator[Span]:
    last = 0
    for at in re.finditer("@", text):
        if at.start() < last:
            continue
        domain = next((found for pattern in _DOMAINS if (found := pattern.match(text, at.end()))), None)
        first = max(last, at.start() - _LONGEST_LOCAL)
        local = _LOCAL_BEFORE.search(text, first, at.start()) or _UNSPACED_LOCAL_BEFORE.search(text, first, at.start())
        if domain and local:
            last = domain.end()
            yield local.start(), last, "<email>"


# --- IBANs -------------------------------------------------------------------------------------------------------------

_IBAN = re.compile(rf"(?i)(?<![A-Z0-9])[A-Z]{{2}}\d\d(?:{_BETWEEN}[A-Z0-9]){{11,30}}")
_SHORTEST_IBAN, _FEWEST_DIGITS = 15, 9


def _ibans(text: str) -> Iterator[Span]:
    for candidate in _IBAN.finditer(text):
        start = candidate.start()
        ends = [end.end() for end in re.finditer(r"[A-Za-z0-9]+", candidate[0])]
        for end in reversed(ends):
            if not text[start + end : start + end + 1].isalnum() and _is_iban(candidate[0][:end]):
                yield start, start + end, "<iban>"
                break


def _is_iban(written: str) -> bool:
    """Return whether letters and digits are those of an IBAN (ISO 13616: ISO 7064 MOD 97-10)."""
    signs = "".join(re.findall("[A-Z0-9]", written.upper()))
    if len(signs) < _SHORTEST_IBAN or sum(sign.isdigit() for sign in signs) < _FEWEST_DIGITS:
        return False
    return int("".join(str(int(sign, 36)) for sign in signs[4:] + signs[:4])) % 97 == 1


# --- numbers -----------------------------------------------------------------------------------------------------------

_MOST_DIGITS, _MOST_GROUPS, _FEWEST = 19, 8, 7
_RUN = re.compile(rf"[0-9](?:{_BETWEEN}[0-9])*")
_DATE = re.compile(
    r"(?<![0-9])(?<![0-9][./-])(?:(?:0?[1-9]|[12]\d|3[01])([./-])(?:0?[1-9]|[12]\d|3[01])\1(?:19|20)?\d\d"
    r"|(?:19|20)\d\d([./-])(?:0?[1-9]|1[0-2])\2(?:0?[1-9]|[12]\d|3[01]))(?![0-9]|[./-][0-9])"
)
_OTHER_NUMBER = re.compile(
    r"(?i)(?:order|bestell\w*|auftrags?\w*|rechnungs?\w*|invoice|receipt|article|artikel\w*|item|product|produkt\w*|sku|isbn"
    r"|ean|upc|gtin|asin|model|modell\w*|part|serial|serien\w*|tracking|sendungs?\w*|parcel|ticket|ref|reference|case"
    r"|kunden\w*|订单|訂單|单号|單號|运单|快递单|货号|貨號|型号|商品|编号|編號|条码|款号|#)"
    r"[\s.-]*(?:(?:number|no|nr|nummer|id|code|号码|号|编号)\b)?[\s.:：#=-]*\Z"
)
"""Text before a number that makes it no phone number."""
_LOOK_BACK = 40


@dataclass(frozen=True)
class _Number:
    """Consecutive groups of digits.

    Attributes:
        digits: all of them.
        sizes: digits of each group.
        before: the text before the number.
        after: the text behind it.
    """

    digits: str
    sizes: tuple[int, ...]
    before: str
    after: str


def _numbers(text: str) -> Iterator[Span]:
    hidden = _DATE.sub(lambda date: "|" * len(date[0]), text)
    for run in _RUN.finditer(hidden):
        groups = [(run.start() + group.start(), run.start() + group.end()) for group in re.finditer("[0-9]+", run[0])]
        first = 0
        while first < len(groups):
            span, used = _longest(hidden, groups, first)
            if span:
                yield span
            first += used


def _longest(text: str, groups: Sequence[tuple[int, int]], first: int) -> tuple[Span | None, int]:
    """Return the longest number that begins with a group, and how many groups to go on by."""
    start = groups[first][0]
    if _is_joined(text, start):
        return None, 1
    candidates = list[tuple[int, str, tuple[int, ...]]]()
    digits, sizes = "", tuple[int, ...]()
    for number, (begin, end) in enumerate(groups[first : first + _MOST_GROUPS], 1):
        if len(digits) + end - begin > _MOST_DIGITS:
            break
        digits, sizes = digits + text[begin:end], (*sizes, end - begin)
        if len(digits) >= _FEWEST:
            candidates.append((number, digits, sizes))
    before = text[max(0, start - _LOOK_BACK) : start]
    for number, digits, sizes in reversed(candidates):
        end = groups[first + number - 1][1]
        candidate = _Number(digits, sizes, before, text[end : end + 5])
        for name, ending in _KINDS:
            if (size := ending(candidate)) is not None:
                # A plus sign before the digits belongs to the number, and a bracket that it closes.
                opening = len(before) - len(before.rstrip("+(（" if re.search("[)）]", text[start:end]) else "+"))
                return (start - opening, end + size, name), number
    return None, 1


def _is_joined(text: str, start: int) -> bool:
    """Return whether digits continue a word or another number, as in ``WH-1000`` or ``1,299``."""
    return re.search(r"[A-Za-z0-9](?:[-_#])?\Z|[0-9][.,/-]\Z", text[max(0, start - 2) : start]) is not None


def _ends(after: str) -> bool:
    """Return whether a number may end before this text."""
    return re.match(r"[A-Za-z0-9_]|[.,/-][0-9]", after) is None


def _card_ending(number: _Number) -> int | None:
    brand = re.fullmatch(
        r"4\d{15}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
        r"|6\d{15,18}",
        number.digits,
    )
    return 0 if brand and _ends(number.after) and _is_luhn(number.digits) else None


def _is_luhn(digits: str) -> bool:
    """Return whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    doubled = [int(digit) * 2 for digit in digits[-2::-2]]
    return (sum(map(int, digits[-1::-2])) + sum(value // 10 + value % 10 for value in doubled)) % 10 == 0


_PROVINCE = r"(?:1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3])\d{4}"
_MONTH_AND_DAY = r"(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
_CHECK_DIGITS = "10X98765432"


def _id_ending(number: _Number) -> int | None:
    """Return how many signs of the text behind the digits belong to an identity number of China (GB 11643)."""
    digits, check = number.digits, re.match(rf"{_BETWEEN}[Xx](?![A-Za-z0-9])", number.after)
    if check and re.fullmatch(rf"{_PROVINCE}(?:19|20)\d\d{_MONTH_AND_DAY}\d{{3}}", digits):
        return check.end() if _id_check_digit(digits) == "X" else None
    if not _ends(number.after):
        return None
    if re.fullmatch(rf"{_PROVINCE}(?:19|20)\d\d{_MONTH_AND_DAY}\d{{4}}", digits):
        return 0 if _id_check_digit(digits[:17]) == digits[17] else None
    return 0 if re.fullmatch(rf"{_PROVINCE}\d\d{_MONTH_AND_DAY}\d{{3}}", digits) else None


def _id_check_digit(digits: str) -> str:
    return _CHECK_DIGITS[sum(int(digit) * 2 ** (17 - place) for place, digit in enumerate(digits)) % 11]


def _phone_ending(number: _Number) -> int | None:
    if not _ends(number.after):
        return None
    is_international = number.before.rstrip("(（").endswith("+") and number.digits[0] != "0"
    if is_international and re.search(r"[A-Za-z0-9]\+[(（]?\Z", number.before):
        return None
    if is_international:
        return 0 if len(number.digits) in _INTERNATIONAL_DIGITS else None
    if not any(form(number.digits, number.sizes) for form in _PHONE_FORMS):
        return None
    return None if _OTHER_NUMBER.search(number.before) else 0


def _is_exit_code(digits: str, sizes: tuple[int, ...]) -> bool:
    """``0049 30 1234567``, ``00491701234567``."""
    of_country = len(digits) - len("00")
    return re.match("00[1-9]", digits) is not None and of_country in (
        range(11, 16) if len(sizes) == 1 else range(9, 16)
    )


def _is_trunk(digits: str, sizes: tuple[int, ...]) -> bool:
    """``030 / 1234567``, ``06 12 34 56 78``, ``(0161) 496 0000``, ``03-1234-5678``, ``02-123-4567``, ``0755 8888 8888``."""
    if re.match("0[1-9]", digits) is None:
        return False
    if len(sizes) == 1:
        return len(digits) in (10, 11) or re.fullmatch(r"01[5-7]\d{9}", digits) is not None
    return len(digits) in range(9, 13) and min(sizes) > 1 and len(sizes) in range(2, 6)


def _is_chinese_mobile(digits: str, sizes: tuple[int, ...]) -> bool:
    """``138 0013 8000``, with or without 86."""
    return re.fullmatch(r"(?:86)?1[3-9]\d{9}", digits) is not None and min(sizes) > 1


def _is_indian_mobile(digits: str, sizes: tuple[int, ...]) -> bool:
    """``98765 43210``, ``987 654 3210``."""
    return re.fullmatch(r"(?:91)?[6-9]\d{9}", digits) is not None and sizes in {
        *((10,), (5, 5), (3, 3, 4), (4, 3, 3), (4, 6)),
        *((2, 10), (2, 5, 5), (2, 3, 3, 4)),
    }


def _is_north_american(digits: str, sizes: tuple[int, ...]) -> bool:
    """``(555) 123-4567``, ``1-800-555-0199``; without separators only where all ten digits fit the numbering plan."""
    if len(sizes) == 1:
        return re.fullmatch(r"1?[2-9]\d\d[2-9]\d{6}", digits) is not None
    return re.fullmatch(r"1?[2-9]\d{9}", digits) is not None and sizes[-3:] == (3, 3, 4) and sizes[:-3] in ((), (1,))


_INTERNATIONAL_DIGITS = range(7, 16)
"""Digits of a number with its country code (ITU-T E.164)."""
_PHONE_FORMS = (_is_exit_code, _is_trunk, _is_chinese_mobile, _is_indian_mobile, _is_north_american)
_KINDS: tuple[tuple[str, Callable[[_Number], int | None]], ...] = (
    ("<card>", _card_ending),
    ("<id>", _id_ending),
    ("<phone>", _phone_ending),
)
"""What replaces a number, and how many signs behind its digits belong to it; ``None`` where it is no such number."""
