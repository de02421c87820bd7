"""Commands of a small platform, killed at random moments as by kill -9, and run again to their end."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

import bp_spark
from bp_spark import pipeline
from bp_spark.core.errors import BpSparkError
from bp_spark.core.session import get_session
from bp_spark.lakehouse import leftovers
from tests.support.aged_logs import optimize_and_vacuum
from tests.support.harness import AS_OF, Contents, Killed, Platform, another, differences, forget_cached, tables

GONE = "u3"
"""The user who is forgotten."""
KEPT_DAYS = (datetime.now(UTC).date() - date(2024, 1, 20)).days
KEPT = f"privacy.retention_days.events={KEPT_DAYS}"
"""Events of the first days are too old."""
_GARBAGE = "m\n"
"""Start of py4j's calls that free an object of Java: they may come at any time, and change nothing."""
_MOST_ATTEMPTS = 40
_SOURCES = (Path(__file__).parents[2], Path(bp_spark.__file__).parents[1])


@dataclass(frozen=True)
class Setting:
    """Where commands run.

    Attributes:
        platform: its files.
        waiting: files that the platform will deliver.
        lakehouse: the tables.
        bundle: the bundle that scores.
    """

    platform: Platform
    waiting: Path
    lakehouse: Path
    bundle: Path

    def withdraw(self) -> None:
        """Take back what was waiting and has been delivered."""
        for path in self.waiting.rglob("*.json"):
            (self.platform.folder / path.relative_to(self.waiting)).unlink(missing_ok=True)

    def run(self, spark: SparkSession, command: str) -> None:
        """Run a command by its name."""
        config = self.platform.config(self.lakehouse, KEPT)
        match command:
            case "featurize":
                pipeline.featurize(spark, config, [AS_OF])
            case "deliver and featurize":
                # with their times, by which files are known again
                shutil.copytree(self.waiting, self.platform.folder, copy_function=shutil.copy2, dirs_exist_ok=True)
                pipeline.featurize(spark, config, [AS_OF])
            case "score":
                pipeline.score(spark, config, AS_OF, self.bundle)
            case "forget":
                pipeline.forget(spark, config, [GONE])
            case "retain":
                pipeline.retain(spark, config)

    def maintain(self, spark: SparkSession, generator: random.Random) -> None:
        """OPTIMIZE and VACUUM some tables, which leaves neither old versions nor their changes."""
        names = sorted(log.parent.name for log in self.lakehouse.glob("bp/*/_delta_log") if any(log.iterdir()))
        for name in generator.sample(names, 3):
            optimize_and_vacuum(spark, self.lakehouse / "bp" / name)


@dataclass
class Calls:
    """Counts the calls that a command makes to Java and to the file system, and ends it at one of them.

    Each effect of a command on the world is one of these calls: what lies between two of them leaves no trace.

    Attributes:
        last: number of the call at which the process dies; ``None`` for never.
        is_undone: whether it dies before that call has committed to a table: files are there, and the log has no entry.
        beside: what another process does right before a call, by the call's number.
        ends: seconds from the start to the end of each call.
        is_dead: whether the process has died.
        is_beside: whether another process is at work: its calls are its own.
    """

    lakehouse: Path
    last: int | None = None
    is_undone: bool = False
    beside: dict[int, Callable[[], None]] = field(default_factory=dict)
    ends: list[float] = field(default_factory=list)
    is_dead: bool = False
    is_beside: bool = False
    _started: float = field(default_factory=time.monotonic)

    def make(self, call: Callable[[], Any]) -> Any:
        if self.is_dead:
            # the dead do nothing more, whatever is still to be cleaned up
            raise Killed
        number = len(self.ends)
        if job := self.beside.pop(number, None):
            self.is_beside = True
            job()
            self.is_beside = False
        dies = number == self.last
        before = _log_entries(self.lakehouse) if dies else set()
        answer = call()
        self.ends.append(time.monotonic() - self._started)
        if dies:
            self.is_dead = True
            if self.is_undone:
                for path in _log_entries(self.lakehouse) - before:
                    path.unlink(missing_ok=True)
            raise Killed
        return answer


def _log_entries(lakehouse: Path) -> set[Path]:
    """Return the commits, checkpoints and checksums of all tables; a table's first commit stays, for it has no files."""
    found = lakehouse.glob("bp/*/_delta_log/*")
    return {path for path in found if path.is_file() and not path.name.lstrip(".").startswith(f"{0:020d}")}


