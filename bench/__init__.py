"""Measurements side by side; results go to ``build/bench``."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil


def publish(figures: Mapping[str, Any], out: Path) -> None:
    """Write the figures to a file as JSON, and to standard output."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(figures, indent=2)
    out.write_text(text + "\n", encoding="utf-8")
    print(text)


def say(figure: str, value: float) -> None:
    """Print a figure as a line of JSON on standard output."""
    print(json.dumps({"figure": figure, "value": value}), flush=True)


class Usage:
    """What this process and all below it (Spark's Java, Python workers) use in the block.

    They are looked at ten times a second, and not asked once they have ended: Spark's daemon ignores the end of its workers,
    with which their time is in nobody's books.

    Attributes:
        cpu_seconds: of all of them, those that ended meanwhile included.
        driver_peak: resident memory, bytes, of the largest Java process.
        worker_peak: the same of the largest Python process below this one.
    """

    def __enter__(self) -> Usage:
        self.driver_peak = self.worker_peak = 0
        self._this = psutil.Process()
        self._now: dict[psutil.Process, float] = {}
        self._look()
        self._before = dict(self._now)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    @property
    def cpu_seconds(self) -> float:
        return sum(seconds - self._before.get(process, 0.0) for process, seconds in self._now.items())

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self._look()

    def _look(self) -> None:
        for process in (self._this, *self._this.children(recursive=True)):
            with suppress(psutil.Error):
                times = process.cpu_times()
                self._now[process] = times.user + times.system
                name, size = process.name(), process.memory_info().rss
                if "java" in name:
                    self.driver_peak = max(self.driver_peak, size)
                elif "python" in name and process != self._this:
                    self.worker_peak = max(self.worker_peak, size)
