"""Fit each member without a fold of users, to predict that fold, and then on all users."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bp_spark.core.config import Config, digest
from bp_spark.core.session import persisted
from bp_spark.features import catalogue as features
from bp_spark.features import labels
from bp_spark.lakehouse.run import Run
from bp_spark.model.inputs import InputSpec
from bp_spark.model.members.base import Member, predict_all
from bp_spark.model.members.btyd import BtydMember, fit_btyd
from bp_spark.model.members.linear import fit_linear
from bp_spark.model.members.local_trees import LocalTreesFit, collect_rows, fits_driver
from bp_spark.model.members.spark_trees import fit_trees_in_spark, task_slots
from bp_spark.model.members.transformer import TransformerMember
from bp_spark.model.members.trees import SqrtTreesMember, TreesMember
from bp_spark.training.dataset import collect_sample, without_histories, write_pretraining_set
from bp_spark.training.loader import Snapshot, snapshot
from bp_spark.training.tasks import pretrain
from bp_spark.training.tasks.finetune import finetune
from bp_spark.training.warm_start import WarmStart, warm_start

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


class MemberFit(NamedTuple):
    """A fitted member, figures of the fit, and the epochs of a network."""

    member: Member
    figures: Mapping[str, object] = {}
    history: Sequence[Mapping[str, float]] = ()


FitMember = Callable[[int | None], MemberFit]
"""A function that fits a member without a fold of users, on whom it stops early.

