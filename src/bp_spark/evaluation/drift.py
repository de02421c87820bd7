"""Measure drift: distributions of features and scores in bins, their distances, and users whose score changed between runs.

The functions count the rows of each bin in one pass over all columns, and compute the distance of two such distributions. They
also compare two scoring runs user by user, and make figures with the threshold at which they alarm.

A spread is a distribution in bins, ``int64 [borders + 2]``: the rows of each bin, then the rows above the last border, and last
the missing values.
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
"""Bins of a spread, with equally many rows each unless a value is frequent."""
GROUPS = 10
"""Groups of bins for the population stability index, with about a tenth of the reference each."""
SAMPLE = 20_000
"""Rows from which borders are taken; the rows of each bin are counted over a larger sample."""
CHANCE = 0.001
"""A distance that chance alone exceeds with this probability is no drift, however small the two samples are."""
NEW, GONE = "new", "gone"
"""Level before of a user who had no score then, and level now of a user who has no score now."""
EVENT_COLUMNS = ("seq_kind", "seq_amount", "seq_items", "seq_discount", "seq_text_id")
"""Columns of a history that change with its events, and not with time."""

_HASHES = 1_000_000


# --- spreads -----------------------------------------------------------------------------------------------------------


def borders(values: np.ndarray) -> np.ndarray:
    """Return the borders of up to BINS bins with equally many of the values; missing values are left out.

    Each border is one of the values and the upper end of its bin, so that a frequent value has its own bin.

    Returns:
        float64, rising, at most ``BINS - 1``; empty if no value is finite.

    >>> borders(np.array([0.0, 0.0, 0.0, 5.0, np.nan])).tolist()
    [0.0, 5.0]
    """
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return np.zeros(0)
    return np.unique(np.quantile(finite, np.arange(1, BINS) / BINS, method="inverted_cdf"))


def spread(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Count the values in each bin, ``int64 [edges + 2]``.

    >>> spread(np.array([0.0, 1.0, 7.0, np.nan]), np.array([0.0, 5.0])).tolist()
    [1, 1, 1, 1]
    """
    values = np.asarray(values, np.float64)
    bins = np.searchsorted(edges, values, side="left")
    bins[np.isnan(values)] = len(edges) + 1
    return np.bincount(bins, minlength=len(edges) + 2)


def count_spreads(rows: DataFrame, edges: Mapping[str, np.ndarray], by: str) -> dict[str, dict[str, np.ndarray]]:
    """Compute the spreads of many columns in one pass: executors count each batch, and only counts are sent.

    Args:
        rows: rows with the columns of ``edges`` and ``by``.
        edges: column -> its borders.
        by: column to group the rows by; it has few values.

    Returns:
        Value of ``by``, as text -> column -> spread. Values without rows are left out.
    """
    names = tuple(edges)
    if not names:
        return {}
    ends = np.cumsum([len(edges[name]) + 2 for name in names])

    def count_batches(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        totals: dict[str, np.ndarray] = {}
        for batch in batches:
            for part in pc.unique(batch.column(0)).to_pylist():
                columns = from_arrow(batch.filter(pc.equal(batch.column(0), part)))
                counts = np.concatenate([spread(np.asarray(columns[name]), edges[name]) for name in names])
                totals[part] = totals.get(part, 0) + counts
        for part, total in totals.items():
            cells = np.flatnonzero(total)
            yield pa.RecordBatch.from_pydict(
                {"part": pa.array([part] * len(cells)), "cell": cells.astype(np.int32), "rows": total[cells]}
            )

    narrow = rows.select(F.col(by).cast("string").alias("_by"), *names)
    cells = narrow.mapInArrow(count_batches, "part string, cell int, rows bigint").groupBy("part", "cell")
    frame = cells.agg(F.sum("rows").alias("rows")).toPandas()
    return {str(part): dict(zip(names, _split(group, ends), strict=True)) for part, group in frame.groupby("part")}


def _split(cells: pd.DataFrame, ends: np.ndarray) -> list[np.ndarray]:
    counts = np.zeros(ends[-1], np.int64)
    counts[cells["cell"].to_numpy()] = cells["rows"].to_numpy()
    return np.split(counts, ends[:-1])


def sampled(rows: DataFrame, total: int, most: int, *key: str) -> DataFrame:
    """Take about ``most`` of the ``total`` rows, by a hash of their key: the same users in each scoring run."""
    if total <= most:
        return rows
    return rows.filter(F.pmod(F.xxhash64(*key), F.lit(_HASHES)) < int(_HASHES * most / total))


# --- distances ---------------------------------------------------------------------------------------------------------


def psi(reference: np.ndarray, current: np.ndarray) -> float:
    """Return the population stability index ``Σ (q - p) ln(q / p)`` over groups with shares ``p`` before and ``q`` now.

    It is Jeffreys' divergence under its name in credit scoring (Siddiqi 2006, "Credit risk scorecards"; Yurdakul and Naranjo
    2020, "Statistical properties of the population stability index"). The groups are bins joined to about a tenth of the
    reference each, and the missing values. Half a row is added to each group, so that an empty group has a logarithm.

    Args:
        reference: spread before.
        current: spread now, over the same borders.

    Returns:
        The index; NaN if either spread has no rows.
    """
    if not reference.sum() or not current.sum():
        return math.nan
    group = _groups(reference)
    p, q = (np.bincount(group, counts) + 0.5 for counts in (reference, current))
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())


