"""User ids -> keyed pseudonyms, and free text -> text without what tells who wrote it.

In: rows as a source delivers them, with ``user_id``. Out: the same rows with ``user_key``, the HMAC-SHA256 (RFC 2104) of the
id by a secret: without the secret nobody can compute the key of an id, and from a key nobody gets back to the id. Only the
table ``user_keys`` holds both.

The secret is read by whoever needs it, and handed to executors inside a Python function, never as a literal of a query: it
stands in no plan, table, bundle, configuration or log.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.core import secret
from bp_spark.core.errors import ConfigError
from bp_spark.ingest.sources.contract import BLANKS

Group = TypeVar("Group", bound=Hashable)

BROKEN_TEXT = r"[\x00-\x08\x0B\x0C\x0E-\x1F\x{FFFD}]"
"""What no whole text holds: control characters, and what stands for bytes that could not be read."""
FREE_TEXT: Mapping[str, tuple[str, ...]] = {"raw_searches": ("query",), "raw_reviews": ("text",)}
"""Raw table -> its columns that users wrote."""
MIN_SECRET_BYTES = 32
_HOW_TO = "`openssl rand -hex 32` makes one; keep it: another secret gives users other keys"
_MIN_TOLD = 6


# --- the secret --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Secret:
    """The key of the HMAC; printing it tells nothing.

    Attributes:
        value: at least 32 bytes.
    """

    value: bytes = field(repr=False)

    @property
    def key_id(self) -> str:
        """Tells one secret from another, and nothing of either."""
        return hmac.digest(self.value, b"bp-spark key id", "sha256").hex()[:16]

    def key_of(self, user_id: str) -> str:
        """``user_key`` of an id.

        >>> Secret(b"0123456789abcdef0123456789abcdef").key_of(" u1 ")[:16]
        '39536bc0c20e6efc'
        """
        return hmac.digest(self.value, user_id.strip(BLANKS).encode(), "sha256").hex()


def load_secret(address: str) -> Secret:
    """The secret at an address as ``privacy.secret`` has it.

    Raises:
        ConfigError: there is none, or it is shorter than 32 bytes.
    """
    try:
        value = secret.read("privacy.secret", address)
    except ConfigError as error:
        raise ConfigError(f"{error}; {_HOW_TO}") from None
    if len(value) < MIN_SECRET_BYTES:
        raise ConfigError(f"privacy.secret: {address} must hold at least {MIN_SECRET_BYTES} bytes; {_HOW_TO}")
    return Secret(value)


def make_secret(path: Path, text: str = "") -> None:
    """Write a secret, by default a new random one, to a file that only its owner may read; one that is there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{text or secrets.token_hex(MIN_SECRET_BYTES)}\n")


# --- groups of users ---------------------------------------------------------------------------------------------------


def withheld(counts: Mapping[Group, int], totals: Collection[Collection[Group]], smallest: int) -> set[Group]:
    """Groups whose users are not to be told: those that are too small, and more where a total would give these away.

    Complementary suppression, as statistical offices do it (Hundepool et al. 2012, "Statistical Disclosure Control", 4.3): in
    each total that is told, either no group is withheld or several with ``smallest`` users at least together, if the total
    has as many. The next larger group is then withheld too.

    Args:
        counts: users of each group. One without any tells of nobody.
        totals: groups whose sum is told, as rows, columns and the whole of a table.
        smallest: users of which figures may be told.
    """
    hidden = {group for group, users in counts.items() if 0 < users < smallest}
    parts = [{group for group in total if counts.get(group)} for total in totals]
    while True:
        more = {
            _next_larger(counts, part, part & hidden) for part in parts if _given_away(counts, part, hidden, smallest)
        }
        if not more:
            return hidden
        hidden |= more


def _given_away(counts: Mapping[Group, int], part: set[Group], hidden: set[Group], smallest: int) -> bool:
    of_part = part & hidden
    if not of_part or part == of_part:
        return False
    return len(of_part) == 1 or sum(counts[group] for group in of_part) < smallest


def _next_larger(counts: Mapping[Group, int], part: set[Group], hidden: set[Group]) -> Group:
    return min(part - hidden, key=lambda group: (counts[group], str(group)))


# --- user ids ----------------------------------------------------------------------------------------------------------


