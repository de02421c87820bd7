"""Temporary tables of a job, for platforms that refuse to persist frames.

Serverless compute refuses ``persist`` and checkpoints. Inside :func:`opened` a frame can be stored beside the tables instead.
At its end all stored frames are deleted. :func:`clear` deletes those that a killed job left.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from bp_spark.core.config import TablesConfig
from bp_spark.core.stores import folder_of, remove_folder

_NAME = "bp_spark_scratch"
_NOT_SUPPORTED = "0A000"
"""SQLSTATE of a feature that is not supported."""


@dataclass(frozen=True)
class _Scratch:
    """Frames that a job has stored.

    Attributes:
        tables: where the lakehouse is.
        names: names of the stored frames.
    """

    tables: TablesConfig
    names: list[str] = field(default_factory=list)

    def store(self, df: DataFrame) -> DataFrame:
        name = f"{_NAME}_{uuid.uuid4().hex}"
        self.names.append(name)
        if self.tables.path is None:
            df.write.saveAsTable(f"{self.tables.namespace}.{name}")
            return df.sparkSession.read.table(f"{self.tables.namespace}.{name}")
        address = f"{_folder(self.tables.path, self.tables.namespace)}/{name}"
        df.write.parquet(address)
        return df.sparkSession.read.schema(df.schema).parquet(address)

    def delete(self, spark: SparkSession) -> None:
        for name in self.names:
            if self.tables.path is None:
                spark.sql(f"DROP TABLE IF EXISTS {self.tables.namespace}.{name}")
            else:
                remove_folder(f"{_folder(self.tables.path, self.tables.namespace)}/{name}")


_opened: ContextVar[_Scratch | None] = ContextVar("scratch", default=None)


@contextmanager
def opened(spark: SparkSession, tables: TablesConfig) -> Iterator[None]:
    """Let frames be stored beside the tables, for the block."""
    scratch = _Scratch(tables)
    before = _opened.set(scratch)
    try:
        yield
    finally:
        _opened.reset(before)
        scratch.delete(spark)


def stored_instead(df: DataFrame, refusal: Exception) -> DataFrame:
    """Store a frame that the platform refused to persist; return its rows, read from files.

    Args:
        df: the frame.
        refusal: the platform's error.

    Raises:
        Exception: ``refusal``, where it is another error or no block of :func:`opened` is active.
    """
    scratch = _opened.get()
    if scratch is None or not isinstance(refusal, PySparkException) or refusal.getSqlState() != _NOT_SUPPORTED:
        raise refusal
    return scratch.store(df)


def clear(spark: SparkSession, tables: TablesConfig) -> None:
    """Delete the stored frames of all jobs; jobs that still run end with an error."""
    if tables.path is not None:
        remove_folder(_folder(tables.path, tables.namespace))
        return
    for row in spark.sql(f"SHOW TABLES IN {tables.namespace} LIKE '{_NAME}_*'").collect():
        spark.sql(f"DROP TABLE IF EXISTS {tables.namespace}.{row['tableName']}")


def _folder(path: str, namespace: str) -> str:
    return f"{folder_of(path, namespace)}/_scratch"
