"""Train: label past cutoffs, fit and stack the members, evaluate, write the bundle and promote it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from pyspark.sql import SparkSession

from bp_spark.core import extras
from bp_spark.core.config import Config
from bp_spark.core.errors import PlatformError
from bp_spark.core.session import is_connect
from bp_spark.evaluation.drift_reference import store_reference
from bp_spark.features import catalogue as features
from bp_spark.features import labels
from bp_spark.features.aggregates import SEQUENCE_COLUMNS
from bp_spark.ingest import texts
from bp_spark.ingest.clean import currency_of, span
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.tables import METRICS
from bp_spark.model.explanation import Explanation
from bp_spark.model.members.base import predict_all
from bp_spark.model.members.spark_trees import CLASSIC_ONLY
from bp_spark.model.permutation import Agreement
from bp_spark.registry import bundle as bundles
from bp_spark.registry import mlflow_store, signing
from bp_spark.registry.bundle import Bundle, Promoted
from bp_spark.training.dataset import collect_sample, plan
from bp_spark.training.ensemble import Fitted, fit_as_of, metrics_of
from bp_spark.training.promote import decide, decide_refit, enter_registry, promote
from bp_spark.training.prospects import fit_prospects
from bp_spark.training.refunds import fit_refunds


@dataclass(frozen=True)
class TrainResult:
    """Result of a training.

    Attributes:
        bundle: the bundle that was written last.
        metrics: metrics at the test date, of the horizons that are over.
        promoted: whether the bundle is promoted.
        reason: why, or why not.
        fitted: members, stack and predictions of the test date.
        stages: the stages that ran.
    """

    bundle: Bundle
    metrics: pd.DataFrame
    promoted: bool
    reason: str
    fitted: Fitted
    stages: list[dict[str, Any]]


def train(spark: SparkSession, config: Config, test_date: date | None = None) -> TrainResult:
    """Label past cutoffs, fit the members, stack and calibrate them, evaluate at ``test_date``, and promote.

    A bundle is promoted if it ranks users no worse than the baselines and isn't surely worse than the promoted bundle (by more
    than ``evaluation.margin``). Both are judged on the users of the test date (see :mod:`bp_spark.evaluation.promotion`).

    Without a test date, everything is then fitted once more, as of the day after the last event (``training.refit``). So the
    bundle that scores has learned from the newest horizon too; the bundle that was judged is the same, made a horizon earlier.
    Where events don't reach back far enough for ``labels.horizon_days``, one of ``labels.shorter_horizons`` is predicted,
    unless a test date is named.

    At the end, the bundle becomes a version of the registered model (see :mod:`bp_spark.registry.publishing`).

    Args:
        spark: the running session.
        config: settings.
        test_date: the evaluation date; training horizons end on or before it, and nothing later is seen. By default the
            newest date whose whole horizon has been seen.

    Returns:
        The bundle that scores, if one was promoted. Its metrics and ``fitted`` are those of the test date.

    Raises:
        BundleError: the bundle of ``training.from_bundle`` can't be used.
        ConfigError: the key in ``signing.private_key`` can't be used, or that bundle's network has other sizes.
        DataError: there are no events, or too little history for one cutoff.
        OvertakenError: another training promoted its bundle while this one ran.
        PlatformError: the extra ``train`` is not installed, or a member can only be fitted in a classic session. It is raised
            before anything is done.
        TrackingError: the store at ``tracking.uri`` can't be reached. It is raised before anything is done, or when only the
            bundle's entry is missing; then the message names the bundle.
    """
    extras.require("train", "train")
    mlflow_store.check(config.tracking)
    signing.private_key(config.signing)
    require_session(spark, config)
    with recorded(spark, config, "train") as run:
        first, last, day, config = plan(run.lakehouse, config, test_date)
        run.config = config
        as_of = last + timedelta(days=1) if test_date is None and config.training.refit else None
        fitted = fit_as_of(run, labels.cutoffs(first, day, config.labels), day)
        complete = last >= day + timedelta(days=config.labels.horizon_days)
        metrics = metrics_of(fitted, complete)
        bundle = _write_bundle(run, fitted, metrics)
        before = bundles.promoted(config.bundles)
        decision = promote(run, bundle, lambda: decide(run, fitted, complete), as_of, before)
        result = TrainResult(bundle, metrics, decision.promoted, decision.reason, fitted, run.records)
        if not (as_of and decision.promoted):
            enter_registry(run, bundle, fitted.history)
            return result
    return _refit(spark, config, result, as_of, before)


def require_session(spark: SparkSession, config: Config) -> None:
    """Make sure that the session can fit all members; see also :func:`bp_spark.training.cross_fit.cross_fit`.

    Raises:
        PlatformError: the session is one of Spark Connect, and Spark's executors fit boosted trees of any size.
    """
    in_spark = not {"trees", "sqrt_trees"}.isdisjoint(config.fusion.members) and not config.trees.max_local_values
    if in_spark and is_connect(spark):
        raise PlatformError(CLASSIC_ONLY)


def _refit(spark: SparkSession, config: Config, judged: TrainResult, as_of: date, before: Promoted) -> TrainResult:
    """Fit again as of a later date what passed the gate, and promote that in the place of ``before``."""
    with recorded(spark, config, "train") as run:
        first, _ = span(run.lakehouse)
        fitted = fit_as_of(run, labels.cutoffs(first, as_of, config.labels), as_of)
        bundle = _write_bundle(run, fitted, judged.metrics, judged.bundle)
        decision = promote(
            run,
            bundle,
            lambda: decide_refit(run, bundle, judged.fitted, judged.bundle, judged.reason),
            replacing=before,
        )
        enter_registry(run, bundle, fitted.history)
    stages = [*judged.stages, *run.records]
    return replace(judged, bundle=bundle, promoted=decision.promoted, reason=decision.reason, stages=stages)


def _write_bundle(run: Run, fitted: Fitted, metrics: pd.DataFrame, judged: Bundle | None = None) -> Bundle:
    """Write the bundle with its explanation, metrics and drift reference: all exists before the bundle can score.

    Args:
        run: the running job.
        fitted: members, stack and horizons.
        metrics: metrics of the bundle, or of ``judged``.
        judged: the bundle that passed the gate, if this one is its refit.
    """
    lakehouse, config, test_date = run.lakehouse, run.config, fitted.test_date
    explanation, agreement = fit_explanation(run, fitted)
    prospects, refunds = fit_prospects(run, test_date), fit_refunds(run, test_date)
    inputs: dict[str, Sequence[str]] = {"tabular": features.catalogue(config.features).names}
    if "transformer" in fitted.names:
        inputs["history"] = [column.name for column in SEQUENCE_COLUMNS]
    lineage: dict[str, Any] = {
        "run_id": run.run_id,
        "test_date": test_date.isoformat(),
        "training_set": {
            "location": lakehouse.location("training_set"),
            "version": fitted.version,
        },
        "features": features.catalogue(config.features).definitions,
        "text_model": texts.model_digest(config.texts),
        "currency": currency_of(lakehouse) or config.cleaning.currency,
        "config": config.model_dump(mode="json"),
    }
    if fitted.started_from:
        lineage["started_from"] = fitted.started_from
    if judged:
        lineage["judged"] = {"bundle": judged.folder.name, "test_date": judged.test_date}
    name = f"{test_date:%Y%m%d}-{run.run_id}"
    with run.stage("bundle") as figures:
        bundle = bundles.write(
            Path(config.bundles) / name,
            fitted.members,
            fitted.fusion,
            fitted.horizons,
            inputs=inputs,
            lineage=lineage,
            metrics={"rows": metrics.to_dict("records"), "reasons": asdict(agreement)},
            explanation=explanation,
            prospects=prospects,
            totals=fitted.totals,
            refunds=refunds,
            private_key=signing.private_key(config.signing),
        )
        figures["digest"] = bundle.digest
        figures["folder"] = bundle.folder
    store_reference(run, bundle)
    if not metrics.empty:
        _record_metrics(run, metrics, bundle)
    return bundle


def fit_explanation(run: Run, fitted: Fitted) -> tuple[Explanation, Agreement]:
    """Fit the explanation of predictions on a sample of the training set, and measure it; ``runs`` has the figures."""
    config = run.config
    with run.stage("explain") as figures:
        frame = collect_sample(run.lakehouse.read("training_set", fitted.version), fitted.names, config)
        columns = {str(name): frame[name].to_numpy() for name in frame.columns}
        members = [member for member in fitted.members if member.name in fitted.fusion.members]
        explanation = Explanation.fit(
            columns,
            predict_all(members, columns),
            frame["user_key"].to_numpy(),
            members,
            fitted.fusion,
            features.catalogue(config.features).groups,
            seed=config.training.seed,
            threads=os.cpu_count() or 1,
        )
        by_name = {member.name: member for member in members}
        agreement = explanation.agreement(columns, by_name, fitted.fusion, seed=config.training.seed)
        figures["rows_in"] = len(frame)
        figures.update({f"r_squared_{name}": f"{value:.4f}" for name, value in explanation.r_squared.items()})
        figures.update({f"reasons_{name}": f"{value:.4g}" for name, value in asdict(agreement).items()})
    return explanation, agreement


def _record_metrics(run: Run, metrics: pd.DataFrame, bundle: Bundle) -> None:
    test_date = date.fromisoformat(bundle.test_date)
    rows = [
        {**row, "run_id": run.run_id, "bundle_digest": bundle.digest, "test_date": test_date}
        for row in metrics.to_dict("records")
    ]
    run.lakehouse.append(METRICS, run.spark.createDataFrame(rows, METRICS.schema))
