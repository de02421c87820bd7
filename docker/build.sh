#!/usr/bin/env bash
# The steps that make the image; tests/test_image.py runs the same ones in an empty folder.
#   build.sh environment PREFIX    PREFIX/venv from the lock file, hashes required
#   build.sh package PREFIX        this project into PREFIX/venv, and its entrypoint
#   build.sh jars PREFIX           the jars of docker/jars.lock into its Spark, checksums required
#   build.sh configuration PREFIX  conf/ and jobs/ to PREFIX, where its Spark reads them
# Variables: PYTHON (python3.11), LOCK (requirements.lock), JARS (delta and s3a of jars.lock), MAVEN (a repository or mirror),
# VENV (PREFIX/venv; make install gives its own).
set -euo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
step="${1:?environment, package, jars or configuration}"
prefix="${2:?PREFIX: the folder to build in}"
python="${VENV:-${prefix}/venv}/bin/python"

spark_home() {
  "${python}" -c 'import importlib.util as u; print(u.find_spec("pyspark").submodule_search_locations[0])'
}

case "${step}" in
  environment)
    "${PYTHON:-python3.11}" -m venv "${prefix}/venv"
    "${python}" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps --require-hashes \
      --requirement "${LOCK:-${root}/requirements.lock}"
    ;;
  package)
    # a copy: setuptools leaves its own files beside the sources
    sources="$(mktemp -d)"
    trap 'rm -rf "${sources}"' EXIT
    cp -r "${root}/pyproject.toml" "${root}/README.md" "${root}/LICENSE" "${root}/src" "${sources}"
    rm -rf "${sources}"/src/*.egg-info
    "${python}" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps --no-build-isolation "${sources}"
    install -D -m 755 "${root}/docker/entrypoint.sh" "${prefix}/bin/entrypoint.sh"
    ;;
  jars)
    # one Delta is built for one Spark, one connector for its Hadoop: delta is delta-4.1 on Spark 4.1
    spark="$("${python}" -c 'import importlib.metadata as m; print(".".join(m.version("pyspark").split(".")[:2]))')"
    read -ra groups <<<"${JARS:-delta s3a}"
    groups=("${groups[@]/%/-${spark}}")
    "${python}" "${root}/docker/fetch_jars.py" "${root}/docker/jars.lock" "$(spark_home)/jars" \
      "${MAVEN:-https://repo1.maven.org/maven2}" "${groups[@]}"
    ;;
  configuration)
    mkdir -p "${prefix}/conf" "${prefix}/jobs"
    cp "${root}"/conf/*.yaml "${root}/conf/log4j2.properties" "${root}/conf/spark-env.sh" "${prefix}/conf"
    cp "${root}"/jobs/*.py "${prefix}/jobs"
    # the jars are there: a night asks no Maven
    grep -v '^spark\.jars\.packages' "${root}/conf/spark-defaults.conf" >"${prefix}/conf/spark-defaults.conf"
    ln -sfn "${prefix}/conf" "$(spark_home)/conf"
    ;;
  *)
    echo "build.sh: no step ${step}" >&2
    exit 2
    ;;
esac
