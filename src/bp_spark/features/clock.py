"""The one rule of recency precision: a silent user's clock ticks ever more slowly.

Days of silence are rounded down to a few binary digits. Between two ticks no feature of the user changes, so neither does the
score, and the scoring run need not compute the score again.

The rule stands here twice, for numpy and for SQL: workers apply it to arrays, category features and the DuckDB benchmark to
columns. A test holds the two together.
"""

from __future__ import annotations

import numpy as np


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


def quantize_recency_sql(days: str, precision_bits: int | None) -> str:
    """Return the SQL of :func:`quantize_recency`.

    Args:
        days: SQL of a number of days, at least 1.
        precision_bits: as in :func:`quantize_recency`.
    """
    if precision_bits is None:
        return days
    return f"({days} - {days} % shiftleft(1, greatest(length(bin({days})) - {precision_bits}, 0)))"
