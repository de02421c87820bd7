"""Writing tables: contracts are kept, only what is meant is replaced, and each write says what it was made from."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import cast

import pytest
from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bp_spark.core import config
from bp_spark.core.config import TablesConfig
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.stores import file_system
from bp_spark.lakehouse import commits, sql, store
from bp_spark.lakehouse.schema import Column, Table, conform
from bp_spark.lakehouse.sql import key_and_clustering
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import BACKTESTS, RAW_TRANSACTIONS, RUNS, SCORES, TABLE_NAMES, USER_KEYS

TABLE = Table(
    "things",
    "Things",
    (Column("day", "date", "Day", required=True), Column("name", "string", "Name"), Column("n", "bigint", "Number")),
    key=("name",),
    partition_by=("day",),
)
ROWS = [("2024-01-01", "a", 1), ("2024-01-02", "b", 2)]


def things(spark: SparkSession, rows: list[tuple[str, str, int]], number: str = "bigint"):  # type: ignore[no-untyped-def]
    df = spark.createDataFrame(rows, "day string, name string, n bigint")
    return df.select(F.col("day").cast("date"), "name", F.col("n").cast(number))


def stored(lakehouse: Lakehouse) -> list[tuple[str, int]]:
    return sorted((row["name"], row["n"]) for row in lakehouse.read("things").collect())


def test_a_wrong_type_or_a_missing_column_is_named_and_the_table_untouched(
    spark: SparkSession, lakehouse: Lakehouse
) -> None:
    lakehouse.replace(TABLE, things(spark, ROWS))
    version = lakehouse.version("things")
    with pytest.raises(DataError, match=r"things\.n: must be bigint, is string"):
        lakehouse.replace(TABLE, things(spark, ROWS, "string"))
    with pytest.raises(DataError, match=r"things\.name: column is missing"):
        lakehouse.replace(TABLE, things(spark, ROWS).drop("name"))
    assert lakehouse.version("things") == version
    assert stored(lakehouse) == [("a", 1), ("b", 2)]


def test_a_table_that_another_run_is_about_to_create_is_waited_for(
    spark: SparkSession, lakehouse: Lakehouse, tmp_path: Path
) -> None:
    elsewhere = Lakehouse(spark, TablesConfig(path=str(tmp_path / "elsewhere")))
    elsewhere.replace(TABLE, things(spark, []))
    log = Path(lakehouse.location("things"), "_delta_log")
    log.mkdir(parents=True)
    # the other run has made the folder, and commits a moment later
    commit = threading.Timer(
        1, shutil.copytree, (f"{elsewhere.location('things')}/_delta_log", log), {"dirs_exist_ok": True}
    )
    commit.start()
    lakehouse.append(TABLE, things(spark, ROWS))
    commit.join()
    assert stored(lakehouse) == [("a", 1), ("b", 2)]


def test_a_folder_with_other_files_is_no_place_for_a_table(
    spark: SparkSession, lakehouse: Lakehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_CREATION_S", 0)
    folder = Path(lakehouse.location("things"))
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"bp\.things: its folder holds files and no Delta table"):
        lakehouse.append(TABLE, things(spark, ROWS))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_partition_is_replaced_alone_and_no_other_row_gets_in(spark: SparkSession, lakehouse: Lakehouse) -> None:
    lakehouse.replace(TABLE, things(spark, ROWS), inputs="first")
    day = {"day": ["2024-01-02"]}
    lakehouse.replace(TABLE, things(spark, [("2024-01-02", "c", 3)]), where=day, inputs="second", note={"through": 7})
    assert stored(lakehouse) == [("a", 1), ("c", 3)]
    assert (lakehouse.inputs("things"), lakehouse.commit_metadata("things")["through"]) == ("second", 7)
    with pytest.raises(Exception, match="DELTA_REPLACE_WHERE_MISMATCH"):
        lakehouse.replace(TABLE, things(spark, [("2024-01-05", "d", 4)]), where=day)
    assert stored(lakehouse) == [("a", 1), ("c", 3)]


def test_a_merge_updates_inserts_and_deletes_by_key(spark: SparkSession, lakehouse: Lakehouse) -> None:
    lakehouse.replace(TABLE, things(spark, [*ROWS, ("2024-01-02", "old", 9)]))
    fresh = things(spark, [("2024-01-01", "a", 10), ("2024-01-02", "new", 3)])
    gone = spark.createDataFrame([("old",), ("never there",)], "name string")
    days = {"day": ["2024-01-01", "2024-01-02"]}
    lakehouse.merge(TABLE, fresh, within=days, deleted_keys=gone.withColumn("day", F.lit("2024-01-02").cast("date")))
    assert stored(lakehouse) == [("a", 10), ("b", 2), ("new", 3)]


def test_a_column_that_a_newer_version_knows_is_added_and_older_rows_hold_null(
    spark: SparkSession, lakehouse: Lakehouse
) -> None:
    older = dataclasses.replace(TABLE, columns=TABLE.columns[:2])
    lakehouse.append(older, things(spark, ROWS[:1]).drop("n"))
    lakehouse.append(TABLE, things(spark, ROWS[1:]))
    assert stored(lakehouse) == [("a", None), ("b", 2)]


MONTHLY = dataclasses.replace(TABLE, partition_by=("month",), month_of="day", key=("day", "name"), skipped_by=("day",))
TWO_MONTHS = [("2024-01-30", "a", 1), ("2024-01-31", "b", 2), ("2024-02-01", "c", 3), ("2024-02-29", "d", 4)]


def files(lakehouse: Lakehouse) -> set[str]:
    return set(lakehouse.read("things").inputFiles())


def test_a_file_holds_days_of_one_month_and_others_are_left_alone(spark: SparkSession, lakehouse: Lakehouse) -> None:
    lakehouse.replace(MONTHLY, things(spark, TWO_MONTHS).repartition(3))
    held = (
        lakehouse.read("things")
        .groupBy(F.input_file_name())
        .agg(F.collect_set(F.trunc("day", "MONTH")).alias("months"))
    )
    assert sorted(str(row["months"][0]) for row in held.collect()) == ["2024-01-01", "2024-02-01"]
    before = files(lakehouse)
    late = things(spark, [("2024-02-01", "c", 30), ("2024-02-02", "new", 5)])
    lakehouse.merge(MONTHLY, late, within={"day": ["2024-02-01", "2024-02-02"]})
    assert stored(lakehouse) == [("a", 1), ("b", 2), ("c", 30), ("d", 4), ("new", 5)]
    assert [name for name in before & files(lakehouse) if "month=2024-01-01" in name]
    assert not [name for name in before & files(lakehouse) if "month=2024-02-01" in name]


def test_a_table_of_a_version_without_months_is_read_written_and_laid_out_anew(
    spark: SparkSession, lakehouse: Lakehouse
) -> None:
    older = dataclasses.replace(MONTHLY, partition_by=(), month_of="")
    lakehouse.replace(older, things(spark, TWO_MONTHS[:2]))
    lakehouse.merge(MONTHLY, things(spark, [("2024-01-31", "b", 20)]), within={"day": ["2024-01-31"]})
    lakehouse.append(MONTHLY, things(spark, TWO_MONTHS[2:]))
    assert stored(lakehouse) == [("a", 1), ("b", 20), ("c", 3), ("d", 4)]
    lakehouse.replace(MONTHLY, lakehouse.read("things").localCheckpoint())
    assert stored(lakehouse) == [("a", 1), ("b", 20), ("c", 3), ("d", 4)]
    assert all("/month=2024-0" in name for name in files(lakehouse))


def test_a_table_that_is_not_there_is_an_error_that_names_it(lakehouse: Lakehouse) -> None:
    for ask in (lakehouse.read, lakehouse.version):
        with pytest.raises(DataError, match=r"bp\.scores: table does not exist"):
            ask("scores")


def test_columns_carry_their_comments(spark: SparkSession, lakehouse: Lakehouse) -> None:
    lakehouse.replace(TABLE, things(spark, ROWS))
    assert [field.metadata["comment"] for field in lakehouse.read("things").schema.fields] == ["Day", "Name", "Number"]
    assert conform(spark.createDataFrame([], SCORES.schema), SCORES).schema == SCORES.schema


HOSTILE = [
    "x'); DROP TABLE things; --",
    'say "hi"',
    "back`tick",
    "back\\slash",
    "\\' OR 1=1 --",
    "new\nline",
    "牛奶",
    "%_",
]
NAMED = Table(
    "named",
    "Rows by name",
    (Column("name", "string", "Name", required=True), Column("n", "bigint", "Number")),
    key=("name",),
    partition_by=("name",),
)


def test_hostile_values_are_values(spark: SparkSession, lakehouse: Lakehouse) -> None:
    rows = spark.createDataFrame([(name, n) for n, name in enumerate(HOSTILE)], "name string, n bigint")
    lakehouse.replace(NAMED, rows)
    changed = rows.withColumn("n", F.col("n") + 100)
    lakehouse.replace(NAMED, changed, where={"name": HOSTILE})
    lakehouse.merge(NAMED, changed.withColumn("n", F.col("n") + 100), within={"name": HOSTILE})
    stored = {row["name"]: row["n"] for row in lakehouse.read("named").collect()}
    assert stored == {name: n + 200 for n, name in enumerate(HOSTILE)}


def test_hostile_values_bound_a_range(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "_LISTED_VALUES", 1)
    rows = spark.createDataFrame([(name,) for name in [*HOSTILE, "below"]], "name string")
    for names in ([name, name + "x"] for name in HOSTILE):
        found = {row["name"] for row in rows.filter(sql.skipping_condition("name", names)).collect()}
        assert found == {name for name in HOSTILE if names[0] <= name <= names[1]}


@pytest.mark.parametrize(
    "namespace", ["x; DROP TABLE scores", "a`b", "a'b", 'a"b', "a.b.c", "../up", "a/b", "", "a b", "bp\n", ".", "bp."]
)
def test_a_namespace_that_is_no_name_is_refused(namespace: str) -> None:
    with pytest.raises(ConfigError, match=r"tables\.namespace"):
        config.load(overrides=[f"tables.namespace={json.dumps(namespace)}"])


def test_a_folder_that_delta_would_take_apart_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tables\.path"):
        config.load(overrides=["tables.path=/data/`x`"])


def test_tables_in_a_folder_with_quotes_are_known_by_name(spark: SparkSession, tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s "mine" -- x'
    held = Lakehouse(spark, TablesConfig(path=str(folder), namespace="quoted"))
    held.replace(RUNS, spark.createDataFrame([], RUNS.schema))
    try:
        for _ in range(2):
            assert held.register(TABLE_NAMES) == ["runs"]
        assert spark.sql("SELECT * FROM quoted.runs").count() == 0
        # by that name SQL would read the first folder's rows
        moved = Lakehouse(spark, TablesConfig(path=f"file:{tmp_path}/moved", namespace="quoted"))
        moved.replace(RUNS, spark.createDataFrame([], RUNS.schema))
        with pytest.raises(ConfigError, match=r"quoted\.runs is a table in another folder"):
            moved.register(TABLE_NAMES)
    finally:
        spark.sql("DROP SCHEMA IF EXISTS quoted CASCADE")


@pytest.mark.parametrize("address", ["s3a://bucket/lake/a.parquet", "s3://bucket/lake/a.parquet"])
def test_s3_is_asked_where_spark_asks_it(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Store(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "7")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            monkeypatch.setenv(name, "eu-central-1")
        system, path = file_system(address)
        info = system.get_file_info(path)
        server.shutdown()
    assert (info.size, asked) == (7, ["/bucket/lake/a.parquet"])


def test_a_folder_and_its_url_are_the_same_place(tmp_path: Path) -> None:
    for address in (str(tmp_path), f"file:{tmp_path}", tmp_path.as_uri()):
        system, path = file_system(address)
        assert system.get_file_info(path).type.name == "Directory"
        assert Path(path) == tmp_path


def test_a_log_that_only_spark_can_read_says_the_same(
    spark: SparkSession, settings: config.Config, lakehouse: Lakehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = lakehouse.replace(TABLE, things(spark, ROWS), inputs="first")

    def refused(address: str) -> None:
        raise PermissionError(address)

    monkeypatch.setattr(commits, "file_system", refused)
    blind = Lakehouse(spark, settings.tables)
    Path(lakehouse.location("notes")).mkdir()
    Path(lakehouse.location("notes"), "notes.txt").touch()
    assert [name for name in ("things", "others", "notes") if blind.exists(name)] == ["things"]
    assert (blind.version("things"), blind.inputs("things")) == (version, "first")
    assert blind.rows_written("things", version) == 2


# --- what only Databricks has --------------------------------------------------------------------------------------------


class Recorder:
    """A session that notes the SQL that it is given, and refuses what it is told to."""

    def __init__(self, refused: str = "nothing") -> None:
        self.statements: list[str] = []
        self.refused = refused

    def sql(self, statement: str) -> None:
        self.statements.append(statement)
        if self.refused in statement:
            raise AnalysisException("not supported here")


def managed(recorder: Recorder) -> Lakehouse:
    return Lakehouse(cast(SparkSession, recorder), TablesConfig(path=None, namespace="main.bp"))


def test_a_managed_table_on_databricks_has_its_key_and_is_clustered_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "17.3")
    recorder = Recorder()
    managed(recorder).declare_key(USER_KEYS)
    assert recorder.statements == [
        "ALTER TABLE `main`.`bp`.`user_keys` SET TBLPROPERTIES ('delta.dataSkippingStatsColumns' = 'key_id,user_key')",
        "ALTER TABLE `main`.`bp`.`user_keys` CLUSTER BY (`user_key`)",
        "ALTER TABLE `main`.`bp`.`user_keys` ADD CONSTRAINT `user_keys_key` PRIMARY KEY (`user_key`) NOT ENFORCED RELY",
    ]


def test_a_partitioned_table_has_a_key_and_no_clustering() -> None:
    assert key_and_clustering(SCORES, "scores") == [
        "ALTER TABLE scores ADD CONSTRAINT `scores_key` PRIMARY KEY (`user_key`, `score_date`) NOT ENFORCED RELY"
    ]


def test_a_key_that_may_be_null_is_no_primary_key() -> None:
    assert "peer" in BACKTESTS.key
    assert key_and_clustering(BACKTESTS, "backtests") == []
    assert key_and_clustering(RAW_TRANSACTIONS, "raw_transactions") == []


def test_a_catalog_that_refuses_a_key_gets_a_table_without_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "17.3")
    recorder = Recorder(refused="PRIMARY KEY")
    managed(recorder).declare_key(USER_KEYS)
    assert len(recorder.statements) == 3
    assert "main.bp.user_keys: goes without" in caplog.text


def test_tables_elsewhere_get_no_sql_of_databricks(lakehouse: Lakehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    managed(recorder).declare_key(USER_KEYS)
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "17.3")
    by_path = Lakehouse(cast(SparkSession, recorder), TablesConfig(path="/data"))
    by_path.declare_key(USER_KEYS)
    assert recorder.statements == []


def test_delta_clusters_a_table_by_these_statements(spark: SparkSession, lakehouse: Lakehouse) -> None:
    """Delta has the clustering, so that is tried. Spark 4.1 reads the primary key, and its Delta refuses it."""
    clustered = Table(
        "clustered",
        "Things by name",
        (Column("name", "string", "Name", required=True), Column("n", "bigint", "Number")),
        key=("name",),
    )
    rows = things(spark, ROWS).select("name", "n")
    lakehouse.replace(clustered, rows)
    name = f"delta.`{lakehouse.location('clustered')}`"
    statistics, clustering, primary = key_and_clustering(clustered, name)
    spark.sql(statistics)
    spark.sql(clustering)
    with pytest.raises(AnalysisException):
        spark.sql(primary)
    detail = spark.sql(f"DESCRIBE DETAIL {name}").select("clusteringColumns").first()
    assert detail is not None
    assert detail[0] == ["name"]
    lakehouse.append(clustered, rows)
    lakehouse.replace(clustered, rows)
    assert lakehouse.read("clustered").count() == len(ROWS)
    assert lakehouse.is_plain("clustered")