def user_id(column: Column | str) -> Column:
    """An id as it is keyed: whole text without surrounding blanks; NULL where blank or broken."""
    trimmed = _trimmed(F.make_valid_utf8(column))
    return F.when((F.length(trimmed) > 0) & ~trimmed.rlike(BROKEN_TEXT), trimmed)


def _trimmed(column: Column) -> Column:
    return F.btrim(column, F.lit(BLANKS))


def user_key(ids: Column, secret: Secret) -> Column:
    """The key of each id, NULL of NULL; each distinct id of an Arrow batch is computed once."""
    return _key_udf(secret.value)(ids)


def key_hash(keys: Column) -> Column:
    """Return what stands in ``forgotten`` for a user's key: a key is recognised by it, and can't be told from it."""
    return F.sha2(keys, 256)


def _key_udf(value: bytes) -> Callable[[Column], Column]:
    @F.pandas_udf("string")  # type: ignore[call-overload]
    def keys(ids: pd.Series) -> pd.Series:
        place, distinct = pd.factorize(ids)
        # a NULL has place -1: the last
        made = [*(hmac.digest(value, one.encode(), "sha256").hex() for one in distinct), None]
        return pd.Series(np.array(made, object)[place])

    return keys


def pseudonymous(df: DataFrame, table: str, secret: Secret, masked: Callable[[Column], Column]) -> DataFrame:
    """Rows of a raw table as they may be stored: ``user_key`` instead of ``user_id``, free text masked.

    An id that is broken text counts as unreadable. Of a line that could not be taken apart only the length is kept: nobody can
    tell where in it the user's id stands, and ``delivery`` names the file to look into.

    Args:
        df: rows as :func:`bp_spark.ingest.sources.contract.in_contract` shapes them; a table without users is only masked.
        masked: what becomes of a text that users wrote; see :func:`mask`.
    """
    for name in FREE_TEXT.get(table, ()):
        df = df.withColumn(name, masked(F.col(name)))
    own = _trimmed(F.col("user_id")) if "user_id" in df.columns else F.lit(None).cast("string")

    def told(name: Column, value: Column) -> Column:
        """An unreadable value without the row's own user id."""
        line = F.concat(F.lit("<"), F.length(value).cast("string"), F.lit(" characters>"))
        without = F.when(F.trim(value) == own, "<user>").when(
            F.length(own) >= _MIN_TOLD, F.replace(value, own, F.lit("<user>"))
        )
        return F.when(name == "row", line).otherwise(masked(F.coalesce(without, value)))

    unreadable = F.transform_values("unreadable", told)
    if "user_id" not in df.columns:
        return df.withColumn("unreadable", unreadable)
    broken = _trimmed(F.make_valid_utf8("user_id")).rlike(BROKEN_TEXT)
    marked = F.map_concat(
        F.coalesce(unreadable, F.create_map().cast("map<string,string>")),
        F.create_map(F.lit("user_id"), F.lit("<broken text>")),
    )
    return (
        df.withColumn("unreadable", F.when(broken, marked).otherwise(unreadable))
        .withColumn("user_key", user_key(user_id("user_id"), secret))
        .drop("user_id")
    )


# --- free text ---------------------------------------------------------------------------------------------------------

_START, _END = r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])"
_SPACE = r"[ .-]?"
# from a word's beginning and without going back, or a text of megabytes without a space would cost its square
_LOCAL = r"[\p{L}\p{N}._%+'\-&&[^\p{IsHan}]]"
_LABEL = r"[\p{L}\p{N}\-&&[^\p{IsHan}]]{1,63}"
_EMAIL = rf"(?<!{_LOCAL}){_LOCAL}++@(?:{_LABEL}\.){{1,8}}[\p{{L}}&&[^\p{{IsHan}}]]{{2,24}}"
_PHONES = (
    # mobile numbers of China, with and without +86; its landlines with a dash
    rf"{_START}(?:(?:\+|00)?86{_SPACE})?1[3-9]\d{_SPACE}\d{{4}}{_SPACE}\d{{4}}{_END}",
    rf"{_START}0\d{{2,3}}-\d{{7,8}}{_END}",
    # +49 30 1234567, 0049-30-1234567, +1 (555) 123-4567
    rf"{_START}(?:\+[1-9]\d{{0,2}}{_SPACE}|00[1-9]\d{{0,2}}[ .-])(?:\(\d{{1,4}}\){_SPACE})?\d(?:{_SPACE}\d){{5,12}}{_END}",
    # (555) 123-4567, 555-123-4567
    r"(?<![A-Za-z0-9-])(?:\(\d{3}\) ?|\d{3}[.-])\d{3}[.-]\d{4}(?![A-Za-z0-9-])",
)
_CARD = rf"(?<![A-Za-z0-9.-])[2-6](?:[ -]?\d){{13,18}}{_END}"
_CARD_NUMBER = (
    r"^(?:4\d{15}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
    r"|6\d{15,18})$"
)
_ID = rf"{_START}[1-8]\d{{5}}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{{3}}[\dXx]{_END}"
_IBAN = rf"(?i){_START}[A-Z]{{2}}\d\d(?: ?[A-Z0-9]{{4}}){{2,7}}(?: ?[A-Z0-9]{{1,3}})?{_END}"
_SUSPECT = r"@|\d(?:[ .()-]{0,2}\d){6}"
"""What a text has that holds any of these: most have none, and cost one look."""


