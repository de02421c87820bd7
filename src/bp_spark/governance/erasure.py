"""Users forgotten, keys rotated, old rows deleted: in the newest version of each table, then in all files.

Each is a run of steps that leave alone what is done already, so a run that was stopped is made whole by the next. Other jobs
may run meanwhile: what they worked out before, they can't write any more, and end with an error; run them again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import reduce
from pathlib import Path
from typing import Any

import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from safetensors import safe_open

from bp_spark.core import scratch
from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError, DataError, UnknownUserError
from bp_spark.core.session import checkpointed, persisted
from bp_spark.features.job import aggregate, clean, embed, require_same_secret
from bp_spark.governance import residue_scan
from bp_spark.ingest import cleaning, pseudonyms, texts
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.tables import (
    DELIVERIES,
    EVENTS,
    FORGOTTEN,
    GIVEN_LABELS,
    LABEL_REQUESTS,
    MARKET_SEGMENTS,
    PROFILE_TABLES,
    QUARANTINE,
    RAW_LOGS,
    RAW_TABLES,
    SCORES,
    SCORES_LATEST,
    TEXT_EMBEDDINGS,
    TEXTS,
    USER_DAILY,
    USER_KEYS,
    Lakehouse,
)

QUARANTINED_KEY = "get_json_object(t.row, '$.user_key')"
"""SQL of a row's user in ``quarantine``."""
PERIODS: Mapping[str, Mapping[str, str]] = {
    "raw": {
        **dict.fromkeys((table.name for table in RAW_LOGS), "ingested_at"),
        "quarantine": "substring(get_json_object(row, '$.ingested_at'), 1, 10)",
    },
    "events": {"events": "event_date"},
    "features": {"user_features": "as_of_date"},
    "training": dict.fromkeys(("training_set", "pretraining_set", "label_requests", "given_labels"), "as_of_date"),
    "scores": {name: "score_date" for name in ("scores", "scores_latest", *(table.name for table in PROFILE_TABLES))},
}
"""Setting of ``privacy.retention_days`` -> table -> SQL of a row's day."""
PROVEN_KEYS = 1_000
"""Old keys that are looked for after a rotation."""
_POSITIONS_TOLD = 20


def forget(spark: SparkSession, config: Config, user_ids: Sequence[str]) -> list[dict[str, Any]]:
    """Erase users from every table and from the files of older versions, and prove it by reading every file.

    Texts that nobody else wrote go with them, and so do checkpoints that hold such a text. Models are left: what they
    learned of a user can't be told apart from the rest; bundles that carry such a text are named. Rows of the users that are
    delivered later are left out, by the table ``forgotten``.

    Returns:
        The stages that ran, as in ``runs``. Called again with the same ids it deletes nothing and proves it again.

    Raises:
        ConfigError: no id; the secret is missing, or isn't the one that the keys were made with.
        DataError: nothing was ingested yet; a file still holds a user when all is done.
        UnknownUserError: when all is done: nobody has some of the ids, and they were not forgotten before.
    """
    positions: dict[str, int] = {}
    for position, one in enumerate(user_ids, 1):
        positions.setdefault(one.strip(" "), position)
    positions.pop("", None)
    if not positions:
        raise ConfigError("forget: no user id was given")
    secret = pseudonyms.load_secret(config.privacy.secret)
    keys_by_id = {one: secret.key_of(one) for one in positions}
    with recorded(spark, config, "forget") as run:
        lakehouse = run.lakehouse
        known = lakehouse.read("user_keys")
        require_same_secret(lakehouse, secret)
        keys = F.broadcast(spark.createDataFrame([(key,) for key in keys_by_id.values()], "user_key string"))
        with run.stage("forget") as figures:
            found = {row["user_key"] for row in known.join(keys, "user_key", "left_semi").select("user_key").collect()}
            unknown = _list_forgotten(lakehouse, keys_by_id.values(), found, secret)
            # an ingest that didn't see the list can't write any more
            _outdate(lakehouse)
            figures["users"], figures["known"] = len(keys_by_id), len(found)
            _empty_segments_of(lakehouse, keys)
            for name in _tables_of_users(lakehouse):
                # user-days follow events below, and who is known is known until all rows are gone
                if name not in ("user_daily", "user_keys"):
                    figures[name] = lakehouse.erase(name, keys, "t.user_key = s.user_key")
            if lakehouse.exists("quarantine"):
                figures["quarantine"] = lakehouse.erase("quarantine", keys, f"{QUARANTINED_KEY} = s.user_key")
        _follow_events(run)
        _retain(run)
        with run.stage("forget texts") as figures:
            figures.update(_erase_texts(run))
            figures["user_keys"] = lakehouse.erase("user_keys", keys, "t.user_key = s.user_key")
        _vacuum(run)
        _prove(run, keys_by_id.values(), keys_by_id)
        if missing := [position for one, position in positions.items() if keys_by_id[one] in unknown]:
            raise _unknown(missing, len(user_ids))
        return run.records


