"""The stages, end to end: what the jobs, the ``bp-spark`` command and notebooks call.

Each function takes a session and a configuration, reads tables, writes tables, and returns what a person wants to know of
the run. A stage whose inputs are unchanged is skipped; every stage leaves a row in ``runs``.
"""

from __future__ import annotations

import math
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from pyspark import StorageLevel
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F
from safetensors.numpy import save_file

from bp_spark import (
    __version__,
    bootstrap,
    cleaning,
    daily,
    evaluation,
    features,
    labels,
    promotion,
    scoring,
    texts,
    tracking,
)
from bp_spark.config import Config, changed, digest
from bp_spark.errors import BundleError, ConfigError, DataError, TrackingError
from bp_spark.loader import Snapshot, snapshot
from bp_spark.model import bundle as bundles
from bp_spark.model.btyd import fit_btyd
from bp_spark.model.bundle import Bundle
from bp_spark.model.fusion import Fusion
from bp_spark.model.horizons import MIN_ROWS, NETWORK, Horizons
from bp_spark.model.inputs import InputSpec
from bp_spark.model.members import Member, SqrtTreesMember, TreesMember, fit_linear, fit_trees, predict_all
from bp_spark.promotion import Decision
from bp_spark.sources import open_source
from bp_spark.sources.contract import Delivery
from bp_spark.tables import (
    BACKTESTS,
    DELIVERIES,
    EVENTS,
    METRICS,
    QUARANTINE,
    RAW_TABLES,
    RUNS,
    SCORES,
    SCORES_LATEST,
    TEXT_EMBEDDINGS,
    TEXTS,
    TRIALS,
    USER_DAILY,
    Lakehouse,
)
from bp_spark.training.finetune import finetune

if TYPE_CHECKING:
    from bp_spark.search import Trial

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
MEAN = "mean of trees and transformer"
"""A peer of backtests."""


