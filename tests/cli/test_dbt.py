"""Tables as sources of dbt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bp_spark.cli import dbt
from bp_spark.core import config
from bp_spark.lakehouse.tables import SHARED_TABLES, USER_PROFILE


def source(*overrides: str) -> dict[str, Any]:
    (found,) = yaml.safe_load(dbt.sources(config.load(overrides=list(overrides))))["sources"]
    return dict(found)


def tables(*overrides: str) -> dict[str, Any]:
    return {table["name"]: table for table in source(*overrides)["tables"]}


def test_analysts_find_each_table_with_its_columns_and_what_they_mean() -> None:
    found = tables()
    names = {table.name for table in SHARED_TABLES}
    hidden = {name for name in names if name.startswith("raw_")}
    hidden |= {"user_keys", "forgotten", "deliveries", "quarantine", "text_embeddings"}
    assert set(found) == names - hidden | {"user_features"}
    profile = found["user_profile"]
    assert profile["description"] == USER_PROFILE.comment
    columns = {column["name"]: column for column in profile["columns"]}
    assert columns["user_key"]["data_tests"] == ["unique", "not_null"]
    assert columns["level"]["data_tests"] == ["not_null"]
    assert "data_tests" not in columns["refund_share"]
    assert columns["refund_share"]["data_type"] == "double"
    # of two columns neither is unique by itself, and the month is stored, too
    scores = {column["name"]: column for column in found["scores"]["columns"]}
    assert scores["user_key"]["data_tests"] == ["not_null"]
    assert "month" in {column["name"] for column in found["events"]["columns"]}
    assert found["scores"]["config"]["freshness"]["warn_after"] == {"count": 2, "period": "day"}


def test_tables_are_read_where_the_settings_say(tmp_path: Path) -> None:
    def place(path: str) -> str:
        return str(tables(f"tables.path={path}")["totals"]["config"]["meta"]["external_location"])

    assert place(f"{tmp_path}/it's {{here}}") == f"delta_scan('{tmp_path}/it''s {{{{here}}}}/bp/totals')"
    # DuckDB doesn't know Hadoop's name of the store
    assert place("s3a://lake/x") == "delta_scan('s3://lake/x/bp/totals')"
    managed = source("tables.path=null", "tables.namespace=main.shop")
    assert (managed["name"], managed["database"], managed["schema"]) == ("shop", "main", "shop")
    assert all("meta" not in table.get("config", {}) for table in managed["tables"])
