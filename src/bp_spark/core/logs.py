"""Log lines on standard error, as text or JSON: the progress of a job.

Modules log to ``logging.getLogger(__name__)``, and :func:`listen` makes that visible.
``extra={"fields": {...}}`` adds fields for machines. Lines hold names, counts and versions, never a user's key or data.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

_logged: ContextVar[set[str]] = ContextVar("logged", default=set())  # noqa: B039 - one set for all that is no run


class LogFormat(StrEnum):
    """Format of a line."""

    text = "text"
    json = "json"


class TextFormatter(logging.Formatter):
    """Formatter of lines as ``2017-10-03 01:00:00 info: message``, in UTC; a traceback precedes its line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = f"{_time(record):%Y-%m-%d %H:%M:%S} {record.levelname.lower()}: {record.getMessage()}"
        return f"{self.formatException(record.exc_info)}\n{line}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """Formatter of one JSON object per line: ``time``, ``level``, ``logger``, ``message``, fields, maybe ``traceback``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object as JSON."""
        entry: dict[str, Any] = {
            "time": _time(record).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class StderrHandler(logging.Handler):
    """Handler that writes to standard error.

    ``spark-submit`` sends Python's standard error to standard output. There, the handler writes to Java's standard error.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            line = self.format(record)
            if "PYSPARK_GATEWAY_PORT" in os.environ:
                _through_java(line)
            else:
                print(line, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def listen(form: LogFormat) -> None:
    """Write this package's log, from ``INFO`` up, to standard error; a second call changes the form."""
    handler = StderrHandler()
    handler.setFormatter(JsonFormatter() if form is LogFormat.json else TextFormatter())
    logger = logging.getLogger("bp_spark")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


@contextmanager
def each_warning_once() -> Iterator[None]:
    """Let :func:`warn_once` log each warning anew, once for the block: a run."""
    before = _logged.set(set())
    try:
        yield
    finally:
        _logged.reset(before)


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, unless this run has logged it; outside of runs, unless this process has."""
    if message not in _logged.get():
        _logged.get().add(message)
        logger.warning("%s", message)


def _through_java(line: str) -> None:
    from py4j.protocol import Py4JError
    from pyspark import SparkContext
    from pyspark.java_gateway import launch_gateway

    try:
        gateway: Any = SparkContext._gateway or launch_gateway()  # type: ignore[no-untyped-call]
        gateway.jvm.java.lang.System.err.println(line)
    except (Py4JError, OSError):
        print(line, file=sys.stderr, flush=True)


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)
