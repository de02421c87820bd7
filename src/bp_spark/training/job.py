"""From features to a promoted bundle: label, fit the members, fuse, evaluate, promote."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from safetensors.numpy import save_file

from bp_spark.core import extras
from bp_spark.core.config import Config, digest
from bp_spark.core.errors import BundleError, DataError, PlatformError, TrackingError
from bp_spark.core.session import is_connect, persisted
from bp_spark.core.version import __version__
from bp_spark.evaluation import metrics as evaluation
from bp_spark.evaluation import promotion
from bp_spark.evaluation.job import store_reference
from bp_spark.evaluation.promotion import Decision
from bp_spark.features import catalogue as features
from bp_spark.features import labels
from bp_spark.features.job import features_digest, span, write_features
from bp_spark.ingest import texts
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.tables import GIVEN_LABELS, METRICS
from bp_spark.model.explanation import Explanation
from bp_spark.model.horizons import MIN_ROWS, NETWORK, Horizons
from bp_spark.model.inputs import InputSpec
from bp_spark.model.level import Level, WeeklySpend
from bp_spark.model.members.base import Member, predict_all
from bp_spark.model.members.btyd import fit_btyd
from bp_spark.model.members.linear import fit_linear
from bp_spark.model.members.trees import CLASSIC_ONLY, SqrtTreesMember, TreesMember, fit_trees
from bp_spark.model.stack import CalibratedStack
from bp_spark.registry import bundle as bundles
from bp_spark.registry import mlflow_store, publishing, signing
from bp_spark.registry.bundle import Bundle
from bp_spark.training.loader import Snapshot, snapshot
from bp_spark.training.tasks.finetune import finetune

RFM = (
    "recency_days",
    "frequency",
    "tenure_days",
    "monetary_value",
    "spend_30d",
    "spend_90d",
    "orders_30d",
    "orders_90d",
)
"""Features of the linear baseline: recency, frequency and monetary value."""


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to: the bundle, its metrics (of the horizons that are over), the decision, and what it was made
    from."""

    bundle: Bundle
    metrics: pd.DataFrame
    promoted: bool
    reason: str
    fitted: Fitted
    stages: list[dict[str, Any]]


def train(spark: SparkSession, config: Config, test_date: date | None = None) -> TrainResult:
    """Label past cutoffs, fit the members, fuse and calibrate them, evaluate at ``test_date``, promote.

    Promoted is what ranks users no worse than the baselines and isn't surely worse than the promoted bundle (by more than
    ``evaluation.margin``), both judged on the users of the test date (see :mod:`bp_spark.evaluation.promotion`).
    Without a test date all
    is then fitted once more, as of the day after the last event (``training.refit``): what scores has then learned from the
    newest horizon, too, and what was judged is the same made a horizon earlier. Last of all the bundle becomes a version of
    the registered model (see :mod:`bp_spark.registry.publishing`).

    Args:
        test_date: the evaluation date; training horizons end on or before it, and nothing later is seen. By default the
            newest date whose whole horizon has been seen.

    Returns:
        The bundle that scores, if one was promoted; its figures and what they are of are those of the test date.

    Raises:
        ConfigError: the key in ``signing.private_key`` can't be used.
        DataError: no events, or too little history for one cutoff.
        PlatformError: a member can only be fitted in a classic session: before anything is done.
        TrackingError: the store at ``tracking.uri`` can't be reached: before anything is done, or when all is done but the
            bundle's entry, and the message names the bundle.
        PlatformError: the extra ``train`` is not installed.
    """
    extras.require("train", "train")
    mlflow_store.check(config.tracking)
    signing.private_key(config.signing)
    require_session(spark, config)
    with recorded(spark, config, "train") as run:
        first, last = span(run.lakehouse)
        day = test_date or last - timedelta(days=config.labels.horizon_days)
        as_of = last + timedelta(days=1) if test_date is None and config.training.refit else None
        fitted = fit_as_of(run, labels.cutoffs(first, day, config.labels), day)
        complete = last >= day + timedelta(days=config.labels.horizon_days)
        metrics = _metrics(fitted, complete)
        bundle = _write_bundle(run, fitted, metrics)
        decision = promote(run, bundle, lambda: decide(run, fitted, complete), refit=as_of)
        result = TrainResult(bundle, metrics, decision.promoted, decision.reason, fitted, run.records)
        if not (as_of and decision.promoted):
            enter_registry(run, bundle, fitted.history)
            return result
    return _refit(spark, config, result, as_of)


