"""Have users, their features or their scores moved? Spreads of numbers in bins, their distances, and who moved between nights.

In: rows of users, as wide as ``user_features``, and borders between bins. Out: how many rows are in each bin, in one pass over
all columns; the distance of two such spreads; users by their level before and now; figures with the border they alarm at.

A spread is ``int64 [borders + 2]``: the rows in each bin, one more above the last border, and last the missing values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from scipy.special import chdtri

from bp_spark.model.columns import from_arrow

BINS = 100
"""Bins of a spread, of equally many rows each where no value is frequent."""
GROUPS = 10
"""Groups of bins, of about a tenth of the reference each, that the population stability index is of."""
SAMPLE = 20_000
"""Rows that borders are taken from; what lies between them is counted over more."""
CHANCE = 0.001
"""A distance that chance alone would exceed no more often is no drift, however small the two samples are."""
NEW, GONE = "new", "gone"
"""Level before of who had no score then, and now of who has none now."""
OF_EVENTS = ("seq_kind", "seq_amount", "seq_items", "seq_discount", "seq_text_id")
"""Columns of a history that change with its events and not with the clock."""

_HASHES = 1_000_000


# --- spreads -----------------------------------------------------------------------------------------------------------


def borders(values: np.ndarray) -> np.ndarray:
    """Borders of up to BINS bins that hold equally many of the values; missing ones are left out.

    Each is one of the values, and the upper end of its bin, so that a frequent value has a bin of its own.

    Returns:
        float64, rising, at most ``BINS - 1``; none where no value is finite.

    >>> borders(np.array([0.0, 0.0, 0.0, 5.0, np.nan])).tolist()
    [0.0, 5.0]
    """
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    if not known.size:
        return np.zeros(0)
    return np.unique(np.quantile(known, np.arange(1, BINS) / BINS, method="inverted_cdf"))


def spread(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How many of the values lie in each bin, ``int64 [edges + 2]``.

    >>> spread(np.array([0.0, 1.0, 7.0, np.nan]), np.array([0.0, 5.0])).tolist()
    [1, 1, 1, 1]
    """
    values = np.asarray(values, np.float64)
    place = np.searchsorted(edges, values, side="left")
    place[np.isnan(values)] = len(edges) + 1
    return np.bincount(place, minlength=len(edges) + 2)


def counted(rows: DataFrame, edges: Mapping[str, np.ndarray], by: str) -> dict[str, dict[str, np.ndarray]]:
    """Spreads of many columns in one pass: each batch is counted where it lies, and only counts travel.

    Args:
        rows: with the columns of ``edges`` and ``by``.
        edges: column -> its borders.
        by: column that parts the rows; it has few values.

    Returns:
        Value of ``by``, as text -> column -> spread. Values without rows are left out.
    """
    names = tuple(edges)
    if not names:
        return {}
    ends = np.cumsum([len(edges[name]) + 2 for name in names])

    def parts(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        totals: dict[str, np.ndarray] = {}
        for batch in batches:
            for part in pc.unique(batch.column(0)).to_pylist():
                columns = from_arrow(batch.filter(pc.equal(batch.column(0), part)))
                found = np.concatenate([spread(np.asarray(columns[name]), edges[name]) for name in names])
                totals[part] = totals.get(part, 0) + found
        for part, total in totals.items():
            cells = np.flatnonzero(total)
            yield pa.RecordBatch.from_pydict(
                {"part": pa.array([part] * len(cells)), "cell": cells.astype(np.int32), "rows": total[cells]}
            )

    narrow = rows.select(F.col(by).cast("string").alias("_by"), *names)
    cells = narrow.mapInArrow(parts, "part string, cell int, rows bigint").groupBy("part", "cell")
    frame = cells.agg(F.sum("rows").alias("rows")).toPandas()
    return {str(part): dict(zip(names, _split(group, ends), strict=True)) for part, group in frame.groupby("part")}


def _split(cells: pd.DataFrame, ends: np.ndarray) -> list[np.ndarray]:
    counts = np.zeros(ends[-1], np.int64)
    counts[cells["cell"].to_numpy()] = cells["rows"].to_numpy()
    return np.split(counts, ends[:-1])


def sampled(rows: DataFrame, total: int, most: int, *key: str) -> DataFrame:
    """About ``most`` of the ``total`` rows, by hash of their key: the same users night after night."""
    if total <= most:
        return rows
    return rows.filter(F.pmod(F.xxhash64(*key), F.lit(_HASHES)) < int(_HASHES * most / total))


# --- distances ---------------------------------------------------------------------------------------------------------


def psi(reference: np.ndarray, current: np.ndarray) -> float:
    """Population stability index: ``Σ (q - p) ln(q / p)`` over groups with shares ``p`` before and ``q`` now.

    Jeffreys' divergence under the name it has in credit scoring (Siddiqi 2006, "Credit risk scorecards"; Yurdakul and Naranjo
    2020, "Statistical properties of the population stability index"). Groups are bins joined to about a tenth of the
    reference each, and the missing values. Half a row is added to each group, so that an empty one has a logarithm.

    Args:
        reference: spread before.
        current: spread now, over the same borders.

    Returns:
        NaN where either is of no rows.
    """
    if not reference.sum() or not current.sum():
        return math.nan
    group = _groups(reference)
    p, q = (np.bincount(group, counts) + 0.5 for counts in (reference, current))
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())


