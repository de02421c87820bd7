"""What a look at files tells of their form, and which files a pattern matches."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bp_spark.core.errors import DataError
from bp_spark.ingest.onboarding.listing import files_matching
from bp_spark.ingest.onboarding.sniff import Sample, sample_of

LINES = "who;at;paid\nu1;2024-05-01;1,50\nu2;2024-05-02;2,50\n"


def look(path: Path) -> Sample:
    return sample_of(files_matching("file:/", str(path)), "--orders")


def test_separator_quote_and_title_lines_are_seen(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Export of May\n\n" + LINES)
    sample = look(tmp_path / "a.txt")
    assert (sample.format, sample.options, sample.skip_lines) == ("csv", {"sep": ";"}, 2)
    assert sample.rows[0] == {"who": "u1", "at": "2024-05-01", "paid": "1,50"}
    (tmp_path / "b.csv").write_text("who,paid\n'u,1','2'\n'u,2','3'\n'u3','4'\n")
    assert look(tmp_path / "b.csv").options == {"quote": "'"}


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-8", {}),
        ("utf-8-sig", {}),
        ("cp1252", {"encoding": "windows-1252"}),
        ("utf-16", {"encoding": "UTF-16"}),
        ("utf-16-le", {"encoding": "UTF-16LE"}),
        ("utf-16-be", {"encoding": "UTF-16BE"}),
    ],
)
def test_encodings_are_seen(tmp_path: Path, encoding: str, named: dict[str, str]) -> None:
    (tmp_path / "a.csv").write_bytes(("name,paid\n" + "Café £,1.50\n" * 30).encode(encoding))
    sample = look(tmp_path / "a.csv")
    assert sample.options == named
    assert list(sample.columns) == ["name", "paid"]


def test_a_chinese_encoding_is_seen_and_a_doubt(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(("名称,金额\n" + "红色的杯子,1.50\n" * 30).encode("gb18030"))
    sample = look(tmp_path / "a.csv")
    assert (sample.options, sample.rows[0]) == ({"encoding": "GB18030"}, {"名称": "红色的杯子", "金额": "1.50"})
    assert "GB18030" in sample.doubts[0]


def test_a_file_without_a_header_names_its_columns_by_place(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2268318,pv,1511544070\n1,333345,buy,1511561733\n")
    sample = look(tmp_path / "a.csv")
    assert list(sample.columns) == ["_c0", "_c1", "_c2", "_c3"]
    assert sample.options == {"header": False}
    assert len(sample.rows) == 2
    # no message or comment holds what may be a user's row
    assert "2268318" not in " ".join(sample.doubts)


def test_the_last_rows_of_a_large_file_are_looked_at(tmp_path: Path) -> None:
    rows = [f"u{number},2024-{1 + number // 10000:02d}-01,{'x' * 40}\n" for number in range(60_000)]
    (tmp_path / "a.csv").write_text("who,at,note\n" + "".join(rows))
    months = {row["at"] for row in look(tmp_path / "a.csv").rows}
    assert {"2024-01-01", "2024-06-01"} <= months


def test_packed_files_json_and_parquet_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(LINES.encode()))
    assert look(tmp_path / "a.csv.gz").options == {"sep": ";"}
    order = {"id": 1, "customer": {"id": 7}, "line_items": [{"sku": "a", "price": "1.50"}, {"sku": "b", "price": "2"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(order) + "\n")
    lines = look(tmp_path / "a.jsonl")
    assert lines.explode == "line_items"
    assert [row["line_items.sku"] for row in lines.rows] == ["a", "b"]
    assert lines.rows[0]["customer.id"] == "7"
    (tmp_path / "b.json").write_text(json.dumps([order, order], indent=1))
    assert look(tmp_path / "b.json").options == {"multiLine": True}
    pq.write_table(pa.table({"uid": [17850.0, None], "paid": [1.5, 2.5]}), tmp_path / "a.parquet")
    assert look(tmp_path / "a.parquet").values("uid") == [17850.0]


def test_no_file_and_an_empty_one_are_clear_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    for pattern in ("*.json", "empty.csv"):
        with pytest.raises(DataError, match="pattern needs quotes"):
            look(tmp_path / pattern)


def test_patterns_match_as_those_of_hadoop(tmp_path: Path) -> None:
    for name in ("a1.csv", "a2.csv", "b[1].csv", "_hidden.csv", ".b.csv", "day=1/x.csv", "day=2/x.csv", "day=2/_y.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def matched(pattern: str) -> list[str]:
        return [file.address.removeprefix(f"file:{tmp_path}/") for file in files_matching(f"file:{tmp_path}/", pattern)]

    assert matched("a[12].csv") == ["a1.csv", "a2.csv"]
    assert matched("{a1,b*}.csv") == ["a1.csv", "b[1].csv"]
    assert matched(r"b\[1\].csv") == ["b[1].csv"]
    assert matched("day=*/*.csv") == matched("day=*") == ["day=1/x.csv", "day=2/x.csv"]
    assert matched("a?.[ct]sv") == ["a1.csv", "a2.csv"]
    assert matched("nothing/*.csv") == []
    assert [file.below for file in files_matching(f"file:{tmp_path}/", "day=*/*.csv")] == ["day=1/x.csv", "day=2/x.csv"]
    assert files_matching("file:/elsewhere/", f"{tmp_path}/a1.csv")[0].address == f"file:{tmp_path}/a1.csv"