def psi_by_chance(reference: np.ndarray, current: np.ndarray) -> float:
    """Return the index that two samples of one population exceed with probability CHANCE.

    The index of such samples is about ``(1 / rows + 1 / rows)`` times chi-squared with one degree of freedom less than groups
    (Yurdakul and Naranjo 2020).
    """
    degrees = max(1, int(_groups(reference).max()))
    return float(chdtri(degrees, CHANCE) * _inverse_rows(reference, current))


def ks(reference: np.ndarray, current: np.ndarray) -> float:
    """Return the Kolmogorov-Smirnov distance: the largest difference of cumulative shares, with missing values last.

    It is taken at the borders. Within a bin the difference may be larger, by no more than the smaller of the two shares of that
    bin: about a hundredth, and nothing in the bin of a single value.

    Args:
        reference: spread before.
        current: spread now, over the same borders.

    Returns:
        The distance; NaN if either spread has no rows.
    """
    if not reference.sum() or not current.sum():
        return math.nan
    before, now = (np.cumsum(counts) / counts.sum() for counts in (reference, current))
    return float(np.abs(before - now).max())


def ks_by_chance(reference: np.ndarray, current: np.ndarray) -> float:
    """Return the distance that two samples of one population exceed with probability CHANCE (Smirnov 1948)."""
    return math.sqrt(-math.log(CHANCE / 2) / 2 * _inverse_rows(reference, current))


def _groups(reference: np.ndarray) -> np.ndarray:
    """Return the group of each bin, from 0: the tenth of the reference with the middle of the bin; missing values are last."""
    present = reference[:-1]
    middle = (np.cumsum(present) - present / 2) / max(int(present.sum()), 1)
    tenth = np.minimum((middle * GROUPS).astype(int), GROUPS - 1)
    group = np.unique(tenth, return_inverse=True)[1]
    return np.append(group, group.max() + 1)


def _inverse_rows(reference: np.ndarray, current: np.ndarray) -> float:
    """Return the sum of the inverse numbers of rows, which the variance of a distance is proportional to."""
    return 1 / max(int(reference.sum()), 1) + 1 / max(int(current.sum()), 1)


# --- two scoring runs ---------------------------------------------------------------------------------------------------


def join_runs(earlier: DataFrame, later: DataFrame) -> DataFrame:
    """Join the users of two scoring runs.

    Args:
        earlier: rows of SCORES of one date.
        later: rows of SCORES of a later date.

    Returns:
        ``user_key``; ``before`` and ``after``, the levels, or NEW and GONE; and ``points`` by which the score changed, up or
        down, NULL for new and gone users.
    """

    def renamed(scores: DataFrame, side: str) -> DataFrame:
        return scores.select("user_key", F.col("level").alias(f"{side}_level"), F.col("score").alias(f"{side}_score"))

    both = renamed(earlier, "before").join(renamed(later, "after"), "user_key", "full_outer")
    return both.select(
        "user_key",
        F.coalesce("before_level", F.lit(NEW)).alias("before"),
        F.coalesce("after_level", F.lit(GONE)).alias("after"),
        F.abs(F.col("after_score") - F.col("before_score")).alias("points"),
    )


def without_new_events(users: DataFrame, earlier_features: DataFrame, later_features: DataFrame) -> DataFrame:
    """Return the users without a new event between two scoring runs: their histories hold the same events.

    An event that came late or was corrected is new too, although its day is old. An event that is older than all events of a
    history is not seen.

    Args:
        users: users by ``user_key``.
        earlier_features: rows of ``user_features`` of the earlier run.
        later_features: rows of ``user_features`` of the later run.
    """

    def event_hash(features: DataFrame, name: str) -> DataFrame:
        return features.select("user_key", F.xxhash64(*(F.col(column) for column in EVENT_COLUMNS)).alias(name))

    with_both = users.join(event_hash(earlier_features, "_before"), "user_key").join(
        event_hash(later_features, "_after"), "user_key"
    )
    return with_both.filter(F.col("_before") == F.col("_after")).drop("_before", "_after")


def has_moved(points: float) -> Column:
    """Return whether the score changed by more than so many points, for rows of :func:`join_runs`."""
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
    """Return a row of DRIFT, without its run, date and bundle.

    Args:
        kind: kind of the figure.
        subject: feature, score, date or pair of levels that the figure is about.
        metric: name of the figure.
        value: the figure; NaN breaks no threshold.
        users: number of users.
        against: what the figure is compared with: the training, or a date.
        reference: the value that was promised.
        least: a value below this breaks its threshold.
        most: a value above this breaks its threshold.
        note: a remark for people.
    """
    defined = None if math.isnan(value) else float(value)
    broken = defined is not None and ((least is not None and defined < least) or (most is not None and defined > most))
    threshold = most
    if least is not None and (most is None or (defined is not None and defined < (least + most) / 2)):
        threshold = least
    return {
        "kind": kind,
        "subject": subject,
        "metric": metric,
        "against": against,
        "value": defined,
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
    """Return the rows ``psi`` and ``ks``. Each alarms above its threshold, or above the chance distance if that is larger.

    Args:
        kind: kind of the figures.
        subject: the feature, or the score.
        reference: spread before.
        current: spread now, over the same borders.
        against: what the figures are compared with: the training, or a date.
        max_psi: largest index that is no drift; with ``None`` the figure never alarms.
        max_ks: largest distance that is no drift; with ``None`` the figure never alarms.
        note: a remark for people.
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
