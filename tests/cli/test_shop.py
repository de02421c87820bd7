"""The Python API as a notebook uses it."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

import bp_spark
from bp_spark import pipeline, shop
from bp_spark.core import config
from bp_spark.core.errors import BundleError, ConfigError, DataError
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import TRIALS
from bp_spark.registry import bundle as bundles
from bp_spark.scoring import prediction
from bp_spark.shop import Shop


def test_settings_come_from_a_file_and_from_overrides_and_no_session_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bp_spark.core.session.get_session", lambda *_, **__: pytest.fail("a session was started"))
    (tmp_path / "settings.yaml").write_text("labels: {horizon_days: 60}\nbundles: models\n")
    opened = bp_spark.open(tmp_path / "settings.yaml", ["bundles=elsewhere"])
    assert (opened.settings.labels.horizon_days, opened.settings.bundles) == (60, "elsewhere")
    assert bp_spark.open().settings == config.Config()
    with pytest.raises(ConfigError, match=r"did you mean scoring\.batch_mb"):
        bp_spark.open(overrides=["scoring.batch_m=7"])


def test_the_demo_has_its_settings_and_its_public_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BP_SPARK_SETTINGS", "bundles='my models' source.sample=0.5")
    opened = bp_spark.open_demo(["source.sample=0.1"])
    assert opened.settings.tables.path == "demo/lakehouse"
    assert (opened.settings.bundles, opened.settings.source.sample) == ("my models", 0.1)
    assert (tmp_path / "demo/secret").read_text().strip() == shop.DEMO_SECRET


@pytest.fixture
def opened(spark: SparkSession, tmp_path: Path) -> Shop:
    return bp_spark.open(
        None, [f"tables.path={tmp_path}/lakehouse", "tables.namespace=shop", f"bundles={tmp_path}/b"], spark
    )


def trials(spark: SparkSession, opened: Shop, *numbers: int) -> None:
    row = {"run_id": "r", "test_date": date(2017, 10, 3), "settings": {}, "metric": "mae", "seconds": 1.0}
    rows = [{**row, "trial": number, "value": None, "error": None} for number in numbers]
    Lakehouse(spark, opened.settings.tables).append(TRIALS, spark.createDataFrame(rows, TRIALS.schema))


def test_tables_are_read_by_name_and_version_and_by_sql(spark: SparkSession, opened: Shop) -> None:
    trials(spark, opened, 1, 2)
    first = Lakehouse(spark, opened.settings.tables).version("trials")
    trials(spark, opened, 3)
    assert opened.table("trials").count() == 3
    assert opened.table("trials", first).count() == 2
    try:
        assert opened.sql("SELECT max(trial) FROM shop.trials").first()[0] == 3
        elsewhere = bp_spark.open(None, ["tables.path=/elsewhere", "tables.namespace=shop"], spark)
        with pytest.raises(ConfigError, match=r"shop names the tables of .* set tables\.namespace"):
            elsewhere.sql("SELECT 1")
    finally:
        spark.sql("DROP SCHEMA shop CASCADE")
    with pytest.raises(DataError, match="scores"):
        opened.table("scores")


def test_each_stage_is_the_one_of_the_pipeline(opened: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def recorded(name: str) -> Any:
        return lambda spark, settings, *arguments: calls.append((name, spark, settings, *arguments))

    for name in ("featurize", "train", "score", "profile", "report"):
        monkeypatch.setattr(pipeline, name, recorded(name))
    day = date(2017, 10, 3)
    opened.featurize("2017-10-03", day, rebuild=True)
    opened.train()
    opened.train("2017-10-03")
    opened.score(day, "models:/m@champion", full=True)
    opened.profile()
    opened.report("2017-10-03", "page.html")
    assert all(call[1] is opened.spark and call[2] is opened.settings for call in calls)
    assert [(name, *rest) for name, _, _, *rest in calls] == [
        ("featurize", [day, day], True, False),
        ("train", None),
        ("train", day),
        ("score", day, "models:/m@champion", True),
        ("profile", None),
        ("report", day, Path("page.html")),
    ]
    with pytest.raises(ConfigError, match="2017-13-01"):
        opened.score("2017-13-01")


def test_the_udf_is_of_the_promoted_bundle(opened: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match="no bundle is promoted"):
        opened.prediction_udf()
    monkeypatch.setattr(bundles, "current", lambda folder: Path(folder) / "promoted")
    monkeypatch.setattr(bundles, "load", lambda folder, key: (folder, key))
    monkeypatch.setattr(prediction, "prediction_udf", lambda *arguments: arguments)
    assert opened.prediction_udf("spend") == (opened.spark, (tmp_path / "b/promoted", None), "spend")
    assert opened.prediction_udf(bundle="other")[1:] == (("other", None), "predict_spend")