def _list_forgotten(
    lakehouse: Lakehouse, keys: Collection[str], found: Collection[str], secret: pseudonyms.Secret
) -> set[str]:
    """Add users to the table ``forgotten``; return the keys that nobody has, and nobody had when they were first forgotten.

    Args:
        keys: ``user_key`` of all of them.
        found: the keys that users have.
    """
    keys_by_hash = {hashlib.sha256(key.encode()).hexdigest(): key for key in keys}
    listed: dict[str, bool] = {}
    if lakehouse.exists("forgotten"):
        wanted = lakehouse.spark.createDataFrame([(one,) for one in keys_by_hash], "key_hash string")
        rows = lakehouse.read("forgotten").join(F.broadcast(wanted), "key_hash").select("key_hash", "known").collect()
        listed = {keys_by_hash[row["key_hash"]]: row["known"] for row in rows}
    now = datetime.now(UTC)
    fresh = [(one, secret.key_id, key in found, now) for one, key in keys_by_hash.items() if key not in listed]
    if fresh:
        lakehouse.append(FORGOTTEN, lakehouse.spark.createDataFrame(fresh, FORGOTTEN.schema))
    return {key for key in keys if key not in found and not listed.get(key)}


def _unknown(positions: Sequence[int], given: int) -> UnknownUserError:
    told = ", ".join(map(str, positions[:_POSITIONS_TOLD]))
    more = f" and {len(positions) - _POSITIONS_TOLD:,} more" if len(positions) > _POSITIONS_TOLD else ""
    return UnknownUserError(
        f"forget: nobody has {len(positions):,} of the {given:,} ids given (those at the positions {told}{more}); all others "
        "were erased. Rows with the unknown ids are left out of later deliveries, too: docs/privacy.md says how to take a "
        "mistyped id off the list"
    )


def _empty_segments_of(lakehouse: Lakehouse, keys: DataFrame) -> None:
    """Segments that count a user who goes: by what is missing from the next ones the user could be told."""
    if not (lakehouse.exists("market_segments") and lakehouse.exists("user_profile")):
        return
    if not lakehouse.read("user_profile").join(keys, "user_key", "left_semi").isEmpty():
        lakehouse.delete("market_segments", "true")


def retain(spark: SparkSession, config: Config) -> list[dict[str, Any]]:
    """Delete the rows that are older than ``privacy.retention_days`` allow, and the files of older versions.

    Returns:
        The stages that ran, as in ``runs``.

    Raises:
        ConfigError: no period is set.
    """
    if not any(config.privacy.retention_days.model_dump().values()):
        raise ConfigError("retain: privacy.retention_days sets no period, so nothing is too old")
    with recorded(spark, config, "retain") as run:
        _retain(run)
        with run.stage("forget texts") as figures:
            figures.update(_erase_texts(run))
        _vacuum(run)
        return run.records


