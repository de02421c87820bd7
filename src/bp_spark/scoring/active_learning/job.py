"""The jobs of active learning: select the users to ask, and store the labels that they or a reviewer gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import BooleanType, StructField, StructType

from bp_spark.core.config import Config, digest
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.session import checkpointed
from bp_spark.core.version import __version__
from bp_spark.features import catalogue as features
from bp_spark.features import labels
from bp_spark.features.definition import KEY
from bp_spark.ingest import pseudonyms
from bp_spark.ingest.clean import span
from bp_spark.ingest.job import require_same_secret
from bp_spark.lakehouse.run import Run, Step, recorded
from bp_spark.lakehouse.schema import Table
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import GIVEN_LABELS, LABEL_REQUESTS
from bp_spark.registry import bundle as bundles
from bp_spark.scoring.active_learning.files import read_labels, require_known_users, write_questions
from bp_spark.scoring.active_learning.selection import MAX_BUDGET, select_users
from bp_spark.scoring.job import features_of_date, require_same_features

DATED = StructField("dated", BooleanType())
"""Whether the file itself says when a label was given."""


@dataclass(frozen=True)
class SelectResult:
    """The users to ask.

    Attributes:
        asked: ``user_key, as_of_date, rank, disagreement, expected_spend``, by rank.
        written: Whether the requests were written; ``False`` if the same call wrote them before.
        stages: The stages that ran.
    """

    asked: pd.DataFrame
    written: bool
    stages: list[dict[str, Any]]


def select_labels(
    spark: SparkSession, config: Config, as_of_date: date, budget: int, output: Path | None = None
) -> SelectResult:
    """Select the users of a date whose label would help the promoted bundle most, and write them to ``label_requests``.

    Users held out of all fitting, users with a label of the date, and users with an unanswered request are left out. The same
    call on the same features, bundle and labels gives the same users and writes nothing. When labels came in, it selects
    further users.

    Args:
        spark: The session.
        config: All settings.
        as_of_date: A date with features.
        budget: Users to select, at most :data:`bp_spark.scoring.active_learning.selection.MAX_BUDGET`.
        output: File of questions: user, date, and an empty column for the answer.

    Raises:
        BundleError: No bundle is promoted, it can't be trusted or doesn't fit the features, or it has only one member.
        ConfigError: The budget is out of its bounds.
        DataError: There are no features of that date.
    """
    if not 1 <= budget <= MAX_BUDGET:
        raise ConfigError(f"select-labels: the budget must be 1 to {MAX_BUDGET:,}, is {budget:,}")
    with recorded(spark, config, "select-labels") as run:
        lakehouse = run.lakehouse
        bundle = bundles.load_promoted(config)
        require_same_features(bundle, config)
        users = features_of_date(lakehouse, as_of_date, lakehouse.version("user_features"))
        source = sorted(row[0] for row in users.select("built_from").distinct().collect())
        if not source:
            raise DataError(
                "user_features", f"holds no rows of {as_of_date}; run featurize for it", column="as_of_date"
            )
        inputs = digest(
            *(__version__, bundle.digest, source, as_of_date, budget, config.labelling.candidates_per_label),
            *(config.labels, _labelled_users_digest(lakehouse)),
        )
        with run.step("select labels", LABEL_REQUESTS, inputs, as_of_date=str(as_of_date)) as step:
            asking_run = _run_that_asked(lakehouse, step)
            is_new = asking_run is None
            if asking_run is None:
                askable_users = _without_asked(lakehouse, labels.without_holdout(users, config.labels), as_of_date)
                catalogue = features.catalogue(config.features)
                chosen = select_users(askable_users, bundle, catalogue, budget, config.labelling, as_of_date)
                same_in_all_rows = {
                    "as_of_date": as_of_date,
                    "bundle_digest": bundle.digest,
                    "run_id": run.run_id,
                    "requested_at": datetime.now(UTC),
                }
                rows = [{**row, **same_in_all_rows} for row in chosen.to_dict("records")]
                step.append(_frame(run, rows, LABEL_REQUESTS), run_id=run.run_id)
                asking_run = run.run_id
            stored = lakehouse.read(LABEL_REQUESTS.name).filter(F.col("run_id") == asking_run)
            shown = ("user_key", "as_of_date", "rank", "disagreement", "expected_spend")
            asked = stored.select(*shown).toPandas().sort_values("rank").reset_index(drop=True)
            step.figures["rows_out"] = len(asked) if is_new else 0
            step.figures["users"], step.figures["bundle"] = len(asked), bundle.digest
        if output is not None:
            write_questions(output, asked)
        return SelectResult(asked, is_new, run.records)


def add_labels(spark: SparkSession, config: Config, path: Path) -> list[dict[str, Any]]:
    """Store labels that a survey or a reviewer gave, from a file that is used whole or not at all.

    A label replaces an older one of the same user and date. A label that equals the stored one changes nothing, so the same
    file can be added twice.

    Args:
        spark: The session.
        config: All settings.
        path: See :func:`bp_spark.scoring.active_learning.files.read_labels`.

    Returns:
        The stages that ran, as in ``runs``.

    Raises:
        ConfigError: The file has user ids, and the secret is missing or isn't the one that made the keys.
        DataError: Nothing was ingested yet, or the file breaks a rule and nothing was written.
    """
    with recorded(spark, config, "add-labels") as run:
        lakehouse = run.lakehouse
        users = lakehouse.read("user_keys")
        now = datetime.now(UTC)
        with run.step("add labels", GIVEN_LABELS) as step:
            first_event, _ = span(lakehouse)
            file = read_labels(path, first_event, now.date(), config.labelling)
            label_keys = [label.user for label in file.labels]
            if file.user_column == "user_id":
                secret = pseudonyms.load_secret(config.privacy.secret)
                require_same_secret(lakehouse, secret)
                label_keys = [secret.key_of(user_id) for user_id in label_keys]
            keys = spark.createDataFrame([(key,) for key in sorted(set(label_keys))], "user_key string")
            known_users = users.join(F.broadcast(keys), "user_key", "left_semi").select("user_key")
            require_known_users(path, file, label_keys, {row[0] for row in known_users.collect()})
            rows = [
                {
                    "user_key": key,
                    "as_of_date": label.as_of_date,
                    "spend": label.spend,
                    "source": label.source,
                    "given_at": label.given_at or now,
                    "dated": label.given_at is not None,
                    "run_id": run.run_id,
                }
                for key, label in zip(label_keys, file.labels, strict=True)
            ]
            new_labels = checkpointed(_new_labels(lakehouse, _frame(run, rows, GIVEN_LABELS, DATED)))
            step.figures["rows_in"], step.figures["unanswered"] = len(rows), file.unanswered
            step.figures["rows_out"] = count = new_labels.count()
            if count:
                dates = sorted({label.as_of_date for label in file.labels})
                step.merge(new_labels, within={"as_of_date": dates})
            # trainings can't use the label of a user who had never bought before the date: there are no features
            step.figures["given_in_all"] = lakehouse.read(GIVEN_LABELS.name).count()
        return run.records


def _run_that_asked(lakehouse: Lakehouse, step: Step) -> str | None:
    """Return the run that asked last for the date, if it had the same inputs and its requests still exist."""
    if not step.unchanged:
        return None
    asking_run = str(step.previous["run_id"])
    requests = lakehouse.read(LABEL_REQUESTS.name).filter(F.col("run_id") == asking_run)
    return None if requests.isEmpty() else asking_run


def _new_labels(lakehouse: Lakehouse, survey_labels: DataFrame) -> DataFrame:
    """Return the labels that are neither stored nor older than the stored ones."""
    if not lakehouse.exists(GIVEN_LABELS.name):
        return survey_labels
    stored = lakehouse.read(GIVEN_LABELS.name).alias("s")
    t, s = ({name: F.col(f"{side}.{name}") for name in survey_labels.columns if name != "dated"} for side in "ts")
    same = (t["spend"] == s["spend"]) & t["source"].eqNullSafe(s["source"])
    is_older = t["given_at"] < s["given_at"]
    stored_stays = (same & ~F.col("t.dated")) | (same & (t["given_at"] == s["given_at"])) | is_older
    same_key = (t["user_key"] == s["user_key"]) & (t["as_of_date"] == s["as_of_date"])
    return survey_labels.alias("t").join(stored, same_key & stored_stays, "left_anti")


def _without_asked(lakehouse: Lakehouse, users: DataFrame, as_of_date: date) -> DataFrame:
    """Leave out users with a label of the date, and users with a request that waits for its answer."""
    survey_labels = lakehouse.read(GIVEN_LABELS.name) if lakehouse.exists(GIVEN_LABELS.name) else None
    if survey_labels is not None:
        labelled_users = survey_labels.filter(F.col("as_of_date") == F.lit(as_of_date)).select("user_key")
        users = users.join(labelled_users, "user_key", "left_anti")
    if lakehouse.exists(LABEL_REQUESTS.name):
        waiting = lakehouse.read(LABEL_REQUESTS.name).select(*KEY)
        if survey_labels is not None:
            waiting = waiting.join(survey_labels.select(*KEY), KEY, "left_anti")
        users = users.join(waiting.select("user_key").distinct(), "user_key", "left_anti")
    return users


def _labelled_users_digest(lakehouse: Lakehouse) -> str:
    """Return a digest of the users and dates that have labels: as long as it is the same, the same requests wait."""
    if not lakehouse.exists(GIVEN_LABELS.name):
        return ""
    keys = F.bit_xor(F.xxhash64(*KEY))
    return str(lakehouse.read(GIVEN_LABELS.name).agg(F.count(F.lit(1)), keys).collect()[0])


def _frame(run: Run, rows: Sequence[Mapping[str, Any]], table: Table, *more: StructField) -> DataFrame:
    """Return rows of the driver with the columns of a table, and more."""
    schema = StructType([*table.schema.fields, *more])
    return run.spark.createDataFrame([tuple(row[name] for name in schema.names) for row in rows], schema)