def require_session(spark: SparkSession, config: Config) -> None:
    """Make sure that the session can fit all members.

    Raises:
        PlatformError: it is one of Spark Connect, and there are boosted trees.
    """
    if is_connect(spark) and not {"trees", "sqrt_trees"}.isdisjoint(config.fusion.members):
        raise PlatformError(CLASSIC_ONLY)


def _refit(spark: SparkSession, config: Config, judged: TrainResult, as_of: date) -> TrainResult:
    """Fit anew as of a later date what passed the gate, and promote that."""
    with recorded(spark, config, "train") as run:
        first, _ = span(run.lakehouse)
        fitted = fit_as_of(run, labels.cutoffs(first, as_of, config.labels), as_of)
        bundle = _write_bundle(run, fitted, judged.metrics, judged.bundle)
        decision = promote(run, bundle, lambda: decide_refit(run, bundle, judged))
        enter_registry(run, bundle, fitted.history)
    stages = [*judged.stages, *run.records]
    return replace(judged, bundle=bundle, promoted=decision.promoted, reason=decision.reason, stages=stages)


@dataclass(frozen=True)
class Fitted:
    """Members and their fusion, of what was known at a test date.

    ``predictions`` are of the date's users: ``user_key``, ``label_spend``, ``seen``, a column a member, and the answers
    ``fused``, ``low``, ``high``, ``p_active``; of other horizons ``label_spend_30d``, ``transformer_30d``, ``fused_30d``.
    ``history`` is the transformer's, epoch by epoch, without the first fold; ``version`` that of ``training_set``.
    """

    test_date: date
    version: int
    members: Sequence[Member]
    fusion: CalibratedStack
    horizons: Horizons
    predictions: pd.DataFrame
    history: Sequence[Mapping[str, float]]

    @property
    def names(self) -> list[str]:
        return [*(member.name for member in self.members), "fused"]


def fit_as_of(run: Run, dates: Sequence[date], test_date: date, brackets: DataFrame | None = None) -> Fitted:
    """Fit, calibrate and predict with nothing later than the test date; ``brackets`` are joined to the predictions."""
    config = run.config
    version, vocabulary, folder = prepare(run, dates, test_date)
    rows = run.lakehouse.read("training_set", version)
    members, out_of_fold, history = cross_fit(run, rows, test_date, vocabulary, folder, version=version)
    users = test_rows(run, test_date)
    if brackets is not None:
        users = users.join(brackets, "user_key", "left")
    reference = predicted(users, members, config)
    level = fit_level(run, dates, test_date)
    fusion = CalibratedStack.fit(out_of_fold, config.fusion, reference, level.sd)
    horizons = _fit_horizons(run, out_of_fold, fusion)
    said = {str(name): reference[name].to_numpy() for name in reference}
    steady = fusion.steady(said)
    # the predictions may be of a sample; without a forecast nobody needs to be counted
    total = float(steady["expected_spend"].mean()) * users.count() if level.forecast else 0.0
    fusion = replace(fusion, level=level.towards(total))
    fused, by_horizon = fusion.moved(steady), horizons.apply(steady["expected_spend"], said)
    predictions = reference.assign(
        fused=fused["expected_spend"],
        low=fused["low"],
        high=fused["high"],
        p_active=fused["p_active"],
        **{labels.of_days("fused", days): by_horizon[days] * fusion.factor() for days in horizons.others},
    )
    return Fitted(test_date, version, members, fusion, horizons, predictions, history)


def fit_level(run: Run, dates: Sequence[date], test_date: date) -> Level:
    """What the platform's past weeks say of its season, from spend before the test date alone; a stage."""
    config = run.config
    with run.stage("fit level") as figures:
        first, _ = span(run.lakehouse)
        weekly = labels.weekly_spend(run.lakehouse.read("user_daily"), test_date)
        rows = [(row["first_week"], row["week"], row["cents"]) for row in weekly.collect()]
        ages = [(test_date - day).days for day in dates]
        spend = WeeklySpend.of(rows, first, test_date)
        level = Level.fit(spend, config.labels.horizon_days, ages, config.fusion)
        figures["evidence"], figures["sd"] = f"{level.evidence:.2f}", f"{level.sd:.3f}"
    return level


