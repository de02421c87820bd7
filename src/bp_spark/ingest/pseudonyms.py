"""User ids -> keyed pseudonyms, and free text -> text without personal identifiers.

In: rows as a source delivers them, with ``user_id``. Out: the same rows with ``user_key``, the HMAC-SHA256 (RFC 2104) of the id
with a secret. Without the secret nobody can compute a key from an id, and nobody can compute an id from a key. Only the table
``user_keys`` holds both.

Jobs read the secret themselves and pass it to executors inside a Python function, never as a literal of a query. So no plan,
table, bundle, configuration or log holds it.
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
from pyspark.sql.pandas.functions import pandas_udf

from bp_spark.core import secret
from bp_spark.core.errors import ConfigError
from bp_spark.ingest.sources.contract import BLANKS

Group = TypeVar("Group", bound=Hashable)

BROKEN_TEXT = r"[\x00-\x08\x0B\x0C\x0E-\x1F\x{FFFD}]"
"""Pattern of broken text: control characters, and the replacement of unreadable bytes."""
FREE_TEXT: Mapping[str, tuple[str, ...]] = {
    "raw_searches": ("query",),
    "raw_reviews": ("text",),
    # a topic may be the subject line of an e-mail
    "raw_consultations": ("topic", "text"),
}
"""Raw table -> columns with text that users wrote."""
MIN_SECRET_BYTES = 32
_HOW_TO = "`openssl rand -hex 32` makes one; keep it: another secret gives users other keys"
_MIN_REPLACED = 6
"""Length from which an id is replaced inside of other values."""


# --- the secret --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Secret:
    """The key of the HMAC; its printed form hides the value.

    Attributes:
        value: at least 32 bytes.
    """

    value: bytes = field(repr=False)

    @property
    def key_id(self) -> str:
        """Identity of the secret, from which the secret can't be computed."""
        return hmac.digest(self.value, b"bp-spark key id", "sha256").hex()[:16]

    def key_of(self, user_id: str) -> str:
        """Return the ``user_key`` of an id.

        >>> Secret(b"0123456789abcdef0123456789abcdef").key_of(" u1 ")[:16]
        '39536bc0c20e6efc'
        """
        return hmac.digest(self.value, user_id.strip(BLANKS).encode(), "sha256").hex()


def load_secret(address: str) -> Secret:
    """Return the secret at an address in the form of ``privacy.secret``.

    Raises:
        ConfigError: there is no secret, or it is shorter than 32 bytes.
    """
    try:
        value = secret.read("privacy.secret", address)
    except ConfigError as error:
        raise ConfigError(f"{error}; {_HOW_TO}") from None
    if len(value) < MIN_SECRET_BYTES:
        raise ConfigError(f"privacy.secret: {address} must hold at least {MIN_SECRET_BYTES} bytes; {_HOW_TO}")
    return Secret(value)


