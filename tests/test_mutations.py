"""The patches that break promised mechanisms fit the present source and tests; ``make faults`` runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.mutations import ROOT, apply, mutations


def test_each_patch_fits_the_source() -> None:
    refused = {mutation.path.name: apply(mutation, ROOT, "--check") for mutation in mutations()}
    assert {name: problem for name, problem in refused.items() if problem} == {}
    assert len(refused) >= 80


def test_each_patch_names_a_test_that_is_there() -> None:
    tests = {mutation.test for mutation in mutations()}
    command = (sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider")
    collected = subprocess.run((*command, *sorted(tests)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert collected.returncode == 0, collected.stdout[-2_000:]


def test_a_patch_without_a_test_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.patch").write_text("--- a/src/x.py\n+++ b/src/x.py\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.patch: must begin with"):
        mutations(tmp_path)