def _fit_horizons(run: Run, out_of_fold: pd.DataFrame, fusion: CalibratedStack) -> Horizons:
    """Ratios of other horizons; a stage, for one that no cutoff has seen whole is left out and people must see that."""
    config = run.config.labels
    with run.stage("fit horizons") as figures:
        expected = fusion.steady(fusion.inputs_from(out_of_fold))["expected_spend"]
        horizons = Horizons.fit(out_of_fold, expected, config.horizon_days, config.other_horizons)
        for days in config.other_horizons:
            rows = int(out_of_fold[labels.of_days("label_spend", days)].notna().sum())
            figures[f"{days}_days"] = (
                f"from {rows:,} rows"
                if days in horizons.others
                else f"LEFT OUT: {rows:,} rows have seen {days} days whole, of the {MIN_ROWS} it takes; more history or "
                "labels.cutoffs would help"
            )
    return horizons


def _metrics(fitted: Fitted, complete: bool) -> pd.DataFrame:
    """Figures of the horizons that are over; ``complete`` tells whether the main one is."""
    predictions = fitted.predictions
    tables = [evaluation.metrics_table(predictions, fitted.names)] if complete else []
    for days in fitted.horizons.others:
        truth = predictions[labels.of_days("label_spend", days)]
        if truth.notna().all():
            names = [labels.of_days(name, days) for name in (NETWORK, "fused")]
            there = [name for name in names if name in predictions]
            tables.append(evaluation.metrics_table(predictions.assign(label_spend=truth), there))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def prepare(run: Run, dates: Sequence[date], test_date: date) -> tuple[int, Path, Path]:
    """Version of the training set of the complete cutoffs and of newer ones, the vocabulary's file, the folder of the work."""
    dates = [*dates, *labels.recent_cutoffs(dates[-1], test_date, run.config.labels)]
    write_features(run, [*dates, test_date])
    version = write_training_set(run, dates, test_date)
    folder = _work_folder(run)
    return version, write_vocabulary(run, test_date, folder), folder


def write_training_set(run: Run, dates: Sequence[date], test_date: date) -> int:
    """The version that holds it: who reads that one is not disturbed by another training, backtest or search."""
    lakehouse, config = run.lakehouse, run.config
    source = lakehouse.read("user_features").filter(F.col("as_of_date").isin(*dates))
    given = _given(run, test_date)
    inputs = digest(
        __version__,
        config.labels,
        config.features,
        lakehouse.version("user_features"),
        lakehouse.version("user_daily"),
        dates,
        test_date,
        given and given.digest,
    )
    with run.stage("label", inputs) as figures:
        done = lakehouse.commit_metadata("training_set")
        if done.get("inputs") == inputs:
            figures["status"] = "unchanged"
            return int(done["version"])
        days, others = lakehouse.read("user_daily"), config.labels.other_horizons
        spend = labels.future_spend(days, dates, config.labels.horizon_days, test_date)
        rows = labels.with_other_horizons(labels.join_labels(source, spend), days, dates, others, test_date)
        rows = labels.add_weights(rows, test_date, config.labels)
        if given:
            # of these users alone: a whole date of features for a few labels would be a waste
            theirs = features.user_features(
                days, given.dates, config.features, features_digest(run), of=given.rows.select("user_key")
            )
            told = labels.with_given(theirs, given.rows, test_date, config.labels)
            told = labels.with_other_horizons(told, days, given.dates, others, test_date)
            # what was given is of the whole horizon, and what was seen of a part of it
            rows = rows.join(given.rows, labels.KEY, "left_anti").unionByName(told)
        rows = _spread(labels.without_holdout(rows, config.labels), run, "complete", "fold")
        version = lakehouse.replace(labels.training_set_table(config.features, others), rows, inputs=inputs)
        figures["rows_in"] = source.count()
        figures["rows"] = figures["rows_out"] = lakehouse.read("training_set", version).count()
        figures["dates"] = len(dates)
        if given:
            figures["given"] = lakehouse.read("training_set", version).filter("given").count()
        return version


class _Given(NamedTuple):
    """Given labels that a training sees, their as-of dates, and what tells them from any others."""

    rows: DataFrame
    dates: list[date]
    digest: str


