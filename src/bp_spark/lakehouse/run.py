"""One call of a job: its stages, timed, logged and recorded in ``runs`` with the table versions they read and wrote."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, Row, SparkSession

from bp_spark.core import extras, logs, scratch
from bp_spark.core.config import Config, TablesConfig, digest
from bp_spark.core.errors import BpSparkError
from bp_spark.core.spark_errors import translate
from bp_spark.core.version import __version__
from bp_spark.lakehouse import openlineage
from bp_spark.lakehouse.schema import Table
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import RUNS

_MESSAGE = 500
"""Characters of an error that are recorded."""
_ROW_COUNTS = ("rows_in", "rows_out")
"""Figures with a column of their own in ``runs``."""

logger = logging.getLogger(__name__)


class TrackedLakehouse(Lakehouse):
    """A lakehouse that records which versions were read and written since :meth:`touched` was last called.

    A table that is read more than once counts as of the first time, unless a version is asked for.
    """

    def __init__(self, spark: SparkSession, config: TablesConfig) -> None:
        super().__init__(spark, config)
        self._read: dict[str, int] = {}
        self._written: dict[str, int] = {}

    def touched(self) -> dict[str, dict[str, int]]:
        """Return ``read`` and ``written``, table -> version each, and begin anew.

        What a stage reads of its own result does not count as read.
        """
        touched = {"read": self._read, "written": self._written}
        self._read, self._written = {}, {}
        return touched

    def read(self, name: str, version: int | None = None) -> DataFrame:
        """Read a table and record its version; see :meth:`Lakehouse.read`."""
        rows = super().read(name, version)
        if version is not None:
            self._read[name] = version
        else:
            self._record_read(name)
        return rows

    def collect(self, table: Table) -> list[Row]:
        """Return a small table's rows and record its version; see :meth:`Lakehouse.collect`."""
        rows = super().collect(table)
        if self.exists(table.name):
            self._record_read(table.name)
        return rows

    def _record_read(self, name: str) -> None:
        if name != RUNS.name and name not in self._read and name not in self._written:
            self._read[name] = self.version(name)

    def replace(self, table: Table, df: DataFrame, **arguments: Any) -> int:
        """Replace rows and record the version; see :meth:`Lakehouse.replace`."""
        return self._recorded_write(super().replace, table, df, arguments)

    def append(self, table: Table, df: DataFrame, **arguments: Any) -> int:
        """Append rows and record the version; see :meth:`Lakehouse.append`."""
        return self._recorded_write(super().append, table, df, arguments)

    def merge(self, table: Table, df: DataFrame, **arguments: Any) -> int:
        """Merge rows and record the version; see :meth:`Lakehouse.merge`."""
        return self._recorded_write(super().merge, table, df, arguments)

    def _recorded_write(
        self, write: Callable[..., int], table: Table, df: DataFrame, arguments: Mapping[str, Any]
    ) -> int:
        # a write looks at the table itself, which is no reading
        read_before = dict(self._read)
        version = write(table, df, **arguments)
        self._read, self._written[table.name] = read_before, version
        return version


def is_written_lately(lakehouse: Lakehouse, name: str, day: date, every_days: int) -> bool:
    """Return whether the newest write of a table is of one of the last dates before a date, fewer than ``every_days`` ago.

    A write of the date itself doesn't count: a night that is run again asks again, and finds its inputs unchanged.

    Args:
        lakehouse: the tables.
        name: table whose writes record their ``score_date``.
        day: the date.
        every_days: days from one write to the next.
    """
    newest = lakehouse.commit_metadata(name).get("score_date")
    return newest is not None and 0 < (day - date.fromisoformat(newest)).days < every_days


