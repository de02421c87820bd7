"""From what a source has delivered to raw rows: new files are read, with keys instead of user ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from functools import reduce

from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.session import checkpointed
from bp_spark.ingest import broken_text, pseudonyms
from bp_spark.ingest.deliveries import Ledger, day_of, stored_name
from bp_spark.ingest.readable import Batch, undo_ingest, write_readable
from bp_spark.ingest.sources import open_source, source_digests
from bp_spark.ingest.sources.contract import Delivery, Source
from bp_spark.lakehouse.run import Run
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import DELIVERIES, INGEST_COLUMNS, RAW_CAMPAIGNS, RAW_TABLES, USER_KEYS

_SAMPLE_BUCKETS = 10_000
"""Groups that a hash spreads user ids over, to draw a sample of users."""
_PLANNED_DAYS = 400
"""Days that a campaign may be planned ahead."""
KEY_ID = "key_id"
"""What a commit of ``user_keys`` records: the identity of the secret that all its keys were made with."""
_INGEST = "ingest"
"""What a commit of a raw table records: the number of the ingest that wrote it."""


def ingest(run: Run, strict: bool = False) -> None:
    """Read the deliveries that are new or changed into the raw tables, with keys instead of user ids.

    A file that was only touched or copied has the rows that it had: it is recorded and not stored again.

    Args:
        run: the run to record the stage in.
        strict: refuse all deliveries if one can't be read. By default that one is named and left for the next ingest.

    Raises:
        ConfigError: the secret is missing, or is not the one that stored keys were made with.
        DataError: the source breaks the raw contract; the first ingest brings no transactions; deliveries can't be read, as
            :func:`bp_spark.ingest.readable.write_readable` says.
    """
    config, lakehouse = run.config.source, run.lakehouse
    source, identities = open_source(config), source_digests(config)
    with run.step("ingest", DELIVERIES, identities[0]) as step:
        ledger = Ledger.read(lakehouse, identities)
        listed = source.deliveries(run.spark)
        fresh, gone = ledger.fresh(listed), ledger.gone(listed, source.snapshots())
        step.figures["deliveries"] = len(fresh)
        if not fresh and not gone:
            return
        number = ledger.last + 1
        secret = pseudonyms.load_secret(run.config.privacy.secret)
        require_same_secret(lakehouse, secret)

        def write(batch: Batch) -> None:
            unchanged = _unchanged(run, source, ledger.stored(batch.deliveries, listed), secret)
            new = [delivery for delivery in batch.deliveries if delivery not in unchanged]
            raw = source.read(run.spark, new) if unchanged else batch.rows
            raw = {name: sampled(rows, config.sample) for name, rows in raw.items()}
            if not ledger.last and raw["raw_transactions"].isEmpty():
                raise batch.no_transactions
            reservation = step.reserve()
            # keys before rows, so that no row ever has a key that user_keys lacks
            forgotten_users = _add_user_keys(lakehouse, raw, secret, number, after=reservation)
            row_counts = _write_raw_tables(run, raw, secret, number, after=reservation)
            broken_text_rows = broken_text.warn(lakehouse, number, row_counts)
            if new or gone:
                step.figures["ingest_id"] = number
            figures = {"forgotten_users": forgotten_users, "unchanged_files": len(unchanged), "gone_files": len(gone)}
            figures["broken_text_rows"] = broken_text_rows
            step.figures.update({name: count for name, count in figures.items() if count})
            step.figures.update(row_counts)
            step.figures["rows_in"] = step.figures["rows_out"] = sum(row_counts.values())
            days = _days(run, ledger.repeated(new), number)
            read = [
                (identities[0], d.table, d.name, d.fingerprint, number, *days.get(d, (None, None)), None)
                for d in [*new, *gone]
            ]
            for delivery, versions in unchanged.items():
                read += ledger.unchanged_rows(identities[0], delivery, versions)
            # deliveries last: their commit makes the ingest complete
            step.append(run.spark.createDataFrame(read, DELIVERIES.schema), ingest_id=number, left=batch.left)

        batch = write_readable(
            run.spark,
            source,
            fresh,
            write,
            undo=lambda: undo_ingest(lakehouse, number, step.reserve),
            strict=strict,
            left_before=step.newest.get("left", ()),
        )
        if gone and not batch.deliveries:
            write(batch)
        step.figures["deliveries"] = len(batch.deliveries)
        if batch.unreadable:
            step.figures["unreadable_files"] = batch.unreadable_files


def _unchanged(
    run: Run, source: Source, versions: Mapping[Delivery, Sequence[Row]], secret: pseudonyms.Secret
) -> dict[Delivery, Sequence[Row]]:
    """Return those of the files that have the very rows that are stored, with their versions."""
    if not versions:
        return {}
    found: dict[Delivery, Sequence[Row]] = {}
    for table, df in source.read(run.spark, list(versions)).items():
        of_table = {delivery: rows[-1] for delivery, rows in versions.items() if delivery.table == table}
        places = {delivery: (stored_name(row), row["ingest_id"]) for delivery, row in of_table.items()}
        now = _digests(_as_stored(run, table, sampled(df, run.config.source.sample), secret), "delivery")
        before = dict[tuple[object, ...], tuple[object, ...]]()
        if run.lakehouse.exists(table):
            stored = run.lakehouse.read(table)
            names, ingests = zip(*places.values(), strict=True)
            same_names = F.col("delivery").isin(*set(names)) & F.col("ingest_id").isin(*set(ingests))
            before = _digests(stored.filter(same_names), "delivery", "ingest_id")
        found |= {
            delivery: versions[delivery]
            for delivery, place in places.items()
            if now.get((delivery.name,)) == before.get(place)
        }
    return found


def _digests(rows: DataFrame, *keys: str) -> dict[tuple[object, ...], tuple[object, ...]]:
    """Return for each key the number of rows and a sum that depends on all their values, and not on their order."""
    # to JSON, because a hash of columns leaves out NULLs and can't read maps
    options = {"ignoreNullFields": "false", "timestampFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSSSSXXX"}
    content = F.to_json(F.struct(*sorted(set(rows.columns).difference(INGEST_COLUMNS, ["delivery"]))), options)
    total = F.sum(F.xxhash64(content).cast("decimal(38,0)"))
    found = rows.groupBy(*keys).agg(F.count(F.lit(1)).alias("rows"), total.alias("total")).collect()
    return {tuple(row[key] for key in keys): (row["rows"], row["total"]) for row in found}


def _days(run: Run, changed: Sequence[Delivery], number: int) -> dict[Delivery, tuple[date, date]]:
    """Return the first and the last day of the rows of changed files, for the tables whose rows have a day."""
    first_day = F.lit(run.config.cleaning.first_day)
    found: dict[Delivery, tuple[date, date]] = {}
    for table in {delivery.table for delivery in changed}:
        rows = run.lakehouse.read(table).filter(F.col("ingest_id") == number)
        day = day_of(table)
        if day is None:
            continue
        of_table = {delivery.name: delivery for delivery in changed if delivery.table == table}
        # a mistaken year would make the file speak about days that it says nothing about
        latest = F.date_add(F.to_date("ingested_at"), _PLANNED_DAYS if table == RAW_CAMPAIGNS.name else 1)
        plausible = day.between(first_day, latest)
        spans = rows.filter(F.col("delivery").isin(*of_table) & plausible).groupBy("delivery")
        for row in spans.agg(F.min(day).alias("first"), F.max(day).alias("last")).collect():
            found[of_table[row["delivery"]]] = (row["first"], row["last"])
    return found


def _as_stored(run: Run, table: str, rows: DataFrame, secret: pseudonyms.Secret) -> DataFrame:
    """Return rows of a source as they are stored, without the columns that the ingest adds."""
    mask = pseudonyms.mask if run.config.privacy.mask_texts else pseudonyms.as_written
    stored = pseudonyms.pseudonymous(rows, table, secret, mask)
    return _without_forgotten(run.lakehouse, stored) if "user_key" in stored.columns else stored


def _write_raw_tables(
    run: Run, raw: Mapping[str, DataFrame], secret: pseudonyms.Secret, number: int, after: int
) -> dict[str, int]:
    """Write what an ingest read; return raw table -> rows written."""
    lakehouse, now = run.lakehouse, F.lit(datetime.now(UTC))
    row_counts = dict[str, int]()
    for table in RAW_TABLES:
        of_ingest = F.col("ingest_id") == number
        if table.name in raw:
            rows = _as_stored(run, table.name, raw[table.name], secret)
            rows = rows.withColumns({"ingest_id": F.lit(number).cast("bigint"), "ingested_at": now})
        elif _may_hold(lakehouse, table.name, number) and not lakehouse.read(table.name).filter(of_ingest).isEmpty():
            # an ingest of that number was stopped, and what it read of this table is no longer delivered
            rows = lakehouse.read(table.name).limit(0)
        else:
            continue
        version = lakehouse.replace(table, rows, where={"ingest_id": [number]}, note={_INGEST: number}, after=after)
        row_counts[table.name] = lakehouse.rows_written(table.name, version)
    return row_counts


def _may_hold(lakehouse: Lakehouse, name: str, number: int) -> bool:
    """Return whether a raw table may hold rows of an ingest, by what its newest write recorded."""
    recorded = lakehouse.commit_metadata(name)
    return bool(recorded["version"] >= 0 and recorded.get(_INGEST, number) == number)


def require_same_secret(lakehouse: Lakehouse, secret: pseudonyms.Secret) -> None:
    """Require that all stored keys were made with this secret: with two secrets, one user would have two keys.

    Raises:
        ConfigError: some keys were made with another secret.
        DataError: the tables were written by a version that had no keys.
    """
    if not lakehouse.exists("user_keys"):
        if lakehouse.exists("deliveries"):
            rule = (
                "table does not exist, though deliveries were ingested: by a version that stored user ids. Begin anew"
            )
            raise DataError(f"{lakehouse.namespace}.user_keys", f"{rule}, with an empty tables.path")
        return
    if lakehouse.commit_metadata("user_keys").get(KEY_ID) == secret.key_id:
        return
    if not lakehouse.read("user_keys").filter(F.col("key_id") != secret.key_id).isEmpty():
        raise ConfigError(
            "privacy.secret: isn't the secret that the keys in user_keys were made with; give that one, or change it with "
            "`bp-spark rotate-keys`"
        )


def _add_user_keys(
    lakehouse: Lakehouse, raw: Mapping[str, DataFrame], secret: pseudonyms.Secret, number: int, after: int
) -> int:
    """Store the keys of new users; return how many users are left out because they were forgotten."""
    ids = [
        rows.select(pseudonyms.user_id("user_id").alias("user_id"))
        for rows in raw.values()
        if "user_id" in rows.columns
    ]
    if not ids:
        return 0
    distinct_ids = reduce(DataFrame.unionByName, ids).filter(F.col("user_id").isNotNull()).distinct()
    keyed = distinct_ids.withColumns(
        {
            "user_key": pseudonyms.user_key(F.col("user_id"), secret),
            "key_id": F.lit(secret.key_id),
            "ingest_id": F.lit(number).cast("bigint"),
        }
    )
    if not lakehouse.exists("user_keys"):
        lakehouse.append(USER_KEYS, keyed, note={KEY_ID: secret.key_id}, after=after)
        return 0
    new_users = checkpointed(keyed.join(lakehouse.read("user_keys").select("user_key"), "user_key", "left_anti"))
    rows = _without_forgotten(lakehouse, new_users)
    if not rows.isEmpty():
        lakehouse.append(USER_KEYS, rows, note={KEY_ID: secret.key_id}, after=after)
    return 0 if rows is new_users else new_users.count() - rows.count()


def _without_forgotten(lakehouse: Lakehouse, rows: DataFrame) -> DataFrame:
    """Return the rows whose ``user_key`` is not that of a forgotten user."""
    if not lakehouse.exists("forgotten"):
        return rows
    forgotten = lakehouse.read("forgotten").select("key_hash")
    return rows.join(forgotten, pseudonyms.key_hash(F.col("user_key")) == F.col("key_hash"), "left_anti")


def sampled(df: DataFrame, share: float) -> DataFrame:
    """Return the rows of a share of the users: the same users in every table, by a hash of their ids."""
    if share == 1 or "user_id" not in df.columns:
        return df
    bucket = F.pmod(F.xxhash64("user_id"), F.lit(_SAMPLE_BUCKETS))
    return df.filter(bucket < int(share * _SAMPLE_BUCKETS))
