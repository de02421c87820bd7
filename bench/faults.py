"""What is promised of faults, shown: ``python -m bench.faults [PART ...]``.

In: parts (``faults``, ``mutations``, ``nights``; all by default). Out: one JSON line a figure on standard output:

- ``trust.faults_total``: faults of docs/promises.md whose tests ran.
- ``trust.faults_survived``: those whose tests passed.
- ``trust.rows_lost``, ``trust.rows_doubled``: rows that a table lacked, or had too often, after a fault; by comparison with an
  undisturbed run.
- ``trust.mutations``: promised mechanisms that were broken, each by a patch of ``tests/mutations``.
- ``trust.mutations_caught``: those whose test failed by an assertion.
- ``trust.kills``: random kills of random commands.
- ``trust.kill_differences``: tables that differed from those of an undisturbed run after them.
- ``trust.late_night_ratio``: time of a night after three years, by that of the first nights; see :mod:`bench.late_nights`.

What failed or survived is named on standard error.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from bench import say
from bench.mutations import mutations, survivors

ROOT = Path(__file__).parents[1]
PROMISE = re.compile(r"^\| (?P<fault>.+) \| .+ \| `(?P<test>tests/[\w/]+\.py::\w+)` \|$", re.MULTILINE)
"""A row of the table in docs/promises.md."""
ROWS = re.compile(r"(\d+) rows lost, (\d+) rows doubled")
"""What :func:`tests.support.harness.assert_same_tables` says of each table that differs."""


def promises() -> list[tuple[str, str]]:
    """Return (fault, test) of each row of docs/promises.md."""
    return PROMISE.findall((ROOT / "docs/promises.md").read_text(encoding="utf-8"))


def cases(*tests: str, **variables: str) -> dict[str, list[ElementTree.Element]]:
    """Run tests; return file::name of each test -> its cases as pytest reports them."""
    with tempfile.TemporaryDirectory(prefix="bp-faults-") as folder:
        report = Path(folder) / "report.xml"
        options = ("-n", "2", "--dist", "loadfile", "-o", "addopts=", "-q", f"--junitxml={report}")
        done = subprocess.run(
            (sys.executable, "-m", "pytest", *options, *tests),
            cwd=ROOT,
            env=os.environ | variables,
            stdout=sys.stderr,
            check=False,
        )
        if not report.exists():
            sys.exit(f"pytest ended with {done.returncode}")
        found: dict[str, list[ElementTree.Element]] = {}
        for case in ElementTree.parse(report).getroot().iter("testcase"):  # noqa: S314 (written by pytest, just now)
            test = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '').partition('[')[0]}"
            found.setdefault(test, []).append(case)
        return found


def _failed(case: ElementTree.Element) -> bool:
    return any(case.find(kind) is not None for kind in ("error", "failure", "skipped"))


def faults() -> None:
    """Print how many faults were put in, how many were survived, what it cost, and how many kills were among them."""
    promised = promises()
    found = cases(*sorted({test for _, test in promised}))
    totals = dict.fromkeys(("survived", "lost", "doubled", "kills", "differences"), 0)
    for fault, test in promised:
        if found.get(test) and not any(map(_failed, found[test])):
            totals["survived"] += 1
        else:
            print(f"not survived: {fault} ({test})", file=sys.stderr)
    for case in (case for of_test in found.values() for case in of_test):
        for lost, doubled in ROWS.findall("".join(case.itertext())):
            totals["lost"] += int(lost)
            totals["doubled"] += int(doubled)
        for said in case.iter("property"):
            if (name := said.get("name", "")) in totals:
                totals[name] += int(said.get("value", "0"))
    say("trust.faults_total", len(promised))
    say("trust.faults_survived", totals["survived"])
    say("trust.rows_lost", totals["lost"])
    say("trust.rows_doubled", totals["doubled"])
    say("trust.kills", totals["kills"])
    say("trust.kill_differences", totals["differences"])


def break_mechanisms() -> None:
    """Print how many mechanisms were broken, and for how many of them a test failed."""
    chosen = mutations()
    caught = 0
    for mutation, outcome in survivors(chosen):
        caught += not outcome
        if outcome:
            print(f"not caught: {mutation.path.name} by {mutation.test}: {outcome}", file=sys.stderr)
    say("trust.mutations", len(chosen))
    say("trust.mutations_caught", caught)


def nights() -> None:
    """Print how much longer a night takes after three years."""
    from bench.late_nights import late_night_ratio

    say("trust.late_night_ratio", round(late_night_ratio(), 3))


PARTS: Mapping[str, Callable[[], None]] = {
    "faults": faults,
    "mutations": break_mechanisms,
    "nights": nights,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Arguments in, the figures of each part out."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=tuple(PARTS), help=f"what to show of {', '.join(PARTS)}")
    for part in parser.parse_args(arguments).parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
