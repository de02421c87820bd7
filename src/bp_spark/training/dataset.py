"""Build the inputs of a training: the labelled training set, the vocabulary of texts, and the users of the test date."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from safetensors.numpy import save_file

from bp_spark.core import disk
from bp_spark.core.config import Config, digest
from bp_spark.core.errors import BundleError, DataError
from bp_spark.core.version import __version__
from bp_spark.features import catalogue as features
from bp_spark.features import labels
from bp_spark.features.aggregates import SEQUENCE_COLUMNS
from bp_spark.features.definition import KEY
from bp_spark.features.job import features_digest, write_features
from bp_spark.ingest import texts
from bp_spark.ingest.clean import span
from bp_spark.lakehouse.run import Run, Step
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import GIVEN_LABELS
from bp_spark.registry import bundle as bundles

logger = logging.getLogger(__name__)

_HASHES = 1_000_000
_FILES_PER_RANK = 4
"""Files of each partition that a rank reads, so that ranks have similar numbers of rows."""


class Plan(NamedTuple):
    """What a training goes by: the days of the first and of the last event, the test date, and the settings."""

    first_event: date
    last_event: date
    test_date: date
    config: Config


def plan(lakehouse: Lakehouse, config: Config, test_date: date | None) -> Plan:
    """Return the plan of a training.

    Args:
        lakehouse: the tables.
        config: settings.
        test_date: the test date. By default it is the newest whose whole horizon was seen, of a horizon that the events allow:
            see :func:`with_horizon_in_reach`.

    Raises:
        DataError: there are no events, they are too few for any horizon, or the promoted bundle predicts more days than they
            allow.
    """
    first, last = span(lakehouse)
    if test_date is None:
        config = with_horizon_in_reach(config, first, last)
        test_date = last - timedelta(days=config.labels.horizon_days)
    return Plan(first, last, test_date, config)


def with_horizon_in_reach(config: Config, first_event: date, last_event: date) -> Config:
    """Return the settings of a training: with a shorter horizon, and a warning, where events allow no longer one.

    Args:
        config: settings; see ``labels.shorter_horizons``.
        first_event: day of the first event.
        last_event: day of the last event.

    Raises:
        DataError: events are too few for any horizon, or the promoted bundle predicts more days than they allow.
    """
    shorter = labels.with_horizon_in_reach(config.labels, first_event, last_event)
    if not shorter.is_shortened:
        return config
    configured, days = config.labels.horizon_days, shorter.horizon_days
    known, needed = (last_event - first_event).days, labels.days_needed(configured)
    too_few = f"reach over {known} days; to predict {configured} takes {needed}, and they allow {days}"
    if (promoted := _promoted_horizon(config)) > days:
        reason = f"{too_few}, but the promoted bundle predicts {promoted} and stays"
        raise DataError("events", reason, column="event_date")
    logger.warning("events %s: scores, intervals and levels are of %d days until a later training", too_few, days)
    return config.model_copy(update={"labels": shorter})


def _promoted_horizon(config: Config) -> int:
    """Return the days that the promoted bundle predicts, the configured ones at most; 0 where none can be used."""
    if not bundles.is_any_promoted(config.bundles):
        return 0
    try:
        return min(bundles.load_promoted(config).horizon_days, config.labels.horizon_days)
    except BundleError:
        return 0


def prepare(
    run: Run, dates: Sequence[date], test_date: date, unlabelled: Sequence[date] = ()
) -> tuple[int, Path, Path]:
    """Write features, training set and vocabulary as of a test date.

    Args:
        run: the running job.
        dates: cutoffs whose whole horizon was seen; newer cutoffs are added, see :func:`labels.recent_cutoffs`.
        test_date: date from which on nothing is seen.
        unlabelled: further dates to write features of, and no labels.

    Returns:
        The version of ``training_set``, the file of the vocabulary, and the folder for work files.
    """
    dates = [*dates, *labels.recent_cutoffs(dates[-1], test_date, run.config.labels)]
    write_features(run, [*unlabelled, *dates, test_date])
    version = write_training_set(run, dates, test_date)
    folder = _work_folder(run)
    return version, write_vocabulary(run, test_date, folder), folder


def write_training_set(run: Run, dates: Sequence[date], test_date: date) -> int:
    """Label the features of past cutoffs and write them to ``training_set``.

    Args:
        run: the running job.
        dates: cutoffs to label.
        test_date: date from which on no spend is seen.

    Returns:
        The version that holds the rows. A reader of that version is not disturbed by another training, backtest or search.
    """
    lakehouse, config = run.lakehouse, run.config
    source = lakehouse.read("user_features").filter(F.col("as_of_date").isin(*dates))
    survey = survey_labels(run, test_date)
    inputs = digest(
        __version__,
        config.labels,
        config.features,
        lakehouse.version("user_features"),
        lakehouse.version("user_daily"),
        dates,
        test_date,
        survey and survey.digest,
    )
    table = labels.training_set_table(config.features, config.labels.other_horizons)
    with run.step("label", table, inputs) as step:
        if step.unchanged:
            return step.version
        daily = lakehouse.read("user_daily")
        factors = labels.exposure_factors(source.select(*KEY), daily, dates, test_date, config.labels)
        step.figures.update({f"factor_{days}_days": f"{factor:.3f}" for days, factor in factors.items()})
        rows = _labelled(run, source, dates, test_date, factors)
        if survey:
            # a survey label covers the whole horizon, spend so far only a part of it: the survey label wins
            observed = rows.join(survey.rows, KEY, "left_anti")
            rows = observed.unionByName(_labelled_by_survey(run, survey, test_date))
        rows = spread(labels.without_holdout(rows, config.labels), config, "complete", "fold")
        version = step.replace(rows)
        step.figures["rows_in"] = source.count()
        step.figures["rows"] = step.figures["rows_out"] = lakehouse.read("training_set", version).count()
        step.figures["dates"] = len(dates)
        if survey:
            step.figures["given"] = lakehouse.read("training_set", version).filter("given").count()
        return version


def _labelled(
    run: Run, users: DataFrame, dates: Sequence[date], test_date: date, factors: Mapping[int, float]
) -> DataFrame:
    """Add labels from the spend before the test date, of the horizon and of the others, and the weights of rows."""
    config, daily = run.config.labels, run.lakehouse.read("user_daily")
    spend = labels.future_spend(daily, dates, config.horizon_days, test_date)
    rows = labels.with_other_horizons(labels.join_labels(users, spend), daily, dates, config.other_horizons, test_date)
    return labels.add_weights(rows, test_date, config, factors)


class _SurveyLabels(NamedTuple):
    """Survey labels that a training may see, their as-of dates, and a digest of their content."""

    rows: DataFrame
    dates: list[date]
    digest: str


def survey_labels(run: Run, test_date: date) -> _SurveyLabels | None:
    """Return the survey labels that were given before a test date; ``None`` if there are none.

    Survey labels are of the configured horizon. A training that predicts a shorter one gets none.
    """
    if not run.lakehouse.exists(GIVEN_LABELS.name):
        return None
    if run.config.labels.is_shortened:
        logger.warning("given_labels are of labels.horizon_days, and a shorter horizon is predicted: left out")
        return None
    rows = labels.survey_labels_before(run.lakehouse.read(GIVEN_LABELS.name), test_date, run.config.labels)
    # a digest of the rows, not the table's version: later labels, and maintenance, are no reason to train again
    content = rows.groupBy("as_of_date").agg(F.count(F.lit(1)), F.bit_xor(F.xxhash64(*rows.columns)))
    by_date = [tuple(row) for row in content.orderBy("as_of_date").collect()]
    return _SurveyLabels(rows, [day for day, *_ in by_date], digest(by_date)) if by_date else None


def _labelled_by_survey(run: Run, survey: _SurveyLabels, test_date: date) -> DataFrame:
    """Compute the features of the surveyed users, and join their labels."""
    config, daily = run.config, run.lakehouse.read("user_daily")
    # features of these users alone: those of all users of a date would be a waste for a few labels
    surveyed_users = features.user_features(
        daily, survey.dates, config.features, features_digest(run), users=survey.rows.select("user_key")
    )
    rows = labels.join_survey_labels(surveyed_users, survey.rows, test_date, config.labels)
    return labels.with_other_horizons(rows, daily, survey.dates, config.labels.other_horizons, test_date)


def write_pretraining_set(run: Run, test_date: date) -> tuple[str, int]:
    """Write the histories as of the test date, without holdout users, to ``pretraining_set``.

    Returns:
        The location of the table, and the version that holds the rows.
    """
    lakehouse, config = run.lakehouse, run.config
    inputs = digest(
        __version__, config.labels, lakehouse.version("user_features"), config.training.processes, test_date
    )
    table = labels.pretraining_set_table()
    step = Step.begin(lakehouse, table, inputs)
    if not step.unchanged:
        users = lakehouse.read("user_features").filter(F.col("as_of_date") == F.lit(test_date))
        rows = labels.without_holdout(users, config.labels).select(*table.schema.names)
        step.replace(spread(rows, config, "fold"))
    return lakehouse.location("pretraining_set"), step.version


def spread(rows: DataFrame, config: Config, *partitions: str) -> DataFrame:
    """Spread the rows of each partition over a few files for each rank: ranks divide the row groups of the files."""
    files = math.ceil(_FILES_PER_RANK * config.training.processes / config.labels.folds)
    file_number = F.pmod(F.xxhash64("user_key", "as_of_date"), F.lit(files))
    by_file = rows.repartition(files * config.labels.folds, *partitions, file_number)
    return by_file.sortWithinPartitions(*partitions, "user_key", "as_of_date")


def _work_folder(run: Run) -> Path:
    """Return the folder of work files, which changes with the settings and data that a training depends on."""
    # another address of the registry or of the secret, other alarms or questions, are no reason to train again
    folder = Path(run.config.training.work_dir).absolute() / digest(
        run.config.model_dump(exclude={"tracking", "privacy", "drift", "fairness", "labelling", "prospects"}),
        run.lakehouse.location("training_set"),
        run.lakehouse.inputs("training_set"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_vocabulary(run: Run, test_date: date, folder: Path) -> Path:
    """Write the most frequent texts before the test date, with their embeddings, to a safetensors file.

    For a language model that reads histories, the file also has the tokens of the texts.

    Args:
        run: the running job.
        test_date: date from which on events are not counted.
        folder: folder of the file.

    Raises:
        DataError: the configured language model has embedded no text yet.
    """
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
    with disk.writing(path):
        save_file(arrays, path)
    return path


def _tokens(run: Run, text_ids: pd.Series) -> dict[str, np.ndarray]:
    """Return the tokens that events are written with: those of words, and of the texts in their order."""
    # torch takes seconds to import, and a platform without a sequence model doesn't need it
    from bp_spark.model.text_history import tokenise

    config = run.config
    vocabulary = run.spark.createDataFrame([(int(text_id),) for text_id in text_ids], "text_id bigint")
    rows = run.lakehouse.read("texts").join(F.broadcast(vocabulary), "text_id").select("text_id", "text").toPandas()
    ordered = rows.set_index("text_id")["text"].reindex(text_ids).fillna("").to_list()
    folder, network = texts.model_folder(config.history_model), config.network.text
    table = tokenise(ordered, folder, config.texts.max_tokens, network.max_tokens)
    return {"tokens": table.tokens.numpy(), "token_lengths": table.lengths.numpy()}


def users_of_test_date(run: Run, test_date: date) -> DataFrame:
    """Return users of the test date with their spend after it; ``seen`` is false for users that no model was fitted on."""
    lakehouse, config = run.lakehouse, run.config.labels
    users = lakehouse.read("user_features").filter(F.col("as_of_date") == F.lit(test_date))
    daily = lakehouse.read("user_daily")
    rows = labels.join_labels(users, labels.future_spend(daily, [test_date], config.horizon_days))
    _, last = span(lakehouse)
    rows = labels.with_other_horizons(rows, daily, [test_date], config.other_horizons, last)
    return rows.withColumn("seen", labels.fold(config) != labels.HOLDOUT)


def collect_sample(rows: DataFrame, members: Collection[str], config: Config) -> pd.DataFrame:
    """Return :func:`sample` on the driver, with histories only if one of the members, by name, reads them."""
    if "transformer" not in members:
        rows = without_histories(rows)
    # as Arrow, for toPandas makes a Python object of each value
    frame: pd.DataFrame = sample(rows, config).toArrow().to_pandas()
    return frame


def without_histories(rows: DataFrame) -> DataFrame:
    """Drop the events of users, which are most of a row."""
    return rows.drop(*[column.name for column in SEQUENCE_COLUMNS])


def sample(rows: DataFrame, config: Config) -> DataFrame:
    """Take at most about ``evaluation.max_users`` of the rows, by a hash of the user."""
    total, most = rows.count(), config.evaluation.max_users
    if total <= most:
        return rows
    return rows.filter(F.pmod(F.xxhash64("user_key"), F.lit(_HASHES)) < int(_HASHES * most / total))
