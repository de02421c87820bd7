"""Runs as events of OpenLineage, by the client of the standard itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from bp_spark.core import config, extras
from bp_spark.core.config import Config
from bp_spark.core.errors import DataError, PlatformError
from bp_spark.lakehouse.run import recorded
from bp_spark.lakehouse.tables import TEXTS
from tests.support.rows import frame


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File that gets the events."""
    path = tmp_path / "events.json"
    for name, value in {"TYPE": "file", "LOG_FILE_PATH": str(path), "APPEND": "true"}.items():
        monkeypatch.setenv(f"OPENLINEAGE__TRANSPORT__{name}", value)
    return path


def settings_of(folder: Path, *overrides: str) -> Config:
    return config.load(overrides=[f"tables.path={folder}/lake house", "tracking.openlineage=true", *overrides])


def fail(spark: SparkSession, settings: Config) -> None:
    with recorded(spark, settings, "score") as run, run.stage("score"):
        run.lakehouse.read("texts")
        raise DataError("scores", "no row is right")


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_stage_tells_what_it_read_wrote_and_how_it_ended(spark: SparkSession, tmp_path: Path, sent: Path) -> None:
    settings = settings_of(tmp_path)
    with recorded(spark, settings, "featurize") as run, run.step("embed texts", TEXTS) as step:
        step.replace(frame(spark, TEXTS, {"text_id": 1, "text": "secret"}))
        step.figures["rows_out"] = 1
    with pytest.raises(DataError):
        fail(spark, settings)
    written, read = events(sent)[:2], events(sent)[2:]
    assert [event["eventType"] for event in (*written, *read)] == ["START", "COMPLETE", "START", "FAIL"]
    assert {event["job"]["name"] for event in written} == {"featurize.embed_texts"}
    assert len({event["run"]["runId"] for event in written}) == 1
    assert written[0]["run"]["runId"] != read[0]["run"]["runId"]
    (output,) = written[1]["outputs"]
    place = (output["namespace"], output["name"])
    assert place == ("file", f"{tmp_path}/lake house/bp/texts")
    assert output["outputFacets"]["outputStatistics"]["rowCount"] == 1
    columns = {column["name"]: column for column in output["facets"]["schema"]["fields"]}
    assert columns["text"]["description"] == "Normalised text"
    (source,) = read[1]["inputs"]
    assert (source["namespace"], source["name"]) == place
    assert source["facets"]["version"] == output["facets"]["version"]
    assert "no row is right" in read[1]["run"]["facets"]["errorMessage"]["message"]
    assert "secret" not in sent.read_text(encoding="utf-8")


def test_a_catalogue_that_cannot_be_reached_ends_no_run(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"TYPE": "file", "LOG_FILE_PATH": str(tmp_path / "no/such/folder/x"), "APPEND": "true"}.items():
        monkeypatch.setenv(f"OPENLINEAGE__TRANSPORT__{name}", value)
    with recorded(spark, settings_of(tmp_path), "score") as run, run.stage("score"):
        pass
    assert "openlineage: events can't be sent" in caplog.text
    assert run.lakehouse.read("runs").count() == 1


def test_without_its_extra_a_run_that_should_send_does_not_begin(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(extras.EXTRAS, "openlineage", ("no_such_module",))
    with (
        pytest.raises(PlatformError, match=r"pip install 'bp-spark\[openlineage\]'"),
        recorded(spark, settings_of(tmp_path), "score"),
    ):
        raise AssertionError("it began")


def test_nothing_is_sent_where_nobody_asked(spark: SparkSession, tmp_path: Path, sent: Path) -> None:
    with recorded(spark, settings_of(tmp_path, "tracking.openlineage=false"), "score") as run, run.stage("score"):
        pass
    assert not sent.exists()
