"""Each promise of docs/promises.md names a test that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| .+ \| .+ \| `(tests/[\w/]+\.py)::(\w+)` \|$", re.MULTILINE)


def test_every_promise_has_its_test_and_every_test_of_a_fault_its_promise() -> None:
    promised = ROW.findall((ROOT / "docs/promises.md").read_text(encoding="utf-8"))
    assert len(promised) >= 25
    for file, name in promised:
        assert name in _tests(ROOT / file), f"{file} has no {name}"
    told = {name for _, name in promised}
    for file in (ROOT / "tests/faults").glob("test_*.py"):
        assert _tests(file) <= told, f"{file}: no promise names {_tests(file) - told}"


def _tests(file: Path) -> set[str]:
    found = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {node.name for node in found if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