@dataclass
class Step:
    """The write of one table: what its newest commit recorded, and what the next one will.

    A write that adds to the table, and any write after :meth:`reserve`, fails with a conflict if another run has written the
    table since the step began.

    Attributes:
        lakehouse: where the table is.
        output: the table.
        inputs: digest of all that the rows are made from; the block may set it, where only it knows.
        recorded: more values that each commit records, such as the date that its rows are of.
        newest: metadata of the newest commit (:meth:`Lakehouse.commit_metadata`).
        previous: metadata of the newest commit that recorded the same values.
        version: version that writes follow: the newest commit's, then the reservation's, then that of the step's own write.
        figures: figures of the stage, for ``runs``.
        written: whether the step wrote the table.
    """

    lakehouse: Lakehouse
    output: Table
    inputs: str
    recorded: Mapping[str, str]
    newest: Mapping[str, Any]
    previous: Mapping[str, Any]
    version: int
    figures: dict[str, Any] = field(default_factory=dict)
    written: bool = False

    @classmethod
    def begin(cls, lakehouse: Lakehouse, output: Table, inputs: str = "", **recorded: str) -> Step:
        """Look at the newest commit of the output; no stage is recorded, as :meth:`Run.step` does."""
        newest = lakehouse.commit_metadata(output.name)
        previous = lakehouse.commit_metadata(output.name, **recorded) if recorded else newest
        return cls(lakehouse, output, inputs, recorded, newest, previous, newest["version"])

    @property
    def unchanged(self) -> bool:
        """Whether the newest commit was made from the same inputs."""
        return bool(self.previous.get("inputs") == self.inputs)

    def reserve(self) -> int:
        """Reserve the output, for a step that writes other tables before it; see :meth:`Lakehouse.reserve`.

        Returns:
            The reservation, for ``after`` of these other writes.
        """
        self.version = self.lakehouse.reserve(self.output, {**self.newest, "version": self.version})
        return self.version

    def replace(
        self,
        df: DataFrame,
        *,
        where: Mapping[str, Sequence[object]] | None = None,
        after: int | None = None,
        **note: Any,
    ) -> int:
        """Replace the output's rows; see :meth:`Lakehouse.replace`.

        Args:
            df: the new rows.
            where: partition column -> values, to replace only these.
            after: :attr:`version`, where the rows depend on what the table held.
            **note: more values to record with the commit.

        Returns:
            The version written.
        """
        return self._wrote(self.lakehouse.replace(self.output, df, where=where, after=after, **self._metadata(note)))

    def append(self, df: DataFrame, **note: Any) -> int:
        """Add rows to the output after :attr:`version`; see :meth:`Lakehouse.append`."""
        return self._wrote(self.lakehouse.append(self.output, df, after=self.version, **self._metadata(note)))

    def merge(
        self,
        df: DataFrame,
        *,
        within: Mapping[str, Sequence[object]],
        deleted_keys: DataFrame | None = None,
        **note: Any,
    ) -> int:
        """Update and insert rows of the output after :attr:`version`; see :meth:`Lakehouse.merge`."""
        return self._wrote(
            self.lakehouse.merge(
                self.output,
                df,
                within=within,
                deleted_keys=deleted_keys,
                after=self.version,
                **self._metadata(note),
            )
        )

    def _metadata(self, note: Mapping[str, Any]) -> dict[str, Any]:
        return {"inputs": self.inputs, "note": {**self.recorded, **note}}

    def _wrote(self, version: int) -> int:
        self.version, self.written = version, True
        return version


