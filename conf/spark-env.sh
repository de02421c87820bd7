#!/usr/bin/env bash
# Read by spark-submit and by the standalone master and workers. Chooses the Python and the Java that belong together.
bp_spark_python="$(command -v "${PYSPARK_PYTHON:-}" || true)"
if [ -z "${bp_spark_python}" ] && [ -n "${SPARK_HOME:-}" ]; then
  # pyspark sits in ENV/lib/pythonX.Y/site-packages: its own interpreter is the one that has the package
  bp_spark_python="$(cd "${SPARK_HOME}/../../../.." 2>/dev/null && pwd)/bin/python"
  [ -x "${bp_spark_python}" ] && export PYSPARK_PYTHON="${bp_spark_python}"
fi
if [ -n "${bp_spark_python}" ] && [ -x "${bp_spark_python}" ]; then
  # TorchDistributor starts torchrun from PATH
  export PATH="$(dirname "${bp_spark_python}"):${PATH}"
fi
if [ -z "${JAVA_HOME:-}" ] && ! command -v java >/dev/null 2>&1 && [ -x "${bp_spark_python}" ]; then
  JAVA_HOME="$("${bp_spark_python}" -c 'from bp_spark.core.session import java_home; print(java_home())' 2>/dev/null || true)"
  [ -n "${JAVA_HOME}" ] && export JAVA_HOME
fi
unset bp_spark_python
