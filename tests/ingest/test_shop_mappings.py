"""The exports of docs/mappings come to the money that is right, and so do files with faults that were reported in public."""

from __future__ import annotations

from pathlib import Path

from pyspark.sql import SparkSession

from bench.file_cases import CASES
from bench.file_shops import FOLDER, SHOPS
from bench.files import judged, outcomes

PLAIN = {
    name: case
    for name, case in CASES.items()
    if not (case.columns or case.table or case.mapping or case.error)
    and all(file.endswith(".csv") for file in case.files)
}
"""Cases that share a mapping, and so are read at once; `make bench-files` reads all."""


def test_each_mapping_has_its_right_values() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/shop.yaml")} == set(SHOPS)


def test_mappings_and_cases_of_files_come_to_what_is_right(spark: SparkSession, tmp_path: Path) -> None:
    cases = {**SHOPS, **PLAIN}
    found = outcomes(spark, tmp_path, cases)
    assert {name: problems for name, case in cases.items() if (problems := judged(case, found[name]).problems)} == {}
