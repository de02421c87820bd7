"""Rows and settings of any kind: each row ends in events, duplicates or quarantine, or its file is refused by name; each
setting is taken or refused by name. Nothing vanishes and nothing ends in an error that isn't the project's own.

Hypothesis draws rows one by one, and Spark reads them all at once. ``HYPOTHESIS_PROFILE=thorough`` draws 10,000 of them and
as many settings.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.errors import BpSparkError, ConfigError
from bp_spark.features import user_daily
from bp_spark.ingest import cleaning, pseudonyms
from bp_spark.ingest.sources.files import FilesSource
from bp_spark.lakehouse.tables import RAW_LOGS, TEXT_EMBEDDINGS, TEXTS
from tests.support.histories import SECRET, sorted_rows

pytestmark = pytest.mark.slow

CASES = settings().max_examples
THOROUGH = CASES > 1_000
ROWS = CASES // 4 if THOROUGH else 150
"""Of each kind of file."""

HOSTILE = st.sampled_from(
    [
        *(
            "",
            " ",
            "\t",
            "\u00a0",
            "null",
            "NULL",
            "NaN",
            "-Infinity",
            "true",
            "\\N",
            "\\",
            '"',
            '""',
            "'",
            "`",
            ",",
            ";",
        ),
        *(
            "\x00",
            "\x1f",
            "\ufeff",
            "\ufffd",
            "\u202eabc",
            "\u2028",
            "\U0010ffff",
            "e\u0301",
            "👩‍👩‍👧",
            "ＡＢ１２",
            "٣٤",
        ),
        *(
            "'; DROP TABLE events; --",
            "x' OR '1'='1",
            "${jndi:ldap://x}",
            "{{7*7}}",
            "=cmd()",
            "../../etc/passwd",
            "%s%n",
        ),
        *(
            "a\nb",
            "a\r\nb",
            "a\rb",
            "0",
            "-0",
            "007",
            "1e400",
            "-1e-400",
            "0x1F",
            "1_000",
            "1,5",
            "1.000,50",
            "9" * 400,
        ),
        *(
            "x" * 20_000,
            "]",
            "{}]{}",
            "}",
            "[]",
            "{}",
            "$.a",
            "_c0",
            "a,b\n",
            'say "so"',
            'end\\"',
            "1;DROP",
            "9999999999999999.99",
            "1e30",
        ),
    ]
)
TEXT = st.text(max_size=12) | HOSTILE
NUMBER = st.one_of(
    st.integers(-(10**40), 10**40).map(str),
    st.floats().map(repr),
    st.decimals(allow_nan=False, allow_infinity=False).map(str),
    st.floats(-1e6, 1e6).map("{:.2f}".format),
    st.sampled_from(["1000000", "1000000.01", "9999999999999999.99", "5e-324", "1e-300", "0.004", "86400", "-0.0"]),
    HOSTILE,
)
TIME = st.one_of(
    st.datetimes(datetime(2000, 1, 1), datetime(2024, 1, 1)).map(str),
    st.datetimes().map(datetime.isoformat),
    st.datetimes(timezones=st.timezones()).map(datetime.isoformat),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(["2024-02-30", "2024-1-1", "10000-01-01", "-0001-01-01", "0000-00-00", "+294247-01-10T04:00:54Z"]),
    st.sampled_from(
        ["2024-03-10 02:30:00 America/New_York", "2024-01-01T00:00+99:99", "2024-01-01 25:00", "epoch", "now"]
    ),
    HOSTILE,
)
ID = st.integers(0, 3).map("id{}".format)
LOGS: dict[str, dict[str, st.SearchStrategy[str]]] = {
    "transactions": {
        "user_id": ID | TEXT,
        "order_id": ID | TEXT,
        "item_id": ID | TEXT,
        "ts": TIME,
        "quantity": NUMBER,
        "amount": NUMBER,
        "discount": NUMBER | st.just("0"),
        "coupon_discount": NUMBER | st.just("0"),
        "currency": st.sampled_from(["USD", "USD", "CNY", "BIG", "SMALL", "XXX"]) | TEXT,
    },
    "behaviours": {
        "user_id": ID | TEXT,
        "ts": TIME,
        "action": st.sampled_from(cleaning.ACTIONS) | TEXT,
        "item_id": ID | TEXT,
        "dwell_s": NUMBER | st.just("3"),
    },
    "searches": {"user_id": ID | TEXT, "ts": TIME, "query": TEXT, "clicked_item_id": ID | TEXT},
    "reviews": {"user_id": ID | TEXT, "ts": TIME, "item_id": ID | TEXT, "rating": NUMBER | st.just("4"), "text": TEXT},
}
NAMES = tuple(LOGS)
STORED = {table.name: [c.name for c in table.columns if c.name != "ingested_at"] for table in RAW_LOGS}
GOOD = {
    "ts": "2023-05-06 07:08:09",
    "quantity": "2",
    "amount": "9.90",
    "discount": "0",
    "coupon_discount": "0",
    "currency": "CNY",
    "action": "browse",
    "dwell_s": "3",
    "rating": "4",
}


def with_some_changed(
    log: dict[str, st.SearchStrategy[Any]], good: dict[str, Any]
) -> st.SearchStrategy[dict[str, Any]]:
    """Rows of good values but for at most three columns: more at once, and the first would hide the rest."""
    changed = st.lists(st.sampled_from(sorted(log)), max_size=3, unique=True)
    anew = changed.flatmap(lambda names: st.fixed_dictionaries({name: log[name] for name in names}))
    base = st.fixed_dictionaries({name: st.just(good[name]) if name in good else ID for name in log})
    return st.tuples(base, anew).map(lambda pair: {**pair[0], **pair[1]})


ANY_ROW = st.sampled_from(NAMES).flatmap(lambda name: st.tuples(st.just(name), with_some_changed(LOGS[name], GOOD)))
ITEMS = "item_id,title,category,brand\nid1,Milk,Food > Milk,Acme\nid2,,,\nid1,Milch,,\n"
RATES = "currency,day,rate\nCNY,2000-01-01,0.14\nBIG,2000-01-01,9999999999\nSMALL,2000-01-01,0.00000001\nCNY,soon,x\n"
LOG = st.sampled_from(NAMES)


@dataclass(frozen=True)
class Kind:
    """A kind of files: what its rows may be, by log, and the content of a file of such rows."""

    format: str
    rows: st.SearchStrategy[tuple[str, Any]]
    content: Callable[[str, list[Any]], bytes]
    count: Callable[[Any], int] = lambda row: 1
    options: Mapping[str, object] = field(default_factory=dict)


def _csv(log: str, rows: list[Any]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(LOGS[log]), lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _torn(log: str, rows: list[bytes]) -> bytes:
    return b"\n".join([",".join(LOGS[log]).encode(), *rows, b""])


def _json(log: str, rows: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in rows).encode()


def _parquet(log: str, rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    columns = {name: pa.array([row[name] for row in rows], TYPED[name][0]) for name in LOGS[log]}
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue().to_pybytes())


def _rows_of_line(line: str) -> int:
    """An array of objects is a row for each of them; anything else is one row."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return 1
    return len(value) if isinstance(value, list) and all(isinstance(each, dict) for each in value) else 1


SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
ANY_JSON = SCALAR | st.lists(SCALAR, max_size=2) | st.dictionaries(TEXT, SCALAR, max_size=2)
KNOWN = st.sampled_from(sorted({column for log in LOGS.values() for column in log})) | TEXT
JSON_LINE = st.one_of(
    ANY_ROW.map(lambda row: (row[0], json.dumps(row[1]))),
    st.tuples(LOG, st.dictionaries(KNOWN, ANY_JSON, max_size=6).map(json.dumps)),
    st.tuples(LOG, ANY_JSON.map(json.dumps)),
    st.tuples(LOG, TEXT.filter(lambda text: not set("\r\n") & set(text) and text.strip(" \t\x0b\x0c\ufeff"))),
)
TORN_LINE = st.binary(min_size=1, max_size=30).map(
    lambda text: b"x" + text.translate(None, b'\r\n"')
) | st.sampled_from(
    [b'"open', b"a,b,c,d,e,f,g,h,i,j,k,l", b",", b"\xff\xfe", b'u,1,i,2024-01-01,1,"2', b'"a"b"c",', b"\xed\xa0\x80,,"]
)
MICROS = st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999)  # of the years 1 to 9999
TYPED: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "user_id": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "order_id": (pa.float64(), st.floats()),
    "item_id": (pa.bool_(), st.booleans()),
    "ts": (pa.timestamp("us", "UTC"), MICROS),
    "quantity": (pa.float32(), st.floats(width=32)),
    "amount": (pa.float64(), st.floats() | st.floats(-1e6, 1e6)),
    "discount": (pa.decimal128(38, 10), st.decimals(-(10**27), 10**27, places=10)),
    "coupon_discount": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "currency": (pa.string(), st.sampled_from(["USD", "CNY", "BIG", "SMALL"])),
    "action": (pa.string(), st.sampled_from(cleaning.ACTIONS) | TEXT),
    "dwell_s": (pa.float64(), st.floats()),
    "query": (pa.string(), TEXT),
    "clicked_item_id": (pa.date32(), st.dates()),
    "rating": (pa.int8(), st.integers(-128, 127)),
    "text": (pa.float64(), st.floats()),
}
GOOD_TYPED = {
    "user_id": 1,
    "order_id": 1.0,
    "item_id": True,
    "ts": 1_600_000_000_000_000,
    "quantity": 1.0,
    "amount": 1.0,
}
GOOD_TYPED |= {"discount": Decimal(0), "coupon_discount": 0, "currency": "CNY", "action": "click", "dwell_s": 1.0}
GOOD_TYPED |= {"query": "x", "clicked_item_id": date(2020, 1, 1), "rating": 4, "text": 1.0}
TYPED_LOGS = {log: {name: st.none() | TYPED[name][1] for name in LOGS[log]} for log in NAMES}
TYPED_ROW = LOG.flatmap(lambda log: st.tuples(st.just(log), with_some_changed(TYPED_LOGS[log], GOOD_TYPED)))
KINDS = {
    "csv": Kind("csv", ANY_ROW, _csv),
    # with line breaks in quotes, what follows an open one is part of its row
    "torn": Kind("csv", st.tuples(LOG, TORN_LINE), _torn, options={"multiLine": False}),
    "json": Kind("json", JSON_LINE, _json, _rows_of_line),
    "parquet": Kind("parquet", TYPED_ROW, _parquet),
}
Row = tuple[str, str, Any]
"""Kind, log, row."""


