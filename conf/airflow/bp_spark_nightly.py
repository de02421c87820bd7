"""Example for Airflow 3: the night, the weekly training and the weekly upkeep of tables.

Copy it to the DAGs folder and set the four constants.

A run of the interval that ends on day D scores D, from events before it: so a night that was missed, or a backfill
(``airflow backfill create --dag-id bp_spark_nightly --from-date ... --to-date ...``), is as of its day.
Where the workers of Airflow have no spark-submit, put the way to a machine that has one before it in SUBMIT (``ssh``).

Secrets stay with the jobs: SETTINGS names where they are (privacy.secret=file:...), and no command or log of Airflow shows one.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pendulum
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, CronDataIntervalTimetable
from airflow.sdk.exceptions import AirflowException, AirflowFailException

HOME = "/opt/bp-spark"
SETTINGS = "/etc/bp-spark/night.yaml"
SUBMIT = f"{HOME}/venv/bin/spark-submit --master spark://master:7077"
TIMEZONE = "UTC"

# Exit codes of a job (docs/ops.md) that a second try can't mend: settings, data, bundle. 1, 5, 6 and 7 (another run wrote
# the same table meanwhile) are tried again: a repeated night goes on from where it stopped and leaves no row twice.
FINAL = {2: "settings", 3: "data", 4: "bundle"}


class Stage(BashOperator):
    """A job of bp-spark."""

    def __init__(self, *, job: str, arguments: str = "", **kwargs: Any) -> None:
        command = f"exec {SUBMIT} {HOME}/jobs/{job}.py --config {SETTINGS} {arguments}".strip()
        super().__init__(task_id=job, bash_command=command, skip_on_exit_code=None, **kwargs)

    def execute(self, context: Any) -> Any:
        """Run the job; fail without a retry where a retry can't help."""
        try:
            return super().execute(context)
        except AirflowException as error:
            process = self.subprocess_hook.sub_process
            if process is not None and process.returncode in FINAL:
                wrong = FINAL[process.returncode]
                raise AirflowFailException(f"{self.task_id}: {wrong}, see its last line; not tried again") from error
            raise


COMMON: dict[str, Any] = {
    "start_date": pendulum.datetime(2024, 10, 1, tz=TIMEZONE),
    # what was missed while the DAG was off is for a person to decide: a backfill does it
    "catchup": False,
    # two nights at once would only be in each other's way
    "max_active_runs": 1,
    "default_args": {
        "owner": "bp-spark",
        "retries": 3,
        "retry_delay": timedelta(minutes=5),
        "retry_exponential_backoff": True,
        "execution_timeout": timedelta(hours=4),
    },
    "tags": ["bp-spark"],
}
DAY = "{{ data_interval_end | ds }}"

with DAG(
    dag_id="bp_spark_nightly",
    description="A whole night, as of the end of the interval",
    schedule=CronDataIntervalTimetable("0 2 * * *", timezone=TIMEZONE),
    **COMMON,
):
    Stage(job="night", arguments=f"--date {DAY}")

with DAG(
    dag_id="bp_spark_weekly",
    description="Train, evaluate, and promote if it isn't worse",
    schedule=CronDataIntervalTimetable("0 12 * * 6", timezone=TIMEZONE),
    **COMMON,
):
    Stage(job="train")

with DAG(
    dag_id="bp_spark_maintenance",
    description="Join the small files of all tables, and delete those of old versions",
    schedule=CronDataIntervalTimetable("0 12 * * 0", timezone=TIMEZONE),
    **COMMON,
):
    Stage(job="maintain")
