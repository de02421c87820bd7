"""How often totals lie in their interval: a part of :mod:`bench.decisions`.

In: a copy of the demo's tables, for features of past dates are written. At each of six dates, four weeks apart, a training that
sees nothing later expects what the platform and each level will spend in the 90 days from it on. Boosted trees and the
transformer are left out: six default trainings would take an hour, and the error of sums is learned from out-of-fold
predictions of whatever members there are.

- ``totals.coverage_90``: share of these totals that lie in their interval of 90 %; ``totals.platform_coverage_90``: of those of
  the platform.

Horizons of dates four weeks apart overlap, so that one surprise moves several of them.
"""

from __future__ import annotations

import shutil
import statistics
from datetime import timedelta
from pathlib import Path

from pyspark.sql import SparkSession

from bench.worlds import totals_inside
from bp_spark.core import config
from bp_spark.core.config import DEMO_FILE
from bp_spark.features import labels
from bp_spark.ingest.clean import span
from bp_spark.lakehouse.run import recorded
from bp_spark.training.ensemble import fit_as_of

DATES, DAYS_APART = 6, 28


def totals(spark: SparkSession, lakehouse: Path, folder: Path) -> dict[str, float]:
    """Return how often totals lay in their interval.

    Args:
        spark: the session.
        lakehouse: folder of the demo's tables.
        folder: where the copy goes.
    """
    shutil.copytree(lakehouse, folder / "lakehouse" / lakehouse.name)
    settings = config.load(
        DEMO_FILE,
        [
            f"tables.path={folder}/lakehouse",
            f"training.work_dir={folder}/work",
            f"bundles={folder}/bundles",
            "fusion.members=[linear, btyd]",
            "labels.other_horizons=[]",
        ],
    )
    inside = []
    with recorded(spark, settings, "bench") as run:
        first, last = span(run.lakehouse)
        newest = last - timedelta(days=settings.labels.horizon_days)
        for step in range(DATES):
            day = newest - timedelta(days=step * DAYS_APART)
            fitted = fit_as_of(run, labels.cutoffs(first, day, settings.labels), day)
            inside.append(totals_inside(fitted, fitted.predictions))
    return {
        "totals.coverage_90": statistics.mean(each["totals_inside"] for each in inside),
        "totals.platform_coverage_90": statistics.mean(each["platform_inside"] for each in inside),
    }
