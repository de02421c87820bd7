"""What users spent after earlier scoring runs, beside what these expected: errors once a horizon is over."""

from __future__ import annotations

import math
from datetime import date, timedelta
from typing import Any

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.core.errors import DataError
from bp_spark.evaluation import drift, metrics
from bp_spark.features import labels
from bp_spark.ingest.clean import span
from bp_spark.lakehouse.run import Run
from bp_spark.lakehouse.schema import rows_of_date

_DEVIATIONS = 3.3
"""Standard errors that chance alone exceeds once in a thousand times."""


def bundle_of(scores: DataFrame, score_date: date) -> str:
    """Return the digest of the bundle that scored a date.

    Raises:
        DataError: the date has no scores.
    """
    row = rows_of_date(scores, score_date).select("bundle_digest").first()
    if row is None:
        raise DataError("scores", f"holds no rows of {score_date}; run score for it", column="score_date")
    return str(row[0])


def realised(run: Run, scores: DataFrame, score_date: date) -> list[dict[str, Any]]:
    """Return figures of the runs whose horizon is over, and that no check of another date has measured."""
    measured = set[str]()
    if run.lakehouse.exists("drift"):
        others = run.lakehouse.read("drift").filter(
            (F.col("kind") == "realised") & (F.col("score_date") != F.lit(score_date))
        )
        measured = {row[0] for row in others.select("subject").distinct().collect()}
    rows = []
    for day, days in complete_dates(run, scores, score_date).items():
        if str(day) not in measured:
            rows += _errors_of_buyers(run, scores, day, days)
            rows += _errors_of_prospects(run, day, days, bundle_of(scores, day))
    return rows


def complete_dates(run: Run, scores: DataFrame, score_date: date) -> dict[date, int]:
    """Return date -> days of horizon of the scores up to a date whose horizon is over, as far as events reach, oldest first."""
    if not run.lakehouse.exists("user_daily"):
        return {}
    configured, (_, last) = run.config.labels.horizon_days, span(run.lakehouse)
    day, recorded = F.col("score_date"), F.col("horizon_days")
    # statistics of the files skip newer nights whose horizon is as configured
    may_be_over = (day <= F.lit(last - timedelta(days=configured))) | (recorded < configured)
    dates = scores.filter((day <= F.lit(score_date)) & may_be_over).groupBy(day).agg(F.max(recorded)).collect()
    # older versions of this package didn't record the horizon
    horizons = {on: days or (configured if _has_horizon(scores, on, configured) else 0) for on, days in sorted(dates)}
    return {on: days for on, days in horizons.items() if days and on + timedelta(days=days) <= last}


def _has_horizon(scores: DataFrame, day: date, days: int) -> bool:
    """Return whether the expected spend of a date is over so many days: one bundle, with one horizon, predicted it."""
    by_horizon = F.col("expected_by_horizon")
    same = F.element_at(by_horizon, F.lit(days)) == F.col("expected_spend")
    row = rows_of_date(scores, day).select(F.coalesce(same, by_horizon.isNull())).first()
    return row is not None and bool(row[0])


def with_spend(run: Run, scores: DataFrame, day: date, days: int) -> DataFrame:
    """Return the scores of a date with ``label_spend``, the user's spend over so many days."""
    of_date = rows_of_date(scores, day).withColumn("as_of_date", F.col("score_date"))
    return labels.join_labels(of_date, labels.future_spend(run.lakehouse.read("user_daily"), [day], days))


def _errors_of_buyers(run: Run, scores: DataFrame, day: date, days: int) -> list[dict[str, Any]]:
    """Return the figures of the kind realised: the metrics of a date, and whether they are as promised."""
    config = run.config.drift
    rows = with_spend(run, scores, day, days)
    users = rows_of_date(scores, day).count()
    columns = ("label_spend", "expected_spend", "low", "high", "p_active")
    frame = drift.sampled(rows, users, config.max_users, "user_key").select(*columns).toPandas()
    truth, predicted, low, high, p_active = (frame[name].to_numpy(np.float64) for name in columns)
    coverage = run.config.fusion.coverage
    figures = metrics.evaluate(truth, predicted, low=low, high=high, p_active=p_active, promised=coverage)
    spent = np.maximum(truth, 0.0).sum()
    figures["calibration"] = predicted.sum() / spent if spent > 0 else math.nan
    bundle_digest = bundle_of(scores, day)
    promised = _test_metrics(run, bundle_digest)
    promised |= {"coverage": coverage, "calibration": 1.0}
    rank_metrics = [name for name in promised if name in ("spearman", "gini")]
    least = {name: promised[name] - config.max_rank_loss for name in rank_metrics}
    least |= {"coverage": coverage - config.max_coverage_gap, "calibration": 1 - config.max_calibration_error}
    most = {"calibration": 1 + config.max_calibration_error}
    note = None if len(frame) == users else f"of a sample of {len(frame):,} of {users:,} users, by hash"
    by_user = [
        drift.figure(
            "realised",
            str(day),
            metric,
            value,
            len(frame),
            reference=promised.get(metric),
            least=least.get(metric),
            most=most.get(metric),
            note=note,
        )
        for metric, value in figures.items()
    ]
    return by_user + _totals_inside(run, rows, day, days, bundle_digest)


