"""Steps that erasure, retention and key rotation share: what follows from deleted rows, and the proof at the end.

Other jobs may run meanwhile. They can't write what they computed before, and end with an error: run them again.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from safetensors import safe_open

from bp_spark.core import scratch
from bp_spark.core.errors import DataError
from bp_spark.core.session import checkpointed
from bp_spark.features.job import aggregate
from bp_spark.governance import residue_scan
from bp_spark.ingest import cleaning, texts
from bp_spark.ingest.texts_job import embed
from bp_spark.lakehouse.run import Run
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import (
    CAMPAIGN_CONTACTS,
    COHORTS,
    CONSULTATION_TOPICS,
    CONSULTATIONS,
    DELIVERIES,
    EVENTS,
    EXPERIMENT_RESULTS,
    EXPERIMENTS,
    GIVEN_LABELS,
    LABEL_REQUESTS,
    MARKET_FORECAST,
    MARKET_SEGMENTS,
    PROFILE_TABLES,
    PROSPECT_SCORES,
    QUARANTINE,
    RAW_TABLES,
    RECOMMENDATIONS,
    SCORES_LATEST,
    TABLE_NAMES,
    TEXT_EMBEDDINGS,
    TEXTS,
    TOTALS,
    USER_DAILY,
    USER_KEYS,
)


def tables_of_users(lakehouse: Lakehouse) -> list[str]:
    """Return the names of the tables that have a column ``user_key``."""
    return [name for name in lakehouse.existing(TABLE_NAMES) if "user_key" in lakehouse.read(name).columns]


def stop_other_writers(lakehouse: Lakehouse) -> dict[str, int]:
    """Refuse from now on all writes of results that other runs computed from the tables so far, even in memory.

    Returns:
        Table -> version of the reservation under which it may be written.
    """
    of_contacts = (CONSULTATIONS, CONSULTATION_TOPICS, CAMPAIGN_CONTACTS)
    of_ingest = (DELIVERIES, EVENTS, *of_contacts, TEXTS, TEXT_EMBEDDINGS)
    of_dates = (SCORES_LATEST, PROSPECT_SCORES, MARKET_SEGMENTS, TOTALS, COHORTS, MARKET_FORECAST, RECOMMENDATIONS)
    derived = (*of_ingest, USER_DAILY, *of_dates)
    reservations = {
        table.name: lakehouse.reserve(table, lakehouse.commit_metadata(table.name))
        for table in (*derived, LABEL_REQUESTS, GIVEN_LABELS, EXPERIMENTS, EXPERIMENT_RESULTS)
        if lakehouse.exists(table.name)
    }
    for table in (*RAW_TABLES, USER_KEYS):
        if lakehouse.exists(table.name):
            lakehouse.invalidate_writers(table, reservations["deliveries"])
    if lakehouse.exists("quarantine"):
        lakehouse.invalidate_writers(QUARANTINE, reservations["events"])
    for table in PROFILE_TABLES:
        if table is not MARKET_SEGMENTS and "market_segments" in reservations and lakehouse.exists(table.name):
            lakehouse.invalidate_writers(table, reservations["market_segments"])
    return reservations


def update_user_days(run: Run) -> None:
    """Delete the user-days that no event supports any more; use the change feed where it still exists."""
    if run.lakehouse.exists("events"):
        embed(run)
        aggregate(run, rebuild=False)


def erase_unused_texts(run: Run) -> dict[str, object]:
    """Delete the texts that no raw row and no event holds, their embeddings, and the checkpoints that carry them.

    Returns:
        Figures of the stage: deleted rows by table, deleted checkpoints, and a note that names affected bundles.
    """
    lakehouse = run.lakehouse
    if not lakehouse.exists("texts"):
        return {}
    raw_tables = {table.name: lakehouse.read(table.name) for table in RAW_TABLES if lakehouse.exists(table.name)}
    raw_text_ids = cleaning.texts(raw_tables).select(texts.text_id(F.col("text")).alias("text_id"))
    event_text_ids = lakehouse.read("events").select("text_id").filter("text_id IS NOT NULL")
    used_text_ids = raw_text_ids.unionByName(event_text_ids).distinct()
    figures: dict[str, object] = {}
    for name in ("texts", "text_embeddings"):
        if lakehouse.exists(name):
            unused = lakehouse.read(name).select("text_id").distinct().join(used_text_ids, "text_id", "left_anti")
            figures[name] = lakehouse.erase(name, checkpointed(unused), "t.text_id = s.text_id")
    stored_text_ids = lakehouse.read("texts").select("text_id")
    checkpoints = _folders_with_erased_texts(run, Path(run.config.training.work_dir), stored_text_ids)
    for folder in checkpoints:
        shutil.rmtree(folder, ignore_errors=True)
    figures["checkpoints"] = len(checkpoints)
    bundles = _folders_with_erased_texts(run, Path(run.config.bundles), stored_text_ids)
    if bundles:
        names = ", ".join(folder.name for folder in bundles)
        figures["note"] = f"{names}: carry a text that was erased; train again, and delete them and their versions"
    return figures


def _folders_with_erased_texts(run: Run, root: Path, stored_text_ids: DataFrame) -> list[Path]:
    """Return the folders below a root that hold a file of weights with a text that is not stored any more."""
    folders = []
    for path in sorted(root.rglob("*.safetensors")):
        with safe_open(path, "numpy") as tensors:
            name = next((name for name in ("ids", "vocabulary_ids") if name in tensors.keys()), None)  # noqa: SIM118
            ids = [] if name is None else tensors.get_tensor(name).tolist()
        if ids:
            text_ids = run.spark.createDataFrame(pd.DataFrame({"text_id": ids}))
            if not text_ids.join(stored_text_ids, "text_id", "left_anti").isEmpty():
                folders.append(path.parent)
    return folders


def vacuum_tables(run: Run) -> None:
    """Delete the files of older versions of all tables that hold users or texts."""
    lakehouse = run.lakehouse
    with run.stage("vacuum") as figures:
        scratch.clear(run.spark, run.config.tables)
        groups = ("market_segments", "totals", "cohorts", "market_forecast", "experiment_results")
        without_user_key = ("quarantine", "texts", "text_embeddings", *groups)
        others = (name for name in without_user_key if lakehouse.exists(name))
        deleted_files = [lakehouse.vacuum(name) for name in (*tables_of_users(lakehouse), *others)]
        figures["tables"], figures["files"] = len(deleted_files), sum(deleted_files)


def prove_erased(run: Run, keys: Collection[str], ids: Collection[str]) -> None:
    """Read every file, whether a table needs it or not, and require that none holds a key or an id.

    Args:
        run: The run that erased them.
        keys: User keys, as in ``user_key``.
        ids: The platform's user ids.

    Raises:
        DataError: A file holds one of them.
    """
    config = run.config
    other_folders = [config.training.work_dir, config.bundles, config.evaluation.reports]
    with run.stage("prove") as figures:
        folders = [*run.lakehouse.folders(TABLE_NAMES), *(str(Path(folder).absolute()) for folder in other_folders)]
        residue = residue_scan.search(run.spark, folders, keys, ids)
        figures["parquet_files"], figures["other_files"] = residue.parquet_files, residue.other_files
        files = residue.files_with_residue
        figures["found"] = len(files)
        if files:
            rule = f"still holds what was to be erased, as do {len(files) - 1} more files; if it isn't a copy that "
            raise DataError(files[0], f"{rule}somebody made, another job was running: run this again")
