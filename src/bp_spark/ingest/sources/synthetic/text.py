"""Values as the platform writes them: words, times, money."""

from __future__ import annotations

from collections.abc import Sequence

from pyspark.sql import Column
from pyspark.sql import functions as F

from bp_spark.core.config import SyntheticConfig
from bp_spark.ingest.sources.synthetic.draws import whole


def pick(words: Sequence[str], uniform: Column) -> Column:
    """Return one of the words, each equally likely."""
    return F.get(F.lit(list(words)), whole(uniform * len(words)))


def pick_in(chinese: Column, words: Sequence[Sequence[str]], uniform: Column) -> Column:
    """Return a word of ``words[1]`` (Chinese) where ``chinese``, else of ``words[0]``."""
    return F.when(chinese, pick(words[1], uniform)).otherwise(pick(words[0], uniform))


def text_time(config: SyntheticConfig, day: Column, second: Column) -> Column:
    """Return the text of a time, from the day of the period and the second of the day."""
    # by a timestamp without zone: the text does not depend on the session's time zone
    midnight = F.date_add(F.lit(config.first_day), day).cast("timestamp_ntz")
    return (midnight + F.make_dt_interval(secs=second)).cast("string")


def text_money(value: Column) -> Column:
    """Return the text of an amount with two decimals."""
    return value.cast("decimal(18,2)").cast("string")
