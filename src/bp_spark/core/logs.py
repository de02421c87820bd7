"""Log lines on standard error, as text or JSON: what a job says of its stages while it runs.

Modules log to ``logging.getLogger(__name__)`` and stay silent until somebody listens; ``extra={"fields": {...}}`` brings what a
machine reads. Lines hold names, counts and versions, never a user's key or data.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any


class LogFormat(StrEnum):
    """How a line looks."""

    text = "text"
    json = "json"


class TextFormatter(logging.Formatter):
    """``2017-10-03 01:00:00 info: what happened``, in UTC; a traceback stands before its line."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record):%Y-%m-%d %H:%M:%S} {record.levelname.lower()}: {record.getMessage()}"
        return f"{self.formatException(record.exc_info)}\n{line}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One object a line: ``time``, ``level``, ``logger``, ``message``, the record's fields, ``traceback`` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": _time(record).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


class StderrHandler(logging.Handler):
    """Writes to standard error; under ``spark-submit``, which sends what Python writes there to standard output, to Java's."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if "PYSPARK_GATEWAY_PORT" in os.environ:
                _through_java(line)
            else:
                print(line, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def listen(form: LogFormat) -> None:
    """Write what this package logs, from ``INFO`` up, to standard error; called again, in the new form."""
    handler = StderrHandler()
    handler.setFormatter(JsonFormatter() if form is LogFormat.json else TextFormatter())
    logger = logging.getLogger("bp_spark")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _through_java(line: str) -> None:
    from py4j.protocol import Py4JError
    from pyspark import SparkContext
    from pyspark.java_gateway import launch_gateway

    try:
        gateway: Any = SparkContext._gateway or launch_gateway()
        gateway.jvm.java.lang.System.err.println(line)
    except (Py4JError, OSError):
        print(line, file=sys.stderr, flush=True)


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)