def rotate_keys(spark: SparkSession, config: Config, to: str) -> list[dict[str, Any]]:
    """Give every user a new key, made with another secret, and erase the files that hold the old ones.

    Raw rows, scores and given labels are re-keyed; events, whose identity the key is part of, are derived from the raw rows
    anew, with what follows from them. Features, training sets, profiles and questions for labels are emptied: ``featurize``,
    ``train``, ``profile`` and ``select-labels`` make them again. Holdout and folds go by a hash of the key, so they are drawn
    anew: train again.

    Args:
        to: where the new secret is, as ``privacy.secret``, which must name it from then on.

    Returns:
        The stages that ran, as in ``runs``.

    Raises:
        ConfigError: a secret is missing, or the old one isn't that of the keys; raw rows are not all kept.
        ConflictError: another job wrote meanwhile.
        DataError: nothing was ingested yet; a file still holds an old key when all is done, or a row one that nobody has.
    """
    old, new = (pseudonyms.load_secret(place) for place in (config.privacy.secret, to))
    if old == new:
        raise ConfigError(f"rotate-keys: {to} holds the secret that is in use already")
    _require_all_raw_rows(config, "rotate-keys")
    with recorded(spark, config, "rotate-keys") as run:
        lakehouse = run.lakehouse
        users = lakehouse.read("user_keys")
        if not users.filter(F.col("key_id") != new.key_id).isEmpty():
            require_same_secret(lakehouse, old)
            with run.stage("rotate keys") as figures:
                claims = _outdate(lakehouse)
                # raw tables and user_keys are written under it, as by an ingest
                claim = lakehouse.reserve(DELIVERIES, lakehouse.commit_metadata("deliveries"))
                _rekey(lakehouse, users, new, figures, {**claims, "deliveries": claim})
                if lakehouse.exists("forgotten") and (count := lakehouse.read("forgotten").count()):
                    figures["note"] = (
                        f"the new secret does not recognise the {count:,} users who were forgotten: give their ids to forget "
                        "again, or rows of theirs that are delivered later come in"
                    )
            clean(run, rebuild=True)
            embed(run)
            aggregate(run, rebuild=True)
            rekeyed = {"user_key": pseudonyms.user_key(F.col("user_id"), new), "key_id": F.lit(new.key_id)}
            rotated = users.withColumns(rekeyed)
            _require_known_keys(lakehouse, rotated)
            # an ingest that began meanwhile has claimed the table: its rows bear old keys
            lakehouse.reserve(DELIVERIES, {**lakehouse.commit_metadata("deliveries"), "version": claim})
            # last: as long as the old keys stand here, a run that was stopped begins anew
            lakehouse.replace(USER_KEYS, rotated, after=claim)
        _vacuum(run)
        _require_known_keys(lakehouse, lakehouse.read("user_keys"))
        sample = lakehouse.read("user_keys").limit(PROVEN_KEYS).collect()
        _prove(run, [old.key_of(row["user_id"]) for row in sample], [])
        return run.records


def _rekey(
    lakehouse: Lakehouse,
    users: DataFrame,
    new: pseudonyms.Secret,
    figures: dict[str, object],
    claims: Mapping[str, int],
) -> None:
    """Write the new keys in the place of the old ones; empty what is made again from them.

    Args:
        claims: table -> claim under which it is written. That of ``deliveries`` is for raw tables, ``scores`` has none.
    """
    both = users.select(F.col("user_key").alias("_old"), pseudonyms.user_key(F.col("user_id"), new).alias("_new"))
    with persisted(both) as keys:
        for table in (*RAW_TABLES, SCORES, SCORES_LATEST, GIVEN_LABELS):
            if not lakehouse.exists(table.name) or "user_key" not in table.schema.names:
                continue
            rows = lakehouse.read(table.name)
            theirs = F.col("user_key") == F.col("_old")
            if not rows.join(keys, theirs, "left_semi").isEmpty():
                rekeyed = rows.join(keys, theirs, "left").withColumn("user_key", F.coalesce("_new", "user_key"))
                after = claims["deliveries"] if table in RAW_TABLES else claims.get(table.name)
                lakehouse.replace(table, rekeyed, after=after)
        figures["users"] = keys.count()
    emptied = ("user_features", "training_set", "pretraining_set", "label_requests")
    for name in (*emptied, *(table.name for table in PROFILE_TABLES)):
        if lakehouse.exists(name):
            lakehouse.delete(name, "true")


def _require_known_keys(lakehouse: Lakehouse, users: DataFrame) -> None:
    """Require that each row's ``user_key`` is one of the users'.

    Raises:
        DataError: some are not.
    """
    tables = (*RAW_TABLES, EVENTS, USER_DAILY, SCORES, SCORES_LATEST, GIVEN_LABELS)
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


def _require_all_raw_rows(config: Config, what: str) -> None:
    days = config.privacy.retention_days.raw
    if days is not None:
        raise ConfigError(
            f"{what}: events are derived from the raw rows anew, but of these only {days} days are kept "
            "(privacy.retention_days.raw)"
        )


def _outdate(lakehouse: Lakehouse) -> dict[str, int]:
    """Refuse from now on what other runs worked out of the tables so far, be it in memory; return the claims by table."""
    made = (DELIVERIES, EVENTS, TEXTS, TEXT_EMBEDDINGS, USER_DAILY, SCORES_LATEST, MARKET_SEGMENTS)
    claims = {
        table.name: lakehouse.reserve(table, lakehouse.commit_metadata(table.name))
        for table in (*made, LABEL_REQUESTS, GIVEN_LABELS)
        if lakehouse.exists(table.name)
    }
    for table in (*RAW_TABLES, USER_KEYS):
        if lakehouse.exists(table.name):
            lakehouse.invalidate_writers(table, claims["deliveries"])
    if lakehouse.exists("quarantine"):
        lakehouse.invalidate_writers(QUARANTINE, claims["events"])
    for table in PROFILE_TABLES:
        if table is not MARKET_SEGMENTS and "market_segments" in claims and lakehouse.exists(table.name):
            lakehouse.invalidate_writers(table, claims["market_segments"])
    return claims