@dataclass
class Run:
    """One call of a job: its stages, recorded in ``runs`` when it ends, well or not."""

    spark: SparkSession
    config: Config
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lakehouse = Lakehouse(self.spark, self.config.tables)

    @contextmanager
    def stage(self, name: str, inputs: str = "") -> Iterator[dict[str, object]]:
        """Time a stage; the figures that the block puts into the yielded mapping are kept.

        ``figures["status"]`` may be set to ``unchanged``. An error is recorded and passed on.
        """
        started, clock = datetime.now(UTC), time.monotonic()
        figures: dict[str, object] = {}
        status = "failed"
        try:
            yield figures
            status = str(figures.pop("status", "done"))
        except Exception as error:
            figures["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            raise
        finally:
            self.records.append(
                {
                    "run_id": self.run_id,
                    "stage": name,
                    "started_at": started,
                    "seconds": time.monotonic() - clock,
                    "status": status,
                    "inputs": inputs,
                    "code_version": __version__,
                    "figures": {key: str(value) for key, value in figures.items()},
                }
            )

    def close(self) -> None:
        """Write the stages to ``runs``."""
        if self.records:
            self.lakehouse.append(RUNS, self.spark.createDataFrame(self.records, RUNS.schema))


@contextmanager
def _run(spark: SparkSession, config: Config) -> Iterator[Run]:
    run = Run(spark, config)
    try:
        yield run
    finally:
        run.close()


# --- featurize ---------------------------------------------------------------------------------------------------------


def featurize(
    spark: SparkSession, config: Config, as_of: Sequence[date], rebuild: bool = False
) -> list[dict[str, Any]]:
    """Ingest what is new, clean it, embed new texts, update the user-days it touches, build features of the as-of dates.

    Args:
        as_of: dates to build features for.
        rebuild: derive everything anew from the raw tables: after a change of the cleaning rules, say.

    Returns:
        The stages that ran, as in ``runs``.

    Raises:
        DataError: the source breaks the raw contract; an as-of date lies before the data.
    """
    with _run(spark, config) as run:
        _ingest(run)
        _clean(run, rebuild)
        _embed(run)
        _aggregate(run, rebuild)
        _featurize(run, as_of)
        return run.records


def _ingest(run: Run) -> None:
    config, lakehouse = run.config.source, run.lakehouse
    source, identity = open_source(config), digest(config)
    with run.stage("ingest", identity) as figures:
        known, last = _ingested(lakehouse, identity)
        fresh = [delivery for delivery in source.deliveries(run.spark) if delivery not in known]
        figures["deliveries"] = len(fresh)
        if not fresh:
            figures["status"] = "unchanged"
            return
        number = last + 1
        raw = source.read(run.spark, fresh)
        if not last and raw["raw_transactions"].isEmpty():
            raise DataError("raw_transactions", "holds no rows; there is nobody to score")
        now = F.lit(datetime.now(UTC))
        for table in RAW_TABLES:
            if table.name in raw:
                rows = raw[table.name].transform(lambda df: _sampled(df, config.sample))
                rows = rows.withColumns({"ingest_id": F.lit(number).cast("bigint"), "ingested_at": now})
                lakehouse.replace(table, rows, where={"ingest_id": [number]})
                figures[table.name] = lakehouse.read(table.name).filter(F.col("ingest_id") == number).count()
        read = [(identity, d.table, d.name, d.fingerprint, number) for d in fresh]
        # deliveries last: with its commit, and not before, the ingest has happened
        lakehouse.append(DELIVERIES, run.spark.createDataFrame(read, DELIVERIES.schema), note={"ingest_id": number})


def _ingested(lakehouse: Lakehouse, source: str) -> tuple[set[Delivery], int]:
    """Deliveries of the source that were read, and the number of the last ingest of any (0 for none)."""
    if not lakehouse.exists("deliveries"):
        return set(), 0
    rows = lakehouse.read("deliveries").collect()
    known = {Delivery(row["table"], row["name"], row["fingerprint"]) for row in rows if row["source"] == source}
    return known, max(row["ingest_id"] for row in rows)


def _sampled(df: DataFrame, share: float) -> DataFrame:
    if share == 1 or "user_id" not in df.columns:
        return df
    return df.filter(F.pmod(F.xxhash64("user_id"), F.lit(labels.BUCKETS)) < int(share * labels.BUCKETS))


def _clean(run: Run, rebuild: bool) -> None:
    lakehouse = run.lakehouse
    raw = {table.name: lakehouse.read(table.name) for table in RAW_TABLES if lakehouse.exists(table.name)}
    last = int(lakehouse.note("deliveries")["ingest_id"])
    done = lakehouse.note("events")
    first = 1 if rebuild or done.get("format") != cleaning.FORMAT else int(done["through"]) + 1
    rules = digest(run.config.cleaning)
    with run.stage("clean", digest(rules, first, last)) as figures:
        if first > last:
            figures["status"] = "unchanged"
            return
        batch = {name: raw[name].filter(F.col("ingest_id").between(first, last)) for name in raw}
        judged = cleaning.judge(batch, raw, run.config.cleaning)
        ingests = list(range(first, last + 1))
        figures["rows"] = sum(batch[name].count() for name in judged)
        refused = cleaning.quarantine(judged)
        lakehouse.replace(QUARANTINE, refused, where=None if first == 1 else {"ingest_id": ingests})
        kept = lakehouse.read("quarantine").filter(F.col("ingest_id").between(first, last))
        figures["quarantine"] = kept.count()
        _add_texts(run, batch, raw, rebuild=first == 1)
        note = {"format": cleaning.FORMAT, "through": last, "rules": rules}
        _add_events(run, cleaning.events(judged), note, figures, rebuild=first == 1)
        _require_balance(figures)
        if first > 1 and done["rules"] != rules:
            figures["note"] = "older rows were judged by other cleaning settings; featurize --rebuild judges them anew"


def _add_texts(run: Run, batch: Mapping[str, DataFrame], raw: Mapping[str, DataFrame], *, rebuild: bool) -> None:
    """Store the texts of the batch that are new."""
    lakehouse = run.lakehouse
    brands = cleaning.brands(raw["raw_items"]) if "raw_items" in raw else None
    if rebuild:
        lakehouse.replace(TEXTS, texts.distinct_texts(cleaning.texts(batch), brands, run.config.texts))
        return
    found = cleaning.texts(batch).withColumn("text_id", texts.text_id(F.col("text")))
    fresh = found.join(lakehouse.read("texts").select("text_id"), "text_id", "left_anti").drop("text_id")
    rows = texts.distinct_texts(fresh, brands, run.config.texts).localCheckpoint()
    if not rows.isEmpty():
        lakehouse.append(TEXTS, rows)


def _add_events(
    run: Run, found: DataFrame, note: Mapping[str, Any], figures: dict[str, object], *, rebuild: bool
) -> None:
    """Store the events of a batch that are new, correct those that changed, count those that are there already."""
    lakehouse = run.lakehouse
    if rebuild:
        counts = Observation("events")
        repeated = F.coalesce(F.sum((F.col("copy") > 1).cast("long")), F.lit(0)).alias("duplicates")
        lakehouse.replace(EVENTS, found.observe(counts, repeated).filter("copy = 1"), note=note)
        figures["events"] = lakehouse.read("events").count()
        figures["duplicates"] = counts.get["duplicates"]
        return
    with (
        _kept(found) as rows,
        _kept(cleaning.against_known(rows.filter("copy = 1"), _same_days(run, rows))) as sorted_out,
    ):
        states = {row["state"]: row["count"] for row in sorted_out.groupBy("state").count().collect()}
        new, changed, known = (states.get(state, 0) for state in (cleaning.NEW, cleaning.CHANGED, cleaning.KNOWN))
        if changed:
            days = _days(sorted_out, "event_date")
            fresh = sorted_out.filter(F.col("state") != cleaning.KNOWN)
            lakehouse.merge(EVENTS, fresh, within={"event_date": days}, note=note)
        else:
            lakehouse.append(EVENTS, sorted_out.filter(F.col("state") == cleaning.NEW), note=note)
        figures["events"], figures["corrections"] = new, changed
        figures["duplicates"] = rows.filter("copy > 1").count() + known + changed


def _same_days(run: Run, rows: DataFrame) -> DataFrame:
    return run.lakehouse.read("events").filter(F.col("event_date").isin(_days(rows, "event_date")))


def _days(df: DataFrame, column: str) -> list[date]:
    return sorted(row[0] for row in df.select(column).distinct().collect())


@contextmanager
def _kept(df: DataFrame) -> Iterator[DataFrame]:
    """The frame, computed once for the block."""
    kept = df.persist(StorageLevel.MEMORY_AND_DISK)
    try:
        yield kept
    finally:
        kept.unpersist()


def _require_balance(figures: Mapping[str, Any]) -> None:
    rows, kept = figures["rows"], figures["events"] + figures["duplicates"] + figures["quarantine"]
    if kept != rows:
        raise DataError(
            "events",
            f"rows in ({rows}) must equal events ({figures['events']}) + duplicates ({figures['duplicates']}) "
            f"+ quarantine ({figures['quarantine']})",
            count=rows - kept,
        )


def replay_quarantine(spark: SparkSession, config: Config) -> list[dict[str, Any]]:
    """Judge the rows in quarantine anew, after a change of rules, items or rates, and move the good ones into ``events``.

    Raises:
        DataError: nothing was cleaned yet.
    """
    with _run(spark, config) as run:
        lakehouse = run.lakehouse
        rows = lakehouse.read("quarantine").localCheckpoint()
        known = {name: lakehouse.read(name) for name in ("raw_items", "raw_rates") if lakehouse.exists(name)}
        done = lakehouse.note("events")
        with run.stage("replay", digest(config.cleaning, lakehouse.version("quarantine"))) as figures:
            figures["rows"] = rows.count()
            # what is known today counts for rows that were refused for not knowing it
            today = {name: df.withColumn("ingest_id", F.lit(0).cast("bigint")) for name, df in known.items()}
            raw = {name: cleaning.from_quarantine(rows, name) for name in cleaning.LOGS}
            judged = {name: df.localCheckpoint() for name, df in cleaning.judge(raw, today, config.cleaning).items()}
            _add_texts(run, {name: df.filter("rule IS NULL") for name, df in judged.items()}, known, rebuild=False)
            note = {key: done[key] for key in ("format", "through", "rules")}
            _add_events(run, cleaning.events(judged), note, figures, rebuild=False)
            # events first: stopped between the two, a row is in both and the next replay counts it as a duplicate
            lakehouse.replace(QUARANTINE, cleaning.quarantine(judged))
            figures["quarantine"] = lakehouse.read("quarantine").count()
            _require_balance(figures)
        _embed(run)
        _aggregate(run, rebuild=False)
        return run.records


def quarantine_by_rule(spark: SparkSession, config: Config) -> list[tuple[str, str, int]]:
    """Source, rule and number of rows in quarantine, most first.

    Raises:
        DataError: nothing was cleaned yet.
    """
    rows = Lakehouse(spark, config.tables).read("quarantine").groupBy("source", "rule").count()
    return [tuple(row) for row in rows.orderBy(F.desc("count"), "source", "rule").collect()]


def _embed(run: Run) -> None:
    lakehouse, config = run.lakehouse, run.config.texts
    model = texts.model_digest(config)
    inputs = digest(model, lakehouse.version("texts"))
    with run.stage("embed", inputs) as figures:
        if lakehouse.inputs("text_embeddings") == inputs:
            figures["status"] = "unchanged"
            return
        unread = lakehouse.read("texts")
        if lakehouse.exists("text_embeddings"):
            unread = texts.unread(unread, lakehouse.read("text_embeddings"), model)
        # the model is loaded once in each task: as many as there are cores, but one for a handful of texts
        tasks = min(run.spark.sparkContext.defaultParallelism, math.ceil(unread.count() / texts.TEXTS_PER_TASK))
        unread = unread.repartition(max(1, tasks), "text_id")
        lakehouse.append(TEXT_EMBEDDINGS, texts.embed(unread, config), inputs=inputs)
        figures["texts"] = lakehouse.read("text_embeddings").filter(F.col("model_digest") == model).count()


def _aggregate(run: Run, rebuild: bool) -> None:
    """Update ``user_daily`` for the users and days whose events changed since it was last written."""
    lakehouse, config = run.lakehouse, run.config
    model = texts.model_digest(config.texts)
    kept = config.features.history_length
    definition = digest(daily.FORMAT, cleaning.FORMAT, model, kept)
    version, done = lakehouse.version("events"), lakehouse.note("user_daily")
    with run.stage("aggregate", digest(definition, version)) as figures:
        events = lakehouse.read("events", version)
        words = lakehouse.read("texts")
        vectors = lakehouse.read("text_embeddings").filter(F.col("model_digest") == model)
        note = {"definition": definition, "events": version}
        if rebuild or done.get("definition") != definition or int(done["events"]) > version:
            lakehouse.replace(USER_DAILY, daily.user_daily(events, words, vectors, kept), note=note)
            figures["user_days"] = lakehouse.read("user_daily").count()
            return
        if done["events"] == version:
            figures["status"] = "unchanged"
            return
        touched = lakehouse.changes("events", int(done["events"])).select("user_key", F.col("event_date").alias("day"))
        touched = touched.distinct().localCheckpoint()
        figures["user_days"] = touched.count()
        days = _days(touched, "day")
        figures["days"] = len(days)
        theirs = events.filter(F.col("event_date").isin(days)).join(
            touched.withColumnRenamed("day", "event_date"), ["user_key", "event_date"], "left_semi"
        )
        rows = daily.user_daily(theirs, words, vectors, kept).localCheckpoint()
        gone = touched.join(rows, daily.KEY, "left_anti")
        lakehouse.merge(USER_DAILY, rows, within={"day": days}, gone=gone, note=note)


def _featurize(run: Run, as_of: Sequence[date]) -> None:
    lakehouse, config = run.lakehouse, run.config.features
    first, _ = _span(lakehouse)
    for day in as_of:
        if day <= first:
            raise DataError(
                "events", f"no event lies before the as-of date {day}; the first is of {first}", column="ts"
            )
    table = features.user_features_table(config)
    built_from = digest(__version__, lakehouse.version("user_daily"), config, features.catalogue(config))
    with run.stage("featurize", built_from) as figures:
        built = _built(lakehouse, built_from)
        missing = [day for day in as_of if day not in built]
        figures["dates"] = len(missing)
        if not missing:
            figures["status"] = "unchanged"
            return
        rows = features.user_features(lakehouse.read("user_daily"), missing, config, built_from)
        lakehouse.replace(table, rows, where={"as_of_date": missing}, inputs=built_from)
        written = lakehouse.read("user_features").filter(F.col("as_of_date").isin(*missing))
        figures["users"] = written.count()


def _built(lakehouse: Lakehouse, built_from: str) -> set[date]:
    """As-of dates whose features are those that would be built now."""
    if not lakehouse.exists("user_features"):
        return set()
    rows = lakehouse.read("user_features").filter(F.col("built_from") == built_from).select("as_of_date").distinct()
    return {row[0] for row in rows.collect()}


def _span(lakehouse: Lakehouse) -> tuple[date, date]:
    """Days of the first and the last event."""
    row = lakehouse.read("events").agg(F.min("event_date"), F.max("event_date")).first()
    if row is None or row[0] is None:
        raise DataError("events", "holds no rows")
    return row[0], row[1]


# --- adapt the language model ------------------------------------------------------------------------------------------


def adapt_language(spark: SparkSession, config: Config, output: Path) -> list[dict[str, Any]]:
    """Go on pre-training the language model on the platform's texts; ``texts.model=OUTPUT`` then uses what came out.

    Embeddings bear the digest of their model: the next featurize reads each text anew with the adapted one.

    Args:
        output: folder to be made.

    Returns:
        The stage that ran, as in ``runs``.

    Raises:
        ConfigError: ``output`` is there already; the configured model can't guess masked tokens.
        DataError: no texts yet, or too few.
    """
    # torch and transformers take seconds to import: other stages don't pay for them
    from bp_spark.training import language

    with _run(spark, config) as run:
        lakehouse = run.lakehouse
        if not lakehouse.exists("texts"):
            raise DataError(f"{lakehouse.namespace}.texts", "table does not exist; run featurize first")
        found = snapshot(lakehouse.location("texts"))
        inputs = language.inputs_digest(found, config)
        with run.stage("adapt language", inputs) as figures:
            work = Path(config.training.work_dir).absolute() / f"language-{inputs}"
            result = language.adapt(spark, found, config, work, output)
            figures["texts"] = result.texts
            figures["held_out"] = result.held_out
            figures["epochs"] = result.epochs
            figures["best_epoch"] = result.best_epoch
            figures["loss_before"] = round(result.loss_before, 4)
            figures["loss_after"] = round(result.loss_after, 4)
            figures["model_digest"] = result.model_digest
            figures["folder"] = result.folder
            if not result.best_epoch:
                figures["note"] = "no epoch was better: the folder holds the model as it was"
        return run.records


# --- train -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to: the bundle, its metrics (of the horizons that are over), the decision."""

    bundle: Bundle
    metrics: pd.DataFrame
    promoted: bool
    reason: str
    stages: list[dict[str, Any]]


def train(spark: SparkSession, config: Config, test_date: date | None = None) -> TrainResult:
    """Label past cutoffs, fit the members, fuse and calibrate them, evaluate at ``test_date``, promote.

    Promoted is what ranks users no worse than the baselines and isn't surely worse than the promoted bundle, both
    judged on the users of the test date (see :mod:`bp_spark.promotion`). Last of all the bundle becomes a version of the
    registered model (see :mod:`bp_spark.tracking`).

    Args:
        test_date: the evaluation date; training horizons end on or before it. By default the newest date whose whole
            horizon has been seen.

    Raises:
        DataError: no events, or too little history for one cutoff.
        TrackingError: the store at ``tracking.uri`` can't be reached: before anything is done, or when all is done but the
            bundle's entry, and the message names the bundle.
    """
    tracking.check(config.tracking)
    with _run(spark, config) as run:
        first, last = _span(run.lakehouse)
        test_date = test_date or last - timedelta(days=config.labels.horizon_days)
        fitted = _fit_as_of(run, labels.cutoffs(first, test_date, config.labels), test_date)
        complete = last >= test_date + timedelta(days=config.labels.horizon_days)
        metrics = _metrics(fitted, complete)
        bundle = _write_bundle(run, fitted, metrics)
        decision = _promote(run, bundle, fitted, complete)
        if not metrics.empty:
            _record_metrics(run, metrics, bundle, test_date)
        _publish(run, bundle, fitted.history)
        return TrainResult(bundle, metrics, decision.promoted, decision.reason, run.records)


@dataclass(frozen=True)
class _Fitted:
    """Members and their fusion, of what was known at a test date.

    ``predictions`` are of the date's users: ``user_key``, ``label_spend``, ``seen``, a column a member, and the answers
    ``fused``, ``low``, ``high``, ``p_active``; of other horizons ``label_spend_30d``, ``transformer_30d``, ``fused_30d``.
    ``history`` is the transformer's, epoch by epoch, without the first fold.
    """

    test_date: date
    members: Sequence[Member]
    fusion: Fusion
    horizons: Horizons
    predictions: pd.DataFrame
    history: Sequence[Mapping[str, float]]

    @property
    def names(self) -> list[str]:
        return [*(member.name for member in self.members), "fused"]


def _fit_as_of(run: Run, dates: Sequence[date], test_date: date, brackets: DataFrame | None = None) -> _Fitted:
    """Fit, calibrate and predict with nothing later than the test date; ``brackets`` are joined to the predictions."""
    config = run.config
    rows, vocabulary, folder = _prepare(run, dates, test_date)
    members, out_of_fold, history = _cross_fit(run, rows, test_date, vocabulary, folder)
    users = _test_rows(run, test_date)
    if brackets is not None:
        users = users.join(brackets, "user_key", "left")
    reference = _predict(users, members, config)
    fusion = Fusion.fit(out_of_fold, config.fusion, reference)
    horizons = _fit_horizons(run, out_of_fold, fusion)
    said = {str(name): reference[name].to_numpy() for name in reference}
    fused = fusion.apply(said)
    by_horizon = horizons.apply(fused["expected_spend"], said)
    predictions = reference.assign(
        fused=fused["expected_spend"],
        low=fused["low"],
        high=fused["high"],
        p_active=fused["p_active"],
        **{labels.of_days("fused", days): by_horizon[days] for days in horizons.others},
    )
    return _Fitted(test_date, members, fusion, horizons, predictions, history)


def _fit_horizons(run: Run, out_of_fold: pd.DataFrame, fusion: Fusion) -> Horizons:
    """Ratios of other horizons; a stage, for one that no cutoff has seen whole is left out and people must see that."""
    config = run.config.labels
    with run.stage("fit horizons") as figures:
        expected = fusion.apply({name: out_of_fold[name].to_numpy() for name in fusion.members})["expected_spend"]
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


def _metrics(fitted: _Fitted, complete: bool) -> pd.DataFrame:
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


def _prepare(run: Run, dates: Sequence[date], test_date: date) -> tuple[DataFrame, Path, Path]:
    """The training set of the complete cutoffs and of newer ones, the vocabulary's file, the folder of the work."""
    dates = [*dates, *labels.recent_cutoffs(dates[-1], test_date, run.config.labels)]
    _featurize(run, [*dates, test_date])
    rows = _training_set(run, dates, test_date)
    folder = _work_folder(run)
    return rows, _vocabulary(run, test_date, folder), folder


def _training_set(run: Run, dates: Sequence[date], test_date: date) -> DataFrame:
    lakehouse, config = run.lakehouse, run.config
    source = lakehouse.read("user_features").filter(F.col("as_of_date").isin(*dates))
    inputs = digest(
        __version__,
        config.labels,
        config.features,
        lakehouse.version("user_features"),
        lakehouse.version("user_daily"),
        dates,
        test_date,
    )
    with run.stage("label", inputs) as figures:
        if lakehouse.inputs("training_set") == inputs:
            figures["status"] = "unchanged"
            return lakehouse.read("training_set")
        spend = labels.future_spend(lakehouse.read("user_daily"), dates, config.labels.horizon_days, test_date)
        others = config.labels.other_horizons
        rows = labels.with_other_horizons(
            labels.labelled(source, spend), lakehouse.read("user_daily"), dates, others, test_date
        )
        rows = labels.weighed(rows, test_date, config.labels)
        rows = _spread(labels.without_holdout(rows, config.labels), run, "complete", "fold")
        lakehouse.replace(labels.training_set_table(config.features, others), rows, inputs=inputs)
        written = lakehouse.read("training_set")
        figures["rows"] = written.count()
        figures["dates"] = len(dates)
        return written


def _work_folder(run: Run) -> Path:
    # another place of the record is no reason to train anew
    folder = Path(run.config.training.work_dir).absolute() / digest(
        run.config.model_dump(exclude={"tracking"}),
        run.lakehouse.location("training_set"),
        run.lakehouse.inputs("training_set"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _vocabulary(run: Run, test_date: date, folder: Path) -> Path:
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


def _cross_fit(
    run: Run, rows: DataFrame, test_date: date, vocabulary: Path, folder: Path, *, refit: bool = True
) -> tuple[list[Member], pd.DataFrame, Sequence[Mapping[str, float]]]:
    """Members fitted on all folds; what members that were fitted without a user's fold say of that user; the epochs of the
    transformer without the first fold.

    The frame has the rows whose whole horizon was seen, at most ``evaluation.max_users`` of them, with the spend of each other
    horizon, NaN where not known, and the columns of :func:`bp_spark.model.members.predict_all`. Without ``refit`` no member is
    fitted on all folds.
    """
    folds = range(run.config.labels.folds)
    rows.persist()
    frame = _sample(rows.filter("complete"), run.config).toPandas()
    columns = {name: frame[name].to_numpy() for name in frame.columns}
    rows_of = [np.flatnonzero(columns["fold"] == fold) for fold in folds]
    members: list[Member] = []
    out_of_fold: dict[str, np.ndarray] = {}
    history: Sequence[Mapping[str, float]] = ()
    for name, fit in _fits(run, rows, test_date, vocabulary, folder).items():
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
    rows.unpersist()
    spend = [labels.of_days("label_spend", days) for days in run.config.labels.other_horizons]
    return members, frame[["user_key", "as_of_date", "label_spend", *spend]].assign(**out_of_fold), history


def _fits(run: Run, rows: DataFrame, test_date: date, vocabulary: Path, folder: Path) -> dict[str, Fit]:
    """How each member is fitted; the baselines linear and btyd always are."""
    config, catalogue = run.config, features.catalogue(run.config.features)

    def split(fold: int | None) -> DataFrame:
        if fold is None:
            return rows.withColumn("split", F.lit("train"))
        held_out = F.when(F.col("fold") != fold, "train").when(F.col("complete"), "valid").otherwise("unused")
        return rows.withColumn("split", held_out)

    def linear(fold: int | None) -> _MemberFit:
        return _MemberFit(fit_linear(split(fold).filter("complete"), RFM, config.linear))

    def btyd(fold: int | None) -> _MemberFit:
        return _MemberFit(fit_btyd(split(fold), config.labels.horizon_days))

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
        fits["transformer"] = _transformer_fit(run, test_date, vocabulary, folder)
    return fits


def _transformer_fit(run: Run, test_date: date, vocabulary: Path, folder: Path) -> Fit:
    """Pre-trains and fine-tunes. Who is predicted out of fold isn't pre-trained on either: later events tell of labels."""
    # torch takes seconds to import: a platform without a sequence model doesn't pay for it
    from bp_spark.model.network import TransformerMember

    config, lakehouse = run.config, run.lakehouse
    spec = InputSpec.of(config.features)
    labelled = lakehouse.location("training_set"), lakehouse.version("training_set")
    best: dict[str, list[int]] = {"pre-training": [], "fine-tuning": []}

    def length(name: str, fold: int | None) -> int | None:
        return _mean_length(best[name]) if fold is None else None

    def fit(fold: int | None) -> _MemberFit:
        place = folder / ("all" if fold is None else f"without-{fold}")
        encoder, figures = None, dict[str, object]()
        if config.pretraining.max_epochs:
            encoder, epochs = _pretrain(run, test_date, vocabulary, fold, length("pre-training", fold))
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


def _pretrain(run: Run, test_date: date, vocabulary: Path, fold: int | None, epochs: int | None) -> tuple[Path, int]:
    """The history half of the transformer, pre-trained on histories as of the test date without a fold's; its epochs."""
    # torch takes seconds to import: a platform without a sequence model doesn't pay for it
    from bp_spark.training import pretrain

    config, lakehouse = run.config, run.lakehouse
    inputs = digest(
        __version__, config.labels, lakehouse.version("user_features"), config.training.processes, test_date
    )
    if lakehouse.inputs("pretraining_set") != inputs:
        table = labels.pretraining_set_table()
        users = lakehouse.read("user_features").filter(F.col("as_of_date") == F.lit(test_date))
        rows = labels.without_holdout(users, config.labels).select(*table.schema.names)
        lakehouse.replace(table, _spread(rows, run, "fold"), inputs=inputs)
    found = lakehouse.location("pretraining_set"), lakehouse.version("pretraining_set")
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


def _test_rows(run: Run, test_date: date) -> DataFrame:
    """Users of the test date with what they spent after it; ``seen`` tells whether models were fitted on them."""
    lakehouse, config = run.lakehouse, run.config.labels
    users = lakehouse.read("user_features").filter(F.col("as_of_date") == F.lit(test_date))
    days = lakehouse.read("user_daily")
    rows = labels.labelled(users, labels.future_spend(days, [test_date], config.horizon_days))
    _, last = _span(lakehouse)
    rows = labels.with_other_horizons(rows, days, [test_date], config.other_horizons, last)
    return rows.withColumn("seen", labels.fold(config) != labels.HOLDOUT)


def _predict(rows: DataFrame, members: Sequence[Member], config: Config) -> pd.DataFrame:
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


def _write_bundle(run: Run, fitted: _Fitted, metrics: pd.DataFrame) -> Bundle:
    lakehouse, config, test_date = run.lakehouse, run.config, fitted.test_date
    catalogue = features.catalogue(config.features)
    inputs: dict[str, Sequence[str]] = {"tabular": catalogue.names}
    if "transformer" in fitted.names:
        inputs["history"] = [column.name for column in features.SEQUENCE_COLUMNS]
    lineage = {
        "run_id": run.run_id,
        "test_date": test_date.isoformat(),
        "training_set": {
            "location": lakehouse.location("training_set"),
            "version": lakehouse.version("training_set"),
        },
        "text_model": texts.model_digest(config.texts),
        "config": config.model_dump(mode="json"),
    }
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
        )
        figures["digest"] = bundle.digest
        figures["folder"] = bundle.folder
    return bundle


def _promote(run: Run, bundle: Bundle, fitted: _Fitted, complete: bool) -> Decision:
    """Promote the bundle if it passes the gate; the decision is recorded beside it and in ``runs``."""
    with run.stage("promote") as figures:
        decision = _decide(run, fitted, complete)
        if decision.promoted:
            bundles.promote(run.config.bundles, bundle)
        bundles.record(run.config.bundles, bundle, promoted=decision.promoted, reason=decision.reason)
        figures["promoted"], figures["reason"] = decision.promoted, decision.reason
    return decision


def _decide(run: Run, fitted: _Fitted, complete: bool) -> Decision:
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
        theirs = _incumbent_says(run, incumbent, fitted.test_date)
    except BundleError as error:
        return Decision(True, f"{baselines.reason}; {incumbent.folder.name} can't be compared with ({error})")
    both = fitted.predictions.merge(theirs, on="user_key", how="inner", validate="one_to_one")
    resamples, seed = run.config.evaluation.resamples, run.config.training.seed
    judged = promotion.against_incumbent(both, incumbent.folder.name, resamples=resamples, seed=seed)
    return Decision(judged.promoted, f"{baselines.reason}; {judged.reason}{_head_start(incumbent, fitted.test_date)}")


def _incumbent(run: Run) -> tuple[Bundle | None, str]:
    """The promoted bundle, if there is one that can be compared with; else why not."""
    if not bundles.is_any_promoted(run.config.bundles):
        return None, "no other bundle is promoted"
    try:
        incumbent = bundles.load(bundles.current(run.config.bundles))
    except BundleError as error:
        return None, f"the promoted bundle can't be used ({error})"
    if incumbent.horizon_days != run.config.labels.horizon_days:
        return None, f"{incumbent.folder.name}, promoted before, predicts {incumbent.horizon_days} days"
    return incumbent, ""


def _incumbent_says(run: Run, incumbent: Bundle, test_date: date) -> pd.DataFrame:
    """``user_key, incumbent``: expected spend of the test date's users.

    Raises:
        BundleError: it wants a column that today's features lack.
    """
    users = _test_rows(run, test_date)
    incumbent.check_inputs(users.columns)
    says = _predict(users, list(incumbent.members.values()), run.config)
    answers = incumbent.fusion.apply({name: says[name].to_numpy() for name in incumbent.members})
    return pd.DataFrame({"user_key": says["user_key"], "incumbent": answers["expected_spend"]})


def _head_start(incumbent: Bundle, test_date: date) -> str:
    """A warning where the promoted bundle learned from spend that both are judged by."""
    theirs = str(incumbent.manifest["lineage"].get("test_date", ""))
    if theirs <= test_date.isoformat():
        return ""
    return f"; {incumbent.folder.name} was trained on labels up to {theirs}, some of which it is judged by here"


def _record_metrics(run: Run, metrics: pd.DataFrame, bundle: Bundle, test_date: date) -> None:
    rows = [
        {**row, "run_id": run.run_id, "bundle_digest": bundle.digest, "test_date": test_date}
        for row in metrics.to_dict("records")
    ]
    run.lakehouse.append(METRICS, run.spark.createDataFrame(rows, METRICS.schema))


def _publish(run: Run, bundle: Bundle, history: Sequence[Mapping[str, float]]) -> None:
    """Enter the bundle into the registry, where there is one."""
    if run.config.tracking.uri is None:
        return
    with run.stage("publish") as figures:
        try:
            published = tracking.publish(run.config, bundle, history, run.records[0]["started_at"])
        except TrackingError as error:
            raise TrackingError(
                f"{error}; the training is done and the bundle is written: bp-spark publish --bundle {bundle.folder}"
            ) from error
        figures["model"], figures["version"] = run.config.tracking.model, published.version
        figures[run.config.tracking.alias] = published.promoted


# --- backtest ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BacktestResult:
    """What a backtest came to.

    Attributes:
        tables: test date -> see :func:`bp_spark.bootstrap.compare`.
        report: the HTML page; its figures lie beside it.
        stages: what ran.
    """

    tables: Mapping[date, pd.DataFrame]
    report: Path
    stages: list[dict[str, Any]]


def backtest(
    spark: SparkSession, config: Config, test_dates: Sequence[date] = (), folds: int = 1, step_days: int = 28
) -> BacktestResult:
    """Train as of past dates with what was known by then, and hold the predictions against what was spent since.

    Each date has the pipeline's own training, into the tables ``user_features`` and ``training_set``; no bundle is written
    and none is promoted. Figures go to ``backtests`` date by date, so that a stopped backtest keeps what it has; the
    page and its figures go to a folder of ``evaluation.reports``.

    Args:
        test_dates: evaluation dates; by default the newest whose whole horizon has been seen, and ``folds - 1`` before it.
        folds: how many dates, where none are given.
        step_days: days between two of them.

    Raises:
        DataError: the horizon of a date is not over or the data don't reach back far enough for one, which is found
            before anything is trained; or no user has the bracket of ``evaluation.external_segment``.
    """
    # matplotlib takes a second to import: other stages don't pay for it
    from bp_spark import report

    horizon = timedelta(days=config.labels.horizon_days)
    lakehouse = Lakehouse(spark, config.tables)
    first, last = _span(lakehouse)
    newest = last - horizon
    dates = sorted(set(test_dates)) or [newest - timedelta(days=step_days * fold) for fold in reversed(range(folds))]
    for day in dates:
        if day > newest:
            raise DataError(
                "events", f"must reach to the end of the horizon of {day}; the newest test date is {newest}"
            )
    cutoffs = {day: labels.cutoffs(first, day, config.labels) for day in dates}
    brackets = _brackets(lakehouse, config.evaluation.external_segment)
    backtest_id, stages, finished = uuid.uuid4().hex[:12], [], []
    for day in dates:
        with _run(spark, config) as run:
            fitted = _fit_as_of(run, cutoffs[day], day, brackets)
            with run.stage("backtest") as figures:
                figures["test_date"], figures["backtest_id"] = day, backtest_id
                predictions, members = _with_mean(fitted)
                table = _compare(predictions, members, config)
                _record_backtest(run, table, backtest_id, day)
                drawn = report.figures(predictions, members, config.fusion.coverage, fitted.history)
                finished.append(report.Fold(day, table, drawn))
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


def _brackets(lakehouse: Lakehouse, segment: str | None) -> DataFrame | None:
    """``user_key, bracket``: the segment's newest value of each user that has one."""
    if segment is None:
        return None
    users = lakehouse.read("raw_users").select(
        F.trim(F.col("user_id")).alias("user_key"), F.element_at("segment", segment).alias("bracket"), "ingest_id"
    )
    newest = (
        users.filter("bracket IS NOT NULL").groupBy("user_key").agg(F.max_by("bracket", "ingest_id").alias("bracket"))
    )
    if newest.isEmpty():
        raise DataError("raw_users", f"no user has a segment {segment!r}", column="segment")
    return newest


def _with_mean(fitted: _Fitted) -> tuple[pd.DataFrame, list[str]]:
    """The predictions with one more peer: the plain mean of trees and transformer, which fusing has to beat."""
    if "transformer" not in fitted.names:
        return fitted.predictions, fitted.names
    mean = (fitted.predictions["trees"] + fitted.predictions["transformer"]) / 2
    return fitted.predictions.assign(**{MEAN: mean}), [*fitted.names[:-1], MEAN, "fused"]


def _compare(predictions: pd.DataFrame, members: Sequence[str], config: Config) -> pd.DataFrame:
    resamples, seed = config.evaluation.resamples, config.training.seed
    table = bootstrap.compare(predictions, members, resamples=resamples, seed=seed)
    segment = config.evaluation.external_segment
    if segment is None:
        return table
    outside = bootstrap.compare_with_brackets(predictions, members, segment, resamples=resamples, seed=seed)
    return pd.concat([table, outside], ignore_index=True)


def _record_backtest(run: Run, table: pd.DataFrame, backtest_id: str, test_date: date) -> None:
    same = {
        "backtest_id": backtest_id,
        "run_id": run.run_id,
        "test_date": test_date,
        "resamples": run.config.evaluation.resamples,
    }
    rows = [{**row, **same} for row in table.astype(object).where(table.notna(), None).to_dict("records")]
    run.lakehouse.append(BACKTESTS, run.spark.createDataFrame(rows, BACKTESTS.schema))


# --- search ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchResult:
    """What a search came to: every trial, the best one, the stages."""

    trials: Sequence[Trial]
    best: Trial
    stages: list[dict[str, Any]]


def search(spark: SparkSession, config: Config, test_date: date | None = None) -> SearchResult:
    """Try other settings on what is known as of a date, and tell which are best.

    A trial is judged by the fused prediction of users whom its members were not fitted on, at past cutoffs: nothing from
    the test date on is seen. Each leaves a row in ``trials`` and its settings in TensorBoard, beside the checkpoints; when
    the search ends, well or not, all become runs of MLflow (see :mod:`bp_spark.tracking`).

    Args:
        test_date: as in :func:`train`.

    Raises:
        DataError: no events, or too little history for one cutoff.
        ConfigError: no trial came to a figure.
        TrackingError: the store at ``tracking.uri`` can't be reached: before anything is done, or when all trials are in
            the table ``trials``.
    """
    tracking.check(config.tracking)
    # optuna and torch take seconds to import: other stages don't pay for them
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    from bp_spark.search import Search

    with _run(spark, config) as run:
        first, last = _span(run.lakehouse)
        day = test_date or last - timedelta(days=config.labels.horizon_days)
        rows, vocabulary, folder = _prepare(run, labels.cutoffs(first, day, config.labels), day)

        def judge(settings: Mapping[str, object]) -> float:
            trial = Run(spark, changed(config, settings))
            with TemporaryDirectory(dir=folder) as place:
                _, out_of_fold, _ = _cross_fit(trial, rows, day, vocabulary, Path(place), refit=False)
            fusion = Fusion.fit(out_of_fold, trial.config.fusion)
            said = fusion.apply({name: out_of_fold[name].to_numpy() for name in fusion.members})["expected_spend"]
            return evaluation.evaluate(out_of_fold["label_spend"].to_numpy(), said)[config.search.metric]

        now = {key: reduce(getattr, key.split("."), config) for key in config.search.space}
        found = Search(config.search, now, judge, config.training.seed)
        with run.stage("search") as figures, SummaryWriter(str(folder / "search")) as writer:
            try:
                for trial in tqdm(
                    found.run(), total=config.search.trials, desc="search", unit="trial", file=sys.stderr
                ):
                    _record_trial(run, trial, day)
                    shown = {
                        key: value if isinstance(value, (bool, int, float)) else str(value)
                        for key, value in trial.settings.items()
                    }
                    writer.add_hparams(shown, {config.search.metric: trial.value}, run_name=str(trial.number))
            finally:
                tracking.record_search(
                    config.tracking, config.search, run.run_id, day, found.trials, ended=datetime.now(UTC)
                )
            best = found.best
            if best is None:
                raise ConfigError(f"search: no trial came to a figure; the first: {found.trials[0].error}")
            figures["trials"], figures["best"], figures[config.search.metric] = (
                len(found.trials),
                best.number,
                best.value,
            )
        return SearchResult(found.trials, best, run.records)


def _record_trial(run: Run, trial: Trial, test_date: date) -> None:
    row = {
        "run_id": run.run_id,
        "test_date": test_date,
        "trial": trial.number,
        "settings": {key: str(value) for key, value in trial.settings.items()},
        "metric": run.config.search.metric,
        "value": None if math.isnan(trial.value) else trial.value,
        "seconds": trial.seconds,
        "error": trial.error,
    }
    run.lakehouse.append(TRIALS, run.spark.createDataFrame([row], TRIALS.schema))


# --- score -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreResult:
    """What a night came to.

    Attributes:
        users: rows of the night.
        computed: users whose score was computed; the others' was carried forward from an earlier night.
        written: whether rows were written; False: they were there already.
        bundle: the model.
        stages: what ran.
    """

    users: int
    computed: int
    written: bool
    bundle: Bundle
    stages: list[dict[str, Any]]


def score(
    spark: SparkSession, config: Config, score_date: date, chosen: str | Path | None = None, full: bool = False
) -> ScoreResult:
    """Score every user of a date and overwrite that date in ``scores``.

    A night that was scored with the same bundle on the same features is left as it is. Of any other, users whose features
    are those of the newest night that the same bundle scored keep that night's score.

    Args:
        chosen: a bundle's folder, or its address in the registry as ``models:/NAME@ALIAS``; by default the bundle that
            ``bundles/current`` names.
        full: compute every user's score, whatever earlier nights said.

    Raises:
        BundleError: no bundle is promoted, or it can't be trusted or doesn't fit the features.
        DataError: there are no features of that date.
        TrackingError: the registry can't be reached.
    """
    with _run(spark, config) as run:
        lakehouse = run.lakehouse
        if str(chosen).startswith(tracking.SCHEME):
            bundle = tracking.fetch(config, str(chosen))
        else:
            bundle = bundles.load(chosen or bundles.current(config.bundles))
        users = lakehouse.read("user_features").filter(F.col("as_of_date") == F.lit(score_date))
        source = {row["built_from"]: row["count"] for row in users.groupBy("built_from").count().collect()}
        if not source:
            raise DataError(
                "user_features", f"holds no rows of {score_date}; run featurize for it", column="as_of_date"
            )
        inputs, expected = digest(__version__, bundle.digest, sorted(source)), sum(source.values())
        with run.stage("score", inputs) as figures:
            written = full or not _scored(run, inputs, score_date, expected)
            if written:
                print(f"scoring {expected:,} users of {score_date}{_estimate(run, expected)}", file=sys.stderr)
                earlier = None if full else _earlier_night(run, bundle, score_date)
                rows = _night(users, earlier, bundle, score_date, lakehouse.version("user_features"))
                with scoring.sized(spark, config.scoring):
                    lakehouse.replace(SCORES, rows, where={"score_date": [score_date]}, inputs=inputs)
            else:
                figures["status"] = "unchanged"
            _refresh_latest(run, inputs)
            count, computed = _checked(lakehouse, score_date, expected)
            figures["users"], figures["computed"] = count, computed if written else 0
            figures["score_date"], figures["bundle"] = score_date, bundle.digest
        return ScoreResult(count, computed if written else 0, written, bundle, run.records)


def _night(
    users: DataFrame, earlier: DataFrame | None, bundle: Bundle, score_date: date, features_version: int
) -> DataFrame:
    """Rows of SCORES of all users."""
    if earlier is None:
        return scoring.score(users, bundle, score_date, features_version)
    fresh = scoring.score(scoring.changed(users, earlier), bundle, score_date, features_version)
    return fresh.unionByName(scoring.carried(users, earlier, score_date))


def _nights(run: Run) -> DataFrame | None:
    """Rows of ``runs`` of the nights that were scored; ``None`` where none can have been."""
    lakehouse = run.lakehouse
    if not (lakehouse.exists("scores") and lakehouse.exists("runs")):
        return None
    return lakehouse.read("runs").filter((F.col("stage") == "score") & (F.col("status") == "done"))


def _estimate(run: Run, users: int) -> str:
    """How long so many users take at most, in words, by the newest night that computed any."""
    nights = _nights(run)
    if nights is None:
        return ""
    computed = F.element_at("figures", "computed").cast("long")
    newest = (
        nights.filter(computed > 0).orderBy(F.desc("started_at")).select("seconds", computed.alias("computed")).first()
    )
    if newest is None:
        return ""
    seconds = newest["seconds"] * max(1.0, users / newest["computed"])
    return f": at most about {timedelta(seconds=math.ceil(seconds))}, by the last night"


def _earlier_night(run: Run, bundle: Bundle, score_date: date) -> DataFrame | None:
    """Scores of the newest night up to this date that the same bundle and code made."""
    nights = _nights(run)
    if nights is None:
        return None
    scored_date = F.to_date(F.element_at("figures", "score_date"))
    theirs = (F.element_at("figures", "bundle") == bundle.digest) & (scored_date <= F.lit(score_date))
    newest = nights.filter(theirs).agg(F.max(scored_date)).first()
    if newest is None or newest[0] is None:
        return None
    made_by = (F.col("bundle_digest") == bundle.digest) & (F.col("code_version") == __version__)
    return run.lakehouse.read("scores").filter((F.col("score_date") == F.lit(newest[0])) & made_by)


def _scored(run: Run, inputs: str, score_date: date, users: int) -> bool:
    """Whether the newest run that wrote this date scored it from these inputs and its rows are there."""
    nights = _nights(run)
    if nights is None:
        return False
    of_date = nights.filter(F.element_at("figures", "score_date") == str(score_date))
    newest = of_date.orderBy(F.desc("started_at")).select("inputs").first()
    if newest is None or newest[0] != inputs:
        return False
    return run.lakehouse.read("scores").filter(F.col("score_date") == F.lit(score_date)).count() == users


def _refresh_latest(run: Run, inputs: str) -> None:
    lakehouse = run.lakehouse
    scores = lakehouse.read("scores")
    newest = scores.agg(F.max("score_date")).first()
    assert newest is not None
    version = digest(inputs, lakehouse.version("scores"))
    if lakehouse.inputs("scores_latest") != version:
        rows = scores.filter(F.col("score_date") == F.lit(newest[0]))
        lakehouse.replace(SCORES_LATEST, rows, inputs=version)


def _checked(lakehouse: Lakehouse, score_date: date, users: int) -> tuple[int, int]:
    """Rows of a night, and how many of them it computed itself.

    Raises:
        DataError: there isn't one row for each user.
    """
    night = lakehouse.read("scores").filter(F.col("score_date") == F.lit(score_date))
    counted = night.agg(
        F.count(F.lit(1)).alias("rows"),
        F.count_distinct("user_key").alias("users"),
        F.count_if(F.col("computed_on") == F.lit(score_date)).alias("computed"),
    ).first()
    assert counted is not None
    if not counted["rows"] == counted["users"] == users:
        raise DataError(
            "scores", f"must hold one row for each of {users} users", column="user_key", count=counted["rows"]
        )
    return counted["rows"], counted["computed"]