def make_secret(path: Path, text: str = "") -> None:
    """Write a secret, by default a random one, to a file that only its owner may read; an existing file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{text or secrets.token_hex(MIN_SECRET_BYTES)}\n")


# --- groups of users ---------------------------------------------------------------------------------------------------


def withheld(counts: Mapping[Group, int], totals: Collection[Collection[Group]], smallest: int) -> set[Group]:
    """Return the groups to withhold: those that are too small, and more where a published total would reveal these.

    This is complementary suppression (Hundepool et al. 2012, "Statistical Disclosure Control", 4.3). In each published total
    either no group is withheld, or several groups with at least ``smallest`` users together, if the total has as many. For
    that, the next larger group is withheld too.

    Args:
        counts: users of each group. A group without users reveals nobody.
        totals: groups whose sum is published, such as the rows, columns and total of a table.
        smallest: the fewest users whose figures may be published.
    """
    hidden = {group for group, users in counts.items() if 0 < users < smallest}
    parts = [{group for group in total if counts.get(group)} for total in totals]
    while True:
        more = {
            _next_larger(counts, part, part & hidden) for part in parts if _is_revealed(counts, part, hidden, smallest)
        }
        if not more:
            return hidden
        hidden |= more


def _is_revealed(counts: Mapping[Group, int], part: set[Group], hidden: set[Group], smallest: int) -> bool:
    hidden_part = part & hidden
    if not hidden_part or part == hidden_part:
        return False
    return len(hidden_part) == 1 or sum(counts[group] for group in hidden_part) < smallest


def _next_larger(counts: Mapping[Group, int], part: set[Group], hidden: set[Group]) -> Group:
    return min(part - hidden, key=lambda group: (counts[group], str(group)))


# --- user ids ----------------------------------------------------------------------------------------------------------


def user_id(column: Column | str) -> Column:
    """Return the id that is keyed: text without surrounding blanks; NULL where blank or broken."""
    trimmed = _trimmed(F.make_valid_utf8(column))
    return F.when((F.length(trimmed) > 0) & ~trimmed.rlike(BROKEN_TEXT), trimmed)


def _trimmed(column: Column) -> Column:
    return F.btrim(column, F.lit(BLANKS))


def user_key(ids: Column, secret: Secret) -> Column:
    """Return the key of each id, NULL for NULL; each distinct id of an Arrow batch is computed once."""
    return _key_udf(secret.value)(ids)


def key_hash(keys: Column) -> Column:
    """Return the hash of a user's key for ``forgotten``: it recognises a key, and the key can't be computed from it."""
    return F.sha2(keys, 256)


def _key_udf(value: bytes) -> Callable[[Column], Column]:
    def keys(ids: pd.Series) -> pd.Series:
        positions, distinct_ids = pd.factorize(ids)
        # a NULL has position -1: the last
        distinct_keys = [*(hmac.digest(value, one.encode(), "sha256").hex() for one in distinct_ids), None]
        return pd.Series(np.array(distinct_keys, object)[positions])

    udf: Callable[[Column], Column] = pandas_udf(keys, "string")  # type: ignore[call-overload]
    return udf


def pseudonymous(df: DataFrame, table: str, secret: Secret, mask_text: Callable[[Column], Column]) -> DataFrame:
    """Return rows of a raw table as they may be stored: ``user_key`` instead of ``user_id``, free text masked.

    An id that is broken text counts as unreadable. For a line that could not be parsed only its length is stored: the user's id
    may be anywhere in it, and ``delivery`` names the file to look into.

    Args:
        df: rows as :func:`bp_spark.ingest.sources.contract.in_contract` shapes them; a table without users is only masked.
        table: raw table of the rows.
        secret: secret of the keys.
        mask_text: masks a text that users wrote; see :func:`mask` and :func:`as_written`.
    """
    for name in FREE_TEXT.get(table, ()):
        df = df.withColumn(name, mask_text(F.col(name)))
    own_id = _trimmed(F.col("user_id")) if "user_id" in df.columns else F.lit(None).cast("string")

    def without_id(name: Column, value: Column) -> Column:
        """Return an unreadable value without the row's own user id."""
        line = F.concat(F.lit("<"), F.length(value).cast("string"), F.lit(" characters>"))
        without = F.when(F.trim(value) == own_id, "<user>").when(
            F.length(own_id) >= _MIN_REPLACED, F.replace(value, own_id, F.lit("<user>"))
        )
        return F.when(name == "row", line).otherwise(mask_text(F.coalesce(without, value)))

    unreadable = F.transform_values("unreadable", without_id)
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
# from a word's beginning and without backtracking, or a text of megabytes without a space would cost quadratic time
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
"""Pattern of every text that may hold one of these numbers; most texts don't match, and cost one search."""


def mask(text: Column) -> Column:
    """Replace personal numbers in a text by ``<email>``, ``<phone>``, ``<card>``, ``<id>`` and ``<iban>``.

    Numbers with check digits are masked only where the digits fit: cards (Luhn), identity numbers of China (GB 11643, ISO 7064
    MOD 11-2), IBANs (ISO 13616, MOD 97-10). In a text with any of these, full-width digits become plain digits.

    Other numbers stay: prices, sizes, years, model and order numbers. An order number of eleven digits that begins with 13 to
    19 looks like a mobile number of China, and is masked.
    """
    plain = F.translate(text, "０１２３４５６７８９＠＋－", "0123456789@+-")
    masked = F.regexp_replace(plain, _EMAIL, "<email>")
    masked = _replaced(masked, _IBAN, _is_iban, "<iban>")
    masked = _replaced(masked, _ID, _is_id, "<id>")
    masked = _replaced(masked, _CARD, _is_card, "<card>")
    for pattern in _PHONES:
        masked = F.regexp_replace(masked, pattern, "<phone>")
    return F.when(plain.rlike(_SUSPECT), masked).otherwise(text)


def as_written(text: Column) -> Column:
    """Return the text unchanged, in the place of :func:`mask`."""
    return text


def _replaced(text: Column, pattern: str, holds: Callable[[Column], Column], by: str) -> Column:
    """Replace the parts of a text that match a pattern and pass a check of their digits."""

    def without(whole: Column) -> Column:
        candidates = F.filter(F.regexp_extract_all(whole, F.lit(pattern), F.lit(0)), holds)
        return F.aggregate(candidates, whole, lambda rest, candidate: F.replace(rest, candidate, F.lit(by)))

    # as a lambda variable: otherwise the expression of the text would be computed twice in each of several steps
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