def _tables_of_users(lakehouse: Lakehouse) -> list[str]:
    return [name for name in lakehouse.names() if "user_key" in lakehouse.read(name).columns]


def _follow_events(run: Run) -> None:
    """User-days that belong to no event any more go, by the change feed where it is still there."""
    if run.lakehouse.exists("events"):
        embed(run)
        aggregate(run, rebuild=False)


def _retain(run: Run) -> None:
    today = datetime.now(UTC).date()
    periods = run.config.privacy.retention_days.model_dump()
    if not any(periods.values()):
        return
    with run.stage("retain") as figures:
        for period, days in periods.items():
            for name, day in PERIODS[period].items() if days else ():
                if run.lakehouse.exists(name):
                    oldest = today - timedelta(days=days)
                    figures[name] = run.lakehouse.delete(name, f"DATE({day}) < DATE'{oldest}'")
    _follow_events(run)


def _erase_texts(run: Run) -> dict[str, object]:
    """Delete texts that stand in no raw row and no event, what the language model made of them, and checkpoints with them."""
    lakehouse = run.lakehouse
    if not lakehouse.exists("texts"):
        return {}
    raw = {table.name: lakehouse.read(table.name) for table in RAW_TABLES if lakehouse.exists(table.name)}
    written = cleaning.texts(raw).select(texts.text_id(F.col("text")).alias("text_id"))
    kept = written.unionByName(lakehouse.read("events").select("text_id").filter("text_id IS NOT NULL")).distinct()
    same = "t.text_id = s.text_id"
    figures: dict[str, object] = {}
    for name in ("texts", "text_embeddings"):
        if lakehouse.exists(name):
            gone = lakehouse.read(name).select("text_id").distinct().join(kept, "text_id", "left_anti")
            figures[name] = lakehouse.erase(name, checkpointed(gone), same)
    known = lakehouse.read("texts").select("text_id")
    work = Path(run.config.training.work_dir)
    stale = _with_other_texts(run, work, known)
    for folder in stale:
        shutil.rmtree(folder, ignore_errors=True)
    figures["checkpoints"] = len(stale)
    bundles = _with_other_texts(run, Path(run.config.bundles), known)
    if bundles:
        names = ", ".join(folder.name for folder in bundles)
        figures["note"] = f"{names}: carry a text that was erased; train again, and delete them and their versions"
    return figures


def _with_other_texts(run: Run, root: Path, known: DataFrame) -> list[Path]:
    """Folders below a root in which a file of weights carries a text that is not known (any more)."""
    found = []
    for path in sorted(root.rglob("*.safetensors")):
        with safe_open(path, "numpy") as tensors:
            name = next((name for name in ("ids", "vocabulary_ids") if name in tensors.keys()), None)  # noqa: SIM118
            ids = [] if name is None else tensors.get_tensor(name).tolist()
        if ids:
            carried = run.spark.createDataFrame(pd.DataFrame({"text_id": ids}))
            if not carried.join(known, "text_id", "left_anti").isEmpty():
                found.append(path.parent)
    return found


def _vacuum(run: Run) -> None:
    lakehouse = run.lakehouse
    with run.stage("vacuum") as figures:
        scratch.clear(run.spark, run.config.tables)
        named = ("quarantine", "texts", "text_embeddings", "market_segments")
        others = (name for name in named if lakehouse.exists(name))
        deleted = [lakehouse.vacuum(name) for name in (*_tables_of_users(lakehouse), *others)]
        figures["tables"], figures["files"] = len(deleted), sum(deleted)


def _prove(run: Run, keys: Collection[str], ids: Collection[str]) -> None:
    """Read every file, whether a table needs it or not.

    Raises:
        DataError: one holds a key or an id.
    """
    config = run.config
    places = [config.training.work_dir, config.bundles, config.evaluation.reports]
    with run.stage("prove") as figures:
        folders = [*run.lakehouse.folders(), *(str(Path(place).absolute()) for place in places)]
        traces_left = residue_scan.search(run.spark, folders, keys, ids)
        figures["parquet_files"], figures["other_files"] = traces_left.parquet_files, traces_left.other_files
        figures["found"] = len(traces_left.found)
        if traces_left.found:
            rule = f"still holds what was to be erased, as do {len(traces_left.found) - 1} more files; if it isn't a copy that "
            raise DataError(traces_left.found[0], f"{rule}somebody made, another job was running: run this again")
