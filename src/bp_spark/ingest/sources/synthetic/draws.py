"""Random draws as hashes: the same for the same seed, purpose and key, on any cluster."""

from __future__ import annotations

import math

import numpy as np
from pyspark.sql import Column
from pyspark.sql import functions as F
from scipy import special

from bp_spark.core.config import SyntheticConfig

Key = Column | str
SCORE_LIMIT, SCORE_STEPS = 6, 64
"""Quantile tables reach from -6 to 6 standard deviations, in steps of 1/64."""
MAX_INVERTED_MEAN = 50.0
"""Beyond this mean, Poisson counts are drawn by the normal approximation."""


def uniform(config: SyntheticConfig, purpose: str, *key: Key) -> Column:
    """Draw uniforms on (0, 1), the same for the same seed, purpose and key: 52 bits of a hash."""
    bits = F.shiftrightunsigned(F.xxhash64(F.lit(f"{config.seed}/{purpose}"), *key), 12)
    return (bits.cast("double") + 0.5) / 2.0**52


def normal(config: SyntheticConfig, purpose: str, *key: Key) -> Column:
    """Draw standard normals (Box & Muller 1958)."""
    radius = F.sqrt(-2.0 * F.log(uniform(config, f"{purpose} radius", *key)))
    return radius * F.cos(2 * math.pi * uniform(config, f"{purpose} angle", *key))


def gamma(shape: float, score: Column) -> Column:
    """Return the Gamma(shape, 1) quantile of a normal score.

    A table of log quantiles is interpolated linearly.
    """
    grid = np.linspace(-SCORE_LIMIT, SCORE_LIMIT, 2 * SCORE_LIMIT * SCORE_STEPS + 1)
    # from the nearer tail: 1 - p has no digits left where p is close to 1
    lower, upper = special.gammaincinv(shape, special.ndtr(grid)), special.gammainccinv(shape, special.ndtr(-grid))
    logs = np.log(np.where(grid < 0, lower, upper))
    bounded = F.greatest(F.least(score, F.lit(SCORE_LIMIT - 1e-9)), F.lit(-float(SCORE_LIMIT)))
    position = (bounded + SCORE_LIMIT) * SCORE_STEPS
    below = F.floor(position).cast("int")
    low, high = F.get(F.lit(logs), below), F.get(F.lit(logs), below + 1)
    return F.exp(low + (position - below) * (high - low))


def poisson(mean: Column, uniforms: Column, normals: Column) -> Column:
    """Return Poisson counts, by inversion of the uniform or, beyond a mean of 50, by the normal approximation."""
    small = F.least(mean, F.lit(MAX_INVERTED_MEAN))
    p0 = F.exp(-small)
    start = F.struct(p0.alias("p"), p0.alias("below"), F.lit(0).alias("n"))

    def step(state: Column, k: Column) -> Column:
        p = state["p"] * small / k
        more = F.struct(p.alias("p"), (state["below"] + p).alias("below"), (state["n"] + 1).alias("n"))
        return F.when(state["below"] < uniforms, more).otherwise(state)

    most = F.ceil(small + 7 * F.sqrt(small) + 8).cast("int")
    inverted = F.aggregate(F.sequence(F.lit(1), most), start, step)["n"]
    approximate = F.floor(mean + F.sqrt(mean) * normals + 0.5).cast("int")
    return F.when(mean > MAX_INVERTED_MEAN, F.greatest(approximate, F.lit(0))).otherwise(inverted)


def sigmoid(x: Column) -> Column:
    """Return the logistic function."""
    return 1 / (1 + F.exp(-x))


def whole(x: Column) -> Column:
    """Return the largest whole number that is not above a number."""
    return F.floor(x).cast("int")
