"""Users forgotten: erased from the newest version of each table, then from all files.

The job consists of steps that skip what is already done, so the next run completes one that was stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError, UnknownUserError
from bp_spark.governance import cleanup
from bp_spark.governance.retention import delete_expired_rows
from bp_spark.ingest import pseudonyms
from bp_spark.ingest.job import require_same_secret
from bp_spark.lakehouse import sql
from bp_spark.lakehouse.run import recorded
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import FORGOTTEN

QUARANTINED_KEY = "get_json_object(t.row, '$.user_key')"
"""SQL of a row's user in ``quarantine``."""
_MAX_POSITIONS = 20
"""Positions of unknown ids that the error lists."""


def forget(spark: SparkSession, config: Config, user_ids: Sequence[str]) -> list[dict[str, Any]]:
    """Erase users from every table and from the files of older versions, and prove it by reading every file.

    Texts that nobody else wrote are erased too, and so are checkpoints that hold such a text. Models stay: what they learned
    from one user can't be separated from the rest. The run names bundles that carry such a text. The table ``forgotten``
    keeps out rows of these users that are delivered later.

    Returns:
        The stages that ran, as in ``runs``. A second call with the same ids deletes nothing and repeats the proof.

    Raises:
        ConfigError: No id was given, or the secret is missing or isn't the one that made the keys.
        DataError: Nothing was ingested yet, or a file still holds a user at the end.
        UnknownUserError: At the end: nobody has some of the ids, and they were not forgotten before.
    """
    first_positions: dict[str, int] = {}
    for position, user_id in enumerate(user_ids, 1):
        first_positions.setdefault(user_id.strip(" "), position)
    first_positions.pop("", None)
    if not first_positions:
        raise ConfigError("forget: no user id was given")
    secret = pseudonyms.load_secret(config.privacy.secret)
    keys_by_id = {user_id: secret.key_of(user_id) for user_id in first_positions}
    with recorded(spark, config, "forget") as run:
        lakehouse = run.lakehouse
        user_keys = lakehouse.read("user_keys")
        require_same_secret(lakehouse, secret)
        keys = F.broadcast(spark.createDataFrame([(key,) for key in keys_by_id.values()], "user_key string"))
        with run.stage("forget") as figures:
            rows = user_keys.join(keys, "user_key", "left_semi").select("user_key").collect()
            existing_keys = {row["user_key"] for row in rows}
            unknown_keys = _list_forgotten(lakehouse, keys_by_id.values(), existing_keys, secret)
            # an ingest that read the list before these users were on it must not write
            cleanup.stop_other_writers(lakehouse)
            figures["users"], figures["known"] = len(keys_by_id), len(existing_keys)
            _empty_segments_with(lakehouse, keys)
            _empty_history_with(lakehouse, keys)
            _delete_results_with(lakehouse, keys)
            for name in cleanup.tables_of_users(lakehouse):
                # user-days follow from events below; user_keys goes last, so that a stopped run still finds the users
                if name not in ("user_daily", "user_keys"):
                    figures[name] = lakehouse.erase(name, keys, "t.user_key = s.user_key")
            if lakehouse.exists("quarantine"):
                figures["quarantine"] = lakehouse.erase("quarantine", keys, f"{QUARANTINED_KEY} = s.user_key")
        cleanup.update_user_days(run)
        delete_expired_rows(run)
        with run.stage("forget texts") as figures:
            figures.update(cleanup.erase_unused_texts(run))
            figures["user_keys"] = lakehouse.erase("user_keys", keys, "t.user_key = s.user_key")
        cleanup.vacuum_tables(run)
        cleanup.prove_erased(run, keys_by_id.values(), keys_by_id)
        unknown_positions = [
            position for user_id, position in first_positions.items() if keys_by_id[user_id] in unknown_keys
        ]
        if unknown_positions:
            raise _unknown_users(unknown_positions, len(user_ids))
        return run.records


def _list_forgotten(
    lakehouse: Lakehouse, keys: Collection[str], existing_keys: Collection[str], secret: pseudonyms.Secret
) -> set[str]:
    """Add users to the table ``forgotten``.

    Args:
        lakehouse: Holds the table.
        keys: ``user_key`` of all these users.
        existing_keys: Those of them that users have now.
        secret: Made the keys.

    Returns:
        The keys that no user has now, and that no user had when they were first forgotten.
    """
    keys_by_hash = {hashlib.sha256(key.encode()).hexdigest(): key for key in keys}
    listed_keys: dict[str, bool] = {}
    if lakehouse.exists("forgotten"):
        hashes = lakehouse.spark.createDataFrame([(key_hash,) for key_hash in keys_by_hash], "key_hash string")
        rows = lakehouse.read("forgotten").join(F.broadcast(hashes), "key_hash").select("key_hash", "known").collect()
        listed_keys = {keys_by_hash[row["key_hash"]]: row["known"] for row in rows}
    now = datetime.now(UTC)
    new_rows = [
        (key_hash, secret.key_id, key in existing_keys, now)
        for key_hash, key in keys_by_hash.items()
        if key not in listed_keys
    ]
    if new_rows:
        lakehouse.append(FORGOTTEN, lakehouse.spark.createDataFrame(new_rows, FORGOTTEN.schema))
    return {key for key in keys if key not in existing_keys and not listed_keys.get(key)}


def _unknown_users(positions: Sequence[int], given_ids: int) -> UnknownUserError:
    listed = ", ".join(map(str, positions[:_MAX_POSITIONS]))
    more = f" and {len(positions) - _MAX_POSITIONS:,} more" if len(positions) > _MAX_POSITIONS else ""
    return UnknownUserError(
        f"forget: nobody has {len(positions):,} of the {given_ids:,} ids given (those at the positions {listed}{more}); all "
        "others were erased. Rows with the unknown ids are left out of later deliveries, too: docs/privacy.md says how to "
        "take a mistyped id off the list"
    )


def _empty_segments_with(lakehouse: Lakehouse, keys: DataFrame) -> None:
    """Empty ``market_segments`` if it counts one of the users: the difference to the next one would reveal the user.

    What was added up from it for ``totals`` goes, too.
    """
    if not (lakehouse.exists("market_segments") and lakehouse.exists("user_profile")):
        return
    counted = lakehouse.read("user_profile").join(keys, "user_key", "left_semi").select("score_date").first()
    if counted is None:
        return
    lakehouse.delete("market_segments", "true")
    if lakehouse.exists("totals"):
        lakehouse.delete("totals", f"score_date = DATE'{counted[0]}'")


def _empty_history_with(lakehouse: Lakehouse, keys: DataFrame) -> None:
    """Empty ``cohorts`` and ``market_forecast`` if one of the users was ever scored.

    Both tell of the past, so that the next ones would differ from these by what the user did.
    """
    names = [name for name in ("cohorts", "market_forecast") if lakehouse.exists(name)]
    if not (names and lakehouse.exists("scores")):
        return
    if not lakehouse.read("scores").join(keys, "user_key", "left_semi").isEmpty():
        for name in names:
            lakehouse.delete(name, "true")


def _delete_results_with(lakehouse: Lakehouse, keys: DataFrame) -> None:
    """Delete the results of experiments with one of the users: the difference to the next ones would reveal the user."""
    if not (lakehouse.exists("experiments") and lakehouse.exists("experiment_results")):
        return
    users = lakehouse.read("experiments").join(keys, "user_key", "left_semi")
    names = [row[0] for row in users.select("experiment").distinct().collect()]
    if names:
        lakehouse.delete("experiment_results", sql.one_of("experiment", names))