@dataclass
class Run:
    """One call of a job: its stages, recorded in ``runs`` when it ends, well or not.

    Attributes:
        spark: session to work in.
        config: all settings.
        job: name of the job.
        run_id: identity of the run.
        records: rows of ``runs``, one per stage that ended.
    """

    spark: SparkSession
    config: Config
    job: str = ""
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lakehouse = TrackedLakehouse(self.spark, self.config.tables)

    @contextmanager
    def stage(self, name: str, inputs: str = "") -> Iterator[dict[str, Any]]:
        """Time a stage and record the figures that the block puts into the yielded mapping.

        ``figures["status"]`` may be set to ``unchanged``; ``rows_in`` and ``rows_out`` become columns of their own. An error
        is recorded and passed on.
        """
        figures: dict[str, Any] = {}
        with self._timed(name, figures, lambda: inputs):
            yield figures

    @contextmanager
    def step(self, name: str, output: Table, inputs: str = "", **recorded: str) -> Iterator[Step]:
        """Record a stage that writes one table, and give the block what it needs to skip, reserve and write.

        The block returns early where :attr:`Step.unchanged` holds, or where it finds nothing to write. A block that writes
        nothing to the output is recorded as ``unchanged``. A write records ``inputs`` in the output's log, so that a run that
        was killed later need not do it again.

        Args:
            name: name of the stage.
            output: the table that the step writes, last if it writes several.
            inputs: digest of all that the rows are made from.
            **recorded: more values to record with each commit; only commits with the same values count as previous ones.
        """
        figures: dict[str, Any] = {}
        begun: list[Step] = []
        with self._timed(name, figures, lambda: begun[0].inputs if begun else inputs):
            begun.append(step := Step.begin(self.lakehouse, output, inputs, **recorded))
            step.figures = figures
            yield step
            if not step.written:
                figures["status"] = "unchanged"

    @contextmanager
    def _timed(self, name: str, figures: dict[str, Any], inputs: Callable[[], str]) -> Iterator[None]:
        started, clock = datetime.now(UTC), time.monotonic()
        status, error = "failed", None
        self._log(name, "started")
        try:
            with translate():
                yield
            status = str(figures.pop("status", "done"))
        except BaseException as raised:
            error = describe_error(raised)
            raise
        finally:
            seconds = time.monotonic() - clock
            self._record(name, status, error, started=started, seconds=seconds, inputs=inputs(), figures=figures)

    @property
    def failed(self) -> bool:
        """Whether a stage failed."""
        return any(record["status"] == "failed" for record in self.records)

    def fail(self, error: BaseException) -> None:
        """Log an error between two stages, and record it as a stage that bears the job's name."""
        self._record(
            self.job, "failed", describe_error(error), started=datetime.now(UTC), seconds=0.0, inputs="", figures={}
        )

    def close(self) -> None:
        """Write the stages to ``runs``, and send them to OpenLineage where that is asked for."""
        if self.records:
            rows = self.spark.createDataFrame(self.records, RUNS.schema)
            Lakehouse(self.spark, self.config.tables).append(RUNS, rows)
        if self.config.tracking.openlineage:
            openlineage.send(self.records, self.config.tables)

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
        row_counts = {name: figures.pop(name, None) for name in _ROW_COUNTS}
        self.records.append(
            {
                "run_id": self.run_id,
                "job": self.job,
                "stage": stage,
                "started_at": started,
                "seconds": seconds,
                "status": status,
                "error": error,
                **row_counts,
                **self.lakehouse.touched(),
                "inputs": inputs,
                "code_version": __version__,
                "config_digest": digest(self.config),
                "figures": {key: str(value) for key, value in figures.items()},
            }
        )
        self._log(stage, status, seconds=round(seconds, 3), error=error, **row_counts)

    def _log(self, stage: str, status: str, **facts: Any) -> None:
        facts = {key: value for key, value in facts.items() if value is not None}
        words = [f"{self.job} {self.run_id}, {stage}: {status}"]
        if "seconds" in facts:
            words.append(f"after {facts['seconds']:.1f} s")
        words += [f"{facts[name]:,} {name.replace('_', ' ')}" for name in _ROW_COUNTS if name in facts]
        if "error" in facts:
            words.append(facts["error"])
        level = logging.ERROR if status == "failed" else logging.INFO
        fields = {"run_id": self.run_id, "job": self.job, "stage": stage, "status": status, **facts}
        logger.log(level, "%s", ", ".join(words), extra={"fields": fields})


@contextmanager
def recorded(spark: SparkSession, config: Config, job: str) -> Iterator[Run]:
    """Yield a run whose stages are written to ``runs`` when the block ends.

    An error of the block is raised in preference to an error of that write.

    Raises:
        PlatformError: ``tracking.openlineage`` is set, and its extra is not installed.
    """
    if config.tracking.openlineage:
        extras.require("openlineage", "tracking.openlineage")
    run = Run(spark, config, job)
    try:
        with logs.each_warning_once(), translate(), scratch.opened(spark, config.tables):
            yield run
    except BaseException as error:
        # a mistaken tables.path must not become a lakehouse by the record of the mistake
        if not run.failed and run.lakehouse.exists(RUNS.name):
            run.fail(error)
        try:
            run.close()
        except Exception as write_error:
            # people have to see the error that ended the job
            logger.warning("runs: can't be written (%s)", describe_error(write_error))
        raise
    run.close()


def describe_error(error: BaseException) -> str:
    """Describe an error in one line, for the record and the log.

    The words of foreign errors are left out, for these may quote a row.
    """
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
