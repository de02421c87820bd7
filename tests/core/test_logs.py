"""Log lines: what people read, what machines read."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from bp_spark.core import logs
from bp_spark.core.logs import LogFormat


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    package = logging.getLogger("bp_spark")
    before = package.handlers[:], package.level, package.propagate
    yield logging.getLogger("bp_spark.somewhere")
    package.handlers[:], package.propagate = before[0], before[2]
    package.setLevel(before[1])


def test_a_line_is_text_or_an_object_and_written_once(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in (LogFormat.text, LogFormat.json):
        logs.listen(form)
        logger.info("score: %s", "done", extra={"fields": {"run_id": "1a", "seconds": 1.5}})
    captured = capsys.readouterr()
    text, line = captured.err.splitlines()
    assert captured.out == ""
    assert text.endswith(" info: score: done")
    told = json.loads(line)
    assert told.pop("time").endswith("+00:00")
    assert told == {
        "level": "info",
        "logger": "bp_spark.somewhere",
        "message": "score: done",
        "run_id": "1a",
        "seconds": 1.5,
    }


def test_a_traceback_is_kept_in_one_object(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    logs.listen(LogFormat.json)
    try:
        raise ValueError("a\nb")
    except ValueError:
        logger.exception("unexpected")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: a\nb" in json.loads(line)["traceback"]