With ``None`` it fits on all users, for the mean length of the fits without a fold. So those fits must come first.
"""


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
    start: WarmStart | None = None,
) -> tuple[list[Member], pd.DataFrame, Sequence[Mapping[str, float]]]:
    """Fit the members without each fold, predict the users of that fold, and fit the members on all folds.

    Args:
        run: the running job.
        rows: the training set.
        test_date: date from which on nothing is seen.
        vocabulary: file of the texts.
        folder: folder for work files.
        version: version of the training set, for the network, which reads its files; ``None`` for the newest.
        refit: whether to fit the members on all folds too.
        spec: inputs of the transformer; by default all that there are.
        start: what the members start from; by default what the settings say.

    Returns:
        The members of all folds; out-of-fold predictions; and the epochs of the transformer without the first fold. The
        predictions are of rows whose whole horizon was seen, at most ``evaluation.max_users``. They have the columns of
        :func:`predict_all`, and the spend of each other horizon, NaN where it is not known.
    """
    start = start or warm_start(run)
    folds = range(run.config.labels.folds)
    frame = collect_sample(rows.filter("complete"), run.config.fusion.members, run.config)
    # the transformer reads the histories from the table's files
    with persisted(without_histories(rows)) as training_set:
        columns = {name: frame[name].to_numpy() for name in frame.columns}
        rows_of_fold = [np.flatnonzero(columns["fold"] == fold) for fold in folds]
        members: list[Member] = []
        out_of_fold: dict[str, np.ndarray] = {}
        history: Sequence[Mapping[str, float]] = ()
        for name, fit in _member_fits(run, training_set, version, test_date, vocabulary, folder, spec, start).items():
            with run.stage(f"fit {name}") as figures:
                for fold in folds:
                    fitted = fit(fold)
                    held_out = {column: values[rows_of_fold[fold]] for column, values in columns.items()}
                    for column, predictions in predict_all([fitted.member], held_out).items():
                        out_of_fold.setdefault(column, np.empty(len(frame)))[rows_of_fold[fold]] = predictions
                    history = history or fitted.history
                if refit:
                    fitted = fit(None)
                    members.append(fitted.member)
                figures.update(fitted.figures)
    spend = [labels.horizon_column("label_spend", days) for days in run.config.labels.other_horizons]
    return members, frame[["user_key", "as_of_date", "label_spend", *spend]].assign(**out_of_fold), history


def _member_fits(
    run: Run,
    rows: DataFrame,
    version: int | None,
    test_date: date,
    vocabulary: Path,
    folder: Path,
    spec: InputSpec | None,
    start: WarmStart,
) -> dict[str, FitMember]:
    """Return how each member is fitted: the members of ``fusion.members``, and always the baselines linear and btyd."""
    config = run.config
    fits: dict[str, FitMember] = {"linear": _linear_fit(rows, config), "btyd": _btyd_fit(rows, config, start.purchases)}
    kinds = [kind for kind in (TreesMember, SqrtTreesMember) if kind.name in config.fusion.members]
    if kinds:
        fits |= _trees_fits(rows, config, kinds)
    if "transformer" in config.fusion.members:
        spec = spec or InputSpec.of(config.features)
        initial = start.write_encoder(folder)
        fits["transformer"] = _transformer_fit(run, version, test_date, vocabulary, folder, spec, initial)
    return fits


def _with_split(rows: DataFrame, fold: int | None) -> DataFrame:
    """Add ``split``: ``valid`` for complete rows of the fold, ``unused`` for its others, ``train`` for all other rows."""
    if fold is None:
        return rows.withColumn("split", F.lit("train"))
    split = F.when(F.col("fold") != fold, "train").when(F.col("complete"), "valid").otherwise("unused")
    return rows.withColumn("split", split)


def _linear_fit(rows: DataFrame, config: Config) -> FitMember:
    def fit(fold: int | None) -> MemberFit:
        return MemberFit(fit_linear(_with_split(rows, fold).filter("complete"), RFM, config.linear))

    return fit


def _btyd_fit(rows: DataFrame, config: Config, like: BtydMember | None) -> FitMember:
    newest = rows.filter("NOT given").agg(F.max("as_of_date")).first()
    assert newest is not None
    # btyd reads the visits of all users of the newest date; the dates of survey labels have a few chosen users
    has_all_users = F.col("as_of_date") <= F.lit(newest[0])

    def fit(fold: int | None) -> MemberFit:
        users = _with_split(rows, fold).filter(has_all_users)
        return MemberFit(fit_btyd(users, config.labels.horizon_days, like))

    return fit


def _trees_fits(rows: DataFrame, config: Config, kinds: Sequence[type[TreesMember]]) -> dict[str, FitMember]:
    """Return how the trees are fitted: on the driver where the rows fit it, else in Spark.

    Raises:
        PlatformError: the rows don't fit the driver, and the session is one of Spark Connect.
    """
    names = features.catalogue(config.features).names
    if fits_driver(rows, names, config.trees):
        local = LocalTreesFit(collect_rows(rows, names, weight="weight"), config.trees, seed=config.training.seed)
        return {kind.name: _local_trees_fit(local, config, kind) for kind in kinds}
    # before hours of fits of other members
    task_slots(rows.sparkSession)
    return {kind.name: _spark_trees_fit(rows, names, config, kind) for kind in kinds}


def _local_trees_fit(local: LocalTreesFit, config: Config, kind: type[TreesMember]) -> FitMember:
    folds, members = range(config.labels.folds), list[TreesMember]()

    def fit_without(fold: int) -> TreesMember:
        return local.fit(kind, fold, at_once=len(folds))

    def fit(fold: int | None) -> MemberFit:
        if not members:
            with ThreadPoolExecutor(len(folds)) as pool:
                members.extend(pool.map(fit_without, folds))
        if fold is None:
            member = local.fit(kind, None, rounds=_mean_length([member.rounds for member in members]))
        else:
            member = members[fold]
        return MemberFit(member, {"rounds": member.rounds})

    return fit


def _spark_trees_fit(rows: DataFrame, names: Sequence[str], config: Config, kind: type[TreesMember]) -> FitMember:
    best_rounds: list[int] = []

    def fit(fold: int | None) -> MemberFit:
        member = fit_trees_in_spark(
            _with_split(rows, fold),
            names,
            config.trees,
            seed=config.training.seed,
            kind=kind,
            rounds=_mean_length(best_rounds) if fold is None else None,
            weight="weight",
        )
        best_rounds.append(member.rounds)
        return MemberFit(member, {"rounds": member.rounds})

    return fit


def _transformer_fit(
    run: Run,
    version: int | None,
    test_date: date,
    vocabulary: Path,
    folder: Path,
    spec: InputSpec,
    initial: Path | None,
) -> FitMember:
    """Return the pre-training and fine-tuning of the transformer.

    The users of the left-out fold are not pre-trained on either: their later events would leak their labels.
    """
    config, location = run.config, run.lakehouse.location("training_set")
    best_epochs: dict[str, list[int]] = {"pre-training": [], "fine-tuning": []}

    def length(name: str, fold: int | None) -> int | None:
        return _mean_length(best_epochs[name]) if fold is None else None

    def labelled(folds: list[str]) -> Snapshot:
        return snapshot(location, version, {"complete": "true", "fold": folds})

    def fit(fold: int | None) -> MemberFit:
        run_dir = folder / ("all" if fold is None else f"without-{fold}")
        encoder, figures = initial, dict[str, object]()
        if config.pretraining.max_epochs:
            encoder, epochs = pretrain_encoder(run, test_date, vocabulary, fold, length("pre-training", fold), initial)
            best_epochs["pre-training"].append(epochs)
            figures["pretraining_epochs"] = epochs
        train, valid = _train_and_valid(config, fold, labelled)
        result = finetune(
            run.spark, train, valid, spec, vocabulary, config, run_dir, encoder, epochs=length("fine-tuning", fold)
        )
        best_epochs["fine-tuning"].append(result.best_epoch)
        figures["epochs"] = result.best_epoch
        return MemberFit(TransformerMember.load(result.folder), figures, result.history)

    return fit


def pretrain_encoder(
    run: Run, test_date: date, vocabulary: Path, fold: int | None, epochs: int | None, initial: Path | None = None
) -> tuple[Path, int]:
    """Pre-train the history encoder on histories as of the test date.

    Args:
        run: the running job.
        test_date: date of the histories.
        vocabulary: file of the texts.
        fold: fold of users to leave out, and to stop early on; ``None`` for all users.
        epochs: number of epochs; ``None`` to stop early.
        initial: folder of an encoder to start from; by default from random weights.

    Returns:
        The folder of the encoder, and its best epoch.
    """
    config = run.config
    location, version = write_pretraining_set(run, test_date)
    train, valid = _train_and_valid(config, fold, lambda folds: snapshot(location, version, {"fold": folds}))
    identity = digest(pretrain.inputs_digest(train, valid, vocabulary, config, initial), epochs)
    run_dir = Path(config.training.work_dir).absolute() / f"pretraining-{identity}"
    result = pretrain.pretrain(run.spark, train, valid, vocabulary, config, run_dir, initial, epochs=epochs)
    return result.folder, result.best_epoch


def _train_and_valid(
    config: Config, fold: int | None, snapshot_of: Callable[[list[str]], Snapshot]
) -> tuple[Snapshot, Snapshot | None]:
    """Return a snapshot of the folds to learn from, and one of the left-out fold, which tells when to stop."""
    folds = [str(number) for number in range(config.labels.folds) if number != fold]
    return snapshot_of(folds), None if fold is None else snapshot_of([str(fold)])


def _mean_length(lengths: Sequence[int]) -> int:
    """Return the mean number of rounds or epochs, at least 1."""
    return max(1, round(float(np.mean(lengths))))
