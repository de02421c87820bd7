#!/usr/bin/env bash
# What a container of the image does:
#   master | worker | history        a part of the cluster
#   night [DATE] [KEY=VALUE...]      a whole night; without a date today's (UTC)
#   JOB [ARGUMENT...]                a job of jobs/, as train or doctor, by spark-submit
#   health                           whether the page of that part answers
# Variables: BP_SPARK_MASTER (spark://HOST:7077), BP_SPARK_CONFIG (settings, YAML), BP_SPARK_PROPERTIES (further Spark settings),
# AWS_SECRET_ACCESS_KEY_FILE (a file with the store's secret key).
set -euo pipefail

home="$(cd "$(dirname "$0")/.." && pwd)"
page="${TMPDIR:-/tmp}/bp-spark-page"
export PATH="${home}/venv/bin:${PATH}"
export PYSPARK_PYTHON="${PYSPARK_PYTHON:-${home}/venv/bin/python}"
if [ -n "${AWS_SECRET_ACCESS_KEY_FILE:-}" ]; then
  AWS_SECRET_ACCESS_KEY="$(cat "${AWS_SECRET_ACCESS_KEY_FILE}")"
  export AWS_SECRET_ACCESS_KEY
fi

deploy=org.apache.spark.deploy
properties=()
[ -z "${BP_SPARK_PROPERTIES:-}" ] || properties=(--load-spark-defaults --properties-file "${BP_SPARK_PROPERTIES}")
settings=()
[ -z "${BP_SPARK_CONFIG:-}" ] || settings=(--config "${BP_SPARK_CONFIG}")

submit() {
  local job="$1"
  shift
  spark-submit --master "${BP_SPARK_MASTER:-local[*]}" "${properties[@]}" "${home}/jobs/${job}.py" "${settings[@]}" "$@"
}

what="${1:?master, worker, history, night, health or a job}"
shift
case "${what}" in
  master)
    echo "http://localhost:${MASTER_PAGE:-8080}/json/" >"${page}"
    exec spark-class "${deploy}.master.Master" --host "$(hostname)" --port 7077 --webui-port "${MASTER_PAGE:-8080}" "$@"
    ;;
  worker)
    echo "http://localhost:${WORKER_PAGE:-8081}/json/" >"${page}"
    exec spark-class "${deploy}.worker.Worker" --webui-port "${WORKER_PAGE:-8081}" "$@" \
      "${BP_SPARK_MASTER:?BP_SPARK_MASTER: spark://HOST:7077}"
    ;;
  history)
    echo "http://localhost:${HISTORY_PAGE:-18080}/api/v1/version" >"${page}"
    exec spark-class "${deploy}.history.HistoryServer" "${properties[@]:1}"
    ;;
  health)
    [ ! -f "${page}" ] || exec python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' "$(cat "${page}")"
    ;;
  night)
    day="$(date -u +%F)"
    if [[ "${1:-}" =~ ^[0-9]{4}-[0-9]{2}-[0-9]{2}$ ]]; then
      day="$1"
      shift
    fi
    submit night --date "${day}" "$@"
    ;;
  *)
    if [ -f "${home}/jobs/${what}.py" ]; then
      submit "${what}" "$@"
    else
      exec "${what}" "$@"
    fi
    ;;
esac