def _given(run: Run, test_date: date) -> _Given | None:
    """``None`` where no label was given that a training as of the test date may see."""
    if not run.lakehouse.exists(GIVEN_LABELS.name):
        return None
    rows = labels.given_before(run.lakehouse.read(GIVEN_LABELS.name), test_date, run.config.labels)
    # not the table's version: later labels, and maintenance, are no reason to train anew
    told = rows.groupBy("as_of_date").agg(F.count(F.lit(1)), F.bit_xor(F.xxhash64(*rows.columns))).orderBy("as_of_date")
    by_date = [tuple(row) for row in told.collect()]
    return _Given(rows, [day for day, *_ in by_date], digest(by_date)) if by_date else None


def _work_folder(run: Run) -> Path:
    # another place of the record, or of the secret, other alarms or questions, are no reason to train anew
    folder = Path(run.config.training.work_dir).absolute() / digest(
        run.config.model_dump(exclude={"tracking", "privacy", "drift", "fairness", "labelling"}),
        run.lakehouse.location("training_set"),
        run.lakehouse.inputs("training_set"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_vocabulary(run: Run, test_date: date, folder: Path) -> Path:
    """The most frequent texts before the test date with their embeddings, as a safetensors file; with their tokens too, if
    a language model reads histories."""
    lakehouse, config = run.lakehouse, run.config.texts
    frequent = (
        lakehouse.read("events")
        .filter((F.col("event_date") < F.lit(test_date)) & F.col("text_id").isNotNull())
        .groupBy("text_id")
        .count()
        .orderBy(F.desc("count"), "text_id")
        .limit(config.vocabulary)
    )
    vectors = lakehouse.read("text_embeddings").filter(F.col("model_digest") == texts.model_digest(config))
    rows = frequent.join(vectors, "text_id").select("text_id", "embedding").toPandas().sort_values("text_id")
    if rows.empty and not frequent.isEmpty():
        raise DataError("text_embeddings", f"holds nothing by the language model {config.model}; run featurize first")
    width = len(rows["embedding"].iloc[0]) if len(rows) else 1
    path = folder / "texts.safetensors"
    arrays = {
        "ids": rows["text_id"].to_numpy(np.int64),
        "embeddings": np.stack(rows["embedding"].to_list()).astype(np.float32)
        if len(rows)
        else np.zeros((0, width), np.float32),
    }
    if run.config.network.backbone == "text":
        arrays |= _tokens(run, rows["text_id"])
    save_file(arrays, path)
    return path


def _tokens(run: Run, text_ids: pd.Series) -> dict[str, np.ndarray]:
    """What events are written with: of words, and of these texts in their order."""
    # torch takes seconds to import: a platform without a sequence model doesn't pay for it
    from bp_spark.model.text_history import tokenise

    config, known = run.config, run.spark.createDataFrame([(int(n),) for n in text_ids], "text_id bigint")
    found = run.lakehouse.read("texts").join(F.broadcast(known), "text_id").select("text_id", "text").toPandas()
    ordered = found.set_index("text_id")["text"].reindex(text_ids).fillna("").to_list()
    folder, network = texts.model_folder(config.history_model), config.network.text
    table = tokenise(ordered, folder, config.texts.max_tokens, network.max_tokens)
    return {"tokens": table.tokens.numpy(), "token_lengths": table.lengths.numpy()}


def _spread(rows: DataFrame, run: Run, *partitions: str) -> DataFrame:
    """Rows in a few files of each partition for each rank: ranks share the row groups of the files."""
    files = math.ceil(4 * run.config.training.processes / run.config.labels.folds)
    place = F.pmod(F.xxhash64("user_key", "as_of_date"), F.lit(files))
    spread = rows.repartition(files * run.config.labels.folds, *partitions, place)
    return spread.sortWithinPartitions(*partitions, "user_key", "as_of_date")


class _MemberFit(NamedTuple):
    """A fitted member, figures of the fit, and the epochs of a network."""

    member: Member
    figures: Mapping[str, object] = {}
    history: Sequence[Mapping[str, float]] = ()


Fit = Callable[[int | None], _MemberFit]
"""Fits a member without the users of a fold, on whom it stops early, or then (``None``) on all users, for as long as the fits
without a fold were best at."""


def cross_fit(
    run: Run,
    rows: DataFrame,
    test_date: date,
    vocabulary: Path,
    folder: Path,
    *,
    version: int | None = None,
    refit: bool = True,
    spec: InputSpec | None = None,
) -> tuple[list[Member], pd.DataFrame, Sequence[Mapping[str, float]]]:
    """Members fitted on all folds; what members that were fitted without a user's fold say of that user; the epochs of the
    transformer without the first fold.

    The frame has the rows whose whole horizon was seen, at most ``evaluation.max_users`` of them, with the spend of each other
    horizon, NaN where not known, and the columns of :func:`predict_all`. Without ``refit`` no member is
    fitted on all folds. The transformer reads what ``spec`` names, by default all there is.
    """
    folds = range(run.config.labels.folds)
    with persisted(rows) as computed:
        frame = _sample(computed.filter("complete"), run.config).toPandas()
        columns = {name: frame[name].to_numpy() for name in frame.columns}
        rows_of = [np.flatnonzero(columns["fold"] == fold) for fold in folds]
        members: list[Member] = []
        out_of_fold: dict[str, np.ndarray] = {}
        history: Sequence[Mapping[str, float]] = ()
        for name, fit in _fits(run, computed, version, test_date, vocabulary, folder, spec).items():
            with run.stage(f"fit {name}") as figures:
                for fold in folds:
                    fitted = fit(fold)
                    here = {column: values[rows_of[fold]] for column, values in columns.items()}
                    for column, said in predict_all([fitted.member], here).items():
                        out_of_fold.setdefault(column, np.empty(len(frame)))[rows_of[fold]] = said
                    history = history or fitted.history
                if refit:
                    fitted = fit(None)
                    members.append(fitted.member)
                figures.update(fitted.figures)
    spend = [labels.of_days("label_spend", days) for days in run.config.labels.other_horizons]
    return members, frame[["user_key", "as_of_date", "label_spend", *spend]].assign(**out_of_fold), history


def _fits(
    run: Run,
    rows: DataFrame,
    version: int | None,
    test_date: date,
    vocabulary: Path,
    folder: Path,
    spec: InputSpec | None,
) -> dict[str, Fit]:
    """How each member is fitted; the baselines linear and btyd always are."""
    config, catalogue = run.config, features.catalogue(run.config.features)

    newest = rows.filter("NOT given").agg(F.max("as_of_date")).first()
    assert newest is not None
    # btyd reads everyone's visits of the newest date; dates of given labels have few users, chosen ones
    of_everyone = F.col("as_of_date") <= F.lit(newest[0])

    def split(fold: int | None) -> DataFrame:
        if fold is None:
            return rows.withColumn("split", F.lit("train"))
        held_out = F.when(F.col("fold") != fold, "train").when(F.col("complete"), "valid").otherwise("unused")
        return rows.withColumn("split", held_out)

    def linear(fold: int | None) -> _MemberFit:
        return _MemberFit(fit_linear(split(fold).filter("complete"), RFM, config.linear))

    def btyd(fold: int | None) -> _MemberFit:
        return _MemberFit(fit_btyd(split(fold).filter(of_everyone), config.labels.horizon_days))

    def boosted(kind: type[TreesMember]) -> Fit:
        best: list[int] = []

        def fit(fold: int | None) -> _MemberFit:
            member = fit_trees(
                split(fold),
                catalogue.names,
                config.trees,
                seed=config.training.seed,
                kind=kind,
                rounds=_mean_length(best) if fold is None else None,
                weight="weight",
            )
            best.append(member.rounds)
            return _MemberFit(member, {"rounds": member.rounds})

        return fit

    fits: dict[str, Fit] = {"linear": linear, "btyd": btyd}
    fits |= {kind.name: boosted(kind) for kind in (TreesMember, SqrtTreesMember) if kind.name in config.fusion.members}
    if "transformer" in config.fusion.members:
        spec = spec or InputSpec.of(config.features)
        fits["transformer"] = _transformer_fit(run, version, test_date, vocabulary, folder, spec)
    return fits


def _transformer_fit(
    run: Run, version: int | None, test_date: date, vocabulary: Path, folder: Path, spec: InputSpec
) -> Fit:
    """Pre-trains and fine-tunes. Who is predicted out of fold isn't pre-trained on either: later events tell of labels."""
    # torch takes seconds to import: a platform without a sequence model doesn't pay for it
    from bp_spark.model.members.transformer import TransformerMember

    config, lakehouse = run.config, run.lakehouse
    labelled = lakehouse.location("training_set"), version
    best: dict[str, list[int]] = {"pre-training": [], "fine-tuning": []}

    def length(name: str, fold: int | None) -> int | None:
        return _mean_length(best[name]) if fold is None else None

    def fit(fold: int | None) -> _MemberFit:
        place = folder / ("all" if fold is None else f"without-{fold}")
        encoder, figures = None, dict[str, object]()
        if config.pretraining.max_epochs:
            encoder, epochs = pretrain_encoder(run, test_date, vocabulary, fold, length("pre-training", fold))
            best["pre-training"].append(epochs)
            figures["pretraining_epochs"] = epochs
        learned, held_out = _parts(config, fold, lambda part: snapshot(*labelled, {"complete": "true", "fold": part}))
        result = finetune(
            run.spark, learned, held_out, spec, vocabulary, config, place, encoder, epochs=length("fine-tuning", fold)
        )
        best["fine-tuning"].append(result.best_epoch)
        figures["epochs"] = result.best_epoch
        return _MemberFit(TransformerMember.load(result.folder), figures, result.history)

    return fit


def pretrain_encoder(
    run: Run, test_date: date, vocabulary: Path, fold: int | None, epochs: int | None
) -> tuple[Path, int]:
    """The history half of the transformer, pre-trained on histories as of the test date without a fold's; its epochs."""
    # torch takes seconds to import: a platform without a sequence model doesn't pay for it
    from bp_spark.training.tasks import pretrain

    config, lakehouse = run.config, run.lakehouse
    inputs = digest(
        __version__, config.labels, lakehouse.version("user_features"), config.training.processes, test_date
    )
    done = lakehouse.commit_metadata("pretraining_set")
    version = int(done["version"])
    if done.get("inputs") != inputs:
        table = labels.pretraining_set_table()
        users = lakehouse.read("user_features").filter(F.col("as_of_date") == F.lit(test_date))
        rows = labels.without_holdout(users, config.labels).select(*table.schema.names)
        version = lakehouse.replace(table, _spread(rows, run, "fold"), inputs=inputs)
    found = lakehouse.location("pretraining_set"), version
    learned, held_out = _parts(config, fold, lambda part: snapshot(*found, {"fold": part}))
    identity = digest(pretrain.inputs_digest(learned, held_out, vocabulary, config), epochs)
    place = Path(config.training.work_dir).absolute() / f"pretraining-{identity}"
    result = pretrain.pretrain(run.spark, learned, held_out, vocabulary, config, place, epochs=epochs)
    return result.folder, result.best_epoch


def _parts(config: Config, fold: int | None, of: Callable[[list[str]], Snapshot]) -> tuple[Snapshot, Snapshot | None]:
    """What is learned from, and the fold that tells when to stop; ``of`` makes a snapshot of folds."""
    learned = [str(number) for number in range(config.labels.folds) if number != fold]
    return of(learned), None if fold is None else of([str(fold)])


def _mean_length(lengths: Sequence[int]) -> int:
    return max(1, round(float(np.mean(lengths))))


def test_rows(run: Run, test_date: date) -> DataFrame:
    """Users of the test date with what they spent after it; ``seen`` tells whether models were fitted on them."""
    lakehouse, config = run.lakehouse, run.config.labels
    users = lakehouse.read("user_features").filter(F.col("as_of_date") == F.lit(test_date))
    days = lakehouse.read("user_daily")
    rows = labels.join_labels(users, labels.future_spend(days, [test_date], config.horizon_days))
    _, last = span(lakehouse)
    rows = labels.with_other_horizons(rows, days, [test_date], config.other_horizons, last)
    return rows.withColumn("seen", labels.fold(config) != labels.HOLDOUT)


def predicted(rows: DataFrame, members: Sequence[Member], config: Config) -> pd.DataFrame:
    """Each member's predictions of a sample of the rows, as a frame on the driver."""
    frame = _sample(rows, config).toPandas()
    columns = {name: frame[name].to_numpy() for name in frame.columns}
    others = [labels.of_days("label_spend", days) for days in config.labels.other_horizons]
    kept = [name for name in ("user_key", "as_of_date", "label_spend", *others, "seen", "bracket") if name in frame]
    return frame[kept].assign(**predict_all(members, columns))


def _sample(rows: DataFrame, config: Config) -> DataFrame:
    """At most about ``evaluation.max_users`` of the rows, taken by hash of the user."""
    total, most = rows.count(), config.evaluation.max_users
    if total <= most:
        return rows
    return rows.filter(F.pmod(F.xxhash64("user_key"), F.lit(1_000_000)) < int(1_000_000 * most / total))


def fit_explanation(run: Run, fitted: Fitted) -> Explanation:
    """What takes predictions apart, learned from a sample of the training set; its error stands in ``runs``."""
    config = run.config
    with run.stage("explain") as figures:
        frame = _sample(run.lakehouse.read("training_set", fitted.version), config).toPandas()
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
        figures["rows_in"] = len(frame)
        figures["r_squared"] = f"{explanation.r_squared:.4f}"
    return explanation


def _write_bundle(run: Run, fitted: Fitted, metrics: pd.DataFrame, judged: Bundle | None = None) -> Bundle:
    """The bundle with its explanation, its figures and what drift is told by: all there before it can score.

    Args:
        judged: the bundle whose ``metrics`` they are, by default itself.
    """
    lakehouse, config, test_date = run.lakehouse, run.config, fitted.test_date
    explanation = fit_explanation(run, fitted)
    catalogue = features.catalogue(config.features)
    inputs: dict[str, Sequence[str]] = {"tabular": catalogue.names}
    if "transformer" in fitted.names:
        inputs["history"] = [column.name for column in features.SEQUENCE_COLUMNS]
    lineage: dict[str, Any] = {
        "run_id": run.run_id,
        "test_date": test_date.isoformat(),
        "training_set": {
            "location": lakehouse.location("training_set"),
            "version": fitted.version,
        },
        "text_model": texts.model_digest(config.texts),
        "config": config.model_dump(mode="json"),
    }
    if judged:
        lineage["judged"] = {"bundle": judged.folder.name, "test_date": judged.judged_on}
    name = f"{test_date:%Y%m%d}-{run.run_id}"
    with run.stage("bundle") as figures:
        bundle = bundles.write(
            Path(config.bundles) / name,
            fitted.members,
            fitted.fusion,
            fitted.horizons,
            inputs=inputs,
            lineage=lineage,
            metrics={"rows": metrics.to_dict("records")},
            explanation=explanation,
            private_key=signing.private_key(config.signing),
        )
        figures["digest"] = bundle.digest
        figures["folder"] = bundle.folder
    store_reference(run, bundle)
    if not metrics.empty:
        _record_metrics(run, metrics, bundle)
    return bundle


def promote(run: Run, bundle: Bundle, decide: Callable[[], Decision], refit: date | None = None) -> Decision:
    """Promote the bundle if it passes the gate; the decision is recorded beside it and in ``runs``.

    Args:
        refit: as of when a bundle that passes is fitted anew, which is then promoted in its place.
    """
    with run.stage("promote") as figures:
        decision = decide()
        promoted, reason = decision.promoted, decision.reason
        if promoted and refit:
            promoted, reason = False, f"{reason}; to be fitted anew as of {refit} and then promoted"
        if promoted:
            bundles.promote(run.config.bundles, bundle)
        bundles.record(run.config.bundles, bundle, promoted=promoted, reason=reason)
        figures["promoted"], figures["reason"] = promoted, reason
    return decision


def decide(run: Run, fitted: Fitted, complete: bool) -> Decision:
    """The gate: baselines first, then the promoted bundle, both at the test date of the new one."""
    incumbent, trouble = _incumbent(run)
    if not complete:
        without = (
            f"the {run.config.labels.horizon_days} days from {fitted.test_date} are not over, so nothing can judge it"
        )
        if incumbent is None:
            return Decision(True, f"{without}; {trouble}")
        return Decision(False, f"{without}; {incumbent.folder.name} stays")
    baselines = promotion.against_baselines(fitted.predictions)
    if incumbent is None or not baselines.promoted:
        return Decision(baselines.promoted, f"{baselines.reason}; {trouble}" if trouble else baselines.reason)
    try:
        rival = _judged(run, incumbent)
        theirs = _fused(run, rival, fitted.test_date)
    except BundleError as error:
        return Decision(True, f"{baselines.reason}; {incumbent.folder.name} can't be compared with ({error})")
    name = rival.folder.name
    if rival is not incumbent:
        name = f"{name}, which {incumbent.folder.name} was fitted anew from,"
    judged = _against(run, fitted.predictions, theirs, name)
    return Decision(judged.promoted, f"{baselines.reason}; {judged.reason}{_head_start(rival, fitted.test_date)}")


def decide_refit(run: Run, bundle: Bundle, judged: TrainResult) -> Decision:
    """A later fit has seen the spend that the first was judged by: it is surely worse there only if something went wrong."""
    as_of, test_date = bundle.manifest["lineage"]["test_date"], judged.fitted.test_date
    sound = _against(run, _fused(run, bundle, test_date), judged.fitted.predictions, judged.bundle.folder.name)
    if not sound.promoted:
        return Decision(False, f"fitted anew as of {as_of}, but {sound.reason}, whose test date it has seen")
    return Decision(True, f"fitted anew as of {as_of}; as of {test_date}: {judged.reason}")


def _against(run: Run, new: pd.DataFrame, old: pd.DataFrame, name: str) -> Decision:
    """Hold what is expected of users (``fused``) against what another bundle, of that name, expected of them."""
    others = old[["user_key", "fused"]].rename(columns={"fused": "incumbent"})
    both = new.merge(others, on="user_key", how="inner", validate="one_to_one")
    judging, seed = run.config.evaluation, run.config.training.seed
    return promotion.against_incumbent(both, name, margin=judging.margin, resamples=judging.resamples, seed=seed)


def _incumbent(run: Run) -> tuple[Bundle | None, str]:
    """The promoted bundle, if there is one that can be compared with; else why not."""
    if not bundles.is_any_promoted(run.config.bundles):
        return None, "no other bundle is promoted"
    try:
        incumbent = bundles.load_promoted(run.config)
    except BundleError as error:
        return None, f"the promoted bundle can't be used ({error})"
    if incumbent.horizon_days != run.config.labels.horizon_days:
        return None, f"{incumbent.folder.name}, promoted before, predicts {incumbent.horizon_days} days"
    return incumbent, ""


def _judged(run: Run, incumbent: Bundle) -> Bundle:
    """The bundle that the promoted one was fitted anew from, while it is there: it hasn't seen the horizon it is judged by."""
    judged = incumbent.manifest["lineage"].get("judged")
    if judged is None:
        return incumbent
    try:
        return bundles.load_promoted(run.config, Path(run.config.bundles) / judged["bundle"])
    except BundleError:
        return incumbent


def _fused(run: Run, bundle: Bundle, test_date: date) -> pd.DataFrame:
    """``user_key, label_spend, fused``: what the test date's users spent, and what a bundle expected of them.

    Raises:
        BundleError: it wants a column that today's features lack.
    """
    users = test_rows(run, test_date)
    bundle.check_inputs(users.columns)
    says = predicted(users, list(bundle.members.values()), run.config)
    answers = bundle.fusion.apply(bundle.fusion.inputs_from(says), test_date)
    return says[["user_key", "label_spend"]].assign(fused=answers["expected_spend"])


def _head_start(incumbent: Bundle, test_date: date) -> str:
    """A warning where the promoted bundle learned from spend that both are judged by."""
    theirs = str(incumbent.manifest["lineage"].get("test_date", ""))
    if theirs <= test_date.isoformat():
        return ""
    return f"; {incumbent.folder.name} was trained on labels up to {theirs}, some of which it is judged by here"


def _record_metrics(run: Run, metrics: pd.DataFrame, bundle: Bundle) -> None:
    test_date = date.fromisoformat(bundle.judged_on)
    rows = [
        {**row, "run_id": run.run_id, "bundle_digest": bundle.digest, "test_date": test_date}
        for row in metrics.to_dict("records")
    ]
    run.lakehouse.append(METRICS, run.spark.createDataFrame(rows, METRICS.schema))


def enter_registry(run: Run, bundle: Bundle, history: Sequence[Mapping[str, float]]) -> None:
    """Enter the bundle into the registry, where there is one."""
    if run.config.tracking.uri is None:
        return
    with run.stage("publish") as figures:
        try:
            published = publishing.publish(run.config, bundle, history, run.records[0]["started_at"])
        except TrackingError as error:
            raise TrackingError(
                f"{error}; the training is done and the bundle is written: bp-spark publish --bundle {bundle.folder}"
            ) from error
        figures["model"], figures["version"] = run.config.tracking.model, published.version
        figures[run.config.tracking.alias] = published.promoted
