"""Labels by asking: users selected whose label would help most, and what they or a reviewer answered stored for training."""

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
from bp_spark.features.job import require_same_secret, span
from bp_spark.ingest import pseudonyms
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.tables import GIVEN_LABELS, LABEL_REQUESTS, Lakehouse, Table
from bp_spark.registry.bundle import load_promoted
from bp_spark.scoring import active_learning
from bp_spark.scoring.job import features_of, require_same_features

DATED = StructField("dated", BooleanType())
"""Whether a file says itself when a label was given."""


@dataclass(frozen=True)
class SelectResult:
    """Who is asked.

    Attributes:
        asked: ``user_key, as_of_date, rank, disagreement, expected_spend``, by rank.
        written: whether the requests were written; False: the same call wrote them already.
        stages: what ran.
    """

    asked: pd.DataFrame
    written: bool
    stages: list[dict[str, Any]]


def select_labels(
    spark: SparkSession, config: Config, as_of_date: date, budget: int, output: Path | None = None
) -> SelectResult:
    """Select the users of a date whose label would help the promoted bundle most, and write them to ``label_requests``.

    Left out are users that are held out of all fitting, whom a label of the date was given of, and who were asked before, of
    whatever date, and haven't answered. The same call on the same features, bundle and labels gives the same users and writes
    nothing; when labels came in, it selects further ones.

    Args:
        budget: how many users, at most :data:`bp_spark.scoring.active_learning.MAX_BUDGET`.
        output: file for whoever asks: who, of which date, and an empty column for the answer.

    Raises:
        BundleError: no bundle is promoted, it can't be trusted or doesn't fit the features, or it has one member only.
        ConfigError: the budget is not in its bounds.
        DataError: there are no features of that date.
    """
    if not 1 <= budget <= active_learning.MAX_BUDGET:
        raise ConfigError(f"select-labels: the budget must be 1 to {active_learning.MAX_BUDGET:,}, is {budget:,}")
    with recorded(spark, config, "select-labels") as run:
        lakehouse = run.lakehouse
        bundle = load_promoted(config)
        require_same_features(bundle, config)
        users = features_of(lakehouse, as_of_date, lakehouse.version("user_features"))
        source = sorted(row[0] for row in users.select("built_from").distinct().collect())
        if not source:
            raise DataError(
                "user_features", f"holds no rows of {as_of_date}; run featurize for it", column="as_of_date"
            )
        inputs = digest(
            *(__version__, bundle.digest, source, as_of_date, budget, config.labelling.candidates_per_label),
            *(config.labels, _given_digest(lakehouse)),
        )
        with run.stage("select labels", inputs) as figures:
            before = lakehouse.commit_metadata(LABEL_REQUESTS.name)
            asked_by = _run_that_asked(lakehouse, as_of_date, inputs)
            written = asked_by is None
            if asked_by is None:
                open_to = _not_asked(lakehouse, labels.without_holdout(users, config.labels), as_of_date)
                catalogue = features.catalogue(config.features)
                found = active_learning.selected(open_to, bundle, catalogue, budget, config.labelling, as_of_date)
                more = {
                    "as_of_date": as_of_date,
                    "bundle_digest": bundle.digest,
                    "run_id": run.run_id,
                    "requested_at": datetime.now(UTC),
                }
                rows = [{**row, **more} for row in found.to_dict("records")]
                note = {"as_of_date": str(as_of_date), "run_id": run.run_id}
                lakehouse.append(
                    LABEL_REQUESTS, _frame(run, rows, LABEL_REQUESTS), inputs=inputs, note=note, after=before["version"]
                )
                asked_by = run.run_id
            else:
                figures["status"] = "unchanged"
            stored = lakehouse.read(LABEL_REQUESTS.name).filter(F.col("run_id") == asked_by)
            shown = ("user_key", "as_of_date", "rank", "disagreement", "expected_spend")
            asked = stored.select(*shown).toPandas().sort_values("rank").reset_index(drop=True)
            figures["rows_out"] = len(asked) if written else 0
            figures["users"], figures["bundle"] = len(asked), bundle.digest
        if output is not None:
            active_learning.write_questions(output, asked)
        return SelectResult(asked, written, run.records)