@contextmanager
def counted(spark: SparkSession, calls: Calls) -> Iterator[None]:
    """Let the block's calls to Java, and its deletions of files, go through ``calls``."""
    client, thread = spark.sparkContext._gateway._gateway_client, threading.get_ident()
    send, delete = client.send_command, leftovers._delete_file

    def sent(command: str, *arguments: Any, **named: Any) -> Any:
        if threading.get_ident() != thread or command.startswith(_GARBAGE) or calls.is_beside:
            return send(command, *arguments, **named)
        return calls.make(lambda: send(command, *arguments, **named))

    def deleted(system: Any, path: str) -> None:
        if calls.is_dead:
            raise Killed
        delete(system, path)

    client.send_command, leftovers._delete_file = sent, deleted
    try:
        yield
    finally:
        del client.send_command
        leftovers._delete_file = delete


@dataclass(frozen=True)
class Step:
    """A command of an undisturbed run.

    Attributes:
        command: its name.
        ends: as of :class:`Calls`.
        tables: contents after it.
    """

    command: str
    ends: Sequence[float]
    tables: dict[str, Contents]


def undisturbed(spark: SparkSession, setting: Setting, commands: Sequence[str]) -> list[Step]:
    """Run commands one after the other."""
    steps = []
    for command in commands:
        calls = Calls(setting.lakehouse)
        with counted(spark, calls):
            setting.run(spark, command)
        steps.append(Step(command, calls.ends, tables(setting.lakehouse / "bp")))
    return steps


@dataclass
class Outcome:
    """What came of killed commands: kills, errors that other jobs gave, and differences to an undisturbed run."""

    kills: int = 0
    errors: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def killed_at_random(
    spark: SparkSession, setting: Setting, steps: Sequence[Step], kills: int, generator: random.Random
) -> Outcome:
    """Run the commands of an undisturbed run; kill random ones at random moments, and run each again to its end.

    A moment is drawn evenly from the seconds that the command took undisturbed. In one of three runs, OPTIMIZE and VACUUM run
    beside it, or before it is run again.
    """
    outcome = Outcome()
    planned = [generator.randrange(len(steps)) for _ in range(kills)]
    for number, step in enumerate(steps):
        left = planned.count(number)
        for _ in range(left + _MOST_ATTEMPTS):
            calls = Calls(setting.lakehouse)
            if left:
                calls.last = bisect(step.ends, generator.uniform(0, step.ends[-1]))
                calls.is_undone = generator.random() < 0.5
            session = another(spark)
            if generator.random() < 1 / 3:
                moment = bisect(step.ends, generator.uniform(0, step.ends[-1]))
                calls.beside[moment] = lambda: setting.maintain(another(spark), generator)
            try:
                with counted(spark, calls):
                    setting.run(session, step.command)
            except Killed:
                outcome.kills += 1
            except BpSparkError as error:
                # what the maintenance beside it took away
                outcome.errors.append(f"{step.command}: {error}")
                continue
            finally:
                left -= bool(left)
                spark.catalog.clearCache()
                forget_cached(spark)
            if not calls.is_dead and not left:
                break
        else:
            raise AssertionError(f"{step.command} does not end: {outcome.errors[-1:]}")
        found = differences(setting.lakehouse, step.tables)
        outcome.differences += [f"{step.command}: {name}: {rows}" for name, rows in found.items()]
    return outcome


# --- kill -9 ---------------------------------------------------------------------------------------------------------------


def killed_process(setting: Setting, step: Step, generator: random.Random) -> bool:
    """Run a command in a process of its own, and kill it and its Java at a random moment; return whether it still ran."""
    places = (setting.platform.folder, setting.waiting, setting.lakehouse, setting.bundle)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.random_kills", step.command, *map(str, places)],
        # forget searches the folders of work and reports too
        cwd=setting.lakehouse.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, _SOURCES))},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        # a young Java takes several times as long
        ended, _, _ = select.select([process.stdout], [], [], generator.uniform(0, 3 * step.ends[-1]))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    return not ended


def main(command: str, platform: str, waiting: str, lakehouse: str, bundle: str) -> None:
    """Run a command, after a line that says that the session is there."""
    setting = Setting(Platform(Path(platform)), Path(waiting), Path(lakehouse), Path(bundle))
    spark = get_session(setting.platform.config(lakehouse), "to be killed")
    print("begun", flush=True)
    setting.run(spark, command)


if __name__ == "__main__":
    main(*sys.argv[1:])
