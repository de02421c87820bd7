"""The synthetic platform as a whole: users, logs and tables, written as files with the mapping to read them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pyarrow import fs
from pyspark.sql import SparkSession

from bp_spark.core.config import SyntheticConfig
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.stores import file_system
from bp_spark.ingest.sources.synthetic import currency, items, logs, users
from bp_spark.ingest.sources.synthetic.dirt import DELIVERED, soiled, write_log

LOGS = {
    "transactions": logs.transactions,
    "behaviours": logs.behaviours,
    "searches": logs.searches,
    "reviews": logs.reviews,
}
"""The logs that become events."""


@dataclass(frozen=True)
class Summary:
    """What was written.

    Args:
        folder: where the files are.
        rows: rows of each table.
        dirt: rows of each (log, kind of dirt).
        seconds: how long it took.
    """

    folder: str
    rows: Mapping[str, int]
    dirt: Mapping[tuple[str, str], int]
    seconds: float


def generate(spark: SparkSession, config: SyntheticConfig, folder: str) -> Summary:
    """Write the files of a synthetic platform.

    Args:
        spark: session to write with.
        config: size, seed, period and dirt of the platform.
        folder: where to write; absent or empty. A path, or an address that Spark and pyarrow know.

    Returns:
        Counts of rows and dirt, as also in ``truth/dirt`` (table, kind, rows).

    Raises:
        ConfigError: there are too few items for one of each type and price tier.
        DataError: the folder is not empty.
    """
    started = time.monotonic()
    if config.item_count < items.CELLS:
        raise ConfigError(
            f"synthetic.items ({config.item_count}): must be {items.CELLS} at least, one of each type and tier"
        )
    folder = folder.rstrip("/")
    _require_empty(folder)
    # read back, so that no optimiser computes a user's latent truth anew for each filter that follows
    users.users(spark, config).write.parquet(f"{folder}/truth/users")
    truth = spark.read.parquet(f"{folder}/truth/users")
    lines = users.lines(users.visits(truth, config), config)
    rows: dict[str, int] = {}
    dirt: dict[tuple[str, str], int] = {}
    for log, rows_of in {**LOGS, "consultations": logs.consultations}.items():
        if log in config.kinds:
            counts = write_log(soiled(rows_of(lines, config), log, config), log, folder)
            rows[log] = counts.pop("rows")
            dirt.update({(log, kind): count for kind, count in counts.items()})
    tables = {"users": truth, "rates": currency.rates(spark, config)}
    if "items" in config.kinds:
        tables["items"] = items.items(spark, config)
    for name, df in tables.items():
        delivery = f"{folder}/{name}/delivery_day={config.first_day}"
        df.select(*DELIVERED[name]).coalesce(max(1, config.users // 1_000_000)).write.parquet(delivery)
        rows[name] = spark.read.parquet(delivery).count()
    dirt_rows = [(log, kind, count) for (log, kind), count in dirt.items()]
    dirt_table = spark.createDataFrame(dirt_rows, "table string, kind string, rows bigint")
    dirt_table.coalesce(1).write.parquet(f"{folder}/truth/dirt")
    _write_text(f"{folder}/source.yaml", yaml.safe_dump(mapping(list(rows)), sort_keys=False))
    return Summary(folder, rows, dirt, time.monotonic() - started)


def mapping(tables: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of the ``files`` source for these tables; paths are relative to the folder."""
    sections: dict[str, Any] = {"timezone": "UTC"}
    for table in (name for name in DELIVERED if name in tables):
        columns: dict[str, Any] = {column: column for column in DELIVERED[table]}
        for column in ("ts", "signup_ts"):
            if column in columns:
                columns[column] = {"column": column, "format": "yyyy-MM-dd HH:mm:ss"}
        if table == "users":
            columns["segment"] = {"columns": {name: columns.pop(name) for name in ("age", "income")}}
        sections[table] = {"path": f"{table}/*/*.parquet", "format": "parquet", "columns": columns}
    return sections


def _require_empty(folder: str) -> None:
    files, path = file_system(folder)
    info = files.get_file_info(path)
    if info.is_file or files.get_file_info(fs.FileSelector(path, allow_not_found=True)):
        raise DataError(folder, "must be absent or an empty folder: nothing is overwritten")


def _write_text(address: str, text: str) -> None:
    files, path = file_system(address)
    with files.open_output_stream(path) as stream:
        stream.write(text.encode())
