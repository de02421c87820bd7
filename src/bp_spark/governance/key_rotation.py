"""User keys rotated: each user gets a new key, and the files that hold the old ones are erased.

The job consists of steps that skip what is already done, so the next run completes one that was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.session import persisted
from bp_spark.features.job import aggregate
from bp_spark.governance import cleanup
from bp_spark.ingest import contacts_job, pseudonyms
from bp_spark.ingest.clean import clean
from bp_spark.ingest.job import KEY_ID, require_same_secret
from bp_spark.ingest.texts_job import embed, find_topics
from bp_spark.lakehouse.run import recorded
from bp_spark.lakehouse.store import Lakehouse, read_as_declared
from bp_spark.lakehouse.tables import (
    CAMPAIGN_CONTACTS,
    CONSULTATION_TOPICS,
    CONSULTATIONS,
    DELIVERIES,
    EVENTS,
    EXPERIMENTS,
    GIVEN_LABELS,
    PROFILE_TABLES,
    PROSPECT_SCORES,
    RAW_TABLES,
    RECOMMENDATIONS,
    SCORES,
    SCORES_LATEST,
    USER_DAILY,
    USER_KEYS,
)

OF_SCORES = (SCORES, SCORES_LATEST, PROSPECT_SCORES, RECOMMENDATIONS, EXPERIMENTS)
"""Tables that get the new keys, though no raw row makes them."""
PROVEN_KEYS = 1_000
"""Old keys that the proof looks for after a rotation."""


def rotate_keys(spark: SparkSession, config: Config, to: str) -> list[dict[str, Any]]:
    """Give every user a new key, made with another secret, and erase the files that hold the old ones.

    Raw rows, scores, recommendations, experiments and survey labels get the new keys. A key is part of an event's identity,
    so events, contacts and what follows from them are derived from the raw rows again. Features, training sets, profiles and
    label requests are emptied: ``featurize``, ``train``, ``profile`` and ``select-labels`` make them again. A hash of the key
    decides holdout and folds, so both change: train again.

    Args:
        spark: The session.
        config: All settings; ``privacy.secret`` names the secret in use.
        to: Where the new secret is, written as ``privacy.secret``, which must name it from then on.

    Returns:
        The stages that ran, as in ``runs``.

    Raises:
        ConfigError: A secret is missing, the old one didn't make the keys, or raw rows have a retention period.
        ConflictError: Another job wrote meanwhile.
        DataError: Nothing was ingested yet, a file still holds an old key at the end, or a row holds a key of nobody.
    """
    old_secret, new_secret = (pseudonyms.load_secret(place) for place in (config.privacy.secret, to))
    if old_secret == new_secret:
        raise ConfigError(f"rotate-keys: {to} holds the secret that is in use already")
    _require_all_raw_rows(config)
    with recorded(spark, config, "rotate-keys") as run:
        lakehouse = run.lakehouse
        users = lakehouse.read("user_keys")
        if not users.filter(F.col("key_id") != new_secret.key_id).isEmpty():
            require_same_secret(lakehouse, old_secret)
            with run.stage("rotate keys") as figures:
                reservations = cleanup.stop_other_writers(lakehouse)
                # raw tables and user_keys are written under this reservation, as in an ingest
                reservation = lakehouse.reserve(DELIVERIES, lakehouse.commit_metadata("deliveries"))
                _rekey(lakehouse, users, new_secret, figures, {**reservations, "deliveries": reservation})
                if lakehouse.exists("forgotten") and (count := lakehouse.read("forgotten").count()):
                    figures["note"] = (
                        f"the new secret does not recognise the {count:,} users who were forgotten: give their ids to forget "
                        "again, or their rows come in with later deliveries"
                    )
            clean(run, rebuild=True)
            contacts_job.contacts(run, rebuild=True)
            embed(run)
            find_topics(run)
            aggregate(run, rebuild=True)
            new_columns = {
                "user_key": pseudonyms.user_key(F.col("user_id"), new_secret),
                "key_id": F.lit(new_secret.key_id),
            }
            rotated_users = users.withColumns(new_columns)
            _require_keys_of_users(lakehouse, rotated_users)
            # an ingest that began meanwhile has reserved the table, and its rows bear old keys
            lakehouse.reserve(DELIVERIES, {**lakehouse.commit_metadata("deliveries"), "version": reservation})
            # last: while the old keys stand here, the next run repeats a rotation that was stopped
            lakehouse.replace(USER_KEYS, rotated_users, note={KEY_ID: new_secret.key_id}, after=reservation)
        cleanup.vacuum_tables(run)
        _require_keys_of_users(lakehouse, lakehouse.read("user_keys"))
        sample = lakehouse.read("user_keys").limit(PROVEN_KEYS).collect()
        cleanup.prove_erased(run, [old_secret.key_of(row["user_id"]) for row in sample], [])
        return run.records


def _rekey(
    lakehouse: Lakehouse,
    users: DataFrame,
    new_secret: pseudonyms.Secret,
    figures: dict[str, object],
    reservations: Mapping[str, int],
) -> None:
    """Replace the old keys by the new ones, and empty the tables that other jobs make from them.

    Args:
        lakehouse: The tables.
        users: Rows of USER_KEYS with the old keys.
        new_secret: Makes the new keys.
        figures: Figures of the stage; gets ``users``.
        reservations: Table -> reservation under which it is written. That of ``deliveries`` is for raw tables; ``scores``
            has none.
    """
    old_and_new = users.select(
        F.col("user_key").alias("_old"), pseudonyms.user_key(F.col("user_id"), new_secret).alias("_new")
    )
    with persisted(old_and_new) as keys:
        for table in (*RAW_TABLES, *OF_SCORES, GIVEN_LABELS):
            if not lakehouse.exists(table.name) or "user_key" not in table.schema.names:
                continue
            # tables of an older version get the columns that came since
            rows = read_as_declared(lakehouse, table)
            has_old_key = F.col("user_key") == F.col("_old")
            if not rows.join(keys, has_old_key, "left_semi").isEmpty():
                rekeyed = rows.join(keys, has_old_key, "left").withColumn("user_key", F.coalesce("_new", "user_key"))
                after = reservations["deliveries"] if table in RAW_TABLES else reservations.get(table.name)
                lakehouse.replace(table, rekeyed, after=after)
        figures["users"] = keys.count()
    emptied = ("user_features", "prospect_features", "training_set", "pretraining_set", "label_requests")
    for name in (*emptied, *(table.name for table in PROFILE_TABLES)):
        if lakehouse.exists(name):
            lakehouse.delete(name, "true")


def _require_keys_of_users(lakehouse: Lakehouse, users: DataFrame) -> None:
    """Require that each row's ``user_key`` is the key of one of the users.

    Raises:
        DataError: Some rows have another key.
    """
    contacts = (CONSULTATIONS, CONSULTATION_TOPICS, CAMPAIGN_CONTACTS)
    tables = (*RAW_TABLES, EVENTS, *contacts, USER_DAILY, *OF_SCORES, GIVEN_LABELS)
    keys = [
        lakehouse.read(table.name).select(F.lit(table.name).alias("table"), "user_key").filter("user_key IS NOT NULL")
        for table in tables
        if "user_key" in table.schema.names and lakehouse.exists(table.name)
    ]
    orphans = reduce(DataFrame.unionByName, keys).join(users.select("user_key"), "user_key", "left_anti")
    counts = {row["table"]: row["count"] for row in orphans.groupBy("table").count().collect()}
    if counts:
        table, count = min(counts.items())
        raise DataError(
            f"{lakehouse.namespace}.{table}",
            "holds keys that nobody in user_keys has: another job wrote while keys were rotated. Run rotate-keys again; rows "
            "that stay are nobody's: delete them",
            column="user_key",
            count=count,
        )


def _require_all_raw_rows(config: Config) -> None:
    days = config.privacy.retention_days.raw
    if days is not None:
        raise ConfigError(
            f"rotate-keys: events are derived again from all raw rows, but only {days} days are kept "
            "(privacy.retention_days.raw)"
        )