def psi_by_chance(reference: np.ndarray, current: np.ndarray) -> float:
    """What the index of two samples of one population exceeds with probability CHANCE: it is about
    ``(1 / rows + 1 / rows)`` times chi-squared with a degree less than groups (Yurdakul and Naranjo 2020).
    """
    degrees = max(1, int(_groups(reference).max()))
    return float(chdtri(degrees, CHANCE) * _both(reference, current))


def ks(reference: np.ndarray, current: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance: the largest difference of the two cumulative shares; missing values come last.

    It is taken at the borders. Within a bin it may be larger, by no more than the smaller of the two shares of that bin:
    about a hundredth, and nothing in the bin of a single value.

    Returns:
        NaN where either is of no rows.
    """
    if not reference.sum() or not current.sum():
        return math.nan
    before, now = (np.cumsum(counts) / counts.sum() for counts in (reference, current))
    return float(np.abs(before - now).max())


def ks_by_chance(reference: np.ndarray, current: np.ndarray) -> float:
    """What the distance of two samples of one population exceeds with probability CHANCE (Smirnov 1948)."""
    return math.sqrt(-math.log(CHANCE / 2) / 2 * _both(reference, current))


def _groups(reference: np.ndarray) -> np.ndarray:
    """Number of each bin's group, from 0: its middle's tenth of the reference; missing values are the last group."""
    known = reference[:-1]
    middle = (np.cumsum(known) - known / 2) / max(int(known.sum()), 1)
    tenth = np.minimum((middle * GROUPS).astype(int), GROUPS - 1)
    group = np.unique(tenth, return_inverse=True)[1]
    return np.append(group, group.max() + 1)


def _both(reference: np.ndarray, current: np.ndarray) -> float:
    return 1 / max(int(reference.sum()), 1) + 1 / max(int(current.sum()), 1)


# --- two nights --------------------------------------------------------------------------------------------------------


def beside(earlier: DataFrame, tonight: DataFrame) -> DataFrame:
    """Users of two nights: ``user_key``, ``before`` and ``after`` (level; NEW, GONE where there is none), ``points`` that the
    score moved, up or down (NULL for who is new or gone).

    Args:
        earlier: rows of SCORES of a night.
        tonight: of a later one.
    """

    def of(night: DataFrame, side: str) -> DataFrame:
        return night.select("user_key", F.col("level").alias(f"{side}_level"), F.col("score").alias(f"{side}_score"))

    both = of(earlier, "before").join(of(tonight, "after"), "user_key", "full_outer")
    return both.select(
        "user_key",
        F.coalesce("before_level", F.lit(NEW)).alias("before"),
        F.coalesce("after_level", F.lit(GONE)).alias("after"),
        F.abs(F.col("after_score") - F.col("before_score")).alias("points"),
    )


def without_new_events(users: DataFrame, features_earlier: DataFrame, features_tonight: DataFrame) -> DataFrame:
    """Those of the users of whom no event came in between two nights: their histories hold the same events.

    An event that came late, or was corrected, is a new one too, which its day would not tell; one that is older than all
    that a history holds is not seen.

    Args:
        users: with ``user_key``.
        features_earlier: rows of ``user_features`` of the earlier night.
        features_tonight: of the later one.
    """

    def told(features: DataFrame, name: str) -> DataFrame:
        return features.select("user_key", F.xxhash64(*(F.col(column) for column in OF_EVENTS)).alias(name))

    with_both = users.join(told(features_earlier, "_before"), "user_key").join(
        told(features_tonight, "_after"), "user_key"
    )
    return with_both.filter(F.col("_before") == F.col("_after")).drop("_before", "_after")


def moved(points: float) -> Column:
    """Of rows of :func:`beside`, whether the score moved by more points."""
    return F.coalesce(F.col("points") > points, F.lit(False))


# --- figures -----------------------------------------------------------------------------------------------------------


def figure(
    kind: str,
    subject: str,
    metric: str,
    value: float,
    users: int,
    *,
    against: str | None = None,
    reference: float | None = None,
    least: float | None = None,
    most: float | None = None,
    note: str | None = None,
) -> dict[str, Any]:
    """A row of DRIFT but for its run, night and bundle. A value below ``least`` or above ``most`` breaks its threshold; one
    that can't be told (NaN) breaks none.
    """
    told = None if math.isnan(value) else float(value)
    broken = told is not None and ((least is not None and told < least) or (most is not None and told > most))
    threshold = most
    if least is not None and (most is None or (told is not None and told < (least + most) / 2)):
        threshold = least
    return {
        "kind": kind,
        "subject": subject,
        "metric": metric,
        "against": against,
        "value": told,
        "reference": reference,
        "threshold": threshold,
        "broken": broken,
        "users": users,
        "note": note,
    }


def distances(
    kind: str,
    subject: str,
    reference: np.ndarray,
    current: np.ndarray,
    *,
    against: str,
    max_psi: float | None,
    max_ks: float | None,
    note: str | None = None,
) -> list[dict[str, Any]]:
    """Rows ``psi`` and ``ks``. The threshold is the given one or, where that is larger, what chance alone comes to.

    Args:
        max_psi: largest index that is no drift; ``None``: the figure never alarms.
        max_ks: largest distance that is no drift, likewise.
    """
    users = int(current.sum())
    rows = []
    for metric, value, most, by_chance in (
        ("psi", psi(reference, current), max_psi, psi_by_chance(reference, current)),
        ("ks", ks(reference, current), max_ks, ks_by_chance(reference, current)),
    ):
        border = None if most is None else max(most, by_chance)
        rows.append(figure(kind, subject, metric, value, users, against=against, most=border, note=note))
    return rows
