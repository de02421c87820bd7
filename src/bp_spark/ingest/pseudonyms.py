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
from bp_spark.ingest import masking
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


def pseudonymous(df: DataFrame, table: str, secret: Secret, mask_texts: Callable[[Column], Column]) -> DataFrame:
    """Return rows of a raw table as they may be stored: ``user_key`` instead of ``user_id``, free text masked.

    An id that is broken text counts as unreadable. For a line that could not be parsed only its length is stored: the user's id
    may be anywhere in it, and ``delivery`` names the file to look into.

    Args:
        df: rows as :func:`bp_spark.ingest.sources.contract.in_contract` shapes them; a table without users is only masked.
        table: raw table of the rows.
        secret: secret of the keys.
        mask_texts: masks an array of texts that users wrote; see :func:`mask` and :func:`as_written`.
    """
    for name in FREE_TEXT.get(table, ()):
        df = df.withColumn(name, mask_texts(F.array(name))[0])
    own_id = _trimmed(F.col("user_id")) if "user_id" in df.columns else F.lit(None).cast("string")

    def without_id(name: Column, value: Column) -> Column:
        """Return an unreadable value without the row's own user id."""
        line = F.concat(F.lit("<"), F.length(value).cast("string"), F.lit(" characters>"))
        without = F.when(F.trim(value) == own_id, "<user>").when(
            F.length(own_id) >= _MIN_REPLACED, F.replace(value, own_id, F.lit("<user>"))
        )
        return F.when(name == "row", line).otherwise(F.coalesce(without, value))

    without_ids = F.transform_values("unreadable", without_id)
    unreadable = F.map_from_arrays(F.map_keys(without_ids), mask_texts(F.map_values(without_ids)))
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


def mask(texts: Column) -> Column:
    """Replace personal numbers and addresses in an array of texts; see :mod:`bp_spark.ingest.masking`.

    Only texts that may hold one are sent to Python, which takes 40 microseconds for each.

    Cards, identity numbers of China, and IBANs are masked only where their check digits fit. Other numbers stay: prices, dates,
    sizes, years, model and order numbers. A number in the form of a phone number is masked, unless the word before it says
    that it is another number.
    """
    is_suspect = F.exists(texts, lambda text: text.rlike(masking.SUSPECT))
    # Python would refuse a text with broken bytes.
    readable = F.transform(texts, F.make_valid_utf8)
    return F.coalesce(_mask_udf()(F.when(is_suspect, readable)), texts)


def _mask_udf() -> Callable[[Column], Column]:
    def mask_each(arrays: pd.Series) -> pd.Series:
        return arrays.map(
            lambda texts: None if texts is None else [None if text is None else masking.masked(text) for text in texts]
        )

    udf: Callable[[Column], Column] = pandas_udf(mask_each, "array<string>")  # type: ignore[call-overload]
    return udf


def as_written(texts: Column) -> Column:
    """Return texts unchanged, in the place of :func:`mask`."""
    return texts
