"""Promised mechanisms broken one by one: each has a test that fails then.

A mutation is a patch in ``tests/mutations``. Its header names the mechanism that it breaks and the test that must fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests/mutations"
COPIED = ("bench", "conf", "docs", "src", "tests", "pyproject.toml")
"""What a throw-away checkout holds."""
MOST_SECONDS = 900
_HEADER = re.compile(r"Breaks: (?P<mechanism>.+)\nTest: (?P<test>tests/[\w/]+\.py::\S.*)\n\n--- a/src/")
_ASSERTION = re.compile(r"AssertionError|assert |Failed: ")
"""Start of the message of a test that fails by what it asserts, ``pytest.raises`` included."""


@dataclass(frozen=True)
class Mutation:
    """A change of the source that breaks a promise.

    Attributes:
        path: the patch.
        mechanism: what it breaks.
        test: identity of the test that must fail.
    """

    path: Path
    mechanism: str
    test: str


def mutations(folder: Path = FOLDER) -> list[Mutation]:
    """Return all mutations, by name.

    Raises:
        ValueError: a patch has no header, or none that is understood.
    """
    found = []
    for path in sorted(folder.glob("*.patch")):
        header = _HEADER.match(path.read_text(encoding="utf-8"))
        if header is None:
            raise ValueError(f"{path}: must begin with lines 'Breaks: ...' and 'Test: tests/...', then a patch of src/")
        found.append(Mutation(path, header["mechanism"], header["test"]))
    return found


def apply(mutation: Mutation, root: Path, *options: str) -> str:
    """Apply a patch to the source below a folder; return why that is impossible, or an empty text."""
    # a repository above the folder is none of Git's business here
    variables = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent), "GIT_DIR": os.devnull}
    command = ("git", "apply", *options, str(mutation.path))
    return subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, check=False).stderr.strip()


@dataclass(frozen=True)
class Checkout:
    """A throw-away copy of the source, with a Python whose processes all import it.

    Attributes:
        root: its folder.
        python: the interpreter.
    """

    root: Path
    python: Path

    def outcomes(self, tests: Sequence[str]) -> dict[str, str]:
        """Run tests; return each test case -> ``passed``, ``failed`` by an assertion, or what else happened."""
        report = self.root / "report.xml"
        report.unlink(missing_ok=True)
        options = ("-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-o", "addopts=", "-m", "not integration")
        # with a PYTHONPATH of the source, the unbroken one would win
        left_out = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")
        variables = {name: value for name, value in os.environ.items() if name not in left_out}
        try:
            done = subprocess.run(
                (str(self.python), "-m", "pytest", *options, *tests),
                cwd=self.root,
                env=variables,
                capture_output=True,
                text=True,
                check=False,
                timeout=MOST_SECONDS * len(tests),
            )
        except subprocess.TimeoutExpired:
            return {"pytest": f"took more than {MOST_SECONDS} s"}
        tree = ElementTree.parse(report) if report.exists() else ElementTree.ElementTree()  # noqa: S314 (pytest's own)
        cases = list(tree.iter("testcase")) if report.exists() else []
        if not cases:
            return {"pytest": done.stdout[-2_000:] + done.stderr[-2_000:]}
        return {f"{case.get('classname')}::{case.get('name')}": _outcome(case) for case in cases}


def _outcome(case: ElementTree.Element) -> str:
    for kind in ("error", "failure", "skipped"):
        if (found := case.find(kind)) is not None:
            message = found.get("message", "")
            if kind == "failure" and _ASSERTION.match(message):
                return "failed"
            return f"{kind}: {message.splitlines()[0][:300] if message else ''}"
    return "passed"


@contextmanager
def checkout() -> Iterator[Checkout]:
    """Make a throw-away copy of the source for the block."""
    with tempfile.TemporaryDirectory(prefix="bp-mutations-") as folder:
        root = Path(folder) / "checkout"
        root.mkdir()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, root / name)
        yield Checkout(root, _interpreter(Path(folder) / "venv", root / "src"))


def _interpreter(folder: Path, source: Path) -> Path:
    """Make an environment with the packages of this one, in which the package's source lies elsewhere."""
    venv.EnvBuilder(symlinks=os.name != "nt").create(folder)
    variables = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", variables))
    here = sysconfig.get_path("purelib")
    # the first path wins: the installed package is behind it
    (packages / "mutated.pth").write_text(f"{source}\nimport site; site.addsitedir({here!r})\n", encoding="utf-8")
    return folder / "bin" / Path(sys.executable).name


def survivors(chosen: Sequence[Mutation]) -> Iterator[tuple[Mutation, str]]:
    """Yield each mutation with what its test did: an empty text where the test failed by an assertion, as it must.

    Raises:
        RuntimeError: a test does not pass on the present source.
    """
    with checkout() as copy:
        before = copy.outcomes(sorted({mutation.test for mutation in chosen}))
        broken = {case: outcome for case, outcome in before.items() if outcome != "passed"}
        if broken or not before:
            raise RuntimeError(f"tests that must pass before anything is broken: {broken or 'none'}")
        for mutation in chosen:
            if problem := apply(mutation, copy.root):
                raise RuntimeError(f"{mutation.path.name}: does not apply: {problem}")
            try:
                outcomes = copy.outcomes([mutation.test]).values()
            finally:
                apply(mutation, copy.root, "--reverse")
            others = [outcome for outcome in outcomes if outcome not in ("passed", "failed")]
            yield mutation, "" if "failed" in outcomes and not others else "; ".join(others) or "passed"