def _errors_of_prospects(run: Run, day: date, days: int, bundle_digest: str) -> list[dict[str, Any]]:
    """Return figures of the first purchases of a date's prospects; none where that bundle scored no prospect.

    Spent over expected alarms beyond ``drift.max_calibration_error`` from 1, and beyond what chance explains: the spend of n
    expected purchasers has the relative standard error ``sqrt((1 + v²) / n)``, with the coefficient v of their variation.

    Args:
        run: the running job.
        day: the date.
        days: of its horizon.
        bundle_digest: of the bundle that scored it.
    """
    if not run.lakehouse.exists("prospect_scores"):
        return []
    config = run.config.drift
    # a bundle without a model of prospects leaves older rows of the date
    of_bundle = (F.col("bundle_digest") == bundle_digest) & (F.coalesce("horizon_days", F.lit(days)) == days)
    rows = with_spend(run, run.lakehouse.read("prospect_scores").filter(of_bundle), day, days)
    columns = ("label_spend", "expected_spend", "high", "p_active")
    users = rows.count()
    frame = drift.sampled(rows, users, config.max_users, "user_key").select(*columns).toPandas()
    if frame.empty:
        return []
    label, expected, high, p_active = (frame[name].to_numpy(np.float64) for name in columns)
    spent, bought = np.maximum(label, 0.0), label > 0
    variation = spent[bought].std() / spent[bought].mean() if bought.any() else 1.0
    chance = _DEVIATIONS * math.sqrt((1 + variation**2) / max(p_active.sum(), 1.0))
    tolerated = max(config.max_calibration_error, chance)
    note = None if len(frame) == users else f"of a sample of {len(frame):,} of {users:,} prospects, by hash"

    figures = {
        "auc": metrics.auc(bought, p_active),
        "ece": metrics.expected_calibration_error(bought, p_active, np.ones(len(bought))),
        "above_high": float((spent > high).mean()),
        "buyers": float(bought.mean()),
    }
    unwatched = [
        drift.figure("realised", str(day), f"prospects_{name}", value, len(frame), note=note)
        for name, value in figures.items()
    ]
    total = drift.figure(
        "realised",
        str(day),
        "prospects_spent_over_expected",
        float(spent.sum() / expected.sum()) if expected.sum() > 0 else math.nan,
        len(frame),
        reference=1.0,
        least=max(0.0, 1 - tolerated),
        most=1 + tolerated,
        note=note,
    )
    return [*unwatched, total]


def _totals_inside(run: Run, rows: DataFrame, day: date, days: int, bundle_digest: str) -> list[dict[str, Any]]:
    """Return the share of the date's totals, of the platform and of its levels, whose interval held what was spent.

    A level is left out if some of its users were counted elsewhere, as too few of a category or a region.

    Args:
        run: the running job.
        rows: scores of the date with ``label_spend``.
        day: the date.
        days: of its horizon.
        bundle_digest: of the bundle that scored it.
    """
    if not run.lakehouse.exists("totals"):
        return []
    of_horizon = (F.col("horizon_days") == days) & F.col("segment").isin("platform", "level")
    of_bundle = F.col("bundle_digest") == bundle_digest
    promised = rows_of_date(run.lakehouse.read("totals"), day).filter(of_horizon & of_bundle).collect()
    spend = F.sum(F.greatest("label_spend", F.lit(0.0)))
    spent = {
        row["level"]: (row["users"], row["spend"])
        for row in rows.groupBy("level").agg(F.count(F.lit(1)).alias("users"), spend.alias("spend")).collect()
    }
    spent["all"] = (sum(users for users, _ in spent.values()), sum(spend for _, spend in spent.values()))
    inside = [
        total["low"] <= spent[total["value"]][1] <= total["high"]
        for total in promised
        if spent.get(total["value"], (0, 0.0))[0] == total["users"]
    ]
    if not inside:
        return []
    note = f"of {len(inside)} totals: of the platform and of levels"
    share, users = sum(inside) / len(inside), spent["all"][0]
    coverage = run.config.fusion.coverage
    return [drift.figure("realised", str(day), "totals_inside", share, users, reference=coverage, note=note)]


def _test_metrics(run: Run, bundle_digest: str) -> dict[str, float]:
    """Return metrics of the bundle at its test date, over all users; none if its horizon was not over then."""
    if not run.lakehouse.exists("metrics"):
        return {}
    of_bundle = (
        (F.col("bundle_digest") == bundle_digest) & (F.col("member") == "fused") & (F.col("population") == "all")
    )
    rows = (
        run.lakehouse.read("metrics").filter(of_bundle & F.col("value").isNotNull()).select("metric", "value").collect()
    )
    return {row["metric"]: row["value"] for row in rows if not math.isnan(row["value"])}
