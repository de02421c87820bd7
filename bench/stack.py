"""Whether the packages of today agree with one another: ``python -m bench.stack``.

Out: one JSON line a figure on standard output, 1 or 0 each; what failed, on standard error:

- ``stack.feeds_equal``: Petastorm and pyarrow read the same rows of the same snapshot, each once over all shards.
- ``stack.connect_rows_equal``: two nights through Spark Connect leave the tables that a classic session leaves, row by row.
- ``stack.wheel_demo_ok``: the demo runs from the wheel, in an environment and a folder of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench import say

ROOT = Path(__file__).parents[1]
CHECKS = {
    "feeds_equal": ("tests/training/test_loader.py", "not integration"),
    "connect_rows_equal": ("tests/test_connect.py", "integration"),
    "wheel_demo_ok": ("tests/test_package.py", "integration"),
}
"""Figure -> the tests that tell it, and which of them."""


def passes(tests: str, marked: str) -> bool:
    """Whether the tests of a file pass, at least one of them; a skipped one tells nothing."""
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, tests)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode or "skipped" in last[0]:
        print(done.stdout[-5_000:], done.stderr[-2_000:], file=sys.stderr, flush=True)
        return False
    return True


def main() -> None:
    """Print the figures; the exit status is 1 where one is 0."""
    found = {}
    for figure, (tests, marked) in CHECKS.items():
        found[figure] = passes(tests, marked)
        say(f"stack.{figure}", int(found[figure]))
    sys.exit(not all(found.values()))


if __name__ == "__main__":
    main()
