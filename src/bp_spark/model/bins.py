"""Bins of about equal numbers of rows, by the quantiles of a variable."""

from __future__ import annotations

import math

import numpy as np


def quantile_edges(x: np.ndarray, bins: int, smallest: int) -> np.ndarray:
    """Return the borders, rising, between up to ``bins`` equal shares of ``x``.

    Equal values share a bin. Bins with fewer than ``smallest`` rows are merged with a neighbour.
    """
    edges = np.unique(np.quantile(x, np.arange(1, bins) / bins, method="higher"))
    while len(edges):
        rows = np.bincount(np.searchsorted(edges, x, side="right"), minlength=len(edges) + 1)
        thinnest = int(np.argmin(rows))
        if rows[thinnest] >= smallest:
            break
        edges = np.delete(edges, min(thinnest, len(edges) - 1))
    return edges


def quantile_bins(x: np.ndarray, bins: int, smallest: int) -> np.ndarray:
    """Return the bin of each row, int64 [rows]: up to ``bins`` equal shares of ``x``, of about ``smallest`` rows or more."""
    return np.searchsorted(quantile_edges(x, min(bins, max(1, len(x) // smallest)), 1), x, side="right")


def equivalent_rows(rows: int, weights: np.ndarray) -> int:
    """Return how many rows of the mean weight weigh as much as ``rows`` of weight 1."""
    return math.ceil(rows * len(weights) / float(weights.sum()) - 1e-9)
