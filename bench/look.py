"""How long a look takes: ``python -m bench.look``.

In: nothing; a small lakehouse is built first. Out: one JSON line a figure on standard output, each the median of three commands
from start to end:

- ``look.help_seconds``: ``bp-spark --help``.
- ``look.sql_seconds``: ``bp-spark sql`` with a count by level.
- ``look.profile_seconds``: ``bp-spark profile --user``.
- ``look.report_seconds``: ``bp-spark report``.
- ``look.doctor_seconds``: ``bp-spark doctor``.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from bench import say
from bench.long_lived import SECRET, Platform, day

NIGHTS = 30
TIMES = 3
COUNTS = "SELECT level, count(*) FROM bp.scores_latest GROUP BY level ORDER BY level"


def build(folder: Path) -> Path:
    """Make a lakehouse with scores and profiles of a few users; return its file of settings."""
    from bp_spark import pipeline
    from bp_spark.core.session import get_session
    from tests.support.harness import small_bundle

    platform = Platform(folder, small_bundle(folder / "bundles/small", 20.0).folder)
    settings = platform.settings("lakehouse")
    spark = get_session(settings, "looks")
    try:
        for night in range(NIGHTS):
            platform.deliver("lakehouse", night)
        pipeline.featurize(spark, settings, [day(NIGHTS)])
        pipeline.score(spark, settings, day(NIGHTS), platform.bundle)
        pipeline.profile(spark, settings)
    finally:
        spark.stop()
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
    return file


def seconds(folder: Path, *words: str) -> float:
    """Return the median time of a command.

    Raises:
        CalledProcessError: it fails.
    """
    command = (str(Path(sys.executable).with_name("bp-spark")), *words)
    times = []
    for _ in range(TIMES):
        started = time.monotonic()
        subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
        times.append(time.monotonic() - started)
    return statistics.median(times)


def main() -> None:
    """Print the figures."""
    os.environ["BP_SPARK_SECRET"] = SECRET
    with tempfile.TemporaryDirectory(prefix="bp-look-") as name:
        folder = Path(name)
        config = ("--config", str(build(folder)))
        looks = {
            "help": ("--help",),
            "sql": ("sql", COUNTS, *config),
            "profile": ("profile", "--user", "u1", *config),
            "report": ("report", "--date", str(day(NIGHTS)), *config),
            "doctor": ("doctor", *config),
        }
        for look, words in looks.items():
            say(f"look.{look}_seconds", round(seconds(folder, *words), 2))


if __name__ == "__main__":
    main()
