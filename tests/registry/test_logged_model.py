"""A logged model where bp-spark isn't installed: an environment of the model's own requirements loads it and predicts."""

from __future__ import annotations

import json
import subprocess
import venv
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from packaging.requirements import Requirement

from bp_spark.core import config, session
from bp_spark.model.members.transformer import TransformerMember
from bp_spark.registry import logged_model, publishing
from bp_spark.registry.bundle import Bundle
from bp_spark.registry.predictions import PREDICTION_COLUMNS, as_frame, predict
from tests.support.networks import make_network
from tests.support.trained_bundles import fitted_members, write_bundle
from tests.support.training_rows import SPEC, make_rows

COLUMNS = (*SPEC.columns,)

LOAD = """
import importlib.util, json, sys
import mlflow, pandas as pd

assert importlib.util.find_spec("bp_spark") is None
rows = pd.read_parquet(sys.argv[1])
answers = mlflow.pyfunc.load_model(sys.argv[2]).predict(rows)
import bp_spark
assert "/code/" in bp_spark.__file__, bp_spark.__file__
print(json.dumps(answers.to_dict("records"), default=lambda array: array.tolist()))
"""

SPARK = f"""
import importlib.util, json, sys
import mlflow
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

assert importlib.util.find_spec("bp_spark") is None
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
rows = spark.read.parquet(sys.argv[1])
answer = mlflow.pyfunc.spark_udf(spark, sys.argv[2], env_manager="local")
inputs = F.struct(*{COLUMNS!r})
answers = rows.select(answer(inputs).alias("answer")).select("answer.*").collect()
print(json.dumps([row.asDict(recursive=True) for row in answers]))
spark.stop()
"""


@dataclass(frozen=True)
class Logged:
    """A bundle, its files in the store, rows to score, and a Python that has nothing but the model's requirements."""

    bundle: Bundle
    model: Path
    folder: Path
    rows: Path
    python: Path

    def run(self, *arguments: str) -> str:
        """Run that Python; its standard output."""
        environment = {
            "HOME": str(self.folder),
            "PATH": "/usr/bin:/bin",
            "LC_ALL": "C.UTF-8",
            "JAVA_HOME": session.java_home(),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYSPARK_PYTHON": str(self.python),
            "SPARK_CONF_DIR": str(self.folder),
            "SPARK_LOCAL_IP": "127.0.0.1",
        }
        result = subprocess.run(
            [str(self.python), *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env=environment,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    def expected(self, columns: list[str]) -> list[dict[str, object]]:
        """What scoring answers for the same rows."""
        rows = pd.read_parquet(self.rows)
        answers = as_frame(predict(self.bundle, {name: rows[name].to_numpy() for name in COLUMNS}))
        return as_plain(answers[columns])


def as_plain(answers: pd.DataFrame) -> list[dict[str, object]]:
    """Rows as JSON gives them back."""
    text = json.dumps(answers.to_dict("records"), default=lambda array: array.tolist())
    return list(json.loads(text))


def link_requirements(requirements: Path, site_packages: Path) -> None:
    """Link the installed packages that a requirements file names, and what these require, into another environment."""
    waiting = [Requirement(line) for line in requirements.read_text(encoding="utf-8").splitlines()]
    linked: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        distribution = metadata.distribution(requirement.name)
        assert requirement.specifier.contains(distribution.version), requirement
        extras = ("", *requirement.extras)
        if set(new := [(requirement.name, extra) for extra in extras]) <= linked:
            continue
        linked.update(new)
        for text in distribution.requires or ():
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = site_packages / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    folder = tmp_path_factory.mktemp("alone")
    settings = config.load(
        overrides=[
            f"tracking.uri=sqlite:///{folder}/mlflow.db",
            f"tracking.artifacts={folder}/artifacts",
            f"bundles={folder}/bundles",
        ]
    )
    users = pd.DataFrame({name: list(values) for name, values in make_rows(50).items() if name in COLUMNS})
    users = users.astype(dict.fromkeys(SPEC.tabular, "float32")).set_axis([f"user{n:02}" for n in range(50)])
    members = [*fitted_members(users), TransformerMember(make_network())]
    bundle = write_bundle(settings, members, "one", rows=users)
    publishing.publish(settings, bundle)
    client = MlflowClient(settings.tracking.uri)
    model = Path(client.get_model_version_download_uri("purchasing-power", "1").removeprefix("file://"))
    rows = folder / "rows.parquet"
    users.to_parquet(rows)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    link_requirements(model / "requirements.txt", next((folder / "venv/lib").glob("python*/site-packages")))
    return Logged(bundle, model, folder, rows, folder / "venv/bin/python")


def test_a_logged_model_predicts_where_bp_spark_is_not_installed(logged: Logged) -> None:
    answers = json.loads(logged.run("-c", LOAD, str(logged.rows), str(logged.model)))
    assert answers == logged.expected(list(answers[0]))
    assert set(answers[0]) == set(PREDICTION_COLUMNS)


@pytest.mark.slow
def test_a_spark_udf_of_a_logged_model_predicts_where_bp_spark_is_not_installed(logged: Logged) -> None:
    answers = json.loads(logged.run("-c", SPARK, str(logged.rows), str(logged.model)))
    # the file is one task's and one batch: sums come in one order, and numbers are the same to the last bit
    assert answers == logged.expected(list(answers[0]))
    assert set(PREDICTION_COLUMNS) - set(answers[0]) == {"expected_by_horizon"}


def test_the_command_line_of_mlflow_predicts_from_json(logged: Logged) -> None:
    rows = pd.read_parquet(logged.rows)[list(COLUMNS)]
    data = rows.astype(object).where(rows.notna(), None).map(lambda v: v.tolist() if isinstance(v, np.ndarray) else v)
    request, response = logged.folder / "request.json", logged.folder / "response.json"
    request.write_text(json.dumps({"dataframe_records": data.to_dict("records")}), encoding="utf-8")
    command = ("-m", "mlflow", "models", "predict", "--env-manager", "local", "--content-type", "json")
    logged.run(*command, "--model-uri", str(logged.model), "--input-path", str(request), "--output-path", str(response))
    answers = json.loads(response.read_text(encoding="utf-8"))["predictions"]
    assert answers == logged.expected(list(answers[0]))


def test_requirements_are_versions_that_are_installed(logged: Logged) -> None:
    for text in logged_model.requirements(logged.bundle):
        requirement = Requirement(text)
        assert str(requirement.specifier) == f"=={metadata.version(requirement.name).partition('+')[0]}"


def test_a_spark_that_a_platform_brings_is_required_in_the_declared_range(
    logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        if name == "pyspark":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr("bp_spark.registry.logged_model.metadata.version", version)
    required = {Requirement(text).name: Requirement(text) for text in logged_model.requirements(logged.bundle)}
    declared = [Requirement(text) for text in metadata.requires("bp-spark") or ()]
    assert required["pyspark"] in declared


def test_only_a_network_needs_torch(logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    def names() -> set[str]:
        return {Requirement(text).name for text in logged_model.requirements(logged.bundle)}

    network = {"torch", "transformers", "safetensors"}
    assert names() >= network
    monkeypatch.delitem(logged.bundle.members, "transformer")
    assert not names() & network
