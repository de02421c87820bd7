"""How much longer a night takes after three years: ``late_night_ratio``, for :mod:`bench.faults`."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

from bench.long_lived import SECRET, Platform

NIGHTS = 1_000
MEASURED = 5


def late_night_ratio(nights: int = NIGHTS) -> float:
    """Return the median time of a night after so many nights, by that of a night of the first week.

    Nights of both kinds take turns, so that a warm Java serves both alike.
    """
    from bp_spark.core import config
    from bp_spark.core.session import MODEL_MODULES, get_session
    from tests.support.harness import small_bundle

    os.environ["BP_SPARK_SECRET"] = SECRET
    with tempfile.TemporaryDirectory(prefix="bp-nights-") as folder:
        platform = Platform(Path(folder), small_bundle(Path(folder) / "bundles/small", 20.0).folder)
        spark = get_session(config.load(), "late nights", MODEL_MODULES)
        try:
            platform.live(spark, "old", nights)
            # the first of each are for Java to know the way
            for night in range(2):
                platform.night(spark, "young", night)
                platform.night(spark, "old", nights + night)
            seconds = [
                (platform.night(spark, "young", night), platform.night(spark, "old", nights + night))
                for night in range(2, 2 + MEASURED)
            ]
        finally:
            spark.stop()
    young, old = (statistics.median(of_one) for of_one in zip(*seconds, strict=True))
    print(f"a night takes {young:.2f} s in the first week and {old:.2f} s after {nights:,} nights", file=sys.stderr)
    return old / young
