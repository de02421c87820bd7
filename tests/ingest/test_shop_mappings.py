"""The exports of docs/mappings come to the money that is right, and so do files with faults that were reported in public."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from pyspark.sql import SparkSession

from bench.file_cases import KINDS
from bench.file_shops import FOLDER, SHOPS
from bench.files import judged, outcomes

FEW = 2
"""Cases of each kind that a test reads; `make bench-files` reads all."""


def test_each_mapping_has_its_right_values() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/shop.yaml")} == set(SHOPS)


def test_mappings_and_cases_of_files_come_to_what_is_right(spark: SparkSession, tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if kind not in ("the language", "times", "options")]
    few = {f"{kind}: {name}": case for kind in kinds for name, case in islice(KINDS[kind].items(), FEW)}
    cases = {**SHOPS, **few}
    found = outcomes(spark, tmp_path, cases)
    assert {name: problems for name, case in cases.items() if (problems := judged(case, found[name]).problems)} == {}
