"""Fit all that predicts as of a test date: the members, their calibrated stack, the platform's level and the other horizons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame

from bp_spark.core.config import Config
from bp_spark.evaluation import metrics as evaluation
from bp_spark.features import labels
from bp_spark.ingest.clean import span
from bp_spark.lakehouse.run import Run
from bp_spark.model.horizons import MIN_ROWS, NETWORK, Horizons, label_column
from bp_spark.model.level import PRIOR_SD, Level, WeeklySpend
from bp_spark.model.members.base import Member, predict_all
from bp_spark.model.stack import CalibratedStack, recency_weights
from bp_spark.model.totals import FEW_ERRORS, Totals
from bp_spark.training.cross_fit import cross_fit
from bp_spark.training.dataset import collect_sample, prepare, users_of_test_date
from bp_spark.training.warm_start import WarmStart, warm_start


@dataclass(frozen=True)
class Fitted:
    """Members and their stack, fitted with nothing later than a test date.

    Attributes:
        test_date: the test date.
        version: version of ``training_set``.
        members: the members, fitted on all folds.
        fusion: the stack of the members.
        horizons: ratios of the other horizons.
        totals: errors of sums of users.
        predictions: a row per user of the test date: ``user_key``, ``label_spend``, ``seen``, a column per member, ``fused``,
            ``low``, ``high``, ``p_active``; for other horizons ``label_spend_30d``, ``transformer_30d``, ``fused_30d``.
        history: epochs of the transformer without the first fold.
        started_from: digest of the bundle of another platform that this started from; ``None`` without one.
    """

    test_date: date
    version: int
    members: Sequence[Member]
    fusion: CalibratedStack
    horizons: Horizons
    totals: Totals
    predictions: pd.DataFrame
    history: Sequence[Mapping[str, float]]
    started_from: str | None = None

    @property
    def names(self) -> list[str]:
        """Columns of expected spend in ``predictions``: the members, then ``fused``."""
        return [*(member.name for member in self.members), "fused"]


def fit_as_of(run: Run, dates: Sequence[date], test_date: date, brackets: DataFrame | None = None) -> Fitted:
    """Fit, calibrate and predict with nothing later than the test date.

    Args:
        run: the running job.
        dates: cutoffs whose whole horizon was seen before the test date.
        test_date: date from which on nothing is seen.
        brackets: ``user_key, bracket``, to join to the predictions.

    Raises:
        BundleError, ConfigError, TrackingError: see :func:`bp_spark.training.warm_start.warm_start`.
    """
    config = run.config
    start = _start(run)
    level, spend = fit_level(run, dates, test_date, start.level_sd)
    year_before = labels.year_before(span(run.lakehouse)[0], test_date, config.labels) if level.evidence else []
    version, vocabulary, folder = prepare(run, dates, test_date, year_before)
    rows = run.lakehouse.read("training_set", version)
    members, out_of_fold, history = cross_fit(run, rows, test_date, vocabulary, folder, version=version, start=start)
    users = users_of_test_date(run, test_date)
    if brackets is not None:
        users = users.join(brackets, "user_key", "left")
    reference = predict_sample(users, members, config)
    fusion = CalibratedStack.fit(out_of_fold, config.fusion, reference, level.sd)
    expected = fusion.apply_without_level(fusion.inputs_from(out_of_fold))["expected_spend"]
    horizons = _fit_horizons(run, out_of_fold, expected)
    totals = _fit_totals(run, out_of_fold, expected, horizons, level)
    columns = {str(name): reference[name].to_numpy() for name in reference}
    steady = fusion.apply_without_level(columns)
    by_days = horizons.apply(steady["expected_spend"], columns)
    if level.evidence:
        if year_before:
            season = _as_a_year_before(run, level, spend, year_before, members, fusion, horizons)
        else:
            # the reference is a sample of the users
            count = users.count()
            expected_totals = {days: float(values.mean()) * count for days, values in by_days.items()}
            season = _as_last_year(run, level, spend, expected_totals, horizons.main)
        level = season.pop(horizons.main)
        horizons = replace(horizons, levels=season)
    fusion = replace(fusion, level=level)
    fused, by_horizon = fusion.apply_level(steady), horizons.apply_level(by_days, fusion.factor())
    predictions = reference.assign(
        fused=fused["expected_spend"],
        low=fused["low"],
        high=fused["high"],
        p_active=fused["p_active"],
        **{labels.horizon_column("fused", days): by_horizon[days] for days in horizons.others},
    )
    return Fitted(test_date, version, members, fusion, horizons, totals, predictions, history, start.digest)


def _start(run: Run) -> WarmStart:
    """Return what the training starts from; a warm start is a stage of ``run``."""
    if run.config.training.from_bundle is None:
        return WarmStart()
    with run.stage("warm start") as figures:
        start = warm_start(run)
        figures.update(start.figures)
    return start


def fit_level(
    run: Run, dates: Sequence[date], test_date: date, prior_sd: float = PRIOR_SD
) -> tuple[Level, WeeklySpend]:
    """Fit the platform's season and trend on the weeks before the test date.

    Args:
        run: the running job; this is a stage of it.
        dates: cutoffs of the training set.
        test_date: date from which on no spend is seen.
        prior_sd: standard deviation of the log level where nothing is known.

    Returns:
        The level, and the weeks that it was fitted on.
    """
    config = run.config
    run.lakehouse.require_whole_files("user_daily")
    with run.stage("fit level") as figures:
        first, _ = span(run.lakehouse)
        weekly = labels.weekly_spend(run.lakehouse.read("user_daily"), test_date)
        rows = [(row["first_week"], row["week"], row["cents"]) for row in weekly.collect()]
        ages = [(test_date - day).days for day in dates]
        spend = WeeklySpend.of(rows, first, test_date)
        level = Level.fit(spend, config.labels.horizon_days, ages, config.fusion, prior_sd)
        figures["evidence"], figures["sd"] = f"{level.evidence:.2f}", f"{level.sd:.3f}"
    return level, spend


def _as_a_year_before(
    run: Run,
    level: Level,
    spend: WeeklySpend,
    days: Sequence[date],
    members: Sequence[Member],
    fusion: CalibratedStack,
    horizons: Horizons,
) -> dict[int, Level]:
    """Complete the level by what the members miss as of dates of the year before, for each horizon.

    The labels of these dates fitted nothing. The users' later labels did, but one factor for all users can't memorise them.

    Returns:
        Days of the horizon -> its level. A horizon that no such date has seen whole by ``spend.end`` has the factor 1: it is
        about a year long.
    """
    with run.stage("fit season") as figures:
        spent, expected = dict.fromkeys(horizons.days, 0.0), dict.fromkeys(horizons.days, 0.0)
        p_active, bought = [np.empty(0)], [np.empty(0, bool)]
        for day in days:
            users = predict_sample(users_of_test_date(run, day), members, run.config)
            columns = {str(name): users[name].to_numpy() for name in users}
            steady = fusion.apply_without_level(columns)
            predicted = horizons.apply(steady["expected_spend"], columns)
            # the main horizon of these dates is over
            p_active.append(steady["p_active"])
            bought.append(columns["label_spend"] > 0)
            for horizon, values in predicted.items():
                # the data may reach beyond the date of the fit
                if day + timedelta(days=horizon) <= spend.end:
                    spent[horizon] += float(users[label_column(horizon, horizons.main)].clip(lower=0.0).sum())
                    expected[horizon] += float(values.sum())
        levels = {
            horizon: _level_of(level, spend, horizon, horizons.main).as_a_year_before(spent[horizon], expected[horizon])
            for horizon in horizons.days
        }
        main = levels[horizons.main].with_odds(np.concatenate(p_active), np.concatenate(bought))
        levels[horizons.main] = main
        figures["dates"], figures["odds"] = len(days), f"{main.odds:.2f}"
        figures.update({f"factor_{horizon}_days": f"{one.factor():.2f}" for horizon, one in levels.items()})
    return levels


def _as_last_year(
    run: Run, level: Level, spend: WeeklySpend, expected_totals: Mapping[int, float], main: int
) -> dict[int, Level]:
    """Complete the level by the totals that the weeks of the year before foretell, for each horizon.

    Args:
        run: the running job; this is a stage of it.
        level: assumes a season.
        spend: that it was fitted on.
        expected_totals: days of the horizon -> what the members expect of all users.
        main: days of the main horizon.

    Returns:
        Days of the horizon -> its level.
    """
    with run.stage("fit season") as figures:
        levels = {
            horizon: _level_of(level, spend, horizon, main).towards(spend.seasonal_total(horizon) or 0.0, expected)
            for horizon, expected in expected_totals.items()
        }
        figures["assumed"] = f"{level.evidence:.2f}"
        figures.update({f"factor_{horizon}_days": f"{one.factor():.2f}" for horizon, one in levels.items()})
    return levels


def _level_of(level: Level, spend: WeeklySpend, horizon: int, main: int) -> Level:
    return level if horizon == main else level.of_horizon(spend, horizon)


def _fit_horizons(run: Run, out_of_fold: pd.DataFrame, expected: np.ndarray) -> Horizons:
    """Fit the ratios of other horizons; the stage names each horizon that is left out, as no cutoff has seen it whole."""
    config = run.config.labels
    with run.stage("fit horizons") as figures:
        horizons = Horizons.fit(out_of_fold, expected, config.horizon_days, config.other_horizons)
        for days in config.other_horizons:
            rows = int(out_of_fold[labels.horizon_column("label_spend", days)].notna().sum())
            figures[f"{days}_days"] = (
                f"from {rows:,} rows"
                if days in horizons.others
                else f"LEFT OUT: {rows:,} rows have seen {days} days whole, of the {MIN_ROWS} it takes; more history or "
                "labels.cutoffs would help"
            )
    return horizons


def _fit_totals(run: Run, out_of_fold: pd.DataFrame, expected: np.ndarray, horizons: Horizons, level: Level) -> Totals:
    """Fit the errors of sums; the stage names the horizons with too few cutoffs to measure them."""
    config = run.config.fusion
    with run.stage("fit totals") as figures:
        columns = {str(name): out_of_fold[name].to_numpy() for name in out_of_fold}
        totals = Totals.fit(
            out_of_fold,
            horizons.apply(expected, columns),
            recency_weights(out_of_fold, config.half_life_days),
            main=horizons.main,
            level_sd=level.sd,
            forecasts=level.forecasts,
            coverage=config.coverage,
        )
        for error in totals.errors:
            few = ": FEW, so mostly an assumption" if error.horizons < FEW_ERRORS else ""
            figures[f"{error.days}_days"] = f"{error.common_sd:.1%} by {error.horizons:.1f} errors{few}"
    return totals


def predict_sample(rows: DataFrame, members: Sequence[Member], config: Config) -> pd.DataFrame:
    """Return each member's predictions of a sample of the rows, on the driver."""
    frame = collect_sample(rows, [member.name for member in members], config)
    columns = {name: frame[name].to_numpy() for name in frame.columns}
    others = [labels.horizon_column("label_spend", days) for days in config.labels.other_horizons]
    names = ("user_key", "as_of_date", "label_spend", *others, "seen", "bracket")
    return frame[[name for name in names if name in frame]].assign(**predict_all(members, columns))


def metrics_of(fitted: Fitted, complete: bool) -> pd.DataFrame:
    """Return metrics of the horizons that are over.

    Args:
        fitted: members, stack and predictions.
        complete: whether the main horizon from the test date is over.
    """
    predictions = fitted.predictions
    tables = [evaluation.metrics_table(predictions, fitted.names, fitted.fusion.coverage)] if complete else []
    for days in fitted.horizons.others:
        truth = predictions[labels.horizon_column("label_spend", days)]
        if truth.notna().all():
            columns = [labels.horizon_column(name, days) for name in (NETWORK, "fused")]
            present = [name for name in columns if name in predictions]
            tables.append(evaluation.metrics_table(predictions.assign(label_spend=truth), present))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
