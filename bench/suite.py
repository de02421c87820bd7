"""How long the tests take, how many they are and what they cover: ``python -m bench.suite [PART ...]``.

In: parts (``test``, ``integrations``, ``fast``, ``coverage``; all by default). Out: one JSON line a figure on standard output:

- ``suite.seconds``: wall time of ``make test`` after installation.
- ``suite.tests``: tests that passed in it.
- ``suite.ci_seconds``: the same with ``make check-integrations`` after it, as in ``.ci/run``.
- ``suite.fast_seconds``: wall time of ``make test-fast``.
- ``suite.coverage_percent``: lines of the package that the tests of ``make test`` and ``make check-integrations`` run, those in
  Spark's Python workers, ranks and jobs of their own included, in percent.

Raises ``SystemExit`` with the output of a part that failed: the time of a suite that fails is no figure.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import say

ROOT = Path(__file__).parents[1]
PARTS = ("test", "integrations", "fast", "coverage")
PYTEST = (sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")


def run(*command: str, **variables: str) -> tuple[float, str]:
    """Run a command in the checkout; seconds and what it said."""
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}")
    return time.monotonic() - started, done.stdout


def coverage_percent() -> float:
    """Lines that the suite covers, in percent of all."""
    with tempfile.TemporaryDirectory(prefix="bp-coverage-") as folder:
        measured = {"COVERAGE_PROCESS_START": str(ROOT / "pyproject.toml"), "COVERAGE_FILE": f"{folder}/data"}
        run(*PYTEST, **measured)
        run(sys.executable, "-m", "pytest", "-m", "integration", **measured)
        coverage = (sys.executable, "-m", "coverage")
        file = f"--data-file={folder}/data"
        run(*coverage, "combine", "--quiet", file, *map(str, Path(folder).glob("data.*")))
        return float(run(*coverage, "report", file)[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Arguments in, the figures of each part out."""
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"what to measure of {', '.join(PARTS)}")
    parts = parser.parse_args(arguments).parts
    seconds = 0.0
    if "test" in parts:
        seconds, said = run("make", "test")
        say("suite.seconds", round(seconds, 2))
        say("suite.tests", round(int(re.findall(r"(\d+) passed", said)[-1]), 2))
    if "integrations" in parts:
        more, _ = run("make", "check-integrations")
        if seconds:
            say("suite.ci_seconds", round(seconds + more, 2))
    if "fast" in parts:
        say("suite.fast_seconds", round(run("make", "test-fast")[0], 2))
    if "coverage" in parts:
        say("suite.coverage_percent", round(coverage_percent(), 2))


if __name__ == "__main__":
    main()
