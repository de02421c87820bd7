"""Backtest: train as of past dates, and compare the predictions with the spend since."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core import extras
from bp_spark.core.config import Config
from bp_spark.core.errors import DataError
from bp_spark.core.version import __version__
from bp_spark.evaluation import bootstrap
from bp_spark.features import labels
from bp_spark.ingest.clean import span
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import BACKTESTS
from bp_spark.training.ensemble import Fitted, fit_as_of

MEAN = "mean of trees and transformer"
"""A further peer, which backtests compare with: the stack has to beat it."""


@dataclass(frozen=True)
class BacktestResult:
    """Result of a backtest.

    Attributes:
        tables: test date -> table of :func:`bp_spark.evaluation.bootstrap.compare`.
        report: the HTML page; its figures are beside it.
        stages: the stages that ran.
    """

    tables: Mapping[date, pd.DataFrame]
    report: Path
    stages: list[dict[str, Any]]


def backtest(
    spark: SparkSession, config: Config, test_dates: Sequence[date] = (), folds: int = 1, step_days: int = 28
) -> BacktestResult:
    """Train as of past dates with what was known by then, and compare the predictions with the spend since.

    Each date has the pipeline's own training, into the tables ``user_features`` and ``training_set``. No bundle is written or
    promoted. Figures go to ``backtests`` date by date, so a backtest that is stopped keeps those of finished dates. The page
    and its figures go to a folder of ``evaluation.reports``.

    Args:
        spark: the running session.
        config: settings.
        test_dates: evaluation dates; by default the newest whose whole horizon has been seen, and ``folds - 1`` before it.
        folds: number of dates, if ``test_dates`` is empty.
        step_days: days between two of these dates.

    Raises:
        DataError: the horizon of a date is not over, or the data don't reach back far enough, before anything is trained; or no
            user has the bracket of ``evaluation.external_segment``.
        PlatformError: the extra ``train`` is not installed.
    """
    extras.require("train", "backtest")
    # matplotlib takes a second to import, and other stages don't need it
    from bp_spark.report import backtest as report

    horizon = timedelta(days=config.labels.horizon_days)
    lakehouse = Lakehouse(spark, config.tables)
    first, last = span(lakehouse)
    newest = last - horizon
    dates = sorted(set(test_dates)) or [newest - timedelta(days=step_days * fold) for fold in reversed(range(folds))]
    for day in dates:
        if day > newest:
            raise DataError(
                "events", f"must reach to the end of the horizon of {day}; the newest test date is {newest}"
            )
    cutoffs = {day: labels.cutoffs(first, day, config.labels) for day in dates}
    segment = config.evaluation.external_segment
    user_brackets = None if segment is None else brackets(lakehouse.read("raw_users"), segment)
    backtest_id, stages, finished = uuid.uuid4().hex[:12], [], []
    for day in dates:
        with recorded(spark, config, "backtest") as run:
            fitted = fit_as_of(run, cutoffs[day], day, user_brackets)
            with run.stage("backtest") as figures:
                figures["test_date"], figures["backtest_id"] = day, backtest_id
                predictions, members = _with_mean(fitted)
                table = _compare(predictions, members, config)
                _record_backtest(run, table, backtest_id, day)
                charts = report.figures(predictions, members, config.fusion.coverage, fitted.history)
                finished.append(report.Fold(day, table, charts))
            stages += run.records
    about = {
        "backtest": backtest_id,
        "bp-spark": __version__,
        "horizon": f"{config.labels.horizon_days} days",
        "fusion of": ", ".join(config.fusion.members),
        "resamples": str(config.evaluation.resamples),
    }
    page = report.write(Path(config.evaluation.reports) / f"backtest-{backtest_id}", finished, about)
    return BacktestResult({fold.test_date: fold.table for fold in finished}, page, stages)


def brackets(raw_users: DataFrame, segment: str) -> DataFrame:
    """Return ``user_key, bracket``: the newest value of a segment, for each user with one.

    Args:
        raw_users: rows of RAW_USERS.
        segment: name of the segment.

    Raises:
        DataError: no user has the segment.
    """
    users = raw_users.select("user_key", F.element_at("segment", segment).alias("bracket"), "ingest_id")
    newest = (
        users.filter("bracket IS NOT NULL").groupBy("user_key").agg(F.max_by("bracket", "ingest_id").alias("bracket"))
    )
    if newest.isEmpty():
        raise DataError("raw_users", f"no user has a segment {segment!r}", column="segment")
    return newest


def _with_mean(fitted: Fitted) -> tuple[pd.DataFrame, list[str]]:
    """Add a peer to the predictions: the plain mean of trees and transformer, which the stack has to beat."""
    if "transformer" not in fitted.names:
        return fitted.predictions, fitted.names
    mean = (fitted.predictions["trees"] + fitted.predictions["transformer"]) / 2
    return fitted.predictions.assign(**{MEAN: mean}), [*fitted.names[:-1], MEAN, "fused"]


def _compare(predictions: pd.DataFrame, members: Sequence[str], config: Config) -> pd.DataFrame:
    resamples, seed = config.evaluation.resamples, config.training.seed
    promised = config.fusion.coverage
    table = bootstrap.compare(predictions, members, resamples=resamples, seed=seed, promised=promised)
    segment = config.evaluation.external_segment
    if segment is None:
        return table
    by_bracket = bootstrap.compare_with_brackets(predictions, members, segment, resamples=resamples, seed=seed)
    return pd.concat([table, by_bracket], ignore_index=True)


def _record_backtest(run: Run, table: pd.DataFrame, backtest_id: str, test_date: date) -> None:
    common = {
        "backtest_id": backtest_id,
        "run_id": run.run_id,
        "test_date": test_date,
        "resamples": run.config.evaluation.resamples,
    }
    rows = [{**row, **common} for row in table.astype(object).where(table.notna(), None).to_dict("records")]
    run.lakehouse.append(BACKTESTS, run.spark.createDataFrame(rows, BACKTESTS.schema))