def mask(text: Column) -> Column:
    """The text with ``<email>``, ``<phone>``, ``<card>``, ``<id>`` and ``<iban>`` in the place of such numbers.

    Numbers with check digits are masked only where these fit: cards (Luhn), identity numbers of China (GB 11643, ISO 7064
    MOD 11-2), IBANs (ISO 13616, MOD 97-10). In a text with any of these, full-width digits become plain ones.

    What looks like none of them stays: prices, sizes, years, model and order numbers. An order number of eleven digits that
    begins with 13 to 19 looks like a mobile number of China, and is masked.
    """
    plain = F.translate(text, "０１２３４５６７８９＠＋－", "0123456789@+-")
    found = F.regexp_replace(plain, _EMAIL, "<email>")
    found = _replaced(found, _IBAN, _is_iban, "<iban>")
    found = _replaced(found, _ID, _is_id, "<id>")
    found = _replaced(found, _CARD, _is_card, "<card>")
    for pattern in _PHONES:
        found = F.regexp_replace(found, pattern, "<phone>")
    return F.when(plain.rlike(_SUSPECT), found).otherwise(text)


def as_written(text: Column) -> Column:
    """What stands for :func:`mask` where texts are not masked."""
    return text


def _replaced(text: Column, pattern: str, holds: Callable[[Column], Column], by: str) -> Column:
    """The text with what matches the pattern, and passes a check of its digits, replaced."""

    def without(whole: Column) -> Column:
        candidates = F.filter(F.regexp_extract_all(whole, F.lit(pattern), F.lit(0)), holds)
        return F.aggregate(candidates, whole, lambda found, candidate: F.replace(found, candidate, F.lit(by)))

    # as a variable: what the text is made by would stand, and be computed, twice in each of several steps
    return F.transform(F.array(text), without)[0]


def _is_card(candidate: Column) -> Column:
    number = F.regexp_replace(candidate, "[ -]", "")
    return number.rlike(_CARD_NUMBER) & F.call_function("luhn_check", number)


def _is_id(candidate: Column) -> Column:
    weights = F.array(*(F.lit(2 ** (18 - place) % 11) for place in range(1, 18)))
    places = F.sequence(F.lit(1), F.lit(17))
    digits = F.transform(places, lambda at: candidate.substr(at, F.lit(1)).cast("int") * F.element_at(weights, at))
    total = F.aggregate(digits, F.lit(0), lambda sum_, digit: sum_ + digit)
    return F.substring(F.upper(candidate), 18, 1) == F.element_at(
        F.split(F.lit("1,0,X,9,8,7,6,5,4,3,2"), ","), total % 11 + 1
    )


def _is_iban(candidate: Column) -> Column:
    number = F.upper(F.regexp_replace(candidate, " ", ""))
    turned = F.concat(F.substring(number, 5, 34), F.substring(number, 1, 4))

    def next_rest(rest: Column, sign: Column) -> Column:
        letter = (rest * 100 + F.ascii(sign) - 55) % 97
        return F.when(sign.rlike("[0-9]"), (rest * 10 + F.ascii(sign) - 48) % 97).otherwise(letter)

    return F.aggregate(F.split(turned, ""), F.lit(0), next_rest) == 1
