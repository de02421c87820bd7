"""What was erased is found wherever it still stands, in Parquet and in other files, and nothing else is taken for it."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from bp_spark.governance import residue_scan

IDS = ("acct/17:x", "o'neil", "anna smith", 'say "hi"', "/u/17-a", "anna@shop", "back\\slash", "小明/2024/东")
HOLDING = {
    **{f"{one} at the end": f"says {one}" for one in IDS},
    **{f"{one} in a sentence": f"({one}), they said" for one in IDS},
    **{f"{one} in JSON": json.dumps({"user": one}) for one in IDS},
    **{f"{one} in JSON of its own letters": json.dumps({"user": one}, ensure_ascii=False) for one in IDS},
    **{f"{one} in a URL": f"https://shop.example/?user={quote(one, safe='')}&page=1" for one in IDS},
}
OTHERS = (
    "acct/17:xy",
    "xacct/17:x",
    "acct/17",
    "o'neill",
    "co'neil",
    "joanna smith",
    "anna smithson",
    "anna",
    "say hi",
)


@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_ids_with_any_characters_are_found_inside_texts(spark: SparkSession, tmp_path: Path, kind: str) -> None:
    for number, text in enumerate([*HOLDING.values(), *OTHERS]):
        path = tmp_path / f"{number:03}.{kind}"
        if kind == "txt":
            path.write_text(text, encoding="utf-8")
        else:
            pd.DataFrame({"query": ["nothing", text]}).to_parquet(path)
    found = residue_scan.search(spark, [str(tmp_path)], keys=(), ids=IDS).files_with_residue
    assert sorted(int(Path(path).stem) for path in found) == [*range(len(HOLDING))]