def drawn(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """That many values of a strategy."""
    found: list[Any] = []

    @settings(
        max_examples=count,
        derandomize=not THOROUGH,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def smallest(rows: Sequence[Row], trouble: Callable[[Sequence[Row]], str | None]) -> str | None:
    """The trouble with the rows, told of as few of them as halving comes to."""
    said = trouble(rows)
    while said is not None and len(rows) > 1:
        half = len(rows) // 2
        for part in (rows[:half], rows[half:]):
            if (about := trouble(part)) is not None:
                rows, said = part, about
                break
        else:
            break
    return said and f"{said}\nwith {len(rows)} rows: {[str(row)[:500] for row in rows[:3]]}"


def platform(folder: Path, kind: Kind, rows: Sequence[Row]) -> FilesSource:
    """The source of a platform that delivered each row twice, in two files of each log."""
    folder.mkdir(parents=True)
    logs: dict[str, Any] = {}
    for log in NAMES:
        content = kind.content(log, [row for _, name, row in rows if name == log])
        for delivery in ("a", "b"):
            (folder / f"{log}_{delivery}").write_bytes(content)
        logs[log] = {"path": f"{log}_*", "format": kind.format, "columns": {name: name for name in LOGS[log]}}
        logs[log]["options"] = dict(kind.options)
    for name, text in (("items", ITEMS), ("rates", RATES)):
        (folder / f"{name}.csv").write_text(text)
        header = text.split("\n")[0].split(",")
        logs[name] = {"path": f"{name}.csv", "format": "csv", "columns": {column: column for column in header}}
    (folder / "shop.yaml").write_text(yaml.safe_dump(logs))
    return FilesSource(folder / "shop.yaml")


def imbalance(spark: SparkSession, folder: Path, rows: Sequence[Row]) -> str | None:
    """What is wrong with cleaning platforms that delivered each row twice; ``None``: nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        return _imbalance(spark, folder, rows)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:2000]}"


def _imbalance(spark: SparkSession, folder: Path, rows: Sequence[Row]) -> str | None:
    delivered: list[dict[str, DataFrame]] = []
    for number, (name, kind) in enumerate(KINDS.items(), start=1):
        source = platform(folder / name, kind, [row for row in rows if row[0] == name])
        added = {"ingest_id": F.lit(number).cast("bigint"), "ingested_at": F.lit(datetime(2024, 6, 1, tzinfo=UTC))}
        read = source.read(spark, source.deliveries(spark))
        stored = {table: pseudonyms.pseudonymous(df, table, SECRET, pseudonyms.mask) for table, df in read.items()}
        delivered.append({table: df.withColumns(added) for table, df in stored.items()})
    raw = {
        name: reduce(DataFrame.unionByName, [each[name] for each in delivered]).localCheckpoint()
        for name in delivered[0]
    }
    for log in NAMES:
        found = {row["ingest_id"]: row["count"] for row in raw[f"raw_{log}"].groupBy("ingest_id").count().collect()}
        for number, (name, kind) in enumerate(KINDS.items(), start=1):
            count = 2 * sum(kind.count(row) for of, where, row in rows if (of, where) == (name, log))
            if found.get(number, 0) != count:
                return f"{name} of {log}: {count} rows delivered, {found.get(number, 0)} read"
    settings = config.load().cleaning
    judged = cleaning.validate({name: raw[name] for name in cleaning.LOGS}, raw, settings)
    judged = {name: df.localCheckpoint() for name, df in judged.items()}
    refused = cleaning.quarantine(judged).localCheckpoint()
    events = cleaning.events(judged).localCheckpoint()
    total = sum(df.count() for df in judged.values())
    quarantined = refused.count()
    by_copy = events.groupBy((F.col("copy") == 1).alias("first")).agg(
        F.count("*").alias("n"), F.sum("amount").alias("money")
    )
    copies = {row["first"]: row for row in by_copy.collect()}
    kept, repeated = (copies[first]["n"] if first in copies else 0 for first in (True, False))
    if kept + repeated + quarantined != total:
        return f"{total} rows, {kept} events, {repeated} duplicates, {quarantined} in quarantine"
    if kept > repeated:
        return f"{kept} events and {repeated} duplicates of rows that came twice each"
    nothing_known = [spark.createDataFrame([], table.schema) for table in (TEXTS, TEXT_EMBEDDINGS)]
    days = user_daily.user_daily(events.filter("copy = 1"), *nothing_known, tokens_kept=4).localCheckpoint()
    spent = (copies[True]["money"] if kept else None) or 0
    if (stored := days.agg(F.sum("spend")).collect()[0][0] or 0) != spent:
        return f"{spent} spent, {stored} in user_daily"
    for name, df in judged.items():
        broken = df.filter("rule IS NOT NULL").select(*STORED[name])
        one, other = (
            sorted_rows(each.withColumn("ts", F.unix_micros("ts")).drop("ingested_at"))
            for each in (broken, cleaning.from_quarantine(refused, name))
        )
        for before, after in zip(one, other, strict=True):
            if before != after:
                return f"{name}: in quarantine is {after}, of {before}"
    return None


@pytest.mark.timeout(7200)
def test_rows_of_any_content_end_in_events_duplicates_or_quarantine(spark: SparkSession, tmp_path: Path) -> None:
    rows = [(name, *row) for name, kind in KINDS.items() for row in drawn(kind.rows, ROWS)]
    assert smallest(rows, lambda some: imbalance(spark, tmp_path / "platforms", some)) is None


# --- settings and mappings ---------------------------------------------------------------------------------------------

KEY_OR_VALUE = SCALAR | st.dates()
VALUE = st.recursive(
    KEY_OR_VALUE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY_OR_VALUE, inner, max_size=3),
    max_leaves=5,
)
KEYS = sorted(config.all_keys(Config))
KEY = st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS).map(lambda key: f"{key}s"), st.text(max_size=8), HOSTILE)
WORD = st.sampled_from(
    [
        "",
        "2024-13-45",
        "!!timestamp x",
        "!!int x",
        "!!bool x",
        "!!binary x",
        "0o9",
        "9" * 5000,
        "[" * 3000,
        "&a [*a]",
        "*a",
        "{",
        "!x",
    ]
)


@pytest.mark.timeout(7200)
def test_settings_of_any_kind_are_taken_or_refused_by_name(tmp_path: Path) -> None:
    dumped = VALUE.map(lambda value: yaml.safe_dump(value, allow_unicode=True).removesuffix("...\n").strip())
    override = st.tuples(KEY, dumped | WORD | TEXT).map("=".join) | TEXT
    sections = st.dictionaries(KEY.map(lambda key: key.split(".")[0]), st.dictionaries(KEY, VALUE, max_size=3) | VALUE)
    spaces = st.dictionaries(st.sampled_from(KEYS) | TEXT, VALUE, max_size=2).map(
        lambda space: {"search": {"space": space}}
    )
    path = tmp_path / "settings.yaml"

    @settings(derandomize=not THOROUGH, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(override, max_size=3), st.none() | sections.map(yaml.safe_dump) | spaces.map(yaml.safe_dump) | WORD)
    def each(overrides: list[str], text: str | None) -> None:
        if text is not None:
            path.write_text(text, encoding="utf-8")
        try:
            loaded = config.load(None if text is None else path, overrides)
        except ConfigError:
            return
        # what is recorded of a run leads back to its settings
        path.write_text(yaml.safe_dump(loaded.model_dump(mode="json")), encoding="utf-8")
        assert config.load(path) == loaded

    each()


def test_mappings_of_any_kind_are_taken_or_refused_by_name(tmp_path: Path) -> None:
    columns = st.sampled_from(["user_id", "ts", "amount", "segment", "day", "nothing"]) | TEXT
    rule = st.dictionaries(
        st.sampled_from(["column", "value", "values", "format", "unit", "timezone", "columns"]), VALUE
    )
    table = st.fixed_dictionaries(
        {},
        optional={
            "path": VALUE,
            "format": st.sampled_from(["csv", "json", "orc"]) | VALUE,
            "options": st.dictionaries(st.sampled_from(["sep", "mode", "header"]), VALUE) | VALUE,
            "timezone": st.sampled_from(["UTC", "+08:00", "+99:99"]) | VALUE,
            "columns": st.dictionaries(columns, rule | VALUE) | VALUE,
        },
    )
    names = st.sampled_from(["transactions", "users", "rates", "items", "timezone", "nothing"])
    path = tmp_path / "shop.yaml"

    @settings(derandomize=not THOROUGH, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(names, table | VALUE).map(yaml.safe_dump) | WORD)
    def each(text: str) -> None:
        path.write_text(text, encoding="utf-8")
        with suppress(ConfigError):
            FilesSource(path)

    each()


def test_readers_options_and_formats_of_any_kind_are_taken_or_refused_by_name(
    spark: SparkSession, tmp_path: Path
) -> None:
    option = st.sampled_from(
        ["sep", "quote", "escape", "comment", "encoding", "lineSep", "multiLine", "header", "nullValue"]
    )
    word = st.sampled_from(["", "x", "xx", "\\", '"', "\n", "true", "GBK", "UTF-16", "\x00", "#"]) | st.text(max_size=3)
    time = st.sampled_from(["yyyy", "YYYY", "dd.MM.yyyy", "'", "[", "VV", "x" * 9, "yyyy-MM-dd'T'HH:mm"]) | st.text(
        max_size=4
    )
    case = st.tuples(st.sampled_from(["csv", "json"]), st.dictionaries(option, word, max_size=2), time)
    (tmp_path / "a").write_text('user_id,ts,amount\n"1",2024-01-01,"2"\n')
    for kind, options, pattern in drawn(case, max(8, CASES // 100)):
        columns = {"user_id": "user_id", "ts": {"column": "ts", "format": pattern}, "amount": "amount"}
        logs = {"transactions": {"path": "a", "format": kind, "options": options, "columns": columns}}
        (tmp_path / "shop.yaml").write_text(yaml.safe_dump(logs), encoding="utf-8")
        try:
            source = FilesSource(tmp_path / "shop.yaml")
            source.read(spark, source.deliveries(spark))["raw_transactions"].collect()
        except BpSparkError:
            continue
        except Exception as error:
            pytest.fail(f"{type(error).__name__} of {kind} {options} {pattern!r}: {str(error)[:1000]}")
