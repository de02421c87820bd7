"""A newcomer's folder: what is written, what stays, and mistakes that are told before a session starts."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from bp_spark.cli import app, common
from bp_spark.core import config
from bp_spark.core.errors import BpSparkError, ConfigError, DataError
from bp_spark.ingest.onboarding.preflight import Preflight, look_at_files, require_ready
from bp_spark.ingest.onboarding.start import start
from bp_spark.ingest.sources.mapping import load_mapping

ORDERS = "customer,order_no,sku,paid_at,paid\nu1,1,a,2024-05-13 10:00:00,€1.50\nu2,2,b,2024-05-14 10:00:00,€2.50\n"
MAPPING = """
transactions:
  path: "*.csv"
  format: csv
  columns: {user_id: customer, ts: paid_at, amount: {column: paid, symbol: "€"}}
"""


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a session was asked for")

    monkeypatch.setattr(common, "start_session", fail)


def flight(folder: Path, mapping: str = MAPPING, **files: str | bytes) -> Preflight:
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "shop.yaml").write_text(mapping)
    name = str(folder / "shop.yaml")
    return look_at_files(name, load_mapping(Path(name)))


def test_mapping_settings_and_secret_are_written_and_fit_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports/a.csv").write_text(ORDERS)
    result = start(Path("shop"), {"transactions": "exports/*.csv"})
    assert (result.currency, result.open) == ("EUR", [])
    settings = config.load(tmp_path / "shop/settings.yaml")
    mapping = require_ready(settings)
    assert mapping is not None
    assert mapping.tables["raw_transactions"].path == f"{tmp_path}/exports/*.csv"
    assert settings.tables.path == f"{tmp_path}/shop/lakehouse"
    assert stat.S_IMODE((tmp_path / "shop/secret").stat().st_mode) == 0o600
    # files in the folder are named from there, so that it can be moved
    (tmp_path / "shop/a.csv").write_text(ORDERS)
    start(Path("shop"), {"transactions": "shop/*.csv"}, force=True)
    assert load_mapping(tmp_path / "shop/shop.yaml").tables["raw_transactions"].path == "*.csv"


def test_nothing_is_overwritten_unless_it_is_asked_for_and_the_secret_never(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(ORDERS)
    patterns = {"transactions": str(tmp_path / "a.csv")}
    start(tmp_path / "shop", patterns)
    secret = (tmp_path / "shop/secret").read_text()
    (tmp_path / "shop/shop.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"has shop\.yaml and settings\.yaml already; --force"):
        start(tmp_path / "shop", patterns)
    assert (tmp_path / "shop/shop.yaml").read_text() == "mine"
    start(tmp_path / "shop", patterns, "PLN", force=True)
    assert "customer" in (tmp_path / "shop/shop.yaml").read_text()
    assert "currency: PLN" in (tmp_path / "shop/settings.yaml").read_text()
    assert (tmp_path / "shop/secret").read_text() == secret


def test_a_pattern_without_quotes_is_named(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{name}.csv") for name in "abc"]
    for words in ([str(tmp_path / "shop"), "--orders", *files], ["--orders", *files, str(tmp_path / "shop")]):
        result = CliRunner().invoke(app.app, ["init", *words])
        assert isinstance(result.exception, ConfigError)
        assert f"or the shell makes a list of files of it: --orders '{tmp_path}/*.csv'" in str(result.exception)
    assert not (tmp_path / "shop").exists()


def test_init_says_what_to_fill_in_and_what_to_do_next(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(ORDERS.replace("€", ""))
    result = CliRunner().invoke(app.app, ["init", str(tmp_path / "shop"), "--orders", str(tmp_path / "*.csv")])
    assert result.exit_code == 0
    assert "Fill in first, where TODO stands: cleaning.currency" in result.output
    assert f"bp-spark check --config {tmp_path}/shop/settings.yaml" in result.output.replace("\n", "")
    assert "u1" not in result.output


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("command", [["check"], ["featurize", "--as-of", "2024-10-01"]])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (["shop.yaml", "ts: paid_at", "tss: paid_at"], "did you mean ts?"),
        (["shop.yaml", "amount:", "amount: {expr: 'sum(paid)'} #"], "is an aggregate"),
        (["settings.yaml", "secret: ", "secret: file:/nowhere/secret #"], "openssl rand -hex 32"),
        (["settings.yaml", "currency: EUR", "currency: TODO"], "is TODO"),
    ],
)
def test_mistakes_are_told_before_a_session_starts(
    command: Sequence[str], change: Sequence[str], problem: str, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text(ORDERS)
    start(tmp_path / "shop", {"transactions": str(tmp_path / "a.csv")})
    path = tmp_path / "shop" / change[0]
    assert change[1] in path.read_text()
    path.write_text(path.read_text().replace(change[1], change[2]))
    result = CliRunner().invoke(app.app, [*command, "--config", str(tmp_path / "shop/settings.yaml")])
    assert isinstance(result.exception, BpSparkError)
    assert result.exception.exit_code == ConfigError.exit_code
    assert problem in str(result.exception)


@pytest.mark.usefixtures("no_session")
def test_check_wants_files_and_a_currency_of_three_letters(tmp_path: Path) -> None:
    (tmp_path / "shop.yaml").write_text(MAPPING)
    (tmp_path / "a.csv").write_text(ORDERS)
    files = ["source.kind=files", f"source.mapping={tmp_path}/shop.yaml"]
    for settings, problem in (
        ([], "check looks at files"),
        ([*files, "cleaning.currency=euro"], "three capital letters"),
    ):
        result = CliRunner().invoke(app.app, ["check", *settings])
        assert isinstance(result.exception, ConfigError)
        assert problem in str(result.exception)


def test_missing_files_and_columns_are_told_by_name_and_without_a_value(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no file of transactions: '\*\.csv' matches no csv"):
        flight(tmp_path)
    with pytest.raises(DataError, match=r"a\.csv\.paid_at: column is missing; .*; did you mean 'paid'"):
        flight(tmp_path, a__csv=ORDERS.replace("paid_at", "paid_on"))
    with pytest.raises(DataError, match="encoding: UTF-16") as caught:
        flight(tmp_path, a__csv=ORDERS.encode("utf-16"))
    assert "u1" not in str(caught.value)
    pq.write_table(pa.table({"customer": ["u1"], "paid_at": ["2024-05-01"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet\.paid: column is missing"):
        flight(tmp_path, MAPPING.replace("csv", "parquet"))


def test_one_bad_file_of_several_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    found = flight(tmp_path, a__csv=ORDERS, b__csv=ORDERS.replace("customer", "who"), c__csv="")
    assert {name: error.column for name, error in found.unreadable.items()} == {"b.csv": "customer"}


def test_another_encoding_is_an_error_with_the_remedy_and_few_broken_rows_are_a_warning(tmp_path: Path) -> None:
    text = ORDERS.replace("u1", "Zoë")
    with pytest.raises(DataError, match=r"options: \{encoding: windows-1252\}"):
        flight(tmp_path, a__csv=text.encode("cp1252"))
    few = (text + ORDERS.partition("\n")[2] * 200).replace("€", "")
    assert "options: {encoding: windows-1252}" in flight(tmp_path, a__csv=few.encode("cp1252")).warnings[0]
    assert flight(tmp_path, a__csv=text).warnings == []
    named = MAPPING.replace("format: csv", "format: csv\n  options: {encoding: windows-1252}")
    assert flight(tmp_path, named, a__csv=text.encode("cp1252")).warnings == []
    assert "the mapping says windows-1252" in flight(tmp_path, named, a__csv=text).warnings[0]
    unknown = named.replace("windows-1252", "x-of-java")
    assert "only Spark can tell" in flight(tmp_path, unknown, a__csv=text).warnings[0]


def test_headers_behind_other_lines_and_partitions_of_the_path_are_columns(tmp_path: Path) -> None:
    mapping = MAPPING.replace("format: csv", "format: csv\n  skip_lines: 2").replace("ts: paid_at", "ts: day")
    (tmp_path / "day=2024-05-01").mkdir()
    (tmp_path / "day=2024-05-01/a.csv").write_text(f"Export\n\n{ORDERS}")
    found = flight(tmp_path, mapping.replace("*.csv", "day=*/*.csv"))
    assert found.unreadable == {}


def test_the_checks_before_a_session_load_neither_torch_nor_a_stage() -> None:
    code = (
        "import sys; import bp_spark.ingest.onboarding.preflight, bp_spark.ingest.onboarding.start, "
        "bp_spark.ingest.pseudonyms; print([m for m in ('torch', 'bp_spark.pipeline') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
