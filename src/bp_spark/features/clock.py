"""The one rule of recency precision: a silent user's clock ticks ever more slowly.

Days of silence are rounded down to a few binary digits. Between two ticks no feature of the user changes, so neither does the
score, and the scoring run need not compute the score again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from pyspark.sql import Column
from pyspark.sql.pandas.functions import pandas_udf


def quantize_recency(days: np.ndarray, precision_bits: int | None) -> np.ndarray:
    """Round numbers of days down to their leading binary digits.

    >>> quantize_recency(np.array([15, 17, 63, 100]), 4).tolist()
    [15, 16, 60, 96]

    Args:
        days: int64, each at least 1.
        precision_bits: binary digits that stay, the others become 0; ``None`` leaves every day as it is.
    """
    if precision_bits is None:
        return days
    length = np.frexp(days.astype(np.float64))[1].astype(np.int64)
    unit: np.ndarray = 1 << np.maximum(length - precision_bits, 0)
    return np.asarray(days - days % unit)


def quantized_recency(days: Column, precision_bits: int | None) -> Column:
    """Return :func:`quantize_recency` of a column of whole numbers, each at least 1, as an integer column."""
    if precision_bits is None:
        return days

    def rounded(values: pd.Series) -> pd.Series:
        return pd.Series(quantize_recency(values.to_numpy(np.int64), precision_bits))

    udf: Callable[[Column], Column] = pandas_udf(rounded, "int")  # type: ignore[call-overload]
    return udf(days)