def add_labels(spark: SparkSession, config: Config, path: Path) -> list[dict[str, Any]]:
    """Store labels that a survey or a reviewer gave, from a file that is whole or not used at all.

    A label replaces an older one of the same user and date. One that says what is stored already stays as it is, so that the
    same file twice changes nothing.

    Args:
        path: see :func:`bp_spark.scoring.active_learning.read_labels`.

    Returns:
        The stages that ran, as in ``runs``.

    Raises:
        ConfigError: the file has user ids, and the secret is missing or isn't the one that the keys were made with.
        DataError: nothing was ingested yet; the file breaks a rule, and nothing was written.
    """
    with recorded(spark, config, "add-labels") as run:
        lakehouse = run.lakehouse
        users = lakehouse.read("user_keys")
        now = datetime.now(UTC)
        with run.stage("add labels") as figures:
            first, _ = span(lakehouse)
            file = active_learning.read_labels(path, first, now.date(), config.labelling)
            given = [label.user for label in file.labels]
            if file.user_column == "user_id":
                secret = pseudonyms.load_secret(config.privacy.secret)
                require_same_secret(lakehouse, secret)
                given = [secret.key_of(user) for user in given]
            keys = spark.createDataFrame([(key,) for key in sorted(set(given))], "user_key string")
            known = {
                row[0] for row in users.join(F.broadcast(keys), "user_key", "left_semi").select("user_key").collect()
            }
            active_learning.require_known(path, file, given, known)
            told = [
                {
                    "user_key": key,
                    "as_of_date": label.as_of_date,
                    "spend": label.spend,
                    "source": label.source,
                    "given_at": label.given_at or now,
                    "dated": label.given_at is not None,
                    "run_id": run.run_id,
                }
                for key, label in zip(given, file.labels, strict=True)
            ]
            done = lakehouse.commit_metadata(GIVEN_LABELS.name)
            news = checkpointed(_news(lakehouse, _frame(run, told, GIVEN_LABELS, DATED)))
            figures["rows_in"], figures["unanswered"] = len(told), file.unanswered
            figures["rows_out"] = count = news.count()
            if count:
                dates = sorted({label.as_of_date for label in file.labels})
                lakehouse.merge(GIVEN_LABELS, news, within={"as_of_date": dates}, after=done["version"])
            else:
                figures["status"] = "unchanged"
            stored = lakehouse.read(GIVEN_LABELS.name)
            # who has never bought before the date has no features on it, and trainings can't learn from the label
            figures["given_in_all"] = stored.count()
        return run.records


def _run_that_asked(lakehouse: Lakehouse, as_of_date: date, inputs: str) -> str | None:
    """The run that asked last of the date, if it did so by the same inputs and its questions are there still."""
    done = lakehouse.commit_metadata(LABEL_REQUESTS.name, as_of_date=str(as_of_date))
    if done.get("inputs") != inputs:
        return None
    theirs = lakehouse.read(LABEL_REQUESTS.name).filter(F.col("run_id") == done["run_id"])
    return None if theirs.isEmpty() else str(done["run_id"])


def _news(lakehouse: Lakehouse, told: DataFrame) -> DataFrame:
    """What is not stored, and isn't older than what is."""
    if not lakehouse.exists(GIVEN_LABELS.name):
        return told
    stored = lakehouse.read(GIVEN_LABELS.name).alias("s")
    t, s = ({name: F.col(f"{side}.{name}") for name in told.columns if name != "dated"} for side in "ts")
    same = (t["spend"] == s["spend"]) & t["source"].eqNullSafe(s["source"])
    stays = (same & ~F.col("t.dated")) | (same & (t["given_at"] == s["given_at"])) | (t["given_at"] < s["given_at"])
    of_one = (t["user_key"] == s["user_key"]) & (t["as_of_date"] == s["as_of_date"])
    return told.alias("t").join(stored, of_one & stays, "left_anti")


def _not_asked(lakehouse: Lakehouse, users: DataFrame, as_of_date: date) -> DataFrame:
    """Users without a label of the date, and without a question that waits for its answer."""
    given = lakehouse.read(GIVEN_LABELS.name) if lakehouse.exists(GIVEN_LABELS.name) else None
    if given is not None:
        of_date = given.filter(F.col("as_of_date") == F.lit(as_of_date)).select("user_key")
        users = users.join(of_date, "user_key", "left_anti")
    if lakehouse.exists(LABEL_REQUESTS.name):
        waiting = lakehouse.read(LABEL_REQUESTS.name).select(*labels.KEY)
        if given is not None:
            waiting = waiting.join(given.select(*labels.KEY), labels.KEY, "left_anti")
        users = users.join(waiting.select("user_key").distinct(), "user_key", "left_anti")
    return users


def _given_digest(lakehouse: Lakehouse) -> str:
    """Of whom labels are stored: as long as it is the same, the same questions wait."""
    if not lakehouse.exists(GIVEN_LABELS.name):
        return ""
    of_whom = F.bit_xor(F.xxhash64(*labels.KEY))
    return str(lakehouse.read(GIVEN_LABELS.name).agg(F.count(F.lit(1)), of_whom).collect()[0])


def _frame(run: Run, rows: Sequence[Mapping[str, Any]], table: Table, *more: StructField) -> DataFrame:
    """Rows of the driver with the columns of a table, and more."""
    schema = StructType([*table.schema.fields, *more])
    return run.spark.createDataFrame([tuple(row[name] for name in schema.names) for row in rows], schema)
