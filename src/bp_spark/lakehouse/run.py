"""One call of a job: its stages, timed, logged and recorded in ``runs`` with the table versions they read and wrote."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from bp_spark.core import scratch
from bp_spark.core.config import Config, TablesConfig, digest
from bp_spark.core.errors import BpSparkError
from bp_spark.core.spark_errors import translate
from bp_spark.core.version import __version__
from bp_spark.lakehouse.tables import RUNS, Lakehouse, Table

_MESSAGE = 500
_TOLD = ("rows_in", "rows_out")

logger = logging.getLogger(__name__)


class TrackedLakehouse(Lakehouse):
    """A lakehouse that knows which versions were read and written since :meth:`touched` was last asked.

    A table that is read more than once counts as of the first time, unless a version is asked for.
    """

    def __init__(self, spark: SparkSession, config: TablesConfig) -> None:
        super().__init__(spark, config)
        self._read: dict[str, int] = {}
        self._written: dict[str, int] = {}

    def touched(self) -> dict[str, dict[str, int]]:
        """``read`` and ``written``: table -> version; what a stage reads of its own result is not counted."""
        touched = {"read": self._read, "written": self._written}
        self._read, self._written = {}, {}
        return touched

    def read(self, name: str, version: int | None = None) -> DataFrame:
        found = super().read(name, version)
        if version is not None:
            self._read[name] = version
        elif name != RUNS.name and name not in self._read and name not in self._written:
            self._read[name] = self.version(name)
        return found

    def replace(self, table: Table, df: DataFrame, **how: Any) -> int:
        return self._written_by(super().replace, table, df, how)

    def append(self, table: Table, df: DataFrame, **how: Any) -> int:
        return self._written_by(super().append, table, df, how)

    def merge(self, table: Table, df: DataFrame, **how: Any) -> int:
        return self._written_by(super().merge, table, df, how)

    def _written_by(self, write: Callable[..., int], table: Table, df: DataFrame, how: Mapping[str, Any]) -> int:
        # a write looks at the table itself: that is no reading
        before = dict(self._read)
        version = write(table, df, **how)
        self._read, self._written[table.name] = before, version
        return version


@dataclass
class Run:
    """One call of a job: its stages, recorded in ``runs`` when it ends, well or not."""

    spark: SparkSession
    config: Config
    job: str = ""
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lakehouse = TrackedLakehouse(self.spark, self.config.tables)

    @contextmanager
    def stage(self, name: str, inputs: str = "") -> Iterator[dict[str, object]]:
        """Time a stage; the figures that the block puts into the yielded mapping are kept.

        ``figures["status"]`` may be set to ``unchanged``; ``rows_in`` and ``rows_out`` become columns of their own. An error
        is recorded and passed on.
        """
        started, clock = datetime.now(UTC), time.monotonic()
        figures: dict[str, Any] = {}
        status, error = "failed", None
        self._log(name, "started")
        try:
            with translate():
                yield figures
            status = str(figures.pop("status", "done"))
        except BaseException as raised:
            error = described(raised)
            raise
        finally:
            seconds = time.monotonic() - clock
            self._record(name, status, error, started=started, seconds=seconds, inputs=inputs, figures=figures)

    @property
    def failed(self) -> bool:
        """Whether a stage has."""
        return any(record["status"] == "failed" for record in self.records)

    def fail(self, error: BaseException) -> None:
        """Log, and record as a stage that bears the job's name, an error between two stages."""
        self._record(
            self.job, "failed", described(error), started=datetime.now(UTC), seconds=0.0, inputs="", figures={}
        )

    def close(self) -> None:
        """Write the stages to ``runs``."""
        if self.records:
            rows = self.spark.createDataFrame(self.records, RUNS.schema)
            Lakehouse(self.spark, self.config.tables).append(RUNS, rows)

    def _record(
        self,
        stage: str,
        status: str,
        error: str | None,
        *,
        started: datetime,
        seconds: float,
        inputs: str,
        figures: dict[str, Any],
    ) -> None:
        rows = {name: figures.pop(name, None) for name in _TOLD}
        self.records.append(
            {
                "run_id": self.run_id,
                "job": self.job,
                "stage": stage,
                "started_at": started,
                "seconds": seconds,
                "status": status,
                "error": error,
                **rows,
                **self.lakehouse.touched(),
                "inputs": inputs,
                "code_version": __version__,
                "config_digest": digest(self.config),
                "figures": {key: str(value) for key, value in figures.items()},
            }
        )
        self._log(stage, status, seconds=round(seconds, 3), error=error, **rows)

    def _log(self, stage: str, status: str, **told: Any) -> None:
        told = {key: value for key, value in told.items() if value is not None}
        words = [f"{self.job} {self.run_id}, {stage}: {status}"]
        if "seconds" in told:
            words.append(f"after {told['seconds']:.1f} s")
        words += [f"{told[name]:,} {name.replace('_', ' ')}" for name in _TOLD if name in told]
        if "error" in told:
            words.append(told["error"])
        level = logging.ERROR if status == "failed" else logging.INFO
        fields = {"run_id": self.run_id, "job": self.job, "stage": stage, "status": status, **told}
        logger.log(level, "%s", ", ".join(words), extra={"fields": fields})


@contextmanager
def recorded(spark: SparkSession, config: Config, job: str) -> Iterator[Run]:
    """A run, whose stages are written to ``runs`` when the block ends; an error of the block goes before one of that write."""
    run = Run(spark, config, job)
    try:
        with translate(), scratch.opened(spark, config.tables):
            yield run
    except BaseException as error:
        # a mistaken tables.path shall not become a lakehouse by the record of the mistake
        if not run.failed and run.lakehouse.exists(RUNS.name):
            run.fail(error)
        try:
            run.close()
        except Exception as trouble:
            # what the job died of is what people have to see
            logger.warning("runs: can't be written (%s)", described(trouble))
        raise
    run.close()


def described(error: BaseException) -> str:
    """An error in one line, for the record and the log: without the words of foreign errors, for these may quote a row."""
    name, words = type(error).__name__, ""
    if isinstance(error, BpSparkError):
        words = str(error)
    elif isinstance(error, OSError):
        words = error.strerror or ""
    elif isinstance(error, PySparkException):
        words = error.getCondition() or ""
    elif isinstance(error, Py4JJavaError):
        words = str(error.java_exception.getClass().getName())
    return ": ".join(part for part in (name, words) if part).splitlines()[0][:_MESSAGE]
